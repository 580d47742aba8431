"""EASE against numbers recorded from sun-hailong/CVPR24-Ease 6d67508, and on tiny tasks."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import strategy_node
from golden_cl_case import ClCase, images
from golden_cl_case import backbone as recorded_backbone

from driftline.backbones.backbone import Backbone
from driftline.cl.ease import Ease, complete, ensemble
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError
from driftline.core.features import FeatureCache
from driftline.core.seed import generator
from driftline.core.stream import Batch, Task

CONF = Path(__file__).parents[1] / "conf" / "strategy"
CPU = torch.device("cpu")


def make(net: Backbone | None = None, **options) -> Ease:
    node = strategy_node("ease", **{"rank": 4, "epochs": 2, "lr": 0.5} | options)
    return build(node, at="strategy", backbone=net or tiny(), seed=3, num_classes=10)


def tiny() -> Backbone:
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2}
    net = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, **options)
    return Backbone(net.eval(), input_size=16)


def task(index: int, classes: range, per_class: int | list[int] = 6, tests: int = 3) -> Task:
    """Random images whose mean colour tells the class."""
    counts = [per_class] * len(classes) if isinstance(per_class, int) else per_class

    def draw(counts: list[int], split: str) -> Batch:
        y = torch.cat([torch.full((n,), c) for c, n in zip(classes, counts, strict=True)])
        x = torch.rand(len(y), 3, 16, 16, generator=generator(7, split, index))
        x[:, 0] = 0.5 * x[:, 0] + 0.05 * y[:, None, None]
        return Batch(x, y, torch.arange(len(y)), torch.zeros_like(y))

    learn, test = draw(counts, "train"), draw([tests] * len(classes), "test")

    def pick(whole: Batch, order: torch.Tensor, size: int = 4):
        for at in order.split(size) if len(order) else ():
            yield Batch(*(t[at] for t in whole))

    def train(epoch: int, start: int = 0):
        order = torch.randperm(len(learn.y), generator=generator(7, "order", index, epoch))
        yield from list(pick(learn, order))[start:]

    return Task(
        index,
        f"t{index}",
        classes,
        -(-len(learn.y) // 4),
        train,
        lambda: pick(learn, torch.arange(len(learn.y))),
        lambda: pick(test, torch.arange(len(test.y))),
    )


def stream() -> list[Task]:
    """Unequal tasks, single images, a class that the test set lacks, a task of one class."""
    return [
        task(0, range(0, 3)),
        task(1, range(3, 5), [5, 1]),
        task(2, range(5, 6), 1, tests=0),
        task(3, range(6, 10), 2),
    ]


def learn(strategy, task: Task, *, begin: bool = True, epoch: int = 0, step: int = 0) -> None:
    if begin:
        strategy.begin_task(task)
    for e in range(epoch, strategy.epochs):
        if step == 0:
            strategy.begin_epoch(task, e)
        for batch in task.train(e, step):
            strategy.observe(batch)
        step = 0
    strategy.end_task(task)


def wake(strategy, seed: int) -> None:
    """Give the newest adapters values, so that subspaces differ without training."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in strategy.bank.parameters_of(strategy.names[-1]):
            p.add_(torch.randn(p.shape, generator=draws) * 0.3)


def parameters(strategy: Ease) -> dict[str, torch.Tensor]:
    """What learns, under its official name."""
    found = {"proxy_fc.weight": strategy.head.weight, "proxy_fc.sigma": strategy.head.sigma}
    adapters = strategy.bank.adapters(strategy.names[-1])
    for i, adapter in enumerate(adapters.values()):
        for ours, theirs in (("down", "down_proj"), ("up", "up_proj")):
            layer = getattr(adapter, ours)
            found[f"backbone.cur_adapter.{i}.{theirs}.weight"] = layer.weight
            found[f"backbone.cur_adapter.{i}.{theirs}.bias"] = layer.bias
    return found


# ------------------------------------------------------------------------ recorded runs


@pytest.mark.usefixtures("gradients_stay")
@pytest.mark.parametrize("name", ["ease_run", "ease_run_ptm"])
def test_recorded_run(name, record_property):
    case = ClCase(f"ease/{name}")
    h = case.hyper
    strategy = make(
        recorded_backbone(),
        rank=h["ffn_num"],
        dropout=0.0,
        epochs=h["init_epochs"],
        epochs_later=h["later_epochs"],
        lr=h["init_lr"],
        later={"lr": h["later_lr"]},
        weight_decay=h["weight_decay"],
        alpha=h["alpha"],
        beta=h["beta"],
        recalc_sim=h["recalc_sim"],
        use_init_ptm=h["use_init_ptm"],
    )
    right = {e[1]: e[2] for e in case.info["events"] if e[0] == "accuracy"}
    for t in range(len(h["task_sizes"])):
        now = case.task(t, h["task_sizes"])
        strategy.begin_task(now)
        assert strategy.head.sigma.item() == 1
        with torch.no_grad():
            for key, p in parameters(strategy).items():
                p.copy_(case[f"task{t}/before_training/{key}"])
        sweeps = case.passes(f"train/train/classes{now.classes.start}-{now.classes.stop - 1}")
        losses, rates, step = [], [], 0
        for epoch, (_, batches) in enumerate(sweeps):
            strategy.begin_epoch(now, epoch)
            for rows in batches:
                rates.append([strategy.optimizer.param_groups[0]["lr"]])
                losses.append(strategy.observe(images("train", rows))["loss"])
                if step < 2:
                    for key, p in parameters(strategy).items():
                        case.close(f"task{t}/train/step{step}/grad/{key}", p.grad)
                        case.close(f"task{t}/train/step{step}/param/{key}", p)
                step += 1
        assert epoch + 1 == strategy.epochs
        case.close(f"task{t}/train/loss_per_step", torch.stack(losses))
        case.close(f"task{t}/train/lr_per_step", np.asarray(rates))
        for key, p in parameters(strategy).items():
            case.close(f"task{t}/after_training/{key}", p)
        strategy.end_task(now)
        case.close(f"task{t}/fc_weight", strategy.means.transpose(0, 1).flatten(1))
        rows = case[f"task{t}/test_indices"]
        test = images("test", rows)
        scores = strategy.predict(test.x)
        case.close(f"task{t}/test_logits", scores)
        predicted = scores.argmax(1)
        assert torch.equal(predicted, case[f"task{t}/test_logits"].argmax(1))
        assert round(100 * float((predicted == test.y).float().mean()), 2) == right[t]
        found = strategy.embed(images("test", range(8)).x, list(strategy.extractors()))
        case.close(f"task{t}/test_features_concat", found.transpose(0, 1).flatten(1))
    record_property("worst", case.worst)


def test_recorded_forward(record_property):
    case = ClCase("ease/ease_forward")
    strategy = make(recorded_backbone(), rank=8, use_init_ptm=True)
    x = images("test", case["input_test_indices"]).x
    for t in range(3):
        strategy.grow(case.task(t, [4, 3, 3]))
        with torch.no_grad():
            for key, p in parameters(strategy).items():
                if key.startswith("backbone"):
                    number, rest = key.removeprefix("backbone.cur_adapter.").split(".", 1)
                    p.copy_(case[f"adapter{t}/blocks.{number}.{rest}"])
    found = strategy.embed(x, ["pretrained", "task0", "task1", "task2"])
    for key, feature in zip(["pretrained", *(f"adapter{t}" for t in range(3))], found, strict=True):
        case.close(f"feature_{key}", feature)
    case.close("concat_test_features", found[1:].transpose(0, 1).flatten(1))
    case.close("concat_test_features_with_ptm", found.transpose(0, 1).flatten(1))
    case.close("train_path_feature_current_adapter", found[3])
    record_property("worst", case.worst)


def test_dropout_acts_where_the_official_adapter_has_it():
    case = ClCase("ease/ease_forward")
    unit = {k: case[f"dropout_unit/{k}"] for k in ("input", "keep_mask", "output_train_p0.1")}
    hidden = case["dropout_unit/bottleneck_before_dropout"]
    strategy = make(recorded_backbone(), rank=hidden.shape[-1])
    strategy.grow(case.task(0, [4, 3, 3]))
    adapter = next(iter(strategy.bank.adapters("task0").values()))
    with torch.no_grad():
        for ours, theirs in ((adapter.down, "down_proj"), (adapter.up, "up_proj")):
            ours.weight.copy_(case[f"dropout_unit/{theirs}.weight"])
            ours.bias.copy_(case[f"dropout_unit/{theirs}.bias"])
        plain = adapter.eval()(unit["input"])
        case.close("dropout_unit/output_eval_with_residual", plain + unit["input"])
        case.close("dropout_unit/bottleneck_before_dropout", adapter.down(unit["input"]).relu())
        kept = adapter.up(hidden * unit["keep_mask"] / 0.9) * 0.1
        case.close("dropout_unit/output_train_p0.1", kept)
        assert adapter.dropout == 0.1 and not torch.equal(adapter.train()(unit["input"]), plain)


def test_recorded_head(record_property):
    case = ClCase("ease/ease_head")
    d = 32
    owner = torch.tensor([0] * 4 + [1] * 3 + [2] * 3)
    for i, given in enumerate(case.hyper["reweight_combinations"]):
        options = {"alpha": given["alpha"], "beta": given["beta"], "use_init_ptm": given["ptm"]}
        strategy = make(recorded_backbone(), **options)
        strategy.owner = owner
        means = case[f"reweight{i}/weight"].unflatten(1, (-1, d)).transpose(0, 1)
        features = case[f"reweight{i}/features"].unflatten(1, (-1, d)).transpose(0, 1)
        scores = ensemble(features, means, strategy._weight(3))
        case.close(f"reweight{i}/logits_reweight", case[f"reweight{i}/sigma"] * scores)
    for kind, skipped in (("nopt", 0), ("ptm", 1)):
        for t in (1, 2):
            base = f"complement/{kind}/task{t}/weight"
            means = case[f"{base}_in"].unflatten(1, (-1, d)).transpose(0, 1)
            for recalculate in (False, True):
                out = means.clone()
                out[skipped:] = complete(means[skipped:], owner[: means.shape[1]], recalculate)
                key = f"{base}_out_recalc_sim_{str(recalculate).lower()}"
                case.close(key, out.transpose(0, 1).flatten(1))
    record_property("worst", case.worst)


# ------------------------------------------------------------------------ the parts


def test_the_paper_does_not_divide_alpha():
    owner, tasks = torch.tensor([0, 1, 2]), 3
    for reweight, other in (("code", 0.3), ("paper", 0.6)):
        strategy = make(alpha=0.6, reweight=reweight)
        strategy.owner = owner
        want = torch.full((3, 3), other).fill_diagonal_(1)
        assert torch.allclose(strategy._weight(tasks), want)
        strategy.owner = owner[:1]
        assert torch.equal(strategy._weight(1), torch.ones(1, 1))


def test_completion_by_hand():
    means = torch.randn(2, 4, 5, generator=generator(0, "m"))
    owner = torch.tensor([0, 1, -1, 1])  # the third class has no image
    out = complete(means, owner, True)
    cos = torch.cosine_similarity(means[0, 0], means[0, [1, 3]], dim=1)
    assert torch.allclose(out[1, 0], cos.softmax(0) @ means[1, [1, 3]], atol=1e-6)
    out[1, 0] = means[1, 0]
    assert torch.equal(out, means)
    nobody = complete(means, torch.tensor([0, -1, -1, -1]), True)
    assert torch.equal(nobody, means)
    one = complete(means, torch.tensor([0, 0, 0, 1]), False)
    assert torch.allclose(one[1, :3], means[1, 3].expand(3, -1))  # a single donor


def test_only_the_newest_set_and_its_head_learn():
    strategy, tasks = make(), stream()
    learn(strategy, tasks[0])
    old = [p.clone() for p in strategy.bank.parameters_of("task0")]
    before = {k: v.clone() for k, v in strategy.backbone.state_dict().items()}
    strategy.begin_task(tasks[1])
    held = {id(p) for p in strategy.updated_parameters()}
    assert held == {id(p) for p in (*strategy.bank.parameters_of("task1"),
                                    *strategy.head.parameters())}  # fmt: skip
    start = [p.clone() for p in strategy.bank.parameters_of("task1")]
    for batch in tasks[1].train(0):
        strategy.observe(batch)
    for batch in tasks[1].train(1):
        strategy.observe(batch)
    assert all(map(torch.equal, old, strategy.bank.parameters_of("task0")))
    assert not any(map(torch.equal, start, strategy.bank.parameters_of("task1")))
    assert all(torch.equal(v, before[k]) for k, v in strategy.backbone.state_dict().items())
    assert strategy.head.sigma.item() != 1


# ------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize(("count", "ptm"), [(10, False), (20, False), (10, True)])
def test_a_run_costs_one_pass_per_image_and_set(count, ptm):
    """Scores after every task: T (T+1) passes without, T with kept features, the same scores."""
    strategy = make(use_init_ptm=ptm, beta=0.5)
    tasks = [task(i, range(i, i + 1), 2, tests=2) for i in range(count)]
    cache, passes, plain, kept = FeatureCache(), strategy.backbone.passes, 0, 0
    for now in tasks:
        strategy.grow(now)
        wake(strategy, now.index)
        strategy.end_task(now)
        for seen in tasks[: now.index + 1]:
            start = passes.forward
            scored = list(cache.scores(f"test{seen.index}", seen.test, strategy, CPU))
            kept += passes.forward - start
            start = passes.forward
            for (scores, y), batch in zip(scored, seen.test(), strict=True):
                want = strategy.predict(batch.x)
                assert torch.equal(y, batch.y) and scores.shape == (2, now.index + 1)
                assert torch.allclose(scores, want, rtol=0, atol=2e-6)
                assert torch.equal(scores.argmax(1), want.argmax(1))
            plain += passes.forward - start
    total = 2 * count
    assert kept == total * (count + ptm)
    if not ptm:
        assert plain / kept >= {10: 3.5, 20: 7}[count]
    assert cache.computed == kept


def test_many_images_and_sets_are_embedded_in_parts(monkeypatch):
    strategy = make(use_init_ptm=True)
    for now in stream():
        strategy.grow(now)
        wake(strategy, now.index)
    x, names = torch.rand(5, 3, 16, 16), ["task1", "pretrained", "task3", "task0"]
    whole = strategy.embed(x, names)
    strategy.eval()  # `embed` sees to that itself
    monkeypatch.setattr("driftline.parts.adapters.bank.COPIES", 6)
    assert torch.allclose(strategy.embed(x, names), whole, atol=1e-5)
    for name, feature in zip(names, whole, strict=True):
        with torch.no_grad():
            want = strategy.bank.features(x, None if name == "pretrained" else name)
        assert torch.allclose(feature, want, atol=1e-5)


# ------------------------------------------------------------------------ odd input


def test_scores_before_the_end_of_a_task():
    strategy, tasks, x = make(), stream(), torch.rand(2, 3, 16, 16)
    strategy.begin_task(tasks[0])
    assert torch.equal(strategy.predict(x), torch.zeros(2, 3))
    strategy.end_task(tasks[0])
    first = strategy.predict(x)
    strategy.begin_task(tasks[1])
    during = strategy.predict(x)
    assert torch.equal(during[:, :3], first) and not during[:, 3:].any()


def test_a_class_without_images_scores_zero_and_gives_nothing():
    strategy = make()
    for now in (task(0, range(0, 2), [3, 0]), task(1, range(2, 4), [0, 2]), task(2, range(4, 5))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn(strategy, now)
    scores = strategy.predict(torch.rand(4, 3, 16, 16))
    assert scores.isfinite().all() and not scores[:, [1, 2]].any() and scores[:, [0, 3, 4]].all()


def test_a_class_that_comes_back_belongs_to_its_last_task():
    strategy = make()
    first, second = task(0, range(0, 3)), task(1, range(3, 5))
    for now in (first, second, task(2, range(1, 3))):
        learn(strategy, now)
    assert strategy.owner.tolist() == [0, 2, 2, 1, 1]
    assert strategy.predict(torch.rand(2, 3, 16, 16)).shape == (2, 5)


def test_one_class_tasks_warn_once():
    strategy = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(3):
            learn(strategy, task(i, range(i, i + 1)))
    assert [str(w.message) for w in caught if "one class" in str(w.message)] == [
        str(caught[0].message)
    ]


def test_nan_is_reported_with_the_setting():
    strategy, now = make(), task(0, range(0, 2))
    strategy.begin_task(now)
    batch = next(now.train(0))
    with pytest.raises(Diverged, match=r"strategy\.optim\.lr"):
        strategy.observe(batch._replace(x=batch.x * torch.nan))
    with torch.no_grad():
        strategy.bank.parameters_of("task0")[0].fill_(torch.nan)
    with pytest.raises(Diverged, match=r"class 0.*strategy\.optim\.lr"):
        strategy.end_task(now)


def test_bad_settings_and_networks_are_refused():
    with pytest.raises(UserError, match=r"strategy\.adapter\.kind\.rank"):
        make(rank=0)
    with pytest.raises(UserError, match=r"strategy\.adapter\.kind\.dropout"):
        make(dropout=1.0)
    cnn = Backbone(timm.create_model("test_resnet", num_classes=0))
    with pytest.raises(UserError, match=r"no place for adapters.*timm ViT"):
        make(cnn).grow(task(0, range(2)))


# ------------------------------------------------------------------------ resuming
