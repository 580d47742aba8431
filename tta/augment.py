"""The stack of random image transforms of CoTTA, shared by the methods derived from it.

Code: github.com/qinenergy/cotta @ c212a20 (`cifar/my_transforms.py`, after KATANA, arXiv
2109.08191). One draw holds for the whole batch; only the noise differs between pixels. Drawing and
applying are separate, so that random numbers can be consumed without paying for the transform.

Deviation: image sides come from the batch (the code fixes 32 or 224).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

NOISE_STD = 0.005  # in units of the [0, 1] image
COLOUR = (  # the position is what the drawn permutation refers to
    ("brightness", 0.6, 1.4),
    ("contrast", 0.7, 1.3),
    ("saturation", 0.5, 1.5),
    ("hue", -0.06, 0.06),
    ("gamma", 0.7, 1.3),
)


class Draws(NamedTuple):
    """Random numbers of one transform of one batch."""

    colour: list[tuple[str, float]]  # operation and factor, in order of application
    angle: float  # degrees
    shift: tuple[int, int]  # pixels to the right and down
    scale: float
    sigma: float  # of the blur, pixels
    flip: bool
    noise: Tensor  # standard normal [B, 3, H, W], float32


def draw(
    generator: torch.Generator, shape: torch.Size, noise: torch.Generator | None = None
) -> Draws:
    """Random numbers for a batch of `shape` [B, 3, H, W], in the order of the reference code.

    Args:
        generator: on the CPU, for the factors.
        shape: of the batch to transform.
        noise: generator of the pixel noise, on any device; None uses `generator`.
    """

    def uniform(low: float, high: float) -> float:
        made = torch.empty(1, dtype=torch.float32)
        return made.uniform_(low, high, generator=generator).item()

    height, width = (side + 2 * (side // 2) for side in shape[-2:])
    order = torch.randperm(len(COLOUR), generator=generator).tolist()
    colour = [(COLOUR[i][0], uniform(*COLOUR[i][1:])) for i in order]
    angle = uniform(-15, 15)
    right = round(uniform(-width / 16, width / 16))
    down = round(uniform(-height / 16, height / 16))
    scale = uniform(0.9, 1.1)
    sigma = uniform(0.001, 0.5)
    flip = uniform(0, 1) < 0.5
    source = generator if noise is None else noise
    pixels = torch.randn(shape, generator=source, device=source.device, dtype=torch.float32)
    return Draws(colour, angle, (right, down), scale, sigma, flip, pixels)


def _colour(x: Tensor, name: str, factor: float) -> Tensor:
    if name == "gamma":  # zero has no finite slope under a power below one
        return F.adjust_gamma(x.clamp(1e-8, 1.0), factor)
    return getattr(F, f"adjust_{name}")(x, factor)


def apply(x: Tensor, draws: Draws) -> Tensor:
    """Transformed images, float [B, 3, H, W] in [0, 1] like `x`."""
    height, width = x.shape[-2:]
    out = x.clamp(0, 1)
    for name, factor in draws.colour:
        out = _colour(out, name, factor)
    out = F.pad(out, [width // 2, height // 2], padding_mode="edge")
    # A given fill, even of zero, is part of the reference arithmetic: it multiplies by the
    # interpolated coverage, which is one only up to rounding.
    out = F.affine(
        out,
        draws.angle,
        list(draws.shift),
        draws.scale,
        [0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
        fill=[0.0] * x.shape[1],
    )
    out = F.gaussian_blur(out, [5, 5], [draws.sigma, draws.sigma])
    out = F.center_crop(out, [height, width])
    if draws.flip:
        out = F.hflip(out)
    return (out + draws.noise.to(out) * NOISE_STD).clamp(0, 1)
