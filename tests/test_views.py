"""The fast transform of `parts/views.py` against torchvision's, operation by operation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from driftline.parts import views

SHAPES = [(3, 3, 64, 64), (2, 3, 32, 32), (2, 3, 17, 40), (1, 3, 9, 8), (2, 3, 31, 4)]


def reference(x: Tensor, draws: views.Draws, padding: views.Padding = "edge") -> Tensor:
    """The transform as the code writes it: everything on a canvas of twice the size."""
    height, width = x.shape[-2:]
    out = x.clamp(0, 1)
    for name, factor in draws.colour:
        out = out.clamp(1e-8, 1.0) if name == "gamma" else out
        out = getattr(F, f"adjust_{name}")(out, factor)
    out = F.pad(out, [width // 2, height // 2], padding_mode=padding)
    shift, mode = list(draws.shift), InterpolationMode.BILINEAR
    out = F.affine(
        out, draws.angle, shift, draws.scale, [0.0, 0.0], interpolation=mode, fill=[0.0] * 3
    )
    if draws.sigma:
        out = F.gaussian_blur(out, [5, 5], [draws.sigma, draws.sigma])
    out = F.center_crop(out, [height, width])
    out = F.hflip(out) if draws.flip else out
    if draws.noise is None:
        return out.clamp(0, 1)
    return (out + draws.noise.to(out) * views.NOISE_STD).clamp(0, 1)


@pytest.mark.parametrize("padding", ["edge", "reflect"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_torchvision(shape, dtype, padding):
    """`reflect` without blur and noise, as ROID takes it."""
    g = torch.Generator().manual_seed(1)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-6  # torchvision's hue is always float32
    flips = set()
    for _ in range(12):
        x = torch.rand(shape, generator=g, dtype=dtype) * 1.2 - 0.1
        before, draws = x.clone(), views.draw(g, x.shape, blurred=padding == "edge")
        mine = views.apply(x, draws, padding)
        assert mine.dtype == dtype and torch.equal(x, before)
        torch.testing.assert_close(mine, reference(x, draws, padding), rtol=0, atol=tolerance)
        flips.add(draws.flip)
    assert len(flips) == 2


@pytest.mark.parametrize("shape", [(1, 3, 9, 8), (2, 3, 31, 4), (2, 3, 24, 24), (2, 3, 64, 20)])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("padding", ["edge", "reflect"])
def test_a_window_beyond_the_canvas_is_filled_with_zero(shape, sign, padding):
    """Small or narrow images at the ends of the ranges; `sigma` reaches the outermost taps."""
    g = torch.Generator().manual_seed(2)
    x = torch.rand(shape, generator=g) / 2 + 0.5
    shift = (-sign * round(shape[3] / 8), sign * round(shape[2] / 8))
    draws = views.Draws([], sign * 15.0, shift, 0.9, 0.5, False, torch.zeros(shape))
    expected = reference(x, draws, padding)
    beyond = views._grid(x, draws)[1] is not None
    assert beyond == (min(shape[2:]) < 20 or shape[2] > 2 * shape[3])
    torch.testing.assert_close(views.apply(x, draws, padding), expected, rtol=0, atol=5e-6)
    if shape == (2, 3, 31, 4):
        assert expected.min() < 0.1  # zeros have come in
    plain = draws._replace(sigma=0.0, noise=None)
    expected = reference(x, plain, padding)
    torch.testing.assert_close(views.apply(x, plain, padding), expected, rtol=0, atol=5e-6)


def test_hue_at_the_corners_of_the_colour_cube():
    values = torch.tensor([0.0, 0.3, 0.30001, 0.7, 1.0], dtype=torch.float64)
    x = torch.cartesian_prod(values, values, values).T.reshape(1, 3, 5, 25)
    for turn in (-0.06, -0.02, 0.0, 1e-4, 0.06):
        mine = x.clone()
        views.hue(mine, turn)
        torch.testing.assert_close(mine, F.adjust_hue(x, turn), rtol=0, atol=2e-6)


@pytest.mark.parametrize("sigma", [0.001, 0.12, 0.16, 0.3, 0.33, 0.5])
def test_blur_leaves_out_only_what_rounding_loses(sigma):
    x = torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(3))
    taps = views._taps(sigma, x)
    mine = views._blur(views._blur(x, taps, 2), taps, 3)
    expected = F.gaussian_blur(x, [5, 5], [sigma, sigma])[..., 2:-2, 2:-2]
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)
    assert len(taps) == 1 + (sigma > 0.15) + (sigma > 0.31)


def test_images_do_not_depend_on_their_neighbours_and_keep_their_layout():
    """Pieces of the batch are transformed on their own; channels-last goes in and comes out."""
    g = torch.Generator().manual_seed(4)
    x = torch.rand(5, 3, 32, 32, generator=g)
    draws = views.draw(g, x.shape)
    whole = views.apply(x, draws)
    alone = [views.apply(x[i : i + 1], draws._replace(noise=draws.noise[i])) for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=0, atol=1e-6)
    last = views.apply(x.contiguous(memory_format=torch.channels_last), draws)
    assert last.is_contiguous(memory_format=torch.channels_last) and whole.is_contiguous()
    torch.testing.assert_close(last, whole, rtol=0, atol=1e-6)
    small = views.CACHE
    try:
        views.CACHE = 2 * x[0].numel()  # pieces of two, two and one
        assert torch.allclose(views.apply(x, draws), whole, rtol=0, atol=1e-6)
    finally:
        views.CACHE = small
