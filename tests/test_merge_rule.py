"""Merging at the end of tasks, around every continual method, against the rules themselves."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from conftest import copied, equal, rule_node
from test_contract import OF_FILES, PLAIN, Case, construct, drive, images, tasks, with_other_kinds
from torch import Tensor

from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.strategy import CLStrategy
from driftline.parts import merging
from driftline.parts.rules.merge import Merge

METHODS = [case for case in OF_FILES if not case.adapts]
MERGEABLE = [case for case in METHODS if not construct(case).unmergeable]
MERGEABLE += [case for case in PLAIN if case.name == "ease-one"]
ids = dict(ids=lambda case: case.name)


def around(method: CLStrategy, **options: Any) -> Merge:
    rule = build(rule_node("merge", **options), at="around.merge", inner=method)
    assert isinstance(rule, Merge)
    return rule


def learn(rule: Merge, task: Any) -> dict[str, Tensor]:
    """All of a task; what was trained, before it is merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rule.begin_task(task)
        for epoch in range(rule.inner.epochs):
            rule.begin_epoch(task, epoch)
            for batch in rule.batches(task, epoch):
                if batch is not None:
                    rule.observe(batch)
        trained = copied(rule._tensors())
        rule.end_task(task)
    return trained


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", MERGEABLE, **ids)
def test_around_every_method_the_mean_of_two_tasks(case):
    rule = around(construct(case), rule="mean")
    first, second = tasks(case.name)[:2]
    torch.manual_seed(1)
    sets = [learn(rule, first)]
    base = {name: rule.base[name].clone() for name in sets[0]}
    sets.append(learn(rule, second))
    assert sets[0].keys() == sets[1].keys() == rule._learned().keys()
    assert not any(name.startswith("head") for name in base)
    assert any(not torch.equal(base[n], sets[1][n]) for n in base), "the second task learns nothing"
    for name, value in rule._tensors().items():
        torch.testing.assert_close(value, (sets[0][name] + sets[1][name]) / 2)
    moved = {n: p for n, p in rule.inner.named_parameters() if n in base}
    assert all(moved[n].data_ptr() == p.data_ptr() for n, p in rule._learned().items())
    assert rule.report()["merge_sets"] == 2


@pytest.mark.parametrize("case", [c for c in METHODS if c not in MERGEABLE], **ids)
def test_a_method_whose_tasks_share_no_weights_is_refused(case):
    why = construct(case).unmergeable
    with pytest.raises(
        UserError, match=rf"around=merge: {case.kind.__name__} has nothing.*{re.escape(why)};"
    ):
        around(construct(case))


def finetune(adapter: str = "finetune+lora") -> Case:
    return next(c for c in with_other_kinds(METHODS) if c.name == adapter)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("start", ["first", "merged", "last"])
@pytest.mark.parametrize("name", merging.RULES)
def test_every_rule_merges_the_adapters_of_all_tasks(name, start):
    case = finetune()
    rule = around(construct(case), rule=name, start=start)
    vectors, before = [], None
    torch.manual_seed(1)
    for task in tasks(case.name)[:3]:
        if before is not None:
            rule.begin_task(task)  # twice is no matter: nothing is learned in between
            want = {"first": rule.base, "merged": before[0], "last": before[1]}[start]
            assert all(torch.equal(p, want[n]) for n, p in rule._tensors().items())
        trained = learn(rule, task)
        base = {n: rule.base[n] for n in trained}
        vectors += merging.differences([trained], base)
        got = copied(rule._tensors())
        if not name.startswith("dare"):
            want = merging.added(base, merging.RULES[name](vectors))
            for key, value in want.items():
                torch.testing.assert_close(got[key], value, msg=f"{name} {key}")
        assert all(v.isfinite().all() for v in got.values())
        before = got, trained
    held = 1 + (1 if name in merging.STEPS else 3) + (start == "last")
    size = sum(p.numel() * 4 for p in rule._tensors().values())
    assert rule.report() == {"merge_sets": held, "merge_bytes": held * size}


def test_the_method_ends_its_task_with_the_merged_weights():
    rule = around(construct(finetune()), rule="mean")
    seen = []
    rule.inner.end_task = lambda task: seen.append(copied(rule._tensors()))
    first, second = tasks("finetune")[:2]
    learn(rule, first)
    learn(rule, second)
    assert equal(seen[1], copied(rule._tensors()))


def test_dare_repeats_itself_and_draws_from_nobody_else():
    case = finetune()
    ends = []
    for _ in range(2):
        rule = around(construct(case), rule="dare_mean")
        torch.manual_seed(1)
        for cursor, _out in drive(rule, case):
            if cursor[0] == 2:
                break
        ends.append((copied(rule._tensors()), torch.get_rng_state()))
    assert equal(ends[0], ends[1])
    assert Merge.takes_seed({"rule": "dare"}) and not Merge.takes_seed({"rule": "ties"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "mean", "density": 0.5}, "around.merge.density=0.5 would do nothing: rule=mean"),
        ({"rule": "ties", "alpha": 0.5}, "around.merge.alpha=0.5 .* rule=ties has density, scale"),
        ({"rule": "opcm", "outliers": 0.1}, "rule=opcm has alpha"),
        ({"rule": "tise"}, "around.merge.rule must be one of .*; did you mean 'ties'"),
        ({"density": 1.5}, "around.merge.density must be a number, above 0 and at most 1"),
        ({"density": 0}, "around.merge.density must be a number, above 0 and at most 1"),
        ({"start": "base"}, "around.merge.start must be one of 'first', 'merged', 'last'"),
        ({"density": "half"}, "around.merge.density must be"),
    ],
)
def test_a_wrong_setting_is_named(options, message):
    with pytest.raises(UserError, match=message):
        around(construct(finetune()), **options)


def test_it_goes_around_no_rule():
    inner = build(rule_node("weight_average"), at="a", inner=construct(finetune()))
    with pytest.raises(UserError, match="WeightAverage has nothing to merge.*a rule itself"):
        around(inner)


def test_predictions_are_those_of_the_merged_weights():
    case = finetune()
    rule, plain = around(construct(case), rule="mean"), construct(case)
    for task in tasks(case.name)[:2]:
        learn(rule, task)
        plain.grow(task)
    plain.load_state_dict(rule.inner.state_dict())
    (x,) = images(case, 4)
    torch.testing.assert_close(rule.predict(x), plain.predict(x))


def test_ease_with_one_set_does_not_grow_and_answers_with_all_class_means():
    case = next(c for c in PLAIN if c.name == "ease-one")
    rule = around(construct(case), rule="opcm")
    sizes, hashes = [], []
    one: Any = rule.inner
    for task in tasks(case.name)[:3]:
        learn(rule, task)
        hashes += one.extractors().values()
        assert len(one.bank.sets) == 1 and one.means.shape[:2] == (1, task.classes.stop)
        sizes.append(sum(p.numel() for n, p in one.named_parameters() if n.startswith("bank.")))
    assert len(set(sizes)) == 1 and rule.report()["merge_sets"] == 2
    (x,) = images(case, 4)
    features = torch.nn.functional.normalize(one.bank.features(x, one.names[0]), dim=1)
    want = features @ torch.nn.functional.normalize(one.means[0], dim=1).T
    torch.testing.assert_close(rule.predict(x), want)
    assert one.means[0].any(1).all()
    assert len(set(hashes)) == 3, "kept features would be those of an older set"
