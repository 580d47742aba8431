"""FSA: adapt the network on the first session, then linear discriminant analysis on its features.

Paper: Panos et al., "First Session Adaptation: A Strong Replay-Free Baseline for Class-Incremental
Learning", ICCV 2023, arXiv 2303.13199.
Official code: aresPanos/fsa e151d89.

First task: the whole network (FSA), or a factor and a summand for each channel behind norms
(FSA-FiLM, `adapter=fsa_film`; on a ViT `adapter=scale_shift strategy.adapter.kind.std=0`), learn by
cross-entropy with a linear head behind dropout. From then on the head is LDA in closed form, over
all images so far: S = covariance around the mean of ALL features (not of each class) + I,
w_c = S^-1 m_c, score x w_c - m_c w_c / 2, without class priors.

Deviations that change a number: classes of the future are left out, which score 0 in the official
code and win there where all others are negative (a class of the past without images does so here
as well). With the whole network the official code never leaves training mode, so that BatchNorm
reads each batch's own statistics (and its evaluation stops with an error); here features are
measured and scored in evaluation mode. Its accuracy is a mean over batches, in which the last,
short one weighs more; ours is over images.

That change none: the official code computes the features of all earlier images again in each
session; counts, sums and products in float64 give the same head without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.first_task import FirstTask
from driftline.core.distributed import dropout
from driftline.core.errors import UserError
from driftline.core.ranges import Below1, CountOrZero, Positive
from driftline.core.stream import Task
from driftline.parts.adapters.adapter import Adapter
from driftline.parts.adapters.plan import Plan
from driftline.parts.optim import FirstOptim
from driftline.parts.statistics import ClassMeans, ridge_solve


class DroppedLinear(nn.Module):
    """A linear layer with bias behind dropout; torch's usual initial values.

    Args:
        dim, classes: inputs and outputs.
        rate: of the dropout, in training only.
        generator: CPU generator of weights and biases, U(-1/sqrt(D), 1/sqrt(D)).
    """

    def __init__(self, dim: int, classes: int, rate: float, generator: torch.Generator) -> None:
        super().__init__()
        self.rate, bound = rate, dim**-0.5
        weight = torch.empty(classes, dim).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(classes).uniform_(-bound, bound, generator=generator)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        if self.training and self.rate:
            features = dropout(features, self.rate)
        return F.linear(features, self.weight, self.bias)


class FiLM(Adapter):
    """`gamma * norm(x) + beta`, before the activation where the norm has one; starts at (1, 0).

    Args:
        module: a BatchNorm in evaluation mode; not a submodule.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        if not isinstance(module, nn.BatchNorm2d):
            raise UserError(
                f"FiLM acts behind BatchNorm, not {type(module).__name__}: choose other points "
                "(strategy.adapter.at), or adapter=scale_shift strategy.adapter.kind.std=0"
            )
        self._norm: list[Any] = [module]
        self.gamma = nn.Parameter(torch.ones(module.num_features))
        self.beta = nn.Parameter(torch.zeros(module.num_features))

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        norm = self._norm[0]
        scale, shift = self.gamma * norm.weight, self.gamma * norm.bias + self.beta
        statistics = norm.running_mean, norm.running_var
        out = F.batch_norm(inp, *statistics, scale, shift, training=False, eps=norm.eps)
        return norm.act(norm.drop(out)) if hasattr(norm, "act") else out  # timm's BatchNormAct2d


class LDA(ClassMeans):
    """Class means and linear discriminant analysis without priors; scores are x w - b / 2.

    Args:
        dim: length D of a feature vector.
    """

    weight: Tensor  # float [C, D]
    bias: Tensor  # float [C]

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("weight", torch.zeros(0, dim))
        self.register_buffer("bias", torch.zeros(0))

    def grow(self, classes: int) -> None:
        super().grow(classes)
        added = max(0, classes - len(self.bias))
        self.weight = F.pad(self.weight, (0, 0, 0, added))
        self.bias = F.pad(self.bias, (0, added))

    def solve_for(self, spread: Tensor, ridge: float) -> None:
        """Weights and biases from the means so far and a covariance, float64 [D, D].

        Args:
            ridge: added to its diagonal.
        """
        means = self.means
        weight = ridge_solve(spread, means.T, ridge).T
        self.weight, self.bias = weight.float(), (weight * means).sum(1).float()

    def forward(self, features: Tensor) -> Tensor:
        """Scores [B, C] of features [B, D]."""
        return features @ self.weight.T - self.bias / 2


class TotalLDA(LDA):
    """LDA with the covariance of all features around their common mean, from sums.

    Args:
        dim: length D of a feature vector.
        ridge: added to the variances.
    """

    products: Tensor  # float64 [D, D], sum of x x'

    def __init__(self, dim: int, ridge: float) -> None:
        super().__init__(dim)
        self.ridge = ridge
        self.register_buffer("products", torch.zeros(dim, dim, dtype=torch.float64))

    @torch.no_grad()
    def update(self, features: Tensor, y: Tensor) -> None:
        super().update(features, y)
        features = features.double()
        self.products += features.T @ features

    def covariance(self) -> Tensor:
        """Unbiased, float64 [D, D]; zeros for one image or none."""
        images = self.counts.sum()
        if images < 2:
            return torch.zeros_like(self.products)
        total = self.sums.sum(0)
        return (self.products - total[:, None] * total / images) / (images - 1)

    def solve(self) -> None:
        """Weights and biases from the sums so far."""
        self.solve_for(self.covariance(), self.ridge)


class FSA(FirstTask):
    """A network adapted on the first task, and LDA.

    Args:
        adapter, epochs, optim: see `FirstTask`.
        head_dropout: of the features before the head of the first task.
        ridge: added to the variances of LDA.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        adapter: Plan | None,
        epochs: CountOrZero,
        optim: FirstOptim,
        head_dropout: Below1,
        ridge: Positive,
    ) -> None:
        super().__init__(backbone, seed=seed, adapter=adapter, epochs=epochs, optim=optim)
        self.head_dropout = head_dropout
        self.head = TotalLDA(backbone.dim, ridge)

    def make_tuning_head(self, classes: int, generator: torch.Generator) -> nn.Module:
        dim = cast(Backbone, self.backbone).dim
        return DroppedLinear(dim, classes, self.head_dropout, generator)

    def grow(self, task: Task) -> None:
        self.head.grow(task.classes.stop)
        super().grow(task)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Freeze what was tuned, add the training images of `task`, solve for the head."""
        for (features,), y in self.measured(task):
            self.check(features, y)
            self.head.update(features, y)
        self.head.solve()

    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        """Scores [B, C_seen]."""
        return self.head(features[self.reads[0]])
