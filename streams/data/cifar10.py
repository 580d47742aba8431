"""CIFAR-10: reading it, and its classes as tasks; what CIFAR-100 shares with it."""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from driftline.core.errors import UserError, scarce
from driftline.streams.dataset import About, Split, SplitData, about, first_folder
from driftline.streams.downloads import Download, Published
from driftline.streams.images import Arrays, still_packed

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

ABOUT = About(
    title="CIFAR-10",
    paper="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    published="https://www.cs.toronto.edu/~kriz/cifar.html",
    licence="none stated; the authors ask for a citation",
    layout="<data.root>/cifar-10-batches-py/ (torchvision's own layout)",
    label_space="cifar10",
    class_names=CLASSES,
    name="cifar10",
    download=Download(
        (
            Published(
                "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                ("cifar-10-batches-py",),
                size=170_498_071,
                checksum="md5:c58f30108f718f92721af3b95e74349a",
            ),
        ),
        command="scenario=split_cifar10",
        sources="MD5: torchvision",
    ),
)

Cifar = Literal["cifar10", "cifar100"]


@dataclass(frozen=True, kw_only=True)
class Cifar10(SplitData):
    """The official training and test images."""

    about = ABOUT
    cifar = True
    stand_ins = 10
    which: ClassVar[Cifar] = "cifar10"

    def read(self, root: Path) -> Split:
        return cifar(root, self.which, train=True), cifar(root, self.which, train=False)


class _Plain(pickle.Unpickler):
    """Reads arrays, numbers, texts, lists and dictionaries; calls nothing that a file names."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in ARRAYS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no data")


# What NumPy's arrays are made of in a pickle, under its old and its new name.
ARRAYS = {f"{m}.multiarray._reconstruct" for m in ("numpy.core", "numpy._core")}
ARRAYS |= {"numpy.ndarray", "numpy.dtype", "_codecs.encode"}


def cifar(root: Path, which: Cifar, *, train: bool) -> Arrays:
    """CIFAR-10/100 in the layout and with the MD5 sums that torchvision knows.

    The files are pickles. They are read by a reader of our own, which makes nothing but data of
    them.

    Raises:
        UserError: if the files are missing or damaged.
    """
    import driftline.core.vision  # noqa: F401  # isort: skip
    from torchvision import datasets

    kind = datasets.CIFAR10 if which == "cifar10" else datasets.CIFAR100
    folder = first_folder(root, [kind.base_folder], [kind.meta["filename"]])
    folder = folder or root / kind.base_folder

    def content(name: str, md5: str) -> dict[str, Any]:
        path = folder / name
        try:
            text = path.read_bytes()
            if not intact(text, md5):
                raise ValueError("its MD5 sum is not the published one")
            return _Plain(io.BytesIO(text), encoding="latin1").load()
        except MemoryError:
            raise
        except Exception as error:  # pickles raise whatever their bytes lead to
            if isinstance(error, OSError) and scarce(error):
                raise
            raise UserError(
                f"{which} is missing or damaged: {path} ({error}). "
                f"{still_packed(root, named=kind.filename)}{about(which).expected}"
            ) from error

    parts = [content(name, md5) for name, md5 in (kind.train_list if train else kind.test_list)]
    pixels = np.vstack([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
    labels = [y for part in parts for y in part.get("labels", part.get("fine_labels"))]
    names = content(kind.meta["filename"], kind.meta["md5"])[kind.meta["key"]]
    return Arrays(pixels.transpose(0, 2, 3, 1), np.asarray(labels), list(names))


def cifar_beside(root: Path, which: Cifar) -> Arrays | None:
    """The test images, for sets that come without them; None where there are none."""
    try:
        return cifar(root, which, train=False)
    except UserError:
        return None


def intact(content: bytes, md5: str) -> bool:
    """Whether a file of CIFAR is the published one."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == md5
