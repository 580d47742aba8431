"""T3A: the linear classifier gives way to class means of confident features.

Paper: "Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization" (NeurIPS
2021, OpenReview e_yvNqkJKAW).
Code: github.com/matsuolab/T3A @ ff8cde5 (`domainbed/adapt_algorithms.py`); with ViT and 20 supports
on ImageNet-C: github.com/mr-eggplant/FOA @ 004b02d (`tta_library/t3a.py`).

What the code does: the rows of the classifier's weight are the first supports and are filed under
the class that the classifier, bias included, gives them, so that a class may begin without one; a
class without supports has a zero vector, which loses against every positive score; scores grow with
the length of the feature, so their softmax says little about confidence.

Deviations that change no number: one sort of all supports in place of one for each class; supports
beyond the limit are dropped at the start already. Deviations that do: supports of equal entropy
keep their order of arrival, which the code leaves open; the last incomplete batch counts.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count
from driftline.core.strategy import TTAStrategy
from driftline.parts.heads import linear_head
from driftline.parts.objectives import entropy


class T3A(TTAStrategy):
    """Each batch: file its features under the predicted class, keep the surest, average them.

    Args:
        backbone: a classifier that ends in a linear layer; it never changes.
        supports: features kept for each class, those of smallest entropy. `all`: every one, which
            costs memory without end. `all_but_last`: what the official code does with `-1`, there
            meant for all: in every class and at every batch the one of largest entropy is dropped,
            so that a class with a single support loses it.

    One image and a short last batch count like any other. Predictions do not depend on how images
    are batched, but every image of `adapt` already counts in its own batch's scores.
    """

    needs = frozenset({"head", "features"})
    grows = "with supports=all: 4 D + 12 bytes an image; else bounded by supports a class"
    backbone: Any  # a Backbone; the parent promises less
    features: Tensor
    classes: Tensor
    entropies: Tensor

    def __init__(
        self, backbone: Backbone, *, supports: Count | Literal["all", "all_but_last"]
    ) -> None:
        super().__init__(backbone)
        head = linear_head(backbone, "t3a")
        self.backbone.eval().requires_grad_(False)
        self.supports = supports
        rows = head.weight.detach().clone()
        for name, value in zip(("features", "classes", "entropies"), self._file(rows), strict=True):
            self.register_buffer(name, value)
        if supports != "all_but_last":
            self.select()

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C] against the class vectors as they are."""
        return self.backbone.frozen_features(x) @ self.class_vectors()

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] against class vectors that include this batch."""
        z = self.backbone.frozen_features(x)
        features, classes, entropies = self._file(z)
        self.features = torch.cat([self.features, features])
        self.classes = torch.cat([self.classes, classes])
        self.entropies = torch.cat([self.entropies, entropies])
        self.select()
        return z @ self.class_vectors()

    @torch.no_grad()
    def _file(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, D] with the class and the entropy [B] that the classifier gives them."""
        logits = self.backbone.head(z)
        return z, logits.argmax(1), entropy(logits)

    def select(self) -> None:
        """Drop supports beyond the limit; the rest is sorted by class, the surest first."""
        order = self.entropies.argsort(stable=True)
        order = order[self.classes[order].argsort(stable=True)]
        classes = self.classes[order]
        counts = classes.bincount(minlength=self.backbone.num_classes)
        place = torch.arange(len(classes), device=classes.device)
        place -= (counts.cumsum(0) - counts)[classes]  # within the class
        if isinstance(self.supports, int):
            order = order[place < self.supports]
        elif self.supports == "all_but_last":
            order = order[place < counts[classes] - 1]
        self.features, self.classes = self.features[order], self.classes[order]
        self.entropies = self.entropies[order]

    def class_vectors(self) -> Tensor:
        """[D, C]: sums of the supports' directions, of length 1; zero for a class without."""
        member = F.one_hot(self.classes, self.backbone.num_classes).to(self.features)
        return F.normalize(F.normalize(self.features, dim=1).T @ member, dim=0)
