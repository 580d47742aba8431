"""Mirrors of the run's files: they cannot stop a run, and a resumed run goes on counting."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG, ROOT

from driftline.core.errors import UserError
from driftline.core.record import RunLogger
from driftline.core.sinks import About, TensorBoardSink, WandbSink, make_sinks
from driftline.runs.execute import run_experiment

WANDB = {"mode": "offline", "project": "driftline-test", "entity": None, "every": 2}
SUMMARY = {
    "run": {"folder": "f"},
    "metrics": {"err_mean": 1.0},
    "cost": {"batches": 4},
    "reference": [
        {"strategy": "s", "metric": "err_mean", "value": 2.0, "ours": 1.0, "status": "seen"}
    ],
}


@pytest.fixture
def about(tmp_path) -> About:
    return About(tmp_path, {"seed": 0}, "test-run", "s/tent/r", "run", ("seed:0",))


def fill(log: RunLogger) -> None:
    for i in range(4):
        log.log("batches", batch=i, wrong=i, seconds=0.1)
    log.log("experiences", index=0, name="fog:5", err=50.0)
    for after, name in ((-1, "start"), (0, "fog:5")):
        log.log("matrix", after=after, after_name=name, on="fog:5", acc=50.0 + after)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(folder))
    found.Reload()
    tags = found.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags}


def test_wandb_online_without_a_key_is_an_error_not_a_prompt(about, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        WandbSink(about, **{**WANDB, "mode": "online"})


def test_a_failing_tracker_warns_once_and_the_run_goes_on(about, monkeypatch):
    import wandb

    def broken(**_):
        raise RuntimeError("server on fire")

    monkeypatch.setattr(wandb, "init", broken)
    with pytest.warns(UserWarning, match="server on fire") as caught:
        sink = WandbSink(about, **WANDB)
        log = RunLogger(about.folder, "s", [sink])
        fill(log)
        log.finish(SUMMARY)
    assert (about.folder / "summary.json").exists()
    assert len([w for w in caught if "wandb is off" in str(w.message)]) == 1


def test_wandb_gets_rows_with_their_own_steps_and_the_tables(about, monkeypatch):
    import wandb

    class Run:
        def __init__(self):
            self.rows, self.summary, self.ended = [], {}, None

        def define_metric(self, *_, **__): ...

        def log(self, row):
            self.rows.append(row)

        def finish(self, exit_code):
            self.ended = exit_code

    run, given = Run(), {}
    monkeypatch.setattr(wandb, "init", lambda **options: given.update(options) or run)
    log = RunLogger(about.folder, "s", [WandbSink(about, **WANDB)])
    fill(log)
    log.finish(SUMMARY)
    assert given["group"] == "s/tent/r" and given["job_type"] == "run"
    assert given["tags"] == ["seed:0"] and given["config"] == {"seed": 0}
    batches = [r for r in run.rows if "batches/step" in r]
    assert [(r["batches/step"], r["batches/wrong"]) for r in batches] == [(2, 1), (4, 3)]
    assert [r["matrix/step"] for r in run.rows if "matrix/step" in r] == [0, 1]
    assert run.summary["metrics/err_mean"] == 1.0 and run.ended == 0
    assert run.rows[-1]["tables/matrix"].data == [["start", 49.0], ["fog:5", 50.0]]
    assert run.rows[-1]["tables/published"].data == [["s", "err_mean", 2.0, 1.0, "seen"]]


@pytest.mark.slow
def test_wandb_offline_needs_no_account_and_writes_into_the_run_folder(about, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    log = RunLogger(about.folder, "s", [WandbSink(about, **WANDB)])
    fill(log)
    log.finish(SUMMARY)
    runs = list(about.folder.glob("wandb/offline-run-*"))
    assert runs and list(runs[0].glob("*.wandb"))
    command = [sys.executable, "scripts/sync_wandb.py", str(about.folder)]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert (
        listed.returncode == 0 and "wandb sync" in listed.stdout and str(runs[0]) in listed.stdout
    )
    (runs[0] / "run-test-run.wandb.synced").touch()  # the mark that an upload leaves
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert "nothing to upload" in listed.stdout


def test_tensorboard_has_the_rows_and_the_summary(about):
    pytest.importorskip("tensorboard")
    log = RunLogger(about.folder, "s", [TensorBoardSink(about, every=2)])
    fill(log)
    log.finish(SUMMARY)
    found = scalars(about.folder / "tensorboard")
    assert found["batches/wrong"] == [(2, 1.0), (4, 3.0)]
    assert found["matrix/fog:5"] == [(0, 49.0), (1, 50.0)]
    assert found["experiences/err"] == [(0, 50.0)] and "experiences/index" not in found
    assert found["summary/metrics/err_mean"] == [(0, 1.0)]


def test_a_resumed_run_goes_on_counting_batches(about):
    pytest.importorskip("tensorboard")
    for _ in range(2):
        log = RunLogger(about.folder, "s", [TensorBoardSink(about, every=3)])
        fill(log)
        log.close()
    assert [s for s, _ in scalars(about.folder / "tensorboard")["batches/wrong"]] == [3, 6]


def test_tensorboard_without_its_package_names_the_fix(about, monkeypatch):
    monkeypatch.setattr("driftline.core.sinks.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[tensorboard\]"'):
        make_sinks({"wandb": None, "tensorboard": {"every": 1}}, about)


def test_groups_hold_the_seeds_of_one_setting(configure, monkeypatch):
    """Same group for two seeds, another one for another severity; companions are marked."""
    told: list[About] = []
    monkeypatch.setattr(
        "driftline.runs.execute.make_sinks", lambda loggers, about: told.append(about) or []
    )
    tiny = ["scenario.corruptions=[contrast]", "scenario.images=10", "scenario.probe_images=0"]
    tiny += ["scenario.clean_images=0", "strategy=bn_adapt"]
    for more in ("seed=0", "seed=1", "scenario.severity=3"):
        run_experiment(configure(*tiny, more), [])
    runs = [a for a in told if a.job_type == "run"]
    companions = [a for a in told if a.job_type == "companion"]
    assert runs[0].group == runs[1].group != runs[2].group
    assert runs[0].run_id != runs[1].run_id and "seed:1" in runs[1].tags
    assert all("/source/" in a.group for a in companions) and len(companions) == 3
    assert json.dumps(runs[0].config)
