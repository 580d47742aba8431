"""L2: fine-tuning that is pulled back to the parameters of the previous task.

The plainest regulariser, `CE + weight / 2 * |theta - theta*|^2`, where theta* is the value at the
end of the task before; the baseline that Kirkpatrick et al. (PNAS 2017, arXiv 1612.00796) compare
EWC with. All that learns is pulled, rows of new classes excepted. No official code; training
otherwise as in `cl/finetune.py`.

The gradient `weight * (theta - theta*)` is added directly, which is the same as to differentiate
the penalty.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.common import Schedule, Scope, Store
from driftline.cl.finetune import Finetune
from driftline.core.ranges import Count, CountOrZero, NonNegative, Unit
from driftline.core.stream import Task


class Anchored(Finetune):
    """Fine-tuning with a quadratic pull of every parameter to a value of its own.

    Args:
        weight: strength of the pull; 0 is fine-tuning.
        options: those of `Finetune`.
    """

    def __init__(self, backbone: Backbone, *, weight: float, **options: Any) -> None:
        super().__init__(backbone, **options)
        self.weight = weight
        self.anchor = Store()  # theta*, by the name of the parameter; of the head its first rows

    def learned(self, rows: int) -> Iterator[tuple[str, Tensor]]:
        """Names and parameters, of the head the first `rows` rows only."""
        for name, p in self.backbone.named_parameters():
            if p.requires_grad:
                yield f"backbone.{name}", p
        for name, p in self.head.named_parameters():
            yield f"head.{name}", p[:rows]

    def drop_anchor(self, rows: int) -> None:
        """From now on the present values are theta*."""
        for name, p in self.learned(rows):
            self.anchor.put(name, p.detach().clone())

    def strength(self, name: str) -> float | Tensor:
        """Factor of `(theta - theta*)` in the gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def add_gradients(self) -> dict[str, Tensor]:
        """Add the pull to the gradients; the penalty is logged."""
        penalty = torch.zeros((), device=self.device)
        if "head.bias" not in self.anchor:  # the first task
            return {"penalty": penalty}
        grads = {f"backbone.{n}": p.grad for n, p in self.backbone.named_parameters()}
        grads |= {f"head.{n}": p.grad for n, p in self.head.named_parameters()}
        for name, p in self.learned(len(self.anchor["head.bias"])):
            grad = grads[name]
            if grad is None:  # no part in the loss, hence never moved
                continue
            away = p - self.anchor[name]
            pull = self.strength(name) * away
            (grad[: len(p)] if name.startswith("head.") else grad).add_(pull)
            penalty += (pull * away).sum() / 2
        return {"penalty": penalty}


class L2(Anchored):
    """Equal pull on every parameter; `weight` is lambda, the other options as in `Finetune`."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optimizer: Literal["sgd"],
        lr: NonNegative,
        head_lr: NonNegative,
        momentum: Unit,
        weight_decay: NonNegative,
        weight_decay_later: NonNegative,
        schedule: Schedule,
        milestones: list[CountOrZero],
        milestones_later: list[CountOrZero],
        lr_decay: Unit,
        loss_scope: Scope,
        freeze_bn: bool,
        weight: NonNegative,
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optimizer=optimizer,
            lr=lr,
            head_lr=head_lr,
            momentum=momentum,
            weight_decay=weight_decay,
            weight_decay_later=weight_decay_later,
            schedule=schedule,
            milestones=milestones,
            milestones_later=milestones_later,
            lr_decay=lr_decay,
            loss_scope=loss_scope,
            freeze_bn=freeze_bn,
            weight=weight,
        )

    def grow(self, task: Task) -> None:
        if self.seen:  # a resumed run overwrites the values afterwards
            self.drop_anchor(self.seen)
        super().grow(task)

    def strength(self, name: str) -> float:
        return self.weight
