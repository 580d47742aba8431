"""TUNA: merging, losses, alignment and answers against a few lines (no run was recorded)."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import strategy_node
from test_ease import learn, stream, task, tiny

from driftline.cl.tuna import CURRENT, UNIVERSAL, Tuna, fuse, overlap
from driftline.core.build import build
from driftline.core.errors import UserError

X = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def make(**options) -> Tuna:
    quick = {"rank": 4, "epochs": 2, "lr": 0.5, "align_epochs": 2, "align_samples": 8}
    node = strategy_node("tuna", **quick | {"dropout": 0.0} | options)
    return build(node, at="strategy", backbone=tiny(), seed=3, num_classes=10)


def learned(tasks: int = 2, **options) -> Tuna:
    strategy = make(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for now in stream()[:tasks]:
            learn(strategy, now)
    return strategy


def values(strategy: Tuna, name: str) -> list[np.ndarray]:
    return [p.detach().numpy().copy() for p in strategy.bank.parameters_of(name)]


def test_fusion_takes_the_largest_of_the_values_with_the_sign_of_the_mean():
    draws = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    draws[:, 0] = 0
    want = []
    for column in draws.T:
        sign = 1 if column.mean() > 0 else -1
        want.append(sign * max([abs(v) for v in column if v * sign > 0], default=0))
    np.testing.assert_array_equal(fuse(torch.from_numpy(draws)).numpy(), np.float32(want))


def test_the_merged_set_answers_and_the_newest_one_as_released():
    strategy = learned(3, universal="merged")
    merged = values(strategy, UNIVERSAL)
    sets = [values(strategy, name) for name in strategy.names]
    for at, got in enumerate(merged):
        stacked = torch.stack([torch.from_numpy(s[at]) for s in sets])
        np.testing.assert_array_equal(got, fuse(stacked).numpy())
    released = learned(3)
    scores = []
    for one, universal in ((strategy, UNIVERSAL), (released, CURRENT)):
        with torch.no_grad():
            each = [one.bank.eval().features(X, n) for n in (*one.names, universal)]
        cosines = [20 * F.cosine_similarity(f[:, None], one.head[None], dim=2) for f in each]
        p = [c.softmax(1) for c in cosines]
        entropy = [-(q * (q + 1e-10).log()).sum(1) for q in p[:-1]]
        best = [min(range(3), key=lambda t: entropy[t][b]) for b in range(len(X))]
        want = torch.stack([p[t][b] + p[-1][b] for b, t in enumerate(best)])
        torch.testing.assert_close(one.predict(X), want.detach())
        scores.append(want)
    assert torch.equal(strategy.head, released.head)  # the universal set has no part in training
    assert not torch.allclose(*scores)


def test_loss_with_margin_and_overlap():
    strategy = learned(2, orthogonality=0.4)
    third = task(2, range(5, 9))
    strategy.begin_task(third)
    batch = next(iter(third.train(0)))
    features = strategy.bank.eval().features(batch.x, CURRENT)
    strategy.margin = 0.3
    cosines = 20 * F.cosine_similarity(features[:, None], strategy.head[None, 5:], dim=2)
    right = cosines[torch.arange(len(batch.y)), batch.y - 5] - 20 * 0.3
    rest = cosines.exp().sum(1) - (right + 20 * 0.3).exp()
    want = -(right - (right.exp() + rest).log()).mean()
    new, total = values(strategy, CURRENT), 0.0
    for name in strategy.names[:-1]:
        for a, b in zip(new[2::4], values(strategy, name)[2::4], strict=True):
            rows = [m / np.linalg.norm(m, axis=1, keepdims=True).clip(1e-12) for m in (a, b)]
            total += abs((rows[0] @ rows[1].T).mean()) / 2  # of two blocks
    want = want + 0.4 * math.exp(-3) * total
    torch.testing.assert_close(strategy._losses(batch)[1], want.float())
    assert overlap(torch.ones(3, 2), -torch.ones(3, 2)) == pytest.approx(1)


@pytest.mark.parametrize("stored_learn", [True, False])
def test_stored_sets_go_on_learning_as_released_or_stay(stored_learn):
    strategy = learned(1, orthogonality=0.4, stored_learn=stored_learn)
    before, keys = values(strategy, "task0"), strategy.extractors()
    strategy.begin_task(stream()[1])
    for batch in stream()[1].train(0):
        strategy.observe(batch)
    after = values(strategy, "task0")
    moved = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [stored_learn and i % 4 == 2 for i in range(len(moved))]  # up-projections
    assert (strategy.extractors() == keys) is not stored_learn


def test_means_are_shortened_as_the_code_does_or_by_task():
    strategy = learned(2)  # classes 0-2 and 3-4
    size, now = -2, 1
    want = [0.9 + 0.1 * (c // size + 1) / (now + 1) for c in range(5)]
    strategy.shrink = "code"
    assert strategy.lengths().tolist() == pytest.approx(want)
    strategy.shrink = "by_task"
    assert strategy.lengths().tolist() == pytest.approx([0.95] * 3 + [1.0] * 2)
    strategy.shrink = "none"
    assert strategy.lengths().tolist() == [1.0] * 5


@pytest.mark.filterwarnings("ignore:one image")
def test_alignment_draws_a_gaussian_a_class_under_a_rate_that_falls_and_rises(monkeypatch):
    rates = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1],
    )
    strategy = learned(1)
    strategy.begin_task(stream()[1])
    rates.clear()
    strategy.align_epochs, strategy.align_lr = 8, 0.1
    strategy.end_task(stream()[1])
    want = [0.05 * (1 + math.cos(math.pi * epoch / 5)) for epoch in range(8) for _ in range(5)]
    np.testing.assert_allclose(rates, want, atol=1e-12)


def test_overlap_needs_low_rank_products():
    with pytest.raises(UserError, match=r"strategy\.orthogonality .* set it to 0"):
        node = strategy_node("tuna", adapter="scale_shift", orthogonality=0.1)
        build(node, at="strategy", backbone=tiny(), seed=3, num_classes=10)
