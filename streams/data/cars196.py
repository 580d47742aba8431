"""Stanford Cars: 196 models of cars."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from driftline.streams.dataset import About, Split
from driftline.streams.downloads import Download, Published
from driftline.streams.images import Files
from driftline.streams.splits import SplitFolders, entries, matlab

FILES = {  # archive -> bytes, SHA-256
    "cars_train.tgz": (
        979_269_282,
        "512b227b30e2f0a8aab9e09485786ab4479582073a144998da74d64b801fd288",
    ),
    "cars_test.tgz": (
        977_350_468,
        "bffea656d6f425cba3c91c6d83336e4c5f86c6cffd8975b0f375d3a10da8e243",
    ),
    "cars_test_annos_withlabels.mat": (
        185_758,
        "790f75be8ea34eeded134cc559332baf23e30e91367e9ddca97d26ed9b895f05",
    ),
    "car_devkit.tgz": (
        330_960,
        "b97deb463af7d58b6bfaa18b2a4de9829f0f79e8ce663dfa9261bf7810e9accd",
    ),
}
CREATES = {"car_devkit.tgz": "devkit"}

ABOUT = About(
    title="Stanford Cars",
    paper="Krause et al., 3dRR workshop, 2013",
    published="https://ai.stanford.edu/~jkrause/cars/car_dataset.html (no longer there)",
    licence="non-commercial research",
    layout="<data.root>/cars/train/<class>/*.jpg and test/<class>/*.jpg; with "
    "scenario.split_by=official stanford_cars/cars_train/*.jpg, cars_test/, devkit/ and "
    "cars_test_annos_withlabels.mat (torchvision's own layout)",
    label_space="",
    name="cars196",
    download=Download(
        tuple(
            Published(
                "",
                (f"stanford_cars/{CREATES.get(name, name.removesuffix('.tgz'))}",),
                size=size,
                checksum=f"sha256:{sha256}",
                into="stanford_cars",
                name=name,
            )
            for name, (size, sha256) in FILES.items()
        ),
        by_hand="The publisher took it off the net; where you have the four files "
        f"({', '.join(FILES)}), scripts/get_data.py cars196 --from THAT_FOLDER checks and "
        "unpacks them",
        command="scenario=split_cars scenario.split_by=official",
        sources="sizes and SHA-256: TensorFlow Datasets (cars196)",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Cars196(SplitFolders):
    """The cars.

    Args:
        split_by: `folders`: class folders, as RanPAC reads them. `official`: the files of the
            publisher, whose tables SciPy reads.
    """

    about = ABOUT
    folders = ("cars", "cars196", "stanford_cars")
    classes = 196

    split_by: Literal["folders", "official"]

    def read(self, root: Path) -> Split:
        if self.split_by == "folders":
            return super().read(root)
        needed = ("cars_train", "cars_test", "devkit", "cars_test_annos_withlabels.mat")
        folder = root / "stanford_cars"
        folder = folder if folder.is_dir() else root
        *images, kit, test_table = entries(folder, needed, ABOUT)
        train_table, meta = entries(kit, ("cars_train_annos.mat", "cars_meta.mat"), ABOUT)
        classes = [str(name) for name in matlab(meta, ABOUT)["class_names"]]

        def part(place: Path, table: Path) -> Files:
            rows = matlab(table, ABOUT)["annotations"]
            labels = np.asarray([int(row["class"]) - 1 for row in rows])
            return Files(place, [str(row["fname"]) for row in rows], labels, classes)

        train, test = map(part, images, (train_table, test_table))
        return self.checked(train, test, (8_144, 8_041))
