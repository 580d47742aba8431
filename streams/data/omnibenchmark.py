"""OmniBenchmark, as class-incremental papers use it: 300 classes of many realms."""

from __future__ import annotations

from dataclasses import dataclass

from driftline.streams.dataset import About
from driftline.streams.downloads import Download
from driftline.streams.splits import SplitFolders

ABOUT = About(
    title="OmniBenchmark (300 classes)",
    paper="Zhang et al., ECCV 2022; the 300 classes: Zhou et al., IJCV 2024",
    published="https://github.com/LAMDA-CL/LAMDA-PILOT (README, section Datasets)",
    licence="the rights of the images are their owners'",
    layout="<data.root>/omnibenchmark/train/<class>/* and test/<class>/*",
    label_space="",
    name="omnibenchmark",
    download=Download(
        by_hand="Load the archive that the README of https://github.com/LAMDA-CL/LAMDA-PILOT "
        "links (a drive) and unpack it so that data.root/omnibenchmark/train is there",
        command="scenario=split_omnibenchmark",
    ),
)


@dataclass(frozen=True, kw_only=True)
class OmniBenchmark(SplitFolders):
    """The split of LAMDA-PILOT; RanPAC's is the same layout."""

    about = ABOUT
    folders = ("omnibenchmark", "OmniBenchmark")
    classes = 300
    published = (89_697, 5_985)  # Zhou et al.
