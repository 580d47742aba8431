"""Tent: entropy minimisation on the normalisation layers.

Paper: "Tent: Fully Test-Time Adaptation by Entropy Minimization" (ICLR 2021, arXiv 2006.10726).
Code: github.com/DequanWang/tent @ e9e926a; the same class in github.com/qinenergy/cotta @ c212a20.
Variants: github.com/mariodoebler/test-time-adaptation @ 8b2ed63 (`layers=norm`, `mode=eval`) and
github.com/Yangsenqiao/vida @ c26b0db (`layers=name`).

Deviations: an empty selection is an error instead of a silent no-op; parameters that are not
trained are frozen under `layers=name` too (the code computes their gradients for nothing); no
running statistics are kept for BatchNorm1d either, which changes no prediction in training mode.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Count
from driftline.core.strategy import TTAStrategy
from driftline.parts.modes import evaluating
from driftline.parts.norms import (
    Select,
    by_kind,
    by_name,
    collect_parameters,
    train_only,
    use_batch_statistics,
)
from driftline.parts.objectives import entropy
from driftline.parts.optim import Optim

LAYERS: dict[str, Select] = {
    "bn": by_kind("bn2d"),
    "norm": by_kind("bn2d", "bn1d", "ln", "gn"),
    "name": by_name("norm", "bn"),
}
HINTS = {
    "bn": "has no BatchNorm2d; set strategy.layers=norm to train LayerNorm and GroupNorm as well",
    "norm": "has no affine BatchNorm, LayerNorm or GroupNorm; set strategy.layers=name to train "
    "every module with 'norm' or 'bn' in its name, or use strategy=source",
    "name": "has no module with 'norm' or 'bn' in its name; set strategy.layers=norm",
}


class Tent(TTAStrategy):
    """Each batch: forward, mean softmax entropy, one optimiser step on scales and shifts.

    Args:
        backbone: a network with normalisation layers.
        layers: trained modules. `bn`: BatchNorm2d (official); `norm`: also BatchNorm1d, LayerNorm
            and GroupNorm; `name`: every module with "norm" or "bn" in its name, which misses
            layers inside unnamed stems and shortcuts.
        mode: of the whole network while adapting; decides on dropout and stochastic depth only,
            batch normalisation uses batch statistics in both.
        optim: of the one group `norm`.
        steps: updates per batch, at least 1.

    One image and a short last batch adapt like any other batch; only a map of a single pixel for
    a single image raises a UserError.
    """

    needs = frozenset({"head"})
    batch_dependent = True

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Literal["bn", "norm", "name"],
        mode: Literal["train", "eval"],
        optim: Optim,
        steps: Count,
    ) -> None:
        super().__init__(backbone)
        trained = list(collect_parameters(backbone.net, LAYERS[layers]).values())
        if not trained:
            raise UserError(
                f"strategy=tent with layers={layers} has nothing to train: {backbone.tag} "
                f"{HINTS[layers]}"
            )
        train_only(self.backbone.train(mode == "train"), trained)
        use_batch_statistics(backbone.net)
        self.steps, self.optim = steps, optim
        self.optimizer = optim.optimizer({"norm": trained})

    def loss(self, logits: Tensor) -> Tensor:
        """Mean entropy, in nats, of the predictions `logits` [B, C]."""
        return entropy(logits).mean(0)

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the current weights; dropout is off whatever the mode."""
        with evaluating(self.backbone):
            return self.backbone(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] from before the (last) update on this batch."""
        for _ in range(self.steps - 1):
            self._update(x)
        return self._update(x)

    @torch.enable_grad()
    def _update(self, x: Tensor) -> Tensor:
        logits = self.backbone(x)
        self.loss(logits).backward()
        self.optim.update(self.optimizer, lambda: self.loss(self.backbone(x)).backward())
        return logits.detach()
