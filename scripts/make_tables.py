"""Markdown tables of the finished runs under a results folder, one per scenario and backbone.

    python scripts/make_tables.py results [--out results/reference/tables.md]
    python scripts/make_tables.py results --average scenario.corruptions    # CoTTA's ten orders

Runs that differ in nothing but the seed (and the keys under --average) are one row: mean and, from
two on, standard deviation. Where a strategy was run with several settings, its rows name them.
Every table names the scenario's label, so stand-in images stay recognisable as such.
`intransigence` needs the `joint` run on the same stream in the same folder. LaTeX, CSV, figures and
one page of everything: scripts/report.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from driftline.analysis import load_runs, notes, select
from driftline.analysis.runs import AVERAGE
from driftline.analysis.tables import (
    by_place,
    defined,
    markdown,
    quoted,
    tables_of,
    with_intransigence,
)
from driftline.core.console import program
from driftline.core.errors import UserError
from driftline.core.files import write_text


def tables(runs: pd.DataFrame, average: Sequence[str] = AVERAGE) -> str:
    """All tables as one Markdown text.

    Raises:
        UserError: if no run is finished.
    """
    used = with_intransigence(select(runs, average))
    remarks = quoted(notes(runs, used, average))
    shown = [table for _, some in by_place(used) for table in tables_of(some)]
    return "\n".join([remarks, *map(markdown, shown), defined(shown)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--average", nargs="*", default=AVERAGE, metavar="KEY")
    args = parser.parse_args()
    try:
        text = tables(load_runs(args.root), args.average)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.out is None:
        print(text)
    else:
        write_text(args.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
