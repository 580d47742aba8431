"""ImageNet-1k: clean images, their labels and lists of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import driftline.core.vision  # noqa: F401  # isort: skip

import numpy as np
from PIL import Image
from torchvision import transforms as T

from driftline.core.errors import UserError
from driftline.core.seed import derive
from driftline.streams.dataset import About
from driftline.streams.downloads import Download
from driftline.streams.images import (
    Derived,
    Files,
    ImageSet,
    holds_images,
    image_folder,
    is_number,
    still_packed,
    subfolders,
    unfolded,
)
from driftline.streams.listings import find_listed, read_labels, read_list

ABOUT = About(
    title="ImageNet-1k (ILSVRC2012), validation images",
    paper="Russakovsky et al., IJCV 2015",
    published="https://image-net.org/download.php (ILSVRC2012 validation images)",
    licence="non-commercial research and education, on registration",
    layout="<data.root>/val/<wnid>/*.JPEG, or flat images with labels.csv "
    "(columns filename, class_index); folders may also be named by label, 0 to 999",
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


def canonical(files: Files, *, numbered: bool = False) -> Files:
    """Folder names that are synset ids, or numbers from 0 to 999, get that ImageNet-1k label.

    Args:
        numbered: numbers are the published names; else a warning says what they are taken for.

    Raises:
        UserError: for others.
    """
    position = {w: i for i, w in enumerate(wnids())}
    if all(map(is_number, files.class_names)):
        position = {name: int(name) for name in files.class_names if int(name) < len(wnids())}
        if not numbered:
            warnings.warn(
                f"{files.root}: the numbers of its class folders are taken as labels of "
                "ImageNet-1k (sorted synset ids)",
                stacklevel=2,
            )
    unknown = [c for c in files.class_names if c not in position]
    if unknown:
        raise UserError(
            f"{files.root} has class folders that are no ImageNet-1k synset ids: {unknown[:3]}; "
            "name them like n01440764, or by label, 0 to 999"
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
    lines = published_list() if image_list == "published" else read_list(path)
    rows, missing = find_listed(lines, names)
    if missing or not lines:
        raise UserError(
            f"{root} lacks {len(missing)} of the {len(lines)} images of "
            f"scenario.image_list={image_list} (first: {[*missing, 'none is listed'][0]}; images "
            f"there are named like {names[0]}); complete the set, or set scenario.image_list=all "
            "to draw from the images that are there"
        )
    return rows


def imagenet_clean(root: Path) -> Files:
    """Clean ImageNet images: a class-folder tree or flat files with `labels.csv`.

    Raises:
        UserError: if neither is there.
    """
    for base in (root, root / "imagenet", root / "ImageNet"):
        if (base / "labels.csv").is_file():
            table = read_labels(base / "labels.csv", len(wnids()))
            return Files(base, table.names, table.labels, wnids())
    base = _class_folders(root, "val")
    if base is not None:
        return canonical(image_folder(base, ABOUT.expected))
    packed = still_packed(root, root / "imagenet", root / "ImageNet")
    raise UserError(f"no clean ImageNet images under data.root={root}. {packed}{ABOUT.expected}")


def _class_folders(root: Path, split: Literal["train", "val"]) -> Path | None:
    """The folder that holds class folders of ImageNet, named by synset id or label."""
    for base in (root / "imagenet" / split, root / "ImageNet" / split, root / split, root):
        base = unfolded(base)
        names = subfolders(base) if base.is_dir() else []
        if any(name.startswith(("n0", "n1")) for name in names):
            return base
        # Folders of severities are numbers, too, but hold no images themselves.
        if names and all(map(is_number, names)) and holds_images(base / names[0]):
            return base
    return None


def imagenet_beside(root: Path) -> Files | None:
    """As `imagenet_clean`, for sets that come without these images; None where there are none."""
    try:
        return imagenet_clean(root)
    except UserError:
        return None


def outside(clean: Files | None, used: Sequence[str]) -> np.ndarray:
    """Rows of the clean images whose file, whatever its folder and suffix, is not a `used` one."""
    stems = {Path(n).stem for n in used}
    names = clean.names if clean else []
    return np.asarray([i for i, n in enumerate(names) if Path(n).stem not in stems], np.int64)


def imagenet_train(root: Path) -> Files:
    """Labelled ImageNet training images, `<root>/train/<wnid>/*.JPEG` or class folders in `root`.

    Raises:
        UserError: if there are none.
    """
    base = _class_folders(root, "train")
    if base is not None:
        return canonical(image_folder(base, ABOUT.expected))
    raise UserError(
        f"no ImageNet training images under {root}: expected train/<wnid>/*.JPEG. This method "
        "prepares on labelled source images: complete data.root, or set scenario.source_from to "
        "another folder of class folders, or to held_out (clean images outside the stream). "
        f"{ABOUT.how}"
    )
