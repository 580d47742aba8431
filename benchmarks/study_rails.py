"""What `around=rails` is worth: methods x streams, as they are, with rails, and only watched.

    python benchmarks/study_rails.py --out results/rails
    python benchmarks/study_rails.py --out results/rails --device cuda --jobs 2 \\
        --methods tent,cotta data.root=/data backbone=efficientnet_lite0_in1k

Every cell is a run of run.py, so that the same command goes on where it was stopped; words at the
end are settings of all of them. The table has the error of the source, of the method, with the
rails, and what they cost in time; below it stand the goals of the rails, and precision and recall
of their warning: "worse than not adapting is likely" in most comparisons of the run that is only
watched, against whether the method's error was more than a point above the source's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
METHODS = (
    "tent,cotta,bn_adapt,eata,eta,sar,deyo,roid,cmf,rotta,note,sotta,petal,lame,t3a,neo,recap,"
    "come,unmix_tns"
)
BASE = "gaussian_noise,defocus_blur,fog,jpeg_compression,contrast,snow"
OUTAGES = ("noise", "black")  # in the middle of the stream
STREAMS: dict[str, list[str]] = {
    "ordinary": [],
    "sorted": ["scenario.order=continual+correlated"],
    "batch1": ["scenario.batch_size=1"],
    "batch4": ["scenario.batch_size=4"],
    "sorted4": ["scenario.order=continual+correlated", "scenario.batch_size=4"],
    "noise": [],
    "black": [],
    "lr100": [],
}
VARIANTS = {
    "plain": [],
    "rails": ["around=rails"],
    "watched": ["around=rails", "around.rails.answer=method"],
}


def raised(method: str) -> list[str] | None:
    """The setting that makes the method's learning rate 100 times as large; None: it has none."""
    node: Any = OmegaConf.load(ROOT / "conf" / "strategy" / f"{method}.yaml")
    for key in ("optim.lr", "lr"):
        if (rate := OmegaConf.select(node, key)) is not None:
            return [f"strategy.{key}={100 * float(rate):g}"]
    return None


def run(words: list[str]) -> dict[str, Any] | str:
    """The summary of a run, or the last line of what it said where it failed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )
    at = re.findall(r"(?:results|already done): (.+?)(?: \(on_exists.*)?$", done.stdout, re.M)
    if done.returncode or not at:
        return ([*done.stdout.splitlines(), *done.stderr.splitlines()] or ["no output"])[-1]
    return json.loads((ROOT / at[-1] / "summary.json").read_text())


def row(runs: dict[str, dict[str, Any] | str]) -> dict[str, Any]:
    """What the table says of one method on one stream; `failed` where a run did."""
    for variant, summary in runs.items():
        if isinstance(summary, str):
            return {"failed": f"{variant}: {summary}"}
    plain, rails, watched = (runs[v] for v in VARIANTS)
    assert isinstance(plain, dict) and isinstance(rails, dict) and isinstance(watched, dict)
    method = watched["method"]
    return {
        "source": plain["source"]["metrics"]["err_images"],
        "plain": plain["metrics"]["err_images"],
        "rails": rails["metrics"]["err_images"],
        "passes": 100 * (passes(rails) / passes(plain) - 1),
        "time": 100 * (rails["cost"]["seconds_total"] / plain["cost"]["seconds_total"] - 1),
        "warned": 2 * method["rails_worse"] > method["rails_judged"],
        "judged": int(method["rails_judged"]),
        "by_source": rails["method"]["rails_by_source"] / rails["cost"]["batches"],
    }


def passes(summary: dict[str, Any]) -> float:
    """Forward passes of images, a backward pass as two of them."""
    return summary["cost"]["forward_images"] + 2 * summary["cost"]["backward_images"]


def table(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    lines = ["| stream | method | source | plain | rails | passes | time | by source | warned |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for (stream, method), r in rows.items():
        if "failed" in r:
            lines.append(f"| {stream} | {method} | {r['failed'][:70]} | | | | | | |")
            continue
        errors = " | ".join(f"{r[k]:.1f}" for k in ("source", "plain", "rails"))
        warned = ("yes" if r["warned"] else "no") + f" ({r['judged']})"
        lines.append(
            f"| {stream} | {method} | {errors} | {r['passes']:+.0f} % | {r['time']:+.0f} % "
            f"| {100 * r['by_source']:.0f} % | {warned} |"
        )
    return "\n".join(lines)


def goals(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    whole = {k: r for k, r in rows.items() if "failed" not in r}
    hostile = {k: r["rails"] - r["source"] for k, r in whole.items() if k[0] != "ordinary"}
    ordinary = [r for k, r in whole.items() if k[0] == "ordinary"]
    lines = []
    if hostile:
        bad = [f"{'/'.join(k)} {d:+.1f}" for k, d in hostile.items() if d > 1]
        before = sum(r["plain"] - r["source"] > 1 for k, r in whole.items() if k in hostile)
        lines.append(
            f"hostile: {len(bad)} of {len(hostile)} more than a point worse than the source with "
            f"rails ({before} without){': ' if bad else ''}{', '.join(bad)}"
        )
    if ordinary:
        points = [r["rails"] - r["plain"] for r in ordinary]
        times, more = (sorted(r[k] for r in ordinary) for k in ("time", "passes"))
        lines.append(
            f"ordinary: rails cost at most {max(points):+.2f} points (mean "
            f"{sum(points) / len(points):+.2f}), {more[len(more) // 2]:+.1f} % passes and "
            f"{times[len(times) // 2]:+.1f} % time (medians)"
        )
    hits = [(r["plain"] - r["source"] > 1, r["warned"]) for r in whole.values()]
    right = sum(worse and warned for worse, warned in hits)
    warned, worse = sum(w for _, w in hits), sum(w for w, _ in hits)
    lines.append(f"warning: precision {right} of {warned}, recall {right} of {worse}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("--out", required=True, help="folder of the runs, and of table.md")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--streams", default=",".join(STREAMS))
    parser.add_argument("--corruptions", default=BASE)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("settings", nargs="*", help="of every run, as after run.py")
    args = parser.parse_args()
    common = [f"root={Path(args.out).resolve()}", f"runtime.device={args.device}"]
    common += [
        f"scenario.corruptions=[{BASE}]",
        "scenario.probe_images=0",
        "scenario.clean_images=0",
    ]

    def cell(place: tuple[str, str]) -> dict[str, Any]:
        stream, method = place
        more = raised(method) if stream == "lr100" else []
        if more is None:
            return {"failed": "has no learning rate"}
        domains = args.corruptions.split(",")
        if stream in OUTAGES:
            domains.insert(len(domains) // 2, stream)
        words = [f"strategy={method}", f"scenario.corruptions=[{','.join(domains)}]", *common]
        words += [*STREAMS[stream], *more, *args.settings]
        found = row({name: run([*words, *variant]) for name, variant in VARIANTS.items()})
        print("/".join(place), found, flush=True)
        return found

    places = [*product(args.streams.split(","), args.methods.split(","))]
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = dict(zip(places, pool.map(cell, places), strict=True))
    text = f"{table(rows)}\n\n{goals(rows)}\n"
    print(text)
    (Path(args.out) / "table.md").write_text(text)


if __name__ == "__main__":
    main()
