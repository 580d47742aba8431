"""5-datasets: ten classes each of SVHN, MNIST, CIFAR-10, notMNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import MinLen, Predicate
from PIL import Image

from driftline.core.errors import UserError
from driftline.core.ranges import distinct
from driftline.streams.data.cifar10 import cifar
from driftline.streams.dataset import About, Split, SplitData
from driftline.streams.downloads import Download, Published
from driftline.streams.images import Arrays, Files, ImageSet, fingerprint, image_folder, unreadable
from driftline.streams.splits import entries, matlab

ACL = "https://github.com/facebookresearch/Adversarial-Continual-Learning"
ABOUT = About(
    title="5-datasets",
    paper="Ebrahimi et al., ECCV 2020",
    published=f"{ACL} (notMNIST), torchvision.datasets (the others)",
    licence="that of the five sets; none is stated for notMNIST",
    layout="<data.root>/SVHN/train_32x32.mat and test_32x32.mat, MNIST/raw/*-ubyte (or .gz), "
    "cifar-10-batches-py/, notMNIST/Train/<letter>/*.png and Test/, FashionMNIST/raw/*-ubyte",
    label_space="",
    name="five_datasets",
    download=Download(
        (
            Published(
                f"{ACL}/raw/master/data/notMNIST.zip",
                ("notMNIST/Train", "notMNIST/Test"),
            ),
        ),
        by_hand="The other four: scripts/get_data.py cifar10, and torchvision, which checks them: "
        "pip install scipy; python -c 'from torchvision import datasets as d; "
        'r = "DATA_ROOT"; d.MNIST(r, download=True); d.FashionMNIST(r, download=True); '
        '[d.SVHN(r + "/SVHN", s, download=True) for s in ("train", "test")]\'',
        command="scenario=five_datasets",
        sources="address: Ebrahimi et al., whose file has no published checksum",
    ),
)
Name = Literal["svhn", "mnist", "cifar10", "notmnist", "fashion_mnist"]
DIGITS = [str(i) for i in range(10)]
CLOTHES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag"]
CLOTHES += ["ankle boot"]


@dataclass(frozen=True, kw_only=True)
class FiveDatasets(SplitData):
    """The sets one after the other; ten classes a task and scenario.class_order=fixed keep it so.

    Args:
        sets: which of them, in which order.
    """

    about = ABOUT
    stand_ins = 50

    sets: Annotated[list[Name], MinLen(1), Predicate(distinct)]

    def read(self, root: Path) -> Split:
        readers = {"svhn": svhn, "mnist": mnist, "cifar10": cifar10, "notmnist": notmnist}
        readers["fashion_mnist"] = fashion_mnist
        found = [readers[name](root) for name in self.sets]
        return Joined(self.sets, [t for t, _ in found]), Joined(self.sets, [t for _, t in found])


class Joined:
    """Several sets as one, with the classes of each after those of the one before.

    Args:
        names: of the sets, which come before the names of their classes.
    """

    def __init__(self, names: Sequence[str], sets: Sequence[ImageSet]) -> None:
        self.sets = list(sets)
        self.class_names = [
            f"{n} {c}" for n, s in zip(names, sets, strict=True) for c in s.class_names
        ]
        self.num_classes = len(self.class_names)
        before = np.cumsum([0, *(s.num_classes for s in sets)])
        self.labels = np.concatenate([s.labels + n for s, n in zip(sets, before, strict=False)])
        self._starts = np.cumsum([0, *(len(s.labels) for s in sets)])

    def _of(self, rows: np.ndarray | None) -> list[np.ndarray]:
        """Rows of each set."""
        rows = np.arange(len(self.labels)) if rows is None else rows
        spans = zip(self._starts[:-1], self._starts[1:], strict=True)
        return [rows[(rows >= a) & (rows < b)] - a for a, b in spans]

    def content(self, rows: np.ndarray | None = None) -> str:
        parts = zip(self.sets, self._of(rows), strict=True)
        return fingerprint(*(images.content(own) for images, own in parts))

    def unreadable(self, rows: np.ndarray | None = None) -> list[Path]:
        parts = zip(self.sets, self._of(rows), strict=True)
        return [path for images, own in parts for path in unreadable(images, own)]

    def image(self, row: int) -> Image.Image:
        place = int(np.searchsorted(self._starts, row, "right")) - 1
        return self.sets[place].image(int(row - self._starts[place]))


class Grey(Arrays):
    """Grey images held in memory, uint8 [N, H, W]."""

    def image(self, row: int) -> Image.Image:
        return super().image(row).convert("RGB")


def mnist(root: Path, folder: str = "MNIST", classes: Sequence[str] = DIGITS) -> Split:
    """The files of MNIST and of Fashion-MNIST, as they are published or unpacked.

    Raises:
        UserError: for missing or damaged files.
    """
    raw = root / folder / "raw"
    parts = [
        f"{p}-{kind}-ubyte" for p in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
    ]
    there = [name if (raw / name).is_file() else f"{name}.gz" for name in parts]
    arrays = [idx(path) for path in entries(raw, there, ABOUT)]
    for pixels, labels, name in zip(arrays[::2], arrays[1::2], there[::2], strict=True):
        if pixels.ndim != 3 or labels.shape != pixels.shape[:1] or labels.max(initial=0) > 9:
            raise UserError(f"{raw / name} and its labels do not belong together")
    train, test = (Grey(arrays[i], arrays[i + 1], classes) for i in (0, 2))
    return train, test


def fashion_mnist(root: Path) -> Split:
    return mnist(root, "FashionMNIST", CLOTHES)


def idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format of MNIST: a magic number, the sizes, the values.

    Raises:
        UserError: for another file.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        zero, kind, axes = int.from_bytes(content[:2], "big"), content[2], content[3]
        sizes = np.frombuffer(content, ">u4", axes, offset=4).astype(int)
        if zero or kind != 8:
            raise ValueError("its beginning is another one")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(sizes)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(
            f"{path} is no file of MNIST's format ({error}). {ABOUT.expected}"
        ) from error


def svhn(root: Path) -> Split:
    """House numbers; the files name the digit 0 with 10."""
    tables = entries(root / "SVHN", ("train_32x32.mat", "test_32x32.mat"), ABOUT)

    def part(path: Path) -> Arrays:
        table = matlab(path, ABOUT)
        labels = np.asarray(table["y"], np.int64).reshape(-1) % 10
        return Arrays(np.ascontiguousarray(table["X"].transpose(3, 0, 1, 2)), labels, DIGITS)

    train, test = map(part, tables)
    return train, test


def cifar10(root: Path) -> Split:
    return cifar(root, "cifar10", train=True), cifar(root, "cifar10", train=False)


def notmnist(root: Path) -> Split:
    """Letters A to J; a few files are damaged, which data.on_error=skip leaves out."""
    parts = entries(root / "notMNIST", ("Train", "Test"), ABOUT)

    def part(place: Path) -> Files:
        files = image_folder(place, ABOUT.expected)
        if list(files.class_names) != list("ABCDEFGHIJ"):
            raise UserError(f"{place} has other folders than A to J. {ABOUT.expected}")
        return files

    train, test = map(part, parts)
    return train, test
