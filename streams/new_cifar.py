"""New test images for the classes of CIFAR-10, stored as arrays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from driftline.core.errors import UserError
from driftline.streams.data.cifar10 import CLASSES, cifar, cifar_beside
from driftline.streams.domain_folders import DomainFolders
from driftline.streams.images import Arrays, ImageSet


@dataclass(frozen=True, kw_only=True)
class NewCifar10(DomainFolders):
    """Each domain is a few files with images uint8 [N, 32, 32, 3] and their labels 0 to 9."""

    all_files: ClassVar[Mapping[str, Sequence[str]]]  # domain -> names of its files

    def known(self) -> list[str]:
        return list(self.all_files)

    def places(self, root: Path, domain: str) -> list[Path]:
        """The first of its files, wherever it may lie."""
        return [
            folder / self.all_files[domain][0] for folder in (*map(root.joinpath, self.tops), root)
        ]

    def place(self, root: Path, domain: str) -> Path | None:
        for place in self.places(root, domain):
            if all(place.with_name(name).is_file() for name in self.all_files[domain]):
                return place
        return None

    @abstractmethod
    def arrays(self, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels out of these files.

        Raises:
            UserError: for files that cannot be read.
        """

    def read(self, root: Path, domain: str) -> ImageSet:
        first = self.folder(root, domain)
        pixels, labels = self.arrays([first.with_name(name) for name in self.all_files[domain]])
        fits = pixels.dtype == np.uint8 and pixels.shape == (len(labels), 32, 32, 3)
        if labels.ndim != 1 or not fits or not set(labels.tolist()) <= set(range(10)):
            raise UserError(
                f"{first}: expected images uint8 [N, 32, 32, 3] with labels 0..9, "
                f"found {pixels.dtype} {pixels.shape} with {len(labels)} labels"
            )
        return Arrays(pixels, labels, CLASSES)

    def clean(self, root: Path) -> ImageSet | None:
        """The test images of CIFAR-10, where they lie beside the set."""
        return cifar_beside(root, "cifar10")

    def training(self, folder: Path) -> ImageSet:
        return cifar(folder, "cifar10", train=True)
