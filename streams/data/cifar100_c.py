"""CIFAR-100-C."""

from __future__ import annotations

from dataclasses import dataclass, replace

from driftline.streams.data import cifar10_c
from driftline.streams.data.cifar100 import ABOUT as CLEAN

ABOUT = replace(
    cifar10_c.ABOUT,
    title="CIFAR-100-C",
    published="https://zenodo.org/records/3555552",
    layout="<data.root>/CIFAR-100-C/<corruption>.npy and labels.npy",
    label_space="cifar100",
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
