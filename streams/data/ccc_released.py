"""CCC as released: images with two corruptions that change smoothly."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from driftline.core.errors import UserError, scarce
from driftline.streams.content import file_digests
from driftline.streams.data.imagenet import wnids
from driftline.streams.dataset import About
from driftline.streams.domain_folders import ImageNetDomains
from driftline.streams.downloads import Download
from driftline.streams.images import ImageError, ImageSet, fingerprint

SETTINGS = [
    f"baseline_{baseline}_transition+speed_{speed}_seed_{seed}"
    for baseline in (0, 20, 40)
    for speed in (1000, 2000, 5000)
    for seed in (43, 44, 45)
]

ABOUT = About(
    title="CCC (continuously changing corruptions), released images",
    paper="Press et al., NeurIPS 2023",
    published="https://github.com/oripress/CCC",
    licence="none stated; for the images the terms of ImageNet",
    layout="<data.root>/CCC/baseline_<0, 20 or 40>_transition+speed_<1000, 2000 or 5000>_seed_"
    "<43, 44 or 45>/serial_00000.tar, serial_00001.tar and so on",
    label_space="imagenet1k",
    name="ccc_released",
    download=Download(
        by_hand="Load the numbered archives of a setting, one after the other, from "
        "https://mlcloud.uni-tuebingen.de:7443/datasets/CCC/<setting>/serial_00000.tar and so on; "
        "scenario=ccc makes such a stream from clean ImageNet images without them",
    ),
)


@dataclass(frozen=True, kw_only=True)
class CccReleased(ImageNetDomains):
    """Images of the archives in their order, as eval.py of oripress/CCC reads them.

    With `images`, archives after those that hold so many are not opened.
    """

    about = ABOUT
    shuffled = False
    tops = ("CCC", "ccc")
    spellings = {setting: (setting,) for setting in SETTINGS}

    def read(self, root: Path, domain: str) -> ImageSet:
        wanted = None if self.images is None else self.images + self.probe_images
        return archives(self.folder(root, domain), wanted)


class Archived:
    """Images in tar files without compression.

    Args:
        folder: of the archives.
        names: of the archives.
        archive, start, size: in which of them, from which byte on, how many bytes; int64 [N].
        labels: int64 [N].
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        archive: np.ndarray,
        start: np.ndarray,
        size: np.ndarray,
        labels: np.ndarray,
    ) -> None:
        self.folder, self.names = folder, names
        self.archive, self.start, self.size = archive, start, size
        self.labels, self.class_names = labels, wnids()
        self.num_classes = len(self.class_names)

    def content(self, rows: np.ndarray | None = None) -> str:
        """Of the bytes of an archive some pieces count, and where each image begins and ends."""
        rows = np.arange(len(self.labels)) if rows is None else rows
        names = [self.names[i] for i in np.unique(self.archive[rows])]
        places = (self.archive[rows], self.start[rows], self.size[rows], self.labels[rows])
        return fingerprint("\n".join(names), file_digests(self.folder, names), *places)

    def image(self, row: int) -> Image.Image:
        path = self.folder / self.names[self.archive[row]]
        try:
            with open(path, "rb") as file:
                file.seek(self.start[row])
                content = file.read(self.size[row])
            with Image.open(io.BytesIO(content)) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, OSError) and scarce(error):
                raise
            raise ImageError(f"cannot read image {row} (in {path}): {error}") from error


def archives(folder: Path, wanted: int | None) -> Archived:
    """The images of serial_00000.tar, serial_00001.tar and so on.

    A sample is `<key>.input.jpg` and `<key>.output.cls`, the label as text.

    Args:
        wanted: open no more archives than hold so many images; None: open all.

    Raises:
        UserError: for an archive that is missing or damaged, or samples that lack a part.
    """
    names = sorted(path.name for path in folder.glob("serial_*.tar"))
    expected = [f"serial_{i:05d}.tar" for i in range(len(names))]
    missing = [name for name in expected or ["serial_00000.tar"] if name not in names]
    if missing:
        raise UserError(
            f"{folder} lacks {missing[0]}; archives have to be there from serial_00000.tar on "
            f"without a gap. {ABOUT.expected}"
        )
    rows: list[tuple[int, int, int, int]] = []
    for number, name in enumerate(tqdm(names, "reading the archives", delay=3, disable=None)):
        if wanted is not None and len(rows) >= wanted:
            names = names[:number]
            break
        rows += [(number, *place) for place in _samples(folder / name)]
    archive, start, size, labels = np.asarray(rows, np.int64).reshape(-1, 4).T
    return Archived(folder, names, archive, start, size, labels)


def _samples(path: Path) -> list[tuple[int, int, int]]:
    """First byte, bytes and label of each image of an archive, in its order."""
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key, _, part = member.name.partition(".")
                if part == "input.jpg":
                    places[key] = member.offset_data, member.size
                elif part == "output.cls":
                    file = archive.extractfile(member)
                    labels[key] = int(file.read()) if file else -1
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        if isinstance(error, OSError) and scarce(error):
            raise
        raise UserError(f"{path} is damaged ({error}); load it again. {ABOUT.how}") from error
    wrong = [key for key, label in labels.items() if not 0 <= label < len(wnids())]
    if not places or places.keys() != labels.keys() or wrong:
        raise UserError(
            f"{path} holds {len(places)} images and {len(labels)} labels, {len(wrong)} of them "
            f"outside of ImageNet-1k; it should hold <key>.input.jpg and <key>.output.cls of each. "
            f"{ABOUT.how}"
        )
    return [(*place, labels[key]) for key, place in places.items()]
