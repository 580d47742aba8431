"""ImageNet-100 and ImageNet-1k as class-incremental papers learn them: training images in tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from driftline.core.errors import UserError
from driftline.streams.data import imagenet
from driftline.streams.dataset import About, Split, first_folder
from driftline.streams.downloads import Download
from driftline.streams.images import Files, image_folder
from driftline.streams.splits import NamedSplit, entries

ABOUT = About(
    title="ImageNet-100, ImageNet-1k",
    paper="Russakovsky et al., IJCV 2015; 100 classes: Rebuffi et al., CVPR 2017 and others",
    published="https://image-net.org/download.php",
    licence=imagenet.ABOUT.licence,
    layout="<data.root>/train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, in data.root or a folder "
    "imagenet100 or imagenet",
    label_space="",
    name="imagenet100",
    download=Download(
        by_hand="As imagenet, training and validation images. A folder with 100 classes alone is "
        "read, too",
        command="scenario=split_imagenet100",
    ),
)

# HobbitLong/CMC, imagenet100.txt: the 100 classes of contrastive learning, sorted here.
CMC = (
    "n01558993", "n01692333", "n01729322", "n01735189", "n01749939", "n01773797", "n01820546",
    "n01855672", "n01978455", "n01980166", "n01983481", "n02009229", "n02018207", "n02085620",
    "n02086240", "n02086910", "n02087046", "n02089867", "n02089973", "n02090622", "n02091831",
    "n02093428", "n02099849", "n02100583", "n02104029", "n02105505", "n02106550", "n02107142",
    "n02108089", "n02109047", "n02113799", "n02113978", "n02114855", "n02116738", "n02119022",
    "n02123045", "n02138441", "n02172182", "n02231487", "n02259212", "n02326432", "n02396427",
    "n02483362", "n02488291", "n02701002", "n02788148", "n02804414", "n02859443", "n02869837",
    "n02877765", "n02974003", "n03017168", "n03032252", "n03062245", "n03085013", "n03259280",
    "n03379051", "n03424325", "n03492542", "n03494278", "n03530642", "n03584829", "n03594734",
    "n03637318", "n03642806", "n03764736", "n03775546", "n03777754", "n03785016", "n03787032",
    "n03794056", "n03837869", "n03891251", "n03903868", "n03930630", "n03947888", "n04026417",
    "n04067472", "n04099969", "n04111531", "n04127249", "n04136333", "n04229816", "n04238763",
    "n04336792", "n04418357", "n04429376", "n04435653", "n04485082", "n04493381", "n04517823",
    "n04589890", "n04592741", "n07714571", "n07715103", "n07753275", "n07831146", "n07836838",
    "n13037406", "n13040303",
)  # fmt: skip
Subset = Literal["first", "seeded", "cmc", "folders", "all"]


def subset(name: Subset, there: Sequence[str]) -> list[str]:
    """Synset ids of a subset, sorted.

    Args:
        there: class folders, which are the subset `folders`.
    """
    if name == "folders":
        return sorted(there)
    known = imagenet.wnids()
    if name == "seeded":
        return sorted(known[i] for i in np.random.RandomState(1993).permutation(1000)[:100])
    return {"first": known[:100], "cmc": list(CMC), "all": known}[name]


@dataclass(frozen=True, kw_only=True)
class ImageNetTasks(NamedSplit):
    """The training images of some classes, tested on the validation images.

    Args:
        subset: which 100 classes papers call ImageNet-100 differs. `first`: of the 1,000, sorted
            (the lists of PODNet, arthurdouillard/incremental_learning.pytorch).
            `seeded`: drawn with NumPy's seed 1993 (hshustc/CVPR19_Incremental_Learning).
            `cmc`: the list of contrastive learning (HobbitLong/CMC). `folders`: those there, 100.
            `all`: the 1,000 classes. Labels follow the sorted synset ids.
    """

    about = ABOUT
    classes = 100

    subset: Subset

    def read(self, root: Path) -> Split:
        names = ("imagenet", "ImageNet") if self.subset == "all" else ("imagenet100", "imagenet")
        folder = first_folder(root, names, ("train", "val")) or root
        train, val = (
            image_folder(place, ABOUT.expected)
            for place in entries(folder, ("train", "val"), ABOUT)
        )
        wanted = subset(self.subset, train.class_names)
        train, val = among(train, wanted), among(val, wanted)
        if len(wanted) == len(imagenet.wnids()):
            return train, val
        return self.checked(train, val)


def among(files: Files, classes: Sequence[str]) -> Files:
    """The images of some classes, labelled in this order.

    Raises:
        UserError: for classes that are not there.
    """
    position = {name: label for label, name in enumerate(classes)}
    missing = [name for name in classes if name not in set(files.class_names)]
    if missing:
        raise UserError(
            f"{files.root} lacks {len(missing)} of {len(classes)} classes (first: {missing[0]}); "
            f"scenario.subset says which are meant. {ABOUT.expected}"
        )
    labels = np.asarray([position.get(name, -1) for name in files.class_names])[files.labels]
    rows = np.flatnonzero(labels >= 0)
    return Files(files.root, [files.names[i] for i in rows.tolist()], labels[rows], list(classes))
