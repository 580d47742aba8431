"""CIFAR-10.1: about 2,000 new test images of the classes of CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published
from driftline.streams.images import load_array
from driftline.streams.new_cifar import NewCifar10

BASE = "https://raw.githubusercontent.com/modestyachts/CIFAR-10.1/master/datasets"
FILES = {  # file -> bytes, SHA-256
    "cifar10.1_v6_data.npy": (
        6_144_128,
        "2997188e5816f5bd545dc77771b6227828c28146049fcecf3fa10775474cacc6",
    ),
    "cifar10.1_v6_labels.npy": (
        8_128,
        "ae40beda001693674edc94d925ee8268cfe68905f8f9aff800c8dcdfcd6c9448",
    ),
    "cifar10.1_v4_data.npy": (
        6_208_640,
        "5aaedc268df8f4cffca2ac0cf9e608ae1897a8cddb630c7a850a2ea8f6558e75",
    ),
    "cifar10.1_v4_labels.npy": (
        8_212,
        "1f9544300ded199539b6662364ce7fe6c2e1ea9f87408f06db4b1a6184cffb18",
    ),
}

ABOUT = About(
    title="CIFAR-10.1",
    paper="Recht et al., 2018",
    published="https://github.com/modestyachts/CIFAR-10.1",
    licence="MIT",
    layout="<data.root>/CIFAR-10.1/cifar10.1_v6_data.npy and cifar10.1_v6_labels.npy",
    label_space="cifar10",
    name="cifar10_1",
    download=Download(
        tuple(
            Published(
                f"{BASE}/{name}",
                (f"CIFAR-10.1/{name}",),
                size=size,
                checksum=f"sha256:{sha256}",
                into="CIFAR-10.1",
                part=name[10:12],
                optional="_v4_" in name,
            )
            for name, (size, sha256) in FILES.items()
        ),
        sources="sizes and SHA-256: TensorFlow Datasets (cifar10_1)",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Cifar101(NewCifar10):
    """Version 6, in which every class has as many images, or version 4, of 2,021 images."""

    about = ABOUT
    tops = ("CIFAR-10.1", "cifar-10.1", "cifar10.1")
    all_files = {v: (f"cifar10.1_{v}_data.npy", f"cifar10.1_{v}_labels.npy") for v in ("v6", "v4")}

    def arrays(self, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = map(load_array, paths)
        return pixels, labels
