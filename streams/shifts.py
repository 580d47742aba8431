"""Adaptation streams: the images of a data set in an order, and what stands beside them.

The orders themselves are in `streams/orders.py`, data sets in `streams/data/`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import driftline.core.vision  # noqa: F401  # isort: skip

import numpy as np
from annotated_types import Ge, Gt
from torchvision import transforms as T

from driftline.core.errors import UserError
from driftline.core.ranges import Count, CountOrZero, Flat, PlainName, Positive, Seed, Size, Unit
from driftline.core.seed import derive
from driftline.core.stream import (
    SINGLE_IMAGES,
    Batch,
    Batches,
    Outputs,
    Segment,
    ShiftStream,
    Skipped,
    SourceImages,
)
from driftline.streams.dataset import NAMED, CleanData, ShiftData
from driftline.streams.images import ImageSet, files_of, fingerprint
from driftline.streams.loading import Reader, Rows, consecutive, remember
from driftline.streams.orders import LABEL_ORDERS, Options, Step, called, parse, plan
from driftline.streams.pipelines import PHOTOMETRIC, Pipeline, as_stored
from driftline.streams.store import ImageStore
from driftline.streams.unknown import Unknown


@dataclass(frozen=True, kw_only=True)
class Loading:
    """How the images of an adaptation stream are read."""

    batch_size: Count
    on_error: Literal["raise", "skip"]
    workers: int
    store: ImageStore

    def reader(self, sets: Sequence[ImageSet], skipped: Skipped) -> Reader:
        remember(sets, self.store.limit)
        return Reader(sets, skipped, self.workers, self.on_error, self.store.device)

    def again(self, reader: Reader, rows: Rows, change: Pipeline) -> Iterator[Batch | None]:
        """Images that are scored after every segment."""
        plan = consecutive(len(rows), self.batch_size)
        stored = self.store.fixed(repr(change), reader, rows, change, plan)
        return reader.batches(rows, self.batch_size, change) if stored is None else stored


@dataclass(frozen=True, kw_only=True)
class Ordering:
    """Which domain when, which label when: an order of `streams/orders.py` and what it reads."""

    order: str
    rounds: Count
    delta: Positive
    imbalance: Annotated[float, Ge(1)]
    zipf: Annotated[float, Gt(1)]
    stay: Unit
    burst_share: Unit
    burst_length: Count
    index_file: str | None
    order_seed: Seed

    def steps(self, names: list[str], severities: list[int]) -> list[Step]:
        """The segments before images are dealt out."""
        domain_order, _ = parse(self.order)
        rng = np.random.default_rng(derive(self.order_seed, "stream", domain_order))
        return plan(domain_order, names, severities, self.rounds, self.zipf, rng)

    def listed(self, rows: np.ndarray) -> np.ndarray:
        """The rows of a domain, or those of them that `index_file` names."""
        return rows if self.index_file is None else _index_file(self.index_file, rows)

    def arranged(self, name: str, rows: Rows) -> Rows:
        """The rows of the segment `name`, in the order of their labels."""
        _, label_order = parse(self.order)
        if label_order is None:
            return rows
        options = Options(**{name: getattr(self, name) for name in Options._fields})
        rng = np.random.default_rng(derive(self.order_seed, "stream", label_order, name))
        return rows.take(LABEL_ORDERS[label_order](rows.label, options, rng))

    def mixed(self, rows: Rows) -> Rows:
        """The rows of all domains, shuffled."""
        rng = np.random.default_rng(derive(self.order_seed, "stream", "mixed"))
        return rows.take(rng.permutation(len(rows)))


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The images beside a stream: clean ones for source forgetting, labelled ones of the source."""

    clean_images: CountOrZero
    clean_adapting: bool
    source_from: str
    source_images: CountOrZero | None
    order_seed: Seed


def corruption_stream(
    *,
    label: PlainName,
    data: Annotated[ShiftData, NAMED],
    ordering: Annotated[Ordering, Flat()],
    loading: Annotated[Loading, Flat()],
    beside: Annotated[Beside, Flat()],
    unknown: Annotated[Unknown, Flat()],
    resize: Size | None,
    probe_every: Count,
    probe_cells: Literal["metrics", "all"],
    label_budget: CountOrZero | Unit | None,
    label_delay: CountOrZero,
) -> ShiftStream:
    """The images of a data set as a stream for test-time adaptation.

    Raises:
        UserError: for missing data or settings that do not fit.
    """
    domain_order, _ = parse(ordering.order)
    if domain_order.startswith("gradual") and data.severities() == [0]:
        raise UserError(
            f"scenario.order={ordering.order} needs severities, and {data.about.title} has none"
        )
    steps = ordering.steps(data.names(), data.severities())
    domains = list(dict.fromkeys(s.domain for s in steps))
    images = data.sources(domains)
    sets = [images.sets[d] for d in domains]
    kept, outputs = data.kept, None
    if kept is not None:
        outputs = Outputs(kept, sets[0].num_classes)
    skipped = Skipped()
    probe_reader = loading.reader([images.probe_sets[d] for d in domains], skipped)
    raw: Pipeline = as_stored
    if resize is not None:
        raw = T.Resize([resize, resize], T.InterpolationMode.BILINEAR)

    def load(rows: Rows, start: int = 0) -> Iterator[Batch | None]:
        batches = reader.batches(rows, loading.batch_size, raw, start=start)
        return unknown.in_their_domains(batches, len(domains))

    dealt: list[tuple[str, int, Rows]] = []
    for step in steps:
        d = domains.index(step.domain)
        listed = ordering.listed(images.rows[step.domain])
        rows = rows_of(sets[d], listed, kept, d)
        if len(rows) < len(listed):
            raise UserError(f"{data.about.title} has images of classes outside of its own list")
        dealt.append((step.name, step.round, rows))
    if domain_order == "mixed":
        joined = Rows.join([rows for *_, rows in dealt])
        dealt = [("mixed", 1, ordering.mixed(joined))]
    dealt = [(name, turn, ordering.arranged(name, rows)) for name, turn, rows in dealt]
    notes = dict(images.notes)
    if unknown.unknown_share:
        like = sets[0].image(int(images.rows[domains[0]][0]))
        dealt, strangers = unknown.among(dealt, data, domains, like, loading.batch_size)
        sets = [*sets, *strangers]
        notes["unknown"] = {
            "share": unknown.unknown_share,
            "images": sum(int((rows.label < 0).sum()) for *_, rows in dealt),
        }
    reader = loading.reader(sets, skipped)

    segments = [
        Segment(
            index=i,
            name=name,
            domains=tuple(dict.fromkeys((rows.domain % len(domains)).tolist())),
            images=len(rows),
            steps=-(-len(rows) // loading.batch_size),
            batches=partial(load, rows),
            round=turn,
        )
        for i, (name, turn, rows) in enumerate(dealt)
    ]
    hardest = max(s for _, s in domains)
    probes = {
        i: partial(
            loading.again,
            probe_reader,
            rows_of(probe_reader.sets[i], images.probe[d], kept, i),
            raw,
        )
        for i, d in enumerate(domains)
        if d[1] == hardest and len(images.probe[d]) and d not in images.unprobed
    }
    # Rows of each set whose images a result depends on. (Embedded probes are another set, which
    # follows from the settings.)
    probe = [*(images.probe[d] for d in domains), *[np.zeros(0, np.int64)] * len(sets)]
    used = [
        np.unique(np.concatenate([probe[i], *(r.row[r.domain == i] for *_, r in dealt)]))
        for i in range(len(sets))
    ]
    shown = list(zip(sets, used, strict=True))
    around = surroundings(data, beside, loading, images.clean, images.held_out, raw, skipped, shown)
    probed = {rows.tobytes(): rows for rows in images.probe.values()}  # once where they agree
    counts = [len(images.rows[d]) for d in domains]
    classes = sets[0].num_classes if kept is None else len(kept)
    facts: dict[str, object] = {
        "classes": classes,
        "label_space": data.label_space,
        "images_per_domain": counts[0] if len(set(counts)) == 1 else counts,
        "order": ordering.order,
        "resize": resize,
        "segments": [s.name for s in segments],
        **data.facts(),
        **notes,
        "fingerprint": fingerprint(
            *reader.contents(used),
            *(np.stack([r.domain, r.row]) for *_, r in dealt),
            *probed.values(),
            *around.contents,
            *images.contents,
            *([kept] if kept else []),
        ),
    }
    return ShiftStream(
        name=f"{label}{images.mark}",
        num_classes=classes,
        domains=[called(d) for d in domains],
        segments=segments,
        facts=facts,
        skipped=skipped,
        probes=probes,
        probe_every=probe_every,
        probe_all=probe_cells == "all",
        holdout=around.holdout,
        holdout_adapting=beside.clean_adapting,
        source=around.source,
        label_budget=label_budget,
        label_delay=label_delay,
        open_world=unknown.unknown_share > 0,
        order={
            "segment": np.concatenate([np.full(len(r), i) for i, (*_, r) in enumerate(dealt)]),
            "domain": np.concatenate([r.domain for *_, r in dealt]) % len(domains),
            "row": np.concatenate([r.row for *_, r in dealt]),
            "label": np.concatenate([r.label for *_, r in dealt]),
        },
        provides=frozenset({"probes"}) | provided(around, loading.batch_size),
        outputs=outputs,
        class_names=data.class_names or sets[0].class_names,
    )


def rows_of(
    images: ImageSet, rows: np.ndarray, kept: Sequence[int] | None, domain: int = 0
) -> Rows:
    """Rows of a set, their labels as positions in `kept`; those of other labels are left out."""
    every = Rows.of(images, rows, domain)
    if kept is None:
        return every
    position = np.full(images.num_classes, -1, np.int64)
    position[list(kept)] = np.arange(len(kept))
    label = position[every.label]
    return Rows(every.row, label, every.domain).take(np.flatnonzero(label >= 0))


def _index_file(path: str, listed: np.ndarray) -> np.ndarray:
    """Positions in the image list, read from a .npy file: an order drawn elsewhere."""
    try:
        index = np.load(path, allow_pickle=False).astype(np.int64).reshape(-1)
    except (OSError, ValueError) as error:
        raise UserError(f"scenario.index_file={path}: not a .npy file of numbers") from error
    if not len(index) or index.min() < 0 or index.max() >= len(listed):
        raise UserError(
            f"scenario.index_file={path} must hold positions 0..{len(listed) - 1} in the list of "
            "images of a domain"
        )
    return listed[index]


# ------------------------------------------------------------------ what surrounds a stream


@dataclass(frozen=True)
class Surroundings:
    """Clean images for source forgetting, and the labelled source images."""

    holdout: Batches | None
    contents: tuple[object, ...]  # of what `holdout` delivers, for the stream's fingerprint
    source: Callable[[], SourceImages]


def provided(around: Surroundings, batch_size: int) -> frozenset[str]:
    """What a stream with these surroundings offers to methods and rules that need it."""
    offers = {"holdout": around.holdout is not None, SINGLE_IMAGES: batch_size == 1}
    return frozenset(name for name, there in offers.items() if there)


def surroundings(
    data: ShiftData | CleanData,
    beside: Beside,
    loading: Loading,
    clean: ImageSet | None,
    held_out: np.ndarray,
    change: Pipeline,
    skipped: Skipped,
    shown: Sequence[tuple[ImageSet, np.ndarray]],
) -> Surroundings:
    """The images beside a stream.

    Args:
        clean: clean evaluation images, if there are any.
        held_out: rows of `clean` that neither stream nor probes use.
        change: pipeline of the stream.
        shown: sets of the stream and of its probes, and which rows of them.

    Raises:
        UserError: for a `source_from` that is neither a word nor a folder.
    """
    source_from, seed = beside.source_from, beside.order_seed
    if source_from not in ("train", "held_out") and not Path(source_from).is_dir():
        raise UserError(
            f"scenario.source_from={source_from}: there is no such folder; use train, held_out or "
            "a folder of training images"
        )
    # Drawn once, so that warm-up, stream and clean images stay apart.
    rng = np.random.default_rng(derive(seed, "source"))
    if clean is not None:
        held_out = rows_of(clean, held_out, data.kept).row
    held_out = rng.permutation(held_out)[: beside.source_images]
    holdout, rows = None, np.zeros(0, np.int64)
    contents: list[object] = []
    if clean is not None and beside.clean_images:
        rows = rows_of(clean, np.arange(len(clean.labels)), data.kept).row
        if data.data_root is not None:
            rows = np.random.default_rng(derive(seed, "clean")).permutation(rows)
        if source_from == "held_out":
            rows = rows[~np.isin(rows, held_out)]
        rows = rows[: beside.clean_images]
        reader = loading.reader([clean], skipped)
        if data.data_root is not None:  # embedded images follow from the settings
            contents += reader.contents([rows])
        holdout = partial(loading.again, reader, rows_of(clean, rows, data.kept), change)
        shown = [*shown, (clean, rows)]
    source = partial(_source, data, beside, loading, clean, held_out, change, shown)
    return Surroundings(holdout, (rows, *contents), source)


def _source(
    data: ShiftData | CleanData,
    beside: Beside,
    loading: Loading,
    clean: ImageSet | None,
    held_out: np.ndarray,
    change: Pipeline,
    shown: Sequence[tuple[ImageSet, np.ndarray]],
) -> SourceImages:
    """The images that a method may prepare on, see `scenario.source_from`.

    Raises:
        UserError: where there are none, or fewer than asked for.
    """
    choice, count, seed = beside.source_from, beside.source_images, beside.order_seed
    if data.data_root is None:
        from driftline.streams.embedded import SHIFT_CLASSES, EmbeddedImages

        wanted = count or 400
        per_class = -(-wanted // len(SHIFT_CLASSES))
        images: ImageSet = EmbeddedImages(SHIFT_CLASSES, split="train", per_class=per_class)
        rows, text = np.arange(len(images.labels)), "embedded training images"
    elif choice == "held_out":
        if clean is None:
            raise UserError("scenario.source_from=held_out: no clean images are under data.root")
        images, rows, text = clean, held_out, "clean evaluation images outside the stream"
    else:
        images = data.training(Path(data.data_root if choice == "train" else choice))
        rows = rows_of(images, np.arange(len(images.labels)), data.kept).row
        text = "training images"
        _refuse_evaluation_images(images, rows, shown, choice)
    if not len(rows) or (count or 0) > len(rows):
        raise UserError(
            f"scenario.source_images={count or 'all'}, but scenario.source_from={choice} leaves "
            f"{len(rows)} images; ask for fewer, or leave some out of the stream (scenario.images)"
        )
    rows = np.random.default_rng(derive(seed, "source")).permutation(rows)[: count or len(rows)]
    reader = loading.reader([images], Skipped())

    def batches(
        batch_size: int,
        *,
        epoch: int | None = None,
        start: int = 0,
        augment: Literal["none", "photometric"] = "none",
    ) -> Iterator[Batch]:
        taken, key = rows, None
        if epoch is not None:
            key = derive(seed, "source", epoch)
            taken = np.random.default_rng(key).permutation(rows)
        if augment == "photometric":
            both: Pipeline = T.Compose([PHOTOMETRIC, change])
        else:
            both = change
        for batch in reader.batches(
            rows_of(images, taken, data.kept), batch_size, both, start=start, seed=key
        ):
            if batch is not None:
                yield batch

    content = fingerprint(*reader.contents([rows]), rows, *([data.kept] if data.kept else []))
    return SourceImages(len(rows), text, content, batches)


def _refuse_evaluation_images(
    images: ImageSet,
    rows: np.ndarray,
    shown: Sequence[tuple[ImageSet, np.ndarray]],
    choice: str,
) -> None:
    """A method must not learn from labels of images on which it is judged.

    Raises:
        UserError: if source images are images of the stream, its probes or the clean images.
    """
    judged: dict[str, list[Path]] = {}
    for other, used in shown:
        for path in files_of(other, used):
            judged.setdefault(path.stem, []).append(path)
    same = [
        path
        for path in files_of(images, rows)
        if path.stem in judged
        and (
            path.stem.startswith(EVALUATION)  # one image, wherever a copy of it lies
            or any(os.path.realpath(path) == os.path.realpath(p) for p in judged[path.stem])
        )
    ]
    if same:
        raise UserError(
            f"scenario.source_from={choice}: {len(same)} of {len(rows)} source images are images "
            f"that the run is judged on (first: {same[0]}), so a method would learn from their "
            "labels. Name the folder of the training images, or use held_out (clean images outside "
            "the stream)"
        )


EVALUATION = "ILSVRC2012_val_"  # names that ImageNet's validation images keep in every copy
