"""A torchvision of another build is one line; every import of it comes after the check."""

from __future__ import annotations

import ast
import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import PACKAGES, ROOT

from driftline.core.installation import torchvision_problem

FOLDERS = (*PACKAGES, "scripts", "tools", "benchmarks")
FILES = [ROOT / "run.py", *(f for d in FOLDERS for f in sorted((ROOT / d).rglob("*.py")))]
OTHER_BUILD = 'raise RuntimeError("operator torchvision::nms does not exist")\n'


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name of every imported module, in the order of the lines."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            lines += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            lines.append((node.lineno, node.module))
    return sorted(lines)


@pytest.fixture
def other_build(tmp_path) -> Path:
    """A folder with a torchvision that cannot be imported beside this torch."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(OTHER_BUILD)
    (package / "version.py").write_text("__version__ = '0.1.2+cpu'\n")
    return tmp_path


def test_every_import_of_torchvision_or_timm_comes_after_the_check():
    checked = 0
    for file in FILES:
        lines = imported(ast.parse(file.read_text(encoding="utf-8")))
        first = next((n for n, name in lines if name.split(".")[0] in ("torchvision", "timm")), 0)
        if first and file.name != "installation.py":
            checked += 1
            assert any(name == "driftline.core.vision" and n < first for n, name in lines), file
    assert checked > 5


def test_timm_is_imported_without_wandb_which_can_be_imported_afterwards(tmp_path, monkeypatch):
    for package in ("timm", "wandb"):
        (tmp_path / package).mkdir()
        monkeypatch.delitem(sys.modules, package, raising=False)
    (tmp_path / "wandb" / "__init__.py").touch()
    seen = "try:\n    import wandb\nexcept ImportError:\n    wandb = None\n"
    (tmp_path / "timm" / "__init__.py").write_text(seen)
    monkeypatch.syspath_prepend(str(tmp_path))
    runpy.run_module("driftline.backbones.without_wandb")
    assert sys.modules["timm"].wandb is None and importlib.import_module("wandb")
    for name in ("timm", "wandb"):
        monkeypatch.delitem(sys.modules, name)
    importlib.import_module("wandb")
    runpy.run_module("driftline.backbones.without_wandb")  # somebody uses it: it stays
    assert "wandb" in sys.modules and "timm" not in sys.modules


def test_backbones_import_timm_after_that():
    files = [f for f in FILES if f.parent.name == "backbones" and f.name != "without_wandb.py"]
    users = 0
    for file in files:
        names = [name for _, name in imported(ast.parse(file.read_text(encoding="utf-8")))]
        if first := next((n for n in names if n.split(".")[0] == "timm"), ""):
            users += 1
            before = names[: names.index(first)]
            assert "driftline.backbones.without_wandb" in before, file
    assert users >= 3


def test_both_versions_are_named(other_build, monkeypatch):
    assert torchvision_problem() is None
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(other_build))
    assert torchvision_problem() == (
        f"torch {torch.__version__} and torchvision 0.1.2+cpu do not fit "
        "(operator torchvision::nms does not exist)"
    )


def test_a_missing_torchvision_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr("driftline.core.installation.importlib.util.find_spec", lambda _: None)
    assert "torchvision, the partner of torch" in str(torchvision_problem())


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("command", ["run.py strategy=source", "benchmarks/bench_tta.py --help"])
def test_a_program_ends_with_one_line(other_build, command):
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(other_build)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    (line,) = (x for x in done.stderr.splitlines() if x)
    assert line.startswith("error: torch ") and "pip install" in line


def test_help_needs_no_torch():
    """The modules that `run.py` imports before a run begins."""
    code = "import sys, run, driftline.core.installation; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
