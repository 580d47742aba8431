"""What rules that put the method back to its start have in common."""

from __future__ import annotations

from typing import ClassVar

from driftline.core.errors import UserError
from driftline.core.strategy import TTAStrategy, Wrapper


class Reset(Wrapper):
    """A rule that resets at some time.

    Args:
        inner: the method, or the rule, inside.

    Raises:
        UserError: beside a rule that resets before every batch, so that the other does nothing.
    """

    before_each_batch: ClassVar[bool] = False

    def __init__(self, inner: TTAStrategy) -> None:
        super().__init__(inner)
        for rule in self.rules():
            if isinstance(rule, Reset) and (self.before_each_batch or rule.before_each_batch):
                raise UserError(
                    "around=episodic goes back to the start before each batch, so that another "
                    "rule that resets does nothing: leave one out"
                )
