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
# # Runs
# One row a run, finished or not. `RESULTS_ROOT` names the folder; without it the small example set
# of this repository is read, which was made on embedded stand-in images.

# %%
import os
from pathlib import Path

REPO = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "analysis").is_dir())
RESULTS = Path(os.environ.get("RESULTS_ROOT", REPO / "results/example"))

# %%
from driftline.analysis import load_runs, notes, select

runs = load_runs(RESULTS)
runs.groupby(["scenario", "strategy", "around", "backbone"])["state"].value_counts().unstack(
    fill_value=0
)

# %% [markdown]
# Every key of `summary.json`, `environment.json` and `config.yaml` is a column.

# %%
numbers = [k for k in runs if k.startswith("metrics.")]
runs[["scenario", "strategy", "around", "seed", "git", "state", *numbers]].round(2).head(30)

# %% [markdown]
# What to know before comparing.

# %%
done = select(runs)
notes(runs, done)

# %% [markdown]
# Runs that are missing in a grid of methods, seeds and orders.

# %%
repeats = done.groupby(["scenario", "method", "order", "seed"]).size()
missing = repeats.unstack(["order", "seed"]).isna().groupby("scenario").sum()
missing.T[lambda table: table.any(axis=1)]
