"""The average of the weights around continual methods, against the formula written out."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import copied, equal, rule_node
from test_cl_methods import X, learn, make, stream
from test_contract import OF_FILES, construct, drive, tasks
from torch import Tensor

from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.strategy import CLStrategy
from driftline.parts.rules.weight_average import WeightAverage

METHODS = [case for case in OF_FILES if not case.adapts]
AVERAGEABLE = [case for case in METHODS if construct(case).averageable]


def around(method: CLStrategy, decay: float, every: int = 1) -> WeightAverage:
    node = rule_node("weight_average", decay=decay, every=every)
    rule = build(node, at="around.weight_average", inner=method)
    assert isinstance(rule, WeightAverage)
    return rule


def weights(method: CLStrategy) -> dict[str, Tensor]:
    moved = {id(p) for p in method.updated_parameters()}
    return {n: p.detach().clone() for n, p in method.named_parameters() if id(p) in moved}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.filterwarnings("ignore:task 2 has one class")
def test_the_answer_is_that_of_the_average_of_every_step(every):
    rule, plain = around(make("finetune"), 0.8, every), make("finetune")
    slow: dict[str, Tensor] = {}
    steps = 0
    for t in stream():
        for one in (rule, plain):
            one.begin_task(t)
        for name, p in weights(plain).items():  # rows of new classes begin as they are
            old = slow.get(name, p[:0])
            slow[name] = torch.cat([old, p[len(old) :]])
        for batch in t.train(0):
            torch.manual_seed(steps)
            rule.observe(batch)
            torch.manual_seed(steps)
            plain.observe(batch)
            if steps % every == 0:
                slow = {n: 0.8 * slow[n] + 0.2 * p for n, p in weights(plain).items()}
            steps += 1
        assert equal(weights(rule.inner), weights(plain)), "the method learns otherwise"
        twin = make("finetune")
        for earlier in stream()[: t.index + 1]:
            twin.grow(earlier)
        twin.load_state_dict(plain.state_dict())
        with torch.no_grad():
            for name, p in twin.named_parameters():
                if name in slow:
                    p.copy_(slow[name])
        torch.testing.assert_close(rule.predict(X), twin.predict(X))
        assert not torch.allclose(rule.predict(X), plain.predict(X))
    assert rule.report()["weight_of_start"] == pytest.approx(0.8 ** len(range(0, steps, every)))


def ends(name: str, decay: float | None) -> tuple[list[Tensor], object]:
    """Predictions after each of two tasks, and the method's own state."""
    case = next(c for c in METHODS if c.name == name)
    method = construct(case)
    strategy = method if decay is None else around(method, decay)
    torch.manual_seed(1)
    rows = []
    for cursor, out in drive(strategy, case):
        rows += [] if cursor[1] else [out]
        if cursor[0] == 2:
            break
    return rows, copied(method.snapshot())


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [c.name for c in AVERAGEABLE])
def test_around_every_method_a_decay_of_0_is_the_method(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert equal(ends(name, 0.0), ends(name, None))


@pytest.mark.parametrize("case", [c for c in METHODS if c not in AVERAGEABLE], ids=lambda c: c.name)
def test_a_method_that_answers_with_more_than_weights_is_refused(case):
    with pytest.raises(UserError, match=f"around=weight_average: {case.kind.__name__} answers"):
        around(construct(case), 0.9)


def test_a_prompt_that_is_copied_at_the_start_of_a_task_is_so_in_the_average():
    case = next(c for c in METHODS if c.name == "dualprompt")
    rule = around(construct(case), 1.0)  # the average stays where it begins
    first, second = tasks(case.name)[:2]
    learn(rule, first)
    rule.begin_task(second)
    experts = [n for n, p in rule.inner.named_parameters() if p.ndim == 4 and n in rule.average]
    for name in experts:
        mine, average = rule.inner.get_parameter(name)[:, :2], rule.average[name][:, :2]
        assert torch.equal(average[:, 1], mine[:, 1]) and torch.equal(mine[:, 1], mine[:, 0])
        assert not torch.equal(average[:, 0], mine[:, 0])
    assert experts
