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
# # Tables
# Mean and standard deviation (n-1) over seeds or orders, best bold, second underlined, published
# figures beside ours where they compare. Rows are never averaged over settings or scenarios.

# %%
import os
from pathlib import Path

REPO = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "analysis").is_dir())
RESULTS = Path(os.environ.get("RESULTS_ROOT", REPO / "results/example"))

# %%
from driftline.analysis import load_runs, select
from driftline.analysis.tables import by_place, headline, latex, main_table, tables_of

places = by_place(select(load_runs(RESULTS)))
[place for place, _ in places]

# %%
place, runs = places[0]
main_table(runs)

# %%
place, runs = places[-1]
main_table(runs)

# %% [markdown]
# As LaTeX (booktabs).

# %%
print(latex(main_table(runs)))

# %% [markdown]
# All tables of one place: per domain, published figures, cost.

# %%
for table in tables_of(places[0][1]):
    print(table.title, table.caption, sep="\n  ")

# %% [markdown]
# Difference to the first method on the same order and seed: few runs are better listed than
# averaged.

# %%
wide = runs.pivot_table(f"metrics.{headline(runs)}", ["order", "seed"], "method")
wide.sub(wide.iloc[:, 0], axis=0).round(2)
