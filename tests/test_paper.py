"""Rows of papers: every figure is listed with its status, ours beside it where they are equals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import paper


def finished(
    root: Path, preset: str, seed: int, value: float, comparable: bool, label: str
) -> None:
    folder = root / label / "cotta" / "b" / f"s{seed}-00000000"
    folder.mkdir(parents=True)
    row = {"strategy": "cotta", "metric": "err_mean", "ours": value, "comparable": comparable}
    summary = {"run": {"scenario": label, "strategy": "cotta"}, "reference": [row]}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "overrides.txt").write_text(f"experiment={preset}\nseed={seed}\n")


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/paper.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_every_preset_belongs_to_a_paper_and_holds_figures():
    folders = [p.name for p in paper.PRESETS.iterdir() if p.is_dir()]
    rows = {name: figures for p in folders for name, figures in paper.presets(p).items()}
    assert len(rows) == len(list(paper.PRESETS.rglob("*.yaml")))
    assert all(rows.values())


def test_ours_is_a_mean_over_equal_runs_and_in_brackets_otherwise(tmp_path):
    preset = "cotta/cifar10_c"
    assert "-" in paper.ours([])
    finished(tmp_path, preset, 0, 40.0, False, "cifar10_c[embedded]")
    key = (preset, "cotta", "err_mean")
    assert paper.ours(paper.measured(tmp_path)[key]) == "(40.00 [embedded])"
    finished(tmp_path, preset, 1, 16.0, True, "cifar10_c")
    finished(tmp_path, preset, 2, 17.0, True, "cifar10_c")
    assert paper.ours(paper.measured(tmp_path)[key]) == "16.50 ± 0.71, n=2"
    text = paper.listing(paper.presets(preset), paper.measured(tmp_path))
    line = next(li for li in text.splitlines() if " cotta " in li)
    assert "16.2 " in line and "16.50 ± 0.71, n=2" in line and "unverified" in line
    source = next(li for li in text.splitlines() if " source " in li)
    assert "43.5" in source and "seen" in source and " - " in source


def test_a_typo_in_a_paper_gets_the_nearest_name():
    done = cli("cota")
    assert done.returncode == 2 and "did you mean 'cotta'" in done.stderr
    assert cli("cotta", "seed=1").returncode == 2  # settings without --run


@pytest.mark.slow
def test_a_row_is_run_and_listed(tmp_path):
    small = ["scenario.corruptions=[fog]", "scenario.images=20", "scenario.probe_images=0"]
    small += ["scenario.clean_images=0", "scenario.batch_size=10", "strategy.views=2"]
    done = cli("cotta/cifar10_c", "--run", *small, f"root={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = [li for li in done.stdout.splitlines() if li.startswith("cotta/cifar10_c ")]
    own = next(li for li in lines if " cotta " in li)
    assert "16.2" in own and "[embedded])" in own
