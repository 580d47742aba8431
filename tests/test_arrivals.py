"""Streams that do not wait: who answers which batch, what that is worth, and whole runs with it."""

from __future__ import annotations

from collections import deque
from copy import deepcopy

import numpy as np
import pytest
import torch
from conftest import copied
from test_analysis import write_run
from test_runs import Kill, records, stop_after

from driftline.analysis import load_runs, select
from driftline.analysis.tables import by_place, group_table
from driftline.core.arrivals import Budget, Deadline, Decay, begin, discount
from driftline.core.errors import UserError
from driftline.runs.execute import run_experiment

TINY = ["scenario.images=16", "scenario.corruptions=[contrast,fog]", "scenario.batch_size=4"]
TINY += ["scenario.probe_images=0", "scenario.clean_images=0"]
GIVEN = ["time.latency=3", "time.source=1"]
MEASURED: dict = {"latency": "measured", "source": "measured"}


def queued(latencies: list[float], interval: float, queue: int) -> list[int]:
    """Which batches are served, with the images in a queue: oldest out when it is full."""
    served, waiting, free = [], deque[int](), 0.0

    def serve(batch: int, start: float) -> float:
        served.append(batch)
        return start + latencies[batch]

    for i in range(len(latencies)):
        arrival = i * interval
        while waiting and free <= arrival:
            free = serve(waiting.popleft(), free)
        if free <= arrival:
            free = serve(i, arrival)
        elif queue:
            if waiting:
                waiting.popleft()
            waiting.append(i)
    for i in waiting:
        free = serve(i, free)
    return served


@pytest.mark.parametrize("queue", [0, 1])
def test_the_batches_served_are_those_of_a_simulated_queue(queue):
    """For the newest missed batch it is known on arrival whether its turn comes."""
    rng = np.random.default_rng(queue)
    for _ in range(50):
        # Quarters of a second, so that sums of times are exact.
        latencies = (rng.integers(1, 17, size=20) / 4).tolist()
        interval = float(rng.integers(1, 9)) / 4
        clock = Deadline(
            interval=interval, queue=queue, missed="source", latency="measured", source=1.0
        )
        served = []
        for i, latency in enumerate(latencies):
            who = clock.who(last=i == 19)
            clock.answered(who, latency, torch.tensor(1), 4)
            served += [i] if who == "method" else []
        assert served == queued(latencies, interval, queue)
        metrics = clock.summary()
        assert metrics["time/availability"] == 5 * len(served) == 100 - 5 * metrics["time/missed"]
        assert metrics["time/utility"] == pytest.approx(0.75 * metrics["time/availability"])
        assert metrics["time/err_served"] == 25


@pytest.mark.parametrize(("latency", "interval"), [(3, 1), (2.5, 1), (0.3, 0.1), (1, 1), (1, 4)])
def test_without_a_queue_so_many_are_missed_as_in_the_known_protocol(latency, interval):
    """ceil(latency / interval) - 1 after each (Alfarra et al.), whatever floats make of 0.3."""
    free, expected = 0.0, round(np.ceil(round(latency / interval, 6)))
    for n in range(40):
        start = begin(n * interval, free, interval)
        assert (start is not None) == (n % expected == 0), n
        free = free if start is None else start + latency


def test_a_late_answer_is_worth_less():
    assert discount(0.5, 1, 3) == discount(1, 1, 3) == 1 and discount(3, 1, 3) == 0.5
    clock = Decay(threshold=3.0, latency="measured", source=1.0)
    accuracies, delays = np.array([0.25, 0.5, 1.0]), np.array([3.0, 1.0, 0.5])
    for accuracy, delay in zip(accuracies, delays, strict=True):
        clock.answered("method", delay, torch.tensor(round(4 * (1 - accuracy))), 4)
    worth = np.array([0.5, 1, 1])
    cov = np.cov(accuracies, worth)[0, 1]
    assert clock.summary() == pytest.approx({
        "time/timeliness": 100 * worth.mean(),
        "time/alignment": 100 * cov,
        "time/utility": 100 * (accuracies.mean() * worth.mean() + cov),
    })  # fmt: skip
    clock.answered("method", 1.0, torch.tensor(0), 0)  # no image with a known label
    assert clock.summary()["time/timeliness"] == pytest.approx(100 * worth.mean())


def test_a_budget_is_spent_on_what_takes_longer_than_the_source():
    clock = Budget(budget=3.0, latency=2.5, source=1.0)
    answers = []
    for _ in range(5):
        answers.append(clock.who(last=False))
        clock.answered(answers[-1], 100.0, torch.tensor(3), 4)
    assert answers == ["method", "method", "frozen", "frozen", "frozen"]
    assert clock.summary() == {"time/adapted": 2, "time/spent": 3.0, "time/utility": 25}
    source = Budget(budget=3.0, latency=1.0, source=1.0)
    assert [source.who(False) for _ in range(9)] == ["method"] * 9


def test_the_source_is_timed_as_mean_and_six_deviations():
    clock = Deadline(interval=2.0, queue=0, missed="source", latency="measured", source="measured")
    clock.calibrate([1.0, 3.0])
    assert clock.unit == 2 + 6 and clock.about()["interval_seconds"] == 16
    assert clock.about()["repeatable"] is False


def rows(summary: dict) -> list[dict]:
    return records(summary["run"]["folder"])["batches"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Results that the runs here are compared with are made once."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def timed(configure, shared):
    """`timed("tent", "time=deadline", ...)` runs that on eight small batches."""

    def run(strategy: str, *words: str) -> dict:
        words = (f"strategy={strategy}", f"root={shared}", *TINY, *words)
        return run_experiment(configure(*words), [])

    return run


def test_missed_batches_are_answered_by_the_source_or_by_the_last_model(timed):
    plain, source, batch = (rows(timed(name)) for name in ("tent", "source", "bn_adapt"))
    summary = timed("tent", "time=deadline", *GIVEN)
    answered = rows(summary)
    assert [r["answer"] for r in answered] == (["method", *["source"] * 2] * 3)[:8]
    for late, never in zip(answered[1:3], source[1:3], strict=True):
        assert late["wrong"] == never["wrong"]
    assert answered[0]["wrong"] == plain[0]["wrong"] and answered[3]["segment"] == 0
    assert summary["cost"]["images"] == 12 and summary["cost"]["forward_images"] == 12
    assert summary["metrics"]["time/availability"] == 37.5
    assert summary["time"]["repeatable"] and summary["time"]["interval_seconds"] == 1
    assert "time" not in summary["source"]["metrics"]
    last = timed("tent", "time=deadline", *GIVEN, "time.missed=last", "strategy.optim.lr=0.1")
    # While the first batch is adapted to, the method is still what it was before: batch statistics.
    assert [r["answer"] for r in rows(last)][1:3] == ["last"] * 2
    assert [r["wrong"] for r in rows(last)[:3]] == [r["wrong"] for r in batch[:3]]


def test_a_stream_that_is_slow_enough_is_the_stream_that_waits(timed):
    """Also where everything is measured: warming up and timing change no number."""
    quick = ["strategy.threshold=0", "scenario.images=8"]  # which restores weights at random
    plain = timed("cotta", *quick)
    clocks = (
        ["time=deadline", *GIVEN, "time.interval=3"],
        ["time=deadline", "time.interval=1e9"],
        ["time=budget", "time.budget=1e9"],
    )
    for words in clocks:
        summary = timed("cotta", *quick, *words)
        kept = [{k: v for k, v in r.items() if k != "answer"} for r in rows(summary)]
        assert kept == rows(plain), words
        same = {k: v for k, v in summary["metrics"].items() if not k.startswith("time/")}
        assert same == plain["metrics"]
        assert summary["time"]["repeatable"] is (words[1:3] == GIVEN)
        assert summary["time"]["device"].startswith("cpu")


def test_given_latencies_resume_to_the_last_bit(timed, monkeypatch):
    words = ["time=deadline", "time.missed=last", "time.queue=1", *GIVEN]
    words += ["checkpoint.every=1", "strategy.optim.lr=0.1"]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Kill):
            timed("tent", *words)
    again = timed("tent", *words)
    whole = timed("tent", *words, "on_exists=rerun")
    assert rows(again) == rows(whole) and again["metrics"] == whole["metrics"]
    assert {r["answer"] for r in rows(again)} == {"method", "last"}
    for clock in (Decay(threshold=2.0, **MEASURED), Budget(budget=0.5, **MEASURED)):
        other = deepcopy(clock)
        clock.calibrate([1.0, 1.0])
        clock.answered(clock.who(False), 2.0, torch.tensor(1), 4)
        other.restore(copied(clock.snapshot()))
        assert other.summary() == clock.summary() and other.unit == 1
        assert other.who(False) == clock.who(False)


def test_clocks_are_for_streams_of_shifts_and_their_settings_for_a_chosen_clock(configure):
    for words, text in (
        (["strategy=simplecil", "scenario=split_cifar", "time=decay"], "simplecil learns tasks"),
        (["time=decay", "time.threshold=1"], "time.threshold must be a finite number, above 1"),
        (["time=deadline", "time.latency=fast"], "time.latency must be 'measured' or"),
    ):
        with pytest.raises(UserError, match=text):
            run_experiment(configure(*words), [])


def test_reports_show_utility_and_whose_time_it_is(tmp_path):
    metrics = {"time/utility": 40.0, "time/availability": 50.0}
    clock = {"protocol": "deadline", "repeatable": False, "device": "H100"}
    for name, about in (("tent", clock), ("cotta", clock | {"repeatable": True})):
        write_run(tmp_path, name, metrics=metrics, summary={"time": about})
    ((_, runs),) = by_place(select(load_runs(tmp_path)))
    table = group_table(runs, "time")
    assert table is not None and {"time/utility ↑", "time/availability ↑"} <= set(table.head)
    assert "time/...: measured on H100" in table.caption
