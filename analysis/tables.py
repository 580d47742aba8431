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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from driftline.analysis.runs import PLACE, json_lines, named, stand_in, title
from driftline.core.console import table as aligned
from driftline.core.errors import UserError, suggest

SHIFT = (
    "err_mean",
    "plasticity",
    "stability",
    "forgetting",
    "source_forgetting",
    "source_forgetting_adapting",
    "auroc",
    "fpr95",
    "h_score",
    "time/availability",
    "time/err_served",
    "time/timeliness",
    "time/utility",
    "estimate/agreement_mae",
    "estimate/aetta_mae",
)
TASK = ("acc_inc", "acc_last", "plasticity", "stability", "forgetting", "bwt", "fwt")
TASK += ("intransigence",)
COST = {  # metric -> head of its column, decimals
    "cost/seconds_per_batch": ("s/batch", 3),
    "cost/seconds_total": ("steps s", 1),
    "cost/end_of_task_seconds": ("end of task s", 1),
    "cost/evaluation_seconds": ("test s", 1),
    "cost/peak_memory_mb": ("peak MiB", 0),
    "cost/forward_per_image": ("forward/image", 1),
    "cost/backward_per_image": ("backward/image", 1),
    "cost/parameters_updated": ("updated", 0),
    "cost/parameters_total": ("parameters", 0),
}
UNRANKED = "joint"  # an upper bound that sees all data
SMALLER = ("err", "clean_err", "fpr95", "forgetting", "source_forgetting", "intransigence", "mce")
SHARES = ("ece", "nll", "brier", "collapse")  # not in percent


def smaller_is_better(metric: str) -> bool:
    name = metric.removeprefix("til/").removeprefix("time/")
    return name.startswith((*SMALLER, *SHARES, "nan", "missed", "spent")) or name.endswith("_mae")


def digits(metric: str) -> int:
    """One decimal for errors, two for accuracies, three for quantities in [0, 1]."""
    if metric in COST:
        return COST[metric][1]
    if metric in SHARES:
        return 3
    return 1 if metric.startswith(("err", "clean_err", "mce", "time/")) else 2


def number(value: float, metric: str) -> str:
    return f"{value:,.{digits(metric)}f}"


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
        numbers = [k for p in ("metrics.", "cost.", "data.") for k in named(some, p)]
        unknown = [k for k in numbers if some[k].isna().all() and k != "data.fingerprint"]
        groups.append((title(place), some.drop(columns=unknown)))
    return groups


def _place(runs: pd.DataFrame) -> str:
    return title(runs[PLACE].iloc[0])


# ------------------------------------------------------------------------------ statistics


def statistics(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per scenario, backbone, stream, method and metric (`cost/...` for costs).

    Columns: those, n (runs), seeds, orders (how many); mean (over the orders of the means over
    seeds); std_seeds (within orders, pooled), std_orders (of the means of the orders), both with
    n - 1 and NaN where there is one value; values (all, in JSON); rank (1 best, 2 second, 0 else);
    published, source, comparable: a published figure that some run of the method names.

    Args:
        runs: as `select` returns them.
    """
    numbers = runs.select_dtypes("number")
    names = {k: k.removeprefix("metrics.") for k in named(numbers, "metrics.")}
    names |= {k: k.replace("cost.", "cost/", 1) for k in named(numbers, "cost.")}
    key = [*PLACE, "method", "metric"]
    about = [*PLACE, "method", "order", "seed"]
    every = runs[about].join(runs[list(names)].astype(float).rename(columns=names))
    every = every.melt(about, var_name="metric").dropna(subset="value").sort_values(about)
    in_order = every.groupby([*key, "order"])["value"].agg(["mean", "var"]).groupby(key)
    rows = every.groupby(key)
    long = pd.DataFrame({
        "n": rows.size(),
        "seeds": rows["seed"].nunique(),
        "orders": in_order.size(),
        "mean": in_order["mean"].mean(),
        "std_seeds": in_order["var"].mean() ** 0.5,
        "std_orders": in_order["mean"].std(),
        "values": rows["value"].agg(lambda values: json.dumps(values.tolist())),
        "rank": 0,
    }).reset_index()  # fmt: skip
    for (*_, metric), group in long.groupby([*PLACE, "metric"]):
        if metric not in COST:
            long.loc[group.index, "rank"] = _ranks(group, str(metric))
    figures = published(runs).sort_values("comparable", kind="stable").drop(columns="status")
    return long.merge(figures.drop_duplicates(key, keep="last"), on=key, how="left")


def _ranks(group: pd.DataFrame, metric: str) -> pd.Series:
    """1 and 2 for the best two printed means, as in a race; 0 for the others or if all are equal.

    Means that print alike share a rank, and after two firsts there is no second.
    """
    ranked = group["method"].str.split(" ").str[0] != UNRANKED
    shown = group["mean"].round(digits(metric)).where(ranked)
    place = shown.rank(method="min", ascending=smaller_is_better(metric))
    return place.where((place <= 2) & (shown.nunique() > 1), 0).astype(int)


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
    """Text cells with marks: rank 1 is the best of its column, 2 the second."""

    title: str
    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    marks: dict[tuple[int, int], int] = field(default_factory=dict)  # (row, column) -> rank

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.title)}</p>{as_html(self)}"


def cell(row: pd.Series) -> str:
    """`mean`, `mean ± std`, or `mean ± over seeds ± over orders`; `mean (every seed)` where all
    seeds gave one number, which is no measurement of a spread."""
    if row["std_seeds"] == 0 and row["metric"] not in COST and math.isnan(row["std_orders"]):
        return f"{number(row['mean'], row['metric'])} (every seed)"
    stds = [row[k] for k in ("std_seeds", "std_orders") if not math.isnan(row[k])]
    if row["metric"] in COST:
        stds = []  # spread of time and memory is the machine's, not the method's
    return " ± ".join(number(v, row["metric"]) for v in (row["mean"], *stds))


def _spread_over(long: pd.DataFrame) -> str:
    seeds, orders = long["std_seeds"].notna().any(), long["std_orders"].notna().any()
    if not (seeds or orders):
        return "One run each."
    over = {(True, False): "seeds", (False, True): "orders"}
    both = "seeds within an order ± over orders"
    fixed = (
        " (every seed): the seed changes nothing there." if (long["std_seeds"] == 0).any() else ""
    )
    spread = over.get((bool(seeds), bool(orders)), both)
    return f"Mean ± standard deviation (n-1) over {spread}.{fixed}"


def grid(runs: pd.DataFrame, metrics: Sequence[str], what: str = "") -> Table:
    """Methods by metrics with the number of runs, and columns of published figures that compare.

    Args:
        runs: of one scenario, backbone and stream (`by_place`).
        what: added to the title.
    """
    long = statistics(runs)
    at = {(row["method"], row["metric"]): row for _, row in long.iterrows()}
    methods = methods_in_order(runs)
    head, marks = ["strategy", "runs"], {}
    rows = [[m, str((runs["method"] == m).sum())] for m in methods]
    for metric in metrics:
        here = [at.get((m, metric)) for m in methods]
        arrow = "" if metric in COST else " ↓" if smaller_is_better(metric) else " ↑"
        head.append(COST[metric][0] if metric in COST else metric.removeprefix("err/") + arrow)
        for r, entry in enumerate(here):
            rows[r].append("-" if entry is None else cell(entry))
            if entry is not None and entry["rank"]:
                marks[r, len(head) - 1] = int(entry["rank"])
        theirs = [
            f["published"] if f is not None and f["comparable"] is True else None for f in here
        ]
        if any(value is not None for value in theirs):
            head.append(f"{metric}, published")
            for row, value in zip(rows, theirs, strict=True):
                row.append("" if value is None else number(value, metric))
    used = long[long["metric"].isin(metrics)]
    caption = ["Means." if set(metrics) <= set(COST) else _spread_over(used), _label(runs)]
    if UNRANKED in set(runs["strategy"]) and marks:
        caption.append(f"{UNRANKED} is an upper bound and not ranked.")
    name = f"{_place(runs)}: {what}" if what else _place(runs)
    return Table(name, head, rows, " ".join(filter(None, caption)), marks)


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
    units = "" if {*SHARES} & {*chosen} else "In percent. "
    table.caption = f"{units}{table.caption} Weights: {', '.join(weights_text) or 'unknown'}."
    table.caption += _timed(runs) if any(m.startswith("time/") for m in chosen) else ""
    return table


def _timed(runs: pd.DataFrame) -> str:
    """Which machine's time `time/...` speaks of."""
    devices = runs.loc[runs["time.repeatable"] == False, "time.device"].unique()  # noqa: E712
    return f" time/...: measured on {', '.join(devices) or 'no machine, latency given'}."


def domain_table(runs: pd.DataFrame) -> Table | None:
    """Error per domain, with the mean in front; None for streams of tasks."""
    domains = [k.removeprefix("metrics.") for k in named(runs, "metrics.err/")]
    return grid(runs, ["err_mean", *domains], "error per domain, percent") if domains else None


def cost_table(runs: pd.DataFrame) -> Table | None:
    """What the methods cost; None if no run says it."""
    known = [m for m in COST if m.replace("cost/", "cost.", 1) in runs]
    if not known:
        return None
    table = grid(runs, known, "cost")
    table.caption += f" Measured on {', '.join(runs['device'].dropna().unique()) or 'unknown'}."
    return table


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
    head = [{"git": "code", "path": "folder", "around": "rules"}.get(k, k) for k in columns]
    return Table("All runs", head, shown.to_numpy().tolist())


def tables_of(runs: pd.DataFrame, metrics: Sequence[str] = ()) -> list[Table]:
    """All tables of one scenario, backbone and stream."""
    tables = [
        main_table(runs, metrics),
        domain_table(runs),
        published_table(runs),
        cost_table(runs),
    ]
    return [t for t in tables if t is not None]


# ------------------------------------------------------------------------------ as text


def _marked(table: Table, form: dict[int, str], escape: Any = str) -> list[list[str]]:
    return [
        [form[table.marks.get((r, c), 0)] % escape(text) for c, text in enumerate(row)]
        for r, row in enumerate(table.rows)
    ]


def terminal(table: Table) -> str:
    """Aligned columns; best with *, second with +."""
    rows = _marked(table, {0: "%s", 1: "%s*", 2: "%s+"})
    legend = "(* best, + second) " if table.marks else ""
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
    rows = _marked(table, {0: "%s", 1: "**%s**", 2: "<u>%s</u>"}, markdown_escape)
    head = [markdown_escape(text) for text in table.head]
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    lines.insert(1, "|---" + "|---:" * (len(table.head) - 1) + "|")
    legend = "**Best**, <u>second</u>. " if table.marks else ""
    title, caption = (one_line(t).replace("<", "&lt;") for t in (table.title, table.caption))
    return f"### {title}\n\n" + "\n".join(lines) + f"\n\n{legend}{caption}\n"


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
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
}


def latex_escape(text: str) -> str:
    """Text that is no command and stays on its line."""
    return "".join(LATEX.get(c, c) for c in one_line(text))


def latex(table: Table) -> str:
    """A table environment (booktabs; graphicx for the width); best bold, second underlined."""
    form = {0: "%s", 1: r"\textbf{%s}", 2: r"\underline{%s}"}
    head, *body = (
        " & ".join(row) + r" \\"
        for row in [[latex_escape(t) for t in table.head], *_marked(table, form, latex_escape)]
    )
    legend = r" \textbf{Best}, \underline{second}." if table.marks else ""
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


def as_html(table: Table) -> str:
    """A table inside a box of its own, which scrolls where it is too wide."""
    rows = _marked(table, {0: "%s", 1: "<b>%s</b>", 2: "<u>%s</u>"}, html.escape)
    head = "".join(f"<th>{html.escape(t)}</th>" for t in table.head)
    body = "\n".join("<tr>" + "".join(f"<td>{t}</td>" for t in row) + "</tr>" for row in rows)
    legend = "<b>Best</b>, <u>second</u>. " if table.marks else ""
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
        f'<p class="caption">{legend}{html.escape(table.caption)}</p>\n'
    )
