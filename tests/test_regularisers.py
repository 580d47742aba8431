"""L2, EWC and LwF: penalties and statistics against values worked out by hand; state and misuse."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from golden_cl_case import backbone as vit
from test_cl_methods import (
    X,
    learn,
    make,
    stream,
    task,
    tensors,
    through_file,
)
from torch import Tensor

from driftline.cl.l2 import learned
from driftline.core.errors import Diverged, UserError
from driftline.core.stream import Batch, Task
from driftline.parts.store import Store

ALL = ("l2", "ewc", "lwf")


def quiet(strategy, tasks: list[Task]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in tasks:
            learn(strategy, t)
    return strategy


def gradients(strategy, batch: Batch) -> dict[str, Tensor]:
    """Gradients of one step, which is taken with rate 0."""
    for group in strategy.optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0
    gradients: dict[str, Tensor] = {}

    def note(*_: object) -> None:
        named = strategy.named_parameters()
        gradients.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    handle = strategy.optimizer.register_step_pre_hook(note)
    torch.manual_seed(0)  # dropout
    strategy.observe(batch)
    handle.remove()
    return gradients


def twin_gradients(strategy, loss_of) -> dict[str, Tensor]:
    """Gradients by autograd of a loss that is written out in the test."""
    strategy.zero_grad()
    torch.manual_seed(0)
    strategy.train()
    loss_of(strategy).backward()
    return {n: p.grad.clone() for n, p in strategy.named_parameters() if p.grad is not None}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: k + m)


# ------------------------------------------------------------------------------ L2


def test_l2_is_half_the_squared_distance_to_the_end_of_the_task_before():
    strategy, tasks = make("l2", weight=0.5), stream()
    learn(strategy, tasks[0])
    star = {n: p.detach().clone() for n, p in strategy.named_parameters() if ".fc." not in n}
    strategy.begin_task(tasks[1])
    with torch.no_grad():
        for p in strategy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    batch = next(tasks[1].train(0))

    def distance(s) -> Tensor:
        away = [(p[: len(star[n])] - star[n]) for n, p in s.named_parameters() if n in star]
        return sum((a**2).sum() for a in away)

    def written_out(s) -> Tensor:
        scores = s.head(s.backbone.features(batch.x))
        return F.cross_entropy(scores[:, 3:5], batch.y - 3) + 0.5 / 2 * distance(s)

    want = twin_gradients(strategy, written_out)
    assert_close(gradients(strategy, batch), want)
    for p in strategy.parameters():
        p.grad = torch.zeros_like(p)
    penalty = strategy.penalty.add_gradients(strategy)["penalty"]
    torch.testing.assert_close(penalty, 0.25 * distance(strategy).detach())


def test_l2_leaves_new_rows_and_the_first_task_alone():
    strategy, tasks = make("l2"), stream()
    strategy.begin_task(tasks[0])
    assert strategy.observe(next(tasks[0].train(0)))["penalty"] == 0
    strategy.end_task(tasks[0])
    strategy.begin_task(tasks[1])
    assert strategy.penalty.anchor["head.weight"].shape == (3, 6) and strategy.head.classes == 5
    with torch.no_grad():
        strategy.head.weight[3:] += 1
    assert strategy.observe(next(tasks[1].train(0)))["penalty"] == 0


def test_weight_zero_is_fine_tuning_and_a_large_one_holds_still():
    plain, tasks = quiet(make("finetune"), stream()), stream()
    off = quiet(make("l2", weight=0.0), tasks)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, off.state_dict()[key]), key
    moved = {}
    for weight in (0.0, 5.0):
        strategy = make("l2", weight=weight, optim={"momentum": 0.0}, epochs=10)
        learn(strategy, tasks[0])
        before = strategy.backbone.net.body[0].weight.detach().clone()
        learn(strategy, tasks[1])
        moved[weight] = (strategy.backbone.net.body[0].weight - before).norm().item()
    assert moved[5.0] < 0.5 * moved[0.0], moved


# ------------------------------------------------------------------------------ EWC


def by_hand(strategy, t: Task, kind: str) -> Tensor:
    """Fisher information of the head's weight: the gradient of log p_y is (1[c = y] - p_c) f."""
    total, batches = torch.zeros(strategy.head.weight.shape), list(t.train(strategy.epochs))
    strategy.eval()
    with torch.no_grad():
        for batch in batches:
            for x, y in zip(batch.x, batch.y, strict=True):
                f = strategy.backbone.features(x[None])[0]
                p = strategy.head(f[None])[0].softmax(0)
                g = (F.one_hot(y, len(p)) - p)[:, None] * f
                total += (p[y] if kind == "weighted" else 1) * g**2
    return total / (len(batches) * len(batches[0].y))


@pytest.mark.parametrize("kind", ["weighted", "empirical"])
@pytest.mark.parametrize("size", [1, 3])
def test_fisher_information_of_the_head_is_what_the_formula_says(kind, size):
    strategy, tasks = make("ewc", fisher=kind, fisher_batch=size, gamma=0.5), stream()
    learn(strategy, tasks[0])
    first = strategy.penalty.fisher["head.weight"]
    torch.testing.assert_close(first, by_hand(strategy, tasks[0], kind), rtol=1e-4, atol=1e-8)
    assert first.shape == (6, 6) and (first[3:] > 0).any()  # mammoth: future classes compete
    learn(strategy, tasks[1])
    want = 0.5 * first + by_hand(strategy, tasks[1], kind)
    torch.testing.assert_close(strategy.penalty.fisher["head.weight"], want, rtol=1e-4, atol=1e-8)


def test_fisher_information_by_finite_differences():
    """A weight inside the network, `empirical`: mean over images of (d log p / d w)^2."""
    strategy, t = make("ewc", fisher="empirical"), task(0, range(0, 3), 2)
    strategy.double()
    t = Task(**{**vars(t), "train": lambda e, start=0: iter([double(b) for b in t.fit()])})
    strategy.begin_task(t)
    strategy.end_task(t)
    found = strategy.penalty.fisher["backbone.net.body.0.weight"][2, 1, 0, 2]
    strategy.eval()
    w = strategy.backbone.net.body[0].weight
    batches, squares = list(t.train(0)), []
    for b in batches:
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                w[2, 1, 0, 2] += step
                scores = strategy.head(strategy.backbone.features(b.x)).log_softmax(1)
                w[2, 1, 0, 2] -= step
            ends.append(scores.gather(1, b.y[:, None])[:, 0])
        squares.append(((ends[0] - ends[1]) / 2e-5) ** 2)
    want = torch.cat(squares).sum() / (len(batches) * len(batches[0].y))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-12)


def double(batch: Batch) -> Batch:
    return batch._replace(x=batch.x.double())


@pytest.mark.parametrize("kind", ["weighted", "empirical", "sampled"])
def test_batched_fisher_equals_one_image_at_a_time(kind):
    each = {}
    for size in (1, 4):
        strategy = make("ewc", fisher=kind, fisher_batch=size)
        strategy.begin_task(stream()[0])
        each[size] = strategy.penalty.fisher_of(strategy, stream()[0])
    assert_close(each[1], each[4])


def test_batched_fisher_of_a_transformer():
    t = task(0, range(0, 3), 2)
    found = {}
    for size in (1, 3):
        strategy = make("ewc", fisher_batch=size)
        strategy.backbone = vit()
        for block in strategy.backbone.net.blocks:
            block.attn.fused_attn = True
        strategy.head.weight = torch.nn.Parameter(torch.zeros(0, 32))
        grown = Task(**{**vars(t), "train": lambda e, start=0: (large(b) for b in t.fit())})
        strategy.begin_task(grown)
        found[size] = strategy.penalty.fisher_of(strategy, grown)
    assert len(found[1]) > 20
    assert_close(found[1], found[3])


def large(batch: Batch) -> Batch:
    return batch._replace(x=F.interpolate(batch.x, 32))


def test_sampled_labels_are_those_of_the_model():
    """With certain predictions the drawn labels are the predicted ones, whatever was given."""
    strategy, t = make("ewc", fisher="sampled"), task(0, range(0, 3))
    strategy.begin_task(t)
    with torch.no_grad():
        strategy.head.bias[1] = 1e4
    assert all(
        not f.any() for f in strategy.penalty.fisher_of(strategy, t).values()
    )  # p = 1: no gradient
    strategy.penalty.fisher_kind = "empirical"
    assert any(f.any() for f in strategy.penalty.fisher_of(strategy, t).values())


def test_ewc_adds_twice_the_weighted_distance():
    strategy, tasks = make("ewc", weight=3.0), stream()
    learn(strategy, tasks[0])
    star = {n: p.detach().clone() for n, p in learned(strategy, 6)}
    fisher = {n: strategy.penalty.fisher[n].clone() for n in star}
    strategy.begin_task(tasks[1])
    with torch.no_grad():
        for p in strategy.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    batch = next(tasks[1].train(0))

    def written_out(s) -> Tensor:
        loss = F.cross_entropy(s.head(s.backbone.features(batch.x)), batch.y)  # all six classes
        terms = [(fisher[n] * (p - star[n]) ** 2).sum() for n, p in learned(s, 6)]
        return loss + 3.0 * sum(terms)

    want = twin_gradients(strategy, written_out)
    assert_close(gradients(strategy, batch), want)


def test_one_penalty_a_task_is_the_sum_of_all_of_them():
    tasks = [task(i, range(i, i + 2)) for i in (0, 1, 2)]
    strategy = make("ewc", theta_star="each", loss_scope="seen", weight=1.0)
    terms = []
    for t in tasks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn(strategy, t)
        new = strategy.penalty.fisher_of(strategy, t)  # the same pass again: nothing is drawn
        ends = dict(learned(strategy, strategy.head.classes))
        terms.append({n: (new[n], ends[n].detach().clone()) for n in new})
    strategy.begin_task(task(3, range(4, 5)))
    with torch.no_grad():
        for p in strategy.parameters():
            p.add_(0.1)

    def total(s) -> Tensor:
        found = dict(learned(s, s.head.classes))
        parts = [
            (f * (found[n][: len(c)] - c) ** 2).sum() for t in terms for n, (f, c) in t.items()
        ]
        return sum(parts)

    want = twin_gradients(strategy, total)
    for p in strategy.parameters():
        p.grad = torch.zeros_like(p)
    strategy.penalty.add_gradients(strategy)
    for name, gradient in want.items():
        got = dict(strategy.named_parameters())[name].grad
        torch.testing.assert_close(got, gradient, rtol=1e-3, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------ LwF


def test_lwf_loss_is_mammoths():
    """Probabilities to the power 1/tau, normalised again; old classes only; alpha in front."""
    strategy, tasks = make("lwf", alpha=0.7, tau=3.0), stream()
    learn(strategy, tasks[0])
    old = {
        int(i): s
        for b in tasks[1].fit()
        for i, s in zip(b.index, strategy.predict(b.x), strict=True)
    }
    strategy.begin_task(tasks[1])
    batch = next(tasks[1].train(0))

    def soft(scores: Tensor) -> Tensor:
        powered = scores.softmax(1) ** (1 / 3)
        return powered / powered.sum(1, keepdim=True)

    def written_out(s) -> Tensor:
        scores = s.head(s.backbone.features(batch.x))
        kept = soft(torch.stack([old[int(i)] for i in batch.index]))
        distilled = -(kept * soft(scores[:, :3]).log()).sum(1).mean()
        return F.cross_entropy(scores, batch.y) + 0.7 * distilled

    want = twin_gradients(strategy, written_out)
    got = gradients(strategy, batch)
    assert_close(got, want)


def test_the_warm_up_moves_rows_of_new_classes_alone_and_records_the_old_network():
    strategy, tasks = make("lwf", warmup_epochs=3), stream()
    learn(strategy, tasks[0])
    before, wanted = tensors(strategy), [strategy.predict(b.x) for b in tasks[1].fit()]
    fresh = make("lwf", warmup_epochs=0)
    fresh.grow(tasks[0])
    fresh.restore(through_file(strategy.snapshot()))
    fresh.begin_task(tasks[1])  # the same without warm-up: the new rows as drawn
    strategy.begin_task(tasks[1])
    for key, value in before.items():
        assert torch.equal(strategy.state_dict()[key][: len(value)] if value.ndim else value, value)
    assert not torch.equal(strategy.head.weight[3:], fresh.head.weight[3:])
    index = torch.cat([b.index for b in tasks[1].fit()])
    assert strategy.penalty.old["index"].tolist() == sorted(index.tolist())
    torch.testing.assert_close(strategy.penalty.old["scores"], torch.cat(wanted)[index.argsort()])


def test_warm_up_is_plain_gradient_descent():
    strategy, tasks = (
        make("lwf", warmup_epochs=1, optim={"momentum": 0.9, "later": {"weight_decay": 0.5}}),
        stream(),
    )
    learn(strategy, tasks[0])
    drawn = make("lwf", warmup_epochs=0)
    drawn.grow(tasks[0])
    drawn.restore(through_file(strategy.snapshot()))
    drawn.begin_task(tasks[1])
    rows, bias = drawn.head.weight[3:].detach(), drawn.head.bias[3:].detach()
    strategy.begin_task(tasks[1])
    strategy.eval()
    for b in tasks[1].train(2):  # an epoch beyond those of the training
        with torch.no_grad():
            f = strategy.backbone.features(b.x)
            error = (f @ rows.T + bias).softmax(1) - F.one_hot(b.y - 3, 2)
        rows = rows - 0.1 * error.T @ f / len(b.y)
        bias = bias - 0.1 * error.mean(0)
    torch.testing.assert_close(strategy.head.weight[3:].detach(), rows)
    torch.testing.assert_close(strategy.head.bias[3:].detach(), bias)


def test_distillation_keeps_old_answers():
    drift = {}
    for alpha in (0.0, 20.0):
        strategy, tasks = make("lwf", alpha=alpha, freeze_bn=True, warmup_epochs=0), stream()
        learn(strategy, tasks[0])
        before = torch.cat([strategy.predict(b.x) for b in tasks[1].fit()]).softmax(1)
        learn(strategy, tasks[1])
        after = torch.cat([strategy.predict(b.x) for b in tasks[1].fit()])[:, :3].softmax(1)
        drift[alpha] = (after - before).norm().item()
    assert drift[20.0] < drift[0.0], drift


# ------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scope", ["current", "seen", "all"])
def test_one_class_tasks_and_single_images(name, scope):
    tasks = [task(0, range(0, 1)), task(1, range(1, 2), 1), task(2, range(2, 5), [1, 3, 1])]
    strategy = quiet(make(name, num_classes=5, loss_scope=scope), tasks)
    assert strategy.predict(X).isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_what_is_not_finite_is_told(name):
    strategy, t = make(name), stream()[0]
    strategy.begin_task(t)
    batch = next(t.train(0))
    with pytest.raises(Diverged, match=r"loss is nan: lower strategy\.optim\.lr \(now 0\.05\)"):
        strategy.observe(batch._replace(x=batch.x * torch.nan))
    assert all(p.isfinite().all() for p in strategy.parameters())


def test_ewc_that_has_diverged_is_told():
    strategy, t = make("ewc"), stream()[0]
    learn(strategy, t)
    with torch.no_grad():
        strategy.head.weight.fill_(torch.inf)
    with pytest.raises(Diverged, match=r"Fisher information after task 0.*strategy\.optim\.lr"):
        strategy.end_task(t)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("l2", "weight", -1.0),
        ("ewc", "gamma", 2.0),
        ("ewc", "fisher_batch", 0),
        ("ewc", "fisher", "exact"),
        ("lwf", "tau", 0.0),
    ],
)
def test_bad_settings_are_named(name, key, value):
    with pytest.raises(UserError, match=rf"strategy\.penalty\.{key} must"):
        make(name, **{key: value})


def test_a_store_takes_what_it_is_given():
    a, b = Store(), Store()
    a.put("net.weight", torch.ones(2, 3))
    b.put("other", torch.ones(1))
    b.load_state_dict(a.state_dict())
    assert "other" not in b and torch.equal(b["net.weight"], torch.ones(2, 3))
    a["net.weight"].zero_()
    assert b["net.weight"].all() and "net.weight" in a
