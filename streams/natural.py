"""Sets of natural shifts: each domain has images of its own, as they were taken."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import MinLen, Predicate

from driftline.core.errors import UserError, suggest
from driftline.core.ranges import distinct
from driftline.core.seed import derive
from driftline.streams.corrupted import corrupted, stand_ins
from driftline.streams.dataset import ShiftData, Sources, count_of, existing_root, probe_rows
from driftline.streams.images import ImageSet
from driftline.streams.orders import Domain, called

# What stands for the domains where the images are embedded ones, in turn, at severity 3.
STAND_INS = ("contrast", "fog", "pixelate", "gaussian_noise", "brightness", "defocus_blur")
SETTINGS = {"preset": "cifar", "seed": 0, "jpeg_quality": None, "frost_dir": None}


def _stand_ins(domains: list[Domain]) -> dict[Domain, Domain]:
    return {d: (STAND_INS[i % len(STAND_INS)], 3) for i, d in enumerate(domains)}


def as_stand_ins(base: ImageSet, kinds: dict[Domain, Domain]) -> dict[Domain, ImageSet]:
    """Embedded images under the corruptions that stand for the domains."""
    sets = corrupted(base, list(dict.fromkeys(kinds.values())), "memory", **SETTINGS)
    return {d: sets[kind] for d, kind in kinds.items()}


@dataclass(frozen=True, kw_only=True)
class NaturalData(ShiftData):
    """Domains with names and no severities, images in an order drawn once.

    Args:
        domains: which, in stream order; None: all of them.
    """

    all_domains: ClassVar[tuple[str, ...]]  # of the data set, in the order of its paper
    shuffled: ClassVar[bool] = True  # False: in the order of the files

    domains: Annotated[list[str], MinLen(1), Predicate(distinct)] | None

    def names(self) -> list[str]:
        known = self.known()
        for name in self.domains or []:
            if name not in known:
                raise UserError(
                    f"scenario.domains: {name!r} is no domain of {self.about.title}"
                    f"{suggest(name, known)}. Known: {', '.join(known)}"
                )
        return list(self.domains or known)

    def known(self) -> list[str]:
        """Every domain of the set."""
        return list(self.all_domains)

    @abstractmethod
    def read(self, root: Path, domain: str) -> ImageSet:
        """The images of one domain under `root`; their labels are those of the label space.

        Raises:
            UserError: if they are missing.
        """

    def clean(self, root: Path) -> ImageSet | None:
        """Evaluation images of the source domain, for source forgetting; None without any."""
        return None

    def alike(self, base: ImageSet, domains: list[Domain]) -> dict[Domain, ImageSet]:
        """As they are; embedded ones as the stand-ins of the domains."""
        if self.data_root is not None:
            return super().alike(base, domains)
        return as_stand_ins(base, _stand_ins(domains))

    def sources(self, domains: list[Domain]) -> Sources:
        if self.data_root is None:
            return stand_ins(_stand_ins(domains), self, SETTINGS)
        root = existing_root(self.data_root, self.about)
        sets = {d: self.read(root, d[0]) for d in domains}
        if self.shuffled and self.about.label_space != "own":  # else a part may be what is asked
            self._check_classes(sets, root)
        return self.arranged(sets, self.clean(root))

    def _check_classes(self, sets: dict[Domain, ImageSet], root: Path) -> None:
        """Warn of domains without images of a class."""
        for d, images in sets.items():
            wanted = set(self.about.subset or range(images.num_classes))
            if lacking := len(wanted - set(images.labels.tolist())):
                warnings.warn(
                    f"{self.about.title}, {called(d)}: {lacking:,} of {len(wanted):,} classes "
                    f"have no image under {root}; results are not those of the published set",
                    stacklevel=3,
                )

    def arranged(self, sets: dict[Domain, ImageSet], clean: ImageSet | None) -> Sources:
        """Which images of each domain the stream and its probes show.

        Args:
            clean: images of the source domain that are in none of `sets`.
        """
        rows, probe, notes = {}, {}, {}
        for d, images in sets.items():
            listed = np.arange(len(images.labels))
            if self.shuffled:
                listed = np.random.default_rng(derive(self.order_seed, "subset")).permutation(
                    listed
                )
            rows[d] = listed[: count_of(self.images, len(listed))]
            probe[d], notes[called(d)] = probe_rows(len(listed), rows[d], self)
        return Sources(
            sets=sets,
            rows=rows,
            probe=probe,
            probe_sets=sets,
            clean=clean,
            held_out=np.arange(0 if clean is None else len(clean.labels)),
            notes={
                "probe_from": notes,
                "clean": "none" if clean is None else "evaluation images of the source",
            },
        )
