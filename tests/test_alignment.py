"""SLCA and SSIAT against numbers recorded from GengDavid/SLCA 169d4e6 and HAIV-Lab/SSIAT 3f1f00d.

And what is special about each, on tiny tasks. MOS, which has the same alignment: test_mos.py.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

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
from driftline.cl.slca import normalized, shrinkage
from driftline.cl.ssiat import BEFORE, CURRENT, semantic_shift
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError
from driftline.core.stream import Batch, Task

QUICK = {"epochs": 2, "align_epochs": 2, "align_samples": 8}


def make(name: str, net: Backbone | None = None, **options) -> Any:
    node = strategy_node(name, **QUICK | options)
    return build(node, at="strategy", backbone=net or tiny(), seed=3, num_classes=10)


def learned(name: str, tasks: list[Task], **options) -> Any:
    strategy = make(name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for now in tasks:
            learn(strategy, now)
    return strategy


# ------------------------------------------------------------------------ recorded numbers


def check(case: ClCase, base: str, got: dict[str, Tensor]) -> None:
    """Compare what the recording has under `base`, if anything."""
    for key, value in got.items():
        if f"{base}/{key}" in case.data:
            case.close(f"{base}/{key}", value)


@torch.no_grad()
def put(case: ClCase, base: str, into: dict[str, Tensor]) -> None:
    for key, p in into.items():
        if f"{base}/{key}" in case.data:
            p.copy_(case[f"{base}/{key}"])


class Steps:
    """Compares every step of every optimiser with the recording, and keeps their rates.

    Args:
        learns: something of each parameter by its official name, by default the parameter.
    """

    def __init__(self, case: ClCase, learns: Callable[..., dict[str, Any]]) -> None:
        self.case, self.learns, self.phase = case, learns, ""
        self.count: dict[str, int] = defaultdict(int)
        self.rates: dict[str, list[list[float]]] = defaultdict(list)

    def before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.rates[self.phase].append([g["lr"] for g in optimizer.param_groups])
        # The recording has old gradients of what the optimiser does not move.
        grads = {k: g for k, g in self.learns(lambda p: p.grad).items() if g is not None}
        check(self.case, f"{self.phase}/step{self.count[self.phase]}/grad", grads)

    def after(self, *_: Any) -> None:
        check(self.case, f"{self.phase}/step{self.count[self.phase]}/param", self.learns())
        self.count[self.phase] += 1

    @contextmanager
    def watched(self) -> Iterator[None]:
        handles = [
            register_optimizer_step_pre_hook(self.before),
            register_optimizer_step_post_hook(self.after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def train(case: ClCase, strategy: Any, now: Task, steps: Steps) -> None:
    """The recorded batches of a task."""
    steps.phase = f"task{now.index}/train"
    events = iter(case.info["events"])
    assert any(e == ["phase", steps.phase] for e in events)
    losses = []
    for epoch, event in enumerate(iter(lambda: next(events), ["end", steps.phase])):
        strategy.begin_epoch(now, epoch)
        losses += [strategy.observe(images("train", rows))["loss"] for rows in event[2]]
    assert epoch + 1 == strategy.epochs
    case.close(f"{steps.phase}/loss_per_step", torch.stack(losses))


def give_draws(case: ClCase, strategy: Any, steps: Steps) -> None:
    """Let the alignment use recorded features; they are checked to be draws of our Gaussians."""
    draws: dict[str, Iterator[Tensor]] = {}
    align, gaussians = strategy.align, strategy.gaussians

    def draw(classes: Tensor, samples: int, rng: torch.Generator, scale: Tensor) -> Tensor:
        drawn = next(draws["samples"])
        centred = drawn - gaussians.means[classes][:, None] * scale[:, None, None]
        factor = gaussians.factors[classes]
        noise = torch.linalg.solve_triangular(factor, centred.mT, upper=False)
        # Of n standard normals in D dimensions: the squared mean is D / n, the variance 1.
        distance = (noise.mean(2) ** 2).mean(1) * samples
        assert distance.min() > 0.4 and distance.max() < 2
        assert 0.9 < noise.var() < 1.1
        return drawn

    def aligning() -> Tensor:
        steps.phase = f"{steps.phase.split('/')[0]}/ca"
        draws["samples"] = iter(case[f"{steps.phase}/samples"])
        draws["permutation"] = iter(case[f"{steps.phase}/permutation"])
        losses = align()
        case.close(f"{steps.phase}/loss_per_step", losses)
        return losses

    gaussians.draw, gaussians.shuffle = draw, lambda *_: next(draws["permutation"])
    strategy.align = aligning


def test_scores(case: ClCase, strategy: Any, index: int) -> None:
    """Features, scores and accuracy of the test images."""
    seen = images("test", case[f"task{index}/test_indices"])
    features = strategy.eval().features(seen.x)
    case.close(f"task{index}/test_features", features)
    scores = strategy.predict(seen.x)
    case.close(f"task{index}/test_logits", scores)
    right = {e[1]: e[2] for e in case.info["events"] if e[0] == "accuracy"}
    accuracy = 100 * float((scores.argmax(1) == seen.y).float().mean())
    assert round(accuracy, 2) == right[index]


test_scores.__test__ = False


@pytest.mark.parametrize("name", ["slca_run", "slca_run_no_logit_norm"])
def test_recorded_slca(name, record_property):
    case = ClCase(f"slca/{name}")
    h = case.hyper
    strategy = make(
        "slca",
        recorded_backbone(),
        epochs=h["epochs"],
        lr=h["lr"],
        milestones=h["milestones"],
        factors={"backbone": h["bcb_lrscale"]},
        align_epochs=h["ca_epochs"],
        align_lr=h["lr"],
        align_samples=h["ca_samples_per_class"],
        logit_norm=h["ca_with_logit_norm"] or None,
        task_of_class="division",
    )
    assert strategy.optim.momentum == h["momentum"]
    assert strategy.optim.weight_decay == h["weight_decay"]

    def heads() -> dict[str, Tensor]:
        named = strategy.heads.layers.named_parameters()
        return {f"fc.heads.{k.replace('.', '.0.')}": p for k, p in named}

    def learns(of=lambda p: p) -> dict[str, Any]:
        net = strategy.backbone.net.named_parameters()
        named = {f"convnet.{k}": p for k, p in net} | heads()
        return {k: of(p) for k, p in named.items()}

    steps = Steps(case, learns)
    give_draws(case, strategy, steps)
    with steps.watched():
        for t in range(len(h["task_sizes"])):
            now = case.task(t, h["task_sizes"])
            strategy.begin_task(now)
            put(
                case,
                f"task{t}/before_training",
                {k: p for k, p in heads().items() if f".{t}." in k},
            )
            check(case, f"task{t}/before_training", heads())
            train(case, strategy, now, steps)
            check(case, f"task{t}/after_training", learns())
            case.close(f"task{t}/train/lr_per_step", np.asarray(steps.rates[f"task{t}/train"]))
            whole = {f"{k}": p for k, p in strategy.backbone.net.named_parameters()}
            check(case, f"task{t}/backbone_after_training", whole)
            strategy.end_task(now)
            new = slice(now.classes.start, now.classes.stop)
            case.close(f"task{t}/class_means_new", strategy.gaussians.means[new])
            factors = strategy.gaussians.factors[new]
            case.close(f"task{t}/class_covs_new", factors @ factors.mT)
            if t:
                case.close(f"task{t}/ca/lr_per_step", np.asarray(steps.rates[f"task{t}/ca"]))
            check(case, f"task{t}/after_ca", heads())
            test_scores(case, strategy, t)
            carried = strategy.carried.split([p.numel() for p in heads().values()])
            pairs = zip(heads().items(), carried, strict=True)
            check(case, f"task{t}/heads_carried_over", {k: v.view_as(p) for (k, p), v in pairs})
    assert sum(steps.count.values()) == 9 * 3 + 14 + 20
    record_property("worst", case.worst)


def test_recorded_ssiat(record_property):
    case = ClCase("ssiat/ssiat_run")
    h = case.hyper
    strategy = make(
        "ssiat",
        recorded_backbone(),
        epochs=h["init_epochs"],
        epochs_later=h["inc_epochs"],
        rank=h["ffn_num"],
        dropout=h["dropout"],
        lr=h["lr_all_groups"],
        weight_decay=h["weight_decay"],
        scale=h["scale"],
        margin=h["margin"],
        shift_width=h["drift_sigma"],
        shift_pairing="unpaired",
        align_epochs=h["ca_epochs"],
        align_lr=h["init_lr"],
        align_samples=h["ca_samples_per_class"],
        task_of_class="division",
    )
    sizes = h["task_sizes"]

    def heads(values: Tensor) -> dict[str, Tensor]:
        parts = values.split(sizes[: len(strategy.tasks)])
        return {f"fc.heads.{i}.0.weight": p for i, p in enumerate(parts)}

    def learns(of=lambda p: p) -> dict[str, Any]:
        named = {}
        for i, a in enumerate(strategy.bank.adapters(CURRENT).values()):
            for ours, theirs in ((a.down, "down_proj"), (a.up, "up_proj")):
                for kind, p in ours.named_parameters():
                    named[f"convnet.blocks.{i}.adaptmlp.{theirs}.{kind}"] = of(p)
        return named | heads(of(strategy.head.weight))

    steps = Steps(case, learns)
    give_draws(case, strategy, steps)
    shift, align = strategy.shift, strategy.align

    def shifting(before: Tensor, after: Tensor) -> None:
        case.close(f"task{t}/drift/embeddings_old", before)
        case.close(f"task{t}/drift/embeddings_new", after)
        old = strategy.gaussians.means[: now.classes.start].clone()
        case.close(f"task{t}/drift/old_class_means", old)
        shift(before, after)
        moved = semantic_shift(before, after, old, h["drift_sigma"])[0]
        case.close(f"task{t}/drift/shift", moved)

    def aligning() -> Tensor:
        check(case, f"task{t}/ca/init", heads(strategy.head.weight))
        return align()

    strategy.shift, strategy.align = shifting, aligning
    with steps.watched():
        for t in range(len(sizes)):
            now = case.task(t, sizes)
            strategy.begin_task(now)
            new = f"fc.heads.{t}."
            put(
                case,
                f"task{t}/before_training",
                {k: p for k, p in learns().items() if t == 0 or k.startswith(new)},
            )
            check(case, f"task{t}/before_training", learns())
            train(case, strategy, now, steps)
            check(case, f"task{t}/after_training", learns())
            rates = np.asarray(steps.rates[f"task{t}/train"])
            columns = [0, 0, 1] if t == 0 else [0, 1]  # the last block apart, in the first task
            case.close(f"task{t}/train/lr_per_step", rates[:, columns])
            strategy.end_task(replace(now, train=partial(drift_pass, case, t)))
            case.close(f"task{t}/class_means", strategy.gaussians.means)
            factors = strategy.gaussians.factors
            case.close(f"task{t}/class_covs", factors @ factors.mT)
            if t:
                case.close(f"task{t}/ca/lr_per_step", np.asarray(steps.rates[f"task{t}/ca"]))
                check(case, f"task{t}/after_ca", heads(strategy.head.weight))
            test_scores(case, strategy, t)
    assert sum(steps.count.values()) == 9 + 6 + 6 + 14 + 20
    record_property("worst", case.worst)


def drift_pass(case: ClCase, index: int, epoch: int) -> Iterator[Batch]:
    """The shuffled passes before and after the training of a task, as the epochs that follow it."""
    events = case.info["events"]
    at = events.index(["phase", f"task{index}/train"]) - 1
    if epoch > case.hyper["inc_epochs"]:
        at = events.index(["end", f"task{index}/train"]) + 1
    yield from (images("train", rows) for rows in events[at][2])


# ------------------------------------------------------------------------ what is special


def test_factors_of_means_and_norms_of_logits():
    tasks = [range(0, 4), range(4, 7), range(7, 10)]
    own = shrinkage(tasks, "table")
    want = [0.9 + 0.1 * (i + 1) / 3 for i in (0, 0, 0, 0, 1, 1, 1, 2, 2, 2)]
    assert np.allclose(own, want)
    divided = shrinkage(tasks, "division")  # by 3: class 3 counts as the second task's, 9 as a 4th
    assert np.allclose(divided, [0.9 + 0.1 * (c // 3 + 1) / 3 for c in range(10)])
    equal = [range(0, 3), range(3, 6), range(6, 9)]
    assert torch.equal(shrinkage(equal, "table"), shrinkage(equal, "division"))
    z = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    mean = sum(z[:, t.start : t.stop].norm(dim=1) for t in tasks) / 3
    torch.testing.assert_close(normalized(z, tasks, 0.1), z / mean[:, None] / 0.1)


def test_slca_goes_on_from_the_heads_before_the_alignment():
    tasks, x = [task(0, range(0, 3)), task(1, range(3, 5))], torch.rand(3, 3, 16, 16)
    strategy = learned("slca", tasks)
    scored = strategy.predict(x)
    third = task(2, range(1, 6))  # two classes come back
    strategy.begin_task(third)
    before = [p for layer in strategy.heads.layers[:2] for p in layer.parameters()]
    assert torch.equal(torch.cat([p.flatten() for p in before]), strategy.carried)
    assert not torch.allclose(strategy.heads(strategy.features(x))[:, :1], scored[:, :1])
    norm = strategy.backbone.net.norm
    assert norm.eps == 1e-5 and not torch.equal(norm.weight, torch.ones(16))  # new, and it learns
    strategy.end_task(third)
    features = strategy.eval().features(x)
    torch.testing.assert_close(strategy.predict(x)[:, 1:6], strategy.heads.layers[-1](features))


def test_old_means_follow_what_their_neighbours_do():
    draws = torch.Generator().manual_seed(0)
    before, means = torch.randn(20, 4, generator=draws), torch.randn(3, 4, generator=draws)
    after = before + torch.randn(20, 4, generator=draws)
    moved, images = semantic_shift(before, after, means, 0.5)
    for c in range(3):
        w = [float((-((y - means[c]) ** 2).sum() / 0.5).exp()) + 1e-5 for y in before]
        share = torch.tensor(w) / sum(w)
        torch.testing.assert_close(moved[c].float(), (share[:, None] * (after - before)).sum(0))
        assert float(images[c]) == pytest.approx(1 / float((share**2).sum()), rel=1e-5)
    far, reach = semantic_shift(before + 100, after + 100, means, 4.0)  # all at the floor
    torch.testing.assert_close(far.float(), (after - before).mean(0).expand(3, -1))
    assert reach.allclose(torch.tensor(20.0, dtype=torch.float64))


@pytest.mark.parametrize("pairing", ["paired", "unpaired"])
def test_means_move_by_the_features_of_the_task(pairing):
    tasks = [task(0, range(0, 3)), task(1, range(3, 5))]
    strategy = learned("ssiat", tasks[:1], shift_pairing=pairing, lr=0.5)
    old = strategy.gaussians.means.clone()
    kept = strategy.gaussians.factors.clone()
    assert BEFORE not in strategy.bank.sets
    learn(strategy, tasks[1])
    with torch.no_grad():
        strategy.eval()
        if pairing == "paired":
            batches = [b.x for b in tasks[1].fit()]
            before, after = (
                torch.cat([strategy.features(x, name) for x in batches])
                for name in (BEFORE, CURRENT)
            )
        else:  # epochs that were not trained on
            before, after = (
                torch.cat([strategy.features(b.x, name) for b in tasks[1].train(epoch)])
                for name, epoch in ((BEFORE, 10), (CURRENT, 11))
            )
    moved, images = semantic_shift(before, after, old, 4.0)
    got = strategy.gaussians.means[:3]
    torch.testing.assert_close(got, (old + moved).float(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, old, atol=1e-4)
    assert torch.equal(strategy.gaussians.factors[:3], kept)
    assert strategy.report()["shift_images"] == pytest.approx(float(images.mean()), rel=1e-4)


def test_margin_is_taken_off_the_own_cosine():
    strategy = make("ssiat", margin=0.3)
    now = task(0, range(0, 3))
    strategy.begin_task(now)
    batch = next(now.train(0))
    strategy.eval()
    v = strategy.predict(batch.x)
    own = v.gather(1, batch.y[:, None])[:, 0]
    top = (20 * (own - 0.3)).exp()
    want = -(top / (top + (20 * v).exp().sum(1) - (20 * own).exp())).log().mean()
    torch.testing.assert_close(strategy._loss(batch)[0], want)


@pytest.mark.parametrize("name", ["slca", "ssiat"])
def test_few_images_and_nan_are_named(name):
    tasks = [task(0, range(0, 3)), task(1, range(3, 5), [5, 1]), task(2, range(5, 6), [4])]
    strategy = make(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for now in tasks:
            learn(strategy, now)
    said = [str(w.message) for w in caught if w.category is UserWarning]
    assert len(said) == 2 and "one image of class 4" in said[0] and "task 2 has one" in said[1]
    assert strategy.predict(torch.rand(2, 3, 16, 16)).isfinite().all()
    strategy.gaussians.means[3] = torch.nan
    with pytest.raises(Diverged, match=r"class 3.*strategy\.align_lr"):
        strategy.align()


def test_a_network_without_a_last_norm_is_refused():
    net = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(UserError, match=r"strategy\.final_norm=pretrained"):
        make("slca", Backbone(net, tag="test_resnet"))
    assert make("slca", Backbone(net), final_norm="pretrained").heads.dim == 96
