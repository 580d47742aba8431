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
# # Kernel benchmarks
# What `benchmarks/bench_kernels.py` measured for the fused adapter operation: time of plain PyTorch
# over ours, so more than 1 is faster.

# %%
import json
from pathlib import Path

import pandas as pd

REPO = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "analysis").is_dir())
results = {path.stem: json.loads(path.read_text()) for path in REPO.glob("results/kernels/*.json")}
files = {name: one for name, one in results.items() if "summary" in one}

# %%
pd.concat({name: pd.DataFrame(found["summary"]) for name, found in files.items()}).round(2)

# %%
cases = pd.concat({name: pd.DataFrame(found["cases"]) for name, found in files.items()})
cases.pivot_table("ratio", ["kind", "dim"], ["rank", "batch"]).round(2)
