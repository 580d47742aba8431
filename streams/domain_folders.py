"""Natural shifts that are stored as folders: one a domain, with class folders in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import driftline.core.vision  # noqa: F401  # isort: skip

import numpy as np
from PIL import Image
from torchvision import transforms as T

from driftline.core.errors import UserError, suggest
from driftline.streams.data.imagenet import canonical, cropped, imagenet_beside, imagenet_train
from driftline.streams.dataset import Sources, existing_root
from driftline.streams.images import Derived, Files, ImageSet, image_folder, still_packed
from driftline.streams.listings import read_labelled
from driftline.streams.natural import NaturalData
from driftline.streams.orders import Domain

WHOLE = "resize 224 x 224"  # DomainBed
SQUARE = "resize 256 x 256, crop 224"  # SHOT, AdaContrast
_BILINEAR = T.InterpolationMode.BILINEAR
_SHAPES = {
    WHOLE: T.Resize([224, 224], _BILINEAR),
    SQUARE: T.Compose([T.Resize([256, 256], _BILINEAR), T.CenterCrop(224)]),
}


def _shape(image: Image.Image, row: int, *, shape: str) -> Image.Image:
    return _SHAPES[shape](image)


@dataclass(frozen=True, kw_only=True)
class DomainFolders(NaturalData):
    """Domains that lie under data.root under one of several names each."""

    tops: ClassVar[Sequence[str]] = ()  # folders around the domains, as people have them
    spellings: ClassVar[Mapping[str, Sequence[str]]]  # domain -> names its folder may have

    def known(self) -> list[str]:
        return list(self.spellings)

    def places(self, root: Path, domain: str) -> list[Path]:
        """Where the domain may lie, best first; `root` itself, where it is the domain's folder."""
        names = self.spellings[domain]
        around = [*(root / top for top in self.tops), root]
        itself = [root] if root.resolve().name in names else []
        return [*(folder / name for folder in around for name in names), *itself]

    def place(self, root: Path, domain: str) -> Path | None:
        """Where the domain lies; None: nowhere."""
        return next((p for p in self.places(root, domain) if p.is_dir()), None)

    def sources(self, domains: list[Domain]) -> Sources:
        if self.data_root is not None:
            self.require(existing_root(self.data_root, self.about), [name for name, _ in domains])
        return super().sources(domains)

    def require(self, root: Path, domains: Sequence[str]) -> None:
        """Of all that is missing there is one error.

        Raises:
            UserError: naming the domains that are not under `root`.
        """
        missing = [d for d in domains if self.place(root, d) is None]
        if missing:
            first = self.places(root, missing[0])[0]
            around = dict.fromkeys(p.parent for p in self.places(root, missing[0]))
            raise UserError(
                f"data.root={root} lacks {len(missing)} of {len(domains)} domains of "
                f"{self.about.title}: {', '.join(missing)} (looked for {first}). "
                f"{still_packed(*around)}{self.about.expected}"
            )

    def folder(self, root: Path, domain: str) -> Path:
        """As `place`, for a domain that is needed.

        Raises:
            UserError: as `require`.
        """
        self.require(root, [domain])
        place = self.place(root, domain)
        assert place is not None
        return place


@dataclass(frozen=True, kw_only=True)
class ImageNetDomains(DomainFolders):
    """Class folders named by synset id, or by label, with the classes of ImageNet-1k."""

    numbered: ClassVar[bool] = False  # folders are named by label in the published files

    def files(self, root: Path, domain: str) -> Files:
        folder = self.folder(root, domain)
        return canonical(image_folder(folder, self.about.expected), numbered=self.numbered)

    def read(self, root: Path, domain: str) -> ImageSet:
        return cropped(self.files(root, domain))

    def clean(self, root: Path) -> ImageSet | None:
        """The validation images, where they lie beside the set."""
        files = imagenet_beside(root)
        if files is None:
            return None
        places = [self.place(root, domain) for domain in self.known()]
        if any(place is not None and files.root.is_relative_to(place) for place in places):
            return None  # data.root is the folder of the set itself
        return cropped(files)

    def training(self, folder: Path) -> ImageSet:
        return cropped(imagenet_train(folder))


@dataclass(frozen=True, kw_only=True)
class TrainedOnADomain(DomainFolders):
    """Domains with the same classes, on one of which the network was trained.

    Args:
        source: that domain; it is no part of the stream unless `domains` names it, and its images
            are the source images. None: the network was trained on something else.
    """

    classes: ClassVar[Sequence[str]]  # in the order of the labels
    shape: ClassVar[str] = SQUARE

    source: str | None

    def names(self) -> list[str]:
        known = self.known()
        if self.source is not None and self.source not in known:
            raise UserError(
                f"scenario.source: {self.source!r} is no domain of {self.about.title}"
                f"{suggest(self.source, known)}. Known: {', '.join(known)}"
            )
        names = super().names()
        return names if self.domains else [name for name in names if name != self.source]

    def shaped(self, files: Files) -> ImageSet:
        """Images of 224 px, as networks for the set are given them."""
        return Derived(files, partial(_shape, shape=self.shape), self.shape)

    def read(self, root: Path, domain: str) -> ImageSet:
        return self.shaped(self.files(root, domain))

    def files(self, root: Path, domain: str) -> Files:
        return self.labelled(image_folder(self.folder(root, domain), self.about.expected))

    def labelled(self, files: Files) -> Files:
        """Labels by the names of the class folders, in any case.

        Raises:
            UserError: for folders that are no class of the set.
        """
        position = {name.lower(): i for i, name in enumerate(self.classes)}
        unknown = [c for c in files.class_names if c.lower() not in position]
        if unknown:
            raise UserError(
                f"{files.root} has folders that are no classes of {self.about.title}: "
                f"{', '.join(unknown[:3])}{suggest(unknown[0], self.classes)}. "
                f"{self.about.expected}"
            )
        labels = np.asarray([position[c.lower()] for c in files.class_names])
        return Files(files.root, files.names, labels[files.labels], self.classes)

    def training(self, folder: Path) -> ImageSet:
        """The images of the source domain in the layout of the set, or class folders."""
        if self.source is None:
            raise UserError(
                "scenario.source=null: name the domain that the network was trained on, whose "
                "images this method prepares on"
            )
        if self.place(folder, self.source) is None and str(folder) != self.data_root:
            return self.shaped(self.labelled(image_folder(folder, self.about.expected)))
        return self.read(folder, self.source)


def image_list(path: Path, folder: Path, classes: Sequence[str]) -> Files:
    """Images of a list with a path and a label a line.

    Args:
        folder: what the paths are relative to.
        classes: in the order of the labels.

    Raises:
        UserError: naming the line, if it is no such list.
    """
    names, labels = read_labelled(path, len(classes))
    return Files(folder, names, labels, classes)
