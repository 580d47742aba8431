"""The method is put back to its start where a segment of the stream begins.

The protocol of the authors of Tent (ICLR 2021), EATA and SAR: each corruption on its own, from the
source model. It uses the labels of the stream: in deployment nobody says where a domain ends.
"""

from __future__ import annotations

from driftline.core.strategy import TTAStrategy
from driftline.parts.rules.reset import Reset


class ResetEachDomain(Reset):
    """Resets at the beginning of every segment: a corruption, a pair of CCC, a round of a mixture.

    Args:
        inner: the method, or the rule, inside.
    """

    def __init__(self, *, inner: TTAStrategy) -> None:
        super().__init__(inner)

    def begin_segment(self) -> None:
        self.reset()
        super().begin_segment()
