"""The method is put back to its start every n batches.

Paper: "RDumb: A simple approach that questions our progress in continual test-time adaptation"
(Press et al., NeurIPS 2023, arXiv 2306.05401), whose method is this rule around ETA with n = 1000
(`strategy=eta around=reset_every`). Batches count whether the method learned from them or not.
"""

from __future__ import annotations

from torch import Tensor

from driftline.core.ranges import Count
from driftline.core.strategy import TTAStrategy
from driftline.parts.rules.reset import Reset


class ResetEvery(Reset):
    """Resets before batch n + 1, 2n + 1, ...; generators run on.

    Args:
        inner: the method, or the rule, inside.
        every: n. After a reset from outside, batches count anew.
    """

    def __init__(self, *, inner: TTAStrategy, every: Count) -> None:
        super().__init__(inner)
        self.every = every
        self.batches = 0  # since the last reset

    def get_extra_state(self) -> int:
        return self.batches

    def set_extra_state(self, state: int) -> None:
        self.batches = state

    def adapt(self, x: Tensor) -> Tensor:
        if self.batches == self.every:
            self.reset()
        self.batches += 1
        return self.inner.adapt(x)
