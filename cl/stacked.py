"""What SD-LoRA and InfLoRA share: the updates of all tasks in one set, an expanding linear head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.olora import merged
from driftline.core.strategy import CLStrategy
from driftline.core.stream import BOUNDARIES, Batch, Task
from driftline.parts.adapters.adapter import Adapter
from driftline.parts.adapters.plan import Plan
from driftline.parts.heads import ExpandingLinear
from driftline.parts.modes import evaluation_mode
from driftline.parts.objectives import scoped_cross_entropy
from driftline.parts.optim import Optim

NAME = "all"  # the one set of adapters: each holds the pairs of all tasks


class Stacked(CLStrategy):
    """A frozen transformer with updates of its qkv layers, trained by the cross-entropy of a task.

    A subclass makes `head`, and in `grow` the new pairs, `columns` and the optimiser.

    Args:
        evaluation: `merged`: the updates are added to the weights while predicting; `branches`:
            computed beside them. Equal up to rounding.
        kind: makes the updates of a layer from its two widths; they have `delta`.
    """

    needs = frozenset({"features", BOUNDARIES})
    averageable = True
    unmergeable = "it adds up the updates of all tasks, each in tensors of its own"
    head: ExpandingLinear

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        epochs: int,
        optim: Optim,
        evaluation: Literal["merged", "branches"],
        kind: Callable[..., Adapter],
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.epochs, self.evaluation = epochs, evaluation
        self.optim = self.task_optim = optim
        backbone.eval().requires_grad_(False)
        plan = Plan(at=["blocks.*.attn.qkv:out"], blocks=None, kind=kind)
        self.bank = plan.bank(backbone)
        plan.add(self.bank, NAME, self.first_draws())
        self.layers = {
            point.removesuffix(":out"): cast(nn.Linear, m) for point, m in plan.points(backbone)
        }
        self.seen = 0
        self.columns: Sequence[int] = range(0)

    def first_draws(self) -> torch.Generator | None:
        """Of the updates that the first task begins with; None: nothing is drawn for them."""
        return None

    @property
    def loras(self) -> Sequence[Any]:
        """The updates of all tasks, layer by layer."""
        return [*self.bank.adapters(NAME).values()]

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if len(self.columns) == 1:
            self.warn_once(
                "one class",
                f"task {task.index} has one class: its cross-entropy is 0 and nothing is learned; "
                "take larger tasks (scenario.increment)",
            )

    def begin_epoch(self, task: Task, epoch: int) -> None:
        self.task_optim.set_rates(self.optimizer, epoch, self.epochs)

    # ------------------------------------------------------------------ training

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores [B, C_seen] and the cross-entropy over the classes of the task."""
        scores = self.head(self.bank.features(batch.x, NAME))
        return scores, scoped_cross_entropy(scores, batch.y, self.columns)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step; returns the loss and the accuracy in percent over the classes seen.

        Raises:
            Diverged: for a loss that is not finite, before anything is changed.
        """
        self.train()
        self.backbone.eval()
        scores, loss = self.losses(batch)
        self.task_optim.step(self.optimizer, loss, lambda: self.losses(batch)[1])
        right = scores.detach().argmax(1) == batch.y
        return {"loss": loss.detach(), "acc": 100 * right.float().mean()}

    # ------------------------------------------------------------------ prediction

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen] for x float [B, 3, H, W] in [0, 1]."""
        with evaluation_mode(self):
            if self.evaluation == "branches":
                return self.head(self.bank.features(x, NAME))
            with merged([*self.layers.values()], (lora.delta() for lora in self.loras)):
                return self.head(self.bank.features(x))
