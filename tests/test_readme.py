"""The README's example method, taken from the README and run as a newcomer would."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest
from conftest import HANG, ROOT, python

README = (ROOT / "README.md").read_text()


def block(path: str) -> str:
    """The fenced code block whose first line is a comment with its path."""
    found = re.search(rf"```\w+\n(# {re.escape(path)}\n.*?)```", README, re.S)
    assert found, f"README.md has no block for {path}"
    return found.group(1)


def test_readme_opens_with_the_two_commands():
    first = re.search(r"```bash\n(.*?)```", README, re.S)
    assert first and re.findall(r"^make \w+", first.group(1), re.M) == ["make demo", "make test"]


@pytest.mark.slow
def test_a_new_method_is_one_python_file_and_one_yaml_file(tmp_path):
    copy = tmp_path / "driftline"
    packages = [init.parent.name for init in ROOT.glob("*/__init__.py")]
    for name in ("conf", *packages):
        shutil.copytree(ROOT / name, copy / name)
    shutil.copy(ROOT / "run.py", copy)
    code = block("tta/prior_shift.py")
    assert len(code.splitlines()) <= 40
    (copy / "tta" / "prior_shift.py").write_text(code)
    settings = block("conf/strategy/prior_shift.yaml")
    (copy / "conf" / "strategy" / "prior_shift.yaml").write_text(settings)
    command = [python(), "run.py", "strategy=prior_shift", "scenario.images=60"]
    command += ["scenario.corruptions=[contrast,fog]", "runtime.threads=1"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    summary = json.loads(next(copy.rglob("prior_shift/*/*/summary.json")).read_text())
    assert summary["metrics"]["err_mean"] != summary["source"]["metrics"]["err_mean"]
    listed = subprocess.run(
        [python(), "run.py", "--help"], cwd=copy, capture_output=True, text=True, timeout=HANG
    )
    assert "prior_shift" in listed.stdout


def test_methods_table_lists_every_strategy():
    for path in sorted((ROOT / "conf" / "strategy").glob("*.yaml")):
        assert f"`{path.stem}`" in README, path.stem
