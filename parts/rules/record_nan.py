"""Scores that are not finite are counted as wrong and the stream goes on; metric `nan`.

Official code has no check at all: this is what it does.
"""

from __future__ import annotations

from driftline.core.errors import UserError
from driftline.core.strategy import TTAStrategy, Wrapper
from driftline.parts.rules.rollback import Rollback


class RecordNan(Wrapper):
    """Tells the runner to record scores that are not finite instead of stopping.

    A method that itself raises `Diverged` stops the run all the same.

    Args:
        inner: the method, or the rule, inside.

    Raises:
        UserError: together with `rollback`, which leaves nothing to record.
    """

    def __init__(self, *, inner: TTAStrategy) -> None:
        super().__init__(inner, records_nan=True)
        if any(isinstance(rule, Rollback) for rule in self.rules()):
            raise UserError("around=rollback leaves nothing for record_nan: leave one out")
