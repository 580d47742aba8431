"""The method is put back to its start when its predictions become too certain.

The model recovery of "Towards Stable Test-Time Adaptation in Dynamic Wild World" (SAR, Niu et al.,
ICLR 2023, arXiv 2302.12400), which ReCAP takes over: a moving average of the entropy that falls
below a constant is the sign of a model that gives one class to everything. SAR averages the loss
of its second pass over confident images, a rule around any method sees the scores that the method
returns, so here it is the mean entropy of all images of a batch. The released code writes the old
average back after a reset and so resets again at the following batches (issue 4 of mr-eggplant/SAR
calls it a mistake); here the average begins anew.
"""

from __future__ import annotations

import torch
from torch import Tensor

from driftline.core.ranges import Positive, Unit
from driftline.core.strategy import TTAStrategy
from driftline.parts.rules.reset import Reset


class ResetOnCollapse(Reset):
    """Resets after a batch with which the moving average of the entropy falls below a constant.

    Args:
        inner: the method, or the rule, inside.
        below: the constant, in nats; the entropy of C classes is between 0 and log C.
        ema: weight of the old average. A batch with scores that are not finite leaves it alone.
    """

    counters = ("resets",)
    average: Tensor | None

    def __init__(self, *, inner: TTAStrategy, below: Positive, ema: Unit) -> None:
        super().__init__(inner)
        self.below, self.ema = below, ema
        self.register_buffer("average", None)  # of the entropy in nats, 0-dim
        self.resets = 0  # in the whole stream

    def get_extra_state(self) -> int:
        return self.resets

    def set_extra_state(self, state: int) -> None:
        self.resets = state

    def report(self) -> dict[str, float]:
        """How often the method was put back because it had collapsed."""
        return super().report() | {"resets_on_collapse": float(self.resets)}

    def adapt(self, x: Tensor) -> Tensor:
        """The scores [B, C] of the method, from before the reset if there is one."""
        scores = self.inner.adapt(x)
        entropy = mean_entropy(scores, self.outputs)
        if entropy.isfinite():
            old = entropy if self.average is None else self.average
            self.average = self.ema * old + (1 - self.ema) * entropy
            if self.average < self.below:
                self.reset()
                self.resets += 1
        return scores


@torch.no_grad()
def mean_entropy(scores: Tensor, outputs: str) -> Tensor:
    """Mean over images of the entropy in nats, 0-dim, of `scores` [B, C].

    Args:
        outputs: what the scores are, `logits` or `probabilities`.
    """
    if outputs == "probabilities":
        return torch.special.entr(scores).sum(1).mean()
    log_p = scores.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()
