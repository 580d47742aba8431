"""What a data set is to a stream: the record of it, and one base class for each use of it.

Each data set has one file in `streams/data/`, named as `scenario.dataset` names it. In it stand
`ABOUT` and a class for each use: `ShiftData` (test-time adaptation), `SplitData` (classes learned
in tasks), `DomainData` (domains learned in tasks), `CleanData` (images that pairs of corruptions
are made on). The fields of such a class are its options, typed flat as `scenario.<field>`; where
nothing stands under `data_root`, it delivers embedded stand-in images. Nothing is registered: a
class of another package is named by its dotted path.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from annotated_types import MinLen, Predicate

from driftline.core.build import locate
from driftline.core.errors import UserError
from driftline.core.paths import script_line
from driftline.core.ranges import Count, CountOrZero, Flat, Seed, distinct
from driftline.core.seed import derive
from driftline.streams.downloads import Download
from driftline.streams.images import ImageSet, still_packed
from driftline.streams.orders import Domain

PACKAGE = "driftline.streams.data"
NAMED = Flat(by="dataset", within=PACKAGE)  # a parameter that gets the data set of the scenario


@dataclass(frozen=True)
class About:
    """What is known of a data set without reading it."""

    title: str
    paper: str
    published: str  # address
    licence: str
    layout: str  # what lies where under data.root
    label_space: str  # outputs of networks for it: "imagenet1k"; empty: the data says
    subset: tuple[int, ...] | None = None  # classes of the label space that occur; None: all
    class_names: tuple[str, ...] = ()  # of the label space; empty: the images say
    hashes: Mapping[str, str] = field(default_factory=dict)  # file in its folder -> "md5:..."
    name: str = ""  # as `scenario.dataset` names it, for `scripts/get_data.py`
    download: Download | None = None  # None: there is nothing to load

    @property
    def how(self) -> str:
        """The command that loads the set, or says what a person has to do; maybe empty."""
        if self.download is None or not self.name:
            return ""
        what = "loads it" if self.download.by_program else "says how to get it"
        return f"{script_line('get_data', f'{self.name} --to <data.root>')} {what}. "

    @property
    def expected(self) -> str:
        """The sentence that ends every error about missing data."""
        return (
            f"Expected layout: {self.layout}. Published at: {self.published}. {self.how}"
            "Leave data.root unset to run on the embedded stand-in images."
        )


def named() -> list[str]:
    """The data sets of this project."""
    package = importlib.import_module(PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def about(dataset: str) -> About:
    """The record of a data set by its name, or by the dotted path of its class."""
    if "." in dataset:
        return locate(dataset).about
    return importlib.import_module(f"{PACKAGE}.{dataset}").ABOUT


def existing_root(root: str, record: About) -> Path:
    """`root` as a path.

    Raises:
        UserError: if there is no such folder.
    """
    path = Path(root)
    if path.is_file():
        raise UserError(f"data.root={root} is a file; unpack it, and name the folder that it makes")
    if not path.is_dir():
        packed = still_packed(path.parent, named=path.name)
        raise UserError(f"data.root={root}: there is no such folder. {packed}{record.expected}")
    return path


def first_folder(root: Path, names: Sequence[str], entries: Sequence[str]) -> Path | None:
    """The first of root/<name> (or root itself) that holds one of the `entries`.

    Each may hold them in a folder of its own name, as some archives unpack.
    """
    places = [*(root / n for n in names), root]
    for folder in [*places, *(p / p.name for p in places)]:
        if any((folder / e).exists() for e in entries):
            return folder
    return None


# ------------------------------------------------------------------ test-time adaptation


@dataclass(frozen=True)
class Sources:
    """The images of an adaptation stream by domain, and those beside it.

    Args:
        sets: in the order of the domains.
        rows: int64, of each set, in stream order.
        probe: int64, rows of `probe_sets` that are scored without adapting.
        clean: images without the shift, if there are any.
        held_out: int64, rows of `clean` that neither stream nor probes show.
        unprobed: domains in which nobody can be right, which are not probed.
        notes: for the facts of the stream.
        mark: joined to the name of the stream, `[generated]`.
        contents: further parts of the stream's fingerprint.
    """

    sets: dict[Domain, ImageSet]
    rows: dict[Domain, np.ndarray]
    probe: dict[Domain, np.ndarray]
    probe_sets: dict[Domain, ImageSet]
    clean: ImageSet | None
    held_out: np.ndarray
    unprobed: frozenset[Domain] = frozenset()
    notes: dict[str, object] = field(default_factory=dict)
    mark: str = ""
    contents: tuple[object, ...] = ()

    @classmethod
    def aligned(
        cls,
        sets: dict[Domain, ImageSet],
        rows: np.ndarray,
        probe: np.ndarray,
        clean: ImageSet | None,
        held_out: np.ndarray,
        notes: dict[str, object],
    ) -> Sources:
        """Of sets in which row i is the same image: all show the same `rows` and `probe`."""
        return cls(
            sets=sets,
            rows=dict.fromkeys(sets, rows),
            probe=dict.fromkeys(sets, probe),
            probe_sets=sets,
            clean=clean,
            held_out=held_out,
            notes=notes,
        )


@dataclass(frozen=True, kw_only=True)
class ShiftData(ABC):
    """A data set of test-time adaptation: a list of domains with images of one label space.

    Args:
        dataset: its name, or the dotted path of its class.
        images: of each domain; None: all (never None for embedded images).
        order_seed: of subsets and probe images.
        probe_images: of each domain, scored without adapting.
        probe_from: `auto`: outside the stream where enough images are left.
        clean_images: how many are wanted beside the stream.
        data_root: None: embedded stand-in images.
        cache: folder for images that are made here, or None.
    """

    about: ClassVar[About]

    dataset: str
    images: Count | None
    order_seed: Seed
    probe_images: CountOrZero
    probe_from: Literal["auto", "held_out", "stream"]
    clean_images: CountOrZero
    data_root: str | None
    cache: str | None

    @property
    def label_space(self) -> str:
        return "embedded" if self.data_root is None else self.about.label_space

    @property
    def class_names(self) -> Sequence[str]:
        """Of the label space, in its order; empty: the images say."""
        return () if self.data_root is None else self.about.class_names

    def facts(self) -> dict[str, object]:
        """What a result says of the set, beside the notes on its images."""
        return {}

    @property
    def kept(self) -> tuple[int, ...] | None:
        """Outputs of the network that are the classes of the stream; None: all of them."""
        return None

    @abstractmethod
    def names(self) -> list[str]:
        """Names of the domains, in stream order."""

    def severities(self) -> list[int]:
        """Each domain occurs at each of them; 0: there are none."""
        return [0]

    @abstractmethod
    def sources(self, domains: list[Domain]) -> Sources:
        """The images of `domains` and those beside them.

        Raises:
            UserError: for missing data or settings that do not fit.
        """

    def alike(self, base: ImageSet, domains: list[Domain]) -> dict[Domain, ImageSet]:
        """Other images, of unknown classes, under the shift of each domain; here: as they are."""
        return dict.fromkeys(domains, base)

    @abstractmethod
    def training(self, folder: Path) -> ImageSet:
        """Labelled images of the source domain under `folder`.

        Raises:
            UserError: if there are none.
        """


@dataclass(frozen=True, kw_only=True)
class SubsetData(ShiftData):
    """A set with some classes of its label space, those of `about.subset`.

    Args:
        subset_scores: `masked`: the network gives the scores of these classes alone, so that a
            method adapts on them, too (hendrycks/imagenet-r, eval.py, masks the scores;
            mariodoebler/test-time-adaptation does it inside the network). `all`: every output
            counts.
    """

    subset_scores: Literal["masked", "all"]

    @property
    def subset(self) -> tuple[int, ...] | None:
        """Classes of the label space that the set has; None: all of them."""
        return None if self.data_root is None else self.about.subset

    def facts(self) -> dict[str, object]:
        if self.subset is None:
            return {}
        return {"subset": {"classes": len(self.subset), "scores": self.subset_scores}}

    @property
    def kept(self) -> tuple[int, ...] | None:
        return self.subset if self.subset_scores == "masked" else None


def count_of(images: int | None, available: int) -> int:
    """How many images a domain shows.

    Raises:
        UserError: if there are fewer than asked for.
    """
    if images is not None and not 1 <= images <= available:
        raise UserError(f"scenario.images={images}, but {available} images are available")
    return images or available


def probe_rows(available: int, used: np.ndarray, data: ShiftData) -> tuple[np.ndarray, str]:
    """Probe rows: outside the stream where enough are left, else from its beginning."""
    left = np.setdiff1d(np.arange(available), used)
    source = data.probe_from
    if source == "auto":
        source = "held_out" if len(left) >= data.probe_images else "stream"
    if source == "held_out" and len(left) < data.probe_images:
        raise UserError(
            f"scenario.probe_from=held_out needs {data.probe_images} images outside the stream, "
            f"but only {len(left)} are left; set scenario.probe_from=stream or fewer "
            "scenario.images"
        )
    if source == "held_out":
        left = np.random.default_rng(derive(data.order_seed, "probe")).permutation(left)
    return (left if source == "held_out" else used)[: data.probe_images], source


# ------------------------------------------------------------------ pairs of corruptions


@dataclass(frozen=True)
class Clean:
    """The clean images that a stream is made from, and those beside it."""

    base: ImageSet
    rows: np.ndarray  # of `base`, to draw from
    clean: ImageSet
    held_out: np.ndarray  # rows of `clean` that are not in `rows`
    crop: bool  # random crops, as the official code of CCC


@dataclass(frozen=True, kw_only=True)
class CleanData(ABC):
    """Clean images of a data set, to make corruptions on.

    Args:
        image_list: which of them: all | published | a text file.
        order_seed: of subsets.
        clean_images: how many are wanted beside the stream.
        data_root: None: embedded stand-in images.
    """

    kept: ClassVar[None] = None  # every output is a class
    about: ClassVar[About]
    preset: ClassVar[Literal["imagenet", "cifar"]]  # parameters of the corruptions

    dataset: str
    image_list: str
    order_seed: Seed
    clean_images: CountOrZero
    data_root: str | None

    @property
    def label_space(self) -> str:
        return "embedded" if self.data_root is None else self.about.label_space

    def images(self) -> Clean:
        """The images of the set, or stand-ins.

        Raises:
            UserError: for missing data.
        """
        if self.data_root is not None:
            return self.read(self.data_root)
        from driftline.streams.embedded import SHIFT_CLASSES, EmbeddedImages

        probes = max(1, -(-self.clean_images // len(SHIFT_CLASSES)))
        base, probe = (
            EmbeddedImages(SHIFT_CLASSES, split=split, per_class=count)
            for split, count in (("test", 40), ("probe", probes))
        )
        return Clean(base, np.arange(400), probe, np.arange(len(probe.labels)), False)

    @abstractmethod
    def read(self, root: str) -> Clean:
        """The images under `root`.

        Raises:
            UserError: if they are missing.
        """

    @abstractmethod
    def training(self, folder: Path) -> ImageSet:
        """As of `ShiftData`."""


# ------------------------------------------------------------------ continual learning

Split = tuple[ImageSet, ImageSet]  # training and test images, of the same label positions


@dataclass(frozen=True, kw_only=True)
class SplitData(ABC):
    """Training and test images of a set whose classes are learned in tasks.

    Args:
        embedded_images: of each class, for training and for the test, where data_root is None.
    """

    about: ClassVar[About]
    cifar: ClassVar[bool] = False  # see `streams.pipelines.pipeline`
    stand_ins: ClassVar[int] = 100  # embedded classes

    dataset: str
    embedded_images: tuple[Count, Count]
    data_root: str | None

    def split(self) -> Split:
        """The images of the set, or stand-ins.

        Raises:
            UserError: for missing data.
        """
        if self.data_root is not None:
            return self.read(existing_root(self.data_root, self.about))
        from driftline.streams.embedded import TASK_CLASSES, EmbeddedImages

        train, test = (
            EmbeddedImages(classes=TASK_CLASSES[: self.stand_ins], split=split, per_class=n)
            for split, n in zip(("train", "test"), self.embedded_images, strict=True)
        )
        return train, test

    @abstractmethod
    def read(self, root: Path) -> Split:
        """The images under `root`.

        Raises:
            UserError: if they are missing.
        """


@dataclass(frozen=True, kw_only=True)
class DomainData(ABC):
    """Training and test images of several domains with the same classes, learned one by one.

    Args:
        domains: in their order; None: those of the set.
        embedded_images: of each class, for training and for the test, where data_root is None.
    """

    about: ClassVar[About]

    dataset: str
    domains: Annotated[list[str], MinLen(1), Predicate(distinct)] | None
    embedded_images: tuple[Count, Count]
    data_root: str | None

    def splits(self) -> dict[str, Split]:
        """The images by domain, or stand-ins.

        Raises:
            UserError: for missing data, or a domain that does not exist.
        """
        if self.data_root is not None:
            return self.read(existing_root(self.data_root, self.about))
        from driftline.streams.stand_ins import embedded_domains

        return embedded_domains(self.domains, self.embedded_images)

    @abstractmethod
    def read(self, root: Path) -> dict[str, Split]:
        """The images under `root`.

        Raises:
            UserError: if they are missing.
        """
