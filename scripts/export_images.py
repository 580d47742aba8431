"""Write images held in .npz archives as class folders of PNG files, for scenario=split_imagefolder.

    python scripts/export_images.py TRAIN.npz TEST.npz OUT

Each archive holds one uint8 array [N, H, W, 3] and one integer array [N] of labels; an array of
strings, if there is one, names the classes. OUT/train and OUT/test are made whole or not at all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from driftline.core.console import program
from driftline.core.errors import UserError
from driftline.core.ranges import plain_name


def export(archive: Path, folder: Path) -> int:
    """Write one archive; returns the number of images.

    Raises:
        UserError: if the archive has no image array, no matching label array, or classes whose
            names would lead out of the folder.
    """
    try:
        with np.load(archive, allow_pickle=False) as data:
            arrays = {k: data[k] for k in data.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{archive}: no archive of arrays ({error})") from error
    images = next((a for a in arrays.values() if a.ndim == 4 and a.dtype == np.uint8), None)
    if images is None:
        raise UserError(f"{archive}: no uint8 array [N, H, W, 3]")
    labels = next(
        (a for a in arrays.values() if a.shape == images.shape[:1] and a.dtype.kind in "iu"), None
    )
    if labels is None:
        raise UserError(f"{archive}: no integer array [{len(images)}] of labels")
    names = next(
        (a for a in arrays.values() if a.dtype.kind == "U" and len(a) == labels.max() + 1),
        np.asarray([str(i) for i in range(labels.max() + 1)]),
    )
    places = [f"{label:03d}_{name}" for label, name in enumerate(names)]
    if labels.min() < 0 or not all(map(plain_name, places)):
        raise UserError(f"{archive}: labels below 0, or names of classes that are no folder's")
    part = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    for row, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        place = part / places[label]  # sorted folders keep the label order
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{row:06d}.png")
    os.replace(part, folder)
    return len(images)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    for split in ("train", "test"):
        target = args.out / split
        if target.exists():
            print(f"{target} exists already", file=sys.stderr)
            return 2
        args.out.mkdir(parents=True, exist_ok=True)
        try:
            print(f"{target}: {export(getattr(args, split), target)} images")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
