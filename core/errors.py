"""Errors that a user can fix: one line that names the setting and the remedy, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Wrong input or configuration; `run.py` prints the message alone and exits with status 2."""


class Diverged(UserError):
    """A method's loss or scores are no longer finite; `around=rollback` goes on after a reset."""


def suggest(word: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the nearest allowed name in any case, or an empty string."""
    names = {name.lower(): name for name in allowed}
    near = difflib.get_close_matches(word.lower(), names, n=1, cutoff=0.5)
    return f"; did you mean {names[near[0]]!r}?" if near else ""
