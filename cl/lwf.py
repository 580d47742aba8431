"""LwF: the answers of the old network on the new images are kept by distillation.

Paper: Li and Hoiem, "Learning without Forgetting", TPAMI 2017, arXiv 1606.09282. Official code of
the default: aimagelab/mammoth e75a491, `models/lwf.py`.

From the second task on: the head alone is trained on the new classes (warm-up, plain SGD), the
scores of the old classes are recorded for every training image without augmentation, then the whole
network learns by `CE over all classes seen + alpha * distillation`, the cross-entropy between the
recorded and the present probabilities of the old classes, both softened by tau. Mammoth raises
probabilities to 1/tau and normalises them again, which is the same as to divide scores by tau.

Deviations: the recorded images go through the test pipeline (mammoth: none at all). Warm-up epochs
are further epochs of the stream, so that they draw other augmentations than the training. No second
network is kept; the recorded scores are part of a checkpoint.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.common import (
    Schedule,
    Scope,
    Store,
    evaluation_mode,
    require_finite,
    scoped_cross_entropy,
)
from driftline.cl.finetune import Finetune
from driftline.core.ranges import Count, CountOrZero, NonNegative, Positive, Unit
from driftline.core.stream import Batch, Task


class LwF(Finetune):
    """Fine-tuning with distillation; options as in `Finetune`, and:

    Args:
        alpha: factor of the distillation.
        tau: temperature (`softmax_temp` in mammoth).
        warmup_epochs: of the head alone, at rate `head_lr`; None: as many as `epochs`.
    """

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
        alpha: NonNegative,
        tau: Positive,
        warmup_epochs: CountOrZero | None,
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optimizer=optimizer,
            lr=lr,
            head_lr=head_lr,
            momentum=momentum,
            weight_decay=weight_decay,
            weight_decay_later=weight_decay_later,
            schedule=schedule,
            milestones=milestones,
            milestones_later=milestones_later,
            lr_decay=lr_decay,
            loss_scope=loss_scope,
            freeze_bn=freeze_bn,
        )
        self.alpha, self.tau = alpha, tau
        self.warmup_epochs = epochs if warmup_epochs is None else warmup_epochs
        self.old = Store()  # of the current task: `index` int64 [N], ascending; `scores` [N, C_old]

    def begin_task(self, task: Task) -> None:
        known = self.seen
        super().begin_task(task)
        if known:
            self._warm_up(task)
            self._record(task, known)

    def _warm_up(self, task: Task) -> None:
        """Train the head on the classes of `task`, everything else as it is."""
        optimizer = torch.optim.SGD(self.head.parameters(), lr=self.head_lr)
        with evaluation_mode(self):
            for epoch in range(self.train_epochs, self.train_epochs + self.warmup_epochs):
                for batch in task.train(epoch):
                    if batch is None:
                        continue
                    batch = batch.to(self.device)
                    with torch.no_grad():
                        features = self.features(batch.x)
                    loss = scoped_cross_entropy(self.head(features), batch.y, task.classes)
                    require_finite(loss.detach(), self.head_lr, "strategy.head_lr")
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

    @torch.no_grad()
    def _record(self, task: Task, known: int) -> None:
        """Note the scores of the `known` old classes for every training image."""
        index, scores = [], []
        with evaluation_mode(self):
            for batch in task.fit():
                index.append(batch.index.to(self.device))
                scores.append(self.head(self.features(batch.x.to(self.device)))[:, :known])
        order = torch.cat(index).argsort()
        self.old.put("index", torch.cat(index)[order])
        self.old.put("scores", torch.cat(scores)[order])

    def loss(self, scores: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy on the labels plus the distillation of the old classes."""
        loss = super().loss(scores, batch)
        if "index" not in self.old:  # the first task
            return loss
        rows = torch.searchsorted(self.old["index"], batch.index)
        target = (self.old["scores"][rows] / self.tau).softmax(1)
        mine = scores[:, : target.shape[1]] / self.tau
        return loss + self.alpha * F.cross_entropy(mine, target)
