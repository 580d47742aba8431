"""A run's folder: identity, records, environment, lock. Files are the truth; sinks mirror them."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from driftline.core import distributed
from driftline.core.errors import UserError
from driftline.core.files import write_json, write_text

TABLES = ("batches", "experiences", "matrix")


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
    cuda = device.type == "cuda"
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu ({cpu_name()})",
        "driver": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "processes": distributed.size(),
    }


def cpu_name() -> str:
    """The processor's model name, or its architecture."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.machine()


class Lock:
    """Keeps a second process out of a run folder; released by the kernel if the process dies."""

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[str] = open(folder / ".lock", "a+")  # noqa: SIM115
        except OSError as error:
            raise UserError(
                f"cannot write to the results folder {folder}: {error.strerror}. "
                "Choose another one with root=/path/to/results"
            ) from error
        self.path = folder / ".lock"

    def acquire(self) -> bool:
        """True if this process now holds the folder."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        self._file.truncate(0)
        self._file.write(f"{socket.gethostname()} pid {os.getpid()}")
        self._file.flush()
        return True

    def holder(self) -> str:
        """Host and process id written by the process that holds the folder."""
        return self.path.read_text() or "another process"

    def release(self) -> None:
        self._file.close()


class RunLogger:
    """Append-only JSON lines, one file a table, written in blocks; read with pandas at once.

    Args:
        folder: the run folder; must exist.
        label: written into every row, so that a row never loses its origin.
    """

    def __init__(self, folder: Path, label: str, sinks: Sequence[Sink] = ()) -> None:
        self.folder, self.label, self.sinks = folder, label, sinks
        self._pending: list[tuple[str, dict[str, Any]]] = []

    def path(self, table: str) -> Path:
        return self.folder / f"{table}.jsonl"

    def log(self, table: str, **values: float | int | str | Tensor | None) -> None:
        """Add a row; 0-dim tensors stay on their device until `flush`."""
        self._pending.append((table, values))

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
        for table, lines in blocks.items():
            with open(self.path(table), "a") as file:
                file.write("\n".join(lines) + "\n")
        self._pending.clear()

    def offsets(self) -> dict[str, int]:
        """Bytes written so far, per table."""
        return {t: self.path(t).stat().st_size for t in TABLES if self.path(t).exists()}

    def rewind(self, offsets: Mapping[str, int]) -> None:
        """Cut the tables back to `offsets`, dropping rows written after a checkpoint."""
        self._pending.clear()
        for table in TABLES:
            if self.path(table).exists():
                os.truncate(self.path(table), offsets.get(table, 0))

    def rows(self, table: str) -> list[dict[str, Any]]:
        """All rows of a table written so far."""
        if not self.path(table).exists():
            return []
        return [json.loads(line) for line in self.path(table).read_text().splitlines()]

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json, whose existence means that the run is done."""
        self.flush()
        write_json(self.folder / "summary.json", summary)
        (self.folder / "failure.txt").unlink(missing_ok=True)
        for sink in self.sinks:
            sink.finish(summary)

    def fail(self, error: BaseException) -> None:
        """Keep what was recorded and write the traceback beside it."""
        self.flush()
        text = "".join(traceback.format_exception(error))
        write_text(self.folder / "failure.txt", text)
        self.close()

    def close(self) -> None:
        """Flush without a summary: the run is not done."""
        self.flush()
        for sink in self.sinks:
            sink.finish(None)


class NoRecords(RunLogger):
    """Of a process that leaves the run folder to another one."""

    def log(self, table: str, **values: float | int | str | Tensor | None) -> None:
        pass

    def rewind(self, offsets: Mapping[str, int]) -> None:
        pass

    def rows(self, table: str) -> list[dict[str, Any]]:
        return []

    def finish(self, summary: Mapping[str, Any]) -> None:
        pass

    def fail(self, error: BaseException) -> None:
        pass
