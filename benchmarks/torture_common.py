"""What the sections of torture.py share: rows of the report, forked runs, and their results."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from driftline.analysis.runs import json_lines
from driftline.core.files import read_record
from driftline.core.processes import end_with_parent
from driftline.runs import command, execute

assert execute  # imported here for the forked processes
SHIFTS = [
    "scenario=imagenet_c",
    "scenario.corruptions=[contrast,brightness]",
    "scenario.images=64",
    "scenario.batch_size=8",
    "scenario.probe_images=16",
    "scenario.clean_images=16",
    "scenario.source_images=40",
]
TASKS = [
    "scenario=split_cifar10",
    "scenario.increment=4",
    "scenario.embedded_images=[12,6]",
    "scenario.batch_size=10",
    "strategy.epochs=2",
]
RUNS = {
    "CoTTA": ["strategy=cotta", "strategy.views=2", "strategy.threshold=2", *SHIFTS],
    "ViDA": ["strategy=vida", "strategy.views=2", "strategy.rank_high=8", *SHIFTS],
    "RoTTA": ["strategy=rotta", *SHIFTS],
    "EASE": ["strategy=ease", *TASKS],
    "MOS": ["strategy=mos", *TASKS],
}
WITH_WORKERS = ("RoTTA", "MOS")  # these runs read through two loader processes
SWEEP = ["-m", "strategy=source,tent,rotta", "seed=0,1", *SHIFTS]
OFTEN = ["checkpoint.every=2"]
TENT = ["strategy=tent", *SHIFTS, *OFTEN]


class Row(NamedTuple):
    """A row of the report, and whether all that it says held."""

    cells: list[str]
    held: bool


class Part(NamedTuple):
    """What makes one row; the name is what `--rows` is compared with."""

    name: str
    work: Callable[[], Row]


@dataclass
class Tried:
    """A row of the report."""

    what: str
    tried: int = 0
    held: int = 0
    notes: list[str] = field(default_factory=list)  # what failed; or the lines that were said

    def add(self, held: bool, note: str = "") -> None:
        self.tried += 1
        self.held += held
        if note and note not in self.notes and (not held or len(self.notes) < 3):
            self.notes.append(note if held else f"**{note}**")

    def row(self) -> Row:
        counts = [str(n) if self.tried else "-" for n in (self.tried, self.held)]
        return Row([self.what, *counts, "; ".join(self.notes)], self.held == self.tried)


# ------------------------------------------------------------------------ processes


OUTPUTS: dict[int, tuple[int, Path]] = {}  # process -> the pipe with what it says, its log


def start(words: Sequence[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    """`python run.py WORDS` in a forked process with its output in `log`; returns its number.

    Args:
        before: done in that process first.
    """
    sys.stdout.flush()
    read, write = os.pipe()  # not the file itself: a limit on files shall not hit the log
    parent, pid = os.getpid(), os.fork()
    if pid:
        os.close(write)
        os.set_blocking(read, False)
        OUTPUTS[pid] = read, log
        return pid
    status = 99
    try:
        end_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(status)
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(read)
        os.close(write)
        sys.argv = ["run.py", *words]
        before()
        try:
            status = command.main()
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def wait(pid: int) -> int:
    """Exit status of a process, negative for a signal; what it said is in its log then."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    read, log = OUTPUTS.pop(pid)
    with open(log, "ab") as file, contextlib.suppress(BlockingIOError):
        while said := os.read(read, 2**16):
            file.write(said)
    os.close(read)
    return status


def call(words: Sequence[str], log: Path, before: Callable[[], None] = lambda: None) -> int:
    return wait(start(words, log, before))


def problems(log: Path) -> list[str]:
    """Lines of a log that begin an error, and a word for a traceback.

    Not those of torch's loader, whose half-made object complains while it is deleted.
    """
    lines = log.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.startswith("error: ")]
    traces = [
        before
        for before, line in zip(["", *lines], lines, strict=False)
        if line == "Traceback (most recent call last):"
    ]
    ours = [line for line in traces if not line.startswith("Exception ignored in")]
    return [*said, *(["a traceback"] if ours else [])]


# ------------------------------------------------------------------------ results

CLOCK = ("seconds", "memory")  # in the names of what no two runs share


def result(root: Path) -> dict[str, Any]:
    """All results under a folder, without what depends on the clock, the memory and the place."""
    results = {}
    for path in sorted(root.glob("*/*/*/*/summary.json")):
        summary = read_record(path)
        rows = {
            name: [
                {k: v for k, v in row.items() if k != "seconds"}
                for row in json_lines(path.with_name(f"{name}.jsonl"), checksum)
            ]
            for name, checksum in summary["rows"].items()
        }
        cost = {k: v for k, v in summary["cost"].items() if not any(w in k for w in CLOCK)}
        kept = ("metrics", "per_class", "method", "kernel", "skipped_images", "definitions")
        name = path.parent.relative_to(root).as_posix()
        results[name] = {k: summary[k] for k in kept if k in summary} | {"cost": cost, "rows": rows}
        results[name]["source"] = summary.get("source", {}).get("metrics")
    return json.loads(json.dumps(results))


def difference(whole: Any, other: Any, at: str = "") -> str:
    """Where two results differ first; empty if nowhere."""
    if isinstance(whole, dict) and isinstance(other, dict):
        for key in sorted({*whole, *other}):
            if found := difference(whole.get(key), other.get(key), f"{at}/{key}"):
                return found
        return ""
    same = whole == other or (
        isinstance(whole, float) and isinstance(other, float) and math.isnan(whole + other)
    )
    return "" if same else f"{at}: {str(other)[:60]} instead of {str(whole)[:60]}"


def leftovers(root: Path) -> list[str]:
    """Temporary files under a folder."""
    names = (*root.rglob("*.tmp"), *root.rglob("features-*"), *root.rglob(".held*"))
    return sorted(path.name for path in names)
