"""CUB-200-2011: 200 kinds of birds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from driftline.streams.dataset import About, Split, first_folder
from driftline.streams.downloads import Download, Published
from driftline.streams.images import Files
from driftline.streams.listings import read_list
from driftline.streams.splits import SplitFolders, entries

ABOUT = About(
    title="CUB-200-2011",
    paper="Wah et al., Caltech technical report, 2011",
    published="https://data.caltech.edu/records/65de6-vp158",
    licence="non-commercial research and education; the rights of the images are their owners'",
    layout="<data.root>/cub/train/<class>/*.jpg and test/<class>/*.jpg; with "
    "scenario.split_by=official CUB_200_2011/images/<class>/*.jpg, images.txt and "
    "train_test_split.txt",
    label_space="",
    name="cub200",
    download=Download(
        (
            Published(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
                ("CUB_200_2011",),
                size=1_150_585_339,
                checksum="md5:97eceeb196236b17998738112f37df78",
            ),
        ),
        by_hand="The split of other papers (PILOT, RanPAC: train/<class>, test/<class>) is a file "
        "on a drive: see https://github.com/LAMDA-CL/LAMDA-PILOT",
        command="scenario=split_cub scenario.split_by=official",
        sources="size and MD5: as Avalanche and other libraries check them",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Cub200(SplitFolders):
    """The birds, in one of two splits that have only their images in common.

    Args:
        split_by: `folders`: that of LAMDA-PILOT and RanPAC, four fifths for training. `official`:
            that of the publisher, half of each class.
    """

    about = ABOUT
    folders = ("cub", "CUB", "cub200")
    classes = 200
    published = (9_430, 2_358)  # Zhou et al., IJCV 2024

    split_by: Literal["folders", "official"]

    def read(self, root: Path) -> Split:
        if self.split_by == "folders":
            return super().read(root)
        folder = first_folder(root, ["CUB_200_2011"], ["images.txt"]) or root / "CUB_200_2011"
        names = ("images", "images.txt", "train_test_split.txt")
        images, listed, chosen = entries(folder, names, ABOUT)
        names_of, part_of = numbered(listed), numbered(chosen)
        classes = sorted({name.partition("/")[0] for name in names_of.values()})

        def part(number: str) -> Files:
            files = [name for i, name in names_of.items() if part_of.get(i) == number]
            labels = [classes.index(name.partition("/")[0]) for name in files]
            return Files(images, files, np.asarray(labels, np.int64), classes)

        return self.checked(part("1"), part("0"), (5_994, 5_794))


def numbered(path: Path) -> dict[str, str]:
    """The entries of a list of CUB: a number and what it has, `17 001.Black_footed/a.jpg`."""
    lines = (line.partition(" ") for line in read_list(path))
    return {number: entry.strip() for number, _, entry in lines}
