"""Small pieces that training methods share: loss scope, learning-rate schedule, modes."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.backbone import Backbone

Scope = Literal["current", "seen", "all"]
Schedule = Literal["step", "cosine"]


def scope_columns(scope: Scope, classes: range, seen: int, total: int) -> range:
    """Columns of the scores that take part in the softmax of the loss.

    `current`: the classes of this task. `seen`: every class so far. `all`: every class of the
    stream, those of the future included.
    """
    if scope == "current":
        return classes
    return range(seen if scope == "seen" else total)


def scoped_cross_entropy(scores: Tensor, y: Tensor, columns: range) -> Tensor:
    """Mean cross-entropy over `columns` of scores [B, C]; y int64 [B] must lie in them."""
    return F.cross_entropy(scores[:, columns.start : columns.stop], y - columns.start)


def rate_factor(
    schedule: Schedule, epoch: int, epochs: int, milestones: Sequence[int], decay: float
) -> float:
    """Learning rate of an epoch relative to the initial one.

    `step`: times `decay` at every milestone reached. `cosine`: (1 + cos(pi e / E)) / 2.
    """
    if schedule == "cosine":
        return (1 + math.cos(math.pi * epoch / epochs)) / 2
    return decay ** sum(epoch >= m for m in milestones)


@contextmanager
def evaluation_mode(module: nn.Module) -> Generator[None]:
    """Evaluation mode inside; afterwards every submodule has its own mode again, mixed or not."""
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in before:
            m.training = mode


def freeze_pretrained_head(backbone: Backbone) -> None:
    """The pretrained classifier has no part in features: neither trained, counted nor saved."""
    if backbone.head is not None:
        backbone.head.requires_grad_(False)
