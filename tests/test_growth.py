"""A long stream or many tasks: what is kept stays bounded, or grows by a formula that is stated."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from conftest import ROOT, plain_yaml, strategy_node
from test_contract import QUICK, AnyLabel, NoProgress
from test_contract import tasks as tasks_of
from torch import Tensor, nn
from torch.optim import Optimizer

import driftline
from driftline.backbones.backbone import Backbone
from driftline.core import cost, guard, record
from driftline.core.build import locate
from driftline.core.cost import Costs
from driftline.core.strategy import CLStrategy, TTAStrategy
from driftline.core.stream import Batch, SourceImages
from driftline.parts.memory import Memory

CONF = ROOT / "conf"
METHODS = [
    p.stem
    for p in sorted((CONF / "strategy").glob("*.yaml"))
    if issubclass(locate(plain_yaml(p)["_target_"]), TTAStrategy)
]
RULES = [
    p.stem
    for p in sorted((CONF / "around").glob("*.yaml"))
    if issubclass(locate(plain_yaml(p)[p.stem]["_target_"]), TTAStrategy)
]
BATCH, EARLY, LATE = 4, 7, 11  # images a batch; batches after which memories are full; of a stream
BOUNDED = {"t3a": {"supports": 2}, "simatta": {"capacity": 16, "growth": 0.0}}
UNBOUNDED = {"t3a": {"supports": "all"}, "simatta": {"max_updates": 1}}


def network(kind: Any) -> Backbone:
    """A ResNet or ViT of a few thousand weights on images of 8 pixels, with unlike scores."""
    torch.manual_seed(3)
    vit = issubclass(kind, CLStrategy) or kind.prefers == "vit" or "blocks" in kind.needs
    vit = vit and "batch_norm" not in kind.needs
    small: dict[str, Any] = {"channels": (8, 8, 8, 8), "stem_width": 8, "output_stride": 8}
    if vit:
        small = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 2}
    net = timm.create_model("test_vit" if vit else "test_resnet", num_classes=10, **small)
    if not vit:
        net.maxpool = nn.Identity()  # maps of two pixels a side at the end
    nn.init.normal_(net.get_classifier().weight, std=0.3)
    return Backbone(net.eval(), input_size=8)


def batch(number: int, size: int = BATCH) -> Tensor:
    return torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(number))


def source_images() -> SourceImages:
    def batches(size: int, *, epoch=None, start=0, augment="none") -> Iterator[Batch]:
        y = torch.arange(size) % 10
        yield from [Batch(batch(10**6, size), y, y, torch.zeros_like(y))][start:]

    return SourceImages(BATCH, "random images", "random", batches)


def held(value: Any, seen: set[int]) -> int:
    """Bytes of tensors, and 8 for each other value, in what a module holds in whatever way."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        grad = value.grad if value.is_leaf else None
        return value.untyped_storage().nbytes() + (0 if grad is None else grad.nbytes)
    if isinstance(value, nn.Module | Optimizer):
        return sum(held(v, seen) for k, v in vars(value).items() if "hooks" not in k)
    if isinstance(value, Mapping):
        return sum(8 + held(v, seen) for v in value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return sum(8 + held(v, seen) for v in value)
    return 0


def sizes(
    name: str, *rule: str, early: int = EARLY, late: int = LATE, **options: Any
) -> tuple[int, int]:
    """What a method holds after so many batches of a stream, and after more."""
    kind = locate(strategy_node(name)["_target_"])
    around = {"around": list(rule)} if rule else {}
    method: Any = driftline.make(name, network(kind), **QUICK.get(name, {}) | options, **around)
    if method.preparation() is not None:
        method.use_prepared(method.method.prepare(source_images(), NoProgress()))
    if method.method.replays_source(strategy_node(name, **QUICK.get(name, {}))):
        method.use_source(source_images())
    if method.buys_labels:
        method.use_oracle(AnyLabel())
    method.begin_stream()
    found = []
    for number in range(late):
        method.adapt(batch(number))
        if number + 1 in (early, late):
            found.append(held(method, set()))
    return found[0], found[-1]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_holds_does_not_grow_with_the_stream(name):
    early, late = sizes(name, **BOUNDED.get(name, {}))
    assert late == early, "a method that needs more says so in `grows`"


def test_what_grows_says_so():
    grows = {name for name in METHODS if locate(strategy_node(name)["_target_"]).grows}
    assert grows == set(UNBOUNDED)
    for name, options in UNBOUNDED.items():
        early, late = sizes(name, early=2, late=6, **options)
        assert late > early


@pytest.mark.one_in(2)
@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_holds_does_not_grow_with_the_stream(rule):
    until = {"early": 26, "late": 30} if rule == "rails" else {}  # its window holds 100 images
    early, late = sizes("tent", rule, **until)
    assert late == early


# ------------------------------------------------------------------------ tasks


@pytest.mark.parametrize("name", ["ease", "mos"])
def test_what_a_task_adds_to_the_state_is_its_formula(name):
    method: Any = driftline.make(
        name, network(locate(strategy_node(name)["_target_"])), epochs=1, **QUICK[name]
    )
    dim, known = method.backbone.dim, []
    for number, shared in enumerate(tasks_of(name), 1):
        y = torch.arange(shared.classes.start, shared.classes.stop).repeat(4)
        images = Batch(batch(number, len(y)), y, y, torch.zeros_like(y))
        task = replace(shared, fit=lambda images=images: iter([images]))
        method.begin_task(task)
        method.begin_epoch(task, 0)
        method.observe(images)
        method.end_task(task)
        weights = sum(p.numel() for p in method.bank.parameters_of(method.names[-1]))
        classes = task.classes.stop
        each = 12 * dim + 4 * dim**2 + 24  # sums, means and factors in 8 and 4 bytes, counts
        if name == "ease":
            formula = 4 * number * classes * dim + 8 * classes + 4 * len(task.classes) * dim
        else:
            formula = each * classes
        state = sum(t.nbytes for t in method.snapshot()["tensors"].values())
        known.append(state - formula - 4 * weights * number)
    assert len(set(known)) == 1, known
    for earlier in method.names[:-1]:  # nor does a step take longer with every set
        method.bank.sets[earlier].train = lambda mode: pytest.fail("a frozen set was looked at")
    method.bank.train()


# ------------------------------------------------------------------------ records


def test_rows_are_written_before_they_are_many(tmp_path, monkeypatch):
    """Without a checkpoint within a segment they would wait for its end."""
    monkeypatch.setattr(record, "PENDING", 10)
    log = record.RunLogger(tmp_path, "s")
    for i in range(95):
        log.log("batches", batch=i, wrong=torch.tensor(i % 7))
        assert len(log._pending) < 10
    assert [row["batch"] for row in log.rows("batches")] == list(range(90))
    sizes = [len(line) for line in log.path("batches").read_text().splitlines()]
    assert max(sizes) - min(sizes) <= 1  # the digits of a number


def test_a_resumed_run_reads_its_rows_for_mirrors_alone(tmp_path, monkeypatch):
    log = record.RunLogger(tmp_path, "s")
    log.log("batches", batch=0)
    log.flush()
    monkeypatch.setattr(log, "rows", lambda table: pytest.fail("rows were read"))
    log.rewind(log.offsets(), dict(log.sums))


def test_durations_are_few_and_their_sum_is_whole(monkeypatch):
    monkeypatch.setattr(cost, "DURATIONS", 50)
    ticks = iter(range(10**6))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks) ** 2 / 1000)
    costs = Costs(Backbone(nn.Linear(2, 2)), torch.device("cpu"))
    for _ in range(1000):
        with costs.step(4):
            pass
    assert len(costs.durations) == 50
    assert costs.step_seconds == pytest.approx(sum(4 * i + 1 for i in range(1000)) / 1000)
    middle = sorted(costs.durations)[25]
    assert 1.0 < middle < 3.0  # of 0 to 4: drawn from all of the run, not from its end
    again = Costs(Backbone(nn.Linear(2, 2)), torch.device("cpu"))
    again.restore(costs.snapshot())
    again.durations[0] = -1.0
    assert costs.durations[0] >= 0 and again.snapshot().keys() == costs.snapshot().keys()
    earlier = {k: v for k, v in costs.snapshot().items() if k not in ("step_seconds", "durations")}
    again.restore(earlier | {"history": [1.0] * 60})
    assert again.step_seconds == 60 and len(again.durations) == 50


def test_predictions_of_a_single_class_are_not_collected():
    watching: Any = guard.Guard(nn.Module(), "warn", print, 1)
    for _ in range(3):
        assert not watching._collapsed([0] * guard.WINDOW)
    assert watching._window == []


def test_a_memory_takes_the_first_free_place():
    rng, memory = random.Random(0), Memory()
    for number in range(300):
        if len(memory) and rng.random() < 0.4:
            memory.remove(rng.randrange(len(memory)))
        else:
            size = 0 if memory.pool is None else len(memory.pool)
            free = set(range(max(1, 2 * size if len(memory) == size else size)))
            first = min(free - set(memory.slots))
            memory.insert(torch.full((1, 1, 1), float(number)), number)
            assert memory.slots[-1] == first and memory.images([-1]).item() == number
        if number == 150:
            memory.set_extra_state(memory.get_extra_state())  # as a resumed run
    assert [int(v) for v in memory.images().flatten()] == memory.labels
