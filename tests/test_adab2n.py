"""AdaB2N: recorded runs; which tasks weigh how much, which rate, which losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import copied, strategy_node
from golden_cl_case import ClCase, images
from golden_cl_case import backbone as recorded_backbone
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.adab2n import AdaB2N, BalancedNorm
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError
from driftline.core.seed import generator


def small(width: int = 5, classes: int = 9) -> Backbone:
    """The network of the recordings."""
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )
    net.num_classes = classes
    return Backbone(net, input_size=32)


def make(net: Backbone | None = None, **options: Any) -> AdaB2N:
    node = strategy_node("adab2n", **{"capacity": 500, "replay_batch": 6} | options)
    return build(node, at="strategy", backbone=net or small(), seed=3, num_classes=9)


# ------------------------------------------------------------------------------ recorded runs


def learned(strategy: AdaB2N) -> dict[str, Tensor]:
    """What learns, by its official name."""
    named = dict(strategy.backbone.net.named_parameters())
    return named | {f"8.{k}": p for k, p in strategy.head.named_parameters()}


def recorded(t: int, key: str, value: Tensor, case: ClCase, place: str) -> None:
    """Compare; the official weights of tasks have entries of later tasks too, which rest."""
    if key.endswith("task_weight"):
        rest = torch.zeros(2 - t) if "grad" in place else case[f"initial/{key}"][t + 1 :]
        value = torch.cat([value.detach(), rest])
    case.close(f"{place}/{key}", value)


@pytest.mark.usefixtures("gradients_stay")
@pytest.mark.parametrize("name", ["adab2n_run", "adab2n_run_kappa1"])
def test_recorded_run(name):
    case = ClCase(f"adab2n/{name}")
    h = case.hyper
    strategy = make(
        loss="er",
        kappa=h["kappa"],
        regularizer=h["lambd"],
        regularized_from=h["ada_t0"],
        optim={"lr": h["lr"]},
    )
    assert all(layer.momentum == 0.1 for layer in strategy.norms)
    sweeps = case.passes("train/train/current+replay")
    for t in range(3):
        strategy.begin_task(case.task(t, h["task_sizes"]))
        with torch.no_grad():
            for layer in strategy.norms:
                layer.task_weight[t] = h["init_weight"]
            for place, layer in zip("14", strategy.norms, strict=True) if t == 0 else ():
                layer.running_mean.copy_(case[f"initial/{place}.running_mean"])
                layer.running_var.copy_(case[f"initial/{place}.running_var"])
            for key, p in learned(strategy).items() if t == 0 else ():
                if not key.endswith("task_weight"):
                    p.copy_(case[f"initial/{key}"])
        losses, rates, means = [], [], []
        strategy.draws = int(t > 0)
        for step in range(h["steps"]):
            rows = next(sweeps)[1][0]
            batch = images("train", rows[: h["batch"]])
            if rows := rows[h["batch"] :]:
                again = images("train", rows)
                first = len(strategy.buffer)
                for i, label in enumerate(again.y.tolist()):
                    strategy.buffer.put(first + i, label // 3, rows[i], label)
                places = list(range(first, first + len(rows)))
                strategy._draw = lambda d=(places, again.x, again.y): d
            losses.append(strategy.observe(batch)["loss"])
            rates.append([layer.rate or layer.momentum for layer in strategy.norms])
            means.append(torch.cat([layer.running_mean for layer in strategy.norms]))
            for key, p in learned(strategy).items() if step < 3 else ():
                for what, value in (("grad", p.grad), ("param", p)):
                    place = f"task{t}/train/step{step}/{what}"
                    if f"{place}/{key}" in case.data:
                        recorded(t, key, value, case, place)
        case.close(f"task{t}/train/loss_per_step", torch.stack(losses))
        case.close(f"task{t}/rate_per_step", rates)
        case.close(f"task{t}/running_mean_per_step", torch.stack(means))
        variances = torch.cat([layer.running_var for layer in strategy.norms])
        case.close(f"task{t}/running_var", variances)
        for key, p in learned(strategy).items():
            recorded(t, key, p, case, f"task{t}/after_training")
        strategy.end_task(case.task(t, h["task_sizes"]))
        test = images("test", case[f"task{t}/test_indices"])
        strategy.eval()
        with torch.no_grad():
            everything = strategy.head(strategy.features(test.x))
        case.close(f"task{t}/test_logits", everything)
        assert torch.equal(strategy.predict(test.x), everything[:, : 3 * t + 3])
    print(f"worst share of the tolerance, {name}: {case.worst:.3f}")


# ------------------------------------------------------------------------------ behaviour


def layer(tasks: int = 3, kappa: float = 0.4) -> BalancedNorm:
    one = BalancedNorm(nn.BatchNorm2d(4), kappa)
    for _ in range(tasks):
        one.grow()
    return one


X = torch.rand(6, 4, 3, 3, generator=generator(1, "maps"))
TASKS = torch.tensor([2, 2, 0, 2, 0, 2])  # task 1 is missing


def test_statistics_of_a_batch_by_hand_and_what_a_missing_task_keeps():
    one = layer()
    with torch.no_grad():
        one.task_weight.copy_(torch.tensor([0.3, 1.0, -0.2]))
    one.tasks = TASKS, torch.tensor([2, 0, 4])
    got = one(X)
    share = [torch.tensor(w).exp().item() + n for w, n in ((0.3, 2), (1.0, 0), (-0.2, 4))]
    share = [s / sum(share) for s in share]
    weights = [share[k] / {0: 2, 2: 4}[k] for k in TASKS.tolist()]
    means = [sum(w * X[b, c].mean() for b, w in enumerate(weights)) for c in range(4)]
    for c, mean in enumerate(means):
        var = sum(w * ((X[b, c] - mean) ** 2).mean() for b, w in enumerate(weights))
        assert torch.allclose(got[:, c], (X[:, c] - mean) / (var + 1e-5).sqrt(), atol=1e-5)
        rate = 0.1**0.4
        assert one.running_mean[c].item() == pytest.approx(rate * mean.item(), abs=1e-6)
        assert one.running_var[c].item() == pytest.approx(1 - rate + rate * var.item(), abs=1e-6)
    assert one.missing.item() == pytest.approx(share[1], abs=1e-6)
    one.distance.backward()
    assert (one.task_weight.grad != 0).all()


def test_without_the_memory_and_in_the_first_task_statistics_are_those_of_batch_norm():
    for tasks, given in ((1, True), (3, False)):
        one, plain = layer(tasks), nn.BatchNorm2d(4)
        one.tasks = (torch.zeros(6, dtype=torch.int64), torch.tensor([6])) if given else None
        assert torch.allclose(one(X), plain(X), atol=1e-5)
        one.eval()
        mean, var = one.running_mean.clone(), one.running_var.clone()
        want = F.batch_norm(X, mean, var, one.weight, one.bias)
        assert torch.equal(one(X), want) and torch.equal(one.running_mean, mean)


@pytest.mark.parametrize("kappa", [0.1, 0.4, 0.7])
def test_the_rate_falls_to_its_fixed_point(kappa):
    one = layer(kappa=kappa)
    rates = [one.next_rate() for _ in range(3000)]
    assert rates[0] == 0.1**kappa and rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1 - 0.9**kappa, rel=1e-6)
    other = layer(kappa=kappa)
    other.load_state_dict(copied(one.state_dict()))
    assert other.next_rate() == one.next_rate()


def test_the_ends_of_kappa():
    constant, mean = layer(kappa=1.0), layer(kappa=0.0)
    assert constant.next_rate() == constant.next_rate() == 0.1
    for x in (X, 3 * X, X + 1):
        mean(x)
    want = sum(x.mean((0, 2, 3)) for x in (X, 3 * X, X + 1)) / 3
    assert torch.allclose(mean.running_mean, want, atol=1e-6)


@pytest.mark.parametrize("loss", ["derpp", "er_ace"])
def test_official_losses_by_hand(loss):
    case = ClCase("adab2n/adab2n_run")
    strategy = make(loss=loss, alpha=0.7, beta=0.4, replay_batch=4, regularizer=0.0)
    strategy.begin_task(case.task(0, [3, 3, 3]))
    first = images("train", [0, 13, 25, 1, 14, 26])
    strategy.observe(first)
    before = strategy.buffer.scores
    if loss == "er_ace":  # nothing is drawn in the first task
        strategy.observe(first)
        assert not strategy.drawn and before is None
    strategy.begin_task(case.task(1, [3, 3, 3]))
    again, batch = images("train", [13, 25]), images("train", [37, 49, 38])
    positions = [1, 2]
    strategy._draw = lambda: (positions, again.x, again.y)
    seen: list[Tensor] = []
    handle = strategy.head.register_forward_hook(lambda _, args, out: seen.append(out.detach()))
    got = strategy.observe(batch)["loss"]
    handle.remove()
    (scores,) = seen  # one pass
    mine, old = scores[:3], scores[3:5]
    if loss == "derpp":
        want = F.cross_entropy(mine, batch.y) + 0.7 * F.mse_loss(old, before[positions])
        want += 0.4 * F.cross_entropy(scores[5:], again.y)
        assert torch.equal(strategy.buffer.scores[-3:], mine)
    else:
        kept = sorted({*batch.y.tolist(), *range(int(batch.y.max()), 9)})
        labels = torch.tensor([kept.index(y) for y in batch.y.tolist()])
        want = F.cross_entropy(mine[:, kept], labels) + F.cross_entropy(old, again.y)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


def test_bad_input_is_named():
    with pytest.raises(UserError, match="has none: use strategy=derpp"):
        make(recorded_backbone())
    plain = small()
    plain.net[1] = nn.BatchNorm2d(5, track_running_stats=False)
    with pytest.raises(UserError, match="running statistics and a momentum"):
        make(plain)
    with pytest.raises(UserError, match=r"strategy\.capacity=8"):
        make(capacity=8)
    strategy = make()
    strategy.begin_task(ClCase("adab2n/adab2n_run").task(0, [3, 3, 3]))
    batch = images("train", [0, 13, 25])
    with pytest.raises(Diverged, match=r"strategy\.optim\.lr"):
        strategy.observe(batch._replace(x=batch.x * torch.nan))
