"""The first continual-learning methods on tiny tasks made by hand."""

from __future__ import annotations

import inspect
import io
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import strategy_node, with_options
from omegaconf import OmegaConf
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.joint import mixed
from driftline.core.build import build
from driftline.core.errors import Diverged
from driftline.core.seed import generator
from driftline.core.stream import Batch, Task
from driftline.parts.heads import ExpandingLinear, PrototypeHead
from driftline.parts.objectives import scope_columns

CONF = Path(__file__).parents[1] / "conf" / "strategy"
TRAINED = ("finetune", "linear_probe", "joint")
ALL = (*TRAINED, "simplecil")


class TinyNet(nn.Module):
    """8 px images, BatchNorm and dropout, 6 features, a pretrained head of 5 classes."""

    num_classes, num_features = 5, 6

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.1)
        )
        self.fc = nn.Linear(6, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)


def backbone() -> Backbone:
    torch.manual_seed(0)
    return Backbone(TinyNet(), input_size=8)


def task(index: int, classes: range, per_class: int | list[int] = 6, batch: int = 4) -> Task:
    """Random images whose mean colour tells the class."""
    counts = [per_class] * len(classes) if isinstance(per_class, int) else per_class
    y = torch.cat([torch.full((n,), c) for c, n in zip(classes, counts, strict=True)])
    x = torch.rand(len(y), 3, 8, 8, generator=generator(7, "x", index))
    x[:, 0] = 0.5 * x[:, 0] + 0.05 * y[:, None, None]
    rows = torch.arange(len(y)) + 1000 * index

    def pick(order: Tensor):
        for at in order.split(batch):
            yield Batch(x[at], y[at], rows[at], torch.zeros_like(y[at]))

    def train(epoch: int, start: int = 0):
        order = torch.randperm(len(y), generator=generator(7, "order", index, epoch))
        yield from list(pick(order))[start:]

    fixed = lambda: pick(torch.arange(len(y)))  # noqa: E731
    return Task(index, f"t{index}", classes, -(-len(y) // batch), train, fixed, fixed)


def stream() -> list[Task]:
    """Unequal tasks; the last one is a single class with a single image."""
    return [task(0, range(0, 3)), task(1, range(3, 5), [5, 2]), task(2, range(5, 6), 1)]


def make(name: str, num_classes: int = 6, **options):
    node = strategy_node(name)
    short: dict[str, Any] = {"epochs": 2, "freeze_bn": False}
    short |= {"optim": {"lr": 0.05} | ({} if name == "linear_probe" else {"rates": {"head": 0.1}})}
    node = with_options(node, **{k: v for k, v in short.items() if k in node})
    node = with_options(node, **options)
    net = backbone()
    return build(node, at="strategy", backbone=net, seed=3, num_classes=num_classes)


def learn(strategy, task: Task, *, begin: bool = True, epoch: int = 0, step: int = 0) -> None:
    """What the runner does with one task, from a given cursor on."""
    if begin:
        strategy.begin_task(task)
    for e in range(epoch, strategy.epochs):
        if step == 0:
            strategy.begin_epoch(task, e)
        for batch in task.train(e, step):
            strategy.observe(batch)
        step = 0
    strategy.end_task(task)


def learned(name: str, tasks: list[Task] | None = None, **options):
    strategy = make(name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in stream() if tasks is None else tasks:
            learn(strategy, t)
    return strategy


def tensors(strategy) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in strategy.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


X = torch.rand(9, 3, 8, 8, generator=generator(1, "test"))


# ------------------------------------------------------------------------------ heads


def test_growth_keeps_old_rows_and_starts_new_ones_like_the_official_head():
    head, g = ExpandingLinear(64), generator(0, "init")
    head.grow(40, g)
    head.bias.data.normal_()
    old = head.weight.detach().clone(), head.bias.detach().clone()
    head.grow(100, g)
    head.grow(50, g)  # never shrinks
    assert head.classes == 100 and head(torch.rand(2, 64)).shape == (2, 100)
    assert torch.equal(head.weight[:40], old[0]) and torch.equal(head.bias[:40], old[1])
    new, bound = head.weight[40:], (3 / 64) ** 0.5
    assert not head.bias[40:].any()
    assert 0.98 * bound < new.abs().max() < bound and abs(new.std() - bound / 3**0.5) < 0.005


def test_growth_follows_the_generator():
    heads = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        heads.append(ExpandingLinear(4))
        heads[-1].grow(3, generator(0, "init"))
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_prototypes_of_repeated_classes_are_exact_means():
    x = torch.randn(60, 5, generator=generator(0, "p"))
    y = torch.arange(60) % 3
    whole, parts = PrototypeHead(5), PrototypeHead(5)
    whole.grow(4)
    whole.update(x, y)
    parts.grow(2)
    for at in (y == 0, y == 1):
        parts.update(x[at][:7], y[at][:7])
    parts.grow(4)
    for at in (y == 0, y == 1):
        parts.update(x[at][7:], y[at][7:])
    parts.update(x[y == 2], y[y == 2])
    assert whole.counts.tolist() == parts.counts.tolist() == [20, 20, 20, 0]
    assert torch.allclose(whole.sums, parts.sums, rtol=1e-13, atol=1e-13)
    want = torch.stack([x[y == c].double().mean(0).float() for c in range(3)])
    assert torch.allclose(parts.weight[:3], want, rtol=1e-6) and not parts.weight[3].any()
    assert not parts(x)[:, 3].any()
    with pytest.raises(Diverged, match="class 2"):
        parts.update(torch.full((1, 5), torch.nan), torch.tensor([2]))


# ------------------------------------------------------------------------------ every method


@pytest.mark.parametrize("name", ALL)
def test_sizes_follow_the_classes_seen(name):
    strategy = make(name)
    for t, width in zip(stream(), (3, 5, 6), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn(strategy, t)
        scores = strategy.predict(X)
        assert scores.shape == (9, width) and scores.isfinite().all()


@pytest.mark.parametrize("name", ["finetune", "joint"])
def test_the_whole_network_learns_except_the_pretrained_head(name):
    strategy, before = learned(name, stream()[:1]), backbone().state_dict()
    for key, value in strategy.backbone.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("net.fc."), key
    updated = {id(p) for p in strategy.updated_parameters()}
    assert updated == {id(p) for n, p in strategy.named_parameters() if ".fc." not in n}


@pytest.mark.parametrize("name", TRAINED)
def test_yaml_values_reach_the_optimiser(name):
    strategy = make(name, lr=0.25, momentum=0.5, weight_decay=0.125)
    strategy.make_optimizer(stream()[0])
    groups = strategy.optimizer.param_groups
    assert groups[0]["lr"] == (0.1 if name == "joint" and len(groups) == 1 else 0.25)
    assert all(g["momentum"] == 0.5 and g["weight_decay"] == 0.125 for g in groups)
    held = {id(p) for g in groups for p in g["params"]}
    assert held == {id(p) for p in strategy.parameters() if p.requires_grad}


# ------------------------------------------------------------------------------ resuming


# ------------------------------------------------------------------------------ fine-tuning


def old_rows_move(scope: str) -> bool:
    strategy = learned("finetune", stream()[:1], loss_scope=scope, later={"weight_decay": 0.0})
    before = strategy.head.weight[:3].detach().clone()
    learn(strategy, stream()[1])
    return not torch.equal(strategy.head.weight[:3], before)


def test_loss_scopes_differ_as_defined():
    assert [old_rows_move(s) for s in ("current", "seen", "all")] == [False, True, True]
    strategy = learned("finetune", stream()[:1], loss_scope="all")
    assert strategy.head.classes == 6 and strategy.predict(X).shape == (9, 3)
    losses = {}
    for scope in ("current", "seen", "all"):
        strategy = make("finetune", loss_scope=scope)
        for t in stream()[:2]:
            strategy.grow(t)
        with torch.no_grad():
            for p in strategy.head.parameters():
                p.zero_()  # then the loss is the log of the number of classes in the softmax
        losses[scope] = strategy.observe(next(stream()[1].train(0)))["loss"].exp().item()
    assert losses == pytest.approx({"current": 2, "seen": 5, "all": 6})
    assert scope_columns("current", range(3, 5), 5, 6) == range(3, 5)


def test_first_step_is_plain_sgd():
    strategy = make("finetune", lr=0.5, rates={"head": 0.25}, weight_decay=0.125)
    t = stream()[0]
    strategy.begin_task(t)
    strategy.begin_epoch(t, 0)
    twin, batch = deepcopy(strategy), next(t.train(0))
    torch.manual_seed(0)
    logged = strategy.observe(batch)
    torch.manual_seed(0)
    twin.train()
    scores = twin.head(twin.backbone.features(batch.x))
    loss = nn.functional.cross_entropy(scores, batch.y)
    loss.backward()
    assert torch.equal(logged["loss"], loss.detach()) and logged["acc"].shape == ()
    for (name, p), q in zip(strategy.named_parameters(), twin.parameters(), strict=True):
        if ".fc." not in name:
            rate = 0.25 if name.startswith("head") else 0.5
            torch.testing.assert_close(p, q - rate * (q.grad + 0.125 * q))


def test_schedules():
    strategy, t = make("finetune", milestones=[1], later={"milestones": [2]}), stream()
    for index, rates in ((0, [0.05, 0.005, 0.005]), (1, [0.05, 0.05, 0.005])):
        strategy.begin_task(t[index])
        for epoch, rate in enumerate(rates):
            strategy.begin_epoch(t[index], epoch)
            assert strategy.optimizer.param_groups[0]["lr"] == pytest.approx(rate)
            assert strategy.optimizer.param_groups[1]["lr"] == pytest.approx(2 * rate)


def test_weight_decay_of_first_and_later_tasks():
    strategy = make("finetune", weight_decay=0.5, later={"weight_decay": 0.25})
    decays = []
    for t in stream():
        strategy.make_optimizer(t)
        decays.append(strategy.optimizer.param_groups[0]["weight_decay"])
    assert decays == [0.5, 0.25, 0.25]


@pytest.mark.parametrize("freeze", [True, False])
def test_freeze_bn_keeps_statistics_only(freeze):
    strategy = learned("finetune", stream()[:1], freeze_bn=freeze)
    norm, start = strategy.backbone.net.body[1], backbone().net.body[1]
    assert torch.equal(norm.running_mean, start.running_mean) == freeze
    assert not torch.equal(norm.weight, start.weight)


@pytest.mark.parametrize("name", ["finetune", "linear_probe"])
def test_one_class_in_the_softmax_warns_once(name):
    strategy = make(name, loss_scope="current")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in (task(0, range(0, 1)), task(1, range(1, 2)), task(2, range(2, 4))):
            learn(strategy, t)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1 and "strategy.loss_scope=current" in messages[0]


def test_one_class_tasks_learn_under_seen():
    tasks = [task(i, range(i, i + 1)) for i in range(3)]
    strategy = learned("finetune", tasks, loss_scope="seen")
    assert strategy.predict(X).shape == (9, 3)


# ------------------------------------------------------------------------------ joint


def test_joint_sees_old_data_and_starts_from_the_pretrained_weights():
    tasks, seen = stream(), []
    strategy = make("joint", epochs=1)
    observe = strategy.observe

    def spy(batch: Batch):
        if not seen:
            assert_same(dict(backbone().state_dict()), strategy.backbone.state_dict())
        seen.append(batch.index)
        return observe(batch)

    strategy.observe = spy
    for t in tasks:
        seen.clear()
        learn(strategy, t)
        images = torch.cat(seen).tolist()
        want = [int(i) for s in tasks[: t.index + 1] for b in s.test() for i in b.index]
        assert sorted(images) == sorted(want)
    assert any(len({int(i) // 1000 for i in rows}) > 1 for rows in seen)  # mixed batches


def test_joint_beats_fine_tuning_on_old_classes():
    tasks = [task(0, range(0, 2), 20, 8), task(1, range(2, 4), 20, 8)]
    options = {"epochs": 30, "momentum": 0.9, "freeze_bn": True, "num_classes": 4}
    right = {}
    for name in ("finetune", "joint"):
        strategy = learned(name, tasks, **options)
        hits = [strategy.predict(b.x).argmax(1) == b.y for b in tasks[0].test()]
        right[name] = torch.cat(hits).float().mean().item()
    assert right["joint"] > right["finetune"] + 0.3, right


def test_final_only_trains_once_at_the_end():
    strategy, tasks = make("joint", when="final_only"), stream()
    learn(strategy, tasks[0])
    assert_same(dict(backbone().state_dict()), strategy.backbone.state_dict())
    for t in tasks[1:]:
        learn(strategy, t)
    assert not torch.equal(strategy.backbone.net.body[0].weight, backbone().net.body[0].weight)
    assert strategy.predict(X).shape == (9, 6)


def test_joint_probe_leaves_the_backbone_alone():
    strategy = learned("joint", trains="head")
    assert_same(dict(backbone().state_dict()), dict(strategy.backbone.state_dict()))


def test_mixing_is_a_uniform_shuffle_of_the_union():
    tasks = [task(0, range(0, 1), 30, 8), task(1, range(1, 2), 10, 8), task(2, range(2, 3), 1, 8)]
    sizes: dict[int, int] = {}
    share = torch.zeros(6, dtype=torch.float64)
    for epoch in range(60):
        batches = list(mixed(tasks, epoch, generator(epoch, "mix"), sizes))
        labels = torch.cat([b.y for b in batches])
        assert labels.bincount().tolist() == [30, 10, 1] and sizes == {0: 30, 1: 10, 2: 1}
        assert len(batches) == 6 and (epoch == 0 or [len(b.y) for b in batches] == [8] * 5 + [1])
        share += torch.tensor([(b.y == 1).sum() / 60 for b in batches])
    assert (share[:5] - 8 * 10 / 41).abs().max() < 0.6  # images of task 1 in every full batch


def test_mixing_with_skipped_images_loses_none():
    whole = task(0, range(0, 2), 6, 4)

    def holes(epoch: int, start: int = 0):
        first, second, third = whole.train(epoch, start)
        yield Batch(*(t[:2] for t in first))
        yield second
        yield None
        yield third

    odd = Task(0, "odd", range(0, 2), 4, holes, whole.fit, whole.test)
    for _ in range(2):
        batches = list(mixed([odd], 0, generator(0, "mix"), {}))
        assert sum(len(b.y) for b in batches) == 10


# ------------------------------------------------------------------------------ SimpleCIL


def test_simplecil_means_and_repeated_classes():
    tasks = stream()
    strategy = learned("simplecil", tasks)
    with torch.no_grad():
        for t in tasks:
            batches = list(t.fit())
            y = torch.cat([b.y for b in batches])
            features = strategy.backbone.features(torch.cat([b.x for b in batches]))
            for c in t.classes:
                torch.testing.assert_close(strategy.head.weight[c], features[y == c].mean(0))
    assert strategy.head.counts.tolist() == [6, 6, 6, 5, 2, 1]
    again = task(3, range(0, 3), 6)
    learn(strategy, again)
    assert strategy.head.counts.tolist() == [12, 12, 12, 5, 2, 1]
    assert strategy.predict(X).abs().max() <= 1 + 1e-6


def test_no_hyper_parameter_has_a_default():
    for name in ALL:
        node = OmegaConf.load(CONF / f"{name}.yaml")
        module, cls = node._target_.rsplit(".", 1)
        target = getattr(__import__(module, fromlist=[cls]), cls)
        parameters = inspect.signature(target).parameters
        assert all(p.default is p.empty for p in parameters.values())
