"""HPCR: losses and one step against a few lines of their own, from FelixHuiweiLin/PCR fba5677."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import copied, strategy_node
from golden_cl_case import ClCase, images
from golden_cl_case import backbone as recorded_backbone

from driftline.cl.hpcr import HPCR, Pairs, contrast
from driftline.core.build import build


def make(**options: object) -> HPCR:
    quick = {"capacity": 12, "replay_batch": 5} | options
    node = strategy_node("hpcr", **quick)
    return build(node, at="strategy", backbone=recorded_backbone(), seed=3, num_classes=10)


@pytest.mark.parametrize("pairs", ["proxies", "samples", "all"])
def test_the_contrastive_loss_pair_by_pair(pairs: Pairs):
    g = torch.Generator().manual_seed(1)
    labels = torch.tensor([0, 1, 0, 2, 1])
    x, rows = torch.randn(5, 4, generator=g), torch.randn(3, 4, generator=g)[labels]
    things = [(f"x{i}", x[i], c) for i, c in enumerate(labels.tolist())]
    proxies = [(f"w{i}", rows[i], c) for i, c in enumerate(labels.tolist())]
    anchors = things + (proxies if pairs == "all" else [])
    losses = []
    for name, anchor, label in anchors:
        others = [t for t in (proxies if pairs == "proxies" else things + proxies) if t[0] != name]
        odds = [math.exp(F.cosine_similarity(anchor, o, dim=0) / 0.3) for _, o, _ in others]
        mine = [p for p, other in zip(odds, others, strict=True) if other[2] == label]
        losses.append(-sum(math.log(p / sum(odds)) for p in mine) / len(mine))
    want = sum(losses) / len(losses)
    assert contrast(x, rows, labels, 0.3, pairs).item() == pytest.approx(want, rel=1e-5)


def test_a_step_of_the_second_task_by_hand():
    """The images are not augmented, so that both views are one."""
    strategy, case = make(period=7, alpha=0.3, beta=0.6), ClCase("replay/er_run")
    strategy.begin_task(case.task(0, [4, 3, 3]))
    strategy.begin_epoch(case.task(0, [4, 3, 3]), 0)
    first = images("train", [0, 13, 25, 40, 1, 14])
    start = copied(strategy.state_dict())
    assert strategy.observe(first)["loss"] == 0  # the memory is empty
    assert all(
        torch.equal(v, start[k]) for k, v in strategy.head.state_dict(prefix="head.").items()
    )
    with torch.no_grad():
        old = strategy.features(first.x)
        answers = strategy.head(old)
    second = case.task(1, [4, 3, 3])
    strategy.begin_task(second)
    strategy.begin_epoch(second, 0)
    strategy.observe(images("train", [51, 63]))  # of step 0
    strategy.buffer.keep(range(6))
    batch = images("train", [50, 62, 75])
    with torch.no_grad():
        strategy.head.weight.mul_(1 + 0.3 * torch.rand(strategy.head.weight.shape))
        now, again = strategy.features(batch.x), strategy.features(first.x)
    state = copied(strategy.state_dict())
    loss = strategy.observe(batch)["loss"]
    chosen = strategy.drawn[0][0]
    weight, temperature = state["head.weight"], 0.09

    def cosines(a, b):
        return F.cosine_similarity(a[:, None], b[None], dim=2) / temperature

    y = torch.cat([first.y[chosen]] * 2 + [batch.y] * 2)
    x = torch.cat([again[chosen]] * 2 + [now] * 2)
    share = torch.bincount(y, minlength=10) * cosines(x, weight).exp()
    p = cosines(x, weight).exp() / share.sum(1, keepdim=True)
    scale = 0.5625 + (1.8 - 0.5625) * 0.5 * (1 - math.cos(2 * math.pi / 7))
    want = -scale * p[range(len(y)), y].log().mean()
    m, f_m = x[:10], old[chosen].repeat(2, 1)
    gap = (cosines(m, weight) - answers[chosen].repeat(2, 1)) ** 2
    want += 0.3 * gap[:, y].mean()
    for i in range(10):
        others = [j for j in range(10) if j != i]
        new, was = cosines(m[i : i + 1], m[others])[0], cosines(f_m[i : i + 1], f_m[others])[0]
        want -= 0.6 / 10 * (was.softmax(0) * new.log_softmax(0)).sum()
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    assert strategy.buffer.report()["memory_mib"] > 0
