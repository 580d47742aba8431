"""Labelled images of your own: class folders, or a table of labels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import driftline.core.vision  # noqa: F401  # isort: skip

import numpy as np
from PIL import Image
from torchvision import transforms as T

from driftline.core.errors import UserError, suggest
from driftline.core.ranges import Size
from driftline.streams.corrupted import (
    OUTAGES,
    Corruptions,
    corrupted,
    corruption_names,
    frost_source,
    outages,
    stand_ins,
)
from driftline.streams.data.imagenet import wnids
from driftline.streams.dataset import (
    About,
    Sources,
    Split,
    SplitData,
    SubsetData,
    existing_root,
)
from driftline.streams.images import (
    EXTENSIONS,
    Derived,
    Files,
    ImageSet,
    image_folder,
    in_classes_of,
    is_number,
    subfolders,
)
from driftline.streams.listings import read_labels, read_list
from driftline.streams.natural import STAND_INS, NaturalData
from driftline.streams.orders import Domain

ABOUT = About(
    title="class folders",
    paper="",
    published="any set of yours",
    licence="yours",
    layout="<data.root>/train/<class>/<image> and <data.root>/test/<class>/<image>",
    label_space="own",
)
EVALUATION = replace(
    ABOUT,
    layout="<data.root>/test/<class>/<image>, or class folders in data.root itself, or labels.csv "
    "(columns filename and class), or one such folder for each domain",
)
TABLE = "labels.csv"
ONE = "images"  # name of the domain where there is one


@dataclass(frozen=True, kw_only=True)
class FolderSplit(SplitData):
    """Training and test images in class folders."""

    about = ABOUT

    def read(self, root: Path) -> Split:
        train, test = (image_folder(root / s, ABOUT.expected) for s in ("train", "test"))
        in_classes_of(test, train)
        return train, test


@dataclass(frozen=True, kw_only=True)
class FolderShift(Corruptions, SubsetData, NaturalData):
    """Images of any classes, as they are or corrupted on the fly; a domain is a folder of them.

    The images of a domain lie in class folders, in its folder or in `test` (or `val`) there, or are
    listed in labels.csv. Labels are positions in the list of classes: that of `classes`; else the
    class folders of `train`, which the network was trained on; else those that there are.

    Args:
        classes: None; `imagenet1k`, where folders are synset ids; or a text file with a class a
            line, in the order of the network's outputs.
        side: images are resized to 256/224 of it (shorter side, bilinear) and cropped to it, in
            pixels; None: as stored, all of one size.
        corrupt: None: images as they are.
    """

    about = ABOUT

    classes: str | None
    side: Size | None
    corrupt: Literal["on_the_fly"] | None

    def __post_init__(self) -> None:
        if self.corrupt is None and (self.corruptions, self.severity) != ("standard", 5):
            raise UserError(
                "scenario.corruptions and scenario.severity would do nothing; add "
                "scenario.corrupt=on_the_fly"
            )

    # ---------------------------------------------------------------- classes

    @property
    def label_space(self) -> str:
        if self.data_root is not None and self.classes == "imagenet1k":
            return "imagenet1k"
        return super().label_space

    @cached_property
    def _classes(self) -> list[str]:
        """All classes, in the order of the labels."""
        root = existing_root(str(self.data_root), EVALUATION)
        if self.classes == "imagenet1k":
            return wnids()
        if self.classes is not None:
            path = Path(self.classes)
            if not path.is_file():
                raise UserError(
                    f"scenario.classes={path}: no such file; give a text file with a class a line, "
                    "in the order of the network's outputs, or imagenet1k"
                )
            names = read_list(path)
            if not names or len(set(names)) < len(names):
                raise UserError(f"scenario.classes={path} must hold each class once, a line each")
            return names
        if _has_classes(root / "train"):
            return _Labelled.of(root / "train").names
        return _sorted({name for place in self._places.values() for name in place.names})

    @property
    def subset(self) -> tuple[int, ...] | None:
        if self.data_root is None or self.classes is None:
            return None
        places = self._places.values()
        kept = {int(y) for p in places for y in np.unique(p.files(self._classes).labels)}
        return tuple(sorted(kept)) if len(kept) < len(self._classes) else None

    # ---------------------------------------------------------------- domains

    @cached_property
    def _places(self) -> dict[str, _Labelled]:
        """What lies in the folders of the domains, in stream order."""
        root = existing_root(str(self.data_root), EVALUATION)
        folders = {n: _evaluation(root / n) for n in subfolders(root) if n not in ("train", "val")}
        there = {name: folder for name, folder in folders.items() if folder is not None}
        for folder in (root / "test", root, *([] if there else [root / "val"])):
            if _has_classes(folder):
                there = {ONE: folder}
                break
        for name in self.domains or []:
            if name not in there:
                raise UserError(
                    f"scenario.domains: {name!r} is no folder of labelled images in "
                    f"{root}{suggest(name, there)}. Folders there: {', '.join(there) or 'none'}. "
                    f"{EVALUATION.expected}"
                )
        if not there:
            raise UserError(f"no labelled images under data.root={root}. {EVALUATION.expected}")
        return {name: _Labelled.of(there[name]) for name in self.domains or there}

    def names(self) -> list[str]:
        if self.data_root is None:
            places = self.domains or list(STAND_INS[:3])
            return corruption_names(self.corruptions) if self.corrupt else places
        if self.corrupt is None:
            return list(self._places)
        kinds = corruption_names(self.corruptions)
        if list(self._places) == [ONE]:
            return kinds
        return [f"{place}/{kind}" for place in self._places for kind in kinds]

    def severities(self) -> list[int]:
        return self.all_severities() if self.corrupt else [0]

    # ---------------------------------------------------------------- images

    def _fitted(self, images: ImageSet) -> ImageSet:
        if self.side is None:
            return images
        return Derived(images, partial(_fit, side=self.side), f"resize and crop {self.side}")

    def read(self, root: Path, domain: str) -> ImageSet:
        return self._fitted(self._places[domain].files(self._classes))

    def clean(self, root: Path) -> ImageSet | None:
        """Those of `val`, where the stream is of other images."""
        val = root / "val"
        if not _has_classes(val) or val in [place.folder for place in self._places.values()]:
            return None
        return self._fitted(_Labelled.of(val).files(self._classes))

    def training(self, folder: Path) -> ImageSet:
        for place in (folder / "train", folder):
            if _has_classes(place):
                return self._fitted(_Labelled.of(place).files(self._classes))
        raise UserError(
            f"no training images under {folder}: expected train/<class>/<image>. This method "
            "prepares on labelled source images: complete data.root, or set scenario.source_from "
            "to another folder of class folders"
        )

    def sources(self, domains: list[Domain]) -> Sources:
        if self.corrupt is None:
            return super().sources(domains)
        frost = frost_source(self.frost_dir)
        if self.data_root is None:
            settings = {**self.settings("cifar"), "jpeg_quality": None}
            return stand_ins({d: d for d in domains}, self, settings)
        root = existing_root(self.data_root, EVALUATION)
        bases = {place: self.read(root, place) for place in self._places}
        size = min(next(iter(bases.values())).image(0).size)
        preset = "cifar" if size < 64 else "imagenet"  # their images have 32 and 224 px
        sets: dict[Domain, ImageSet] = {}
        failing = set()
        for d in domains:
            place, _, kind = d[0].rpartition("/")
            base = bases[place or ONE]
            if kind in OUTAGES:
                failing.add(d)
                sets[d] = outages(base, [(kind, d[1])], self.corruption_seed)[kind, d[1]]
            else:
                made = corrupted(base, [(kind, d[1])], self.cache, **self.settings(preset))
                sets[d] = made[kind, d[1]]
        images = self.arranged(sets, self.clean(root))
        held_out = images.held_out
        clean = images.clean
        if clean is None and len(bases) == 1:  # the images themselves, before they are corrupted
            clean = next(iter(bases.values()))
            used = [rows for part in (images.rows, images.probe) for rows in part.values()]
            held_out = np.setdiff1d(np.arange(len(clean.labels)), np.concatenate(used))
        notes: dict[str, object] = {
            "corruptions": "generated on the fly",
            **images.notes,
            "parameters": f"those of {preset}",
            "clean": "evaluation images" if clean is not None else "none",
        }
        if "frost" in corruption_names(self.corruptions):
            notes["frost"] = frost
        return replace(
            images, clean=clean, held_out=held_out, notes=notes, unprobed=frozenset(failing)
        )


def _fit(image: Image.Image, row: int, *, side: int) -> Image.Image:
    shorter = T.Resize(int(side / 0.875), T.InterpolationMode.BILINEAR)
    return T.CenterCrop(side)(shorter(image))


def _evaluation(folder: Path) -> Path | None:
    """Where the images of a domain lie; None without any."""
    return next((p for p in (folder / "test", folder, folder / "val") if _has_classes(p)), None)


def _has_classes(folder: Path) -> bool:
    """Whether a folder holds class folders with images, or a table of labels."""
    return (folder / TABLE).is_file() or has_class_folders(folder)


def has_class_folders(folder: Path) -> bool:
    """Whether a folder holds folders with images."""
    return folder.is_dir() and any(_has_images(folder / name) for name in subfolders(folder))


def _has_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(e.name.lower().endswith(EXTENSIONS) and e.is_file() for e in entries)


@dataclass(frozen=True)
class _Labelled:
    """Images of one folder with what their labels are called."""

    folder: Path
    paths: Sequence[str]
    labels: np.ndarray  # positions in `names`
    names: list[str]
    numbered: bool  # by a table: the labels are positions in whatever list of classes

    @staticmethod
    def of(folder: Path) -> _Labelled:
        if not (folder / TABLE).is_file():
            found = image_folder(folder, EVALUATION.expected)
            return _Labelled(found.root, found.names, found.labels, list(found.class_names), False)
        table = read_labels(folder / TABLE)
        names = table.classes or [str(i) for i in range(int(table.labels.max()) + 1)]
        return _Labelled(folder, table.names, table.labels, names, table.classes is None)

    def files(self, classes: Sequence[str]) -> Files:
        """The images, their labels as positions in `classes`.

        Raises:
            UserError: for a class that is not among them.
        """
        position = {
            name: i for i, name in enumerate(range(len(classes)) if self.numbered else classes)
        }
        names = range(len(self.names)) if self.numbered else self.names
        unknown = [name for name in names if name not in position]
        if unknown:
            raise UserError(
                f"{self.folder} has classes that are not among the {len(classes)} of the list "
                f"({', '.join(classes[:3])} ...): {unknown[:5]}"
            )
        labels = np.asarray([position[name] for name in names], np.int64)[self.labels]
        return Files(self.folder, self.paths, labels, classes)


def _sorted(names: set[str]) -> list[str]:
    """In the order of class folders: as numbers where all of them are."""
    return sorted(names, key=int) if all(map(is_number, names)) else sorted(names)
