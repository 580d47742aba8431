"""The rows of a paper: what is published, with which certainty, and what we measured.

    python scripts/paper.py                                 # methods and how many rows each has
    python scripts/paper.py cotta                           # its presets and figures, ours beside
    python scripts/paper.py cotta --run data.root=/data     # runs every preset, then the same table
    python scripts/paper.py cotta/cifar10_c --run data.root=/data seed=0,1,2
    python scripts/paper.py ease --run data.root=/sets/{data}    # {data}: the row's data set

Before the first row runs, settings, data, weights, packages, device and results folder of all rows
are looked at, and all that is wrong is said at once.

`ours` is read from finished runs of the preset under --results: the mean over seeds or orders, with
the standard deviation and count. It stands in brackets where the run is no equal of the published
one (stand-in images, changed settings, one order of ten), and says which data a row needs where
there is no run of it. Status of a figure: `seen` in logs, README or issues of the code that made
it; `quoted` from a table or thread that repeats it; `unverified`: repeated elsewhere, its source
not read by us.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf

from driftline.core import papers
from driftline.core.console import program, table
from driftline.core.errors import UserError, suggest
from driftline.core.files import Damaged, read_record
from driftline.core.paths import CONF, results_folder
from driftline.streams.dataset import about

CIFAR = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}  # their folders have other names
Figure = dict[str, Any]
Found = dict[tuple[str, str, str], list[Figure]]  # preset, strategy, metric -> one a run


@cache
def presets(paper: str) -> dict[str, list[Figure]]:
    """Published figures of each preset of `paper` (a table of papers/, or one preset)."""
    if papers.exists("experiment", paper):
        return {paper: papers.figures(paper)}
    rows = [f"{paper}/{name}" for name in papers.names("experiment", paper)]
    return {row: papers.figures(row) for row in rows}


def dataset(scenario: str) -> str:
    """The data set that an option of conf/scenario reads, its own or that of its base."""
    node: Any = OmegaConf.load(CONF / "scenario" / f"{scenario}.yaml")
    return node.dataset if "dataset" in node else dataset(node.defaults[0])


@cache
def needs(preset: str) -> tuple[str, str]:
    """Name and expected place of a preset's images: "CIFAR-10-C", "<data.root>/CIFAR-10-C/..."."""
    settings = papers.words("experiment", preset)
    source = dataset(settings["scenario"])
    record = about(source)
    if label := settings.get("scenario.label"):
        table_of = f"papers/{preset.partition('/')[0]}.yaml"
        return label.removeprefix("split_"), f"{record.layout}, see the head of {table_of}"
    name = CIFAR.get(source) or record.layout.split("/")[1]
    return name, f"{record.layout}, published at {record.published}"


def methods_in(preset: str) -> list[str]:
    """Methods to run for the figures of a preset: all of them, unless it sets options of its own.

    The source model is measured beside each of them.
    """
    settings = papers.words("experiment", preset)
    own = settings["strategy"]
    if any(key.startswith("strategy.") for key in settings):
        return [own]
    published = (row["strategy"] for row in papers.figures(preset))
    return list(dict.fromkeys(name for name in published if name != "source")) or [own]


def measured(results: Path) -> Found:
    """Every figure that a finished run of a preset holds beside the published one."""
    runs_of: Found = defaultdict(list)
    for path in sorted(results.rglob("summary.json")):
        overrides = path.with_name("overrides.txt")
        words = overrides.read_text().split() if overrides.exists() else []
        preset = next((w.split("=", 1)[1] for w in words if w.startswith("experiment=")), None)
        if preset is None:
            continue
        try:
            summary = read_record(path)
        except Damaged as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        for row in summary.get("reference") or []:
            if row["ours"] is not None:
                about = {"value": row["ours"], "comparable": row["comparable"]}
                about["label"] = summary["run"]["scenario"]
                about["own"] = row["strategy"] == summary["run"]["strategy"]
                runs_of[preset, row["strategy"], row["metric"]].append(about)
    return runs_of


def ours(runs: list[Figure], data: str) -> str:
    """Mean, spread and count of our runs, in brackets where they are no equals."""
    if any(r["own"] for r in runs):  # a run of its own rather than the source beside others
        runs = [r for r in runs if r["own"]]
    equal = [r for r in runs if r["comparable"]]
    shown = equal or runs
    if not shown:
        return f"needs {data}"
    values = [r["value"] for r in shown]
    text = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2f}, n={len(values)}"
    if equal:
        return text
    marks = sorted({r["label"][r["label"].index("[") :] for r in shown if "[" in r["label"]})
    return f"({text}{' ' if marks else ''}{' '.join(marks)})"


def listing(rows: dict[str, list[Figure]], runs_of: Found) -> str:
    """One line a published figure."""
    width = max(len(figure["source"]) for figures in rows.values() for figure in figures)
    body = []
    for preset, figures in rows.items():
        data, _ = needs(preset)
        for figure in figures:
            runs = runs_of.get((preset, figure["strategy"], figure["metric"]), [])
            same = "" if figure["comparable"] else ", not comparable"
            body.append(
                (
                    preset,
                    figure["strategy"],
                    figure["metric"],
                    str(figure["value"]),
                    ours(runs, data),
                    f"{figure['status']}{same}",
                    figure["source"].ljust(width),
                )
            )
    head = ("preset", "strategy", "metric", "published", "ours", "status", "source".ljust(width))
    return table(head, body)


def heading(method: str) -> str:
    """Title, publication and code of a method."""
    fact = papers.facts()[method]
    parts = [fact.get("title", fact.get("about"))]
    if "paper" in fact:
        where = fact.get("url") or f"arXiv {fact['arxiv']}"
        parts.append(f"{fact['paper']} {fact['year']}, {where}")
    if fact.get("code"):
        parts.append(f"code: {', '.join(fact['code'])}")
    return f"{method}: {'; '.join(parts)}"


def places(rows: dict[str, list[Figure]], runs_of: Found) -> list[str]:
    """Where the images of rows without a run belong."""
    done = {preset for preset, _, _ in runs_of}
    where: dict[str, list[str]] = defaultdict(list)
    for name, place in dict(needs(p) for p in rows if p not in done).items():
        where[place].append(name)
    return [f"needs {', '.join(names)}: {place}" for place, names in where.items()]


def settings_of(preset: str, words: list[str]) -> list[str]:
    """What is typed for the sweep of a preset over its methods."""
    settings = [word.replace("{data}", needs(preset)[0]) for word in words]
    if not any(word.startswith("strategy=") for word in words):
        settings.append(f"strategy={','.join(methods_in(preset))}")
    return [f"experiment={preset}", *settings]


def check(rows: dict[str, list[Figure]], words: list[str]) -> list[str]:
    """What would end runs of these presets before they have begun, a line each.

    Of the values of a sweep that a method is not, the first stands for all.
    """
    from driftline.runs.command import as_sweeps, composed
    from driftline.runs.ready import problems
    from driftline.runs.sweep import expand

    runs, wrong = [], list[str]()
    for preset in rows:
        of_method: dict[str, list[str]] = {}
        try:
            for one in expand(as_sweeps(settings_of(preset, words))):
                method = next(w for w in one if w.startswith("strategy="))
                of_method.setdefault(method, one)
            runs += [(f"{preset}, {m}", composed(one)) for m, one in of_method.items()]
        except (UserError, HydraException) as error:
            wrong.append(str(error).splitlines()[0])
    return [*dict.fromkeys(wrong), *problems(runs)]


def run(rows: dict[str, list[Figure]], words: list[str]) -> list[str]:
    """Run every preset as a sweep over its methods; returns those that did not come to an end."""
    broken = []
    for number, preset in enumerate(rows, 1):
        command = [sys.executable, "run.py", "-m", *settings_of(preset, words)]
        print(f"[{number}/{len(rows)}] {shlex.join(['python', *command[1:]])}", flush=True)
        code = subprocess.run(command, cwd=CONF.parent, check=False).returncode
        if code in (130, 143):
            raise SystemExit(code)
        if code:
            broken.append(preset)
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paper", nargs="?", help="a table of papers/, or one row of it")
    parser.add_argument("words", nargs="*", help="with --run: settings for every row")
    parser.add_argument("--run", action="store_true", help="run the rows first")
    parser.add_argument("--results", type=Path, default=Path("results"))
    args = parser.parse_intermixed_args()
    methods = papers.facts()
    if args.paper is None:
        body = []
        for method, fact in methods.items():
            rows = presets(method)
            paper = f"{fact['paper']} {fact['year']}" if "paper" in fact else fact["about"]
            body.append((method, paper, str(len(rows)), str(sum(map(len, rows.values())))))
        print(table(("method", "paper", "presets", "figures"), body))
        return 0
    rows = presets(args.paper)
    if not rows and args.paper in methods:
        print(f"{heading(args.paper)}\nno row of it: {methods[args.paper]['no_rows']}")
        return 0
    if not rows:
        every = [*methods, *papers.options("experiment")]
        print(
            f"error: no preset of {args.paper}{suggest(args.paper, every)}\n"
            f"methods: {', '.join(methods)}",
            file=sys.stderr,
        )
        return 2
    if args.words and not args.run:
        print("error: settings are for --run; without it nothing is run", file=sys.stderr)
        return 2
    results = results_folder(args.words, args.results)
    if args.run and (trouble := check(rows, args.words)):
        head = f"error: nothing was run; {len(trouble)} problems would end runs:"
        lines = [f"error: {trouble[0]}"] if len(trouble) == 1 else [head, *trouble]
        print("\n  ".join(lines), file=sys.stderr)
        return 2
    broken = run(rows, args.words) if args.run else []
    runs_of = measured(results)
    print(heading(args.paper.split("/")[0]) + "\n")
    print(listing(rows, runs_of))
    print("", *places(rows, runs_of), sep="\n")
    for preset in broken:
        print(f"not finished: {preset} (its report is above)", file=sys.stderr)
    if not args.run:
        print(f"run them: python scripts/paper.py {args.paper} --run data.root=/path/to/data")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(program(main))
