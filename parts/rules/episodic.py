"""Every batch is adapted to from the start: `episodic` of the official Tent and CoTTA (`conf.py`).

MEMO and TPT are defined so.
"""

from __future__ import annotations

from torch import Tensor

from driftline.core.errors import UserError
from driftline.core.strategy import TTAStrategy
from driftline.parts.rules.rails import Rails
from driftline.parts.rules.reset import Reset
from driftline.parts.rules.window import Window


class Episodic(Reset):
    """Resets before each batch; generators run on.

    Args:
        inner: the method, or the rule, inside.

    Raises:
        UserError: around a window or rails, which it would empty, or beside another rule that
            resets.
    """

    before_each_batch = True

    def __init__(self, *, inner: TTAStrategy) -> None:
        super().__init__(inner)
        if any(isinstance(rule, Window) for rule in self.rules()):
            raise UserError(
                "around=[window,episodic] empties the window before every image; "
                "around=[episodic,window] begins every update at the start"
            )
        if any(isinstance(rule, Rails) for rule in self.rules()):
            raise UserError(
                "around=[rails,episodic] forgets what it judges by before every batch; "
                "around=[episodic,rails] does not"
            )

    def adapt(self, x: Tensor) -> Tensor:
        self.reset()
        return self.inner.adapt(x)
