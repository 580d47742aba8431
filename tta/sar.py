"""SAR: sharpness-aware entropy of images that are certain, and recovery from collapse.

Paper: "Towards Stable Test-Time Adaptation in Dynamic Wild World" (ICLR 2023, arXiv 2302.12400).
Code: github.com/mr-eggplant/SAR @ 20f6e24; variant `mode=eval` from
github.com/mariodoebler/test-time-adaptation @ 8b2ed63, which is also what the recorded runs are of.

What the codes do, and may surprise: the optimiser's momentum survives a recovery, as it lies in an
inner optimiser that the saved state does not reach (`keep_momentum_on_recovery`); the authors'
code writes the old average back after a recovery, so that further ones follow at the next batches
(issue 4 of the repository calls it a mistake; `keep_average_on_recovery`); where no image is
certain the gradient is zero and the momentum still moves the weights; which layers learn goes by
names, which other libraries do not share (`top`).

Deviation that changes no number: the constant of the recovery is an option, where the authors'
code takes 0.2 whatever is passed to it.
Deviations that do: `reset` puts momentum, average and weights back to the start, whatever a
recovery keeps; BatchNorm1d layers learn too; an empty selection of layers is an error.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, NonNegative
from driftline.core.strategy import TTAStrategy
from driftline.parts.modes import evaluating
from driftline.parts.norms import Layers, Top, train_norms
from driftline.parts.objectives import entropy
from driftline.parts.optim import StreamOptim

OLD = 0.9  # weight of the old average of the loss


class SAR(TTAStrategy):
    """Two passes a batch: up to where the mean entropy of the certain images is highest, and back.

    Args:
        backbone: a network with normalisation layers.
        layers: which of them learn, see `parts/norms.py`; `norm` is official.
        top: whether the uppermost ones learn, see `parts.norms.below_top`; `names` is official.
        mode: of the whole network while adapting; decides on dropout and stochastic depth only.
        optim: of the one group `trained`; `sam` is the radius of the first pass, and null leaves
            the second pass out.
        steps: updates per batch, at least 1.
        margin: images whose entropy is at least `margin` ln(classes) are left out of both passes;
            the second one leaves out further ones that are now above.
        recover_below: weights go back to the start when the moving average of the loss, in nats,
            falls below this; 0: never. For few classes, low entropies are normal.
        keep_momentum_on_recovery: whether the optimiser's state survives that (both codes).
        keep_average_on_recovery: whether the average does (the authors' code); else it begins anew.

    Where no image is certain the gradient is zero and the average stays, but what momentum there
    is moves the weights. One image and a short last batch adapt like any other batch; only a map
    of a single pixel for a single image raises a UserError.
    """

    needs = frozenset({"head"})
    batch_dependent = True
    counters = ("recoveries",)
    option: ClassVar[str] = "sar"  # of conf/strategy

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        top: Top,
        mode: Literal["train", "eval"],
        optim: StreamOptim,
        steps: Count,
        margin: NonNegative,
        recover_below: NonNegative,
        keep_momentum_on_recovery: bool,
        keep_average_on_recovery: bool,
    ) -> None:
        super().__init__(backbone)
        trained = train_norms(backbone, layers, strategy=self.option, top=top)
        self.backbone.train(mode == "train")
        self.optim, self.optimizer = optim, optim.optimizer({"trained": trained.values()})
        self.steps, self.margin = steps, margin * math.log(backbone.num_classes)
        self.recover_below = recover_below
        self.keep_momentum = keep_momentum_on_recovery
        self.keep_average = keep_average_on_recovery
        self.average: float | None = None  # of the loss
        self.recoveries = 0  # in the whole stream

    def get_extra_state(self) -> dict[str, Any]:
        return {"average": self.average, "recoveries": self.recoveries}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.average, self.recoveries = state["average"], state["recoveries"]

    def report(self) -> dict[str, float]:
        """How often the weights went back to the start because the method had collapsed."""
        return {"recoveries": float(self.recoveries)}

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the current weights; dropout is off whatever the mode."""
        with evaluating(self):
            return self.backbone(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] of the first pass of the (last) update on this batch."""
        for _ in range(self.steps - 1):
            self._update(x)
        return self._update(x)

    @torch.enable_grad()
    def _update(self, x: Tensor) -> Tensor:
        logits = self.backbone(x)
        certain = self.certain(logits)
        losses = [self.loss(logits[certain])]
        losses[0].backward()

        def again() -> None:
            second = self.backbone(x)[certain]
            losses.append(self.loss(second[self.certain(second)]))
            losses[-1].backward()

        self.optim.update(self.optimizer, again)
        self.follow(losses[-1].item())
        return logits.detach()

    def entropy(self, logits: Tensor) -> Tensor:
        """What is minimised and compared with the margin, [B] for `logits` [B, C], in nats."""
        return entropy(logits)

    @torch.no_grad()
    def certain(self, logits: Tensor) -> Tensor:
        """Rows [n] of `logits` [B, C] that are below the margin."""
        return (self.entropy(logits) < self.margin).nonzero()[:, 0]

    def loss(self, logits: Tensor) -> Tensor:
        """Mean entropy of the certain `logits` [n, C]; for none NaN, with a gradient of zero."""
        return self.entropy(logits).mean()

    def follow(self, loss: float) -> None:
        """Take the loss of the last pass into the average, and recover where that is too low."""
        if not math.isnan(loss):
            self.average = loss if self.average is None else OLD * self.average + (1 - OLD) * loss
        if self.average is not None and self.average < self.recover_below:
            self.recover()

    def recover(self) -> None:
        """Weights as at the start."""
        assert self.optimizer is not None
        momentum, average = deepcopy(self.optimizer.state_dict()), self.average
        self.reset()
        if self.keep_momentum:
            self.optimizer.load_state_dict(momentum)
        if self.keep_average:
            self.average = average
        self.recoveries += 1
