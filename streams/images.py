"""Image sets: rows of labelled RGB images, decoded lazily."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from driftline.core.errors import UserError, scarce
from driftline.core.files import BadFile, read_checked, sweep_away, write_checked
from driftline.streams.content import SIZE, array_digest, file_digests, rows_digest

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
KIND = "pixels-1"  # of cached images


class ImageSet(Protocol):
    """Labels are known without decoding; `image` returns RGB."""

    labels: np.ndarray  # int64 [N]
    num_classes: int

    @property
    def class_names(self) -> Sequence[str]: ...

    def content(self, rows: np.ndarray | None = None) -> str:
        """Hash of the images and labels of `rows` (None: all), wherever they are stored.

        A set that is always hashed whole may leave `rows` out of account.
        """
        ...

    def image(self, row: int) -> Image.Image: ...


class ImageError(UserError):
    """One image cannot be read; the message names it."""


def fingerprint(*parts: object) -> str:
    """First 12 hex digits of SHA-256 over the parts' text."""
    digest = hashlib.sha256()
    for part in parts:
        text = part.tobytes() if isinstance(part, np.ndarray) else os.fsencode(str(part))
        digest.update(text)
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
        if isinstance(error, OSError) and scarce(error):
            raise  # never taken for a fault of the image, which data.on_error=skip leaves out
        raise ImageError(f"cannot read the image {os.fspath(path)}: {error}") from error


class Arrays:
    """Images held in memory, uint8 [N, H, W, 3]."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
        self.pixels = pixels
        self.labels = labels.astype(np.int64)
        self.class_names = class_names
        self.num_classes = len(class_names)

    @cached_property
    def _digest(self) -> bytes:
        return array_digest(np.ascontiguousarray(self.pixels))

    def content(self, rows: np.ndarray | None = None) -> str:
        return fingerprint(self.labels, self._digest.hex())

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
        self._digests = np.zeros((len(names), SIZE), np.uint8)
        self._read = np.zeros(len(names), bool)  # which of them are there

    def content(self, rows: np.ndarray | None = None) -> str:
        rows = np.arange(len(self.names)) if rows is None else rows
        new = np.unique(rows[~self._read[rows]])
        if len(new):
            self._digests[new] = file_digests(self.root, self._named(new))
            self._read[new] = True
        return fingerprint("\n".join(self._named(rows)), self.labels[rows], self._digests[rows])

    def _named(self, rows: np.ndarray) -> list[str]:
        return [self.names[row] for row in rows.tolist()]

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

    @cached_property
    def _digest(self) -> bytes:
        return rows_digest(self.path, self.start, self.start + len(self.labels))

    def content(self, rows: np.ndarray | None = None) -> str:
        return fingerprint(self.labels, self._digest.hex())

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
        identity: text that names the function and all its settings.
        cache: folder for the results, `"memory"`, or None. They lie in a folder named by the
            content of the set, a .npy file with a checksum for each row.
    """

    def __init__(
        self,
        base: ImageSet,
        change: Callable[[Image.Image, int], Image.Image],
        identity: str,
        cache: Path | str | None = None,
    ) -> None:
        self.base, self.change, self.identity = base, change, identity
        self.labels, self.num_classes = base.labels, base.num_classes
        self.class_names = base.class_names
        self._memory: dict[int, np.ndarray] | None = {} if cache == "memory" else None
        self._key = "" if cache is None or cache == "memory" else self.content()
        self._folder = Path(str(cache)) / self._key if self._key else None
        if self._folder is not None:
            sweep_away(self._folder)

    def content(self, rows: np.ndarray | None = None) -> str:
        return fingerprint(self.base.content(rows), self.identity)

    def stored(self, row: int) -> np.ndarray | None:
        """The cached result, uint8 [H, W, 3]; None where there is none that can be read."""
        if self._memory is not None:
            return self._memory.get(row)
        if self._folder is None:
            return None
        try:
            with read_checked(
                self._folder / f"{row:06d}.npy", KIND, f"{self._key}{row:06x}"
            ) as file:
                return np.load(file, allow_pickle=False)
        except (OSError, BadFile):
            return None

    def keep(self, row: int, pixels: np.ndarray) -> None:
        """Cache a result, uint8 [H, W, 3]."""
        if self._memory is not None:
            self._memory[row] = pixels
        elif self._folder is not None:
            path, key = self._folder / f"{row:06d}.npy", f"{self._key}{row:06x}"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with write_checked(path, KIND, key, shared=True) as file:
                    np.save(file, pixels)
            except OSError as error:
                warnings.warn(f"no more images go to data.cache: {error}", stacklevel=2)
                self._folder = None  # the images are made anew wherever they are wanted

    def image(self, row: int) -> Image.Image:
        pixels = self.stored(row)
        if pixels is None:
            pixels = np.asarray(self.change(self.base.image(row), row))
            self.keep(row, pixels)
        return Image.fromarray(pixels)


class Generated(Derived):
    """Another set seen through a function of whole batches, on any device: corruptions.

    Args:
        make: `(uint8 [B, 3, H, W], rows) -> uint8 of the same shape and device`; an image depends
            on its row and its pixels alone, not on the batch.
        identity, cache: as for `Derived`.
    """

    def __init__(
        self,
        base: ImageSet,
        make: Callable[[Tensor, Sequence[int]], Tensor],
        identity: str,
        cache: Path | str | None = None,
    ) -> None:
        super().__init__(base, self._single, identity, cache)
        self._make = make

    def _single(self, image: Image.Image, row: int) -> Image.Image:
        levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return Image.fromarray(channels_last(self._make(levels, [row]))[0])

    def generate(self, levels: Tensor, rows: Sequence[int]) -> Tensor:
        """The images of `rows` from clean ones, uint8 [B, 3, H, W]; cached where the set caches."""
        generated = self._make(levels, rows)
        if self._memory is not None or self._folder is not None:
            for row, pixels in zip(rows, channels_last(generated), strict=True):
                self.keep(row, pixels)
        return generated


def channels_last(levels: Tensor) -> np.ndarray:
    """uint8 [B, 3, H, W] on any device -> contiguous [B, H, W, 3] on the host."""
    return levels.cpu().permute(0, 2, 3, 1).contiguous().numpy()


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
        files = sorted(
            e.name for e in os.scandir(root / name) if e.name.lower().endswith(EXTENSIONS)
        )
        names += [f"{name}/{file}" for file in files]
        labels += [label] * len(files)
    if not names:
        raise UserError(f"{root} holds no images in class folders. {expected}")
    return Files(root, names, np.asarray(labels), classes)
