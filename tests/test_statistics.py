"""Methods that tune once and keep statistics, against recorded runs and by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import strategy_node
from golden_cl_case import ClCase, backbone, images
from test_aper import parameters
from torch import Tensor

from driftline.cl.first_task import FirstTask
from driftline.cl.ranpac import RIDGES, RanPAC, held_out_errors
from driftline.core.build import build
from driftline.core.stream import Batch, Task
from driftline.parts.statistics import ridge_solve


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
    with torch.no_grad():
        for name, p in mine.items():
            p.copy_(case[f"task0/before_training/{name}"])
    losses, rates = [], []
    for epoch, (_, rows) in enumerate(case.passes("train/train")):
        strategy.begin_epoch(task, epoch)
        for chosen in rows:
            step = len(losses)
            rates.append([strategy.optimizer.param_groups[0]["lr"]])
            losses.append(strategy.observe(images("train", chosen))["loss"].item())
            for name, p in mine.items() if step < 2 else ():
                case.close(f"task0/train/step{step}/grad/{name}", p.grad)
                case.close(f"task0/train/step{step}/param/{name}", p)
    case.close("task0/train/loss_per_step", losses)
    case.close("task0/train/lr_per_step", rates)
    for name, p in mine.items():
        case.close(f"task0/after_training/{name}", p)


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


def test_a_matrix_that_rounding_left_indefinite_is_solved_all_the_same():
    v = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)).double())[0]
    matrix = v @ torch.diag(torch.tensor([-1e-3, 0.0, 1, 2, 3, 4]).double()) @ v.T
    got = ridge_solve(matrix, v[:, 2:3], 1e-6)
    torch.testing.assert_close(got, v[:, 2:3] / (1 + 1e-6))
