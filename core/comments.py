"""What the comments of a YAML file say of each of its settings; needs no torch.

A comment stands above its key, or behind its value. The comment at the head of a file is about the
file as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml


def head(path: Path) -> list[str]:
    """The comment about a file as a whole, a string a line."""
    with open(path) as file:
        return [li.lstrip("#").strip() for li in takewhile(lambda li: li.startswith("#"), file)]


def summary(path: Path) -> str:
    """The first sentence of that, without its full stop; empty without a comment."""
    text = " ".join(head(path))
    end = re.search(r"(?<!al)\.(?=\s+[A-Z]|\s*$)|(?<=\))\.(?=\s)|:\s*$", text)
    return text[: end.start()] if end else text


@cache
def comments(path: Path) -> dict[str, str]:
    """The comment of each setting of a file in one line, by dotted key; absent without one.

    Raises:
        OSError, yaml.YAMLError: if the file cannot be read.
    """
    text = path.read_text()
    lines, start = text.splitlines(), len(head(path))
    texts = {}
    for name, key, value in _pairs(yaml.compose(text, yaml.SafeLoader)):
        inner = isinstance(value, yaml.MappingNode) and not value.flow_style
        last = key.end_mark if inner else value.end_mark
        behind = re.match(r":?\s*#\s*(.*)", lines[last.line][last.column :])
        words = _above(lines, start, key.start_mark.line)
        words += [behind[1].strip()] if behind else []
        if words:
            texts[name] = " ".join(words)
    return texts


@cache
def settings(path: Path) -> frozenset[str]:
    """The dotted keys of a file."""
    root = yaml.compose(path.read_text(), yaml.SafeLoader)
    return frozenset(name for name, _, _ in _pairs(root))


def as_typed(value: Any) -> str:
    """A plain value as it is typed in YAML or on the command line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _above(lines: list[str], start: int, line: int) -> list[str]:
    """The comment lines from `start` on that end right above a line, without their marks."""
    words: list[str] = []
    while line > start and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        words.insert(0, lines[line].strip().lstrip("#").strip())
    return words


def _pairs(node: yaml.Node | None, above: str = "") -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Dotted name, key and value of every setting, outer ones first."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        name = f"{above}{key.value}"
        yield name, key, value
        yield from _pairs(value, f"{name}.")
