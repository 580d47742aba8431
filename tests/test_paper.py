"""Rows of papers: every figure is listed with its status, ours beside it where they are equals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG, ROOT, python

from driftline.core import papers
from driftline.core.errors import UserError
from driftline.runs import ready

sys.path.insert(0, str(ROOT / "scripts"))
import paper

METHODS = papers.facts()


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
    command = [python(), "scripts/paper.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)


def test_every_preset_belongs_to_a_method_and_holds_figures():
    assert set(papers.papers()) <= set(METHODS)
    rows = {name: figures for p in METHODS for name, figures in paper.presets(p).items()}
    assert sorted(rows) == sorted(papers.options("experiment"))
    assert all(rows.values())


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_every_method_are_listed_without_data(method, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["paper.py", method, "--results", str(tmp_path)])
    assert paper.main() == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith(f"{method}: ")
    rows = paper.presets(method)
    if not rows:
        assert lines[0] == f"no row of it: {METHODS[method]['no_rows']}"
        return
    figures = [line for line in lines if line.startswith(f"{method}/")]
    assert len(figures) == sum(map(len, rows.values()))
    assert all(f"needs {paper.needs(line.split()[0])[0]}" in line for line in figures)
    needed = [line for line in lines if line.startswith("needs ")]
    assert needed and all("<data.root>" in line for line in needed)
    assert lines[-1] == f"run them: python scripts/paper.py {method} --run data.root=/path/to/data"


def test_a_method_says_why_it_has_no_row_and_only_then():
    for method, fact in METHODS.items():
        assert ("no_rows" in fact) == (not paper.presets(method)), method


def test_needs_names_the_data_set_and_its_place():
    name, place = paper.needs("cotta/cifar10_c")
    assert name == "CIFAR-10-C" and "zenodo.org" in place
    assert paper.needs("ease/imagenet_r_b0_inc20_in21k")[0] == "imagenet_r"
    assert paper.needs("lae/cifar100_b0_inc10")[0] == "CIFAR-100"


def test_ours_is_a_mean_over_equal_runs_and_in_brackets_otherwise(tmp_path):
    preset = "cotta/cifar10_c"
    assert paper.ours([], "CIFAR-10-C") == "needs CIFAR-10-C"
    finished(tmp_path, preset, 0, 40.0, False, "cifar10_c[embedded]")
    key = (preset, "cotta", "err_mean")
    assert paper.ours(paper.measured(tmp_path)[key], "") == "(40.00 [embedded])"
    finished(tmp_path, preset, 1, 16.0, True, "cifar10_c")
    finished(tmp_path, preset, 2, 17.0, True, "cifar10_c")
    assert paper.ours(paper.measured(tmp_path)[key], "") == "16.50 ± 0.71, n=2"
    text = paper.listing(paper.presets(preset), paper.measured(tmp_path))
    line = next(li for li in text.splitlines() if " cotta " in li)
    assert "16.2 " in line and "16.50 ± 0.71, n=2" in line and "unverified" in line
    source = next(li for li in text.splitlines() if " source " in li and "needs" in li)
    assert "43.5" in source and "seen" in source and "needs CIFAR-10-C" in source


def test_each_row_is_run_on_its_data_set_with_its_methods(monkeypatch):
    calls = []

    def fake(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(paper.subprocess, "run", fake)
    rows = {"ease/vtab_b0_inc10_in1k": [], "cotta/cifar10_c": []}
    assert paper.run(rows, ["data.root=/sets/{data}"]) == []
    assert [c[-2:] for c in calls] == [
        ["data.root=/sets/vtab", "strategy=ease"],
        ["data.root=/sets/CIFAR-10-C", "strategy=bn_adapt,tent,cotta"],
    ]
    calls.clear()
    paper.run({"cotta/cifar10_c": []}, ["strategy=cotta"])
    assert calls[0][-1] == "strategy=cotta"


def test_everything_that_would_end_a_row_is_said_before_any_row_runs(tmp_path, capsys, monkeypatch):
    def build(cfg):
        raise UserError("no weights here")

    monkeypatch.setattr(paper, "run", lambda *_: pytest.fail("a row was run"))
    monkeypatch.setattr(ready, "_build", build)
    monkeypatch.setattr(ready.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "file").write_text("")

    def said(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["paper.py", "lae", "--run", *words])
        assert paper.main() == 2
        return capsys.readouterr().err.splitlines()

    (line,) = said("runtime.device=tpu", "seed=0,1")
    assert "runtime.device must be auto, cpu" in line and "2 rows: lae/cifar100_b0" in line
    (line,) = said("strategy.epocs=1")
    assert "strategy.epocs: no such setting; did you mean 'strategy.epochs'?" in line
    head, *lines = said("data.root=/no/{data}", f"root={tmp_path}/file/a", "adapter=peft/lora")
    assert head == "error: nothing was run; 5 problems would end runs:"
    assert [text for text in lines if "file is a file" in text and "2 rows" in text]
    assert len([text for text in lines if "no such folder" in text]) == 2  # one a data set
    assert [text for text in lines if "needs the package peft" in text]
    assert [text for text in lines if "no weights here" in text]


def test_options_of_a_preset_are_for_its_own_method():
    assert paper.methods_in("mos/cifar100_b0_inc5_in21k") == ["mos"]  # mode=official is MOS's
    assert paper.methods_in("finetune/cifar100_b0_inc5_in21k") == ["finetune", "lwf"]
    assert paper.methods_in("vida/imagenet_c_vit_b16_normalized") == ["vida"]


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["cota"], "did you mean 'cotta'"),
        (["ease/cifar100_b0_inc5_in21"], "did you mean 'ease/cifar100_b0_inc5_in21k'"),
        (["cotta", "seed=1"], "settings are for --run"),
    ],
)
def test_wrong_words_get_one_error(words, answer, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["paper.py", *words])
    assert paper.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and answer in error and len(error.splitlines()) <= 2


@pytest.mark.slow
@pytest.mark.release
def test_a_row_is_run_and_listed(tmp_path):
    small = ["scenario.corruptions=[fog]", "scenario.images=20", "scenario.probe_images=0"]
    small += [
        "scenario.clean_images=0",
        "scenario.batch_size=10",
        "strategy.views=2",
        "strategy=cotta",
    ]
    done = cli("cotta/cifar10_c", "--run", *small, f"root={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = [li for li in done.stdout.splitlines() if li.startswith("cotta/cifar10_c ")]
    own = next(li for li in lines if " cotta " in li)
    assert "16.2" in own and "[embedded])" in own
