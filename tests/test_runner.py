"""The loops: diverging methods, the adapting clean score, rounds; transfer to the next domain."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from driftline.core.errors import Diverged
from driftline.runs import execute
from driftline.runs.execute import run_experiment

TINY = ["scenario.images=12", "scenario.corruptions=[contrast]", "scenario.probe_images=0"]


@pytest.fixture
def diverging(monkeypatch):
    """Every method's third batch returns NaN."""
    real = execute.make_strategy

    def make(*args):
        strategy, weights = real(*args)
        method = strategy.method
        adapt, count = method.adapt, iter(range(1000))

        def broken(x: Tensor) -> Tensor:
            scores = adapt(x)
            return scores * float("nan") if next(count) == 2 else scores

        method.adapt = broken
        return strategy, weights

    def switch(on: bool = True) -> None:
        monkeypatch.setattr(execute, "make_strategy", make if on else real)

    return switch


def test_a_diverged_method_stops_goes_back_or_is_recorded(configure, diverging, capsys):
    words = ["strategy=tent", *TINY, "scenario.batch_size=2", "scenario.clean_images=0"]
    run_experiment(configure("strategy=source", *words[1:]), [])
    diverging()
    with pytest.raises(Diverged, match="around=rollback"):
        run_experiment(configure(*words), [])
    metrics = run_experiment(configure(*words, "around=record_nan"), [])["metrics"]
    assert metrics["nan"] == 2
    summary = run_experiment(configure(*words, "around=rollback"), [])
    assert summary["metrics"]["nan"] == 0 and summary["method"] == {"rollbacks": 1}
    assert "rollbacks 1" in capsys.readouterr().out


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


def test_the_next_domain_is_scored_before_a_method_learns_it(configure):
    """With a method that logs batches, and with one that has none."""
    words = ["scenario=domains_imagefolder", "scenario.embedded_images=[2,1]"]
    words += ["scenario.domains=[clean,contrast]"]
    for method in (["strategy=linear_probe", "strategy.epochs=1"], ["strategy=simplecil"]):
        assert "fwt" in run_experiment(configure(*words, *method), [])["metrics"]


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
