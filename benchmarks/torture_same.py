"""What may change without changing a number. A section of torture.py."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from torture_common import OFTEN, RUNS, SHIFTS, TASKS, Part, Row, call, difference, result

from driftline.core import checkpoint

METHODS = {
    "Tent": ["strategy=tent", *SHIFTS],
    "CoTTA": RUNS["CoTTA"],
    "RoTTA": RUNS["RoTTA"],
    "EASE": RUNS["EASE"],
    "MOS": RUNS["MOS"],
    "ER": ["strategy=er", "strategy.capacity=30", *TASKS],
}
ADAPTS = ("Tent", "CoTTA", "RoTTA")
LEARNS = ("EASE", "MOS", "ER")
FEW = ["scenario.probe_images=0", "scenario.clean_images=0"]  # where each loader costs seconds
TOLERANCE = 2.0  # points, of any metric in percent
ONLINE = ("err", "ece", "nll", "brier", "collapse", "nan")  # metrics made while adapting
HEAD = ["changed", "to", *METHODS, "verdict"]
TEXT = (
    "Runs on embedded images with one setting changed, compared with the run without the change "
    "(`runtime.workers=0`, one thread, a fork where there are processes). `equal`: to the last "
    "bit, everything that is compared above; `numbers equal`: metrics, accuracies per class and "
    "rows, where counters or the accuracy matrix differ by what the setting is for. Other numbers "
    "of threads add in another order: a number is the largest difference of any metric in percent "
    f"or, for a single image of these few, its share; held up to {TOLERANCE:g} points. "
    "`-`: not tried, or no such setting."
)


@dataclass(frozen=True)
class Change:
    """One thing that shall change no number.

    Args:
        words: the settings that change.
        level: `all` is equal, or `numbers`, or those made `online`, or they are `close`.
        methods: that are tried.
        both: settings of both sides.
        before: done in the process first.
    """

    what: str
    to: str
    words: Sequence[str] = ()
    level: str = "all"
    methods: Sequence[str] = tuple(METHODS)
    both: Sequence[str] = ()
    before: Callable[[], None] = lambda: None


def started_by(method: str) -> Callable[[], None]:
    return partial(multiprocessing.set_start_method, method, force=True)


def killed_in_the_middle() -> None:
    """The process dies with the seventh batch after the first checkpoint that is due."""
    real = checkpoint.Checkpointer.tick
    left = iter(range(10))

    def tick(self: Any, *args: Any, **cursor: int) -> None:
        real(self, *args, **cursor)
        if "source" not in self.log.folder.parts and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.Checkpointer.tick = tick  # type: ignore[method-assign]


TWO = ["runtime.workers=2"]
CHANGES = [
    Change("loader processes", "1", ["runtime.workers=1"]),
    Change("loader processes", "2", TWO),
    Change("loader processes", "4", ["runtime.workers=4"]),
    Change("their start", "forkserver", TWO, before=started_by("forkserver")),
    Change(
        "their start", "spawn", TWO, methods=["Tent", "ER"], both=FEW, before=started_by("spawn")
    ),
    Change("`checkpoint.every`", "1", ["checkpoint.every=1"]),
    Change("`checkpoint.every`", "0", ["checkpoint.every=0"]),
    Change("killed and continued", "after batch 11", OFTEN, before=killed_in_the_middle),
    Change("`scenario.probe_every`", "2", ["scenario.probe_every=2"], "online", ADAPTS),
    Change("probes, clean images", "none", FEW, "online", ADAPTS),
    Change(
        "`scenario.clean_adapting`", "false", ["scenario.clean_adapting=false"], "online", ADAPTS
    ),
    Change("`scenario.test_batch_size`", "1", ["scenario.test_batch_size=1"], "numbers", LEARNS),
    Change("`scenario.test_batch_size`", "7", ["scenario.test_batch_size=7"], "numbers", LEARNS),
    Change("`runtime.feature_cache_mb`", "0", ["runtime.feature_cache_mb=0"], "numbers", LEARNS),
    Change("`runtime.image_store_mb`", "0", ["runtime.image_store_mb=0"]),
    Change("a sweep", "two seeds, one process", ["-m", "seed=1,0"]),
    Change("threads", "2", ["runtime.threads=2"], "close"),
    Change("threads", "4", ["runtime.threads=4"], "close"),
]


def settings(work: Path) -> Iterator[Part]:
    """A row for each change."""
    for change in CHANGES:
        name = f"{change.what} {change.to}"
        yield Part(name, partial(changed, change, work / "same"))


def changed(change: Change, folder: Path) -> Row:
    log = folder / "same.log"
    folder.mkdir(parents=True, exist_ok=True)
    cells, held = [], True
    shutil.rmtree(folder / "trial", ignore_errors=True)
    for name, words in METHODS.items():
        if name not in change.methods:
            cells.append("-")
            continue
        words = [*words, "runtime.workers=0", "runtime.threads=1", *_fitting(change.both, words)]
        base = folder / ("base-few" if change.both else "base")
        want = one_run(tuple(words), base, log)
        log.unlink(missing_ok=True)
        root = folder / "trial"
        flags = [w for w in change.words if w.startswith("-")]
        others = [w for w in change.words if not w.startswith("-")]
        typed = {w.split("=")[0] for w in others}
        command = [*flags, *(w for w in words if w.split("=")[0] not in typed), *others]
        status = call([*command, f"root={root}"], log, change.before)
        if status == -signal.SIGKILL:
            status = call([*command, f"root={root}"], log)
        if status:
            cells.append(f"**status {status}**")
            held = False
            continue
        cell, fine = compared(want, read(root, words), change.level)
        cells.append(cell if fine else f"**{cell}**")
        held = held and fine
    return Row([change.what, change.to, *cells, "held" if held else "**did not hold**"], held)


def _fitting(both: Sequence[str], words: Sequence[str]) -> list[str]:
    """Those settings that the scenario has."""
    adapts = any(word.startswith("scenario=imagenet_c") for word in words)
    return [word for word in both if adapts]


@cache
def one_run(words: Sequence[str], root: Path, log: Path) -> dict[str, Any]:
    """The result of a run, found or made."""
    assert call([*words, f"root={root}"], log) == 0, log.read_text()
    return read(root, words)


def read(root: Path, words: Sequence[str]) -> dict[str, Any]:
    """The result of the method itself, with seed 0."""
    strategy = words[0].removeprefix("strategy=")
    found = {k: v for k, v in result(root).items() if f"/{strategy}/" in k and "/s0-" in k}
    assert len(found) == 1, sorted(found)
    return next(iter(found.values()))


def compared(want: dict[str, Any], got: dict[str, Any], level: str) -> tuple[str, bool]:
    """What to write of two results, and whether it is as promised."""
    if level == "all":
        found = difference(want, got)
        return (found or "equal", not found)
    if level == "numbers":
        found = difference(*({k: one[k] for k in ("metrics", "per_class", "rows") if k in one}
                             for one in (want, got)))  # fmt: skip
        return (found or "numbers equal", not found)
    if level == "online":
        found = difference(*(online(one) for one in (want, got)))
        return (found or "numbers equal", not found)
    pairs = [
        (value, got["metrics"][name])
        for name, value in want["metrics"].items()
        if name not in ("nll", "brier", "ece", "nan", "collapse")
    ]
    if not difference(want, got):
        return "equal", True
    worst = max(abs(a - b) for a, b in pairs)
    return f"{worst:.2f}", worst <= TOLERANCE


def online(one: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are made while adapting."""
    metrics = {k: v for k, v in one["metrics"].items() if k.split("/")[0].split("_")[0] in ONLINE}
    tables = {k: v for k, v in one["rows"].items() if k != "matrix"}
    return {"metrics": metrics, "rows": tables}
