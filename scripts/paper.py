"""The rows of a paper: what is published, with which certainty, and what we measured.

    python scripts/paper.py                                 # papers and how many rows each has
    python scripts/paper.py cotta                           # its presets and figures, ours beside
    python scripts/paper.py cotta --run data.root=/data     # runs every preset, then the same table
    python scripts/paper.py cotta/cifar10_c --run data.root=/data seed=0,1,2

`ours` is read from finished runs of the preset under --results: the mean over seeds or orders, with
the standard deviation and count. It stands in brackets where the run is no equal of the published
one (stand-in images, changed settings, one order of ten). Status of a figure: `seen` in the
authors' code or logs, `quoted` from a paper's table, `unverified` from memory of others.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.console import table
from core.errors import suggest

PRESETS = Path(__file__).parents[1] / "conf" / "experiment"
Figure = dict[str, Any]
Found = dict[tuple[str, str, str], list[Figure]]  # preset, strategy, metric -> one a run


def presets(paper: str) -> dict[str, list[Figure]]:
    """Published figures of each preset of `paper` (a folder of conf/experiment, or one preset)."""
    one = PRESETS / f"{paper}.yaml"
    files = [one] if one.is_file() else sorted((PRESETS / paper).glob("*.yaml"))
    found = {}
    for path in files:
        rows: Any = OmegaConf.to_container(OmegaConf.load(path))
        found[path.relative_to(PRESETS).with_suffix("").as_posix()] = rows["reference"]
    return found


def measured(results: Path) -> Found:
    """Every figure that a finished run of a preset holds beside the published one."""
    found: Found = defaultdict(list)
    for path in sorted(results.rglob("summary.json")):
        overrides = path.with_name("overrides.txt")
        words = overrides.read_text().split() if overrides.exists() else []
        preset = next((w.split("=", 1)[1] for w in words if w.startswith("experiment=")), None)
        if preset is None:
            continue
        summary = json.loads(path.read_text())
        for row in summary.get("reference") or []:
            if row["ours"] is not None:
                about = {"value": row["ours"], "comparable": row["comparable"]}
                about["label"] = summary["run"]["scenario"]
                about["own"] = row["strategy"] == summary["run"]["strategy"]
                found[preset, row["strategy"], row["metric"]].append(about)
    return found


def ours(runs: list[Figure]) -> str:
    """Mean, spread and count of our runs, in brackets where they are no equals."""
    if any(r["own"] for r in runs):  # a run of its own rather than the source beside others
        runs = [r for r in runs if r["own"]]
    equal = [r for r in runs if r["comparable"]]
    kept = equal or runs
    if not kept:
        return "-"
    values = [r["value"] for r in kept]
    text = f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.2f}, n={len(values)}"
    if equal:
        return text
    marks = sorted({r["label"][r["label"].index("[") :] for r in kept if "[" in r["label"]})
    return f"({text}{' ' if marks else ''}{' '.join(marks)})"


def listing(rows: dict[str, list[Figure]], found: Found) -> str:
    """One line a published figure."""
    body = []
    for preset, figures in rows.items():
        for figure in figures:
            runs = found.get((preset, figure["strategy"], figure["metric"]), [])
            same = "" if figure["comparable"] else ", not comparable"
            body.append(
                (
                    preset,
                    figure["strategy"],
                    figure["metric"],
                    str(figure["value"]),
                    ours(runs),
                    f"{figure['status']}{same}",
                    figure["source"],
                )
            )
    head = ("preset", "strategy", "metric", "published", "ours", "status", "source")
    return table(head, body)


def run(rows: dict[str, list[Figure]], words: list[str]) -> list[str]:
    """Run every preset as a sweep of its own; returns those that did not come to their end."""
    broken = []
    for number, preset in enumerate(rows, 1):
        command = [sys.executable, "run.py", "-m", f"experiment={preset}", *words]
        print(f"[{number}/{len(rows)}] {shlex.join(['python', *command[1:]])}", flush=True)
        code = subprocess.run(command, cwd=PRESETS.parents[1], check=False).returncode
        if code in (130, 143):
            raise SystemExit(code)
        if code:
            broken.append(preset)
    return broken


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paper", nargs="?", help="a folder of conf/experiment, or one preset")
    parser.add_argument("words", nargs="*", help="with --run: settings for every row")
    parser.add_argument("--run", action="store_true", help="run the rows first")
    parser.add_argument("--results", type=Path, default=Path("results"))
    given = parser.parse_intermixed_args()
    papers = sorted(p.name for p in PRESETS.iterdir() if p.is_dir())
    if given.paper is None:
        counts = [(p, presets(p)) for p in papers]
        body = [(p, str(len(r)), str(sum(map(len, r.values())))) for p, r in counts]
        print(table(("paper", "presets", "figures"), body))
        return 0
    rows = presets(given.paper)
    if not rows:
        every = [*papers, *(name for p in papers for name in presets(p))]
        print(
            f"error: no preset of {given.paper}{suggest(given.paper, every)}\n"
            f"papers: {', '.join(papers)}",
            file=sys.stderr,
        )
        return 2
    if given.words and not given.run:
        print("error: settings are for --run; without it nothing is run", file=sys.stderr)
        return 2
    results = given.results
    for word in given.words:
        if word.startswith("root="):
            results = Path(word.removeprefix("root="))
    broken = run(rows, given.words) if given.run else []
    print(listing(rows, measured(results)))
    for preset in broken:
        print(f"not finished: {preset} (its report is above)", file=sys.stderr)
    if not given.run:
        print(f"\nrun them: python scripts/paper.py {given.paper} --run data.root=/path/to/data")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
