"""GTTA: labelled source images moved towards the test images, then filtered pseudo-labels.

Paper: "Introducing Intermediate Domains for Effective Self-Training during Test-Time" (IJCNN 2024,
arXiv 2208.07736; "Gradual Test-Time Adaptation by Self-Training and Style Transfer" at first).
Code: github.com/mariodoebler/test-time-adaptation @ 8b2ed63, of the same authors.

This is the variant with mix-up. The one with style transfer, which the authors' configuration for
ImageNet-C names, cannot be constructed in their code at this commit (its constructor reads a name
that does not exist) and needs decoders that are not released; it is not offered.

What the code does, and may surprise: with `mix=1/3`, two thirds of a mixed image are the source's;
a batch in which no pseudo-label survives gives a NaN loss with zero gradients, and momentum moves
the weights all the same (`on_empty`).

Deviations that change no number: the NaN is not computed with.
Deviations that do: a reset also puts the average confidence back, and begins a new pass over the
source images, where the code leaves both; BatchNorm1d layers use batch statistics too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, Size, Unit
from driftline.core.strategy import TTAStrategy
from driftline.core.stream import SourceImages
from driftline.parts.modes import evaluating
from driftline.parts.norms import collect_parameters, train_only, use_batch_statistics
from driftline.parts.optim import StreamOptim
from driftline.parts.replay import Replay

IGNORED = -1  # label of an image that is not learned from


class GTTA(TTAStrategy):
    """Each batch: a step on source images mixed with test images, a step on pseudo-labels.

    Args:
        backbone: any classifier.
        seed: of the order of the source images.
        optim: of the one group `weights`; both steps are its own.
        mix: share of the test image in a mixed one.
        confidence_start: the average confidence before the first batch.
        confidence_momentum: weight of the old average; a pseudo-label counts from the square root
            of the average on, its own batch included.
        on_empty: without a pseudo-label that counts, `skip` the second step, or make it with a zero
            gradient, so that `momentum` still moves the weights.
        source_batch: source images a batch; cut to the number of test images.
        steps: pairs of steps per batch, each with other source images; the pseudo-labels are those
            of the first.

    One image and a short last batch adapt like any other batch; only a map of a single pixel for
    a single image raises a UserError. Networks without BatchNorm need nothing else.
    """

    needs = frozenset({"head"})
    batch_dependent = True
    confidence: Tensor
    empty: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        optim: StreamOptim,
        mix: Unit,
        confidence_start: Unit,
        confidence_momentum: Unit,
        on_empty: Literal["skip", "momentum"],
        source_batch: Size,
        steps: Count,
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.optim, self.mix, self.steps = optim, mix, steps
        self.momentum, self.on_empty = confidence_momentum, on_empty
        trained = list(collect_parameters(backbone.net).values())
        train_only(self.backbone.train(), trained)
        use_batch_statistics(backbone.net)
        self.optimizer = optim.optimizer({"weights": trained})
        self.replay = Replay(source_batch, self.rng("replay"), strategy="gtta")
        start = torch.tensor(confidence_start, dtype=trained[0].dtype, device=self.device)
        self.register_buffer("confidence", start)  # running average of the largest probability
        self.register_buffer("empty", torch.zeros((), dtype=torch.int64, device=self.device))

    @classmethod
    def replays_source(cls, options: Mapping[str, Any]) -> bool:
        return True

    def use_source(self, source: SourceImages) -> None:
        self.replay.use(source)

    def report(self) -> dict[str, float]:
        """Batches since the last reset in which no pseudo-label counted."""
        return {"batches_without_pseudo_label": float(self.empty)}

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the current weights; dropout is off."""
        with evaluating(self):
            return self.backbone(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] from between the two steps of the last pair.

        Raises:
            Diverged: when a loss is not finite; the step is not made then.
        """
        scores = self._scores(x)
        labels = self.pseudo_labels(scores)
        self.empty += (labels == IGNORED).all()
        after = scores
        for turn in range(self.steps):
            self.learn(*self.mixed(x, self._scores(x) if turn else scores))
            after = self.learn(x, labels)
        return after

    @torch.no_grad()
    def _scores(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def pseudo_labels(self, scores: Tensor) -> Tensor:
        """Classes [B] of the largest scores, or -1; moves the average confidence first."""
        best, labels = scores.softmax(1).max(1)
        old = self.momentum * self.confidence
        self.confidence = old + (1 - self.momentum) * best.mean()
        return labels.masked_fill(best < self.confidence.sqrt(), IGNORED)

    def mixed(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Source images, each with the test image whose prediction agrees most, and their labels.

        Args:
            scores: [B, C] of the test images `x`.
        """
        source = self.replay.next().to(self.device)
        images, y = source.x[: len(x)], source.y[: len(x)]
        agreement = self._scores(images).softmax(1) @ scores.softmax(1).T
        return self.mix * x[agreement.argmax(1)] + (1 - self.mix) * images, y

    @torch.enable_grad()
    def learn(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on images with labels; scores [B, C] of the images from before it."""
        counts = bool((y != IGNORED).any())
        if not counts and self.on_empty == "skip":
            return self._scores(x)

        def gradients() -> Tensor:
            logits = self.backbone(x)
            loss = self.loss(logits, y) if counts else 0 * logits.sum()
            self.optim.backward(self.optimizer, loss)
            return logits.detach()

        scores = gradients()
        self.optim.update(self.optimizer, gradients)
        return scores

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy of the images whose label counts."""
        return F.cross_entropy(logits, y, ignore_index=IGNORED)
