"""CORe50: 50 objects in 11 sessions of video, three of which are the test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import Interval

from driftline.core.errors import UserError, suggest
from driftline.streams.dataset import About, DomainData, Split, SplitData, first_folder
from driftline.streams.downloads import Download, Published
from driftline.streams.images import Files, image_folder
from driftline.streams.listings import read_labelled
from driftline.streams.splits import entries

FILES = {  # address -> MD5, what it creates
    "http://bias.csr.unibo.it/maltoni/download/core50/core50_128x128.zip": (
        "745f3373fed08d69343f1058ee559e13",
        "core50_128x128",
    ),
    "https://vlomonaco.github.io/core50/data/batches_filelists.zip": (
        "e3297508a8998ba0c99a83d6b36bde62",
        "batches_filelists",
    ),
    "https://vlomonaco.github.io/core50/data/labels2names.pkl": (
        "557d0b9f0ec32765ccea65624aa51b3b",
        "labels2names.pkl",
    ),
}

ABOUT = About(
    title="CORe50",
    paper="Lomonaco and Maltoni, CoRL 2017",
    published="https://vlomonaco.github.io/core50/",
    licence="CC BY 4.0",
    layout="<data.root>/core50/core50_128x128/s<session>/o<object>/*.png and batches_filelists/, "
    "or core50_imgs/s<session>/<class>/*.png and core50_imgs/test_3_7_10/<class>/*.png",
    label_space="",
    name="core50",
    download=Download(
        tuple(
            Published(url, (f"core50/{name}",), checksum=f"md5:{md5}", into="core50")
            for url, (md5, name) in FILES.items()
        ),
        command="scenario=domains_core50",
        sources="addresses and MD5: Avalanche (core50_data.py)",
    ),
)

TEST = (3, 7, 10)  # sessions
TRAINING = tuple(s for s in range(1, 12) if s not in TEST)
CATEGORIES = ("plug_adapter", "mobile_phone", "scissor", "light_bulb", "can", "glass", "ball")
CATEGORIES += ("marker", "cup", "remote_control")
OBJECTS = [f"{name}{i}" for name in CATEGORIES for i in range(1, 6)]  # o1 ... o50
Run = Annotated[int, Interval(ge=0, le=9)]
Listed = tuple[list[str], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Core50Sessions(DomainData):
    """New instances (NI): the same objects in eight sessions, tested on the three others each time.

    Args:
        run: 0 ... 9: the order of sessions in the published lists of this run. None: sessions by
            number, without lists (RanPAC).
        labels: 50 objects, or the 10 categories they belong to.
    """

    about = ABOUT

    run: Run | None
    labels: Literal["object", "category"]

    def read(self, root: Path) -> dict[str, Split]:
        folders = root / "core50_imgs"
        if self.run is None and folders.is_dir():
            needed = [*(f"s{s}" for s in TRAINING), f"test_{'_'.join(map(str, TEST))}"]
            *sessions, test = (
                self.labelled(image_folder(place, ABOUT.expected))
                for place in entries(folders, needed, ABOUT)
            )
            return self.chosen(dict(zip(needed, sessions, strict=False)), test)
        folder = base(root)
        if self.run is None:
            (images,) = entries(folder, ["core50_128x128"], ABOUT)
            places = entries(images, [f"s{s}" for s in range(1, 12)], ABOUT)
            found = [self.labelled(image_folder(place, ABOUT.expected)) for place in places]
            joined = [(f"{f.root.name}/{n}", y) for i in TEST for f in found[i - 1 : i]
                      for n, y in zip(f.names, f.labels.tolist(), strict=True)]  # fmt: skip
            names, labels = zip(*joined, strict=True)
            test = Files(images, list(names), np.asarray(labels), self.named)
            return self.chosen({f"s{i}": found[i - 1] for i in TRAINING}, test)
        images, batches, (names, labels) = listed(folder, "NI_inc", self.run, 8)
        sessions = {
            paths[0].partition("/")[0]: Files(images, paths, self.coarse(y), self.named)
            for paths, y in batches
        }
        return self.chosen(sessions, Files(images, names, self.coarse(labels), self.named))

    @property
    def named(self) -> list[str]:
        return OBJECTS if self.labels == "object" else list(CATEGORIES)

    def coarse(self, objects: np.ndarray) -> np.ndarray:
        """Labels of objects, 0 ... 49, as those that are asked for."""
        return objects if self.labels == "object" else objects // 5

    def labelled(self, files: Files) -> Files:
        """The objects of a session by the names of their folders, o1 ... o50, or their order.

        Raises:
            UserError: for another number of folders.
        """
        if files.num_classes != len(OBJECTS):
            raise UserError(
                f"{files.root} has {files.num_classes} folders, but a session of CORe50 has "
                f"{len(OBJECTS)} objects. {ABOUT.expected}"
            )
        numbers = [name.removeprefix("o") for name in files.class_names]
        plain = set(numbers) == {str(i) for i in range(1, len(OBJECTS) + 1)}
        objects = np.asarray([int(n) - 1 for n in numbers]) if plain else np.arange(len(OBJECTS))
        return Files(files.root, files.names, self.coarse(objects[files.labels]), self.named)

    def chosen(self, sessions: dict[str, Files], test: Files) -> dict[str, Split]:
        """The sessions of `domains`, all of them without.

        Raises:
            UserError: for one that is not for training.
        """
        for name in self.domains or []:
            if name not in sessions:
                raise UserError(
                    f"scenario.domains: {name!r} is no session of CORe50 for training"
                    f"{suggest(name, sessions)}. Known: {', '.join(sessions)}"
                )
        return {name: (sessions[name], test) for name in self.domains or sessions}


@dataclass(frozen=True, kw_only=True)
class Core50Objects(SplitData):
    """New classes (NC): ten objects, then five a task, each in eight sessions.

    The published lists of a run number the objects in the order in which they come, so that
    scenario.class_order=fixed with 10 and then 5 classes gives their batches.

    Args:
        run: 0 ... 9.
    """

    about = ABOUT
    stand_ins = 50

    run: Run

    def read(self, root: Path) -> Split:
        images, batches, (names, labels) = listed(base(root), "NC_inc", self.run, 9)
        object_of = {y: paths[i] for paths, all_y in [*batches, (names, labels)]
                     for i, y in enumerate(all_y.tolist())}  # fmt: skip
        if sorted(object_of) != list(range(len(OBJECTS))):
            raise UserError(
                f"the lists of NC_inc/run{self.run} do not number {len(OBJECTS)} objects"
            )
        places = [object_of[label].split("/")[1].removeprefix("o") for label in sorted(object_of)]
        named = [OBJECTS[int(place) - 1] for place in places]
        paths = [path for part, _ in batches for path in part]
        train = Files(images, paths, np.concatenate([y for _, y in batches]), named)
        return train, Files(images, names, labels, named)


def base(root: Path) -> Path:
    """The folder of the published files."""
    return first_folder(root, ["core50"], ["core50_128x128"]) or root / "core50"


def listed(folder: Path, kind: str, run: int, count: int) -> tuple[Path, list[Listed], Listed]:
    """The folder of the images, the training batches of a run, and its test.

    Raises:
        UserError: for missing files.
    """
    images, lists = entries(folder, ("core50_128x128", f"batches_filelists/{kind}/run{run}"), ABOUT)
    names = [f"train_batch_{i:02}_filelist.txt" for i in range(count)]
    *batches, test = map(read_labelled, entries(lists, [*names, "test_filelist.txt"], ABOUT))
    return images, batches, test
