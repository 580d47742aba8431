"""The notebooks run on the example results, and their two forms hold the same cells."""

from __future__ import annotations

import os
import subprocess
import sys

import jupytext
import pytest
from conftest import HANG, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN_ALL = """
import runpy, sys, time
for path in sys.argv[1:]:
    started = time.perf_counter()
    runpy.run_path(path)
    print(f"ran {path} in {time.perf_counter() - started:.1f} s", flush=True)
"""


@pytest.mark.slow
@pytest.mark.release
def test_every_notebook_runs_from_top_to_bottom():
    """As scripts in one process: the libraries are imported once."""
    paths = [path.with_suffix(".py").name for path in NOTEBOOKS]
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *paths],
        cwd=ROOT / "notebooks", capture_output=True, text=True, timeout=HANG,
        env={**os.environ, "MPLBACKEND": "agg", "RESULTS_ROOT": str(ROOT / "results" / "example")},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count("ran ") == len(paths) >= 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_both_forms_hold_the_same_cells_and_no_outputs(path):
    notebook, script = jupytext.read(path), jupytext.read(path.with_suffix(".py"))
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in script.cells]
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None
