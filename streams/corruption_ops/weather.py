"""Snow and fog."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from driftline.streams.corruption_ops.common import (
    Array,
    Draws,
    Rng,
    central_zoom,
    field,
    motion,
    planes,
    to_levels,
    unit,
)


def draw_snow(params: Any, h: int, w: int, rng: Rng) -> dict[str, Array]:
    return {"normal": rng.standard_normal((h, w)), "angle": np.asarray(rng.uniform(-135, -45))}


def _multiply_add(values: Tensor, factor: float, rest: Tensor) -> Tensor:
    """values * factor + rest in float32 with a single rounding, the same on every device."""
    exact = torch.tensor(factor, dtype=torch.float32).item()
    return values.to(torch.float64).mul_(exact).add_(rest).to(torch.float32)


def snow(levels: Tensor, params: tuple[float, ...], draws: Draws, dtype: torch.dtype) -> Tensor:
    """Whitened image plus motion-blurred flakes; draws: "normal" [H, W], "angle" [] in degrees.

    params: mean and standard deviation of the noise, its zoom, threshold, radius and sigma of the
    motion blur, share of the unwhitened image. Image in float32 as in the reference, flakes in
    `dtype`.
    """
    mean, deviation, zoom, threshold, radius, sigma, share = params
    noise = field(draws, "normal", (levels.shape[2], levels.shape[3])).to(levels.device, dtype)
    flakes = central_zoom(noise.mul(deviation).add_(mean)[:, None], float(zoom)).mT.contiguous()
    flakes.masked_fill_(flakes < threshold, 0.0)
    angle = field(draws, "angle", ())
    flakes = unit(motion(to_levels(flakes), int(radius), sigma, angle, dtype), dtype)
    image = planes(levels, torch.float32)
    red, green, blue = image.unbind(1)
    grey = _multiply_add(blue, 0.114, _multiply_add(green, 0.587, red * 0.299))
    whitened = torch.maximum(image, grey.mul_(1.5).add_(0.5)[:, None])
    mixed = image.mul_(share).add_(whitened.mul_(1 - share)).to(dtype)
    return to_levels(mixed.add_(flakes).add_(flakes.flip(2, 3)))


def _fog_side(params: tuple[float, float, int], h: int, w: int) -> int:
    """Side of the height map: the preset's, or the next power of two that covers the image."""
    return max(params[2], 1 << (max(h, w) - 1).bit_length())


def draw_fog(params: tuple[float, float, int], h: int, w: int, rng: Rng) -> dict[str, Array]:
    draws = {}
    step, amplitude = _fog_side(params, h, w), 100.0
    side = step
    while step >= 2:
        cells = side // step
        draws[f"step{step}"] = rng.uniform(-amplitude, amplitude, size=(3, cells, cells))
        step //= 2
        amplitude /= params[1]
    return draws


def height_map(
    side: int, decay: float, draws: Draws, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Periodic diamond-square surfaces [B, side, side], each shifted and scaled to [0, 1].

    Each level holds its points densely and is woven with its new points into the next.
    """
    batch = len(field(draws, f"step{side}", (3, 1, 1)))
    corners = torch.zeros((batch, 1, 1), dtype=dtype, device=device)
    step, amplitude = side, 100.0
    while step >= 2:
        cells = side // step
        bump = field(draws, f"step{step}", (3, cells, cells)).to(device, dtype) * amplitude
        down = corners + corners.roll(-1, 1)
        centres = (down + down.roll(-1, 2)).div_(4).add_(bump[:, 0])
        vertical = centres + centres.roll(1, 1)
        across = corners + corners.roll(-1, 2)
        on_rows = vertical.add_(across).div_(4).add_(bump[:, 1])
        horizontal = centres + centres.roll(1, 2)
        on_columns = horizontal.add_(down).div_(4).add_(bump[:, 2])
        woven = corners.new_empty((batch, cells, 2, cells, 2))
        woven[:, :, 0, :, 0] = corners
        woven[:, :, 0, :, 1] = on_rows
        woven[:, :, 1, :, 0] = on_columns
        woven[:, :, 1, :, 1] = centres
        corners = woven.view(batch, 2 * cells, 2 * cells)
        step //= 2
        amplitude /= decay
    low, high = corners.amin((1, 2), keepdim=True), corners.amax((1, 2), keepdim=True)
    return corners.sub_(low).div_(high - low)


def fog(
    levels: Tensor, params: tuple[float, float, int], draws: Draws, dtype: torch.dtype
) -> Tensor:
    """Adds a cloud surface, then restores the image's maximum; params (strength, decay, side).

    draws: "step256", "step128", ..., "step2" (from the side of the map down), each
    [3, side/step, side/step]: cell centres, points on the rows, points on the columns. They are
    uniform in +-amplitude, and the surface is displaced by amplitude * draw, as in the reference.
    """
    strength, decay, _ = params
    h, w = levels.shape[-2:]
    cloud = height_map(_fog_side(params, h, w), decay, draws, dtype, levels.device)
    cloud = cloud[:, :h, :w].mul(strength)
    peak = unit(levels.amax((1, 2, 3), keepdim=True), dtype)[:, 0]
    out = torch.empty_like(levels, memory_format=torch.contiguous_format)
    for channel, result in zip(levels.unbind(1), out.unbind(1), strict=True):
        values = planes(channel, dtype).add_(cloud)
        result.copy_(to_levels(values.mul_(peak).div_(peak + strength)))
    return out
