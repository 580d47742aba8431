"""MoRAM: the mixture of ranks against a loop over tokens (no run was recorded); what learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import strategy_node
from test_olora import X, learn, stream, tiny

from driftline.cl.moram import MoRAM, RankExperts
from driftline.core.build import build


def make(**options: Any) -> MoRAM:
    node = strategy_node("moram", **{"rank": 3, "top_k": 3, "epochs": 2, "lr": 0.01} | options)
    return build(node, at="strategy", backbone=tiny(), seed=3, num_classes=8)


@pytest.mark.parametrize("out", [8, 24])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_is_the_mixture_of_the_ranks_that_answer(out, training):
    torch.manual_seed(0)
    update = RankExperts(8, out, 3, top_k=4, temperature=0.1, threshold=0.3)
    update.b.data = torch.randn_like(update.b)
    update.extend(None)
    update.b.data = torch.randn_like(update.b)
    update.train(training)
    parts, x = (3 if out == 24 else 1), torch.randn(5, 2, 8)
    want = torch.zeros(5, 2, parts, out // parts)
    for at in [(i, j, p) for i in range(5) for j in range(2) for p in range(parts)]:
        ranks = [(update.old_a[at[2], r], update.old_b[at[2], :, r]) for r in range(3)]
        ranks += [(update.a[at[2], r], update.b[at[2], :, r]) for r in range(3)]
        u = torch.stack([x[at[:2]] @ a for a, _ in ranks])
        s = u / u.square().sum().sqrt()
        best = sorted(range(6), key=lambda r: -s[r])[:4]
        total = sum((s[r] / 0.1).exp() for r in best)
        for r in best:
            if training or s[r] >= 0.3:
                want[at] += (s[r] / 0.1).exp() / total * u[r] * ranks[r][1]
    torch.testing.assert_close(update(x), want.flatten(2))


def test_only_the_new_ranks_learn_and_fewer_than_k_are_all_chosen():
    strategy = make(top_k=9)
    learn(strategy, stream()[0])
    strategy.begin_task(stream()[1])
    held = [(u.old_a.clone(), u.old_b.clone()) for u in strategy.updates]
    assert all(b.any() for _, b in held) and all(a.shape[1] == 3 for a, _ in held)
    for batch in stream()[1].train(0):
        strategy.observe(batch)
    for update, (a, b) in zip(strategy.updates, held, strict=True):
        assert torch.equal(update.old_a, a) and torch.equal(update.old_b, b)
    assert all(u.b.any() for u in strategy.updates)


def test_the_threshold_acts_in_evaluation_alone():
    everything, few = make(threshold=None), make(threshold=0.9)
    for strategy in (everything, few):
        learn(strategy, stream()[0])
    for a, b in zip(everything.updates, few.updates, strict=True):
        assert torch.equal(a.b, b.b)
    assert not torch.equal(everything.predict(X), few.predict(X))
