"""COIL: classifiers of old and new classes are transported onto each other between tasks.

Paper: Zhou et al., "Co-Transport for Class-Incremental Learning", ACM MM 2021, arXiv 2107.12654.
Official code: zhoudw-zdw/MM21-Coil f4ebcc1, `models/COIL.py`; the same in LAMDA-CL/PyCIL f3509b8
and, with pretrained networks, of which the defaults are, in LAMDA-CL/LAMDA-PILOT 5240714. Read, not
run: no recorded numbers exist.

A cosine head and exemplars chosen by herding, as iCaRL has them. A plan of optimal transport says
how much an old and a new class have to do with each other: entropic, between the uniform masses of
both, at the cost of the `norm` between class means of normalised features. With it

* rows of the head for new classes start as mixtures of the old rows (prospective transport), with
  their mean length; in the first epoch the scores of these mixtures are distilled into new rows;
* in later epochs rows for the old classes are mixed from the new ones, every `refresh` batches
  (retrospective transport); the scores of the network before are distilled into them.

    loss = k/n distillation + (1 - k/n) CE of all classes + transport     k of n classes are old

with all scores softened by `temperature` but in CE, and without the scale of the head in the
transported ones. The weight of the second transport grows as the square of the epoch.

Deviations that change no number but by rounding: the two masses of the official code differ where
there are more old classes than new ones; the plan is then a multiple of this one, which is lost as
the rows are brought to length. `calibration_term` of its settings is replaced before it is used,
and so is no option. The first transport is computed when a task begins, not when the one before
ends. That do: `old_means=exemplars` (default) takes the means of old classes for it from the memory
alone; the official code reads all their training images again (`all_images`), which no method may
that is compared with others of the same memory. The memory is that of `cl/icarl.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.icarl import READ, ICaRL
from driftline.core.ranges import Count, NonNegative, Positive
from driftline.core.stream import Batch, Task
from driftline.parts.heads import CosineHead
from driftline.parts.optim import Optim
from driftline.parts.statistics import ClassMeans

LIMIT, EVERY, CLOSE = 1000, 10, 1e-9  # steps of Sinkhorn, those between two looks, when it ends


def transport(cost: Tensor, entropy: float) -> Tensor:
    """Entropic optimal transport between uniform masses: the plan, float64 [n, m], sum 1.

    Args:
        cost: [n, m].
        entropy: weight of the entropy of the plan.
    """
    kernel = (-cost.double() / entropy).exp()
    n, m = kernel.shape
    u, v = kernel.new_full((n,), 1 / n), kernel.new_full((m,), 1 / m)
    for step in range(LIMIT):
        v = 1 / m / (kernel.T @ u)
        u = 1 / n / (kernel @ v)
        if step % EVERY == 0 and (v * (kernel.T @ u) - 1 / m).norm() < CLOSE:
            break
    return u[:, None] * kernel * v


class GrowingCosineHead(CosineHead):
    """A cosine head whose later rows start at 0, to be set by what owns it."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 0, torch.Generator())

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Append rows up to `classes` in all; the first ones are drawn as in `CosineHead`."""
        old = self.weight.detach()
        if not len(old):
            drawn = CosineHead(old.shape[1], classes, generator).weight
            self.weight = nn.Parameter(drawn.detach().to(old))
        elif classes > len(old):
            self.weight = nn.Parameter(F.pad(old, (0, 0, 0, classes - len(old))))


class COIL(ICaRL):
    """Fine-tuning with exemplars, distillation, and rows of the head transported both ways.

    Args:
        num_classes, epochs, optim, freeze_bn: as in `Finetune`.
        capacity, memory, temperature, answer: as in `ICaRL`.
        entropy: of the plan, see `transport`.
        norm: of the difference of two class means, which is the cost.
        new_weight: of the first transport's distillation, in the first epoch of a task.
        old_weight: of the second one's, in the last epoch; (e / epochs)^2 of it in epoch e.
        refresh: batches from one second transport to the next, each of which reads all training
            images of the task and all exemplars.
        old_means: see the top of the file.

    Raises:
        UserError: for a memory of fewer exemplars than classes.
    """

    head: GrowingCosineHead  # type: ignore[assignment]
    rows: Tensor  # float [C, D]: the transported ones, of the new classes, then of the old ones

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
        entropy: Positive,
        norm: Positive,
        new_weight: NonNegative,
        old_weight: NonNegative,
        refresh: Count,
        old_means: Literal["exemplars", "all_images"],
        answer: Literal["head", "nme"],
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optim=optim,
            freeze_bn=freeze_bn,
            capacity=capacity,
            memory=memory,
            temperature=temperature,
            distillation=1.0,
            answer=answer,
        )
        self.entropy, self.norm = entropy, norm
        self.new_weight, self.old_weight = new_weight, old_weight
        self.refresh, self.old_means = refresh, old_means
        self.head = GrowingCosineHead(backbone.dim)
        self.register_buffer("rows", torch.zeros(0, backbone.dim))
        self.known = 0  # classes before the task
        self.epoch = self.step = 0  # of the task; of the epoch
        self._tasks: list[Task] = []

    # ------------------------------------------------------------------ transport

    def grow(self, task: Task) -> None:
        self.known = self.seen
        self._tasks.append(task)
        super().grow(task)

    def begin_task(self, task: Task) -> None:
        """Rows of new classes start as mixtures of the old ones."""
        super().begin_task(task)
        if not self.known:
            return
        old = self.class_means[: self.known]
        if self.old_means == "all_images":
            old = self._means(b for t in self._tasks[:-1] for b in t.fit())[: self.known]
        new = self._means(task.fit())[self.known :]
        with torch.no_grad():
            weight = self.head.weight
            mixed = self._mixed(old, new, weight[: self.known])
            length = weight[: self.known].norm(dim=1).mean() / mixed.norm(dim=1).mean()
            weight[self.known :] = self.rows = length * mixed

    def _mixed(self, source: Tensor, target: Tensor, rows: Tensor) -> Tensor:
        """Mixtures [m, D] of rows [n, D] of the head, by class means [n, D] and [m, D]."""
        cost = torch.cdist(source.cpu(), target.cpu(), p=self.norm)
        plan = transport(cost, self.entropy)
        return plan.T.to(rows) @ F.normalize(rows.detach(), dim=1)

    def _means(self, batches: Iterable[Batch]) -> Tensor:
        """Directions of the class means of normalised features, float64 [C_seen, D]."""
        means = ClassMeans(cast(Backbone, self.backbone).dim).to(self.device)
        means.grow(self.seen)
        for batch in batches:
            y = batch.y.to(self.device)
            means.update(self._directions(batch.x, y), y)
        return F.normalize(means.means, dim=1)

    def _exemplars(self) -> Iterable[Batch]:
        for start in range(0, len(self.buffer), READ):
            at = list(range(start, min(start + READ, len(self.buffer))))
            y = self.buffer.labels_of(at)
            yield Batch(self.buffer.images(at, self._readers, None), y, y, y)

    def _mix_old_rows(self) -> None:
        old = self._means(self._exemplars())[: self.known]
        new = self._means(self._tasks[-1].fit())[self.known :]
        self.rows = self._mixed(new, old, self.head.weight[self.known :])

    # ------------------------------------------------------------------ training

    def begin_epoch(self, task: Task, epoch: int) -> None:
        super().begin_epoch(task, epoch)
        self.epoch, self.step = epoch, 0

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        if self.known and self.epoch and self.step % self.refresh == 0:
            self._mix_old_rows()
        logged = super().observe(batch)
        self.step += 1
        return logged

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        features = self.features(batch.x)
        scores = self.head(features)
        loss = F.cross_entropy(scores, batch.y)
        if self.teacher is not None:
            with torch.no_grad():
                network, head = self.teacher
                old = (head(cast(Backbone, network).features(batch.x)) / self.temperature).softmax(
                    1
                )
            soft, share = scores / self.temperature, self.known / self.seen
            distilled = F.cross_entropy(soft[:, : self.known], old)
            cosines = F.linear(F.normalize(features, dim=1), F.normalize(self.rows, dim=1))
            mixed = cosines / self.temperature
            if self.epoch:
                weight = self.old_weight * (self.epoch / self.train_epochs) ** 2
                transported = F.cross_entropy(mixed, old)
            else:
                weight = self.new_weight
                transported = F.cross_entropy(soft[:, self.known :], mixed.softmax(1))
            loss = share * distilled + (1 - share) * loss + weight * transported
        self.task_optim.backward(self.optimizer, loss)
        return scores.detach(), loss.detach(), {}

    def get_extra_state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "step": self.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.epoch, self.step = state["epoch"], state["step"]
