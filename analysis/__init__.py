"""From results folders to tables, figures and one HTML page; used by scripts/ and notebooks/.

Needs pandas and matplotlib (`pip install -e ".[analysis]"`); nothing else of ours imports this.
"""

from driftline.analysis.runs import (
    load_batches,
    load_experiences,
    load_matrix,
    load_runs,
    notes,
    select,
)

__all__ = ["load_batches", "load_experiences", "load_matrix", "load_runs", "notes", "select"]
