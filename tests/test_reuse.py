"""What is not computed again: answers beside a stream of a method that has not changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from broken_methods import Sound
from conftest import copied
from torch import nn

from driftline.core.reuse import Answered, leaves, predicting
from driftline.core.stream import Segment, ShiftStream, Skipped
from driftline.runs.execute import run_experiment

SMALL = ["scenario=imagenet_c", "scenario.corruptions=[contrast,fog,brightness]"]
SMALL += ["scenario.images=12", "scenario.batch_size=6"]
SMALL += ["scenario.probe_images=3", "scenario.clean_images=5"]


def sound() -> Sound:
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    method = Sound(net, seed=0)
    method.begin_stream()
    return method


def noted(method: Sound) -> Answered:
    answered = Answered()
    answered.now(predicting(method))
    answered.counts = {"fog": (1, 2)}
    return answered


def replace_data(method: Sound) -> None:
    method.bias.data = method.bias.data.clone() + 1


CHANGES = {
    "in place": lambda m: m.mean.add_(1),
    "past the version counter": lambda m: m.bias.data.add_(1e-7),
    "another storage": replace_data,
    "minus zero": lambda m: m.mean.neg_(),
    "another shape": lambda m: m.register_buffer("mean", torch.zeros(1, 10)),
    "another type": lambda m: m.register_buffer("mean", torch.zeros(10, dtype=torch.int32)),
    "optimiser": lambda m: m.optimizer.param_groups[0].update(lr=0.2),
    "one more value": lambda m: m.optimizer.param_groups[0].update(more=0),
    "one more buffer": lambda m: m.register_buffer("new", torch.zeros(0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_state_is_noticed_and_nothing_else(change):
    method = sound()
    answered = noted(method)
    method.rng("noise").manual_seed(7)  # `predict` draws nothing
    with torch.no_grad():
        method.mean.add_(0)  # a version that counts, and no other value
    answered.now(predicting(method))
    assert answered.counts
    again = Answered()
    again.restore(copied(answered.snapshot()))  # as a resumed run has it
    with torch.no_grad():
        CHANGES[change](method)
    for one in (answered, again):
        one.now(predicting(method))
        assert not one.counts


def test_a_state_known_to_its_first_change_alone_is_not_taken_for_the_same():
    answered = Answered()
    answered.now(leaves([1, 2, 3]))
    answered.now(leaves([1, 5, 3]))  # ends at the 5
    answered.counts = {"fog": (1, 2)}
    answered.now(leaves([1, 5, 4]))
    assert not answered.counts
    answered.counts = {"fog": (1, 2)}
    answered.now(leaves([1, 5, 4]))
    assert answered.counts  # by now all of it is known


def cells(summary) -> dict[tuple[int, str], list[int]]:
    rows = map(json.loads, Path(summary["run"]["folder"], "matrix.jsonl").read_text().splitlines())
    return {(r["after"], r["on"]): [r["correct"], r["n"]] for r in rows}


@pytest.mark.parametrize("strategy", ["bn_adapt", "tent"])
def test_what_no_metric_reads_changes_none(configure, strategy):
    """The cells that are scored are those of all, and so are the metrics."""
    words = [*SMALL, f"strategy={strategy}"]
    few = run_experiment(configure(*words), [])
    every = run_experiment(configure(*words, "scenario.probe_cells=all"), [])
    assert few["metrics"] == every["metrics"] and {"fwt", "stability"} < few["metrics"].keys()
    some, whole = cells(few), cells(every)
    assert some.items() <= whole.items() and len(whole) == 4 * 4
    images = 3 * 3 + 5  # in a whole row
    if strategy == "bn_adapt":  # it stands still: one row is scored, and one batch adapted to
        assert some == whole
        assert few["cost"]["evaluation_forward_images"] == images + 5
        assert few["cost"]["evaluation_images"] == 4 * images + 2 * 5
    else:
        assert set(whole) - set(some) == {(0, "brightness:5"), (0, "clean"), (1, "clean")}
        assert few["cost"]["evaluation_forward_images"] == 4 * images - 3 - 5 - 5 + 2 * 5
        assert few["cost"]["evaluation_backward_images"] == 2 * 5


def test_rows_of_a_stream_that_comes_back():
    segments = [Segment(i, "s", (d,), 1, 1, iter) for i, d in enumerate([0, 1, 2, 0, 1, 2])]
    probes = dict.fromkeys(range(3), iter)
    stream = ShiftStream("s", 2, ["a", "b", "c"], segments, {}, Skipped(), probes, probe_every=2)
    every = {0, 1, 2}
    ends = {-1: (every, True), 5: (every, True)}
    assert stream.scored() == {**ends, 1: (every, False), 3: (every, False)}
    sparse = ShiftStream("s", 2, ["a", "b", "c"], segments[:3], {}, Skipped(), probes)
    assert sparse.scored()[0] == ({0, 1}, False)
