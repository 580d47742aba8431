"""VLCS: five classes in four older data sets of photographs."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published

ABOUT = About(
    title="VLCS",
    paper="Fang et al., ICCV 2013",
    published="https://github.com/facebookresearch/DomainBed (scripts/download.py)",
    licence="none stated; that of the four sets",
    layout="<data.root>/VLCS/<Caltech101, LabelMe, SUN09 or VOC2007>/<class>/*.jpg",
    label_space="",
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
