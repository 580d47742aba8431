"""VLCS: five classes in four older data sets of photographs."""

from __future__ import annotations

from dataclasses import dataclass

from driftline.streams.dataset import About
from driftline.streams.domain_folders import WHOLE, TrainedOnADomain
from driftline.streams.downloads import Download, Published

ABOUT = About(
    title="VLCS",
    paper="Fang et al., ICCV 2013",
    published="https://github.com/facebookresearch/DomainBed (scripts/download.py)",
    licence="none stated; that of the four sets",
    layout="<data.root>/VLCS/<Caltech101, LabelMe, SUN09 or VOC2007>/<class>/*.jpg",
    label_space="vlcs",
    name="vlcs",
    download=Download(
        (
            Published(
                "",
                tuple(f"VLCS/{name}" for name in ("Caltech101", "LabelMe", "SUN09", "VOC2007")),
                into="VLCS",
                top="VLCS",
                name="VLCS.tar.gz",
            ),
        ),
        by_hand="Load https://drive.google.com/uc?id=1skwblH1_okBwxWxmRsp9_qi15hyPpxg8 (the copy "
        "that DomainBed names) in a browser as VLCS.tar.gz, then: scripts/get_data.py vlcs "
        "--from THAT_FOLDER",
        sources="address: DomainBed",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Vlcs(TrainedOnADomain):
    """All images of a domain, in the layout of DomainBed; 224 px as there."""

    about = ABOUT
    shape = WHOLE
    classes = ("bird", "car", "chair", "dog", "person")
    tops = ("VLCS", "vlcs")
    spellings = {
        "Caltech101": ("Caltech101", "CALTECH", "caltech"),
        "LabelMe": ("LabelMe", "LABELME", "labelme"),
        "SUN09": ("SUN09", "SUN", "sun"),
        "VOC2007": ("VOC2007", "PASCAL", "pascal"),
    }
