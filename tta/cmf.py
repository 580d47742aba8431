"""CMF: ROID whose weights are held near a hidden model that follows them slowly.

Paper: "Continual Momentum Filtering on Parameter Space for Online Test-time Adaptation" (ICLR 2024,
openreview.net/forum?id=BllUWdpIOA).
Code: github.com/mariodoebler/test-time-adaptation @ 8b2ed63 (`classification/methods/cmf.py`),
which follows the authors' code on OpenReview.

What the code does: its two types, `lp` and `op`, are the same, because the predicted hidden model
and the updated one are one object (`anchor`); the gain depends on the number of batches alone, not
on data, and is at least 0.89; with few parameters it is 1 and the hidden model never leaves the
source, which is ROID; `reset` keeps the variance of the filter (`keep_variance`).

Deviations that change no number: the hidden model holds the parameters that learn alone, since no
others differ from the source. Deviations that do: `reset` also sets the variance back; and those of
ROID.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, NonNegative, Positive, Unit
from driftline.parts.norms import Layers
from driftline.parts.optim import StreamOptim
from driftline.parts.teacher import move_average
from driftline.tta.roid import ROID

VALUES = 38_400  # of the normalisation layers of ViT-B/16, for which `noise` is stated
LEAST, WHOLE = 0.89, 0.9999  # gain: not below; from here on 1


class CMF(ROID):
    """Each batch: ROID's step, a Kalman filter over the parameters, their mean with its state.

    Args:
        return_rate: weight of the old hidden model in its mean with the source, before it sees the
            parameters (alpha).
        noise: variance that a batch adds, for a network with 38,400 learning values and in
            proportion to their number (Q).
        anchor: what the parameters are averaged with. `updated`: the hidden model after it has
            seen them (official, whatever its type); `predicted`: before, which the type `op` means.
        keep_variance: `reset` leaves the variance of the filter as it is (official).
        ensemble: weight of the adapted parameters in the mean with the hidden model (gamma).
        seed, layers, optim, weighting, temperature, class_ema, consistency, prior_on, divisor: as
            in ROID.

    Odd batches are as in ROID.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        layers: Layers,
        optim: StreamOptim,
        weighting: bool,
        temperature: Positive,
        class_ema: Unit,
        consistency: bool,
        ensemble: Unit,
        prior_on: Literal["logits", "probabilities"] | None,
        divisor: Literal["largest", "batch"] | Count,
        return_rate: Unit,
        noise: NonNegative,
        anchor: Literal["updated", "predicted"],
        keep_variance: bool,
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            layers=layers,
            optim=optim,
            weighting=weighting,
            temperature=temperature,
            class_ema=class_ema,
            consistency=consistency,
            ensemble=ensemble,
            prior_on=prior_on,
            divisor=divisor,
        )
        self.return_rate, self.anchor, self.keep_variance = return_rate, anchor, keep_variance
        self.noise = noise * sum(p.numel() for p in self.trained) / VALUES
        self.hidden = nn.ParameterList(p.clone() for p in self.source).requires_grad_(False)
        self.variance = 0.0

    def get_extra_state(self) -> float:
        return self.variance

    def set_extra_state(self, state: float) -> None:
        self.variance = state

    def reset(self) -> None:
        """Back to the start of the stream, but for the variance under `keep_variance`."""
        variance = self.variance
        super().reset()
        if self.keep_variance:
            self.variance = variance

    def gain(self) -> float:
        """Weight of the hidden model against the parameters in this batch; moves the variance."""
        variance, trust = self.return_rate**2 * self.variance + self.noise, 1 - self.noise
        gain = max(trust / (variance + trust), LEAST)
        gain = gain if gain < WHOLE else 1.0
        self.variance = gain * variance
        return gain

    def merge(self) -> None:
        """Predict, update, and average the adapted parameters with the hidden model."""
        hidden = [*self.hidden]
        move_average(hidden, [*self.source], self.return_rate)
        predicted = [p.clone() for p in hidden] if self.anchor == "predicted" else hidden
        move_average(hidden, [*self.trained], self.gain())
        move_average([*self.trained], predicted, self.ensemble)
