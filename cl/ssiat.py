"""SSIAT: one adapter set for all tasks; old class means follow it, and the head is aligned.

Paper: Tan et al., "Semantically-Shifted Incremental Adapter-Tuning is A Continual ViTransformer",
CVPR 2024, arXiv 2403.19979.
Official code: HAIV-Lab/SSIAT 3f1f00d.

One adapter set learns task after task, unconstrained, with a cosine head and a softmax with margin
over the classes of the task. How far it has carried the features of the task's images says how far
it may have carried the mean of an old class:

    m += sum_i w_i (y'_i - y_i) / sum_i w_i,    w_i = exp(-|y_i - m|^2 / (2 width^2)) + 1e-5

with the features y of image i before and y' after the task. Then mean and covariance of each new
class are measured, and from the second task on the head is trained as in SLCA (cl/slca.py) on
features drawn from all Gaussians; covariances stay as they were measured.

Deviations that change a number: the code measures y and y' in two passes over shuffled and
augmented training images, so that row i is another image each time; the default here is the same
image (`shift_pairing=unpaired` is the code). As in cl/slca.py, the task of a class is a table
(`task_of_class=division` is the code). That change none: those of parts/alignment.py; all rows of
the head are one matrix; features of before come from a copy of the adapters, so that nothing of the
images is kept, and both are computed in one pass of the frozen weights. The code trains at a rate
of 0.01 whatever its settings say, and uses theirs in the alignment: here `optim.lr`, `align_lr`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.slca import TaskOfClass, shrinkage
from driftline.core.ranges import Count, CountOrZero, NonNegative, Positive
from driftline.core.strategy import CLStrategy
from driftline.core.stream import OWN_CLASSES, Batch, Task
from driftline.parts.adapters.plan import Plan
from driftline.parts.alignment import ClassGaussians, Statistics, collect
from driftline.parts.modes import evaluation_mode
from driftline.parts.optim import Optim

RIDGE = 1e-3  # added to every variance
CURRENT, BEFORE = "current", "before"  # the set that learns, and as it was before the task
FLOOR = 1e-5  # of the weight of an image in a shift


def semantic_shift(
    before: Tensor, after: Tensor, means: Tensor, width: float
) -> tuple[Tensor, Tensor]:
    """How far class means have moved, from how far images have.

    Args:
        before, after: features [N, D].
        means: [C, D].
        width: standard deviation of the Gaussian around a mean in which images count.

    Returns:
        shifts [C, D], and over how many images each is averaged (effective sample size) [C].
    """
    before, after, means = before.double(), after.double(), means.double()
    distance = (before**2).sum(1) - 2 * means @ before.T + (means**2).sum(1)[:, None]
    weight = (-distance.clamp_min(0) / (2 * width**2)).exp() + FLOOR
    weight = weight / weight.sum(1, keepdim=True)
    return weight @ (after - before), 1 / (weight**2).sum(1)


class CosineRows(nn.Module):
    """Cosine similarity with rows that learn, whose number starts at 0."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, dim))

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Rows up to `classes` in all, N(0, 0.02^2). The parameter is a new object."""
        old = self.weight.detach()
        new = torch.empty(max(0, classes - len(old)), old.shape[1])
        nn.init.trunc_normal_(new, std=0.02, generator=generator)
        self.weight = nn.Parameter(torch.cat([old, new.to(old)]))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        return F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


class SSIAT(CLStrategy):
    """One adapter set, a cosine head, and a Gaussian a class.

    Args:
        epochs: of the first task.
        epochs_later: of the tasks after it; None: the same.
        adapter: the set.
        optim: of the groups `adapter` and `head`, made anew for each task; the alignment has its
            momentum and weight decay.
        scale: of the cosines in every softmax.
        margin: taken off the cosine of an image with its own class, in the tasks only.
        shift_width: of `semantic_shift`; None: old means stay.
        shift_pairing: `paired`: each image, in the test pipeline, before and after; `unpaired`: two
            passes over the training batches.
        align_epochs, align_lr: of the head on Gaussian features, from the second task on.
        align_samples: features drawn a class and epoch, and those in a step.
        task_of_class, statistics: see `cl/slca.py`.

    Raises:
        UserError: for a network that lacks the points of `adapter`.
        Diverged: if loss or features are no longer finite.
    """

    needs = frozenset({"features", OWN_CLASSES})
    unmergeable = ""
    shift_images: Tensor  # float [], images behind a shift of the last task, mean over classes

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        epochs: Count,
        epochs_later: Count | None,
        adapter: Plan,
        optim: Optim,
        scale: Positive,
        margin: NonNegative,
        shift_width: Positive | None,
        shift_pairing: Literal["paired", "unpaired"],
        align_epochs: CountOrZero,
        align_lr: NonNegative,
        align_samples: Annotated[int, Ge(1), Le(10**5)],
        task_of_class: TaskOfClass,
        statistics: Statistics,
    ) -> None:
        super().__init__(backbone, seed=seed)
        backbone.eval().requires_grad_(False)
        self.all_epochs = epochs, epochs if epochs_later is None else epochs_later
        self.epochs, self.optim, self.task_optim = epochs, optim, optim
        self.scale, self.margin = scale, margin
        self.shift_width, self.shift_pairing = shift_width, shift_pairing
        self.align_epochs, self.align_lr = align_epochs, align_lr
        self.align_samples = align_samples
        self.task_of_class: TaskOfClass = task_of_class
        self.bank = adapter.bank(backbone)
        adapter.add(self.bank, CURRENT, self.rng("init"))
        self.head = CosineRows(backbone.dim)
        self.gaussians = ClassGaussians(backbone.dim, statistics, RIDGE)
        self.tasks: list[range] = []  # their classes
        self.register_buffer("shift_images", torch.zeros(()))

    # -------------------------------------------------------------- training

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if BEFORE in self.bank.sets:
            self.bank.sets[BEFORE].load_state_dict(self.bank.sets[CURRENT].state_dict())
        if len(task.classes) == 1:
            self.warn_once(
                "one class",
                f"task {task.index} has one class: the loss over its own classes is 0 and its "
                "adapters stay as they were (scenario.increment sets the classes of a task)",
            )

    def grow(self, task: Task) -> None:
        """Rows for new classes, an optimiser, and from the second task on a copy of the set."""
        if self.tasks and BEFORE not in self.bank.sets and self.shift_width is not None:
            self.bank.copy(CURRENT, BEFORE)
            self.bank.freeze(BEFORE)
        self.tasks.append(task.classes)
        later = len(self.tasks) > 1
        self.head.grow(task.classes.stop, self.rng("init"))
        self.gaussians.grow(task.classes.stop)
        self.epochs = self.all_epochs[later]
        self.task_optim = self.optim.of_task(int(later))
        groups = {"adapter": self.bank.parameters_of(CURRENT), "head": self.head.parameters()}
        self.optimizer = self.task_optim.optimizer(groups, self.bank.second_factors(CURRENT))

    def begin_epoch(self, task: Task, epoch: int) -> None:
        self.task_optim.set_rates(self.optimizer, epoch, self.epochs)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step on the classes of the task; returns the loss and the accuracy in percent."""
        self.bank.train()
        loss, right = self._loss(batch)
        self.task_optim.step(self.optimizer, loss, lambda: self._loss(batch)[0])
        return {"loss": loss.detach(), "acc": 100 * right.float().mean()}

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss [], and which images [B] are nearest to their class among those of the task."""
        classes = self.tasks[-1]
        y = batch.y - classes.start
        cosines = self.head(self.features(batch.x))[:, classes.start : classes.stop]
        own = F.one_hot(y, len(classes))
        loss = F.cross_entropy(self.scale * (cosines - self.margin * own), y)
        return loss, cosines.detach().argmax(1) == y

    def features(self, x: Tensor, name: str = CURRENT) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D] under one set."""
        return self.bank.features(x, name)

    # -------------------------------------------------------------- end of a task

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Move the old means, measure the new classes, align the head."""
        later = BEFORE in self.bank.sets
        names = [BEFORE] * later + [CURRENT]

        def each(x: Tensor) -> Tensor:
            return self.bank.features_each(x, names).transpose(0, 1).flatten(1)

        with evaluation_mode(self):
            features, y = collect(task.fit(), each, device=self.device, lr=self.optim.lr)
            if later and len(y):
                self.shift(*self.clouds(task, features))
        if warning := self.gaussians.measure(task.classes, features[:, -self.dim :], y):
            self.warn_once("covariance", warning)
        if len(self.tasks) > 1:
            self.align()

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return self.gaussians.means.shape[1]

    def clouds(self, task: Task, paired: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, D] of the images of `task` before and after it.

        Args:
            paired: [N, 2 D], both of each image.
        """
        if self.shift_pairing == "paired":
            return paired[:, : self.dim], paired[:, self.dim :]
        device, lr = self.device, self.optim.lr
        # Epochs that training has not had: other orders and augmentations.
        passes = [(BEFORE, self.epochs), (CURRENT, self.epochs + 1)]
        before, after = (
            collect(task.train(e), lambda x, n=n: self.features(x, n), device=device, lr=lr)[0]
            for n, e in passes
        )
        rows = min(len(before), len(after))  # unequal where unreadable images were left out
        return before[:rows], after[:rows]

    def shift(self, before: Tensor, after: Tensor) -> None:
        """Move the means of the classes measured so far."""
        assert self.shift_width is not None
        known = self.gaussians.counts > 0
        means = self.gaussians.means[known]
        moved, images = semantic_shift(before, after, means, self.shift_width)
        self.gaussians.means[known] = (means + moved).float()
        self.shift_images = images.mean().float()

    def align(self) -> Tensor:
        """Train the head on Gaussian features; returns the loss per step."""
        return self.gaussians.align(
            self.head.parameters(),
            lambda features, y: F.cross_entropy(self.scale * self.head(features), y),
            optim=self.optim,
            lr=self.align_lr,
            epochs=self.align_epochs,
            samples=self.align_samples,
            rng=self.rng("align"),
            scale=shrinkage(self.tasks, self.task_of_class),
        )

    def report(self) -> dict[str, float]:
        """Effective number of images behind a shift of the last task, mean over old classes."""
        return {"shift_images": float(self.shift_images)}

    # -------------------------------------------------------------- prediction

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Cosines [B, C_seen] for x float [B, 3, H, W] in [0, 1]."""
        with evaluation_mode(self):
            return self.head(self.features(x))
