"""CIFAR-10-C, and what CIFAR-100-C shares with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from driftline.core.errors import UserError
from driftline.streams.corrupted import CorruptedData, instead
from driftline.streams.data.cifar10 import ABOUT as CLEAN
from driftline.streams.data.cifar10 import Cifar, cifar, cifar_beside
from driftline.streams.dataset import (
    About,
    Clean,
    CleanData,
    Sources,
    about,
    count_of,
    existing_root,
    first_folder,
    probe_rows,
)
from driftline.streams.downloads import Download, Published
from driftline.streams.images import ImageSet, corruption_arrays, still_packed
from driftline.streams.orders import Domain

ABOUT = About(
    title="CIFAR-10-C",
    paper="Hendrycks and Dietterich, ICLR 2019",
    published="https://zenodo.org/records/2535967",
    licence="CC BY 4.0",
    layout="<data.root>/CIFAR-10-C/<corruption>.npy and labels.npy",
    label_space="cifar10",
    class_names=CLEAN.class_names,
    hashes={
        "labels.npy": "md5:c439b113295ed5254878798ffe28fd54",
        "brightness.npy": "md5:0a81ef75e0b523c3383219c330a85d48",
        "contrast.npy": "md5:3c8262171c51307f916c30a3308235a8",
        "defocus_blur.npy": "md5:7d1322666342a0702b1957e92f6254bc",
        "elastic_transform.npy": "md5:9421657c6cd452429cf6ce96cc412b5f",
        "fog.npy": "md5:7b397314b5670f825465fbcd1f6e9ccd",
        "frost.npy": "md5:31f6ab3bce1d9934abfb0cc13656f141",
        "gaussian_blur.npy": "md5:c33370155bc9b055fb4a89113d3c559d",
        "gaussian_noise.npy": "md5:ecaf8b9a2399ffeda7680934c33405fd",
        "glass_blur.npy": "md5:7361fb4019269e02dbf6925f083e8629",
        "impulse_noise.npy": "md5:2090e01c83519ec51427e65116af6b1a",
        "jpeg_compression.npy": "md5:2b9cc4c864e0193bb64db8d7728f8187",
        "motion_blur.npy": "md5:fffa5f852ff7ad299cfe8a7643f090f4",
        "pixelate.npy": "md5:0f14f7e2db14288304e1de10df16832f",
        "saturate.npy": "md5:1cfae0964219c5102abbb883e538cc56",
        "shot_noise.npy": "md5:3a7239bb118894f013d9bf1984be7f11",
        "snow.npy": "md5:bb238de8555123da9c282dea23bd6e55",
        "spatter.npy": "md5:8a5a3903a7f8f65b59501a6093b4311e",
        "speckle_noise.npy": "md5:ef00b87611792b00df09c0b0237a1e30",
        "zoom_blur.npy": "md5:6ea8e63f1c5cdee1517533840641641b",
    },
    name="cifar10_c",
    download=Download(
        (
            Published(
                "https://zenodo.org/records/2535967/files/CIFAR-10-C.tar?download=1",
                (
                    "CIFAR-10-C/labels.npy",
                    "CIFAR-10-C/gaussian_noise.npy",
                    "CIFAR-10-C/zoom_blur.npy",
                ),
                size=2_918_471_680,
                checksum="sha256:c72763e101c723b7c507b96205f7e938912a5d587376173b825850cf3cb876a7",
            ),
        ),
        sources="size and SHA-256: TensorFlow Datasets (cifar10_corrupted); MD5 of the "
        "unpacked files: as torch-uncertainty checks them",
    ),
)
FOLDERS = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}


@dataclass(frozen=True, kw_only=True)
class Cifar10C(CorruptedData):
    """Corrupted test images in file order, as the official code reads them."""

    about = ABOUT
    clean_about = CLEAN
    preset = "cifar"
    folders = ("CIFAR-10-C",)
    which: ClassVar[Cifar] = "cifar10"

    def released(self, root: Path, domains: list[Domain]) -> Sources:
        names, severities = (list(dict.fromkeys(part)) for part in zip(*domains, strict=True))
        sets = cifar_c(root, self.which, names, severities)
        return self._sources(sets, cifar_beside(root, self.which))

    def on_the_fly(self, root: Path, domains: list[Domain]) -> Sources:
        clean = cifar(root, self.which, train=False)
        return self._sources(self.generated(clean, domains), clean)

    def _sources(self, sets: dict[Domain, ImageSet], clean: ImageSet | None) -> Sources:
        available = len(next(iter(sets.values())).labels)
        rows = np.arange(count_of(self.images, available))
        probe, source = probe_rows(available, rows, self)
        notes: dict[str, object] = {
            "probe_from": source,
            "clean": "test images" if clean else f"none found: {self.clean_about.layout}",
        }
        held_out = np.setdiff1d(np.arange(available), np.union1d(rows, probe))
        return Sources.aligned(sets, rows, probe, clean, held_out, notes)

    def training(self, folder: Path) -> ImageSet:
        return cifar(folder, self.which, train=True)


@dataclass(frozen=True, kw_only=True)
class Cifar10Clean(CleanData):
    """The clean test images."""

    about = ABOUT
    preset = "cifar"
    which: ClassVar[Cifar] = "cifar10"

    def read(self, root: str) -> Clean:
        base = cifar(existing_root(root, about(self.which)), self.which, train=False)
        return Clean(base, np.arange(len(base.labels)), base, np.zeros(0, np.int64), False)

    def training(self, folder: Path) -> ImageSet:
        return cifar(folder, self.which, train=True)


def clean_instead(root: Path, which: Cifar) -> str:
    """What to set where clean images are there and the corrupted ones are not; else empty."""
    clean = cifar_beside(root, which)
    return "" if clean is None else instead(len(clean.labels), root, "scenario.corrupt=on_the_fly")


def cifar_c(
    root: Path, which: Cifar, corruptions: Sequence[str], severities: Sequence[int]
) -> dict[tuple[str, int], ImageSet]:
    """`(corruption, severity) -> images`: rows 10000(s-1) ... 10000 s - 1 of each .npy file.

    Raises:
        UserError: naming every missing file, or as `corruption_arrays`.
    """
    record = about(f"{which}_c")
    name = FOLDERS[which]
    base = first_folder(root, [name], ["labels.npy", *(f"{c}.npy" for c in corruptions)])
    if base is None:
        what = "holds no arrays" if (root / name).is_dir() else "does not exist"
        packed = still_packed(root / name) or still_packed(root, named=name)
        clean = clean_instead(root, which)
        raise UserError(f"{root / name} {what}. {packed}{clean}{record.expected}")
    files = ["labels.npy", *(f"{c}.npy" for c in corruptions)]
    missing = [f for f in files if not (base / f).is_file()]
    if missing:
        raise UserError(
            f"{base} lacks {len(missing)} of {len(files)} files: {', '.join(missing[:6])}"
            f"{' ...' if len(missing) > 6 else ''}. {still_packed(base)}"
            f"{clean_instead(root, which)}{record.expected}"
        )
    return dict(corruption_arrays(base, corruptions, severities, 10 if which == "cifar10" else 100))
