"""Tables, figures and one HTML page of the runs under some results folders.

    python scripts/report.py results
    python scripts/report.py results/imagenet_c* --out report --metric err_mean ece --figures
    python scripts/report.py results --average scenario.corruptions    # CoTTA's ten orders

Prints the tables and writes into --out (by default `report/` inside the first folder):

    report.html               everything in one file, for any browser, offline
    tables.md, tables.tex     the printed tables (LaTeX: booktabs and graphicx)
    tables.csv, runs.csv      every metric: mean, deviations, all values, published figure;
                              one row a run, unfinished and failed ones too
    figures/*.png, *.pdf      with --figures: the keys of their runs are in the metadata

Runs that differ in nothing but the seed and the keys under --average are one row: mean and standard
deviation. Where a strategy was run with several settings, its rows name them; several settings of
the scenario make several tables. Needs `pip install -e ".[analysis]"`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from driftline.analysis import load_runs, notes, plots, select
except ModuleNotFoundError as error:
    sys.exit(f'error: this needs {error.name}: pip install -e ".[analysis]"')
from driftline.analysis import tables as tab
from driftline.analysis.page import Picture, Section, page
from driftline.analysis.runs import AVERAGE, named, refused
from driftline.core.console import program
from driftline.core.errors import UserError, suggest
from driftline.core.files import write_bytes, write_text

FORMATS = ("html", "md", "tex", "csv")


def report(
    roots: Sequence[Path],
    out: Path,
    *,
    metrics: Sequence[str] = (),
    formats: Sequence[str] = FORMATS,
    average: Sequence[str] = AVERAGE,
    figures: bool = False,
) -> str:
    """Write the report into `out`; returns the tables and notes as text for a terminal.

    Args:
        metrics: columns of the main tables that have them; the first is drawn against cost.
        figures: also write every figure as a PNG and a PDF file.

    Raises:
        UserError: for a missing or empty folder, no finished run, an unknown metric.
    """
    every = load_runs(*roots)
    runs = tab.with_intransigence(select(every, average))
    told = notes(every, runs, average)
    known = [k.removeprefix("metrics.") for k in named(runs, "metrics.")]
    for metric in metrics:
        if metric not in known:
            raise UserError(f"no run has the metric {metric!r}{suggest(metric, known)}")
    places, refusals = [], refused(*roots)
    for title, some in tab.by_place(runs):
        wanted = [m for m in metrics if f"metrics.{m}" in some]
        places.append((title, some, wanted, tab.tables_of(some, wanted, refusals)))
    tables = [table for *_, some in places for table in some]
    out.mkdir(parents=True, exist_ok=True)
    if "md" in formats:
        text = "\n".join([tab.quoted(told), *map(tab.markdown, tables), tab.defined(tables)])
        write_text(out / "tables.md", text.lstrip())
    if "tex" in formats:
        remarks = "".join(f"% {tab.one_line(note)}\n" for note in told)
        meanings = "".join(f"% {line}\n" for line in tab.defined(tables).splitlines() if line)
        parts = [remarks, *map(tab.latex, tables), meanings]
        write_text(out / "tables.tex", "\n".join(parts).lstrip())
    if "csv" in formats:
        write_text(out / "tables.csv", tab.csv(tab.statistics(runs)))
        write_text(out / "runs.csv", tab.csv(every))
    sections = []
    for title, some, wanted, drawing in places if figures or "html" in formats else []:
        section = Section(title, drawing, [])
        drawn = plots.figures(some, wanted[0] if wanted else None, refusals)
        for name, figure in drawn.items():
            png = plots.encode(figure, "png", some)
            width = round(96 * figure.get_figwidth())
            section.pictures.append(Picture(png, plots.describe(name, some), width))
            if figures:
                stem = re.sub(r"[/\\\s]", "_", f"{title.replace(', ', '-')}-{name}")
                (out / "figures").mkdir(exist_ok=True)
                write_bytes(out / "figures" / f"{stem}.png", png)
                write_bytes(out / "figures" / f"{stem}.pdf", plots.encode(figure, "pdf", some))
        sections.append(section)
    if "html" in formats:
        states = ", ".join(f"{n} {state}" for state, n in every["state"].value_counts().items())
        name = f"Runs under {', '.join(root.name or str(root) for root in roots)}"
        code = ", ".join(sorted(runs["git"].dropna().str[:10].unique()))
        about = f"{len(every)} runs: {states}; code {code or 'unknown'}"
        write_text(out / "report.html", page(name, about, told, sections, tab.state_table(every)))
    return "\n\n".join([*map(tab.terminal, tables), *(f"note: {note}" for note in told)])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("roots", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--out", type=Path, help="default: report/ in the first folder")
    parser.add_argument("--metric", nargs="*", default=(), help="columns of the main tables")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--figures", action="store_true", help="also as PNG and PDF files")
    parser.add_argument(
        "--average",
        nargs="*",
        default=AVERAGE,
        metavar="KEY",
        help=f"settings that are repetitions, as seeds are (default: {' '.join(AVERAGE)})",
    )
    args = parser.parse_args()
    out = args.out or args.roots[0] / "report"
    try:
        text = report(
            args.roots,
            out,
            metrics=args.metric,
            formats=args.formats,
            average=args.average,
            figures=args.figures,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {out}: {error}; choose a folder with --out", file=sys.stderr)
        return 2
    first = out / ("report.html" if "html" in args.formats else "")
    print(f"{text}\n\nwrote {first}")
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
