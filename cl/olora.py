"""O-LoRA: one low-rank update a task, each pushed to be orthogonal to all earlier ones.

Paper: Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning", EMNLP
Findings 2023, arXiv 2310.14152. Official code: cmnfriend/O-LoRA 07117e1, for T5 and LLaMA.

This is a port to vision transformers; the authors report none. From the official code: the query
and the value projection of every attention layer are adapted, s = alpha / r of one task scales the
old and the new branch, one dropout mask serves both, and while a pair (A, B) is trained

    loss = cross-entropy + lambda1 * sum over maps |A_old A^T| + lambda2 * sum (|A|_F + |B|_F)

where |A_old A^T| sums absolute values. Only the new pair learns. (The paper writes that penalty
for the up-projections, its A; the code has it on the down-projections, and so has this file.)

Choices of the port: q and v are rows [0, d) and [2d, 3d) of timm's fused qkv; the head is an
expanding linear layer that starts near 0 and is trained with the pair.

Deviations: the penalty is one batched product instead of a loop over parameter names; q and v
share a matrix product. Earlier pairs are taken over when the next task begins, not when a task
ends, and evaluation can add all pairs to the weights: the same functions, other rounding. A
penalty of exactly 0 beside earlier tasks, which the official loader can cause unseen, is an error.
Dropout draws from torch's global generator, like that of any network; checkpoints contain it.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, cast

import torch
from annotated_types import MinLen
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.distributed import dropout
from driftline.core.errors import UserError
from driftline.core.ranges import Below1, Count, NonNegative, Size
from driftline.core.strategy import CLStrategy
from driftline.core.stream import BOUNDARIES, Batch, Task
from driftline.kernels import adapter
from driftline.parts.adapters.adapter import Adapter
from driftline.parts.adapters.plan import Plan
from driftline.parts.heads import NearZeroLinear
from driftline.parts.modes import evaluation_mode
from driftline.parts.objectives import scope_columns, scoped_cross_entropy
from driftline.parts.optim import SameOptim


class StackedLoRA(Adapter):
    """Low-rank updates of q and v in a fused qkv: those of earlier tasks stacked, and a new pair.

    Args:
        dim, out: width d of the tokens, and 3d, of the layer's output.
        rank: r of one task.
        alpha: the factor of both branches is alpha / rank.
        dropout: on the input, in training only; q and v draw a mask each.
        generator: of the new A, U(-1/sqrt(d), 1/sqrt(d)); the new B starts at 0.

    Raises:
        UserError: for a layer that is no fused qkv.
    """

    old_a: Tensor  # [2, R, d]
    old_b: Tensor  # [2, d, R]

    def __init__(
        self,
        dim: int,
        out: int,
        rank: Size,
        *,
        alpha: NonNegative,
        dropout: Below1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if out != 3 * dim:
            raise UserError(
                f"O-LoRA's own updates need a fused qkv layer (D to 3 D), not {dim} to {out}: "
                "leave strategy.adapter.at as it is, or use adapter=lora"
            )
        self.dim, self.rank, self.scale, self.dropout = dim, rank, alpha / rank, dropout
        self.register_buffer("old_a", torch.zeros(2, 0, dim))
        self.register_buffer("old_b", torch.zeros(2, dim, 0))
        self.a = nn.Parameter(torch.empty(2, rank, dim))
        self.b = nn.Parameter(torch.zeros(2, dim, rank))
        self._start(generator)

    def _start(self, generator: torch.Generator | None) -> None:
        bound = self.dim**-0.5
        drawn = torch.empty(self.a.shape).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(drawn.to(self.a))
        self.b = nn.Parameter(torch.zeros_like(self.b))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [2, R + r, d] and B [2, d, R + r] of all tasks so far, the newest last."""
        return torch.cat([self.old_a, self.a], 1), torch.cat([self.old_b, self.b], 2)

    @torch.no_grad()
    def extend(self, generator: torch.Generator) -> None:
        """Add the current pair to the earlier ones and start a fresh one (new parameters)."""
        self.old_a, self.old_b = self.factors()
        self._start(generator)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.a, self.b, strict=True))

    def _both(self, x: Tensor) -> Tensor:
        """The input of q's and of v's branch, [2, rows, d]."""
        x = x.flatten(0, -2).expand(2, -1, -1)
        return dropout(x, self.dropout, dim=1) if self.training and self.dropout else x

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., 3d], zeros in the rows of k."""
        q, v = adapter(self._both(x), *self.factors(), scale=self.scale).unbind()
        return torch.cat([q, torch.zeros_like(q), v], -1).view(*x.shape[:-1], 3 * self.dim)

    def add(self, x: Tensor, base: Tensor, weight: float = 1.0) -> Tensor:
        old = base.reshape(-1, 3, self.dim).transpose(0, 1)  # q, k, v
        scale = weight * self.scale
        q, v = adapter(self._both(x), *self.factors(), scale=scale, base=old[::2]).unbind()
        return torch.cat([q, old[1], v], -1).view(base.shape)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the branches amount to as a change of the weight, [3d, d]."""
        a, b = self.factors()
        q, v = (self.scale * (b @ a)).unbind()
        return torch.cat([q, torch.zeros_like(q), v])


def orthogonality(a: Tensor, old: Tensor) -> Tensor:
    """Per map the sum of |A_old A^T|: a [M, r, d], old [M, R, d] -> [M]."""
    return (old @ a.mT).abs().sum((1, 2))


def norms(a: Tensor, b: Tensor) -> Tensor:
    """Sum over maps of the (not squared) Frobenius norms: a [M, r, d], b [M, d, r] -> [].

    The gradient of the norm of a zero matrix is 0, as at the start of a task.
    """
    return sum((torch.linalg.vector_norm(m, dim=(1, 2)).sum() for m in (a, b)), a.new_zeros(()))


@contextmanager
def merged(layers: Sequence[nn.Linear], deltas: Iterable[Tensor]) -> Generator[None]:
    """Inside, the weights contain `deltas`, one a layer; afterwards they are the same tensors."""
    before = [layer.weight for layer in layers]
    try:
        for layer, delta in zip(layers, deltas, strict=True):
            total = layer.weight + delta.to(layer.weight)
            layer.weight = nn.Parameter(total, requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.weight = weight


class OLoRA(CLStrategy):
    """A frozen transformer, low-rank updates of all tasks so far, an expanding linear head.

    Args:
        epochs: passes over the training images of a task.
        adapter: of a task; of kinds that add low-rank products.
        lambda1: weight of the penalty; a list has one value a task, its last one goes on.
        lambda2: weight of the norms of the new pair.
        ortho_reduction: `sum`, or divided by the number of earlier tasks.
        head: `linear_local`: cross-entropy over the classes of the task, so that only their rows
            learn. `linear_global`: over all classes seen, all rows learn.
        optim: of the groups `adapter` and `head`, made anew for each task.
        evaluation: `merged`: the updates are added to the weights while predicting; `branches`:
            computed beside them, as those of other kinds than `StackedLoRA` always are. Equal up
            to rounding.

    Raises:
        UserError: for adapters whose tasks cannot be summed, or points that the network lacks.
    """

    needs = frozenset({"features", BOUNDARIES})
    averageable = True
    unmergeable = "it adds up the updates of all tasks, each in tensors of its own"

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        epochs: Count,
        adapter: Plan,
        lambda1: NonNegative | Annotated[list[NonNegative], MinLen(1)],
        lambda2: NonNegative,
        ortho_reduction: Literal["sum", "mean_over_old_tasks"],
        head: Literal["linear_local", "linear_global"],
        optim: SameOptim,
        evaluation: Literal["merged", "branches"],
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.epochs, self.optim = epochs, optim
        self.lambda1 = list(lambda1) if isinstance(lambda1, list) else [lambda1]
        self.lambda2, self.ortho_reduction = lambda2, ortho_reduction
        self.evaluation = evaluation
        self.scope: Literal["current", "seen"] = "current" if head == "linear_local" else "seen"

        backbone.eval().requires_grad_(False)
        self.adapter, self.bank = adapter, adapter.bank(backbone)
        adapter.add(self.bank, "task0", self.rng("init"))
        self.sets = ["task0"]  # one a task; `StackedLoRA` holds all tasks in the first
        self.layers: list[Any] = [module for _, module in adapter.points(backbone)]
        own = self.bank.adapters("task0")
        self.stacked = all(isinstance(a, StackedLoRA) for a in own.values())
        self.names = [f"{p} {i}" for p, a in own.items() for i in range(len(a.pairs()))]
        for point, one in own.items():
            if not one.pairs() or not point.endswith((":out", ":parallel")):
                raise UserError(
                    f"strategy=olora: {type(one).__name__} at {point} adds no product of two "
                    "learned factors, but O-LoRA sums those of all tasks and keeps their inputs "
                    "apart. Use adapter=olora, lora (without a start that is taken off), "
                    "dual_rank, bottleneck, mosa or peft/lora"
                )
        self.head = NearZeroLinear(backbone.dim)
        self.seen = 0
        self.begun = 0  # tasks
        self.columns: Sequence[int] = range(0)
        self._checked = False

    @property
    def loras(self) -> list[StackedLoRA]:
        """The updates of all tasks, block by block, where they are of that kind."""
        return [cast(StackedLoRA, a) for a in self.bank.adapters("task0").values()]

    # ------------------------------------------------------------------ tasks

    def grow(self, task: Task) -> None:
        if self.begun and self.stacked:
            for lora in self.loras:
                lora.extend(self.rng("init"))
        elif self.begun:
            self.bank.freeze(self.sets[-1])
            self.sets.append(f"task{self.begun}")
            self.adapter.add(self.bank, self.sets[-1], self.rng("init"))
        self.begun += 1
        self.seen = max(self.seen, task.classes.stop)
        self.head.grow(self.seen, self.rng("init"))
        self.columns = scope_columns(self.scope, task.own, self.seen, self.seen)
        own = self.sets[-1]
        groups = {"adapter": self.bank.parameters_of(own), "head": self.head.parameters()}
        self.optimizer = self.optim.optimizer(groups, self.bank.second_factors(own))
        self._checked = False

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if len(self.columns) == 1:
            self.warn_once(
                "one class",
                f"task {task.index} has one class in its softmax: the cross-entropy is 0 and the "
                "class is not learned; strategy.head=linear_global compares it with earlier ones",
            )
        first = next(iter(self.bank.adapters(self.sets[-1]).values()))
        rank, width = first.pairs()[0][0].shape
        if self.begun * rank > width >= (self.begun - 1) * rank:
            warnings.warn(
                f"the ranks of {self.begun} tasks exceed the width {width}: not all updates "
                "can be orthogonal any more",
                stacklevel=2,
            )

    def begin_epoch(self, task: Task, epoch: int) -> None:
        self.optim.set_rates(self.optimizer, epoch, self.epochs)

    # ------------------------------------------------------------------ training

    def penalties(self) -> tuple[Tensor, Tensor]:
        """Orthogonality per map [M] (zeros in the first task) and the norm term []."""
        if not self.stacked:
            return self._penalties_of_sets()
        loras = self.loras
        a, b = torch.cat([m.a for m in loras]), torch.cat([m.b for m in loras])
        return orthogonality(a, torch.cat([m.old_a for m in loras])), norms(a, b)

    def _penalties_of_sets(self) -> tuple[Tensor, Tensor]:
        *earlier, new = [
            [pair for a in self.bank.adapters(name).values() for pair in a.pairs()]
            for name in self.sets
        ]
        omega = []
        for i, (a, _) in enumerate(new):
            old = torch.cat([a.detach()[:0], *(pairs[i][0] for pairs in earlier)])
            omega.append(orthogonality(a[None], old[None]))
        return torch.cat(omega), torch.stack([norms(a[None], b[None]) for a, b in new]).sum()

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D] with the updates of all tasks so far."""
        return self.bank.features(x, dict.fromkeys(self.sets, 1.0))

    def _check(self, omega: Tensor) -> None:
        """Once a task and after every resume: all earlier updates take part in the penalty."""
        if self.begun > 1 and not self._checked:
            zero = [n for n, v in zip(self.names, omega.tolist(), strict=True) if v == 0]
            if zero:
                raise RuntimeError(
                    f"the orthogonality penalty of {zero[0]} is exactly 0 in task "
                    f"{self.begun - 1} ({len(zero)} of {len(self.names)} maps): the updates of "
                    "earlier tasks are missing or were not loaded"
                )
        self._checked = True

    def losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Scores [B, C_seen]; the loss and its parts before weighting, 0-dim."""
        scores = self.head(self.features(batch.x))
        task_loss = scoped_cross_entropy(scores, batch.y, self.columns)
        omega, norm = self.penalties()
        self._check(omega.detach())
        if self.ortho_reduction == "mean_over_old_tasks" and self.begun > 1:
            omega = omega / (self.begun - 1)
        omega = omega.sum()
        lambda1 = self.lambda1[min(self.begun, len(self.lambda1)) - 1]
        loss = task_loss + lambda1 * omega + self.lambda2 * norm
        return scores, {"loss": loss, "task_loss": task_loss, "orthogonality": omega, "norm": norm}

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step; returns the loss, its parts before weighting, and the accuracy in percent.

        Raises:
            Diverged: for a loss that is not finite, before anything is changed.
            RuntimeError: if a map has no penalty although there are earlier tasks.
        """
        self.train()
        self.backbone.eval()
        scores, parts = self.losses(batch)
        self.optim.step(self.optimizer, parts["loss"], lambda: self.losses(batch)[1]["loss"])
        right = scores.detach().argmax(1) == batch.y
        return {
            **{name: part.detach() for name, part in parts.items()},
            "acc": 100 * right.float().mean(),
        }

    # ------------------------------------------------------------------ prediction

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen] for x float [B, 3, H, W] in [0, 1]."""
        with evaluation_mode(self):
            if self.evaluation == "branches" or not self.stacked:
                return self.head(self.features(x))
            with merged(self.layers, (lora.delta() for lora in self.loras)):
                return self.head(self.bank.features(x))
