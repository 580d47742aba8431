"""The stack of random image transforms of CoTTA, shared by the methods derived from it.

Code: github.com/qinenergy/cotta @ c212a20 (`cifar/my_transforms.py`, after KATANA, arXiv
2109.08191). One draw holds for the whole batch; only the noise differs between pixels. Drawing and
applying are separate, so that random numbers can be consumed without paying for the transform.

ROID and CMF (github.com/mariodoebler/test-time-adaptation @ 8b2ed63) take the stack without blur
and noise (`draw(..., blurred=False)`) and mirror the canvas (`apply(..., padding="reflect")`).

Deviation: image sides come from the batch (the code fixes 32 or 224).

`apply` computes what the code computes, up to rounding, in less time: the colour operations run
before the padding, which repeats pixels and commutes with them; only the pixels that survive the
crop (and those the blur reads) are sampled; the blur is separable; the hue needs no branch and no
division; a few images at a time stay in the cache of a CPU.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NOISE_STD = 0.005  # in units of the [0, 1] image
RADIUS = 2  # of the blur
CACHE = 1 << 18  # values transformed at a time on a CPU
Padding = Literal["edge", "reflect"]  # beyond the image: its edge pixels, or its mirror image
GREY = (0.2989, 0.587, 0.114)
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
    sigma: float  # of the blur, pixels; 0 without
    flip: bool
    noise: Tensor | None  # standard normal [B, 3, H, W], float32


def draw(
    generator: torch.Generator,
    shape: torch.Size,
    noise: torch.Generator | None = None,
    *,
    blurred: bool = True,
) -> Draws:
    """Random numbers for a batch of `shape` [B, 3, H, W], in the order of the reference code.

    Args:
        generator: on the CPU, for the factors.
        shape: of the batch to transform.
        noise: generator of the pixel noise, on any device; None uses `generator`.
        blurred: with blur and noise; without them their numbers are not drawn.
    """

    def uniform(low: float, high: float) -> float:
        number = torch.empty(1, dtype=torch.float32)
        return number.uniform_(low, high, generator=generator).item()

    height, width = (side + 2 * (side // 2) for side in shape[-2:])
    order = torch.randperm(len(COLOUR), generator=generator).tolist()
    colour = [(COLOUR[i][0], uniform(*COLOUR[i][1:])) for i in order]
    angle = uniform(-15, 15)
    right = round(uniform(-width / 16, width / 16))
    down = round(uniform(-height / 16, height / 16))
    scale = uniform(0.9, 1.1)
    sigma = uniform(0.001, 0.5) if blurred else 0.0
    flip = uniform(0, 1) < 0.5
    if not blurred:
        return Draws(colour, angle, (right, down), scale, sigma, flip, None)
    source = generator if noise is None else noise
    pixels = torch.randn(shape, generator=source, device=source.device, dtype=torch.float32)
    return Draws(colour, angle, (right, down), scale, sigma, flip, pixels)


def grey(x: Tensor, factor: float) -> Tensor:
    """`factor` times the grey value of x [n, 3, ...], as [n, 1, ...]."""
    red, green, blue = (factor * part for part in GREY)
    return (x[:, :1] * red).add_(x[:, 1:2], alpha=green).add_(x[:, 2:], alpha=blue)


def hue(x: Tensor, turn: float | Tensor) -> None:
    """Rotate the hue of x [n, 3, ...] in place by less than a sixth of the circle.

    `turn` may be a tensor that broadcasts with [n, ...], for images that turn differently.

    Largest and smallest channel of a pixel keep their values. In between, a channel is linear in
    the hue with slope 6 * (largest - smallest), up or down depending on the order of the other
    two; continued beyond its flat pieces and clamped, the line gives every channel of the result.
    """
    red, green, blue = x.unbind(1)
    high = torch.maximum(red, green).maximum(blue)
    low = torch.minimum(red, green).minimum(blue)
    middle = (red + green).add_(blue).sub_(high).sub_(low)
    step = (high - low).mul_(6 * turn)
    up = torch.stack((green - blue, blue - red, red - green), 1)
    x.mul_(2).sub_(middle[:, None])
    x.sub_(up.sign_().mul_(step[:, None]))
    torch.clamp(x, low[:, None], high[:, None], out=x)


def _colour(x: Tensor, name: str, factor: float) -> None:
    """One colour operation on x [n, 3, H, W] with values in [0, 1], in place."""
    if name == "hue":
        hue(x, factor)
        return
    if name == "gamma":  # zero has no finite slope under a power below one
        x.clamp_(min=1e-8).pow_(factor)
        return
    other = None
    if name == "contrast":
        other = grey(x.mean((2, 3)), 1 - factor)[..., None, None]
    elif name == "saturation":
        other = grey(x, 1 - factor)
    x.mul_(factor)
    if other is not None:
        x.add_(other)
    x.clamp_(0, 1)


def _taps(sigma: float, like: Tensor) -> list[float]:
    """Weights of the blur at distance 0, 1, 2, without those that vanish in rounding."""
    if sigma == 0:
        return [1.0]
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(RADIUS + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    least = torch.finfo(like.dtype).eps / 64
    return [w / total for w in weights if w / total > least]


def _blur(x: Tensor, taps: list[float], dim: int) -> Tensor:
    """Symmetric filter along `dim`, which loses `RADIUS` values on either side."""
    size = x.shape[dim] - 2 * RADIUS
    out = x.narrow(dim, RADIUS, size)
    if len(taps) == 1:
        return out
    out = out * taps[0]
    for i, weight in enumerate(taps[1:], 1):
        for start in (RADIUS - i, RADIUS + i):
            out.add_(x.narrow(dim, start, size), alpha=weight)
    return out


def _line(side: int, device: torch.device) -> Tensor:
    """Rows of the padded canvas that the blur reads for the rows of the crop, from its centre."""
    canvas = side + 2 * (side // 2)
    rows = torch.arange(-RADIUS, side + RADIUS, device=device) + side // 2
    rows = (canvas - 1) - (canvas - 1 - rows.abs()).abs()  # the blur mirrors at the canvas's edge
    return rows - 0.5 * (canvas - 1)


def _grid(x: Tensor, draws: Draws, padding: Padding = "edge") -> tuple[Tensor, Tensor | None]:
    """Where the window (crop plus blur margin) is sampled, and how much of the canvas it sees.

    Returns:
        grid [1, H + 4, W + 4, 2] in the units of `grid_sample`, relative to the unpadded image;
        factors [H + 4, W + 4] for a window that reaches beyond the padded canvas, else None.
    """
    height, width = x.shape[-2:]
    angle = math.radians(draws.angle)
    cos, sin = math.cos(angle) / draws.scale, math.sin(angle) / draws.scale
    right, down = draws.shift
    u, v = _line(width, x.device).to(x), _line(height, x.device).to(x)[:, None]
    places, cover = [], None
    for side, a, b in ((width, cos, sin), (height, -sin, cos)):
        place = a * u + b * v - (a * right + b * down)  # pixels from the centre of the image
        reach = abs(a) * (width / 2 + RADIUS) + abs(b) * (height / 2 + RADIUS)
        edge = side / 2 + side // 2 - 0.5  # outermost pixel of the canvas
        if reach + abs(a * right + b * down) > edge:
            inside = (edge + 1 - place.abs()).clamp(0, 1)
            cover = inside if cover is None else cover * inside
            if padding == "reflect":  # the mirror goes on beyond the canvas, the canvas does not
                place = place.clamp(-edge, edge)
        # From the outer edges of the image, or from the centres of its outer pixels, the mirrors.
        places.append(place * (2 / side if padding == "edge" else 2 / max(side - 1, 1)))
    # The zero fill of the reference multiplies by the coverage that the samples already have.
    return torch.stack(places, -1)[None], None if cover is None else cover * cover


def _apply(
    x: Tensor,
    draws: Draws,
    padding: Padding,
    grid: Tensor,
    cover: Tensor | None,
    out: Tensor,
) -> None:
    image = x.clamp(0, 1).contiguous()
    for name, factor in draws.colour:
        _colour(image, name, factor)
    grid = grid.expand(len(image), -1, -1, -1)
    if padding == "edge":
        image = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    else:
        image = F.grid_sample(image, grid, padding_mode="reflection", align_corners=True)
    if cover is not None:
        image.mul_(cover)
    taps = _taps(draws.sigma, image)
    image = _blur(_blur(image, taps, 2), taps, 3)
    if draws.flip:
        image = image.flip(3)
    out.copy_(image)


def apply(x: Tensor, draws: Draws, padding: Padding = "edge") -> Tensor:
    """Transformed images, float [B, 3, H, W] in [0, 1] and in memory like `x`."""
    out = torch.empty_like(x)
    grid, cover = _grid(x, draws, padding)
    size = x[0].numel()
    step = max(1, CACHE // size) if x.device.type == "cpu" else len(x)
    for start in range(0, len(x), step):
        part = slice(start, start + step)
        _apply(x[part], draws, padding, grid, cover, out[part])
    if draws.noise is not None:
        out.add_(draws.noise.to(out), alpha=NOISE_STD)
    return out.clamp_(0, 1)
