"""Class folders of your own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from driftline.core.errors import UserError
from driftline.streams.dataset import About, Split, SplitData
from driftline.streams.images import image_folder

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
        unknown = sorted(set(test.class_names) - set(train.class_names))
        if unknown:
            raise UserError(f"{root / 'test'} has classes that train lacks: {unknown[:5]}")
        position = np.asarray([train.class_names.index(c) for c in test.class_names])
        test.labels, test.class_names = position[test.labels], train.class_names
        return train, test
