"""ImageNet-A: photographs of 200 ImageNet classes that a ResNet-50 got wrong."""

from __future__ import annotations

from dataclasses import dataclass

from driftline.streams.dataset import About, SubsetData
from driftline.streams.domain_folders import ImageNetDomains
from driftline.streams.downloads import Download, Published
from driftline.streams.splits import SplitFolders

# Labels of ImageNet-1k, from eval.py of hendrycks/natural-adv-examples;
# bethgelab/robustness has the same ones.
SUBSET = (
    6, 11, 13, 15, 17, 22, 23, 27, 30, 37, 39, 42, 47, 50, 57, 70, 71, 76, 79, 89, 90, 94, 96, 97,
    99, 105, 107, 108, 110, 113, 124, 125, 130, 132, 143, 144, 150, 151, 207, 234, 235, 254, 277,
    283, 287, 291, 295, 298, 301, 306, 307, 308, 309, 310, 311, 313, 314, 315, 317, 319, 323, 324,
    326, 327, 330, 334, 335, 336, 347, 361, 363, 372, 378, 386, 397, 400, 401, 402, 404, 407, 411,
    416, 417, 420, 425, 428, 430, 437, 438, 445, 456, 457, 461, 462, 470, 472, 483, 486, 488, 492,
    496, 514, 516, 528, 530, 539, 542, 543, 549, 552, 557, 561, 562, 569, 572, 573, 575, 579, 589,
    606, 607, 609, 614, 626, 627, 640, 641, 642, 643, 658, 668, 677, 682, 684, 687, 701, 704, 719,
    736, 746, 749, 752, 758, 763, 765, 768, 773, 774, 776, 779, 780, 786, 792, 797, 802, 803, 804,
    813, 815, 820, 823, 831, 833, 835, 839, 845, 847, 850, 859, 862, 870, 879, 880, 888, 890, 897,
    900, 907, 913, 924, 932, 933, 934, 937, 943, 945, 947, 951, 954, 956, 957, 959, 971, 972, 980,
    981, 984, 986, 987, 988,
)  # fmt: skip

ABOUT = About(
    title="ImageNet-A",
    paper="Hendrycks et al., CVPR 2021",
    published="https://github.com/hendrycks/natural-adv-examples",
    licence="MIT, as its repository; the rights of the images are their owners'",
    layout="<data.root>/imagenet-a/<wnid>/*.jpg; in tasks imagenet-a/train/<wnid>/*.jpg and "
    "test/<wnid>/*.jpg",
    label_space="imagenet1k",
    subset=SUBSET,
    name="imagenet_a",
    download=Download(
        (
            Published(
                "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar",
                ("imagenet-a",),
                size=687_552_512,
                checksum="sha256:3bb3632277e6ba6392ea64c02ddbf4dd2266c9caffd6bc09c9656d28f012589e",
            ),
        ),
        sources="size and SHA-256: TensorFlow Datasets (imagenet_a)",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ImageNetA(SubsetData, ImageNetDomains):
    """All its images, resized and cropped to 224 px as the official code does it."""

    about = ABOUT
    spellings = {"imagenet_a": ("imagenet-a", "ImageNet-A", "imagenet_a")}


@dataclass(frozen=True, kw_only=True)
class ImageNetATasks(SplitFolders):
    """The split of LAMDA-PILOT and RanPAC, four fifths of the images for training."""

    about = ABOUT
    folders = ("imagenet-a", "ImageNet-A", "imagenet_a")
    classes = 200
    published = (5_981, 1_519)  # Zhou et al., IJCV 2024
