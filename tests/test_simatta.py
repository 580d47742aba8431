"""SimATTA against the formulas of its code, by hand (no run of it is recorded), and the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import copied, equal, rule_node, strategy_node
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.checkpoint import Checkpointer, Signals
from driftline.core.console import Console
from driftline.core.errors import UserError
from driftline.core.oracle import Oracle
from driftline.core.record import RunLogger
from driftline.core.runner import Context, run_shifts
from driftline.core.strategy import TTAStrategy
from driftline.core.stream import Batch, Segment, ShiftStream, Skipped
from driftline.parts.clusters import kmeans
from driftline.runs.execute import run_experiment
from driftline.tta.simatta import SimATTA
from driftline.tta.tent import Tent

QUICK = {"clusters": 3, "max_updates": 2, "train_batch": 4, "keep_below": 1.5, "keep": 2}


def make(**options: Any) -> SimATTA:
    torch.manual_seed(3)
    net = timm.create_model("test_resnet", num_classes=10)
    nn.init.normal_(net.get_classifier().weight, std=0.3)
    node = strategy_node("simatta", **(QUICK | options))
    return build(node, at="strategy", backbone=Backbone(net, tag="test_resnet"), seed=0)


def images(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def adapt(method: TTAStrategy, x: Tensor, y: Tensor, oracle: Oracle) -> Tensor:
    method.use_oracle(oracle)
    with oracle.batch(y):
        return method.adapt(x)


# ------------------------------------------------------------------------------ the oracle


def test_an_oracle_sells_labels_of_the_present_batch_within_its_budget() -> None:
    y, oracle = torch.tensor([5, 6, 7, 8]), Oracle(3)
    assert oracle.left == 0
    with oracle.batch(y):
        assert oracle.left == 3 and oracle.ask([2, 0]).tolist() == [7, 5]
        assert oracle.ask([0]).tolist() == [5] and oracle.left == 1  # paid once
        with pytest.raises(UserError, match="2 labels are asked for and 1 are left"):
            oracle.ask([1, 3])
    with pytest.raises(UserError, match="while a batch is adapted to"):
        oracle.ask([0])
    other = Oracle(3)
    other.restore(oracle.snapshot())
    with other.batch(y):
        assert other.left == 1 and other.ask([3]).tolist() == [8] and other.left == 0
    assert other.report() == {"labels_bought": 3.0, "labels_share": 3 / 8}
    assert Oracle(0.29, 100).budget == 29 and Oracle(1.0, 8).budget == 8
    with Oracle().batch(y) as _, (free := Oracle()).batch(y):
        assert free.left == 4


def test_labels_that_take_time_come_under_the_numbers_of_their_orders() -> None:
    oracle = Oracle(delay=2)
    came, numbers = [], list[int]()
    for first in (0, 10, 20, 30, 40):
        with oracle.batch(torch.arange(first, first + 4)):
            came.append(oracle.delivered())
            if first < 20:
                numbers += oracle.order([1, 3] if first else [2])
            assert oracle.delivered() == {}
        assert oracle.delivered() == {}  # outside a batch
        other = Oracle(delay=2)
        other.restore(copied(oracle.snapshot()))
        oracle = other
    assert numbers == [0, 1, 2] and oracle.bought == 3
    assert came == [{}, {}, {0: 2}, {1: 11, 2: 13}, {}]
    with oracle.batch(torch.arange(4)), pytest.raises(UserError, match="scenario.label_delay=2"):
        oracle.ask([0])


def test_a_late_label_belongs_to_its_image_and_one_of_no_class_teaches_nothing() -> None:
    """With a delay of one batch; the second image bought is of an unknown class."""
    method, oracle = make(buy_above=0.0, keep_below=0.0, clusters=8), Oracle(3, delay=1)
    x = images(4)
    scores = adapt(method, x, torch.tensor([5, -1, 7, 8]), oracle)
    assert oracle.bought == 3 and not len(method.bought) and len(method.waiting) == 3
    start = make().backbone.state_dict()
    assert equal(copied(method.backbone.state_dict()), copied(start))  # nothing to learn from yet
    held = {tuple(image.flatten()[:3].tolist()) for image in method.waiting.images()}
    bought = [i for i in range(4) if tuple(x[i].flatten()[:3].tolist()) in held]
    torch.testing.assert_close(adapt(method, x, torch.tensor([0, 0, 0, 0]), oracle), scores)
    labels = {tuple(x[i].flatten()[:3].tolist()): [5, -1, 7, 8][i] for i in bought}
    known = [label for label in labels.values() if label >= 0]
    assert sorted(method.bought.labels) == sorted(known) and not len(method.waiting)
    for image, label in zip(method.bought.images(), method.bought.labels, strict=True):
        assert labels[tuple(image.flatten()[:3].tolist())] == label
    again, late = make(buy_above=0.0, keep_below=0.0, clusters=8), Oracle(delay=1)
    again.begin_stream()
    adapt(again, x, torch.arange(4), late)
    again.reset()  # as a rule does; what was ordered before is of no use
    adapt(again, x, torch.arange(4), late)
    assert not len(again.bought) and len(again.waiting) == 4


class Record(Oracle):
    """Which labels were bought, by their place in the stream."""

    places: ClassVar[list[list[int]]] = []

    def order(self, positions: Any) -> list[int]:
        self.places.append([self.seen - len(self._labels), *positions])  # type: ignore[arg-type]
        return super().order(positions)


def runs(
    folder: Path, strategy: TTAStrategy, y: Tensor, budget: float | None = None
) -> tuple[dict[str, Any], Any]:
    """What a run on 16 images in four batches reports of the method, and its state at the end."""
    x = images(16)

    def batches(start: int = 0) -> Iterator[Batch]:
        rows = torch.arange(16).split(4)[start:]
        yield from (Batch(x[r], y[r], r, torch.zeros_like(r)) for r in rows)

    folder.mkdir()
    log = RunLogger(folder, "tiny")
    checkpoint = Checkpointer(log, Signals(), every=0, key="tiny")
    context = Context(log, checkpoint, Console("tiny", mute=True), torch.device("cpu"))
    stream = ShiftStream(
        "tiny",
        10,
        ["fog"],
        [Segment(0, "fog", (0,), 16, 4, batches)],
        {},
        Skipped(),
        holdout=batches,
        holdout_adapting=True,
        label_budget=budget,
    )
    torch.manual_seed(1)
    return run_shifts(strategy, stream, context)["method"], copied(strategy.snapshot())


def test_labels_that_are_not_bought_change_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("driftline.core.runner.Oracle", Record)
    monkeypatch.setattr(Record, "places", [])
    y = torch.arange(16) % 10
    report, state = runs(tmp_path / "a", make(), y)
    bought = [first + place for first, *places in Record.places for place in places]
    assert report == {"labels_bought": float(len(bought)), "labels_share": len(bought) / 16}
    assert 0 < len(bought) < 16  # also: none of the clean images that it adapts to
    other = y + 1
    other[bought] = y[bought]
    assert equal(runs(tmp_path / "b", make(), other % 10)[1], state)
    other[bought[0]] += 1
    assert not equal(runs(tmp_path / "c", make(), other % 10)[1], state)


@pytest.mark.parametrize(("budget", "bought"), [(0, 0), (2, 2), (0.25, 4)])
def test_the_budget_is_kept_through_rules(tmp_path, budget, bought) -> None:
    rule = build(rule_node("reset_every", every=2), at="around", inner=make(growth=3.0))
    assert rule.buys_labels
    report, _ = runs(tmp_path / "run", rule, torch.arange(16) % 10, budget)
    assert report["labels_bought"] == bought
    with pytest.raises(UserError, match="around=window: SimATTA buys labels"):
        build(rule_node("window"), at="around", inner=make())


def test_a_method_that_buys_none_never_meets_the_oracle(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Tent, "use_oracle", None)  # a call would fail
    net = Backbone(timm.create_model("test_resnet", num_classes=10), tag="test_resnet")
    tent = build(strategy_node("tent"), at="strategy", backbone=net, seed=0)
    assert runs(tmp_path / "run", tent, torch.arange(16) % 10)[0] == {}


def test_what_was_bought_is_in_the_result(configure) -> None:
    words = ["scenario.corruptions=[fog]", "scenario.images=16", "scenario.batch_size=8"]
    words += ["scenario.clean_images=8", "scenario.probe_images=8", "strategy.max_updates=1"]
    words += ["strategy=simatta", "scenario.label_budget=0.25", "around=reset_each_domain"]
    summary = run_experiment(configure(*words), [])
    assert summary["method"] == {"labels_bought": 4.0, "labels_share": 0.25}
    assert "label" not in str(summary["source"]["folder"])


# ------------------------------------------------------------------------------ the method


def test_clusters_are_the_best_of_all_partitions() -> None:
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(7, 2, generator=g, dtype=torch.float64)
        weights = 1 + 3 * torch.rand(7, generator=g, dtype=torch.float64)
        best = float("inf")
        for partition in product(range(3), repeat=7):
            member, spent = torch.tensor(partition), 0.0
            for c in set(partition):
                mine, w = x[member == c], weights[member == c]
                centre = (w[:, None] * mine).sum(0) / w.sum()
                spent += float(((mine - centre) ** 2).sum(1) @ w)
            best = min(best, spent)
        centres, member = kmeans(x, weights, 3, g)
        got = float(((x - centres[member]) ** 2).sum(1) @ weights)
        assert abs(got - best) < 1e-9
        assert torch.equal(torch.cdist(x, centres).argmin(1), member)


def test_a_label_is_bought_of_each_cluster_without_an_anchor() -> None:
    """Three groups on a line; the first holds both anchors. Weights pull the centres."""
    method = make()
    for image in images(2):
        method.bought.insert(image, 0, 1.0)
    line = [0.0, 0.2, 0.1, 0.3, 10.0, 10.4, 10.3, 20.0, 20.2, 20.1]
    points = torch.tensor(line, dtype=torch.float64)[:, None] * torch.ones(1, 4).double()
    rows, sizes, more = method.select(points, torch.ones(10).double(), 3)
    found = dict(zip(rows.tolist(), sizes.tolist(), strict=True))
    assert found == {4: 3, 7: 3}  # 10.3 is nearest to 10.23, 20.1 to 20.1; candidates from 0
    assert more.tolist() == [2.0, 2.0]  # four images, the anchors too, over two anchors
    rows, _, _ = method.select(points[:1].expand(3, -1), torch.ones(3).double(), 5)
    assert not len(rows)  # equal points: one cluster, which has an anchor


def test_the_sure_and_the_uncertain_are_told_apart_by_entropy() -> None:
    x, y, oracle = images(8), torch.arange(8), Oracle()
    p = make().backbone(x).softmax(1).detach()
    surprise = -(p * p.log()).sum(1)
    high, low = surprise.sort().values[[5, 3]].tolist()
    method = make(buy_above=high, keep_below=low, keep=2, clusters=8, capacity=3)
    scores = adapt(method, x, y, oracle)
    torch.testing.assert_close(scores.softmax(1), p)
    order = surprise.argsort().tolist()
    assert sorted(method.bought.labels) == sorted(order[5:]) and oracle.bought == 3
    assert method.bought.scores == [1.0, 1.0, 1.0]
    assert method.kept.labels == p.argmax(1)[order[:2]].tolist()
    assert torch.equal(method.kept.images(), x[order[:2]])
    adapt(method, x, y, Oracle(0))
    assert len(method.kept) == 3 and torch.equal(method.kept.images()[1:], x[order[:2]])
    # of the first batch: the images, by the source too; then one update after the other
    assert method.backbone.passes.backward == 2 * 2 * (2 + 3) + 2


@pytest.mark.parametrize("cold_start", [0, 100])
def test_one_update_by_hand(cold_start) -> None:
    method = make(cold_start=cold_start, max_updates=1)
    weight = "layer1.0.conv1.weight"
    x = images(5)
    for image in x[:1]:
        method.bought.insert(image, 3)
    for image in x[1:2]:
        method.kept.insert(image, 4)
    net = make().backbone
    share = 0.2 if cold_start else 0.5
    loss = (1 - share) * F.cross_entropy(net(x[1:2]), torch.tensor([4]))
    loss += share * F.cross_entropy(net(x[:1]), torch.tensor([3]))
    p = net.net.get_parameter(weight)
    want = p - 1e-4 * torch.autograd.grad(loss, p)[0]
    method._train()
    torch.testing.assert_close(method.backbone.net.get_parameter(weight), want)
    assert not method.optimizer.state
    assert not method.backbone.training


def test_training_ends_six_windows_after_the_lowest_loss() -> None:
    method = make(max_updates=None, optim={"lr": 0.0})
    method.bought.insert(images(1)[0], 3)
    method._train()  # without kept images, on the bought ones twice
    assert method.backbone.passes.backward == 2 * 7 * 6


def test_without_a_label_nothing_is_learned() -> None:
    method = make(keep_below=2.5)
    start = copied(method.backbone.state_dict())
    with pytest.warns(UserWarning, match="call use_oracle"):
        method.adapt(images(4))
    adapt(method, images(4), torch.arange(4), Oracle(0))
    assert len(method.kept) and equal(copied(method.backbone.state_dict()), start)
