"""k-means of weighted points: Lloyd's algorithm from greedy k-means++ starts.

Written after scikit-learn's; checked against all partitions of a few points.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

STARTS, ITERATIONS, TOLERANCE = 10, 300, 1e-4  # scikit-learn's


def spread_out(x: Tensor, k: int, rng: torch.Generator) -> Tensor:
    """Greedy k-means++: `k` of the points `x` [N, D], each far from those before it."""
    points = [int(torch.randint(len(x), (), generator=rng))]
    near = torch.cdist(x, x[points]).square()  # [N, 1]
    for _ in range(k - 1):
        odds = near[:, 0].cpu() + torch.finfo(x.dtype).tiny
        tried = torch.multinomial(odds, 2 + int(math.log(k)), replacement=True, generator=rng)
        closer = torch.minimum(near, torch.cdist(x, x[tried.to(x.device)]).square())
        best = int(closer.sum(0).argmin())
        points.append(int(tried[best]))
        near = closer[:, best : best + 1]
    return x[points]


def kmeans(x: Tensor, weights: Tensor, k: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """The best of some runs of Lloyd's algorithm: centres [k, D] and the cluster [N] of each point.

    Args:
        x: float64 [N, D], at least `k` different points.
        weights: of the points, [N], in the centres.
        rng: of the starts, on the CPU.
    """
    best, lowest = (x[:k], x.new_zeros(len(x), dtype=torch.int64)), math.inf
    still = TOLERANCE * x.var(0, unbiased=False).mean()
    for _ in range(STARTS):
        centres = spread_out(x, k, rng)
        distance, member = torch.cdist(x, centres).square().min(1)
        for _ in range(ITERATIONS):
            share = F.one_hot(member, k).to(x).T * weights
            mass = share.sum(1)
            moved = share @ x / mass.clamp_min(torch.finfo(x.dtype).tiny)[:, None]
            if n := int((mass == 0).sum()):  # an empty cluster goes to the farthest point
                moved[mass == 0] = x[distance.topk(n).indices]
            shift, before, centres = (moved - centres).square().sum(), member, moved
            distance, member = torch.cdist(x, centres).square().min(1)
            if shift <= still or torch.equal(member, before):
                break
        if (inertia := float(distance @ weights)) < lowest:
            best, lowest = (centres, member), inertia
    return best
