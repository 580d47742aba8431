"""Markdown tables of the finished runs under a results folder, one per scenario and backbone.

    python scripts/make_tables.py results [--out results/reference/tables.md]

All runs of one strategy, scenario and backbone are averaged (mean and, from two on, standard
deviation), whatever else they differ in: give other settings another scenario.label, or tabulate
their folders apart.
Every table names the scenario's label, so stand-in images stay recognisable as such.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHIFT = ("err_mean", "plasticity", "stability", "forgetting", "source_forgetting")
TASK = ("acc_inc", "acc_last", "plasticity", "stability", "forgetting", "bwt")
COST = {
    "s/batch": ("seconds_per_batch", "{:.3f}"),
    "peak MiB": ("peak_memory_mb", "{:.0f}"),
    "forward/image": ("forward_per_image", "{:.1f}"),
    "updated": ("parameters_updated", "{:,.0f}"),
}
Run = dict[str, Any]


def load_runs(root: Path) -> list[Run]:
    """Summaries of all finished runs, unfinished ones left out."""
    return [json.loads(p.read_text()) for p in sorted(root.rglob("summary.json"))]


def spread(values: Iterable[float | None], form: str = "{:.1f}") -> str:
    """Mean, with the standard deviation (n - 1) when there are several values."""
    known = [v for v in values if v is not None]
    if not known:
        return "-"
    text = form.format(statistics.mean(known))
    return f"{text} ± {form.format(statistics.stdev(known))}" if len(known) > 1 else text


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is the head."""
    lines = ["| " + " | ".join(r) + " |" for r in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def tables(runs: list[Run]) -> str:
    """All tables as one Markdown text."""
    groups: dict[tuple[str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        about = run["run"]
        groups[about["scenario"], about["backbone"]][about["strategy"]].append(run)
    parts = []
    for (scenario, backbone), methods in sorted(groups.items()):
        ordered = sorted(methods.items(), key=lambda item: (item[0] != "source", item[0]))
        first = ordered[0][1][0]
        names = SHIFT if "err_mean" in first["metrics"] else TASK
        domains = [k for k in first["metrics"] if k.startswith("err/")]
        head = ["strategy", "runs", *names, *COST]
        body, detail = [], []
        for name, same in ordered:
            cells = [spread((r["metrics"].get(k) for r in same), "{:.2f}") for k in names]
            cost = [spread([r["cost"][k] for r in same][:1], form) for k, form in COST.values()]
            body.append([name, str(len(same)), *cells, *cost])
            detail.append([name, *(spread(r["metrics"].get(k) for r in same) for k in domains)])
        weights = first["weights"]
        parts.append(f"### {scenario}, {backbone}\n")
        parts.append(f"Weights `{weights['tag']}`, hash `{weights['hash']}`. In percent.\n")
        parts.append(markdown([head, *body]) + "\n")
        if domains:
            short = [d.removeprefix("err/") for d in domains]
            parts.append(f"Error per domain, {scenario}:\n")
            parts.append(markdown([["strategy", *short], *detail]) + "\n")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    runs = load_runs(given.root)
    if not runs:
        print(f"error: no finished run under {given.root}", file=sys.stderr)
        return 2
    text = tables(runs)
    if given.out is None:
        print(text)
    else:
        part = given.out.with_name(given.out.name + ".tmp")
        part.write_text(text)
        part.replace(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
