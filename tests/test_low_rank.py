"""SD-LoRA: its recorded run; norms of finished pairs, magnitudes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import strategy_node
from golden_cl_case import ClCase, images
from golden_cl_case import backbone as recorded_backbone

from driftline.backbones.backbone import Backbone
from driftline.cl.sdlora import SDLoRA
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError
from driftline.core.seed import generator
from driftline.core.stream import Batch, Task


def sdlora(net: Backbone | None = None, **options: Any) -> SDLoRA:
    node = strategy_node("sdlora", **{"epochs": 1, "rank": 3} | options)
    return build(node, at="strategy", backbone=net or recorded_backbone(), seed=3, num_classes=10)


def task(index: int, classes: range, per_class: int = 4) -> Task:
    """Random images, one batch."""
    y = torch.arange(classes.start, classes.stop).repeat_interleave(per_class)
    x = torch.rand(len(y), 3, 32, 32, generator=generator(7, "x", index))
    batch = Batch(x, y, torch.arange(len(y)), torch.zeros_like(y))

    def train(epoch: int, start: int = 0) -> Any:
        yield from [batch][start:]

    fixed = lambda: iter([batch])  # noqa: E731
    return Task(index, f"t{index}", classes, 1, train, fixed, fixed)


def learn(strategy: SDLoRA, now: Task) -> None:
    strategy.begin_task(now)
    for epoch in range(strategy.epochs):
        strategy.begin_epoch(now, epoch)
        for batch in now.train(epoch):
            strategy.observe(batch)
    strategy.end_task(now)


X = torch.rand(5, 3, 32, 32, generator=generator(1, "test"))


# ------------------------------------------------------------------------------ recorded numbers


def close_sdlora(case: ClCase, strategy: SDLoRA, head: str, *, grad: bool = False) -> None:
    """Compare everything that learns, or its gradient, with the arrays under `head`."""
    value = (lambda p: p.grad) if grad else (lambda p: p)
    for block, lora in enumerate(strategy.loras):
        for i, part in enumerate("qv"):
            name = f"{head}/backbone.lora_vit.blocks.{block}.attn.qkv.linear"
            case.close(f"{name}_a_{part}.weight", value(lora.a)[i])
            case.close(f"{name}_b_{part}.weight", value(lora.b)[i])
    *old, new = value(strategy.magnitudes).split(1)
    case.close(f"{head}/backbone.wrapped_param.0.param", new)
    for i, one in enumerate(old):
        case.close(f"{head}/backbone.wrapped_param_prev.{i}.param", one)
    case.close(f"{head}/fc.weight", value(strategy.head.weight))
    case.close(f"{head}/fc.bias", value(strategy.head.bias))


@pytest.mark.usefixtures("gradients_stay")
@pytest.mark.parametrize("evaluation", ["branches", "merged"])
def test_sdlora_run_as_recorded(evaluation):
    case = ClCase("sdlora/sdlora_run")
    h, sizes = case.hyper, case.hyper["task_sizes"]
    assert (h["optimizer"], h["weight_decay"]) == ("sgd", 0)
    strategy = sdlora(
        epochs=h["epochs"],
        rank=h["rank"],
        magnitude=h["initial_magnitude"],
        optim={
            "lr": h["init_lr"],
            "momentum": h["momentum"],
            "schedule": "steps",
            "milestones": h["milestones"],
            "decay": h["lrate_decay"],
            "later": {"lr": h["lrate"]},
        },
        evaluation=evaluation,
    )
    events = iter(case.info["events"])
    for t in range(3):
        now = case.task(t, sizes)
        strategy.begin_task(now)
        before = f"task{t}/before_training"
        with torch.no_grad():
            for block, lora in enumerate(strategy.loras):
                name = f"{before}/backbone.lora_vit.blocks.{block}.attn.qkv.linear_a"
                for i, part in enumerate("qv"):
                    lora.a[i] = case[f"{name}_{part}.weight"]
            strategy.head.weight[now.classes] = case[f"{before}/fc.weight"][now.classes]
        close_sdlora(case, strategy, before)

        losses, rates, step = [], [], 0
        assert next(events) == ["phase", f"task{t}/train"]
        for epoch in range(strategy.epochs):
            strategy.begin_epoch(now, epoch)
            for rows in next(events)[2]:
                losses.append(strategy.observe(images("train", rows))["loss"].item())
                rates.append([strategy.optimizer.param_groups[0]["lr"]])
                if step < 2:
                    close_sdlora(case, strategy, f"task{t}/train/step{step}/grad", grad=True)
                    close_sdlora(case, strategy, f"task{t}/train/step{step}/param")
                step += 1
        assert next(events) == ["end", f"task{t}/train"]
        strategy.end_task(now)
        case.close(f"task{t}/train/loss_per_step", torch.tensor(losses))
        case.close(f"task{t}/train/lr_per_step", torch.tensor(rates, dtype=torch.float64))
        close_sdlora(case, strategy, f"task{t}/after_training")

        test = images("test", case[f"task{t}/test_indices"])
        with torch.no_grad():
            case.close(f"task{t}/test_features", strategy.bank.features(test.x, "all"))
        scores = strategy.predict(test.x)
        case.close(f"task{t}/test_logits", scores)
        assert next(events)[0] == "pass"
        right = 100 * (scores.argmax(1) == test.y).float().mean()
        assert right.item() == pytest.approx(next(events)[2], abs=0.01)
    print(f"worst share of the tolerance, sdlora_run {evaluation}: {case.worst:.3f}")


# ------------------------------------------------------------------------------ SD-LoRA


def test_finished_pairs_have_unit_norm_and_only_their_magnitudes_learn():
    strategy = sdlora(epochs=2, optim={"lr": 0.05})
    learn(strategy, task(0, range(0, 3)))
    learned = strategy.magnitudes.detach().clone()
    assert learned.shape == (1,) and learned != 0.8
    strategy.begin_task(task(1, range(3, 5)))
    before = [(lora.old_a, lora.old_b) for lora in strategy.loras]
    for old in sum(before, ()):
        assert torch.allclose(torch.linalg.vector_norm(old, dim=(1, 2)), torch.ones(2))
    for _ in range(2):  # in the first step the new B is 0
        strategy.observe(next(task(1, range(3, 5)).train(0)))
    assert all(m is strategy.magnitudes for m in (lora.magnitudes for lora in strategy.loras))
    assert (strategy.magnitudes != 0.8).all()
    for lora, (a, b) in zip(strategy.loras, before, strict=True):
        assert lora.old_a is a and lora.old_b is b


def test_magnitudes_start_again_or_go_on():
    for restart in (True, False):
        strategy = sdlora(restart=restart, epochs=2, optim={"lr": 0.05})
        learn(strategy, task(0, range(0, 3)))
        learned = strategy.magnitudes.item()
        strategy.begin_task(task(1, range(3, 5)))
        first = 0.8 if restart else learned
        assert strategy.magnitudes.tolist() == pytest.approx([first, 0.8])


def test_a_pair_that_learned_nothing_adds_nothing():
    """One class: no gradient, so B stays 0; the official code divides it by its norm."""
    strategy = sdlora()
    with pytest.warns(UserWarning, match="one class"):
        learn(strategy, task(0, range(0, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn(strategy, task(1, range(1, 4)))
        learn(strategy, task(2, range(4, 5)))  # said once
    assert not any(lora.old_b[:, :, :3].any() for lora in strategy.loras)
    assert strategy.predict(X).isfinite().all() and strategy.predict(X).shape == (5, 5)


def test_sdlora_bad_input_is_named():
    for options, text in (
        ({"rank": 0}, "strategy.rank"),
        ({"magnitude": 0.0}, "strategy.magnitude"),
        ({"optim": {"rates": {"pairs": 0.1}}}, "pairs"),
    ):
        with pytest.raises(UserError, match=text):
            sdlora(**options).begin_task(task(0, range(0, 2)))
    strategy = sdlora()
    strategy.begin_task(task(0, range(0, 2)))
    batch = next(task(0, range(0, 2)).train(0))
    before = {k: v.clone() for k, v in strategy.state_dict().items()}
    with pytest.raises(Diverged, match=r"strategy\.optim\.lr"):
        strategy.observe(batch._replace(x=batch.x * torch.nan))
    assert all(torch.equal(v, before[k]) for k, v in strategy.state_dict().items())
