"""Files that are whole or not there, and files that notice damage; needs no torch."""

from __future__ import annotations

import errno
import io
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from driftline.core.errors import UserError

LINE = 64  # bytes of the last line of a checked file
MARK = b"\ndriftline "  # what it begins with


class BadFile(UserError):
    """A file that must not be used: damaged, or of another owner; the message names it."""


class Damaged(BadFile):
    """A file that is not as it was written; what it held is lost."""


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it where the block ends well, else deleted.

    The new file outlasts a power cut, but for a shared one: there are many of these, and what
    their users find damaged they make again.

    Args:
        shared: other processes may write `path` at the same time.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp" if shared else f"{path.name}.tmp")
    try:
        yield part
        if not shared:
            _to_disk(part)
        os.replace(part, path)
        if not shared:
            _to_disk(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)  # a write does not know where it went
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _to_disk(path: Path) -> None:
    """Wait until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it
            raise
    finally:
        os.close(descriptor)


def sweep_away(folder: Path) -> None:
    """Delete temporary files of shared writes that were killed: those untouched for an hour."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".tmp") and time.time() - entry.stat().st_mtime > 3600:
                os.unlink(entry.path)


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


def append(path: Path, content: bytes) -> None:
    """Add to a file; the new part outlasts a power cut."""
    try:
        with open(path, "ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


# ------------------------------------------------------------------------------ records


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """As `write_json`, with a field `checksum` that `read_record` compares."""
    plain = json.loads(json.dumps(content, default=str))
    write_json(path, {**plain, "checksum": _sum_of(plain)})


def read_record(path: Path, *fields: str) -> dict[str, Any]:
    """The content of a file of `write_record`; of earlier versions, which have no checksum, too.

    Args:
        fields: what it must hold.

    Raises:
        Damaged: if it is not what was written.
        OSError: if it cannot be read.
    """
    content = path.read_bytes()
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise Damaged(f"{path} is damaged: it holds no mapping")
    checksum = record.pop("checksum", None)
    if checksum is not None and checksum != _sum_of(record):
        raise Damaged(f"{path} is damaged: its content does not fit its checksum")
    if lacking := [name for name in fields if name not in record]:
        raise Damaged(f"{path} is damaged: it lacks {', '.join(lacking)}")
    return record


def _sum_of(record: Mapping[str, Any]) -> str:
    return checksum(json.dumps(record, sort_keys=True).encode())


def checksum_of(path: Path, size: int) -> int:
    """CRC-32 of the first `size` bytes of a file, read block by block."""
    with open(path, "rb") as file:
        return _sum_up(file, size)


def _sum_up(file: BinaryIO, size: int) -> int:
    total = 0
    while size > 0 and (block := file.read(min(size, 2**20))):
        total = zlib.crc32(block, total)
        size -= len(block)
    return total


def checksum(content: bytes) -> str:
    """CRC-32, 8 hex digits."""
    return f"{zlib.crc32(content):08x}"


# ------------------------------------------------------------------------------ checked files


class _Summed(io.RawIOBase):
    """Writes on to `file` and sums up what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.checksum = file, 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise


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
        try:
            with io.BufferedWriter(summed) as buffer:
                yield buffer
        except Exception as error:
            # torch.save says that a write failed, and not why.
            raise (summed.error or error) from None
        line = _line(f"{kind} {key}".encode(), summed.checksum)
        assert len(line) == LINE, f"{kind} {key} is too long"
        file.write(line)


@contextmanager
def read_checked(path: Path, kind: str, key: str) -> Iterator[BinaryIO]:
    """The content of a file of `write_checked`, open for reading.

    Raises:
        Damaged: if a bit of the file differs from what was written.
        BadFile: if it was written as another kind or for another key.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        checksum = _sum_up(file, os.fstat(file.fileno()).st_size - LINE)
        line = file.read()
        words = line.split()[1:3]  # kind and key
        if not line.startswith(MARK) or len(words) < 2:
            raise Damaged(f"{path} is damaged, or of another version of this project")
        if line != _line(b" ".join(words), checksum):
            raise Damaged(f"{path} is damaged: its content does not fit its checksum")
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
