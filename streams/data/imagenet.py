"""ImageNet-1k: clean images, their labels and lists of them."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import driftline.core.vision  # noqa: F401  # isort: skip

import numpy as np
from PIL import Image
from torchvision import transforms as T

from driftline.core.errors import UserError
from driftline.core.seed import derive
from driftline.streams.dataset import About
from driftline.streams.downloads import Download
from driftline.streams.images import Derived, Files, ImageSet, image_folder

ABOUT = About(
    title="ImageNet-1k (ILSVRC2012), validation images",
    paper="Russakovsky et al., IJCV 2015",
    published="https://image-net.org/download.php (ILSVRC2012 validation images)",
    licence="non-commercial research and education, on registration",
    layout="<data.root>/val/<wnid>/*.JPEG, or flat images with labels.csv "
    "(columns filename, class_index)",
    label_space="imagenet1k",
    name="imagenet",
    download=Download(
        by_hand="Register at https://image-net.org/download.php, load ILSVRC2012_img_val.tar (6.7 "
        "GB) and ILSVRC2012_devkit_t12.tar.gz into data.root, then sort the images into folders: "
        "pip install scipy; python -c 'from torchvision.datasets import ImageNet; "
        'ImageNet("DATA_ROOT", "val")\'; training images: the same with ILSVRC2012_img_train.tar '
        '(148 GB) and "train"',
        command="scenario=imagenet_c scenario.corrupt=on_the_fly",
    ),
)

CROP = "resize 256, crop 224"  # how ImageNet-C was made from the validation images
_CROP = T.Compose([T.Resize(256, T.InterpolationMode.BILINEAR), T.CenterCrop(224)])


def crop(image: Image.Image, row: int) -> Image.Image:
    return _CROP(image)


def cropped(images: ImageSet) -> ImageSet:
    """Images as networks of ImageNet expect them, 224 px."""
    return Derived(images, crop, CROP)


@cache
def wnids() -> list[str]:
    """The 1,000 synset ids of ImageNet-1k in label order."""
    from timm.data import ImageNetInfo

    return [str(name) for name in ImageNetInfo().label_names()]


def canonical(files: Files) -> Files:
    """Folder names that are synset ids get their ImageNet-1k label."""
    position = {w: i for i, w in enumerate(wnids())}
    unknown = [c for c in files.class_names if c not in position]
    if unknown:
        raise UserError(
            f"{files.root} has class folders that are no ImageNet-1k synset ids: {unknown[:3]}"
        )
    canonical = np.asarray([position[c] for c in files.class_names])
    return Files(files.root, files.names, canonical[files.labels], wnids())


def published_list() -> list[str]:
    """The fixed, shuffled 5,000-image list of RobustBench: `wnid/ILSVRC2012_val_*.JPEG`."""
    path = Path(__file__).parents[1] / "lists" / "imagenet_c_5000.txt"
    return path.read_text().split()


def chosen(names: Sequence[str], image_list: str, seed: int, root: Path) -> np.ndarray:
    """Rows of `names` in stream order, by `image_list` (published | all | a file).

    Raises:
        UserError: if there is no such list, or an image of it is missing under `root`.
    """
    if image_list == "all":
        return np.random.default_rng(derive(seed, "subset")).permutation(len(names))
    path = Path(image_list)
    if image_list != "published" and not path.is_file():
        raise UserError(
            f"scenario.image_list={image_list}: no such file; give a text file with one "
            "<wnid>/<file> a line, or `published` or `all`"
        )
    try:
        listed = published_list() if image_list == "published" else path.read_text().split()
    except ValueError as error:
        raise UserError(f"scenario.image_list={image_list}: not a text file ({error})") from error
    position = {Path(n).with_suffix("").as_posix(): i for i, n in enumerate(names)}
    rows = [position.get(Path(n).with_suffix("").as_posix(), -1) for n in listed]
    missing = [n for n, r in zip(listed, rows, strict=True) if r < 0]
    if missing:
        raise UserError(
            f"{root} lacks {len(missing)} of the {len(listed)} images of "
            f"scenario.image_list={image_list} (first: {missing[0]}); complete the set, or set "
            "scenario.image_list=all to draw from the images that are there"
        )
    return np.asarray(rows)


def imagenet_clean(root: Path) -> Files:
    """Clean ImageNet images: a class-folder tree or flat files with `labels.csv`.

    Raises:
        UserError: if neither is there.
    """
    for base in (root, root / "imagenet", root / "ImageNet"):
        if (base / "labels.csv").is_file():
            try:
                with open(base / "labels.csv", newline="") as file:
                    rows = list(csv.DictReader(file))
                labels = np.asarray([int(r["class_index"]) for r in rows if r["filename"]])
            except (ValueError, TypeError, KeyError, csv.Error) as error:
                raise UserError(
                    f"{base / 'labels.csv'} needs the columns filename and class_index, a number: "
                    f"{error}"
                ) from error
            if len(labels) < max(len(rows), 1):
                raise UserError(f"{base / 'labels.csv'} needs the columns filename, class_index")
            if labels.min() < 0 or labels.max() >= 1000:
                raise UserError(f"{base / 'labels.csv'}: class_index must lie in 0..999")
            return Files(base, [r["filename"] for r in rows], labels, wnids())
    for base in (root / "imagenet" / "val", root / "ImageNet" / "val", root / "val", root):
        if base.is_dir() and any(e.is_dir() and e.name.startswith("n0") for e in os.scandir(base)):
            return canonical(image_folder(base, ABOUT.expected))
    raise UserError(f"no clean ImageNet images under data.root={root}. {ABOUT.expected}")


def imagenet_train(root: Path) -> Files:
    """Labelled ImageNet training images, `<root>/train/<wnid>/*.JPEG` or class folders in `root`.

    Raises:
        UserError: if there are none.
    """
    for base in (root / "imagenet" / "train", root / "ImageNet" / "train", root / "train", root):
        if base.is_dir() and any(e.is_dir() and e.name.startswith("n0") for e in os.scandir(base)):
            return canonical(image_folder(base, ABOUT.expected))
    raise UserError(
        f"no ImageNet training images under {root}: expected train/<wnid>/*.JPEG. This method "
        "prepares on labelled source images: complete data.root, or set scenario.source_from to "
        "another folder of class folders, or to held_out (clean images outside the stream). "
        f"{ABOUT.how}"
    )
