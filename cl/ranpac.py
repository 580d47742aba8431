"""RanPAC: ridge regression from randomly expanded features of a network tuned on the first task.

Paper: McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual
Learning", NeurIPS 2023, arXiv 2307.02251.
Official code: RanPAC/RanPAC 012927f; a port in LAMDA-CL/LAMDA-PILOT 5240714.

First task: adapters and a cosine head learn as in APER, or nothing does (`epochs=0`). From then on
h = relu(f W) with a fixed Gaussian W of M columns. G = sum h h' and Q = sum h y' over all training
images so far, y the one-hot label; the head solves (G + lambda I) w = Q, whatever the order of the
images. Scores are h w.

Two things to know of the released code. lambda is chosen on the present task alone (and applied to
all of G): of 17 powers of ten, the one whose solution on 80 % of its images has the least squared
error on the rest. Its images are shuffled before, so the choice is random; here the generator
`split` draws it. PILOT's port scores by cosine (`score=cosine`), which is another classifier.

Deviations: lambda is chosen and the head solved in float64, by one eigendecomposition for all 17
and a Cholesky factor; the official float32 solves of small lambdas are rounding noise, which loses
to a larger one. Where the lambda chosen is lost in the rounding of the float32 sums, so that the
solution fits the task worse than zeros, it is raised (`RanPAC.solve`). A task of one image keeps
the lambda of the task before (1 at first), where the official code fails. Left out: joint training,
class means without regression, and the evaluation after every epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.first_task import FirstTask
from driftline.core.ranges import CountOrZero
from driftline.core.stream import Task
from driftline.parts.adapters.plan import Plan
from driftline.parts.heads import CosineHead
from driftline.parts.optim import FirstOptim
from driftline.parts.statistics import ridge_solve

RIDGES = [10.0**k for k in range(-8, 9)]
FITTED = 0.8  # share of a task's images that the ridge is fitted on when it is chosen


def held_out_errors(h: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error on the last fifth of the rows for each of `RIDGES`, fitted on the others.

    Args:
        h: [N, M], N > 1.
        targets: [N, C].

    Returns:
        float64 [17].
    """
    cut = int(FITTED * len(h))
    h, targets = h.double(), targets.double()
    fitted, wanted = h[:cut], targets[:cut]
    left, right = h[cut:], fitted.T @ wanted
    if cut < h.shape[1]:  # fewer images than columns: the same solution from their products
        gram, left, right = fitted @ fitted.T, left @ fitted.T, wanted
    else:
        gram = fitted.T @ fitted
    values, vectors = torch.linalg.eigh(gram)
    values, left, right = values.clamp_min(0), left @ vectors, vectors.T @ right
    errors = [((left / (values + r)) @ right - targets[cut:]).square().mean() for r in RIDGES]
    return torch.stack(errors)


class RanPAC(FirstTask):
    """Random projection, sums of products, ridge regression to one-hot labels.

    Args:
        adapter, epochs, optim: see `FirstTask`.
        projection: columns M of the random projection; 0: regression from the features themselves.
        score: `inner`: product with the solution; `cosine` (PILOT's port): their cosine, times the
            scale that the head of the first task learned.
    """

    projection: Tensor  # float [D, M]; [D, 0] without one
    gram: Tensor  # [M, M]
    targets: Tensor  # [M, C], sums of h by class
    weight: Tensor  # float [C, M]
    ridge: Tensor  # float64 [], of the last task
    sigma: Tensor  # float [1]
    sums = torch.float32  # official; 400 MB for M = 10,000

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        adapter: Plan | None,
        epochs: CountOrZero,
        optim: FirstOptim,
        projection: CountOrZero,
        score: Literal["inner", "cosine"],
    ) -> None:
        super().__init__(backbone, seed=seed, adapter=adapter, epochs=epochs, optim=optim)
        self.score = score
        size = projection or backbone.dim
        self.register_buffer("projection", self.draw(backbone.dim, projection))
        self.register_buffer("gram", torch.zeros(size, size, dtype=self.sums))
        self.register_buffer("targets", torch.zeros(size, 0, dtype=self.sums))
        self.register_buffer("weight", torch.zeros(0, size))
        self.register_buffer("ridge", torch.ones((), dtype=torch.float64))
        self.register_buffer("sigma", torch.ones(1))

    def draw(self, dim: int, columns: int) -> Tensor:
        """The projection [dim, columns]."""
        return torch.randn(dim, columns, generator=self.rng("projection"))

    def expand(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, M]."""
        if not self.projection.shape[1]:
            return features
        return F.relu(features @ self.projection)

    def grow(self, task: Task) -> None:
        added = max(0, task.classes.stop - len(self.weight))
        self.targets = F.pad(self.targets, (0, added))
        self.weight = F.pad(self.weight, (0, 0, 0, added))
        super().grow(task)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Freeze what was tuned, add the training images of `task`, solve for the head."""
        if isinstance(self.tuning_head, CosineHead):
            self.sigma.copy_(self.tuning_head.sigma)
        features, y = self.collected(task)
        h, wanted = self.expand(features), F.one_hot(y, len(self.weight)).to(self.sums)
        order = self.order(len(y)).to(y.device)
        self.choose(h[order], wanted[order])
        h = h.to(self.sums)
        self.targets += h.T @ wanted
        self.gram += h.T @ h
        self.weight = self.solve(h, wanted)

    def solve(self, h: Tensor, targets: Tensor) -> Tensor:
        """The head [C, M] for all sums, which fits the rows of this task better than zeros do.

        Where there are fewer images than columns, a small ridge divides by what rounding has left
        in the sums; it is then raised to the size of that, and tenfold until zeros are beaten.
        """
        rounding = torch.finfo(self.sums).eps * float(self.gram.trace())
        while True:
            weight = ridge_solve(self.gram, self.targets, float(self.ridge)).T.float()
            misfit = (h.float() @ weight.T - targets).square().mean()
            if misfit <= targets.square().mean() or self.ridge >= RIDGES[-1]:
                return weight
            self.ridge.fill_(max(10 * float(self.ridge), rounding))

    def order(self, images: int) -> Tensor:
        """In which order the images of a task are divided when the ridge is chosen."""
        return torch.randperm(images, generator=self.rng("split"))

    def choose(self, h: Tensor, targets: Tensor) -> None:
        """Set the ridge from the rows of one task."""
        if len(h) > 1:
            self.ridge.fill_(RIDGES[int(held_out_errors(h, targets).argmin())])

    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        """Scores [B, C_seen]."""
        h = self.expand(features[self.reads[0]])
        if self.score == "inner":
            return h @ self.weight.T
        return self.sigma * F.normalize(h, dim=1) @ F.normalize(self.weight, dim=1).T
