"""Image sets: rows of labelled RGB images, decoded lazily."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from core.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")


class ImageSet(Protocol):
    """Labels are known without decoding; `image` returns RGB."""

    labels: np.ndarray  # int64 [N]
    num_classes: int
    fingerprint: str  # changes when the images change, as far as can be told without decoding

    @property
    def class_names(self) -> Sequence[str]: ...

    def image(self, row: int) -> Image.Image: ...


class ImageError(UserError):
    """One image cannot be read; the message names it."""


def fingerprint(*parts: object) -> str:
    """First 12 hex digits of SHA-256 over the parts' text."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else str(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:12]


def open_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Decode one file as RGB.

    Raises:
        ImageError: naming the file, if it is missing, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"cannot read the image {os.fspath(path)}: {error}") from error


class Arrays:
    """Images held in memory, uint8 [N, H, W, 3]."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
        self.pixels = pixels
        self.labels = labels.astype(np.int64)
        self.class_names = class_names
        self.num_classes = len(class_names)
        self.fingerprint = fingerprint(
            pixels.shape, self.labels, pixels[:: max(1, len(pixels) // 64)]
        )

    def image(self, row: int) -> Image.Image:
        return Image.fromarray(self.pixels[row])


class Files:
    """Image files under one root.

    Args:
        root: common folder.
        names: paths relative to `root`, one per row.
        labels: int64 [N].
    """

    def __init__(
        self, root: Path, names: Sequence[str], labels: np.ndarray, class_names: Sequence[str]
    ) -> None:
        self.root, self.names = root, names
        self.labels = labels.astype(np.int64)
        self.class_names = class_names
        self.num_classes = len(class_names)
        self.fingerprint = fingerprint("\n".join(names), self.labels)

    def image(self, row: int) -> Image.Image:
        return open_rgb(self.root / self.names[row])


class NpyRows:
    """A block of rows of a uint8 [N, H, W, 3] .npy file, memory-mapped (the CIFAR-C layout)."""

    def __init__(
        self, path: Path, start: int, labels: np.ndarray, class_names: Sequence[str]
    ) -> None:
        self.path, self.start = path, start
        self.labels = labels.astype(np.int64)
        self.class_names = class_names
        self.num_classes = len(class_names)
        self._pixels: np.ndarray | None = None
        self.fingerprint = fingerprint(path.name, start, path.stat().st_size, self.labels)

    def image(self, row: int) -> Image.Image:
        if self._pixels is None:
            self._pixels = np.load(self.path, mmap_mode="r")
        return Image.fromarray(np.ascontiguousarray(self._pixels[self.start + row]))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pixels": None}  # a worker process maps the file itself


class Derived:
    """Another set seen through a function of (image, row): crops, corruptions.

    Args:
        change: `(PIL image, row) -> PIL image`, deterministic.
        identity: text that names the function and all its settings, for the fingerprint.
        cache: folder for the results (one .npy a row, uint8 [H, W, 3]), `"memory"`, or None.
    """

    def __init__(
        self,
        base: ImageSet,
        change: Callable[[Image.Image, int], Image.Image],
        identity: str,
        cache: Path | str | None = None,
    ) -> None:
        self.base, self.change = base, change
        self.labels, self.num_classes = base.labels, base.num_classes
        self.class_names = base.class_names
        self.fingerprint = fingerprint(base.fingerprint, identity)
        self._memory: dict[int, np.ndarray] | None = {} if cache == "memory" else None
        self._folder = (
            None if cache is None or cache == "memory" else Path(cache) / self.fingerprint
        )

    def image(self, row: int) -> Image.Image:
        if self._memory is not None:
            if row not in self._memory:
                self._memory[row] = np.asarray(self.change(self.base.image(row), row))
            return Image.fromarray(self._memory[row])
        if self._folder is None:
            return self.change(self.base.image(row), row)
        path = self._folder / f"{row:06d}.npy"
        try:
            return Image.fromarray(np.load(path))
        except (OSError, ValueError, EOFError):
            image = self.change(self.base.image(row), row)
        self._folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with open(part, "wb") as file:
            np.save(file, np.asarray(image))
        os.replace(part, path)
        return image


def image_folder(root: Path, expected: str) -> Files:
    """`<root>/<class>/<image>`, classes and images in sorted order (torchvision's ImageFolder).

    Raises:
        UserError: with `expected` (layout and origin) if the folder is missing or holds no image.
    """
    if not root.is_dir():
        raise UserError(f"{root} does not exist. {expected}")
    classes = sorted(e.name for e in os.scandir(root) if e.is_dir())
    names, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(
            e.name for e in os.scandir(root / name) if e.name.lower().endswith(EXTENSIONS)
        )
        names += [f"{name}/{file}" for file in found]
        labels += [label] * len(found)
    if not names:
        raise UserError(f"{root} holds no images in class folders. {expected}")
    return Files(root, names, np.asarray(labels), classes)
