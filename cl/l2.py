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

import torch
from torch import Tensor

from driftline.cl.finetune import Finetune, Penalty
from driftline.core.ranges import NonNegative
from driftline.core.stream import Task
from driftline.parts.store import Store


def learned(method: Finetune, rows: int) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters that learn, of the head the first `rows` rows only."""
    for name, p in method.backbone.named_parameters():
        if p.requires_grad:
            yield f"backbone.{name}", p
    if method.bank is not None:
        yield from ((f"bank.{name}", p) for name, p in method.bank.named_parameters())
    for name, p in method.head.named_parameters():
        yield f"head.{name}", p[:rows]


class Anchored(Penalty):
    """A quadratic pull of every parameter to a value of its own.

    Args:
        weight: strength of the pull; 0 is fine-tuning.
    """

    def __init__(self, *, weight: NonNegative) -> None:
        super().__init__()
        self.weight = weight
        self.anchor = Store()  # theta*, by the name of the parameter; of the head its first rows

    def strength(self, name: str) -> float | Tensor:
        """Factor of `(theta - theta*)` in the gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def add_gradients(self, method: Finetune) -> dict[str, Tensor]:
        """Add the pull to the gradients; the penalty is logged."""
        penalty = torch.zeros((), device=method.device)
        if "head.bias" not in self.anchor:  # the first task
            return {"penalty": penalty}
        grads = {f"backbone.{n}": p.grad for n, p in method.backbone.named_parameters()}
        grads |= {f"head.{n}": p.grad for n, p in method.head.named_parameters()}
        if method.bank is not None:
            grads |= {f"bank.{n}": p.grad for n, p in method.bank.named_parameters()}
        for name, p in learned(method, len(self.anchor["head.bias"])):
            grad = grads[name]
            if grad is None:  # no part in the loss, hence never moved
                continue
            away = p - self.anchor[name]
            pull = self.strength(name) * away
            (grad[: len(p)] if name.startswith("head.") else grad).add_(pull)
            penalty += (pull * away).sum() / 2
        return {"penalty": penalty}


class L2(Anchored):
    """Equal pull on every parameter; `weight` is lambda."""

    def strength(self, name: str) -> float:
        return self.weight

    def end_task(self, method: Finetune, task: Task) -> None:
        """From now on the present values are theta*."""
        for name, p in learned(method, method.seen):
            self.anchor.put(name, p.detach().clone())
