"""Sweeps: every run is its own process, the end tells what became of each, the repeat completes."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG, ROOT
from omegaconf import OmegaConf
from test_runs import pausing, wait_for

from driftline.runs import command, sweep

sys.path.insert(0, str(ROOT / "scripts"))
import gpu_pool

SMALL = [
    "scenario=imagenet_c",
    "scenario.corruptions=[contrast]",
    "scenario.images=20",
    "scenario.batch_size=10",
    "scenario.probe_images=0",
    "scenario.clean_images=0",
]


def start(root: Path, *words: str, script: tuple[str, ...] = ("run.py",)) -> subprocess.Popen[str]:
    command = [sys.executable, *script, *words, f"root={root}"]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def planned(folder: Path, *outcomes: dict[str, object]) -> None:
    sweep.plan(folder, [["strategy=a", f"seed={i}"] for i in range(len(outcomes))])
    for number, one in enumerate(outcomes):
        if one:
            sweep.note(folder, number, **one)


# ------------------------------------------------------------------------ the report


def test_the_report_counts_and_gives_each_reason_once(tmp_path):
    bad = {"state": "failed", "error": "lr is too large\nmore"}
    done = {"state": "finished", "before": True}
    planned(tmp_path, done, bad, bad, {"state": "running"}, {}, {"state": "finished"})
    text, status = sweep.report(tmp_path)
    assert status == 1
    assert "6 runs: 2 finished (1 of them before), 2 failed, 1 killed, 1 not started" in text
    assert text.count("because: lr is too large") == 1 and "more" not in text.splitlines()[3]
    assert "failed: seed=1,2\n" in text and "killed: seed=3" in text
    assert text.endswith("the same command skips what is finished and goes on with the rest")


def test_a_sweep_in_which_every_run_fails_says_so(tmp_path):
    planned(tmp_path, *[{"state": "failed", "error": "no such folder"}] * 3)
    text, status = sweep.report(tmp_path)
    assert status == 1 and text.endswith("every run failed, all for this one reason")
    assert len(text.splitlines()) == 4


def test_a_sweep_that_fails_for_its_settings_alone_ends_as_single_runs_do(tmp_path):
    wrong = {"state": "failed", "error": "seed must be", "wrong_settings": True}
    planned(tmp_path, {"state": "finished"}, wrong, wrong)
    assert sweep.report(tmp_path)[1] == 2
    planned(tmp_path / "b", wrong, {"state": "failed", "error": "RuntimeError"})
    assert sweep.report(tmp_path / "b")[1] == 1


def test_a_complete_sweep_is_one_line(tmp_path):
    planned(tmp_path, {"state": "finished"}, {"state": "finished"})
    assert sweep.report(tmp_path) == (f"sweep of 2 runs: 2 finished ({tmp_path})", 0)


def test_runs_are_expanded_as_hydra_does():
    assert sweep.expand(["strategy=a,b", "seed=range(2)", "x=[1,2]"]) == [
        ["strategy=a", "seed=0", "x=[1,2]"],
        ["strategy=a", "seed=1", "x=[1,2]"],
        ["strategy=b", "seed=0", "x=[1,2]"],
        ["strategy=b", "seed=1", "x=[1,2]"],
    ]


def test_sudden_ends_have_a_cause():
    assert "SIGKILL" in sweep._sudden(-9, None)["error"]
    assert "memory" in sweep._sudden(-9, None)["error"]
    assert sweep._sudden(-15, signal.SIGTERM)["state"] == "stopped"
    assert sweep._sudden(3, None) == {
        "state": "failed",
        "error": "ended with status 3 before it could say why",
    }


# ------------------------------------------------------------------------ launchers


@pytest.mark.parametrize(("n_jobs", "cores", "expected"), [(4, 16, 4), (-1, 16, 8), (64, 16, 8)])
def test_joblib_runs_share_the_cores(tmp_path, monkeypatch, n_jobs, cores, expected):
    """At most as many runs at once as there are runs: two here, on all cores together."""
    monkeypatch.setattr(sweep, "cores", lambda: cores)
    runs = 4 if n_jobs == 4 else 2
    sweep.plan(tmp_path, [[f"seed={i}"] for i in range(runs)])
    cfg = OmegaConf.create({"runtime": {"threads": None}, "data": {"root": "/data"}})
    cfg.scenario = {"_target_": "driftline.streams.shifts.corruption_stream"}
    launcher = OmegaConf.create({"n_jobs": n_jobs})
    assert sweep._threads(cfg, tmp_path, launcher).runtime.threads == expected
    assert cfg.runtime.threads is None
    cfg.runtime.threads = 3
    assert sweep._threads(cfg, tmp_path, launcher).runtime.threads == 3


def test_a_missing_plugin_names_the_extra(monkeypatch):
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)  # as where no plugin of Hydra is installed

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    for launcher, package in (("joblib", "hydra-joblib"), ("slurm", "hydra-submitit")):
        text = command.check_launcher(["-m", f"hydra/launcher={launcher}", "seed=0,1"])
        assert package in text and 'pip install -e ".[sweep]"' in text
    assert "add -m" in command.check_launcher(["hydra/launcher=joblib"])
    assert command.check_launcher(["-m", "hydra/launcher=basic", "seed=0,1"]) is None


def test_a_typo_in_a_launcher_gets_a_short_answer():
    command = [sys.executable, "run.py", "-m", "hydra/launcher=jobib", "seed=0,1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 2 and "did you mean 'joblib'" in done.stderr
    assert "slurm, submitit_local, basic" in done.stderr and "Traceback" not in done.stderr


def test_slurm_saves_and_requeues_on_its_warning(configure):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu"]
        launcher = compose("config", words, return_hydra_config=True).hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher") and launcher.partition == "gpu"
    assert launcher.max_num_timeout > 0 and launcher.signal_delay_s >= 60


# ------------------------------------------------------------------------ real sweeps


@pytest.mark.slow
def test_a_killed_and_a_failed_run_stop_nothing_and_the_repeat_completes(tmp_path):
    words = ["-m", *SMALL, "strategy=tent,finetune,bn_adapt", "checkpoint.every=1"]
    first = start(tmp_path, *words, script=pausing(tmp_path / "paused", "tent", 1))
    os.kill(wait_for(tmp_path / "paused", first), signal.SIGKILL)
    out, _ = first.communicate(timeout=HANG)
    assert first.returncode == 1
    assert "sweep of 3 runs: 1 finished, 1 killed, 1 failed" in out, out
    assert "killed: strategy=tent\n    because: killed by SIGKILL" in out
    assert "failed: strategy=finetune\n    because: strategy=finetune does not fit" in out
    second = start(tmp_path, *[w.replace("finetune,", "") for w in words])
    out, _ = second.communicate(timeout=HANG)
    assert second.returncode == 0 and "resuming in segment 0" in out, out
    assert "sweep of 2 runs: 2 finished (1 of them before)" in out


@pytest.mark.slow
def test_ctrl_c_saves_the_run_and_reports(tmp_path):
    words = ["-m", *SMALL, "strategy=tent,bn_adapt", "checkpoint.every=1"]
    process = start(tmp_path, *words, script=pausing(tmp_path / "paused", "tent", 1))
    wait_for(tmp_path / "paused", process)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=HANG)
    assert process.returncode == 130, out
    assert "sweep of 2 runs: 0 finished, 1 stopped, 1 not started" in out, out
    assert "Traceback" not in out


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["joblib", "hydra.launcher.n_jobs=2"],
        ["submitit_local"],
    ],
)
@pytest.mark.release
def test_other_launchers_report_the_same_way(tmp_path, launcher):
    plugin = command.PLUGINS[launcher[0]]
    pytest.importorskip(f"hydra_plugins.{plugin}")
    more = [f"hydra/launcher={launcher[0]}", *launcher[1:]]
    process = start(tmp_path, "-m", *more, *SMALL, "strategy=source,finetune")
    out, _ = process.communicate(timeout=HANG)
    assert process.returncode == 2
    assert "sweep of 2 runs: 1 finished, 1 failed" in out and "Traceback" not in out, out
    assert "failed: strategy=finetune" in out and "validated against" not in out


# ------------------------------------------------------------------------ several GPUs


def test_each_gpu_gets_one_run_at_a_time_and_sees_itself_only(tmp_path, monkeypatch, capsys):
    stub = tmp_path / "stub.py"
    stub.write_text(
        "import os, sys\n"
        "print('gpu', os.environ['CUDA_VISIBLE_DEVICES'], *sys.argv[1:], flush=True)\n"
        "if 'seed=1' in sys.argv: sys.exit('error: seed 1 is broken')\n"
        "if 'seed=2' in sys.argv: os.kill(os.getpid(), 9)\n"
    )
    busy: list[list[str]] = []  # GPUs of the runs under way, after each start
    start_one = gpu_pool.Pool.start

    def noting(pool: gpu_pool.Pool, number: int) -> None:
        start_one(pool, number)
        busy.append(sorted(gpu for _, gpu in pool.active.values()))

    monkeypatch.setattr(gpu_pool.Pool, "start", noting)
    monkeypatch.setattr(gpu_pool, "COMMAND", [sys.executable, str(stub)])
    words = ["--gpus", "3,5", "seed=range(4)", f"root={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["gpu_pool.py", *words])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu_pool.main() == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    text = capsys.readouterr().err
    assert "4 runs: 2 finished, 1 failed, 1 killed" in text
    assert "because: seed 1 is broken" in text and "because: killed by SIGKILL" in text
    logs = sorted(tmp_path.glob(".sweeps/*/*.log"))
    used = [log.read_text().split()[1] for log in logs]
    assert set(used) == {"3", "5"}
    for setting in ("runtime.threads=", "runtime.wait=true"):
        assert all(setting in log.read_text() for log in logs)
    assert busy[:2] == [["3"], ["3", "5"]] and len(busy) == 4
    assert all(gpus in (["3"], ["5"], ["3", "5"]) for gpus in busy)


def test_no_gpu_names_the_alternatives(monkeypatch, capsys):
    monkeypatch.setattr(gpu_pool, "gpus", list)
    monkeypatch.setattr(sys, "argv", ["gpu_pool.py", "seed=0,1"])
    with pytest.raises(SystemExit):
        gpu_pool.main()
    assert "--gpus 0,1" in capsys.readouterr().err


def test_the_array_script_saves_and_requeues(tmp_path, monkeypatch):
    """Run by bash as SLURM would, with stand-ins for the run and for scontrol."""
    stub = tmp_path / "stub.py"
    stub.write_text(
        "import signal, sys, time\n"
        "def saved(*_):\n    print('saved', flush=True)\n    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, saved)\n"
        "print('words', sys.argv[1:], flush=True)\nwhile True: time.sleep(1)\n"
    )
    control = tmp_path / "scontrol"
    control.write_text("#!/bin/bash\necho scontrol $*\n")
    control.chmod(0o755)
    monkeypatch.setattr(gpu_pool, "COMMAND", [sys.executable, str(stub)])
    script = gpu_pool.array_script([["seed=0"], ["x=[a, b]", "seed=1"]], 2)
    assert "#SBATCH --array=0-1%2" in script and "--requeue" in script
    names = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_JOB_ID": "77"}
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    (tmp_path / "s.sh").write_text(script)
    process = subprocess.Popen(
        ["bash", str(tmp_path / "s.sh")],
        env=os.environ | names | path,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "words ['runtime.wait=true', 'x=[a, b]', 'seed=1']\n"
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=HANG)
    assert out == "saved\nscontrol requeue 77_1\n" and process.returncode == 0


def test_seeds_that_changed_nothing_are_said(tmp_path):
    def finished(strategy: str, seed: int, error: float) -> dict:
        run = tmp_path / f"{strategy}{seed}"
        run.mkdir()
        summary = {"run": {"seed": seed}, "metrics": {"err_mean": error}}
        (run / "summary.json").write_text(json.dumps(summary))
        words = [f"strategy={strategy}", f"seed={seed}"]
        return {"state": "finished", "run": str(run), "overrides": words}

    runs = [finished("source", s, 34.93) for s in (0, 1)]
    runs += [finished("cotta", s, 30.0 + s) for s in (0, 1)]
    sweep.plan(tmp_path, [run.pop("overrides") for run in runs])
    for number, run_ in enumerate(runs):
        sweep.note(tmp_path, number, **run_)
    text, status = sweep.report(tmp_path)
    assert status == 0 and "the seed changed nothing in: strategy=source. " in text
    assert "scenario.order_seed" in text
