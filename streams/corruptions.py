"""Common image corruptions (ImageNet-C and CIFAR-10/100-C), for single images and batches.

Source: D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019, and the code of the repository `hendrycks/robustness`.
This is an independent implementation of the operations defined there: fifteen standard and four
extra corruptions, five severities, one parameter table per benchmark ("imagenet" for 224 px,
"cifar" for 32 px). docs/corruptions.md says how close each of them comes to the reference.

Randomness is kept apart from the operation. `draw` makes all random numbers of one image on the
host, from a counter-based generator that depends on (seed, name, severity, index); the operations
of `streams.corruption_ops` are pure functions of images and draws. `corrupt_batch` joins the two
for tensors on any device, `corrupt` for one NumPy image: an image is the same whatever batch it is
in, whatever the visiting order and the number of workers.

Conventions. Images are RGB, sides from 32 to 512 px, 256 grey levels. Floating-point results are
clipped to the range and TRUNCATED to levels, as the benchmarks do; rounding would be a different
benchmark. Lengths in the parameter tables are absolute pixels and are not scaled with the image.
The released ImageNet-C files were stored as JPEG of quality 85: `jpeg_quality=85` repeats that.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from driftline.core.exact import divide_
from driftline.streams.corruption_ops import OPERATIONS
from driftline.streams.corruption_ops.common import Array, Rng, jpeg, keep_freed_memory
from driftline.streams.corruption_ops.frost import FROST_FILES, FROST_NOTE, frost_source

__all__ = [
    "EXTRA",
    "FROST_FILES",
    "FROST_NOTE",
    "PRESETS",
    "STANDARD",
    "VERSION",
    "apply",
    "corrupt",
    "corrupt_batch",
    "draw",
    "frost_source",
    "generator",
    "parameters",
]

#: Bumped whenever any output changes; belongs into the key of every cache of corrupted images.
VERSION: int = 1

STANDARD: tuple[str, ...] = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
EXTRA: tuple[str, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")

PRESETS: tuple[str, ...] = ("imagenet", "cifar")
MIN_SIDE: int = 32
MAX_SIDE: int = 512

Preset = Literal["imagenet", "cifar"]
Precision = Literal["exact", "fast"]
Draws = dict[str, Array]

_DTYPES: dict[str, torch.dtype] = {"exact": torch.float64, "fast": torch.float32}
# Pixels worked on at once: as many as stay in a CPU core's cache, or enough to fill a GPU.
_CHUNK_PIXELS: dict[str, int] = {"cpu": 2**16, "cuda": 2**22}

_L = 244.0  # the reference's elastic_transform uses 244, not 224

# Parameters per severity 1..5; their meaning is given by the function of each corruption.
_PARAMETERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "imagenet": {
        "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
        "shot_noise": (60, 25, 12, 5, 3),
        "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
        "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        "snow": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "frost": ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
        "fog": ((1.5, 2, 256), (2, 2, 256), (2.5, 1.7, 256), (2.5, 1.5, 256), (3, 1.4, 256)),
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "elastic_transform": (
            (_L * 2, _L * 0.7, _L * 0.1),
            (_L * 2, _L * 0.08, _L * 0.2),
            (_L * 0.05, _L * 0.01, _L * 0.02),
            (_L * 0.07, _L * 0.01, _L * 0.02),
            (_L * 0.12, _L * 0.01, _L * 0.02),
        ),
        "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
        "jpeg_compression": (25, 18, 15, 10, 7),
        "speckle_noise": (0.15, 0.2, 0.35, 0.45, 0.6),
        "gaussian_blur": (1, 2, 3, 4, 6),
        "spatter": (
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ),
        "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    },
    "cifar": {
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "shot_noise": (500, 250, 100, 75, 50),
        "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
        "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "snow": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "frost": ((1, 0.2, 5), (1, 0.3, 5), (0.9, 0.4, 5), (0.85, 0.4, 5), (0.75, 0.45, 5)),
        "fog": ((0.2, 3, 32), (0.5, 3, 32), (0.75, 2.5, 32), (1, 2, 32), (1.5, 1.75, 32)),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "elastic_transform": (
            (0.0, 0.0, 32 * 0.08),
            (32 * 0.05, 32 * 0.2, 32 * 0.07),
            (32 * 0.08, 32 * 0.06, 32 * 0.06),
            (32 * 0.1, 32 * 0.04, 32 * 0.05),
            (32 * 0.1, 32 * 0.03, 32 * 0.03),
        ),
        "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
        "jpeg_compression": (80, 65, 58, 50, 40),
        "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),
        "spatter": (
            (0.62, 0.1, 0.7, 0.7, 0.5, False),
            (0.65, 0.1, 0.8, 0.7, 0.5, False),
            (0.65, 0.3, 1, 0.69, 0.5, False),
            (0.65, 0.1, 0.7, 0.69, 0.6, True),
            (0.65, 0.1, 0.5, 0.68, 0.6, True),
        ),
        "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    },
}


# Position = the id that enters the seed: append only, never reorder.
_IDS: dict[str, int] = {name: i for i, name in enumerate(STANDARD + EXTRA)}


def _parameters(name: str, severity: int, preset: str) -> Any:
    """Checked look-up in the parameter table."""
    if name not in _IDS:
        near = difflib.get_close_matches(str(name), _IDS, n=1, cutoff=0.0)
        raise ValueError(
            f"unknown corruption {name!r}; did you mean {near[0]!r}? allowed: {', '.join(_IDS)}"
        )
    if preset not in _PARAMETERS:
        raise ValueError(f"unknown preset {preset!r}; allowed: {', '.join(PRESETS)}")
    if isinstance(severity, bool) or not isinstance(severity, int | np.integer):
        raise ValueError(f"severity must be an integer from 1 to 5, got {severity!r}")
    if not 1 <= severity <= 5:
        raise ValueError(f"severity must be from 1 to 5, got {severity}")
    return _PARAMETERS[preset][name][severity - 1]


def parameters(name: str, preset: Preset) -> tuple[Any, ...]:
    """The parameters of severities 1..5; ValueError for an unknown name or preset."""
    return tuple(_parameters(name, severity, preset) for severity in range(1, 6))


def _check_size(h: int, w: int) -> None:
    if not (MIN_SIDE <= h <= MAX_SIDE and MIN_SIDE <= w <= MAX_SIDE):
        raise ValueError(
            f"image is {h} x {w} px; both sides must be from {MIN_SIDE} to {MAX_SIDE} px"
        )


def _channel_hint(channels: int) -> str:
    hints = {1: "repeat the grey channel three times", 4: "drop the alpha channel"}
    return f"; {hints[channels]} first" if channels in hints else ""


def _check_image(image: Array) -> None:
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image must be a NumPy array uint8 [H, W, 3], got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        hint = _channel_hint(1 if image.ndim == 2 else image.shape[-1] if image.ndim == 3 else 0)
        raise ValueError(
            f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}{hint}"
        )
    _check_size(image.shape[0], image.shape[1])


def _levels(x: Tensor) -> Tensor:
    """Checked batch as uint8 [B, 3, H, W]; floats are rounded to the nearest of 256 levels."""
    if not isinstance(x, Tensor) or not (x.dtype == torch.uint8 or x.is_floating_point()):
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"images must be a uint8 or float tensor [B, 3, H, W], got {given}")
    if x.ndim != 4 or x.shape[1] != 3:
        hint = _channel_hint(x.shape[1] if x.ndim == 4 else 0)
        raise ValueError(f"images must be [B, 3, H, W], got {list(x.shape)}{hint}")
    _check_size(x.shape[2], x.shape[3])
    if x.dtype == torch.uint8:
        return x
    if x.numel() and not ((x >= 0) & (x <= 1)).all():  # NaN compares as false
        raise ValueError(
            "float images must lie in [0, 1] without NaN; undo any normalisation and corrupt first"
        )
    return x.float().mul(255).round_().to(torch.uint8)


def _check_key(seed: int, index: int) -> None:
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0, got seed {seed} and index {index}")


def generator(seed: int, name: str, severity: int, index: int) -> np.random.Generator:
    """The counter-based generator that belongs to one (seed, corruption, severity, image).

    Raises:
        ValueError: unknown name, severity out of range, or a negative seed or index.
    """
    _parameters(name, severity, PRESETS[0])
    _check_key(seed, index)
    key = np.random.SeedSequence([int(seed), _IDS[name], int(severity), int(index)])
    return np.random.Generator(np.random.Philox(key))


def draw(
    name: str,
    severity: int,
    shape: tuple[int, int],
    *,
    preset: Preset,
    rng: Rng,
    frost_dir: str | Path | None = None,
    parameters: Any = None,
) -> dict[str, Array]:
    """All random numbers of one corrupted image.

    Args:
        name: one of `STANDARD` or `EXTRA`.
        severity: 1..5.
        shape: (H, W) of the image in px.
        preset: parameter table, "imagenet" or "cifar".
        rng: Generator or legacy RandomState; the order of the draws equals the reference's.
        frost_dir: as for `corrupt`; the photographs' sizes limit the drawn window of frost.
        parameters: as for `corrupt_batch`.

    Returns:
        Named arrays as described by each corruption; empty for the deterministic ones.

    Raises:
        ValueError: unknown name, preset or severity, size out of range, or an image that does
            not fit into the drawn frost photograph.
        FileNotFoundError: frost photographs are missing from `frost_dir`.
    """
    params = _parameters(name, severity, preset)
    params = params if parameters is None else parameters
    h, w = shape
    _check_size(h, w)
    function = OPERATIONS[name].draw
    if function is None:
        return {}
    if name == "frost":
        return function(params, h, w, rng, frost_dir)
    return function(params, h, w, rng)


def _apply(
    levels: Tensor,
    name: str,
    params: Any,
    draws: Sequence[Draws],
    dtype: torch.dtype,
    frost_dir: str | Path | None,
) -> Tensor:
    """One chunk, uint8 [B, 3, H, W], with the draws of its images; no checks of the arguments."""
    stacked = {
        # a view of the only entry: draws of a single image need not be copied
        key: torch.from_numpy(value[None] if len(draws) == 1 else np.stack([d[key] for d in draws]))
        for key, value in draws[0].items()
    }
    function = OPERATIONS[name].apply
    if name == "frost":
        return function(levels, params, stacked, dtype, frost_dir)
    return function(levels, params, stacked, dtype)


def _planes(image: Array) -> Tensor:
    """[H, W, 3] -> [1, 3, H, W], a copy."""
    return torch.from_numpy(image.copy()).permute(2, 0, 1).contiguous()[None]


def _image(levels: Tensor) -> Array:
    """[1, 3, H, W] -> [H, W, 3], in row-major order."""
    return torch.stack(levels[0].unbind(), dim=-1).numpy()


def apply(
    image: Array,
    name: str,
    severity: int,
    draws: Draws,
    *,
    preset: Preset,
    frost_dir: str | Path | None = None,
    precision: Precision = "exact",
) -> Array:
    """Corrupts one image with given draws; deterministic, the input is left unchanged.

    Args:
        image: uint8 [H, W, 3] RGB.
        name: one of `STANDARD` or `EXTRA`.
        severity: 1..5.
        draws: result of `draw` for the same name, severity, size, preset and frost_dir.
        preset: parameter table, "imagenet" or "cifar".
        frost_dir: as for `corrupt_batch`.
        precision: as for `corrupt_batch`.

    Returns:
        A new array, uint8 [H, W, 3].

    Raises:
        ValueError: unknown name, preset, precision or severity, wrong image dtype, shape or size,
            or draws that are incomplete or of another size.
        FileNotFoundError: frost photographs are missing from `frost_dir`.
    """
    params = _parameters(name, severity, preset)
    _check_image(image)
    dtype = _dtype(precision)
    draws = {key: np.array(value) for key, value in draws.items()}
    return _image(_apply(_planes(image), name, params, [draws], dtype, frost_dir))


def _dtype(precision: str) -> torch.dtype:
    if precision not in _DTYPES:
        raise ValueError(f"unknown precision {precision!r}; allowed: {', '.join(_DTYPES)}")
    return _DTYPES[precision]


def corrupt_batch(
    x: Tensor,
    name: str,
    severity: int,
    indices: Sequence[int] | Tensor,
    *,
    preset: Preset = "imagenet",
    seed: int = 0,
    jpeg_quality: int | None = None,
    frost_dir: str | Path | None = None,
    precision: Precision = "exact",
    chunk: int | None = None,
    parameters: Any = None,
) -> Tensor:
    """A batch under one corruption; image i depends on (seed, name, severity, indices[i]) alone.

    Args:
        x: [B, 3, H, W] RGB on any device, uint8 or float in [0, 1] (rounded to the nearest of the
            256 levels); sides 32..512 px (the benchmarks: 224 and 32).
        name: one of `STANDARD` or `EXTRA`.
        severity: 1..5.
        indices: B non-negative numbers of the images in their data set.
        preset: parameter table, "imagenet" or "cifar".
        seed: non-negative seed of the whole corrupted data set.
        jpeg_quality: if given (1..95), the result is passed through JPEG of this quality; 85
            repeats how the released ImageNet-C files were stored.
        frost_dir: folder with the reference's frost photographs (`FROST_FILES`); None blends a
            synthetic texture instead, see `FROST_NOTE` and `frost_source`.
        precision: "exact" computes in float64 where the reference does; "fast" in float32, which
            moves up to a few per cent of the values by one level (docs/corruptions.md).
        chunk: images worked on at once, which bounds the memory; None chooses by image size and
            device. Changes no image.
        parameters: instead of those of the severity (`streams.severities`), whose draws are used.

    Returns:
        A new tensor like x: levels for uint8, levels / 255 for floats.

    Raises:
        ValueError: any argument out of its range; the message names what is allowed.
        FileNotFoundError: frost photographs are missing from `frost_dir`.
    """
    params = _parameters(name, severity, preset)
    params = params if parameters is None else parameters
    dtype = _dtype(precision)
    levels = _levels(x)
    batch, _, h, w = levels.shape
    numbers = [int(i) for i in indices]
    if len(numbers) != batch:
        raise ValueError(f"indices must number the {batch} images of the batch, got {len(numbers)}")
    if jpeg_quality is not None and not 1 <= jpeg_quality <= 95:
        raise ValueError(f"jpeg_quality must be from 1 to 95 or None, got {jpeg_quality}")
    if chunk is None:
        pixels = _CHUNK_PIXELS.get(x.device.type, _CHUNK_PIXELS["cpu"])
        chunk = max(1, pixels // (h * w))
    elif chunk < 1:
        raise ValueError(f"chunk must be at least 1 image or None, got {chunk}")
    for index in numbers:
        _check_key(seed, index)
    keep_freed_memory()

    def drawn(index: int) -> Draws:
        if OPERATIONS[name].draw is None:
            return {}
        rng = generator(seed, name, severity, index)
        return draw(
            name, severity, (h, w), preset=preset, rng=rng, frost_dir=frost_dir, parameters=params
        )

    out = torch.empty_like(x)
    for start in range(0, batch, chunk):
        rows = slice(start, start + chunk)
        draws = [drawn(index) for index in numbers[rows]]
        result = _apply(levels[rows], name, params, draws, dtype, frost_dir)
        if jpeg_quality is not None:
            result = jpeg(result, jpeg_quality)
        out[rows] = result if x.dtype == torch.uint8 else divide_(result.to(x.dtype), 255)
    return out


def corrupt(
    image: Array,
    name: str,
    severity: int,
    *,
    preset: Preset = "imagenet",
    seed: int = 0,
    index: int = 0,
    jpeg_quality: int | None = None,
    frost_dir: str | Path | None = None,
) -> Array:
    """One image under one corruption, equal to `corrupt_batch` in its exact precision.

    Args:
        image: uint8 [H, W, 3] RGB, sides 32..512 px.
        name, severity, preset, seed, jpeg_quality, frost_dir: as for `corrupt_batch`.
        index: non-negative number of the image in its data set.

    Returns:
        A new array, uint8 [H, W, 3].

    Raises:
        ValueError: any argument out of its range; the message names what is allowed.
        FileNotFoundError: frost photographs are missing from `frost_dir`.
    """
    _check_image(image)
    result = corrupt_batch(
        _planes(image),
        name,
        severity,
        [index],
        preset=preset,
        seed=seed,
        jpeg_quality=jpeg_quality,
        frost_dir=frost_dir,
    )
    return _image(result)
