"""Sequential fine-tuning of the whole network: the lower bound of every table.

Official code: LAMDA-CL/LAMDA-PILOT 5240714, `models/finetune.py` and `exps/finetune.json`.
Cross-entropy over the current classes only from the second task on (over all of them in the
first, which is the same thing), SGD over backbone and head, no replay, no penalty; prediction
over all classes seen. Mammoth's variant puts all classes of the stream into the softmax.

Deviations: the pretrained classifier is left untouched, as PILOT loads none. Rates of backbone
and head may differ. New head rows alone are drawn (see `backbones/heads.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Literal, cast

import torch
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.backbones.heads import ExpandingLinear
from driftline.backbones.surgery import batch_norms
from driftline.cl.common import (
    Schedule,
    Scope,
    evaluation_mode,
    freeze_pretrained_head,
    rate_factor,
    require_finite,
    scope_columns,
    scoped_cross_entropy,
)
from driftline.core.ranges import Count, CountOrZero, NonNegative, Unit
from driftline.core.strategy import CLStrategy
from driftline.core.stream import Batch, Task


class Finetune(CLStrategy):
    """Backbone and expanding linear head, trained on one task after the other.

    Args:
        num_classes: classes of the whole stream.
        epochs: passes over the training images of a task.
        lr, head_lr: initial rates of backbone and head.
        weight_decay, weight_decay_later: first task, later tasks; biases included.
        schedule, milestones, milestones_later, lr_decay: see `cl.common.rate_factor`.
        loss_scope: see `cl.common.scope_columns`.
        freeze_bn: BatchNorm layers keep their running statistics (scale and shift still learn).
    """

    needs = frozenset({"features"})

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optimizer: Literal["sgd"],
        lr: NonNegative,
        head_lr: NonNegative,
        momentum: Unit,
        weight_decay: NonNegative,
        weight_decay_later: NonNegative,
        schedule: Schedule,
        milestones: list[CountOrZero],
        milestones_later: list[CountOrZero],
        lr_decay: Unit,
        loss_scope: Scope,
        freeze_bn: bool,
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.num_classes, self.epochs, self.train_epochs = num_classes, epochs, epochs
        self.lr, self.head_lr, self.momentum = lr, head_lr, momentum
        self.weight_decay = (weight_decay, weight_decay_later)
        self.schedule: Schedule = schedule
        self.milestones, self.lr_decay = (milestones, milestones_later), lr_decay
        self.loss_scope: Scope = loss_scope
        self.freeze_bn = freeze_bn
        freeze_pretrained_head(backbone)
        self.head = ExpandingLinear(backbone.dim)
        self.seen = 0
        self.columns = range(0)
        self._warned = False

    def extend(self, task: Task) -> None:
        """Grow the head to the classes of `task` and note which the loss covers."""
        self.seen = max(self.seen, task.classes.stop)
        rows = self.num_classes if self.loss_scope == "all" else self.seen
        self.head.grow(rows, self.rng("init"))
        self.columns = scope_columns(self.loss_scope, task.classes, self.seen, self.num_classes)

    def grow(self, task: Task) -> None:
        self.extend(task)
        self.optimizer = self.make_optimizer(task)  # here, since `begin_task` is not called again

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if len(self.columns) == 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"task {task.index} has one class in its softmax under "
                f"strategy.loss_scope={self.loss_scope}: the loss is 0 and nothing is learned",
                stacklevel=2,
            )

    def make_optimizer(self, task: Task) -> torch.optim.Optimizer:
        """A fresh optimiser for one task, without momentum from the one before."""
        backbone = [p for p in self.backbone.parameters() if p.requires_grad]
        groups = [{"params": backbone, "lr": self.lr}] if backbone else []
        groups.append({"params": list(self.head.parameters()), "lr": self.head_lr})
        decay = self.weight_decay[task.index > 0]
        optimizer = torch.optim.SGD(groups, momentum=self.momentum, weight_decay=decay)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def begin_epoch(self, task: Task, epoch: int) -> None:
        milestones = self.milestones[task.index > 0]
        factor = rate_factor(self.schedule, epoch, self.train_epochs, milestones, self.lr_decay)
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def modes(self) -> Iterator[tuple[nn.Module, bool]]:
        """Modules and whether they train; later entries override earlier ones."""
        yield self, True
        if self.freeze_bn:
            yield from ((m, False) for m in batch_norms(self.backbone).values())

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D]."""
        return cast(Backbone, self.backbone).features(x)

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Loss of scores [B, C]; for subclasses."""
        return scoped_cross_entropy(scores, batch.y, self.columns)

    def add_gradients(self) -> dict[str, Tensor]:
        """For penalties on parameters, added to their gradients; returns what to log of them."""
        return {}

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step; returns the loss and the accuracy in percent over the classes seen.

        Raises:
            Diverged: for a loss that is not finite, before the parameters change.
        """
        assert self.optimizer is not None
        for module, mode in self.modes():
            module.train(mode)
        scores = self.head(self.features(batch.x))
        loss = self.loss(scores, batch)
        require_finite(loss.detach(), self.lr)
        self.optimizer.zero_grad()
        loss.backward()
        penalties = self.add_gradients()
        self.optimizer.step()
        right = scores.detach()[:, : self.seen].argmax(1) == batch.y
        return {"loss": loss.detach(), "acc": 100 * right.float().mean(), **penalties}

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen] for x float [B, 3, H, W] in [0, 1]."""
        with evaluation_mode(self):
            return self.head(self.features(x))[:, : self.seen]
