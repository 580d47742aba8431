"""SEMA: recorded forward pass and run; when a block gets an adapter, and what a run stopped in the
middle of it goes on with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import timm
import torch
from conftest import copied, equal, strategy_node
from golden_cl_case import ClCase, images
from golden_cl_case import backbone as recorded_backbone
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.sema import SEMA, Expert, regrouped
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError
from driftline.core.seed import generator
from driftline.core.stream import Batch, Task


def make(**options: Any) -> SEMA:
    quick = {"epochs": 2, "epochs_descriptor": 2, "rank": 6, "hidden": 8, "expandable": 2}
    node = strategy_node("sema", **quick | options)
    return build(node, at="strategy", backbone=recorded_backbone(), seed=3, num_classes=10)


def task(index: int, classes: range, per_class: int = 4, spread: float = 1.0) -> Task:
    """Random images in batches of five, shuffled by epoch; `spread` is that of the pixels."""
    y = torch.arange(classes.start, classes.stop).repeat_interleave(per_class)
    x = spread * torch.rand(len(y), 3, 32, 32, generator=generator(7, "x", index))
    whole = Batch(x, y, torch.arange(len(y)), torch.zeros_like(y))

    def train(epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(y), generator=generator(7, "order", index, epoch))
        for rows in order.split(5)[start:]:
            yield Batch(*(part[rows] for part in whole))

    fixed = lambda: iter([whole])  # noqa: E731
    return Task(index, f"t{index}", classes, -(-len(y) // 5), train, fixed, fixed)


def drive(strategy: SEMA, tasks: list[Task], at: tuple[int, ...] = (0, 0, 0, 0)) -> Iterator[Any]:
    """What the runner does, from a cursor on."""
    first, begun, epoch, step = at
    for now in tasks[first:]:
        if not begun:
            strategy.begin_task(now)
        for e in range(epoch, strategy.epochs):
            if step == 0:
                strategy.begin_epoch(now, e)
            for i, batch in enumerate(strategy.batches(now, e, step), step):
                logged = strategy.observe(batch)
                yield (now.index, 1, e, i + 1), logged
            step = 0
        strategy.end_task(now)
        yield (now.index + 1, 0, 0, 0), {}
        begun = epoch = 0


# ------------------------------------------------------------------------------ recorded numbers


def close(case: ClCase, strategy: SEMA, place: str, *, grad: bool = False) -> int:
    """Compare every array under `place`; returns how many there are."""
    named = official(strategy)
    keys = [k for k in case.data if k.startswith(place + "/")]
    for key in keys:
        name = key.removeprefix(place + "/")
        if name.startswith("record/"):
            continue
        value = named[name]
        case.close(key, value.grad if grad else value)
    return len(keys)


def official(strategy: SEMA) -> dict[str, Tensor]:
    """Everything that is recorded under its official names; the newest column is `new_router`."""
    named: dict[str, Tensor] = {"fc.weight": strategy.head.weight, "fc.bias": strategy.head.bias}
    for i, mixture in enumerate(strategy.mixtures):
        block = f"backbone.blocks.{i}.adapter_module"
        experts = mixture.each()
        for k, one in enumerate(experts):
            encoder, decoder = one.descriptor
            router = "router" if k == 0 else "new_router"
            layers = {
                f"adapters.{k}.functional.down_proj": one.function.down,
                f"adapters.{k}.functional.up_proj": one.function.up,
                f"adapters.{k}.rd.encoder": encoder,
                f"adapters.{k}.rd.decoder": decoder,
                router: one.column,
            }
            for name, layer in layers.items():
                named[f"{block}.{name}.weight"] = layer.weight
                named[f"{block}.{name}.bias"] = layer.bias
    return named


def load(case: ClCase, strategy: SEMA, place: str) -> None:
    """Give what is recorded under `place` its values."""
    named = official(strategy)
    with torch.no_grad():
        for key in case.data:
            if key.startswith(place + "/"):
                named[key.removeprefix(place + "/")].copy_(case[key])


def test_forward_pass_as_recorded():
    case = ClCase("sema/sema_forward")
    h = case.hyper
    strategy = make(rank=h["ffn_num"], hidden=h["rd_dim"], remembered=h["buffer_size"])
    for i, mixture in enumerate(strategy.mixtures):
        count = len(case[f"params/blocks.{i}.router.bias"])
        mixture.resize(count, strategy.rng("init"))
        with torch.no_grad():
            for k, one in enumerate(mixture.each()):
                place = f"params/blocks.{i}"
                encoder, decoder = one.descriptor
                for layer, name in (
                    (one.function.down, "functional.down_proj"),
                    (one.function.up, "functional.up_proj"),
                    (encoder, "rd.encoder"),
                    (decoder, "rd.decoder"),
                ):
                    layer.weight.copy_(case[f"{place}.adapters.{k}.{name}.weight"])
                    layer.bias.copy_(case[f"{place}.adapters.{k}.{name}.bias"])
                one.column.weight.copy_(case[f"{place}.router.weight"][k : k + 1])
                one.column.bias.copy_(case[f"{place}.router.bias"][k : k + 1])
                one.errors = case[f"record/blocks.{i}.adapters.{k}/values"]
                case.close(f"record/blocks.{i}.adapters.{k}/mean", one.errors.mean())
                case.close(f"record/blocks.{i}.adapters.{k}/stddev", one.errors.std())
    x = images("test", range(6)).x
    with torch.no_grad():
        features, means = strategy.passed_through(x)
        case.close("feature", features)
        total = torch.zeros(())
        for i, mixture in enumerate(strategy.mixtures):
            tokens = case[f"tap/blocks.{i}/input"]
            case.close(f"tap/blocks.{i}/mixed_output", mixture(tokens))
            for k, one in enumerate(mixture.each()):
                tap = f"tap/blocks.{i}.adapters.{k}"
                case.close(f"{tap}/func_out", one.function(tokens))
                case.close(f"{tap}/reconstruction_loss", one.error(means[i]))
                case.close(f"{tap}/z_score", one.deviation(means[i]))
            newest = one.error(means[i]).mean()
            case.close(f"tap/blocks.{i}/rd_loss", newest)
            total += newest
        case.close("rd_loss_sum", total)
    print(f"worst share of the tolerance, sema_forward: {case.worst:.3f}")


def recorded(
    rows: dict[int, list[list[int]]], passes: Iterator[Any], epoch: int, start: int = 0
) -> Iterator[Batch]:
    """The next recorded pass, for one epoch the same."""
    if epoch not in rows:
        rows[epoch] = next(passes)[1]
    return iter([images("train", r) for r in rows[epoch]][start:])


@pytest.mark.usefixtures("gradients_stay")
def test_run_as_recorded():
    case = ClCase("sema/sema_run")
    h = case.hyper
    strategy = make(
        epochs=h["func_epoch"],
        epochs_descriptor=h["rd_epoch"],
        rank=h["ffn_num"],
        hidden=h["rd_dim"],
        remembered=h["buffer_size"],
        threshold=h["exp_threshold"],
        sweep_batch=h["detect_batch_size"],
        optim={
            "lr": h["init_lr"],
            "rates": {"descriptor": h["rd_lr"]},
            "momentum": h["momentum"],
            "weight_decay": h["weight_decay"],
        },
    )
    phases = [e[1] for e in case.info["events"] if e[0] == "phase"]
    detected = [e for e in case.info["events"] if e[0] == "detect"]
    right = {e[1]: e[2] for e in case.info["events"] if e[0] == "accuracy"}
    compared = 0
    for t in range(h["tasks_run"]):
        now = case.task(t, h["task_sizes"])
        passes = case.passes(f"train/train/classes{now.classes.start}-{now.classes.stop - 1}")
        now = replace(now, train=partial(recorded, {}, passes))
        strategy.begin_task(now)
        place, losses, rates = "", [], []
        for epoch in range(strategy.epochs):
            strategy.begin_epoch(now, epoch)
            if strategy.phase in ("function", "descriptor") and strategy.passed == 0:
                assert not losses
                place = phases.pop(0)
                if strategy.phase == "function":
                    for name in ("fc.weight", "fc.bias") if compared else ():
                        case.close(f"{place}/start/{name}", official(strategy)[name])
                    load(case, strategy, f"{place}/start")
                else:
                    close(case, strategy, f"{place}/start")
            for batch in strategy.batches(now, epoch):
                if strategy.phase == "sweep":
                    check_detection(strategy, detected.pop(0), batch)
                    strategy.observe(batch)
                    continue
                logged = strategy.observe(batch)
                losses.append(logged.get("loss", logged.get("descriptor_loss")))
                rates.append([strategy.optimizer.param_groups[0]["lr"]])
                if len(losses) == 1:
                    compared += close(case, strategy, f"{place}/step0/grad", grad=True)
                    compared += close(case, strategy, f"{place}/step0/param")
            over = strategy.passed + 1 == strategy.lengths.get(strategy.phase)
            if losses and over:
                case.close(f"{place}/loss_per_step", torch.stack(losses))
                case.close(f"{place}/lr_per_step", torch.tensor(rates, dtype=torch.float64))
                compared += close(case, strategy, f"{place}/end")
                for i, mixture in enumerate(strategy.mixtures):
                    for k, one in enumerate(mixture.each()):
                        case.close(f"{place}/record/blocks.{i}.adapters.{k}", one.errors)
                losses, rates = [], []
        assert not losses
        if t:  # the official code sweeps once more, although nothing can be added
            ((_, batches),) = passes
            for r in batches:
                check_detection(strategy, detected.pop(0), images("train", r))
        strategy.end_task(now)
        named = official(strategy)
        for i, mixture in enumerate(strategy.mixtures):
            columns = [one.column for one in mixture.each()]
            for kind in ("weight", "bias"):
                whole = torch.cat([getattr(c, kind) for c in columns])
                case.close(f"task{t}/final/blocks.{i}.router.{kind}", whole)
        for name, value in named.items():
            key = f"task{t}/final/{name.replace('backbone.', '').replace('.adapter_module', '')}"
            if "router" not in name:
                case.close(key, value)
        test = images("test", case[f"task{t}/test_indices"])
        scores = strategy.predict(test.x)
        case.close(f"task{t}/test_logits", scores)
        accuracy = 100 * (scores.argmax(1) == test.y).float().mean()
        assert accuracy.item() == pytest.approx(right[t], abs=0.01)
    assert not phases and not detected
    assert compared == sum("/step0/" in k or "/end/" in k for k in case.data)
    print(f"worst share of the tolerance, sema_run: {case.worst:.3f}")


def check_detection(strategy: SEMA, event: list[Any], batch: Batch) -> None:
    """Scores and decisions of one recorded batch of a sweep."""
    _, _, scores, fired = event
    for i, found in enumerate(strategy.novelty(batch.x)[: len(fired)]):
        want = [v for name, v in scores.items() if name.startswith(f"blocks.{i}.")]
        assert found.tolist() == pytest.approx(want, rel=1e-5)
        now = i not in strategy.grown and min(want) > strategy.threshold
        assert now is fired[i]


# ------------------------------------------------------------------------------ behaviour

TASKS = [task(0, range(3)), task(1, range(3, 5), spread=0.8), task(2, range(5, 7))]
LATER = {"threshold": 1.5, "sweep_batch": 3, "epochs": 1, "epochs_descriptor": 2, "rank": 2}


def test_a_run_stopped_anywhere_goes_on_bit_by_bit():
    """Also where an adapter was added a moment ago, and within the rest of a sweep."""
    strategy = make(**LATER)
    states = [
        (at, copied(strategy.snapshot()), strategy.phase, strategy.passed, len(strategy.grown))
        for at, _ in drive(strategy, TASKS)
    ]
    assert {s[2:] for s in states} >= {
        ("function", -1, 1),
        ("descriptor", 0, 1),
        ("sweep", 0, 1),
        ("sweep", 0, 0),
    }
    kinds = {(at[0], *place): i for i, (at, _, *place) in enumerate(states[:-1]) if at[0]}
    for i in kinds.values():  # one step from each to the next
        (at, state, *_), (_, want, *_) = states[i : i + 2]
        fresh = make(**LATER)
        for now in TASKS[: at[0] + at[1]]:
            fresh.grow(now)
        fresh.restore(state)
        next(drive(fresh, TASKS, at))
        assert equal(copied(fresh.snapshot()), want), f"from {at}"


def test_images_like_those_before_add_nothing_and_the_head_alone_learns():
    strategy = make(threshold=1e6, sweep_batch=6)
    list(drive(strategy, TASKS[:1]))
    before, extractors = copied(strategy.bank.state_dict()), strategy.extractors()
    head = strategy.head.weight.detach().clone()
    rows = list(drive(strategy, TASKS[:2], (1, 0, 0, 0)))
    assert [sorted(logged) for _, logged in rows] == [["novelty"]] * 2 + [["acc", "loss"]] * 4 + [
        []
    ]
    assert equal(strategy.bank.state_dict(), before) and strategy.extractors() == extractors
    assert not torch.equal(strategy.head.weight, head)
    assert strategy.report() == {"adapters_added": 0}


def test_an_added_adapter_learns_and_those_before_it_stay():
    strategy = make(threshold=0.0)
    list(drive(strategy, TASKS[:1]))
    old = [copied(m.each()[0].state_dict()) for m in strategy.mixtures]
    list(drive(strategy, TASKS[:2], (1, 0, 0, 0)))
    assert strategy.report() == {"adapters_added": 2}
    for mixture, want in zip(strategy.mixtures, old, strict=True):
        first, second = mixture.each()
        assert equal(first.state_dict(), want)
        assert second.function.up.weight.any() and len(second.errors) == 8 * 4


def test_errors_that_fill_up_the_memory_are_cut():
    one = Expert(4, 2, 3, generator(1, "expert"))
    means = torch.rand(3, 4, generator=generator(1, "means"))
    for first, want in ((0, [0, 1]), (2, [0, 1, 2, 3]), (4, [0, 1, 2, 3, 4]), (6, [2, 3, 4, 6, 7])):
        assert not one.deviation(means).any() or len(one.errors) > 2
        one.remember(torch.arange(first, first + 2.0), 5)
        assert one.errors.tolist() == want


def test_batches_are_regrouped_in_order():
    parts = [images("train", rows) for rows in ([0, 1], [2, 3, 4], [5])]
    found = [b.index.tolist() for b in regrouped([parts[0], None, *parts[1:]], 4)]
    assert found == [[0, 1, 2, 3], [4, 5]]
    assert not list(regrouped([None], 4))


def test_bad_input_is_named():
    for options, text in (
        ({"rank": 0}, "strategy.rank"),
        ({"threshold": -1.0}, "strategy.threshold"),
        ({"optim": {"rates": {"router": 0.1}}}, "router"),
    ):
        with pytest.raises(UserError, match=text):
            make(**options).begin_task(TASKS[0])
    net = timm.create_model("test_resnet", num_classes=10)
    with pytest.raises(UserError, match="no place for adapters"):
        build(strategy_node("sema"), at="strategy", backbone=Backbone(net), seed=3, num_classes=10)
    strategy, alone = make(), task(0, range(1))
    with pytest.warns(UserWarning, match="one class"):
        strategy.begin_task(alone)
    batch = next(alone.train(0))
    for phase in ("function", "descriptor"):
        strategy._enter(phase)
        before = copied(strategy.state_dict())
        with pytest.raises(Diverged, match=r"strategy\.optim\.lr"):
            strategy.observe(batch._replace(x=batch.x * torch.nan))
        assert equal(strategy.state_dict(), before)
