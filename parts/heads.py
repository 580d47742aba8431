"""Classifiers: a growing linear one, a cosine one for one task, and one of class means.

`ExpandingLinear` starts new rows as LAMDA-PILOT 5240714 (`backbone/linears.py`, SimpleLinear) does.
`PrototypeHead` is the cosine classifier of SimpleCIL (arXiv 2303.07338) in the same repository.

Deviations: PILOT draws all rows again at every growth and then copies the old ones over them; here
only new rows are drawn, from the same distribution. PILOT stores the means; here sums and counts
are kept, so images of a class may arrive in any number of calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.parts.statistics import ClassMeans


def linear_head(backbone: Backbone, strategy: str) -> nn.Linear:
    """The layer that gives the scores from features, for methods that read or replace its input.

    Args:
        strategy: name of the method, for the error.

    Raises:
        UserError: for a network without one.
    """
    if backbone.head is None:
        raise UserError(
            f"strategy={strategy} works on the input of a network's last linear layer, and "
            f"{backbone.tag} has no single linear layer that gives its scores. Use another "
            "backbone, or strategy=source"
        )
    return backbone.head


class ExpandingLinear(nn.Module):
    """Linear layer D -> C whose C starts at 0.

    Args:
        dim: length D of a feature vector.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(0, dim))
        self.bias = nn.Parameter(torch.empty(0))

    @property
    def classes(self) -> int:
        return len(self.weight)

    def start(self, weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
        """Initial values of new rows: U(-sqrt(3/D), sqrt(3/D)), Kaiming's with linear gain.

        Args:
            weight, bias: [n, D] on the CPU, not set; and [n], 0.
        """
        bound = (3 / weight.shape[1]) ** 0.5
        weight.uniform_(-bound, bound, generator=generator)

    def grow(self, classes: int, generator: torch.Generator) -> None:
        """Append rows up to `classes` in all; existing rows are copied bit by bit.

        The parameters are new objects, so an optimiser has to be made afterwards.

        Args:
            generator: CPU generator of the initial values, see `start`.
        """
        added = classes - self.classes
        if added <= 0:
            return
        weight, bias = torch.empty(added, self.weight.shape[1]), torch.zeros(added)
        self.start(weight, bias, generator)
        rows, biases = self.weight.detach(), self.bias.detach()
        self.weight = nn.Parameter(torch.cat([rows, weight.to(rows)]))
        self.bias = nn.Parameter(torch.cat([biases, bias.to(biases)]))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        return F.linear(features, self.weight, self.bias)


class CosineHead(nn.Module):
    """`sigma * cos(feature, row)` with a learnable sigma that starts at 1 (EASE, APER).

    Args:
        dim: length D of a feature vector.
        classes: rows, drawn from U(-1/sqrt(D), 1/sqrt(D)).
        generator: CPU generator of the initial rows.
    """

    def __init__(self, dim: int, classes: int, generator: torch.Generator) -> None:
        super().__init__()
        bound = dim**-0.5
        rows = torch.empty(classes, dim).uniform_(-bound, bound, generator=generator)
        self.weight, self.sigma = nn.Parameter(rows), nn.Parameter(torch.ones(1))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        return self.sigma * F.linear(F.normalize(features, dim=1), F.normalize(self.weight, dim=1))


class PrototypeHead(ClassMeans):
    """Cosine similarity with class means; nothing is trained.

    A class without images has a zero row and scores 0.

    Args:
        dim: length D of a feature vector.
    """

    @property
    def weight(self) -> Tensor:
        """Class means, float32 [C, D]."""
        return self.means.float()

    def forward(self, features: Tensor) -> Tensor:
        """Cosines float [B, C] of features [B, D]."""
        weight = self.weight.to(features.dtype)
        return F.linear(F.normalize(features, dim=1), F.normalize(weight, dim=1))


class NearZeroLinear(ExpandingLinear):
    """Expanding linear layer whose new rows start at N(0, 0.001^2), biases at 0 (LAE, O-LoRA)."""

    def start(self, weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
        weight.normal_(0, 0.001, generator=generator)


class PlainLinear(ExpandingLinear):
    """Expanding linear layer with torch's initial values, U(-1/sqrt(D), 1/sqrt(D)), biases too."""

    def start(self, weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
        bound = weight.shape[1] ** -0.5
        weight.uniform_(-bound, bound, generator=generator)
        bias.uniform_(-bound, bound, generator=generator)


def freeze_pretrained_head(backbone: Backbone) -> None:
    """The pretrained classifier has no part in features: neither trained, counted nor saved."""
    if backbone.head is not None:
        backbone.head.requires_grad_(False)
