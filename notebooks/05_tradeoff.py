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
# # Trade-offs
# Stability against plasticity, and quality against time and memory. Small dots are runs, large
# markers their means, the staircase is the Pareto front of the means.

# %%
import os
from pathlib import Path

REPO = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "analysis").is_dir())
RESULTS = Path(os.environ.get("RESULTS_ROOT", REPO / "results/example"))

# %%
from driftline.analysis import load_runs, plots, select
from driftline.analysis.tables import by_place, cost_table

places = by_place(select(load_runs(RESULTS)))
place, runs = places[0]
plots.tradeoff(runs)

# %%
plots.pareto(runs)

# %%
cost_table(runs)

# %%
place, runs = places[-1]
plots.tradeoff(runs)

# %%
plots.pareto(runs)

# %% [markdown]
# A figure as a file, with the keys of its runs in its metadata.

# %%
pdf = plots.encode(plots.pareto(runs), "pdf", runs)
len(pdf)  # Path("pareto.pdf").write_bytes(pdf)
