"""Where each data set lies under `data.root`, and one clear error where it does not."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from driftline.core.errors import UserError, scarce
from driftline.streams.images import Arrays, Files, ImageSet, NpyRows, fingerprint, image_folder

Cifar = Literal["cifar10", "cifar100"]

ORIGIN = {
    "imagenet_c": "https://zenodo.org/records/2235448",
    "cifar10_c": "https://zenodo.org/records/2535967",
    "cifar100_c": "https://zenodo.org/records/3555552",
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "cifar100": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "imagenet": "https://image-net.org/download.php (ILSVRC2012 validation images)",
    "imagefolder": "any set of yours",
    "domains": "any set of yours, for example DomainNet or Office-Home",
}
LAYOUT = {
    "imagenet_c": "<data.root>/ImageNet-C/<corruption>/<severity 1-5>/<wnid>/*.JPEG",
    "cifar10_c": "<data.root>/CIFAR-10-C/<corruption>.npy and labels.npy",
    "cifar100_c": "<data.root>/CIFAR-100-C/<corruption>.npy and labels.npy",
    "cifar10": "<data.root>/cifar-10-batches-py/ (torchvision's own layout)",
    "cifar100": "<data.root>/cifar-100-python/ (torchvision's own layout)",
    "imagenet": "<data.root>/val/<wnid>/*.JPEG, or flat images with labels.csv "
    "(columns filename, class_index)",
    "imagefolder": "<data.root>/train/<class>/<image> and <data.root>/test/<class>/<image>",
    "domains": "<data.root>/<domain>/train/<class>/<image> and .../test/<class>/<image>",
}


# Folders of the released layouts, any of these names.
RELEASED = {
    "imagenet_c": ["ImageNet-C", "imagenet-c", "imagenet_c"],
    "cifar10_c": ["CIFAR-10-C"],
    "cifar100_c": ["CIFAR-100-C"],
}


def expected(dataset: str) -> str:
    """The sentence that ends every missing-data error."""
    return (
        f"Expected layout: {LAYOUT[dataset]}. Published at: {ORIGIN[dataset]}. "
        "Leave data.root unset to run on the embedded stand-in images."
    )


def existing_root(root: str, dataset: str) -> Path:
    """`root` as a path.

    Raises:
        UserError: if there is no such folder.
    """
    path = Path(root)
    if not path.is_dir():
        raise UserError(f"data.root={root}: there is no such folder. {expected(dataset)}")
    return path


def _first(root: Path, names: Sequence[str], probe: Sequence[str]) -> Path | None:
    """The first of root/<name> (or root itself) that holds one of the `probe` entries."""
    for folder in [*(root / n for n in names), root]:
        if any((folder / p).exists() for p in probe):
            return folder
    return None


MANIFEST = "manifest.json"  # of scripts/generate_corruptions.py, beside what it wrote


@dataclass(frozen=True)
class Manifest:
    """How the files of a released layout were made here, and their hashes."""

    settings: dict[str, object]
    sha256: dict[str, str]  # of "<corruption>/<severity>"

    def content(self, domains: Sequence[tuple[str, int]]) -> str:
        """Hash of the settings and of what was written for `domains`; more may be added later."""
        parts = [f"{name}/{severity}" for name, severity in domains]
        sums = [self.sha256.get(part) for part in parts]
        return fingerprint(json.dumps([self.settings, parts, sums], sort_keys=True))


def generated(root: Path, dataset: str) -> Manifest | None:
    """The manifest of files that were made here; None for the released files.

    Raises:
        UserError: for a manifest that cannot be read.
    """
    folder = _first(root, RELEASED[dataset], [MANIFEST])
    if folder is None:
        return None
    try:
        content = json.loads((folder / MANIFEST).read_text())
        return Manifest(dict(content["settings"]), dict(content.get("sha256", {})))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / MANIFEST} is damaged: what these files are cannot be told. Generate them "
            "again into another folder (scripts/generate_corruptions.py)"
        ) from error


# ---------------------------------------------------------------- ImageNet


@cache
def wnids() -> list[str]:
    """The 1,000 synset ids of ImageNet-1k in label order."""
    import driftline.core.vision  # noqa: F401  # isort: skip
    from timm.data import ImageNetInfo

    return [str(name) for name in ImageNetInfo().label_names()]


def canonical(files: Files) -> Files:
    """Folder names that are synset ids get their ImageNet-1k label."""
    position = {w: i for i, w in enumerate(wnids())}
    unknown = [c for c in files.class_names if c not in position]
    if unknown:
        raise UserError(
            f"{files.root} has class folders that are no ImageNet-1k synset ids: {unknown[:3]}"
        )
    canonical = np.asarray([position[c] for c in files.class_names])
    return Files(files.root, files.names, canonical[files.labels], wnids())


GROUPS = ("noise", "blur", "weather", "digital", "extra")  # how the archives are grouped


def imagenet_c(
    root: Path, corruptions: Sequence[str], severities: Sequence[int]
) -> dict[tuple[str, int], Path]:
    """`(corruption, severity) -> folder` of the released ImageNet-C.

    Raises:
        UserError: naming every missing corruption folder.
    """
    base = _first(root, RELEASED["imagenet_c"], [*corruptions, *GROUPS])
    if base is None:
        raise UserError(
            f"ImageNet-C is not under data.root={root} (looked for {root / 'ImageNet-C'} and "
            f"{root / corruptions[0]}). {expected('imagenet_c')}"
        )
    sets, missing = {}, []
    for corruption in corruptions:
        for severity in severities:
            places = [base / corruption / str(severity)]
            places += [base / g / corruption / str(severity) for g in GROUPS]
            there = [p for p in places if p.is_dir()]
            if there:
                sets[corruption, severity] = there[0]
            else:
                missing.append(f"{corruption}/{severity}")
    if missing:
        raise UserError(
            f"{base} lacks {len(missing)} of {len(missing) + len(sets)} corruption folders: "
            f"{', '.join(missing[:6])}{' ...' if len(missing) > 6 else ''}. "
            f"{expected('imagenet_c')}"
        )
    return sets


def published_list() -> list[str]:
    """The fixed, shuffled 5,000-image list of RobustBench: `wnid/ILSVRC2012_val_*.JPEG`."""
    path = Path(__file__).with_name("lists") / "imagenet_c_5000.txt"
    return path.read_text().split()


def imagenet_clean(root: Path) -> Files:
    """Clean ImageNet images: a class-folder tree or flat files with `labels.csv`.

    Raises:
        UserError: if neither is there.
    """
    for base in (root, root / "imagenet", root / "ImageNet"):
        if (base / "labels.csv").is_file():
            try:
                with open(base / "labels.csv", newline="") as file:
                    rows = list(csv.DictReader(file))
                labels = np.asarray([int(r["class_index"]) for r in rows if r["filename"]])
            except (ValueError, TypeError, KeyError, csv.Error) as error:
                raise UserError(
                    f"{base / 'labels.csv'} needs the columns filename and class_index, a number: "
                    f"{error}"
                ) from error
            if len(labels) < max(len(rows), 1):
                raise UserError(f"{base / 'labels.csv'} needs the columns filename, class_index")
            if labels.min() < 0 or labels.max() >= 1000:
                raise UserError(f"{base / 'labels.csv'}: class_index must lie in 0..999")
            return Files(base, [r["filename"] for r in rows], labels, wnids())
    for base in (root / "imagenet" / "val", root / "ImageNet" / "val", root / "val", root):
        if base.is_dir() and any(e.is_dir() and e.name.startswith("n0") for e in os.scandir(base)):
            return canonical(image_folder(base, expected("imagenet")))
    raise UserError(f"no clean ImageNet images under data.root={root}. {expected('imagenet')}")


def imagenet_train(root: Path) -> Files:
    """Labelled ImageNet training images, `<root>/train/<wnid>/*.JPEG` or class folders in `root`.

    Raises:
        UserError: if there are none.
    """
    for base in (root / "imagenet" / "train", root / "ImageNet" / "train", root / "train", root):
        if base.is_dir() and any(e.is_dir() and e.name.startswith("n0") for e in os.scandir(base)):
            return canonical(image_folder(base, expected("imagenet")))
    raise UserError(
        f"no ImageNet training images under {root}: expected train/<wnid>/*.JPEG. This method "
        "prepares on labelled source images: complete data.root, or set scenario.source_from to "
        "another folder of class folders, or to held_out (clean images outside the stream)"
    )


# ---------------------------------------------------------------- CIFAR


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
    folder = root / kind.base_folder

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
                f"{which} is missing or damaged: {path} ({error}). {expected(which)}"
            ) from error

    parts = [content(name, md5) for name, md5 in (kind.train_list if train else kind.test_list)]
    pixels = np.vstack([part["data"] for part in parts]).reshape(-1, 3, 32, 32)
    labels = [y for part in parts for y in part.get("labels", part.get("fine_labels"))]
    names = content(kind.meta["filename"], kind.meta["md5"])[kind.meta["key"]]
    return Arrays(pixels.transpose(0, 2, 3, 1), np.asarray(labels), list(names))


def intact(content: bytes, md5: str) -> bool:
    """Whether a file of CIFAR is the published one."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest() == md5


def _npy(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """An array of a .npy file.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        return np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read the array {path}: {error}; copy it here again") from error


def cifar_c(
    root: Path, which: Cifar, corruptions: Sequence[str], severities: Sequence[int]
) -> dict[tuple[str, int], ImageSet]:
    """`(corruption, severity) -> images`: rows 10000(s-1) ... 10000 s - 1 of each .npy file.

    Raises:
        UserError: naming every missing file, or a file of the wrong shape.
    """
    key = f"{which}_c"
    names = RELEASED[key]
    base = _first(root, names, ["labels.npy", *(f"{c}.npy" for c in corruptions)])
    if base is None:
        raise UserError(f"{root / names[0]} does not exist. {expected(key)}")
    files = ["labels.npy", *(f"{c}.npy" for c in corruptions)]
    missing = [f for f in files if not (base / f).is_file()]
    if missing:
        raise UserError(
            f"{base} lacks {len(missing)} of {len(files)} files: {', '.join(missing[:6])}"
            f"{' ...' if len(missing) > 6 else ''}. {expected(key)}"
        )
    labels = _npy(base / "labels.npy")
    number = 10 if which == "cifar10" else 100
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not set(labels) <= set(range(number)):
        raise UserError(f"{base / 'labels.npy'}: expected labels 0..{number - 1}, one an image")
    block = len(labels) // 5
    classes = [str(i) for i in range(number)]
    sets: dict[tuple[str, int], ImageSet] = {}
    for corruption in corruptions:
        path = base / f"{corruption}.npy"
        pixels = _npy(path, "r")
        shape = pixels.shape
        if len(shape) != 4 or shape[0] != 5 * block or shape[3] != 3 or pixels.dtype != np.uint8:
            raise UserError(
                f"{path}: expected {5 * block} images uint8 [N, H, W, 3], found {pixels.dtype} "
                f"{shape}"
            )
        for severity in severities:
            start = block * (severity - 1)
            rows = labels[start : start + block]
            sets[corruption, severity] = NpyRows(path, start, rows, classes)
    return sets
