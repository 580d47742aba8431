"""SimATTA: labels bought of a few uncertain images, beside the sure ones of the source model.

Paper: "Active Test-Time Adaptation: Theoretical Analyses and An Algorithm" (Gui, Li, Ji, ICLR 2024,
arXiv 2404.05094). Code: github.com/divelab/ATTA @ b8bba6d (`kernel/algorithms/SimATTA.py`, configs
of PACS, VLCS, OfficeHome and Tiny-ImageNet-C), from which this is written; no recorded run. Checked
by hand: selection, weights of the anchors, loss, length of the training; clusters against all
partitions of a few points.

What the code does and the paper does not say:
* it has no budget: as many labels are bought as there are clusters without an anchor;
* an anchor's weight grows by all images of its cluster, anchors too, over the anchors in it;
* below `cold_start` sure images, the weight of the bought ones is at most 0.2 (README: at least);
* `steps` ends the training of (Tiny-)ImageNet and CIFAR alone, after steps + 2 updates; elsewhere
  only the loss on bought images ends it;
* the window of that loss leaves out every sixth update, with a window of five;
* teacher, consistency and `beta` of the class are not used.

Deviations that change no number: the network trains in evaluation mode (the code's has frozen
statistics and no dropout); features of bought images are computed when the next clustering reads
them, so not after the last batch nor with a spent budget; the 100 surest images of a batch do not
become 101 after the first. Deviations that do: a budget, which takes the largest clusters first;
the clustering, scikit-learn's in the code, is `parts/clusters.py`, with its own random numbers; no
more clusters than different points, where the code stops; while nothing is bought nothing is
learned, where the code stops; an image that two clusters choose is paid once; two classes are two
outputs (one in the code).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.oracle import Oracle
from driftline.core.paths import run_line
from driftline.core.ranges import Count, CountOrZero, NonNegative, Size
from driftline.core.strategy import TTAStrategy
from driftline.parts.clusters import kmeans
from driftline.parts.heads import linear_head
from driftline.parts.memory import Memory
from driftline.parts.modes import evaluating
from driftline.parts.objectives import entropy
from driftline.parts.optim import StreamOptim

COLD_SHARE = 0.2  # weight of bought images during the cold start
NO_ORACLE = (
    "strategy=simatta learns from labels that it buys, and has no oracle: call use_oracle(oracle) "
    "with oracle = Oracle(budget) of driftline.core.oracle, and adapt inside `with "
    f"oracle.batch(labels)` (`{run_line()}` does both)"
)
PATIENCE = 5  # windows without a lower loss, after which one more ends the training


def passes(n: int, size: int, rng: torch.Generator) -> Iterator[list[int]]:
    """Batches of rows, for ever: passes of `n` draws with replacement, the last batch short."""
    while True:
        for rows in torch.randint(n, (n,), generator=rng).split(size):
            yield rows.tolist()


class SimATTA(TTAStrategy):
    """Each batch: predict, buy labels, keep what the source model is sure of, train on both.

    Args:
        backbone: a classifier with a linear head; all of its weights learn.
        seed: of the clustering and of the batches of the training.
        optim: of the one group `weights`; starts anew with every batch of the stream.
        buy_above: least entropy, in nats, of an image whose label may be bought.
        keep_below: images of lower entropy, in nats, under the source model are kept with the
            prediction of that one as their label; 0 keeps none and does not run it.
        keep: such images of a batch, at most; those of the lowest entropy.
        capacity: such images in all, of which the oldest leave; null keeps every one, on the
            device and in checkpoints.
        clusters: of bought images and candidates, in the first batch. A label is bought of each
            cluster without a bought image in it.
        growth: further clusters a batch; a fraction adds up.
        cold_start: kept images below which the bought ones count for a fifth of the loss at most;
            with as many, they count by their number.
        train_batch: images of a kind in an update, at most.
        max_updates: a batch of the stream; null: until the loss on bought images stops to fall.
        window: updates whose loss is averaged to see that.

    The labels come from an `Oracle` within `scenario.label_budget`; while none was bought, the
    network stays as it is. One image, a short batch and equal images are clustered like others:
    there are at most as many clusters as different images. Normalisation layers of any kind keep
    the statistics of the source.
    """

    needs = frozenset({"head", "features"})
    buys_labels = True
    grows = (
        "images: each label bought, within scenario.label_budget, and each kept one, within "
        "capacity; 12 H W bytes each, in a pool that doubles"
    )
    backbone: Any  # a Backbone; the parent promises less

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        optim: StreamOptim,
        buy_above: NonNegative,
        keep_below: NonNegative,
        keep: Count,
        capacity: Count | None,
        clusters: Count,
        growth: NonNegative,
        cold_start: CountOrZero,
        train_batch: Size,
        max_updates: Count | None,
        window: Count,
    ) -> None:
        super().__init__(backbone, seed=seed)
        linear_head(backbone, "simatta")
        self.optim, self.buy_above, self.keep_below = optim, buy_above, keep_below
        self.keep, self.capacity, self.cold_start = keep, capacity, cold_start
        self.train_batch, self.max_updates, self.window = train_batch, max_updates, window
        self.source = deepcopy(backbone.eval()).requires_grad_(False)
        self.backbone.requires_grad_(True)
        self.optimizer = optim.optimizer({"weights": self.backbone.parameters()})
        self.bought, self.kept = Memory(), Memory()  # scores: weights in the clustering
        self.waiting = Memory()  # paid, label not there yet; labels: numbers of their orders
        self.clusters, self.growth = float(clusters), growth
        self.oracle: Oracle | None = None
        for purpose in ("clusters", "training"):
            self.rng(purpose)  # part of the state from the start

    def use_oracle(self, oracle: Oracle) -> None:
        self.oracle = oracle

    def get_extra_state(self) -> float:
        return self.clusters

    def set_extra_state(self, state: float) -> None:
        self.clusters = state

    def frozen(self) -> set[str]:
        """The source never changes and is rebuilt from the pretrained weights."""
        return super().frozen() | {f"source.{name}" for name in self.source.state_dict()}

    def predict(self, x: Tensor) -> Tensor:
        with evaluating(self.backbone):
            return self.backbone(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] from before this batch is learned from.

        Raises:
            Diverged: when the loss is not finite.
        """
        with evaluating(self.backbone):
            features = self.backbone.features(x)
            scores = self.backbone.head(features)
        if not scores.isfinite().all():  # diverged; whoever asked sees it
            return scores
        self._receive()
        self._buy(x, features, entropy(scores))
        if self.keep_below:
            self._keep(x)
        if len(self.bought):
            self._train()
        return scores

    def _buy(self, x: Tensor, features: Tensor, surprise: Tensor) -> None:
        """Labels of uncertain images far from those whose label is known."""
        clusters = int(self.clusters)
        self.clusters += self.growth
        if self.oracle is None:
            warnings.warn(NO_ORACLE, stacklevel=3)
        candidates = (surprise >= self.buy_above).nonzero().flatten()
        known = len(self.bought)
        if self.oracle is None or not self.oracle.left or not known + len(candidates):
            return
        parts = [features[candidates]]
        if known:
            with evaluating(self.backbone):
                images = self.bought.images().split(32)
                parts = [*map(self.backbone.features, images), *parts]
        weights = x.new_tensor([*self.bought.scores, *[1.0] * len(candidates)])
        rows, sizes, more = self.select(torch.cat(parts).double(), weights.double(), clusters)
        pairs = zip(self.bought.scores, more.tolist(), strict=True)
        self.bought.scores = [weight + gain for weight, gain in pairs]
        sizes, order = sizes.sort(descending=True, stable=True)
        rows = candidates[rows[order[: self.oracle.left]]].tolist()
        numbers = self.oracle.order(rows)
        for row, number, size in zip(rows, numbers, sizes.tolist(), strict=False):
            self.waiting.insert(x[row], number, size)
        self._receive()

    def _receive(self) -> None:
        """Images whose label has come; one of no class of the network is of no use."""
        labels = {} if self.oracle is None else self.oracle.delivered()
        for number, label in labels.items():
            if number not in self.waiting.labels:  # a rule has put the method back since
                continue
            at = self.waiting.labels.index(number)
            if label >= 0:
                self.bought.insert(self.waiting.images([at])[0], label, self.waiting.scores[at])
            self.waiting.remove(at)

    def select(
        self, points: Tensor, weights: Tensor, clusters: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which candidates to label, of how many images each cluster is, and what anchors gain.

        Args:
            points: features [N, D], first those of the images with a label; `weights` [N].

        Returns:
            positions among the candidates, sizes of their clusters, and what the weights of the
            images with a label gain.
        """
        known = len(self.bought)
        k = min(clusters, len(points.unique(dim=0)))
        centres, member = kmeans(points, weights, k, self.rng("clusters"))
        size, held = member.bincount(minlength=k), member[:known].bincount(minlength=k)
        nearest = torch.cdist(centres, points).argmin(1)  # which may lie in another cluster
        fresh = (held == 0) & (size > 0) & (nearest >= known)
        return nearest[fresh] - known, size[fresh], (size / held)[member[:known]]

    def _keep(self, x: Tensor) -> None:
        """Images that the source model is sure of, with its prediction."""
        with torch.no_grad():
            scores = self.source(x)
        surprise = entropy(scores)
        rows = surprise.argsort(stable=True)[: self.keep]
        rows = rows[surprise[rows] < self.keep_below]
        labels = scores.argmax(1)[rows].tolist()
        for row, label in zip(rows.tolist(), labels, strict=True):
            if len(self.kept) == self.capacity:
                self.kept.remove(0)
            self.kept.insert(x[row], label)

    @torch.enable_grad()
    def _train(self) -> None:
        """Updates on both kinds of images, weighted by their numbers."""
        kept, n = self.kept if len(self.kept) else self.bought, len(self.bought)
        share = n / (n + len(kept))
        if len(kept) < self.cold_start:
            share = min(COLD_SHARE, share)
        rng, size = self.rng("training"), self.train_batch
        draws = zip(passes(len(kept), size, rng), passes(n, size, rng), strict=False)
        lowest, idle, losses = math.inf, 0, list[Tensor]()
        for update, rows in enumerate(draws, 1):
            each = partial(self._losses, kept, rows, share)
            loss, on_bought = each()
            self.optim.step(self.optimizer, loss, lambda each=each: each()[0])
            if len(losses) < self.window:
                losses.append(on_bought)
            else:
                mean, losses = float(torch.stack(losses).double().mean()), []
                idle = 0 if mean < lowest else idle + 1
                lowest = min(lowest, mean)
                if idle > PATIENCE:
                    break
            if update == self.max_updates:
                break
        assert self.optimizer is not None
        self.optimizer.state.clear()

    def _losses(
        self, kept: Memory, rows: tuple[list[int], list[int]], share: float
    ) -> tuple[Tensor, Tensor]:
        """The loss on kept and bought images, of which these have weight `share`, and on these."""
        each = []
        for memory, chosen in zip((kept, self.bought), rows, strict=True):
            labels = torch.tensor([memory.labels[row] for row in chosen], device=self.device)
            each.append(F.cross_entropy(self.backbone(memory.images(chosen)), labels))
        return (1 - share) * each[0] + share * each[1], each[1].detach()
