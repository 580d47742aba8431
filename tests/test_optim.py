"""Optimiser, rates of groups, schedules, clipping, LoRA+ and SAM against their formulas."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, with_options
from omegaconf import OmegaConf
from test_contract import OF_FILES, Case, drive, make
from torch import nn

from driftline.core.build import check
from driftline.core.errors import Diverged, UserError
from driftline.parts.optim import Optim
from driftline.runs.command import spelled_out
from driftline.runs.library import settings

SGD = {"kind": "sgd", "lr": 0.1}


def pair() -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([1.0]))


def test_the_shipped_file_states_every_setting_and_its_default():
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "optim" / "default.yaml"))
    node.pop("_target_")
    plain = Optim(kind="sgd", lr=0.001)
    assert node == {k: list(v) if isinstance(v, tuple) else v for k, v in vars(plain).items()}


def test_groups_have_rates_of_their_own_and_empty_ones_are_left_out():
    a, b = pair()
    c, d = pair()
    optim = Optim(**SGD, rates={"b": 0.5}, factors={"c": 3.0})
    groups = optim.optimizer({"a": [a], "b": [b], "c": [c, d], "none": []}).param_groups
    assert [(g["name"], g["lr"]) for g in groups] == [("a", 0.1), ("b", 0.5), ("c", 0.1 * 3.0)]
    optim = Optim(**SGD, schedule="cosine", rates={"b": 0.5})
    optimizer = optim.optimizer({"a": [a], "b": [b]})
    optim.set_rates(optimizer, 1, 4)
    half = (1 + math.cos(math.pi / 4)) / 2
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.1 * half, 0.5 * half])


def test_a_rise_that_is_longer_than_the_learning_is_said():
    optim = Optim(**SGD, rise=2)
    optimizer = optim.optimizer({"a": pair()})
    with pytest.warns(UserWarning, match=r"rise=2 takes all of the 1 epochs.*0\.1 and stays 0"):
        optim.set_rates(optimizer, 0, 1)
    with pytest.warns(UserWarning, match="rise=2 takes all of the 2 epochs"):
        optim.set_rates(optimizer, 0, 2, 0, 4)
    with warnings.catch_warnings(action="error"):
        optim.set_rates(optimizer, 0, 3)
        optim.set_rates(optimizer, 1, 2)


def test_lora_plus_raises_the_rate_of_second_factors():
    a, b = pair()
    groups = Optim(**SGD, lora_plus=16.0).optimizer({"adapter": [a, b]}, [b]).param_groups
    assert [(g["lr"], g["params"]) for g in groups] == [(0.1, [a]), (1.6, [b])]
    with pytest.raises(UserError, match="lora_plus needs adapters that are low-rank"):
        Optim(**SGD, lora_plus=16.0).optimizer({"norm": [a]})


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_kinds_are_those_of_torch(kind):
    class_ = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[kind]
    (a, b), (c, d) = pair(), pair()
    more = {"momentum": 0.9, "nesterov": True} if kind == "sgd" else {"betas": (0.8, 0.9)}
    ours = Optim(kind=kind, lr=0.1, weight_decay=0.01, **more)
    mine, theirs = ours.optimizer({"a": [a, b]}), class_([c, d], lr=0.1, weight_decay=0.01, **more)
    for _ in range(3):
        ours.step(mine, (a * a).sum() * b.sum())
        theirs.zero_grad()
        ((c * c).sum() * d.sum()).backward()
        theirs.step()
    assert torch.equal(a, c) and torch.equal(b, d) and a.grad is None


def test_clipping_is_of_the_whole_gradient():
    a, b = pair()
    optim = Optim(kind="sgd", lr=1.0, clip=1.0)
    before = torch.cat([a, b]).detach().clone()
    optim.step(optim.optimizer({"a": [a], "b": [b]}), (a * a).sum() / 2 + 12 * b.sum())
    moved = before - torch.cat([a, b])
    assert moved.detach() == pytest.approx(torch.tensor([3, 4, 12]) / 13, rel=1e-5)


def test_sam_takes_the_gradient_where_the_loss_is_highest():
    """Of |a|^2 / 2 at (3, 4): the gradient at (3, 4) (1 + rho / 5)."""
    (a, _), optim = pair(), Optim(kind="sgd", lr=0.5, sam=0.1)
    loss = lambda: (a * a).sum() / 2  # noqa: E731
    optim.step(optim.optimizer({"a": [a]}), loss(), loss)
    want = torch.tensor([3.0, 4.0]) * (1 - 0.5 * (1 + 0.1 / 5))
    torch.testing.assert_close(a.detach(), want)
    with pytest.raises(UserError, match="no second pass"):
        optim.step(optim.optimizer({"a": [a]}), loss())


def test_the_gradient_of_the_first_pass_is_no_part_of_the_second():
    (a, _), optim = pair(), Optim(kind="sgd", lr=0.5, sam=0.1)
    optimizer, loss = optim.optimizer({"a": [a]}), lambda: (a * a).sum() / 2
    loss().backward()
    optim.update(optimizer, lambda: loss().backward())
    want = torch.tensor([3.0, 4.0]) * (1 - 0.5 * (1 + 0.1 / 5))
    torch.testing.assert_close(a.detach(), want)


def test_a_loss_that_is_not_finite_changes_nothing():
    (a, _), optim = pair(), Optim(**SGD)
    optimizer = optim.optimizer({"a": [a]})
    with pytest.raises(Diverged, match=r"loss is nan: lower strategy\.optim\.lr \(now 0\.1\)"):
        optim.step(optimizer, a.sum() * torch.nan)
    assert a.tolist() == [3.0, 4.0]


def test_later_tasks_have_settings_of_their_own():
    optim = Optim(**SGD, weight_decay=0.5, later={"weight_decay": 0.25, "milestones": [2]})
    assert optim.of_task(0) is optim and optim.of_task(0).milestones == ()
    assert [optim.of_task(i).weight_decay for i in (1, 2)] == [0.25, 0.25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"later": {"lrr": 1}}, "optim.later has no option 'lrr'; did you mean 'lr'"),
        ({"later": {"lr": -1}}, r"optim\.later\.lr must be"),
        ({"later": {"later": {}}}, "optim.later has no option 'later'"),
        ({"nesterov": True}, "needs strategy.optim.momentum above 0"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Optim(**SGD | options)
    a, _ = pair()
    with pytest.raises(UserError, match="rate or factor of 'haed'; did you mean 'head'"):
        Optim(**SGD, rates={"haed": 1.0}).optimizer({"head": [a]})


@pytest.mark.parametrize(
    ("word", "where", "value"),
    [
        ("strategy.optim.rates={head: 0.5}", "rates", {"head": 0.5}),
        ("strategy.optim.rates.head=0.5", "rates", {"head": 0.5}),
        ("strategy.optim.factors.head=10", "factors", {"head": 10}),
        ("strategy.optim.later={lr: 0.5}", "later", {"lr": 0.5}),
    ],
)
def test_rates_of_groups_are_typed_like_any_setting(configure, word, where, value):
    node = configure(*spelled_out(["strategy=ease", "scenario=split_cifar10", word])).strategy
    assert node.optim[where] == value
    optim = settings("ease", **{f"optim.{where}": value}).optim
    assert optim[where] == value


def learned(case: Case, until: int) -> torch.Tensor:
    """All parameters of the method after so many batches, or tasks."""
    strategy = make(case)
    next(cursor for cursor, _ in drive(strategy, case) if cursor[0] == until)
    return torch.cat([p.flatten() for p in strategy.parameters()]).detach()


WITH_OPTIM = [c for c in OF_FILES if "optim" in c.node]
LEARNING = [  # by default every second one: the settings are of parts/optim.py
    pytest.param(c, id=c.name, marks=[pytest.mark.release] * (i % 2))
    for i, c in enumerate(WITH_OPTIM)
]


@pytest.mark.one_in(5)
@pytest.mark.slow
@pytest.mark.parametrize("case", LEARNING)
def test_every_method_takes_every_setting(case):
    """Another kind, clipping and a second pass: it learns, and learns something else."""
    until, ends = 2 if case.adapts else 1, []
    lasting = {"episodic": False} if case.node.get("episodic") else {}  # nothing is left otherwise
    for more in ({}, {"kind": "adamw", "clip": 0.5, "sam": 0.1}):
        changed = replace(case, node=with_options(case.node, optim=more, **lasting))
        if more and case.name == "ecotta":  # two losses a batch
            with pytest.raises(UserError, match="no second pass"):
                learned(changed, until)
            return
        ends.append(learned(changed, until))
    assert ends[1].isfinite().all() and not torch.equal(*ends)


UNREAD = {"schedule": "cosine", "rise": 1, "milestones": [1], "decay": 0.5, "later": {"lr": 0.0}}


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize("case", LEARNING)
def test_a_setting_that_would_do_nothing_is_refused(case):
    """A stream has no epochs and no tasks; a task's own settings act, or there are none."""
    for key in UNREAD if case.adapts else ("later",):
        node = with_options(case.node, optim={key: UNREAD[key]})
        try:
            check(node, at="strategy", live=("backbone", "seed", "num_classes"))
        except UserError as error:
            assert re.match(rf"strategy\.optim\.{key}=.* would do nothing: this method", str(error))
            continue
        assert not case.adapts, key
        assert not torch.equal(*(learned(one, 2) for one in (case, replace(case, node=node))))
