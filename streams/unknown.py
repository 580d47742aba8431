"""Images of classes outside the label space, mixed into the batches of an adaptation stream.

The settings of UniEnt (Gao et al., CVPR 2024), OSTTA (Lee et al., ICCV 2023) and STAMP (Yu et al., ECCV
2024): the unknown images are under the same shift as the known ones, and a method is told neither
which ones they are nor how many. UniEnt puts as many into each batch (`unknown_share=0.5`); STAMP
shuffles 2,500 into the whole test set of a domain. Their label is -1; what is measured is in
`core/open_world.py`.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import driftline.core.vision  # noqa: F401  # isort: skip

import numpy as np
from PIL import Image
from torchvision import transforms as T

from driftline.core.errors import UserError
from driftline.core.ranges import Below1, Seed
from driftline.core.seed import derive
from driftline.core.stream import Batch
from driftline.streams.dataset import ShiftData
from driftline.streams.images import Derived, ImageSet, image_folder
from driftline.streams.loading import Rows
from driftline.streams.orders import Domain

CLASSES = 20  # embedded ones, of those that no embedded classifier knows


def _fit(image: Image.Image, row: int, *, width: int, height: int) -> Image.Image:
    """Cut to the size of known images; 224 px as ImageNet-C was made, out of 256."""
    shorter = 256 if min(width, height) == 224 else max(width, height)
    resize = T.Resize(shorter, T.InterpolationMode.BILINEAR)
    return T.CenterCrop([height, width])(resize(image))


@dataclass(frozen=True, kw_only=True)
class Unknown:
    """Which unknown images, and how many of them.

    Args:
        unknown_share: of the images of every batch; 0: none.
        unknown_from: folder of class folders with clean images, which get the shift of each domain;
            None: embedded images, of classes that are not those of the embedded stream.
    """

    unknown_share: Below1
    unknown_from: str | None
    order_seed: Seed

    def among(
        self,
        dealt: list[tuple[str, int, Rows]],
        data: ShiftData,
        domains: Sequence[Domain],
        like: Image.Image,
        batch_size: int,
    ) -> tuple[list[tuple[str, int, Rows]], list[ImageSet]]:
        """Segments (name, round, images) with unknown images in every batch, and these by domain.

        Args:
            like: a known image, of the size that the unknown ones get.

        Raises:
            UserError: for a share, a folder or a number of images that does not fit.
        """
        count = self._of(batch_size)
        longest = max(len(rows) for *_, rows in dealt)
        needed = count * (longest // (batch_size - count) + 1)
        sets = self._sets(data, domains, like, needed)
        available = len(sets[0].labels)
        mixed = [
            (name, turn, self._mixed(name, rows, batch_size, len(domains), available))
            for name, turn, rows in dealt
        ]
        return mixed, sets

    def in_their_domains(
        self, batches: Iterator[Batch | None], domains: int
    ) -> Iterator[Batch | None]:
        """Batches of a reader, to which unknown images are further sets after the domains."""
        if not self.unknown_share:
            return batches
        return (
            batch if batch is None else batch._replace(domain=batch.domain % domains)
            for batch in batches
        )

    def _of(self, size: int) -> int:
        """Unknown images in a batch of `size`.

        Raises:
            UserError: if that is none, or all.
        """
        count = round(self.unknown_share * size)
        if not 0 < count < size:
            raise UserError(
                f"scenario.unknown_share={self.unknown_share} makes {count} of the {size} images "
                "of a batch unknown; there must be at least one of each kind"
            )
        return count

    def _sets(
        self, data: ShiftData, domains: Sequence[Domain], like: Image.Image, needed: int
    ) -> list[ImageSet]:
        """The unknown images under each domain.

        Args:
            like: a known image, of the size that these get.
            needed: images that an embedded set has at least.

        Raises:
            UserError: for a folder that is missing, or stands where images are embedded.
        """
        base: ImageSet
        if data.data_root is None:
            if self.unknown_from is not None:
                raise UserError(
                    f"scenario.unknown_from={self.unknown_from}: beside embedded images, unknown "
                    "ones are embedded, too; give data.root, or leave it out"
                )
            from driftline.streams.embedded import TASK_CLASSES, EmbeddedImages

            per_class = -(-needed // CLASSES)
            base = EmbeddedImages(TASK_CLASSES[:CLASSES], split="test", per_class=per_class)
        elif self.unknown_from is None:
            raise UserError(
                f"scenario.unknown_share={self.unknown_share} needs scenario.unknown_from: a "
                "folder of class folders with images of other classes"
            )
        else:
            width, height = like.size
            folder = Path(self.unknown_from)
            files = image_folder(folder, "scenario.unknown_from: <folder>/<class>/<image>")
            fit = partial(_fit, width=width, height=height)
            base = Derived(files, fit, f"cut to {width} x {height}")
        alike = data.alike(base, list(domains))
        return [alike[d] for d in domains]

    def _mixed(self, name: str, rows: Rows, batch_size: int, domains: int, available: int) -> Rows:
        """`rows` with unknown images in every batch, in an order drawn for each batch.

        Args:
            name: of the segment.
            domains: number of them; domain d of unknown images is `domains + d`. In a batch the
                unknown ones come from the domains of the known ones.
            available: unknown images of each domain; a segment shows none of them twice.

        Raises:
            UserError: if they are too few.
        """
        count = self._of(batch_size)
        known = batch_size - count
        rng = np.random.default_rng(derive(self.order_seed, "unknown", name))
        order = np.random.default_rng(derive(self.order_seed, "unknown")).permutation(available)
        used = np.zeros(domains, np.int64)
        parts = []
        for start in range(0, len(rows), known):
            here = rows.take(np.arange(start, min(start + known, len(rows))))
            many = round(count * len(here) / known)
            domain = here.domain[np.arange(many) * len(here) // max(1, many)]
            place = np.zeros(many, np.int64)
            for d in np.unique(domain):
                mine = domain == d
                place[mine] = used[d] + np.arange(mine.sum())
                used[d] += mine.sum()
            if used.max() > available:
                raise UserError(
                    f"scenario.unknown_share={self.unknown_share} takes more unknown images than "
                    f"the {available} of scenario.unknown_from; take a smaller share, or fewer "
                    "scenario.images"
                )
            strangers = Rows(order[place], np.full(many, -1, np.int64), domain + domains)
            parts.append(Rows.join([here, strangers]).take(rng.permutation(len(here) + many)))
        return Rows.join(parts)
