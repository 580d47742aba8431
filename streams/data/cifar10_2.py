"""CIFAR-10.2: 2,000 new test and 10,000 new training images of the classes of CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from driftline.core.errors import UserError
from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published
from driftline.streams.new_cifar import NewCifar10

COMMIT = "521467a52ad494b78ff9c70051099c0d9ba74d40"
BASE = f"https://raw.githubusercontent.com/modestyachts/cifar-10.2/{COMMIT}"

ABOUT = About(
    title="CIFAR-10.2",
    paper="Lu et al., 2020",
    published="https://github.com/modestyachts/cifar-10.2",
    licence="none stated",
    layout="<data.root>/CIFAR-10.2/cifar102_test.npz",
    label_space="cifar10",
    name="cifar10_2",
    download=Download(
        (
            Published(
                f"{BASE}/cifar102_test.npz",
                ("CIFAR-10.2/cifar102_test.npz",),
                size=6_393_664,
                checksum="sha256:e4fd6462bd5141ed293acd52ea570952f65d1bfd4ec9b068f87742f75a7a632e",
                into="CIFAR-10.2",
                part="test",
            ),
            Published(
                f"{BASE}/cifar102_train.npz",
                ("CIFAR-10.2/cifar102_train.npz",),
                into="CIFAR-10.2",
                part="train",
                optional=True,
            ),
        ),
        sources="files: the README of its repository; size and SHA-256 of the test images: as a "
        "public study pins them at this commit",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Cifar102(NewCifar10):
    """The test images; the training images are a domain, too."""

    about = ABOUT
    tops = ("CIFAR-10.2", "cifar-10.2", "cifar10.2")
    all_files = {part: (f"cifar102_{part}.npz",) for part in ("test", "train")}

    def arrays(self, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
        try:
            with np.load(paths[0], allow_pickle=False) as content:
                return content["images"], content["labels"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UserError(f"cannot read {paths[0]}: {error}; copy it here again") from error
