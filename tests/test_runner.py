"""The adaptation loop: windows of single images, diverging methods, the adapting clean score."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.errors import Diverged
from driftline.core.strategy import TTAStrategy
from driftline.core.window import Window
from driftline.runs import execute
from driftline.runs.execute import run_experiment


class Echo(TTAStrategy):
    """Scores are sums of the images that the method was given; it counts its updates."""

    updates: Tensor

    def __init__(self, batch_dependent: bool = True) -> None:
        super().__init__(Backbone(torch.nn.Linear(1, 1)))
        self.batch_dependent = batch_dependent  # type: ignore[misc]
        self.seen: list[tuple[str, list[float]]] = []

    def adapt(self, x: Tensor) -> Tensor:
        self.seen.append(("adapt", x[:, 0, 0, 0].tolist()))
        return x[:, 0, 0, :1]

    def predict(self, x: Tensor) -> Tensor:
        self.seen.append(("predict", x[:, 0, 0, 0].tolist()))
        return x[:, 0, 0, :1]


def image(value: float) -> Tensor:
    return torch.full((1, 3, 2, 2), value)


def test_a_window_fills_up_and_then_overwrites_its_oldest_place():
    method, window = Echo(), Window(3)
    scores = [window.adapt(method, image(i)).item() for i in range(7)]
    assert scores == list(range(7))
    assert method.seen == [
        ("predict", [0]),
        ("predict", [0, 1]),
        ("adapt", [0, 1, 2]),
        ("predict", [3, 1, 2]),
        ("predict", [3, 4, 2]),
        ("adapt", [3, 4, 5]),
        ("predict", [6, 4, 5]),
    ]


def test_without_batch_statistics_only_the_image_is_predicted():
    method, window = Echo(batch_dependent=False), Window(2)
    for i in range(3):
        window.adapt(method, image(i))
    assert method.seen == [("predict", [0]), ("adapt", [0, 1]), ("predict", [2])]


def test_a_window_of_one_adapts_to_every_image_and_a_snapshot_goes_on():
    method, window = Echo(), Window(1)
    window.adapt(method, image(0))
    assert method.seen == [("adapt", [0])]
    window = Window(3)
    for i in range(4):
        window.adapt(method, image(i))
    again = Window(3)
    again.restore(window.snapshot())
    method.seen.clear()
    window.adapt(method, image(9))
    again.adapt(method, image(9))
    assert method.seen[0] == method.seen[1] == ("predict", [3, 9, 2])


TINY = ["scenario.images=12", "scenario.corruptions=[contrast]", "scenario.probe_images=0"]


def test_a_stream_of_single_images_runs_through_a_window(configure):
    words = ["strategy=tent", *TINY, "scenario.batch_size=1", "scenario.clean_images=6"]
    summary = run_experiment(configure(*words, "scenario.window=4"), [])
    assert summary["cost"]["batches"] == 12 and summary["data"]["window"] == 4
    # 3 updates on 4 images; 9 predictions on the buffer so far (1+2+3, then 4 each)
    assert summary["cost"]["forward_images"] == 3 * 4 + 1 + 2 + 3 + 6 * 4
    assert summary["cost"]["backward_images"] == 3 * 4


@pytest.fixture
def diverging(monkeypatch):
    """Every method's third batch returns NaN."""
    real = execute.make_strategy

    def make(*args):
        strategy, weights = real(*args)
        adapt, count = strategy.adapt, iter(range(1000))

        def broken(x: Tensor) -> Tensor:
            scores = adapt(x)
            return scores * float("nan") if next(count) == 2 else scores

        strategy.adapt = broken
        return strategy, weights

    def switch(on: bool = True) -> None:
        monkeypatch.setattr(execute, "make_strategy", make if on else real)

    return switch


def test_a_diverged_method_stops_goes_back_or_is_recorded(configure, diverging):
    words = ["strategy=tent", *TINY, "scenario.batch_size=2", "scenario.clean_images=0"]
    run_experiment(configure("strategy=source", *words[1:]), [])
    diverging()
    with pytest.raises(Diverged, match="on_nan=rollback"):
        run_experiment(configure(*words), [])
    metrics = run_experiment(configure(*words, "on_nan=record"), [])["metrics"]
    assert metrics["nan"] == 2 and "rollbacks" not in metrics
    metrics = run_experiment(configure(*words, "on_nan=rollback"), [])["metrics"]
    assert metrics["nan"] == 0 and metrics["rollbacks"] == 1


def test_scoring_clean_images_while_adapting_leaves_the_stream_alone(configure):
    words = ["strategy=tent", "strategy.optim.lr=0.01", *TINY[:2], "scenario.batch_size=4"]
    words += ["scenario.clean_images=20"]
    both = run_experiment(configure(*words), [])["metrics"]
    frozen = run_experiment(configure(*words, "scenario.clean_adapting=false"), [])["metrics"]
    extra = {k for k in both if k.endswith("_adapting")}
    assert extra == {f"{k}_adapting" for k in
                     ("clean_err_before", "clean_err_after", "source_forgetting")}  # fmt: skip
    assert {k: v for k, v in both.items() if k not in extra} == frozen


def test_rounds_are_reported(configure):
    words = ["strategy=bn_adapt", *TINY, "scenario.order=recurring", "scenario.rounds=3"]
    metrics = run_experiment(configure(*words), [])["metrics"]
    errors = [metrics[f"err_round/{r}"] for r in (1, 2, 3)]
    assert errors[0] == errors[1] == errors[2] == metrics["err_mean"]  # BN-adapt learns nothing


@pytest.mark.slow
def test_constant_images_and_a_stream_shorter_than_a_batch(configure, monkeypatch):
    words = [*TINY[1:], "scenario.images=3", "scenario.batch_size=8", "scenario.clean_images=0"]
    for strategy in ("bn_adapt", "tent", "cotta", "lame", "ecotta"):
        real = execute.make_strategy

        def make(*args, real=real):
            made, weights = real(*args)
            adapt = made.adapt
            made.adapt = lambda x: adapt(torch.full_like(x, 0.5))
            return made, weights

        with monkeypatch.context() as patch:
            patch.setattr(execute, "make_strategy", make)
            metrics = run_experiment(configure(f"strategy={strategy}", *words), [])["metrics"]
        assert metrics["nan"] == 0 and metrics["err_mean"] <= 100
