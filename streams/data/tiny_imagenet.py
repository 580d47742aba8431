"""Tiny ImageNet: 200 classes of ImageNet at 64 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from driftline.core.errors import UserError
from driftline.streams.dataset import About, Split, first_folder
from driftline.streams.downloads import Download, Published
from driftline.streams.images import Files, image_folder, in_classes_of
from driftline.streams.listings import read_list
from driftline.streams.splits import NamedSplit, by_text, entries

ABOUT = About(
    title="Tiny ImageNet",
    paper="Le and Yang, CS 231N course project, 2015",
    published="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    licence="none stated; for the images the terms of ImageNet",
    layout="<data.root>/tiny-imagenet-200/train/<wnid>/images/*.JPEG, val/images/*.JPEG and "
    "val/val_annotations.txt, or val/<wnid>/",
    label_space="",
    name="tiny_imagenet",
    download=Download(
        (
            Published(
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                ("tiny-imagenet-200",),
                size=248_100_043,
                checksum="md5:90528d7ca1a48142e341f4ef8d21d0de",
            ),
        ),
        command="scenario=split_tiny_imagenet",
        sources="size and MD5: as Avalanche and other libraries check them",
    ),
)


@dataclass(frozen=True, kw_only=True)
class TinyImageNet(NamedSplit):
    """The training images, tested on the validation images: the labels of the test are secret."""

    about = ABOUT
    classes = 200

    def read(self, root: Path) -> Split:
        names = ("tiny-imagenet-200", "tiny-imagenet")
        folder = first_folder(root, names, ("train", "val")) or root / names[0]
        train, val = entries(folder, ("train", "val"), ABOUT)
        images = by_text(image_folder(train, ABOUT.expected))
        if (val / "images").is_dir():
            return self.checked(images, annotated(val, images.class_names), (100_000, 10_000))
        test = image_folder(val, ABOUT.expected)
        in_classes_of(test, images)
        return self.checked(images, test, (100_000, 10_000))


def annotated(val: Path, classes: Sequence[str]) -> Files:
    """Validation images as they are published: in one folder, with a table of their classes.

    Raises:
        UserError: without the table, or for a class in it that is none of `classes`.
    """
    _, table = entries(val, ("images", "val_annotations.txt"), ABOUT)
    rows = [line.split() for line in read_list(table)]
    position = {name: label for label, name in enumerate(classes)}
    unknown = [row for row in rows if len(row) < 2 or row[1] not in position]
    if unknown:
        raise UserError(f"{table}: {' '.join(unknown[0])!r} names no class of the training images")
    labels = np.asarray([position[row[1]] for row in rows], np.int64)
    return Files(val, [f"images/{row[0]}" for row in rows], labels, classes)
