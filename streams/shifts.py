"""Adaptation streams over corruption sets: which images, in which order.

The orders themselves are in `streams/orders.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import driftline.core.vision  # noqa: F401  # isort: skip

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, MinLen, Predicate
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from driftline.core.errors import UserError, suggest
from driftline.core.ranges import (
    Count,
    CountOrZero,
    PlainName,
    Positive,
    Seed,
    Size,
    Unit,
    distinct,
)
from driftline.core.seed import derive
from driftline.core.stream import (
    SINGLE_IMAGES,
    Batch,
    Batches,
    Segment,
    ShiftStream,
    Skipped,
    SourceImages,
)
from driftline.streams import corruptions as C
from driftline.streams.datasets import (
    LAYOUT,
    Cifar,
    canonical,
    cifar,
    cifar_c,
    existing_root,
    expected,
    generated,
    imagenet_c,
    imagenet_clean,
    imagenet_train,
    published_list,
)
from driftline.streams.images import Derived, Files, Generated, ImageSet, fingerprint, image_folder
from driftline.streams.loading import Reader, Rows
from driftline.streams.orders import LABEL_ORDERS, SEQUENCES, Domain, Options, parse, plan
from driftline.streams.pipelines import PHOTOMETRIC, Pipeline, as_stored
from driftline.streams.store import ImageStore

OUTAGES = ("noise", "black")  # what a camera that fails delivers; a severity changes nothing
Dataset = Literal["imagenet_c", "cifar10_c", "cifar100_c"]
Severity = Literal[1, 2, 3, 4, 5]
LABELS = {"imagenet_c": "imagenet1k", "cifar10_c": "cifar10", "cifar100_c": "cifar100"}


@dataclass(frozen=True)
class Request:
    """What the settings ask of a data set."""

    domains: list[Domain]
    images: int | None  # never None for embedded images
    image_list: str
    probe: int
    probe_from: Literal["auto", "held_out", "stream"]
    clean: int
    seed: int
    legacy_resize: bool
    cache: str | None
    generate: dict[str, Any]  # corruption seed, JPEG quality, frost folder

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(n for n, _ in self.domains))

    @property
    def severities(self) -> list[int]:
        return list(dict.fromkeys(s for _, s in self.domains))


@dataclass(frozen=True)
class Sources:
    """The image sets of a stream: one per domain, and what surrounds them."""

    sets: dict[Domain, ImageSet]
    stream: np.ndarray  # int64 [n], rows of every set, in stream order
    probe: np.ndarray  # int64 [m], rows scored without adapting
    probe_sets: dict[Domain, ImageSet]
    clean: ImageSet | None
    held_out: np.ndarray  # rows of `clean` that neither stream nor probe use
    notes: dict[str, object]


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
                "photographs of hendrycks/robustness, or be null for a synthetic texture"
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


CROP = "resize 256, crop 224"  # how ImageNet-C was made from the validation images
_CROP = T.Compose([T.Resize(256, T.InterpolationMode.BILINEAR), T.CenterCrop(224)])


def crop(image: Image.Image, row: int) -> Image.Image:
    return _CROP(image)


def _legacy(images: ImageSet) -> ImageSet:
    """The resize that old loaders applied to images that were 224 px already."""
    return Derived(images, crop, f"legacy {CROP}")


def corruption_stream(
    *,
    label: PlainName,
    dataset: Dataset,
    corrupt: Literal["released", "on_the_fly"],
    corruptions: str | Annotated[list[str], MinLen(1)],
    severity: Severity | Annotated[list[Severity], MinLen(1), Predicate(distinct)],
    order: str,
    rounds: Count,
    delta: Positive,
    imbalance: Annotated[float, Ge(1)],
    zipf: Annotated[float, Gt(1)],
    stay: Unit,
    burst_share: Unit,
    burst_length: Count,
    index_file: str | None,
    images: Count | None,
    image_list: str,
    batch_size: Count,
    order_seed: Seed,
    corruption_seed: Seed,
    jpeg_quality: Annotated[int, Ge(1), Le(100)] | None,
    frost_dir: str | None,
    legacy_resize: bool,
    resize: Size | None,
    probe_images: CountOrZero,
    probe_from: Literal["auto", "held_out", "stream"],
    probe_every: Count,
    clean_images: CountOrZero,
    clean_adapting: bool,
    source_from: str,
    source_images: CountOrZero | None,
    label_budget: CountOrZero | Unit | None,
    data_root: str | None,
    on_error: Literal["raise", "skip"],
    cache: str | None,
    workers: int,
    store: ImageStore,
) -> ShiftStream:
    """A stream of corrupted images for test-time adaptation.

    Raises:
        UserError: for missing data or settings that do not fit.
    """
    names = corruption_names(corruptions)
    severities: list[int] = [*severity] if isinstance(severity, list) else [severity]
    domain_order, label_order = parse(order)
    returns = np.random.default_rng(derive(order_seed, "stream", domain_order))
    steps = plan(domain_order, names, severities, rounds, zipf, returns)
    domains = list(dict.fromkeys(s.domain for s in steps))
    failing = [d for d in domains if d[0] in OUTAGES]
    request = Request(
        domains=[d for d in domains if d not in failing],
        images=images,
        image_list=image_list,
        probe=probe_images,
        probe_from=probe_from,
        clean=clean_images,
        seed=order_seed,
        legacy_resize=legacy_resize,
        cache=cache,
        generate={
            "seed": corruption_seed,
            "jpeg_quality": jpeg_quality if dataset == "imagenet_c" else None,
            "frost_dir": frost_dir,
        },
    )
    released = corrupt == "released"
    if data_root is None:
        found = _embedded(request, dataset)
    elif dataset == "imagenet_c":
        root = existing_root(data_root, dataset if released else "imagenet")
        found = (_imagenet_released if released else _imagenet_on_the_fly)(root, request)
    else:
        which: Cifar = "cifar10" if dataset == "cifar10_c" else "cifar100"
        root = existing_root(data_root, dataset if released else which)
        found = _cifar(root, which, request, released)
    on_the_fly = data_root is None or not released
    manifest = None if on_the_fly else generated(Path(str(data_root)), dataset)
    origin = "generated on the fly" if on_the_fly else "released files"
    if manifest is not None:
        origin = "generated files (scripts/generate_corruptions.py)"
        found.notes["generated"] = manifest.settings
    frost = frost_source(frost_dir)
    if on_the_fly and "frost" in names:
        found.notes["frost"] = frost

    for kinds in (found.sets, found.probe_sets):
        kinds |= outages(kinds[request.domains[0]], failing, corruption_seed)
    sets = [found.sets[d] for d in domains]
    skipped = Skipped()

    def reading(images: list[ImageSet]) -> Reader:
        return Reader(images, skipped, workers, on_error, store.device)

    reader = reading(sets)
    probe_reader = reading([found.probe_sets[d] for d in domains])
    raw: Pipeline = as_stored
    if resize is not None:
        raw = T.Resize([resize, resize], T.InterpolationMode.BILINEAR)

    def load(which: Reader, rows: Rows, start: int = 0) -> Iterator[Batch | None]:
        return which.batches(rows, batch_size, raw, start=start)

    def arranged(name: str, rows: Rows) -> Rows:
        if label_order is None:
            return rows
        rng = np.random.default_rng(derive(order_seed, "stream", label_order, name))
        return rows.take(LABEL_ORDERS[label_order](rows.label, options, rng))

    options = Options(delta, imbalance, zipf, stay, burst_share, burst_length)
    listed = found.stream if index_file is None else _index_file(index_file, found.stream)
    dealt: list[tuple[str, int, Rows]] = []
    for step in steps:
        d = domains.index(step.domain)
        dealt.append((step.name, step.round, Rows.of(sets[d], listed, d)))
    if domain_order == "mixed":
        joined = Rows.join([rows for *_, rows in dealt])
        rng = np.random.default_rng(derive(order_seed, "stream", "mixed"))
        dealt = [("mixed", 1, joined.take(rng.permutation(len(joined))))]
    dealt = [(name, turn, arranged(name, rows)) for name, turn, rows in dealt]

    segments = [
        Segment(
            index=i,
            name=name,
            domains=tuple(dict.fromkeys(rows.domain.tolist())),
            images=len(rows),
            steps=-(-len(rows) // batch_size),
            batches=partial(load, reader, rows),
            round=turn,
        )
        for i, (name, turn, rows) in enumerate(dealt)
    ]
    hardest = max(s for _, s in domains)
    probes = {
        d: partial(_again, store, probe_reader, Rows.of(s, found.probe, d), raw, batch_size)
        for d, s in enumerate(probe_reader.sets)
        if domains[d][1] == hardest and len(found.probe) and domains[d] not in failing
    }
    around = surroundings(
        found.clean,
        found.held_out,
        root=data_root,
        dataset=dataset,
        order_seed=order_seed,
        clean_images=clean_images,
        source_from=source_from,
        source_images=source_images,
        batch_size=batch_size,
        change=raw,
        workers=workers,
        on_error=on_error,
        skipped=skipped,
        store=store,
    )
    # Rows of each set whose images a result depends on. (Embedded probes are another set, which
    # follows from the settings.)
    used = [
        np.unique(np.concatenate([found.probe, *(r.row[r.domain == d] for *_, r in dealt)]))
        for d in range(len(sets))
    ]
    classes = sets[0].num_classes
    facts: dict[str, object] = {
        "classes": classes,
        "label_space": "embedded" if data_root is None else LABELS[dataset],
        "images_per_domain": len(found.stream),
        "corruptions": origin,
        "order": order,
        "resize": resize,
        "segments": [s.name for s in segments],
        **found.notes,
        "fingerprint": fingerprint(
            *(s.content(rows) for s, rows in zip(sets, used, strict=True)),
            *(np.stack([r.domain, r.row]) for *_, r in dealt),
            found.probe,
            *around.contents,
            *([manifest.content(request.domains)] if manifest else []),
        ),
    }
    return ShiftStream(
        name=label if manifest is None else f"{label}[generated]",
        num_classes=classes,
        domains=[f"{n}:{s}" for n, s in domains],
        segments=segments,
        facts=facts,
        skipped=skipped,
        probes=probes,
        probe_every=probe_every,
        holdout=around.holdout,
        holdout_adapting=clean_adapting,
        source=around.source,
        label_budget=label_budget,
        order={
            "segment": np.concatenate([np.full(len(r), i) for i, (*_, r) in enumerate(dealt)]),
            "domain": np.concatenate([r.domain for *_, r in dealt]),
            "row": np.concatenate([r.row for *_, r in dealt]),
            "label": np.concatenate([r.label for *_, r in dealt]),
        },
        provides=frozenset({"probes"}) | provided(around, batch_size),
    )


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


def _again(
    store: ImageStore, reader: Reader, rows: Rows, change: Pipeline, batch_size: int
) -> Iterator[Batch | None]:
    """Images that are scored after every segment."""
    found = store.fixed(repr(change), reader, rows, change, batch_size)
    return reader.batches(rows, batch_size, change) if found is None else found


def surroundings(
    clean: ImageSet | None,
    held_out: np.ndarray,
    *,
    root: str | None,
    dataset: Dataset,
    order_seed: int,
    clean_images: int,
    source_from: str,
    source_images: int | None,
    batch_size: int,
    change: Pipeline,
    workers: int,
    on_error: Literal["raise", "skip"],
    skipped: Skipped,
    store: ImageStore,
) -> Surroundings:
    """The images beside a stream.

    Args:
        clean: clean evaluation images, if there are any.
        held_out: rows of `clean` that neither stream nor probes use.

    Raises:
        UserError: for a `source_from` that is neither a word nor a folder.
    """
    if source_from not in ("train", "held_out") and not Path(source_from).is_dir():
        raise UserError(
            f"scenario.source_from={source_from}: there is no such folder; use train, held_out or "
            "a folder of training images"
        )
    # Drawn once, so that warm-up, stream and clean images stay apart.
    rng = np.random.default_rng(derive(order_seed, "source"))
    held_out = rng.permutation(held_out)[:source_images]
    holdout, rows = None, np.zeros(0, np.int64)
    contents: list[object] = []
    if clean is not None and clean_images:
        rows = np.arange(len(clean.labels))
        if root is not None:
            rows = np.random.default_rng(derive(order_seed, "clean")).permutation(rows)
        if source_from == "held_out":
            rows = rows[~np.isin(rows, held_out)]
        rows = rows[:clean_images]
        if root is not None:  # embedded images follow from the settings
            contents.append(clean.content(rows))
        reader = Reader([clean], skipped, workers, on_error, store.device)
        holdout = partial(_again, store, reader, Rows.of(clean, rows), change, batch_size)
    source = partial(
        _source,
        root=root,
        device=store.device,
        dataset=dataset,
        choice=source_from,
        count=source_images,
        clean=clean,
        held_out=held_out,
        seed=order_seed,
        workers=workers,
        on_error=on_error,
        change=change,
    )
    return Surroundings(holdout, (rows, *contents), source)


def _source(
    *,
    root: str | None,
    device: torch.device,
    dataset: Dataset,
    choice: str,
    count: int | None,
    clean: ImageSet | None,
    held_out: np.ndarray,
    seed: int,
    workers: int,
    on_error: Literal["raise", "skip"],
    change: Pipeline,
) -> SourceImages:
    """The images that a method may prepare on, see `scenario.source_from`.

    Raises:
        UserError: where there are none, or fewer than asked for.
    """
    if root is None:
        from driftline.streams.embedded import SHIFT_CLASSES, EmbeddedImages

        wanted = count or 400
        per_class = -(-wanted // len(SHIFT_CLASSES))
        images: ImageSet = EmbeddedImages(SHIFT_CLASSES, split="train", per_class=per_class)
        rows, text = np.arange(len(images.labels)), "embedded training images"
    elif choice == "held_out":
        if clean is None:
            raise UserError("scenario.source_from=held_out: no clean images are under data.root")
        images, rows, text = clean, held_out, "clean evaluation images outside the stream"
    elif dataset == "imagenet_c":
        folder = Path(root if choice == "train" else choice)
        images, text = Derived(imagenet_train(folder), crop, CROP), "training images"
        rows = np.arange(len(images.labels))
    else:
        which: Cifar = "cifar10" if dataset == "cifar10_c" else "cifar100"
        images = cifar(Path(root if choice == "train" else choice), which, train=True)
        rows, text = np.arange(len(images.labels)), "training images"
    if not len(rows) or (count or 0) > len(rows):
        raise UserError(
            f"scenario.source_images={count or 'all'}, but scenario.source_from={choice} leaves "
            f"{len(rows)} images; ask for fewer, or leave some out of the stream (scenario.images)"
        )
    rows = np.random.default_rng(derive(seed, "source")).permutation(rows)[: count or len(rows)]
    reader = Reader([images], Skipped(), workers, on_error, device)

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
            Rows.of(images, taken), batch_size, both, start=start, seed=key
        ):
            if batch is not None:
                yield batch

    return SourceImages(len(rows), text, fingerprint(images.content(rows), rows), batches)


# ------------------------------------------------------------------ where the images come from


def _embedded(request: Request, dataset: Dataset) -> Sources:
    from driftline.streams.embedded import SHIFT_CLASSES, EmbeddedImages

    def images(split: str, count: int) -> ImageSet:
        per_class = max(1, -(-count // len(SHIFT_CLASSES)))
        return EmbeddedImages(classes=SHIFT_CLASSES, split=split, per_class=per_class)

    assert request.images is not None
    count = request.images
    stream, probe = images("test", count), images("probe", max(request.probe, request.clean))
    preset = "imagenet" if dataset == "imagenet_c" else "cifar"
    options: dict[str, Any] = {**request.generate, "preset": preset, "jpeg_quality": None}
    return Sources(
        sets=corrupted(stream, request.domains, "memory", **options),
        stream=np.arange(count),
        probe=np.arange(request.probe),
        probe_sets=corrupted(
            probe, request.domains, "memory", **{**options, "seed": options["seed"] + 1}
        ),
        clean=probe,
        held_out=np.zeros(0, np.int64),  # the source images are another split
        notes={"probe_from": "held_out", "parameters": f"those of {dataset}, on 32 px images"},
    )


def chosen(names: Sequence[str], image_list: str, seed: int, root: Path) -> np.ndarray:
    """Rows of `names` in stream order, by `image_list` (published | all | a file).

    Raises:
        UserError: if there is no such list, or an image of it is missing under `root`.
    """
    if image_list == "all":
        return np.random.default_rng(derive(seed, "subset")).permutation(len(names))
    path = Path(image_list)
    if image_list != "published" and not path.is_file():
        raise UserError(
            f"scenario.image_list={image_list}: no such file; give a text file with one "
            "<wnid>/<file> a line, or `published` or `all`"
        )
    try:
        listed = published_list() if image_list == "published" else path.read_text().split()
    except ValueError as error:
        raise UserError(f"scenario.image_list={image_list}: not a text file ({error})") from error
    position = {Path(n).with_suffix("").as_posix(): i for i, n in enumerate(names)}
    rows = [position.get(Path(n).with_suffix("").as_posix(), -1) for n in listed]
    missing = [n for n, r in zip(listed, rows, strict=True) if r < 0]
    if missing:
        raise UserError(
            f"{root} lacks {len(missing)} of the {len(listed)} images of "
            f"scenario.image_list={image_list} (first: {missing[0]}); complete the set, or set "
            "scenario.image_list=all to draw from the images that are there"
        )
    return np.asarray(rows)


def _listed(names: Sequence[str], request: Request, root: Path) -> np.ndarray:
    rows = chosen(names, request.image_list, request.seed, root)
    return rows[: _count(request.images, len(rows))]


def _count(asked: int | None, available: int) -> int:
    if asked is not None and not 1 <= asked <= available:
        raise UserError(f"scenario.images={asked}, but {available} images are available")
    return asked or available


def _probe(available: int, used: np.ndarray, request: Request) -> tuple[np.ndarray, str]:
    """Probe rows: outside the stream where enough are left, else from its beginning."""
    left = np.setdiff1d(np.arange(available), used)
    source = request.probe_from
    if source == "auto":
        source = "held_out" if len(left) >= request.probe else "stream"
    if source == "held_out" and len(left) < request.probe:
        raise UserError(
            f"scenario.probe_from=held_out needs {request.probe} images outside the stream, but "
            f"only {len(left)} are left; set scenario.probe_from=stream or fewer scenario.images"
        )
    if source == "held_out":
        left = np.random.default_rng(derive(request.seed, "probe")).permutation(left)
    return (left if source == "held_out" else used)[: request.probe], source


def _outside(clean: Files | None, used: Sequence[str]) -> np.ndarray:
    """Rows of the clean ImageNet images whose file is not among the `used` ones."""
    stems = {Path(n).stem for n in used}
    names = clean.names if clean else []
    return np.asarray([i for i, n in enumerate(names) if Path(n).stem not in stems], np.int64)


def _imagenet_released(root: Path, request: Request) -> Sources:
    folders = imagenet_c(root, request.names, request.severities)
    first = canonical(image_folder(folders[request.domains[0]], expected("imagenet_c")))
    sets: dict[Domain, ImageSet] = {}
    for d in request.domains:
        files = Files(folders[d], first.names, first.labels, first.class_names)
        sets[d] = _legacy(files) if request.legacy_resize else files
    rows = _listed(first.names, request, first.root)
    probe, source = _probe(len(first.labels), rows, request)
    try:
        clean = imagenet_clean(root)
    except UserError:
        clean = None  # the released corruption sets come without clean images
    return Sources(
        sets=sets,
        stream=rows,
        probe=probe,
        probe_sets=sets,
        clean=Derived(clean, crop, CROP) if clean else None,
        held_out=_outside(clean, [first.names[i] for i in np.union1d(rows, probe)]),
        notes={
            "image_list": request.image_list,
            "legacy_resize": request.legacy_resize,
            "probe_from": source,
            "clean": "validation images" if clean else f"none found: {LAYOUT['imagenet']}",
        },
    )


def _imagenet_on_the_fly(root: Path, request: Request) -> Sources:
    files = imagenet_clean(root)
    clean = Derived(files, crop, CROP)
    rows = _listed(files.names, request, root)
    probe, source = _probe(len(files.labels), rows, request)
    sets = corrupted(clean, request.domains, request.cache, preset="imagenet", **request.generate)
    if request.legacy_resize:
        sets = {d: _legacy(images) for d, images in sets.items()}
    return Sources(
        sets=sets,
        stream=rows,
        probe=probe,
        probe_sets=sets,
        clean=clean,
        held_out=np.setdiff1d(np.arange(len(files.labels)), np.union1d(rows, probe)),
        notes={
            "image_list": request.image_list,
            "legacy_resize": request.legacy_resize,
            "probe_from": source,
            "jpeg_quality": request.generate["jpeg_quality"],
        },
    )


def _cifar(root: Path, which: Cifar, request: Request, released: bool) -> Sources:
    clean: ImageSet | None
    if released:
        sets = cifar_c(root, which, request.names, request.severities)
        try:
            clean = cifar(root, which, train=False)
        except UserError:
            clean = None
    else:
        clean = cifar(root, which, train=False)
        sets = corrupted(clean, request.domains, None, preset="cifar", **request.generate)
    available = len(sets[request.domains[0]].labels)
    rows = np.arange(_count(request.images, available))  # file order, as the official code reads
    probe, source = _probe(available, rows, request)
    return Sources(
        sets=sets,
        stream=rows,
        probe=probe,
        probe_sets=sets,
        clean=clean,
        held_out=np.setdiff1d(np.arange(available), np.union1d(rows, probe)),
        notes={
            "probe_from": source,
            "clean": "test images" if clean else f"none found: {LAYOUT[which]}",
        },
    )
