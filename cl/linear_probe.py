"""Continual linear probe: a frozen pretrained network and a linear head, task after task.

No official code trains this one task by task; head and loss are those of LAMDA-CL/LAMDA-PILOT
5240714 `models/finetune.py`, optimiser settings those of the joint probe of RanPAC/RanPAC 012927f.
The backbone stays in evaluation mode, so BatchNorm statistics do not drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn

from backbones.backbone import Backbone
from cl.common import Schedule, Scope
from cl.finetune import Finetune


class LinearProbe(Finetune):
    """Trains the head alone; options as in `Finetune`, `lr` being the rate of the head."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: int,
        optimizer: Literal["sgd"],
        lr: float,
        momentum: float,
        weight_decay: float,
        weight_decay_later: float,
        schedule: Schedule,
        milestones: list[int],
        milestones_later: list[int],
        lr_decay: float,
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

    def modes(self) -> Iterator[tuple[nn.Module, bool]]:
        yield self.backbone, False
