"""Files that are whole or not there, and files that notice damage; needs no torch."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from driftline.core.errors import UserError

LINE = 64  # bytes of the last line of a checked file
MARK = b"\ndriftline "  # what it begins with


class BadFile(UserError):
    """A file that must not be used: damaged, or of another owner; the message names it."""


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it where the block ends well, else deleted.

    Args:
        shared: other processes may write `path` at the same time.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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


# ------------------------------------------------------------------------------ checked files


class _Summed(io.RawIOBase):
    """Writes on to `file` and sums up what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.checksum = file, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self.file.write(data)


@contextmanager
def write_checked(path: Path, kind: str, key: str, *, shared: bool = False) -> Iterator[BinaryIO]:
    """A file to write to, whole or not there, that `read_checked` opens again.

    A line at its end holds kind, key and a CRC-32 of the content and of both; `torch.load` and
    `numpy.load` read such a file as if the line were not there. A CRC-32 notices every changed bit
    and every run of up to 32, and costs a fifth of what writing costs.

    Args:
        kind: what the file holds and the version of its format, a word like `checkpoint-2`.
        key: whom it belongs to, at most 24 hex digits.
        shared: other processes may write `path` at the same time.
    """
    with replacing(path, shared=shared) as part, open(part, "wb") as file:
        summed = _Summed(file)
        with io.BufferedWriter(summed) as buffer:
            yield buffer
        line = _line(f"{kind} {key}".encode(), summed.checksum)
        assert len(line) == LINE, f"{kind} {key} is too long"
        file.write(line)


@contextmanager
def read_checked(path: Path, kind: str, key: str) -> Iterator[BinaryIO]:
    """The content of a file of `write_checked`, open for reading.

    Raises:
        BadFile: if a bit of the file differs from what was written, or if it was written as
            another kind or for another key.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        checksum, left = 0, os.fstat(file.fileno()).st_size - LINE
        while left > 0 and (block := file.read(min(left, 2**20))):
            checksum = zlib.crc32(block, checksum)
            left -= len(block)
        line = file.read()
        words = line.split()[1:3]  # kind and key
        if not line.startswith(MARK) or len(words) < 2:
            raise BadFile(f"{path} is damaged, or of another version of this project")
        if line != _line(b" ".join(words), checksum):
            raise BadFile(f"{path} is damaged: its content does not fit its checksum")
        other_kind, other_key = (word.decode(errors="replace") for word in words)
        if other_kind != kind:
            raise BadFile(f"{path} is of another version ({other_kind}, not {kind})")
        if other_key != key:
            raise BadFile(
                f"{path} is of another run or other settings (key {other_key}, not {key})"
            )
        file.seek(0)
        yield file


def _line(name: bytes, checksum: int) -> bytes:
    """The line at the end, for kind and key and the checksum of what stands before it."""
    return (MARK + name + f" {zlib.crc32(name, checksum):08x}".encode()).ljust(LINE - 1) + b"\n"
