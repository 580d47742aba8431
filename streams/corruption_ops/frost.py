"""Frost: a window of a frost photograph, or of a synthetic texture, blended into the image."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from driftline.streams.corruption_ops.common import Array, Draws, Rng, field, integers

FROST_NOTE: str = (
    "The reference blends one of five frost photographs of its repository into the image. Without "
    "a frost_dir that holds those files, a procedural ice texture is blended instead; such results "
    "must be reported as 'frost (synthetic texture)' and do not equal the benchmark's frost."
)
FROST_FILES: tuple[str, ...] = (
    "frost1.png",
    "frost2.png",
    "frost3.png",
    "frost4.jpg",
    "frost5.jpg",
)


def frost_source(frost_dir: str | Path | None) -> Literal["photographs", "synthetic texture"]:
    """What `frost` blends in for this `frost_dir`, in the words in which results should say it."""
    return "synthetic texture" if frost_dir is None else "photographs"


def frost_photographs(folder: str) -> tuple[Array, ...]:
    """The five photographs, uint8 [Hf, Wf, 3] RGB, decoded once per process."""
    missing = [name for name in FROST_FILES if not (Path(folder) / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"frost_dir {folder!r} lacks {', '.join(missing)}; it must hold the reference's "
            f"{', '.join(FROST_FILES)} (or pass frost_dir=None for the synthetic texture)"
        )
    stats = [os.stat(Path(folder) / name) for name in FROST_FILES]
    return _decoded(folder, tuple((s.st_size, s.st_ino, s.st_ctime_ns) for s in stats))


@lru_cache(maxsize=4)
def _decoded(folder: str, _: tuple[tuple[int, int, int], ...]) -> tuple[Array, ...]:
    photographs = []
    for name in FROST_FILES:
        with Image.open(Path(folder) / name) as photograph:
            photographs.append(np.array(photograph.convert("RGB")))
    return tuple(photographs)


# Mean RGB, standard deviation (grey levels), needles and their typical length (px) of the five
# synthetic textures: from thin blue-green ice over dense white frost to dark panes with crystals.
TEXTURES: tuple[tuple[tuple[int, int, int], float, int, float], ...] = (
    ((80, 149, 166), 17.0, 500, 14.0),
    ((200, 205, 214), 22.0, 1100, 28.0),
    ((200, 205, 214), 22.0, 900, 34.0),
    ((138, 153, 165), 29.0, 1500, 12.0),
    ((112, 123, 135), 43.0, 1000, 18.0),
)
_TEXTURE_SIDE = 512


@lru_cache(maxsize=5)
def frost_texture(index: int) -> Array:
    """Synthetic frost, uint8 [512, 512, 3], periodic in both directions, from a fixed seed.

    Cloudy ice (noise with a 1/f spectrum) and feathered crystals: needles from random seeds in
    sprays of similar direction, each with side needles at 60 degrees, lit along one flank.
    """
    mean, deviation, needles, length = TEXTURES[index]
    side = _TEXTURE_SIDE
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([20190506, index])))

    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]) * side
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(side, side))) / frequency**1.2
    cloud = np.fft.irfft2(spectrum, s=(side, side))
    cloud /= cloud.std()

    crystal = np.zeros(side * side)
    centre = rng.uniform(0, side, size=(needles, 2))
    heading = rng.uniform(0, 2 * np.pi, size=needles)
    reach = length * rng.lognormal(0.0, 0.5, size=needles)
    light = rng.uniform(0.3, 1.0, size=needles)
    along = np.linspace(0.0, 1.0, 96)

    def stroke(origin: Array, direction: Array, extent: Array, strength: Array) -> None:
        step = np.stack([np.sin(direction), np.cos(direction)], axis=-1)
        for shift, sign in ((0.0, 1.0), (1.5, -0.6)):  # bright flank, then its shadow
            normal = np.stack([step[:, 1], -step[:, 0]], axis=-1) * shift
            points = (origin + normal)[:, None] + step[:, None] * (
                extent[:, None, None] * along[None, :, None]
            )
            cell = np.floor(points).astype(np.intp) % side
            value = sign * (strength * extent / len(along))[:, None] * (1.0 - 0.8 * along)
            np.add.at(crystal, (cell[..., 0] * side + cell[..., 1]).ravel(), value.ravel())

    stroke(centre, heading, reach, light)
    for at in (0.15, 0.3, 0.45, 0.6, 0.75):
        tip = np.stack([np.sin(heading), np.cos(heading)], axis=-1) * (at * reach)[:, None]
        for turn in (-np.pi / 3, np.pi / 3):
            stroke(centre + tip, heading + turn, 0.5 * (1.0 - at) * reach, 0.8 * light)
    field = np.fft.rfft2(crystal.reshape(side, side)) * np.exp(-0.5 * (frequency / 110.0) ** 2)
    field[0, 0] = 0.0
    crystal = np.tanh(np.fft.irfft2(field, s=(side, side)) * 1.2)
    crystal = (crystal - crystal.mean()) / crystal.std()

    shade = 0.75 * cloud + 0.65 * crystal
    shade *= deviation / shade.std()
    return np.clip(np.array(mean) + shade[..., None], 0, 255).astype(np.uint8)


def _frost_photograph(index: int, step: int, frost_dir: str | Path) -> Array:
    """One photograph, shrunk to 1 / step.

    Bilinear scaling by 0.2 without anti-aliasing samples at 5 i + 2, i.e. at pixel centres.
    """
    return frost_photographs(str(frost_dir))[index][step // 2 :: step, step // 2 :: step]


def draw_frost(
    params: tuple[float, float, int], h: int, w: int, rng: Rng, frost_dir: str | Path | None
) -> dict[str, Array]:
    index = int(integers(rng, 0, len(FROST_FILES), (), np.int64))
    if frost_dir is None:
        limits = (_TEXTURE_SIDE, _TEXTURE_SIDE)
    else:
        size = _frost_photograph(index, params[2], frost_dir).shape
        limits = (size[0] - h, size[1] - w)
        if min(limits) < 1:
            raise ValueError(
                f"frost: an image of {h} x {w} does not fit into {FROST_FILES[index]}, which is "
                f"{size[0]} x {size[1]} here; use a smaller image or frost_dir=None"
            )
    top = integers(rng, 0, limits[0], (), np.int64)
    left = integers(rng, 0, limits[1], (), np.int64)
    return {"index": np.asarray(index), "top": np.asarray(top), "left": np.asarray(left)}


def _window(
    index: int, top: int, left: int, step: int, h: int, w: int, frost_dir: str | Path | None
) -> Array:
    """The drawn part of a picture, uint8 [h, w, 3]; the synthetic texture wraps round."""
    if frost_dir is not None:
        return _frost_photograph(index, step, frost_dir)[top : top + h, left : left + w]
    rows = (top + step * np.arange(h)) % _TEXTURE_SIDE
    columns = (left + step * np.arange(w)) % _TEXTURE_SIDE
    return frost_texture(index)[rows[:, None], columns]


def frost(
    levels: Tensor,
    params: tuple[float, float, int],
    draws: Draws,
    dtype: torch.dtype,
    frost_dir: str | Path | None,
) -> Tensor:
    """Weighted sum with a window of a frost picture; params (image weight, frost weight, step).

    draws: "index" (0..4), "top", "left", all []. The picture is shrunk to 1 / step (CIFAR: 5).
    Photographs are cut; the synthetic texture is periodic, so it serves every image size.
    """
    share, ice, step = params
    h, w = levels.shape[-2:]
    places = zip(*(field(draws, key, ()).tolist() for key in ("index", "top", "left")), strict=True)
    windows = np.stack([_window(i, y, x, step, h, w, frost_dir) for i, y, x in places])
    frozen = torch.from_numpy(windows).to(levels.device).permute(0, 3, 1, 2).to(dtype).mul_(ice)
    levels = levels.contiguous(memory_format=torch.channels_last)
    return levels.to(dtype).mul_(share).add_(frozen).clamp_(0, 255).to(torch.uint8)
