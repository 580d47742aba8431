"""VTAB-50, as class-incremental papers use it: 50 classes of five sets."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download

ABOUT = About(
    title="VTAB-50",
    paper="Zhai et al., 2019; the 50 classes: Zhou et al., IJCV 2024",
    published="https://github.com/LAMDA-CL/LAMDA-PILOT (README, section Datasets)",
    licence="that of the five sets",
    layout="<data.root>/vtab/train/<class>/* and test/<class>/*",
    label_space="",
    name="vtab",
    download=Download(
        by_hand="Load the archive that the README of https://github.com/LAMDA-CL/LAMDA-PILOT "
        "links (a drive) and unpack it so that data.root/vtab/train is there",
    ),
)
