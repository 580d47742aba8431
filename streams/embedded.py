"""Procedural labelled images made by this project's own code: stand-in data, not a benchmark.

A class is a triple (texture, colour family, shape), for example "striped red star". Every image
shows one such object with nuisance variation: position, size, stretch, rotation, hue within the
family, tone contrast, a rippled gradient background, clutter behind and in front, and lighting.

The set exists so that scenarios and methods run without any download and still show the effects
they are about. Numbers measured on it say nothing about public data sets; everything derived from
it has to carry the label ``[embedded]``.

An image is a pure function of (class, instance, split, seed, size). All random numbers come from
one Philox stream per image, and the renderer uses only IEEE-exact operations (``+ - * /``,
``sqrt``, ``floor``, comparisons), so that the bytes do not depend on the platform or on which
images are rendered together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

VERSION = 1  # raise whenever any rendered byte or any class list changes

SHAPES = (
    "disc", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "bar", "hourglass",
)  # fmt: skip
TEXTURES = (
    "plain", "striped", "checked", "dotted", "banded", "gridded", "zigzag", "halved", "rimmed",
    "mottled",
)  # fmt: skip
COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
SPLITS = ("train", "test", "probe")

Triple = tuple[int, int, int]
"""(shape, texture, colour), indices into SHAPES, TEXTURES and COLOURS."""

_HUES = np.array([0.0, 52.0, 120.0, 178.0, 226.0, 288.0])  # degrees
_HUE_JITTER = 13.0  # degrees either side
_CACHE_SIZE_LIMIT = 64  # px; larger images are rendered one at a time and not kept

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
U8 = NDArray[np.uint8]


def class_name(triple: Triple) -> str:
    """Readable name of a class, e.g. ``"striped red star"``."""
    shape, texture, colour = triple
    return f"{TEXTURES[texture]} {COLOURS[colour]} {SHAPES[shape]}"


def _class_lists() -> tuple[tuple[Triple, ...], tuple[Triple, ...], tuple[Triple, ...]]:
    """Cut one fixed order of all triples into the three disjoint lists.

    The order is that of a hash of the names: stable over library versions, and any stretch of it
    mixes shapes, textures and colours.
    """
    triples = [
        (s, t, c)
        for s in range(len(SHAPES))
        for t in range(len(TEXTURES))
        for c in range(len(COLOURS))
    ]
    triples.sort(key=lambda triple: hashlib.sha256(class_name(triple).encode()).hexdigest())
    return tuple(triples[:20]), tuple(triples[20:120]), tuple(triples[120:280])


SHIFT_CLASSES, TASK_CLASSES, PRETRAIN_CLASSES = _class_lists()

# ---------------------------------------------------------------------------------- shapes
# Each takes object coordinates u (right) and v (down), float32 [n,h,w], unit = object radius, and
# returns a (roughly) signed distance in the same unit, negative inside.


def _disc(u: F32, v: F32) -> F32:
    return np.sqrt(u * u + v * v) - np.float32(0.88)


def _square(u: F32, v: F32) -> F32:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.76)


def _half_planes(u: F32, v: F32, count: int) -> list[F32]:
    """Projections on the ``count`` directions evenly spaced over the circle, first one down."""
    angles = 2.0 * np.pi * np.arange(count) / count
    normals = np.round(np.stack([np.sin(angles), np.cos(angles)], axis=1), 6).astype(np.float32)
    return [nx * u + ny * v for nx, ny in normals]


def _triangle(u: F32, v: F32) -> F32:
    a, b, c = _half_planes(u, v - np.float32(0.12), 3)
    return np.maximum(np.maximum(a, b), c) - np.float32(0.52)


def _star(u: F32, v: F32) -> F32:
    # A pentagram is the set of points inside at least four of five half planes.
    planes = _half_planes(u, v, 5)
    first = np.maximum(planes[0], planes[1])
    second = np.minimum(planes[0], planes[1])
    for plane in planes[2:]:
        second = np.maximum(second, np.minimum(first, plane))
        first = np.maximum(first, plane)
    return second - np.float32(0.36)


def _cross(u: F32, v: F32) -> F32:
    a, b = np.abs(u), np.abs(v)
    upright = np.maximum(a - np.float32(0.32), b - np.float32(0.92))
    return np.minimum(upright, np.maximum(a - np.float32(0.92), b - np.float32(0.32)))


def _ring(u: F32, v: F32) -> F32:
    return np.abs(np.sqrt(u * u + v * v) - np.float32(0.66)) - np.float32(0.28)


def _crescent(u: F32, v: F32) -> F32:
    outer = np.sqrt(u * u + v * v) - np.float32(0.95)
    w = u - np.float32(0.5)
    return np.maximum(outer, np.float32(0.68) - np.sqrt(w * w + v * v))


def _heart(u: F32, v: F32) -> F32:
    a = np.abs(u)
    x, y = a - np.float32(0.42), v + np.float32(0.3)
    lobes = np.sqrt(x * x + y * y) - np.float32(0.5)
    body = (a * np.float32(0.76) + v * np.float32(0.65)) - np.float32(0.55)
    return np.minimum(lobes, np.maximum(body, -v - np.float32(0.2)))


def _bar(u: F32, v: F32) -> F32:
    return np.maximum(np.abs(u) - np.float32(0.98), np.abs(v) - np.float32(0.38))


def _hourglass(u: F32, v: F32) -> F32:
    b = np.abs(v)
    side = (np.abs(u) - np.float32(0.14) - np.float32(0.75) * b) * np.float32(0.8)
    return np.maximum(side, b - np.float32(0.86))


_SHAPE_FUNCTIONS = (
    _disc, _square, _triangle, _star, _cross, _ring, _crescent, _heart, _bar, _hourglass,
)  # fmt: skip

# -------------------------------------------------------------------------------- textures
# Each returns the weight in [0,1] of the second tone, float32 [n,h,w]. ``scale`` [n,1,1] is the
# number of samples per object unit, for edges one sample wide; ``phase`` [n,1,1,2] in [0,1).


def _triangle_wave(x: F32) -> F32:
    """Period 1, range [0,1], 0 at integers."""
    return np.float32(2.0) * np.abs(x - np.floor(x + np.float32(0.5)))


def _edge(distance: F32, scale: F32) -> F32:
    """0 below, 1 above distance 0 (object units), linear over one sample."""
    return np.clip(distance * scale + np.float32(0.5), 0, 1)


def _wave(x: F32, period: float, scale: F32, duty: float = 0.5) -> F32:
    """Square wave over x / period; ``duty`` is the share of the second tone."""
    p = np.float32(period)
    height = _triangle_wave(x) - np.float32(1.0 - duty)
    return _edge(height * (p / np.float32(2.0)), scale)


def _texture(
    kind: str, u: F32, v: F32, distance: F32, scale: F32, phase: F32, cells: F32, period: F32
) -> F32:
    """Second-tone weight of the texture ``kind``; see the comment above for the arguments.

    ``cells`` [n,8,8] in [0,1) holds the tones of the mottled texture and ``period`` [n,1,1] the
    length of one repeat in object units.
    """
    p = np.float32(1.0) / period
    mean_period = 0.55
    a, b = phase[..., 0], phase[..., 1]
    if kind == "plain":
        return np.zeros_like(u)
    if kind == "striped":
        return _wave(u * p + a, mean_period, scale)
    if kind == "checked":
        x = _wave(u * p + a, mean_period, scale)
        y = _wave(v * p + b, mean_period, scale)
        return x + y - np.float32(2.0) * x * y
    if kind == "dotted":
        x = _triangle_wave(u * p + a) - np.float32(1.0)
        y = _triangle_wave(v * p + b) - np.float32(1.0)
        radius = np.sqrt(x * x + y * y)
        return _edge((np.float32(0.62) - radius) * np.float32(mean_period / 2), scale)
    if kind == "banded":
        return _wave(np.sqrt(u * u + v * v) * p + a, mean_period, scale)
    if kind == "gridded":
        x = _wave(u * p + a, mean_period, scale, duty=0.3)
        return np.maximum(x, _wave(v * p + b, mean_period, scale, duty=0.3))
    if kind == "zigzag":
        bend = _triangle_wave(u * p * np.float32(0.75) + a) * np.float32(0.8)
        return _wave(v * p * np.float32(0.9) + bend + b, mean_period, scale)
    if kind == "halved":
        return _edge(v + (a - np.float32(0.5)) * np.float32(0.3), scale)
    if kind == "rimmed":
        return _edge(distance + np.float32(0.2), scale)
    # mottled: blotches at random places
    rows = np.clip((v + np.float32(1.2)) * np.float32(3.3), 0, 7).astype(np.intp)
    cols = np.clip((u + np.float32(1.2)) * np.float32(3.3), 0, 7).astype(np.intp)
    which = np.arange(len(u))[:, None, None]
    return np.where(cells[which, rows, cols] < np.float32(0.45), np.float32(1), np.float32(0))


# -------------------------------------------------------------------------------- renderer

_CLUTTER = 4
_NUMBERS = 64 + 40 + 12 * _CLUTTER  # uniform numbers per image: mottle, scene, clutter


def _uniforms(triple: Triple, instances: Sequence[int], split: str, seed: int) -> F64:
    """All random numbers of ``len(instances)`` images: float64 [n, _NUMBERS] in [0,1)."""
    key = (triple[0] * len(TEXTURES) + triple[1]) * len(COLOURS) + triple[2]
    out = np.empty((len(instances), _NUMBERS))
    for i, instance in enumerate(instances):
        sequence = np.random.SeedSequence([VERSION, seed, SPLITS.index(split), key, instance])
        np.random.Generator(np.random.Philox(sequence)).random(out=out[i])
    return out


def _span(u: F64, low: float, high: float) -> F64:
    return low + (high - low) * u


def _direction(u: F64, w: F64) -> tuple[F64, F64]:
    """Unit vectors over the whole circle; rational parametrisation, hence no sine or cosine."""
    t = 2.0 * u - 1.0
    sign = np.where(w < 0.5, -1.0, 1.0)
    return sign * (1.0 - t * t) / (1.0 + t * t), sign * 2.0 * t / (1.0 + t * t)


def _rgb(hue: F64, saturation: F64, value: F64) -> F64:
    """HSV (hue in degrees, the rest in [0,1]) [n] to RGB [n,3]."""
    out = np.empty((len(hue), 3))
    for channel, n in enumerate((5.0, 3.0, 1.0)):
        k = n + hue / 60.0
        k = k - 6.0 * np.floor(k / 6.0)
        out[:, channel] = value - value * saturation * np.clip(np.minimum(k, 4.0 - k), 0.0, 1.0)
    return out


def _column(x: F64) -> F32:
    """[n] or [n,3] -> float32 broadcastable over [n,h,w] or [n,h,w,3]."""
    x = x.astype(np.float32)
    return x[:, None, None] if x.ndim == 1 else x[:, None, None, :]


def _blend(canvas: F32, colour: F32, weight: F32) -> None:
    """canvas += (colour - canvas) * weight, in place; weight [n,h,w]."""
    canvas += (colour - canvas) * weight[..., None]


def _paint_clutter(canvas: F32, x: F32, y: F32, numbers: F64, samples: int) -> None:
    """One small disc or rod per image; ``numbers`` float64 [n,12]."""
    cx, cy = (_column(_span(numbers[:, i], 0.02, 0.98)) for i in (0, 1))
    c, s = (_column(z) for z in _direction(numbers[:, 2], numbers[:, 3]))
    half = _column(_span(numbers[:, 4], 0.03, 0.07))
    # a rod is a disc drawn out along one axis
    length = _column(np.where(numbers[:, 5] < 0.5, 0.0, _span(numbers[:, 6], 0.08, 0.2)))
    u, v = (x - cx) * c + (y - cy) * s, (y - cy) * c - (x - cx) * s
    u = np.maximum(np.abs(u) - length, 0)
    inside = _edge(half - np.sqrt(u * u + v * v), np.float32(samples))
    colour = _rgb(
        360.0 * numbers[:, 7], _span(numbers[:, 8], 0.1, 0.8), _span(numbers[:, 9], 0.2, 1.0)
    )
    opacity = _column(np.where(numbers[:, 10] < 0.75, 0.9, 0.0))
    _blend(canvas, _column(colour), inside * opacity)


def _render_block(triple: Triple, instances: Sequence[int], split: str, seed: int, size: int) -> U8:
    """Images of one class: uint8 [n,size,size,3]."""
    r = _uniforms(triple, instances, split, seed)
    cells, d, clutter = r[:, :64], r[:, 64:104], r[:, 104:].reshape(len(r), _CLUTTER, 12)
    n = len(r)
    factor = 2 if size < 96 else 1
    samples = size * factor
    axis = ((np.arange(samples) + 0.5) / samples).astype(np.float32)
    x, y = axis[None, None, :], axis[None, :, None]

    # background: gradient between two muted colours, with two ripples
    first, second = (
        _rgb(360.0 * d[:, i], _span(d[:, i + 1], 0.0, 0.45), _span(d[:, i + 2], 0.15, 0.9))
        for i in (0, 3)
    )
    c, s = (_column(z) for z in _direction(d[:, 6], d[:, 7]))
    ramp = np.clip((x - np.float32(0.5)) * c + (y - np.float32(0.5)) * s + np.float32(0.5), 0, 1)
    for i in (8, 12):
        c, s = (_column(z) for z in _direction(d[:, i], d[:, i + 1]))
        frequency = _column(_span(d[:, i + 2], 1.5, 6.0))
        wave = _triangle_wave((x * c + y * s) * frequency + _column(d[:, i + 3]))
        ramp = ramp + (wave - np.float32(0.5)) * np.float32(0.3)
    canvas = _column(first) + _column(second - first) * ramp[..., None]
    for i in range(_CLUTTER - 1):
        _paint_clutter(canvas, x, y, clutter[:, i], samples)

    # object
    radius = _span(d[:, 16], 0.32, 0.45)
    stretch = _span(d[:, 17], 0.86, 1.16)
    cx, cy = (_column(0.5 + _span(d[:, i], -1.0, 1.0) * (0.5 - radius)) for i in (18, 19))
    t = _span(d[:, 20], -0.14, 0.14)  # tangent of half the rotation: about 16 degrees at most
    c, s = _column((1.0 - t * t) / (1.0 + t * t)), _column(2.0 * t / (1.0 + t * t))
    across, down = _column(1.0 / (radius * stretch)), _column(stretch / radius)
    u = ((x - cx) * c + (y - cy) * s) * across
    v = ((y - cy) * c - (x - cx) * s) * down
    scale = _column(radius * samples)
    distance = _SHAPE_FUNCTIONS[triple[0]](u, v)
    weight = _texture(
        TEXTURES[triple[1]], u, v, distance, scale,
        d[:, None, None, 21:23].astype(np.float32),
        cells.reshape(n, 8, 8).astype(np.float32),
        _column(_span(d[:, 23], 0.46, 0.64)),
    )  # fmt: skip
    hue = _HUES[triple[2]] + _span(d[:, 24], -_HUE_JITTER, _HUE_JITTER)
    saturation, value = _span(d[:, 25], 0.55, 0.95), _span(d[:, 26], 0.7, 1.0)
    light = _rgb(hue, saturation, value)
    dark = _rgb(hue, saturation, value * _span(d[:, 27], 0.3, 0.62))
    swap = (d[:, 28] < 0.5)[:, None]  # which of the two tones comes first says nothing
    tone, other = np.where(swap, dark, light), np.where(swap, light, dark)
    surface = _column(tone) + _column(other - tone) * weight[..., None]
    _blend(canvas, surface, _edge(-distance, scale))
    _paint_clutter(canvas, x, y, clutter[:, -1], samples)

    # lighting: gain, slope and a slight tint
    c, s = (_column(z) for z in _direction(d[:, 29], d[:, 30]))
    slope = _column(_span(d[:, 31], 0.0, 0.4))
    lit = ((x - np.float32(0.5)) * c + (y - np.float32(0.5)) * s) * slope
    gain = _column(_span(d[:, 32], 0.75, 1.05)) * (np.float32(1.0) + lit)
    canvas *= gain[..., None] * _column(_span(d[:, 33:36], 0.94, 1.06))
    if factor == 2:
        canvas = canvas[:, 0::2] + canvas[:, 1::2]
        canvas = (canvas[:, :, 0::2] + canvas[:, :, 1::2]) * np.float32(0.25)
    return (np.clip(canvas, 0, 1) * np.float32(255.0) + np.float32(0.5)).astype(np.uint8)


@lru_cache(maxsize=1024)
def _cached_block(triple: Triple, count: int, split: str, seed: int, size: int) -> U8:
    """The first ``count`` images of a class, read-only uint8 [count,size,size,3]."""
    block = _render_block(triple, range(count), split, seed, size)
    block.setflags(write=False)
    return block


def render(
    triple: Triple, instances: Sequence[int], split: str = "train", seed: int = 0, size: int = 32
) -> U8:
    """Render some images of one class: uint8 [len(instances),size,size,3], RGB.

    Every image depends on (triple, its instance number, split, seed, size) only.

    Raises:
        ValueError: unknown triple or split, negative seed or instance, or size below 8 px.
    """
    limits = (len(SHAPES), len(TEXTURES), len(COLOURS))
    if len(triple) != 3 or not all(0 <= i < n for i, n in zip(triple, limits, strict=True)):
        raise ValueError(f"no such class: {triple}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}, expected one of {SPLITS}")
    if size < 8:
        raise ValueError(f"size must be at least 8 px, got {size}")
    if seed < 0 or any(instance < 0 for instance in instances):
        raise ValueError("seed and instances must not be negative")
    return _render_block(triple, instances, split, seed, size)


class EmbeddedImages:
    """A balanced set of rendered images with labels 0..num_classes-1.

    Rows go round-robin over the classes (row = instance * num_classes + label), so every prefix
    is balanced to within one image per class. Images are rendered on first use; small ones are
    kept in a cache shared by the process.

    Attributes:
        labels: int64 [N].
        num_classes: number of classes.
        class_names: one readable name per label.
        name: always ``"embedded"``.
        fingerprint: hash of the generator version and of all settings.
    """

    name = "embedded"

    def __init__(
        self,
        classes: Sequence[Triple] = SHIFT_CLASSES,
        split: str = "train",
        per_class: int = 25,
        size: int = 32,
        seed: int = 0,
    ) -> None:
        """Describe the set; nothing is rendered yet.

        Args:
            classes: triples; the label is the position in this sequence.
            split: "train", "test" or "probe"; different splits share no image.
            per_class: images per class.
            size: side in pixels.
            seed: selects another draw of the same set.

        Raises:
            ValueError: no or repeated classes, per_class below 1, or what ``render`` rejects.
        """
        self.classes = tuple((int(s), int(t), int(c)) for s, t, c in classes)
        if not self.classes or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes must be non-empty and distinct")
        if per_class < 1:
            raise ValueError(f"per_class must be at least 1, got {per_class}")
        for triple in self.classes:
            render(triple, [], split, seed, size)  # checks the arguments
        self.split, self.per_class, self.size, self.seed = split, per_class, size, seed
        self.num_classes = len(self.classes)
        self.class_names = [class_name(triple) for triple in self.classes]
        self.labels = np.tile(np.arange(self.num_classes, dtype=np.int64), per_class)
        settings = [VERSION, self.classes, split, per_class, size, seed]
        self.fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.labels)

    def content(self, rows: NDArray[np.int64] | None = None) -> str:
        """The fingerprint: the images follow from the settings."""
        return self.fingerprint

    def array(self, row: int) -> U8:
        """Pixels of one image: uint8 [size,size,3], possibly read-only.

        Raises:
            IndexError: row outside [0, N).
        """
        if not 0 <= row < len(self.labels):
            raise IndexError(f"row {row} outside [0, {len(self.labels)})")
        instance, label = divmod(int(row), self.num_classes)
        triple = self.classes[label]
        if self.size > _CACHE_SIZE_LIMIT:
            return _render_block(triple, [instance], self.split, self.seed, self.size)[0]
        return _cached_block(triple, self.per_class, self.split, self.seed, self.size)[instance]

    def image(self, row: int) -> Image.Image:
        """One image, PIL RGB of the set's size.

        Raises:
            IndexError: row outside [0, N).
        """
        return Image.fromarray(self.array(row))
