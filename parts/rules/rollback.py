"""A method that has diverged is put back to its start, and the stream goes on."""

from __future__ import annotations

from torch import Tensor

from driftline.core.errors import Diverged, UserError
from driftline.core.strategy import TTAStrategy, Wrapper


class Rollback(Wrapper):
    """Resets where scores are not finite or the method says that it has diverged.

    The batch at which it happens is predicted with the method as it was at its start.

    Args:
        inner: the method, or the rule, inside.

    Raises:
        UserError: together with `record_nan`, for which nothing would be left.
    """

    counters = ("rollbacks",)

    def __init__(self, *, inner: TTAStrategy) -> None:
        super().__init__(inner)
        if self.records_nan:
            raise UserError("around=rollback leaves nothing for record_nan: leave one out")
        self.rollbacks = 0  # in the whole stream

    def get_extra_state(self) -> int:
        return self.rollbacks

    def set_extra_state(self, state: int) -> None:
        self.rollbacks = state

    def report(self) -> dict[str, float]:
        """How often the method was put back because it had diverged."""
        return super().report() | {"rollbacks": float(self.rollbacks)}

    def adapt(self, x: Tensor) -> Tensor:
        try:
            scores = self.inner.adapt(x)
            if scores.isfinite().all():
                return scores
        except Diverged:
            pass
        self.reset()
        self.rollbacks += 1
        return self.inner.predict(x)
