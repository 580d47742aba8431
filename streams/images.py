"""Image sets: rows of labelled RGB images, decoded lazily."""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from mmap import mmap
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from driftline.core.errors import UserError, scarce
from driftline.core.files import BadFile, read_checked, sweep_away, write_checked
from driftline.streams.content import SIZE, array_digest, file_digests, rows_digest

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm")
KIND = "pixels-1"  # of cached images
SAMPLE = 256  # images that show whether white is 1 or 255


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


def unreadable(images: ImageSet, rows: np.ndarray | None = None) -> list[Path]:
    """Files of `rows` (None: all) that are missing or cannot be opened, without decoding any."""
    check = getattr(images, "unreadable", None)  # sets that are not made of files have none
    return check(rows) if check is not None else []


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
            return _rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and scarce(error):
            raise  # never taken for a fault of the image, which data.on_error=skip leaves out
        text = f"cannot read the image {os.fspath(path)}: {error}{_instead(path)}"
        raise ImageError(text) from error


def _rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits. Of 16 bits the upper 8 count, in grey as Pillow does it in colour.

    Raises:
        ValueError: for numbers of which nobody can tell what white is.
    """
    if image.mode.startswith(("I", "F")):  # `convert` would cut these off at 255
        values = np.asarray(image)
        if image.mode == "F":
            return Image.fromarray(to_levels(values, white_of(values))).convert("RGB")
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"grey levels from {values.min()} to {values.max()}, outside the 16 bits 0 ... "
                "65535; save it with 8 or 16 bits"
            )
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours, without a warning
    return image.convert("RGB")


def white_of(values: np.ndarray) -> int:
    """Which number is white in images stored as `values`: 1 or 255."""
    return 1 if values.dtype.kind == "f" and values.size and float(values.max()) <= 1 else 255


def to_levels(values: np.ndarray, white: int) -> np.ndarray:
    """Numbers from 0 to `white` as uint8 of the same shape.

    Raises:
        ValueError: for numbers outside.
    """
    if not 0 <= values.min() <= values.max() <= white:  # nor is something no number
        raise ValueError(
            f"values from {values.min():.4g} to {values.max():.4g}, where images have 0 ... "
            f"{white}; normalised ones have to be saved before that step"
        )
    return (values.astype(np.float64) * (255 / white)).round().astype(np.uint8)


def _instead(path: str | os.PathLike[str]) -> str:
    """What a file that is no image is, where that is known to happen."""
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError:
        return ""
    if start.startswith(b"version https://git-lfs"):
        return "; it is a pointer of Git LFS, `git lfs pull` fetches the image"
    if start.startswith((b"<!doctype html", b"<html")):
        return "; it is a web page, fetch the image again"
    return ""


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

    def unreadable(self, rows: np.ndarray | None = None) -> list[Path]:
        """Which files of `rows` (None: all) cannot be opened, by the digests of `content`."""
        self.content(rows)
        rows = np.arange(len(self.names)) if rows is None else rows
        return [self.root / name for name in self._named(rows[~self._digests[rows].any(1)])]

    def _named(self, rows: np.ndarray) -> list[str]:
        return [self.names[row] for row in rows.tolist()]

    def image(self, row: int) -> Image.Image:
        return open_rgb(self.root / self.names[row])


class NpyRows:
    """A block of rows of a .npy file, memory-mapped (the CIFAR-C layout).

    Args:
        path: of an array [N, H, W, 3] or [N, 3, H, W], see `to_levels`; released files: uint8.
        start: first row of the block.
        white: which number is white.
    """

    def __init__(
        self,
        path: Path,
        start: int,
        labels: np.ndarray,
        class_names: Sequence[str],
        white: int = 255,
    ) -> None:
        self.path, self.start, self.white = path, start, white
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
        pixels = self._pixels[self.start + row]
        if pixels.shape[-1] != 3:
            pixels = pixels.transpose(1, 2, 0)
        if pixels.dtype != np.uint8:
            try:
                pixels = to_levels(pixels, self.white)
            except ValueError as error:
                place = f"image {self.start + row} of {self.path}"
                raise ImageError(f"cannot read {place}: {error}") from error
        return Image.fromarray(np.ascontiguousarray(pixels))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_pixels": None}  # a worker process maps the file itself


def load_array(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """An array of a .npy file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read the array {path}: {error}; copy it here again") from error


def corruption_arrays(
    folder: Path, corruptions: Sequence[str], severities: Sequence[int], classes: int
) -> dict[tuple[str, int], NpyRows]:
    """`(corruption, severity) -> images` of <corruption>.npy and labels.npy in `folder`.

    The released files hold five severities, one after the other, and so do their labels. Files of
    one severity, and labels of one, are recognised by their number and by whether the labels come
    five times; files of one severity are taken as the one that is asked for.

    Raises:
        UserError: for a file that cannot be read, of the wrong shape or range, or that lacks a
            severity.
    """
    place = folder / "labels.npy"
    labels = load_array(place)
    column = labels.shape in ((labels.size,), (labels.size, 1))
    if not column or not set(labels.reshape(-1).tolist()) <= set(range(classes)):  # 3.0 is 3
        raise UserError(f"{place}: expected labels 0..{classes - 1}, one an image")
    labels = labels.reshape(-1).astype(np.int64)
    block = len(labels) // 5
    parts = labels[: 5 * block].reshape(5, block)
    # Most of them, as a single label may be damaged; those of other images agree by chance.
    five = len(labels) == 5 * block > 0 and np.mean(parts[1:] == parts[0]) > 0.5
    if not five:
        block, parts = len(labels), np.tile(labels, (5, 1))
    names = [str(i) for i in range(classes)]
    sets = {}
    for corruption in corruptions:
        path = folder / f"{corruption}.npy"
        pixels = load_array(path, "r")
        count, *shape = pixels.shape or (0,)
        if pixels.dtype.kind not in "iuf" or len(shape) != 3 or 3 not in (shape[0], shape[2]):
            raise UserError(
                f"{path}: expected images [N, H, W, 3], uint8 or other numbers, found "
                f"{pixels.dtype} {pixels.shape}"
            )
        if count not in (block, 5 * block):
            raise UserError(
                f"{path} holds {count} images, but {place} the labels of {block} images a "
                "severity; both must be of one release"
            )
        one = count == block
        if one and len(severities) > 1:
            raise UserError(
                f"{path} holds one severity ({count} images), but scenario.severity asks for "
                f"{len(severities)}; name the one that it is"
            )
        if one:
            warnings.warn(
                f"{path} holds one severity and does not say which; it is taken as "
                f"scenario.severity={severities[0]}",
                stacklevel=2,
            )
        for severity in severities:
            start = 0 if one else block * (severity - 1)
            sample = pixels[start : start + SAMPLE]
            white = white_of(sample)
            if pixels.dtype != np.uint8:
                try:
                    to_levels(sample, white)
                except ValueError as error:
                    raise UserError(f"{path}: {error}") from error
            rows = parts[0 if one else severity - 1]
            sets[corruption, severity] = NpyRows(path, start, rows, names, white)
    return sets


def files_of(images: ImageSet, rows: np.ndarray) -> list[Path]:
    """The files that `rows` of a set are made from; none where they lie in arrays."""
    while isinstance(images, Derived):
        images = images.base
    if not isinstance(images, Files):
        return []
    return [images.root / images.names[row] for row in rows.tolist()]


class Shelf:
    """Images of one size in memory that all loader processes share, uint8 [H, W, 3] each.

    What a forked process puts here is seen by the others, and by those forked later; one that is
    started afresh has an empty shelf that takes nothing.

    Args:
        count: rows.
        shape: of each image; images of another are not taken.
        limit: of all images, in bytes.
    """

    def __init__(self, count: int, shape: tuple[int, ...], limit: int) -> None:
        self.limit = limit
        self._filled = np.frombuffer(mmap(-1, count), np.uint8)
        # Memory is taken by what is written, not by what is mapped.
        self._pixels = np.frombuffer(mmap(-1, count * math.prod(shape)), np.uint8)
        self._pixels = self._pixels.reshape(count, *shape)

    def get(self, row: int) -> np.ndarray | None:
        """The image of a row; None where there is none."""
        return self._pixels[row] if len(self._filled) and self._filled[row] else None

    def __setitem__(self, row: int, pixels: np.ndarray) -> None:
        if pixels.shape != self._pixels.shape[1:]:
            return
        if (int(self._filled.sum()) + 1) * pixels.nbytes <= self.limit:
            self._pixels[row] = pixels
            self._filled[row] = 1  # last: another process may be looking

    def __getstate__(self) -> dict[str, object]:
        empty = np.zeros(0, np.uint8)
        return {"limit": 0, "_filled": empty, "_pixels": empty}


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
        self._memory: dict[int, np.ndarray] | Shelf | None = {} if cache == "memory" else None
        self._key = "" if cache is None or cache == "memory" else self.content()
        self._folder = Path(str(cache)) / self._key if self._key else None
        if self._folder is not None:
            sweep_away(self._folder)

    def content(self, rows: np.ndarray | None = None) -> str:
        return fingerprint(self.base.content(rows), self.identity)

    def unreadable(self, rows: np.ndarray | None = None) -> list[Path]:
        return unreadable(self.base, rows)

    def remember(self, limit: int) -> None:
        """Keep up to `limit` bytes of results in memory, for a set that is read several times."""
        if limit and self._memory is None and self._folder is None:
            # Who reads a bad image says so; where so much memory cannot be mapped, none is used.
            with suppress(ImageError, OSError):
                self._memory = Shelf(len(self.labels), np.asarray(self.image(0)).shape, limit)

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


# ------------------------------------------------------------------ folders

# What systems and programs leave beside images; names that begin with a dot are left out, too.
STRAY = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
STRAY += ("lost+found", "desktop.ini", "Thumbs.db")
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def listed(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, sorted by name, without hidden and stray entries."""
    with os.scandir(folder) as entries:
        seen = [e for e in entries if not e.name.startswith(".") and e.name not in STRAY]
    return sorted(seen, key=lambda entry: entry.name)


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder`: sorted, as numbers where all of them are (0, 1, ... 10)."""
    names = [entry.name for entry in listed(folder) if entry.is_dir()]
    return sorted(names, key=int) if all(map(is_number, names)) else names


def is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def holds_images(folder: Path) -> bool:
    return any(entry.name.lower().endswith(EXTENSIONS) for entry in listed(folder))


def unfolded(folder: Path) -> Path:
    """`folder`, or the folder of that name which lies alone in it, as some archives unpack."""
    inside = subfolders(folder) if folder.is_dir() else []
    if inside == [folder.name] and subfolders(folder / folder.name):
        return folder / folder.name
    return folder


def still_packed(*folders: Path, named: str = "") -> str:
    """A sentence that names archives in `folders` and how to unpack them; empty without any.

    Args:
        named: what the names of the archives begin with, in any case.
    """
    for folder in folders:
        if not folder.is_dir():
            continue
        names = [e.name for e in listed(folder) if e.name.lower().endswith(ARCHIVES)]
        names = [name for name in names if name.lower().startswith(named.lower())]
        if names:
            tool = "unzip" if names[0].lower().endswith(".zip") else "tar -xf"
            return (
                f"{folder} holds {_some(names)}, not unpacked: cd {folder} && {tool} {names[0]}. "
            )
    return ""


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")


def image_folder(root: Path, expected: str) -> Files:
    """`<root>/<class>/<image>`, images in sorted order (torchvision's ImageFolder).

    Classes are in the order of `subfolders`. A class folder that holds one folder and no image is
    read from there. Files that are no images by their extension, and classes without images, are
    counted and named in a warning.

    Raises:
        UserError: with `expected` (layout and origin) if the folder is missing or holds no image.
    """
    if not root.is_dir():
        raise UserError(f"{root} does not exist. {still_packed(root.parent)}{expected}")
    root = unfolded(root)
    classes = subfolders(root)
    names, labels, empty = [], [], []
    unread: Counter[str] = Counter()
    for label, name in enumerate(classes):
        files = _images(root, name, unread)
        names += files
        labels += [label] * len(files)
        if not files:
            empty.append(name)
    kinds = ", ".join(f"{kind} ({count})" for kind, count in unread.most_common(4))
    if not names:
        loose = [e.name for e in listed(root) if e.name.lower().endswith(EXTENSIONS)]
        reason = f"its {len(classes)} class folders hold {kinds or 'nothing'}"
        if not classes:
            reason = f"it holds {len(loose)} images, but no folders"
        raise UserError(
            f"{root} holds no images in class folders: {reason}. Images end with "
            f"{', '.join(EXTENSIONS)}. {still_packed(root)}{expected}"
        )
    if unread:
        warnings.warn(
            f"{root}: {unread.total()} entries of class folders are not read: {kinds}. Images end "
            f"with {', '.join(EXTENSIONS)}",
            stacklevel=2,
        )
    if empty:
        warnings.warn(
            f"{root}: {len(empty)} of {len(classes)} classes have no images: {_some(empty)}",
            stacklevel=2,
        )
    return Files(root, names, np.asarray(labels), classes)


def in_classes_of(test: Files, train: Files) -> None:
    """Give test images the labels of the training images, by the names of their class folders.

    Classes without test images are counted and named in a warning.

    Raises:
        UserError: for classes that `train` lacks.
    """
    unknown = [name for name in test.class_names if name not in set(train.class_names)]
    if unknown:
        raise UserError(
            f"{test.root} has classes that {train.root} lacks: {_some(unknown)}; the folders of a "
            "class need one name"
        )
    position = np.asarray([train.class_names.index(name) for name in test.class_names])
    test.labels, test.class_names = position[test.labels], train.class_names
    test.num_classes = train.num_classes
    there = set(test.labels.tolist())
    absent = [name for label, name in enumerate(train.class_names) if label not in there]
    if absent:
        warnings.warn(
            f"{test.root}: {len(absent)} of {train.num_classes} classes have no test images: "
            f"{_some(absent)}",
            stacklevel=2,
        )


def _images(root: Path, folder: str, unread: Counter[str]) -> list[str]:
    """Image files in <root>/<folder>, relative to `root`; counts by kind what is not read."""
    files, inside, others = [], [], []
    for entry in listed(root / folder):
        if entry.name.lower().endswith(EXTENSIONS):
            files.append(f"{folder}/{entry.name}")
        elif entry.is_dir():
            inside.append(entry.name)
        else:
            others.append(os.path.splitext(entry.name)[1].lower() or "without an extension")
    if not files and len(inside) == 1:
        return _images(root, f"{folder}/{inside[0]}", unread)
    unread.update(others)
    unread.update(["folders"] * len(inside))
    return files
