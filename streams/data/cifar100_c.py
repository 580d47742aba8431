"""CIFAR-100-C."""

from __future__ import annotations

from dataclasses import dataclass, replace

from driftline.streams.data import cifar10_c
from driftline.streams.data.cifar100 import ABOUT as CLEAN
from driftline.streams.downloads import Download, Published

ABOUT = replace(
    cifar10_c.ABOUT,
    title="CIFAR-100-C",
    published="https://zenodo.org/records/3555552",
    layout="<data.root>/CIFAR-100-C/<corruption>.npy and labels.npy",
    label_space="cifar100",
    name="cifar100_c",
    download=Download(
        (
            Published(
                "https://zenodo.org/records/3555552/files/CIFAR-100-C.tar?download=1",
                (
                    "CIFAR-100-C/labels.npy",
                    "CIFAR-100-C/gaussian_noise.npy",
                    "CIFAR-100-C/zoom_blur.npy",
                ),
                size=2_918_473_216,
                checksum="sha256:30ee6543a1bfd049fa33834b7c1ada301e7064b7fbe8fc38340eb8b62ced4b33",
            ),
        ),
        sources="size and SHA-256: TensorFlow Datasets (cifar100_corrupted)",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Cifar100C(cifar10_c.Cifar10C):
    """Corrupted test images in file order, as the official code reads them."""

    about = ABOUT
    clean_about = CLEAN
    folders = ("CIFAR-100-C",)
    which = "cifar100"


@dataclass(frozen=True, kw_only=True)
class Cifar100Clean(cifar10_c.Cifar10Clean):
    """The clean test images."""

    about = ABOUT
    which = "cifar100"
