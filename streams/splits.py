"""Named sets of continual learning: training and test images, and what is published of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from driftline.core.errors import UserError
from driftline.streams.dataset import About, Split, SplitData, first_folder
from driftline.streams.images import Files, image_folder, in_classes_of, still_packed


@dataclass(frozen=True, kw_only=True)
class NamedSplit(SplitData):
    """A set of which the number of classes is published, and mostly that of images."""

    classes: ClassVar[int]

    def checked(self, train: Files, test: Files, published: tuple[int, int] | None = None) -> Split:
        """Both parts, if they are of this set.

        Args:
            published: images for training and for the test; where others are found, that is a
                warning.

        Raises:
            UserError: for another number of classes, naming it.
        """
        for part in (train, test):
            if part.num_classes != self.classes:
                raise UserError(
                    f"{part.root} has {part.num_classes} classes, but {self.about.title} has "
                    f"{self.classes}: complete it, or learn the classes of any train/<class> and "
                    f"test/<class> with scenario=split_imagefolder. {self.about.expected}"
                )
        here = (len(train.labels), len(test.labels))
        if published is not None and here != published:
            warnings.warn(
                f"{self.about.title}: {here[0]:,} training and {here[1]:,} test images are under "
                f"{train.root.parent}, {published[0]:,} and {published[1]:,} are published; "
                "results are not those of the published split",
                stacklevel=2,
            )
        return train, test


@dataclass(frozen=True, kw_only=True)
class SplitFolders(NamedSplit):
    """Class folders in a folder for training and one for the test.

    So LAMDA-PILOT and RanPAC distribute their sets; the folders are the split, no list of it is
    published. Labels follow the names of the folders sorted as texts (10 before 2), as
    torchvision's ImageFolder sorts them, so that a class order means the classes it means there.
    """

    folders: ClassVar[Sequence[str]]  # under data.root, which hold the two parts
    published: ClassVar[tuple[int, int] | None] = None  # images in the two parts

    def read(self, root: Path) -> Split:
        train, test = class_folders(root, self.folders, ("train", "test"), self.about)
        return self.checked(train, test, self.published)


def entries(folder: Path, names: Sequence[str], about: About) -> list[Path]:
    """Files or folders that a set needs in `folder`.

    Raises:
        UserError: naming every one that is missing.
    """
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        packed = still_packed(folder) or still_packed(folder.parent)
        raise UserError(f"{folder} lacks {', '.join(missing)}. {packed}{about.expected}")
    return [folder / name for name in names]


def class_folders(
    root: Path, folders: Sequence[str], parts: tuple[str, str], about: About
) -> tuple[Files, Files]:
    """Training and test images of <root>/<folder>/<part>/<class>/<image>, with the same labels.

    Args:
        folders: names of which the first that is there counts; `root` itself, too.
        parts: names for training and test.

    Raises:
        UserError: naming every part that is missing.
    """
    place = first_folder(root, folders, parts)
    missing = [part for part in parts if place is None or not (place / part).is_dir()]
    if missing:
        packed = still_packed(root) or still_packed(place or root)
        raise UserError(
            f"{place or root / folders[0]} lacks {' and '.join(missing)}. {packed}{about.expected}"
        )
    assert place is not None
    train, test = (by_text(image_folder(place / part, about.expected)) for part in parts)
    in_classes_of(test, train)
    return train, test


def by_text(files: Files) -> Files:
    """Classes, and images with them, in the order of the names of the classes as texts."""
    names = sorted(files.class_names)
    labels = np.asarray([names.index(name) for name in files.class_names])[files.labels]
    rows = np.argsort(labels, kind="stable")
    return Files(files.root, [files.names[row] for row in rows], labels[rows], names)


def matlab(path: Path, about: About) -> dict[str, Any]:
    """The variables of a MATLAB file, read by SciPy.

    Raises:
        UserError: without SciPy, or if the file cannot be read.
    """
    try:
        from scipy.io import loadmat  # pyrefly: ignore[missing-import]
    except ImportError as error:
        raise UserError(f"{path} is read by SciPy: pip install scipy") from error
    try:
        return loadmat(path, squeeze_me=True)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read ({error}). {about.expected}") from error
