"""VTAB-50, as class-incremental papers use it: 50 classes of five sets."""

from __future__ import annotations

from dataclasses import dataclass

from driftline.streams.dataset import About
from driftline.streams.downloads import Download
from driftline.streams.splits import SplitFolders

ABOUT = About(
    title="VTAB-50",
    paper="Zhai et al., 2019; the 50 classes: Zhou et al., IJCV 2024",
    published="https://github.com/LAMDA-CL/LAMDA-PILOT (README, section Datasets)",
    licence="that of the five sets",
    layout="<data.root>/vtab/train/<class>/* and test/<class>/*, or the same in vtab-cil/vtab",
    label_space="",
    name="vtab",
    download=Download(
        by_hand="Load the archive that the README of https://github.com/LAMDA-CL/LAMDA-PILOT "
        "links (a drive) and unpack it so that data.root/vtab/train is there",
        command="scenario=split_vtab",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Vtab(SplitFolders):
    """Ten classes of each set: Resisc45, DTD, Pets, EuroSAT, Flowers, in the order of the folders.

    The order is part of the benchmark: tasks of ten classes are sets (scenario.class_order=fixed).
    """

    about = ABOUT
    folders = ("vtab", "vtab-cil/vtab", "vtab-cil")
    classes = 50
    published = (1_796, 8_619)  # Zhou et al.
    stand_ins = 50
