"""Arithmetic that several corruptions share.

Whatever decides a grey level is computed in single IEEE operations (never a fused multiply-add or
a library reduction) or in exact integers, so that an image does not depend on the batch it is in,
on the number of threads or on the device.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from driftline.core.exact import divide_

Array = np.ndarray[Any, Any]
Draws = Mapping[str, Tensor]
Rng = np.random.Generator | np.random.RandomState


def unit(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 levels -> [0, 1]; memory format kept."""
    return divide_(levels.to(dtype), 255)


def planes(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 levels -> [0, 1], each plane contiguous."""
    return unit(levels.contiguous(), dtype)


def to_levels(values: Tensor) -> Tensor:
    """[0, 1] -> uint8 with clipping and truncation toward zero; overwrites `values`."""
    return values.clamp_(0, 1).mul_(255).to(torch.uint8)


def select(rest: Tensor, *choices: tuple[Tensor, Tensor]) -> Tensor:
    """uint8: the value of the choice (mask, value) whose mask is set, else `rest`; masks disjoint.

    By bits, which is many times faster than `torch.where` on bytes.
    """
    result = rest
    for mask, value in choices:
        bits = mask.to(torch.uint8).neg_()  # 1 -> 255
        result = (result ^ value).bitwise_and_(bits).bitwise_xor_(result)
    return result


def field(draws: Draws, key: str, shape: tuple[int, ...]) -> Tensor:
    """One entry of `draws`, [B, *shape]; ValueError if missing or made for another image size."""
    if key not in draws:
        raise ValueError(f"draws lack {key!r}; given: {sorted(draws)}")
    value = draws[key]
    if tuple(value.shape[1:]) != shape:
        raise ValueError(
            f"draws[{key!r}] has shape {tuple(value.shape[1:])}; this image needs {shape}"
        )
    return value


def integers(rng: Rng, low: int, high: int, size: tuple[int, ...], dtype: type) -> Array:
    """Uniform integers in [low, high), from either generator interface."""
    if isinstance(rng, np.random.Generator):
        return rng.integers(low, high, size=size, dtype=dtype)
    # The legacy stream depends on the dtype asked for, so draw with its default and convert.
    return np.asarray(rng.randint(low, high, size=size)).astype(dtype)


def modulo(index: Tensor, n: int) -> Tensor:
    """Whole numbers modulo n, in float64: several times faster than `torch.remainder`."""
    index = index.to(torch.float64)
    return index - divide_(index.clone(), n).floor_().mul_(n)


def reflect(index: Tensor, n: int) -> Tensor:
    """Fold whole numbers into 0..n-1 by half-sample mirroring (... 1 0 | 0 1 ... n-1 | n-1 ...).

    Any type in, float64 out.
    """
    index = modulo(index, 2 * n)
    return torch.minimum(index, 2 * n - 1 - index)


def reflect101(index: Tensor, n: int) -> Tensor:
    """As `reflect`, mirroring without repeating the edge (... 2 1 | 0 1 2 ...)."""
    index = modulo(index, 2 * n - 2)
    return torch.minimum(index, 2 * n - 2 - index)


def repeat_edge(values: Tensor, dim: int, before: int, after: int) -> Tensor:
    """Extends one dimension by copies of its first and last entry."""
    n = values.shape[dim]
    shape = list(values.shape)
    shape[dim] = before + n + after
    out = values.new_empty(shape)
    out.narrow(dim, before, n).copy_(values)
    if before:
        out.narrow(dim, 0, before).copy_(values.narrow(dim, 0, 1))
    if after:
        out.narrow(dim, before + n, after).copy_(values.narrow(dim, n - 1, 1))
    return out


_PIECE = 2**16  # values of a plane or group of planes that stay in a CPU core's cache


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Lets the C library of Linux reuse the memory of temporary images.

    It gives larger blocks back to the system when they are freed and then faults their pages in
    again, for every temporary tensor. Freeing one block raises that limit to the block's size.
    """
    torch.empty(2**24, dtype=torch.uint8)


def by_planes(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """A function of planes [N, H, W], applied to [..., H, W] in pieces that suit the device.

    Filters pass over their data many times; on a CPU they are up to twice as fast in the cache.
    """
    flat = values.reshape(-1, *values.shape[-2:])
    count = len(flat)
    if values.device.type == "cpu":
        count = max(1, _PIECE // flat[0].numel())
    result = torch.cat([function(piece) for piece in flat.split(count)])
    return result.view(*values.shape[:-2], *result.shape[-2:])


@lru_cache(maxsize=32)
def gaussian_weights(sigma: float, radius: int) -> Array:
    """Normalised taps of a sampled Gaussian, float64 [2 * radius + 1]."""
    weights = np.exp(-0.5 / (sigma * sigma) * np.arange(-radius, radius + 1) ** 2)
    weights /= weights.sum()
    weights.flags.writeable = False
    return weights


@lru_cache(maxsize=16)
def gaussian_matrix(n: int, sigma: float, truncate: float) -> Tensor:
    """Smoothing of n samples as an n x n matrix; taps outside are mirrored (half-sample) back."""
    radius = int(truncate * sigma + 0.5)
    matrix = torch.zeros((n, n), dtype=torch.float64)
    rows = torch.arange(n)
    for offset, weight in enumerate(gaussian_weights(sigma, radius), start=-radius):
        matrix[rows, reflect(rows + offset, n).long()] += float(weight)
    return matrix


_BAND = 32  # rows of a banded matrix that are multiplied at once


def smooth_rows(values: Tensor, sigma: float, truncate: float) -> Tensor:
    """`gaussian_matrix` times [N, W], without the blocks of the matrix that are zero."""
    n = len(values)
    radius = int(truncate * sigma + 0.5)
    matrix = gaussian_matrix(n, sigma, truncate).to(values.device, values.dtype)
    if values.dtype == torch.float32:
        return matrix @ values  # blocks gain little here, and would be summed in another order
    blocks = []
    for start in range(0, n, _BAND):
        near = slice(max(0, start - radius), start + _BAND + radius)
        blocks.append(matrix[start : start + _BAND, near] @ values[near])
    return torch.cat(blocks)


def gaussian_blur_nearest(values: Tensor, sigma: float) -> Tensor:
    """Separable Gaussian of [..., H, W], radius floor(4 sigma + 1/2), edge repeated.

    Adds the taps in symmetric pairs from the outermost inwards, the order in which SciPy's
    correlation adds them: in flat regions the last bit decides which integer the truncation
    yields, so the order of the sum is visible in the result.
    """
    radius = int(4.0 * sigma + 0.5)
    if radius == 0:
        return values
    weights = gaussian_weights(float(sigma), radius).tolist()

    def blur(piece: Tensor) -> Tensor:
        for dim in (-2, -1):
            n = piece.shape[dim]
            padded = repeat_edge(piece, dim, radius, radius)
            total = piece * weights[radius]
            pair = torch.empty_like(total)
            for k in range(radius, 0, -1):
                ends = padded.narrow(dim, radius - k, n), padded.narrow(dim, radius + k, n)
                total += torch.add(*ends, out=pair).mul_(weights[radius - k])
            piece = total
        return piece

    return by_planes(blur, values)


def motion(levels: Tensor, radius: int, sigma: float, angles: Tensor, dtype: torch.dtype) -> Tensor:
    """One-sided motion blur of uint8 [B, C, H, W] as ImageMagick defines it; angles [B] in degrees.

    2 * radius + 1 taps with half-Gaussian weights, at offsets along the angle rounded to whole
    pixels; the edge is repeated. The sum is rounded to the 16-bit levels ImageMagick works with
    (257 per 8-bit level) and then truncated to 8 bits; in float64 this reproduces its output.
    """
    h, w = levels.shape[-2:]
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2.0 * sigma * sigma))
    weights /= weights.sum()

    def blur(piece: Tensor, angle: float) -> Tensor:
        radians = math.radians(angle)
        dx = np.ceil(taps * math.cos(radians) - 0.5).astype(int)
        dy = np.ceil(taps * math.sin(radians) - 0.5).astype(int)
        top, left = -int(dy.min()), -int(dx.min())
        padded = repeat_edge(piece.to(dtype), -2, top, int(dy.max()))
        padded = repeat_edge(padded, -1, left, int(dx.max()))
        total = torch.zeros(piece.shape, dtype=dtype, device=piece.device)
        # Fused multiply-adds are fine here: the rounding to 16 bits hides the last bits.
        places = (top + dy).tolist(), (left + dx).tolist()
        for y, x, weight in zip(*places, weights.tolist(), strict=True):
            total.add_(padded.narrow(-2, y, h).narrow(-1, x, w), alpha=weight)
        sixteen_bit = total.mul_(257).add_(0.5).floor_()
        # 1/2 keeps the quotients away from the integers
        return sixteen_bit.add_(0.5).mul_(1 / 257).to(torch.uint8)

    return torch.stack(
        [
            by_planes(partial(blur, angle=angle), image)
            for image, angle in zip(levels.contiguous(), angles.tolist(), strict=True)
        ]
    )


@lru_cache(maxsize=128)
def _zoom_taps(
    n: int, factor: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Linear interpolation of the central part of n samples, enlarged by `factor`, n kept.

    The central ceil(n / factor) samples are stretched corner-aligned to round(ceil(.) * factor)
    and the central n are kept. Returns lower index [n], upper index [n] and upper weight [n, 1].
    """
    crop = math.ceil(n / factor)
    enlarged = round(crop * factor)
    position = (np.arange(n) + (enlarged - n) // 2) * ((crop - 1) / (enlarged - 1))
    lower = np.clip(np.floor(position).astype(np.int64), 0, crop - 1)
    upper = np.minimum(lower + 1, crop - 1)
    first = (n - crop) // 2
    weight = torch.from_numpy(position - lower).to(device, dtype)[:, None]
    return (
        torch.from_numpy(first + lower).to(device),
        torch.from_numpy(first + upper).to(device),
        weight,
    )


def zoom_rows(values: Tensor, factor: float) -> Tensor:
    """Enlarges the central rows of [..., H, W] by `factor`, size and dtype kept."""
    rows = values.shape[-2]
    lower, upper, weight = _zoom_taps(rows, factor, values.dtype, values.device)
    start = values.index_select(-2, lower)
    return start.add_(values.index_select(-2, upper).sub_(start).mul_(weight))


def central_zoom(values: Tensor, factor: float) -> Tensor:
    """Enlarges the centre of [..., H, W] by `factor`; returned TRANSPOSED, [..., W, H].

    Rows are picked several times faster than columns, so the second direction works on the
    transposed image; a caller that adds up several zooms transposes back only once.
    """
    return zoom_rows(zoom_rows(values, factor).mT.contiguous(), factor)


def jpeg(levels: Tensor, quality: int) -> Tensor:
    """Baseline JPEG with 4:2:0 chroma, encoded and decoded by Pillow on the host."""
    images = levels.contiguous().cpu().numpy()
    decoded = np.empty_like(images)
    for image, place in zip(images, decoded, strict=True):
        buffer = io.BytesIO()
        # Pillow weaves the channels faster than a strided copy does.
        whole = Image.merge("RGB", [Image.fromarray(channel) for channel in image])
        whole.save(buffer, "JPEG", quality=quality)
        with Image.open(buffer) as file:
            pixels = np.frombuffer(file.tobytes(), np.uint8).reshape(*image.shape[1:], 3)
        np.copyto(place, pixels.transpose(2, 0, 1))
    return torch.from_numpy(decoded).to(levels.device)
