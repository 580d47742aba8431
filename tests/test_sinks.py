"""Mirrors of the run's files: they cannot stop a run, and a resumed run goes on counting."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG, ROOT

from driftline.core.errors import UserError
from driftline.core.record import RunLogger
from driftline.core.sinks import About, TensorBoardSink, WandbSink, check_sinks, short
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


def test_wandb_online_without_a_key_is_an_error_not_a_prompt(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        check_sinks({"wandb": {**WANDB, "mode": "online"}})


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


class Tracker:
    """What Weights & Biases makes of a run: `rows` of this process, `summary` of the whole run."""

    def __init__(self) -> None:
        self.rows, self.summary, self.ended = [], {}, None
        self.options: dict[str, object] = {}

    def start(self, **options: object) -> Tracker:
        self.options, self.rows = options, []
        if options["mode"] == "offline":
            self.summary = {}
        return self

    def define_metric(self, *_, **__): ...

    def log(self, row):
        self.rows.append(row)
        self.summary.update({k: v for k, v in row.items() if k.endswith("/step")})

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.fixture
def tracker(monkeypatch) -> Tracker:
    import wandb

    run = Tracker()
    monkeypatch.setattr(wandb, "init", run.start)
    return run


def test_wandb_gets_rows_with_their_own_steps_and_the_tables(about, tracker):
    run = tracker
    log = RunLogger(about.folder, "s", [WandbSink(about, **WANDB)])
    fill(log)
    log.finish(SUMMARY)
    assert run.options["group"] == "s/tent/r" and run.options["job_type"] == "run"
    assert run.options["tags"] == ["seed:0"] and run.options["config"] == {"seed": 0}
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


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_resumed_run_is_one_run_for_the_tracker(about, tracker, mode):
    """Killed two batches after its last checkpoint; offline each process begins the run anew."""
    log = RunLogger(about.folder, "s", [WandbSink(about, **{**WANDB, "mode": mode})])
    fill(log)
    log.flush()
    saved = log.offsets()
    for i in (4, 5):
        log.log("batches", batch=i, wrong=i, seconds=0.1)
    log.flush()
    before = list(tracker.rows)
    log = RunLogger(about.folder, "s", [WandbSink(about, **{**WANDB, "mode": mode})])
    log.rewind(saved)
    for i in range(4, 8):
        log.log("batches", batch=i, wrong=i, seconds=0.1)
    log.finish(SUMMARY)
    rows = tracker.rows if mode == "offline" else before + tracker.rows
    steps = [r["batches/step"] for r in rows if "batches/step" in r]
    assert sorted(set(steps)) == [2, 4, 6, 8]
    assert steps == [2, 4, 6, 8] or (mode == "online" and steps == [2, 4, 6, 6, 8])  # 6 is 6
    assert {r["matrix/step"] for r in rows if "matrix/step" in r} == {0, 1}
    assert tracker.rows[-1]["tables/matrix"].data == [["start", 49.0], ["fog:5", 50.0]]


def test_a_resumed_run_is_one_folder_of_wandb_and_one_curve_of_tensorboard(about, monkeypatch):
    import wandb

    def start(id: str, dir: str, **_: object) -> Tracker:
        folders = Path(dir, "wandb").glob("offline-run-*")
        Path(dir, "wandb", f"offline-run-2026_{len(list(folders))}-{id}").mkdir(parents=True)
        return Tracker()

    monkeypatch.setattr(wandb, "init", start)
    (about.folder / "wandb" / "offline-run-2026_9-another").mkdir(parents=True)
    sinks = [lambda: WandbSink(about, **WANDB)]
    if importlib.util.find_spec("tensorboard"):
        sinks.append(lambda: TensorBoardSink(about, every=3))
    for _ in range(2):
        log = RunLogger(about.folder, "s", [make() for make in sinks])
        log.rewind(log.offsets())
        fill(log)
        log.close()
    assert len(list(about.folder.glob("wandb/offline-run-*-test-run"))) == 1
    assert len(list(about.folder.glob("wandb/offline-run-*"))) == 2
    if len(sinks) > 1:
        assert [s for s, _ in scalars(about.folder / "tensorboard")["batches/wrong"]] == [3, 6]


@pytest.mark.parametrize("label", ["x" * 120, "a/b:c;d,e#f?g'h%i", "é" * 60, " lead", "0"])
def test_any_label_makes_names_that_wandb_takes(about, tracker, label):
    import wandb

    names = {"run_id": f"{label}-tent-0", "group": f"{label}/tent/r/0a1b", "tags": (f"s:{label}",)}
    WandbSink(dataclasses.replace(about, **names), **WANDB)
    made = tracker.options
    settings = wandb.Settings(run_id=made["id"], run_group=made["group"], run_tags=made["tags"])
    assert settings.run_id and len(settings.run_id) <= 128 and len(made["group"]) <= 128
    assert short("x" * 120, 64) != short("x" * 121, 64)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("logger.wandb.project='a/b'", "logger.wandb: .*project name"),
        (f"logger.wandb.project={'x' * 129}", "logger.wandb: .*128"),
        ("logger.wandb.mode=online", "WANDB_API_KEY"),
        ("logger.wandb.every=0", "logger.wandb.every.*at least 1"),
    ],
)
def test_what_is_wrong_with_a_logger_is_said_before_anything_is_computed(
    configure, monkeypatch, word, expected
):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    cfg = configure("strategy=tent", "logger=wandb", word)
    with pytest.raises(UserError, match=expected):
        run_experiment(cfg, [])
    assert not list(Path(cfg.root).rglob("*.json"))  # nothing of a source run either


def test_tensorboard_without_its_package_names_the_fix(monkeypatch):
    monkeypatch.setattr("driftline.core.sinks.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[tensorboard\]"'):
        check_sinks({"wandb": None, "tensorboard": {"every": 1}})


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
