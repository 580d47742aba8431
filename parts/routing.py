"""Which set of adapters answers for an image, told from what every set makes of it.

Both functions name one set an image; `scores_of` reads its scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def by_entropy(scores: Tensor) -> Tensor:
    """The set whose scores have the lowest entropy (TUNA, Wang et al., ICCV 2025).

    Args:
        scores: [T, B, C], logits under every set.

    Returns:
        int64 [B].
    """
    p = scores.softmax(2)
    entropy = -(p * (p + 1e-10).log()).sum(2)
    return entropy.argmin(0)


def by_distance(features: Tensor, means: Tensor, owner: Tensor) -> Tensor:
    """The set under which an image is most similar to a class mean that was measured under it.

    Args:
        features: [T, B, D], under every set.
        means: [C, D], of each class under the set of its task; a zero row is never the nearest.
        owner: int64 [C], set of each class.

    Returns:
        int64 [B].
    """
    cosines = F.normalize(features, dim=2) @ F.normalize(means, dim=1).T  # [T, B, C]
    foreign = owner != torch.arange(len(features), device=owner.device)[:, None]
    unknown = foreign | (means == 0).all(1)
    return cosines.masked_fill(unknown[:, None], -torch.inf).amax(2).argmax(0)


def scores_of(scores: Tensor, chosen: Tensor) -> Tensor:
    """[T, B, C] -> [B, C]: row b of set `chosen[b]`; int64 [B]."""
    return scores[chosen, torch.arange(len(chosen), device=chosen.device)]
