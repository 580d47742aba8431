"""The table of definitions in docs/results.md, from analysis/metrics.py.

python tools/metrics_table.py            # rewrites the block between the markers
python tools/metrics_table.py --check    # exit status 1 if the block is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

import blocks

from driftline.analysis.metrics import GROUPS, METRICS, Metric

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
BEGIN = "<!-- definitions: made by tools/metrics_table.py -->"
END = "<!-- end of definitions -->"


def row(metric: Metric) -> str:
    name = f"`{metric.name}`{metric.arrow}{metric.called}"
    cells = (name, metric.unit, metric.text, metric.source)
    return f"| {' | '.join(cells)} |"


def markdown() -> str:
    """A table for each group."""
    lines = []
    for group, title in GROUPS.items():
        lines += [f"**{title[0].upper()}{title[1:]}**", ""]
        lines += ["| name | unit | definition | source |", "|---|---|---|---|"]
        lines += [*(row(m) for m in METRICS if m.group == group), ""]
    return "\n".join(lines).rstrip()


def filled(text: str) -> str:
    """The page with fresh tables, as of `blocks.filled`."""
    return blocks.filled(text, BEGIN, END, markdown())


if __name__ == "__main__":
    sys.exit(blocks.main(__doc__, ROOT, {PAGE: filled}))
