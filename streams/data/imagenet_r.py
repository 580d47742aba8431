"""ImageNet-R: renditions of 200 ImageNet classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from driftline.streams.dataset import About, Split, SubsetData
from driftline.streams.domain_folders import ImageNetDomains
from driftline.streams.downloads import Download, Published
from driftline.streams.images import Files
from driftline.streams.listings import read_list
from driftline.streams.splits import SplitFolders, entries

# Labels of ImageNet-1k, from eval.py of hendrycks/imagenet-r;
# bethgelab/robustness has the same ones.
SUBSET = (
    1, 2, 4, 6, 8, 9, 11, 13, 22, 23, 26, 29, 31, 39, 47, 63, 71, 76, 79, 84, 90, 94, 96, 97, 99,
    100, 105, 107, 113, 122, 125, 130, 132, 144, 145, 147, 148, 150, 151, 155, 160, 161, 162, 163,
    171, 172, 178, 187, 195, 199, 203, 207, 208, 219, 231, 232, 234, 235, 242, 245, 247, 250, 251,
    254, 259, 260, 263, 265, 267, 269, 276, 277, 281, 288, 289, 291, 292, 293, 296, 299, 301, 308,
    309, 310, 311, 314, 315, 319, 323, 327, 330, 334, 335, 337, 338, 340, 341, 344, 347, 353, 355,
    361, 362, 365, 366, 367, 368, 372, 388, 390, 393, 397, 401, 407, 413, 414, 425, 428, 430, 435,
    437, 441, 447, 448, 457, 462, 463, 469, 470, 471, 472, 476, 483, 487, 515, 546, 555, 558, 570,
    579, 583, 587, 593, 594, 596, 609, 613, 617, 621, 629, 637, 657, 658, 701, 717, 724, 763, 768,
    774, 776, 779, 780, 787, 805, 812, 815, 820, 824, 833, 847, 852, 866, 875, 883, 889, 895, 907,
    928, 931, 932, 933, 934, 936, 937, 943, 945, 947, 948, 949, 951, 953, 954, 957, 963, 965, 967,
    980, 981, 983, 988,
)  # fmt: skip

CODA = "6417d4f68754be68b697c7ca2323ee61e791e1a3"  # commit of GT-RIPL/CODA-Prompt
SPLITS = {  # list -> bytes, SHA-256
    "imagenet-r_train.yaml": (
        1_137_662,
        "6bcaa14ca9359915ac3a44c48ae71388146385686eb15da79a37844421a0b845",
    ),
    "imagenet-r_test.yaml": (
        284_216,
        "57275ac242d68983a4f39ccb81ec34f48b1bd920b9cd79e6e8040d7c042db02a",
    ),
}

ABOUT = About(
    title="ImageNet-R",
    paper="Hendrycks et al., ICCV 2021",
    published="https://github.com/hendrycks/imagenet-r",
    licence="MIT, as its repository; the rights of the images are their owners'",
    layout="<data.root>/imagenet-r/<wnid>/*.jpg; in tasks imagenet-r/train/<wnid>/*.jpg and "
    "test/<wnid>/*.jpg, or with scenario.split_by=coda the first and imagenet-r-splits/",
    label_space="imagenet1k",
    subset=SUBSET,
    name="imagenet_r",
    download=Download(
        (
            Published(
                "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
                ("imagenet-r",),
                size=2_191_079_936,
                checksum="sha256:18c6bf493b39a0d975d48e587437f562caab9c52ae6327dcfa9dd8eb54aa1b52",
            ),
            *(
                Published(
                    "https://raw.githubusercontent.com/GT-RIPL/CODA-Prompt/"
                    f"{CODA}/dataloaders/splits/{name}",
                    (f"imagenet-r-splits/{name}",),
                    size=size,
                    checksum=f"sha256:{sha256}",
                    into="imagenet-r-splits",
                    part="splits",
                    optional=True,
                )
                for name, (size, sha256) in SPLITS.items()
            ),
        ),
        sources="size and SHA-256: TensorFlow Datasets (imagenet_r); splits: the files of "
        "CODA-Prompt at one commit",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ImageNetR(SubsetData, ImageNetDomains):
    """All its images, resized and cropped to 224 px as the official code does it."""

    about = ABOUT
    spellings = {"imagenet_r": ("imagenet-r", "ImageNet-R", "imagenet_r")}


@dataclass(frozen=True, kw_only=True)
class ImageNetRTasks(SplitFolders):
    """Four fifths of the images for training, as one of two sources draws them.

    Args:
        split_by: `folders`: those of LAMDA-PILOT and RanPAC. `coda`: the lists of CODA-Prompt on
            the published images (scripts/get_data.py imagenet_r --parts splits).
    """

    about = ABOUT
    folders = ("imagenet-r", "ImageNet-R", "imagenet_r")
    classes = 200
    published = (24_000, 6_000)

    split_by: Literal["folders", "coda"]

    def read(self, root: Path) -> Split:
        if self.split_by == "folders":
            return super().read(root)
        lists = entries(root / "imagenet-r-splits", list(SPLITS), ABOUT)
        (images,) = entries(root, ["imagenet-r"], ABOUT)
        parts = [list_of(path) for path in lists]
        classes = sorted({name.partition("/")[0] for names in parts for name in names})

        def part(names: list[str]) -> Files:
            labels = [classes.index(name.partition("/")[0]) for name in names]
            return Files(images, names, np.asarray(labels, np.int64), classes)

        train, test = map(part, parts)
        return self.checked(train, test, self.published)


def list_of(path: Path) -> list[str]:
    """The images that a list of CODA-Prompt names, relative to the folder of the set.

    Its lines are `- data/imagenet-r/n02128757/sculpture_4.jpg`; labels of its own follow, which
    number the classes in another order.
    """
    found = (line.partition("imagenet-r/") for line in read_list(path))
    return sorted(name for _, known, name in found if known and "/" in name)
