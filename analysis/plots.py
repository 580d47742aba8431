"""Figures of runs, as matplotlib figures that are never shown by themselves.

Every function takes runs of one scenario, backbone and stream (`analysis.tables.by_place`) and
names the scenario's label in its title. A method has one colour everywhere; settings of one method
share it and differ in marker and line. The colours can be told apart with the common kinds of
colour blindness (Okabe and Ito 2008; Paul Tol's muted scheme), and markers repeat the distinction.
"""

from __future__ import annotations

import functools
import io
import math
import textwrap
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from driftline.analysis.metrics import define
from driftline.analysis.runs import (
    by_kind,
    load_batches,
    load_experiences,
    load_matrix,
    origin,
)
from driftline.analysis.tables import (
    Refusals,
    about_kinds,
    domains_in_order,
    headline,
    is_shift,
    kind_cell,
    kinds_and_bases,
    methods_in_order,
    number,
)

COLOURS = {  # of strategies that are often drawn; see `looks` for others
    "source": "#666666",
    "bn_adapt": "#0072B2",
    "tent": "#D55E00",
    "cotta": "#009E73",
    "vida": "#CC79A7",
    "lame": "#E69F00",
    "ecotta": "#56B4E9",
    "finetune": "#666666",
    "joint": "#000000",
    "linear_probe": "#999933",
    "simplecil": "#0072B2",
    "ease": "#D55E00",
    "mos": "#009E73",
    "aper": "#56B4E9",
    "lae": "#CC79A7",
    "olora": "#E69F00",
    "lwf": "#882255",
    "ewc": "#332288",
    "l2": "#44AA99",
}
OTHERS = ("#AA4499", "#117733", "#DDCC77", "#88CCEE", "#661100", "#6699CC")
MARKERS = "osD^vPX<>dph"
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
MOST = 40  # methods with kinds of adapters; see `figures`
CROWD = 8  # methods; more than that are drawn without bands
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.dpi": 144,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Draw with this module's settings, whatever matplotlibrc says (so without LaTeX, too)."""

    @functools.wraps(draw)
    def inner(*args: Any, **named: Any) -> Any:
        with mpl.rc_context({**mpl.rcParamsDefault, "backend": mpl.get_backend(), **STYLE}):
            return draw(*args, **named)

    return inner


class Shown(Figure):
    """A figure that a notebook shows as the value of a cell; pyplot would keep it for ever."""

    @styled
    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=96)
        return file.getvalue()


def looks(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker, line style and label of each method, no two of them alike.

    Strategies without a colour of their own take one of `OTHERS`: that which their name asks for,
    so that it is mostly the same in every figure, or the next one that is free.
    """
    strategies = list(dict.fromkeys(method.split(" ")[0] for method in methods))
    named = [s for s in strategies if s in COLOURS]
    others = [s for s in strategies if s not in COLOURS]
    colours, markers = {**COLOURS}, {s: list(COLOURS).index(s) for s in named}
    for i, s in enumerate(others):
        first = zlib.crc32(s.encode())
        turn = [OTHERS[(first + k) % len(OTHERS)] for k in range(len(OTHERS))]
        uses = [sum(colours[o] == colour for o in others[:i]) for colour in turn]
        colours[s] = turn[uses.index(min(uses))]
        markers[s] = min(uses)
    look_of: dict[str, dict[str, Any]] = {}
    used: dict[str, int] = {}
    for method in methods:
        strategy = method.split(" ")[0]
        variant = used[strategy] = used.get(strategy, -1) + 1
        look_of[method] = {
            "color": colours[strategy],
            "marker": MARKERS[(markers[strategy] + 5 * variant) % len(MARKERS)],
            "linestyle": ":" if strategy == "source" else LINES[variant % len(LINES)],
            "label": textwrap.fill(method, 44),
        }
    return look_of


def _head(figure: Figure, runs: pd.DataFrame, what: str) -> None:
    scenario, backbone = runs["scenario"].iloc[0], runs["backbone"].iloc[0]
    stand_in = " (stand-in images)" if "[embedded]" in scenario else ""
    figure.suptitle(f"{what}\n{scenario}{stand_in}, {backbone}", fontsize=10.5)


def _figure(width: float, height: float, methods: int) -> Figure:
    return Shown((width, height + 0.2 * math.ceil(methods / 3)), layout="constrained")


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    widest = max((len(line) for label in labels for line in label.split("\n")), default=0)
    columns = max(1, min(5, len(labels), 90 // (widest + 5)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _short(names: Iterable[str]) -> list[str]:
    return [str(n).removeprefix("classes ").replace("_", " ") for n in names]


# ------------------------------------------------------------------------------ learning tasks


@styled
def heat_maps(runs: pd.DataFrame) -> Figure | None:
    """Heat maps of R, one per method: accuracy on each column after each row, mean over runs.

    Only runs with the commonest sequence of rows are shown (orders of domains may differ); the
    title of a map says how many they are. None without a cell.
    """
    cells = load_matrix(runs[~origin(runs).duplicated()])  # one for several seeds counts once
    if "acc" not in cells or cells["acc"].isna().all():
        return None
    cells = cells[cells["acc"].notna()].sort_values("after", kind="stable")
    sequence = cells.groupby("path")["after_name"].agg(lambda names: tuple(dict.fromkeys(names)))
    wanted = sequence.mode().iloc[0]
    cells = cells[cells["path"].map(sequence) == wanted]
    columns = list(dict.fromkeys(cells["on"]))
    methods = [m for m in methods_in_order(runs) if m in set(cells["method"])]
    across = min(len(methods), 2 if len(columns) > 12 or len(methods) == 4 else 3)
    down = math.ceil(len(methods) / across)
    width = (4.4 if len(columns) > 12 else 2.9) * across + 0.6
    height = (0.9 + min(3.4, 0.36 * max(3, len(wanted)))) * down + 1.1
    figure = Shown((max(4.2, width), height), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for axes, method in zip(grid.flat, methods, strict=False):
        some = cells[cells["method"] == method]
        means = some.pivot_table("acc", "after", "on", sort=False).reindex(columns=columns)
        image = axes.imshow(means, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        axes.set_facecolor("#e4e4e4")
        axes.grid(False)
        axes.set_title(textwrap.fill(f"{method} (n={some['path'].nunique()})", 30), fontsize=9)
        axes.set_xticks(range(len(columns)), _short(columns), rotation=90, fontsize=8)
        every = math.ceil(len(wanted) / 15)
        names = _short(wanted)[::every]
        axes.set_yticks(range(0, len(wanted), every), names, fontsize=8)
        if len(columns) <= 10 and len(wanted) <= 16:
            for (r, c), value in np.ndenumerate(means):
                if not math.isnan(value):
                    ink = "white" if value < 60 else "black"
                    axes.text(c, r, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink)
    for i, axes in enumerate(grid.flat):
        axes.tick_params(labelbottom=i + across >= len(methods))
        axes.set_visible(i < len(methods))
    figure.colorbar(image, ax=grid, label="accuracy, %", shrink=0.8, aspect=30)
    figure.supxlabel("evaluated on", fontsize=9)
    figure.supylabel("after", fontsize=9)
    _head(figure, runs, "Accuracy matrix R")
    return figure


@styled
def curves(runs: pd.DataFrame, y: str = "acc_last") -> Figure | None:
    """`y` of experiences.jsonl after each task: acc_last (all classes seen) or forgetting.

    Line: mean over runs; band: one standard deviation.
    """
    rows = load_experiences(runs)
    if y not in rows:
        return None
    methods = methods_in_order(runs)
    figure = _figure(5.4, 3.8, len(methods))
    axes = figure.add_subplot()
    for method, look in looks(methods).items():
        wide = rows[rows["method"] == method].pivot_table(y, "path", "index")
        mean, std = wide.mean(), wide.std()
        axes.plot(mean.index + 1, mean, markersize=4, linewidth=1.4, **look)
        if len(methods) <= CROWD:
            band = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(mean.index + 1, mean - std, mean + std, **band)
    what = "accuracy on all seen classes" if y == "acc_last" else y
    axes.set(xlabel="tasks learned", ylabel=f"{what}, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _head(figure, runs, f"{what[0].upper()}{what[1:]} after each task")
    _legend(figure, axes)
    return figure


# ------------------------------------------------------------------------------ streams


def streams_of(runs: pd.DataFrame) -> list[pd.DataFrame]:
    """`runs` of shifts, split by the sequence of their segments."""
    if "data.segments" not in runs:
        return []
    known = runs[runs["data.segments"].notna()]
    return [group for _, group in known.groupby(known["data.segments"].map(tuple), sort=False)]


@styled
def stream(runs: pd.DataFrame, window: int | None = None) -> Figure | None:
    """Running error along the stream, with a band for each domain; the source model is dotted.

    Args:
        runs: with the same sequence of segments (`streams_of`).
        window: batches in the running mean; None takes a 30th of the stream, at least 3.
    """
    rows = load_batches(runs[~origin(runs).duplicated()])  # one for several seeds counts once
    if "wrong" not in rows:
        return None
    rows = rows[rows["wrong"].notna()].astype({"wrong": float})
    methods = [m for m in methods_in_order(runs) if m in set(rows["method"])]
    figure = _figure(8.0, 4.2, len(methods))
    axes = figure.add_subplot()
    window = window or max(3, rows.groupby("path").size().max() // 30)
    for method, look in looks(methods).items():
        errors = {}
        for path, run in rows[rows["method"] == method].groupby("path"):
            _events(axes, run, look["color"])
            sums = run[["wrong", "n"]].rolling(window, min_periods=1).sum()
            errors[path] = pd.Series((100 * sums["wrong"] / sums["n"]).values, run["n"].cumsum())
        wide = pd.DataFrame(errors).sort_index()
        mean, std = wide.mean(axis=1), wide.std(axis=1)
        axes.plot(mean.index, mean, linewidth=1.5, **look)[0].set_marker("")
        if len(methods) <= CROWD:
            band = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(mean.index, mean - std, mean + std, **band)
    first = rows[rows["path"] == rows["path"].iloc[0]]
    _bands(axes, first.groupby("segment")["n"].sum(), runs["data.segments"].iloc[0])
    axes.set(xlabel="images seen", ylabel=f"error, % (running mean over {window} batches)")
    _head(figure, runs, "Error along the stream")
    _legend(figure, axes)
    return figure


def _events(axes: Axes, run: pd.DataFrame, color: Any) -> None:
    """A tick below the curves where a rule or the guard did something."""
    named = [name for name in ("event", "guard") if name in run]
    at = run["n"].cumsum()[run[named].notna().any(axis=1)] if named else []
    axes.plot(at, [0.012] * len(at), "|", color=color, transform=axes.get_xaxis_transform())


def _bands(axes: Axes, images: pd.Series, names: Sequence[str]) -> None:
    """One band per domain, named above the curves; neighbours of one corruption are one domain."""
    domains = [str(names[int(i)]).partition(":")[0] for i in images.index]
    ends = images.cumsum().to_numpy()
    low, high = axes.get_ylim()
    room = 0.3 * (high - low) if len(set(domains)) <= 30 else 0
    axes.set_ylim(max(0, low), high + room)
    axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= min(100, high)])
    left, number_of = 0, 0
    for i, (name, right) in enumerate(zip(domains, ends, strict=True)):
        if i + 1 < len(domains) and domains[i + 1] == name:
            continue
        shade = {"alpha": 0.14 if number_of % 2 else 0.03, "linewidth": 0}
        axes.axvspan(left, right, color="#777777", **shade)
        if room:
            at: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "rotation": 90}
            at |= {"ha": "center", "va": "top", "fontsize": 8}
            axes.text((left + right) / 2, 0.985, name.replace("_", " "), **at)
        left, number_of = right, number_of + 1
    axes.grid(axis="x", visible=False)
    axes.set_xlim(0, ends[-1])


@styled
def domains(runs: pd.DataFrame) -> Figure | None:
    """Error per domain, one marker a method (mean over its runs); small dots are single runs."""
    shown = [f"metrics.{name}" for name in domains_in_order(runs)][::-1]
    if not shown:
        return None
    methods = methods_in_order(runs)
    figure = _figure(5.4, 1.5 + 0.26 * len(shown), len(methods))
    axes = figure.add_subplot()
    for method, look in looks(methods).items():
        some = runs.loc[runs["method"] == method, shown]
        for _, values in some.iterrows():
            axes.plot(values, range(len(shown)), ".", color=look["color"], alpha=0.35, markersize=3)
        axes.plot(some.mean(), range(len(shown)), markersize=6, **look)[0].set_linestyle("")
    axes.set_yticks(range(len(shown)), _short(k.removeprefix("metrics.err/") for k in shown))
    axes.set(xlabel="error, %")
    _head(figure, runs, "Error per domain")
    _legend(figure, axes)
    return figure


# ------------------------------------------------------------------------------ trade-offs


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other point beats; both numbers are better when larger."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, reverse=True):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front[::-1]


def _scatter(axes: Axes, runs: pd.DataFrame, x: str, y: str, signs: tuple[int, int]) -> None:
    """Single runs as small dots, means as large markers, the Pareto front as a staircase.

    Args:
        signs: 1 where larger is better, -1 where smaller is.
    """
    points = []
    for method, look in looks(methods_in_order(runs)).items():
        some = runs.loc[runs["method"] == method, [x, y]].dropna()
        if some.empty:
            continue
        axes.plot(some[x], some[y], ".", color=look["color"], alpha=0.45, markersize=4)
        mean = some.mean()
        edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 0.8}
        axes.plot(mean[x], mean[y], markersize=9, zorder=3, **edge, **look)[0].set_linestyle("")
        if not method.startswith("joint"):
            points.append((signs[0] * mean[x], signs[1] * mean[y]))
    front = np.array(pareto_front(points)).reshape(-1, 2) * signs
    line = {"color": "#000000", "alpha": 0.35, "linewidth": 1, "drawstyle": "steps-pre"}
    axes.plot(front[:, 0], front[:, 1], zorder=1, label="Pareto front", **line)
    axes.margins(0.08)


@styled
def tradeoff(runs: pd.DataFrame) -> Figure | None:
    """Stability against plasticity; the staircase is the Pareto front of the means."""
    x, y = "metrics.plasticity", "metrics.stability"
    if not {x, y} <= set(runs) or runs[[x, y]].dropna().empty:
        return None
    figure = _figure(5.4, 3.8, runs["method"].nunique())
    axes = figure.add_subplot()
    _scatter(axes, runs, x, y, (1, 1))
    axes.set(xlabel="plasticity, %  (better: right)", ylabel="stability, %  (better: up)")
    _head(figure, runs, "Stability against plasticity")
    _legend(figure, axes)
    return figure


def with_time(runs: pd.DataFrame) -> pd.DataFrame:
    """`runs` with `time`: milliseconds an image (streams) or seconds of learning (tasks).

    Learning is steps and ends of tasks, without evaluation.
    """
    time = runs["cost.seconds_total"]
    if is_shift(runs):
        time = 1000 * time / runs["cost.images"].replace(0, np.nan)
    elif "cost.end_of_task_seconds" in runs:
        time = time + runs["cost.end_of_task_seconds"].fillna(0)
    return runs.assign(time=time)


@styled
def pareto(runs: pd.DataFrame, metric: str | None = None) -> Figure | None:
    """`metric` against time and against memory; staircases are the Pareto fronts of the means.

    Args:
        metric: by default the mean error of streams, the average incremental accuracy of tasks.
    """
    metric = metric or headline(runs)
    needed = {"cost.seconds_total", "cost.images", "cost.peak_memory_mb", f"metrics.{metric}"}
    if not needed <= set(runs):
        return None
    some = with_time(runs)
    known = define(metric)
    sign = -1 if known.better == "lower" else 1
    figure = _figure(7.4, 4.0, runs["method"].nunique())
    left, right = figure.subplots(1, 2, sharey=True)
    _scatter(left, some, "time", f"metrics.{metric}", (-1, sign))
    _scatter(right, some, "cost.peak_memory_mb", f"metrics.{metric}", (-1, sign))
    left.set(xlabel="milliseconds an image" if is_shift(runs) else "seconds of learning")
    unit = f", {known.unit}" if known.unit else ""
    better = {"lower": "  (better: down)", "higher": "  (better: up)", "": ""}[known.better]
    left.set(ylabel=f"{metric}{unit}{better}")
    right.set(xlabel="peak memory, MiB")
    machines = runs["device"].nunique()
    warn = f"; from {machines} machines" if machines > 1 else ""
    _head(figure, runs, f"{metric} against cost (better: left{warn})")
    _legend(figure, left)
    return figure


# ------------------------------------------------------------------------------ kinds of adapters


@styled
def kind_map(
    runs: pd.DataFrame, metric: str | None = None, refusals: Refusals | None = None
) -> Figure | None:
    """Heat map of kinds of adapters by methods; None where no method was run with several.

    Args:
        metric, refusals: as for `tables.kind_table`.
    """
    metric = metric or headline(runs)
    rows = by_kind(runs, metric)
    if rows is None:
        return None
    bases, kinds = kinds_and_bases(rows, refusals)
    means = rows.pivot(index="kind", columns="base", values="mean").reindex(kinds, columns=bases)
    at = {(row["base"], row["kind"]): row for _, row in rows.iterrows()}
    figure = Shown((2.6 + 1.15 * len(bases), 1.7 + 0.3 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    lower = define(metric).better == "lower"
    image = axes.imshow(means, cmap="viridis_r" if lower else "viridis", aspect="auto")
    axes.set_facecolor("#e4e4e4")
    axes.grid(False)
    axes.set_xticks(range(len(bases)), [textwrap.fill(base, 16) for base in bases], fontsize=9)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    low, high = image.get_clim()
    for (r, c), value in np.ndenumerate(means):
        text = kind_cell(at, bases[c], kinds[r], metric, refusals)
        share = (value - low) / (high - low) if high > low else 0.5
        ink = "white" if (share > 0.4 if lower else share < 0.6) else "black"
        ink = "#666666" if math.isnan(value) else ink
        axes.text(c, r, text, ha="center", va="center", fontsize=7, color=ink)
    unit = define(metric).unit
    figure.colorbar(image, ax=axes, label=f"{metric}{f', {unit}' if unit else ''}", aspect=30)
    _head(figure, runs, f"{metric} of kinds of adapters\n{about_kinds(runs, rows)}")
    return figure


@styled
def kind_costs(runs: pd.DataFrame, metric: str | None = None) -> Figure | None:
    """`metric` of methods and kinds of adapters against what they cost, a panel a cost.

    Costs that no run has are left out. Staircases are the Pareto fronts of the means, and the kinds
    on them are named.
    """
    metric = metric or headline(runs)
    if not {"cost.seconds_total", "cost.images"} <= set(runs):
        return None
    rows = by_kind(runs.assign(**{"cost.time": with_time(runs)["time"]}), metric)
    if rows is None:
        return None
    learning = "milliseconds an image" if is_shift(runs) else "seconds of learning"
    costs = {
        "cost.parameters_updated": "trained parameters",
        "cost.task_mib": "MiB a task",
        "cost.time": learning,
        "cost.test_ms": "milliseconds a test image",
    }
    known = {k: text for k, text in costs.items() if k in rows and rows[k].notna().any()}
    looks_of = looks(sorted(rows["base"].unique()))
    sign = -1 if define(metric).better == "lower" else 1
    down = math.ceil(len(known) / 2)
    figure = _figure(8.6, 0.8 + 3.4 * down, len(looks_of))
    grid = figure.subplots(down, 2, squeeze=False, sharey=True)
    for axes, (cost, text) in zip(grid.flat, known.items(), strict=False):
        some = rows.dropna(subset=[cost, "mean"])
        for base, look in looks_of.items():
            own = some[some["base"] == base]
            axes.errorbar(own[cost], own["mean"], own["error"].fillna(0), elinewidth=0.6,
                          markersize=5, alpha=0.8, **look | {"linestyle": ""})  # fmt: skip
        best = pareto_front((-x, sign * y) for x, y in some[[cost, "mean"]].to_numpy())
        front = np.array(best).reshape(-1, 2) * (-1, sign)
        line = {"color": "#000000", "alpha": 0.35, "linewidth": 1, "drawstyle": "steps-pre"}
        axes.plot(front[:, 0], front[:, 1], zorder=1, label="Pareto front", **line)
        for x, y in front:
            at = some[(some[cost] == x) & (some["mean"] == y)].iloc[0]
            where: dict[str, Any] = {"xytext": (3, 4), "textcoords": "offset points"}
            axes.annotate(at["kind"], (x, y), fontsize=7, **where)
        if cost == "cost.parameters_updated" and (some[cost] > 0).all():
            axes.set_xscale("log")
        axes.set_xlabel(text)
        axes.margins(0.1)
    for i, axes in enumerate(grid.flat):
        axes.set_visible(i < len(known))
    unit, better = define(metric).unit, "down" if sign < 0 else "up"
    figure.supylabel(f"{metric}{f', {unit}' if unit else ''}  (better: {better})", fontsize=9)
    machines = runs["device"].nunique()
    warn = f"; from {machines} machines" if machines > 1 else ""
    _head(figure, runs, f"{metric} of kinds of adapters against cost (better: left{warn})")
    _legend(figure, grid.flat[0])
    return figure


# ------------------------------------------------------------------------------ all of them


def figures(
    runs: pd.DataFrame, metric: str | None = None, refusals: Refusals | None = None
) -> dict[str, Figure]:
    """Every figure that these runs have, by name; those of kinds of adapters alone where more than
    `MOST` methods, which no other one could show, are a grid of such kinds."""
    kinds = {"kinds": kind_map(runs, metric, refusals), "kind-costs": kind_costs(runs, metric)}
    kinds = {name: figure for name, figure in kinds.items() if figure is not None}
    if kinds and runs["method"].nunique() > MOST:
        return kinds
    return _figures_of_methods(runs, metric) | kinds


def _figures_of_methods(runs: pd.DataFrame, metric: str | None) -> dict[str, Figure]:
    if is_shift(runs):
        drawings = {f"stream-{i}": stream(some) for i, some in enumerate(streams_of(runs), 1)}
        drawings["domains"] = domains(runs)
    else:
        drawings = {"curves": curves(runs)}
    drawings |= {
        "tradeoff": tradeoff(runs),
        "pareto": pareto(runs, metric),
        "matrix": heat_maps(runs),
    }
    return {name: figure for name, figure in drawings.items() if figure is not None}


@styled
def encode(figure: Figure, kind: str, runs: pd.DataFrame) -> bytes:
    """A png or pdf file whose metadata name the runs it was made from."""
    keys = f"runs {' '.join(sorted(runs['key'].dropna().astype(str)))}"
    label = f"{runs['scenario'].iloc[0]} {runs['backbone'].iloc[0]}"
    file = io.BytesIO()
    about = {"Title": label, "Description" if kind == "png" else "Keywords": keys}
    figure.savefig(file, format=kind, metadata=about)
    return file.getvalue()


def describe(name: str, runs: pd.DataFrame) -> str:
    """Alternative text of a figure: what it shows and its main numbers."""
    what = {
        "curves": "accuracy on all seen classes after each task",
        "domains": "error per domain",
        "tradeoff": "stability against plasticity",
        "pareto": "quality against time and memory",
        "matrix": "accuracy matrices, one heat map per method",
        "kinds": "heat map of kinds of adapters by methods",
        "kind-costs": "kinds of adapters, quality against cost",
    }.get(name, "running error along the stream")
    metric = headline(runs)
    means = runs.groupby("method")[f"metrics.{metric}"].mean()
    means_text = ", ".join(f"{m} {number(v, metric)}" for m, v in means.items())
    return f"{runs['scenario'].iloc[0]}: {what}; {metric} in percent: {means_text}"
