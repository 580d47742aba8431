"""Files that are whole or not there; needs no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it where the block ends well."""
    part = path.with_name(path.name + ".tmp")
    yield part
    os.replace(part, path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write to a temporary name, then rename: a reader never sees half a file."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, for text."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: object) -> None:
    """As `write_bytes`, for what JSON can hold; anything else as its text."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")
