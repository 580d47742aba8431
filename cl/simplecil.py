"""SimpleCIL: class means of frozen features and cosine similarity; nothing is trained.

Paper: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models:
Generalizability and Adaptivity are All You Need", IJCV 2024, arXiv 2303.07338.
Official code: LAMDA-CL/LAMDA-PILOT 5240714, `models/simplecil.py`.

Deviations: means are accumulated in float64 with counts, so a class that comes back updates its
mean instead of overwriting it. The official learnable scale stays at 1 there and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone, weights_hash
from driftline.core.strategy import CLStrategy
from driftline.core.stream import Task
from driftline.parts.heads import PrototypeHead
from driftline.parts.modes import evaluation_mode
from driftline.parts.statistics import ClassMeans


class SimpleCIL(CLStrategy):
    """Nearest class mean by cosine, over training images seen through the test pipeline."""

    needs = frozenset({"features"})
    head: ClassMeans  # that gives scores

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        backbone.eval().requires_grad_(False)
        self.head = PrototypeHead(backbone.dim)
        self._extractors = {"plain": weights_hash(backbone.state_dict())}

    def grow(self, task: Task) -> None:
        self.head.grow(task.classes.stop)

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D]."""
        return cast(Backbone, self.backbone).frozen_features(x)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Add the training images of `task` to the class means."""
        with evaluation_mode(self):
            for batch in task.fit():
                batch = batch.to(self.device)
                self.head.update(self.features(batch.x), batch.y)

    def extractors(self) -> Mapping[str, str]:
        return self._extractors

    @torch.no_grad()
    def embed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        with evaluation_mode(self):
            return self.features(x)[None]

    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.head(features["plain"])

    def predict(self, x: Tensor) -> Tensor:
        """Cosines [B, C_seen] for x float [B, 3, H, W] in [0, 1]."""
        return self.classify({"plain": self.embed(x, ["plain"])[0]})
