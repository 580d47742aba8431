"""LAME: the outputs of a frozen classifier, corrected so that similar images agree.

Paper: "Parameter-free Online Test-time Adaptation" (CVPR 2022, arXiv 2201.05718).
Code: github.com/fiveai/LAME @ d2e5f63 (`src/adaptation/lame.py`).

Nothing is learned and nothing is kept between batches. It helps where neighbouring images of the
stream share a class (`scenario.order=correlated`) and is worse than the source model on balanced,
shuffled streams; that is a property of the method, not an error.

Deviations that change no number: distances are computed in blocks of rows; on an accelerator the
energies of several iterations are read back together, and the first iterate that meets the stopping
rule is taken. The option `sigma` of the code, which is never read, does not exist.
Deviations that do: a batch of one image, or one whose rbf bandwidth is zero (equal features), keeps
its probabilities, where the code divides zero by zero and predicts class 0 for every image. For the
same reason `affinity=rbf knn=1 rbf_self=count` is refused.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Count, NonNegative
from driftline.core.strategy import TTAStrategy
from driftline.parts.heads import linear_head

BLOCK_VALUES = 2**24  # values of a block of differences: 64 MiB in float32
STEPS_PER_READ = 8  # iterations between two reads of the energy on an accelerator


def distances(features: Tensor) -> Tensor:
    """Euclidean distances [N, N] between rows of [N, D], from explicit differences.

    A matrix product would be faster, but its rounding (6e-4) can exchange neighbours.
    """
    rows = max(1, BLOCK_VALUES // max(1, features.numel()))
    blocks = [(part[:, None] - features[None]).norm(dim=-1) for part in features.split(rows)]
    return torch.cat(blocks)


def affinity_matrix(
    features: Tensor,
    *,
    affinity: Literal["rbf", "knn", "linear"],
    knn: int,
    force_symmetry: bool,
    rbf_self: Literal["count", "skip"],
) -> Tensor | None:
    """How strongly the images of a batch pull at each other: [N, N] from features [N, D].

    `knn` is cut to what the batch has. The options are those of `LAME`.

    Returns:
        None where the rbf bandwidth is zero: all neighbours are equal to their image.
    """
    features = F.normalize(features, dim=-1)
    count = len(features)
    if affinity == "linear":
        kernel = features @ features.T
    elif affinity == "knn":
        # As in the code, the first of the sorted row is dropped, not "self": they differ where
        # two images have equal features.
        near = distances(features).topk(min(knn + 1, count), largest=False).indices[:, 1:]
        kernel = features.new_zeros(count, count).scatter_(1, near, 1.0)
    else:
        apart = distances(features)
        rank = min(knn if rbf_self == "count" else knn + 1, count)  # the nearest is the image
        sigma = apart.topk(rank, largest=False).values[:, -1].mean()
        if sigma == 0:
            return None
        kernel = torch.exp(-(apart**2) / (2 * sigma**2))
    return (kernel + kernel.T) / 2 if force_symmetry else kernel


def laplacian_assignments(
    unary: Tensor, kernel: Tensor, *, weight: float, max_steps: int, tolerance: float
) -> tuple[Tensor, list[float]]:
    """Assignments that stay near the network's own and agree where `kernel` is large.

    Fixed-point iteration `Y <- softmax(-unary + weight * kernel @ Y)`, which ends after
    `max_steps` or, from the third step on, when the energy changes by at most `tolerance`
    relative to the one before. In the energy the pairwise term is that of the previous iterate,
    as in the code; it serves as stopping rule only.

    Args:
        unary: costs [N, C], minus the logarithm of the network's probabilities.
        kernel: affinities [N, N].

    Returns:
        probabilities [N, C], and the energy after every step made.
    """
    at_once = 1 if unary.device.type == "cpu" else STEPS_PER_READ
    now = (-unary).softmax(1)
    energies: list[float] = []
    while len(energies) < max_steps:
        iterates, values = [], []
        for _ in range(min(at_once, max_steps - len(energies))):
            pairwise = weight * (kernel @ now)
            now = (-unary + pairwise).softmax(1)
            energy = unary * now - pairwise * now + now * now.clamp(min=1e-20).log()
            iterates.append(now)
            values.append(energy.sum())
        for iterate, value in zip(iterates, torch.stack(values).tolist(), strict=True):
            energies.append(value)
            if len(energies) >= 3:
                before = energies[-2]
                if abs(value - before) <= tolerance * abs(before):
                    return iterate, energies
    return now, energies


class LAME(TTAStrategy):
    """Each batch: one forward of the frozen network, then Laplacian-regularised assignments.

    Args:
        backbone: a classifier that ends in a linear layer, whose input is the feature. It runs in
            evaluation mode with the statistics of its training.
        affinity: `rbf`: exp(-d²/2σ²) of the distances d between features of length one, σ their
            mean distance to the `knn`-th neighbour; `knn`: one for the `knn` nearest images, else
            zero; `linear`: inner product.
        knn: neighbours, at least 1; not read by `linear`. A smaller batch uses all it has.
        force_symmetry: average of the affinities and their transpose.
        rbf_self: `count`: the image itself is its first neighbour, so `knn` = 5 is the distance to
            the fourth other image (official); `skip`: only other images count.
        weight: λ, of the agreement against the network's own probabilities.
        max_steps: iterations, at least 1.
        tolerance: relative change of the energy that ends the iteration.

    One image keeps its probabilities, and so does a batch without a bandwidth; `unchanged` counts
    the adapted batches of both kinds.
    """

    needs = frozenset({"head"})
    batch_dependent = True
    static = True
    counters = ("unchanged",)
    outputs = "probabilities"
    backbone: Any  # a Backbone; the parent promises less
    unchanged: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        affinity: Literal["rbf", "knn", "linear"],
        knn: Count,
        force_symmetry: bool,
        rbf_self: Literal["count", "skip"],
        weight: NonNegative,
        max_steps: Count,
        tolerance: NonNegative,
    ) -> None:
        super().__init__(backbone)
        if affinity == "rbf" and rbf_self == "count" and knn == 1:
            raise UserError(
                "strategy.affinity=rbf with strategy.knn=1 counts each image as its own only "
                "neighbour, at distance zero, and has no bandwidth. Use strategy.knn=2 or more, "
                "or strategy.rbf_self=skip"
            )
        linear_head(backbone, "lame")
        self.backbone.eval().requires_grad_(False)
        self.affinity: dict[str, Any] = {
            "affinity": affinity,
            "knn": knn,
            "force_symmetry": force_symmetry,
            "rbf_self": rbf_self,
        }
        self.solver: dict[str, Any] = {
            "weight": weight,
            "max_steps": max_steps,
            "tolerance": tolerance,
        }
        self.register_buffer("unchanged", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def _assign(self, x: Tensor) -> tuple[Tensor, bool]:
        """Probabilities [B, C], and whether they are other than the network's."""
        features, logits = self.backbone.frozen_features_and_logits(x)
        own = logits.softmax(1)
        kernel = affinity_matrix(features, **self.affinity) if len(x) > 1 else None
        if kernel is None:
            return own, False
        return laplacian_assignments(-(own + 1e-10).log(), kernel, **self.solver)[0], True

    def predict(self, x: Tensor) -> Tensor:
        """Corrected probabilities [B, C] of the batch `x`; the same that `adapt` returns."""
        return self._assign(x)[0]

    def adapt(self, x: Tensor) -> Tensor:
        """Corrected probabilities [B, C] of the batch `x`."""
        scores, changed = self._assign(x)
        self.unchanged += not changed
        return scores

    def report(self) -> dict[str, float]:
        """How many batches kept the network's own probabilities."""
        return {"unchanged_batches": float(self.unchanged)}

    def begin_stream(self) -> None:
        """Nothing moves, so there is nothing to keep."""

    def reset(self) -> None:
        """Nothing to put back: no batch leaves a trace."""
