"""SD-LoRA: directions of finished low-rank updates stay, all magnitudes are learned.

Paper: Wu et al., "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning",
ICLR 2025, openreview 5U1rlpX68A. Official code: WuYichen-97/SD-Lora-CL 8bacded, `backbone/lora.py`
and `models/sdlora.py`. In task t, queries and values of every attention layer get

    sum over i < t of alpha_i B_i A_i z / (|B_i|_F |A_i|_F)  +  alpha_t B_t A_t z

with one scalar alpha_i a task for the whole network. The new pair, all magnitudes and the head
learn, from the cross-entropy over the classes of the task. No image is kept, no task is guessed.

As in the official code, the new pair is divided by its norms only when it is finished, and every
magnitude starts again (`restart`): the function of the network changes where a task begins, while
the older rows of the head stay as they are.

Deviations that change no number: the finished pairs of a layer are one product whose columns are
scaled; evaluation can add all pairs to the weights (other rounding); the term of orthogonality,
which the official code computes and leaves out of the loss, is not computed. A finished pair that
is 0, for which the official code divides 0 by 0, adds nothing. More than 21 tasks are possible.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.olora import StackedLoRA
from driftline.cl.stacked import NAME, Stacked
from driftline.core.ranges import Count, Positive, Size
from driftline.core.stream import Task
from driftline.parts.heads import ExpandingLinear
from driftline.parts.optim import Optim


class DecoupledLoRA(StackedLoRA):
    """Finished pairs of unit norm and a new pair, each times the magnitude of its task.

    Args:
        dim, out: width d of the tokens, and 3d, of the layer's output.
        rank: of one task.
        generator: of the new A, U(-1/sqrt(d), 1/sqrt(d)); the new B starts at 0.
    """

    def __init__(
        self, dim: int, out: int, rank: Size, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(dim, out, rank, alpha=rank, dropout=0.0, generator=generator)
        self.magnitudes = nn.Parameter(torch.ones(1))  # [tasks], one object in all layers

    def factors(self) -> tuple[Tensor, Tensor]:
        a, b = super().factors()
        return a, b * self.magnitudes.repeat_interleave(self.rank)

    @torch.no_grad()
    def extend(self, generator: torch.Generator) -> None:
        """Divide the current pair by its norms, add it to the finished ones, start a fresh one."""
        self.old_a = torch.cat([self.old_a, unit_norm(self.a)], 1)
        self.old_b = torch.cat([self.old_b, unit_norm(self.b)], 2)
        self._start(generator)


def unit_norm(m: Tensor) -> Tensor:
    """Matrices [M, ., .], each divided by its Frobenius norm; one that is 0 stays 0."""
    norm = torch.linalg.vector_norm(m, dim=(1, 2), keepdim=True)
    return m / norm.masked_fill(norm == 0, 1)


class SDLoRA(Stacked):
    """A frozen transformer, decoupled low-rank updates of all tasks, an expanding linear head.

    Args:
        epochs: passes over the training images of a task.
        rank: of the pair of one task.
        magnitude: initial value of each.
        restart: every magnitude starts again in every task; False: those of earlier tasks go on
            from what they were.
        optim: of the groups `adapter` (the new pairs), `magnitudes` and `head`, made anew for each
            task.
        evaluation: `merged`: the updates are added to the weights while predicting; `branches`:
            computed beside them. Equal up to rounding.

    Raises:
        UserError: for a network without fused qkv layers.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        epochs: Count,
        rank: Size,
        magnitude: Positive,
        restart: bool,
        optim: Optim,
        evaluation: Literal["merged", "branches"],
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            epochs=epochs,
            optim=optim,
            evaluation=evaluation,
            kind=partial(DecoupledLoRA, rank=rank),
        )
        self.magnitude, self.restart = magnitude, restart
        self._share(torch.full((1,), magnitude))
        self.head = ExpandingLinear(backbone.dim)
        self.begun = 0  # tasks

    def first_draws(self) -> torch.Generator:
        return self.rng("init")

    @property
    def magnitudes(self) -> nn.Parameter:
        """Of the tasks so far, the newest last."""
        return self.loras[0].magnitudes

    def _share(self, values: Tensor) -> None:
        magnitudes = nn.Parameter(values.to(self.device))
        for lora in self.loras:
            lora.magnitudes = magnitudes

    # ------------------------------------------------------------------ tasks

    def grow(self, task: Task) -> None:
        if self.begun:
            for lora in self.loras:
                lora.extend(self.rng("init"))
            old = self.magnitudes.detach()
            fresh = old.new_full((self.begun + 1,), self.magnitude)
            self._share(fresh if self.restart else torch.cat([old, fresh[:1]]))
        self.begun += 1
        self.seen = max(self.seen, task.classes.stop)
        self.head.grow(self.seen, self.rng("init"))
        self.columns = task.own
        self.task_optim = self.optim.of_task(task.index)
        groups = {
            "adapter": [p for lora in self.loras for p in (lora.a, lora.b)],
            "magnitudes": [self.magnitudes],
            "head": self.head.parameters(),
        }
        self.optimizer = self.task_optim.optimizer(groups, self.bank.second_factors(NAME))
