"""How far a run is: a bar where somebody watches, plain lines in a file; by a clock of the test."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from driftline.core import console
from driftline.core.console import BAR_EVERY, LINE_EVERY, Console, duration
from driftline.core.metrics import OnlineError
from driftline.runs import sweep


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Run:
    """A run of 100 batches of 8 images, one every `seconds` by its clock."""

    def __init__(self, seconds: float = 1.0, **options: bool) -> None:
        self.now, self.asked, self.seconds = 0.0, 0, seconds
        self.console = Console("set", clock=lambda: self.now, **options)
        self.console.start(100, 20, "Tent", self.state)

    def state(self) -> str:
        self.asked += 1
        return "error 25.0 %"

    def go(self, batches: int) -> None:
        for _ in range(batches):
            self.now += self.seconds
            self.console.advance(8)


def test_without_a_terminal_a_line_comes_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    run = Run()
    run.go(59)
    assert capsys.readouterr().out == "" and run.asked == 0
    run.go(1)
    line = "set | Tent 80/100 batches, 8 images/s, error 25.0 %, about 20 s left\n"
    assert capsys.readouterr().out == line and run.asked == 1
    run.go(20)
    run.console.stop()
    assert capsys.readouterr().out == "" and sys.stderr.getvalue() == ""


def test_a_quiet_run_shows_its_progress_and_a_mute_one_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    quiet, mute = Run(LINE_EVERY, quiet=True), Run(LINE_EVERY, mute=True)
    quiet.console.say("a line")
    mute.console.say("a line", always=True)
    quiet.go(1)
    mute.go(2)
    assert capsys.readouterr().out.count("\n") == 1 and mute.asked == 0


def test_in_a_terminal_a_bar_shows_rate_and_state_without_asking_at_every_batch(
    capsys, monkeypatch
):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run = Run(seconds=BAR_EVERY / 10)
    run.go(80)
    text = sys.stderr.getvalue()
    assert 7 <= run.asked <= 8  # of 80 batches
    assert "160 images/s, error 25.0 %" in text and "set | Tent" in text
    run.console.stop()
    assert capsys.readouterr().out == ""


def test_runs_that_share_a_terminal_print_lines(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(Console, "bars", False)
    Run(LINE_EVERY).go(1)
    assert "21/100 batches" in capsys.readouterr().out and sys.stderr.getvalue() == ""


def test_a_notebook_gets_a_bar_though_it_is_no_terminal(monkeypatch, recwarn):
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(console, "_notebook_bar", lambda: console.tqdm)  # without widgets
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    run = Run()
    run.go(3)
    assert "error 25.0 %" in sys.stderr.getvalue()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not console.in_notebook()


def test_the_bar_of_a_notebook_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert issubclass(console._notebook_bar(), console.tqdm)


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.4, "12 s"), (89, "89 s"), (150, "2 min"), (9000, "2.5 h")]
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_the_error_so_far_is_over_all_images():
    online = OnlineError(["a", "b"], 3)
    assert online.error() != online.error()  # NaN without an image
    for segment, wrong in ((0, 1), (1, 3)):
        scores = torch.eye(3)[[0, 0, 0, 0]]
        y = torch.tensor([1] * wrong + [0] * (4 - wrong))
        online.update(scores, y, segment, torch.full((4,), segment), "logits")
    assert online.error() == 50.0 == online.summary()["err_images"]


def test_a_sweep_says_which_run_of_how_many_and_what_is_left(tmp_path, monkeypatch):
    runs = [["strategy=tent", f"seed={i}"] for i in range(4)]
    assert sweep.place_in_sweep(tmp_path, 6, ["seed=9"]) == "sweep, run 7: seed=9"  # not planned
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    os.utime(tmp_path / "sweep.json", (1000, 1000))
    monkeypatch.setattr(sweep.time, "time", lambda: 1100.0)
    assert sweep.place_in_sweep(tmp_path, 0, runs[0]) == "sweep 1/4: seed=0"
    sweep.note(tmp_path, 0, state="finished", before=True, seconds=10)  # says nothing of the time
    assert sweep.place_in_sweep(tmp_path, 1, runs[1]) == "sweep 2/4: seed=1"
    sweep.note(tmp_path, 1, state="failed", error="x", seconds=90)
    sweep.note(tmp_path, 2, state="running")
    assert sweep.place_in_sweep(tmp_path, 2, runs[2]) == "sweep 3/4: seed=2, about 3 min left"


@pytest.mark.parametrize("at_once", [1, 4])
def test_runs_taken_over_do_not_spoil_what_a_sweep_says_is_left(tmp_path, monkeypatch, at_once):
    """40 runs from before, of 3 s each, and 10 made here, of 60 s each; 10 are left."""
    runs = [["strategy=tent", f"seed={i}"] for i in range(60)]
    (tmp_path / "sweep.json").write_text(json.dumps({"runs": runs}))
    os.utime(tmp_path / "sweep.json", (1000, 1000))
    for number in range(50):
        before = number < 40
        sweep.note(tmp_path, number, state="finished", before=before, seconds=3 if before else 60)
    monkeypatch.setattr(sweep.time, "time", lambda: 1000 + (40 * 3 + 10 * 60) / at_once)
    line = sweep.place_in_sweep(tmp_path, 50, runs[50])
    assert line == f"sweep 51/60: seed=50, about {sweep.duration(10 * 60 / at_once)} left"
