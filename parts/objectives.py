"""Losses that methods share, as functions of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scope = Literal["current", "seen", "all"]


def entropy(logits: Tensor) -> Tensor:
    """Entropy [B] of the softmax of `logits` [B, C], in nats."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def consistency(logits: Tensor, target: Tensor, *, symmetric: bool) -> Tensor:
    """Mean of `consistencies` over the batch; 0-dim."""
    return consistencies(logits, target, symmetric=symmetric).mean(0)


def consistencies(logits: Tensor, target: Tensor, *, symmetric: bool) -> Tensor:
    """Cross-entropy [B] of student `logits` against teacher `target`, both [B, C].

    Args:
        symmetric: mean of both directions instead of H(target, logits) alone.
    """
    forward = (target.softmax(1) * logits.log_softmax(1)).sum(1)
    if not symmetric:
        return -forward
    backward = (logits.softmax(1) * target.log_softmax(1)).sum(1)
    return -0.5 * forward - 0.5 * backward


def scope_columns(scope: Scope, classes: Sequence[int], seen: int, total: int) -> Sequence[int]:
    """Columns of the scores that take part in the softmax of the loss.

    `current`: the classes of this task. `seen`: every class so far. `all`: every class of the
    stream, those of the future included.
    """
    if scope == "current":
        return classes
    return range(seen if scope == "seen" else total)


def within(scores: Tensor, y: Tensor, columns: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The `columns` (ascending) of scores [B, C], and the places of y int64 [B] among them."""
    if isinstance(columns, range):
        return scores[:, columns.start : columns.stop], y - columns.start
    chosen = torch.tensor(columns, device=y.device)
    return scores[:, chosen], torch.searchsorted(chosen, y)


def scoped_cross_entropy(scores: Tensor, y: Tensor, columns: Sequence[int]) -> Tensor:
    """Mean cross-entropy over `columns` of scores [B, C]; y int64 [B] must lie in them."""
    return F.cross_entropy(*within(scores, y, columns))
