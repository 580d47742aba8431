"""Checkpoints that make an interrupted run indistinguishable from an uninterrupted one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Protocol

import torch

from driftline.core import distributed
from driftline.core.errors import UserError
from driftline.core.files import BadFile, Damaged, read_checked, write_checked
from driftline.core.packs import Packs
from driftline.core.record import RunLogger
from driftline.core.seed import rng_state, set_rng_state
from driftline.core.strategy import Strategy

# 2: with the run's key and a checksum; 3: state of inner strategies; 4: with the guard;
# 5: with the answers to probes; 6: with whether anything was drawn; 7: what stays in packs
KIND = "checkpoint-7"
LAST = "last.pt"  # in a run folder, until the run is finished


class Stopped(Exception):
    """A signal asked to stop; the state is saved. Carries the signal number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Snapshots(Protocol):
    def snapshot(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...


class Signals:
    """While active: SIGINT and SIGTERM stop after the batch, SIGUSR1 saves and goes on.

    A second SIGINT interrupts at once, as usual. Somebody at a terminal is told so: what a method
    does at the end of a task may take minutes.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save = True
            return
        self.stop = number
        if os.isatty(2):
            os.write(2, b"\nstopping after this step; Ctrl-C again stops without saving it\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> Signals:
        self._before = {}
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: no signals there
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Checkpointer:
    """Writes and reads `last.pt` in the run folder.

    Args:
        key: of the run, see `core.identity`; a checkpoint of another one is refused.
        every: batches between checkpoints inside an experience; 0 saves at its end only.
        say: prints a line.
    """

    def __init__(
        self,
        log: RunLogger,
        signals: Signals,
        *,
        key: str,
        every: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self.log, self.signals, self.key, self.every, self.say = log, signals, key, every, say
        self.path = log.folder / LAST
        self.packs = Packs(self.path, KIND, key)
        self._since = 0

    def load(self) -> dict[str, Any] | None:
        """The last state, or None for a fresh run; the records are cut back to it.

        A state that is damaged, or has lost some of its rows, is of no use any more: the run begins
        again, and that is said.

        Raises:
            UserError: if the file is of another run or of another version.
        """
        return distributed.from_rank0(self._load)

    def _load(self) -> dict[str, Any] | None:
        if not self.path.exists():
            self.log.rewind({})
            return None
        try:
            with read_checked(self.path, KIND, self.key) as file:
                saved = torch.load(file, weights_only=True, map_location="cpu")
            state = self.packs.read(saved)
            self.log.rewind(state["log"], state["sums"])
        except Damaged as error:
            self.say(f"{error}; this run begins again")
            self.log.rewind({})
            return None
        except BadFile as error:
            raise UserError(
                f"the checkpoint {error}. Delete it to start this run again."
            ) from error
        except OSError as error:
            raise UserError(f"cannot read the checkpoint {self.path}: {error}") from error
        return state

    def apply(
        self, state: Mapping[str, Any], strategy: Strategy, meters: Mapping[str, Snapshots]
    ) -> dict[str, int]:
        """Put a loaded state into place; returns the cursor."""
        strategy.restore(state["strategy"])
        for name, meter in meters.items():
            meter.restore(state["meters"][name])
        set_rng_state(state["rng"])
        return dict(state["cursor"])

    def tick(self, strategy: Strategy, meters: Mapping[str, Snapshots], **cursor: int) -> None:
        """Called after every batch: saves on schedule or when a signal asks for it.

        Raises:
            Stopped: after saving, if a signal asked to stop.
        """
        self._since += 1
        due = bool(self.every) and self._since >= self.every
        save, stop = self._asked()
        if due or save or stop:
            self.save(strategy, meters, **cursor)

    def save(self, strategy: Strategy, meters: Mapping[str, Snapshots], **cursor: int) -> None:
        """Write to a temporary name, then rename.

        Raises:
            Stopped: after saving, if a signal asked to stop.
        """
        if distributed.rank0():
            self._write(strategy, meters, cursor)
        self._since, self.signals.save = 0, False
        if stop := self._asked()[1]:
            raise Stopped(stop)

    def _asked(self) -> list[int]:
        """Whether to save, and the number of the signal to stop (0: none), in any process."""
        return distributed.all_reduce_max(self.signals.save, self.signals.stop or 0)

    def _write(
        self, strategy: Strategy, meters: Mapping[str, Snapshots], cursor: Mapping[str, int]
    ) -> None:
        self.log.flush()
        state = {
            "cursor": dict(cursor),
            "strategy": strategy.snapshot(),
            "meters": {name: meter.snapshot() for name, meter in meters.items()},
            "rng": rng_state(),
            "log": self.log.offsets(),
            "sums": dict(self.log.sums),
        }
        saved = self.packs.write(state)
        with write_checked(self.path, KIND, self.key) as file:
            torch.save(saved, file)
        self.packs.tidy()
