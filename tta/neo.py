"""NEO: features of the test stream are moved so that their mean lies in the origin.

Paper: "NEO: No-Optimization Test-Time Adaptation through Latent Re-Centering" (ICLR 2026,
arXiv 2510.05635).
Code: github.com/awesomealex1/NEO @ 68e9d7f (`tta_library/neo.py`, `tta_library/neo_cont.py`); no
recorded run.

What the code does: a batch counts in its own scores, so the first image of a stream that comes
alone is moved into the origin and gets the classifier's bias as scores, whatever it shows.

Deviations that change no number: none. Deviations that do: none.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Unit
from driftline.core.strategy import TTAStrategy
from driftline.parts.heads import linear_head


class NEO(TTAStrategy):
    """Each batch: one forward, move the mean, classify features without it.

    Args:
        backbone: a classifier that ends in a linear layer; it never changes.
        mean: of the features. `stream`: of all images so far (NEO); `moving`: a moving average of
            the batches, from zero on (NEO-Continual).
        momentum: weight of the new batch, `moving` only.

    A short last batch counts by its images with `mean=stream`, like any other with `moving`. One
    image as the first batch is all of the mean: see above. Predictions do not depend on how images
    are batched.
    """

    needs = frozenset({"head", "features"})
    prefers = "vit"
    backbone: Any  # a Backbone; the parent promises less
    center: Tensor

    def __init__(
        self, backbone: Backbone, *, mean: Literal["stream", "moving"], momentum: Unit
    ) -> None:
        super().__init__(backbone)
        head = linear_head(backbone, "neo")
        self.backbone.eval().requires_grad_(False)
        self.mean, self.momentum = mean, momentum
        weight = head.weight
        self.register_buffer("center", weight.new_zeros(weight.shape[1]))
        self.images = 0

    def get_extra_state(self) -> int:
        return self.images

    def set_extra_state(self, state: int) -> None:
        self.images = state

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C] with the mean as it is."""
        return self.backbone.head(self.backbone.frozen_features(x) - self.center)

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] with a mean that includes this batch."""
        z = self.backbone.frozen_features(x)
        self.images += len(z)
        share = len(z) / self.images if self.mean == "stream" else self.momentum
        self.center = (1 - share) * self.center + share * z.mean(0)
        return self.backbone.head(z - self.center)
