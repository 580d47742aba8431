"""FeCAM: Mahalanobis distance to class means, with a covariance for each class.

Paper: Goswami et al., "FeCAM: Exploiting the Heterogeneity of Class Distributions in
Exemplar-Free Continual Learning", NeurIPS 2023, arXiv 2309.14062.
Official code: dipamgoswami/FeCAM d2479b7 (a trainer for CNNs and scripts for ViTs); a port in
LAMDA-CL/LAMDA-PILOT 5240714.

The network is frozen from the start, or after a first task that tunes it. A class is the mean and
the covariance of its features. Covariances are shrunk towards a multiple of the identity, as there
are fewer images than features, and divided by the standard deviations, so that distances to
different classes can be compared: d = (x - m)' S^+ (x - m), x of unit length, nearest class wins.

The three programs differ, and the options are those differences:

|                | ViT scripts (default) | CNN trainer             | PILOT's port              |
|----------------|-----------------------|-------------------------|---------------------------|
| first task     | `epochs=0`            | whole network           | adapters, as in APER      |
| `unit_length`  | `before`              | `after`                 | `after`                   |
| `power`        | null                  | 0.5                     | null                      |
| shrinkage      | once, scaled, (1, 0)  | twice, scaled, (1, 1)   | once, fixed, 100          |
| `scaling`      | `correlation`         | `correlation`           | `rows`                    |
| `first_scores` | `distance`            | `head`                  | `distance`                |

Two of them are not what the paper says. The trainer for CNNs shrinks every covariance twice. PILOT
does not divide by standard deviations: it asks for the correlation coefficients of the rows of the
covariance, as if these were observations, which centres them; the matrix is singular by
construction and its pseudo-inverse drops a direction.

Deviations: covariances, scaling and inverses are float64, one inverse a class instead of one at
every evaluation. Distances are computed row by row; the official matrix of all pairs of a batch is
not. A class of one image, or of images without any spread, has no covariance; it gets the identity,
with a warning, where the official code computes NaN. A class that comes back is measured anew from
its last task. The common covariance is of images in the test pipeline. Left out: the logarithm in
place of a power, and nearest means without covariance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.first_task import FirstTask
from driftline.core.errors import UserError
from driftline.core.ranges import CountOrZero, NonNegative, Positive
from driftline.core.stream import OWN_CLASSES, Task
from driftline.parts.adapters.plan import Plan
from driftline.parts.heads import CosineHead
from driftline.parts.optim import FirstOptim
from driftline.parts.statistics import covariance

FAR = 1e6  # distance to a class without images
CLASSES = 64  # whose distances are computed together, which bounds memory


def shrink(spread: Tensor, diagonal: float, rest: float) -> Tensor:
    """Adds multiples of the mean variance to the diagonal and of the mean covariance elsewhere.

    The mean covariance is that of the entries that are not 0.
    """
    eye = torch.eye(len(spread), dtype=spread.dtype, device=spread.device)
    others = spread * (1 - eye)
    mean = others.sum() / (others != 0).sum().clamp_min(1)
    return spread + diagonal * spread.diagonal().mean() * eye + rest * mean * (1 - eye)


class FeCAM(FirstTask):
    """Class means and matrices; scores are negative distances.

    Args:
        adapter, epochs, optim: see `FirstTask`.
        unit_length: features are brought to it `before` means and covariances (the means stay as
            they are), or the means `after`, from features as they are.
        power: of every feature, before all else; for networks whose features are at least 0.
        spread: `class`: a covariance each; `diagonal`: its variances, divided by their norm;
            `common`: one for all, a mean over tasks weighted by classes, not scaled and shrunk
            from the second task on.
        shrinkage: of the covariance, `scaled`: see `shrink`; `fixed`: alpha1 times the identity is
            added.
        shrinkages: how many times.
        alpha1, alpha2: of the diagonal and of the rest.
        scaling: `correlation`: entries over the standard deviations; `rows`: correlation
            coefficients of the rows of the matrix; `none`.
        first_scores: after the first task alone: `distance`, as later, or those of the `head` that
            learned: Euclidean distance to its rows.

    Raises:
        UserError: for a head that does not learn, or a power of features below 0.
    """

    needs = FirstTask.needs | {OWN_CLASSES}
    means: Tensor  # float [C, D]
    inverses: Tensor  # float [C, D, D]; [C, D] diagonal; [1, D, D] common
    counts: Tensor  # int64 [C], images behind the statistics
    common: Tensor  # float64 [D, D]; empty unless spread=common
    rows: Tensor  # float [C, D], of the head after the first task alone, else empty

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        adapter: Plan | None,
        epochs: CountOrZero,
        optim: FirstOptim,
        unit_length: Literal["before", "after"],
        power: Positive | None,
        spread: Literal["class", "diagonal", "common"],
        shrinkage: Literal["scaled", "fixed"],
        shrinkages: Literal[0, 1, 2],
        alpha1: NonNegative,
        alpha2: NonNegative,
        scaling: Literal["correlation", "rows", "none"],
        first_scores: Literal["distance", "head"],
    ) -> None:
        super().__init__(backbone, seed=seed, adapter=adapter, epochs=epochs, optim=optim)
        if first_scores == "head" and not epochs:
            raise UserError(
                "strategy.first_scores=head needs a head that learns: set strategy.epochs above 0, "
                "or strategy.first_scores=distance"
            )
        self.unit_length, self.power, self.spread = unit_length, power, spread
        self.shrinkage, self.shrinkages = shrinkage, shrinkages
        self.alpha1, self.alpha2, self.scaling = alpha1, alpha2, scaling
        self.first_scores = first_scores
        dim = backbone.dim
        size = (dim,) if spread == "diagonal" else (dim, dim)
        self.register_buffer("means", torch.zeros(0, dim))
        shared = torch.eye(dim)[None] if spread == "common" else torch.zeros(0, *size)
        self.register_buffer("inverses", shared)
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("common", torch.zeros(0, 0, dtype=torch.float64))
        self.register_buffer("rows", torch.zeros(0, dim))

    def grow(self, task: Task) -> None:
        added = max(0, task.classes.stop - len(self.counts))
        self.means = F.pad(self.means, (0, 0, 0, added))
        self.counts = F.pad(self.counts, (0, added))
        if self.spread != "common":
            shape = (*[0, 0] * (self.inverses.ndim - 1), 0, added)
            self.inverses = F.pad(self.inverses, shape)
        super().grow(task)

    # ------------------------------------------------------------------ statistics

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Freeze what was tuned; mean and matrix of each class of `task`.

        Raises:
            UserError: for `power` and features below 0.
        """
        head, (features, y) = self.tuning_head, self.collected(task)
        if self.power is not None and bool((features < 0).any()):
            raise UserError(
                "strategy.power needs features of at least 0, as of networks that end in a ReLU; "
                "set strategy.power=null"
            )
        self.rows = self.rows[:0]
        if self.first_scores == "head" and task.index == 0 and isinstance(head, CosineHead):
            self.rows = head.weight.detach().clone()
        if self.spread == "common" and len(y) > 1:
            self._join(self.transformed(features), task)
        plain: list[int] = []
        for c in task.classes:
            own = features[y == c]
            self.counts[c] = len(own)
            if len(own):
                self.means[c] = self.mean_of(own)
            if self.spread == "common" or not len(own):
                continue
            matrix = self.matrix_of(own) if len(own) > 1 else None
            if matrix is None or not matrix.isfinite().all():
                plain.append(c)
                matrix = torch.eye(own.shape[1], dtype=torch.float64, device=own.device)
            if self.spread == "diagonal":
                self.inverses[c] = 1 / matrix.diagonal()
            else:
                self.inverses[c] = torch.linalg.pinv(matrix, hermitian=True)
        if plain:
            self.warn_once(
                "covariance",
                f"no covariance from the images of class {', '.join(map(str, plain[:5]))}: one "
                "image, or features without any spread; its distance is Euclidean. "
                "strategy.spread=common needs none of its own (this is said once)",
            )

    def transformed(self, features: Tensor) -> Tensor:
        """Features [N, D] as covariances are measured on them."""
        if self.power is not None:
            features = features**self.power
        return F.normalize(features, dim=1) if self.unit_length == "before" else features

    def mean_of(self, features: Tensor) -> Tensor:
        """[D] from the features [N, D] of a class."""
        if self.unit_length == "before":
            return self.transformed(features).double().mean(0).float()
        mean = features.double().mean(0)
        return F.normalize(mean if self.power is None else mean**self.power, dim=0).float()

    def matrix_of(self, features: Tensor) -> Tensor:
        """Float64 [D, D] from the features [N, D] of a class, N > 1."""
        matrix = self.shrunk(covariance(self.transformed(features)), self.shrinkages)
        if self.spread == "diagonal":
            return (matrix.diagonal() / matrix.diagonal().norm()).diag()
        if self.scaling == "rows":
            return torch.corrcoef(matrix)
        if self.scaling == "correlation":
            deviation = matrix.diagonal().sqrt()
            return matrix / (deviation[:, None] * deviation)
        return matrix

    def shrunk(self, matrix: Tensor, times: int) -> Tensor:
        for _ in range(times):
            if self.shrinkage == "scaled":
                matrix = shrink(matrix, self.alpha1, self.alpha2)
            else:
                matrix = matrix + self.alpha1 * torch.eye(len(matrix)).to(matrix)
        return matrix

    def _join(self, features: Tensor, task: Task) -> None:
        """The covariance of all images of `task` joins the common one."""
        spread, known = covariance(features), task.classes.start
        if len(self.common):
            share = known / len(self.counts)
            spread = share * self.common + (1 - share) * self.shrunk(
                spread, min(1, self.shrinkages)
            )
        self.common = spread
        self.inverses[0] = torch.linalg.pinv(spread, hermitian=True)

    # ------------------------------------------------------------------ prediction

    def distances(self, features: Tensor) -> Tensor:
        """Float [B, C] from features [B, D]; `FAR` for a class without images."""
        if self.power is not None:
            features = features**self.power
        x, parts = F.normalize(features, dim=1), []
        for at in torch.arange(len(self.counts), device=x.device).split(CLASSES):
            gap = x - self.means[at][:, None]  # [C, B, D]
            inverse = self.inverses if self.spread == "common" else self.inverses[at]
            turned = gap * inverse[:, None] if inverse.ndim == 2 else gap @ inverse
            parts.append((turned * gap).sum(2).T)
        distances = torch.cat(parts, 1) if parts else x[:, :0]
        return distances.masked_fill(self.counts == 0, FAR)

    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        """Negative distances [B, C_seen]."""
        own = features[self.reads[0]]
        if not len(self.rows):
            return -self.distances(own)
        rows = F.normalize(self.rows, dim=1)
        squares = (F.normalize(own, dim=1)[:, None] - rows).square().sum(2)
        return -F.pad(squares, (0, len(self.counts) - len(rows)), value=FAR)
