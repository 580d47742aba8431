"""Long streams and many tasks: what grows, and by what formula. A section of torture.py.

Tiny networks of random weights on tiny random images go through the loops of core/runner.py with
records and checkpoints, each method in a process of its own. Seconds are those of the processor, so
that what else a machine does hardly matters.
"""

from __future__ import annotations

import array
import contextlib
import gc
import math
import os
import pickle
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torture_common import CLOCK, Part, Row, difference

import driftline.core.vision  # noqa: F401  # isort: skip
import timm

from driftline.backbones.backbone import Backbone
from driftline.core.build import locate
from driftline.core.checkpoint import Checkpointer, Signals
from driftline.core.console import Console
from driftline.core.cost import DURATIONS
from driftline.core.record import RunLogger
from driftline.core.runner import Context, run_shifts, run_tasks
from driftline.core.strategy import CLStrategy, TTAStrategy
from driftline.core.stream import (
    Batch,
    Segment,
    ShiftStream,
    Skipped,
    SourceImages,
    Task,
    TaskStream,
)
from driftline.runs.library import make, settings

ROOT = Path(__file__).parents[1]
BATCH, CLASSES, SIDE = 64, 10, 8  # images a batch, classes, pixels
SIZES = {"memo": 4}  # images a batch of what looks at one after the other
FEWEST = 50  # batches that say something of growth
SAMPLES = 20  # looks at memory along a stream, at equal distances
LABELS = 60  # that a method which buys them may buy
# Settings that make small steps of what is slow because it repeats itself.
QUICK: dict[str, dict[str, Any]] = {
    "cotta": {"views": 2, "threshold": 2.0},
    "vida": {"views": 2, "threshold": 2.0, "rank_high": 8},
    "petal": {"views": 2, "threshold": 2.0},
    "psmt": {"fisher_images": 64, "lr": 1e-4},
    "memo": {"views": 2},
    "foa": {"population": 4, "source_images": 64},
    "rmt": {"warmup_images": 128},
    "becotta": {"blocks": 1},
    "simatta": {"max_updates": 2, "train_batch": 8, "keep": 10, "capacity": 256, "growth": 0.1},
    "adacontrast": {"queue_size": 512},
}


class Look(NamedTuple):
    """At one moment of a stream or after one task."""

    batches: int
    resident: int  # bytes of the process
    tensors: int  # bytes of all tensors that are alive, each storage once
    objects: int  # that Python's collector knows
    checkpoint: int  # bytes of last.pt and its packs
    rows: int  # bytes of batches.jsonl


def look(batches: int, folder: Path) -> Look:
    gc.collect()
    known = gc.get_objects()
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in known
        if type(t) in (Tensor, nn.Parameter)
    }
    saved, rows = (sum(p.stat().st_size for p in folder.glob(f)) for f in FILES)
    durations = 9 * min(batches // EVERY * EVERY, DURATIONS)  # see TEXT
    return Look(batches, resident(), sum(storages.values()), len(known), saved - durations, rows)


FILES = ("last*.pt", "batches.jsonl")
EVERY = 10  # batches between checkpoints
KERNELS = 16  # convolutions that oneDNN keeps compiled, one for each batch size; else 1,024


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def apart(work: Callable[[], Any]) -> Any:
    """What `work` returns in a forked process; its text where it fails.

    Raises:
        RuntimeError: with the traceback of that process.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        os.close(read)
        try:
            answer = (True, work())
        except BaseException:
            answer = (False, traceback.format_exc())
        with os.fdopen(write, "wb") as file:
            pickle.dump(answer, file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        content = file.read()
    os.waitpid(pid, 0)
    fine, answer = pickle.loads(content) if content else (False, "the process died")
    if not fine:
        raise RuntimeError(answer)
    return answer


# ------------------------------------------------------------------------ a network and images


def network(kind: str) -> Backbone:
    """A ResNet of 10,000 or a ViT of 7,000 weights, random but with scores that differ."""
    torch.manual_seed(3)
    small: dict[str, Any] = {"channels": (8, 8, 8, 8), "stem_width": 8, "output_stride": 8}
    if kind == "vit":
        small = {"img_size": SIDE, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 2}
    net = timm.create_model(f"test_{kind}", num_classes=CLASSES, **small)
    if kind == "resnet":
        net.maxpool = nn.Identity()  # maps of two pixels a side at the end
    nn.init.normal_(net.get_classifier().weight, std=0.3)
    return Backbone(net.eval(), name=kind, tag=f"test_{kind}", input_size=SIDE)


def batch(number: int, size: int = BATCH) -> Batch:
    """Images of ten classes under noise, darker and brighter by turns of 500 batches."""
    draws = torch.Generator().manual_seed(number)
    shapes = torch.rand(CLASSES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    y = torch.randint(CLASSES, (size,), generator=draws)
    x = 0.6 * shapes[y] + 0.4 * torch.rand(size, 3, SIDE, SIDE, generator=draws)
    x = x * (1 - 0.1 * (number // 500 % 5))
    rows = torch.arange(size)
    return Batch(x, y, rows, torch.zeros_like(rows))


class NoProgress:
    """A preparation that is never interrupted."""

    def load(self) -> None:
        return None

    def save(self, state: Any) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def source_images() -> SourceImages:
    def batches(size: int, *, epoch=None, start=0, augment="none") -> Iterator[Batch]:
        for number in range(start, 4):
            yield batch(10**6 + number + 10 * (epoch or 0), size)

    return SourceImages(4 * BATCH, "random images", "random", batches)


def method(name: str, rule: str | None) -> TTAStrategy:
    """An adaptation method at the start of a stream."""
    node = settings(name, **QUICK.get(name, {}))
    kind = locate(node._target_)
    vit = (kind.prefers == "vit" or "blocks" in kind.needs) and "batch_norm" not in kind.needs
    around = {"around": rule} if rule else {}
    strategy = make(name, network("vit" if vit else "resnet"), **QUICK.get(name, {}), **around)
    assert isinstance(strategy, TTAStrategy)
    if strategy.preparation() is not None:
        strategy.use_prepared(strategy.method.prepare(source_images(), NoProgress()))
    if strategy.method.replays_source(node):
        strategy.use_source(source_images())
    strategy.begin_stream()
    return strategy


# ------------------------------------------------------------------------ long streams


class Watched:
    """The batches of a long stream, which looks at memory and time as they are taken.

    Args:
        images: of the stream; it ends earlier after `limit` seconds of the processor.
        size: images a batch.
        killed: the number of the batch before which the process kills itself, if one.
    """

    def __init__(
        self, folder: Path, images: int, limit: float, size: int = BATCH, killed: int | None = None
    ) -> None:
        self.folder, self.steps, self.limit = folder, -(-images // size), limit
        self.size, self.killed = size, killed
        self.seconds = array.array("d")  # of each batch, all that the loop does to it
        self.looks: list[Look] = []
        self.began = time.process_time()
        self.ready = 0.0  # seconds to the first batch

    def __call__(self, start: int = 0) -> Iterator[Batch]:
        self.ready = time.process_time() - self.began
        spent = 0.0
        for number in range(start, self.steps):
            if number == self.killed:
                os.kill(os.getpid(), signal.SIGKILL)
            share = max(number / self.steps, spent / self.limit)
            if share * SAMPLES >= len(self.looks):
                self.looks.append(look(number, self.folder))
            if share >= 1:
                return
            images = batch(number, self.size)
            since = time.process_time()
            yield images
            self.seconds.append(time.process_time() - since)
            spent += self.seconds[-1]
        self.looks.append(look(self.steps, self.folder))


def stream(name: str, rule: str | None, watched: Watched) -> dict[str, Any]:
    """What `run_shifts` returns for a method on the batches of `watched`; a run there goes on."""
    watched.folder.mkdir(parents=True, exist_ok=True)
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = str(KERNELS)  # read at the first convolution
    torch.set_num_threads(1)
    gc.freeze()  # what was there before is not looked through again and again
    strategy = method(name, rule)
    images = watched.steps * watched.size
    segment = Segment(0, "noise", (0,), images, watched.steps, watched)
    shifts = ShiftStream("tiny", CLASSES, ["noise"], [segment], {}, Skipped(), label_budget=LABELS)
    log = RunLogger(watched.folder, "tiny")
    checkpoint = Checkpointer(log, Signals(), key="0", every=EVERY)
    watched.began = time.process_time()
    console = Console("tiny", mute=True)
    return run_shifts(strategy, shifts, Context(log, checkpoint, console, strategy.device))


def long_stream(
    name: str, rule: str | None, folder: Path, images: int, limit: float
) -> dict[str, Any]:
    """What one method needed along a long stream, after one tenth of it and at its end."""
    shutil.rmtree(folder, ignore_errors=True)
    watched = Watched(folder, images, limit, SIZES.get(name, BATCH))
    result = stream(name, rule, watched)
    shutil.rmtree(folder)
    batches = len(watched.seconds)
    saved = [one for one in watched.looks if one.checkpoint > 0] or watched.looks
    first = min(saved, key=lambda one: abs(one.batches - batches / 10))
    tenth = max(1, batches // 10)
    times = watched.seconds[:tenth], watched.seconds[-tenth:]
    return {
        "images": result["cost"]["images"],
        "batches": batches,
        "looks": (first, watched.looks[-1]),
        "seconds": [statistics.median(part) for part in times],
    }


HEAD = [
    "method", "images", "batches", "resident MiB", "all tensors, KiB", "objects",
    "state on disk, KiB", "rows, bytes a batch", "ms a batch", "verdict",
]  # fmt: skip
RESIDENT, TENSORS, OBJECTS, STATE, TIME = 8 * 2**20, 2**15, 500, 2**10, 1.3
TEXT = (
    "Every method of adaptation, and every rule around Tent, on one segment of up to a million "
    f"images of {SIDE} x {SIDE} pixels in batches of {BATCH}, through the loop of `core/runner.py` "
    f"with rows, guard and a checkpoint every {EVERY} batches; a ResNet of 10,000 or a ViT of "
    "7,000 random weights. What is slow got fewer images: as many as take the seconds given; MEMO "
    f"takes batches of {SIZES['memo']}. "
    f"oneDNN keeps {KERNELS} compiled convolutions here and 1,024 otherwise, one for each number "
    "of images: 20 MiB more in methods that pass some images of a batch (CMF, ROID). "
    "Each pair of numbers is after a tenth of the batches and at the end (time: medians of the "
    "first and the last tenth, in seconds of the processor). Flat: the process gained less than "
    f"{RESIDENT >> 20} MiB, its tensors less than {TENSORS >> 10} KiB, Python's objects less than "
    f"{OBJECTS}, the checkpoint less than {STATE >> 10} KiB, and the time a batch less than "
    f"{TIME - 1:.0%}. Durations (at most 4,096 of them, 37 KB) are left out of the checkpoint's "
    "size: see `core/cost.py`."
)


def streams(images: int, limit: float, work: Path) -> Iterator[Part]:
    """A long stream through each method of adaptation, and through Tent inside each rule."""
    folder = work / "long"
    for path in sorted((ROOT / "conf" / "strategy").glob("*.yaml")):
        if issubclass(locate(settings(path.stem)._target_), TTAStrategy):
            yield Part(path.stem, partial(row_of_stream, path.stem, None, folder, images, limit))
    for path in sorted((ROOT / "conf" / "around").glob("*.yaml")):
        rule = path.stem
        if issubclass(locate(rule_target(rule)), TTAStrategy):
            yield Part(
                f"tent in {rule}", partial(row_of_stream, "tent", rule, folder, images, limit)
            )


def rule_target(rule: str) -> str:
    node: Any = OmegaConf.load(ROOT / "conf" / "around" / f"{rule}.yaml")
    return str(node[rule]._target_)


def row_of_stream(name: str, rule: str | None, folder: Path, images: int, limit: float) -> Row:
    """One row: what a long stream needed."""
    found = apart(lambda: long_stream(name, rule, folder, images, limit))
    first, last = found["looks"]
    began, ended = found["seconds"]
    gained = [
        ("memory", last.resident - first.resident, RESIDENT),
        ("tensors", last.tensors - first.tensors, TENSORS),
        ("objects", last.objects - first.objects, OBJECTS),
        ("checkpoint", last.checkpoint - first.checkpoint, STATE),
        ("time", ended / began, TIME),
    ]
    grows = [what for what, more, allowed in gained if more > allowed]
    kind = locate(settings(name)._target_)
    declared = kind.grows and not set(grows) - {"tensors", "checkpoint", "time", "memory"}
    verdict = f"**{', '.join(grows)} grow**" if grows else "flat"
    if found["batches"] < FEWEST:
        verdict, grows = "not judged: too few batches", []
    if grows and declared:
        verdict = f"as stated: {kind.grows}"
    per_row = (last.rows - first.rows) / max(1, last.batches - first.batches)
    cells = [
        f"{name} in {rule}" if rule else name,
        f"{found['images']:,}",
        f"{found['batches']:,}",
        f"{first.resident / 2**20:.1f} {last.resident / 2**20:.1f}",
        f"{first.tensors / 2**10:.1f} {last.tensors / 2**10:.1f}",
        f"{first.objects:,} {last.objects:,}",
        f"{first.checkpoint / 2**10:.1f} {last.checkpoint / 2**10:.1f}",
        f"{per_row:.0f}",
        f"{1e3 * began:.2f} {1e3 * ended:.2f}",
        verdict,
    ]
    return Row(cells, not grows or bool(declared))


# ------------------------------------------------------------------------ 20,000 batches

BATCHES, SMALL, KILLED, READY = 20_000, 2, 19_990, 5.0
RUNS_HEAD = [
    "method", "batches", "rows, bytes a batch", "state on disk, KiB", "resident MiB",
    "after the kill, s to the next batch", "result", "verdict",
]  # fmt: skip
RUNS_TEXT = (
    f"The same with batches of {SMALL} images: a run of {BATCHES:,} batches, and one killed by "
    f"SIGKILL before batch {KILLED:,} and continued. Pairs of numbers are of the first and the "
    "second half (rows), and from the middle and the end (the others). Held: rows and state grow "
    f"by no more than the digits of their numbers, the next batch comes within {READY:.0f} s of "
    "the processor, and both runs give equal metrics and counters."
)


def long_runs(work: Path) -> Iterator[Part]:
    for name in ("source", "tent"):
        yield Part(f"run of {name}", partial(long_run, name, work / "long"))


def long_run(name: str, folder: Path) -> Row:
    shutil.rmtree(folder, ignore_errors=True)
    images = BATCHES * SMALL

    def whole() -> tuple[dict[str, Any], list[Look]]:
        watched = Watched(folder / "whole", images, math.inf, SMALL)
        return stream(name, None, watched), watched.looks

    def again(killed: int | None) -> tuple[dict[str, Any], float]:
        watched = Watched(folder / "killed", images, math.inf, SMALL, killed)
        return stream(name, None, watched), watched.ready

    want, looks = apart(whole)
    with contextlib.suppress(RuntimeError):
        apart(lambda: again(KILLED))
    result, ready = apart(lambda: again(None))
    shutil.rmtree(folder)
    zero, half, last = (min(looks, key=lambda one: abs(one.batches - n * BATCHES / 2))
                        for n in range(3))  # fmt: skip
    rows = [(b.rows - a.rows) / (b.batches - a.batches) for a, b in ((zero, half), (half, last))]
    equal = difference(counted(want), counted(result))
    held = not equal and ready < READY and last.checkpoint - half.checkpoint < STATE
    held = held and rows[1] < rows[0] + 10 and last.resident - half.resident < RESIDENT
    cells = [
        name,
        f"{last.batches:,}",
        f"{rows[0]:.0f} {rows[1]:.0f}",
        f"{half.checkpoint / 2**10:.1f} {last.checkpoint / 2**10:.1f}",
        f"{half.resident / 2**20:.1f} {last.resident / 2**20:.1f}",
        f"{ready:.2f}",
        equal or "equal",
        "held" if held else "**did not hold**",
    ]
    return Row(cells, held)


def counted(result: dict[str, Any]) -> dict[str, Any]:
    """Without what depends on the clock."""
    cost = {k: v for k, v in result["cost"].items() if not any(word in k for word in CLOCK)}
    return {**result, "cost": cost}


# ------------------------------------------------------------------------ many tasks

TASKS, OF_TASK, TRAINED, TESTED = 100, 2, 4, 1  # tasks; classes a task; images a class
TASKS_HEAD = [
    "method", "after task", "tensors of the state, KiB", "by the formula, KiB",
    "state on disk, KiB", "all tensors, KiB", "resident MiB", "a training step, ms",
    "end of task, ms", "evaluation, ms", "verdict",
]  # fmt: skip
TASKS_TEXT = (
    f"{TASKS} tasks of {OF_TASK} classes ({TRAINED} training and {TESTED} test images a class) "
    "through `run_tasks` with a ViT of width D = 16. P: weights of one set of adapters, C: classes "
    "so far, t: tasks. What the state gains after the first task is 4 P a task for the set and "
    "EASE: 4 t C D + 8 C bytes of class means in all spaces; MOS: (12 D + 4 D^2 + 24) C of "
    "prototypes and Gaussians. Held: equal to the byte, the file larger by at most 1 KiB for each "
    "tensor (and 29 t^2 bytes for which features were computed in which pass), all tensors of the "
    f"process larger by no more than the state, the features kept for evaluation (4 D t for each "
    f"test image) and {TENSORS >> 10} KiB, and the training step at most {TIME - 1:.0%} longer at "
    "the end. A task's evaluation embeds its own test images by t sets and all "
    "others by the new one, and scores C images in t spaces: it grows with t, its scores with "
    "t^2."
)


def tiny_task(index: int) -> Task:
    classes = range(index * OF_TASK, (index + 1) * OF_TASK)

    def images(count: int, salt: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(classes.start, classes.stop).repeat_interleave(count)
        draws = torch.Generator().manual_seed(1000 * index + salt)
        return torch.rand(len(y), 3, SIDE, SIDE, generator=draws), y

    def train(epoch: int = 0, start: int = 0, more: Any = None) -> Iterator[Batch]:
        yield from [whole(*images(TRAINED, 0))][start:]

    def whole(x: Tensor, y: Tensor) -> Batch:
        return Batch(x, y, torch.arange(len(y)), torch.zeros_like(y))

    return Task(
        index,
        f"t{index}",
        classes,
        1,
        train,
        lambda: iter([whole(*images(TRAINED, 0))]),
        lambda: iter([whole(*images(TESTED, 1))]),
    )


class AfterTasks(Checkpointer):
    """Looks at the state whenever it is saved at the end of a task."""

    watch: Callable[[], None]

    def save(self, *args: Any, **cursor: int) -> None:
        super().save(*args, **cursor)
        self.watch()


def tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def tensors_in(value: Any) -> int:
    if isinstance(value, Tensor):
        return 1
    if isinstance(value, dict):
        return sum(map(tensors_in, value.values()))
    return sum(map(tensors_in, value)) if isinstance(value, list | tuple) else 0


def formula(name: str, weights: int, dim: int, tasks: int) -> int:
    """Bytes that the state holds for the tasks so far, see TASKS_TEXT."""
    classes = OF_TASK * tasks
    means = 4 * tasks * classes * dim + 8 * classes
    gaussians = (12 * dim + 4 * dim**2 + 24) * classes
    return 4 * weights * tasks + (means if name == "ease" else gaussians)


def learn_tasks(name: str, folder: Path, tasks: int) -> dict[int, dict[str, Any]]:
    """What was seen after each task."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    gc.freeze()
    node = {"mos": {"align_epochs": 1, "align_samples": 64}}.get(name, {})
    strategy: Any = make(
        name, network("vit"), num_classes=OF_TASK * tasks, rank=4, epochs=5, **node
    )
    assert isinstance(strategy, CLStrategy)
    log = RunLogger(folder, "tiny")
    checkpoint = AfterTasks(log, Signals(), key="0", every=0)
    seen: dict[int, dict[str, Any]] = {}
    console = Console("tiny", mute=True)
    context = Context(log, checkpoint, console, strategy.device)
    clock = dict.fromkeys(("step", "end", "evaluation"), 0.0)

    def timed(what: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began = time.process_time()
            try:
                return work(*args)
            finally:
                clock[what] += time.process_time() - began

        return call

    strategy.observe = timed("step", strategy.observe)
    strategy.end_task = timed("end", strategy.end_task)
    last = [0.0]

    def watch() -> None:
        task = len(seen) + 1
        state = {k: v for k, v in strategy.snapshot().items() if k != "generators"}
        spent = time.process_time() - last[0] - clock["step"] - clock["end"]
        weights = sum(p.numel() for p in strategy.bank.parameters_of(strategy.names[-1]))
        seen[task] = {
            "state": tensor_bytes(state),
            "count": tensors_in(state),
            "formula": formula(name, weights, strategy.backbone.dim, task),
            "features": 4 * strategy.backbone.dim * task * task * OF_TASK * TESTED,
            "look": look(0, folder),
            "step": clock["step"] / 5,
            "end": clock["end"],
            "evaluation": spent,
        }
        clock.update(dict.fromkeys(clock, 0.0))
        last[0] = time.process_time()

    checkpoint.watch = watch
    last[0] = time.process_time()
    stream = TaskStream(
        "tiny", OF_TASK * tasks, [tiny_task(i) for i in range(tasks)], {}, Skipped()
    )
    run_tasks(strategy, stream, context)
    shutil.rmtree(folder)
    return seen


def many_tasks(work: Path) -> Iterator[Part]:
    for name in ("ease", "mos"):
        yield Part(f"{TASKS} tasks of {name}", partial(row_of_tasks, name, work / "tasks"))


def row_of_tasks(name: str, folder: Path, tasks: int = TASKS) -> Row:
    seen = apart(lambda: learn_tasks(name, folder, tasks))
    first = seen[1]
    exact = all(
        one["state"] - first["state"] == one["formula"] - first["formula"] for one in seen.values()
    )
    last = seen[tasks]
    gained = last["state"] - first["state"]
    on_disk = last["look"].checkpoint - first["look"].checkpoint
    alive = last["look"].tensors - first["look"].tensors
    fifth = tasks // 5
    spans = range(1, 1 + fifth), range(1 + tasks - fifth, 1 + tasks)
    step = [statistics.median(seen[t]["step"] for t in span) for span in spans]
    wrong = [
        what
        for what, bad in (
            ("state", not exact),
            ("file", on_disk > gained + 2**10 * (last["count"] - first["count"]) + 29 * tasks**2),
            ("hidden copies", alive > gained + last["features"] + TENSORS),
            ("training step", step[1] > TIME * step[0]),
        )
        if bad
    ]
    at = [1, tasks // 2, tasks]

    def three(value: Callable[[dict[str, Any]], float], digits: int = 1) -> str:
        return " ".join(f"{value(seen[t]):,.{digits}f}" for t in at)

    cells = [
        name,
        " ".join(map(str, at)),
        three(lambda one: (one["state"] - first["state"]) / 2**10),
        three(lambda one: (one["formula"] - first["formula"]) / 2**10),
        three(lambda one: one["look"].checkpoint / 2**10),
        three(lambda one: one["look"].tensors / 2**10),
        three(lambda one: one["look"].resident / 2**20),
        three(lambda one: 1e3 * one["step"]),
        three(lambda one: 1e3 * one["end"]),
        three(lambda one: 1e3 * one["evaluation"]),
        f"**{', '.join(wrong)}**" if wrong else "held",
    ]
    return Row(cells, not wrong)
