"""CODA-Prompt: keys and values that are sums of components, weighted by attention to the query.

Paper: Smith et al., "CODA-Prompt: COntinual Decomposed Attention-based Prompting for
Rehearsal-Free Continual Learning", CVPR 2023, arXiv 2211.13218.
Official code: GT-RIPL/CODA-Prompt 6417d4f; recorded from the port in LAMDA-CL/LAMDA-PILOT 5240714,
`models/coda_prompt.py` and `backbone/prompt.py`.

In some blocks, component m has a key k_m, an attention vector a_m and a prompt p_m. An image with
the query q (the class token of the network without prompts) gets sum_m cos(q * a_m, k_m) p_m, half
of it keys, half values. Each task adds components of its own, orthogonal to the earlier ones when
they are made; the earlier ones take part and do not learn. Loss: cross-entropy over the classes of
the task, plus `ortho` times a penalty.

As in the official codes: the scheduler sets its counter back after the first step, so that the
first two epochs run at the full rate and the last one ends above the intended rate
(`optim.schedule=quarter_cosine`); a last batch that is smaller than the others is dropped.

Deviations that change no number: components of later tasks, which are zero and take no part, do
not exist yet, so that a stream may have more tasks than planned. Cosines come from two products of
matrices, orthogonal vectors from one product each (rounding). With one epoch, for which the
official scheduler divides by 0, the rate is the full one. A task smaller than a batch is learned
from that batch. The query of a test image is computed again in every evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from annotated_types import MinLen
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.prompted import NAME, Prompted
from driftline.core.errors import UserError
from driftline.core.ranges import Count, CountOrZero, NonNegative, Size
from driftline.core.stream import OWN_CLASSES, Batch, Task
from driftline.parts.adapters.prefix import Rows
from driftline.parts.optim import Optim

BATCH = "batch"  # images of the largest batch so far, kept with the optimiser's state


def orthogonal(old: Tensor, drawn: Tensor) -> Tensor:
    """Gram-Schmidt: `drawn` [n, d] without its parts along `old` [m, d] and along each other.

    Rows of `old` need not be orthogonal; each is projected out by itself. Returns unit vectors.
    """
    basis = old
    for row in drawn:
        shares = (basis @ row) / basis.square().sum(1).clamp_min(1e-30)
        basis = torch.cat([basis, (row - shares @ basis)[None]])
    return F.normalize(basis[len(old) :], dim=1)


def overlap(rows: Tensor) -> Tensor:
    """Mean square of the entries of M M' - I, for M [m, d]."""
    return (rows @ rows.T - torch.eye(len(rows), device=rows.device)).square().mean()


class Components(Rows):
    """Keys and values mixed from components by the queries [B, D] in the context."""

    reads_context = True

    def __init__(self, dim: int, width: int, length: int) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(0, dim))
        self.attention = nn.Parameter(torch.empty(0, dim))
        self.prompt = nn.Parameter(torch.empty(0, 2 * length, width))
        self.old = 0  # components of earlier tasks

    @torch.no_grad()
    def extend(self, count: int, generator: torch.Generator) -> None:
        """Add `count` components, orthogonal to those that are there; the parameters are new."""
        self.old = len(self.key)
        for name in ("prompt", "key", "attention"):
            held = getattr(self, name).detach()
            flat = held.flatten(1)
            drawn = torch.randn(count, flat.shape[1], generator=generator).to(flat)
            new = orthogonal(flat, drawn).view(count, *held.shape[1:])
            setattr(self, name, nn.Parameter(torch.cat([held, new])))

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, attention vectors [m, D] and prompts [m, 2 * length, D]; old ones without graph."""
        every = self.key, self.attention, self.prompt
        key, attention, prompt = (
            torch.cat([p[: self.old].detach(), p[self.old :]]) if self.old else p for p in every
        )
        return key, attention, prompt

    def rows(self) -> tuple[Tensor, Tensor]:
        assert self.context is not None
        query = self.context
        key, attention, prompt = self.parts()
        length = (query.square() @ attention.square().T).clamp_min(1e-24).sqrt()
        weights = (query @ (attention * F.normalize(key, dim=1)).T) / length
        keys, values = torch.einsum("bm,mld->bld", weights, prompt).chunk(2, 1)
        return keys, values

    def overlap(self) -> Tensor:
        """Penalty of this block."""
        return torch.stack([overlap(part.flatten(1)) for part in self.parts()]).sum()


class CodaPrompt(Prompted):
    """Components in some blocks, some more for each task.

    Args:
        pool: components for the whole stream, in each block; a task gets pool / tasks, rounded
            down.
        tasks: of the stream, for that division; None: classes of the stream over those of the first
            task, rounded up. A task beyond them gets as many components again.
        length: rows added to the keys and to the values each.
        blocks: numbers of the blocks with prompts.
        ortho: weight of the mean square by which the products of the keys, of the attention vectors
            and of the prompts of a block differ from those of orthonormal ones, summed over blocks.
        drop_last: leave out the batch of an epoch that is smaller than the others.
        num_classes, epochs, optim: see `Prompted`; groups `prompts` and `head`.

    Raises:
        UserError: for a pool smaller than the number of tasks, more components than orthogonal
            vectors of the network's width, or blocks of which the network has none.
    """

    needs = Prompted.needs | {OWN_CLASSES}

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optim: Optim,
        pool: Size,
        tasks: Count | None,
        length: Size,
        blocks: Annotated[list[CountOrZero], MinLen(1)],
        ortho: NonNegative,
        drop_last: bool,
    ) -> None:
        super().__init__(backbone, seed=seed, num_classes=num_classes, epochs=epochs, optim=optim)
        self.num_classes, self.pool, self.tasks = num_classes, pool, tasks
        self.ortho, self.drop_last = ortho, drop_last
        self.count = self.planned = 0  # components of a task, and of the tasks planned
        points = self.places(blocks, "strategy.blocks")
        self.bank.add(NAME, {p: Components(backbone.dim, backbone.width, length) for p in points})

    @torch.no_grad()
    def start_head(self, head: nn.Linear, generator: torch.Generator) -> None:
        """Initial values, biases too: U(-1/sqrt(D), 1/sqrt(D))."""
        bound = head.in_features**-0.5
        head.weight.uniform_(-bound, bound, generator=generator)
        head.bias.uniform_(-bound, bound, generator=generator)

    @property
    def components(self) -> Sequence[Components]:
        """Block by block."""
        return [cast(Components, a) for a in self.bank.adapters(NAME).values()]

    def grow(self, task: Task) -> None:
        if not self.count:
            tasks = self.tasks or math.ceil(self.num_classes / len(task.classes))
            self.count = self.pool // tasks
            if not self.count:
                raise UserError(
                    f"strategy.pool={self.pool} components are too few for {tasks} tasks; enlarge "
                    f"it to at least {tasks}, or set strategy.tasks"
                )
            self.planned = self.count * tasks
        there, width = self.components[0].key.shape
        if (needed := max(self.planned, there + self.count)) > width:
            raise UserError(
                f"task {task.index}: {needed} components in a block cannot all be orthogonal, as "
                f"their keys have {width} values. Lower strategy.pool (now {self.pool}), or set "
                "strategy.tasks to the number of tasks"
            )
        for block in self.components:
            block.extend(self.count, self.rng("init"))
        super().grow(task)
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group[BATCH] = 0

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if len(self.components[0].key) > self.pool:
            self.warn_once(
                "pool",
                f"task {task.index}: strategy.pool={self.pool} is used up, as the stream has more "
                f"tasks than its first one shows; {self.count} components are added for each. Set "
                "strategy.tasks to divide the pool among all",
            )

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """As `Prompted.observe`; nothing for a dropped batch."""
        assert self.optimizer is not None
        facts = self.optimizer.param_groups[0]
        facts[BATCH] = max(facts[BATCH], len(batch.y))
        if self.drop_last and len(batch.y) < facts[BATCH]:
            return {}
        return super().observe(batch)

    def context(self, query: Tensor) -> Tensor:
        return query

    def penalty(self, query: Tensor, context: Tensor) -> Tensor | float:
        if not self.ortho:
            return 0.0
        return self.ortho * torch.stack([block.overlap() for block in self.components]).sum()
