"""SANTA: the frozen source network as anchor, and features drawn to the class means of the source.

Paper: "SANTA: Source Anchoring Network and Target Alignment for Continual Test Time Adaptation"
(TMLR 2023, openreview.net/forum?id=V7guVYzvE4). Code: github.com/mariodoebler/test-time-adaptation
@ 8b2ed63, to which the authors' repository (goirik-chakrabarty/SANTA @ 9909833) points.

What the code does, and may surprise: the cross-entropy H(student, anchor) has the student in
front, so that it is linear in the student's probabilities and sharpens them towards the anchor's
first class; two images with one nearest class mean push its two copies apart.

Deviations that change no number: the anchor runs without gradients; those of RMT about class means.
Deviations that do: a class without a source image has no mean and is nobody's nearest, where the
code gets NaN everywhere; BatchNorm1d layers use batch statistics without keeping any.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, NonNegative, Positive, Size
from driftline.core.strategy import Progress, TTAStrategy
from driftline.core.stream import SourceImages
from driftline.parts import views
from driftline.parts.heads import linear_head
from driftline.parts.modes import evaluating
from driftline.parts.norms import Layers, train_norms
from driftline.parts.optim import StreamOptim
from driftline.tta.rmt import Contrast, class_means


class SANTA(TTAStrategy):
    """A network whose normalisation layers learn, and an anchor that stays as it was.

    Args:
        backbone: a classifier with a linear head and normalisation layers.
        seed: of the projector and the views.
        optim: of two groups, `norms` and `projector`.
        layers: which normalisation layers learn, see `parts/norms.py`; `norm` is official.
        self_training_weight: of the cross-entropy of the anchor's prediction of an image under
            those of the network, of the image and of its view.
        contrast_weight: of the contrastive loss.
        temperature, projection: of the contrastive loss; `projection` is the width of both layers
            of the projector, null goes without.
        source_batch: source images a batch, for the class means.
        prototype_images: source images after which the class means are complete.
        steps: updates per batch, at least 1.

    One image and a short last batch adapt like any other batch, though an image alone has nothing
    to be told apart from; only a map of a single pixel for a single image raises a UserError.
    """

    needs = frozenset({"head", "features"})
    batch_dependent = True
    backbone: Any  # a Backbone; the parent promises less

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        optim: StreamOptim,
        layers: Layers,
        self_training_weight: NonNegative,
        contrast_weight: NonNegative,
        temperature: Positive,
        projection: Size | None,
        source_batch: Size,
        prototype_images: Count,
        steps: Count,
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.optim, self.steps = optim, steps
        self.self_training_weight, self.contrast_weight = self_training_weight, contrast_weight
        self.source_batch, self.prototype_images = source_batch, prototype_images
        head = linear_head(backbone, "santa")
        trained = list(train_norms(backbone.eval(), layers, strategy="santa").values())
        self.anchor = backbone.frozen_copy()
        contrast = Contrast(backbone.dim, projection, temperature, self.rng("projector"))
        self.contrast = contrast.to(head.weight).eval()
        groups = {"norms": trained, "projector": self.contrast.parameters()}
        self.optimizer = optim.optimizer(groups)
        # Made now: `restore` can only set a generator that is on the right device.
        self._numbers()

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        return True

    def preparation(self) -> dict[str, Any]:
        return {"prototype_images": self.prototype_images, "source_batch": self.source_batch}

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        """Class means, in the mode in which the network adapts."""
        size, limit = self.source_batch, self.prototype_images
        return {"prototypes": class_means(self.backbone, source, size, limit, progress)}

    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        self.contrast.prototypes = artefact["prototypes"].to(self.device, copy=True)

    def frozen(self) -> set[str]:
        """The anchor never changes and is rebuilt from the pretrained weights."""
        return super().frozen() | {f"anchor.{name}" for name in self.anchor.state_dict()}

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the current weights."""
        with evaluating(self):
            return self.backbone(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] from before the (last) update on this batch.

        Raises:
            Diverged: when the loss is not finite; nothing is updated then.
        """
        for _ in range(self.steps - 1):
            self._update(x)
        return self._update(x)

    @torch.enable_grad()
    def _update(self, x: Tensor) -> Tensor:
        view = self.augment(x)
        anchor = self.anchor.frozen_logits(x)

        def gradients() -> Tensor:
            features, of_view = self.backbone.features(x), self.backbone.features(view)
            logits, view_logits = self.backbone.head(features), self.backbone.head(of_view)
            loss = self.loss(features, logits, of_view, view_logits, anchor)
            self.optim.backward(self.optimizer, loss)
            return logits.detach()

        logits = gradients()
        self.optim.update(self.optimizer, gradients)
        return logits

    def loss(
        self, features: Tensor, logits: Tensor, of_view: Tensor, view_logits: Tensor, anchor: Tensor
    ) -> Tensor:
        """Of a batch and its view: self-training with the scores `anchor` [B, C], and contrast."""
        mean = (logits.softmax(1) + view_logits.softmax(1)) / 2  # H is linear in it
        sharpened = -(mean * anchor.log_softmax(1)).sum(1).mean(0)
        contrast = self.contrast(features, of_view)
        return self.self_training_weight * sharpened + self.contrast_weight * contrast

    def augment(self, x: Tensor) -> Tensor:
        """One random view of the batch `x`."""
        draws, noise = self._numbers()
        return views.apply(x, views.draw(draws, x.shape, noise=noise))

    def _numbers(self) -> tuple[torch.Generator, torch.Generator]:
        return self.rng("views"), self.rng("noise", self.device)
