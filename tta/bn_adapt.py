"""Batch normalisation statistics taken from the test stream; nothing is learned.

Papers: "Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift"
(Nado et al. 2020, arXiv 2006.10963) and "Improving robustness against common corruptions by
covariate shift adaptation" (Schneider et al., NeurIPS 2020, arXiv 2006.16971).
Codes: github.com/qinenergy/cotta @ c212a20 (`norm`), github.com/mariodoebler/
test-time-adaptation @ 8b2ed63 (mixture with source statistics, moving average).

Deviations: the network's own epsilon is kept unless `official_eps`; every batch normalisation
layer takes part, not `BatchNorm2d` alone; with `statistics=batch` no running statistics are kept
(the code moves them but never reads them); with `statistics=mixed` the activation inside timm's
fused layers stays (the code's replacement layer would drop it).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Unit
from driftline.core.strategy import TTAStrategy
from driftline.parts.modes import evaluating
from driftline.parts.norms import (
    batch_norms,
    enough_in_training,
    mix_statistics,
    use_batch_statistics,
)


class BNAdapt(TTAStrategy):
    """Predictions with batch, mixed or moving-average normalisation statistics.

    Args:
        backbone: a network with batch normalisation.
        statistics: `batch`: those of the batch (BN-1); `mixed`: `(1 - alpha) * source + alpha *
            batch`, with the unbiased batch variance (BN-alpha); `ema`: a forward in training mode
            moves the running statistics, a second one in evaluation mode predicts (BN-EMA).
        alpha: weight of the batch, `mixed` only.
        momentum: weight of the batch in the moving average, `ema` only.
        official_eps: overwrite the epsilon of every layer with 1e-5.

    A single image works where its feature maps have two pixels or more; otherwise `adapt` raises
    a UserError. With `ema`, `predict` reads the running statistics as they are.
    """

    needs = frozenset({"head", "batch_norm"})
    batch_dependent = True
    backbone: Any  # a Backbone; the parent promises less

    def __init__(
        self,
        backbone: Backbone,
        *,
        statistics: Literal["batch", "mixed", "ema"],
        alpha: Unit,
        momentum: Unit,
        official_eps: bool,
    ) -> None:
        super().__init__(backbone)
        layers = batch_norms(backbone.net)
        if not layers:
            raise UserError(
                "strategy=bn_adapt changes batch normalisation, and the backbone "
                f"{backbone.tag} has none. Use a network with BatchNorm, strategy=source, or "
                "strategy=tent with layers=norm."
            )
        if statistics == "mixed" and not 0 < alpha < 1:
            raise UserError(
                f"strategy.alpha must lie between 0 and 1, got {alpha}; for 1 use "
                "strategy.statistics=batch, for 0 strategy=source"
            )
        self.statistics = statistics
        self.backbone.eval().requires_grad_(False)
        for layer in layers.values():
            if official_eps:
                layer.eps = 1e-5
            if statistics == "ema":
                layer.momentum = momentum
                layer.register_forward_pre_hook(enough_in_training)
        if statistics == "batch":
            use_batch_statistics(backbone.net)
        elif statistics == "mixed":
            mix_statistics(backbone.net, alpha)

    def predict(self, x: Tensor) -> Tensor:
        with evaluating(self.backbone):
            return self.backbone.frozen_logits(x)

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] with the statistics that include this batch."""
        if self.statistics == "ema":
            self.backbone.train()
            try:
                self.backbone(x)
            finally:
                self.backbone.eval()
        return self.backbone.frozen_logits(x)
