"""Common image corruptions (ImageNet-C and CIFAR-10/100-C), one image at a time, in NumPy.

Source: D. Hendrycks and T. Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", ICLR 2019, and the code of the repository `hendrycks/robustness`.
This is an independent implementation of the operations defined there: fifteen standard and four
extra corruptions, five severities, one parameter table per benchmark ("imagenet" for 224 px,
"cifar" for 32 px).

Randomness is kept apart from the operation. `draw` makes all random numbers of one image and
`apply` is a pure function of the image and those numbers, so that a batched implementation can
replace `apply` and be compared with it number by number. `corrupt` joins the two: the draws of
image `index` depend on (seed, name, severity, index) and on the image's size only, never on batch
size, worker count or visiting order.

Conventions. Images are uint8 [H, W, 3] RGB, sides from 32 to 512 px. Floating-point results are
clipped to the range and TRUNCATED to uint8, as the benchmarks do; rounding would be a different
benchmark. Lengths in the parameter tables are absolute pixels and are not scaled with the image.
The released ImageNet-C files were stored as JPEG of quality 85: `corrupt(..., jpeg_quality=85)`
repeats that step.
"""

from __future__ import annotations

import difflib
import io
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

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

Preset = Literal["imagenet", "cifar"]
Rng = np.random.Generator | np.random.RandomState
Draws = Mapping[str, np.ndarray]
Array = np.ndarray[Any, Any]

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


# --------------------------------------------------------------------------- common arithmetic


def _unit(image: Array, dtype: type = np.float64) -> Array:
    """uint8 levels -> [0, 1]; divided in float64 first, as the reference does."""
    return (image / 255.0).astype(dtype, copy=False)


def _to_uint8(values: Array) -> Array:
    """[0, 1] -> uint8 with clipping and truncation toward zero."""
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)


def _field(draws: Draws, key: str, shape: tuple[int, ...]) -> Array:
    """One entry of `draws`; ValueError if it is missing or made for another image size."""
    if key not in draws:
        raise ValueError(f"draws lack {key!r}; given: {sorted(draws)}")
    value = np.asarray(draws[key])
    if value.shape != shape:
        raise ValueError(f"draws[{key!r}] has shape {value.shape}; this image needs {shape}")
    return value


def _integers(rng: Rng, low: int, high: int, size: tuple[int, ...], dtype: type) -> Array:
    """Uniform integers in [low, high), from either generator interface."""
    if isinstance(rng, np.random.Generator):
        return rng.integers(low, high, size=size, dtype=dtype)
    # The legacy stream depends on the dtype asked for, so draw with its default and convert.
    return np.asarray(rng.randint(low, high, size=size)).astype(dtype)


def _reflect(index: Array, n: int) -> Array:
    """Fold integers into 0..n-1 by half-sample mirroring (... 1 0 | 0 1 ... n-1 | n-1 ...)."""
    index = np.mod(index, 2 * n)
    return np.minimum(index, 2 * n - 1 - index)


def _reflect101(index: Array, n: int) -> Array:
    """Fold integers into 0..n-1 by mirroring without repeating the edge (... 2 1 | 0 1 2 ...)."""
    period = 2 * n - 2
    index = np.mod(index, period)
    return np.minimum(index, period - index)


@lru_cache(maxsize=32)
def _gaussian_weights(sigma: float, radius: int) -> Array:
    weights = np.exp(-0.5 / (sigma * sigma) * np.arange(-radius, radius + 1) ** 2)
    weights /= weights.sum()
    weights.flags.writeable = False
    return weights


@lru_cache(maxsize=16)
def _gaussian_matrix(n: int, sigma: float, truncate: float) -> Array:
    """Smoothing of n samples as an n x n matrix; taps outside are mirrored (half-sample) back."""
    radius = int(truncate * sigma + 0.5)
    matrix = np.zeros((n, n))
    rows = np.arange(n)
    for offset, weight in zip(
        range(-radius, radius + 1), _gaussian_weights(sigma, radius), strict=True
    ):
        matrix[rows, _reflect(rows + offset, n)] += weight
    matrix.flags.writeable = False
    return matrix


def _gaussian_blur_nearest(values: Array, sigma: float) -> Array:
    """Separable Gaussian, float64 [H, W] or [H, W, C], radius floor(4 sigma + 1/2), edge repeated.

    Adds the taps in symmetric pairs from the outermost inwards, the order in which SciPy's
    correlation adds them: in flat regions the last bit decides which integer the truncation
    yields, so the order of the sum is visible in the result.
    """
    radius = int(4.0 * sigma + 0.5)
    if radius == 0:
        return values
    weights = _gaussian_weights(float(sigma), radius)
    for axis in (0, 1):
        n = values.shape[axis]
        index = np.clip(np.arange(-radius, n + radius), 0, n - 1)
        padded = np.take(values, index, axis=axis)
        window: list[slice] = [slice(None)] * values.ndim

        def shifted(
            offset: int,
            padded: Array = padded,
            window: list[slice] = window,
            axis: int = axis,
            n: int = n,
        ) -> Array:
            window[axis] = slice(radius + offset, radius + offset + n)
            return padded[tuple(window)]

        total = shifted(0) * weights[radius]
        pair = np.empty_like(total)
        for k in range(radius, 0, -1):
            np.add(shifted(-k), shifted(k), out=pair)
            pair *= weights[radius - k]
            total += pair
        values = total
    return values


def _jpeg(image: Array, quality: int) -> Array:
    """Baseline JPEG with 4:2:0 chroma, encoded and decoded by Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    buffer.seek(0)
    with Image.open(buffer) as decoded:
        return np.array(decoded.convert("RGB"))


def _rgb_to_hsv(rgb: Array) -> tuple[Array, Array, Array]:
    """Hexcone model; hue in [0, 1), grey pixels get hue 0. float64 [H, W, 3] -> three [H, W]."""
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    grey = chroma == 0
    divisor = np.where(grey, 1.0, chroma)
    hue = np.where(
        blue == value,
        4.0 + (red - green) / divisor,
        np.where(green == value, 2.0 + (blue - red) / divisor, (green - blue) / divisor),
    )
    hue = (hue / 6.0) % 1.0
    hue[grey] = 0.0
    saturation = np.where(grey, 0.0, chroma / np.where(value == 0, 1.0, value))
    return hue, saturation, value


def _hsv_to_rgb(hue: Array, saturation: Array, value: Array) -> Array:
    """Inverse of `_rgb_to_hsv`: three float64 [H, W] -> [H, W, 3]."""
    sector = np.floor(hue * 6.0)
    fraction = hue * 6.0 - sector
    low = value * (1.0 - saturation)
    falling = value * (1.0 - fraction * saturation)
    rising = value * (1.0 - (1.0 - fraction) * saturation)
    sector = sector.astype(np.intp) % 6
    order = (
        (value, rising, low),
        (falling, value, low),
        (low, value, rising),
        (low, falling, value),
        (rising, low, value),
        (value, low, falling),
    )
    rgb = np.empty((*hue.shape, 3))
    for channel in range(3):
        rgb[..., channel] = np.choose(sector, [choice[channel] for choice in order])
    return rgb


# --------------------------------------------------------------------------- noise


def _draw_normals(params: Any, h: int, w: int, rng: Rng) -> dict[str, Array]:
    return {"normal": rng.normal(size=(h, w, 3))}


def _gaussian_noise(image: Array, sigma: float, draws: Draws) -> Array:
    """u + sigma * normal; draws: "normal" [H, W, 3]."""
    return _to_uint8(_unit(image) + sigma * _field(draws, "normal", image.shape))


def _speckle_noise(image: Array, sigma: float, draws: Draws) -> Array:
    """u + u * sigma * normal; draws: "normal" [H, W, 3]."""
    unit = _unit(image)
    return _to_uint8(unit + unit * (sigma * _field(draws, "normal", image.shape)))


def _draw_shot(params: Any, h: int, w: int, rng: Rng) -> dict[str, Array]:
    return {"uniform": rng.uniform(size=(h, w, 3))}


@lru_cache(maxsize=8)
def _poisson_table(photons: int) -> tuple[Array, Array]:
    """Cumulative Poisson distributions of the 256 grey levels, laid end to end.

    Returns (table, start): table[start[v] + k] = v + P(count <= k) for rate photons * v / 255,
    ascending over the whole table, so one binary search serves all levels.
    """
    pieces = []
    for level in range(256):
        rate = photons * (level / 255.0)
        counts = np.arange(int(rate + 10.0 * math.sqrt(rate) + 20.0))
        log_factorial = np.concatenate(([0.0], np.cumsum(np.log(counts[1:]))))
        log_rate = math.log(rate) if rate > 0 else -math.inf
        with np.errstate(invalid="ignore"):
            log_power = np.where(counts == 0, 0.0, counts * log_rate)
        cumulative = np.cumsum(np.exp(log_power - rate - log_factorial))
        cumulative[-1] = 1.0
        pieces.append(level + np.minimum(cumulative, 1.0))
    start = np.concatenate(([0], np.cumsum([len(piece) for piece in pieces])[:-1]))
    table = np.concatenate(pieces)
    table.flags.writeable = False
    start.flags.writeable = False
    return table, start


def _shot_noise(image: Array, photons: int, draws: Draws) -> Array:
    """Poisson(photons * u) / photons; draws: "uniform" [H, W, 3] in [0, 1).

    The counts come from the uniforms through the inverse distribution function. This keeps the
    draws independent of the image (a Poisson generator needs the rate) and `apply` pure.
    """
    uniform = _field(draws, "uniform", image.shape)
    table, start = _poisson_table(int(photons))
    position = np.searchsorted(table, image + uniform, side="right")
    return _to_uint8((position - start[image]) / float(photons))


def _draw_impulse(params: Any, h: int, w: int, rng: Rng) -> dict[str, Array]:
    return {"hit": rng.uniform(size=(h, w, 3)), "salt": rng.uniform(size=(h, w, 3))}


def _impulse_noise(image: Array, amount: float, draws: Draws) -> Array:
    """Each value becomes 0 or 1 with probability amount / 2 each; draws: "hit", "salt" [H, W, 3].

    Pixels AND channels are hit independently.
    """
    hit = _field(draws, "hit", image.shape) <= amount
    salt = _field(draws, "salt", image.shape) <= 0.5
    unit = _unit(image)
    unit[hit & salt] = 1.0
    unit[hit & ~salt] = 0.0
    return _to_uint8(unit)


# --------------------------------------------------------------------------- blur


@lru_cache(maxsize=16)
def _disc_kernel(radius: float, sigma: float) -> Array:
    """Disc of the given radius, normalised, then smoothed by a small Gaussian; float32.

    Where the disc touches the edge of its array (radius 8 and 10) the mirrored border adds about
    1 % to its sum, so the image gets slightly brighter. That belongs to the reference.
    """
    half, reach = (8, 1) if radius <= 8 else (int(radius), 2)
    axis = np.arange(-half, half + 1)
    disc = (axis[:, None] ** 2 + axis[None, :] ** 2 <= radius**2).astype(np.float32)
    disc /= disc.sum()
    weights = _gaussian_weights(float(sigma), reach).astype(np.float32)
    for dimension in (0, 1):
        n = disc.shape[dimension]
        index = _reflect101(np.arange(-reach, n + reach), n)
        padded = np.take(disc, index, axis=dimension)
        disc = sum(
            (
                np.take(padded, np.arange(k, k + n), axis=dimension) * weights[k]
                for k in range(2 * reach + 1)
            ),
            np.zeros_like(disc),
        )
    return disc


@lru_cache(maxsize=8)
def _disc_spectrum(radius: float, sigma: float, shape: tuple[int, int]) -> Array:
    kernel = _disc_kernel(radius, sigma).astype(np.float64)
    return np.fft.rfft2(kernel[::-1, ::-1], s=shape)


def _fft_length(n: int) -> int:
    """Smallest length >= n with prime factors 2, 3 and 5 only."""
    while True:
        rest = n
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return n
        n += 1


def _defocus_blur(image: Array, params: tuple[float, float], draws: Draws) -> Array:
    """Correlation with a disc (radius, sigma of its anti-aliasing), border mirrored without edge.

    Done by FFT in float64: the circular wrap falls outside the part that is kept.
    """
    kernel = _disc_kernel(*params)
    nonzero = np.flatnonzero(kernel.any(axis=1))
    if len(nonzero) <= 5:  # a direct sum of a few taps is faster and has no FFT round-off
        return _to_uint8(_small_correlation(_unit(image), kernel, nonzero))
    h, w, _ = image.shape
    half = kernel.shape[0] // 2
    rows = _reflect101(np.arange(-half, h + half), h)
    columns = _reflect101(np.arange(-half, w + half), w)
    planes = _unit(np.ascontiguousarray(image.transpose(2, 0, 1)))
    padded = planes[:, rows[:, None], columns[None, :]]
    shape = (_fft_length(h + 2 * half), _fft_length(w + 2 * half))
    spectrum = np.fft.rfft2(padded, s=shape, axes=(1, 2))
    spectrum *= _disc_spectrum(*params, shape)
    blurred = np.fft.irfft2(spectrum, s=shape, axes=(1, 2))
    blurred = blurred[:, 2 * half : 2 * half + h, 2 * half : 2 * half + w]
    return _to_uint8(blurred.transpose(1, 2, 0)).copy()


def _small_correlation(values: Array, kernel: Array, used: Array) -> Array:
    """Direct correlation of [H, W, C] with the kernel rows and columns listed in `used`."""
    h, w = values.shape[:2]
    half = kernel.shape[0] // 2
    total = np.zeros_like(values)
    for i in used:
        from_rows = values[_reflect101(np.arange(h) + i - half, h)]
        for j in used:
            if kernel[i, j] != 0:
                columns = _reflect101(np.arange(w) + j - half, w)
                total += float(kernel[i, j]) * from_rows[:, columns]
    return total


def _draw_glass(params: tuple[float, int, int], h: int, w: int, rng: Rng) -> dict[str, Array]:
    _, reach, passes = params
    sites = (h - 2 * reach) * (w - 2 * reach)
    return {"shifts": _integers(rng, -reach, reach, (passes, sites, 2), np.int8)}


def _glass_sources(shifts: Array, reach: int, h: int, w: int) -> Array:
    """Which pixel each pixel ends up with after one pass; flat indices, intp [H * W].

    A pass visits the sites (row and column from size - reach down to reach + 1) in descending
    order and overwrites each with the current value of the pixel shifted by (dy, dx). The value
    read is the original one unless the source has been visited before, i.e. is a site of higher
    index. Sources therefore form chains of ascending index; all chains are followed at once by
    pointer doubling. `shifts` holds (dx, dy) in visiting order.
    """
    rows, columns = h - 2 * reach, w - 2 * reach
    grid = shifts.reshape(rows, columns, 2)[::-1, ::-1].astype(np.intp)
    inner = (slice(reach + 1, h - reach + 1), slice(reach + 1, w - reach + 1))
    source = np.arange(h * w).reshape(h, w)
    source[inner] += grid[..., 1] * w + grid[..., 0]
    site = np.zeros((h, w), dtype=bool)
    site[inner] = True
    pointer, site = source.reshape(-1), site.reshape(-1)
    unresolved = (pointer > np.arange(h * w)) & site[pointer]
    active = np.flatnonzero(unresolved)
    while active.size:
        target = pointer[active]
        continues = unresolved[target]
        following = pointer[target]
        pointer[active] = following
        unresolved[active] = continues
        active = active[continues]
    return pointer


def _glass_blur(image: Array, params: tuple[float, int, int], draws: Draws) -> Array:
    """Gaussian blur, local one-way pixel copies, Gaussian blur; params (sigma, reach, passes).

    draws: "shifts" int [passes, sites, 2] in -reach..reach-1. The reference writes an exchange of
    two pixels, but because of aliasing array views only the visited pixel changes.
    """
    sigma, reach, passes = params
    h, w, _ = image.shape
    shifts = _field(draws, "shifts", (passes, (h - 2 * reach) * (w - 2 * reach), 2))
    pixels = (_gaussian_blur_nearest(_unit(image), sigma) * 255).astype(np.uint8).reshape(-1, 3)
    for one_pass in shifts:
        pixels = pixels[_glass_sources(one_pass, reach, h, w)]
    return _to_uint8(_gaussian_blur_nearest(_unit(pixels.reshape(h, w, 3)), sigma))


def _motion(image: Array, radius: int, sigma: float, angle: float) -> Array:
    """One-sided motion blur of uint8 [H, W] or [H, W, C] as ImageMagick defines it.

    2 * radius + 1 taps with half-Gaussian weights, at offsets along `angle` (degrees) rounded to
    whole pixels; the edge is repeated. The sum is rounded to the 16-bit levels ImageMagick works
    with (257 per 8-bit level) and then truncated to 8 bits; this reproduces its output exactly.
    """
    h, w = image.shape[:2]
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2.0 * sigma * sigma))
    weights /= weights.sum()
    radians = math.radians(angle)
    dx = np.ceil(taps * math.cos(radians) - 0.5).astype(int)
    dy = np.ceil(taps * math.sin(radians) - 0.5).astype(int)
    top, left = -int(dy.min()), -int(dx.min())
    rows = np.clip(np.arange(-top, h + int(dy.max())), 0, h - 1)
    columns = np.clip(np.arange(-left, w + int(dx.max())), 0, w - 1)
    padded = image[rows[:, None], columns[None, :]].astype(np.float64)
    total = np.zeros(image.shape)
    scaled = np.empty(image.shape)
    for i, weight in enumerate(weights):
        y, x = top + dy[i], left + dx[i]
        np.multiply(padded[y : y + h, x : x + w], weight, out=scaled)
        total += scaled
    total *= 257
    total += 0.5
    return (total.astype(np.int32) // 257).astype(np.uint8)


def _draw_motion(params: Any, h: int, w: int, rng: Rng) -> dict[str, Array]:
    return {"angle": np.asarray(rng.uniform(-45, 45))}


def _motion_blur(image: Array, params: tuple[int, float], draws: Draws) -> Array:
    """Motion blur, params (radius, sigma); draws: "angle" [] in degrees, -45..45."""
    return _motion(image, *params, float(_field(draws, "angle", ())))


@lru_cache(maxsize=128)
def _zoom_taps(n: int, factor: float) -> tuple[Array, Array, Array]:
    """Linear interpolation of the central part of n samples, enlarged by `factor`, n kept.

    The central ceil(n / factor) samples are stretched corner-aligned to round(ceil(.) * factor)
    and the central n are kept. Returns (lower index, upper index, upper weight), each [n].
    """
    crop = math.ceil(n / factor)
    enlarged = round(crop * factor)
    position = (np.arange(n) + (enlarged - n) // 2) * ((crop - 1) / (enlarged - 1))
    lower = np.clip(np.floor(position).astype(np.intp), 0, crop - 1)
    upper = np.minimum(lower + 1, crop - 1)
    first = (n - crop) // 2
    return first + lower, first + upper, position - lower


def _central_zoom(values: Array, factor: float) -> Array:
    """Enlarge the centre of [H, W] or [H, W, C] by `factor`, size and dtype kept."""
    for axis in (0, 1):
        lower, upper, weight = _zoom_taps(values.shape[axis], factor)
        shape = [1] * values.ndim
        shape[axis] = -1
        weight = weight.astype(values.dtype).reshape(shape)
        start = np.take(values, lower, axis=axis)
        step = np.take(values, upper, axis=axis)
        step -= start
        step *= weight
        start += step
        values = start
    return values


def _zoom_blur(image: Array, params: tuple[float, float], draws: Draws) -> Array:
    """Mean of the image and of its central zooms; params (end, step) of the list of factors.

    The factors are numpy.arange(1, end, step), whose last member depends on floating-point
    rounding and is part of the definition. The factor 1 is in the list.
    """
    factors = np.arange(1, *params)
    unit = _unit(image, np.float32)
    total = np.zeros_like(unit)
    for factor in factors:
        total += _central_zoom(unit, float(factor))
    return _to_uint8((unit + total) / np.float32(len(factors) + 1))


def _gaussian_blur(image: Array, sigma: float, draws: Draws) -> Array:
    """Gaussian blur with standard deviation `sigma` px, edge repeated."""
    return _to_uint8(_gaussian_blur_nearest(_unit(image), sigma))


# --------------------------------------------------------------------------- weather


def _draw_snow(params: Any, h: int, w: int, rng: Rng) -> dict[str, Array]:
    return {"normal": rng.normal(size=(h, w)), "angle": np.asarray(rng.uniform(-135, -45))}


def _snow(image: Array, params: tuple[float, ...], draws: Draws) -> Array:
    """Whitened image plus motion-blurred flakes; draws: "normal" [H, W], "angle" [] in degrees.

    params: mean and standard deviation of the noise, its zoom, threshold, radius and sigma of the
    motion blur, share of the unwhitened image.
    """
    mean, deviation, zoom, threshold, radius, sigma, share = params
    flakes = mean + deviation * _field(draws, "normal", image.shape[:2])
    flakes = _central_zoom(flakes, float(zoom))
    flakes[flakes < threshold] = 0.0
    angle = float(_field(draws, "angle", ()))
    flakes = _unit(_motion(_to_uint8(flakes), int(radius), sigma, angle))
    unit = _unit(image, np.float32)
    grey = unit @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    whitened = np.maximum(unit, (grey * np.float32(1.5) + np.float32(0.5))[..., None])
    mixed = np.float32(share) * unit + np.float32(1 - share) * whitened
    return _to_uint8(mixed + flakes[..., None] + flakes[::-1, ::-1, None])


def frost_source(frost_dir: str | Path | None) -> Literal["photographs", "synthetic texture"]:
    """What `frost` blends in for this `frost_dir`, in the words in which results should say it."""
    return "synthetic texture" if frost_dir is None else "photographs"


@lru_cache(maxsize=4)
def _frost_photographs(folder: str) -> tuple[Array, ...]:
    """The five photographs, uint8 [Hf, Wf, 3] RGB, decoded once per process."""
    missing = [name for name in FROST_FILES if not (Path(folder) / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"frost_dir {folder!r} lacks {', '.join(missing)}; it must hold the reference's "
            f"{', '.join(FROST_FILES)} (or pass frost_dir=None for the synthetic texture)"
        )
    photographs = []
    for name in FROST_FILES:
        with Image.open(Path(folder) / name) as photograph:
            photographs.append(np.array(photograph.convert("RGB")))
    return tuple(photographs)


# Mean RGB, standard deviation (grey levels), needles and their typical length (px) of the five
# synthetic textures: from thin blue-green ice over dense white frost to dark panes with crystals.
_TEXTURES: tuple[tuple[tuple[int, int, int], float, int, float], ...] = (
    ((80, 149, 166), 17.0, 500, 14.0),
    ((200, 205, 214), 22.0, 1100, 28.0),
    ((200, 205, 214), 22.0, 900, 34.0),
    ((138, 153, 165), 29.0, 1500, 12.0),
    ((112, 123, 135), 43.0, 1000, 18.0),
)
_TEXTURE_SIDE = 512


@lru_cache(maxsize=5)
def _frost_texture(index: int) -> Array:
    """Synthetic frost, uint8 [512, 512, 3], periodic in both directions, from a fixed seed.

    Cloudy ice (noise with a 1/f spectrum) and feathered crystals: needles from random seeds in
    sprays of similar direction, each with side needles at 60 degrees, lit along one flank.
    """
    mean, deviation, needles, length = _TEXTURES[index]
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
    return _frost_photographs(str(frost_dir))[index][step // 2 :: step, step // 2 :: step]


def _draw_frost(
    params: tuple[float, float, int], h: int, w: int, rng: Rng, frost_dir: str | Path | None
) -> dict[str, Array]:
    index = int(_integers(rng, 0, len(FROST_FILES), (), np.int64))
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
    top = _integers(rng, 0, limits[0], (), np.int64)
    left = _integers(rng, 0, limits[1], (), np.int64)
    return {"index": np.asarray(index), "top": np.asarray(top), "left": np.asarray(left)}


def _frost(
    image: Array,
    params: tuple[float, float, int],
    draws: Draws,
    frost_dir: str | Path | None,
) -> Array:
    """Weighted sum with a window of a frost picture; params (image weight, frost weight, step).

    draws: "index" (0..4), "top", "left", all []. The picture is shrunk to 1 / step (CIFAR: 5).
    Photographs are cut; the synthetic texture is periodic and wraps round, so it serves every
    image size.
    """
    share, ice, step = params
    h, w, _ = image.shape
    index, top, left = (int(_field(draws, key, ())) for key in ("index", "top", "left"))
    if frost_dir is None:
        rows = (top + step * np.arange(h)) % _TEXTURE_SIDE
        columns = (left + step * np.arange(w)) % _TEXTURE_SIDE
        window = _frost_texture(index)[rows[:, None], columns[None, :]]
    else:
        window = _frost_photograph(index, step, frost_dir)[top : top + h, left : left + w]
    return np.clip(share * image + ice * window, 0, 255).astype(np.uint8)


def _fog_side(params: tuple[float, float, int], h: int, w: int) -> int:
    """Side of the height map: the preset's, or the next power of two that covers the image."""
    return max(params[2], 1 << (max(h, w) - 1).bit_length())


def _draw_fog(params: tuple[float, float, int], h: int, w: int, rng: Rng) -> dict[str, Array]:
    draws = {}
    step, amplitude = _fog_side(params, h, w), 100.0
    side = step
    while step >= 2:
        cells = side // step
        draws[f"step{step}"] = rng.uniform(-amplitude, amplitude, size=(3, cells, cells))
        step //= 2
        amplitude /= params[1]
    return draws


def _height_map(side: int, decay: float, draws: Draws) -> Array:
    """Periodic diamond-square surface, float64 [side, side], shifted and scaled to [0, 1]."""
    surface = np.zeros((side, side))
    step, amplitude = side, 100.0
    while step >= 2:
        half, cells = step // 2, side // step
        bump = amplitude * _field(draws, f"step{step}", (3, cells, cells))
        corners = surface[::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=0)
        centres = (pairs + np.roll(pairs, -1, axis=1)) / 4 + bump[0]
        surface[half::step, half::step] = centres
        vertical = centres + np.roll(centres, 1, axis=0)
        horizontal = corners + np.roll(corners, -1, axis=1)
        surface[::step, half::step] = (vertical + horizontal) / 4 + bump[1]
        horizontal = centres + np.roll(centres, 1, axis=1)
        vertical = corners + np.roll(corners, -1, axis=0)
        surface[half::step, ::step] = (horizontal + vertical) / 4 + bump[2]
        step = half
        amplitude /= decay
    surface -= surface.min()
    return surface / surface.max()


def _fog(image: Array, params: tuple[float, float, int], draws: Draws) -> Array:
    """Adds a cloud surface, then restores the image's maximum; params (strength, decay, side).

    draws: "step256", "step128", ..., "step2" (from the side of the map down), each
    [3, side/step, side/step]: cell centres, points on the rows, points on the columns. They are
    uniform in +-amplitude, and the surface is displaced by amplitude * draw, as in the reference.
    """
    strength, decay, _ = params
    h, w, _ = image.shape
    cloud = _height_map(_fog_side(params, h, w), decay, draws)[:h, :w, None]
    unit = _unit(image)
    peak = unit.max()
    return _to_uint8((unit + strength * cloud) * peak / (peak + strength))


# --------------------------------------------------------------------------- digital


def _brightness(image: Array, shift: float, draws: Draws) -> Array:
    """Adds `shift` to the HSV value."""
    hue, saturation, value = _rgb_to_hsv(_unit(image))
    return _to_uint8(_hsv_to_rgb(hue, saturation, np.clip(value + shift, 0, 1)))


def _saturate(image: Array, params: tuple[float, float], draws: Draws) -> Array:
    """HSV saturation times params[0] plus params[1]; grey pixels turn reddish if params[1] > 0."""
    hue, saturation, value = _rgb_to_hsv(_unit(image))
    saturation = np.clip(saturation * params[0] + params[1], 0, 1)
    return _to_uint8(_hsv_to_rgb(hue, saturation, value))


def _contrast(image: Array, factor: float, draws: Draws) -> Array:
    """Shrinks the deviation from each channel's spatial mean by `factor`."""
    unit = _unit(image)
    mean = unit.mean(axis=(0, 1), keepdims=True)
    return _to_uint8((unit - mean) * factor + mean)


def _draw_elastic(params: tuple[float, float, float], h: int, w: int, rng: Rng) -> dict[str, Array]:
    _, _, jitter = params
    return {
        "corners": rng.uniform(-jitter, jitter, size=(3, 2)),
        "dx": rng.uniform(-1, 1, size=(h, w)),
        "dy": rng.uniform(-1, 1, size=(h, w)),
    }


def _bilinear(
    pixels: Array, rows: tuple[Array, Array], columns: tuple[Array, Array], fy: Array, fx: Array
) -> Array:
    """Blend of the four neighbours; pixels [H, W, 3], indices and fractions [H, W]."""
    width = pixels.shape[1]
    flat = pixels.reshape(-1, pixels.shape[2])
    total = flat[rows[0] * width + columns[0]] * ((1 - fy) * (1 - fx))[..., None]
    total += flat[rows[0] * width + columns[1]] * ((1 - fy) * fx)[..., None]
    total += flat[rows[1] * width + columns[0]] * (fy * (1 - fx))[..., None]
    total += flat[rows[1] * width + columns[1]] * (fy * fx)[..., None]
    return total


def _affine_warp(unit: Array, moves: Array) -> Array:
    """Warps float32 [H, W, 3] by the affine map that moves three points round the centre.

    As in OpenCV 4, positions are fixed-point numbers and the sampling fraction is a multiple of
    1/32 pixel; border mirrored without edge.
    """
    h, w = unit.shape[:2]
    centre = np.array([h // 2, w // 2], dtype=np.float32)
    reach = np.float32(min(h, w) // 3)
    old = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]], dtype=np.float32)
    new = (old + moves.astype(np.float32)).astype(np.float64)
    # output position -> input position: solve for the forward map, then invert it
    design = np.concatenate([old.astype(np.float64), np.ones((3, 1))], axis=1)
    forward = np.linalg.solve(design, new).T
    (a, b, tx), (c, d, ty) = forward
    determinant = a * d - b * c
    scale = 1.0 / determinant if determinant != 0 else 0.0
    a, b, c, d = d * scale, -b * scale, -c * scale, a * scale
    tx, ty = -(a * tx + b * ty), -(c * tx + d * ty)

    columns, rows = np.arange(w), np.arange(h)
    x = np.rint((b * rows + tx) * 1024)[:, None] + np.rint(a * columns * 1024)[None, :] + 16
    y = np.rint((d * rows + ty) * 1024)[:, None] + np.rint(c * columns * 1024)[None, :] + 16
    x, y = x.astype(np.int64) >> 5, y.astype(np.int64) >> 5
    fx, fy = (x & 31).astype(np.float32) / 32, (y & 31).astype(np.float32) / 32
    x, y = x >> 5, y >> 5
    return _bilinear(
        unit,
        (_reflect101(y, h), _reflect101(y + 1, h)),
        (_reflect101(x, w), _reflect101(x + 1, w)),
        fy,
        fx,
    )


def _elastic_transform(image: Array, params: tuple[float, float, float], draws: Draws) -> Array:
    """Random affine warp, then a smooth displacement field; params (alpha, sigma, jitter) in px.

    draws: "corners" [3, 2] in +-jitter, "dx" and "dy" [H, W] in +-1. The fields are smoothed with
    standard deviation sigma (radius floor(3 sigma + 1/2), half-sample mirrored) and scaled by
    alpha.
    """
    alpha, sigma, _ = params
    h, w, _ = image.shape
    warped = _affine_warp(_unit(image, np.float32), _field(draws, "corners", (3, 2)))
    shifts = []
    for key in ("dx", "dy"):
        field = _field(draws, key, (h, w))
        if sigma > 0:
            field = _gaussian_matrix(h, sigma, 3.0) @ field @ _gaussian_matrix(w, sigma, 3.0).T
        shifts.append((field * alpha).astype(np.float32))
    x = np.arange(w)[None, :] + shifts[0]
    y = np.arange(h)[:, None] + shifts[1]
    left, top = np.floor(x), np.floor(y)
    fx, fy = (x - left).astype(np.float32), (y - top).astype(np.float32)
    left, top = left.astype(np.intp), top.astype(np.intp)
    return _to_uint8(
        _bilinear(
            warped,
            (_reflect(top, h), _reflect(top + 1, h)),
            (_reflect(left, w), _reflect(left + 1, w)),
            fy,
            fx,
        )
    )


def _pixelate(image: Array, factor: float, draws: Draws) -> Array:
    """Box-filter resize to floor(side * factor) and back."""
    h, w, _ = image.shape
    small = Image.fromarray(image).resize((int(w * factor), int(h * factor)), Image.Resampling.BOX)
    return np.array(small.resize((w, h), Image.Resampling.BOX))


def _jpeg_compression(image: Array, quality: int, draws: Draws) -> Array:
    """Baseline JPEG of the given quality."""
    return _jpeg(image, quality)


def _draw_spatter(params: Any, h: int, w: int, rng: Rng) -> dict[str, Array]:
    return {"normal": rng.normal(size=(h, w))}


def _window_sum(values: Array) -> Array:
    """Sum over 3 x 3 neighbourhoods, border mirrored without edge; [H, W]."""
    padded = np.pad(values, 1, mode="reflect")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def _canny(grey: Array, low: int, high: int) -> Array:
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


def _edge_distance(edges: Array, cap: float) -> Array:
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
    distance = _edge_distance(_canny(level, 50, 150), 20.0)
    smooth = (_window_sum(distance.astype(np.float64)) * (1.0 / 9.0)).astype(np.float32)
    relief = np.pad(_equalise(smooth.astype(np.uint8)).astype(np.int64), 1, mode="reflect")
    emboss = np.zeros(level.shape, dtype=np.int64)
    for (dy, dx), weight in np.ndenumerate(np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])):
        emboss += weight * relief[dy : dy + level.shape[0], dx : dx + level.shape[1]]
    emboss = np.clip(emboss, 0, 255)
    mean = (_window_sum(emboss) + 4) // 9  # rounded, as an 8-bit filter
    return level.astype(np.float32) * mean.astype(np.float32)


def _spatter(image: Array, params: tuple[Any, ...], draws: Draws) -> Array:
    """Drops of water or mud; draws: "normal" [H, W].

    params: mean and standard deviation of the noise, its smoothing, threshold, strength (water)
    or smoothing (mud), mud or not. If no drop is formed the image is returned unchanged; the
    reference divides by zero there.
    """
    mean, deviation, smoothing, threshold, strength, mud = params
    noise = mean + deviation * _field(draws, "normal", image.shape[:2])
    liquid = _gaussian_blur_nearest(noise, smoothing)
    liquid = np.where(liquid < threshold, 0.0, liquid)
    unit = _unit(image, np.float32)
    if mud:
        mask = _gaussian_blur_nearest((liquid > threshold).astype(np.float64), strength)
        mask = np.where(mask < 0.8, 0.0, mask).astype(np.float32)[..., None]
        colour = np.array([63, 42, 20], dtype=np.float32) / np.float32(255)
        return _to_uint8(unit * (1 - mask) + mask * colour)
    mask = _water_mask(liquid)
    peak = mask.max()
    if peak == 0:
        return image.copy()
    mask = (mask / peak * np.float32(strength))[..., None]
    colour = np.array([175, 238, 238], dtype=np.float32) / np.float32(255)
    return _to_uint8(unit + mask * colour)


# --------------------------------------------------------------------------- interface


class _Corruption(NamedTuple):
    apply: Callable[..., Array]
    draw: Callable[..., dict[str, Array]] | None


_CORRUPTIONS: dict[str, _Corruption] = {
    "gaussian_noise": _Corruption(_gaussian_noise, _draw_normals),
    "shot_noise": _Corruption(_shot_noise, _draw_shot),
    "impulse_noise": _Corruption(_impulse_noise, _draw_impulse),
    "defocus_blur": _Corruption(_defocus_blur, None),
    "glass_blur": _Corruption(_glass_blur, _draw_glass),
    "motion_blur": _Corruption(_motion_blur, _draw_motion),
    "zoom_blur": _Corruption(_zoom_blur, None),
    "snow": _Corruption(_snow, _draw_snow),
    "frost": _Corruption(_frost, _draw_frost),
    "fog": _Corruption(_fog, _draw_fog),
    "brightness": _Corruption(_brightness, None),
    "contrast": _Corruption(_contrast, None),
    "elastic_transform": _Corruption(_elastic_transform, _draw_elastic),
    "pixelate": _Corruption(_pixelate, None),
    "jpeg_compression": _Corruption(_jpeg_compression, None),
    "speckle_noise": _Corruption(_speckle_noise, _draw_normals),
    "gaussian_blur": _Corruption(_gaussian_blur, None),
    "spatter": _Corruption(_spatter, _draw_spatter),
    "saturate": _Corruption(_saturate, None),
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


def _check_size(h: int, w: int) -> None:
    if not (MIN_SIDE <= h <= MAX_SIDE and MIN_SIDE <= w <= MAX_SIDE):
        raise ValueError(
            f"image is {h} x {w} px; both sides must be from {MIN_SIDE} to {MAX_SIDE} px"
        )


def _check_image(image: Array) -> None:
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image must be a NumPy array uint8 [H, W, 3], got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    _check_size(image.shape[0], image.shape[1])


def draw(
    name: str,
    severity: int,
    shape: tuple[int, int],
    *,
    preset: Preset,
    rng: Rng,
    frost_dir: str | Path | None = None,
) -> dict[str, Array]:
    """All random numbers of one corrupted image.

    Args:
        name: one of `STANDARD` or `EXTRA`.
        severity: 1..5.
        shape: (H, W) of the image in px.
        preset: parameter table, "imagenet" or "cifar".
        rng: Generator or legacy RandomState; the order of the draws equals the reference's.
        frost_dir: as for `corrupt`; the photographs' sizes limit the drawn window of frost.

    Returns:
        Named arrays as described by each corruption; empty for the deterministic ones.

    Raises:
        ValueError: unknown name, preset or severity, size out of range, or an image that does
            not fit into the drawn frost photograph.
        FileNotFoundError: frost photographs are missing from `frost_dir`.
    """
    params = _parameters(name, severity, preset)
    h, w = shape
    _check_size(h, w)
    function = _CORRUPTIONS[name].draw
    if function is None:
        return {}
    if name == "frost":
        return function(params, h, w, rng, frost_dir)
    return function(params, h, w, rng)


def apply(
    image: Array,
    name: str,
    severity: int,
    draws: Draws,
    *,
    preset: Preset,
    frost_dir: str | Path | None = None,
) -> Array:
    """Corrupts one image with given draws; deterministic, the input is left unchanged.

    Args:
        image: uint8 [H, W, 3] RGB.
        name: one of `STANDARD` or `EXTRA`.
        severity: 1..5.
        draws: result of `draw` for the same name, severity, size, preset and frost_dir.
        preset: parameter table, "imagenet" or "cifar".
        frost_dir: as for `corrupt`.

    Returns:
        A new array, uint8 [H, W, 3].

    Raises:
        ValueError: unknown name, preset or severity, wrong image dtype, shape or size, or draws
            that are incomplete or of another size.
        FileNotFoundError: frost photographs are missing from `frost_dir`.
    """
    params = _parameters(name, severity, preset)
    _check_image(image)
    image = np.ascontiguousarray(image)  # one memory order: sums and layout of the result
    function = _CORRUPTIONS[name].apply
    if name == "frost":
        return function(image, params, draws, frost_dir)
    return function(image, params, draws)


def generator(seed: int, name: str, severity: int, index: int) -> np.random.Generator:
    """The counter-based generator that belongs to one (seed, corruption, severity, image).

    Raises:
        ValueError: unknown name, severity out of range, or a negative seed or index.
    """
    _parameters(name, severity, PRESETS[0])
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must be >= 0, got seed {seed} and index {index}")
    key = np.random.SeedSequence([int(seed), _IDS[name], int(severity), int(index)])
    return np.random.Generator(np.random.Philox(key))


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
    """One image under one corruption, reproducible from (seed, name, severity, index) alone.

    Args:
        image: uint8 [H, W, 3] RGB, sides 32..512 px (the benchmarks: 224 and 32).
        name: one of `STANDARD` or `EXTRA`.
        severity: 1..5.
        preset: parameter table, "imagenet" or "cifar".
        seed: non-negative seed of the whole corrupted data set.
        index: non-negative number of the image in its data set.
        jpeg_quality: if given (1..95), the result is passed through JPEG of this quality; 85
            repeats how the released ImageNet-C files were stored.
        frost_dir: folder with the reference's frost photographs (`FROST_FILES`); None blends a
            synthetic texture instead, see `FROST_NOTE` and `frost_source`.

    Returns:
        A new array, uint8 [H, W, 3].

    Raises:
        ValueError: any argument out of its range; the message names what is allowed.
        FileNotFoundError: frost photographs are missing from `frost_dir`.
    """
    _check_image(image)
    if jpeg_quality is not None and not 1 <= jpeg_quality <= 95:
        raise ValueError(f"jpeg_quality must be from 1 to 95 or None, got {jpeg_quality}")
    rng = generator(seed, name, severity, index)
    size = (image.shape[0], image.shape[1])
    draws = draw(name, severity, size, preset=preset, rng=rng, frost_dir=frost_dir)
    result = apply(image, name, severity, draws, preset=preset, frost_dir=frost_dir)
    return result if jpeg_quality is None else _jpeg(result, jpeg_quality)
