"""What loads images in other processes reaches them by pickle, as their start method demands.

Python 3.14 starts them by `forkserver`; macOS by `spawn`. Only a fork would inherit a lambda.
"""

from __future__ import annotations

import mmap
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from conftest import HANG, ROOT, python
from hydra import compose, initialize_config_dir
from split_layouts import LAYOUTS
from test_content import CASES, any_cifar  # noqa: F401
from test_shift_sets import LAYOUTS as SHIFT_SETS
from test_streams import make
from torch.utils.data import DataLoader

from driftline.core.stream import Batch, TaskStream
from driftline.runs.compose import complete
from driftline.runs.machine import set_up
from driftline.streams import loading
from driftline.streams.pipelines import Name

TASKS = ["scenario.embedded_images=[2,1]"]
SHIFTS = ["scenario.images=20", "scenario.clean_images=20", "scenario.batch_size=16"]
SHIFTS += ["scenario.source_images=20"]
CORRUPTED = [*SHIFTS, "scenario.corruptions=[fog,pixelate]", "scenario.probe_images=20"]
FEW = [*SHIFTS, "scenario.images=4", "scenario.probe_images=4"]
EMBEDDED = {  # of each scenario, small
    "folders": FEW,
    **dict.fromkeys(SHIFT_SETS, FEW),
    "ccc": [*SHIFTS, "scenario.speed=5"],
    "cifar10_c": CORRUPTED,
    "cifar100_c": CORRUPTED,
    "imagenet_c": CORRUPTED,
    "domains_imagefolder": TASKS,
    "split_cifar": TASKS,
    "split_cifar10": TASKS,
    "split_cifar100": TASKS,
    "split_imagefolder": TASKS,
    **{layout.scenario: TASKS for layout in LAYOUTS.values()},
}


class ByPickle(DataLoader):
    """Loads in this process, through a copy of what a worker process would be sent."""

    def __init__(self, dataset: Any, *, num_workers: int, **options: Any) -> None:
        sent = pickle.dumps((dataset, options["collate_fn"], options["worker_init_fn"]))
        copy, options["collate_fn"], _ = pickle.loads(sent)
        super().__init__(copy, **options)


def batches(stream: Any, source: bool = True) -> Iterator[Batch | None]:
    """Everything that a stream loads, with the images to prepare on if `source`."""
    if isinstance(stream, TaskStream):
        for task in stream.tasks:
            yield from task.train(0)
            yield from task.fit()
            yield from task.test()
        return
    for segment in stream.segments:
        yield from segment.batches()
    for probe in stream.probes.values():
        yield from probe()
    if stream.holdout is not None:
        yield from stream.holdout()
    if source:
        yield from stream.source().batches(16, epoch=0, augment="photometric")


def same(first: Iterator[Batch | None], second: Iterator[Batch | None]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return bool(pairs) and all(
        a is b is None or all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
        for a, b in pairs
    )


def test_every_scenario_is_among_the_small_ones():
    assert set(EMBEDDED) == {p.stem for p in (ROOT / "conf" / "scenario").glob("*.yaml")}


@pytest.mark.one_in(8)
@pytest.mark.slow
@pytest.mark.parametrize("scenario", EMBEDDED)
def test_every_scenario_is_loaded_by_pickle(configure, monkeypatch, scenario):
    cfg = configure(f"scenario={scenario}", *EMBEDDED[scenario])
    here = list(batches(make(cfg)))
    monkeypatch.setattr(loading, "DataLoader", ByPickle)
    assert same(iter(here), batches(make(cfg)))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("any_cifar")
def test_every_layout_of_files_is_loaded_by_pickle(
    configure, monkeypatch, tmp_path: Path, case: str
):
    scenario, build = CASES[case]
    words, _ = build(tmp_path / "data")  # without training images of ImageNet
    cfg = configure(f"scenario={scenario}", f"data.root={tmp_path / 'data'}", *words)
    here = list(batches(make(cfg), source=False))
    monkeypatch.setattr(loading, "DataLoader", ByPickle)
    assert same(iter(here), batches(make(cfg), source=False))


@pytest.mark.parametrize("name", get_args(Name))
def test_every_pipeline_is_loaded_by_pickle(configure, monkeypatch, name):
    words = ["scenario=split_cifar10", *TASKS, f"scenario.pipeline={name}"]
    here = list(batches(make(configure(*words))))
    monkeypatch.setattr(loading, "DataLoader", ByPickle)
    assert same(iter(here), batches(make(configure(*words))))


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "method"), [("split_cifar10", "spawn"), ("imagenet_c", "forkserver")]
)
def test_a_worker_process_gives_the_same_batches(configure, monkeypatch, scenario, method):
    words = [f"scenario={scenario}", *EMBEDDED[scenario]]

    def first(workers: int) -> Iterator[Batch | None]:
        stream = make(configure(*words), workers=workers)
        load = stream.tasks[0].train if scenario == "split_cifar10" else stream.segments[0].batches
        yield from load(0)

    here = list(first(0))
    started = partial(DataLoader, multiprocessing_context=method)
    monkeypatch.setattr(loading, "DataLoader", started)
    assert same(iter(here), first(1))


def resident() -> int:
    """Bytes of memory of this process that are its own."""
    _, pages, shared = map(int, Path("/proc/self/statm").read_text().split()[:3])
    return (pages - shared) * mmap.PAGESIZE


def start_after_a_large_method(words: list[str]) -> None:
    """What the other process of the next test does."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("config", words)
    set_up(complete(cfg.copy()))  # from here on freed memory is not given back by itself
    stream = make(cfg, workers=1)
    blocks = [torch.ones(2**20) for _ in range(100)]  # 4 MiB each, too small for maps of their own
    full = resident()
    last = blocks.pop()
    del blocks
    assert resident() > full - 2**25
    next(iter(stream.segments[0].batches()))
    assert resident() < full - 300 * 2**20, "a worker was forked with 400 MiB that nobody uses"
    assert last.sum() == 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_workers_do_not_inherit_freed_memory():
    words = ["strategy=source", "scenario=imagenet_c", *CORRUPTED, "runtime.threads=1"]
    code = f"import test_workers; test_workers.start_after_a_large_method({words!r})"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *map(str, sys.path)])}
    subprocess.run([python(), "-c", code], cwd=ROOT, env=env, check=True, timeout=HANG)
