"""MOS against numbers recorded from sun-hailong/AAAI25-MOS 8d5e07c, and on tiny tasks."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import strategy_node
from golden_cl_case import ClCase, images
from golden_cl_case import backbone as recorded_backbone
from test_ease import learn, task, tiny
from torch import Tensor
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from driftline.backbones.backbone import Backbone
from driftline.cl.mos import CURRENT, Mos, retrieve
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError
from driftline.core.features import FeatureCache
from driftline.core.seed import generator
from driftline.core.stream import Task

CONF = Path(__file__).parents[1] / "conf" / "strategy"
CPU = torch.device("cpu")


def make(net: Backbone | None = None, **options) -> Mos:
    quick = {"rank": 4, "epochs": 2, "lr": 0.5, "align_epochs": 2, "align_samples": 8}
    node = strategy_node("mos", **quick | {"statistics_batch": 4} | options)
    return build(node, at="strategy", backbone=net or tiny(), seed=3, num_classes=10)


def stream() -> list[Task]:
    """Unequal tasks, few images, a class that the test set lacks, a task of one class."""
    return [
        task(0, range(0, 3)),
        task(1, range(3, 5), [5, 1]),
        task(2, range(5, 6), 2, tests=0),
        task(3, range(6, 10), 4),
    ]


def learned(tasks: list[Task] | None = None, **options) -> Mos:
    strategy = make(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for now in stream() if tasks is None else tasks:
            learn(strategy, now)
    return strategy


def wake(strategy: Mos, name: str, seed: int) -> None:
    """Give a set values, so that sets differ without training."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in strategy.bank.parameters_of(name):
            p.add_(torch.randn(p.shape, generator=draws) * 0.3)


# ------------------------------------------------------------------------ recorded numbers


def adapter(strategy: Mos, name: str = CURRENT, form: str = "blocks.{}.") -> dict[str, Tensor]:
    """Tensors of a set under their recorded names."""
    found = {}
    for i, a in enumerate(strategy.bank.adapters(name).values()):
        for ours, theirs in (("down", "down_proj"), ("up", "up_proj")):
            layer = getattr(a, ours)
            found[f"{form.format(i)}{theirs}.weight"] = layer.weight
            found[f"{form.format(i)}{theirs}.bias"] = layer.bias
    return found


def head(strategy: Mos, form: str = "head.") -> dict[str, Tensor]:
    return {f"{form}weight": strategy.head.weight, f"{form}bias": strategy.head.bias}


def learns(strategy: Mos) -> dict[str, Tensor]:
    """What the optimisers move, under its official name."""
    named = adapter(strategy, form="backbone.cur_adapter.{}.")
    return named | head(strategy, "backbone.head.")


@torch.no_grad()
def put(case: ClCase, base: str, into: dict[str, Tensor]) -> None:
    for key, p in into.items():
        p.copy_(case[f"{base}/{key}"])


def check(case: ClCase, base: str, got: dict[str, Tensor]) -> None:
    for key, value in got.items():
        case.close(f"{base}/{key}", value)


@pytest.mark.parametrize("name", ["mos_run", "mos_run_variance"])
def test_recorded_run(name, record_property):
    case = ClCase(f"mos/{name}")
    h = case.hyper
    strategy = make(
        recorded_backbone(),
        mode="official",
        rank=h["ffn_num"],
        dropout=0.0,
        epochs=h["tuned_epoch"],
        lr=h["init_lr"],
        weight_decay=h["weight_decay"],
        reg=h["reg"],
        pull=h["adapter_momentum"],
        ensemble=h["ensemble"],
        statistics=h["ca_storage_efficient_method"],
        statistics_batch=3 * h["batch_size"],
        align_epochs=h["crct_epochs"],
        align_lr=h["ca_lr"],
        align_samples=5 * h["batch_size"],
    )
    events = iter(case.info["events"])
    right = {e[1]: e[2] for e in case.info["events"] if e[0] == "accuracy"}
    sizes = h["task_sizes"]
    where, steps = "", defaultdict(int)  # phase, optimiser steps in it
    seen: dict[str, list] = defaultdict(list)

    def before(optimizer, *_):
        step = steps[where]
        seen[f"{where}/lr"].append([g["lr"] for g in optimizer.param_groups])
        if step < 2:
            moved = (
                learns(strategy) if where.endswith("train") else head(strategy, "backbone.head.")
            )
            for key, p in moved.items():
                case.close(f"{where}/step{step}/grad/{key}", p.grad)
            if where.endswith("train"):
                check(case, f"{where}/step{step}/adapter_at_backward", adapter(strategy))

    def after(*_):
        step = steps[where]
        if step < 2:
            moved = (
                learns(strategy) if where.endswith("train") else head(strategy, "backbone.head.")
            )
            check(case, f"{where}/step{step}/param", moved)
        steps[where] += 1

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    draws: dict[str, Iterator[Tensor]] = {}
    strategy.gaussians.draw = lambda *_: next(draws["samples"])
    strategy.gaussians.shuffle = lambda *_: next(draws["permutation"])
    align, measure = strategy.align, strategy._measure

    def aligning():
        nonlocal where
        where = f"task{t}/ca"
        check(case, f"task{t}/ca/init", head(strategy, "backbone.head."))
        draws["samples"] = iter(case[f"task{t}/ca/samples"])
        draws["permutation"] = iter(case[f"task{t}/ca/permutation"])
        case.close(f"task{t}/ca/loss_per_step", align())
        check(case, f"task{t}/after_ca", head(strategy))

    def measuring(task):
        features, y = measure(task)
        check(case, f"task{t}/current_adapter_after_class_statistics", adapter(strategy))
        spread = [strategy.gaussians.spread(features[y == c]) for c in task.classes]
        spread = torch.stack(spread).float()
        if h["ca_storage_efficient_method"] == "variance":
            spread = spread.diagonal(dim1=1, dim2=2)
        case.close(f"task{t}/class_cov", spread)
        return features, y

    embed, found = strategy.embed, []

    def embedding(x, names):
        found.append(embed(x, names))
        return found[-1]

    strategy.align, strategy._measure, strategy.embed = aligning, measuring, embedding
    try:
        for t in range(len(sizes)):
            now = case.task(t, sizes)
            strategy.begin_task(now)
            with torch.no_grad():
                if t == 0:
                    put(case, "task0/before_training/adapter", adapter(strategy))
                    put(case, "task0/before_training", head(strategy))
            check(case, f"task{t}/before_training/adapter", adapter(strategy))
            check(case, f"task{t}/before_training", head(strategy))
            where = f"task{t}/train"
            losses, epoch = [], 0
            for event in events:
                if event[0] == "end":
                    break
                if event[0] != "pass":
                    continue
                strategy.begin_epoch(now, epoch)
                epoch += 1
                for rows in event[2]:
                    step = steps[where]
                    losses.append(strategy.observe(images("train", rows))["loss"])
                    if step < 2:
                        base = f"{where}/step{step}/adapter_after_merge"
                        check(case, base, adapter(strategy))
            assert epoch == strategy.epochs
            case.close(f"{where}/loss_per_step", torch.stack(losses))
            case.close(f"{where}/lr_per_step", np.asarray(seen[f"{where}/lr"]))
            check(case, f"task{t}/after_training/adapter", adapter(strategy))
            check(case, f"task{t}/after_training", head(strategy))
            strategy.end_task(now)
            case.close(f"task{t}/class_mean", strategy.gaussians.means[now.classes.start :])
            if t:
                case.close(f"task{t}/ca/lr_per_step", np.asarray(seen[f"task{t}/ca/lr"]))
            case.close(f"task{t}/fc_prototypes", strategy.prototypes.weight)

            for k in range(t + 1):
                check(case, f"task{t}/stored_before_eval/adapter{k}", adapter(strategy, f"task{k}"))
            for event in events:
                if event[0] == "pass" and event[1].startswith("test"):
                    break
            found.clear()
            scores = []
            for rows in event[2]:
                scores.append(strategy.predict(images("test", rows).x))
            for k in range(t + 1):
                check(case, f"task{t}/stored_after_eval/adapter{k}", adapter(strategy, f"task{k}"))
            for event in events:
                if event[0] == "after_task":
                    break
            features, outputs = torch.cat(found, 1), torch.cat(scores)
            case.close(f"task{t}/test_adapter_features", features.transpose(0, 1))
            similar = strategy.prototypes(features[0])
            case.close(f"task{t}/test_orig_logits", similar)
            with torch.no_grad():
                z = strategy.head(features)[..., : now.classes.stop]
            chain = case[f"task{t}/test_retrieval_chain"]
            follow(z, similar, strategy.owner, chain)
            chosen = retrieve(z, strategy.owner[similar.argmax(1)], strategy.owner)
            case.close(f"task{t}/test_refined_logits", z[chosen, torch.arange(len(chosen))])
            case.close(f"task{t}/test_outputs", outputs)
            y = images("test", case[f"task{t}/test_indices"]).y
            accuracy = 100 * float((outputs.argmax(1) == y).float().mean())
            assert round(accuracy, 2) == right[t]
    finally:
        for handle in handles:
            handle.remove()
    record_property("worst", case.worst)


def follow(z: Tensor, similar: Tensor, owner: Tensor, chain: Tensor) -> None:
    """The set after every evaluation is the recorded one."""
    start = owner[similar.argmax(1)]
    for limit in range(1, 5):
        asked = chain[:, limit - 1]
        at = retrieve(z, start, owner, limit)
        going = (asked >= 0) & (chain[:, limit] >= 0)  # asked and answered
        assert torch.equal(at[going], asked[going]), limit
        implied = owner[z[at, torch.arange(len(at))].argmax(1)]
        assert torch.equal(implied[going], chain[going, limit]), limit
        stopped = ~going
        assert torch.equal(implied[stopped], at[stopped]), limit  # it named itself before


def test_recorded_retrieval(record_property):
    case = ClCase("mos/mos_retrieval")
    strategy = make(recorded_backbone())
    strategy.owner = torch.arange(12) // 3
    z = case["adapter_features"].transpose(0, 1) @ case["head_weight"].T + case["head_bias"]
    similar, chain = case["orig_logits"], case["retrieval_chain"]
    follow(z, similar, strategy.owner, chain)
    assert {int(n) for n in (chain >= 0).sum(1)} >= {2, 3, 5}  # the cap of four is reached
    case.close("outputs_ensemble", strategy.answer(z, similar))
    strategy.ensemble = False
    case.close("outputs_without_ensemble", strategy.answer(z, similar))
    case.close("refined_logits", strategy.answer(z, similar))
    record_property("worst", case.worst)


def test_recorded_merging(record_property):
    case = ClCase("mos/mos_merge")
    h = case.hyper
    strategy = make(
        recorded_backbone(), mode="official", rank=h["ffn_num"], pull=h["adapter_momentum"]
    ).eval()
    x = images("test", range(6)).x
    with torch.no_grad():
        case.close("no_adapter_features", strategy.bank.features(x))
        strategy.head.weight.copy_(case["head_weight"])
        strategy.head.bias.copy_(case["head_bias"])
        plain = strategy.head(strategy.bank.features(x))
        case.close("head_logits_of_no_adapter_features", plain)
    for k in range(2):
        strategy.grow(case.task(k, [4, 3, 3]))
        put(case, f"adapter{k}", adapter(strategy))
        strategy.store()
        like, at = adapter(strategy), 0
        for key, p in like.items():
            block, layer, part = key.removeprefix("blocks.").split(".")
            base = f"prefix_sum/{layer.removesuffix('_proj')}_{part}_sum/blocks.{block}/{k}"
            case.close(base, strategy.prefix[k, at : at + p.numel()].view_as(p))
            at += p.numel()
    strategy.grow(case.task(2, [4, 3, 3]))
    strategy.eval()
    put(case, "current_adapter", adapter(strategy))
    strategy.merge(CURRENT, 2)
    check(case, "current_after_one_merge", adapter(strategy))
    for call in (1, 2):
        with torch.no_grad(), strategy.merging(CURRENT, 2):
            case.close(f"train_path_features_call{call}", strategy.bank.features(x, CURRENT))
        check(case, f"current_after_train_forward_{call}", adapter(strategy))
    strategy.store()
    check(case, "stored_adapter2_at_update", adapter(strategy, "task2"))
    for call in (1, 2):
        for k in range(3):
            with torch.no_grad(), strategy.merging(f"task{k}", k):
                got = strategy.bank.features(x, f"task{k}")
            case.close(f"eval_features_call{call}/adapter{k}", got)
            check(case, f"stored_after_eval_call{call}/adapter{k}", adapter(strategy, f"task{k}"))
    strategy.grow(fourth(case))
    strategy.eval()
    put(case, "grad_unit/current_adapter_before", adapter(strategy))
    with strategy.merging(CURRENT, 3):
        features = strategy.bank.features(x, CURRENT)
        case.close("grad_unit/features", features)
        scalar = (features * case["grad_unit/loss_weights"]).sum()
        case.close("grad_unit/scalar", scalar)
        scalar.backward()
    check(case, "grad_unit/current_adapter_after_forward", adapter(strategy))
    check(case, "grad_unit/grad", {k: p.grad for k, p in adapter(strategy).items()})
    record_property("worst", case.worst)


def fourth(case: ClCase) -> Task:
    now = case.task(2, [4, 3, 3])
    return Task(3, "task 3", range(10, 10), 0, now.train, now.fit, now.test)


# ------------------------------------------------------------------------ the parts


def test_functional_mode_pulls_once_a_step_and_nowhere_else():
    strategy, tasks = learned(stream()[:1]), stream()
    strategy.begin_task(tasks[1])
    strategy.begin_epoch(tasks[1], 0)
    goal = [p.clone() for p in strategy.bank.parameters_of("task0")]
    batch, kept = next(tasks[1].train(0)), {}

    def note(*_):
        kept["stepped"] = [p.detach().clone() for p in strategy.bank.parameters_of(CURRENT)]

    handle = strategy.optimizer.register_step_post_hook(note)
    strategy.observe(batch)
    handle.remove()
    for p, stepped, m in zip(
        strategy.bank.parameters_of(CURRENT), kept["stepped"], goal, strict=True
    ):
        torch.testing.assert_close(p.detach(), 0.9 * stepped + 0.1 * m)
    before = [p.detach().clone() for p in strategy.bank.parameters_of(CURRENT)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        strategy.end_task(tasks[1])
    for name in (CURRENT, "task1"):
        assert all(map(torch.equal, strategy.bank.parameters_of(name), before))
    assert all(map(torch.equal, strategy.bank.parameters_of("task0"), goal))


def test_official_mode_pulls_in_every_pass():
    """13 pulls a step with 12 blocks: here 2 blocks, 3 pulls; and evaluation moves stored sets."""
    strategy = learned(stream()[:2], mode="official")
    assert strategy.batch_dependent and not Mos.batch_dependent
    assert strategy.extractors() is None
    stored = [p.detach().clone() for p in strategy.bank.parameters_of("task1")]
    goal = [p.detach().clone() for p in strategy.bank.parameters_of("task0")]
    strategy.predict(torch.rand(3, 3, 16, 16))
    moved = strategy.bank.parameters_of("task1")
    for p, s, m in zip(moved, stored, goal, strict=True):
        torch.testing.assert_close(p.detach(), m + 0.9**2 * (s - m))
    assert all(map(torch.equal, strategy.bank.parameters_of("task0"), goal))


def test_official_prototypes_of_later_tasks_see_dropout():
    for mode, same in (("functional", True), ("official", False)):
        strategy, found = learned(stream()[:1], mode=mode, dropout=0.5), []
        wake(strategy, "task0", 1)
        strategy.begin_task(stream()[1])
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                strategy.end_task(stream()[1])
            found.append(strategy.prototypes.weight[3:].clone())
        assert torch.equal(*found) == same
        assert not next(iter(strategy.bank.adapters("task0").values())).training


def test_drawn_features_are_those_of_a_multivariate_normal():
    x = torch.randn(50, 16, generator=generator(0, "x")) @ torch.randn(16, 16)
    for kind in ("covariance", "variance"):
        strategy = make(statistics=kind, align_samples=7)
        strategy.grow(task(0, range(0, 2)))
        strategy.gaussians.measure(range(0, 2), x, torch.arange(50) % 2)
        assert strategy.gaussians.counts.tolist() == [25, 25]
        drawn = strategy.gaussians.draw(torch.arange(2), 7, torch.Generator().manual_seed(4))
        torch.manual_seed(4)
        noise = torch.randn(2, 7, 16)
        for c in range(2):
            own = x[c::2].double()
            spread = own.T.cov() + 1e-4 * torch.eye(16)
            if kind == "variance":
                spread = spread.diagonal().diag()
            official = torch.distributions.MultivariateNormal(own.mean(0).float(), spread.float())
            want = official.loc + noise[c] @ official.scale_tril.T
            torch.testing.assert_close(drawn[c], want, rtol=1e-4, atol=1e-4)


def test_alignment_moves_the_head_alone_and_learns_the_class_gaussians():
    """Class means twenty standard deviations apart, and a head that has learnt nothing."""
    tasks = [task(i, range(2 * i, 2 * i + 2), 12) for i in range(3)]
    strategy = learned(tasks, align_epochs=20, align_lr=0.05, ensemble=False)
    with torch.no_grad():
        strategy.gaussians.means.copy_(20 * torch.eye(*strategy.gaussians.means.shape))
        strategy.gaussians.factors.copy_(
            torch.eye(strategy.gaussians.means.shape[1]).expand_as(strategy.gaussians.factors)
        )
        strategy.head.weight.zero_()
        strategy.head.bias.zero_()
    before = {k: v.clone() for k, v in strategy.state_dict().items()}
    losses = strategy.align()
    moved = {k for k, v in strategy.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"head.weight", "head.bias"} and len(losses) == 20 * 6
    drawn = strategy.gaussians.draw(torch.arange(6), 8, strategy.rng("align"))
    predicted = strategy.head(drawn)[..., :6].argmax(-1)
    assert torch.equal(predicted, torch.arange(6)[:, None].expand_as(predicted))
    assert losses[-1] < 0.1 < losses[0]


def test_loss_leaves_other_rows_to_weight_decay():
    strategy = learned(stream()[:1], weight_decay=0.0, reg=0.0)
    strategy.begin_task(stream()[1])
    before = strategy.head.weight.detach().clone()
    strategy.observe(next(stream()[1].train(0)))
    rows = (strategy.head.weight != before).any(1).tolist()
    assert rows == [False] * 3 + [True] * 2 + [False] * 5
    strategy = learned(stream()[:1], weight_decay=0.1)
    strategy.begin_task(stream()[1])
    before = strategy.head.weight.detach().clone()
    strategy.observe(next(stream()[1].train(0)))
    assert (strategy.head.weight != before).any(1).all()


# ------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize(("count", "gain"), [(10, 3.5), (20, 7)])
def test_a_run_costs_one_pass_per_image_and_set(count, gain):
    quick = {"rank": 4, "align_epochs": 1, "align_samples": 8, "statistics": "variance"}
    node = strategy_node("mos", **quick)
    strategy = build(node, at="strategy", backbone=tiny(), seed=3, num_classes=count)
    tasks = [task(i, range(i, i + 1), 3, tests=2) for i in range(count)]
    cache, passes, plain, kept = FeatureCache(), strategy.backbone.passes, 0, 0
    for now in tasks:
        strategy.grow(now)
        wake(strategy, CURRENT, now.index)
        strategy.end_task(now)
        for seen in tasks[: now.index + 1]:
            start = passes.forward
            scored = list(cache.scores(f"test{seen.index}", seen.test, strategy, CPU))
            kept += passes.forward - start
            start = passes.forward
            for (scores, y), batch in zip(scored, seen.test(), strict=True):
                names = strategy.names[: now.index + 1]
                found = strategy.embed(batch.x, names)  # the official code asks every set
                want = strategy.classify(dict(zip(names, found, strict=True)))
                assert torch.equal(y, batch.y) and scores.shape == (2, now.index + 1)
                assert torch.allclose(scores, want, rtol=0, atol=5e-6)
                assert torch.equal(scores.argmax(1), want.argmax(1))
            plain += passes.forward - start
    assert kept == 2 * count * count == cache.computed and plain / kept >= gain


def test_many_sets_are_asked_only_as_far_as_an_image_leads():
    """Past 5 tasks `predict` follows each image: at most 5 passes, and the same scores."""
    quick = {"rank": 4, "align_epochs": 1, "align_samples": 8, "statistics": "variance"}
    node = strategy_node("mos", **quick)
    strategy = build(node, at="strategy", backbone=tiny(), seed=3, num_classes=12)
    for now in (task(i, range(i, i + 1), 3, tests=2) for i in range(12)):
        strategy.grow(now)
        wake(strategy, CURRENT, now.index)
        strategy.end_task(now)
    x = torch.rand(16, 3, 16, 16, generator=generator(1, "test"))
    found = dict(zip(strategy.names, strategy.embed(x, strategy.names), strict=True))
    passes = strategy.backbone.passes
    start = passes.forward
    got = strategy.predict(x)
    assert 2 * len(x) <= passes.forward - start <= 5 * len(x)
    assert torch.allclose(got, strategy.classify(found), rtol=0, atol=5e-6)
    one = torch.cat([strategy.predict(image[None]) for image in x])
    assert torch.allclose(got, one, rtol=0, atol=5e-6)


# ------------------------------------------------------------------------ odd input


@pytest.mark.parametrize("mode", ["functional", "official"])
@pytest.mark.parametrize("statistics", ["covariance", "variance"])
def test_few_images_are_named_once(mode, statistics):
    strategy = make(mode=mode, statistics=statistics)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for now in stream():
            learn(strategy, now)
    said = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(said) == 1 and "one image of class 4" in said[0] and "mean variance" in said[0]
    assert strategy.gaussians.counts.tolist() == [6, 6, 6, 5, 1, 2, 4, 4, 4, 4]
    assert strategy.predict(torch.rand(4, 3, 16, 16)).isfinite().all()
    assert strategy.gaussians.factors.isfinite().all()


def test_what_replaces_a_covariance():
    strategy = make(tiny())
    strategy.grow(task(0, range(0, 4)))
    x = torch.randn(13, 16, generator=generator(0, "x"))
    y = torch.tensor([0] * 9 + [1] * 2 + [2] * 1 + [3])
    said = strategy.gaussians.measure(range(0, 4), x, y)
    assert re.search(r"class 1: the variances alone.*class 2, 3: the mean", said)
    spread = strategy.gaussians.factors @ strategy.gaussians.factors.mT
    torch.testing.assert_close(
        spread[0], strategy.gaussians.spread(x[:9]).float(), rtol=1e-4, atol=1e-5
    )
    two = strategy.gaussians.spread(x[9:11])
    torch.testing.assert_close(spread[1], two.diagonal().float().diag())
    mean = (spread[0].diagonal() + spread[1].diagonal()) / 2
    torch.testing.assert_close(spread[2], mean.diag())
    lonely = make(tiny())
    lonely.grow(task(0, range(0, 1)))
    assert lonely.gaussians.measure(range(0, 1), x[:1], y[:1])
    torch.testing.assert_close(lonely.gaussians.factors[0], 0.01 * torch.eye(16))


@pytest.mark.parametrize("mode", ["functional", "official"])
def test_a_class_without_images(mode):
    strategy = learned([task(0, range(0, 2), [3, 0]), task(1, range(2, 4), [0, 3])], mode=mode)
    assert strategy.gaussians.counts.tolist() == [3, 0, 0, 3]
    assert strategy.predict(torch.rand(4, 3, 16, 16)).isfinite().all()


def test_a_class_that_comes_back_belongs_to_its_last_task():
    strategy = learned([task(0, range(0, 3)), task(1, range(3, 5)), task(2, range(1, 3), 4)])
    assert strategy.owner.tolist() == [0, 2, 2, 1, 1]
    assert (
        strategy.gaussians.counts.tolist() == [6, 4, 4, 6, 6] == strategy.prototypes.counts.tolist()
    )
    assert strategy.predict(torch.rand(2, 3, 16, 16)).shape == (2, 5)


def test_scores_before_the_end_of_a_task():
    strategy, tasks, x = make(), stream(), torch.rand(2, 3, 16, 16)
    strategy.begin_task(tasks[0])
    assert torch.equal(strategy.predict(x), torch.zeros(2, 3))
    strategy.end_task(tasks[0])
    first = strategy.predict(x)
    strategy.begin_task(tasks[1])
    assert torch.allclose(strategy.predict(x), first, atol=1e-6)


def test_nan_is_reported_with_class_and_setting():
    strategy, now = make(), task(0, range(0, 2))
    strategy.begin_task(now)
    batch = next(now.train(0))
    with pytest.raises(Diverged, match=r"strategy\.optim\.lr"):
        strategy.observe(batch._replace(x=batch.x * torch.nan))
    with torch.no_grad():
        strategy.bank.parameters_of(CURRENT)[0].fill_(torch.nan)
    with pytest.raises(Diverged, match=r"class 0.*strategy\.optim\.lr"):
        strategy.end_task(now)
    strategy = learned(stream()[:2])
    strategy.gaussians.means[3] = torch.nan
    with pytest.raises(Diverged, match=r"class 3.*strategy\.align_lr"):
        strategy.align()


def test_bad_settings_and_networks_are_refused():
    for options in ({"rank": 0}, {"pull": 1.0}, {"dropout": -0.1}, {"align_samples": 0}):
        with pytest.raises(UserError, match=rf"strategy\.(adapter\.kind\.)?{next(iter(options))}"):
            make(**options)
    with pytest.raises(UserError, match=r"no place for adapters.*timm ViT"):
        make(Backbone(timm.create_model("test_resnet", num_classes=0)))


# ------------------------------------------------------------------------ resuming


def test_a_router_that_the_released_mode_never_asks_is_refused():
    node = strategy_node("mos", mode="official", router="entropy")
    with pytest.raises(UserError, match="strategy.router=entropy would do nothing: mode=official"):
        build(node, at="strategy", backbone=recorded_backbone(), seed=0, num_classes=10)
