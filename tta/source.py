"""No adaptation: the pretrained network in evaluation mode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from driftline.core.strategy import TTAStrategy


class Source(TTAStrategy):
    """Predictions of the pretrained network; nothing changes."""

    needs = frozenset({"head"})
    static = True

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.backbone.eval().requires_grad_(False)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def adapt(self, x: Tensor) -> Tensor:
        return self.predict(x)
