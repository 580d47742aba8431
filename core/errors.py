"""Errors that a user can fix: one line that names the setting and the remedy, no traceback."""

from __future__ import annotations

import difflib
import errno
import os
import re
import resource
from collections.abc import Iterable, Mapping


class UserError(Exception):
    """Wrong input or configuration; `run.py` prints the message alone and exits with status 2."""


class Diverged(UserError):
    """A method's loss or scores are no longer finite; `around=rollback` goes on after a reset."""


def suggest(word: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest allowed name in any case, or an empty string.

    A word that is itself allowed was meant: then something else is wrong with it.
    """
    allowed = list(allowed)
    if word in allowed:
        return ""
    names = {name.lower(): name for name in allowed}
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.6)
    return f"; did you mean {names[near[0]]!r}?" if near else ""


# What a machine can run out of -> what to do about it.
_ROOM = "free some (df -h, df -i; also of /dev/shm and the temporary folder)"
_FILES = "allow more (ulimit -n 4096), or take fewer loader processes with runtime.workers"
_MEMORY = (
    "give it more (ulimit -v, the cluster's limit), or take smaller batches, fewer loader "
    "processes (runtime.workers) or a lower runtime.image_store_mb"
)
_WRITABLE = "make the folder writable again, or choose another one with root=/path/to/results"
_SHORTAGES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: "allow more processes (ulimit -u), or take fewer with runtime.workers",
    errno.ESTALE: "the server of this folder has lost it; mount it again",
}
_REFUSALS = {  # an answer of its own is better, where there is one
    errno.EROFS: _WRITABLE,
    errno.EACCES: _WRITABLE,
    errno.EPERM: _WRITABLE,
    errno.EIO: "the disk or its server does not answer as it should",
}
_OTHER_WORDS = (  # of libraries, which pass on neither type nor number
    (r"StorageFull", errno.ENOSPC),
    (r"can't allocate memory|out of memory|bad_alloc|unable to mmap|failed to map", errno.ENOMEM),
    (r"DataLoader worker .*(killed by signal|exited unexpectedly)", errno.ENOMEM),
    (r"can't start new thread", errno.EAGAIN),
)


def shortage(error: BaseException) -> str | None:
    """One line on what the machine lacked, if that is why something failed.

    Looks through the causes: a library may say it in words of its own, and a loader process hands
    over text alone.
    """
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
    refusals = {} if isinstance(error, UserError) else _REFUSALS
    for one in chain:
        number = _number(one, _SHORTAGES | refusals)
        if number is not None:
            where = one.filename if isinstance(one, OSError) and one.filename else None
            place = f" ({str(where).removesuffix('.tmp')})" if where else ""
            what = "out of memory" if number == errno.ENOMEM else os.strerror(number).lower()
            return (
                f"{what}{place}: {(_SHORTAGES | _REFUSALS)[number]}. The same command goes on "
                "from the last saved state"
            )
    return None


def scarce(error: OSError) -> bool:
    """Whether it is this machine that fails now, and not the file asked for."""
    return error.errno in _SHORTAGES


def _number(error: BaseException, advice: Mapping[int, str]) -> int | None:
    """The number of the system's error that this one is, or speaks of."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if isinstance(error, SystemError) and limited:  # a MemoryError that found no memory for itself
        return errno.ENOMEM
    if limited and re.match(r"could not (create|execute) a", str(error)):  # oneDNN, of any failure
        return errno.ENOMEM
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno if error.errno in advice else None
    if isinstance(error, UserError):
        return None  # its words are ours
    text = str(error)
    for number in advice:
        if os.strerror(number) in text:
            return number
    return next((n for words, n in _OTHER_WORDS if re.search(words, text)), None)
