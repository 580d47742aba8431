"""Kill, starve and damage runs, and see that nothing is lost and nothing is silent.

    python benchmarks/torture.py [--kills 20] [--only kills damage starve] [--seed 0]
                                 [--out docs/reliability.md] [--work FOLDER]

Small runs on embedded images, each in a forked process. After whatever was done to it the same
command is given again, and its result is compared with that of an undisturbed run: metrics, figures
of each class, what the method tells of itself, every counter of the cost, which kernels ran, and
all rows but for their durations.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
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
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from driftline.analysis.runs import json_lines
from driftline.core.files import read_record, write_text
from driftline.core.processes import end_with_parent
from driftline.runs import command, execute

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


def kills(number: int, rng: random.Random, work: Path, rows: re.Pattern[str]) -> Iterator[Tried]:
    """Kill runs and sweeps again and again, until each has died often enough."""
    for name, words in {**RUNS, "sweep of 6 runs": SWEEP}.items():
        row = Tried(f"{name}, killed and continued until it ends")
        if not rows.search(row.what):
            continue
        if name in WITH_WORKERS:
            row.what += ", two loader processes"
            words = [*words, "runtime.workers=2"]
        words = [*words, *OFTEN]
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
                itself = "sweep" not in name and rng.random() < 0.5 and deaths < number
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
            if not deaths:
                continue
            print(f"  {name}: {deaths} kills, {found or 'equal'}", flush=True)
            shutil.rmtree(root, ignore_errors=True)
        yield row


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


def damage(rng: random.Random, work: Path, rows: re.Pattern[str]) -> Iterator[Tried]:
    """Damage each file that a run leaves or reads, finished and half way."""
    folder = work / "damage"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = work / "damage.log"
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
        row = Tried(f"{what}: `{pattern.rpartition('/')[2]}`")
        if not rows.search(row.what):
            continue
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
            elif what == "finished run" and "batches" in pattern:  # nothing makes them anew
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
        yield row


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


def starve(rng: random.Random, work: Path) -> Iterator[Tried]:
    """Take something away from a run, then give it back and repeat the command."""
    folder, log = work / "starve", work / "starve.log"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    workers = [*TENT, "runtime.workers=2"]
    assert call([*TENT, f"root={folder / 'whole'}"], log) == 0, log.read_text()
    whole = result(folder / "whole")

    def judge(row: Tried, words: Sequence[str], root: Path, status: int, case: str) -> None:
        said = problems(log)
        if status == 0:
            found = difference(whole, result(root))
            row.add(not found, found and f"{case}: {found}")
            return
        held = status == 2 and len(said) == 1
        stale = leftovers(root)
        log.unlink(missing_ok=True)
        again = call([*words, f"root={root}"], log)
        found = difference(whole, result(root)) if again == 0 else f"again: {problems(log)}"
        fine = held and not found and not stale
        text = (
            f"`{said[0].removeprefix('error: ').split(':')[0].split('/')[0].rstrip(' (')}`"
            if held
            else ""
        )
        row.add(fine, text if fine else f"{case}: status {status} {said} {found} {stale}")

    def limited(what: str, kind: int, values: Sequence[int], words: Sequence[str]) -> Tried:
        row = Tried(what)
        for value in values:
            root = folder / "trial"
            shutil.rmtree(root, ignore_errors=True)
            log.unlink(missing_ok=True)
            status = call([*words, f"root={root}"], log, limit(kind, value))
            judge(row, words, root, status, f"{value}")
        return row

    used = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 10
    files = [used + n for n in (1, 2, 3, 4, 6, 8, 10, 12, 16, 20)]
    yield limited("few file handles (RLIMIT_NOFILE)", resource.RLIMIT_NOFILE, files, TENT)
    yield limited(
        "few file handles, two loader processes", resource.RLIMIT_NOFILE, files[3:], workers
    )
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    memory = [size + n * 2**20 for n in (1, 8, 32, 64, 128, 192, 256, 384)]
    yield limited("memory limit (RLIMIT_AS)", resource.RLIMIT_AS, memory, TENT)
    yield limited("memory limit, two loader processes", resource.RLIMIT_AS, memory, workers)

    sizes = [2**n for n in range(6, 22)]
    yield limited(
        "largest file limited (RLIMIT_FSIZE, a stand-in for a full disk: each file hits the limit "
        "on its own)",
        resource.RLIMIT_FSIZE,
        sizes,
        TENT,
    )
    yield from disks(folder, log, rng, judge)


def disks(
    folder: Path,
    log: Path,
    rng: random.Random,
    judge: Callable[[Tried, Sequence[str], Path, int, str], None],
) -> Iterator[Tried]:
    """Full disks, disks without inodes or turned read-only, where a tmpfs may be mounted."""
    disk = folder / "disk"
    cases = {
        "full disk (small tmpfs, made larger afterwards)": [
            (f"size={kb}k", "size=64m") for kb in (4, 16, 48, 100, 300, 700, 1000, 1300, 1600, 2000)
        ],
        "no inodes left": [
            (f"nr_inodes={n},size=64m", "nr_inodes=10000") for n in (2, 4, 8, 12, 14, 16, 18, 22)
        ],
    }
    for what, options in cases.items():
        row = Tried(what)
        for small, large in options:
            with small_disk(disk, small) as mounted:
                if not mounted:
                    row.notes = ["not permitted here: see the limit on files above"]
                    break
                log.unlink(missing_ok=True)
                status = call([*TENT, f"root={disk / 'results'}"], log)
                subprocess.run(["mount", "-o", f"remount,{large}", str(disk)], check=True)
                judge(row, TENT, disk / "results", status, small)
        yield row
    row = Tried("folder turned read-only while a run writes to it")
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
            judge(row, TENT, disk / "results", status, f"{delay:.1f} s")
    yield row


# ------------------------------------------------------------------------ the page

TITLES = {
    "kills": "Killed with SIGKILL",
    "damage": "Damaged files",
    "starve": "Short of something",
}
HELD = {
    "kills": "A kill held if the run, continued by the same command, ended with the very result of "
    "an undisturbed one. Half of the kills come at a random moment, half in the middle of "
    "writing: before or after a random rename, flush, deletion or cut.",
    "damage": "Each file is made " + ", ".join(DAMAGES) + ". It held if the same command then gave "
    "the result of an undisturbed run without a traceback; for images, if it was another run or "
    "an error that names the file.",
    "starve": "It held if the run ended with status 2 and one line that names what is lacking, "
    "left no temporary file behind, and the same command gave the result of an undisturbed run "
    "once there was enough; or if it was enough.",
}


def page(sections: dict[str, list[Tried]], words: str) -> str:
    lines = [
        "# What was tried to break runs",
        "",
        f"Made by `{words}` on 2 virtual cores of a shared server, CPU. Small runs on embedded "
        "images; two results are equal if metrics, figures of each class, every counter of the "
        "cost and all rows agree to the last bit (durations and memory aside).",
    ]
    for name, rows in sections.items():
        lines += ["", f"## {TITLES[name]}", "", HELD[name], ""]
        lines += ["| what | tried | held | said |", "|---|---:|---:|---|"]
        for row in rows:
            notes = "; ".join(row.notes).replace("|", "\\|")
            lines.append(f"| {row.what} | {row.tried or '-'} | {row.held if row.tried else '-'} "
                         f"| {notes} |")  # fmt: skip
    wrapped = [line if line.startswith(("|", "#")) else textwrap.fill(line, 100) for line in lines]
    return "\n".join(wrapped) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each method and of the sweep")
    parser.add_argument("--only", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument(
        "--rows", type=re.compile, default=re.compile(""), help="of kills and damage: a pattern"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    parser.add_argument("--out", type=Path, help="write the report, docs/reliability.md")
    parser.add_argument("--work", type=Path, help="default: a temporary folder")
    args = parser.parse_args()
    assert execute  # imported for the forked processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        rng = random.Random(args.seed)
        makers = {
            "kills": lambda: kills(args.kills, rng, work, args.rows),
            "damage": lambda: damage(rng, work, args.rows),
            "starve": lambda: starve(rng, work),
        }
        sections: dict[str, list[Tried]] = {}
        for name in args.only:
            sections[name] = []
            for row in makers[name]():
                sections[name].append(row)
                print(
                    f"{row.what}: {row.held} of {row.tried} held; {'; '.join(row.notes)}",
                    flush=True,
                )
    text = page(sections, f"python benchmarks/torture.py --kills {args.kills}")
    if args.out:
        write_text(args.out, text)
    else:
        print(text)
    return int(any(row.held < row.tried for rows in sections.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
