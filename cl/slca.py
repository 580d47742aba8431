"""SLCA: the whole network learns slowly, and the head is aligned on Gaussian features.

Paper: Zhang et al., "SLCA: Slow Learner with Classifier Alignment for Continual Learning on a
Pre-trained Model", ICCV 2023, arXiv 2303.05118.
Official code: GengDavid/SLCA 169d4e6.

Every task gets a linear head of its own classes, which learns together with the whole network, the
network at a hundredth of the head's rate. Then mean and covariance of each new class are kept, and
from the second task on all heads are trained together on features drawn from the Gaussians of all
classes; the logits are divided by their mean norm over the tasks. These heads give the scores. The
next task goes on from the heads as they were before.

Paper and code differ: the code throws the pretrained last norm away and trains a new LayerNorm in
its place (`final_norm=new`, the default; LAMDA-CL/LAMDA-PILOT's port keeps it), and draws features
around means that are shrunk, the older the class the more: by 0.9 + 0.1 (i + 1) / (t + 1) for a
class of task i after task t. Statistics of old classes stay those of an older network, as in both.

Deviation that changes a number: the code takes the number of the class over the size of the present
task for i, which is wrong for tasks of unequal sizes; the default here is the class's task
(`task_of_class=division` is the code). That change none: those of parts/alignment.py, where each
class is measured in batches of all. A class that comes back belongs to its last task. SLCA++ (LoRA,
reverse cross-entropy) and the nearest-mean figure of the official code are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Count, CountOrZero, NonNegative, Positive
from driftline.core.strategy import CLStrategy
from driftline.core.stream import OWN_CLASSES, Batch, Task
from driftline.parts.alignment import ClassGaussians, Statistics, collect
from driftline.parts.heads import freeze_pretrained_head
from driftline.parts.modes import evaluation_mode
from driftline.parts.optim import Optim

RIDGE = 1e-4  # added to every variance
TaskOfClass = Literal["table", "division"]


def renew_last_norm(backbone: Backbone) -> None:
    """Put a LayerNorm with torch's initial values and eps 1e-5 in the place of the last norm.

    Raises:
        UserError: for a network whose last norm is not a LayerNorm.
    """
    for name in ("fc_norm", "norm"):
        old = getattr(backbone.net, name, None)
        if isinstance(old, nn.LayerNorm):
            setattr(backbone.net, name, nn.LayerNorm([*old.normalized_shape]).to(old.weight))
            return
    raise UserError(
        f"strategy.final_norm=new replaces the LayerNorm before the head, and {backbone.tag} has "
        "none: use a timm ViT (for example backbone=vit_b16_in21k), or strategy.final_norm="
        "pretrained"
    )


def shrinkage(tasks: Sequence[range], task_of_class: TaskOfClass) -> Tensor:
    """Factors [C] of the class means after the last of `tasks`, given by their classes."""
    index = torch.arange(max(t.stop for t in tasks)) // len(tasks[-1])
    if task_of_class == "table":
        for i, classes in enumerate(tasks):
            index[classes.start : classes.stop] = i
    return 0.9 + 0.1 * (index + 1) / len(tasks)


def normalized(scores: Tensor, tasks: Sequence[range], temperature: float) -> Tensor:
    """Scores [B, C] over `temperature` and the mean of their norms on the classes of each task."""
    norms = [scores[:, t.start : t.stop].norm(dim=1, keepdim=True) + 1e-7 for t in tasks]
    return scores / torch.cat(norms, 1).mean(1, keepdim=True) / temperature


class TaskHeads(nn.Module):
    """A linear layer a task; a class that comes back is answered by that of its last task."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.ModuleList()
        self.tasks: list[range] = []  # their classes

    def grow(self, classes: range, generator: torch.Generator) -> None:
        """One more layer: weights N(0, 0.02^2), biases 0."""
        layer = cast(nn.Linear, nn.utils.skip_init(nn.Linear, self.dim, len(classes)))
        nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
        nn.init.zeros_(layer.bias)
        self.layers.append(layer)
        self.tasks.append(classes)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        scores = features.new_zeros(len(features), max((t.stop for t in self.tasks), default=0))
        for classes, layer in zip(self.tasks, self.layers, strict=True):
            scores[:, classes.start : classes.stop] = layer(features)
        return scores


class SLCA(CLStrategy):
    """The whole network, a head a task, and a Gaussian a class.

    Args:
        epochs: passes over the training images of a task.
        optim: of the groups `backbone` and `head`, made anew for each task; the alignment has its
            momentum and weight decay.
        final_norm: `new`: see `renew_last_norm`; `pretrained`: the network stays as it is.
        align_epochs, align_lr: of the heads on Gaussian features, from the second task on.
        align_samples: features drawn a class and epoch, and those in a step.
        logit_norm: temperature in the alignment, see `normalized`; None: plain logits.
        task_of_class: by which the means are shrunk. `table`: the task in which it was learned;
            `division`: its number over the size of the present task.
        statistics: of the features of a class: `covariance` or `variance` (its diagonal).

    Raises:
        UserError: for a network without a last norm to replace.
        Diverged: if loss or features are no longer finite.
    """

    needs = frozenset({"features", OWN_CLASSES})
    unmergeable = ""
    prefers = "vit"
    carried: Tensor  # float [P], the heads as the task has left them, without the alignment

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        epochs: Count,
        optim: Optim,
        final_norm: Literal["new", "pretrained"],
        align_epochs: CountOrZero,
        align_lr: NonNegative,
        align_samples: Annotated[int, Ge(1), Le(10**5)],
        logit_norm: Positive | None,
        task_of_class: TaskOfClass,
        statistics: Statistics,
    ) -> None:
        super().__init__(backbone, seed=seed)
        freeze_pretrained_head(backbone)
        if final_norm == "new":
            renew_last_norm(backbone)
        self.epochs, self.optim, self.task_optim = epochs, optim, optim
        self.align_epochs, self.align_lr = align_epochs, align_lr
        self.align_samples, self.logit_norm = align_samples, logit_norm
        self.task_of_class: TaskOfClass = task_of_class
        self.heads = TaskHeads(backbone.dim)
        self.gaussians = ClassGaussians(backbone.dim, statistics, RIDGE)
        self.register_buffer("carried", torch.zeros(0))

    # -------------------------------------------------------------- training

    @torch.no_grad()
    def begin_task(self, task: Task) -> None:
        """Back to the heads before the alignment; one more of them."""
        old = list(self.heads.parameters())
        for p, value in zip(old, self.carried.split([p.numel() for p in old]), strict=True):
            p.copy_(value.view_as(p))
        super().begin_task(task)
        if len(task.classes) == 1:
            self.warn_once(
                "one class",
                f"task {task.index} has one class: the loss over its own classes is 0 and nothing "
                "is learned before the alignment (scenario.increment sets the classes of a task)",
            )

    def grow(self, task: Task) -> None:
        self.heads.grow(task.classes, self.rng("init"))
        self.heads.to(self.device)
        self.gaussians.grow(task.classes.stop)
        self.task_optim = self.optim.of_task(task.index)
        learned = [p for p in self.backbone.parameters() if p.requires_grad]
        head = self.heads.layers[-1].parameters()
        self.optimizer = self.task_optim.optimizer({"backbone": learned, "head": head})

    def begin_epoch(self, task: Task, epoch: int) -> None:
        self.task_optim.set_rates(self.optimizer, epoch, self.epochs)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step on the classes of the task; returns the loss and the accuracy in percent."""
        self.train()
        loss, right = self._loss(batch)
        self.task_optim.step(self.optimizer, loss, lambda: self._loss(batch)[0])
        return {"loss": loss.detach(), "acc": 100 * right.float().mean()}

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss [] of the head that learns, and which images [B] it gets right."""
        y = batch.y - self.heads.tasks[-1].start
        scores = self.heads.layers[-1](self.features(batch.x))
        return F.cross_entropy(scores, y), scores.detach().argmax(1) == y

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D]."""
        return cast(Backbone, self.backbone).features(x)

    # -------------------------------------------------------------- end of a task

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Measure the new classes, put the heads aside, align them."""
        with evaluation_mode(self):
            found = collect(task.fit(), self.features, device=self.device, lr=self.optim.lr)
        if warning := self.gaussians.measure(task.classes, *found):
            self.warn_once("covariance", warning)
        self.carried = nn.utils.parameters_to_vector(self.heads.parameters()).clone()
        if len(self.heads.tasks) > 1:
            self.align()

    def align(self) -> Tensor:
        """Train all heads on Gaussian features; returns the loss per step."""
        return self.gaussians.align(
            self.heads.parameters(),
            self.align_loss,
            optim=self.optim,
            lr=self.align_lr,
            epochs=self.align_epochs,
            samples=self.align_samples,
            rng=self.rng("align"),
            scale=shrinkage(self.heads.tasks, self.task_of_class),
        )

    def align_loss(self, features: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy [] of drawn features [B, D]."""
        scores = self.heads(features)
        if self.logit_norm is not None:
            scores = normalized(scores, self.heads.tasks, self.logit_norm)
        return F.cross_entropy(scores, y)

    def updated_parameters(self) -> list[Tensor]:
        """Those of the task's optimiser, and the older heads, which the alignment moves."""
        moved = [*super().updated_parameters(), *self.heads.parameters()]
        return list({id(p): p for p in moved}.values())

    # -------------------------------------------------------------- prediction

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen] for x float [B, 3, H, W] in [0, 1]."""
        with evaluation_mode(self):
            return self.heads(self.features(x))
