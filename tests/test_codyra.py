"""CoDyRA: formulas against a few independent lines (no run was recorded); ranks that go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import strategy_node
from test_olora import X, learn, stream, task, tiny
from torch import Tensor

from driftline.cl.codyra import CoDyRA, GatedLoRA, shrink
from driftline.core.build import build


def make(**options: Any) -> CoDyRA:
    quick = {"rank": 3, "epochs": 4, "levels": 3, "threshold": 0.2}
    node = strategy_node("codyra", **quick | options)
    return build(node, at="strategy", backbone=tiny(), seed=3, num_classes=8)


def awake(update: GatedLoRA, seed: int = 0) -> GatedLoRA:
    """b starts at 0: give it values."""
    torch.manual_seed(seed)
    update.b.data = torch.randn_like(update.b)
    return update


@pytest.mark.parametrize("out", [8, 24, 32])
def test_a_layer_is_the_sum_over_its_gated_ranks(out):
    update, x = awake(GatedLoRA(8, out, 2)), torch.randn(5, 4, 8)
    old_a, old_b, old_gate = update.a.detach(), update.b.detach(), update.gate.detach().clone()
    update.gate.data[1] = old_gate[1] = 0
    update.extend(None)
    awake(update, 1)
    parts = 3 if out == 24 else 1
    want = torch.zeros(5, 4, out)
    for a, b, gate in ((old_a, old_b, old_gate), (update.a, update.b, update.gate)):
        for p in range(parts):
            rows = slice(p * out // parts, (p + 1) * out // parts)
            for i in range(2):
                activation = gate[2 * p + i] * (x @ a[2 * p + i])
                want[..., rows] += activation[..., None] * b[rows, i].detach()
    torch.testing.assert_close(update(x), want)
    assert len(update.old_a) == 2 * parts - 1  # the rank whose gate was 0 is gone


def official_shrink(gate: np.ndarray, threshold: float) -> np.ndarray:
    gate = gate.copy()
    for i, value in enumerate(gate):
        value = value - threshold if value > threshold else value
        value = value + threshold if value < -threshold else value
        gate[i] = 0 if abs(value) < threshold else value
    return gate


def test_gates_shrink_as_in_the_code_or_softly():
    start = torch.tensor([-1.0, -0.3, -0.25, -0.2, -0.1, 0.0, 0.1, 0.25, 0.39, 0.5, 2.0])
    code, soft = start.clone(), start.clone()
    shrink(code, 0.25, "code")
    shrink(soft, 0.25, "soft")
    np.testing.assert_array_equal(code, official_shrink(start.numpy(), np.float32(0.25)))
    torch.testing.assert_close(soft, start.sign() * (start.abs() - 0.25).clamp_min(0))


@pytest.mark.parametrize(("steps", "dense", "levels"), [(500, 0.5, 50), (37, 0.3, 4), (8, 0, 3)])
def test_the_threshold_rises_at_multiples_of_its_width(steps, dense, levels):
    strategy = make(dense=dense, levels=levels, threshold=0.7)
    strategy.steps = steps
    table, level = np.linspace(0, 0.7, levels), 0
    width = int((steps - dense * steps) // levels)
    for step in range(steps):
        if step >= dense * steps and step % width == 0:
            level += 1
        want = table[min(levels - 1, level)]
        assert strategy.threshold_at(step) == pytest.approx(want if step >= dense * steps else 0)


def test_rates_follow_the_steps_and_a_new_task_starts_from_the_same_function():
    strategy = make(threshold=0.1)
    first = stream()[0]
    strategy.begin_task(first)
    rates: list[float] = []
    for epoch in range(4):
        strategy.begin_epoch(first, epoch)
        for batch in first.train(epoch):
            ranks = strategy.observe(batch)["ranks"]
            rates.append(strategy.optimizer.param_groups[0]["lr"])
    want = 5e-4 * (1 + np.cos(np.pi * np.arange(len(rates)) / len(rates))) / 2
    np.testing.assert_allclose(rates, want)
    strategy.end_task(first)
    total = sum(len(u.gate) for u in strategy.updates)
    assert 0 < int(ranks) < total
    before, report = strategy.predict(X), strategy.report()
    assert report["ranks"] == int(ranks)
    strategy.begin_task(stream()[1])
    torch.testing.assert_close(strategy.predict(X)[:, :3], before)
    assert sum(len(u.old_a) for u in strategy.updates) == int(ranks)


def test_dropped_and_kept_ranks_learn_no_more():
    strategy = make(threshold=0.0)
    learn(strategy, stream()[0])
    strategy.begin_task(stream()[1])
    old: list[Tensor] = [u.old_b.clone() for u in strategy.updates]
    for batch in stream()[1].train(0):
        strategy.observe(batch)
    assert all(torch.equal(u.old_b, b) for u, b in zip(strategy.updates, old, strict=True))
    assert any(u.b.any() for u in strategy.updates)


def test_too_few_steps_for_the_levels_are_said():
    with pytest.warns(UserWarning, match="4 steps, too few for strategy.levels=50"):
        make(epochs=4, levels=50).begin_task(task(0, range(2), 2))
