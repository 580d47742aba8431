"""APER against LAMDA-CL/LAMDA-PILOT 5240714 on a tiny ViT, and what else it promises."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from conftest import strategy_node
from golden_cl_case import ClCase, backbone, images
from test_cl_methods import backbone as tiny_backbone
from test_cl_methods import learn, stream, tensors, through_file
from test_cl_methods import make as method
from torch import Tensor

from driftline.cl.aper import APER
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError
from driftline.core.features import FeatureCache
from driftline.core.stream import Task
from driftline.parts.adapters.bottleneck import Bottleneck
from driftline.parts.adapters.prompt import Prompt
from driftline.parts.heads import PrototypeHead

YAML = Path(__file__).parents[1] / "conf" / "strategy" / "aper.yaml"
RECORDED = {  # the names of the recordings -> conf/adapter
    "adapter": "aper",
    "ssf": "scale_shift",
    "vpt_deep": "prompt",
    "vpt_shallow": "aper_vpt_shallow",
}
TUNINGS = RECORDED | {"finetune": None, "dora": "dora", "peft": "peft/lora"}
PEFT = pytest.param(
    "peft",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("peft") is None, reason="the peft library is not installed"
    ),
)
ALL = (*RECORDED, "finetune", "dora", PEFT)
LORA = {"r": 2, "lora_alpha": 2, "lora_dropout": 0.1}


def make(tuning: str, net=None, **options) -> APER:
    small = {"aper": {"rank": 8}, "dora": {"rank": 8}, "peft/lora": {"options": LORA}}
    small |= {"prompt": {"count": 3}, "aper_vpt_shallow": {"count": 3}}
    adapter = TUNINGS[tuning]
    options = {"epochs": 2, "lr": 0.1} | small.get(adapter, {}) | options
    node = strategy_node("aper", adapter=adapter, **options)
    return build(node, at="strategy", backbone=net or backbone(), seed=3)


def recorded_tasks(batch: int = 16) -> list[Task]:
    """The three tasks of the recordings (4, 3, 3 classes), shuffled for training."""
    return [recorded_task(index, range(a, b), batch) for index, (a, b) in enumerate(SPLIT)]


SPLIT = ((0, 4), (4, 7), (7, 10))


def recorded_task(index: int, classes: range, batch: int = 16, per_class: int = 12) -> Task:
    rows = [12 * c + i for c in classes for i in range(per_class)]
    test = [4 * c + i for c in classes for i in range(4)]

    def train(epoch: int, start: int = 0):
        draw = torch.Generator().manual_seed(100 * index + epoch)
        order = torch.tensor(rows)[torch.randperm(len(rows), generator=draw)]
        yield from [images("train", r.numpy()) for r in order.split(batch)][start:]

    def fixed(split: str, chosen: list[int]):
        return lambda: (images(split, r.numpy()) for r in torch.tensor(chosen).split(batch))

    steps = -(-len(rows) // batch)
    test_images = fixed("test", test)
    return Task(index, f"t{index}", classes, steps, train, fixed("train", rows), test_images)


# ------------------------------------------------------------------------------ recorded runs


def recorded_name(point: str, key: str, blocks: int) -> str:
    """Where the recording keeps parameter `key` of the adapter at `point`."""
    path = point.partition(":")[0]
    if "down" in key or "up" in key:
        layer, kind = key.split(".")
        return f"{path.removesuffix('.mlp')}.adaptmlp.{layer}_proj.{kind}"
    place, number = {
        "patch_embed": ("patch_embed", 1),
        "norm": ("", 1),
        "norm1": ("", 1),
        "norm2": ("", 2),
        "qkv": ("", 1),
        "proj": ("", 2),
        "fc1": ("", 1),
        "fc2": ("", 2),
    }[path.split(".")[-1]]
    owner = place or path.rpartition(".")[0]
    return f"{owner}.ssf_{key}_{number}" if owner else f"ssf_{key}_{number}"


def parameters(strategy: APER) -> dict[str, Tensor]:
    """Everything that is tuned, under the recorded names; prompts are rows of one array."""
    found, bank = {}, strategy.bank
    points = bank.adapters("tuned")
    if all(isinstance(a, Prompt) for a in points.values()):
        found["backbone.Prompt_Tokens"] = [a.prompt for a in points.values()]
    else:
        for point, adapter in points.items():
            for key, p in adapter.named_parameters():
                found["backbone." + recorded_name(point, key, 2)] = p
    found |= {"fc.weight": strategy.tuning_head.weight, "fc.sigma": strategy.tuning_head.sigma}
    return found


def value(p, of=lambda t: t.detach()) -> Tensor:
    return torch.stack([of(q) for q in p]) if isinstance(p, list) else of(p)


@pytest.mark.usefixtures("gradients_stay")
@pytest.mark.parametrize("tuning", RECORDED)
def test_a_recorded_run_is_reproduced(tuning):
    case = ClCase(f"pilot/aper_{tuning}")
    hyper = case.hyper
    strategy = make(
        tuning,
        epochs=hyper["tuned_epoch"],
        lr=hyper["init_lr"],
        momentum=hyper["momentum"],
        weight_decay=hyper["weight_decay"],
        **{"dropout": 0.0} if tuning == "adapter" else {},
    )
    accuracies = [e[2] for e in case.info["events"] if e[0] == "accuracy"]
    for index, percent in enumerate(accuracies):
        task = case.task(index, hyper["task_sizes"])
        strategy.begin_task(task)
        if index == 0:
            mine = parameters(strategy)
            start = {k for k in case.data if k.startswith("task0/before_training/")}
            assert {f"task0/before_training/{k}" for k in mine} == start
            with torch.no_grad():
                for name, p in mine.items():
                    initial = case[f"task0/before_training/{name}"]
                    for q, v in (
                        zip(p, initial, strict=True) if isinstance(p, list) else [(p, initial)]
                    ):
                        assert q.shape == v.shape
                        q.copy_(v)
            losses, rates = [], []
            for epoch, (_, rows) in enumerate(case.passes("train/train")):
                strategy.begin_epoch(task, epoch)
                for chosen in rows:
                    step = len(losses)
                    rates.append([strategy.optimizer.param_groups[0]["lr"]])
                    losses.append(strategy.observe(images("train", chosen))["loss"].item())
                    for name, p in mine.items() if step < 2 else ():
                        case.close(
                            f"task0/train/step{step}/grad/{name}", value(p, lambda t: t.grad)
                        )
                        case.close(f"task0/train/step{step}/param/{name}", value(p))
            case.close("task0/train/loss_per_step", losses)
            case.close("task0/train/lr_per_step", rates)
            for name, p in mine.items():
                case.close(f"task0/after_training/{name}", value(p))
        assert strategy.epochs == (hyper["tuned_epoch"] if index == 0 else 0)
        strategy.end_task(task)
        seen = images("test", case.data[f"task{index}/test_indices"])
        features = torch.cat([*strategy.embed(seen.x, ["plain", "tuned"])], 1)
        case.close(f"task{index}/test_features", features)
        case.close(f"task{index}/fc_weight", strategy.head.weight)
        scores = strategy.predict(seen.x)
        case.close(f"task{index}/test_outputs", scores)
        case.close(f"task{index}/fc_sigma", [1.0])
        predicted = scores.argmax(1)
        assert torch.equal(predicted, case[f"task{index}/test_outputs"].argmax(1))
        assert round(100 * (predicted == seen.y).double().mean().item(), 2) == percent
    print(f"aper_{tuning}: {case.worst:.3f} of the tolerance")


# ------------------------------------------------------------------------------ initial values


def test_initial_values_follow_the_official_distributions():
    for tuning in RECORDED:
        strategy = make(tuning)
        strategy.begin_task(recorded_task(0, range(0, 4)))
        case = ClCase(f"pilot/aper_{tuning}")
        for name, p in parameters(strategy).items():
            got, want = value(p), case[f"task0/before_training/{name}"]
            if not want.any():
                assert not got.any(), name
            elif "ssf_scale" in name or "ssf_shift" in name:
                assert abs(got.mean() - float("scale" in name)) < 0.02 and 0.01 < got.std() < 0.03
            elif name == "fc.sigma":
                assert torch.equal(got, want)
            else:  # uniform, bound 1 / sqrt(32)
                assert 0.9 < got.abs().max() * 32**0.5 <= 1, name
        bank = strategy.bank.adapters("tuned")
        if tuning == "adapter":
            assert all(isinstance(a, Bottleneck) and a.scale == 0.1 for a in bank.values())


def test_the_published_number_of_parameters():
    """1,189,632 of the adapters of a ViT-B/16; 5 prompts of 768 in each of 12 blocks."""
    import timm

    from driftline.backbones.backbone import Backbone

    net = timm.create_model("vit_base_patch16_224", num_classes=0, weight_init="skip")
    counts = {}
    for tuning in ("adapter", "vpt_deep", "vpt_shallow"):
        size = {"rank": 64} if tuning == "adapter" else {"count": 5}
        strategy = make(tuning, Backbone(net), **size)
        adapters = strategy.adapter.adapters(strategy.backbone).values()
        counts[tuning] = sum(p.numel() for a in adapters for p in a.parameters())
    assert counts == {"adapter": 1_189_632, "vpt_deep": 12 * 5 * 768, "vpt_shallow": 5 * 768}


# ------------------------------------------------------------------------------ every variant

X = images("test", range(40)).x


def quiet(strategy: APER, tasks: list[Task]) -> APER:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in tasks:
            learn(strategy, t)
    return strategy


@pytest.mark.parametrize("tuning", ALL)
def test_only_the_first_task_tunes_and_the_frozen_network_stays_bitwise_the_same(tuning):
    strategy, tasks = make(tuning), recorded_tasks()
    before = backbone().state_dict()
    learn(strategy, tasks[0])
    first = tensors(strategy)
    tuned = {k for k in first if "tuned" in k or k.startswith("copy.")}
    assert tuned and sum(p.numel() for p in strategy.updated_parameters()) > 0
    quiet(strategy, tasks[1:])
    after = tensors(strategy)
    assert strategy.optimizer is None and not any("tuning_head" in k for k in after)
    assert all(torch.equal(first[k], after[k]) for k in tuned)
    assert not any(p.requires_grad for p in strategy.parameters())
    for key, want in before.items():
        name = f"backbone.{key}"
        owner, _, leaf = name.rpartition(".")
        got = after[name] if name in after else after[f"{owner}.base_layer.{leaf}"]
        assert torch.equal(got, want), key
    changed = strategy.embed(X, ["plain", "tuned"])
    assert not torch.allclose(changed[0], changed[1], atol=1e-4)
    with torch.no_grad():
        assert torch.equal(changed[0], backbone().features(X))


@pytest.mark.parametrize("tuning", ALL)
def test_scores_are_cosines_with_the_means_of_both_features(tuning):
    strategy, tasks = make(tuning), recorded_tasks()
    quiet(strategy, tasks)
    both = lambda x: torch.cat([*strategy.embed(x, ["plain", "tuned"])], 1)  # noqa: E731
    y = images("train", range(120)).y
    features = both(images("train", range(120)).x)
    means = torch.stack([features[y == c].mean(0) for c in range(10)])
    torch.testing.assert_close(strategy.head.weight, means, rtol=1e-4, atol=1e-5)
    f = both(X)
    cosine = (f @ means.T) / f.norm(dim=1, keepdim=True) / means.norm(dim=1)
    torch.testing.assert_close(strategy.predict(X), cosine, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tuning", ALL)
def test_cached_evaluation_is_the_prediction(tuning):
    strategy, tasks, cache = make(tuning), recorded_tasks(), FeatureCache()
    device = torch.device("cpu")
    hashes = []
    for i, t in enumerate(tasks):
        quiet(strategy, [t])
        hashes.append(dict(strategy.extractors()))
        for seen in tasks[: i + 1]:
            kept = [s for s, _ in cache.scores(f"test{seen.index}", seen.test, strategy, device)]
            direct = [strategy.predict(b.x) for b in seen.test()]
            assert all(torch.equal(a, b) for a, b in zip(kept, direct, strict=True))
    assert hashes[0] == hashes[1] == hashes[2] and len(set(hashes[0].values())) == 2
    assert cache.computed == 40 * 2 and cache.reused == (16 + 16 + 12) * 2
    cache.close()


def test_extractors_tell_other_weights_apart():
    runs = [quiet(make("adapter", lr=lr), recorded_tasks()[:1]) for lr in (0.1, 0.2)]
    a, b = (dict(s.extractors()) for s in runs)
    assert a["plain"] == b["plain"] and a["tuned"] != b["tuned"]
    state = through_file(runs[1].snapshot())
    runs[0].restore(state)
    assert dict(runs[0].extractors()) == b


@pytest.mark.parametrize("name", ["simplecil", "linear_probe"])
def test_features_of_other_frozen_networks_are_kept_as_well(name):
    strategy, cache, device = method(name), FeatureCache(), torch.device("cpu")
    for t in stream():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            learn(strategy, t)
        kept = [s for s, _ in cache.scores("one", stream()[0].test, strategy, device)]
        direct = [strategy.predict(b.x) for b in stream()[0].test()]
        assert all(torch.equal(a, b) for a, b in zip(kept, direct, strict=True))
    assert (cache.computed, cache.reused) == (18, 36)


# ------------------------------------------------------------------------------ resuming


# ------------------------------------------------------------------------------ odd input


def test_one_class_in_the_first_task_warns_and_is_simplecil():
    strategy = make("vpt_deep", weight_decay=0.0)
    tasks = [recorded_task(0, range(0, 1)), recorded_task(1, range(1, 4))]
    with pytest.warns(UserWarning, match=r"first task has one class.*scenario\.base"):
        strategy.begin_task(tasks[0])
    learn(strategy, tasks[0], begin=False)
    learn(strategy, tasks[1])
    plain = PrototypeHead(32)
    plain.grow(4)
    train = images("train", range(48))
    prompted = strategy.embed(train.x, ["tuned"])[0]  # zero prompts still take attention
    plain.update(prompted, train.y)
    torch.testing.assert_close(strategy.head.weight[:, 32:], plain.weight)


def test_unequal_tasks_single_images_and_absent_test_classes():
    tasks = [
        recorded_task(0, range(0, 2), per_class=3),
        recorded_task(1, range(2, 3), per_class=1),
        recorded_task(2, range(3, 8), per_class=1),
    ]
    strategy = quiet(make("adapter"), tasks)
    assert strategy.head.counts.tolist() == [3, 3] + [1] * 6
    assert strategy.predict(X).shape == (40, 8) and strategy.predict(X).isfinite().all()
    again = recorded_task(3, range(0, 2), per_class=6)
    learn(strategy, again)
    assert strategy.head.counts.tolist() == [9, 9] + [1] * 6


def test_what_is_not_finite_is_told():
    strategy, t = make("adapter"), recorded_task(0, range(0, 4))
    strategy.begin_task(t)
    batch = next(t.train(0))
    with pytest.raises(Diverged, match=r"loss is nan: lower strategy\.optim\.lr \(now 0\.1\)"):
        strategy.observe(batch._replace(x=batch.x * torch.nan))
    assert all(p.isfinite().all() for p in strategy.parameters())
    with torch.no_grad():
        strategy.bank.parameters_of("tuned")[0].fill_(torch.nan)
    with pytest.raises(Diverged, match=r"class 0: .*lower strategy\.optim\.lr"):
        strategy.end_task(t)


def test_networks_that_are_no_vit_are_refused_except_for_fine_tuning():
    with pytest.raises(UserError, match=r"no place for adapters.*timm ViT"):
        make("adapter", tiny_backbone())
    strategy = make("finetune", tiny_backbone())
    quiet(strategy, stream())
    start = tiny_backbone().state_dict()
    for key, v in strategy.backbone.state_dict().items():
        assert torch.equal(v, start[key]), key
    assert not torch.equal(strategy.copy.net.body[0].weight, start["net.body.0.weight"])
    assert torch.equal(strategy.copy.net.fc.weight, start["net.fc.weight"])  # no part in features
    assert strategy.predict(torch.rand(3, 3, 8, 8)).shape == (3, 6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "strategy.adapter.kind.rank must be a whole number, at least 1"),
        ({"tuning": "vpt_deep", "count": 0}, "strategy.adapter.kind.count must be a whole number"),
        ({"epochs": 0}, "strategy.epochs must be a whole number, at least 1"),
        ({"blocks": "first"}, "strategy.adapter.blocks must be a whole number"),
        ({"at": []}, "strategy.adapter.at must be a list of one or more"),
    ],
)
def test_bad_settings_are_named(options, text):
    with pytest.raises(UserError) as caught:
        make(**({"tuning": "adapter"} | options))
    assert text in str(caught.value)
