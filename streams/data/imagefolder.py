"""Class folders of your own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from driftline.streams.dataset import About, Split, SplitData
from driftline.streams.images import image_folder, in_classes_of

ABOUT = About(
    title="class folders",
    paper="",
    published="any set of yours",
    licence="yours",
    layout="<data.root>/train/<class>/<image> and <data.root>/test/<class>/<image>",
    label_space="",
)


@dataclass(frozen=True, kw_only=True)
class FolderSplit(SplitData):
    """Training and test images in class folders."""

    about = ABOUT

    def read(self, root: Path) -> Split:
        train, test = (image_folder(root / s, ABOUT.expected) for s in ("train", "test"))
        in_classes_of(test, train)
        return train, test
