"""CL-LoRA: adapters of the lower blocks shared by all tasks, those of the upper ones by none.

Paper: He et al., "CL-LoRA: Continual Low-Rank Adaptation for Rehearsal-Free Class-Incremental
Learning", CVPR 2025. Official code: JiangpengHe/CL-LoRA df4e74e, `models/cllora.py` and
`backbone/vit_cllora.py`.

Low-rank updates of queries and values with orthonormal down-projections. In the lower blocks only
the up-projections learn, through all tasks; each batch first pulls them to where they were before
the task (distillation through the lower blocks alone), row by row as strongly as the row was long.
The upper blocks have a new pair each task, times a learned weight a block that is kept away from
those of earlier tasks. A class is scored by the cosine with its mean in its own task's subspace.

As in the official code: both steps share one optimiser and its momentum; teacher and student go
through the head that learns, which the distillation moves too; subspaces of earlier tasks are
evaluated with the shared adapters of today, their means stay as they were; the weights of keys are
decayed and kept apart, and multiply nothing.

`second_gradient=stale`: the official loop computes the classification loss before the first step
and its gradient after it, so that activations from before meet weights from after. Current torch
stops there with an error; the recorded run, and this option, pass over that check.

Deviations that change no number: means of new classes in the subspaces of earlier tasks, which no
score reads, are not computed. Shared rows that are all 0, for which the official code divides 0 by
0, are pulled equally.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import _unsafe_preserve_version_counter as unchecked

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Count, NonNegative, Positive, Size
from driftline.core.strategy import CLStrategy
from driftline.core.stream import OWN_CLASSES, Batch, Task
from driftline.kernels import adapter
from driftline.parts.adapters.adapter import Adapter
from driftline.parts.adapters.plan import Plan
from driftline.parts.heads import CosineHead, PrototypeHead
from driftline.parts.modes import evaluation_mode
from driftline.parts.optim import Optim

GENERAL, TEACHER = "general", "teacher"  # sets: shared by all tasks, and as before this task


class OrthogonalLoRA(Adapter):
    """Low-rank updates of q and v in a fused qkv; down-projections start with orthonormal rows.

    Args:
        dim, out: width d of the tokens, and 3d, of the layer's output.
        rank: at most d.
        own: of one task: the down-projections learn, and so do weights of q, k and v, which start
            at U(0.5, 1.5); that of k multiplies nothing.
        generator: of the down-projections and the weights; the up-projections start at 0.

    Raises:
        UserError: for a layer that is no fused qkv, or a rank above its width.
    """

    down: Tensor  # [2, r, d]

    def __init__(
        self, dim: int, out: int, rank: Size, *, own: bool, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if out != 3 * dim:
            raise UserError(f"CL-LoRA needs a fused qkv layer (D to 3 D), not {dim} to {out}")
        if rank > dim:
            raise UserError(
                f"strategy.rank={rank}: so many orthonormal rows of length {dim} do not exist; "
                f"at most {dim}"
            )
        drawn = torch.rand(2, dim, rank, generator=generator)
        down = torch.linalg.qr(drawn).Q.mT.contiguous()
        self.weights = None
        if own:
            self.down = nn.Parameter(down)
            self.weights = nn.Parameter(torch.empty(3).uniform_(0.5, 1.5, generator=generator))
        else:
            self.register_buffer("down", down)
        self.up = nn.Parameter(torch.zeros(2, dim, rank))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., 3d], zeros in the rows of k."""
        both = adapter(x.flatten(0, -2).expand(2, -1, -1), self.down, self.up)
        q, v = both.unbind() if self.weights is None else both * self.weights[::2, None, None]
        return torch.cat([q, torch.zeros_like(q), v], -1).view(*x.shape[:-1], -1)


def row_weights(up: Tensor) -> Tensor:
    """Lengths of the rows of [M, d, r] over their mean in the matrix, [M, d, 1]; 1 if all are 0."""
    length = torch.linalg.vector_norm(up, dim=2, keepdim=True)
    mean = length.mean(1, keepdim=True)
    return torch.where(mean > 0, length / mean, 1.0)


class CLLoRA(CLStrategy):
    """Shared and own low-rank adapters in a bank, a temporary head, a mean a class.

    Args:
        epochs: passes over the training images of a task.
        rank: of every update.
        general: blocks, from the first on, whose adapters all tasks share; None: half of them.
        distillation: weight of the first step's loss.
        temperature: of both softmaxes in it.
        apart: weight of the mean |cosine| between the block weights and those of earlier tasks.
        second_gradient: of the classification loss. `stale`: the activations are of before the
            first step, as in the official code; `fresh`: computed anew after it.
        optim: of the groups `general`, `adapter` and `head`, made anew for each task.

    Raises:
        UserError: for a network without fused qkv layers, or without blocks beyond `general`.
    """

    needs = frozenset({"features", OWN_CLASSES})
    unmergeable = "its task adapters score the classes of their own tasks"
    owner: Tensor  # int64 [C], task of each class; -1: no mean yet

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        epochs: Count,
        rank: Size,
        general: Count | None,
        distillation: NonNegative,
        temperature: Positive,
        apart: NonNegative,
        second_gradient: Literal["stale", "fresh"],
        optim: Optim,
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.epochs, self.temperature = epochs, temperature
        self.distillation, self.apart = distillation, apart
        self.second_gradient = second_gradient
        self.optim = self.task_optim = optim
        backbone.eval().requires_grad_(False)
        every = Plan(
            at=["blocks.*.attn.qkv:out"],
            blocks=None,
            kind=partial(OrthogonalLoRA, rank=rank, own=False),
        )
        self.bank = every.bank(backbone)
        count = len(every.points(backbone))
        self.general = count // 2 if general is None else general
        if not 0 < self.general < count:
            raise UserError(
                f"strategy.general={general}: the network has {count} blocks; between 1 and "
                f"{count - 1} of them can be shared, the others are the task's own"
            )
        lower, upper = range(self.general), range(self.general, count)
        self.plans = [
            Plan(at=every.at, blocks=list(b), kind=partial(OrthogonalLoRA, rank=rank, own=own))
            for b, own in ((lower, False), (upper, True))
        ]
        self.plans[0].add(self.bank, GENERAL, self.rng("init"))
        self.names: list[str] = []  # sets, one a task
        self.head: CosineHead | None = None
        self.prototypes = PrototypeHead(backbone.dim)
        self.register_buffer("owner", torch.zeros(0, dtype=torch.int64))
        self.columns = range(0)

    def loras(self, name: str) -> list[OrthogonalLoRA]:
        """Adapters of a set, block by block."""
        return [cast(OrthogonalLoRA, a) for a in self.bank.adapters(name).values()]

    def block_weights(self, name: str) -> Tensor:
        """Weights of the blocks of one task, [3 * blocks]."""
        return torch.cat([cast(Tensor, lora.weights) for lora in self.loras(name)])

    # ------------------------------------------------------------------ tasks

    def grow(self, task: Task) -> None:
        if self.names:
            self.bank.freeze(self.names[-1])
            if len(self.names) > 1:
                self.bank.remove(TEACHER)
            self.bank.copy(GENERAL, TEACHER)
            self.bank.freeze(TEACHER)
        name, draws = f"task{task.index}", self.rng("init")
        self.names.append(name)
        own = self.plans[1].add(self.bank, name, draws)
        self.head = CosineHead(self.prototypes.sums.shape[1], len(task.classes), draws)
        self.head.to(self.device)
        self.columns = task.classes
        self.prototypes.grow(task.classes.stop)
        self.owner = F.pad(self.owner, (0, self.prototypes.classes - len(self.owner)), value=-1)
        self.task_optim = self.optim.of_task(task.index)
        self.optimizer = self.task_optim.optimizer(
            {
                "general": self.bank.parameters_of(GENERAL),
                "adapter": own,
                "head": self.head.parameters(),
            },
            [lora.up for set_ in (GENERAL, name) for lora in self.loras(set_)],
        )

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if len(task.classes) == 1:
            self.warn_once(
                "one class",
                f"task {task.index} has one class: the loss over its own classes is 0 and its "
                "adapters stay as they were made (scenario.increment sets the classes of a task)",
            )

    def begin_epoch(self, task: Task, epoch: int) -> None:
        self.task_optim.set_rates(self.optimizer, epoch, self.epochs)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Means of the classes of `task` in its own subspace."""
        rows = slice(task.classes.start, task.classes.stop)
        self.prototypes.sums[rows], self.prototypes.counts[rows] = 0, 0
        for batch in task.fit():
            batch = batch.to(self.device)
            self.prototypes.update(self.subspace(batch.x, self.names[-1]), batch.y)
        there = self.prototypes.counts[rows] > 0
        self.owner[rows] = torch.where(there, len(self.names) - 1, -1)

    # ------------------------------------------------------------------ training

    def features(self, x: Tensor, name: str) -> Tensor:
        """[B, 3, H, W] -> [B, D] in the subspace of one task."""
        return self.bank.features(x, {GENERAL: 1.0, name: 1.0})

    @contextmanager
    def lower_blocks(self) -> Generator[None]:
        """Inside, the network ends after the shared blocks (and its final norm)."""
        net: Any = self.backbone.net
        every = net.blocks
        try:
            net.blocks = every[: self.general]
            yield
        finally:
            net.blocks = every

    def distil(self, x: Tensor) -> Tensor:
        """The first step; returns its loss."""
        loss = self._pull(x)
        self.task_optim.update(self.optimizer, lambda: self._pull(x))
        return loss

    def _pull(self, x: Tensor) -> Tensor:
        """Gradients of the distillation, and its loss."""
        assert self.head is not None
        with self.lower_blocks():
            student, teacher = (self.bank.features(x, name) for name in (GENERAL, TEACHER))
        student, teacher = (self.head(f) / self.temperature for f in (student, teacher))
        cross = (teacher.softmax(1) * student.log_softmax(1)).sum(1)
        loss = -self.distillation * cross.mean()
        self.task_optim.backward(self.optimizer, loss)
        for lora, old in zip(self.loras(GENERAL), self.loras(TEACHER), strict=True):
            assert lora.up.grad is not None
            lora.up.grad *= row_weights(old.up)
        return loss.detach()

    def penalty(self) -> Tensor | float:
        """`apart` times the mean |cosine| of the block weights with those of earlier tasks."""
        *earlier, name = self.names
        if not earlier:
            return 0.0
        old = torch.stack([self.block_weights(one) for one in earlier])
        new = F.normalize(self.block_weights(name), dim=0)
        return self.apart * (F.normalize(old, dim=1) @ new).abs().mean()

    def classification(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores of the classes of the task, and their cross-entropy."""
        assert self.head is not None
        scores = self.head(self.features(batch.x, self.names[-1]))
        return scores, F.cross_entropy(scores, batch.y - self.columns.start)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step, two from the second task on; returns the losses and the accuracy in percent.

        Raises:
            Diverged: for a loss that is not finite, before the step.
        """
        assert self.optimizer is not None
        self.bank.train()
        logged: dict[str, Tensor] = {}
        later, stale = len(self.names) > 1, self.second_gradient == "stale"
        if later and not stale:
            logged["distillation"] = self.distil(batch.x)
        scores, loss = self.classification(batch)
        if later and stale:
            moved = [p for group in self.optimizer.param_groups for p in group["params"]]
            with unchecked(tuple(moved)):
                logged["distillation"] = self.distil(batch.x)
        loss = loss + self.penalty()
        self.task_optim.step(
            self.optimizer, loss, lambda: self.classification(batch)[1] + self.penalty()
        )
        right = scores.detach().argmax(1) == batch.y - self.columns.start
        return {"loss": loss.detach(), "acc": 100 * right.float().mean(), **logged}

    # ------------------------------------------------------------------ prediction

    @torch.no_grad()
    def subspace(self, x: Tensor, name: str) -> Tensor:
        """`features` in evaluation mode."""
        with evaluation_mode(self):
            return self.features(x, name)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen] for x float [B, 3, H, W] in [0, 1]; 0 for a class without a mean."""
        scores = x.new_zeros(len(x), len(self.owner))
        for task, name in enumerate(self.names):
            if (own := self.owner == task).any():
                scores = torch.where(own, self.prototypes(self.subspace(x, name)), scores)
        return scores
