"""Statistics of features that methods share: class means, covariances, regularised solutions.

Sums are float64, so that they do not depend on how images come in batches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.core.errors import Diverged


class ClassMeans(nn.Module):
    """Sums (float64) and counts of the features of each class.

    Further images of a known class update its mean exactly. A class without images has a zero mean.

    Args:
        dim: length D of a feature vector.
    """

    sums: Tensor  # float64 [C, D]
    counts: Tensor  # int64 [C]

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(0, dim, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))

    @property
    def classes(self) -> int:
        return len(self.counts)

    @property
    def means(self) -> Tensor:
        """Class means, float64 [C, D]."""
        return self.sums / self.counts.clamp_min(1)[:, None]

    def grow(self, classes: int) -> None:
        """Append zero rows up to `classes` in all."""
        added = max(0, classes - self.classes)
        self.sums = F.pad(self.sums, (0, 0, 0, added))
        self.counts = F.pad(self.counts, (0, added))

    @torch.no_grad()
    def update(self, features: Tensor, y: Tensor) -> None:
        """Add images to their classes: features float [B, D], y int64 [B] below C.

        Raises:
            Diverged: for a NaN or an infinity, naming the class.
        """
        check_finite(features, y)
        # A product, not index_add: sums on a GPU then do not depend on the order of its threads.
        member = y[:, None] == torch.arange(self.classes, device=y.device)
        self.sums += member.double().T @ features.double()
        self.counts += member.sum(0)


def check_finite(features: Tensor, y: Tensor, lr: float | None = None) -> None:
    """Whether the features [B, D] of images of the classes y [B] are finite.

    Args:
        lr: the rate at which the extractor has learned; None: it has not.

    Raises:
        Diverged: if not, naming the class.
    """
    bad = ~features.isfinite().all(1)
    if bad.any():
        advice = (
            "look for images or weights that are not finite numbers"
            if lr is None
            else f"lower strategy.optim.lr ({lr}), or look for NaN in the images"
        )
        raise Diverged(f"non-finite feature of an image of class {int(y[bad][0])}: {advice}")


def covariance(features: Tensor) -> Tensor:
    """Unbiased covariance, float64 [D, D], of features [N, D], N > 1."""
    features = features.double()
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def ridge_solve(matrix: Tensor, targets: Tensor, ridge: float) -> Tensor:
    """Solution X, float64, of `(matrix + ridge I) X = targets`.

    Where rounding has left the sum indefinite, by eigenvalues, those of the matrix below 0 as 0.

    Args:
        matrix: [D, D], symmetric and positive semi-definite up to rounding.
        targets: [D, C].
        ridge: above 0.
    """
    raised, targets = matrix.to(torch.float64, copy=True), targets.double()
    raised.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(raised)
    if not failed:
        return torch.cholesky_solve(targets, factor)
    values, vectors = torch.linalg.eigh(raised)
    return vectors @ ((vectors.T @ targets) / values.clamp_min(ridge)[:, None])
