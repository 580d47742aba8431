"""Which of several sets of adapters, or experts, answer, and with what share.

`by_entropy` and `by_distance` name one set an image, `scores_of` reads its scores. `shares` are the
weights of a mixture: of scores from a learned gate, or of how far a token points in the `direction`
of each set (Arrow).
"""

from __future__ import annotations

from collections.abc import Sequence

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


def shares(scores: Tensor, top: int | None = None, temperature: float = 1.0) -> Tensor:
    """Weights of the experts, a softmax over the largest scores.

    Args:
        scores: [..., K], of each expert.
        top: how many get a share (all if there are fewer); the others have 0. None: all.
        temperature: the scores are divided by it.

    Returns:
        [..., K], with sum 1.
    """
    if temperature != 1:
        scores = scores / temperature
    if top is None:
        return scores.softmax(-1)
    values, chosen = scores.topk(min(top, scores.shape[-1]), -1)
    return torch.zeros_like(scores).scatter(-1, chosen, values.softmax(-1).to(scores))


@torch.no_grad()
def direction(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The input to which a sum of low-rank products, each with rows of its own, answers most.

    That is their first right singular vector, up to its sign: the key of a set in Arrow (Ostapenko
    et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", ICML 2024, arXiv
    2405.11157, section 4).

    Args:
        pairs: down [r, D] and up [D_out, r] of each product.

    Returns:
        [D], of length 1.
    """
    rows = [torch.linalg.qr(up).R @ down for down, up in pairs]
    return torch.linalg.svd(torch.cat(rows), full_matrices=False).Vh[0]
