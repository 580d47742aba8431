"""Corruptions that treat every value alone: Gaussian, speckle, shot and impulse noise.

Draws lie as the reference makes them, [H, W, 3], so these operations work on [B, H, W, 3]. They
overwrite the draws.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from driftline.streams.corruption_ops.common import (
    Array,
    Draws,
    Rng,
    field,
    select,
    to_levels,
    unit,
)


def _channels_last(levels: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, H, W, 3], contiguous."""
    if levels.is_contiguous(memory_format=torch.channels_last):
        return levels.permute(0, 2, 3, 1)
    return torch.stack(levels.unbind(1), dim=-1)  # several times faster than a strided copy


def _channels_first(levels: Tensor) -> Tensor:
    return levels.permute(0, 3, 1, 2)


def _noise(draws: Draws, key: str, levels: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Draws [B, H, W, 3] on the device of the levels."""
    return field(draws, key, (*levels.shape[2:], 3)).to(levels.device, dtype)


def _indices(mask: Tensor) -> Tensor:
    """Where a flat mask is set; on a CPU NumPy finds it several times faster."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def draw_normals(params: Any, h: int, w: int, rng: Rng) -> dict[str, Array]:
    return {"normal": rng.standard_normal((h, w, 3))}


def gaussian_noise(levels: Tensor, sigma: float, draws: Draws, dtype: torch.dtype) -> Tensor:
    """u + sigma * normal; draws: "normal" [H, W, 3]."""
    noise = _noise(draws, "normal", levels, dtype).mul_(sigma)
    return _channels_first(to_levels(noise.add_(unit(_channels_last(levels), dtype))))


def speckle_noise(levels: Tensor, sigma: float, draws: Draws, dtype: torch.dtype) -> Tensor:
    """u + u * sigma * normal; draws: "normal" [H, W, 3]."""
    noise = _noise(draws, "normal", levels, dtype).mul_(sigma)
    values = unit(_channels_last(levels), dtype)
    return _channels_first(to_levels(noise.mul_(values).add_(values)))


def draw_shot(params: Any, h: int, w: int, rng: Rng) -> dict[str, Array]:
    return {"uniform": rng.random((h, w, 3))}


_BINS = 256  # of the unit interval, in which the search for a count begins


@lru_cache(maxsize=8)
def poisson_table(photons: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inverse Poisson distributions of the 256 grey levels, laid end to end.

    Returns (cumulative, result, guide, direct). Level v owns one stretch of `cumulative`, whose
    k-th entry is P(count <= k) for the rate photons * v / 255; `result` holds the grey level of
    that count. guide[_BINS * v + j] is where the search for a uniform in [j, j + 1) / _BINS starts:
    the first entry of the stretch that exceeds j / _BINS. `direct` is the grey level of all
    uniforms of such a bin, or -1 where the bin has several counts and a search is needed.
    """
    cumulative, result, guide, single = [], [], [], []
    start = 0
    for level in range(256):
        rate = photons * (level / 255.0)
        counts = np.arange(int(rate + 10.0 * math.sqrt(rate) + 20.0))
        log_factorial = np.concatenate(([0.0], np.cumsum(np.log(counts[1:]))))
        log_rate = math.log(rate) if rate > 0 else -math.inf
        with np.errstate(invalid="ignore"):
            log_power = np.where(counts == 0, 0.0, counts * log_rate)
        piece = np.minimum(np.cumsum(np.exp(log_power - rate - log_factorial)), 1.0)
        piece[-1] = 1.0
        cumulative.append(piece)
        result.append(to_levels(torch.from_numpy(counts / photons)))
        edges = np.arange(_BINS + 1) / _BINS
        first = np.searchsorted(piece, edges[:-1], side="right")
        guide.append(start + first)
        single.append(piece[first] >= edges[1:])
        start += len(piece)
    results, guides = torch.cat(result), torch.from_numpy(np.concatenate(guide))
    direct = results[guides].to(torch.int16)
    direct[~torch.from_numpy(np.concatenate(single))] = -1
    return torch.from_numpy(np.concatenate(cumulative)), results, guides, direct


def shot_noise(levels: Tensor, photons: float, draws: Draws, dtype: torch.dtype) -> Tensor:
    """Poisson(photons * u) / photons; draws: "uniform" [H, W, 3] in [0, 1).

    The counts come from the uniforms through the inverse distribution function. This keeps the
    draws independent of the image (a Poisson generator needs the rate). Always in float64.
    """
    table = poisson_table(float(photons))
    cumulative, result, guide, direct = (t.to(levels.device) for t in table)
    uniform = _noise(draws, "uniform", levels).view(-1)
    values = _channels_last(levels)
    index = (uniform * _BINS).to(torch.int32).add_(values.reshape(-1).to(torch.int32).mul_(_BINS))
    counts = direct.index_select(0, index)
    unsure = _indices(counts < 0)
    target, position = uniform[unsure], guide[index[unsure]]
    beyond = cumulative[position] <= target
    while beyond.any():
        position += beyond
        beyond = cumulative[position] <= target
    counts[unsure] = result[position].to(torch.int16)
    return _channels_first(counts.to(torch.uint8).view(values.shape))


def draw_impulse(params: Any, h: int, w: int, rng: Rng) -> dict[str, Array]:
    return {"hit": rng.random((h, w, 3)), "salt": rng.random((h, w, 3))}


def impulse_noise(levels: Tensor, amount: float, draws: Draws, dtype: torch.dtype) -> Tensor:
    """Each value becomes 0 or 1 with probability amount / 2 each; draws: "hit", "salt" [H, W, 3].

    Pixels AND channels are hit independently. Always in float64; the other values stay: all levels
    survive level / 255 * 255 and truncation.
    """
    hit = _noise(draws, "hit", levels) <= amount
    salt = _noise(draws, "salt", levels) <= 0.5
    return _channels_first(select(_channels_last(levels), (hit, salt.to(torch.uint8).neg_())))
