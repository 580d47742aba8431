"""Continual linear probe: a frozen pretrained network and a linear head, task after task.

No official code trains this one task by task; head and loss are those of LAMDA-CL/LAMDA-PILOT
5240714 `models/finetune.py`, optimiser settings those of the joint probe of RanPAC/RanPAC 012927f.
The backbone stays in evaluation mode, so BatchNorm statistics do not drift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone, weights_hash
from driftline.cl.common import Schedule, Scope, evaluation_mode
from driftline.cl.finetune import Finetune
from driftline.core.ranges import Count, CountOrZero, NonNegative, Unit


class LinearProbe(Finetune):
    """Trains the head alone; options as in `Finetune`, `lr` being the rate of the head."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optimizer: Literal["sgd"],
        lr: NonNegative,
        momentum: Unit,
        weight_decay: NonNegative,
        weight_decay_later: NonNegative,
        schedule: Schedule,
        milestones: list[CountOrZero],
        milestones_later: list[CountOrZero],
        lr_decay: Unit,
        loss_scope: Scope,
    ) -> None:
        backbone.requires_grad_(False)
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optimizer=optimizer,
            lr=lr,
            head_lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            weight_decay_later=weight_decay_later,
            schedule=schedule,
            milestones=milestones,
            milestones_later=milestones_later,
            lr_decay=lr_decay,
            loss_scope=loss_scope,
            freeze_bn=True,
        )
        self._extractors = {"plain": weights_hash(backbone.state_dict())}

    def modes(self) -> Iterator[tuple[nn.Module, bool]]:
        yield self.backbone, False

    def extractors(self) -> Mapping[str, str]:
        return self._extractors

    @torch.no_grad()
    def embed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        with evaluation_mode(self):
            return self.features(x)[None]

    @torch.no_grad()
    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.head(features["plain"])[:, : self.seen]

    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen] for x float [B, 3, H, W] in [0, 1]."""
        return self.classify({"plain": self.embed(x, ["plain"])[0]})
