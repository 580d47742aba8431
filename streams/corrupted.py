"""Sets of corrupted images: released files, or made from clean images while the stream runs."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge, Le, MinLen, Predicate
from torch import Tensor

from driftline.core.errors import UserError, suggest
from driftline.core.paths import script_line
from driftline.core.ranges import Seed, distinct
from driftline.core.seed import derive
from driftline.streams import corruptions as C
from driftline.streams.data.frost import ABOUT as FROST
from driftline.streams.dataset import About, ShiftData, Sources, existing_root, first_folder
from driftline.streams.images import Files, Generated, ImageSet, fingerprint
from driftline.streams.orders import SEQUENCES, Domain

OUTAGES = ("noise", "black")  # what a camera that fails delivers; a severity changes nothing
Severity = Literal[1, 2, 3, 4, 5]


def corruption_names(corruptions: str | list[str]) -> list[str]:
    """`standard` (15), `extra` (4), `all` (19), a sequence of `streams.orders`, or a list.

    A list may hold `OUTAGES`, too.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    groups = {"standard": C.STANDARD, "extra": C.EXTRA, "all": (*C.STANDARD, *C.EXTRA)}
    groups |= SEQUENCES
    if isinstance(corruptions, str) and corruptions in groups:
        return list(groups[corruptions])
    names = corruptions if isinstance(corruptions, list) else [corruptions]
    for name in names:
        if name not in (*groups["all"], *OUTAGES):
            known = [*groups, *groups["all"], *OUTAGES]
            raise UserError(
                f"scenario.corruptions: {name!r} is no corruption{suggest(name, known)}. "
                f"Known: {', '.join(known)}"
            )
    if not {*names} - {*OUTAGES} or len(set(names)) != len(names):
        raise UserError(
            "scenario.corruptions must hold each corruption once, and at least one beside "
            f"{' and '.join(OUTAGES)}"
        )
    return names


def frost_source(frost_dir: str | None) -> str:
    """What `scenario.frost_dir` blends in, for results.

    Raises:
        UserError: if it is given and lacks photographs.
    """
    if frost_dir is not None:
        missing = [f for f in C.FROST_FILES if not (Path(frost_dir) / f).is_file()]
        if missing:
            raise UserError(
                f"scenario.frost_dir={frost_dir} lacks {', '.join(missing)}; it should hold these "
                "photographs of hendrycks/robustness, or be null for a synthetic texture. "
                f"{FROST.how}"
            )
    return C.frost_source(frost_dir)


def frost_content(frost_dir: str | None) -> str | None:
    """Hash of the photographs in `frost_dir`, wherever they lie; None for the texture."""
    if frost_dir is None:
        return None
    files = C.FROST_FILES
    return Files(Path(frost_dir), files, np.zeros(len(files)), [""]).content()


def _corrupt(
    levels: Tensor,
    rows: Sequence[int],
    *,
    domain: Domain,
    preset: Literal["imagenet", "cifar"],
    seed: int,
    jpeg_quality: int | None,
    frost_dir: str | None,
) -> Tensor:
    name, severity = domain
    try:
        return C.corrupt_batch(
            levels,
            name,
            severity,
            rows,
            preset=preset,
            seed=seed,
            jpeg_quality=jpeg_quality,
            frost_dir=frost_dir,
        )
    except ValueError as error:
        raise UserError(f"scenario.corrupt=on_the_fly, {name}:{severity}: {error}") from error


def corrupted(
    base: ImageSet, domains: list[Domain], cache: str | None, **settings: Any
) -> dict[Domain, ImageSet]:
    """The images of `base` under each of `domains`.

    Args:
        cache: as for `Derived`.
        settings: preset, seed, jpeg_quality and frost_dir of `corruptions.corrupt_batch`.
    """

    named = {**settings, "frost_dir": frost_content(settings["frost_dir"])}

    def identity(domain: Domain) -> str:
        return f"{domain} {sorted(named.items())} {C.VERSION}"

    return {
        d: Generated(base, partial(_corrupt, domain=d, **settings), identity(d), cache)
        for d in domains
    }


def _outage(levels: Tensor, rows: Sequence[int], *, name: str, seed: int) -> Tensor:
    """Uniform noise, of its own for each row, or black, in the shape of the images."""
    if name == "black":
        return torch.zeros_like(levels)
    drawn = [
        np.random.default_rng(derive(seed, name, row)).integers(256, size=levels.shape[1:])
        for row in rows
    ]
    return torch.from_numpy(np.stack(drawn)).to(levels)


def outages(base: ImageSet, domains: list[Domain], seed: int) -> dict[Domain, ImageSet]:
    """What failing cameras deliver in place of the images of `base`, whose labels stay."""
    base = base.base if isinstance(base, Generated) else base
    return {
        (name, s): Generated(base, partial(_outage, name=name, seed=seed), f"{name} {seed}")
        for name, s in domains
    }


@dataclass(frozen=True, kw_only=True)
class Corruptions:
    """Options of corruptions.

    Args:
        corruptions: see `corruption_names`.
        corruption_seed: draws of corruptions made on the fly.
        jpeg_quality: of images made on the fly; None: as made.
        frost_dir: folder of the original photographs; None: a synthetic texture.
    """

    corruptions: str | Annotated[list[str], MinLen(1)]
    severity: Severity | Annotated[list[Severity], MinLen(1), Predicate(distinct)]
    corruption_seed: Seed
    jpeg_quality: Annotated[int, Ge(1), Le(100)] | None
    frost_dir: str | None

    def all_severities(self) -> list[int]:
        return [*self.severity] if isinstance(self.severity, list) else [self.severity]

    def settings(self, preset: C.Preset) -> dict[str, Any]:
        """Those of `corrupted`."""
        return {
            "preset": preset,
            "seed": self.corruption_seed,
            "jpeg_quality": self.jpeg_quality if preset == "imagenet" else None,
            "frost_dir": self.frost_dir,
        }


@dataclass(frozen=True, kw_only=True)
class CorruptedData(Corruptions, ShiftData):
    """Domains are corruptions at severities; row i is the same image in each of them.

    Args:
        corrupt: released files, or corruptions made on the fly from clean images.
        image_list, legacy_resize: of ImageNet; other sets take no notice.
    """

    preset: ClassVar[Literal["imagenet", "cifar"]]  # parameters of the corruptions
    folders: ClassVar[Sequence[str]]  # names that the folder of the released layout may have
    clean_about: ClassVar[About]  # of the set that corruptions on the fly are made from

    corrupt: Literal["released", "on_the_fly"]
    image_list: str
    legacy_resize: bool

    def names(self) -> list[str]:
        return corruption_names(self.corruptions)

    def severities(self) -> list[int]:
        return self.all_severities()

    @abstractmethod
    def released(self, root: Path, domains: list[Domain]) -> Sources:
        """Images in the released layout.

        Raises:
            UserError: naming what is missing.
        """

    @abstractmethod
    def on_the_fly(self, root: Path, domains: list[Domain]) -> Sources:
        """Images made from the clean ones.

        Raises:
            UserError: if those are missing.
        """

    def generated(
        self, clean: ImageSet, domains: list[Domain], cache: str | None = None
    ) -> dict[Domain, ImageSet]:
        """The images of `clean` under each of `domains`; `cache` as of `corrupted`."""
        return corrupted(clean, domains, cache, **self.settings(self.preset))

    def alike(self, base: ImageSet, domains: list[Domain]) -> dict[Domain, ImageSet]:
        """Made on the fly beside released files, too, with other draws than known images have."""
        settings = self.settings(self.preset) | {"seed": self.corruption_seed + 2}
        embedded = self.data_root is None
        if embedded:
            settings["jpeg_quality"] = None
        failing = [d for d in domains if d[0] in OUTAGES]
        real = [d for d in domains if d not in failing]
        sets = corrupted(base, real, "memory" if embedded else self.cache, **settings)
        return sets | outages(base, failing, settings["seed"])

    def sources(self, domains: list[Domain]) -> Sources:
        failing = [d for d in domains if d[0] in OUTAGES]
        real = [d for d in domains if d not in failing]
        made_here = self.data_root is None or self.corrupt == "on_the_fly"
        frost = frost_source(self.frost_dir)
        manifest = None
        if self.data_root is None:
            options = {**self.settings(self.preset), "jpeg_quality": None}
            images = stand_ins({d: d for d in real}, self, options)
            images.notes["parameters"] = f"those of {self.dataset}, on 32 px images"
        elif made_here:
            images = self.on_the_fly(existing_root(self.data_root, self.clean_about), real)
        else:
            images = self.released(existing_root(self.data_root, self.about), real)
            manifest = generated(Path(self.data_root), self.folders)
        sets, probes = (
            kinds | outages(kinds[real[0]], failing, self.corruption_seed)
            for kinds in (images.sets, images.probe_sets)
        )
        notes: dict[str, object] = {"corruptions": "released files", **images.notes}
        if made_here:
            notes["corruptions"] = "generated on the fly"
        if manifest is not None:
            notes["corruptions"] = "generated files (scripts/generate_corruptions.py)"
            notes["generated"] = manifest.settings
        if made_here and "frost" in self.names():
            notes["frost"] = frost
        return replace(
            images,
            sets={d: sets[d] for d in domains},
            rows={d: images.rows[real[0]] for d in domains},
            probe={d: images.probe[real[0]] for d in domains},
            probe_sets={d: probes[d] for d in domains},
            unprobed=frozenset(failing),
            notes=notes,
            mark="[generated]" if manifest else "",
            contents=(manifest.content(real),) if manifest else (),
        )


def instead(count: int, place: Path, settings: str) -> str:
    """What errors about missing corruptions say where the clean images are there."""
    return f"{count:,} clean images are in {place}: {settings} makes the corruptions of them. "


def stand_ins(domains: dict[Domain, Domain], data: ShiftData, settings: dict[str, Any]) -> Sources:
    """Embedded images in the place of a data set.

    Args:
        domains: of the stream, each with the corruption and severity that stand for it.
        settings: of `corrupted`.
    """
    from driftline.streams.embedded import SHIFT_CLASSES, EmbeddedImages

    def images(split: str, count: int) -> ImageSet:
        per_class = max(1, -(-count // len(SHIFT_CLASSES)))
        return EmbeddedImages(classes=SHIFT_CLASSES, split=split, per_class=per_class)

    assert data.images is not None
    stream = images("test", data.images)
    probe = images("probe", max(data.probe_images, data.clean_images))
    kinds = list(dict.fromkeys(domains.values()))
    other = {**settings, "seed": settings["seed"] + 1}
    shown = corrupted(stream, kinds, "memory", **settings)
    probed = corrupted(probe, kinds, "memory", **other)
    return Sources(
        sets={d: shown[kind] for d, kind in domains.items()},
        rows=dict.fromkeys(domains, np.arange(data.images)),
        probe=dict.fromkeys(domains, np.arange(data.probe_images)),
        probe_sets={d: probed[kind] for d, kind in domains.items()},
        clean=probe,
        held_out=np.zeros(0, np.int64),  # the source images are another split
        notes={"probe_from": "held_out"},
    )


# ------------------------------------------------------------------ files made here

MANIFEST = "manifest.json"  # of scripts/generate_corruptions.py, beside what it wrote


@dataclass(frozen=True)
class Manifest:
    """How the files of a released layout were made here, and their hashes."""

    settings: dict[str, object]
    sha256: dict[str, str]  # of "<corruption>/<severity>"

    def content(self, domains: Sequence[tuple[str, int]]) -> str:
        """Hash of the settings and of what was written for `domains`; more may be added later."""
        parts = [f"{name}/{severity}" for name, severity in domains]
        sums = [self.sha256.get(part) for part in parts]
        return fingerprint(json.dumps([self.settings, parts, sums], sort_keys=True))


def generated(root: Path, folders: Sequence[str]) -> Manifest | None:
    """The manifest of files that were made here; None for the released files.

    Args:
        folders: names that the folder of the released layout may have under `root`.

    Raises:
        UserError: for a manifest that cannot be read.
    """
    folder = first_folder(root, folders, [MANIFEST])
    if folder is None:
        return None
    try:
        content = json.loads((folder / MANIFEST).read_text())
        return Manifest(dict(content["settings"]), dict(content.get("sha256", {})))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / MANIFEST} is damaged: what these files are cannot be told. Generate them "
            f"again into another folder with {script_line('generate_corruptions')}"
        ) from error
