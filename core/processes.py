"""Processes that share folders: which one has a folder, and which one ends with another.

Needs no torch.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import multiprocessing
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from driftline.core.errors import UserError


class Lock:
    """Keeps a second process out of a folder; free as soon as the process that holds it is dead.

    The kernel holds it (`flock`). On a file system that has no such locks, the file `.held` in the
    folder says who has it. Nobody looks after that file: one of a process of this machine that is
    gone does not count, one of another machine has to be deleted by hand.

    Raises:
        UserError: if the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._held = folder / ".lock", folder / ".held"
        self._file: int | None = None
        self._exclusive = False  # this process wrote `.held`
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise UserError(
                f"cannot write to the results folder {folder}: {error.strerror}. "
                "Choose another one with root=/path/to/results"
            ) from error
        _open.add(self)

    def acquire(self) -> bool:
        """True if this process now holds the folder.

        Raises:
            UserError: without locks of the file system, if another machine may hold it.
        """
        assert self._file is not None, "released already"
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            return self._acquire_without(error)
        before = _name_in(self.path).rpartition(" pid ")[0]
        if before and before != socket.gethostname():
            warnings.warn(
                f"a process of {before} held {self.path.parent} and did not end by itself. Where "
                "machines do not see each other's locks it may still be at work",
                stacklevel=2,
            )
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, _own_name().encode(), 0)
        return True

    def holder(self) -> str:
        """Host and process id that the process wrote which holds the folder."""
        return _name_in(self._held) or _name_in(self.path) or "another process"

    def release(self) -> None:
        """Give the folder back; nothing if that is done already."""
        if self._file is None:
            return
        if self._exclusive:
            self._held.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk is no reason to keep the lock
            os.ftruncate(self._file, 0)
        self.leave()

    def leave(self) -> None:
        """Forget the lock in a process that does not hold it, such as a forked child."""
        if self._file is not None:
            os.close(self._file)
        self._file, self._exclusive = None, False
        _open.discard(self)

    def _acquire_without(self, error: OSError) -> bool:
        """By an exclusive file, where the file system has no locks."""
        warnings.warn(
            f"{self.path.parent} is on a file system without locks ({error.strerror}); a file "
            "keeps other processes out, which another machine cannot check",
            stacklevel=3,
        )
        for _ in range(3):  # others may take away a dead process's file at the same time
            try:
                file = os.open(self._held, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                if self._in_use():
                    return False
                continue
            os.write(file, _own_name().encode())
            os.close(file)
            self._exclusive = True
            return True
        return False

    def _in_use(self) -> bool:
        """Whether the process that `.held` names is alive; if not, the file is taken away.

        Raises:
            UserError: if it names another machine.
        """
        try:
            text = self._held.read_text(errors="replace")
        except FileNotFoundError:
            return False
        host, _, number = text.rpartition(" pid ")
        if host != socket.gethostname():
            raise UserError(
                f"{self.path.parent} is held by {text.strip() or 'an unknown process'}, which "
                f"cannot be asked from here. If it is gone, delete {self._held}"
            )
        if _alive(number):
            return True
        aside = self._held.with_name(f".held.{os.getpid()}")
        with suppress(FileNotFoundError):
            os.rename(self._held, aside)
            if aside.read_text(errors="replace") != text:  # a live process's, written in between
                os.rename(aside, self._held)
                return True
            aside.unlink()
        return False


_open: set[Lock] = set()


def _leave_all() -> None:
    """A forked child must not keep the locks of a parent that dies before it."""
    for lock in list(_open):
        lock.leave()


os.register_at_fork(after_in_child=_leave_all)


def _name_in(path: Path) -> str:
    """Host and process id in a file of a lock; empty without."""
    try:
        return " ".join(path.read_text(errors="replace").split()[:3])
    except OSError:
        return ""


def _own_name() -> str:
    return f"{socket.gethostname()} pid {os.getpid()} {_started(os.getpid())}".rstrip()


def _alive(number: str) -> bool:
    """Whether a process runs that has this id and, where it is known, this time of its start."""
    pid, _, started = number.partition(" ")
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        pass  # somebody else's
    except (ValueError, OverflowError, OSError):
        return False
    return not started or _started(int(pid)) in ("", started)


def _started(pid: int) -> str:
    """When a process was started, in ticks since this machine was; empty if unknown."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:  # not Linux
        return ""
    return status.rpartition(")")[2].split()[19]


def obey_parent(parent: int) -> None:
    """End at a SIGTERM of the parent, and only then; for a process started in `signals_wait`."""

    def wait() -> None:
        while signal.sigwaitinfo((signal.SIGTERM,)).si_pid != parent:
            pass
        os._exit(0)

    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        threading.Thread(target=wait, daemon=True).start()


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask the kernel for a signal when the parent dies, so that no process is left without one.

    The parent is the thread that started this process: it has to live as long as the process. In a
    process of `multiprocessing`, one that is dead already is noticed.
    """
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()  # not `os.getppid()`: that may be a fork server
    if parent is not None and not parent.is_alive():
        os.kill(os.getpid(), number)


def return_freed_memory() -> None:
    """Give blocks that are free back to the kernel.

    A process forked with them keeps their pages: once they are written to, there are two of each.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Around imports of all that a run needs, once: nothing in them is searched for garbage.

    The imports take a sixth less, and later searches, in forked processes too, pass over them.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def signals_wait() -> Iterator[None]:
    """Requests to stop arrive after the block; processes started in it begin without them.

    Until a process has said what it does with a signal, one sent to the whole group ends it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
