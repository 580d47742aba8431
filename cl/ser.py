"""Strong experience replay (SER): replay, and the network before is answered alike on new images.

Paper: Zhuo et al., "Continual Learning with Strong Experience Replay", 2023, arXiv 2305.13622.
Official code: visiontao/cl bdb982d, `model/ser.py`; there are no recorded cases.

    loss = CE(batch) + CE(x', y') + alpha * mean (z(x') - z')^2 + beta * mean (z(x) - z_old(x))^2

x' is one draw from the memory, as many images as the batch (`replay_batch`), for labels y' and
stored scores z' (those before the step in which the image came: backward consistency). z_old is the
network after the task before, on the images x of the present batch (forward consistency). In the
first task, which has no such network, the loss is CE(batch) alone; the memory fills as in DER++.

Deviations that change no number: as in `cl/derpp.py`. That may: random draws as in `cl/er.py`; at
test the official code lets outputs of future classes win too. Left out: its variant for domains,
which stores the augmented images.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.derpp import DERpp
from driftline.core.ranges import Count, NonNegative, Size
from driftline.core.stream import BOUNDARIES, Task
from driftline.parts.buffer import Rule
from driftline.parts.optim import Optim


class SER(DERpp):
    """Labels and scores of one draw from the memory, old answers on the batch.

    Args:
        num_classes, epochs, optim, loss_scope, freeze_bn, capacity, insertion, replay_batch: as in
            `ER`.
        alpha: weight of the squared difference from the stored scores.
        beta: weight of the squared difference from the scores of the network before.
    """

    needs = DERpp.needs | {BOUNDARIES}

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
            adapter=None,
            capacity=capacity,
            insertion=insertion,
            replay_batch=replay_batch,
            alpha=alpha,
            beta=beta,
        )
        self.draws = 0  # until there is a network before
        self.teacher: nn.ModuleList | None = None  # network and head after the task before

    def grow(self, task: Task) -> None:
        if self.seen:
            self.teacher, self.draws = None, 1  # not copied along
            both = nn.ModuleList([self.backbone, self.head])
            self.teacher = deepcopy(both).requires_grad_(False).eval()
        super().grow(task)

    def modes(self) -> Iterator[tuple[nn.Module, bool]]:
        yield from super().modes()
        if self.teacher is not None:
            yield self.teacher, False

    def penalty_on(self, x: Tensor, scores: Tensor) -> Tensor | float:
        """Old scores on the batch `x` with scores [B, C]; old scores and labels on the draw."""
        if self.teacher is None:
            return 0.0
        with torch.no_grad():
            network, head = self.teacher
            old = head(cast(Backbone, network).features(x))
        loss = self.beta * F.mse_loss(scores[:, : old.shape[1]], old)
        for positions, drawn, y in self.drawn:
            again = self.head(self.features(drawn))
            loss = loss + self.cross_entropy(again, y)
            loss = loss + self.alpha * self.distance(again, positions)
        return loss
