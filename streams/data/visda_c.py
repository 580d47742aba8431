"""VisDA-C: rendered objects and photographs of twelve classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from driftline.core.errors import UserError
from driftline.streams.dataset import About
from driftline.streams.domain_folders import TrainedOnADomain, image_list
from driftline.streams.downloads import Download, Published
from driftline.streams.images import Files

BASE = "http://csr.bu.edu/ftp/visda17/clf"
COMMIT = "370d5dde1f7a3109c5caeb8247a90498b069d1e4"
LABELS = f"https://raw.githubusercontent.com/VisionLearningGroup/taskcv-2017-public/{COMMIT}"
CLASSES = (
    "aeroplane",
    "bicycle",
    "bus",
    "car",
    "horse",
    "knife",
    "motorcycle",
    "person",
    "plant",
    "skateboard",
    "train",
    "truck",
)

ABOUT = About(
    title="VisDA-C (VisDA 2017, classification)",
    paper="Peng et al., 2017",
    published="https://github.com/VisionLearningGroup/taskcv-2017-public/tree/master/classification",
    licence="non-commercial research and education, not to be passed on",
    layout="<data.root>/VISDA-C/<train or validation>/<class>/*; VISDA-C/test/<part>/*.jpg and "
    "VISDA-C/test_list.txt",
    label_space="visda_c",
    name="visda_c",
    download=Download(
        (
            *(
                Published(
                    f"{BASE}/{part}.tar",
                    (f"VISDA-C/{part}",),
                    into="VISDA-C",
                    part=part,
                    optional=part == "test",
                )
                for part in ("validation", "train", "test")
            ),
            Published(
                f"{LABELS}/classification/data/image_list.txt",
                ("VISDA-C/test_list.txt",),
                size=3_415_515,
                checksum="sha256:dcda99baf4064d7c66113422322f232ecc6b593464daa18bc43dc1b623a8bf03",
                into="VISDA-C",
                part="test",
                optional=True,
                name="test_list.txt",
            ),
        ),
        sources="addresses: the README of its repository; labels of the test: its file",
    ),
)


@dataclass(frozen=True, kw_only=True)
class VisdaC(TrainedOnADomain):
    """Rendered objects (train), photographs of COCO (validation) and of other videos (test)."""

    about = ABOUT
    classes = CLASSES
    tops = ("VISDA-C", "visda-c", "VisDA-C", "visda-2017", "VisDA2017", "visda17", "visda")
    spellings = {name: (name,) for name in ("train", "validation", "test")}

    def files(self, root: Path, domain: str) -> Files:
        """Labels by folder, which is what image_list.txt says, too; the test has the list alone."""
        if domain != "test":
            return super().files(root, domain)
        folder = self.folder(root, domain)
        lists = (folder / "image_list.txt", folder.parent / "test_list.txt")
        path = next((p for p in lists if p.is_file()), None)
        if path is None:
            raise UserError(f"{folder} has no labels: {lists[1]} is missing. {self.about.expected}")
        return image_list(path, folder, self.classes)
