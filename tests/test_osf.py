"""OSF: recorded runs; kept directions stay, and the network is a plain one at any time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import strategy_node
from golden_cl_case import ClCase, images
from golden_cl_case import backbone as recorded_backbone
from torch import Tensor

from driftline.cl.osf import OSF
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError
from driftline.core.seed import generator
from driftline.core.stream import Batch, Task


def osf(**options: Any) -> OSF:
    node = strategy_node("osf", **{"epochs": 1} | options)
    return build(node, at="strategy", backbone=recorded_backbone(), seed=3, num_classes=10)


def task(index: int, classes: range) -> Task:
    """Random images, one batch."""
    y = torch.arange(classes.start, classes.stop).repeat_interleave(4)
    x = torch.rand(len(y), 3, 32, 32, generator=generator(7, "x", index))
    batch = Batch(x, y, torch.arange(len(y)), torch.zeros_like(y))
    fixed = lambda *_: iter([batch])  # noqa: E731
    return Task(index, f"t{index}", classes, 1, fixed, fixed, fixed)


# ------------------------------------------------------------------------------ recorded numbers


def learned(strategy: OSF) -> dict[str, Tensor]:
    """Recorded name -> parameter."""
    named: dict[str, Tensor] = {}
    for name, _, split in strategy.parts():
        named |= {f"{name}.U_low": split.u, f"{name}.S_low": split.s, f"{name}.V_low": split.v}
    return named | {"head.weight": strategy.head.weight, "head.bias": strategy.head.bias}


@pytest.mark.usefixtures("gradients_stay")
@pytest.mark.parametrize("name", ["osf_run", "osf_run_adamw"])
def test_run_as_recorded(name):
    case = ClCase(f"osf/{name}")
    h = case.hyper
    strategy = osf(
        epochs=h["epochs"],
        kept=h["kept_fraction"],
        optim={
            "kind": h["optimizer"],
            "lr": h["lr"],
            "rates": {"head": h["lr"]},
            "momentum": h["momentum"] if h["optimizer"] == "sgd" else 0.0,
            "weight_decay": h["weight_decay"],
        },
    )
    for key in ("weight", "bias"):
        p = getattr(strategy.head, key)
        assert 0 < p.abs().max() <= 32**-0.5
        p.data.copy_(case[f"initial_head/{key}"])
    events = iter(case.info["events"])
    for t in range(3):
        now = case.task(t, h["task_sizes"])
        strategy.begin_task(now)
        ranks = [len(split.kept_s) for _, _, split in strategy.parts()]
        assert ranks == case[f"task{t}/rank_kept"].tolist()
        with torch.no_grad():
            for layer, module, split in strategy.parts():
                mine = split.weight()
                assert torch.allclose(mine, module.weight, atol=1e-6)
                for part in "usv":
                    low = case[f"task{t}/before_training/{layer}.{part.upper()}_low"]
                    high = case[f"task{t}/frozen/{layer}.{part.upper()}_high"]
                    getattr(split, part).copy_(low)
                    getattr(split, f"kept_{part}").copy_(high)
                assert torch.allclose(split.weight(), mine, atol=1e-4 if t else 1e-6)
        strategy.rebuild()

        losses, rates, step = [], [], 0
        assert next(events) == ["phase", f"task{t}/train"]
        for epoch in range(strategy.epochs):
            strategy.begin_epoch(now, epoch)
            for rows in next(events)[2]:
                losses.append(strategy.observe(images("train", rows))["loss"].item())
                rates.append([strategy.optimizer.param_groups[0]["lr"]])
                for key, p in learned(strategy).items():
                    head = f"task{t}/train/step{step}"
                    if f"{head}/param/{key}" in case.data:
                        case.close(f"{head}/grad/{key}", p.grad)
                        case.close(f"{head}/param/{key}", p)
                step += 1
        assert next(events) == ["end", f"task{t}/train"]
        case.close(f"task{t}/train/loss_per_step", torch.tensor(losses))
        case.close(f"task{t}/train/lr_per_step", torch.tensor(rates, dtype=torch.float64))
        leaks = [(s.kept_u.T @ s.u).norm() / s.u.norm() for _, _, s in strategy.parts()]
        if f"task{t}/leak_U" in case.data:
            case.close(f"task{t}/leak_U", torch.stack(leaks).detach())
        else:
            assert max(leaks) < 5e-6
        strategy.end_task(now)
        for layer, module, _ in strategy.parts():
            case.close(f"task{t}/merged_weight/{layer}", module.weight)
        case.close(f"task{t}/head_after/weight", strategy.head.weight)
        case.close(f"task{t}/head_after/bias", strategy.head.bias)
        test = images("test", case[f"task{t}/test_indices"])
        scores = strategy.predict(test.x)
        case.close(f"task{t}/test_logits", scores)
        right = 100 * (scores.argmax(1) == test.y).float().mean()
        assert right.item() == pytest.approx(next(events)[2], abs=0.01)
    print(f"worst share of the tolerance, {name}: {case.worst:.3f}")


# ------------------------------------------------------------------------------ behaviour


def test_gradients_of_the_factors_are_those_of_the_rebuilt_weight():
    strategy = osf(kept=0.25)
    now = task(0, range(0, 3))
    strategy.begin_task(now)
    batch = next(now.train(0))
    strategy.gradients(batch)
    for name, layer, split in strategy.parts():
        mine = [p.grad.clone() for p in (split.u, split.s, split.v)]
        parts = [p.detach().clone().requires_grad_() for p in (split.u, split.s, split.v)]
        u, s, v = parts
        rebuilt = split.kept_u * split.kept_s @ split.kept_v + u * s @ v
        state = {f"net.{name}.weight": rebuilt}
        features = torch.func.functional_call(Features(strategy), state, (batch.x,))
        loss = torch.nn.functional.cross_entropy(strategy.head(features)[:, :3], batch.y)
        want = [*torch.autograd.grad(loss, parts)]
        want[0] -= split.kept_u @ split.kept_u.T @ want[0]
        want[2] -= want[2] @ split.kept_v.T @ split.kept_v
        for a, b in zip(mine, want, strict=True):
            assert torch.allclose(a, b, atol=1e-6 + 1e-4 * b.abs().max().item())
        assert layer.weight.grad is None


class Features(torch.nn.Module):
    """The backbone's features as a module of their own."""

    def __init__(self, strategy: OSF) -> None:
        super().__init__()
        self.net, self.one = strategy.backbone.net, [strategy.backbone]

    def forward(self, x: Tensor) -> Tensor:
        return self.one[0].features(x)


def test_projected_steps_keep_adam_out_of_kept_directions():
    leaks = {}
    for project in ("gradient", "step"):
        strategy = osf(project=project, optim={"lr": 1e-3})
        now = task(0, range(0, 3))
        strategy.begin_task(now)
        high = [s.kept_u * s.kept_s @ s.kept_v for _, _, s in strategy.parts()]
        for _ in range(3):
            strategy.observe(next(now.train(0)))
        splits = [s for _, _, s in strategy.parts()]
        leaks[project] = max((s.kept_u.T @ s.u).norm() / s.u.norm() for s in splits)
        for want, (_, layer, s) in zip(high, strategy.parts(), strict=True):
            assert torch.equal(layer.weight, s.weight())
            if project == "step":  # what was known of the weight is still there
                kept = s.kept_u @ (s.kept_u.T @ layer.weight @ s.kept_v.T) @ s.kept_v
                assert torch.allclose(kept, want, atol=1e-5)
    assert leaks["step"] < 1e-6 < 1e-3 < leaks["gradient"]


def test_only_the_named_weights_learn_and_factors_end_with_the_task():
    strategy = osf(layers=["blocks.*.mlp.fc1"], optim={"lr": 1e-3})
    before = {k: v.clone() for k, v in strategy.backbone.state_dict().items()}
    now = task(0, range(0, 3))
    strategy.begin_task(now)
    during = sum(v.numel() for v in strategy.snapshot()["tensors"].values())
    strategy.observe(next(now.train(0)))
    strategy.end_task(now)
    after = strategy.backbone.state_dict()
    moved = {k for k, v in before.items() if not torch.equal(after[k], v)}
    assert moved == {f"net.blocks.{i}.mlp.fc1.weight" for i in range(2)}
    state = strategy.snapshot()["tensors"]
    held = sum(v.numel() for v in state.values())
    assert held == sum(v.numel() for k, v in state.items() if "splits" not in k) < during / 2
    later = task(1, range(3, 5))
    strategy.begin_task(later)
    strategy.observe(next(later.train(0)))


def test_bad_input_is_named():
    for options, text in (
        ({"kept": 1.0}, r"strategy\.kept"),
        ({"kept": [0.5, 1.0]}, r"strategy\.kept"),
        ({"layers": ["blocks.*.mlp.fc3"]}, r"strategy\.layers: .*'blocks\.\*\.mlp\.fc3'; it has"),
    ):
        with pytest.raises(UserError, match=text):
            osf(**options)
    strategy = osf()
    now = task(0, range(0, 2))
    strategy.begin_task(now)
    batch = next(now.train(0))
    before = {k: v.clone() for k, v in strategy.state_dict().items()}
    with pytest.raises(Diverged, match=r"strategy\.optim\.lr"):
        strategy.observe(batch._replace(x=batch.x * torch.nan))
    assert all(torch.equal(v, before[k]) for k, v in strategy.state_dict().items())
