"""EASE: one frozen adapter set a task; class means in every subspace, missing ones synthesised.

Paper: Zhou et al., "Expandable Subspace Ensemble for Pre-Trained Model-Based Class-Incremental
Learning", CVPR 2024, arXiv 2403.12030.
Official code: sun-hailong/CVPR24-Ease 6d67508 (the same in LAMDA-CL/LAMDA-PILOT 5240714).

Task t trains a fresh adapter set and a temporary cosine head on its own classes. Afterwards every
class of the task has a mean in each of the subspaces 0..t. A class of an older task i has none in
the subspaces k > i, whose adapters never saw it; its mean there is put together from the means of
newer classes, weighted by their similarity in subspace i. An image is scored in all subspaces.

Paper and code differ twice; the default is the code. `reweight`: the code divides alpha by the
number of other subspaces, the paper does not. `recalc_sim`: the code synthesises all missing means
again after each task, from every class that has a true one (true); the paper fills the newest
subspace once, from the classes of its task (false).

Deviations: sums of class means are float64. The official loops over pairs of classes are matrix
products. A set is part of the state, so a run can be resumed. Which task a class belongs to is a
table; sizes need not be equal. A class that comes back belongs to its last task and its means are
computed from that task's images alone, as the official code overwrites them. Evaluation reads
features that can be kept (`core/features.py`): T passes an image over a run of T tasks. The mode
`moni_adam` of the official OmniBenchmark setting is not EASE but APER and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.backbones.backbone import Backbone, weights_hash
from driftline.core.errors import Diverged
from driftline.core.ranges import Count, NonNegative
from driftline.core.strategy import CLStrategy
from driftline.core.stream import OWN_CLASSES, Batch, Task
from driftline.parts.adapters.plan import Plan
from driftline.parts.heads import CosineHead
from driftline.parts.modes import evaluation_mode
from driftline.parts.optim import Optim

PRETRAINED = "pretrained"  # the subspace without adapter


def complete(means: Tensor, owner: Tensor, recalculate: bool) -> Tensor:
    """Synthesise the means that old classes lack in the subspaces of later tasks.

    The mean of class a of task i in subspace k > i is a weighted mean of those of all classes b of
    tasks >= k; the weights are softmax over b of the cosine of a and b in subspace i.

    Args:
        means: float [T, C, D], mean of each class in the subspace of each task.
        owner: int64 [C], the task of each class; -1 leaves a class out.
        recalculate: all subspaces k > i, or the newest alone.

    Returns:
        A completed copy of `means`.
    """
    out, unit = means.clone(), F.normalize(means, dim=2)
    for task in range(len(means) - 1):
        first = task + 1 if recalculate else len(means) - 1
        spaces = torch.arange(first, len(means), device=means.device)
        donors = owner >= spaces[:, None]  # [K, C]; without any (no images), nothing is filled
        spaces, donors = spaces[donors.any(1)], donors[donors.any(1)]
        rows = (owner == task).nonzero().flatten()
        similarity = (unit[task, rows] @ unit[task].T).expand(len(spaces), -1, -1)
        share = similarity.masked_fill(~donors[:, None], -torch.inf).softmax(2)  # [K, A, C]
        out[spaces[:, None], rows] = share @ means[spaces]
    return out


def ensemble(features: Tensor, means: Tensor, weight: Tensor) -> Tensor:
    """Weighted sum of the cosines in S subspaces.

    Args:
        features: [S, B, D].
        means: [S, C, D]; a zero row has cosine 0.
        weight: [S, C].

    Returns:
        Scores [B, C].
    """
    cosines = F.normalize(features, dim=2) @ F.normalize(means, dim=2).mT
    return (cosines * weight[:, None]).sum(0)


class Ease(CLStrategy):
    """Adapter sets in a bank, a temporary head, and class means in every subspace.

    Args:
        epochs: of the first task.
        epochs_later: of the tasks after it; None: the same.
        adapter: of one task.
        optim: of the groups `adapter` and `head`, biases and the scale of the head included.
        alpha: weight of the subspaces of other tasks.
        reweight: `code`: alpha over the number of other subspaces; `paper`: alpha.
        recalc_sim: see `complete`.
        use_init_ptm: one more subspace, the pretrained network without adapter, weight `beta`.
        sets: `each`: adapters of its own for each task. `one`: the same ones go on, and class means
            stay as they were measured; for `around=merge`, which merges instead of growing.

    Raises:
        UserError: for a network that lacks the points of `adapter`.
        Diverged: if loss or features are no longer finite.
    """

    needs = frozenset({"features", OWN_CLASSES})
    unmergeable = "each task has a subspace of its own unless strategy.sets=one"
    means: Tensor  # float [S, C, D]
    owner: Tensor  # int64 [C], task of each class; -1: no means yet
    finished: Tensor  # int64 [], tasks whose means exist

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        epochs: Count,
        epochs_later: Count | None,
        adapter: Plan,
        optim: Optim,
        alpha: NonNegative,
        reweight: Literal["code", "paper"],
        recalc_sim: bool,
        use_init_ptm: bool,
        beta: NonNegative,
        sets: Literal["each", "one"],
    ) -> None:
        super().__init__(backbone, seed=seed)
        backbone.eval().requires_grad_(False)
        self.all_epochs = epochs, epochs if epochs_later is None else epochs_later
        self.epochs = epochs
        self.adapter, self.optim = adapter, optim
        self.alpha, self.beta, self.reweight = alpha, beta, reweight
        self.recalc_sim, self.use_init_ptm = recalc_sim, use_init_ptm
        self.one = sets == "one"
        if self.one:
            self.unmergeable = ""
        self.bank = adapter.bank(backbone, calibrates=True)
        self.head: CosineHead | None = None
        self.names: list[str] = []  # sets, one a task
        self.columns = range(0)
        self.register_buffer("means", torch.zeros(int(use_init_ptm), 0, backbone.dim))
        self.register_buffer("owner", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("finished", torch.zeros((), dtype=torch.int64))
        self._hashes: dict[str, str] = {}

    # -------------------------------------------------------------- training

    def grow(self, task: Task) -> None:
        """A fresh adapter set and head; zero rows for the means that `end_task` will fill."""
        later, new = self.head is not None, not (self.one and self.names)
        draws = self.rng("init")
        if new:
            for name in self.names:
                self.bank.freeze(name)
            self.names.append(f"task{task.index}")
            self.adapter.add(self.bank, self.names[-1], draws)
        name = self.names[-1]
        learned = self.bank.parameters_of(name)
        width = self.means.shape[2]
        self.head = CosineHead(width, len(task.classes), draws).to(self.device)
        self.columns = task.classes
        added = max(0, task.classes.stop - len(self.owner))
        self.means = F.pad(self.means, (0, 0, 0, added, 0, int(new)))
        self.owner = F.pad(self.owner, (0, added), value=-1)

        self.epochs = self.all_epochs[later]
        self.task_optim = self.optim.of_task(int(later))
        self.optimizer = self.task_optim.optimizer(
            {"adapter": learned, "head": self.head.parameters()}, self.bank.second_factors(name)
        )

    def begin_task(self, task: Task) -> None:
        sets = len(self.names)
        super().begin_task(task)
        if len(self.names) > sets:
            self.adapter.calibrate(self.bank, self.names[-1], task, lambda b: self.loss(b)[1])
        if len(task.classes) == 1:
            self.warn_once(
                "one class",
                f"task {task.index} has one class: the loss over its own classes is 0 and its "
                "adapters stay as they were made (scenario.increment sets the classes of a task)",
            )

    def begin_epoch(self, task: Task, epoch: int) -> None:
        self.task_optim.set_rates(self.optimizer, epoch, self.epochs)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step on the classes of the task; returns the loss and the accuracy in percent."""
        self.bank.train()
        scores, loss = self.loss(batch)
        self.task_optim.step(self.optimizer, loss, lambda: self.loss(batch)[1])
        right = scores.detach().argmax(1) == batch.y - self.columns.start
        return {"loss": loss.detach(), "acc": 100 * right.float().mean()}

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores [B, C] of the classes of the task, and the loss []."""
        scores = self.scores(batch.x)
        return scores, F.cross_entropy(scores, batch.y - self.columns.start)

    def scores(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> scores [B, C] of the head that learns."""
        assert self.head is not None
        return self.head(self.bank.features(x, self.names[-1]))

    # -------------------------------------------------------------- class means

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Means of the classes of `task` in every subspace, then those that old classes lack."""
        if not self.one:
            self.bank.freeze(self.names[-1])
        spaces, device = self._spaces(len(self.names)), self.device
        labels = torch.arange(task.classes.start, task.classes.stop, device=device)
        size = len(spaces), len(labels), self.means.shape[2]
        sums = torch.zeros(size, dtype=torch.float64, device=device)
        counts = torch.zeros(len(labels), dtype=torch.int64, device=device)
        for batch in task.fit():
            batch = batch.to(device)
            features = self.embed(batch.x, spaces)
            bad = ~features.isfinite().all(2).all(0)
            if bad.any():
                raise Diverged(
                    f"non-finite feature of an image of class {int(batch.y[bad][0])}: lower "
                    "strategy.optim.lr, or look for NaN in the images"
                )
            member = batch.y[:, None] == labels  # a product: exact in any order of threads
            sums += member.double().T @ features.double()
            counts += member.sum(0)
        mean = (sums / counts.clamp_min(1)[:, None]).float()
        self.means[:, task.classes.start : task.classes.stop] = mean
        absent = torch.full_like(labels, -1)
        self.owner[labels] = torch.where(counts > 0, len(self.names) - 1, absent)
        self.finished.fill_(len(self.names))
        first = int(self.use_init_ptm)
        self.means[first:] = complete(self.means[first:], self.owner, self.recalc_sim)

    def _spaces(self, tasks: int) -> list[str]:
        """Subspaces after so many tasks, in the order of `means`."""
        return [PRETRAINED] * self.use_init_ptm + self.names[:tasks]

    def _weight(self, tasks: int) -> Tensor:
        """[S, C]: 1 for the subspace of the class's own task, less for others."""
        other = self.alpha / max(1, tasks - 1) if self.reweight == "code" else self.alpha
        own = self.owner == torch.arange(tasks, device=self.owner.device)[:, None]
        weight = torch.where(own, 1.0, other)
        return F.pad(weight, (0, 0, int(self.use_init_ptm), 0), value=self.beta)

    # -------------------------------------------------------------- prediction

    def extractors(self) -> dict[str, str]:
        """The finished sets (and the network without any), which change with `sets=one` alone."""
        names = self._spaces(int(self.finished))
        for name in names:
            if name not in self._hashes or self.one:
                adapted = name != PRETRAINED
                self._hashes[name] = (
                    weights_hash(self.bank.sets[name].state_dict()) if adapted else ""
                )
        return {name: self._hashes[name] for name in names}

    @torch.no_grad()
    def embed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """[B, 3, H, W] -> [S, B, D]; the sets share one pass of the frozen weights."""
        sets = [n for n in names if n != PRETRAINED]
        features: dict[str, Tensor] = {}
        with evaluation_mode(self):
            if sets:
                features |= zip(sets, self.bank.features_in_parts(x, sets), strict=True)
            if PRETRAINED in names:
                features[PRETRAINED] = self.bank.features(x)
        return torch.stack([features[n] for n in names])

    @torch.no_grad()
    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        """Scores [B, C] of the classes seen from [B, D] under every extractor.

        A class without means (its task has not ended, or has no image of it) scores 0.
        """
        tasks = int(self.finished)
        spaces = self._spaces(tasks)
        stacked = torch.stack([features[n] for n in spaces])
        return ensemble(stacked, self.means[: len(spaces)], self._weight(tasks))

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen] for x float [B, 3, H, W] in [0, 1]; 0 until a task has ended."""
        if not int(self.finished):
            return x.new_zeros(len(x), len(self.owner))
        names = self._spaces(int(self.finished))
        return self.classify(dict(zip(names, self.embed(x, names), strict=True)))

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._hashes.clear()
        for name in () if self.one else self.names[: int(self.finished)]:
            self.bank.freeze(name)
