"""ObjectNet: household objects, photographed turned and in unusual places."""

from __future__ import annotations

from dataclasses import dataclass

from driftline.streams.dataset import About
from driftline.streams.downloads import Download
from driftline.streams.splits import SplitFolders

ABOUT = About(
    title="ObjectNet (200 classes)",
    paper="Barbu et al., NeurIPS 2019; the 200 of its 313 classes: Zhou et al., IJCV 2024",
    published="https://objectnet.dev/download.html",
    licence="its own: for tests alone, nothing may be tuned on it; images keep their red border",
    layout="<data.root>/objectnet/train/<class>/*.png and test/<class>/*.png",
    label_space="",
    name="objectnet",
    download=Download(
        by_hand="Read the licence at https://objectnet.dev/download.html, load objectnet-1.0.zip "
        "there and unpack it with the password that the page gives. The 200 classes of PILOT and "
        "RanPAC (train/<class>, test/<class>): https://github.com/LAMDA-CL/LAMDA-PILOT",
        command="scenario=split_objectnet",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ObjectNet(SplitFolders):
    """The split of LAMDA-PILOT, 200 of the 313 classes; RanPAC's is the same layout.

    Which classes these are is told by the folders alone: no list is published.
    """

    about = ABOUT
    folders = ("objectnet", "ObjectNet")
    classes = 200
    published = (26_509, 6_628)  # Zhou et al.
