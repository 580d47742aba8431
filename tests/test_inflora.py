"""InfLoRA: recorded runs; where its updates act; subspaces that earlier tasks used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import strategy_node
from golden_cl_case import ClCase, images
from golden_cl_case import backbone as recorded_backbone
from torch import nn

from driftline.cl.inflora import InfLoRA
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError
from driftline.core.seed import generator
from driftline.core.stream import Batch, Task
from driftline.parts.subspace import Subspace, input_moments, root


def inflora(kind: str = "driftline.cl.inflora.InfLoRA", **options: Any) -> Any:
    node = strategy_node("inflora", **{"epochs": 1, "rank": 3} | options) | {"_target_": kind}
    return build(node, at="strategy", backbone=recorded_backbone(), seed=3, num_classes=10)


def task(index: int, classes: range, per_class: int = 4) -> Task:
    """Random images, one batch."""
    y = torch.arange(classes.start, classes.stop).repeat_interleave(per_class)
    x = torch.rand(len(y), 3, 32, 32, generator=generator(7, "x", index))
    batch = Batch(x, y, torch.arange(len(y)), torch.zeros_like(y))

    def train(epoch: int, start: int = 0) -> Any:
        yield from [batch][start:]

    fixed = lambda: iter([batch])  # noqa: E731
    return Task(index, f"t{index}", classes, 1, train, fixed, fixed)


def learn(strategy: InfLoRA, now: Task) -> None:
    strategy.begin_task(now)
    for epoch in range(strategy.epochs):
        strategy.begin_epoch(now, epoch)
        for batch in now.train(epoch):
            strategy.observe(batch)
    strategy.end_task(now)


# ------------------------------------------------------------------------------ recorded numbers


def close(case: ClCase, strategy: InfLoRA, t: int, head: str, *, grad: bool = False) -> None:
    """Compare what learns in task `t`, or its gradient, with the arrays under `head`.

    The rows of A are defined up to their signs, and with them the columns of B.
    """
    value = (lambda p: p.grad) if grad else (lambda p: p)
    rank = strategy.rank
    for block, lora in enumerate(strategy.loras):
        mine = lora.down[-rank:]
        signs = (mine * case[f"task{t}/lora_A/block{block}"]).sum(1).sign()
        for i, part in enumerate("kv"):
            name = f"{head}/image_encoder.blocks.{block}.attn.lora_B_{part}.{t}.weight"
            case.close(name, value(lora.up)[i] * signs)
    own = strategy.columns
    case.close(f"{head}/classifier_pool.{t}.weight", value(strategy.head.weight)[own])
    case.close(f"{head}/classifier_pool.{t}.bias", value(strategy.head.bias)[own])
    if grad:
        assert not value(strategy.head.weight)[: own.start].any()


class Recording(InfLoRA):
    """Keeps the moments that it measures and the matrices whose directions it takes."""

    def measure(self, task: Task, epoch: int) -> Any:
        self.measured = super().measure(task, epoch)
        self.designs: list[torch.Tensor] = []
        return self.measured

    def directions(self, space: Subspace, moment: torch.Tensor) -> torch.Tensor:
        self.designs.append(space.free_part(moment))
        return super().directions(space, moment)


@pytest.mark.usefixtures("gradients_stay")
@pytest.mark.parametrize(
    "name, evaluation", [("inflora_run", "branches"), ("inflora_run_adam", "merged")]
)
def test_run_as_recorded(name, evaluation):
    case = ClCase(f"inflora/{name}")
    h = case.hyper
    sizes = h["task_sizes"]
    assert (h["epochs"], h["lrate"], h["weight_decay"]) == (h["init_epoch"], h["init_lr"], 0)
    sgd = h["optim"] == "sgd"
    strategy = inflora(
        f"{__name__}.Recording",
        epochs=h["epochs"],
        rank=h["rank"],
        share=h["lamb"],
        last_share=h["lame"],
        tasks=h["total_sessions"],
        evaluation=evaluation,
        optim={
            "kind": h["optim"],
            "lr": h["lrate"],
            "momentum": 0.9 if sgd else 0.0,
            "schedule": "cosine" if sgd else "quarter_cosine",
        },
    )
    events = iter(case.info["events"])

    def next_pass() -> Any:
        return next(e for e in events if e[0] == "pass")[2]

    def train(epoch: int, start: int = 0) -> Iterator[Batch]:
        for rows in next_pass():
            yield images("train", rows)

    for t in range(len(sizes)):
        now = replace(case.task(t, sizes), train=train)
        strategy.begin_task(now)
        with torch.no_grad():
            head = f"task{t}/before_training/classifier_pool.{t}"
            bound = 32**-0.5
            for p, part in ((strategy.head.weight, "weight"), (strategy.head.bias, "bias")):
                assert 0 < p[now.classes].abs().max() <= bound
                p[now.classes] = case[f"{head}.{part}"]
        close(case, strategy, t, f"task{t}/before_training")
        for block, lora in enumerate(strategy.loras):
            case.close(f"task{t}/design_matrix/block{block}", strategy.designs[block])
            mine, recorded = lora.down[-h["rank"] :], case[f"task{t}/lora_A/block{block}"]
            signs = (mine * recorded).sum(1, keepdim=True).sign()
            case.close(f"task{t}/lora_A/block{block}", mine * signs)

        losses, rates, step = [], [], 0
        for epoch in range(strategy.epochs):
            strategy.begin_epoch(now, epoch)
            for batch in now.train(epoch):
                losses.append(strategy.observe(batch)["loss"].item())
                rates.append([strategy.optimizer.param_groups[0]["lr"]])
                if step < 2:
                    close(case, strategy, t, f"task{t}/train/step{step}/grad", grad=True)
                    close(case, strategy, t, f"task{t}/train/step{step}/param")
                step += 1
        case.close(f"task{t}/train/loss_per_step", torch.tensor(losses))
        case.close(f"task{t}/train/lr_per_step", torch.tensor(rates, dtype=torch.float64))
        close(case, strategy, t, f"task{t}/after_training")
        strategy.end_task(now)
        for block, (layer, lora, space) in enumerate(strategy.parts()):
            down, up = lora.down[-h["rank"] :], lora.up
            case.close(f"task{t}/delta_k/block{block}", up[0] @ down)
            case.close(f"task{t}/delta_v/block{block}", up[1] @ down)
            case.close(f"task{t}/second_moment_after/block{block}", strategy.measured[layer])
            case.close(f"task{t}/projection/block{block}", space.basis @ space.basis.T)
            assert space.basis.shape[1] == case[f"task{t}/basis_size"][block]
            assert space.inverse == case[f"task{t}/basis_kept_for_retain"][block]

        test = images("test", case[f"task{t}/test_indices"])
        scores = strategy.predict(test.x)
        case.close(f"task{t}/test_logits", scores)
        event = next(e for e in events if e[0] == "accuracy")
        right = 100 * (scores.argmax(1) == test.y).float().mean()
        assert right.item() == pytest.approx(event[2], abs=0.01)
    print(f"worst share of the tolerance, {name}: {case.worst:.3f}")


# ------------------------------------------------------------------------------ updates


def test_a_task_learns_where_earlier_ones_have_not_been():
    strategy = inflora(share=0.995, optim={"lr": 0.01})
    learn(strategy, task(0, range(0, 3)))
    assert strategy.tasks == 4
    spaces = [(space.basis.clone(), lora.down.clone()) for _, lora, space in strategy.parts()]
    learn(strategy, task(1, range(3, 5)))
    for (used, first), (_, lora, space) in zip(spaces, strategy.parts(), strict=True):
        assert used.shape[1] >= 1 and space.free < 32 - used.shape[1]
        new = lora.down[3:]
        assert torch.equal(lora.down[:3], first) and not lora.down.requires_grad
        assert torch.allclose(new @ new.T, torch.eye(3) / 3, atol=1e-5)
        assert (new @ used).abs().max() < 1e-5
        assert lora.up.any() and lora.old_up.any() and not lora.delta()[:32].any()


def test_where_nothing_is_left_is_said_or_left_alone():
    strategy = inflora(share=1.0)
    learn(strategy, task(0, range(0, 3)))
    second = task(1, range(3, 5))
    with pytest.raises(UserError, match=r"task 1: .* of blocks\.0\.attn\.qkv, .*no_space=less"):
        strategy.begin_task(second)
    strategy = inflora(share=1.0, no_space="less")
    for now, left in ((task(0, range(0, 3)), 32), (second, 1), (task(2, range(5, 7)), 0)):
        assert [space.free for _, _, space in strategy.parts()] == [left] * 2
        with pytest.warns(UserWarning) if left < 32 else nullcontext() as warned:
            learn(strategy, now)
        text = {1: "leave 1 directions.*that are left", 0: "leave 0 directions.*learns nothing"}
        assert left == 32 or re.search(text[left], str(warned[0].message))
        for lora in strategy.loras:
            assert lora.down[-3:].any(1).sum() == min(left, 3)
            assert lora.up.any() == (left > 0)
    assert strategy.predict(next(second.fit()).x).isfinite().all()


def test_bad_input_is_named():
    with pytest.raises(UserError, match=r"strategy\.rank=33.*at most 32"):
        inflora(rank=33)
    with pytest.raises(UserError, match="share"):
        inflora(share=1.5)
    strategy = inflora(rank=20)
    now = task(0, range(0, 1), per_class=1)  # 17 tokens
    with pytest.warns(UserWarning, match="one class"):
        learn(strategy, now)
    assert all(lora.down.any(1).sum() == 17 for lora in strategy.loras)
    broken = next(now.fit())
    with pytest.raises(Diverged, match="lr"):
        strategy.observe(broken._replace(x=broken.x * torch.nan))


# ------------------------------------------------------------------------------ subspaces


def test_what_a_task_used_is_no_longer_free_and_may_become_nothing():
    draws = generator(5, "inputs")
    for dual in (True, False):
        subspace = Subspace(6, dual=dual)
        free = [subspace.free]
        for _ in range(5):
            inputs = torch.randn(6, 2, generator=draws, dtype=torch.float64)
            subspace.add(inputs, 0.999999)
            subspace.add(inputs, 0.999999)  # of the first pair, one is left out the first time
            free.append(subspace.free)
            left = subspace.free_part(torch.eye(6, dtype=torch.float64))
            assert torch.allclose(left @ left, left, atol=1e-6)
            assert left.trace().item() == pytest.approx(subspace.free, abs=1e-5)
            assert subspace.free_part(inputs).norm() < 2e-3 * inputs.norm()
            assert subspace.inverse == (dual and subspace.free < 3)
        assert free == [6, 4, 2, 0, 0, 0]
    subspace = Subspace(6)
    subspace.add(torch.zeros(6, 6), 0.9)  # no inputs
    assert subspace.free == 6


def test_moments_of_inputs_and_their_root():
    layer = nn.Linear(4, 3)
    x = torch.randn(5, 7, 4, generator=generator(5, "x"))
    with input_moments({"layer": layer}) as moments:
        for part in x.split(2):
            layer(part)
    layer(x)  # is not counted
    rows = x.flatten(0, 1).double()
    mean = moments["layer"].mean()
    assert torch.allclose(mean, rows.T @ rows / 35, atol=1e-7)
    of_inputs = torch.linalg.svdvals(rows.T) / 35**0.5
    assert torch.allclose(torch.linalg.svdvals(root(mean)), of_inputs)
    assert torch.allclose(root(mean) @ root(mean).T, mean)
    bad = pytest.raises(Diverged, match="layer gets inputs that are not finite")
    with bad, input_moments({"layer": layer}):
        layer(x * torch.nan)
