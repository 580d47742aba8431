"""A run's folder: records and environment. Files are the truth; sinks mirror them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
import traceback
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from driftline.core import distributed
from driftline.core.files import Damaged, append, checksum_of, write_record, write_text
from driftline.core.provenance import version
from driftline.core.sinks import TABLES

PENDING = 1000  # rows that wait to be written, at most


class Sink(Protocol):
    """Somewhere else that rows are mirrored to; it must never raise."""

    def log(self, table: str, row: Mapping[str, Any]) -> None: ...
    def finish(self, summary: Mapping[str, Any] | None) -> None: ...


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and threads: what else could move a number."""
    packages: dict[str, str | None] = {}
    for name in ("torch", "torchvision", "timm", "numpy", "hydra-core", "omegaconf", "pillow"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "driftline": version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "device": device_name(device),
        "driver": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
    }


def device_name(device: torch.device) -> str:
    """The model of a GPU, or `cpu (MODEL)`."""
    gpu = device.type == "cuda"
    return torch.cuda.get_device_name(device) if gpu else f"cpu ({cpu_name()})"


def cpu_name() -> str:
    """The processor's model name, or its architecture."""
    return cpu_fact("model name") or platform.machine()


def cpu_fact(*names: str) -> str:
    """What the system says of its first processor under one of `names`; empty where nothing."""
    with suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith(names):
                return line.split(":", 1)[1].strip()
    return ""


class RunLogger:
    """Append-only JSON lines, one file a table, written in blocks; read with pandas at once.

    Args:
        folder: the run folder; must exist.
        label: written into every row, so that a row never loses its origin.
    """

    def __init__(self, folder: Path, label: str, sinks: Sequence[Sink] = ()) -> None:
        self.folder, self.label, self.sinks = folder, label, sinks
        self.sums: dict[str, int] = {}  # CRC-32 of what each table holds
        self._pending: list[tuple[str, dict[str, Any]]] = []

    def path(self, table: str) -> Path:
        return self.folder / f"{table}.jsonl"

    def log(self, table: str, **values: float | int | str | Tensor | None) -> None:
        """Add a row; 0-dim tensors stay on their device until `flush`."""
        self._pending.append((table, values))
        if len(self._pending) >= PENDING:  # where checkpoints are rare
            self.flush()

    def flush(self) -> None:
        """Write the pending rows; one device synchronisation for all tensors in them."""
        where = [
            (row, key)
            for _, row in self._pending
            for key, value in row.items()
            if isinstance(value, Tensor)
        ]
        if where:
            packed = torch.stack([row[key].detach().double() for row, key in where]).tolist()
            for (row, key), value in zip(where, packed, strict=True):
                exact = not row[key].is_floating_point()
                row[key] = int(value) if exact else value
        blocks: dict[str, list[str]] = {}
        for table, row in self._pending:
            row = {"scenario": self.label, **row}
            blocks.setdefault(table, []).append(json.dumps(row))
            for sink in self.sinks:
                sink.log(table, row)
        self._pending.clear()
        for table, lines in blocks.items():
            block = ("\n".join(lines) + "\n").encode()
            append(self.path(table), block)
            self.sums[table] = zlib.crc32(block, self.sums.get(table, 0))

    def offsets(self) -> dict[str, int]:
        """Bytes written so far, per table."""
        return {t: self.path(t).stat().st_size for t in TABLES if self.path(t).exists()}

    def rewind(self, offsets: Mapping[str, int], sums: Mapping[str, int] | None = None) -> None:
        """Cut the tables back to `offsets`, dropping rows written after a checkpoint.

        Args:
            sums: CRC-32 of each table up to there; None does not compare them.

        Raises:
            Damaged: if a table is shorter, or is not what was written; then none is changed.
        """
        self._pending.clear()
        actual = {}
        for table, size in offsets.items():
            there = self.path(table).stat().st_size if self.path(table).exists() else 0
            if there < size:
                raise Damaged(
                    f"{self.path(table)} is damaged: {there:,} of {size:,} bytes are there"
                )
            actual[table] = checksum_of(self.path(table), size)
            if sums is not None and actual[table] != sums[table]:
                raise Damaged(f"{self.path(table)} is damaged: other rows than were written")
        self.sums = actual
        for table in TABLES:
            if self.path(table).exists():
                os.truncate(self.path(table), offsets.get(table, 0))
            for row in self.rows(table) if self.sinks else ():
                for sink in self.sinks:  # a mirror has them all, whatever it had before
                    sink.log(table, row)

    def rows(self, table: str) -> Iterator[dict[str, Any]]:
        """The rows of a table written so far, one after the other."""
        if self.path(table).exists():
            with open(self.path(table)) as file:
                yield from map(json.loads, file)

    def checksums(self) -> dict[str, str]:
        """CRC-32 of what each table holds, 8 hex digits."""
        self.flush()
        return {table: f"{checksum:08x}" for table, checksum in self.sums.items()}

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, whose existence means that the run is done."""
        self.flush()
        write_record(self.folder / "summary.json", summary)
        (self.folder / "failure.txt").unlink(missing_ok=True)
        for sink in self.sinks:
            sink.finish(summary)

    def fail(self, error: BaseException) -> None:
        """Keep what was recorded and write the traceback beside it."""
        with suppress(OSError):  # the disk may be full; the error itself is told either way
            self.flush()
            text = "".join(traceback.format_exception(error))
            write_text(self.folder / "failure.txt", text)
        self._end()

    def close(self) -> None:
        """Flush without a summary: the run is not done."""
        self.flush()
        self._end()

    def _end(self) -> None:
        for sink in self.sinks:
            sink.finish(None)


class NoRecords(RunLogger):
    """Of a process that leaves the run folder to another one."""

    def log(self, table: str, **values: float | int | str | Tensor | None) -> None:
        pass

    def rewind(self, offsets: Mapping[str, int], sums: Mapping[str, int] | None = None) -> None:
        pass

    def rows(self, table: str) -> Iterator[dict[str, Any]]:
        return iter(())

    def finish(self, summary: Mapping[str, Any]) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        pass
