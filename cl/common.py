"""Small pieces that training methods share: loss scope, learning-rate schedule, modes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.backbones.heads import ExpandingLinear
from driftline.backbones.surgery import (
    evaluation_mode as evaluation_mode,  # what every method here needs
)
from driftline.core.errors import Diverged

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


def freeze_pretrained_head(backbone: Backbone) -> None:
    """The pretrained classifier has no part in features: neither trained, counted nor saved."""
    if backbone.head is not None:
        backbone.head.requires_grad_(False)


class NearZeroLinear(ExpandingLinear):
    """Expanding linear layer whose new rows start at N(0, 0.001^2), biases at 0 (LAE, O-LoRA)."""

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Append rows up to `classes` in all; see `ExpandingLinear.grow`."""
        added = classes - self.classes
        if added <= 0:
            return
        old = self.weight.detach()
        new = torch.empty(added, old.shape[1]).normal_(0, 0.001, generator=generator)
        self.weight = nn.Parameter(torch.cat([old, new.to(old)]))
        self.bias = nn.Parameter(F.pad(self.bias.detach(), (0, added)))


def require_finite(loss: Tensor, lr: float, setting: str = "strategy.lr") -> None:
    """Stop before a step that would spoil the parameters.

    Raises:
        Diverged: if `loss` is NaN or infinite, naming the rate and the images as the causes.
    """
    if not loss.isfinite():
        raise Diverged(
            f"the training loss is {loss.item()}: lower {setting} (now {lr:g}), or look for images "
            "that are not finite numbers"
        )


class Store(nn.Module):
    """Named tensors that are part of the state although their number and sizes change.

    Names may hold dots. Loading a state replaces everything that is held.
    """

    where: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("where", torch.empty(0), persistent=False)  # follows `.to(device)`

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep `tensor` itself, not a copy."""
        self.register_buffer(name.replace(".", "/"), tensor)

    def __contains__(self, name: str) -> bool:
        return name.replace(".", "/") in self._buffers

    def __getitem__(self, name: str) -> Tensor:
        found = self._buffers[name.replace(".", "/")]
        assert found is not None
        return found

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in set(self._buffers) - {"where"}:
            delattr(self, name)
        for key, value in state_dict.items():
            if key.startswith(prefix):
                self.put(key.removeprefix(prefix), value.to(self.where.device, copy=True))
