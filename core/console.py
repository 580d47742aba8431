"""Everything a run prints; each line begins with the scenario's label."""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from tqdm import tqdm

BAR_EVERY = 0.5  # seconds between two looks of a bar
LINE_EVERY = 60.0  # seconds between two lines where there is none: a file, a cluster's log
RECENT = 20  # looks that the rate is taken over
BAR = "{desc} {percentage:3.0f}%|{bar:8}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Console:
    """Prints to standard output with a prefix, and shows how far a run is.

    In a terminal or a notebook that is a bar on standard error; elsewhere, as in a log file, a
    plain line now and then.

    Args:
        quiet: a run inside another one; it shows its progress and no lines.
        mute: nothing at all is shown.
        clock: seconds.
    """

    bars = True  # False where several processes share a terminal

    def __init__(
        self,
        label: str,
        quiet: bool = False,
        mute: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.label, self.quiet, self.mute, self.clock = label, quiet, mute, clock
        self._bar: tqdm | None = None
        self._what = ""
        self._next = math.inf  # when to look again

    def say(self, text: str, *, always: bool = False) -> None:
        """Print one message, every line with the label; `always`: on a quiet console too."""
        if self.mute or (self.quiet and not always):
            return
        for line in text.splitlines():
            tqdm.write(f"{self.label} | {line}", file=sys.stdout)
        sys.stdout.flush()

    def start(self, total: int, done: int, what: str, state: Callable[[], str]) -> None:
        """Begin to show progress.

        Args:
            total: batches of the run.
            done: those that an earlier process has done.
            what: the name of the method.
            state: where the run stands in a few words, such as "error 34.2 %". It is asked a few
                times a second at most, as it may wait for a GPU.
        """
        if self.mute:
            return
        self._what, self._state = what, state
        self._total, self._start, self._done, self._images = total, done, done, 0
        self._begun = self.clock()
        self._looks = deque([(self._begun, 0)], maxlen=RECENT)
        if self.bars and (sys.stderr.isatty() or in_notebook()):
            kind = _notebook_bar() if in_notebook() else tqdm
            self._bar = kind(
                total=total,
                initial=done,
                desc=f"{self.label} | {what}",
                bar_format=BAR,
                mininterval=0,
                dynamic_ncols=True,
                leave=False,
                file=sys.stderr,
            )
        self._next = self._begun + self._pause

    @property
    def _pause(self) -> float:
        return LINE_EVERY if self._bar is None else BAR_EVERY

    def advance(self, images: int = 0) -> None:
        """One batch more, with so many images; cheap but a few times a second."""
        if self._next == math.inf:
            return
        self._done += 1
        self._images += images
        now = self.clock()
        if now < self._next:
            return
        self._next = now + self._pause
        since, before = self._looks[0]
        self._looks.append((now, self._images))
        rate = f"{(self._images - before) / max(now - since, 1e-9):,.3g} images/s"
        words = [rate, *([state] if (state := self._state()) else [])]
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(words), refresh=False)
            self._bar.update(self._done - self._bar.n)
            return
        each = (now - self._begun) / (self._done - self._start)
        words.append(f"about {duration((self._total - self._done) * each)} left")
        line = f"{self._what} {self._done:,}/{self._total:,} batches, {', '.join(words)}"
        print(f"{self.label} | {line}", flush=True)

    def stop(self) -> None:
        self._next = math.inf
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def _notebook_bar() -> type[tqdm]:
    """A widget where ipywidgets are installed, else the bar of a terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are none
        from tqdm.auto import tqdm as bar
    return bar


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
