"""The corruptions one image at a time, step by step as the benchmark documents them.

A yardstick for speed (`benchmarks/bench_corruptions.py`) and a second opinion on the results: plain
NumPy and SciPy, Python loops where the definition is a loop, no reuse between images. Images are
uint8 [H, W, 3]; randomness comes from a legacy `numpy.random.RandomState`, in the benchmark's order
of draws, except that impulse noise takes uniforms as scikit-image does. Spatter is left out.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage, signal

Array = np.ndarray[Any, Any]
Rng = np.random.RandomState


def quantise(values: Array) -> Array:
    """[0, 1] -> uint8, truncated."""
    return (np.clip(values, 0, 1) * 255).astype(np.uint8)


def smooth(values: Array, sigma: float) -> Array:
    """Gaussian filter over rows and columns with repeated edges."""
    widths = (sigma, sigma, 0)[: values.ndim]
    return ndimage.gaussian_filter(values, widths, mode="nearest")


# ------------------------------------------------------------------ noise


def gaussian_noise(image: Array, sigma: float, rng: Rng) -> Array:
    x = image / 255.0
    return quantise(x + rng.normal(size=x.shape, scale=sigma))


def speckle_noise(image: Array, sigma: float, rng: Rng) -> Array:
    x = image / 255.0
    return quantise(x + x * rng.normal(size=x.shape, scale=sigma))


def shot_noise(image: Array, photons: float, rng: Rng) -> Array:
    return quantise(rng.poisson(image / 255.0 * photons) / float(photons))


def impulse_noise(image: Array, amount: float, rng: Rng) -> Array:
    x = image / 255.0
    hit = rng.uniform(size=x.shape) <= amount
    salt = rng.uniform(size=x.shape) <= 0.5
    x[hit & salt] = 1
    x[hit & ~salt] = 0
    return quantise(x)


# ------------------------------------------------------------------ blur


def disc(radius: float, sigma: float) -> Array:
    """Disc smoothed by a 3 x 3 (small radius) or 5 x 5 Gaussian, float32."""
    half, reach = (8, 1) if radius <= 8 else (int(radius), 2)
    x, y = np.meshgrid(np.arange(-half, half + 1), np.arange(-half, half + 1))
    kernel = (x**2 + y**2 <= radius**2).astype(np.float32)
    kernel /= kernel.sum()
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)
    for axis in (0, 1):
        kernel = ndimage.correlate1d(kernel, taps, axis=axis, mode="mirror")
    return kernel


def defocus_blur(image: Array, params: tuple[float, float], rng: Rng) -> Array:
    kernel = disc(*params).astype(np.float64)
    half = len(kernel) // 2
    padded = np.pad(image / 255.0, ((half, half), (half, half), (0, 0)), mode="reflect")
    channels = [signal.fftconvolve(padded[..., c], kernel, mode="valid") for c in range(3)]
    return quantise(np.stack(channels, axis=-1))


def glass_blur(image: Array, params: tuple[float, int, int], rng: Rng) -> Array:
    sigma, reach, passes = params
    pixels = (smooth(image / 255.0, sigma) * 255).astype(np.uint8)
    h, w = pixels.shape[:2]
    for _ in range(passes):
        for row in range(h - reach, reach, -1):
            for column in range(w - reach, reach, -1):
                dx, dy = rng.randint(-reach, reach, size=(2,))
                pixels[row, column] = pixels[row + dy, column + dx]
    return quantise(smooth(pixels / 255.0, sigma))


def motion(image: Array, radius: int, sigma: float, angle: float) -> Array:
    """One-sided motion blur of uint8 [H, W] or [H, W, C], 16-bit levels, truncated to 8 bits."""
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2.0 * sigma**2))
    weights /= weights.sum()
    h, w = image.shape[:2]
    total = np.zeros(image.shape)
    for tap, weight in zip(taps, weights, strict=True):
        dx = math.ceil(tap * math.cos(math.radians(angle)) - 0.5)
        dy = math.ceil(tap * math.sin(math.radians(angle)) - 0.5)
        rows = np.clip(np.arange(h) + dy, 0, h - 1)
        columns = np.clip(np.arange(w) + dx, 0, w - 1)
        total += weight * image[rows][:, columns]
    return (np.floor(total * 257 + 0.5) // 257).astype(np.uint8)


def motion_blur(image: Array, params: tuple[int, float], rng: Rng) -> Array:
    return motion(image, *params, rng.uniform(-45, 45))


def zoomed(values: Array, factor: float) -> Array:
    """Centre of [H, W] or [H, W, C] enlarged by spline interpolation of order 1."""
    sides = values.shape[:2]
    crops = [math.ceil(side / factor) for side in sides]
    tops = [(side - crop) // 2 for side, crop in zip(sides, crops, strict=True)]
    inside = values[tops[0] : tops[0] + crops[0], tops[1] : tops[1] + crops[1]]
    large = ndimage.zoom(inside, (factor, factor, 1)[: values.ndim], order=1)
    trims = [(large.shape[d] - sides[d]) // 2 for d in (0, 1)]
    return large[trims[0] : trims[0] + sides[0], trims[1] : trims[1] + sides[1]]


def zoom_blur(image: Array, params: tuple[float, float], rng: Rng) -> Array:
    x = (image / 255.0).astype(np.float32)
    factors = np.arange(1, *params)
    total = np.zeros_like(x)
    for factor in factors:
        total += zoomed(x, float(factor))
    return quantise((x + total) / (len(factors) + 1))


def gaussian_blur(image: Array, sigma: float, rng: Rng) -> Array:
    return quantise(smooth(image / 255.0, sigma))


# ------------------------------------------------------------------ weather


def snow(image: Array, params: tuple[float, ...], rng: Rng) -> Array:
    mean, deviation, zoom, threshold, radius, sigma, share = params
    flakes = zoomed(rng.normal(size=image.shape[:2], loc=mean, scale=deviation), zoom).copy()
    flakes[flakes < threshold] = 0
    flakes = motion(quantise(flakes), int(radius), sigma, rng.uniform(-135, -45)) / 255.0
    x = (image / 255.0).astype(np.float32)
    grey = x[..., 0] * 0.299 + x[..., 1] * 0.587 + x[..., 2] * 0.114
    x = share * x + (1 - share) * np.maximum(x, (grey * 1.5 + 0.5)[..., None])
    return quantise(x + flakes[..., None] + np.rot90(flakes, k=2)[..., None])


def frost(image: Array, params: tuple[float, float, int], rng: Rng, files: list[Path]) -> Array:
    share, ice, step = params
    with Image.open(files[rng.randint(len(files))]) as photograph:
        picture = np.array(photograph.convert("RGB"))[step // 2 :: step, step // 2 :: step]
    h, w = image.shape[:2]
    top = rng.randint(0, picture.shape[0] - h)
    left = rng.randint(0, picture.shape[1] - w)
    window = picture[top : top + h, left : left + w]
    return np.clip(share * image + ice * window, 0, 255).astype(np.uint8)


def plasma(side: int, decay: float, rng: Rng) -> Array:
    """Periodic diamond-square surface in [0, 1]."""
    surface = np.zeros((side, side))
    step, amplitude = side, 100.0

    def displaced(total: Array) -> Array:
        return total / 4 + amplitude * rng.uniform(-amplitude, amplitude, total.shape)

    while step >= 2:
        half = step // 2
        corners = surface[::step, ::step]
        square = corners + np.roll(corners, -1, axis=0)
        surface[half::step, half::step] = displaced(square + np.roll(square, -1, axis=1))
        centres = surface[half::step, half::step]
        diamond = centres + np.roll(centres, 1, axis=0)
        surface[::step, half::step] = displaced(diamond + corners + np.roll(corners, -1, axis=1))
        diamond = centres + np.roll(centres, 1, axis=1)
        surface[half::step, ::step] = displaced(diamond + corners + np.roll(corners, -1, axis=0))
        step, amplitude = half, amplitude / decay
    surface -= surface.min()
    return surface / surface.max()


def fog(image: Array, params: tuple[float, float, int], rng: Rng) -> Array:
    strength, decay, side = params
    x = image / 255.0
    peak = x.max()
    h, w = image.shape[:2]
    x += strength * plasma(side, decay, rng)[:h, :w, None]
    return quantise(x * peak / (peak + strength))


# ------------------------------------------------------------------ digital


def to_hsv(x: Array) -> Array:
    value, low = x.max(axis=-1), x.min(axis=-1)
    chroma = value - low
    with np.errstate(invalid="ignore", divide="ignore"):
        saturation = np.where(chroma == 0, 0, chroma / value)
        red, green, blue = (x[..., c] for c in range(3))
        hue = np.where(red == value, (green - blue) / chroma, 0)
        hue = np.where(green == value, 2 + (blue - red) / chroma, hue)
        hue = np.where(blue == value, 4 + (red - green) / chroma, hue)
    hue = np.where(chroma == 0, 0, hue / 6 % 1)
    return np.stack([hue, saturation, value], axis=-1)


def from_hsv(x: Array) -> Array:
    hue, saturation, value = (x[..., c] for c in range(3))
    sector = np.floor(hue * 6)
    fraction = hue * 6 - sector
    low = value * (1 - saturation)
    falling = value * (1 - fraction * saturation)
    rising = value * (1 - (1 - fraction) * saturation)
    choices = [
        np.stack(channels, axis=-1)
        for channels in (
            (value, rising, low),
            (falling, value, low),
            (low, value, rising),
            (low, falling, value),
            (rising, low, value),
            (value, low, falling),
        )
    ]
    return np.choose((sector.astype(int) % 6)[..., None].repeat(3, axis=-1), choices)


def brightness(image: Array, shift: float, rng: Rng) -> Array:
    x = to_hsv(image / 255.0)
    x[..., 2] = np.clip(x[..., 2] + shift, 0, 1)
    return quantise(from_hsv(x))


def saturate(image: Array, params: tuple[float, float], rng: Rng) -> Array:
    x = to_hsv(image / 255.0)
    x[..., 1] = np.clip(x[..., 1] * params[0] + params[1], 0, 1)
    return quantise(from_hsv(x))


def contrast(image: Array, factor: float, rng: Rng) -> Array:
    x = image / 255.0
    mean = x.mean(axis=(0, 1), keepdims=True)
    return quantise((x - mean) * factor + mean)


def elastic_transform(image: Array, params: tuple[float, float, float], rng: Rng) -> Array:
    alpha, sigma, jitter = params
    h, w = image.shape[:2]
    centre, reach = np.array([h // 2, w // 2]), min(h, w) // 3
    old = (centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])).astype(np.float32)
    new = old + rng.uniform(-jitter, jitter, size=old.shape).astype(np.float32)
    forward = np.linalg.solve(np.column_stack([old, np.ones(3)]), new).T  # on (x, y)
    inverse = np.linalg.inv(forward[:, :2])
    x = (image / 255.0).astype(np.float32)
    columns, rows = np.meshgrid(np.arange(w), np.arange(h))
    moved = np.stack([columns, rows], axis=-1) - forward[:, 2]
    source = moved @ inverse.T
    at = [source[..., 1], source[..., 0]]
    x = np.stack(
        [ndimage.map_coordinates(x[..., c], at, order=1, mode="mirror") for c in range(3)], axis=-1
    )
    shifts = []
    for _ in range(2):
        field = rng.uniform(-1, 1, size=(h, w))
        if sigma > 0:
            field = ndimage.gaussian_filter(field, sigma, mode="reflect", truncate=3)
        shifts.append((field * alpha).astype(np.float32))
    at = [rows + shifts[1], columns + shifts[0]]
    return quantise(
        np.stack(
            [ndimage.map_coordinates(x[..., c], at, order=1, mode="reflect") for c in range(3)],
            axis=-1,
        )
    )


def pixelate(image: Array, factor: float, rng: Rng) -> Array:
    h, w = image.shape[:2]
    small = Image.fromarray(image).resize((int(w * factor), int(h * factor)), Image.Resampling.BOX)
    return np.array(small.resize((w, h), Image.Resampling.BOX))


def jpeg_compression(image: Array, quality: int, rng: Rng) -> Array:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as file:
        return np.array(file)


_FUNCTIONS: tuple[Callable[..., Array], ...] = (
    *(gaussian_noise, shot_noise, impulse_noise, speckle_noise),
    *(defocus_blur, glass_blur, motion_blur, zoom_blur, gaussian_blur),
    *(snow, fog),
    *(brightness, contrast, elastic_transform, pixelate, jpeg_compression, saturate),
)


def transcriptions(frost_files: list[Path]) -> dict[str, Callable[[Array, Any, Rng], Array]]:
    """Functions (image, parameters of the severity, generator) -> image, by name."""
    table: dict[str, Callable[[Array, Any, Rng], Array]] = {f.__name__: f for f in _FUNCTIONS}
    if frost_files:
        table["frost"] = partial(frost, files=frost_files)
    return table
