"""AdaContrast: pseudo-labels refined by neighbours, contrast with a queue, diverse predictions.

Paper: "Contrastive Test-Time Adaptation" (CVPR 2022, arXiv 2204.10377).
Code: github.com/mariodoebler/test-time-adaptation @ 8b2ed63, the online version
(`classification/methods/adacontrast.py`); the authors' own github.com/DianCh/AdaContrast @ c3c8b88
passes 15 times over a set.

What the code does: negatives are chosen by labels that this batch has already overwritten, while
the features are those from before it (`mask_labels`); a full bank does not lose its oldest rows,
since its pointer stops elsewhere while it fills, and it may hold up to a batch more than the queue
(`replace`); running statistics see augmented views alone and serve the prediction; the queue is
random at the start, and a new random one after a reset. On corruption benchmarks the crop of the
weak view is as large as the image, so that view is a flip.

Deviations that change no number: the weak view runs without gradients, from which no loss asks
any; the queue is written after the loss instead of copied; tensors that are never optimised (class
token, position table) get no gradient.
Deviations that do: views are made of the batch, in floats, where the code works on 8-bit images,
and their blur is a Gaussian that PIL's approximates by boxes; an empty bank refines nothing (the
code fails); of a batch larger than the queue the last images enter; a non-finite loss stops the
run; stream and random numbers are separate. One update a batch.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, CountOrZero, NonNegative, Positive, Unit
from driftline.core.strategy import TTAStrategy
from driftline.parts.heads import linear_head
from driftline.parts.modes import evaluating
from driftline.parts.norms import batch_norms, collect_parameters, enough_in_training, train_only
from driftline.parts.optim import StreamOptim
from driftline.parts.teacher import move_average
from driftline.parts.views import grey, hue

# Colour jitter: around 1 (hue: around 0), and how far a factor may be from there.
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
JITTERED, GREYED, BLURRED, FLIPPED = 0.8, 0.2, 0.5, 0.5  # shares of the images
SIGMA = (0.1, 2.0)  # of the blur, pixels
RADIUS = 8  # of the blur, pixels


def flip(x: Tensor, rng: torch.Generator) -> Tensor:
    """Images [B, 3, H, W], each mirrored with probability 1/2."""
    mirrored = (torch.rand(len(x), generator=rng) < FLIPPED).to(x.device)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def jitter(x: Tensor, name: str, factor: Tensor) -> Tensor:
    """One operation on images [n, 3, H, W] in [0, 1] with a factor each, [n, 1, 1, 1]."""
    if name == "hue":
        x = x.clone()
        hue(x, factor[:, 0])
        return x
    other = torch.zeros_like(factor)
    if name == "contrast":
        other = grey(x, 1.0).mean((1, 2, 3), keepdim=True)
    elif name == "saturation":
        other = grey(x, 1.0)
    return (factor * x + (1 - factor) * other).clamp(0, 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Images [n, 3, H, W] through a Gaussian of `sigma` [n] pixels each."""
    distance = torch.arange(-RADIUS, RADIUS + 1).to(sigma)
    taps = (-0.5 * (distance / sigma[:, None]) ** 2).exp()
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, 0)[:, None].to(x)
    channels = F.pad(x, [RADIUS] * 4, mode="replicate").flatten(0, 1)[None]
    channels = F.conv2d(channels, taps[:, :, None], groups=len(taps))
    return F.conv2d(channels, taps[..., None], groups=len(taps)).view_as(x)


def strong_view(x: Tensor, rng: torch.Generator) -> Tensor:
    """Images [B, 3, H, W]: colour jitter, greyscale, blur and flip, all drawn for each image."""

    def chosen(share: float) -> Tensor:
        return torch.rand(len(x), generator=rng) < share

    x = x.clamp(0, 1)
    jittered, order = chosen(JITTERED), torch.rand(len(x), len(JITTER), generator=rng).argsort(1)
    factors = 2 * torch.rand(len(x), len(JITTER), generator=rng) - 1
    for step in range(len(JITTER)):
        for i, (name, reach) in enumerate(JITTER.items()):
            rows = (jittered & (order[:, step] == i)).nonzero()[:, 0]
            factor = factors[rows, i] * reach + (name != "hue")
            x[rows] = jitter(x[rows], name, factor[:, None, None, None].to(x))
    rows = chosen(GREYED).nonzero()[:, 0]
    x[rows] = grey(x[rows], 1.0).expand(-1, 3, -1, -1)
    rows, sigma = chosen(BLURRED).nonzero()[:, 0], torch.rand(len(x), generator=rng)
    if len(rows):
        x[rows] = blur(x[rows], SIGMA[0] + (SIGMA[1] - SIGMA[0]) * sigma[rows])
    return flip(x, rng)


class AdaContrast(TTAStrategy):
    """Each batch: label a weak view, learn it on a strong one, compare that with keys of another.

    Args:
        backbone: a classifier with a linear head; becomes the student.
        seed: of the views and of the queue.
        optim: of the groups `base` and `head`.
        queue_size: keys that a view is contrasted with, and the size of the neighbour bank.
        ema: weight of the old momentum network in its average with the student.
        temperature: of the contrast.
        neighbours: of the bank, whose probabilities are averaged to a pseudo-label.
        distance: between features, to choose them.
        refine_from: images seen before pseudo-labels are refined; until then they are the
            student's own predictions.
        classification, contrast, diversity: weights of the three losses.
        mask_labels: which slots of the queue are no negatives, by label. `new`: labels after this
            batch took the oldest slots (official); `old`: those that belong to the features.
        replace: rows of a full bank that a batch takes. `official`: from where the pointer stopped;
            `oldest`: the oldest.

    One image and a short last batch adapt like any other batch; only a map of a single pixel for
    a single image raises a UserError. Predictions do not depend on the batch.
    """

    needs = frozenset({"head", "features"})
    queue: Tensor | None
    queue_labels: Tensor | None
    bank: Tensor | None
    bank_probabilities: Tensor | None

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        optim: StreamOptim,
        queue_size: Count,
        ema: Unit,
        temperature: Positive,
        neighbours: Count,
        distance: Literal["cosine", "euclidean"],
        refine_from: CountOrZero,
        classification: NonNegative,
        contrast: NonNegative,
        diversity: NonNegative,
        mask_labels: Literal["new", "old"],
        replace: Literal["official", "oldest"],
    ) -> None:
        super().__init__(backbone, seed=seed)
        head = linear_head(backbone, "adacontrast")
        self.dim, self.classes = head.in_features, head.out_features
        self.queue_size, self.ema, self.temperature = queue_size, ema, temperature
        self.neighbours, self.distance, self.refine_from = neighbours, distance, refine_from
        self.classification, self.contrast, self.diversity = classification, contrast, diversity
        self.mask_labels, self.replace = mask_labels, replace
        trained = collect_parameters(backbone.net).values()
        train_only(self.backbone.train(), trained)
        for layer in batch_norms(backbone.net).values():
            layer.register_forward_pre_hook(enough_in_training)
        self.momentum = deepcopy(backbone).requires_grad_(False)
        for name in ("queue", "queue_labels", "bank", "bank_probabilities"):
            self.register_buffer(name, None)
        self.seen = self.queue_at = self.bank_at = 0
        of_head = {id(p) for p in head.parameters()}
        base = [p for p in trained if id(p) not in of_head]
        groups = {"base": base, "head": [p for p in trained if id(p) in of_head]}
        self.optim, self.optimizer = optim, optim.optimizer(groups)
        for purpose in ("queue", "views"):
            self.rng(purpose)

    def get_extra_state(self) -> list[int]:
        return [self.seen, self.queue_at, self.bank_at]

    def set_extra_state(self, state: list[int]) -> None:
        self.seen, self.queue_at, self.bank_at = state

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the student with its running statistics."""
        with evaluating(self.backbone):
            return self.backbone(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] of the images as they are, after the update on their views."""
        weak, query, key = self.weak(x), self.strong(x), self.strong(x)
        with torch.no_grad():
            labels = self.pseudo_labels(*self.encode(self.backbone, weak))
            move_average([*self.momentum.parameters()], [*self.backbone.parameters()], self.ema)
            keys = F.normalize(self.momentum.features(key), dim=1)
            slots, same = self.take_slots(labels)
        with torch.enable_grad():
            given = query, labels, keys, same
            self.optim.step(self.optimizer, self.loss(*given), lambda: self.loss(*given))
        with torch.no_grad():
            assert self.queue is not None
            self.queue[slots] = keys[-self.queue_size :]
            self.store(*self.encode(self.momentum, weak))
        return self.predict(x)

    def weak(self, x: Tensor) -> Tensor:
        """The view that is labelled."""
        return flip(x, self.rng("views"))

    def strong(self, x: Tensor) -> Tensor:
        """A view that is learned or compared with."""
        return strong_view(x, self.rng("views"))

    def encode(self, network: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] and scores [B, C]."""
        features = network.features(x)
        return features, network.head(features)

    def pseudo_labels(self, features: Tensor, logits: Tensor) -> Tensor:
        """Classes [B] of the weak view, from the student alone or from the neighbours."""
        alone = self.seen < self.refine_from  # asked before this batch counts
        self.seen += len(features) if alone else 0
        if alone or self.bank is None or self.bank_probabilities is None:
            return logits.argmax(1)
        if self.distance == "cosine":
            far = 1 - F.normalize(features, dim=1) @ F.normalize(self.bank, dim=1).T
        else:
            far = torch.cdist(features, self.bank)
        nearest = far.argsort(1)[:, : self.neighbours]
        return self.bank_probabilities[nearest].mean(1).argmax(1)

    def draw_queue(self) -> tuple[Tensor, Tensor]:
        """Random keys [K, D] of length 1 and random labels [K]."""
        rng, like = self.rng("queue"), next(self.backbone.parameters())
        keys = torch.randn(self.queue_size, self.dim, generator=rng)
        labels = torch.randint(self.classes, (self.queue_size,), generator=rng)
        return F.normalize(keys, dim=1).to(like), labels.to(self.device)

    def take_slots(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Give the oldest slots of the queue to `labels` [B], whose keys follow after the loss.

        Returns:
            the slots, and which of all slots [B, K] have the label of an image.
        """
        if self.queue is None or self.queue_labels is None:
            self.queue, self.queue_labels = self.draw_queue()
        same = labels[:, None] == self.queue_labels
        slots = self.queue_at + torch.arange(len(labels), device=labels.device)
        self.queue_at = (self.queue_at + len(labels)) % self.queue_size
        slots = (slots % self.queue_size)[-self.queue_size :]
        self.queue_labels[slots] = labels[-self.queue_size :]
        if self.mask_labels == "new":
            same = labels[:, None] == self.queue_labels
        return slots, same

    def loss(self, query: Tensor, labels: Tensor, keys: Tensor, same: Tensor) -> Tensor:
        """Weighted sum of the three losses of the view `query`; 0-dim."""
        label, instance, spread = self.losses(
            *self.encode(self.backbone, query), labels, keys, same
        )
        return self.classification * label + self.contrast * instance + self.diversity * spread

    def losses(
        self, features: Tensor, logits: Tensor, labels: Tensor, keys: Tensor, same: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the pseudo-labels, of the keys against the queue, of the mean prediction; 0-dim."""
        assert self.queue is not None
        query = F.normalize(features, dim=1)
        positive = (query * keys).sum(1, keepdim=True)
        negative = (query @ self.queue.T).masked_fill(same, -torch.inf)
        alike = torch.cat([positive, negative], 1) / self.temperature
        instance = F.cross_entropy(alike, torch.zeros_like(labels))
        mean = logits.softmax(1).mean(0)
        return F.cross_entropy(logits, labels), instance, (mean * (mean + 1e-8).log()).sum()

    def store(self, features: Tensor, logits: Tensor) -> None:
        """Put the weak view into the bank: at its end, or in the place of others if it is full."""
        new, images = logits.softmax(1), len(features)
        if self.bank is None or self.bank_probabilities is None:
            self.bank, self.bank_probabilities = features[:0], new[:0]
        size = len(self.bank)
        if size < self.queue_size:
            self.bank = torch.cat([self.bank, features])
            self.bank_probabilities = torch.cat([self.bank_probabilities, new])
            reached = (self.bank_at + images) % len(self.bank)
            self.bank_at = reached if self.replace == "official" else 0
            return
        rows = self.bank_at + torch.arange(images, device=features.device)
        rows = (rows % size)[-size:]
        self.bank[rows], self.bank_probabilities[rows] = features[-size:], new[-size:]
        self.bank_at = (self.bank_at + images) % size
