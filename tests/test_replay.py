"""ER, DER++ (aimagelab/mammoth e75a491) and iCaRL (LAMDA-CL/LAMDA-PILOT 5240714) against numbers
recorded from them; rules of the memory.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from conftest import scenario_node, strategy_node
from golden_cl_case import ClCase, images
from golden_cl_case import backbone as recorded_backbone
from torch import Tensor

from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.seed import generator
from driftline.core.stream import Batch, Task, TaskStream
from driftline.parts import buffer as buffers
from driftline.parts.buffer import Buffer
from driftline.streams.pipelines import Geometry
from driftline.streams.store import ImageStore


def make(name: str, **options: Any) -> Any:
    node = strategy_node(name, **options)
    return build(node, at="strategy", backbone=recorded_backbone(), seed=3, num_classes=10)


def stream() -> TaskStream:
    """Tasks of two classes from embedded images, six of each class, cropped at random."""
    node = scenario_node(
        "split_cifar",
        dataset="cifar10",
        base=0,
        increment=2,
        class_order="fixed",
        order_seed=0,
        batch_size=5,
        test_batch_size=5,
        test_batches="mixed",
        pipeline="pilot",
        embedded_images=[6, 2],
        shots=None,
        single_pass=False,
    )
    return build(
        node,
        at="scenario",
        data_root=None,
        on_error="raise",
        workers=0,
        seed=1,
        geometry=Geometry(32),
        store=ImageStore(),
    )


def parameters(strategy: Any, head: str) -> dict[str, Tensor]:
    """What learns, under its official name."""
    found = dict(strategy.backbone.net.named_parameters())
    return found | {f"{head}.{k}": p for k, p in strategy.head.named_parameters()}


# ------------------------------------------------------------------------ recorded runs


class Draws:
    """The recorded numbers instead of random ones."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replay: list[list[int]] = []
        self.reservoir: list[int] = []
        monkeypatch.setattr(buffers, "sample", self.sample)
        monkeypatch.setattr(buffers, "uniform", self.uniform)

    def sample(self, count: int, size: int, _: torch.Generator) -> list[int]:
        drawn = [i for i in self.replay.pop(0) if i >= 0]
        assert len(drawn) == min(count, size) and max(drawn) < count
        return drawn

    def uniform(self, stop: int, _: torch.Generator) -> int:
        drawn = self.reservoir.pop(0)
        assert drawn < stop
        return drawn


@pytest.mark.usefixtures("gradients_stay")
@pytest.mark.parametrize("name", ["er", "derpp"])
def test_recorded_run_with_a_memory(name, monkeypatch, record_property):
    case, draws = ClCase(f"replay/{name}_run"), Draws(monkeypatch)
    h = case.hyper
    weights = {k: h[k] for k in ("alpha", "beta") if name == "derpp"}
    strategy = make(
        name,
        epochs=h["epochs"],
        lr=h["lr"],
        momentum=h["momentum"],
        weight_decay=h["weight_decay"],
        capacity=h["buffer_size"],
        replay_batch=h["minibatch_size"],
        **weights,
    )
    right = {e[1]: e[2] for e in case.info["events"] if e[0] == "accuracy"}
    for t in range(len(h["task_sizes"])):
        now = case.task(t, h["task_sizes"])
        strategy.begin_task(now)
        if t == 0:
            with torch.no_grad():
                strategy.head.weight.copy_(case["initial/head.weight"])
                strategy.head.bias.copy_(case["initial/head.bias"])
        draws.replay = case[f"task{t}/replay_draws"].tolist()
        draws.reservoir = case[f"task{t}/reservoir_draws"].tolist()
        losses, rates, step = [], [], 0
        sweeps = case.passes(f"train/train/classes{now.classes.start}-{now.classes.stop - 1}")
        for epoch, (_, batches) in enumerate(sweeps):
            strategy.begin_epoch(now, epoch)
            for rows in batches:
                rates.append([strategy.optimizer.param_groups[0]["lr"]])
                losses.append(strategy.observe(images("train", rows))["loss"])
                for key, p in parameters(strategy, "head").items() if step < 2 else ():
                    for what, value in (("grad", p.grad), ("param", p)):
                        place = f"task{t}/train/step{step}/{what}/{key}"
                        if place in case.data:
                            case.close(place, value)
                step += 1
        assert not draws.replay and not draws.reservoir
        strategy.end_task(now)
        case.close(f"task{t}/train/loss_per_step", torch.stack(losses))
        case.close(f"task{t}/train/lr_per_step", rates)
        for key, p in parameters(strategy, "head").items():
            for place in ("after_training", "backbone_after_training"):
                if f"task{t}/{place}/{key}" in case.data:
                    case.close(f"task{t}/{place}/{key}", p)
        held = strategy.buffer
        assert held.rows == case[f"task{t}/buffer_rows"].tolist()
        assert held.labels == case[f"task{t}/buffer_labels"].tolist()
        assert held.offered.total() == case[f"task{t}/samples_seen"].item()
        if name == "derpp":
            case.close(f"task{t}/buffer_logits", held.scores)
        test = images("test", case[f"task{t}/test_indices"])
        with torch.no_grad():
            everything = strategy.head(strategy.features(test.x))
        case.close(f"task{t}/test_logits", everything)
        answer = strategy.predict(test.x)
        assert torch.equal(answer, everything[:, : now.classes.stop])
        accuracy = 100 * (answer.argmax(1) == test.y).float().mean()
        assert round(accuracy.item(), 2) == right[t]
    record_property("worst", case.worst)


@pytest.mark.usefixtures("gradients_stay")
@pytest.mark.parametrize("name", ["icarl_run", "icarl_run_fixed_memory"])
def test_recorded_run_of_icarl(name, record_property):
    case = ClCase(f"icarl/{name}")
    h = case.hyper
    fixed = h["fixed_memory"]
    strategy = make(
        "icarl",
        epochs=h["epochs"],
        lr=h["init_lr"],
        schedule="steps",
        milestones=h["init_milestones"],
        decay=h["init_lr_decay"],
        weight_decay=h["init_weight_decay"],
        momentum=h["momentum"],
        later={
            "lr": h["lrate"],
            "milestones": h["milestones"],
            "decay": h["lrate_decay"],
            "weight_decay": h["weight_decay"],
        },
        capacity=h["memory_per_class"] if fixed else h["memory_size"],
        memory="per_class" if fixed else "total",
        temperature=h["T"],
    )
    kinds = {"accuracy": "head", "accuracy_nme": "nme"}
    right = {(kinds[e[0]], e[1]): e[2] for e in case.info["events"] if e[0] in kinds}
    official = lambda: {  # noqa: E731
        (k if k.startswith("fc.") else f"backbone.{k}"): p
        for k, p in parameters(strategy, "fc").items()
    }
    for t in range(len(h["task_sizes"])):
        now = case.task(t, h["task_sizes"])
        strategy.begin_task(now)
        known = now.classes.start
        with torch.no_grad():
            before = [strategy.head.weight.clone(), strategy.head.bias.clone()]
            for key, p in (("weight", strategy.head.weight), ("bias", strategy.head.bias)):
                p.copy_(case[f"task{t}/before_training/fc.{key}"])
        case.close(f"task{t}/before_training/fc.weight", torch.cat([before[0][:known],
            strategy.head.weight[known:]]))  # fmt: skip
        losses, rates, step = [], [], 0
        sweeps = case.passes(f"train/train/classes{now.classes.start}-{now.classes.stop - 1}")
        for epoch, (_, batches) in enumerate(sweeps):
            strategy.begin_epoch(now, epoch)
            for rows in batches:
                rates.append([strategy.optimizer.param_groups[0]["lr"]])
                losses.append(strategy.observe(images("train", rows))["loss"])
                for key, p in official().items() if step < 2 else ():
                    for what, value in (("grad", p.grad), ("param", p)):
                        place = f"task{t}/train/step{step}/{what}/{key}"
                        if place in case.data:
                            case.close(place, value)
                step += 1
        case.close(f"task{t}/train/loss_per_step", torch.stack(losses))
        case.close(f"task{t}/train/lr_per_step", rates)
        for key, p in official().items():
            for place in (f"after_training/{key}",
                          f"backbone_after_training/{key.removeprefix('backbone.')}"):  # fmt: skip
                if f"task{t}/{place}" in case.data:
                    case.close(f"task{t}/{place}", p)
        strategy.end_task(now)
        assert strategy.buffer.rows == case[f"task{t}/exemplar_rows"].tolist()
        assert strategy.buffer.labels == case[f"task{t}/exemplar_labels"].tolist()
        case.close(f"task{t}/class_means", strategy.class_means)
        test = images("test", case[f"task{t}/test_indices"])
        with torch.no_grad():
            case.close(f"task{t}/test_features", strategy.features(test.x))
        case.close(f"task{t}/test_logits", strategy.predict(test.x))
        for answer in kinds.values():
            strategy.answer = answer
            accuracy = 100 * (strategy.predict(test.x).argmax(1) == test.y).float().mean()
            assert round(accuracy.item(), 2) == right[answer, t]
        strategy.answer = "head"
    record_property("worst", case.worst)


def test_the_loss_of_ser_and_der_by_hand():
    """Against a few lines of their own, from the formulas; the images are not augmented."""
    mse, ce = torch.nn.functional.mse_loss, torch.nn.functional.cross_entropy
    case = ClCase("replay/er_run")
    for name, weights in (("ser", (0.7, 0.4)), ("der", (0.7, 0.0))):
        strategy = make(name, alpha=weights[0], beta=weights[1], capacity=12, replay_batch=5)
        strategy.begin_task(case.task(0, [4, 3, 3]))
        first = images("train", [0, 13, 25, 40, 1, 14])
        with torch.no_grad():
            answers = strategy.head(strategy.features(first.x))
        loss = strategy.observe(first)["loss"]
        assert torch.allclose(loss, ce(answers, first.y), atol=1e-6)
        strategy.begin_task(case.task(1, [4, 3, 3]))
        with torch.no_grad():  # the network moves on after the task
            strategy.head.weight.mul_(1.5)
        batch = images("train", [50, 62, 75])
        with torch.no_grad():
            scores = strategy.head(strategy.features(batch.x))
            again = strategy.head(strategy.features(first.x))
            old = scores
            if name == "ser":
                network, head = strategy.teacher
                old = head(network.features(batch.x))
                assert not torch.allclose(old, scores)
        loss = strategy.observe(batch)["loss"]
        chosen = strategy.drawn[0][0]
        want = ce(scores, batch.y) + weights[0] * mse(again[chosen], answers[chosen])
        want += weights[1] * mse(scores, old)
        want += ce(again[chosen], first.y[chosen]) if name == "ser" else 0
        assert torch.allclose(loss, want, atol=1e-5) and len(chosen) == 5


# ------------------------------------------------------------------------ the memory


def offered(labels: list[int], capacity: int, rule: Any, seed: int = 0) -> Buffer:
    held, y = Buffer(), torch.tensor(labels)
    batch = Batch(torch.zeros(len(y), 3, 2, 2), y, torch.arange(len(y)), torch.zeros_like(y))
    held.offer(batch, 0, capacity, rule, generator(seed, "test"))
    return held


def test_a_reservoir_keeps_each_image_with_the_same_chance():
    kept = Counter(row for s in range(600) for row in offered([0] * 12, 4, "reservoir", s).rows)
    assert all(abs(kept[row] / 600 - 4 / 12) < 0.08 for row in range(12))


def test_balanced_and_per_class_memories_keep_rare_classes():
    labels = [0] * 40 + [1] * 2 + [0] * 40 + [2] * 30
    assert Counter(offered(labels, 9, "balanced").labels) == {0: 3, 1: 2, 2: 4}
    assert Counter(offered(labels, 3, "per_class").labels) == {0: 3, 1: 2, 2: 3}


def test_a_memory_smaller_than_the_classes_is_refused():
    with pytest.raises(UserError, match=r"strategy\.capacity=9 images for 10 classes"):
        make("er", capacity=9)
    make("er", capacity=9, insertion="per_class")
    with pytest.raises(UserError, match=r"strategy\.capacity=9 exemplars for 10 classes"):
        make("icarl", capacity=9)


def test_drawn_images_keep_their_order_over_tasks_and_are_counted():
    case, held = ClCase("replay/er_run"), Buffer()
    tasks = [case.task(t, [4, 3, 3]) for t in range(3)]
    for t, rows in enumerate([[3, 40], [50, 60], [90, 91]]):
        held.offer(images("train", rows), t, 10, "reservoir", generator(0, "test"))
    positions = [5, 0, 2, 1]
    x = held.images(positions, {t.index: t.again for t in tasks}, 7)
    assert torch.equal(x, images("train", [91, 3, 50, 40]).x)
    assert held.labels_of(positions).tolist() == images("train", [91, 3, 50, 40]).y.tolist()
    assert held.report() == {"memory_images": 6, "memory_mib": 6 * 3 * 32 * 32 / 2**20}


def trained(task: Task, *place: int, **options: Any) -> list[Batch]:
    return [batch for batch in task.train(*place, **options) if batch is not None]


def test_a_stream_augments_images_again_and_mixes_others_in():
    first, second, *_ = stream().tasks
    batch = trained(first, 0)[0]
    x = first.again(batch.index, 5)
    assert x.shape == batch.x.shape and torch.equal(x, first.again(batch.index, 5))
    assert torch.equal(x.flip(0), first.again(batch.index.flip(0), 5))  # by image, not by place
    assert not torch.equal(x, first.again(batch.index, 6))
    more = (batch.index, batch.y)
    mixed = trained(second, 0, more=more)
    plain = torch.cat([b.index for b in trained(second, 0)])
    want = torch.cat([plain, batch.index]).sort()[0]
    assert torch.equal(torch.cat([b.index for b in mixed]).sort()[0], want)
    labels = torch.cat([b.y for b in mixed]).tolist()
    assert {*labels} == {*second.classes, *batch.y.tolist()}
    later = trained(second, 0, 1, more=more)
    assert torch.equal(later[0].x, mixed[1].x)  # as a resumed run


def test_icarl_learns_on_exemplars_and_keeps_all_images_of_a_small_class():
    strategy = make("icarl", epochs=1, memory="per_class", capacity=8)
    for task in stream().tasks[:2]:
        strategy.begin_task(task)
        delivered = [b for b in strategy.batches(task, 0) if b is not None]
        for batch in delivered:
            strategy.observe(batch)
        strategy.end_task(task)
    seen = Counter(torch.cat([b.y for b in delivered]).tolist())
    assert seen == dict.fromkeys(range(4), 6) == Counter(strategy.buffer.labels)
