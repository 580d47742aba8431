"""ImageNet-C: released files, or corruptions of clean images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from driftline.core.errors import UserError
from driftline.streams import corruptions as C
from driftline.streams.corrupted import CorruptedData, instead
from driftline.streams.data.imagenet import ABOUT as CLEAN
from driftline.streams.data.imagenet import (
    CROP,
    canonical,
    chosen,
    crop,
    cropped,
    imagenet_beside,
    imagenet_clean,
    imagenet_train,
    outside,
)
from driftline.streams.dataset import (
    About,
    Clean,
    CleanData,
    Sources,
    count_of,
    existing_root,
    first_folder,
    probe_rows,
)
from driftline.streams.downloads import Download, Published
from driftline.streams.images import Derived, Files, ImageSet, image_folder, still_packed
from driftline.streams.orders import Domain

ARCHIVES = {  # group -> bytes, MD5, corruptions
    "noise": (
        22_565_673_785,
        "e80562d7f6c3f8834afb1ecf27252745",
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
    ),
    "blur": (
        7_112_704_951,
        "2d8e81fdd8e07fef67b9334fa635e45c",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
    ),
    "weather": (
        12_797_438_995,
        "33ffea4db4d93fe4a428c40a6ce0c25d",
        "snow",
        "frost",
        "fog",
        "brightness",
    ),
    "digital": (
        7_757_510_705,
        "89157860d7b10d5797849337ca2e5c03",
        "contrast",
        "elastic_transform",
        "pixelate",
        "jpeg_compression",
    ),
    "extra": (
        15_789_490_144,
        "d492dfba5fc162d8ec2c3cd8ee672984",
        "speckle_noise",
        "spatter",
        "gaussian_blur",
        "saturate",
    ),
}

ABOUT = About(
    title="ImageNet-C",
    paper="Hendrycks and Dietterich, ICLR 2019",
    published="https://zenodo.org/records/2235448",
    licence="CC BY 4.0",
    layout="<data.root>/ImageNet-C/<corruption>/<severity 1-5>/<wnid>/*.JPEG",
    label_space="imagenet1k",
    name="imagenet_c",
    download=Download(
        tuple(
            Published(
                f"https://zenodo.org/records/2235448/files/{group}.tar?download=1",
                tuple(f"ImageNet-C/{corruption}" for corruption in corruptions),
                size=size,
                checksum=f"md5:{md5}",
                into="ImageNet-C",
                part=group,
                optional=group == "extra",
            )
            for group, (size, md5, *corruptions) in ARCHIVES.items()
        ),
        sources="MD5: as several libraries check them; sizes: as a study read them at Zenodo",
    ),
)
FOLDERS = ("ImageNet-C", "imagenet-c", "imagenet_c")


@dataclass(frozen=True, kw_only=True)
class ImageNetC(CorruptedData):
    """Corrupted validation images."""

    about = ABOUT
    clean_about = CLEAN
    preset = "imagenet"
    folders = FOLDERS

    def released(self, root: Path, domains: list[Domain]) -> Sources:
        names, severities = (list(dict.fromkeys(part)) for part in zip(*domains, strict=True))
        folders = imagenet_c(root, names, severities)
        first = canonical(image_folder(folders[domains[0]], ABOUT.expected))
        sets: dict[Domain, ImageSet] = {
            d: Files(folders[d], first.names, first.labels, first.class_names) for d in domains
        }
        clean = imagenet_beside(root)
        rows, probe, notes = self._rows(first.names, first.root)
        return Sources.aligned(
            self._resized(sets),
            rows,
            probe,
            cropped(clean) if clean else None,
            outside(clean, [first.names[i] for i in np.union1d(rows, probe)]),
            {**notes, "clean": "validation images" if clean else f"none found: {CLEAN.layout}"},
        )

    def on_the_fly(self, root: Path, domains: list[Domain]) -> Sources:
        try:
            files = imagenet_clean(root)
        except UserError as error:
            if first_folder(root, FOLDERS, [*C.STANDARD, *GROUPS]) is None:
                raise
            text = "Corrupted images are there: scenario.corrupt=released takes them. "
            raise UserError(f"{text}{error}") from error
        clean = cropped(files)
        rows, probe, notes = self._rows(files.names, root)
        sets = self._resized(self.generated(clean, domains, self.cache))
        held_out = np.setdiff1d(np.arange(len(files.labels)), np.union1d(rows, probe))
        noted = {**notes, "jpeg_quality": self.jpeg_quality}
        return Sources.aligned(sets, rows, probe, clean, held_out, noted)

    def _rows(
        self, names: Sequence[str], root: Path
    ) -> tuple[np.ndarray, np.ndarray, dict[str, object]]:
        """Rows of the stream and of the probes, and what is noted of them."""
        rows = chosen(names, self.image_list, self.order_seed, root)
        rows = rows[: count_of(self.images, len(rows))]
        probe, source = probe_rows(len(names), rows, self)
        notes: dict[str, object] = {
            "image_list": self.image_list,
            "legacy_resize": self.legacy_resize,
            "probe_from": source,
        }
        return rows, probe, notes

    def _resized(self, sets: dict[Domain, ImageSet]) -> dict[Domain, ImageSet]:
        """The resize that old loaders applied to images that were 224 px already."""
        if not self.legacy_resize:
            return sets
        return {d: Derived(images, crop, f"legacy {CROP}") for d, images in sets.items()}

    def training(self, folder: Path) -> ImageSet:
        return cropped(imagenet_train(folder))


@dataclass(frozen=True, kw_only=True)
class ImageNetClean(CleanData):
    """The clean validation images."""

    about = ABOUT
    preset = "imagenet"

    def read(self, root: str) -> Clean:
        files = imagenet_clean(existing_root(root, CLEAN))
        rows = chosen(files.names, self.image_list, self.order_seed, files.root)
        held_out = np.setdiff1d(np.arange(len(files.labels)), rows)
        return Clean(files, rows, cropped(files), held_out, True)

    def training(self, folder: Path) -> ImageSet:
        return cropped(imagenet_train(folder))


GROUPS = ("noise", "blur", "weather", "digital", "extra")  # how the archives are grouped


def clean_instead(root: Path) -> str:
    """What to set where clean images are there and the corrupted ones are not; else empty."""
    files = imagenet_beside(root)
    if files is None:
        return ""
    try:
        chosen(files.names, "published", 0, root)
        settings = "scenario.corrupt=on_the_fly"
    except UserError:  # images of the published list are missing
        settings = "scenario.corrupt=on_the_fly scenario.image_list=all"
    return instead(len(files.names), files.root, settings)


def imagenet_c(
    root: Path, corruptions: Sequence[str], severities: Sequence[int]
) -> dict[tuple[str, int], Path]:
    """`(corruption, severity) -> folder` of the released ImageNet-C.

    Raises:
        UserError: naming every missing corruption folder.
    """
    base = first_folder(root, FOLDERS, [*corruptions, *GROUPS])
    if base is None:
        packed = still_packed(root, *(root / name for name in FOLDERS))
        raise UserError(
            f"ImageNet-C is not under data.root={root} (looked for {root / 'ImageNet-C'} and "
            f"{root / corruptions[0]}). {packed}{clean_instead(root)}{ABOUT.expected}"
        )
    sets, missing = {}, []
    for corruption in corruptions:
        for severity in severities:
            places = [base / corruption / str(severity)]
            places += [base / g / corruption / str(severity) for g in (*GROUPS, corruption)]
            places += [base / g / g / corruption / str(severity) for g in GROUPS]
            there = [p for p in places if p.is_dir()]
            if there:
                sets[corruption, severity] = there[0]
            else:
                missing.append(f"{corruption}/{severity}")
    if missing:
        raise UserError(
            f"{base} lacks {len(missing)} of {len(missing) + len(sets)} corruption folders: "
            f"{', '.join(missing[:6])}{' ...' if len(missing) > 6 else ''}. "
            f"{still_packed(base, root)}{clean_instead(root)}{ABOUT.expected}"
        )
    return sets
