"""Named sets of continual learning in their published layouts, with images of 2 px."""

from __future__ import annotations

import gzip
import io
import pickle
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from driftline.streams.data.imagenet import wnids

Built = tuple[list[str], list[tuple[Path, int]]]  # as of tests/test_content.py
NUMBERS = [str(i) for i in range(300)]  # names of folders whose order as texts is another one
BIRDS = [f"{i:03}.Bird_{i}" for i in range(1, 201)]
WNIDS = [f"n{i:08}" for i in range(200)]
SESSIONS = [f"s{i}" for i in range(1, 12)]


@pytest.fixture
def published_files(monkeypatch) -> None:
    """Files of the tests pass for published ones: sums of CIFAR, and MATLAB's files by NumPy."""
    monkeypatch.setattr("driftline.streams.data.cifar10.intact", lambda *a: True)

    def loadmat(path: Path, squeeze_me: bool) -> dict[str, Any]:
        with np.load(io.BytesIO(path.read_bytes())) as file:
            return dict(file)

    io_module = SimpleNamespace(loadmat=loadmat)
    monkeypatch.setitem(sys.modules, "scipy", SimpleNamespace(io=io_module))
    monkeypatch.setitem(sys.modules, "scipy.io", io_module)


@cache
def pixels(seed: int) -> bytes:
    """A PNG file of 2 px."""
    image = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write(root: Path, names: Iterable[str], seed: int = 0) -> None:
    """Image files; folders are made once each."""
    made: set[Path] = set()
    for i, name in enumerate(names):
        path = root / name
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        path.write_bytes(pixels((seed + i) % 97))


def folders(root: Path, classes: Iterable[str], parts: tuple[str, str] = ("train", "test")) -> None:
    """Two images of each class for training, one for the test."""
    classes = list(classes)
    write(root / parts[0], (f"{c}/{i}.png" for c in classes for i in range(2)))
    write(root / parts[1], (f"{c}/{i}.png" for c in classes for i in range(2, 3)), seed=50)


def cub_official(root: Path) -> None:
    folder = root / "CUB_200_2011"
    names = [f"{bird}/{i}.png" for bird in BIRDS for i in range(3)]
    write(folder / "images", names)
    lines = [f"{i} {name}" for i, name in enumerate(names, 1)]
    (folder / "images.txt").write_text("\n".join(lines))
    lines = [f"{i} {int(i % 3 > 0)}" for i in range(1, len(names) + 1)]
    (folder / "train_test_split.txt").write_text("\n".join(lines))


def tiny_imagenet(root: Path) -> None:
    folder = root / "tiny-imagenet-200"
    write(folder / "train", (f"{w}/images/{w}_{i}.png" for w in WNIDS for i in range(2)))
    for w in WNIDS[:2]:
        (folder / "train" / w / f"{w}_boxes.txt").write_text("a box")
    write(folder / "val" / "images", (f"val_{i}.png" for i in range(200)), seed=50)
    lines = [f"val_{i}.png\t{w}\t0\t0\t62\t62" for i, w in enumerate(reversed(WNIDS))]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines))


def arrays(path: Path, **values: np.ndarray) -> None:
    """What `published_files` reads as a file of MATLAB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.savez(file, allow_pickle=False, **values)


def cars_official(root: Path) -> None:
    folder = root / "stanford_cars"
    for part, per_class, table in (
        ("cars_train", 2, "devkit/cars_train_annos.mat"),
        ("cars_test", 1, "cars_test_annos_withlabels.mat"),
    ):
        names = [f"{i:05}.png" for i in range(196 * per_class)]
        write(folder / part, names)
        rows = [(name, i % 196 + 1) for i, name in enumerate(names)]
        arrays(folder / table, annotations=np.array(rows, [("fname", "U16"), ("class", "u1")]))
    arrays(
        folder / "devkit" / "cars_meta.mat", class_names=np.array([f"Car {i}" for i in range(196)])
    )


def imagenet_r_lists(root: Path) -> None:
    names = [f"{w}/art_{i}.png" for w in WNIDS for i in range(3)]
    write(root / "imagenet-r", names)
    (root / "imagenet-r-splits").mkdir()
    for part, listed in (("test", names[::3]), ("train", [n for n in names if n[-5] != "0"])):
        lines = ["data:", *(f"- data/imagenet-r/{n}" for n in listed), "targets:", "- 3"]
        (root / "imagenet-r-splits" / f"imagenet-r_{part}.yaml").write_text("\n".join(lines))


def imagenet100(root: Path) -> None:
    """Some classes more than the 100."""
    folders(root, wnids()[:103], ("train", "val"))


def imagenet1k(root: Path) -> None:
    write(root / "train", (f"{w}/{w}_1.png" for w in wnids()))
    write(root / "val", (f"{w}/ILSVRC2012_val_{i:08}.png" for i, w in enumerate(wnids())), seed=9)


def sessions(root: Path) -> None:
    names = [f"{s}/o{o}/{s}_{o}.png" for s in SESSIONS for o in range(1, 51)]
    write(root / "core50" / "core50_128x128", names)


def core50(root: Path) -> None:
    """Run 3 of the lists: sessions from the last to the first, objects too."""
    sessions(root)
    lists = root / "core50" / "batches_filelists"
    tests = ["s3", "s7", "s10"]
    training = [s for s in reversed(SESSIONS) if s not in tests]
    batches = {"NI_inc": [([s], range(50, 0, -1)) for s in training]}
    objects = [list(range(50, 40, -1)), *(list(range(k, k - 5, -1)) for k in range(40, 0, -5))]
    batches["NC_inc"] = [(training, of) for of in objects]
    for kind, parts in batches.items():
        folder = lists / kind / "run3"
        folder.mkdir(parents=True)
        for i, (where, of) in enumerate([*parts, (tests, range(1, 51))]):
            lines = [
                f"{s}/o{o}/{s}_{o}.png {50 - o if kind == 'NC_inc' else o - 1}"
                for s in where
                for o in of
            ]
            name = f"train_batch_{i:02}" if i < len(parts) else "test"
            (folder / f"{name}_filelist.txt").write_text("\n".join(lines) + "\n")


def core50_folders(root: Path) -> None:
    names = [f"o{i:02}" for i in range(1, 51)]
    for part in (*SESSIONS, "test_3_7_10"):
        write(root / "core50_imgs" / part, [f"{n}/{part}.png" for n in names])


def domainnet(root: Path) -> None:
    """The second class has no training images in one domain, as in the published lists."""
    folder = root / "DomainNet"
    for domain in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"):
        names = [f"{domain}/{c}/{i}.png" for c in ("axe", "t-shirt", "zebra") for i in range(3)]
        write(folder, names)
        lines = [f"{name} {i // 3}" for i, name in enumerate(names)]
        train = [
            x for i, x in enumerate(lines) if i % 3 and not (domain == "painting" and i // 3 == 1)
        ]
        (folder / f"{domain}_train.txt").write_text("\n".join(train))
        (folder / f"{domain}_test.txt").write_text("\n".join(lines[::3]))


def five_datasets(root: Path) -> None:
    """Files of MNIST as published, those of Fashion-MNIST unpacked."""
    rng = np.random.default_rng(0)

    def images(*shape: int) -> np.ndarray:
        return rng.integers(0, 256, shape, dtype=np.uint8)

    for part, per_class in (("train", 2), ("test", 1)):
        count = 10 * per_class
        digits = (np.arange(count) % 10 + 1).astype(np.uint8)  # 10: the digit 0
        arrays(root / "SVHN" / f"{part}_32x32.mat", X=images(32, 32, 3, count), y=digits)
        write(
            root / "notMNIST" / part.title(),
            [f"{c}/{i}.png" for c in "ABCDEFGHIJ" for i in range(per_class)],
        )
        for name in ("MNIST", "FashionMNIST"):
            raw = root / name / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            start = "t10k" if part == "test" else part
            for kind, values in (
                ("images-idx3", images(count, 28, 28)),
                ("labels-idx1", digits - 1),
            ):
                head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
                content, path = head + values.tobytes(), raw / f"{start}-{kind}-ubyte"
                if name == "MNIST":
                    content, path = gzip.compress(content), path.with_name(f"{path.name}.gz")
                path.write_bytes(content)
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    batch = [(f"data_batch_{i}", range((i - 1) * 4, i * 4)) for i in range(1, 6)]
    for name, rows in (*batch, ("test_batch", range(10))):
        labels = [row % 10 for row in rows]
        content = {"data": images(len(labels), 3072), "labels": labels}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [str(i) for i in range(10)]})
    )


class Layout(NamedTuple):
    """How a set lies on a disk.

    Args:
        build: writes it.
        parts: what it cannot do without; each is taken away by a test.
        words: settings that read it.
        images: of each class, for training and for the test.
        warns: what is said of the number of images.
        domains: of a domain-incremental stream, in their order.
        stranger: what is said of a class too many; without, lists say what belongs to the set.
        last: place of the last file that belongs to the set, among all in sorted order.
    """

    scenario: str
    build: Callable[[Path], None]
    parts: tuple[str, ...]
    classes: int
    words: tuple[str, ...] = ()
    images: tuple[int, int] = (2, 1)  # of each class
    warns: str | None = "are published"
    domains: tuple[str, ...] = ()
    stranger: str = ""
    last: int = -1

    def built(self, root: Path) -> Built:
        """As a case of tests/test_content.py."""
        self.build(root)
        files = sorted(root.rglob("*.png"))
        places = [(files[0], -1), (files[self.last], -1)]
        return [*self.words, "scenario.pipeline=raw"], places


def layout(scenario: str, folder: str, names: Iterable[str], *words: str) -> Layout:
    """Class folders."""
    classes = list(names)
    return Layout(
        scenario,
        lambda root: folders(root / folder, classes),
        (f"{folder}/train", f"{folder}/test"),
        len(classes),
        words,
        stranger="scenario=split_imagefolder|lacks: stranger",
    )


LAYOUTS = {
    "cub": layout("split_cub", "cub", BIRDS),
    "cub, official": Layout(
        "split_cub",
        cub_official,
        tuple(f"CUB_200_2011/{n}" for n in ("images", "train_test_split.txt")),
        200,
        ("scenario.split_by=official",),
    ),
    "objectnet": layout("split_objectnet", "objectnet", NUMBERS[:200]),
    "omnibenchmark": layout("split_omnibenchmark", "omnibenchmark", NUMBERS),
    "vtab": layout("split_vtab", "vtab-cil/vtab", NUMBERS[10:60]),
    "cars": layout("split_cars", "cars", NUMBERS[:196])._replace(warns=None),
    "tiny_imagenet": Layout(
        "split_tiny_imagenet",
        tiny_imagenet,
        tuple(f"tiny-imagenet-200/{n}" for n in ("train", "val", "val/val_annotations.txt")),
        200,
        stranger="scenario=split_imagefolder",
    ),
    "cars, official": Layout(
        "split_cars",
        cars_official,
        tuple(
            f"stanford_cars/{n}" for n in ("cars_train", "devkit", "cars_test_annos_withlabels.mat")
        ),
        196,
        ("scenario.split_by=official",),
    ),
    "imagenet_r": layout("split_imagenet_r", "imagenet-r", WNIDS),
    "imagenet_r, coda": Layout(
        "split_imagenet_r",
        imagenet_r_lists,
        ("imagenet-r", "imagenet-r-splits/imagenet-r_test.yaml"),
        200,
        ("scenario.split_by=coda",),
    ),
    "imagenet_a": layout("split_imagenet_a", "imagenet-a", WNIDS),
    "imagenet100": Layout(
        "split_imagenet100", imagenet100, ("train", "val"), 100, warns=None, last=-4
    ),
    "imagenet1k": Layout(
        "split_imagenet1k", imagenet1k, ("train", "val"), 1000, images=(1, 1), warns=None
    ),
    "core50, NC": Layout(
        "split_core50",
        core50,
        (
            "core50/core50_128x128",
            "core50/batches_filelists/NC_inc/run3/train_batch_08_filelist.txt",
            "core50/batches_filelists/NC_inc/run3/test_filelist.txt",
        ),
        50,
        ("scenario.run=3",),
        (8, 3),
        None,
    ),
    "core50, NI": Layout(
        "domains_core50",
        core50,
        ("core50/core50_128x128", "core50/batches_filelists/NI_inc/run3"),
        50,
        ("scenario.run=3",),
        (1, 3),
        None,
        ("s11", "s9", "s8", "s6", "s5", "s4", "s2", "s1"),
    ),
    "core50, by number": Layout(
        "domains_core50",
        sessions,
        ("core50/core50_128x128/s3", "core50/core50_128x128/s11"),
        10,
        ("scenario.run=null", "scenario.labels=category"),
        (5, 15),
        None,
        ("s1", "s2", "s4", "s5", "s6", "s8", "s9", "s11"),
        "51 folders",
    ),
    "core50, folders": Layout(
        "domains_core50",
        core50_folders,
        ("core50_imgs/s4", "core50_imgs/test_3_7_10"),
        50,
        ("scenario.run=null", "scenario.domains=[s4,s1]"),
        (1, 1),
        None,
        ("s4", "s1"),
        "51 folders",
    ),
    "domainnet": Layout(
        "domains_domainnet",
        domainnet,
        ("DomainNet/real", "DomainNet/painting_train.txt", "DomainNet/clipart_test.txt"),
        3,
        (),
        (2, 1),
        None,
        ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
    ),
    "five_datasets": Layout(
        "five_datasets",
        five_datasets,
        (
            "SVHN/test_32x32.mat",
            "MNIST/raw/train-images-idx3-ubyte.gz",
            "FashionMNIST/raw/t10k-labels-idx1-ubyte",
            "notMNIST/Test",
        ),
        50,
        warns=None,
        stranger="other folders than A to J",
    ),
}
