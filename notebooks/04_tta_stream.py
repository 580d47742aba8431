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
# # Test-time adaptation along a stream
# Error while adapting, with a band for each domain, and error per domain.

# %%
import os
from pathlib import Path

REPO = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "analysis").is_dir())
RESULTS = Path(os.environ.get("RESULTS_ROOT", REPO / "results/example"))

# %%
from driftline.analysis import load_batches, load_runs, plots, select
from driftline.analysis.tables import by_place, domain_table, is_shift

places = [(place, runs) for place, runs in by_place(select(load_runs(RESULTS))) if is_shift(runs)]
assert places, f"no finished test-time adaptation run under {RESULTS}"
place, runs = places[0]
runs = plots.streams_of(runs)[0]
plots.stream(runs)

# %%
plots.domains(runs)

# %%
domain_table(runs)

# %% [markdown]
# The first and the last batches of each domain, error in percent: does a method improve within a
# domain?

# %%
batches = load_batches(runs)
batches["part"] = batches.groupby(["path", "segment"]).cumcount()
batches["error"] = 100 * batches["wrong"] / batches["n"]
batches.pivot_table("error", ["segment", "part"], "method").round(1).head(20)
