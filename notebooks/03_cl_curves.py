# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Class-incremental learning
# Accuracy after each task, forgetting, and the accuracy matrix R.

# %%
import os
from pathlib import Path

REPO = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "analysis").is_dir())
RESULTS = Path(os.environ.get("RESULTS_ROOT", REPO / "results/example"))

# %%
import pandas as pd

from driftline.analysis import load_matrix, load_runs, plots, select
from driftline.analysis.tables import by_place, is_shift

places = [
    (place, runs) for place, runs in by_place(select(load_runs(RESULTS))) if not is_shift(runs)
]
assert places, f"no finished class-incremental run under {RESULTS}"
place, runs = places[0]
plots.curves(runs)

# %%
plots.curves(runs, "forgetting")

# %%
plots.heat_maps(runs)

# %% [markdown]
# Accuracy on each task right after learning it (the diagonal of R) and at the end, mean over runs.

# %%
cells = load_matrix(runs)
learned = cells[cells["on"] == cells["after_name"]].pivot_table("acc", "on", "method", sort=False)
last = cells[cells["after"] == cells["after"].max()].pivot_table("acc", "on", "method", sort=False)
pd.concat({"learned": learned, "at the end": last}, axis=1).round(2)
