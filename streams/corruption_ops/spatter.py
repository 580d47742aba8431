"""Spatter: drops of water or mud. The relief of water drops is made on the host, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from driftline.core.exact import divide_
from driftline.streams.corruption_ops.common import (
    Array,
    Draws,
    Rng,
    field,
    gaussian_blur_nearest,
    planes,
    to_levels,
)


def draw_spatter(params: Any, h: int, w: int, rng: Rng) -> dict[str, Array]:
    return {"normal": rng.standard_normal((h, w))}


def _window_sum(values: Array) -> Array:
    """Sum over 3 x 3 neighbourhoods, border mirrored without edge; [H, W]."""
    padded = np.pad(values, 1, mode="reflect")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def canny(grey: Array, low: int, high: int) -> Array:
    """Canny edges of uint8 [H, W] as bool: 3 x 3 Sobel, |gx| + |gy|, hysteresis low / high."""
    p = np.pad(grey.astype(np.int64), 1, mode="edge")
    down = p[2:] - p[:-2]
    gy = down[:, :-2] + 2 * down[:, 1:-1] + down[:, 2:]
    across = p[:, 2:] - p[:, :-2]
    gx = across[:-2] + 2 * across[1:-1] + across[2:]
    strength = np.abs(gx) + np.abs(gy)
    m = np.pad(strength, 1)

    def neighbour(dy: int, dx: int) -> Array:
        return m[1 + dy : m.shape[0] - 1 + dy, 1 + dx : m.shape[1] - 1 + dx]

    # Sectors of the gradient direction by integer comparison; 13573 = tan(22.5 deg) * 2^15.
    ax, ay = np.abs(gx), np.abs(gy) << 15
    tangent = ax * 13573
    flat, steep = ay < tangent, ay > tangent + (ax << 16)
    opposite = (gx ^ gy) < 0
    peak = np.where(
        flat,
        (strength > neighbour(0, -1)) & (strength >= neighbour(0, 1)),
        np.where(
            steep,
            (strength > neighbour(-1, 0)) & (strength >= neighbour(1, 0)),
            np.where(
                opposite,
                (strength > neighbour(-1, 1)) & (strength > neighbour(1, -1)),
                (strength > neighbour(-1, -1)) & (strength > neighbour(1, 1)),
            ),
        ),
    )
    candidate = peak & (strength > low)
    edges = candidate & (strength > high)
    while True:  # grow the strong edges along the candidates, eight neighbours
        q = np.pad(edges, 1)
        q = q[:-2] | q[1:-1] | q[2:]
        grown = (q[:, :-2] | q[:, 1:-1] | q[:, 2:]) & candidate
        if np.array_equal(grown, edges):
            return edges
        edges = grown


def edge_distance(edges: Array, cap: float) -> Array:
    """Distance of each pixel to the nearest edge, 5 x 5 chamfer metric, capped; float32 [H, W]."""
    one = 1 << 16  # fixed point with 16 fractional bits
    distance = np.where(edges, 0, int(cap * one))
    moves = []
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            cost = {1: 1.0, 2: 1.4, 5: 2.1969}.get(dy * dy + dx * dx)
            if cost is not None:
                moves.append((dy, dx, round(cost * one)))
    h, w = edges.shape
    while True:
        p = np.pad(distance, 2, constant_values=int(cap * one))
        nearer = distance.copy()
        for dy, dx, cost in moves:
            np.minimum(nearer, p[2 + dy : 2 + dy + h, 2 + dx : 2 + dx + w] + cost, out=nearer)
        if np.array_equal(nearer, distance):
            return (distance / one).astype(np.float32)
        distance = nearer


def _equalise(grey: Array) -> Array:
    """Histogram equalisation of uint8 [H, W]."""
    histogram = np.bincount(grey.ravel(), minlength=256)
    first = int(np.flatnonzero(histogram)[0])
    rest = grey.size - int(histogram[first])
    if rest == 0:
        return grey.copy()
    histogram[first] = 0
    scale = np.float32(255) / np.float32(rest)
    table = np.rint(np.cumsum(histogram).astype(np.float32) * scale)
    return np.clip(table, 0, 255).astype(np.uint8)[grey]


def _water_mask(liquid: Array) -> Array:
    """Relief of the drops, non-negative float32 [H, W] with unknown scale; liquid float64."""
    level = (liquid * 255).astype(np.uint8)
    distance = edge_distance(canny(level, 50, 150), 20.0)
    smooth = (_window_sum(distance.astype(np.float64)) * (1.0 / 9.0)).astype(np.float32)
    relief = np.pad(_equalise(smooth.astype(np.uint8)).astype(np.int64), 1, mode="reflect")
    emboss = np.zeros(level.shape, dtype=np.int64)
    for (dy, dx), weight in np.ndenumerate(np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])):
        emboss += weight * relief[dy : dy + level.shape[0], dx : dx + level.shape[1]]
    emboss = np.clip(emboss, 0, 255)
    mean = (_window_sum(emboss) + 4) // 9  # rounded, as an 8-bit filter
    return level.astype(np.float32) * mean.astype(np.float32)


def spatter(levels: Tensor, params: tuple[Any, ...], draws: Draws, dtype: torch.dtype) -> Tensor:
    """Drops of water or mud; draws: "normal" [H, W].

    params: mean and standard deviation of the noise, its smoothing, threshold, strength (water)
    or smoothing (mud), mud or not. If no drop is formed the image is returned unchanged; the
    reference divides by zero there. The liquid is computed in `dtype`, the image in float32.
    """
    mean, deviation, smoothing, threshold, strength, mud = params
    noise = field(draws, "normal", (levels.shape[2], levels.shape[3])).to(levels.device, dtype)
    liquid = gaussian_blur_nearest(noise.mul(deviation).add_(mean), smoothing)
    liquid = liquid.masked_fill(liquid < threshold, 0.0)
    image = planes(levels, torch.float32)
    if mud:
        mask = gaussian_blur_nearest((liquid > threshold).to(dtype), strength)
        mask = mask.masked_fill(mask < 0.8, 0.0).to(torch.float32)[:, None]
        return to_levels(image.mul_(1 - mask).add_(mask * _colour(63, 42, 20, levels.device)))
    masks = np.stack([_water_mask(one) for one in liquid.cpu().numpy()])
    mask = torch.from_numpy(masks).to(levels.device)[:, None]
    peak = mask.amax((1, 2, 3), keepdim=True)
    mask = mask.div_(peak.masked_fill(peak == 0, 1.0)).mul_(strength)
    wet = to_levels(image.add_(mask * _colour(175, 238, 238, levels.device)))
    return torch.where(peak == 0, levels, wet)


def _colour(red: int, green: int, blue: int, device: torch.device) -> Tensor:
    levels = torch.tensor([red, green, blue], dtype=torch.float32, device=device)
    return divide_(levels, 255).view(3, 1, 1)
