"""CIFAR-100: its classes as tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from driftline.streams.data import cifar10
from driftline.streams.downloads import Download, Published

ABOUT = replace(
    cifar10.ABOUT,
    title="CIFAR-100",
    layout="<data.root>/cifar-100-python/ (torchvision's own layout)",
    label_space="cifar100",
    name="cifar100",
    download=Download(
        (
            Published(
                "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                ("cifar-100-python",),
                size=169_001_437,
                checksum="md5:eb9058c3a382ffc7106e4002c42a8d85",
            ),
        ),
        command="scenario=split_cifar100",
        sources="MD5: torchvision",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Cifar100(cifar10.Cifar10):
    """The official training and test images."""

    about = ABOUT
    stand_ins = 100
    which = "cifar100"
