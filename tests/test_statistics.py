"""Methods that tune once and keep statistics, against recorded runs and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import strategy_node
from golden_cl_case import ClCase, backbone, images
from test_aper import parameters
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.fecam import FeCAM
from driftline.cl.first_task import FirstTask
from driftline.cl.fsa import TotalLDA
from driftline.cl.ranpac import RIDGES, RanPAC, held_out_errors
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.stream import Batch, Task
from driftline.parts.statistics import covariance, ridge_solve


def make(name: str, net=None, **options):
    node = strategy_node(name, **options)
    return build(node, at="strategy", backbone=net or backbone(), seed=3, num_classes=10)


def in_order(case: ClCase, task: Task, source: str = "train/test") -> Task:
    """`task` with its images as the reference went through them after the training."""
    name = f"{source}/classes{task.classes.start}-{task.classes.stop - 1}"
    ((_, rows),) = case.passes(name)

    def fit() -> Iterator[Batch]:
        return (images("train", chosen) for chosen in rows)

    return replace(task, fit=fit)


def accuracies(case: ClCase) -> list[float]:
    return [e[2] for e in case.info["events"] if e[0].startswith("accuracy")]


def tuned_as_recorded(case: ClCase, strategy: FirstTask, task: Task, mine: dict[str, Tensor]):
    """The first task from recorded initial values on recorded batches, step by step."""

    def compare(at: str, of=lambda p: p) -> None:
        keys = [n for n in mine if f"{at}/{n}" in case.data]
        assert len(keys) == sum(k.startswith(f"{at}/") for k in case.data)
        for name in keys:
            case.close(f"{at}/{name}", of(mine[name]))

    with torch.no_grad():
        for key in [k for k in case.data if k.startswith("task0/before_training/")]:
            mine[key.removeprefix("task0/before_training/")].copy_(case[key])
    losses, rates = [], []
    for epoch, (_, rows) in enumerate(case.passes("train/train")):
        strategy.begin_epoch(task, epoch)
        for chosen in rows:
            step = len(losses)
            rates.append([strategy.optimizer.param_groups[0]["lr"]])
            losses.append(strategy.observe(images("train", chosen))["loss"].item())
            if step < 2:
                compare(f"task0/train/step{step}/grad", lambda p: p.grad)
                compare(f"task0/train/step{step}/param")
    case.close("task0/train/loss_per_step", losses)
    case.close("task0/train/lr_per_step", rates)
    compare("task0/after_training")


def adapters_and_head(strategy: FirstTask, prefix: str) -> dict[str, Tensor]:
    """What the first task tunes, under the recorded names."""
    return {k.replace("backbone.", f"{prefix}."): p for k, p in parameters(strategy).items()}


def compared(case: ClCase, index: int, scores: Tensor) -> None:
    """Predictions and the official accuracy after a task."""
    y = images("test", case.data[f"task{index}/test_indices"]).y
    percent = 100 * (scores.argmax(1) == y).double().mean().item()
    assert round(percent, 2) == round(accuracies(case)[index], 2)


# ------------------------------------------------------------------------------ RanPAC


class LoaderOrder(RanPAC):
    """Divides the images of a task in the order in which they come, and keeps the errors."""

    def order(self, images: int) -> Tensor:
        return torch.arange(images)

    def choose(self, h: Tensor, targets: Tensor) -> None:
        super().choose(h, targets)
        self.h, self.errors = h, held_out_errors(h, targets)


@pytest.mark.usefixtures("gradients_stay")
@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("ranpac/ranpac_original_frozen", None),
        ("ranpac/ranpac_original_adapter", "convnet"),
        ("pilot/ranpac", "backbone"),
    ],
)
def test_ranpac_reproduces_a_recorded_run(name, prefix):
    case = ClCase(name)
    hyper, port = case.hyper, name.startswith("pilot")
    node = strategy_node(
        "ranpac",
        epochs=hyper["tuned_epoch"] if prefix else 0,
        lr=hyper.get("body_lr", hyper.get("init_lr")),
        momentum=hyper["momentum"],
        weight_decay=hyper["weight_decay"],
        projection=hyper["M"],
        score="cosine" if port else "inner",
        rank=hyper["ffn_num"],
        dropout=0.0,
    )
    node["_target_"] = f"{__name__}.LoaderOrder"
    strategy = build(node, at="strategy", backbone=backbone(), seed=3, num_classes=10)
    strategy.projection.copy_(case["W_rand"])
    for index in range(3):
        task = in_order(case, case.task(index, hyper["task_sizes"]))
        strategy.begin_task(task)
        if prefix and index == 0:
            tuned_as_recorded(case, strategy, task, adapters_and_head(strategy, prefix))
        strategy.end_task(task)
        at, seen = f"task{index}", task.classes.stop
        case.close(f"{at}/G", strategy.gram)
        case.close(f"{at}/Q", F.pad(strategy.targets, (0, 10 - seen)))
        case.close(f"{at}/features_in_loader_order", strategy.h)
        assert float(strategy.ridge) == case.data[f"{at}/ridge_selected"]
        # Theirs is a mean over all columns of the stream; below 1 it is rounding noise.
        errors, want = strategy.errors * seen / 10, case[f"{at}/ridge_validation_mse"]
        kept = [i for i, r in enumerate(RIDGES) if r >= 1]
        rtol = case.info["tolerance"]["task*/ridge_validation_mse"]["rtol"]
        assert (errors - want)[kept].abs().max() <= rtol * want[kept].max() + 1e-7
        case.close(f"{at}/fc_weight", strategy.weight)
        case.close(f"{at}/fc_sigma", strategy.sigma if port else [1.0])
        x = images("test", case.data[f"{at}/test_indices"]).x
        (features,) = strategy.embed(x, strategy.reads)
        case.close(f"{at}/test_features", strategy.expand(features) if port else features)
        scores = strategy.predict(x)
        case.close(f"{at}/test_outputs", scores)
        compared(case, index, scores)
    print(f"{name}: {case.worst:.3f} of the tolerance")


def features_of(split: str = "train") -> tuple[Tensor, Tensor]:
    """Features [N, 32] of the recorded images and their labels."""
    batch = images(split, range(120 if split == "train" else 40))
    with torch.no_grad():
        return backbone().features(batch.x), batch.y


def learned(strategy, tasks: list[Task]):
    for task in tasks:
        strategy.begin_task(task)
        strategy.end_task(task)
    return strategy


def whole(sizes: tuple[int, ...], fit_size: int = 12) -> list[Task]:
    case = ClCase("ranpac/ranpac_original_frozen")
    return [case.task(i, list(sizes), fit_size) for i in range(len(sizes))]


def test_ranpac_is_the_ridge_solution_on_all_images_whatever_the_tasks():
    options = {"epochs": 0, "projection": 48}
    several = learned(make("ranpac", **options), whole((4, 3, 3)))
    once = learned(make("ranpac", **options), whole((10,), fit_size=7))
    features, y = features_of()
    h = several.expand(features)
    torch.testing.assert_close(several.gram, once.gram, rtol=1e-5, atol=1e-3)
    targets = F.one_hot(y, 10).float()
    want = torch.linalg.solve(
        h.double().T @ h.double() + several.ridge * torch.eye(48), h.double().T @ targets.double()
    )
    torch.testing.assert_close(several.weight, want.T.float(), rtol=1e-3, atol=1e-5)


def test_the_chosen_ridge_is_that_of_seventeen_plain_solutions():
    features, y = features_of()
    targets = F.one_hot(y, 10).double()
    draws = torch.Generator().manual_seed(0)
    for columns in (20, 200):  # more images than columns, and fewer
        h = F.relu(features @ torch.randn(32, columns, generator=draws)).double()
        h, targets = h[(rows := torch.randperm(120, generator=draws))], targets[rows]
        a, b = h[:96], h[96:]
        plain = [
            (b @ torch.linalg.solve(a.T @ a + r * torch.eye(columns), a.T @ targets[:96]))
            - targets[96:]
            for r in RIDGES
        ]
        got = held_out_errors(h, targets)
        want = torch.stack([p.square().mean() for p in plain])
        torch.testing.assert_close(got[6:], want[6:])
        assert got.argmin() == want.argmin()


def test_a_task_of_one_image_keeps_the_ridge_of_the_task_before():
    strategy = learned(make("ranpac", epochs=0, projection=48), whole((4, 3, 3))[:1])
    before = float(strategy.ridge)
    lonely = replace(whole((4, 3, 3))[1], fit=lambda: iter([images("train", [48])]))
    learned(strategy, [lonely])
    assert float(strategy.ridge) == before and strategy.weight.isfinite().all()
    assert strategy.predict(images("test", range(5)).x).shape == (5, 7)


@pytest.mark.parametrize("ridge", [1e-8, 1.0, 1e6])
def test_a_ridge_that_is_lost_in_the_rounding_of_the_sums_is_raised(ridge):
    """Few images, many columns, large features: float32 sums solve nothing with a tiny ridge."""
    strategy = make("ranpac", epochs=0, projection=400)
    strategy.grow(whole((4, 3, 3))[0])
    draws = torch.Generator().manual_seed(0)
    h = F.relu(3000 + 300 * torch.randn(40, 400, generator=draws))
    targets = F.one_hot(torch.arange(40) % 4, 4).float()
    strategy.gram += h.T @ h
    strategy.targets += h.T @ targets
    strategy.ridge.fill_(ridge)
    weight = strategy.solve(h, targets)
    assert (h @ weight.T - targets).square().mean() < targets.square().mean()
    assert float(strategy.ridge) == ridge or ridge < 1e6  # one that works stays


def test_a_matrix_that_rounding_left_indefinite_is_solved_all_the_same():
    v = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())[0]
    matrix = v @ torch.diag(torch.tensor([-1e-3, 0.0, 1, 2, 3, 4]).double()) @ v.T
    got = ridge_solve(matrix, v[:, 2:3], 1e-6)
    torch.testing.assert_close(got, v[:, 2:3] / (1 + 1e-6))


# ------------------------------------------------------------------------------ FeCAM


class Watched(FeCAM):
    """Keeps what the recordings call prototypes and covariances of the new classes."""

    def mean_of(self, features: Tensor) -> Tensor:
        self.raw = [*getattr(self, "raw", []), features.mean(0)]
        return super().mean_of(features)

    def matrix_of(self, features: Tensor) -> Tensor:
        matrix = super().matrix_of(features)
        self.spreads = [*getattr(self, "spreads", []), covariance(self.transformed(features))]
        self.matrices = [*getattr(self, "matrices", []), matrix]
        return matrix


def fecam(**options) -> Watched:
    node = strategy_node("fecam", **options) | {"_target_": f"{__name__}.Watched"}
    return build(node, at="strategy", backbone=backbone(), seed=3)


CNN = {"unit_length": "after", "power": 0.5, "shrinkages": 2, "alpha2": 1.0}
PORT = {"unit_length": "after", "shrinkage": "fixed", "alpha1": 100.0, "scaling": "rows"}


def test_fecam_of_the_vit_script_reproduces_a_recorded_run():
    case = ClCase("fecam/fecam_vit")
    strategy = fecam()
    for index in range(3):
        task = case.task(index, case.hyper["task_sizes"])
        strategy.begin_task(task)
        strategy.end_task(task)
        at, new = f"task{index}", slice(task.classes.start, task.classes.stop)
        case.close(f"{at}/class_means_new", strategy.means[new])
        case.close(f"{at}/covariances_new", torch.stack(strategy.spreads[new]))
        case.close(f"{at}/normalised_covariances_new", torch.stack(strategy.matrices[new]))
        x = images("test", case.data[f"{at}/test_indices"]).x
        (features,) = strategy.embed(x, strategy.reads)
        case.close(f"{at}/test_features_normalised", strategy.transformed(features))
        case.close(f"{at}/test_distances", -strategy.predict(x))
        compared(case, index, strategy.predict(x))
    print(f"fecam_vit: {case.worst:.3f} of the tolerance")


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("per_class", CNN),
        ("per_class_no_tukey", CNN | {"power": None, "alpha1": 10.0, "alpha2": 10.0}),
        ("diagonal", CNN | {"spread": "diagonal"}),
    ],
)
def test_fecam_of_the_cnn_trainer_reproduces_recorded_statistics(variant, options):
    case = ClCase("fecam/fecam_statistics")
    strategy, y = fecam(**options), images("train", range(120)).y
    strategy.collected = lambda task: (case["train_features"], y)
    task = replace(case.task(0, [5]), index=1)
    strategy.grow(task)
    strategy.end_task(task)
    shrunk = [strategy.shrunk(s, 2) for s in strategy.spreads]
    case.close(f"{variant}/covariance_shrunk_twice", torch.stack(shrunk))
    case.close(f"{variant}/matrix_used", torch.stack(strategy.matrices))
    case.close(f"{variant}/prototypes", torch.stack(strategy.raw))
    queries = case["test_features"][case["test_indices"]]
    case.close(f"{variant}/test_distances", strategy.distances(queries))
    print(f"fecam_statistics {variant}: {case.worst:.3f} of the tolerance")


@pytest.mark.usefixtures("gradients_stay")
def test_fecam_of_the_port_reproduces_a_recorded_run():
    case = ClCase("fecam/fecam_pilot_run")
    hyper = case.hyper
    strategy = fecam(
        **PORT,
        epochs=hyper["tuned_epoch"],
        lr=hyper["init_lr"],
        weight_decay=hyper["weight_decay"],
        rank=hyper["ffn_num"],
        dropout=0.0,
    )
    for index in range(3):
        task = in_order(case, case.task(index, hyper["task_sizes"]))
        strategy.begin_task(task)
        if index == 0:
            tuned_as_recorded(case, strategy, task, adapters_and_head(strategy, "backbone"))
        strategy.end_task(task)
        at, new = f"task{index}", slice(task.classes.start, task.classes.stop)
        case.close(f"{at}/prototypes", torch.stack(strategy.raw))
        matrices = torch.stack(strategy.matrices[new]).float()
        case.close(f"{at}/normalised_covariances_new", matrices)
        x = images("test", case.data[f"{at}/test_indices"]).x
        (features,) = strategy.embed(x, strategy.reads)
        case.close(f"{at}/test_features", features)
        case.close(f"{at}/test_distances", -strategy.predict(x))
        compared(case, index, strategy.predict(x))
    print(f"fecam_pilot_run: {case.worst:.3f} of the tolerance")


def test_distances_are_the_quadratic_forms_of_every_pair():
    for options in (CNN | {"power": None}, PORT, {"spread": "diagonal"}, {"spread": "common"}):
        strategy = learned(fecam(**options), whole((4, 3, 3)))
        x = F.normalize(features_of("test")[0], dim=1)
        want = torch.zeros(len(x), 10)
        for c in range(10):
            inverse = strategy.inverses[0 if options.get("spread") == "common" else c]
            inverse = inverse.diag() if inverse.ndim == 1 else inverse
            for i, one in enumerate(x):
                gap = one - strategy.means[c]
                want[i, c] = gap @ inverse @ gap
        got = -strategy.predict(images("test", range(40)).x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_common_covariance_is_weighted_by_classes():
    strategy = learned(fecam(spread="common", unit_length="after"), whole((4, 3, 3)))
    features, y = features_of()
    first, second, third = (
        covariance(features[(y >= a) & (y < b)]) for a, b in ((0, 4), (4, 7), (7, 10))
    )
    joint = 4 / 7 * first + 3 / 7 * strategy.shrunk(second, 1)
    joint = 7 / 10 * joint + 3 / 10 * strategy.shrunk(third, 1)
    torch.testing.assert_close(strategy.common, joint, rtol=1e-5, atol=1e-8)


def test_classes_of_one_image_get_euclidean_distances_with_a_warning():
    strategy = fecam()
    task = replace(whole((4, 3, 3))[0], fit=lambda: iter([images("train", [0, 12, 13, 24])]))
    strategy.begin_task(task)
    with pytest.warns(UserWarning, match=r"no covariance from the images of class 0, 2"):
        strategy.end_task(task)
    assert torch.equal(strategy.inverses[0], torch.eye(32))
    scores = strategy.predict(images("test", range(3)).x)
    assert (scores[:, 3] == -1e6).all() and scores.isfinite().all()  # no image of class 3


def test_a_power_needs_features_that_are_not_negative():
    strategy = fecam(power=0.5)
    with pytest.raises(UserError, match=r"features of at least 0.*strategy\.power=null"):
        learned(strategy, whole((4, 3, 3))[:1])
    with pytest.raises(UserError, match=r"strategy\.first_scores=head needs.*strategy\.epochs"):
        fecam(first_scores="head")


# ------------------------------------------------------------------------------ FSA


@pytest.mark.usefixtures("gradients_stay")
def test_fsa_reproduces_a_recorded_run(monkeypatch):
    case = ClCase("fsa/fsa_run")
    hyper = case.hyper
    strategy = make("fsa", epochs=hyper["epochs"], lr=hyper["lr"])
    assert strategy.optim.kind == "adam" and strategy.optim.weight_decay == 0
    masks = iter(case["task0/train/dropout_masks"])

    def drop(features: Tensor, rate: float) -> Tensor:
        return features * torch.stack([next(masks) for _ in features]) / (1 - rate)

    monkeypatch.setattr("driftline.cl.fsa.dropout", drop)
    for index in range(3):
        task = case.task(index, hyper["task_sizes"])
        strategy.begin_task(task)
        if index == 0:
            mine = {f"extractor.{n}": p for n, p in strategy.copy.net.named_parameters()}
            head = strategy.tuning_head
            mine |= {"linear_head.weight": head.weight, "linear_head.bias": head.bias}
            tuned_as_recorded(case, strategy, task, mine)
            assert next(masks, None) is None
        strategy.end_task(task)
        at = f"task{index}"
        seen = images("train", range(12 * task.classes.stop))
        case.close(f"{at}/train_features", strategy.embed(seen.x, strategy.reads)[0])
        case.close(f"{at}/lda_coefficients", strategy.head.weight.T)
        case.close(f"{at}/lda_bias", strategy.head.bias)
        test = images("test", case.data[f"{at}/test_indices"])
        scores = strategy.predict(test.x)
        case.close(f"{at}/test_logits", scores)
        ((_, rows),) = case.passes(f"test/test/classes0-{task.classes.stop - 1}")
        theirs = F.pad(scores, (0, 10 - scores.shape[1]))  # future classes score 0 and may win
        right = (theirs.argmax(1) == test.y).double()
        batches = torch.stack([right[r].mean() for r in rows])  # theirs is a mean over batches
        assert 100 * float(batches.mean()) == pytest.approx(accuracies(case)[index])
    print(f"fsa_run: {case.worst:.3f} of the tolerance")


def test_the_head_of_fsa_reproduces_recorded_numbers():
    case = ClCase("fsa/fsa_head")
    head = TotalLDA(7, ridge=1.0)
    head.grow(5)
    for features, y in zip(case["features"].split(4), case["labels"].split(4), strict=True):
        head.update(features, y)
    head.solve()
    case.close("covariance_plus_identity", head.covariance() + torch.eye(7))
    case.close("coefficients", head.weight.T)
    case.close("bias", head.bias)
    assert not head(case["features"])[:, 2].any()  # a class without images
    single = TotalLDA(7, ridge=1.0)
    single.grow(1)
    single.update(case["features"][:1], torch.zeros(1, dtype=torch.int64))
    case.close("covariance_single_sample", single.covariance())


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet"])
def test_film_is_a_factor_and_a_summand_between_norm_and_activation(name):
    torch.manual_seed(0)
    net = Backbone(timm.create_model(name, num_classes=0).eval(), input_size=32)
    options = {} if name == "test_efficientnet" else {"at": ["bn1:out", "layer*.*.bn*:out"]}
    strategy = make("fsa", net, adapter="fsa_film", epochs=1, **options)
    strategy.begin_task(whole((4, 3, 3))[0])
    x, draws = images("train", range(8)).x, torch.Generator().manual_seed(1)
    torch.testing.assert_close(strategy.features(x, "tuned"), net.features(x))  # starts at (1, 0)
    twin = deepcopy(net)
    with torch.no_grad():
        for point, film in strategy.bank.adapters("tuned").items():
            for p in (film.gamma, film.beta):
                p.add_(0.3 * torch.randn(p.shape, generator=draws))
            norm = twin.net.get_submodule(point.removesuffix(":out"))
            norm.weight.mul_(film.gamma)
            norm.bias.mul_(film.gamma).add_(film.beta)
    torch.testing.assert_close(strategy.features(x, "tuned"), twin.features(x))
    assert len(strategy.bank.parameters_of("tuned")) == 2 * len(strategy.bank.adapters("tuned"))


def test_film_behind_something_else_than_batchnorm_is_refused():
    strategy = make("fsa", adapter="fsa_film", epochs=1, at=["norm:out"])
    with pytest.raises(UserError, match=r"FiLM acts behind BatchNorm, not LayerNorm"):
        strategy.begin_task(whole((4, 3, 3))[0])


# ------------------------------------------------------------------------------ streaming LDA


def by_hand(tasks: list[Task], strategy, skip: bool) -> tuple[Tensor, Tensor]:
    """Means and covariance, image after image, as the paper writes them."""
    means, counts = torch.zeros(10, 32).double(), torch.zeros(10)
    spread, t = torch.zeros(32, 32).double(), 0
    for task in tasks:
        for batch in task.fit():
            for x, y in zip(strategy.embed(batch.x, ["plain"])[0].double(), batch.y, strict=True):
                gap = x - means[y]
                if skip and counts[y] == 0:
                    gap = torch.zeros(32).double()
                spread = (t * spread + t / (t + 1) * torch.outer(gap, gap)) / (t + 1)
                means[y] += (x - means[y]) / (counts[y] + 1)
                counts[y], t = counts[y] + 1, t + 1
    return means, spread


def mixed(tasks: list[Task], size: int) -> list[Task]:
    """The same tasks with their images shuffled, in batches of another size."""
    rows = [torch.cat([b.index for b in t.fit()]) for t in tasks]
    draws = torch.Generator().manual_seed(0)
    rows = [r[torch.randperm(len(r), generator=draws)] for r in rows]
    return [
        replace(t, fit=lambda r=r: (images("train", part.numpy()) for part in r.split(size)))
        for t, r in zip(tasks, rows, strict=True)
    ]


@pytest.mark.parametrize("skip", [False, True])
def test_batches_of_streaming_lda_are_the_recursion_over_single_images(skip):
    tasks = mixed(whole((4, 3, 3)), 7)
    options = {"base": "stream", "first_image": "skipped" if skip else "counts"}
    strategy = learned(make("slda", **options), tasks)
    means, spread = by_hand(tasks, strategy, skip)
    torch.testing.assert_close(strategy.head.means, means)
    torch.testing.assert_close(strategy.head.spread, spread)
    inverse = torch.linalg.pinv((1 - 1e-4) * spread + 1e-4 * torch.eye(32))
    x = features_of("test")[0].double()
    want = torch.stack([x @ inverse @ m - m @ inverse @ m / 2 for m in means], 1).float()
    got = strategy.predict(images("test", range(40)).x)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    assert torch.equal(got.argmax(1), want.argmax(1))


def test_the_first_task_of_streaming_lda_starts_from_a_shrunk_covariance():
    strategy = learned(make("slda", covariance="static"), whole((4, 3, 3)))
    features, y = (part[:48] for part in features_of())
    centred = (features - torch.stack([features[y == c].mean(0) for c in range(4)])[y]).double()
    spread = centred.T @ centred / 48
    trace, square = spread.trace(), (spread @ spread).trace()
    share = min(1.0, float((square + trace**2) / (49 * (square - trace**2 / 32))))
    want = (1 - share) * spread + share * trace / 32 * torch.eye(32)
    torch.testing.assert_close(strategy.head.spread, want, rtol=1e-5, atol=1e-7)
    assert strategy.head.counts.tolist() == [12] * 10
    with pytest.raises(UserError, match=r"strategy\.covariance=static keeps.*strategy\.base=oas"):
        make("slda", covariance="static", base="stream")


# ------------------------------------------------------------------------------ ACIL


def test_acil_is_the_recursion_on_the_inverse():
    strategy = learned(make("acil", projection=48), whole((4, 3, 3)))
    features, y = features_of()
    h, targets = strategy.expand(features).double(), F.one_hot(y, 10).double()
    inverse, weight = torch.eye(48).double() / 0.1, torch.zeros(48, 10).double()
    for rows in torch.arange(120).split(12):
        x, wanted = h[rows], targets[rows]
        inner = torch.linalg.inv(torch.eye(len(rows)) + x @ inverse @ x.T)
        inverse = inverse - inverse @ x.T @ inner @ x @ inverse
        weight = weight + inverse @ x.T @ (wanted - x @ weight)
    torch.testing.assert_close(strategy.weight.double(), weight.T, rtol=1e-4, atol=1e-6)
    assert strategy.gram.dtype == torch.float64 and float(strategy.ridge) == 0.1
    assert float(strategy.projection.abs().max()) <= 32**-0.5


def test_the_labels_of_acils_first_task_are_smoothed():
    strategy = make("acil", projection=48, epochs=1, lr=0.01, smoothing=0.2)
    strategy.begin_task(whole((4, 3, 3))[0])
    batch = images("train", range(0, 48, 3))
    with torch.no_grad():
        log = strategy.tuning_head(strategy.features(batch.x, "tuned")).log_softmax(1)
    target = 0.8 * F.one_hot(batch.y, 4) + 0.2 / 4
    loss = strategy.observe(batch)["loss"]
    torch.testing.assert_close(loss, -(target * log).sum(1).mean())
