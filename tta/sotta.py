"""SoTTA: a memory of confident images, balanced by predicted class, and sharpness-aware steps.

Paper: "SoTTA: Robust Test-Time Adaptation on Noisy Data Streams" (NeurIPS 2023, arXiv 2310.10074).
Code: github.com/taeckyung/SoTTA @ 50b3333, from which this is written; no recorded run.

What the code does and the paper does not say:
* the loss is a mean over images and classes, entropy / C, with 1e-6 inside the logarithm;
* layers of SAR's list of names do not learn (`top=names`);
* both passes of a sharpness-aware step move the running statistics, all layers' of them;
* `--weight_decay 0` counts as not given, so CIFAR runs have 5e-4 and ImageNet runs none.

Deviations that change no number: labels, confidences and scores come from one forward of a batch
(the code forwards an image for its label and again in its batch for the score); labels and
confidences reach the host in one transfer; the memory, which fits into one batch, is not shuffled.
Deviations that do: a non-finite loss stops the run; images after the last full `every` are
predicted like any other (the code drops them); GroupNorm learns under `layers=norm` (the code
hands it to the optimiser, frozen); stream and random numbers are separate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Count, Unit
from driftline.core.strategy import TTAStrategy
from driftline.parts.memory import Memory, choose
from driftline.parts.modes import evaluating
from driftline.parts.norms import Layers, Top, batch_norms, enough_in_training, train_norms
from driftline.parts.optim import StreamOptim


class SoTTA(TTAStrategy):
    """Entropy minimisation on a memory, every so many images; predictions in evaluation mode.

    Args:
        backbone: a network with normalisation layers.
        seed: of the choice which image leaves the memory.
        layers: which normalisation layers learn, see `parts/norms.py`.
        top: whether the uppermost layers learn, see `parts/norms.py`; `names` is official.
        optim: of the one group `trained`; `sam` is the paper's entropy-sharpness minimisation.
        capacity: images that the memory holds.
        every: images of the stream from one update to the next, also within a batch.
        threshold: least confidence (largest probability) of an image that enters the memory.
        momentum: weight of the memory's statistics in the running ones of batch normalisation.

    The predictions on an image do not depend on how the stream is cut into batches: a batch of any
    size, one image included, is taken in pieces that end where an update is due. While nothing was
    confident, the memory is empty and nothing changes. With a single image in the memory, a map of
    one pixel raises a UserError.
    """

    needs = frozenset({"head"})

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        layers: Layers,
        top: Top,
        optim: StreamOptim,
        capacity: Count,
        every: Count,
        threshold: Unit,
        momentum: Unit,
    ) -> None:
        super().__init__(backbone, seed=seed)
        trained = train_norms(backbone, layers, strategy="sotta", top=top, batch_statistics=False)
        for name, layer in batch_norms(backbone.net).items():
            if layer.running_mean is None:
                raise UserError(
                    f"strategy=sotta predicts with running statistics, and {name} keeps none "
                    "(track_running_stats=False); use strategy=tent"
                )
            layer.momentum = momentum
            layer.register_forward_pre_hook(enough_in_training)
        self.backbone.train()
        self.optim = optim
        self.optimizer = optim.optimizer({"trained": trained.values()})
        self.capacity, self.every, self.threshold = capacity, every, threshold
        self.memory = Memory()
        self.seen = 0  # images of the stream
        self.rng("memory")  # part of the state from the start

    def get_extra_state(self) -> int:
        return self.seen

    def set_extra_state(self, state: int) -> None:
        self.seen = state

    def predict(self, x: Tensor) -> Tensor:
        """Scores with the running statistics; dropout is off."""
        with evaluating(self.backbone):
            return self.backbone(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C], of each image from before the update that it takes part in.

        Raises:
            Diverged: when the loss is not finite.
        """
        scores: list[Tensor] = []
        while len(x):
            piece = x[: self.every - self.seen % self.every]
            scores.append(self.predict(piece))
            confidence, label = scores[-1].softmax(1).max(1)
            read = torch.stack([label.double(), confidence.double()], 1).tolist()
            for image, (k, sure) in zip(piece, read, strict=True):
                self.offer(image, int(k), sure)
            self.seen += len(piece)
            if self.seen % self.every == 0:
                self._update()
            x = x[len(piece) :]
        return torch.cat(scores)

    def offer(self, image: Tensor, label: int, confidence: float) -> None:
        """Let a confident image in; from a full memory, one of the largest class goes for it."""
        memory, rng = self.memory, self.rng("memory")
        if confidence < self.threshold:
            return
        if len(memory) == self.capacity:
            largest = memory.largest()
            loser = label if label in largest else choose(largest, rng)
            memory.remove(choose(memory.of_class(loser), rng))
        memory.insert(image, label, confidence)

    @torch.enable_grad()
    def _update(self) -> None:
        if not len(self.memory):
            return
        images = self.memory.images()

        def loss() -> Tensor:
            return self.loss(self.backbone(images))

        self.optim.step(self.optimizer, loss(), loss)

    def loss(self, logits: Tensor) -> Tensor:
        """Entropy of the predictions `logits` [B, C], mean over images and classes."""
        p = logits.softmax(1)
        return -(p * (p + 1e-6).log()).mean()
