"""DER and DER++: replay that keeps what the network once answered, not the label alone.

Paper: Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline",
NeurIPS 2020, arXiv 2004.07211. Official code: aimagelab/mammoth e75a491, `models/der.py`,
`models/derpp.py`, `utils/buffer.py`.

    loss = CE(batch) + alpha * mean (z(x1) - z1)^2 + beta * CE(x2, y2)

x1 and x2 are two independent draws from the memory, each with a forward pass of its own. z1 are the
scores of the moment in which the image came: those of the augmented image before the step, whatever
augmentation it is seen with later. DER is beta = 0, without the second draw.

Deviations that change no number: as in `cl/er.py`. With `loss_scope=seen` scores of classes that
did not exist when an image came are left out of the mean; the official head has all classes from
the start (`all`). Other random draws: as in `cl/er.py`.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.er import ER
from driftline.core.ranges import Count, NonNegative, Size
from driftline.core.stream import Batch
from driftline.parts.adapters.plan import Plan
from driftline.parts.buffer import Rule
from driftline.parts.objectives import scoped_cross_entropy
from driftline.parts.optim import Optim


class DERpp(ER):
    """Cross-entropy on the batch, old scores and old labels on the memory.

    Args:
        num_classes, epochs, optim, loss_scope, freeze_bn, adapter, capacity, insertion,
            replay_batch: as in `ER`; `replay_batch` images in each draw.
        alpha: weight of the squared difference from the stored scores.
        beta: weight of the cross-entropy with stored labels; 0: DER, one draw a step.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optim: Optim,
        loss_scope: Literal["seen", "all"],
        freeze_bn: bool,
        adapter: Plan | None,
        capacity: Count,
        insertion: Rule,
        replay_batch: Size,
        alpha: NonNegative,
        beta: NonNegative,
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optim=optim,
            loss_scope=loss_scope,
            freeze_bn=freeze_bn,
            adapter=adapter,
            capacity=capacity,
            insertion=insertion,
            replay_batch=replay_batch,
        )
        self.alpha, self.beta = alpha, beta
        self.draws = 2 if beta else 1
        self.answers: Tensor | None = None  # to the batch, before the step

    def remember(self, batch: Batch, scores: Tensor | None = None) -> None:
        super().remember(batch, self.answers)
        self.answers = None

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        scores = self.head(self.features(batch.x))
        if self.answers is None:  # not those of a second pass
            self.answers = scores.detach()
        loss = self.cross_entropy(scores, batch.y) + self.penalty_on(batch.x, scores)
        self.task_optim.backward(self.optimizer, loss)
        return scores.detach(), loss.detach(), {}

    def cross_entropy(self, scores: Tensor, y: Tensor) -> Tensor:
        return scoped_cross_entropy(scores, y, self.columns)

    def penalty_on(self, x: Tensor, scores: Tensor) -> Tensor | float:
        """What is drawn from the memory adds to the loss of the batch `x` with scores [B, C]."""
        loss: Tensor | float = 0.0
        if self.drawn:
            positions, drawn, _ = self.drawn[0]
            loss = self.alpha * self.distance(self.head(self.features(drawn)), positions)
        if self.drawn[1:]:
            _, drawn, y = self.drawn[1]
            loss = loss + self.beta * self.cross_entropy(self.head(self.features(drawn)), y)
        return loss

    def distance(self, scores: Tensor, positions: list[int]) -> Tensor:
        """Mean squared difference of scores [B, C] from the stored ones; 0-dim."""
        assert self.buffer.scores is not None
        stored = self.buffer.scores[positions]
        known = stored.isfinite()
        return F.mse_loss(scores[:, : stored.shape[1]][known], stored[known])
