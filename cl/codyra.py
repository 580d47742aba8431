"""CoDyRA: low-rank updates whose ranks are gated; gates that shrink to 0 take their rank away.

Paper: Lu et al., "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning
Vision-Language Models with Dynamic Rank-Selective LoRA", arXiv 2412.01004. Official code:
Artificer-AI-Lab/CoDyRA c1691e4, `loralib/codyra.py` and `models/codyra.py`, for CLIP; read, not
run: no recorded numbers exist. Every linear layer of the blocks computes, for each of q, k, v and
each other layer by itself,

    W x + sum over ranks i of g_i b_i (a_i . x)

with new a, b and g a task. In the first part of a task (`dense`) everything learns freely; after
it, gates are shrunk towards 0 after every step, by a threshold that rises in levels. When the next
task begins, ranks whose gate is 0 are dropped and the others become part of the weights.

As the code shrinks (`shrink=code`), a gate between one and two thresholds becomes 0 as well; the
usual soft threshold leaves it at what is above one (`soft`).

This is a port to vision transformers without a text encoder: an expanding linear head, trained by
the cross-entropy over the classes of the task, stands for the embedded class names, whose scores
of other tasks the official loss masks too. Its second term, from texts to images, has no
counterpart and is left out, and so are the updates of the text encoder.

Deviations that change no number: what a task leaves behind is kept as the factors of its ranks
beside the weights, not added to them (other rounding). q, k and v share a matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal, cast

import torch
from annotated_types import Ge, Le, MinLen
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.finetune import NAME, Finetune
from driftline.core.ranges import Count, NonNegative, Size, Unit
from driftline.core.stream import BOUNDARIES, Batch, Task
from driftline.kernels import adapter
from driftline.parts.adapters.adapter import Adapter, Product, kaiming
from driftline.parts.adapters.plan import Plan
from driftline.parts.optim import Optim


def projections(dim: int, out: int) -> int:
    """Of a linear layer: 3 of a fused qkv, each of which has updates of its own; else 1."""
    return 3 if out == 3 * dim else 1


class GatedLoRA(Product):
    """Ranks kept from earlier tasks, and new ones with a gate each.

    Args:
        dim, out: input and output width of the layer.
        rank: new ranks a projection.
        generator: of a, U(-1/sqrt(dim), 1/sqrt(dim)), and of the gates, N(0, 1); b starts at 0.
    """

    old_a: Tensor  # [R, dim]
    old_b: Tensor  # [out, R], gates included

    def __init__(
        self, dim: int, out: int, rank: Size, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.projections = projections(dim, out)
        ranks = self.projections * rank
        self.register_buffer("old_a", torch.zeros(0, dim))
        self.register_buffer("old_b", torch.zeros(out, 0))
        self.a, self.b = nn.Parameter(torch.empty(ranks, dim)), nn.Parameter(torch.zeros(out, rank))
        self.gate = nn.Parameter(torch.empty(ranks))
        self._start(generator)

    @torch.no_grad()
    def _start(self, generator: torch.Generator | None) -> None:
        self.a, self.b = (nn.Parameter(torch.zeros_like(p)) for p in (self.a, self.b))
        kaiming(self.a, generator)
        drawn = torch.empty(self.gate.shape).normal_(generator=generator)
        self.gate = nn.Parameter(drawn.to(self.gate))

    def gated(self) -> Tensor:
        """[out, ranks]: b times the gates, 0 where a rank is that of another projection."""
        return torch.block_diag(*self.b.chunk(self.projections)) * self.gate

    @torch.no_grad()
    def extend(self, generator: torch.Generator | None) -> None:
        """Keep the ranks whose gate is not 0 and start new ones (new parameters)."""
        kept = self.gate != 0
        self.old_a = torch.cat([self.old_a, self.a[kept]])
        self.old_b = torch.cat([self.old_b, self.gated()[:, kept]], 1)
        self._start(generator)

    def _call(self, x: Tensor, weight: float = 1.0, **residual: Any) -> Tensor:
        a, b = torch.cat([self.old_a, self.a]), torch.cat([self.old_b, self.gated()], 1)
        return adapter(x, a, b, scale=weight, **residual)


@torch.no_grad()
def shrink(gate: Tensor, threshold: float, rule: Literal["code", "soft"]) -> None:
    """Move every gate towards 0 by `threshold`, in place; see the top of the file."""
    above = gate.abs() > threshold
    less = torch.where(above, gate - threshold * gate.sign(), gate)
    gone = less.abs() < threshold if rule == "code" else ~above
    gate.copy_(torch.where(gone, 0.0, less))


class NewRanks(Finetune):
    """New ranks in every task beside those kept; rates that change with every step.

    Args:
        kind: makes the updates of a layer; they have `extend`, which a task begins with.
        at: linear layers, as patterns.
    """

    needs = Finetune.needs | {BOUNDARIES}
    unmergeable = "each task has ranks of its own, which add up"

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optim: Optim,
        kind: Callable[..., Adapter],
        at: list[str],
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optim=optim,
            loss_scope="current",
            freeze_bn=False,
            trains="all",
            adapter=Plan(at=at, blocks=None, kind=kind),
            penalty=None,
        )
        self.step = self.steps = 0  # of the task: so far, and in all

    @property
    def updates(self) -> list[Any]:
        """Those of every layer."""
        assert self.bank is not None
        return list(self.bank.adapters(NAME).values())

    def grow(self, task: Task) -> None:
        if self.seen:
            for update in self.updates:
                update.extend(self.rng("init"))
        self.step, self.steps = 0, self.train_epochs * task.steps
        super().grow(task)

    def begin_epoch(self, task: Task, epoch: int) -> None:
        """Nothing: `observe` sets the rates."""

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        self.task_optim.set_rates(self.optimizer, self.step, self.steps)
        logged = super().observe(batch)
        self.step += 1
        return logged

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class CoDyRA(NewRanks):
    """A frozen transformer, low-rank updates with gated ranks, an expanding linear head.

    Args:
        num_classes: classes of the whole stream.
        epochs: passes over the training images of a task.
        rank: new ranks a task, of q, k, v and of every other layer.
        at: linear layers that are updated, as patterns.
        dense: share of a task's steps before gates are shrunk.
        threshold: largest, reached in equal steps of time after that.
        levels: of the threshold from 0 on; where a task has fewer steps left, nothing is shrunk.
        shrink: `code` or `soft`, see the top of the file.
        optim: of the groups `backbone` (the new ranks) and `head`, made anew for each task. Its
            times (`rise`, `milestones`) count steps, not epochs.

    Raises:
        UserError: for a network without these layers.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        rank: Size,
        at: Annotated[list[str], MinLen(1)],
        dense: Unit,
        threshold: NonNegative,
        levels: Annotated[int, Ge(2), Le(10**9)],
        shrink: Literal["code", "soft"],
        optim: Optim,
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optim=optim,
            kind=partial(GatedLoRA, rank=rank),
            at=at,
        )
        self.dense, self.threshold, self.levels = dense, threshold, levels
        self.shrink: Literal["code", "soft"] = shrink

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if self.threshold and not self._width():
            self.warn_once(
                "levels",
                f"task {task.index} has {self.steps} steps, too few for strategy.levels="
                f"{self.levels} thresholds after strategy.dense={self.dense:g} of them: no gate is "
                "shrunk and every rank is kept. Lower strategy.levels, or raise strategy.epochs",
            )

    def _width(self) -> int:
        """Steps from one threshold to the next."""
        return int((self.steps - self.dense * self.steps) // self.levels)

    def threshold_at(self, step: int) -> float:
        """The threshold in a step of the task; it rises at multiples of the width."""
        start, width = self.dense * self.steps, self._width()
        if step < start or not width:
            return 0.0
        risen = step // width - math.ceil(start / width) + 1
        return self.threshold * min(self.levels - 1, risen) / (self.levels - 1)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step, then the gates; returns also how many of the new ranks are not 0."""
        step = self.step
        logged = super().observe(batch)
        gates = [cast(Tensor, update.gate) for update in self.updates]
        if step > self.dense * self.steps:
            for gate in gates:
                shrink(gate, self.threshold_at(step), self.shrink)
        return logged | {"ranks": torch.stack([g.count_nonzero() for g in gates]).sum()}

    def report(self) -> dict[str, float]:
        """Ranks that take part, of all layers and tasks."""
        kept = sum(len(u.old_a) + int(u.gate.count_nonzero()) for u in self.updates)
        return super().report() | {"ranks": kept}
