"""LAE: recorded numbers of the modules and whole runs; freezing, averaging, resume, bad input."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from conftest import strategy_node
from golden_cl_case import ClCase, images
from golden_cl_case import backbone as recorded_backbone
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.lae import LAE
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError
from driftline.core.seed import generator
from driftline.core.stream import Batch, Task
from driftline.parts.adapters.bottleneck import Bottleneck
from driftline.parts.adapters.lora import LoRA
from driftline.parts.adapters.prefix import Prefix

PETS = {"adapter": "lae", "lora": "lae_lora", "prefix": "lae_prefix"}
SMALL = {"epochs": 3, "freeze_epochs": 1, "lr": 0.01, "ema_decay": 0.9}


def make(net: Backbone | None = None, **options: Any) -> LAE:
    size = "length" if options.get("adapter") == "lae_prefix" else "rank"
    node = strategy_node("lae", **SMALL | {size: 3 if size == "length" else 2} | options)
    return build(node, at="strategy", backbone=net or tiny(), seed=3, num_classes=8)


def tiny(**extra: Any) -> Backbone:
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options | extra)
    return Backbone(net, input_size=16)


def task(index: int, classes: range, per_class: int | list[int] = 6, batch: int = 4) -> Task:
    """Random images whose mean colour tells the class."""
    counts = [per_class] * len(classes) if isinstance(per_class, int) else per_class
    y = torch.cat([torch.full((n,), c) for c, n in zip(classes, counts, strict=True)])
    x = torch.rand(len(y), 3, 16, 16, generator=generator(7, "x", index))
    x[:, 0] = 0.5 * x[:, 0] + 0.05 * y[:, None, None]

    def pick(order: Tensor) -> Iterator[Batch]:
        for at in order.split(batch):
            yield Batch(x[at], y[at], at, torch.zeros_like(at))

    def train(epoch: int, start: int = 0) -> Iterator[Batch]:
        order = torch.randperm(len(y), generator=generator(7, "order", index, epoch))
        yield from list(pick(order))[start:]

    fixed = lambda: pick(torch.arange(len(y)))  # noqa: E731
    return Task(index, f"t{index}", classes, -(-len(y) // batch), train, fixed, fixed)


def stream() -> list[Task]:
    """Unequal tasks; the last one is a single class with a single image."""
    return [task(0, range(0, 3)), task(1, range(3, 5), [5, 2]), task(2, range(5, 6), 1)]


def learn(s: LAE, t: Task, *, begin: bool = True, epoch: int = 0, step: int = 0) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if begin:
            s.begin_task(t)
        for e in range(epoch, s.epochs):
            if step == 0:
                s.begin_epoch(t, e)
            for batch in t.train(e, step):
                s.observe(batch)
            step = 0
        s.end_task(t)


def tensors(s: LAE) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in s.state_dict().items()}


def values(s: LAE, name: str) -> list[Tensor]:
    return [p.detach().clone() for p in s.bank.parameters_of(name)]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


X = torch.rand(5, 3, 16, 16, generator=generator(1, "test"))


# ------------------------------------------------------------------------------ recorded numbers


def official(adapter: Any) -> dict[str, Tensor]:
    """Parameters of a module under their official names."""
    if isinstance(adapter, Bottleneck):
        found = {
            "layer.0.weight": adapter.down.weight,
            "layer.0.bias": adapter.down.bias,
            "layer.2.weight": adapter.up.weight,
            "layer.2.bias": adapter.up.bias,
        }
        learned = isinstance(adapter.scale, Tensor)
        return found | ({"layer.3.scale": adapter.scale} if learned else {})
    if isinstance(adapter, LoRA):
        parts = {"lora_A": adapter.a, "lora_B": adapter.b}
        found = {f"{n}.{i}": p for n, ps in parts.items() for i, p in enumerate(ps)}
        return found | {f"scale.{i}.scale": p for i, p in enumerate(adapter.scales)}
    assert isinstance(adapter, Prefix)
    found = {"key.tokens": adapter.key, "val.tokens": adapter.value}
    return found | {
        "key.scaler.scale": adapter.key_scale,
        "val.scaler.scale": adapter.value_scale,
    }


def modules(s: LAE, name: str = "online") -> Iterator[tuple[str, Tensor]]:
    for i, adapter in enumerate(s.bank.adapters(name).values()):
        for key, p in official(adapter).items():
            yield f"{i}.{key}", p


VARIANTS = {
    "adapter_parallel": {"rank": 5},
    "adapter_before": {"at": ["blocks.*.attn:in"], "rank": 5},
    "adapter_after": {"after": "skip_input", "rank": 5},
    "adapter_parallel_fixed_scale": {"scale": 0.7, "rank": 5},
    "lora": {"adapter": "lae_lora", "rank": 3},
    "prefix": {"adapter": "lae_prefix", "length": 4},
    "prefix_not_compensatory": {"adapter": "lae_prefix", "length": 4, "compensate": False},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_modules_as_recorded(variant):
    case = ClCase("lae/lae_forward")
    strategy = make(recorded_backbone(), **VARIANTS[variant])
    for key, p in modules(strategy):
        p.copy_(case[f"{variant}/pets.{key}"])
    x, seen = images("test", range(6)).x, {}
    block = strategy.backbone.net.blocks[0]
    handles = [
        block.norm1.register_forward_hook(lambda _, args, out: seen.update(norm1=out)),
        block.norm2.register_forward_pre_hook(lambda _, args: seen.update(residual=args[0])),
    ]
    case.close(f"{variant}/feature", strategy.bank.features(x, "online"))
    case.close(f"{variant}/block0_norm1_output", seen["norm1"])
    case.close(f"{variant}/block0_residual_after_attention", seen["residual"])
    for handle in handles:
        handle.remove()
    case.close("pretrained/feature", strategy.backbone.features(x))
    print(f"worst share of the tolerance, {variant}: {case.worst:.3f}")


def recorded(case: ClCase, **options: Any) -> LAE:
    h = case.hyper
    return make(
        recorded_backbone(),
        epochs=3,
        freeze_epochs=1,
        ema_decay=h["ema_decay"],
        lr=0.02,
        **options,
    )


def epochs(case: ClCase, t: int) -> list[list[list[int]]]:
    """Rows of every batch of every epoch of task t."""
    events = iter(case.info["events"])
    while next(events)[:2] != ["phase", f"task{t}/train"]:
        pass
    return [e[2] for e in iter(lambda: next(events), ["end", f"task{t}/train", []]) if len(e) > 2][
        :3
    ]


@pytest.mark.usefixtures("gradients_stay")
@pytest.mark.parametrize("pet", PETS)
def test_runs_as_recorded(pet):
    case = ClCase(f"lae/lae_run_{pet}")
    kwargs, sizes = case.hyper["pet_kwargs"], case.hyper["task_sizes"]
    size = {"length": kwargs["length"]} if pet == "prefix" else {"rank": kwargs.get("rank")}
    if pet == "adapter":
        size = {"rank": kwargs["down_sample"]}
    strategy = recorded(case, adapter=PETS[pet], **size)
    head = strategy.head

    def rows(t: int) -> slice:
        return slice(sum(sizes[:t]), sum(sizes[: t + 1]))

    def close_modules(at: str, name: str = "online", pick: str = "data") -> None:
        for key, p in modules(strategy, name):
            case.close(f"{at}{key}", getattr(p, pick))

    def close_head(at: str, t: int, pick: str = "data") -> None:
        for i in range(t + 1):
            case.close(f"{at}classifiers.{i}.weight", getattr(head.weight, pick)[rows(i)])
            case.close(f"{at}classifiers.{i}.bias", getattr(head.bias, pick)[rows(i)])

    for t in range(3):
        now = case.task(t, sizes)
        strategy.begin_task(now)
        before = f"task{t}/before_training"
        assert head.weight[rows(t)].abs().max() < 0.005 and not head.bias[rows(t)].any()
        with torch.no_grad():
            head.weight[rows(t)] = case[f"{before}/head/classifiers.{t}.weight"]
            if t == 0:
                for key, p in modules(strategy):
                    p.copy_(case[f"{before}/pets/{key}"])
            else:
                close_modules(f"{before}/ema/", "offline")
        close_modules(f"{before}/pets/")
        close_head(f"{before}/head/", t)

        losses, step = [], 0
        for epoch, batches in enumerate(epochs(case, t)):
            strategy.begin_epoch(now, epoch)
            for batch in batches:
                losses.append(strategy.observe(images("train", batch))["loss"])
                at = f"task{t}/train/step{step}"
                frozen = t > 0 and epoch == 0
                if step < 2:
                    close_head(f"{at}/grad/head.", t, "grad")
                    close_head(f"{at}/param/head.", t)
                    if frozen:
                        assert all(p.grad is None for _, p in modules(strategy))
                    else:
                        close_modules(f"{at}/grad/pets.", pick="grad")
                        close_modules(f"{at}/param/pets.")
                for name, group in (("online", "pets_after"), ("offline", "ema_after")):
                    if any(k.startswith(f"{at}/{group}/") for k in case.data):
                        close_modules(f"{at}/{group}/", name)
                step += 1
        strategy.end_task(now)
        case.close(f"task{t}/train/loss_per_step", torch.stack(losses))
        close_modules(f"task{t}/after_training/pets/")
        close_head(f"task{t}/after_training/head/", t)
        x = images("test", case[f"task{t}/test_indices"]).x
        with torch.no_grad():
            case.close(f"task{t}/test_feature_online", strategy.bank.features(x, "online"))
            logits = {n: head(strategy.bank.features(x, n)) for n in strategy.bank.sets}
        case.close(f"task{t}/test_logits_online", logits["online"])
        if t:
            close_modules(f"task{t}/after_training/ema/", "offline")
            case.close(f"task{t}/test_logits_offline", logits["offline"])
        case.close(f"task{t}/test_ensemble", strategy.predict(x))
    print(f"worst share of the tolerance, lae_run_{pet}: {case.worst:.3f}")


@pytest.mark.usefixtures("gradients_stay")
def test_the_port_of_pilot_is_two_options_away():
    """`freeze_first_task` and `ema_start=init`; its prefix is the one module that works there."""
    case = ClCase("lae/lae_port_prefix")
    sizes = case.hyper["task_sizes"]
    port = {"freeze_first_task": True, "ema_start": "init"}
    strategy = recorded(case, adapter="lae_prefix", length=4, **port)
    head = strategy.head
    for t in range(3):
        now = case.task(t, sizes)
        strategy.begin_task(now)
        with torch.no_grad():
            if t == 0:
                for name in ("online", "offline"):
                    for key, p in modules(strategy, name):
                        p.copy_(case[f"task0/initial_pets/{key}"])
            new = slice(sum(sizes[:t]), None)
            head.weight[new] = case[f"task{t}/before_training/fc.weight"][new]
        case.close(f"task{t}/before_training/fc.weight", head.weight)
        case.close(f"task{t}/before_training/fc.bias", head.bias)
        losses: list[Tensor] = []
        for epoch, batches in enumerate(epochs(case, t)):
            strategy.begin_epoch(now, epoch)
            for batch in batches:
                losses.append(strategy.observe(images("train", batch))["loss"])
                if len(losses) <= 2:
                    at = f"task{t}/train/step{len(losses) - 1}"
                    assert head.weight.grad is not None and head.bias.grad is not None
                    case.close(f"{at}/grad/fc.weight", head.weight.grad)
                    case.close(f"{at}/grad/fc.bias", head.bias.grad)
                    case.close(f"{at}/param/fc.weight", head.weight)
                    case.close(f"{at}/param/fc.bias", head.bias)
        strategy.end_task(now)
        case.close(f"task{t}/train/loss_per_step", torch.stack(losses))
        for name, group in (("online", "after_training_pets"), ("offline", "after_training_ema")):
            for key, p in modules(strategy, name):
                case.close(f"task{t}/{group}/{key}", p)
        case.close(f"task{t}/fc_weight", head.weight)
        case.close(f"task{t}/fc_bias", head.bias)
        x = images("test", case[f"task{t}/test_indices"]).x
        with torch.no_grad():
            for name in ("online", "offline"):
                scores = head(strategy.bank.features(x, name))
                case.close(f"task{t}/test_logits_{name}", scores)
        case.close(f"task{t}/test_outputs", strategy.predict(x))
    print(f"worst share of the tolerance, lae_port_prefix: {case.worst:.3f}")


# ------------------------------------------------------------------------------ the method


def test_sizes_are_those_of_the_paper():
    net = Backbone(timm.create_model("vit_base_patch16_224", num_classes=0, img_size=32))
    want = {"adapter": 42_270, "lora": 76_810, "prefix": 76_810}
    for pet, count in want.items():
        strategy = make(
            net, adapter=PETS[pet], **{"length": 10} if pet == "prefix" else {"rank": 5}
        )
        assert sum(p.numel() for p in strategy.bank.parameters_of("online")) == count


@pytest.mark.parametrize("pet", PETS)
def test_offline_copy_appears_with_the_second_task_and_follows_every_step(pet):
    strategy, tasks = make(adapter=PETS[pet]), stream()
    learn(strategy, tasks[0])
    assert list(strategy.bank.sets) == ["online"]
    strategy.begin_task(tasks[1])
    start = values(strategy, "online")
    assert equal(start, values(strategy, "offline"))
    strategy.begin_epoch(tasks[1], 0)  # frozen
    for batch in tasks[1].train(0):
        strategy.observe(batch)
    assert equal(start, values(strategy, "online"))
    strategy.begin_epoch(tasks[1], 1)
    expected = values(strategy, "offline")
    for batch in tasks[1].train(1):
        if strategy.observe(batch):
            now = values(strategy, "online")
            expected = [0.9 * e + (1 - 0.9) * o for e, o in zip(expected, now, strict=True)]
    assert not equal(start, values(strategy, "online"))
    for e, p in zip(expected, values(strategy, "offline"), strict=True):
        assert torch.allclose(e, p, rtol=1e-6, atol=1e-8)


def test_frozen_epochs_cost_no_backward_pass():
    strategy, tasks = make(), stream()
    learn(strategy, tasks[0])
    strategy.begin_task(tasks[1])
    passes = strategy.backbone.passes
    for epoch, factor in ((0, 0), (1, 1)):
        strategy.begin_epoch(tasks[1], epoch)
        before = passes.backward
        strategy.observe(next(tasks[1].train(epoch)))
        assert passes.backward - before == 4 * factor


def test_earlier_classifiers_stay():
    strategy = make()
    learn(strategy, stream()[0])
    before = strategy.head.weight[:3].detach().clone()
    learn(strategy, stream()[1])
    assert torch.equal(strategy.head.weight[:3], before)
    strategy = make(loss_scope="seen")
    learn(strategy, stream()[0])
    before = strategy.head.weight[:3].detach().clone()
    learn(strategy, stream()[1])
    assert not torch.equal(strategy.head.weight[:3], before)


@pytest.mark.parametrize("pet", PETS)
def test_score_is_the_larger_of_two_probabilities(pet):
    strategy = make(adapter=PETS[pet])
    learn(strategy, stream()[0])
    assert torch.allclose(strategy.predict(X).sum(1), torch.ones(5))
    learn(strategy, stream()[1])
    with torch.no_grad():
        each = {
            n: strategy.head(strategy.bank.features(X, n)).softmax(1) for n in strategy.bank.sets
        }
    assert list(each) == ["online", "offline"]
    want = torch.maximum(each["online"], each["offline"])
    assert torch.allclose(strategy.predict(X), want, atol=1e-6)
    for name, alone in each.items():
        strategy.experts = name
        assert torch.allclose(strategy.predict(X), alone, atol=1e-6)


def test_last_smaller_batch_is_dropped_but_a_small_task_is_learned():
    strategy, t = make(), task(0, range(0, 2), 5)  # batches of 4, 4, 2
    strategy.begin_task(t)
    strategy.begin_epoch(t, 0)
    assert [bool(strategy.observe(b)) for b in t.train(0)] == [True, True, False]
    keeps = make(drop_last=False)
    keeps.begin_task(t)
    assert all(keeps.observe(b) for b in t.train(0))
    learn(strategy, task(1, range(2, 4), 1))  # one batch of two images
    assert strategy.head.weight[2:].abs().max() > 0.01  # Adam: 0.01 a step


def test_modules_sit_on_the_first_blocks():
    assert len(make().bank.adapters("online")) == 3  # as many as there are
    assert list(make(blocks=2).bank.adapters("online")) == [
        "blocks.0.attn:out",
        "blocks.1.attn:out",
    ]


# ------------------------------------------------------------------------------ contract


# ------------------------------------------------------------------------------ bad input


def test_bad_settings_are_named():
    for options, text in (
        ({"rank": 0}, "strategy.adapter.kind.rank"),
        ({"blocks": 0}, "strategy.adapter.blocks"),
        ({"adapter": "lae_prefix", "length": 0}, "strategy.adapter.kind.length"),
        ({"ema_decay": 1.5}, "strategy.ema_decay"),
    ):
        with pytest.raises(UserError, match=text):
            make(**options)
    for pet in PETS:
        net = Backbone(timm.create_model("test_resnet", num_classes=0), input_size=32)
        with pytest.raises(UserError, match="timm ViT"):
            make(net, adapter=PETS[pet])


def test_modules_that_never_learn_are_announced():
    with pytest.warns(UserWarning, match="freeze_epochs=3 covers all 3 epochs"):
        make(freeze_epochs=3)


def test_non_finite_loss_names_the_rate_and_changes_nothing():
    strategy = make()
    strategy.begin_task(stream()[0])
    batch = next(stream()[0].train(0))
    before = tensors(strategy)
    with pytest.raises(Diverged, match=r"strategy\.optim\.lr"):
        strategy.observe(batch._replace(x=torch.full_like(batch.x, torch.nan)))
    assert_same(before, tensors(strategy))


def test_one_class_in_the_softmax_warns_once():
    strategy = make()
    with pytest.warns(UserWarning, match="strategy.loss_scope=current"):
        strategy.begin_task(task(0, range(0, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy.begin_task(task(1, range(1, 2)))
