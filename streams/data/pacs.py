"""PACS: photos, art, cartoons and sketches of seven classes."""

from __future__ import annotations

from dataclasses import dataclass

from driftline.streams.dataset import About
from driftline.streams.domain_folders import WHOLE, TrainedOnADomain
from driftline.streams.downloads import Download, Published

ABOUT = About(
    title="PACS",
    paper="Li et al., ICCV 2017",
    published="https://github.com/facebookresearch/DomainBed (scripts/download.py)",
    licence="none stated; research",
    layout="<data.root>/PACS/<art_painting, cartoon, photo or sketch>/<class>/*.jpg",
    label_space="pacs",
    name="pacs",
    download=Download(
        (
            Published(
                "",
                ("PACS/photo", "PACS/art_painting", "PACS/cartoon", "PACS/sketch"),
                into="PACS",
                top="kfold",
                name="PACS.zip",
            ),
        ),
        by_hand="Load https://drive.google.com/uc?id=1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd (the copy "
        "that DomainBed names) in a browser as PACS.zip, then: scripts/get_data.py pacs "
        "--from THAT_FOLDER",
        sources="address: DomainBed",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Pacs(TrainedOnADomain):
    """All images of a domain, without the splits that some papers make; 224 px as in DomainBed."""

    about = ABOUT
    shape = WHOLE
    classes = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    tops = ("PACS", "PACS/kfold", "pacs", "pacs_data", "kfold")
    spellings = {name: (name,) for name in ("photo", "art_painting", "cartoon", "sketch")}
