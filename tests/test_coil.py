"""COIL: transport, rows and losses against a few independent lines (no run was recorded)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_replay import make, stream
from torch import Tensor

from driftline.cl.coil import COIL, transport
from driftline.core.stream import Batch


def tiny(**options: Any) -> COIL:
    return make("coil", **{"capacity": 20, "epochs": 3, "refresh": 2} | options)


def learned(tasks: int = 1, **options: Any) -> COIL:
    """After so many tasks of `stream`."""
    strategy = tiny(**options)
    for task in stream().tasks[:tasks]:
        strategy.begin_task(task)
        for epoch in range(strategy.epochs):
            strategy.begin_epoch(task, epoch)
            for batch in strategy.batches(task, epoch):
                assert batch is not None
                strategy.observe(batch)
        strategy.end_task(task)
    return strategy


def test_the_plan_is_that_of_entropic_transport():
    """Its marginals, and that it is the kernel but for factors of rows and columns: no other is."""
    cost = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    plan = transport(cost, 0.464)
    torch.testing.assert_close(plan.sum(1), torch.full((5,), 1 / 5).double())
    torch.testing.assert_close(plan.sum(0), torch.full((3,), 1 / 3).double())
    free = plan.log() + cost.double() / 0.464
    assert transport(torch.rand(1, 1), 0.464).tolist() == [[1.0]]
    inner = free - free[:1] - free[:, :1] + free[:1, :1]
    torch.testing.assert_close(inner, torch.zeros(5, 3).double())


@pytest.mark.parametrize("old", [2, 6, 9])
def test_unequal_masses_of_the_code_give_a_multiple_of_the_plan(old):
    """models/COIL.py divides both masses by the number of old classes."""
    cost = torch.rand(old, 3, generator=torch.Generator().manual_seed(1)).double()
    kernel = (-cost / 0.464).exp()
    u = torch.ones(old).double() / old
    for _ in range(200):
        v = torch.ones(3).double() / old / (kernel.T @ u)
        u = torch.ones(old).double() / old / (kernel @ v)
    theirs, ours = u[:, None] * kernel * v, transport(cost, 0.464)
    torch.testing.assert_close(theirs / theirs.sum(), ours)


def directions(strategy: COIL, batches: Any) -> dict[int, Tensor]:
    """Direction of the mean of normalised features of each class, the plain way."""
    rows: dict[int, list[Tensor]] = {}
    strategy.eval()
    with torch.no_grad():
        for batch in batches:
            for x, c in zip(batch.x, batch.y.tolist(), strict=True):
                f = strategy.backbone.features(x[None])[0].double()
                rows.setdefault(c, []).append(f / (f.norm() + 1e-8))
    means = {c: torch.stack(r).mean(0) for c, r in rows.items()}
    return {c: m / m.norm() for c, m in means.items()}


@pytest.mark.parametrize("old_means", ["exemplars", "all_images"])
def test_new_rows_start_as_mixtures_of_the_old_ones(old_means):
    strategy, tasks = learned(2, old_means=old_means, capacity=10), stream().tasks
    means = directions(strategy, [b for t in tasks[:3] for b in t.fit()])
    old = [means[c] for c in range(4)]
    if old_means == "exemplars":
        held = directions(strategy, list(strategy._exemplars()))
        old = [held[c] for c in range(4)]
    before = strategy.head.weight.detach().clone()
    cost = [[(a - b).abs().pow(3).sum().pow(1 / 3) for b in (means[4], means[5])] for a in old]
    plan = transport(torch.stack([torch.stack(row) for row in cost]), 0.464)
    mixed = torch.stack(
        [sum(plan[i, j] * before[i] / before[i].norm() for i in range(4)) for j in range(2)]
    )
    want = mixed * sum(r.norm() for r in before) / 4 / (sum(r.norm() for r in mixed) / 2)
    strategy.begin_task(tasks[2])
    torch.testing.assert_close(strategy.head.weight[:4], before)
    torch.testing.assert_close(strategy.head.weight[4:], want.float())


def expected(strategy: COIL, batch: Batch, epoch: int) -> Tensor:
    """The loss, term by term as in models/COIL.py; 2 of 4 classes are old."""
    features = strategy.backbone.features(batch.x)
    network, head = strategy.teacher
    scores = strategy.head(features)
    before = (head(network.features(batch.x)) / 2).softmax(1)
    distilled = -(before * (scores[:, :2] / 2).log_softmax(1)).sum(1).mean()
    loss = 0.5 * distilled + 0.5 * F.cross_entropy(scores, batch.y)
    unit = features / features.norm(dim=1, keepdim=True)
    moved = unit @ (strategy.rows / strategy.rows.norm(dim=1, keepdim=True)).T / 2
    if epoch == 0:
        new = (scores[:, 2:] / 2).log_softmax(1)
        return loss - 0.3 * (new * moved.softmax(1)).sum(1).mean()
    return loss - 0.7 * (epoch / 3) ** 2 * (before * moved.log_softmax(1)).sum(1).mean()


@pytest.mark.parametrize("epoch", [0, 2])
def test_losses_of_the_first_and_of_later_epochs(epoch):
    strategy, task = learned(1, new_weight=0.3, old_weight=0.7), stream().tasks[1]
    strategy.begin_task(task)
    strategy.begin_epoch(task, epoch)
    batch = next(iter(strategy.batches(task, epoch)))
    assert batch is not None
    with torch.no_grad():
        strategy.head.sigma.fill_(3.0)
    if epoch:
        strategy._mix_old_rows()
        means = directions(strategy, [*strategy._exemplars(), *task.fit()])
        cost = [
            [(means[a] - means[b]).abs().pow(3).sum().pow(1 / 3) for b in (0, 1)] for a in (2, 3)
        ]
        plan = transport(torch.tensor(cost), 0.464)
        want = plan.T.float() @ F.normalize(strategy.head.weight[2:], dim=1)
        torch.testing.assert_close(strategy.rows, want)
    strategy.train()
    want = expected(strategy, batch, epoch)
    torch.testing.assert_close(strategy.observe(batch)["loss"], want.detach())


def test_old_rows_are_mixed_anew_every_so_many_batches(monkeypatch):
    counted: list[int] = []
    plain = COIL._mix_old_rows
    monkeypatch.setattr(
        COIL, "_mix_old_rows", lambda self: (counted.append(self.step), plain(self))[1]
    )
    learned(2)
    assert counted == [0, 2, 4] * 2  # of two epochs of six batches, not of the first
