"""iCaRL: exemplars chosen by herding, distillation from the network before, nearest mean.

Paper: Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017,
arXiv 1611.07725. Code of the default: LAMDA-CL/LAMDA-PILOT 5240714, `models/icarl.py` and
`models/base.py`, which differ from the paper: softmax and cross-entropy where that has sigmoids.

A task is learned on its images and all exemplars, shuffled together:

    loss = CE over all classes seen + cross-entropy of the old classes with the network before,

both softened by a temperature, without the factor T^2. At the end old classes keep their first
exemplars, as many as still fit. In a new class the exemplars are chosen one by one, so that their
mean comes closest to that of the class; features are normalised, the mean of the class is not. An
image is answered by the head, or by the nearest mean of exemplars under the present network.

Deviations that change no number: the memory holds which images, not their pixels. Distances are
float64, so that near ties may fall otherwise. That do: a class with fewer images than places keeps
them all (the official code stops); new head rows alone are drawn (see `parts/heads.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.finetune import Finetune
from driftline.core.errors import UserError
from driftline.core.ranges import Count, NonNegative, Positive
from driftline.core.stream import NEW_CLASSES, Batch, Task
from driftline.parts.buffer import Buffer, Reader
from driftline.parts.modes import evaluating
from driftline.parts.objectives import scoped_cross_entropy
from driftline.parts.optim import Optim
from driftline.parts.statistics import check_finite

READ = 64  # exemplars at a time
NOBODY = -4.0  # score of a class without exemplars: minus the largest distance there is


class ICaRL(Finetune):
    """Fine-tuning with exemplars and distillation.

    Args:
        num_classes, epochs, optim, freeze_bn: as in `Finetune`.
        capacity: exemplars, in all or of each class.
        memory: `total`: `capacity` divided by the classes so far, rounded down, for each of them;
            `per_class`: `capacity` for each.
        temperature: of the distillation.
        distillation: weight of the distillation.
        answer: `head`, or `nme`: nearest mean of exemplars.

    Raises:
        UserError: for a memory of fewer exemplars than classes.
    """

    needs = Finetune.needs | {NEW_CLASSES}  # exemplars lie in one set with the images of a task
    class_means: Tensor  # float64 [C, D] of length 1; 0 without exemplars

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optim: Optim,
        freeze_bn: bool,
        capacity: Count,
        memory: Literal["total", "per_class"],
        temperature: Positive,
        distillation: NonNegative,
        answer: Literal["head", "nme"],
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optim=optim,
            loss_scope="seen",
            freeze_bn=freeze_bn,
            trains="all",
            adapter=None,
            penalty=None,
        )
        if memory == "total" and capacity < num_classes:
            raise UserError(
                f"strategy.capacity={capacity} exemplars for {num_classes} classes leave none for "
                f"each; set strategy.capacity to {num_classes} or more, or "
                "strategy.memory=per_class"
            )
        self.capacity, self.memory, self.answer = capacity, memory, answer
        self.temperature, self.distillation = temperature, distillation
        self.averageable = answer == "head"
        self.buffer = Buffer()
        self.teacher: nn.ModuleList | None = None  # network and head after the task before
        self.register_buffer("class_means", torch.zeros(0, backbone.dim, dtype=torch.float64))
        self._readers: dict[int, Reader] = {}  # of every task so far

    def grow(self, task: Task) -> None:
        if self.seen:
            self.teacher = None  # not copied along
            both = nn.ModuleList([self.backbone, self.head])
            self.teacher = deepcopy(both).requires_grad_(False).eval()
        super().grow(task)
        added = self.seen - len(self.class_means)
        self.class_means = F.pad(self.class_means, (0, 0, 0, added))
        self._readers[task.index] = task.again

    # ------------------------------------------------------------------ training

    def modes(self) -> Iterator[tuple[nn.Module, bool]]:
        yield from super().modes()
        if self.teacher is not None:
            yield self.teacher, False

    def batches(self, task: Task, epoch: int, start: int = 0) -> Iterator[Batch | None]:
        """Images of the task and exemplars, in one random order."""
        if not len(self.buffer):
            return task.train(epoch, start)
        rows, labels = (torch.tensor(v) for v in (self.buffer.rows, self.buffer.labels))
        return task.train(epoch, start, more=(rows, labels))

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        scores = self.head(self.features(batch.x))
        loss = scoped_cross_entropy(scores, batch.y, self.columns)
        if self.teacher is not None:
            with torch.no_grad():
                network, head = self.teacher
                old = head(cast(Backbone, network).features(batch.x)) / self.temperature
            mine = scores[:, : old.shape[1]] / self.temperature
            loss = loss + self.distillation * F.cross_entropy(mine, old.softmax(1))
        self.task_optim.backward(self.optimizer, loss)
        return scores.detach(), loss.detach(), {}

    # ------------------------------------------------------------------ exemplars

    def end_task(self, task: Task) -> None:
        """Make room, choose exemplars of the new classes, take all means anew.

        Raises:
            Diverged: for a feature that is not finite.
        """
        places = self.capacity if self.memory == "per_class" else self.capacity // self.seen
        self.class_means = torch.zeros_like(self.class_means)
        old = [c for c in sorted(set(self.buffer.labels)) if c not in task.classes]
        self.buffer.keep([i for c in old for i in self.buffer.of_class(c)[:places]])
        for c in old:
            positions = self.buffer.of_class(c)
            parts = [positions[i : i + READ] for i in range(0, len(positions), READ)]
            images = (self.buffer.images(part, self._readers, None) for part in parts)
            self._set_mean(c, torch.cat([self._directions(x, c) for x in images]))
        rows: dict[int, list[int]] = {c: [] for c in task.classes}
        of_class: dict[int, list[Tensor]] = {c: [] for c in task.classes}
        for batch in task.fit():
            self.buffer.pixels = batch.x[0].numel()
            directions = self._directions(batch.x, batch.y)
            items = zip(batch.index.tolist(), batch.y.tolist(), directions, strict=True)
            for row, label, direction in items:
                rows[label].append(row)
                of_class[label].append(direction)
        for c in (c for c in task.classes if rows[c]):
            directions = torch.stack(of_class[c])
            chosen = herding(directions, places)
            for i in chosen:
                self.buffer.put(len(self.buffer), task.index, rows[c][i], c)
            self._set_mean(c, directions[chosen])

    def _directions(self, x: Tensor, y: Tensor | int) -> Tensor:
        """Normalised features, float64 [n, D], of images of the classes `y`."""
        with evaluating(self):
            features = self.features(x.to(self.device))
        labels = torch.as_tensor(y, device=features.device).expand(len(features))
        check_finite(features, labels)
        return directions_of(features)

    def _set_mean(self, c: int, directions: Tensor) -> None:
        self.class_means[c] = F.normalize(directions.mean(0), dim=0)

    # ------------------------------------------------------------------ prediction

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen]: of the head, or minus the squared distance from each mean."""
        if self.answer == "head":
            return super().predict(x)
        with evaluating(self):
            cosines = directions_of(self.features(x)) @ self.class_means.T
        known = self.class_means.any(1)
        return torch.where(known, 2 * cosines - 2, NOBODY).float()

    def report(self) -> dict[str, float]:
        return super().report() | self.buffer.report()


def directions_of(features: Tensor) -> Tensor:
    """Features [B, D] over their length plus 1e-8, float64."""
    features = features.double()
    return features / (features.norm(dim=1, keepdim=True) + 1e-8)


def herding(directions: Tensor, count: int) -> list[int]:
    """Positions of up to `count` of the [n, D], each time that which brings the mean closest.

    Closest to the mean of all of them; no image twice.
    """
    mean, total = directions.mean(0), torch.zeros_like(directions[0])
    chosen: list[int] = []
    for k in range(1, min(count, len(directions)) + 1):
        distance = (mean - (directions + total) / k).square().sum(1)
        distance[chosen] = torch.inf
        chosen.append(int(distance.argmin()))
        total = total + directions[chosen[-1]]
    return chosen
