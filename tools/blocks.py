"""A block of a page that a program makes, between two lines that mark it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from driftline.core.files import write_text


def filled(text: str, begin: str, end: str, block: str) -> str:
    """The page with a fresh block.

    Raises:
        ValueError: if it lacks the markers.
    """
    head, first, rest = text.partition(begin)
    _, last, tail = rest.partition(end)
    if not first or not last:
        raise ValueError(f"the page needs the lines {begin!r} and {end!r}")
    return f"{head}{begin}\n{block}\n{end}{tail}"


def main(about: str | None, root: Path, pages: Mapping[Path, Callable[[str], str]]) -> int:
    """Rewrite the pages, or with --check say which are out of date.

    Args:
        about: what --help says.
        pages: each with what it makes of its old text.

    Returns:
        the exit status, 1 for pages that are out of date.
    """
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    old = []
    for page, fresh in pages.items():
        text = page.read_text()
        if fresh(text) == text:
            continue
        old.append(page.relative_to(root).as_posix())
        if not args.check:
            write_text(page, fresh(text))
    if args.check and old:
        print(f"out of date: {', '.join(old)}; run python tools/{Path(sys.argv[0]).name}")
        return 1
    return 0
