"""Pairs of corruptions that change smoothly at a held accuracy: CCC, on generated images.

Source: Press et al., "RDumb: A simple approach that questions our progress in continual test-time
adaptation", NeurIPS 2023; github.com/oripress/CCC, `generate.py`. Every image carries two
corruptions, `a` and then `b`, each at a severity from 0 to 5 in quarters. A calibration grid holds,
for each ordered pair, the accuracy of a pretrained network at each pair of severities. The walk of
a pair leads from (s, 0) to (0, t) along neighbouring cells of that grid, so that the mean accuracy
is as close to the baseline as such walks come; at its end only `b` is left, and the walk of (b, c)
begins. Each cell shows `speed` images.

The published archives are drawn without a seed for their noise; this makes the protocol on images
of its own. The sequence of pairs and the cells are those of the official code for the same seed,
names and grid; crops, noise and the choice of images are not.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import driftline.core.vision  # noqa: F401  # isort: skip

import numpy as np
import torch
from annotated_types import Ge, Le, MinLen, Predicate
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from driftline.core.errors import UserError, suggest
from driftline.core.paths import script_line
from driftline.core.ranges import (
    Count,
    CountOrZero,
    Flat,
    Percent,
    PlainName,
    Seed,
    Unit,
    distinct,
)
from driftline.core.seed import derive
from driftline.core.stream import Batch, Segment, ShiftStream, Skipped
from driftline.streams import corruptions as C
from driftline.streams.corrupted import frost_content, frost_source
from driftline.streams.corruption_ops.common import jpeg
from driftline.streams.dataset import NAMED, CleanData
from driftline.streams.images import Generated, ImageSet, fingerprint, unreadable
from driftline.streams.loading import Rows
from driftline.streams.pipelines import as_stored, seeded
from driftline.streams.severities import HIGHEST, NAMES, STEP, interpolated
from driftline.streams.shifts import Beside, Loading, provided, surroundings

Pair = tuple[str, str]
Cells = list[tuple[int, int]]  # severities of a and b, in quarters

EMBEDDED = Path(__file__).with_name("lists") / "ccc_embedded.json"
ALIASES = {"elastic": "elastic_transform", "jpeg": "jpeg_compression"}  # of the official grid
# Corruptions that reach the baseline accuracy alone, by the lowest baseline that uses them; in the
# official order, which the drawing of pairs depends on.
_HARD = ("gaussian_noise", "shot_noise", "impulse_noise", "contrast")
_MEDIUM = tuple(n for n in C.STANDARD if n not in ("brightness", "jpeg_compression"))
_EASY = tuple(n for n in C.STANDARD if n != "brightness")


def published(baseline: float) -> tuple[str, ...]:
    """The corruptions of CCC-Hard (0), Medium (20) and Easy (40)."""
    return _EASY if baseline >= 40 else _MEDIUM if baseline >= 20 else _HARD


# ------------------------------------------------------------------ calibration


@dataclass(frozen=True)
class Calibration:
    """Accuracies in percent, [K, K] per ordered pair: severity of a, severity of b."""

    grids: dict[Pair, np.ndarray]
    about: dict[str, Any]  # how it was measured, for results
    path: Path

    @property
    def step(self) -> int:
        """Quarters between two severities of the grids."""
        side = len(next(iter(self.grids.values())))
        return round(HIGHEST / STEP) // (side - 1)


def key(pair: Pair) -> str:
    """Name of a pair's grid in a calibration file."""
    return f"n1_{pair[0]}_n2_{pair[1]}"


def read_calibration(path: Path, names: Sequence[str]) -> Calibration:
    """The grids of all ordered pairs of `names`.

    Args:
        path: .json `{"accuracy": {"n1_<a>_n2_<b>": [[...]]}, "settings": {...}}` as
            scripts/calibrate_ccc.py writes it, or .npz with arrays of these names (the official
            grid, converted).

    Raises:
        UserError: for a file that is missing, of another kind, incomplete or out of range.
    """
    at = f"scenario.calibration={path}"
    if path.suffix in (".pickle", ".pkl"):
        raise UserError(
            f"{at}: pickles can run code and are not read. Convert one that you trust: python -c "
            "\"import numpy, pandas; numpy.savez('ccc.npz', **pandas.read_pickle('FILE'))\""
        )
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                given, about = {k: file[k] for k in file.files}, {}
        else:
            content = json.loads(path.read_text())
            given, about = content["accuracy"], content.get("settings", {})
            given = {str(k): v for k, v in given.items()}
        found = {_pair(k): np.asarray(v, np.float64) for k, v in given.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{at} cannot be read as a calibration ({type(error).__name__}: {error}); make one "
            f"with {script_line('calibrate_ccc')}"
        ) from error
    wanted = [(a, b) for a in names for b in names if a != b]
    missing = [pair for pair in wanted if pair not in found]
    if missing:
        raise UserError(
            f"{at} lacks {len(missing)} of {len(wanted)} pairs of corruptions (first: "
            f"{' then '.join(missing[0])}); complete it with {script_line('calibrate_ccc')}, or "
            "name fewer in scenario.corruptions"
        )
    grids = {pair: found[pair] for pair in wanted}
    quarters = round(HIGHEST / STEP)
    shapes = {g.shape for g in grids.values()}
    side = next(iter(shapes))[0] if len(shapes) == 1 else 0
    if shapes != {(side, side)} or side < 3 or quarters % (side - 1):
        raise UserError(
            f"{at}: the grids must be square and alike, 21 x 21 for severities 0, 0.25 ... 5 (or "
            f"11 x 11, 6 x 6 for coarser ones), found {sorted(shapes)[:3]}"
        )
    for pair, grid in grids.items():
        if not (np.isfinite(grid).all() and grid.min() >= 0 and 1 < grid.max() <= 100):
            raise UserError(
                f"{at}: accuracies must be percentages from 0 to 100, but those of "
                f"{' then '.join(pair)} run from {grid.min():g} to {grid.max():g}"
            )
    return Calibration(grids, about, path)


def _pair(text: str) -> Pair:
    first, _, second = text.removeprefix("n1_").partition("_n2_")
    return ALIASES.get(first, first), ALIASES.get(second, second)


def walk(grid: np.ndarray, baseline: float) -> Cells:
    """Cells from (i, 0) to (0, j), each one step less of `a` or one more of `b`.

    From each cell the walk takes the step after which the mean of the accuracies to come, its own
    included, is nearer to the baseline; of all starts, the one whose mean is nearest is taken.
    (A choice by cells, as the official code makes it; not every walk is compared.)

    Args:
        grid: percent, [K, K]; rows are severities of a.
    """
    side = len(grid)
    total = np.full((side, side + 1), np.inf)  # of the walk that begins here; no cells beyond b
    cells = np.ones((side, side + 1), np.int64)
    down = np.zeros((side, side), bool)  # the next step takes from a
    total[0, :side] = grid[0]
    for i in range(1, side):
        for j in reversed(range(side)):
            sums = [total[p] + grid[i, j] for p in ((i - 1, j), (i, j + 1))]
            counts = [cells[p] + 1 for p in ((i - 1, j), (i, j + 1))]
            miss = [abs(s / n - baseline) for s, n in zip(sums, counts, strict=True)]
            down[i, j] = miss[0] < miss[1]
            total[i, j], cells[i, j] = (sums[0], counts[0]) if down[i, j] else (sums[1], counts[1])
    i = 1 + int(np.abs(total[1:, 0] / cells[1:, 0] - baseline).argmin())
    j, steps = 0, []
    while i > 0:
        steps.append((i, j))
        i, j = (i - 1, j) if down[i, j] else (i, j + 1)
    return [*steps, (0, j)]


def route(names: Sequence[str], seed: int) -> Iterator[Pair]:
    """Pairs without end, each beginning with what the last ended with."""
    draws = random.Random(seed)
    first, second = draws.choice(names), draws.choice(names)
    while True:
        while second == first:
            second = draws.choice(names)
        yield first, second
        first = second


# ------------------------------------------------------------------ images


def corrupt_pair(
    levels: Tensor,
    pair: Pair,
    quarters: tuple[int, int],
    indices: Sequence[int],
    *,
    preset: C.Preset,
    seed: int,
    jpeg_quality: int | None,
    frost_dir: str | None,
) -> Tensor:
    """`a`, then `b` on the 256 levels that `a` left; then JPEG. Severity 0 leaves an image alone.

    Args:
        levels: uint8 [B, 3, H, W] on any device.
        quarters: severities of a and b, in quarters.
        indices: numbers that the draws depend on, one an image.
        preset, seed, jpeg_quality, frost_dir: as for `corruptions.corrupt_batch`.
    """
    for name, severity in zip(pair, (q * STEP for q in quarters), strict=True):
        if severity:
            levels = C.corrupt_batch(
                levels,
                name,
                math.ceil(severity),
                indices,
                preset=preset,
                seed=seed,
                frost_dir=frost_dir,
                parameters=interpolated(name, severity, preset),
            )
    return levels if jpeg_quality is None else jpeg(levels, jpeg_quality)


_RANDOM_CROP = T.Compose([T.RandomHorizontalFlip(), T.RandomResizedCrop(224)])


class _Shown:
    """The images of one pair as they come: row i is the i-th of them."""

    def __init__(
        self, base: ImageSet, rows: np.ndarray, numbers: np.ndarray, crop_seed: int | None
    ) -> None:
        self.base, self.rows, self.numbers, self.crop_seed = base, rows, numbers, crop_seed
        self.labels, self.num_classes = base.labels[rows], base.num_classes
        self.class_names = base.class_names

    def content(self, rows: np.ndarray | None = None) -> str:
        shown = slice(None) if rows is None else rows
        images, numbers = self.rows[shown], self.numbers[shown]
        return fingerprint(self.base.content(np.unique(images)), images, numbers, self.crop_seed)

    def unreadable(self, rows: np.ndarray | None = None) -> list[Path]:
        shown = slice(None) if rows is None else rows
        return unreadable(self.base, np.unique(self.rows[shown]))

    def image(self, row: int) -> Image.Image:
        image = self.base.image(int(self.rows[row]))
        if self.crop_seed is None:
            return image
        return seeded(_RANDOM_CROP, image, derive(self.crop_seed, "crop", int(self.numbers[row])))


def _make(
    levels: Tensor,
    rows: Sequence[int],
    *,
    pair: Pair,
    quarters: np.ndarray,
    numbers: np.ndarray,
    **settings: Any,
) -> Tensor:
    corrupted = torch.empty_like(levels)
    cells, ids = quarters[list(rows)], numbers[list(rows)]
    for cell in np.unique(cells, axis=0):
        here = np.flatnonzero((cells == cell).all(1))
        at = torch.from_numpy(here).to(levels.device)
        severities = (int(cell[0]), int(cell[1]))
        corrupted[at] = corrupt_pair(levels[at], pair, severities, ids[here].tolist(), **settings)
    return corrupted


@dataclass(frozen=True)
class _Dealt:
    """Which image the stream shows when: int64 [N] each."""

    walk: np.ndarray  # number of the walk
    row: np.ndarray  # of the clean set
    quarters: np.ndarray  # [N, 2]


def _deal(walks: Sequence[Cells], rows: np.ndarray, images: int, speed: int, seed: int) -> _Dealt:
    """`speed` images for each cell, drawn without replacement as long as there are enough."""
    deals: list[tuple[int, np.ndarray, tuple[int, int]]] = []
    left = images
    for number, cells in enumerate(walks):
        for cell in cells:
            rng = np.random.default_rng(derive(seed, "cell", len(deals)))
            count = min(speed, left)
            turns = -(-count // len(rows))
            drawn = np.concatenate([rng.permutation(rows) for _ in range(turns)])[:count]
            deals.append((number, drawn, cell))
            left -= count
            if not left:
                break
    lengths = [len(drawn) for _, drawn, _ in deals]
    return _Dealt(
        np.repeat([n for n, *_ in deals], lengths),
        np.concatenate([drawn for _, drawn, _ in deals]),
        np.repeat(np.asarray([cell for *_, cell in deals], np.int64), lengths, axis=0),
    )


def corruption_names(given: list[str] | None, baseline: float) -> list[str]:
    """`scenario.corruptions`, or those published for the baseline.

    Raises:
        UserError: for an unknown name, with the nearest known one.
    """
    names = list(published(baseline)) if given is None else given
    for name in names:
        if name not in NAMES:
            raise UserError(
                f"scenario.corruptions: {name!r} cannot be part of a pair{suggest(name, NAMES)}. "
                f"Allowed: {', '.join(NAMES)}"
            )
    if len(names) < 2 or len(set(names)) != len(names):
        raise UserError("scenario.corruptions must hold at least two corruptions, each once")
    return names


@dataclass(frozen=True, kw_only=True)
class Walks:
    """The sequence of pairs and of their severities."""

    baseline: Percent
    speed: Count
    walk_seed: Seed
    corruptions: Annotated[list[str], MinLen(2), Predicate(distinct)] | None
    calibration: str | None
    images: Count  # of the whole stream


def pair_stream(
    *,
    label: PlainName,
    data: Annotated[CleanData, NAMED],
    walks: Annotated[Walks, Flat()],
    loading: Annotated[Loading, Flat()],
    beside: Annotated[Beside, Flat()],
    corruption_seed: Seed,
    jpeg_quality: Annotated[int, Ge(1), Le(100)] | None,
    frost_dir: str | None,
    label_budget: CountOrZero | Unit | None,
    label_delay: CountOrZero,
    cache: str | None,
) -> ShiftStream:
    """A stream under pairs of corruptions; a segment is the walk of one pair.

    Raises:
        UserError: for missing data or settings that do not fit.
    """
    real, baseline, speed, images = (
        data.data_root is not None,
        walks.baseline,
        walks.speed,
        walks.images,
    )
    names = corruption_names(walks.corruptions, baseline)
    if walks.calibration is None and real:
        raise UserError(
            "scenario.calibration is needed with real images: a grid of accuracies. Measure one "
            f"with {script_line('calibrate_ccc', 'scenario=ccc data.root=... --out ccc.json')}, or "
            "give the official ccc_accuracy_matrix.pickle, which says how it is converted"
        )
    path = EMBEDDED if walks.calibration is None else Path(walks.calibration)
    grid = read_calibration(path, names)
    found = data.images()
    notes: dict[str, object] = {}
    frost = frost_source(frost_dir)
    if "frost" in names:
        notes["frost"] = frost

    pairs: list[Pair] = []
    cells_of: list[Cells] = []
    for pair in route(names, walks.walk_seed):
        pairs.append(pair)
        cells = walk(grid.grids[pair], baseline)
        cells_of.append([(i * grid.step, j * grid.step) for i, j in cells])
        if speed * sum(map(len, cells_of)) >= images:
            break
    dealt = _deal(cells_of, found.rows, images, speed, walks.walk_seed)
    seen = list(dict.fromkeys(pairs))
    settings: dict[str, Any] = {
        "preset": data.preset,
        "seed": corruption_seed,
        "jpeg_quality": jpeg_quality if real and data.preset == "imagenet" else None,
        "frost_dir": frost_dir,
    }
    named = {**settings, "frost_dir": frost_content(frost_dir)}
    sets: list[ImageSet] = []
    domain, row = np.zeros(images, np.int64), np.zeros(images, np.int64)
    of_pair = np.asarray([seen.index(pair) for pair in pairs])[dealt.walk]
    for d, pair in enumerate(seen):
        numbers = np.flatnonzero(of_pair == d)  # positions in the stream
        domain[numbers], row[numbers] = d, np.arange(len(numbers))
        base = _Shown(
            found.base, dealt.row[numbers], numbers, walks.walk_seed if found.crop else None
        )
        quarters = dealt.quarters[numbers]
        make = partial(_make, pair=pair, quarters=quarters, numbers=numbers, **settings)
        text = f"{pair} {fingerprint(quarters)} {sorted(named.items())} {C.VERSION}"
        sets.append(Generated(base, make, text, cache if real else None))

    skipped = Skipped()
    reader = loading.reader(sets, skipped)
    dealt_rows = Rows(row, found.base.labels[dealt.row], domain)

    def batches(rows: Rows, start: int = 0) -> Iterator[Batch | None]:
        return reader.batches(rows, loading.batch_size, as_stored, start=start)

    segments = []
    for n, pair in enumerate(pairs):
        rows = dealt_rows.take(np.flatnonzero(dealt.walk == n))
        segments.append(
            Segment(
                index=n,
                name=f"{n}/{'+'.join(pair)}",
                domains=(seen.index(pair),),
                images=len(rows),
                steps=-(-len(rows) // loading.batch_size),
                batches=partial(batches, rows),
            )
        )
    shown = [(found.base, np.unique(dealt.row))]
    held_out = found.held_out if real else np.zeros(0, np.int64)
    around = surroundings(data, beside, loading, found.clean, held_out, as_stored, skipped, shown)
    quarter = dealt.quarters // grid.step
    expected = [
        grid.grids[pairs[w]][i, j] for w, (i, j) in zip(dealt.walk, quarter.tolist(), strict=True)
    ]
    facts: dict[str, object] = {
        "classes": found.base.num_classes,
        "label_space": data.label_space,
        "corruptions": "ccc (generated): pairs on images of its own, not the released archives",
        "baseline": baseline,
        "speed": speed,
        "walk_seed": walks.walk_seed,
        "calibration": {
            "file": path.name,
            "grids": fingerprint(*grid.grids.values()),
            **grid.about,
        },
        "calibrated_accuracy": round(float(np.mean(expected)), 2),
        "crop": "random resized crop and flip" if found.crop else "none",
        "jpeg_quality": settings["jpeg_quality"],
        "segments": [s.name for s in segments],
        **notes,
        "fingerprint": fingerprint(*reader.contents([None] * len(sets)), domain, *around.contents),
    }
    # The accuracy that is held takes the place of the severity in a domain's name.
    return ShiftStream(
        name=f"{label}[generated]" if real else label,
        num_classes=found.base.num_classes,
        domains=[f"{'+'.join(pair)}:{baseline:g}" for pair in seen],
        segments=segments,
        facts=facts,
        skipped=skipped,
        holdout=around.holdout,
        holdout_adapting=beside.clean_adapting,
        source=around.source,
        label_budget=label_budget,
        label_delay=label_delay,
        order={
            "segment": dealt.walk,
            "domain": domain,
            "row": row,
            "label": dealt_rows.label,
            "image": dealt.row,
            "severities": dealt.quarters * STEP,
        },
        provides=provided(around, loading.batch_size),
        class_names=(real and data.about.class_names) or found.base.class_names,
    )
