"""TUNA: the surest of the tasks' adapters and a universal one answer together.

Paper: Wang et al., "Integrating Task-Specific and Universal Adapters for Pre-Trained Model-based
Class-Incremental Learning", ICCV 2025, arXiv 2508.08165. Official code: LAMDA-CL/ICCV2025-TUNA
77d4f10, `models/tuna.py` and `backbone/vit_tuna.py`, read in the history of its fork
Ngahoang2005/ICCV2025-TUNA (the learner of LAMDA-CL/C3Box 1378ab2 is the same). It was not run: no
recorded numbers exist, but the authors' logs are public.

One working adapter set learns task after task under a cosine head and is stored at the end of
each. After a task, the head is trained once more on Gaussian features of all classes, each drawn
under the set of its own task. An image is scored under every stored set; the set whose scores have
the lowest entropy and a universal set give one softmax each, and these are added.

What the released code does otherwise than one would think has an option each:

* `universal=newest`: the sets are merged as in the paper (`fuse`), but evaluation asks for the set
  after the last stored one, which is the working set: the newest task's set stands for the
  universal one, and the merged set is never used. `merged`: the merged set.
* `stored_learn`: the term of orthogonality is not cut off from the stored sets, which the optimiser
  holds as well: their up-projections go on learning (and decaying) through all later tasks.
* `shrink=code`: the means of older classes are to be shortened before features are drawn, but the
  size of a task enters with the wrong sign: those of newer classes are shortened more, down to 0.8.
  `by_task`: from 0.9 for the oldest task to 1 for the newest.

Deviations that change no number but by rounding: those of `parts/alignment.py`; the loss is the
cross-entropy of the scores with a margin; the mean product of all pairs of rows is the product of
their means; the first task answers as the later ones do, with one set in both places.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone, weights_hash
from driftline.core.errors import UserError
from driftline.core.ranges import Count, CountOrZero, NonNegative, Positive
from driftline.core.strategy import CLStrategy
from driftline.core.stream import OWN_CLASSES, Batch, Task
from driftline.parts.adapters.mixture import ARROW, check_directed, mix_sets
from driftline.parts.adapters.plan import Plan
from driftline.parts.alignment import ClassGaussians, Statistics, collect
from driftline.parts.modes import evaluation_mode
from driftline.parts.optim import SameOptim
from driftline.parts.routing import by_distance, by_entropy, scores_of

CURRENT, UNIVERSAL = "current", "universal"  # the working and the merged set
RIDGE = 1e-4  # added to every variance


def fuse(values: Tensor) -> Tensor:
    """Of T values each, the largest in size among those with the sign of their mean (EMR-Merging).

    Args:
        values: float [T, ...].
    """
    sign = torch.where(values.mean(0) > 0, 1.0, -1.0)
    return (values * sign).clamp_min(0).amax(0) * sign


def overlap(new: Tensor, old: Tensor) -> Tensor:
    """Size of the mean product of the rows of two matrices [D, r], each row of length 1; 0-dim."""
    return (F.normalize(new, dim=1).mean(0) @ F.normalize(old, dim=1).mean(0)).abs()


class Tuna(CLStrategy):
    """Working and stored adapter sets, a growing cosine head, Gaussians of the classes.

    Args:
        epochs: passes over the training images of a task.
        adapter: of one task.
        optim: of the groups `adapter` and `head`; the alignment has its momentum and weight decay.
        scale: of the cosines.
        margin: taken off the cosine of the right class in training.
        orthogonality: weight of the overlap of the up-projections with those of each stored set,
            which counts exp(-t) times as much in task t (from 1); 0: none.
        stored_learn, universal, shrink: see the top of the file; `shrink=none` leaves means alone.
        router: the task's set for an image: that of the lowest `entropy`, as published; that under
            which it is nearest to a class mean of its task (`distance`); `arrow`: a mixture of the
            sets for each token and block (`parts/adapters/mixture.py`).
        statistics: of the features of a class: `covariance` or `variance` (its diagonal).
        align_epochs, align_lr: of the head on Gaussian features, from the second task on.
        align_period: epochs in which its rate falls to 0 along a cosine, to rise again after them.
        align_samples: features drawn a class and epoch, and those in a step; officially five
            training batches.

    Raises:
        UserError: for a network that lacks the points of `adapter`, or `orthogonality` with
            adapters that are no low-rank products.
        Diverged: if loss or features are no longer finite.
    """

    needs = frozenset({"features", OWN_CLASSES})
    unmergeable = (
        "it chooses the adapters of a task for each image and merges all of them by itself"
    )
    owner: Tensor  # int64 [C], task of each class
    finished: Tensor  # int64 [], tasks that have ended

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        epochs: Count,
        adapter: Plan,
        optim: SameOptim,
        scale: Positive,
        margin: NonNegative,
        orthogonality: NonNegative,
        stored_learn: bool,
        universal: Literal["newest", "merged"],
        shrink: Literal["none", "code", "by_task"],
        router: Literal["entropy", "distance", "arrow"],
        statistics: Statistics,
        align_epochs: CountOrZero,
        align_lr: NonNegative,
        align_period: Count,
        align_samples: Annotated[int, Ge(1), Le(10**5)],
    ) -> None:
        super().__init__(backbone, seed=seed)
        backbone.eval().requires_grad_(False)
        self.epochs, self.optim = epochs, optim
        self.scale, self.margin = scale, margin
        self.orthogonality, self.stored_learn = orthogonality, stored_learn
        self.universal, self.shrink, self.router = universal, shrink, router
        self.align_epochs, self.align_lr = align_epochs, align_lr
        self.align_period, self.align_samples = align_period, align_samples
        self.bank = adapter.bank(backbone)
        adapter.add(self.bank, CURRENT, self.rng("init"))
        if router == "arrow":
            check_directed([*self.bank.adapters(CURRENT).values()])
        if orthogonality and not self._up(CURRENT):
            raise UserError(
                "strategy.orthogonality compares the second factors of low-rank products, which "
                "adapters of this kind have not; set it to 0, or use adapter=mos or lora"
            )
        if universal == "merged":
            self.bank.copy(CURRENT, UNIVERSAL)
            self.bank.freeze(UNIVERSAL)
        self.head = nn.Parameter(torch.empty(0, backbone.dim))
        self.gaussians = ClassGaussians(backbone.dim, statistics, RIDGE)
        self.names: list[str] = []  # stored sets, one a task
        self.stops: list[int] = []  # classes seen at the end of each task
        self.columns = range(0)
        self.register_buffer("owner", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("finished", torch.zeros((), dtype=torch.int64))
        self._hashes: dict[str, str] = {}

    def _up(self, name: str) -> list[nn.Parameter]:
        """The up-projections of a set."""
        return [p for p in self.bank.second_factors(name) if p.ndim == 2]

    # -------------------------------------------------------------- training

    def grow(self, task: Task) -> None:
        """Room for one more stored set, for head rows and statistics of new classes."""
        self.bank.freeze(CURRENT, False)
        name = f"task{task.index}"
        self.bank.copy(CURRENT, name)  # its values come at the end of the task
        self.bank.freeze(name)
        learned = self.bank.parameters_of(CURRENT)
        if self.orthogonality and self.stored_learn:
            for stored in self.names:
                for p in self._up(stored):
                    p.requires_grad_()
                    learned.append(p)
        self.names.append(name)
        self.columns = task.classes
        self.gaussians.grow(task.classes.stop)
        added = max(0, task.classes.stop - len(self.owner))
        self.owner = F.pad(self.owner, (0, added), value=len(self.names) - 1)
        rows = torch.empty(added, self.head.shape[1]).normal_(0, 0.02, generator=self.rng("init"))
        self.head = nn.Parameter(torch.cat([self.head.detach(), rows.to(self.head)]))
        self.stops.append(len(self.owner))
        groups = {"adapter": learned, "head": [self.head]}
        self.optimizer = self.optim.optimizer(groups, self.bank.second_factors(CURRENT))

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if len(task.classes) == 1:
            self.warn_once(
                "one class",
                f"task {task.index} has one class: the loss over its own classes is 0 and its "
                "adapters stay as they were (scenario.increment sets the classes of a task)",
            )

    def begin_epoch(self, task: Task, epoch: int) -> None:
        self.optim.set_rates(self.optimizer, epoch, self.epochs)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step on the classes of the task; returns the loss and the accuracy in percent."""
        self._hashes.clear()
        self.bank.train()
        scores, loss = self._losses(batch)
        self.optim.step(self.optimizer, loss, lambda: self._losses(batch)[1])
        right = scores.detach().argmax(1) == batch.y - self.columns.start
        return {"loss": loss.detach(), "acc": 100 * right.float().mean()}

    def cosines(self, features: Tensor) -> Tensor:
        """[..., D] -> [..., C]."""
        return F.linear(F.normalize(features, dim=-1), F.normalize(self.head, dim=1))

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cosines with the rows of the task's classes, [B, C], and the loss, 0-dim."""
        own = slice(self.columns.start, self.columns.stop)
        y = batch.y - self.columns.start
        scores = self.cosines(self.bank.features(batch.x, CURRENT))[:, own]
        right = F.one_hot(y, len(self.columns))
        loss = F.cross_entropy(self.scale * (scores - self.margin * right), y)
        if self.orthogonality and len(self.names) > 1:
            weight = self.orthogonality * math.exp(-len(self.names))
            loss = loss + weight * self.overlaps()
        return scores, loss

    def overlaps(self) -> Tensor:
        """Mean over the adapters, summed over the stored sets before this task's; 0-dim."""
        new = self._up(CURRENT)
        each = [
            torch.stack([overlap(a, b) for a, b in zip(new, self._up(name), strict=True)]).mean()
            for name in self.names[:-1]
        ]
        return torch.stack(each).sum()

    # -------------------------------------------------------------- end of a task

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Store the set, merge all of them, measure the new classes, realign the head."""
        self._hashes.clear()
        own = self.bank.parameters_of(CURRENT)
        for stored, p in zip(self.bank.parameters_of(self.names[-1]), own, strict=True):
            stored.copy_(p)
        if self.universal == "merged":
            sets = [self.bank.parameters_of(name) for name in self.names]
            merged = self.bank.parameters_of(UNIVERSAL)
            for goal, *values in zip(merged, *sets, strict=True):
                goal.copy_(fuse(torch.stack(values)) if len(values) > 1 else values[0])
        with evaluation_mode(self):
            features, y = collect(
                task.fit(),
                lambda x: self.bank.features(x, CURRENT),
                device=self.device,
                lr=self.optim.lr,
            )
        self.owner[task.classes.start : task.classes.stop] = len(self.names) - 1
        if warning := self.gaussians.measure(task.classes, features, y):
            self.warn_once("covariance", warning)
        if len(self.names) > 1:
            self.align()
        self.finished.fill_(len(self.names))

    def lengths(self) -> Tensor:
        """Factors [C] of the class means in the alignment."""
        tasks, of_class = len(self.names), torch.arange(len(self.owner), device=self.device)
        if self.shrink == "none":
            return torch.ones(len(self.owner), device=self.device)
        # What the code divides by is minus the size of the newest task.
        index = of_class // -len(self.columns) if self.shrink == "code" else self.owner
        return 0.9 + 0.1 * (index + 1) / tasks

    def align(self) -> Tensor:
        """Train the head on Gaussian features of all classes seen; returns the loss per step."""
        return self.gaussians.align(
            [self.head],
            lambda features, y: F.cross_entropy(self.scale * self.cosines(features), y),
            optim=self.optim,
            lr=self.align_lr,
            epochs=self.align_epochs,
            period=self.align_period,
            samples=self.align_samples,
            rng=self.rng("align"),
            scale=self.lengths(),
        )

    # -------------------------------------------------------------- prediction

    def extractors(self) -> dict[str, str]:
        """The stored sets, or their mixture, and the merged one, as after the last step."""
        stored = self.names[: int(self.finished)]
        names = [*stored, UNIVERSAL] if stored and self.universal == "merged" else stored
        for name in names:
            if name not in self._hashes:
                self._hashes[name] = weights_hash(self.bank.sets[name].state_dict())
        hashes = {name: self._hashes[name] for name in names}
        if self.router == "arrow" and stored:
            mixed = mix_sets(self.bank, {name: hashes[name] for name in stored})
            return {names[-1]: hashes[names[-1]], ARROW: mixed}
        return hashes

    @torch.no_grad()
    def embed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """[B, 3, H, W] -> [S, B, D]; the sets share one pass of the frozen weights."""
        with evaluation_mode(self):
            if ARROW in names:
                return torch.stack([self.bank.features(x, name) for name in names])
            return self.bank.features_in_parts(x, names)

    @torch.no_grad()
    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        """Sums of two softmaxes, [B, C] of the classes seen, from [B, D] under each extractor."""
        tasks = int(self.finished)
        names = self.names[:tasks]
        universal = UNIVERSAL if self.universal == "merged" else names[-1]
        answering = [ARROW] if self.router == "arrow" else names
        stacked = torch.stack([features[n] for n in (*answering, universal)])
        scores = self.scale * self.cosines(stacked)[..., : self.stops[tasks - 1]]
        if self.router == "arrow":
            return scores[0].softmax(1) + scores[1].softmax(1)
        seen = scores.shape[2]
        if self.router == "entropy":
            chosen = by_entropy(scores[:-1])
        else:
            chosen = by_distance(stacked[:-1], self.gaussians.means[:seen], self.owner[:seen])
        return scores_of(scores[:-1], chosen).softmax(1) + scores[-1].softmax(1)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen] for x float [B, 3, H, W] in [0, 1]; 0 until a task has ended."""
        names = list(self.extractors())
        if not names:
            return x.new_zeros(len(x), len(self.owner))
        return self.classify(dict(zip(names, self.embed(x, names), strict=True)))

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._hashes.clear()
