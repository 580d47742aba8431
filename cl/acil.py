"""ACIL: train on the first task, then recursive least squares on expanded features.

Paper: Zhuang et al., "ACIL: Analytic Class-Incremental Learning with Absolute Memorization and
Privacy Protection", NeurIPS 2022.
Official code: ZHUANGHP/Analytic-continual-learning, `analytic/ACIL.py`. No run of it was recorded;
the formulas are checked by hand, against the recursion of the paper on the inverse.

First task: the whole network and a linear head learn by cross-entropy with smoothed labels, or
nothing does (`epochs=0`, as the official code does for pretrained networks without base classes).
The head is thrown away. From then on h = relu(f W) with a fixed random W, and the weights are the
ridge solution on all images seen, with one gamma: (sum h h' + gamma I) w = sum h y'. That is what
the recursion on the inverse gives, so it is RanPAC with the whole network, another W, double
precision, and without a choice of the ridge.

Deviations that change no number: sums and a Cholesky factor in place of the recursion. That do, in
the training of the first task alone: the rate is 0 in the first epoch instead of a thousandth and
falls to 0 instead of 1e-6; the last epoch is taken, not that of the best accuracy on test images.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.first_task import TUNED
from driftline.cl.fsa import DroppedLinear
from driftline.cl.ranpac import RanPAC
from driftline.core.ranges import Below1, Count, CountOrZero, Positive
from driftline.core.stream import Batch
from driftline.parts.adapters.plan import Plan
from driftline.parts.optim import FirstOptim


class ACIL(RanPAC):
    """Random expansion and ridge regression with a fixed ridge.

    Args:
        adapter, epochs, optim: see `FirstTask`.
        projection: columns of the expansion.
        gamma: the ridge.
        smoothing: of the labels of the first task.
    """

    sums = torch.float64  # official

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        adapter: Plan | None,
        epochs: CountOrZero,
        optim: FirstOptim,
        projection: Count,
        gamma: Positive,
        smoothing: Below1,
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            adapter=adapter,
            epochs=epochs,
            optim=optim,
            projection=projection,
            score="inner",
        )
        self.smoothing = smoothing
        self.ridge.fill_(gamma)

    def draw(self, dim: int, columns: int) -> Tensor:
        """Torch's usual initial weights of a linear layer, U(-1/sqrt(D), 1/sqrt(D))."""
        bound, draws = dim**-0.5, self.rng("projection")
        return torch.empty(dim, columns).uniform_(-bound, bound, generator=draws)

    def make_tuning_head(self, classes: int, generator: torch.Generator) -> nn.Module:
        return DroppedLinear(cast(Backbone, self.backbone).dim, classes, 0.0, generator)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert self.tuning_head is not None
        scores = self.tuning_head(self.features(batch.x, TUNED))
        return F.cross_entropy(scores, batch.y, label_smoothing=self.smoothing), scores

    def choose(self, h: Tensor, targets: Tensor) -> None:
        """The ridge is fixed."""
