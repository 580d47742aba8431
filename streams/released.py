"""Sets of corrupted images that are there as files alone, in the layout of ImageNet-C."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import MinLen, Predicate

from driftline.core.errors import UserError, suggest
from driftline.core.ranges import distinct
from driftline.streams.corrupted import Severity, stand_ins
from driftline.streams.data.imagenet import (
    canonical,
    chosen,
    cropped,
    imagenet_beside,
    imagenet_train,
    outside,
)
from driftline.streams.dataset import (
    ShiftData,
    Sources,
    count_of,
    existing_root,
    first_folder,
    probe_rows,
)
from driftline.streams.images import Files, ImageSet, image_folder, still_packed
from driftline.streams.natural import SETTINGS, STAND_INS, as_stand_ins
from driftline.streams.orders import Domain


@dataclass(frozen=True, kw_only=True)
class ReleasedCorruptions(ShiftData):
    """Corrupted validation images of ImageNet: `<corruption>/<severity>/<wnid>/<image>`.

    Row i is the same image in each domain.

    Args:
        corruptions: which, in stream order; None: all of them.
        image_list: `all`, `published` (the 5,000 of RobustBench), or a text file.
    """

    folders: ClassVar[Sequence[str]]  # names that the folder of the set may have
    all_corruptions: ClassVar[Sequence[str]]
    parameters: ClassVar[Mapping[str, Sequence[float]]] = {}  # folders of the authors' own script

    corruptions: Annotated[list[str], MinLen(1), Predicate(distinct)] | None
    severity: Severity | Annotated[list[Severity], MinLen(1), Predicate(distinct)]
    image_list: str

    def names(self) -> list[str]:
        for name in self.corruptions or []:
            if name not in self.all_corruptions:
                raise UserError(
                    f"scenario.corruptions: {name!r} is no corruption of {self.about.title}"
                    f"{suggest(name, self.all_corruptions)}. Known: "
                    f"{', '.join(self.all_corruptions)}"
                )
        return list(self.corruptions or self.all_corruptions)

    def severities(self) -> list[int]:
        return [*self.severity] if isinstance(self.severity, list) else [self.severity]

    def _stand_ins(self, domains: list[Domain]) -> dict[Domain, Domain]:
        place = {name: i % len(STAND_INS) for i, name in enumerate(self.all_corruptions)}
        return {d: (STAND_INS[place[d[0]]], d[1]) for d in domains}

    def alike(self, base: ImageSet, domains: list[Domain]) -> dict[Domain, ImageSet]:
        """As they are; embedded ones as the stand-ins of the domains."""
        if self.data_root is not None:
            return super().alike(base, domains)
        return as_stand_ins(base, self._stand_ins(domains))

    def sources(self, domains: list[Domain]) -> Sources:
        if self.data_root is None:
            return stand_ins(self._stand_ins(domains), self, SETTINGS)
        root = existing_root(self.data_root, self.about)
        places = self.places(root, domains)
        first = canonical(image_folder(places[domains[0]], self.about.expected))
        sets: dict[Domain, ImageSet] = {
            d: Files(places[d], first.names, first.labels, first.class_names) for d in domains
        }
        rows = chosen(first.names, self.image_list, self.order_seed, first.root)
        rows = rows[: count_of(self.images, len(rows))]
        probe, source = probe_rows(len(first.names), rows, self)
        clean = imagenet_beside(root)
        return Sources.aligned(
            sets,
            rows,
            probe,
            cropped(clean) if clean else None,
            outside(clean, [first.names[i] for i in np.union1d(rows, probe)]),
            {
                "corruptions": "released files",
                "image_list": self.image_list,
                "probe_from": source,
                "clean": "validation images" if clean else "none",
            },
        )

    def places(self, root: Path, domains: list[Domain]) -> dict[Domain, Path]:
        """The folder of each domain.

        Raises:
            UserError: naming every one that is missing.
        """
        names = list(dict.fromkeys(name for name, _ in domains))
        base = first_folder(root, self.folders, names)
        if base is None:
            packed = still_packed(root, *(root / name for name in self.folders))
            raise UserError(
                f"{self.about.title} is not under data.root={root} (looked for "
                f"{root / self.folders[0] / names[0]}). {packed}{self.about.expected}"
            )
        places: dict[Domain, Path] = {}
        for name, severity in domains:
            called = [str(severity)]
            if name in self.parameters:
                called.append(f"{self.parameters[name][severity - 1]:.2f}")
            inside = [base / name, base / name / name]
            there = [f / c for f in inside for c in called if (f / c).is_dir()]
            if there:
                places[name, severity] = there[0]
        missing = [
            f"{name}/{severity}" for name, severity in domains if (name, severity) not in places
        ]
        if missing:
            raise UserError(
                f"{base} lacks {len(missing)} of {len(domains)} corruption folders: "
                f"{', '.join(missing[:6])}{' ...' if len(missing) > 6 else ''}. "
                f"{still_packed(base, root)}{self.about.expected}"
            )
        return places

    def training(self, folder: Path) -> ImageSet:
        return cropped(imagenet_train(folder))
