"""Markdown tables of the finished runs under a results folder, one per scenario and backbone.

    python scripts/make_tables.py results [--out results/reference/tables.md]
    python scripts/make_tables.py results --average scenario.corruptions    # CoTTA's ten orders

Runs that differ in nothing but the seed (and the keys under --average) are one row: mean and, from
two on, standard deviation. Where a strategy was run with several settings, its rows name them.
Every table names the scenario's label, so stand-in images stay recognisable as such.
`intransigence` needs the `joint` run on the same stream in the same folder.
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

import numpy as np
from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.metrics import intransigence

SHIFT = (
    "err_mean",
    "plasticity",
    "stability",
    "forgetting",
    "source_forgetting",
    "source_forgetting_adapting",
)
TASK = ("acc_inc", "acc_last", "plasticity", "stability", "forgetting", "bwt", "fwt")
TASK += ("intransigence",)
COST = {
    "s/batch": ("seconds_per_batch", "{:.3f}"),
    "train s": ("seconds_total", "{:.0f}"),
    "end s": ("end_of_task_seconds", "{:.1f}"),
    "test s": ("evaluation_seconds", "{:.1f}"),
    "peak MiB": ("peak_memory_mb", "{:.0f}"),
    "forward/image": ("forward_per_image", "{:.1f}"),
    "updated": ("parameters_updated", "{:,.0f}"),
    "parameters": ("parameters_total", "{:,.0f}"),
}
Run = dict[str, Any]


def load_runs(root: Path) -> list[Run]:
    """Summaries of all finished runs with their `config`; unfinished ones are left out."""
    runs = []
    for path in sorted(root.rglob("summary.json")):
        run = json.loads(path.read_text())
        run["config"] = flat(OmegaConf.load(path.with_name("config.yaml")))
        if "acc_inc" in run["metrics"]:
            run["learned"] = learned(path.with_name("matrix.jsonl"))
        runs.append(run)
    add_intransigence(runs)
    return runs


def learned(matrix: Path) -> list[float]:
    """R[j, j]: accuracy on each task right after learning it, percent."""
    cells = [json.loads(line) for line in matrix.read_text().splitlines()]
    return [c["acc"] for c in cells if c["on"] == c["after_name"]]


def add_intransigence(runs: list[Run]) -> None:
    """Mean of R*[j, j] - R[j, j], where R* is of the one `joint` run on the same stream."""

    def stream(run: Run) -> tuple[object, ...]:
        return run["data"]["fingerprint"], run["weights"]["hash"], run["run"]["seed"]

    joint = defaultdict(list)
    for run in runs:
        if run["run"]["strategy"] == "joint":
            joint[stream(run)].append(run)
    for run in runs:
        beside = joint[stream(run)]
        if "learned" in run and len(beside) == 1:
            best = np.array(beside[0]["learned"], float)
            run["metrics"]["intransigence"] = intransigence(np.diag(run["learned"]), best)


def flat(node: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    if not isinstance(node, DictConfig):
        return {path: node}
    found: dict[str, Any] = {}
    for key in node:
        found |= flat(node[key], f"{path}.{key}" if path else str(key))
    return found


def settings(run: Run, average: Iterable[str]) -> dict[str, str]:
    """What sets a run apart from others of the same strategy, scenario and backbone."""
    kept = ("strategy.", "scenario.", "backbone.", "precision", "channels_last", "on_nan")
    return {
        k: str(v)
        for k, v in run["config"].items()
        if k.startswith(kept) and k not in average and not k.endswith("name")
    }


def rows_of(runs: list[Run], average: Iterable[str]) -> dict[str, list[Run]]:
    """Runs by row name; the name holds the settings in which the rows of a strategy differ."""
    by_strategy: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        key = json.dumps(settings(run, average), sort_keys=True)
        by_strategy[run["run"]["strategy"]][key].append(run)
    found = {}
    for strategy, variants in by_strategy.items():
        every = [json.loads(k) for k in variants]
        keys = sorted({k for one in every for k in one})
        differ = [k for k in keys if len({one.get(k) for one in every}) > 1]
        for one, same in zip(every, variants.values(), strict=True):
            told = ", ".join(f"{k.removeprefix('strategy.')}={one.get(k)}" for k in differ)
            found[f"{strategy} ({told})" if told else strategy] = same
    return found


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


def tables(runs: list[Run], average: Iterable[str] = ()) -> str:
    """All tables as one Markdown text."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        about = run["run"]
        groups[about["scenario"], about["backbone"]].append(run)
    parts = []
    for (scenario, backbone), found in sorted(groups.items()):
        methods = rows_of(found, average)
        ordered = sorted(methods.items(), key=lambda item: (item[0] != "source", item[0]))
        first = ordered[0][1][0]
        names = SHIFT if "err_mean" in first["metrics"] else TASK
        names = [n for n in names if any(n in r["metrics"] for r in found)]
        domains = [k for k in first["metrics"] if k.startswith("err/")]
        costs = {n: c for n, c in COST.items() if c[0] in first["cost"]}
        head = ["strategy", "runs", *names, *costs]
        body, detail = [], []
        for name, same in ordered:
            cells = [spread((r["metrics"].get(k) for r in same), "{:.2f}") for k in names]
            cost = [spread([same[0]["cost"][k]], form) for k, form in costs.values()]
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
    parser.add_argument("--average", nargs="*", default=[], metavar="KEY")
    given = parser.parse_args()
    runs = load_runs(given.root)
    if not runs:
        print(f"error: no finished run under {given.root}", file=sys.stderr)
        return 2
    text = tables(runs, given.average)
    if given.out is None:
        print(text)
    else:
        part = given.out.with_name(given.out.name + ".tmp")
        part.write_text(text)
        part.replace(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
