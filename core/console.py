"""Everything a run prints; each line begins with the scenario's label."""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm


class Console:
    """Prints to standard output with a prefix, and owns the progress bar.

    Args:
        quiet: a run inside another one; it shows its progress bar and no lines.
        mute: nothing at all is shown.
    """

    def __init__(self, label: str, quiet: bool = False, mute: bool = False) -> None:
        self.label, self.quiet, self.mute = label, quiet, mute
        self._bar: tqdm | None = None

    def say(self, text: str, *, always: bool = False) -> None:
        """Print one message, every line with the label; `always`: on a quiet console too."""
        if self.mute or (self.quiet and not always):
            return
        for line in text.splitlines():
            tqdm.write(f"{self.label} | {line}", file=sys.stdout)
        sys.stdout.flush()

    def start(self, total: int, done: int, what: str) -> None:
        """Open a progress bar with rate and remaining time (only in a terminal)."""
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=f"{self.label} | {what}",
            unit="batch",
            disable=self.mute or None,
            dynamic_ncols=True,
            leave=False,
        )

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def program(main: Callable[[], int | None]) -> int:
    """`main()` of a command whose reader may leave early, as `| head` does; its exit status.

    The command then ends without a word, with the status of one that SIGPIPE has ended. A run goes
    on from its last saved state with the same command.
    """
    try:
        try:
            return main() or 0
        finally:  # argparse leaves by SystemExit
            sys.stdout.flush()
    except BrokenPipeError:
        if not reader_left():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for the flush at the end of the process
        return 128 + signal.SIGPIPE


def reader_left() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain text table: first column left, the others right."""
    cells = [list(head), *(list(r) for r in rows)]
    width = [max(len(r[i]) for r in cells) for i in range(len(head))]
    lines = [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(r, width, strict=True))
        )
        for r in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
