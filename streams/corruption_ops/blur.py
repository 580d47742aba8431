"""Defocus, glass, motion, zoom and Gaussian blur."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from driftline.core.exact import divide_
from driftline.streams.corruption_ops.common import (
    Array,
    Draws,
    Rng,
    by_planes,
    central_zoom,
    field,
    gaussian_blur_nearest,
    gaussian_weights,
    integers,
    motion,
    planes,
    to_levels,
)

_SCALE = float(2**36)  # of the integer kernel: its sums stay far below the 53 bits of a float64


@lru_cache(maxsize=16)
def disc_kernel(radius: float, sigma: float) -> Array:
    """Disc of the given radius, normalised, then smoothed by a small Gaussian; float32.

    Where the disc touches the edge of its array (radius 8 and 10) the mirrored border adds about
    1 % to its sum, so the image gets slightly brighter. That belongs to the reference.
    """
    half, reach = (8, 1) if radius <= 8 else (int(radius), 2)
    axis = np.arange(-half, half + 1)
    disc = (axis[:, None] ** 2 + axis[None, :] ** 2 <= radius**2).astype(np.float32)
    disc /= disc.sum()
    weights = gaussian_weights(float(sigma), reach).astype(np.float32)
    for dimension in (0, 1):
        n = disc.shape[dimension]
        padded = np.pad(
            disc, [(reach, reach) if d == dimension else (0, 0) for d in (0, 1)], "reflect"
        )
        disc = sum(
            (
                np.take(padded, np.arange(k, k + n), axis=dimension) * weights[k]
                for k in range(2 * reach + 1)
            ),
            np.zeros_like(disc),
        )
    return disc


def _fft_length(n: int) -> int:
    """A length >= n that transforms fast: 32 times a product of 2, 3 and 5."""
    length = -(-n // 32)
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return 32 * length
        length += 1


@lru_cache(maxsize=8)
def _disc_spectrum(
    radius: float, sigma: float, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    kernel = torch.from_numpy(np.rint(disc_kernel(radius, sigma).astype(np.float64) * _SCALE))
    return torch.fft.rfft2(kernel.flip(0, 1), s=size).div_(_SCALE).to(dtype.to_complex())


def defocus_blur(
    levels: Tensor, params: tuple[float, float], draws: Draws, dtype: torch.dtype
) -> Tensor:
    """Correlation with a disc (radius, sigma of its anti-aliasing), border mirrored without edge.

    By FFT; the circular wrap falls outside the part that is kept. In float64 levels are integers
    and the kernel is in units of 2^-36: so are the sums, and half a unit is added before they are
    truncated. No round-off of the FFT, hence no device or batch, shows in the result.
    """
    h, w = levels.shape[-2:]
    half = disc_kernel(*params).shape[0] // 2
    size = (_fft_length(h + 2 * half), _fft_length(w + 2 * half))
    # Mirrored on to the length of the transform; what lies beyond the padding is never used.
    below, right = (length - n - half for n, length in zip((h, w), size, strict=True))
    values = levels.contiguous().to(dtype)
    padded = torch.nn.functional.pad(values, (half, right, half, below), mode="reflect")
    spectrum = torch.fft.rfft2(padded)
    spectrum *= _disc_spectrum(*params, size, dtype).to(levels.device)
    blurred = torch.fft.irfft2(spectrum, s=size)
    blurred = blurred[..., 2 * half : 2 * half + h, 2 * half : 2 * half + w]
    return blurred.add(0.5 / _SCALE).clamp_(0, 255).to(torch.uint8)


def draw_glass(params: tuple[float, int, int], h: int, w: int, rng: Rng) -> dict[str, Array]:
    _, reach, passes = params
    sites = (h - 2 * reach) * (w - 2 * reach)
    return {"shifts": integers(rng, -reach, reach, (passes, sites, 2), np.int8)}


def glass_sources(shifts: Tensor, reach: int, h: int, w: int) -> Tensor:
    """Which pixel each pixel ends up with after one pass; flat indices into the batch, [B * H * W].

    A pass visits the sites (row and column from size - reach down to reach + 1) in descending
    order and overwrites each with the current value of the pixel shifted by (dy, dx). The value
    read is the original one unless the source has been visited before, i.e. is a site of higher
    index. Sources therefore form chains of ascending index; all chains are followed at once by
    pointer doubling. `shifts` [B, sites, 2] holds (dx, dy) in visiting order.
    """
    batch, device = shifts.shape[0], shifts.device
    dx, dy = shifts.to(torch.int32).unbind(-1)
    # The visiting order is the raster order backwards.
    steps = (dy * w).add_(dx).flip(1).view(batch, h - 2 * reach, w - 2 * reach)
    inner = (slice(None), slice(reach + 1, h - reach + 1), slice(reach + 1, w - reach + 1))
    pixels = batch * h * w
    # Nodes 0..pixels-1 are values after the pass; node pixels + i, its own successor, is the
    # original value of pixel i.
    node = torch.arange(2 * pixels, dtype=torch.int32, device=device)
    after, original = node[:pixels], node[pixels:].view(batch, h, w)
    site = torch.zeros((batch, h, w), dtype=torch.bool, device=device)
    site[inner] = True
    source = after.view(batch, h, w)[inner] + steps
    visited = (steps > 0) & site.view(-1).index_select(0, source.view(-1)).view(source.shape)
    follow = original.clone()
    follow[inner] = source.add_(visited.logical_not_(), alpha=pixels)
    follow = follow.view(-1)
    while follow.min() < pixels:
        after.copy_(follow)
        follow = node.index_select(0, follow)
    return follow.sub_(pixels)


def glass_blur(
    levels: Tensor, params: tuple[float, int, int], draws: Draws, dtype: torch.dtype
) -> Tensor:
    """Gaussian blur, local one-way pixel copies, Gaussian blur; params (sigma, reach, passes).

    draws: "shifts" int [passes, sites, 2] in -reach..reach-1. The reference writes an exchange of
    two pixels, but because of aliasing array views only the visited pixel changes.
    """
    sigma, reach, passes = params
    b, c, h, w = levels.shape
    shifts = field(draws, "shifts", (passes, (h - 2 * reach) * (w - 2 * reach), 2))
    shifts = shifts.to(levels.device)
    smooth = gaussian_blur_nearest(planes(levels, dtype), sigma)
    pixels = smooth.mul_(255).to(torch.uint8).transpose(0, 1).reshape(c, -1)
    source = glass_sources(shifts[:, 0], reach, h, w)
    for i in range(1, passes):
        source = source.index_select(0, glass_sources(shifts[:, i], reach, h, w))
    moved = torch.stack([channel.index_select(0, source) for channel in pixels]).view(c, b, h, w)
    return to_levels(gaussian_blur_nearest(planes(moved.transpose(0, 1), dtype), sigma))


def draw_motion(params: Any, h: int, w: int, rng: Rng) -> dict[str, Array]:
    return {"angle": np.asarray(rng.uniform(-45, 45))}


def motion_blur(
    levels: Tensor, params: tuple[int, float], draws: Draws, dtype: torch.dtype
) -> Tensor:
    """Motion blur, params (radius, sigma); draws: "angle" [] in degrees, -45..45."""
    return motion(levels, *params, field(draws, "angle", ()), dtype)


def zoom_blur(
    levels: Tensor, params: tuple[float, float], draws: Draws, dtype: torch.dtype
) -> Tensor:
    """Mean of the image and of its central zooms; params (end, step) of the list of factors.

    The factors are numpy.arange(1, end, step), whose last member depends on floating-point
    rounding and is part of the definition. The factor 1 is in the list. Always in float32, as the
    reference.
    """
    factors = np.arange(1, *params).tolist()

    def blur(piece: Tensor) -> Tensor:
        total = central_zoom(piece, factors[0])
        for factor in factors[1:]:
            total += central_zoom(piece, factor)
        return divide_(total.mT.contiguous().add_(piece), len(factors) + 1)

    return to_levels(by_planes(blur, planes(levels, torch.float32)))


def gaussian_blur(levels: Tensor, sigma: float, draws: Draws, dtype: torch.dtype) -> Tensor:
    """Gaussian blur with standard deviation `sigma` px, edge repeated."""
    return to_levels(gaussian_blur_nearest(planes(levels, dtype), sigma))
