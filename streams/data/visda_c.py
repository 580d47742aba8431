"""VisDA-C: rendered objects and photographs of twelve classes."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published

BASE = "http://csr.bu.edu/ftp/visda17/clf"

ABOUT = About(
    title="VisDA-C (VisDA 2017, classification)",
    paper="Peng et al., 2017",
    published="https://github.com/VisionLearningGroup/taskcv-2017-public/tree/master/classification",
    licence="non-commercial research and education, not to be passed on",
    layout="<data.root>/VISDA-C/<train or validation>/<class>/* and image_list.txt beside them",
    label_space="",
    name="visda_c",
    download=Download(
        tuple(
            Published(
                f"{BASE}/{part}.tar",
                (f"VISDA-C/{part}",),
                into="VISDA-C",
                part=part,
                optional=part == "test",
            )
            for part in ("validation", "train", "test")
        ),
        sources="addresses: the README of its repository",
    ),
)
