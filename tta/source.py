"""No adaptation: the pretrained network in evaluation mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.strategy import TTAStrategy


class Source(TTAStrategy):
    """Predictions of the pretrained network; nothing changes."""

    needs = frozenset({"head"})
    static = True
    backbone: Any  # a Backbone; the parent promises less

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.backbone.eval().requires_grad_(False)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return self.backbone.frozen_logits(x)

    def adapt(self, x: Tensor) -> Tensor:
        return self.predict(x)
