"""The folder of a run: which one it is, whether the run is done there, and the lock on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf

from driftline.core.console import Console
from driftline.core.errors import UserError
from driftline.core.files import Damaged, checksum, read_record, replacing, write_record, write_text
from driftline.core.processes import Lock
from driftline.core.provenance import Code, changed_files
from driftline.core.stream import ShiftStream, TaskStream

RECORD = "environment.json"


class Place(NamedTuple):
    """Where a run goes."""

    folder: Path
    finished: dict[str, Any] | None  # its summary, where the run is done and shall be kept
    notes: list[str]  # why it is not the folder that the reader expects


def choose_folder(place: Path, name: str, on_exists: str, code: Code) -> Place:
    """The first folder of this run that holds it, finished or not, as made by this code.

    Folders of the same settings are numbered: `name`, `name-2`, ... A folder whose method had other
    code belongs to another run, whether that is finished or not.
    """
    notes = []
    for number in count(1):
        folder = place / (name if number == 1 else f"{name}-{number}")
        if any((folder / file).exists() for file in ("summary.json", RECORD, "last.pt")):
            recorded = _code_in(folder)
            if recorded is None or (changed := changed_files("method", recorded, code)):
                what = (
                    "is not recorded" if recorded is None else f"was another: {', '.join(changed)}"
                )
                notes.append(f"not the run of {folder}, the method's code of which {what}")
                continue
        try:
            finished = _summary(folder)
        except Damaged as error:
            return Place(folder, None, [*notes, f"{error}; the run is made again"])
        if finished is None:
            return Place(folder, None, notes + framework_notes(folder, code))
        if on_exists == "error":
            raise UserError(f"{folder} is finished already; use on_exists=skip or rerun")
        if on_exists == "skip":
            return Place(folder, finished, [])
    raise AssertionError


def hold(choose: Callable[[], Place], stack: ExitStack, console: Console, *, wait: bool) -> Place:
    """Lock the folder that `choose` names, then look again: another process may have finished it.

    Args:
        stack: releases the lock where it ends.
        wait: wait for a process that is at the same run; otherwise that is an error.
    """
    waiting = False
    while True:
        place = choose()
        if place.finished is not None:
            return place
        lock = Lock(place.folder)
        if lock.acquire():
            if (again := choose()).folder == place.folder and again.finished is None:
                stack.callback(lock.release)
                return place
            lock.release()
            continue
        if not wait:
            raise UserError(
                f"{place.folder} is being written by {lock.holder()}. Wait for it to end "
                "(runtime.wait=true does), or change a setting (for example the seed) to get "
                "another run folder"
            )
        if not waiting:
            console.say(f"waiting for {lock.holder()}, which is at the same run: {place.folder}")
            waiting = True
        lock.release()
        time.sleep(1)


def _summary(folder: Path) -> dict[str, Any] | None:
    """The result of a run; None where it is not finished.

    Raises:
        Damaged: if it cannot be used.
    """
    path = folder / "summary.json"
    if not path.exists():
        return None
    return read_record(path, "run", "metrics", "cost")


def _code_in(folder: Path) -> Code | None:
    """The code that a run folder was made by; None where that is lost."""
    try:
        code = read_record(folder / RECORD).get("code")
    except (Damaged, FileNotFoundError):
        return None
    parts = ("method", "framework")
    return (
        code
        if isinstance(code, dict) and all(isinstance(code.get(p), dict) for p in parts)
        else None
    )


def framework_notes(folder: Path, code: Code) -> list[str]:
    """One line if code outside the method has changed since a run that is used again."""
    changed = changed_files("framework", _code_in(folder) or code, code)
    if not changed:
        return []
    files = ", ".join(changed[:3]) + (f" and {n} more" if (n := len(changed) - 3) > 0 else "")
    return [f"note: code outside the method has changed since the run of {folder.name}: {files}"]


def describe(
    cfg: DictConfig,
    folder: Path,
    overrides: list[str],
    known: dict[str, Any],
    patch: str,
    stream: TaskStream | ShiftStream,
) -> None:
    """The files of a run folder that say what is run: settings, environment, order of images."""
    for part in folder.glob("*.tmp"):  # of a process that was killed, and nobody writes any more
        part.unlink()
    with replacing(folder / "config.yaml") as part:
        OmegaConf.save(cfg, part, resolve=True)
    write_text(folder / "overrides.txt", "\n".join(overrides) + "\n")
    content = (folder / "config.yaml").read_bytes()
    write_record(folder / RECORD, {**known, "config_checksum": checksum(content)})
    if patch:
        write_text(folder / "patch.diff", patch)
    if stream.order:
        with replacing(folder / "order.npz") as part, open(part, "wb") as file:
            np.savez_compressed(file, **dict(stream.order))  # type: ignore[arg-type]
