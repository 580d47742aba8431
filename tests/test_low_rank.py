"""SD-LoRA and CL-LoRA: recorded runs; norms and magnitudes; shared and own adapters, two steps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import strategy_node
from golden_cl_case import ClCase, images
from golden_cl_case import backbone as recorded_backbone

from driftline.backbones.backbone import Backbone
from driftline.cl.cllora import CLLoRA, row_weights
from driftline.cl.sdlora import SDLoRA
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError
from driftline.core.seed import generator
from driftline.core.stream import Batch, Task


def sdlora(net: Backbone | None = None, **options: Any) -> SDLoRA:
    node = strategy_node("sdlora", **{"epochs": 1, "rank": 3} | options)
    return build(node, at="strategy", backbone=net or recorded_backbone(), seed=3, num_classes=10)


def cllora(net: Backbone | None = None, **options: Any) -> CLLoRA:
    node = strategy_node("cllora", **{"epochs": 1, "rank": 4} | options)
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


def learn(strategy: SDLoRA | CLLoRA, now: Task) -> None:
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


# ------------------------------------------------------------------------------ CL-LoRA


def cllora_tensors(strategy: CLLoRA) -> dict[str, tuple[torch.Tensor, Any]]:
    """Recorded name -> what learns, and which part of it."""
    (general,), (own,) = strategy.loras("general"), strategy.loras(strategy.names[-1])
    named: dict[str, tuple[torch.Tensor, Any]] = {
        "backbone.block_weight": (own.weights, (slice(None), None)),
        "proxy_fc.weight": (strategy.head.weight, ...),
        "proxy_fc.sigma": (strategy.head.sigma, ...),
    }
    for i, part in enumerate((0, 2)):  # q, v
        named[f"backbone.cur_adapter.0.{part}.lora_A.weight"] = (general.up, i)
        named[f"backbone.cur_adapter.1.{part}.lora_A.weight"] = (own.up, i)
        named[f"backbone.cur_adapter.1.{part}.lora_B.weight"] = (own.down, i)
    return named


def start_cllora(case: ClCase, strategy: CLLoRA, t: int) -> None:
    (general,), (own,) = strategy.loras("general"), strategy.loras(strategy.names[-1])
    for down in (general.down, own.down):
        assert torch.allclose(down @ down.mT, torch.eye(4).expand(2, 4, 4), atol=1e-5)
    head = f"task{t}/before_training"
    assert own.weights.min() >= 0.5 and own.weights.max() <= 1.5
    with torch.no_grad():
        for i, part in enumerate((0, 2)):
            if t == 0:
                frozen = case[f"task0/frozen_start/backbone.cur_adapter.0.{part}.lora_B.weight"]
                general.down[i] = frozen
            own.down[i] = case[f"{head}/backbone.cur_adapter.1.{part}.lora_B.weight"]
        own.weights.copy_(case[f"{head}/backbone.block_weight"][:, 0])
        strategy.head.weight.copy_(case[f"{head}/proxy_fc.weight"])
    for name, (tensor, at) in cllora_tensors(strategy).items():
        case.close(f"{head}/{name}", tensor[at])


def recorded_cllora(case: ClCase, **options: Any) -> CLLoRA:
    h = case.hyper
    settings = {
        "epochs": h["init_epochs"],
        "rank": h["rank"],
        "general": len(h["general_blocks"]),
        "distillation": h["kd_weight"],
        "temperature": h["kd_temperature"],
        "apart": h["orthogonality_weight"],
        "optim": {
            "lr": h["init_lr"],
            "momentum": h["momentum"],
            "weight_decay": h["weight_decay"],
            "later": {"lr": h["later_lr"]},
        },
    }
    return cllora(**settings | options)


def test_cllora_run_as_recorded(monkeypatch):
    case = ClCase("cllora/cllora_run")
    strategy, sizes = recorded_cllora(case), case.hyper["task_sizes"]
    events = iter(case.info["events"])
    logged: list[tuple[float, float]] = []  # loss and rate of every optimiser step of a task
    t = 0

    def compare(what: str) -> None:
        step = len(logged) - 1
        for name, (tensor, at) in cllora_tensors(strategy).items():
            key = f"task{t}/train/step{step}/{what}/{name}"
            value = tensor.grad if what == "grad" else tensor
            if key in case.data and value is not None:
                case.close(key, value[at])
                compared.add(key)

    compared: set[str] = set()
    optim = type(strategy.optim)
    backward, update = optim.backward, optim.update

    def spy_backward(self, optimizer, loss):
        backward(self, optimizer, loss)
        logged.append((loss.item(), optimizer.param_groups[0]["lr"]))

    def spy_update(self, optimizer, again=None):
        compare("grad")
        update(self, optimizer, again)
        compare("param")

    monkeypatch.setattr(optim, "backward", spy_backward)
    monkeypatch.setattr(optim, "update", spy_update)
    for t in range(3):
        now = case.task(t, sizes)
        strategy.begin_task(now)
        start_cllora(case, strategy, t)
        logged.clear()
        assert next(events) == ["phase", f"task{t}/train"]
        for epoch in range(strategy.epochs):
            strategy.begin_epoch(now, epoch)
            for rows in next(events)[2]:
                strategy.observe(images("train", rows))
        assert next(events) == ["end", f"task{t}/train"]
        losses, rates = zip(*logged, strict=True)
        case.close(f"task{t}/train/loss_per_step", torch.tensor(losses))
        case.close(f"task{t}/train/lr_per_step", torch.tensor(rates, dtype=torch.float64)[:, None])
        for name, (tensor, at) in cllora_tensors(strategy).items():
            case.close(f"task{t}/after_training/{name}", tensor[at])
        strategy.end_task(now)
        means = []  # the official code has them in the subspaces of earlier tasks too
        for name in strategy.names:
            batches = list(now.fit())
            found = torch.cat([strategy.subspace(b.x, name) for b in batches])
            y = torch.cat([b.y for b in batches])
            means.append(torch.stack([found[y == c].mean(0) for c in now.classes]))
        case.close(f"task{t}/prototypes_new", torch.cat(means, 1))
        own = strategy.prototypes.weight[now.classes.start :]
        assert torch.allclose(own, means[-1], atol=1e-5)
        test = images("test", case[f"task{t}/test_indices"])
        sets = [strategy.subspace(test.x, name) for name in strategy.names]
        case.close(f"task{t}/test_features", torch.cat(sets, 1))
        scores = strategy.predict(test.x)
        case.close(f"task{t}/test_logits", scores)
        event = next(e for e in events if e[0] == "accuracy")
        right = 100 * (scores.argmax(1) == test.y).float().mean()
        assert right.item() == pytest.approx(event[2], abs=0.01)
    assert len(compared) == sum("/train/step" in key for key in case.data)
    print(f"worst share of the tolerance, cllora_run: {case.worst:.3f}")


def test_the_two_gradients_differ_from_the_second_task_on():
    states = {}
    for choice in ("stale", "fresh"):
        strategy = cllora(second_gradient=choice, optim={"lr": 0.05})
        learn(strategy, task(0, range(0, 3)))
        first = strategy.loras("general")[0].up.detach().clone()
        second = task(1, range(3, 6))
        strategy.begin_task(second)
        for _ in range(2):  # in the first step student and teacher are equal
            out = strategy.observe(next(second.train(0)))
        assert out["distillation"] > 0
        states[choice] = first, strategy.loras("general")[0].up.detach().clone()
    (first, stale), (same, fresh) = states.values()
    assert torch.equal(first, same) and not torch.equal(stale, fresh)


def test_a_class_is_scored_in_the_subspace_of_its_task_alone():
    strategy = cllora(optim={"lr": 0.05})
    tasks = [task(0, range(0, 3)), task(1, range(3, 5))]
    downs = [lora.down.clone() for lora in strategy.loras("general")]
    learn(strategy, tasks[0])
    old = {k: v.clone() for k, v in strategy.bank.sets["task0"].state_dict().items()}
    learn(strategy, tasks[1])
    assert all(torch.equal(strategy.bank.sets["task0"].state_dict()[k], v) for k, v in old.items())
    for lora, down in zip(strategy.loras("general"), downs, strict=True):
        assert torch.equal(lora.down, down) and lora.up.any()
    means = strategy.prototypes.weight
    for name, now in zip(strategy.names, tasks, strict=True):
        want = torch.cosine_similarity(
            strategy.subspace(X, name)[:, None], means[now.classes], dim=2
        )
        assert torch.allclose(strategy.predict(X)[:, now.classes], want, atol=1e-6)
    with pytest.warns(UserWarning, match="one class"):
        learn(strategy, task(2, range(1, 2)))  # a class that comes back
    assert strategy.owner.tolist() == [0, 2, 0, 1, 1]


def test_row_weights_have_mean_1_and_are_1_where_nothing_was_learned():
    up = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [0.0, 0.0]], [[0.0, 0.0]] * 3])
    assert row_weights(up)[..., 0].tolist() == [[1.5, 1.5, 0.0], [1.0, 1.0, 1.0]]


def test_cllora_bad_input_is_named():
    for options, text in (
        ({"general": 2}, r"strategy\.general=2: the network has 2 blocks"),
        ({"rank": 33}, r"strategy\.rank=33.*at most 32"),
        ({"temperature": 0.0}, r"strategy\.temperature"),
    ):
        with pytest.raises(UserError, match=text):
            cllora(**options)
    strategy = cllora()
    with pytest.warns(UserWarning, match="one class"):
        learn(strategy, task(0, range(0, 1)))
    learn(strategy, task(1, range(1, 3)))  # the up-projections of before are 0
    assert strategy.predict(X).isfinite().all()
    batch = next(task(1, range(1, 3)).train(0))
    with pytest.raises(Diverged, match=r"strategy\.optim\.lr"):
        strategy.observe(batch._replace(x=batch.x * torch.nan))
