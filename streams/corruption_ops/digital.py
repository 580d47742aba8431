"""Brightness, contrast, elastic transform, pixelation, JPEG and saturation."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from driftline.core.exact import divide_
from driftline.streams.corruption_ops.common import (
    Array,
    Draws,
    Rng,
    field,
    jpeg,
    modulo,
    planes,
    reflect,
    reflect101,
    select,
    smooth_rows,
    to_levels,
)


def rgb_to_hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hexcone model; hue in [0, 1), grey pixels get hue 0. [B, 3, H, W] -> three [B, H, W]."""
    red, green, blue = (channel.contiguous() for channel in rgb.unbind(1))
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    grey = chroma == 0
    divisor = chroma.masked_fill(grey, 1.0)
    # The last of the largest channels decides, and a pure difference of the other two is divided.
    from_blue, from_green = blue == value, green == value
    difference = torch.where(
        from_blue, red - green, torch.where(from_green, blue - red, green - blue)
    )
    sector = from_green.to(rgb.dtype).mul_(2).masked_fill_(from_blue, 4.0)
    hue = divide_(difference.div_(divisor).add_(sector), 6.0)
    hue += hue < 0
    hue.masked_fill_(grey, 0.0)
    saturation = chroma / value.masked_fill(value == 0, 1.0)
    return hue, saturation, value


def hsv_to_levels(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Inverse of `rgb_to_hsv`, truncated: three [B, H, W] in [0, 1] -> uint8 [B, 3, H, W]."""
    position = hue * 6.0
    sector = position.floor()
    fraction = position.sub_(sector)
    sector = sector.to(torch.uint8)
    odd = sector.bitwise_and(1).bool()
    # The middle channel falls within the odd sectors and rises within the even ones.
    share = torch.where(odd, fraction, 1.0 - fraction).mul_(saturation)
    middle = to_levels(value * (1.0 - share))
    low = to_levels(value * (1.0 - saturation))
    high = to_levels(value.clone())
    sector.remainder_(6)
    within = [sector == i for i in range(6)]
    highs, middles = ((0, 5), (1, 2), (3, 4)), ((1, 4), (0, 3), (2, 5))
    return torch.stack(
        [
            select(low, (within[a] | within[b], high), (within[c] | within[d], middle))
            for (a, b), (c, d) in zip(highs, middles, strict=True)
        ],
        dim=1,
    )


def brightness(levels: Tensor, shift: float, draws: Draws, dtype: torch.dtype) -> Tensor:
    """Adds `shift` to the HSV value."""
    hue, saturation, value = rgb_to_hsv(planes(levels, dtype))
    return hsv_to_levels(hue, saturation, (value + shift).clamp_(0, 1))


def saturate(
    levels: Tensor, params: tuple[float, float], draws: Draws, dtype: torch.dtype
) -> Tensor:
    """HSV saturation times params[0] plus params[1]; grey pixels turn reddish if params[1] > 0."""
    hue, saturation, value = rgb_to_hsv(planes(levels, dtype))
    saturation = saturation.mul_(params[0]).add_(params[1]).clamp_(0, 1)
    return hsv_to_levels(hue, saturation, value)


def contrast(levels: Tensor, factor: float, draws: Draws, dtype: torch.dtype) -> Tensor:
    """Shrinks the deviation from each channel's spatial mean by `factor`."""
    pixels = levels.shape[2] * levels.shape[3]
    total = levels.sum((2, 3), keepdim=True, dtype=torch.int64)
    mean = divide_(total.to(torch.float64), 255 * pixels).to(dtype)
    return to_levels(planes(levels, dtype).sub_(mean).mul_(factor).add_(mean))


def draw_elastic(params: tuple[float, float, float], h: int, w: int, rng: Rng) -> dict[str, Array]:
    _, _, jitter = params
    return {
        "corners": rng.uniform(-jitter, jitter, size=(3, 2)),
        "dx": rng.uniform(-1, 1, size=(h, w)),
        "dy": rng.uniform(-1, 1, size=(h, w)),
    }


def _neighbours(whole: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Entries `whole` and `whole + 1` of a periodic table, each [N]; whole numbers in float64."""
    place = modulo(whole.view(-1), len(table)).to(torch.int32)
    return table.index_select(0, place), table.roll(-1).index_select(0, place)


def _bilinear(image: Tensor, y: Tensor, x: Tensor, repeats_edge: bool) -> Tensor:
    """Samples [B, 3, H, W] at the positions y, x (float64 [B, H, W], overwritten) in px.

    The border is mirrored, with or without repeating the edge.
    """
    b, _, h, w = image.shape
    fold, ends = (reflect, 0) if repeats_edge else (reflect101, 2)
    indices, fractions = [], []
    for position, n, stride in ((y, h, w), (x, w, 1)):
        # One period of the mirrored indices: neighbours are then read instead of computed.
        table = fold(torch.arange(2 * n - ends, device=image.device), n).mul_(stride)
        whole = position.floor()
        indices.append(_neighbours(whole, table.to(torch.int32)))
        fractions.append(position.sub_(whole).to(image.dtype).view(-1))
    (upper, lower), columns = indices
    first = torch.arange(b, dtype=torch.int32, device=image.device).mul_(h * w)[:, None]
    rows = [(row.view(b, h * w) + first).view(-1) for row in (upper, lower)]
    fy, fx = fractions
    corners = [
        (row + column, weight_y * weight_x)
        for row, weight_y in zip(rows, (1 - fy, fy), strict=True)
        for column, weight_x in zip(columns, (1 - fx, fx), strict=True)
    ]
    blended = []
    for channel in image.unbind(1):  # picking from one plane is the fastest form of a gather
        plane = channel.reshape(-1)
        parts = [plane.index_select(0, index).mul_(weight) for index, weight in corners]
        blended.append(parts[0].add_(parts[1]).add_(parts[2]).add_(parts[3]).view(b, h, w))
    return torch.stack(blended, dim=1)


def _inverse_affine(h: int, w: int, moves: Array) -> tuple[tuple[float, float, float], ...]:
    """The map from output to input (x, y) that moves three points round the centre by `moves`."""
    centre = np.array([h // 2, w // 2], dtype=np.float32)
    reach = np.float32(min(h, w) // 3)
    old = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]], dtype=np.float32)
    new = (old + moves.astype(np.float32)).astype(np.float64)
    # output position -> input position: solve for the forward map, then invert it
    design = np.concatenate([old.astype(np.float64), np.ones((3, 1))], axis=1)
    (a, b, tx), (c, d, ty) = np.linalg.solve(design, new).T.tolist()
    determinant = a * d - b * c
    scale = 1.0 / determinant if determinant != 0 else 0.0
    a, b, c, d = d * scale, -b * scale, -c * scale, a * scale
    return (a, b, -(a * tx + b * ty)), (c, d, -(c * tx + d * ty))


def _affine_warp(image: Tensor, moves: Tensor) -> Tensor:
    """Warps [B, 3, H, W] by the affine maps that move three points by `moves` [B, 3, 2].

    As in OpenCV 4, positions are fixed-point numbers and the sampling fraction is a multiple of
    1/32 pixel; border mirrored without edge.
    """
    h, w = image.shape[-2:]
    maps = torch.tensor([_inverse_affine(h, w, m) for m in moves.numpy()], dtype=torch.float64)
    columns, rows = torch.arange(w, dtype=torch.float64), torch.arange(h, dtype=torch.float64)
    positions = []
    for factor_x, factor_y, shift in maps.permute(1, 2, 0)[..., None]:
        along = (factor_x * columns).mul_(1024).round_()
        down = (factor_y * rows).add_(shift).mul_(1024).round_().add_(16)
        fixed = down.to(image.device)[:, :, None] + along.to(image.device)[:, None, :]
        positions.append(fixed.mul_(1 / 32).floor_().mul_(1 / 32))  # whole numbers: exact
    x, y = positions
    return _bilinear(image, y, x, repeats_edge=False)


def elastic_transform(
    levels: Tensor, params: tuple[float, float, float], draws: Draws, dtype: torch.dtype
) -> Tensor:
    """Random affine warp, then a smooth displacement field; params (alpha, sigma, jitter) in px.

    draws: "corners" [3, 2] in +-jitter, "dx" and "dy" [H, W] in +-1. The fields are smoothed with
    standard deviation sigma (radius floor(3 sigma + 1/2), half-sample mirrored) and scaled by
    alpha. The image is in float32 as in the reference, the smoothing in `dtype`.
    """
    alpha, sigma, _ = params
    h, w = levels.shape[-2:]
    device = levels.device
    warped = _affine_warp(planes(levels, torch.float32), field(draws, "corners", (3, 2)))
    positions = []
    for key, n, shape in (("dx", w, (1, w)), ("dy", h, (h, 1))):
        shift = field(draws, key, (h, w)).to(device, dtype)
        if sigma > 0:
            # One product per image: a library may sum in another order in another shape.
            shift = torch.stack(
                [smooth_rows(smooth_rows(one, sigma, 3.0).T, sigma, 3.0).T for one in shift]
            )
        shift = shift.mul(alpha).to(torch.float32).to(torch.float64)
        positions.append(shift.add_(torch.arange(n, device=device).view(shape)))
    x, y = positions
    return to_levels(_bilinear(warped, y, x, repeats_edge=True))


@lru_cache(maxsize=32)
def _box_windows(n: int, m: int) -> tuple[Tensor, Tensor]:
    """Pillow's box filter from n to m < n samples: which samples each result averages.

    Returns the membership matrix of zeros and ones, float32 [n, m], and the reciprocal number of
    samples, float64 [m], rounded to the 22 fractional bits of Pillow's fixed point.
    """
    scale = n / m
    centre = (np.arange(m) + 0.5) * scale
    sample = np.arange(n)[:, None]
    inside = (sample >= np.trunc(centre - 0.5 * scale + 0.5)) & (
        sample < np.trunc(centre + 0.5 * scale + 0.5)
    )
    offset = (sample - centre + 0.5) * (1.0 / scale)
    member = inside & (offset > -0.5) & (offset <= 0.5)
    weight = np.rint((1 << 22) / member.sum(0)) / (1 << 22)
    return torch.from_numpy(member.astype(np.float32)), torch.from_numpy(weight)


def _shrink_columns(values: Tensor, m: int) -> Tensor:
    """Box-filters the last dimension of integral float32 values to m samples, 8-bit rounding."""
    member, weight = (t.to(values.device) for t in _box_windows(values.shape[-1], m))
    sums = (values @ member).to(torch.float64)  # small integers: exact in any order
    return sums.mul_(weight).add_(0.5).floor_().to(torch.float32)  # exact but for the floor


@lru_cache(maxsize=32)
def _nearest(n: int, m: int, device: torch.device) -> Tensor:
    """Which of m samples each of n results repeats."""
    return torch.arange(n, dtype=torch.float64).add_(0.5).mul_(m / n).long().to(device)


def pixelate(levels: Tensor, factor: float, draws: Draws, dtype: torch.dtype) -> Tensor:
    """Box-filter resize to floor(side * factor) and back, in the integer arithmetic of Pillow.

    Each pass is rounded to 8 bits: columns first, then rows; rows first where the image is more
    than twice as tall as wide. Enlarging by a box filter repeats the nearest sample.
    """
    h, w = levels.shape[-2:]
    small_h, small_w = int(h * factor), int(w * factor)
    small = levels.contiguous().to(torch.float32)
    if h > 2 * w:
        small = _shrink_columns(small.mT.contiguous(), small_h).mT.contiguous()
        small = _shrink_columns(small, small_w)
    else:
        small = _shrink_columns(small, small_w).mT.contiguous()
        small = _shrink_columns(small, small_h).mT
    small = small.to(torch.uint8, memory_format=torch.contiguous_format)
    rows, columns = (_nearest(n, m, levels.device) for n, m in ((h, small_h), (w, small_w)))
    return small.index_select(-1, columns).index_select(-2, rows)


def jpeg_compression(levels: Tensor, quality: int, draws: Draws, dtype: torch.dtype) -> Tensor:
    """Baseline JPEG of the given quality, by Pillow on the host."""
    return jpeg(levels, quality)
