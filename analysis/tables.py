"""Paper-style tables of runs: mean and standard deviation, best two marked, published figures.

    runs = select(load_runs("results"))
    for place, some in by_place(runs):            # one scenario, backbone and stream at a time
        print(markdown(main_table(some)))

Runs are averaged over seeds and orders only, never over scenarios, backbones or settings. Standard
deviations have n - 1 in the denominator. Spread over seeds and over orders are kept apart: order
variance is often the larger one (arXiv 2509.22580).
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from driftline.analysis.metrics import GROUPS, METRICS, Group, define, of_group, sentences
from driftline.analysis.runs import (
    PLACE,
    by_kind,
    json_lines,
    named,
    origin,
    seeds_agree,
    stand_in,
    title,
)
from driftline.core.console import table as aligned
from driftline.core.errors import UserError, suggest

SHIFT = ("err_mean", "gain", "plasticity", "stability", "forgetting")
SHIFT += ("source_forgetting", "source_forgetting_adapting")
TASK = ("acc_inc", "acc_last", "plasticity", "stability", "forgetting", "bwt", "fwt")
TASK += ("intransigence",)
UNRANKED = "joint"  # an upper bound that sees all data
STILL = -1  # the mark of a cell that its method cannot lose
WORSE = " †"  # behind an error that is worse than not adapting
Refusals = Mapping[tuple[str, str], str]  # (strategy, kind of adapters) -> why
ERRORS = 2.0  # standard errors that a difference must exceed


def number(value: float, metric: str) -> str:
    return f"{value:,.{define(metric).digits}f}"


def ranked(metric: str) -> bool:
    """Whether there is a best: not of costs, counts and numbers that are neither good nor bad."""
    known = define(metric)
    return bool(known.better) and known.group not in ("cost", "count")


def is_shift(runs: pd.DataFrame) -> bool:
    """Whether runs of one scenario adapt to a stream of shifts (else they learn tasks)."""
    return "metrics.err_mean" in runs and bool(runs["metrics.err_mean"].notna().any())


def headline(runs: pd.DataFrame) -> str:
    return "err_mean" if is_shift(runs) else "acc_inc"


def methods_in_order(runs: pd.DataFrame) -> list[str]:
    """The source model first, then by name."""
    return sorted(runs["method"].unique(), key=lambda m: (not m.startswith("source"), m))


def by_place(runs: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Runs of each scenario, backbone and stream, without the numbers that none of them has."""
    groups = []
    for place, some in runs.groupby(PLACE):
        prefixes = ("metrics.", "cost.", "data.", "method.", "guard.")
        numbers = [k for p in prefixes for k in named(some, p)]
        unknown = [k for k in numbers if some[k].isna().all() and k != "data.fingerprint"]
        groups.append((title(place), some.drop(columns=unknown)))
    return groups


def _place(runs: pd.DataFrame) -> str:
    return title(runs[PLACE].iloc[0])


def domains_in_order(runs: pd.DataFrame) -> list[str]:
    """Names `err/<domain>` in the order of the stream, that of the first run where runs differ."""
    known = [k.removeprefix("metrics.") for k in named(runs, "metrics.err/")]
    streams = runs["data.segments"].dropna().tolist() if "data.segments" in runs else []
    first = [f"err/{name}" for name in (streams[0] if streams else [])]
    return [name for name in dict.fromkeys([*first, *known]) if name in known]


# ------------------------------------------------------------------------------ statistics


def never_changed(runs: pd.DataFrame) -> set[str]:
    """Methods whose answers to held-out images were the same after every domain as before.

    They can neither forget nor gain, so that full stability is no merit: the source, methods that
    keep nothing from batch to batch, and those that a rule puts back.
    """
    fixed = {k: define(k.removeprefix("metrics.")).still for k in named(runs, "metrics.")}
    fixed = {k: v for k, v in fixed.items() if v is not None and "/" not in k}
    still = set()
    for method, some in runs.groupby("method"):
        known = [k for k in fixed if some[k].notna().all()]
        same = all((some[k] == fixed[k]).all() for k in known)
        # `fwt` compares with the answers before the stream; without it only the source is sure.
        if same and ("metrics.fwt" in known or (some["strategy"] == "source").all()):
            still.add(str(method))
    return still


def cannot_lose(runs: pd.DataFrame, metric: str, unchanged: set[str]) -> set[str]:
    """Methods that have the best value of `metric` whatever they do.

    Args:
        unchanged: those that `never_changed`.
    """
    if define(metric).still is None:
        return set()
    if metric.startswith("time/"):  # in units of the source's own time
        return set(runs.loc[runs["strategy"] == "source", "method"])
    return unchanged


def _worse_than_source(runs: pd.DataFrame, metric: str) -> bool:
    """Whether an error of the runs of one method is above the source's by more than noise.

    Noise: standard error of the difference, from the number of images (those of the method and of
    the source as if independent, which is cautious) and from the spread over the runs.
    """
    name, beside = f"metrics.{metric}", f"source.metrics.{metric}"
    if not {name, beside, "cost.images"} <= set(runs):
        return False
    pairs = runs[[name, beside, "cost.images"]].dropna().astype(float)
    if pairs.empty:
        return False
    ours, theirs, images = pairs.to_numpy().mean(0).tolist()
    parts = len(named(runs, "metrics.err/")) if metric.startswith("err/") else 1
    images = max(1.0, images / max(1, parts))
    variance = (ours * (100 - ours) + theirs * (100 - theirs)) / images
    gaps = (pairs[name] - pairs[beside])[~origin(runs.loc[pairs.index]).duplicated()].to_numpy()
    variance += float(gaps.var(ddof=1)) / len(gaps) if len(gaps) > 1 else 0.0
    return ours - theirs > ERRORS * math.sqrt(variance)


def _columns(runs: pd.DataFrame) -> dict[str, str]:
    """Columns that hold numbers, and the names of these: metrics, costs, counts."""
    numbers = runs.select_dtypes("number")
    names = {k: k.removeprefix("metrics.") for k in named(numbers, "metrics.")}
    for group in ("cost", "method", "guard"):
        inside = [k for k in named(numbers, f"{group}.") if not k.startswith("guard.first.")]
        names |= {k: k.replace(".", "/", 1) for k in inside}
    return {k: name for k, name in names.items() if runs[k].notna().any()}


def statistics(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per scenario, backbone, stream, method and metric (`cost/...`, `method/...`,
    `guard/...` for costs and counts).

    Columns: those, n (runs; one that stands for several seeds counts once), seeds, orders (how
    many); mean (over the orders of the means over seeds); std_seeds (within orders, pooled),
    std_orders (of the means of the orders), both with n - 1 and NaN where there is one value;
    values (all, in JSON); rank (1 best, 2 second, 0 else, -1 of a method that cannot lose); worse
    (an error is above the source's by more than noise); published, source, comparable: a published
    figure that some run of the method names.

    Args:
        runs: as `select` returns them.
    """
    names = _columns(runs)
    key = [*PLACE, "method", "metric"]
    about = [*PLACE, "method", "order", "seed"]
    every = runs[about].join(runs[list(names)].astype(float).rename(columns=names))
    every = every.assign(run=origin(runs)).melt([*about, "run"], var_name="metric")
    every = every.dropna(subset="value").sort_values(about)
    of_seeds = every.groupby(key)
    every = every.drop_duplicates([*key, "order", "run"])
    in_order = every.groupby([*key, "order"])["value"].agg(["mean", "var"]).groupby(key)
    rows = every.groupby(key)
    long = pd.DataFrame({
        "n": rows.size(),
        "seeds": of_seeds["seed"].nunique(),
        "orders": in_order.size(),
        "mean": in_order["mean"].mean(),
        "std_seeds": in_order["var"].mean() ** 0.5,
        "std_orders": in_order["mean"].std(),
        "values": rows["value"].agg(lambda values: json.dumps(values.tolist())),
        "rank": 0,
        "worse": False,
    }).reset_index()  # fmt: skip
    for place, of_place in long.groupby(PLACE):
        here = runs[(runs[PLACE] == list(place)).all(axis=1)]
        unchanged = never_changed(here)
        for metric, group in of_place.groupby("metric"):
            if ranked(str(metric)):
                still = cannot_lose(here, str(metric), unchanged)
                long.loc[group.index, "rank"] = _ranks(group, str(metric), still)
            if str(metric).startswith("err"):
                long.loc[group.index, "worse"] = [
                    _worse_than_source(here[here["method"] == m], str(metric))
                    for m in group["method"]
                ]
    figures = published(runs).sort_values("comparable", kind="stable").drop(columns="status")
    return long.merge(figures.drop_duplicates(key, keep="last"), on=key, how="left")


def _ranks(group: pd.DataFrame, metric: str, still: set[str]) -> pd.Series:
    """1 and 2 for the best two printed means, as in a race; 0 for the others or if all are equal;
    -1 for the methods `still`, which cannot lose.

    Means that print alike share a rank, and after two firsts there is no second.
    """
    fixed = group["method"].isin(still)
    taking_part = (group["method"].str.split(" ").str[0] != UNRANKED) & ~fixed
    known = define(metric)
    shown = group["mean"].round(known.digits).where(taking_part)
    place = shown.rank(method="min", ascending=known.better == "lower")
    place = place.where((place <= 2) & (shown.nunique() > 1), 0)
    return place.mask(fixed, STILL).astype(int)


def published(runs: pd.DataFrame) -> pd.DataFrame:
    """Published figures that the runs name (papers/), one row per method and metric.

    Columns: scenario, backbone, stream, method, metric, published, source, status, comparable.
    """
    rows = []
    listed = runs[runs["reference"].notna()] if "reference" in runs else runs.iloc[:0]
    for _, run in listed.iterrows():
        beside = runs[(runs[PLACE] == run[PLACE]).all(axis=1)]
        for row in run["reference"]:
            own = row["strategy"] == run["strategy"]
            of = {run["method"]} if own else set(beside["method"]) & {row["strategy"]}
            figure = {k: row[k] for k in ("metric", "source", "status", "comparable")}
            figure["published"] = row["value"]
            rows += [{**run[PLACE], "method": method, **figure} for method in of]
    columns = [*PLACE, "method", "metric", "published", "source", "status", "comparable"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(ignore_index=True)


def with_intransigence(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs` with `learned` and `metrics.intransigence` where they are defined.

    learned[j] is R[j, j], percent; intransigence the mean of R*[j, j] - R[j, j], where R* belongs
    to the one run of `joint` with the same images, weights and seed.
    """
    joint = runs[runs["strategy"] == "joint"]
    if joint.empty:
        return runs
    from driftline.core.metrics import intransigence  # imports torch, which takes seconds

    runs = runs.copy()
    same = ["data.fingerprint", "weights.hash", "seed"]
    learned, values = {}, {}
    for place, group in runs[runs["metrics.acc_inc"].notna()].groupby(same):
        for i, path in group["path"].items():
            cells = json_lines(Path(path) / "matrix.jsonl")
            learned[i] = [c["acc"] for c in cells if c["on"] == c["after_name"]]
        beside = joint.index[(joint[same] == list(place)).all(axis=1)]
        if len(beside) == 1:
            best = np.array(learned[beside[0]], float)
            values |= {i: intransigence(np.diag(learned[i]), best) for i in group.index}
    runs["learned"] = pd.Series(learned, dtype=object)
    runs["metrics.intransigence"] = pd.Series(values, dtype=float)
    return runs


# ------------------------------------------------------------------------------ tables


@dataclass
class Table:
    """Text cells with marks: rank 1 is the best of its column, 2 the second, -1 cannot lose."""

    title: str
    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    marks: dict[tuple[int, int], int] = field(default_factory=dict)  # (row, column) -> rank
    metrics: list[str] = field(default_factory=list)  # of each column, "" where it is none

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.title)}</p>{as_html(self)}"


def cell(row: pd.Series) -> str:
    """`mean`, `mean ± std`, or `mean ± over seeds ± over orders`, and a dagger where it is worse
    than not adapting. Seeds that gave one number are no measurement of a spread."""
    metric, text = row["metric"], number(row["mean"], row["metric"])
    spread = [row[k] for k in ("std_seeds", "std_orders") if not math.isnan(row[k])]
    if define(metric).group in ("cost", "count"):
        spread = []  # spread of time and memory is the machine's, not the method's
    equal_seeds = math.isnan(row["std_orders"]) and spread == [0.0]  # which measure nothing
    if not equal_seeds:
        text = " ± ".join([text, *(number(v, metric) for v in spread)])
    return text + WORSE if row["worse"] else text


def _spread_over(long: pd.DataFrame) -> str:
    seeds, orders = long["std_seeds"].notna().any(), long["std_orders"].notna().any()
    if not (seeds or orders):
        return "One run each."
    over = {(True, False): "seeds", (False, True): "orders"}
    spread = over.get((bool(seeds), bool(orders)), "seeds within an order ± over orders")
    return f"Mean ± standard deviation (n-1) over {spread}."


def _equal_seeds(runs: pd.DataFrame) -> dict[str, int]:
    """How many seeds gave equal numbers, for each method where all did."""
    groups = runs.groupby("method")
    return {str(m): some["seed"].nunique() for m, some in groups if seeds_agree(some)}


def _one_run(runs: pd.DataFrame) -> set[str]:
    """Methods of which a single run was made for several seeds."""
    made = runs.assign(run=origin(runs)).groupby("method")
    return {str(m) for m, some in made if len(some) > 1 and some["run"].nunique() == 1}


def _in_words(methods: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(methods[:-1]), methods[-1]]))


def _about_marks(runs: pd.DataFrame, used: pd.DataFrame, marks: dict[Any, int]) -> list[str]:
    """What a caption says of marks, of seeds and of methods that cannot lose."""
    said = []
    equal, one = _equal_seeds(runs), _one_run(runs)
    for n in sorted(set(equal.values())):
        names = [m for m in methods_in_order(runs) if equal.get(m) == n]
        for these, what in (
            ([m for m in names if m in one], f"one run stands for {n} seeds"),
            ([m for m in names if m not in one], f"{n} seeds gave equal numbers"),
        ):
            if these:
                said.append(f"{_in_words(these)}: {what}: nothing is drawn there on this stream.")
    if STILL in marks.values():
        fixed = used.loc[used["rank"] == STILL]
        names = [m for m in methods_in_order(runs) if m in set(fixed["method"])]
        what = list(dict.fromkeys(define(m).head or define(m).name for m in fixed["metric"]))
        why = (
            "time is counted in units of the source's own"
            if fixed["metric"].str.startswith("time/").all()
            else "answers to held-out images never changed, so that nothing could be lost"
        )
        said.append(f"Not ranked in {_in_words(what)}: {_in_words(names)} ({why}).")
    if used["worse"].any():
        said.append("† worse than not adapting (the source model), by more than 2 standard errors.")
    return said


def grid(runs: pd.DataFrame, metrics: Sequence[str], what: str = "") -> Table:
    """Methods by metrics with the number of runs, and columns of published figures that compare.

    Args:
        runs: of one scenario, backbone and stream (`by_place`).
        what: added to the title.
    """
    long = statistics(runs)
    at = {(row["method"], row["metric"]): row for _, row in long.iterrows()}
    methods, equal = methods_in_order(runs), _equal_seeds(runs)
    head, of_column, marks = ["strategy", "runs"], ["", ""], {}
    counts, one = origin(runs).groupby(runs["method"]).nunique(), _one_run(runs)
    rows = [[m, f"{counts[m]}{' equal' if m in equal and m not in one else ''}"] for m in methods]
    for metric in metrics:
        known = define(metric)
        here = [at.get((m, metric)) for m in methods]
        name = known.head or metric.replace("method/", "").replace("guard/", "guard: ")
        head.append(name + (known.arrow if ranked(metric) else ""))
        of_column.append(metric)
        for r, entry in enumerate(here):
            rows[r].append("-" if entry is None else cell(entry))
            if entry is not None and entry["rank"]:
                marks[r, len(head) - 1] = int(entry["rank"])
        theirs = [
            f["published"] if f is not None and f["comparable"] is True else None for f in here
        ]
        if any(value is not None for value in theirs):
            head.append(f"{name}, published")
            of_column.append(metric)
            for row, value in zip(rows, theirs, strict=True):
                row.append("" if value is None else number(value, metric))
    used = long[long["metric"].isin(metrics)]
    measured = any(define(m).group not in ("cost", "count") for m in metrics)
    caption = [_spread_over(used) if measured else "Means."]
    if measured:
        percent = all(define(m).unit in ("%", "points") for m in metrics)
        caption = ["In percent." if percent else "", *caption, *_about_marks(runs, used, marks)]
    caption.append(_label(runs))
    if UNRANKED in set(runs["strategy"]) and marks:
        caption.append(f"{UNRANKED} is an upper bound and not ranked.")
    name = f"{_place(runs)}: {what}" if what else _place(runs)
    return Table(name, head, rows, " ".join(filter(None, caption)), marks, of_column)


def _label(runs: pd.DataFrame) -> str:
    said = stand_in(runs["scenario"].iloc[0])
    return f"{said[0].upper()}{said[1:]}." if said else ""


def main_table(runs: pd.DataFrame, metrics: Sequence[str] = ()) -> Table:
    """Methods by metrics; by default those of the kind of stream that some run has.

    Raises:
        UserError: for metrics that no run has.
    """
    known = [k.removeprefix("metrics.") for k in named(runs, "metrics.")]
    for metric in metrics:
        if metric not in known:
            hint = suggest(metric, known)
            raise UserError(f"no run of {_place(runs)} has the metric {metric!r}{hint}")
    chosen = metrics or [m for m in (SHIFT if is_shift(runs) else TASK) if m in known]
    table = grid(runs, chosen)
    weights = runs[["weights.tag", "weights.hash"]].drop_duplicates()
    weights_text = [f"{tag} (hash {key})" for tag, key in weights.dropna().itertuples(index=False)]
    table.caption += f" Weights: {', '.join(weights_text) or 'unknown'}."
    return table


def domain_table(runs: pd.DataFrame) -> Table | None:
    """Error per domain in stream order, with the mean in front; None for streams of tasks."""
    names = domains_in_order(runs)
    if not names:
        return None
    table = grid(runs, ["err_mean", *names], "error per domain")
    if "data.segments" in runs:
        orders = runs["data.segments"].dropna().map(tuple).nunique()
        if orders > 1:
            table.caption += f" The runs have {orders} orders of domains; shown is the first one's."
    return table


def group_table(runs: pd.DataFrame, group: Group) -> Table | None:
    """The numbers of one kind that some run has; None if none has any."""
    columns = _columns(runs)
    names = [m for m in of_group(group) if m in columns.values()]
    seen = {m for k, m in columns.items() if (runs[k].fillna(0) != 0).any()}
    if group == "cost":  # ends of tasks only where there are tasks
        names = [m for m in names if m in seen or m != "cost/end_of_task_seconds"]
    if group == "count":  # NaN, collapse and the guard's only where there is something to tell
        names = [m for m in names if m.startswith("method/") or m in seen]
        own = {m for m in columns.values() if m.startswith("method/")} - {m.name for m in METRICS}
        names += sorted(own)
    if not names:
        return None
    table = grid(runs, names, GROUPS[group])
    if group == "time":
        table.caption += _timed(runs)
    if group == "cost":
        table.caption += f" Measured on {', '.join(runs['device'].dropna().unique()) or 'unknown'}."
    return table


def _timed(runs: pd.DataFrame) -> str:
    """Which machine's time `time/...` speaks of."""
    devices = []
    if {"time.repeatable", "time.device"} <= set(runs):
        devices = runs.loc[runs["time.repeatable"] == False, "time.device"].unique()  # noqa: E712
    return f" time/...: measured on {', '.join(devices) or 'no machine, latency given'}."


def cost_table(runs: pd.DataFrame) -> Table | None:
    """What the methods cost; None if no run says it."""
    return group_table(runs, "cost")


def kind_table(
    runs: pd.DataFrame, metric: str | None = None, refusals: Refusals | None = None
) -> Table | None:
    """Kinds of adapters by methods; None where no method was run with several.

    Args:
        metric: by default the mean error of streams, the average incremental accuracy of tasks.
        refusals: why a strategy did not take a kind, from `analysis.runs.refused`.
    """
    metric = metric or headline(runs)
    rows = by_kind(runs, metric)
    if rows is None:
        return None
    at = {(row["base"], row["kind"]): row for _, row in rows.iterrows()}
    bases, kinds = kinds_and_bases(rows, refusals)
    cells = [
        [kind, *(kind_cell(at, base, kind, metric, refusals) for base in bases)] for kind in kinds
    ]
    return Table(
        f"{_place(runs)}: {metric} of kinds of adapters",
        ["adapter", *bases],
        cells,
        f"{about_kinds(runs, rows)} {_label(runs)}".strip(),
        metrics=["", *(metric for _ in bases)],
    )


def kinds_and_bases(
    rows: pd.DataFrame, refusals: Refusals | None = None
) -> tuple[list[str], list[str]]:
    """The methods and the kinds of a grid by name, kinds that some of its methods refused too."""
    bases = sorted(rows["base"].unique())
    asked = {kind for strategy, kind in refusals or () if strategy in bases}
    return bases, sorted({*rows["kind"]} | asked)


def kind_cell(
    at: Mapping[tuple[str, str], pd.Series],
    base: str,
    kind: str,
    metric: str,
    refusals: Refusals | None = None,
) -> str:
    """`mean ± standard error`; `refused`, or `-` where it was not run."""
    if (base, kind) not in at:
        return "refused" if (base.split(" ")[0], kind) in (refusals or ()) else "-"
    row = at[base, kind]
    spread = "" if math.isnan(row["error"]) else f" ± {number(row['error'], metric)}"
    return number(row["mean"], metric) + spread


def about_kinds(runs: pd.DataFrame, rows: pd.DataFrame) -> str:
    """What a caption says of a grid: runs, what they were repeated over, images, and seeds."""
    orders = int(runs["order"].nunique())
    over = (
        "class orders" if orders > 1 and not is_shift(runs) else "orders" if orders > 1 else "seeds"
    )
    few, most = int(rows["n"].min()), int(rows["n"].max())
    count = f"{few}" if few == most else f"{few} to {most}"
    said = f"Mean ± standard error over {count} {over}." if most > 1 else "One run each."
    images = [f"{int(runs[k].iloc[0]):,} {k.removeprefix('data.').replace('_', ' ')}"
              for k in ("data.train_images", "data.test_images") if k in runs]  # fmt: skip
    seeds = ", ".join(map(str, sorted(runs["seed"].unique())))
    return " ".join([said, *([f"{', '.join(images)}."] if images else []), f"Seeds: {seeds}."])


def published_table(runs: pd.DataFrame) -> Table | None:
    """Our mean beside each published figure, and whether the two can be compared."""
    figures = published(runs)
    if figures.empty:
        return None
    at = {(row["method"], row["metric"]): row for _, row in statistics(runs).iterrows()}
    rows = []
    for _, row in figures.iterrows():
        ours = at.get((row["method"], row["metric"]))
        gap = f"{ours['mean'] - row['published']:+.2f}" if ours is not None else ""
        theirs = number(row["published"], row["metric"])
        same = bool(row["comparable"])
        shown = [cell(ours) if ours is not None else "-", theirs, gap if same else ""]
        about = ["yes" if same else "no", row["status"], row["source"]]
        rows.append([row["method"], row["metric"], *shown, *about])
    head = ["strategy", "metric", "ours", "published", "difference", "comparable", "status"]
    caption = "Not comparable: stand-in or changed data, changed settings, or another protocol."
    name = f"{_place(runs)}: published figures"
    return Table(name, [*head, "source"], rows, f"{caption} {_label(runs)}".strip())


def state_table(runs: pd.DataFrame) -> Table:
    """Every run with its state: what was averaged, and what was not and why."""
    columns = ["state", "scenario", "strategy", "around", "backbone", "seed"]
    columns += ["git", "problem", "path"]
    shown = runs[columns].astype(object).where(runs[columns].notna(), "").map(str)
    shown["git"] = shown["git"].str[:8]
    if "same_as.seed" in runs:  # the run of another seed stands for it
        copies = runs["same_as.seed"].notna()
        seeds = runs.loc[copies, "same_as.seed"].astype(int).astype(str)
        shown.loc[copies, "problem"] = "result of seed " + seeds
    head = [{"git": "code", "path": "folder", "around": "rules"}.get(k, k) for k in columns]
    return Table("All runs", head, shown.to_numpy().tolist())


def tables_of(
    runs: pd.DataFrame, metrics: Sequence[str] = (), refusals: Refusals | None = None
) -> list[Table]:
    """All tables of one scenario, backbone and stream; `refusals` as for `kind_table`."""
    special: list[Group] = ["open", "time", "estimate", "count"]
    tables = [
        main_table(runs, metrics),
        domain_table(runs),
        *(group_table(runs, group) for group in special),
        published_table(runs),
        kind_table(runs, metrics[0] if metrics else None, refusals),
        cost_table(runs),
    ]
    return [t for t in tables if t is not None]


def definitions(tables: Sequence[Table]) -> list[tuple[str, str, str]]:
    """Name with arrow and heading, definition and source of every metric in the tables."""
    shown = dict.fromkeys(m for table in tables for m in table.metrics if m)
    return sentences(shown)


# ------------------------------------------------------------------------------ as text


def _has_best(table: Table) -> bool:
    return any(rank > 0 for rank in table.marks.values())


def _marked(table: Table, form: dict[int, str], escape: Any = str) -> list[list[str]]:
    return [
        [form[table.marks.get((r, c), 0)] % escape(text) for c, text in enumerate(row)]
        for r, row in enumerate(table.rows)
    ]


def terminal(table: Table) -> str:
    """Aligned columns; best with *, second with +."""
    rows = _marked(table, {0: "%s", 1: "%s*", 2: "%s+", STILL: "%s"})
    legend = "(* best, + second) " if _has_best(table) else ""
    return f"{table.title}\n{aligned(table.head, rows)}\n{legend}{table.caption}".rstrip()


def one_line(text: str) -> str:
    """Text without line breaks, which would end a row, a heading or a comment."""
    return " ".join(text.splitlines())


def quoted(notes: Sequence[str]) -> str:
    """Notes as a quotation of Markdown."""
    return "".join(f"> {one_line(note).replace('<', '&lt;')}\n" for note in notes)


def markdown_escape(text: str) -> str:
    """Text that is neither HTML nor the end of a cell."""
    return one_line(text).replace("<", "&lt;").replace("\\", "\\\\").replace("|", "\\|")


def markdown(table: Table) -> str:
    """Title, table and caption; best bold, second underlined."""
    rows = _marked(table, {0: "%s", 1: "**%s**", 2: "<u>%s</u>", STILL: "%s"}, markdown_escape)
    head = [markdown_escape(text) for text in table.head]
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    lines.insert(1, "|---" + "|---:" * (len(table.head) - 1) + "|")
    legend = "**Best**, <u>second</u>. " if _has_best(table) else ""
    title, caption = (one_line(t).replace("<", "&lt;") for t in (table.title, table.caption))
    return f"### {title}\n\n" + "\n".join(lines) + f"\n\n{legend}{caption}\n"


def defined(tables: Sequence[Table]) -> str:
    """What the columns mean, as a list in Markdown."""
    lines = [
        f"* {markdown_escape(name)}: {text}{f' ({source})' if source else ''}"
        for name, text, source in definitions(tables)
    ]
    return "\n".join(["### What the numbers mean", "", *lines, ""])


def csv(frame: pd.DataFrame) -> str:
    """CSV text in which no cell is a formula to a spreadsheet: these begin with an apostrophe."""

    def safe(cell: Any) -> Any:
        return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell

    text = frame.astype(object).map(safe)
    return text.rename(columns=safe).to_csv(index=False)


FORMULA = ("=", "+", "-", "@", "\t", "\r")

LATEX = {
    "\\": r"\textbackslash{}",
    **{c: f"\\{c}" for c in "{}_%&#$"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "[": "{[}",  # after a line break, [ would start its optional argument
    "]": "{]}",
    "±": r"$\pm$",
    "†": r"$^{\dagger}$",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
}


def latex_escape(text: str) -> str:
    """Text that is no command and stays on its line."""
    return "".join(LATEX.get(c, c) for c in one_line(text))


def latex(table: Table) -> str:
    """A table environment (booktabs; graphicx for the width); best bold, second underlined."""
    form = {0: "%s", 1: r"\textbf{%s}", 2: r"\underline{%s}", STILL: "%s"}
    head, *body = (
        " & ".join(row) + r" \\"
        for row in [[latex_escape(t) for t in table.head], *_marked(table, form, latex_escape)]
    )
    legend = r" \textbf{Best}, \underline{second}." if _has_best(table) else ""
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{latex_escape(table.title)}. {latex_escape(table.caption)}{legend}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def anchor(metric: str) -> str:
    """Identifier of the definition of a metric on the page."""
    return "m-" + re.sub(r"[^a-z0-9]+", "-", define(metric).name.lower()).strip("-")


def as_html(table: Table, linked: bool = False) -> str:
    """A table inside a box of its own, which scrolls where it is too wide.

    Args:
        linked: heads of metrics lead to their definitions (`anchor`).
    """
    form = {0: "%s", 1: "<b>%s</b>", 2: "<u>%s</u>", STILL: '<span class="faint">%s</span>'}
    dagger = f'<span class="worse">{WORSE}</span>'
    rows = _marked(table, form, lambda text: html.escape(text).replace(WORSE, dagger))
    metrics = table.metrics or [""] * len(table.head)
    head = "".join(
        f'<th><a href="#{anchor(metric)}">{html.escape(text)}</a></th>'
        if linked and metric
        else f"<th>{html.escape(text)}</th>"
        for text, metric in zip(table.head, metrics, strict=True)
    )
    body = "\n".join("<tr>" + "".join(f"<td>{t}</td>" for t in row) + "</tr>" for row in rows)
    legend = "<b>Best</b>, <u>second</u>. " if _has_best(table) else ""
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
        f'<p class="caption">{legend}{html.escape(table.caption)}</p>\n'
    )
