"""HPCR, holistic proxy-based contrastive replay: images against the class rows of their batch.

Paper: Lin et al., "HPCR: Holistic Proxy-based Contrastive Replay for Online Continual Learning",
TNNLS 2025, arXiv 2309.15038. Official code: FelixHuiweiLin/PCR fba5677, `agents/hpcr.py`,
`utils/loss.py`, `models/resnet.py`, `agents/base.py`; there are no recorded cases, the losses were
checked against that code and by hand. Of the paper the abstract was read. PCR (Lin et al., CVPR
2023, arXiv 2304.04408) is `scale_max = scale_min = 1`, `alpha = beta = 0`.

Scores are cosines of feature and row (proxy) over a temperature. Every image counts twice, as the
test pipeline gives it and augmented; v are both views of the batch, m those of what is drawn:

    loss = scale * mean over [m, v] of -log P(own row among the rows of the labels of [m, v])
         + alpha * mean (z(m) - z_m)^2 over the labels of [m, v]
         + beta * cross-entropy of the similarities among m with those among f_m

A row stands among the others as often as its label occurs. Scores z_m and features f_m are those of
the moment before the step in which the image came; the last two terms begin with the second task.
`scale` is the official second temperature: it goes from `scale_min` to `scale_max` and back in
`period` steps. While the memory is empty nothing is learned.

Deviations that change no number: as in `cl/er.py`. That do: random draws as in `cl/er.py`; the
augmented view is that of the scenario's pipeline (official: crop, flip, colour, grey); a short last
batch is learned from (official: left out); features keep their image where the memory fills up
within a batch (official: they shift).
"""

from __future__ import annotations

from math import cos, pi
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.er import ER
from driftline.core.ranges import Count, NonNegative, Positive, Size
from driftline.core.stream import BOUNDARIES, Batch, Task
from driftline.parts.buffer import Rule
from driftline.parts.optim import Optim

Pairs = Literal["proxies", "samples", "all"]


class Proxies(nn.Module):
    """`cos(feature, row) / temperature` with a row for each class, at first none.

    Args:
        dim: length D of a feature.
    """

    def __init__(self, dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(0, dim))

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Append rows from U(-1/sqrt(D), 1/sqrt(D)) up to `classes` in all."""
        old = self.weight.detach()
        new = torch.empty(max(0, classes - len(old)), old.shape[1])
        new.uniform_(-(old.shape[1] ** -0.5), old.shape[1] ** -0.5, generator=generator)
        self.weight = nn.Parameter(torch.cat([old, new.to(old)]))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        return directions(features) @ directions(self.weight).T / self.temperature


class HPCR(ER):
    """Contrastive replay with proxies, old scores and old similarities.

    Args:
        num_classes, epochs, optim, loss_scope, freeze_bn, capacity, insertion, replay_batch: as in
            `ER`. `loss_scope`: which classes have a row when the scores of an image are stored.
        temperature: of cosines.
        pairs: what an image is compared with: `proxies`; `samples`: and with the other images;
            `all`: and rows are compared likewise.
        scale_min, scale_max: of the weight of the contrastive term.
        period: steps from one minimum to the next; counted from the beginning of every epoch.
        alpha: weight of the stored scores.
        beta: weight of the stored similarities.
    """

    needs = ER.needs | {BOUNDARIES}

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optim: Optim,
        loss_scope: Literal["seen", "all"],
        freeze_bn: bool,
        capacity: Count,
        insertion: Rule,
        replay_batch: Size,
        temperature: Positive,
        pairs: Pairs,
        scale_min: NonNegative,
        scale_max: NonNegative,
        period: Count,
        alpha: NonNegative,
        beta: NonNegative,
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optim=optim,
            loss_scope=loss_scope,
            freeze_bn=freeze_bn,
            adapter=None,
            capacity=capacity,
            insertion=insertion,
            replay_batch=replay_batch,
        )
        self.head = Proxies(backbone.dim, temperature)  # type: ignore[assignment]
        self.temperature, self.period = temperature, period
        self.pairs: Pairs = pairs
        self.scale_min, self.scale_max = scale_min, scale_max
        self.alpha, self.beta = alpha, beta
        self.step = 0  # of the epoch
        self.plain: Tensor | None = None  # the batch as the test pipeline gives it
        self.answers: Tensor | None = None  # features and scores of that, before the step

    def get_extra_state(self) -> int:
        return self.step

    def set_extra_state(self, state: int) -> None:
        self.step = state

    def begin_epoch(self, task: Task, epoch: int) -> None:
        super().begin_epoch(task, epoch)
        self.step = 0

    @property
    def scale(self) -> float:
        """Weight of the contrastive term in the present step."""
        wave = (1 - cos(2 * pi * self.step / self.period)) / 2
        return self.scale_min + (self.scale_max - self.scale_min) * wave

    # ------------------------------------------------------------------ training

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        plain = self._readers[self._task](batch.index.cpu(), None)
        self.plain, self.answers = plain.to(self.device), None
        logged = super().observe(batch)
        self.step += 1
        return logged

    def _draw(self) -> tuple[list[int], Tensor, Tensor]:
        """Both views of as many images, one behind the other."""
        positions, x, y = super()._draw()
        plain = self.buffer.images(positions, self._readers, None).to(self.device)
        return positions, torch.cat([plain, x]), torch.cat([y, y])

    def remember(self, batch: Batch, scores: Tensor | None = None) -> None:
        super().remember(batch, self.answers)

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert self.plain is not None
        features = self.features(torch.cat([self.plain, batch.x]))
        scores = self.head(features)
        own = scores[: len(batch.y)].detach()
        if self.answers is None:  # not those of a second pass
            self.answers = torch.cat([features[: len(own)].detach(), own], 1)
        loss = 0 * scores.sum()
        for positions, x, y in self.drawn:
            again = self.features(x)
            labels = torch.cat([y, batch.y, batch.y])
            rows, both = self.head.weight[labels], torch.cat([again, features])
            loss = self.scale * contrast(both, rows, labels, self.temperature, self.pairs)
            if self._task:
                assert self.buffer.scores is not None
                stored = self.buffer.scores[positions].repeat(2, 1)
                old, known = stored[:, : again.shape[1]], stored[:, again.shape[1] :]
                loss = loss + self.alpha * distance(self.head(again), known, labels)
                loss = loss + self.beta * relation(again, old, self.temperature)
        self.task_optim.backward(self.optimizer, loss)
        return own, loss.detach(), {}


def directions(x: Tensor) -> Tensor:
    """Rows of `x` [N, D] over their length."""
    return x / (x.norm(dim=1, keepdim=True) + 1e-6)


def contrast(
    features: Tensor, rows: Tensor, labels: Tensor, temperature: float, pairs: Pairs
) -> Tensor:
    """Supervised contrastive loss of features [N, D] and the rows [N, D] of their labels; 0-dim.

    Mean over anchors of the mean over partners with the anchor's label of -log softmax over all
    partners; nothing is its own partner.
    """
    features, rows = directions(features), directions(rows)
    partners = rows if pairs == "proxies" else torch.cat([features, rows])
    anchors = partners if pairs == "all" else features
    logits = anchors @ partners.T / temperature
    count = len(labels)
    same = labels.repeat(len(anchors) // count)[:, None] == labels.repeat(len(partners) // count)
    if pairs != "proxies":
        itself = torch.eye(len(anchors), len(partners), dtype=torch.bool, device=labels.device)
        logits, same = logits.masked_fill(itself, -torch.inf), same & ~itself
    log_p = logits.log_softmax(1).masked_fill(~same, 0)
    return -(log_p.sum(1) / same.sum(1)).mean()


def distance(scores: Tensor, stored: Tensor, labels: Tensor) -> Tensor:
    """Mean squared difference of scores [N, C] from stored ones in the columns `labels`; 0-dim.

    Of a class that did not exist when an image came it has no score.
    """
    labels = labels[labels < stored.shape[1]]
    old = stored[:, labels]
    known = old.isfinite()
    return F.mse_loss(scores[:, labels][known], old[known])


def relation(features: Tensor, old: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of an image's similarities to the others, of features with old ones [N, D]."""
    apart = ~torch.eye(len(old), dtype=torch.bool, device=old.device)

    def similarities(x: Tensor) -> Tensor:
        x = directions(x)
        return (x @ x.T / temperature)[apart].view(len(x), -1)

    return F.cross_entropy(similarities(features), similarities(old).softmax(1))
