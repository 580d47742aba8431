"""CIFAR-100: its classes as tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from driftline.streams.data import cifar10

ABOUT = replace(
    cifar10.ABOUT,
    title="CIFAR-100",
    layout="<data.root>/cifar-100-python/ (torchvision's own layout)",
    label_space="cifar100",
)


@dataclass(frozen=True, kw_only=True)
class Cifar100(cifar10.Cifar10):
    """The official training and test images."""

    about = ABOUT
    stand_ins = 100
    which = "cifar100"
