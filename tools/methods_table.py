"""The table of methods in README.md and docs/methods.md: paper, code, and what we checked.

    python tools/methods_table.py            # rewrites the block between the markers
    python tools/methods_table.py --check    # exit status 1 if a block is out of date

Rows are the options of conf/strategy; publications come from docs/methods.yaml; the last columns
are counted: cases recorded from a reference implementation (tests/golden), rows of papers
(papers/).
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import blocks

from driftline.core import papers

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
PAGES = {ROOT / "README.md": "docs/", ROOT / "docs" / "methods.md": ""}  # page -> path to docs
BEGIN = "<!-- methods: made by tools/methods_table.py -->"
END = "<!-- end of methods -->"


def recorded(patterns: list[str]) -> dict[str, int]:
    """Cases per reference repository with its commit; LAME's file holds several."""
    cases: dict[str, int] = {}
    for path in sorted(p for pattern in patterns for p in GOLDEN.glob(pattern)):
        case = json.loads(path.read_text())
        repository = case["official_repository"].removeprefix("github.com/")
        count = max(1, sum(name.endswith("_out") for name in case.get("outputs", ())))
        key = f"{repository} @ {case['commit'][:7]}"
        cases[key] = cases.get(key, 0) + count
    return cases


def conformance(fact: papers.Facts) -> str:
    """Which recorded numbers of which code the method reproduces, or what stands for them.

    Raises:
        ValueError: if `golden` matches no file.
    """
    if "golden" not in fact:
        return fact["checked"]
    cases = recorded(fact["golden"])
    if not cases:
        raise ValueError(f"no case under tests/golden matches {fact['golden']}")
    texts = [f"{count} of {where}" for where, count in cases.items()]
    return f"recorded cases: {', '.join(texts)}"


def publication(fact: papers.Facts) -> str:
    """`Wang et al., CVPR 2022` with a link."""
    if "paper" not in fact:
        return fact["about"]
    url = fact.get("url") or f"https://arxiv.org/abs/{fact['arxiv']}"
    link = f"[{fact['paper']} {fact['year']}]({url})"
    before = f"{fact['about']} " if "about" in fact else ""
    after = f"; {fact['note']}" if "note" in fact else ""
    return before + link + after


def rows(name: str) -> int:
    """Rows of the method's table in papers/."""
    return len(papers.names("experiment", name))


def markdown(docs: str) -> str:
    """The table; `docs` is the path from the page to the folder docs."""
    lines = [
        f"| strategy | kind | paper | code | reproduces | [rows]({docs}presets.md) |",
        "|---|---|---|---|---|---|",
    ]
    for name, fact in papers.facts().items():
        needs = f", {fact['needs']}" if "needs" in fact else ""
        code = ", ".join(f"[{c}](https://github.com/{c})" for c in fact.get("code", []))
        cells = (
            f"`{name}`",
            fact["kind"] + needs,
            publication(fact),
            code or ("none public" if "golden" in fact else ""),
            conformance(fact),
            str(rows(name) or "-"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def filled(text: str, docs: str) -> str:
    """The page with a fresh table, as of `blocks.filled`; `docs` is the path to docs/ from it."""
    return blocks.filled(text, BEGIN, END, markdown(docs))


if __name__ == "__main__":
    pages = {page: partial(filled, docs=docs) for page, docs in PAGES.items()}
    sys.exit(blocks.main(__doc__, ROOT, pages))
