"""ROID: weighted soft likelihood ratios on the normalisation layers, held near the source.

Paper: "Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and Prior
Correction" (WACV 2024, arXiv 2306.00650).
Code: github.com/mariodoebler/test-time-adaptation @ 8b2ed63 (`classification/methods/roid.py`).

What the code does: the prior multiplies the logits, so a negative logit of a frequent class falls
(the paper's formula is on probabilities: `prior_on`); the loss is a sum over the images that are
not masked, divided by the configured batch size (`divisor`); a view of the kept images alone goes
through the network, so their batch statistics are their own; the weights are pulled to the source
after every batch, whatever was learned from it.

Deviations that change no number: of the source only the parameters that learn are kept, on the
device; parameters that do not learn are frozen.
Deviations that do: where all images are equally diverse or certain (one image, equal images), the
scaling to [0, 1] is 0 / 0 in the code and the weights of the network become NaN; here such an
image does not stand out: its factor is 0 and its weight in the loss 1. A non-finite loss stops the
run. BatchNorm1d layers use the statistics of a single image too. The views draw from a generator of
the method. One update a batch.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, Positive, Unit
from driftline.core.strategy import TTAStrategy
from driftline.parts import views
from driftline.parts.modes import evaluating
from driftline.parts.norms import Layers, train_norms
from driftline.parts.objectives import consistencies, entropy
from driftline.parts.optim import StreamOptim
from driftline.parts.teacher import move_average

CLIP, EPS = 0.99, 1e-5  # of the soft likelihood ratio


def scaled(values: Tensor) -> Tensor:
    """`values` [B] between 0 and 1; all 0 if they are equal."""
    low, high = values.min(), values.max()
    span = high - low
    return (values - low) / torch.where(span > 0, span, 1)


def soft_likelihood_ratio(logits: Tensor) -> Tensor:
    """Loss [B]: minus the mean log odds of the classes under the prediction itself."""
    p = logits.softmax(1).clamp(max=CLIP)
    return -(p * (p / (1 - p) + EPS).log()).sum(1)


class ROID(TTAStrategy):
    """Each batch: weigh the images, one step on scales and shifts, a little back to the source.

    Args:
        backbone: a network with normalisation layers.
        seed: of the views.
        layers: which normalisation layers learn, see `parts/norms.py`; `norm` is official.
        optim: of the one group `trained`.
        weighting: images that look like the average prediction of late are masked, the others
            weigh `exp(diversity * certainty / temperature)`; false: every image weighs 1.
        temperature: of these weights; lower tells images further apart.
        class_ema: weight of the old average prediction, which diversity is measured from.
        consistency: also compare the prediction of a kept image with that of a transformed copy.
        ensemble: weight of the adapted parameters in the mean with the source, after each step; 1
            leaves them.
        prior_on: what is multiplied with the smoothed frequencies of the batch's predictions:
            `logits` (official), `probabilities` (returned as logarithms); None: nothing.
        divisor: of the summed loss, in images. `largest`: of the largest batch so far, which in a
            stream that starts with a full batch is the configured size (official); `batch`: of
            this batch; a number: that many.

    One image and a short last batch adapt like any other batch. A kept image whose map has a single
    pixel and that is alone has no batch statistics: a UserError.
    """

    needs = frozenset({"head"})
    batch_dependent = True
    class_average: Tensor
    largest: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        layers: Layers,
        optim: StreamOptim,
        weighting: bool,
        temperature: Positive,
        class_ema: Unit,
        consistency: bool,
        ensemble: Unit,
        prior_on: Literal["logits", "probabilities"] | None,
        divisor: Literal["largest", "batch"] | Count,
    ) -> None:
        super().__init__(backbone, seed=seed)
        name = type(self).__name__.lower()
        self.trained = list(train_norms(backbone, layers, strategy=name).values())
        self.backbone.eval()
        self.weighting, self.temperature, self.class_ema = weighting, temperature, class_ema
        self.consistency, self.ensemble = consistency, ensemble
        self.prior_on, self.divisor = prior_on, divisor
        self.source = nn.ParameterList(p.detach().clone() for p in self.trained)
        self.source.requires_grad_(False)
        classes = backbone.num_classes
        uniform = self.trained[0].detach().new_full((classes,), 1 / classes)
        self.register_buffer("class_average", uniform)
        self.register_buffer("largest", torch.zeros((), dtype=torch.int64))
        self.optim, self.optimizer = optim, optim.optimizer({"trained": self.trained})
        self.rng("views")

    def frozen(self) -> set[str]:
        """The source never changes and is rebuilt from the pretrained weights."""
        return super().frozen() | {f"source.{name}" for name in self.source.state_dict()}

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the current weights, with the prior of this batch."""
        with evaluating(self):
            return self.corrected(self.backbone(x))

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] from before the update on this batch."""
        self.largest.clamp_(min=len(x))
        with torch.enable_grad():
            logits = self.backbone(x)
            weights = self.weights(logits.detach())
            view = self.augment(x[weights > 0]) if self.consistency else None
            loss = self.loss(logits, weights, view)
            self.optim.step(
                self.optimizer, loss, lambda: self.loss(self.backbone(x), weights, view)
            )
        self.merge()
        return self.corrected(logits.detach())

    def weights(self, logits: Tensor) -> Tensor:
        """Weight [B] of each image in the loss, 0 where masked; moves the average prediction."""
        p = logits.softmax(1)
        if not self.weighting:
            return p.new_ones(len(p))
        diversity = scaled(1 - F.cosine_similarity(self.class_average[None], p, dim=1))
        certainty = scaled(-entropy(logits))
        weights = torch.exp(diversity * certainty / self.temperature)
        old, new = self.class_ema * self.class_average, (1 - self.class_ema) * p.mean(0)
        self.class_average = old + new
        return weights.masked_fill(diversity < diversity.mean(), 0)

    def augment(self, x: Tensor) -> Tensor:
        """One random view of the images `x`: one draw for all of them."""
        draws = views.draw(self.rng("views"), x.shape, blurred=False)
        return views.apply(x, draws, padding="reflect")

    def loss(self, logits: Tensor, weights: Tensor, view: Tensor | None) -> Tensor:
        """Weighted sum over the kept images, of which `view` is a transformed copy; 0-dim."""
        kept = weights > 0
        images = len(logits) if self.divisor == "batch" else self.divisor
        divisor = self.largest if images == "largest" else images
        loss = (soft_likelihood_ratio(logits) * weights)[kept].sum() / divisor
        if view is not None:
            each = consistencies(self.backbone(view), logits[kept], symmetric=True)
            loss = loss + (each * weights[kept]).sum() / divisor
        return loss

    def merge(self) -> None:
        """Move the adapted parameters a little towards the source."""
        move_average([*self.trained], [*self.source], self.ensemble)

    def corrected(self, logits: Tensor) -> Tensor:
        """`logits` [B, C] with the smoothed frequencies of the batch's predictions."""
        if self.prior_on is None:
            return logits
        prior, (images, classes) = logits.softmax(1).mean(0), logits.shape
        smooth = max(1 / images, 1 / classes) / prior.max()
        prior = (prior + smooth) / (1 + smooth * classes)
        if self.prior_on == "logits":
            return logits * prior
        return logits.log_softmax(1) + prior.log()
