"""SHOT, online: sharp and diverse predictions on a feature extractor below a frozen classifier.

Paper: "Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised
Domain Adaptation" (ICML 2020, arXiv 2002.08546), whose code github.com/tim-learn/SHOT @ f7d555a
passes many times over a set (`object/image_target.py`).
Online forms: github.com/MotasemAlfarra/Online_Test_Time_Adaptation @ 8e21fad (Alfarra et al., ICML
2024, arXiv 2304.04795), the benchmark on ImageNet-C, which the settings follow
(`tta_methods/shot_im.py`); github.com/fiveai/LAME @ d2e5f63 (`src/adaptation/shot.py`), from which
it is adapted; github.com/matsuolab/T3A @ ff8cde5 (`domainbed/adapt_algorithms.py`), from which that
of LINs-lab/ttab is. None has a recorded run; the formulas are checked by hand.

What the codes do: the benchmark computes gradients of the whole extractor and hands its optimiser
scales and shifts of BatchNorm2d alone, as LAME does on purpose; T3A trains the whole extractor with
the statistics of the source (`layers=extractor batch_statistics=false`). The labels of T3A are its
own confident predictions, whose loss is NaN for a batch without one.

Deviations that change no number: parameters that are not trained have no gradient; no running
statistics are kept where those of the batch are used. Deviations that do: the offset in logarithms
of single predictions, 1e-5, is that of the paper's code in all forms (LAME has 1e-10, T3A none);
labels from prototypes follow the paper's code on the images of the batch, where the benchmark
measures other distances and lets classes without an image win; without a confident image the term
is left out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, NonNegative, Unit
from driftline.core.strategy import TTAStrategy
from driftline.parts.heads import linear_head
from driftline.parts.modes import evaluating
from driftline.parts.norms import (
    Layers,
    batch_norms,
    train_norms,
    train_only,
    use_batch_statistics,
)
from driftline.parts.optim import StreamOptim

OFFSET = 1e-5  # in logarithms of probabilities


def certainty(p: Tensor) -> Tensor:
    """Negative entropy, in nats, of the last axis; [..., C] -> [...]."""
    return (p * (p + OFFSET).log()).sum(-1)


def prototype_labels(features: Tensor, p: Tensor) -> Tensor:
    """The class [B] of the nearest prototype, by cosine, among classes that are predicted at all.

    Prototypes are means of features, first weighted by the predictions, then of the images that
    the first ones label.

    Args:
        features: [B, D]; a constant 1 is appended.
        p: predictions [B, C].
    """
    features = F.normalize(F.pad(features, (0, 1), value=1.0), dim=1)
    weights, labels = p, p.argmax(1)
    for _ in range(2):
        means = weights.T @ features / (weights.sum(0)[:, None] + 1e-8)
        alike = features @ F.normalize(means, dim=1).T
        absent = torch.ones_like(alike[0], dtype=torch.bool)
        absent[labels] = False
        labels = alike.masked_fill(absent, -torch.inf).argmax(1)
        weights = F.one_hot(labels, p.shape[1]).to(p)
    return labels


class SHOT(TTAStrategy):
    """Each batch: forward, entropy minus entropy of the mean prediction, one optimiser step.

    Args:
        backbone: a classifier that ends in a linear layer, which stays as it is.
        layers: what learns. Normalisation layers, see `parts/norms.py`; or `extractor`: everything
            below the classifier.
        batch_statistics: of batch normalisation layers; false: those of the source.
        mode: of the whole network while adapting; decides on dropout and stochastic depth only.
        optim: of the one group `trained`.
        steps: updates per batch, at least 1.
        diversity: weight of the entropy of the mean prediction.
        pseudo: weight of the cross-entropy with labels of its own; 0: SHOT-IM.
        labels: where these come from. `prototypes`: the nearest of the class means of the batch;
            `confidence`: the prediction, of images above `threshold` alone.
        threshold: confidence, `confidence` only.

    One image, and equal ones, have no information to gain: the two entropies cancel, and what moves
    is what `pseudo` and momentum move. A short last batch adapts like any other. A single image
    whose maps have one pixel raises a UserError with batch statistics.
    """

    needs = frozenset({"head", "features"})
    batch_dependent = True
    backbone: Any  # a Backbone; the parent promises less

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers | Literal["extractor"],
        batch_statistics: bool,
        mode: Literal["train", "eval"],
        optim: StreamOptim,
        steps: Count,
        diversity: NonNegative,
        pseudo: NonNegative,
        labels: Literal["prototypes", "confidence"],
        threshold: Unit,
    ) -> None:
        super().__init__(backbone)
        head = linear_head(backbone, "shot")
        if layers == "extractor":
            above = {id(p) for p in head.parameters()}
            trained = [p for p in backbone.net.parameters() if id(p) not in above]
            train_only(backbone, trained)
            if batch_statistics:
                use_batch_statistics(backbone.net)
        else:
            named = train_norms(
                backbone, layers, strategy="shot", batch_statistics=batch_statistics
            )
            trained = [*named.values()]
        self.backbone.train(mode == "train")
        if not batch_statistics:
            for layer in batch_norms(backbone.net).values():
                layer.eval()
        self.steps, self.diversity, self.pseudo = steps, diversity, pseudo
        self.labels, self.threshold = labels, threshold
        self.optim, self.optimizer = optim, optim.optimizer({"trained": trained})

    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C] of the current weights; dropout is off whatever the mode."""
        with evaluating(self.backbone):
            return self.backbone.head(self.backbone.features(x))

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] from before the (last) update on this batch."""
        for _ in range(self.steps - 1):
            self._update(x)
        return self._update(x)

    @torch.enable_grad()
    def _update(self, x: Tensor) -> Tensor:
        logits, loss = self.forward_loss(x)
        self.optim.step(self.optimizer, loss, lambda: self.forward_loss(x)[1])
        return logits.detach()

    def forward_loss(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, C] of the present weights, and their loss; 0-dim."""
        features = self.backbone.features(x)
        logits = self.backbone.head(features)
        return logits, self.loss(features, logits)

    def loss(self, features: Tensor, logits: Tensor) -> Tensor:
        """Of a batch with `features` [B, D] and `logits` [B, C]; 0-dim."""
        p = logits.softmax(1)
        loss = self.diversity * certainty(p.mean(0)) - certainty(p).mean(0)
        if not self.pseudo:
            return loss
        if self.labels == "prototypes":
            return loss + self.pseudo * F.cross_entropy(
                logits, prototype_labels(features.detach(), p.detach())
            )
        confidence, labels = p.max(1)
        sure = confidence > self.threshold
        if not sure.any():
            return loss
        return loss + self.pseudo * F.cross_entropy(logits[sure], labels[sure])
