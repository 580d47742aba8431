"""Deep SLDA: linear discriminant analysis on frozen features, image by image.

Paper: Hayes and Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant
Analysis", CVPR Workshops 2020, arXiv 1909.01520.
Official code: tyler-hayes/Deep_SLDA, `SLDA_Model.py`. No run of it was recorded; the formulas are
checked by hand, against the recursion written out image by image.

Each class has a running mean, all share one covariance S. Image number t (from 0) of class y with
d = x - m_y moves S to (t S + t/(t+1) d d') / (t+1) and then m_y by d / (n_y+1). Scores are those
of LDA with the inverse of (1-e) S + e I, without class priors.

The first task may start the statistics at once (`base=oas`, official on ImageNet): its class means,
and a shrunk estimate of the covariance around them (Chen et al. 2010, as in scikit-learn).

One thing to know of the released code: the mean of a new class is 0, so its first image adds its
whole second moment to S (`first_image=counts`).

Deviations: sums are float64, a batch is one product that gives the recursion's values, and a
Cholesky factor replaces the pseudo-inverse of a matrix that has an inverse. An image is seen once,
through the test pipeline, in the order of the data set.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

import torch
from annotated_types import Gt, Le
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.fsa import LDA
from driftline.cl.simplecil import SimpleCIL
from driftline.core.errors import UserError
from driftline.core.stream import Task
from driftline.parts.modes import evaluation_mode


def shrunk_covariance(centred: Tensor) -> Tensor:
    """Covariance of rows [N, D] around 0, shrunk towards its mean variance (OAS), [D, D]."""
    count, dim = centred.shape
    spread = centred.T @ centred / count
    mean = spread.diagonal().mean()
    size = spread.square().mean()
    below = (count + 1) * (size - mean**2 / dim)
    share = ((size + mean**2) / below).clamp_max(1) if below > 0 else torch.ones_like(mean)
    return (1 - share) * spread + share * mean * torch.eye(dim).to(spread)


class StreamingLDA(LDA):
    """Running means, one covariance, LDA.

    Args:
        dim: length D of a feature vector.
        shrinkage, plastic, first_image: see `SLDA`.
    """

    spread: Tensor  # float64 [D, D]

    def __init__(self, dim: int, shrinkage: float, plastic: bool, first_image: str) -> None:
        super().__init__(dim)
        self.shrinkage, self.plastic, self.first_image = shrinkage, plastic, first_image
        self.register_buffer("spread", torch.zeros(dim, dim, dtype=torch.float64))

    def start(self, features: Tensor, y: Tensor) -> None:
        """Means and covariance of the first images at once: features [N, D], y [N]."""
        super().update(features, y)
        self.spread = shrunk_covariance(features.double() - self.means[y])

    @torch.no_grad()
    def update(self, features: Tensor, y: Tensor) -> None:
        """The images [B, D] of classes y [B], one after the other."""
        images = int(self.counts.sum())
        x, t = features.double(), images + torch.arange(len(y), device=y.device)
        before = (y[:, None] == y).tril(-1).double()  # of the same class, earlier in the batch
        counts = self.counts[y] + before.sum(1)
        gaps = x - (self.sums[y] + before @ x) / counts.clamp_min(1)[:, None]
        if self.first_image == "skipped":
            gaps = gaps * (counts > 0)[:, None]
        super().update(features, y)
        if self.plastic:
            added = gaps.T @ (gaps * (t / (t + 1))[:, None])
            self.spread = (images * self.spread + added) / max(1, images + len(y))

    def solve(self) -> None:
        """Weights and biases from the statistics so far."""
        self.solve_for((1 - self.shrinkage) * self.spread, self.shrinkage)


class SLDA(SimpleCIL):
    """A frozen network and streaming LDA.

    Args:
        shrinkage: e, share of the identity in what is inverted.
        covariance: `plastic`: moves with every image; `static`: stays as the first task left it.
        base: the first task: `oas` at once, or `stream`: image by image like all others.
        first_image: of a class: `counts`: its distance to 0 enters the covariance; `skipped`.

    Raises:
        UserError: for a static covariance that nothing ever estimates.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        shrinkage: Annotated[float, Gt(0), Le(1)],
        covariance: Literal["plastic", "static"],
        base: Literal["oas", "stream"],
        first_image: Literal["counts", "skipped"],
    ) -> None:
        super().__init__(backbone)
        if covariance == "static" and base == "stream":
            raise UserError(
                "strategy.covariance=static keeps the covariance of the first task, which "
                "strategy.base=stream does not estimate; set strategy.base=oas"
            )
        self.base = base
        plastic = covariance == "plastic"
        self.head = StreamingLDA(backbone.dim, shrinkage, plastic, first_image)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Add the training images of `task` to the statistics and solve for the head."""
        head = cast(StreamingLDA, self.head)
        if task.index == 0 and self.base == "oas":
            with evaluation_mode(self):
                batches = [b.to(self.device) for b in task.fit()]
                features = [self.features(b.x) for b in batches]
            if features:
                head.start(torch.cat(features), torch.cat([b.y for b in batches]))
        else:
            super().end_task(task)
        head.solve()
