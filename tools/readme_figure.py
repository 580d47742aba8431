"""The picture at the head of README.md, from finished runs of one stream.

    python run.py -m strategy=source,bn_adapt,tent,cotta scenario=imagenet_c
    python tools/readme_figure.py results --out docs/result.svg

Error of every domain in stream order, one line a strategy, as SVG. The title carries the label of
the runs, so that stand-in images stay marked.
"""

from __future__ import annotations

import argparse
import json
import sys
from html import escape
from pathlib import Path

ORDER = ("source", "bn_adapt", "tent", "cotta")
COLOURS = {"source": "#6e7781", "bn_adapt": "#9a6700", "tent": "#0969da", "cotta": "#cf222e"}
DASHED = {"tent": ' stroke-dasharray="7 4"'}  # may lie on that of bn_adapt
WIDTH, HEIGHT = 880, 384
LEFT, RIGHT, TOP, BOTTOM = 76, 182, 64, 92  # margins in pixels
Runs = dict[str, tuple[list[str], list[float]]]  # strategy -> domains, errors in percent


def read(results: Path) -> tuple[str, Runs]:
    """Label of the stream and the errors of each strategy.

    Raises:
        SystemExit: if a strategy was not run there, or on several streams.
    """
    runs_of: dict[str, Runs] = {}
    for path in sorted(results.rglob("summary.json")):
        run = json.loads(path.read_text())["run"]
        if run["strategy"] not in ORDER or run.get("around"):
            continue
        lines = path.with_name("experiences.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        names = [row["name"].partition(":")[0].replace("_", " ") for row in rows]
        label = f"{run['scenario']}, {run['backbone']}"
        runs_of.setdefault(label, {})[run["strategy"]] = names, [row["err"] for row in rows]
    complete = {label: runs for label, runs in runs_of.items() if set(runs) == set(ORDER)}
    if len(complete) != 1:
        raise SystemExit(f"error: {results} needs one stream with runs of {', '.join(ORDER)}")
    return next(iter(complete.items()))


def svg(label: str, runs: Runs) -> str:
    """The chart; error upwards, domains to the right."""
    names = runs[ORDER[0]][0]
    step = (WIDTH - LEFT - RIGHT) / (len(names) - 1)

    def y(error: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - error / 100)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="16" fill="#1f2328">{escape(label)}: '
        "error per domain in percent, in stream order</text>",
    ]
    if "[embedded]" in label:
        parts.append(
            f'<text x="{LEFT}" y="44" fill="#57606a">embedded stand-in data: procedural images '
            "of this project, not ImageNet</text>"
        )
    for error in (0, 25, 50, 75, 100):
        parts.append(
            f'<path d="M{LEFT} {y(error):.1f}H{WIDTH - RIGHT}" stroke="#d0d7de"/>'
            f'<text x="{LEFT - 8}" y="{y(error) + 4:.1f}" text-anchor="end" '
            f'fill="#57606a">{error}</text>'
        )
    for i, name in enumerate(names):
        x, below = LEFT + i * step, HEIGHT - BOTTOM + 16
        parts.append(
            f'<text x="{x:.1f}" y="{below}" text-anchor="end" fill="#57606a" font-size="11" '
            f'transform="rotate(-40 {x:.1f} {below})">{escape(name)}</text>'
        )
    means = {name: sum(runs[name][1]) / len(names) for name in ORDER}
    for strategy in ORDER:
        points = [(LEFT + i * step, y(e)) for i, e in enumerate(runs[strategy][1])]
        colour = COLOURS[strategy]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" '
            f'stroke-width="2"{DASHED.get(strategy, "")}/>'
        )
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
    for i, strategy in enumerate(sorted(ORDER, key=means.__getitem__, reverse=True)):
        parts.append(
            f'<text x="{WIDTH - RIGHT + 14}" y="{TOP + 20 + 22 * i}" font-weight="bold" '
            f'fill="{COLOURS[strategy]}">{strategy}, mean {means[strategy]:.1f}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/result.svg"))
    args = parser.parse_args()
    part = args.out.with_name(args.out.name + ".tmp")
    part.write_text(svg(*read(args.results)))
    part.replace(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
