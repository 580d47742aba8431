"""Kill, starve, damage and repeat runs, let them run for long: nothing is lost, nothing is silent.

    python benchmarks/torture.py [--kills 20] [--only kills damage starve long tasks same]
                                 [--rows PATTERN] [--seed 0] [--seconds 30]
                                 [--out docs/reliability.md] [--work FOLDER]

Small runs on embedded images, each in a forked process. After whatever was done to it the same
command is given again, and its result is compared with that of an undisturbed run: metrics, figures
of each class, what the method tells of itself, every counter of the cost, which kernels ran, and
all rows but for their durations.

All of it takes about an hour of one core. With `--work` it can be stopped: rows that are in that
folder are not made again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torture_long
import torture_same
from torture_common import (
    OFTEN,
    RUNS,
    SHIFTS,
    TENT,
    Part,
    Row,
    Tried,
    call,
    difference,
    leftovers,
    problems,
    result,
    start,
    wait,
)

from driftline.core.files import write_text

WITH_WORKERS = ("RoTTA", "MOS")  # these runs read through two loader processes
SWEEP = ["-m", "strategy=source,tent,rotta", "seed=0,1", *SHIFTS]

# ------------------------------------------------------------------------ kills


def suicide(rng: random.Random) -> Callable[[], None]:
    """Arranges that the process kills itself before or after some writing, drawn at random."""
    name = rng.choice(["replace", "fsync", "unlink", "truncate", "open"])
    left, after = rng.randint(1, 25), rng.random() < 0.5

    def arrange() -> None:
        real = getattr(os, name)
        count = iter(range(left))

        def last(*args: Any, **options: Any) -> Any:
            if next(count, None) is not None:
                return real(*args, **options)
            if after:
                real(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(os, name, last)

    return arrange


def kills(number: int, seed: int, work: Path) -> Iterator[Part]:
    """Kill runs and sweeps again and again, until each has died often enough."""
    for name, words in {**RUNS, "sweep of 6 runs": SWEEP}.items():
        what = f"{name}, killed and continued until it ends"
        if name in WITH_WORKERS:
            what += ", two loader processes"
            words = [*words, "runtime.workers=2"]
        rng = random.Random(f"{seed} {name}")
        yield Part(what, partial(killed, what, [*words, *OFTEN], number, rng, work))


def killed(what: str, words: Sequence[str], number: int, rng: random.Random, work: Path) -> Row:
    row = Tried(what)
    base, log = work / "kills" / "whole", work / "kills.log"
    shutil.rmtree(base.parent, ignore_errors=True)
    base.parent.mkdir(parents=True)
    began = time.perf_counter()
    assert call([*words, f"root={base}"], log) == 0, log.read_text()
    took, whole = time.perf_counter() - began, result(base)
    died = 0
    while died < number:
        root = work / "kills" / f"root{row.tried}"
        deaths = 0
        while True:
            log.unlink(missing_ok=True)
            itself = "sweep" not in what and rng.random() < 0.5 and deaths < number
            pid = start([*words, f"root={root}"], log, suicide(rng) if itself else lambda: None)
            delay = math.inf if itself or deaths >= number else rng.uniform(0.1, 0.7) * took
            end = time.monotonic() + delay
            while (done := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is (
                None
            ) and time.monotonic() < end:
                time.sleep(0.005)
            if done is None:
                os.kill(pid, signal.SIGKILL)
            status = wait(pid)
            if status != -signal.SIGKILL:
                break
            deaths += 1
        found = "" if status == 0 else f"status {status}: {problems(log)}"
        found = found or difference(whole, result(root))
        stale = leftovers(root)
        found = found or (f"left behind: {stale[:3]}" if stale else "")
        died += deaths
        for _ in range(deaths):
            row.add(not found, found)
        if deaths:
            print(f"  {what.split(',')[0]}: {deaths} kills, {found or 'equal'}", flush=True)
            shutil.rmtree(root, ignore_errors=True)
    return row.row()


# ------------------------------------------------------------------------ damage


def flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda content, rng: b"",
    "half": lambda content, rng: content[: len(content) // 2],
    "zeros": lambda content, rng: bytes(len(content)),
    "a byte flipped": flipped,
    "another byte flipped": flipped,
    "another type": lambda content, rng: b"[1, 2]\n",
    "another version": lambda content, rng: b'{"format": 99}\n',
    "binary": lambda content, rng: b"\xff\xfe\x00" + content[3:],
}


def damage(seed: int, work: Path) -> Iterator[Part]:
    """Damage each file that a run leaves or reads, finished and half way."""
    folder = work / "damage"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = images(folder / "data")
    vida, tent = [*RUNS["ViDA"], *OFTEN, "strategy.warmup.every=1"], TENT
    vida += ["strategy.warmup.batch_size=8"]
    simple = ["strategy=simplecil", "backbone=embedded_vit", "scenario=split_imagefolder"]
    simple += ["scenario.increment=1", f"data.root={data}", "scenario.batch_size=4"]
    cases = [
        ("finished run", tent, None, "tent/**/summary.json"),
        ("finished run", tent, None, "tent/**/environment.json"),
        ("finished run", tent, None, "tent/**/config.yaml"),
        ("finished run", tent, None, "tent/**/order.npz"),
        ("finished run", tent, None, "tent/**/batches.jsonl"),
        ("source run beside", tent, "unfinished", "source/**/summary.json"),
        ("source run beside", tent, "unfinished", "source/**/environment.json"),
        *(
            ("unfinished run", tent, "unfinished", f"tent/**/{file}")
            for file in ("last.pt", "batches.jsonl", "matrix.jsonl", "experiences.jsonl")
        ),
        *(
            ("unfinished run", tent, "unfinished", f"tent/**/{file}")
            for file in ("environment.json", "config.yaml", "order.npz", ".lock")
        ),
        ("artefact of the preparation", vida, "no summary", "prepared/**/*.safetensors"),
        ("unfinished preparation", vida, "preparing", "prepared/**/*.partial"),
        ("images read", simple, "no run", "data"),
    ]
    for what, words, state, pattern in cases:
        name = f"{what}: `{pattern.rpartition('/')[2]}`"
        rng = random.Random(f"{seed} {name}")
        yield Part(name, partial(damaged, name, words, state, pattern, rng, folder, data))


def damaged(
    what: str,
    words: Sequence[str],
    state: str | None,
    pattern: str,
    rng: random.Random,
    folder: Path,
    data: Path,
) -> Row:
    """One kind of file under every damage.

    Args:
        state: of the runs in the folder, see `prepare_state`.
        pattern: of the file; `data` for the images that are read.
    """
    row, log = Tried(what), folder / "damage.log"
    name = f"{words[0]}-{state}".replace("=", "_")
    pristine, whole_root = folder / name, folder / f"{name}-whole"
    if not whole_root.exists():
        assert call([*words, f"root={whole_root}"], log) == 0, log.read_text()
        prepare_state(words, state, whole_root, pristine, log)
    whole = result(whole_root)
    for kind, change in DAMAGES.items():
        root = folder / "trial"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(pristine, root)
        place = data if pattern == "data" else root
        targets = sorted(
            place.rglob("*.png")
            if pattern == "data"
            else place.glob(pattern if pattern.startswith("prepared") else f"*/{pattern}")
        )
        assert targets, (pattern, sorted(root.rglob("*")))
        target = targets[0]
        before = target.read_bytes()
        target.write_bytes(change(before, rng))
        changed = target.read_bytes() != before
        log.unlink(missing_ok=True)
        status = call([*words, f"root={root}"], log)
        said = problems(log)
        if pattern == "data":  # other images are another run, or an error that names the file
            target.write_bytes(before)
            names = {p.parent.name for p in root.glob("*/*/*/*/summary.json")}
            known = {p.parent.name for p in whole_root.glob("*/*/*/*/summary.json")}
            held = status == 2 and len(said) == 1 and str(target) in said[0]
            held = held or (status == 0 and not said and changed and not names & known)
            row.add(held, f"{kind}: status {status}, {said}" if not held else "")
            continue
        if status:
            found = f"status {status}: {said}"
        elif what.startswith("finished run") and "batches" in pattern:  # nothing makes them anew
            with warnings.catch_warnings(record=True) as left_out:
                warnings.simplefilter("always")
                found = newest(whole, result(root))
            if len(left_out) == 1 and "/rows/batches" in found:
                row.add(True, "left out of tables and figures")
                continue
        else:
            found = newest(whole, result(root))
        row.add(
            not found and not said, f"{kind}: {found or said}" if found or said else remark(log)
        )
    return row.row()


def newest(whole: dict[str, Any], other: dict[str, Any]) -> str:
    """Compare by run; one made again beside its damaged folder has that name with a number."""
    for name, one in whole.items():
        places = [other[n] for n in (f"{name}-2", name) if n in other]
        if not places:
            return f"no result of {name}"
        if found := difference(one, places[0], name.split("/")[1]):
            return found
    return ""


def remark(log: Path) -> str:
    """What a run said about a damaged file, without the path."""
    words = ("made again", "begins again", "starts again", "is damaged", "not recorded")
    for line in log.read_text(errors="replace").splitlines():
        if any(w in line for w in words):
            return next(w for w in words if w in line)
    return "nothing to say: not needed again, or made at each start"


def prepare_state(
    words: Sequence[str], state: str | None, whole: Path, root: Path, log: Path
) -> None:
    """A results folder in which a run is finished, half way, or only prepared."""
    if state == "no run":
        root.mkdir()
        return
    if state in (None, "no summary"):
        shutil.copytree(whole, root)
        if state == "no summary":
            for path in root.glob("*]/vida"):  # but not prepared/vida
                shutil.rmtree(path)
        return
    strategy = words[0].removeprefix("strategy=")

    def die_in_the_middle() -> None:
        from driftline.core import checkpoint
        from driftline.runs import prepare

        if state == "preparing":
            real_save = prepare.PartialFile.save

            def save(self: Any, content: Any) -> None:
                real_save(self, content)
                os.kill(os.getpid(), signal.SIGKILL)

            prepare.PartialFile.save = save  # type: ignore[method-assign]
            return
        real = checkpoint.Checkpointer.tick
        left = iter(range(10))

        def tick(self: Any, *args: Any, **cursor: int) -> None:
            real(self, *args, **cursor)
            if strategy in self.log.folder.parts and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.Checkpointer.tick = tick  # type: ignore[method-assign]

    assert call([*words, f"root={root}"], log, die_in_the_middle) == -signal.SIGKILL


def images(root: Path) -> Path:
    """A small folder of images in three classes."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(3):
            place = root / split / f"class{label}"
            place.mkdir(parents=True)
            for i in range(4):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return root


# ------------------------------------------------------------------------ starve


def limit(kind: int, value: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (value, value))


@contextlib.contextmanager
def small_disk(folder: Path, options: str) -> Iterator[bool]:
    """A tmpfs on `folder`; yields whether it may be mounted here."""
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True
    )
    try:
        yield made.returncode == 0
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@dataclass(frozen=True)
class Starved:
    """Takes something away from a run, then gives it back and repeats the command."""

    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "starve.log"

    @cache  # noqa: B019
    def whole(self) -> dict[str, Any]:
        assert call([*TENT, f"root={self.folder / 'whole'}"], self.log) == 0, self.log.read_text()
        return result(self.folder / "whole")

    def judge(self, row: Tried, words: Sequence[str], root: Path, status: int, case: str) -> None:
        said = problems(self.log)
        if status == 0:
            found = difference(self.whole(), result(root))
            row.add(not found, found and f"{case}: {found}")
            return
        held = status == 2 and len(said) == 1
        stale = leftovers(root)
        self.log.unlink(missing_ok=True)
        again = call([*words, f"root={root}"], self.log)
        found = difference(self.whole(), result(root))
        found = found if again == 0 else f"again: {problems(self.log)}"
        if status < 0 and not found and not stale:
            row.add(False, f"{case}: {signal.Signals(-status).name} in native code; equal after it")
            return
        fine = held and not found and not stale
        text = (
            f"`{said[0].removeprefix('error: ').split(':')[0].split('/')[0].rstrip(' (')}`"
            if held
            else ""
        )
        row.add(fine, text if fine else f"{case}: status {status} {said} {found} {stale}")

    def limited(self, what: str, kind: int, values: Sequence[int], words: Sequence[str]) -> Row:
        row = Tried(what)
        self.whole()
        for value in values:
            root = self.folder / "trial"
            shutil.rmtree(root, ignore_errors=True)
            self.log.unlink(missing_ok=True)
            status = call([*words, f"root={root}"], self.log, limit(kind, value))
            self.judge(row, words, root, status, f"{value:,}")
        return row.row()


def starve(seed: int, work: Path) -> Iterator[Part]:
    """Few file handles, little memory, small files, full disks."""
    starved = Starved(work / "starve")
    shutil.rmtree(starved.folder, ignore_errors=True)
    starved.folder.mkdir(parents=True)
    workers = [*TENT, "runtime.workers=2"]
    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 10
    files = [used + n for n in (1, 2, 3, 4, 6, 8, 10, 12, 16, 20)]
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    memory = [size + n * 2**20 for n in (1, 8, 32, 48, 64, 96, 128, 192, 256, 384)]
    sizes = [2**n for n in range(6, 22)]
    cases: list[tuple[str, int, list[int], list[str]]] = [
        ("few file handles (RLIMIT_NOFILE)", resource.RLIMIT_NOFILE, files, TENT),
        ("few file handles, two loader processes", resource.RLIMIT_NOFILE, files[3:], workers),
        ("memory limit (RLIMIT_AS)", resource.RLIMIT_AS, memory, TENT),
        ("memory limit, two loader processes", resource.RLIMIT_AS, memory, workers),
        (
            "largest file limited (RLIMIT_FSIZE, a stand-in for a full disk: each file hits the "
            "limit on its own)",
            resource.RLIMIT_FSIZE,
            sizes,
            TENT,
        ),
    ]
    for what, kind, values, words in cases:
        yield Part(what, partial(starved.limited, what, kind, values, words))
    yield from disks(starved, random.Random(f"{seed} disks"))


def disks(starved: Starved, rng: random.Random) -> Iterator[Part]:
    """Full disks, disks without inodes or turned read-only, where a tmpfs may be mounted."""
    cases = {
        "full disk (small tmpfs, made larger afterwards)": [
            (f"size={kb}k", "size=64m") for kb in (4, 16, 48, 100, 300, 700, 1000, 1300, 1600, 2000)
        ],
        "no inodes left": [
            (f"nr_inodes={n},size=64m", "nr_inodes=10000") for n in (2, 4, 8, 12, 14, 16, 18, 22)
        ],
    }
    for what, options in cases.items():
        yield Part(what, partial(full, what, options, starved))
    what = "folder turned read-only while a run writes to it"
    yield Part(what, partial(read_only, what, starved, rng))


def full(what: str, options: Sequence[tuple[str, str]], starved: Starved) -> Row:
    row, disk, log = Tried(what), starved.folder / "disk", starved.log
    for small, large in options:
        with small_disk(disk, small) as mounted:
            if not mounted:
                row.notes = ["not permitted here: see the limit on files above"]
                break
            log.unlink(missing_ok=True)
            status = call([*TENT, f"root={disk / 'results'}"], log)
            subprocess.run(["mount", "-o", f"remount,{large}", str(disk)], check=True)
            starved.judge(row, TENT, disk / "results", status, small)
    return row.row()


def read_only(what: str, starved: Starved, rng: random.Random) -> Row:
    row, disk, log = Tried(what), starved.folder / "disk", starved.log
    for _ in range(5):
        with small_disk(disk, "size=64m") as mounted:
            if not mounted:
                row.notes = ["not permitted here"]
                break
            log.unlink(missing_ok=True)
            pid = start([*TENT, f"root={disk / 'results'}"], log)
            delay = rng.uniform(0.5, 4)
            time.sleep(delay)
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True)
            status = wait(pid)
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            starved.judge(row, TENT, disk / "results", status, f"{delay:.1f} s")
    return row.row()


# ------------------------------------------------------------------------ the page

TRIED = ["what", "tried", "held", "said"]


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    head: Sequence[str]
    parts: Callable[[argparse.Namespace, Path], Iterator[Part]]


SECTIONS = {
    "kills": Section(
        "Killed with SIGKILL",
        "A kill held if the run, continued by the same command, ended with the very result of an "
        "undisturbed one, every counter included. Half of the kills come at a random moment, half "
        "in the middle of writing: before or after a random rename, flush, deletion or cut.",
        TRIED,
        lambda args, work: kills(args.kills, args.seed, work),
    ),
    "damage": Section(
        "Damaged files",
        "Each file is made " + ", ".join(DAMAGES) + ". It held if the same command then gave the "
        "result of an undisturbed run without a traceback; for images, if it was another run or "
        "an error that names the file.",
        TRIED,
        lambda args, work: damage(args.seed, work),
    ),
    "starve": Section(
        "Short of something",
        "It held if the run ended with status 2 and one line that names what is lacking, left no "
        "temporary file behind, and the same command gave the result of an undisturbed run once "
        "there was enough; or if it was enough.",
        TRIED,
        lambda args, work: starve(args.seed, work),
    ),
    "long": Section(
        "Long streams",
        torture_long.TEXT,
        torture_long.HEAD,
        lambda args, work: torture_long.streams(args.images, args.seconds, work),
    ),
    "runs": Section(
        "Runs of 20,000 batches",
        torture_long.RUNS_TEXT,
        torture_long.RUNS_HEAD,
        lambda args, work: torture_long.long_runs(work),
    ),
    "tasks": Section(
        "A hundred tasks",
        torture_long.TASKS_TEXT,
        torture_long.TASKS_HEAD,
        lambda args, work: torture_long.many_tasks(work),
    ),
    "same": Section(
        "The same numbers",
        torture_same.TEXT,
        torture_same.HEAD,
        lambda args, work: torture_same.settings(work),
    ),
}


def page(rows: Sequence[dict[str, Any]], words: str) -> str:
    """Markdown of all rows, section by section."""
    titles: dict[str, list[str]] = {}  # of the sections that each commit made
    for row in rows:
        of_code = titles.setdefault(row["code"], [])
        if (title := SECTIONS[row["section"]].title) not in of_code:
            of_code.append(title)
    code = [
        f"{one} ({', '.join(of_code)})" if len(titles) > 1 else one
        for one, of_code in titles.items()
    ]
    days = sorted({row["day"] for row in rows})
    made = f"{days[0]} to {days[-1]}" if len(days) > 1 else "".join(days)
    lines = [
        "# What was tried to break runs",
        "",
        f"Made by `{words}` on {made} with the code of {' and '.join(code)}, on "
        f"{os.cpu_count()} virtual cores of a shared server beside other work "
        f"({platform.system()}, CPU). Small runs on embedded images; two results are equal if "
        "metrics, figures of each class, every counter of the cost and all rows agree to the last "
        "bit (durations and memory aside).",
    ]
    for name, section in SECTIONS.items():
        mine = [row["cells"] for row in rows if row["section"] == name]
        if not mine:
            continue
        lines += ["", f"## {section.title}", "", section.text, ""]
        lines += ["| " + " | ".join(section.head) + " |"]
        numbers = [
            all(re.match(r"[-\d,.]+( |$)", cells[i]) for cells in mine)
            for i in range(len(section.head))
        ]
        lines += ["|" + "|".join("---:" if number else "---" for number in numbers) + "|"]
        lines += ["| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |" for cells in mine]
    wrapped = [line if line.startswith(("|", "#")) else textwrap.fill(line, 100) for line in lines]
    return "\n".join(wrapped) + "\n"


def code() -> str:
    """Name of the commit, and whether files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent)]

    def said(*words: str) -> str:
        return subprocess.run([*git, *words], capture_output=True, text=True).stdout.strip()

    changed = " with changes" if said("status", "--porcelain", "--untracked-files=no") else ""
    return f"commit {said('rev-parse', '--short=8', 'HEAD')}{changed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each method and of the sweep")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rows", type=re.compile, default=re.compile(""), help="a pattern")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    parser.add_argument("--images", type=int, default=10**6, help="of a long stream, at most")
    parser.add_argument("--seconds", type=float, default=30, help="of a long stream, at most")
    parser.add_argument("--out", type=Path, help="write the report, docs/reliability.md")
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        store = work / "rows.jsonl"
        lines = store.read_text().splitlines() if store.exists() else []
        rows = [json.loads(line) for line in lines]
        for name in args.only:
            for part in SECTIONS[name].parts(args, work):
                known = any((row["section"], row["name"]) == (name, part.name) for row in rows)
                if known or not args.rows.search(part.name):
                    continue
                cells, held = part.work()
                rows.append({"section": name, "name": part.name, "cells": cells, "held": held})
                rows[-1] |= {"code": code(), "day": time.strftime("%Y-%m-%d")}
                with open(store, "a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(" | ".join(cells), flush=True)
    order = [(name, i) for name in SECTIONS for i in range(len(rows)) if rows[i]["section"] == name]
    given = [f"--{k} {getattr(args, k):g}" for k in ("kills", "images", "seconds")
             if getattr(args, k) != parser.get_default(k)]  # fmt: skip
    command = " ".join(["python benchmarks/torture.py", *given, "--out docs/reliability.md"])
    text = page([rows[i] for _, i in order], command)
    if args.out:
        write_text(args.out, text)
    else:
        print(text)
    return int(not all(row["held"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
