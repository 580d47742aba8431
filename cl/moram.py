"""MoRAM: every rank of a low-rank update is an expert that answers to its own activation.

Paper: Lu et al., "Little By Little: Continual Learning via Incremental Mixture of Rank-1
Associative Memory Experts", arXiv 2506.21035 (in its first version: MoRA, "Self-Activated Sparse
Mixture-of-Rank Adaptive Learning"). Official code: Artificer-AI-Lab/MoRAM 05c3d61,
`XTAIL/loralib/moram.py` and `XTAIL/models/moram.py`, for CLIP; read, not run: no recorded numbers
exist. Every linear layer of the blocks computes for each token x, for each of q, k, v and each
other layer by itself, with the ranks (a_i, b_i) of all tasks so far,

    W x + sum over i of w_i u_i b_i      u_i = a_i . x,    s = u / |u|

where w is the softmax of s / `temperature` over the `top_k` largest s, 0 elsewhere, and in
evaluation also 0 where s is below `threshold` (the other weights stay as they are). Only the ranks
of the present task learn. s keeps its sign: a rank with a strongly negative activation is not
chosen. There is no loss beside that of the task.

This is a port to vision transformers without a text encoder, as in `cl/codyra.py`: an expanding
linear head, trained by the cross-entropy over the classes of the task, stands for the embedded
class names; the second term of the official loss, from texts to images, and the updates of the text
encoder are left out. Not to be mixed up with MoRA for language models (arXiv 2405.12130).

Deviations that change no number: q, k and v share a matrix product. That do: where there are fewer
than `top_k` ranks, all of them are chosen (the official code stops).
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le, MinLen
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.codyra import NewRanks, projections
from driftline.core.ranges import Count, Positive, Size
from driftline.parts.adapters.adapter import Adapter, kaiming
from driftline.parts.optim import Optim
from driftline.parts.routing import shares


class RankExperts(Adapter):
    """Ranks of all tasks of a linear layer, mixed for each token by their own activations.

    Args:
        dim, out: input and output width of the layer.
        rank: new ranks a projection.
        top_k, temperature, threshold: see the top of the file.
        generator: of a, U(-1/sqrt(dim), 1/sqrt(dim)); b starts at 0.
    """

    old_a: Tensor  # [P, R, dim]
    old_b: Tensor  # [P, out / P, R]

    def __init__(
        self,
        dim: int,
        out: int,
        rank: Size,
        *,
        top_k: Size,
        temperature: Positive,
        threshold: Positive | None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        parts = projections(dim, out)
        self.top_k, self.temperature, self.threshold = top_k, temperature, threshold
        self.register_buffer("old_a", torch.zeros(parts, 0, dim))
        self.register_buffer("old_b", torch.zeros(parts, out // parts, 0))
        self.a = nn.Parameter(torch.empty(parts, rank, dim))
        self.b = nn.Parameter(torch.zeros(parts, out // parts, rank))
        self._start(generator)

    @torch.no_grad()
    def _start(self, generator: torch.Generator | None) -> None:
        self.a, self.b = (nn.Parameter(torch.zeros_like(p)) for p in (self.a, self.b))
        kaiming(self.a.flatten(0, 1), generator)

    @torch.no_grad()
    def extend(self, generator: torch.Generator | None) -> None:
        """Add the ranks of a task to the earlier ones and start new ones (new parameters)."""
        self.old_a = torch.cat([self.old_a, self.a], 1)
        self.old_b = torch.cat([self.old_b, self.b], 2)
        self._start(generator)

    def weights(self, activations: Tensor) -> Tensor:
        """w [..., R] from u [..., R]."""
        score = F.normalize(activations, dim=-1)
        weights = shares(score, self.top_k, self.temperature)
        if not self.training and self.threshold is not None:
            weights = weights * (score >= self.threshold)
        return weights

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.cat([self.old_a, self.a], 1), torch.cat([self.old_b, self.b], 2)
        u = F.linear(x, a.flatten(0, 1)).unflatten(-1, a.shape[:2])  # [..., P, R]
        return torch.einsum("...pr,por->...po", self.weights(u) * u, b).flatten(-2)


class MoRAM(NewRanks):
    """A frozen transformer, self-activated ranks of all tasks so far, an expanding linear head.

    Args:
        num_classes: classes of the whole stream.
        epochs: passes over the training images of a task.
        rank: new ranks a task, of q, k, v and of every other layer.
        at: linear layers that are updated, as patterns.
        top_k: ranks a token and projection, of all tasks together, at least 2.
        temperature: of the softmax over them.
        threshold: of s in evaluation; None: all that are chosen count.
        optim: of the groups `backbone` (the new ranks) and `head`, made anew for each task. Its
            times (`rise`, `milestones`) count steps, not epochs.

    Raises:
        UserError: for a network without these layers.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        rank: Size,
        at: Annotated[list[str], MinLen(1)],
        top_k: Annotated[int, Ge(2), Le(2**14)],
        temperature: Positive,
        threshold: Positive | None,
        optim: Optim,
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optim=optim,
            kind=partial(
                RankExperts,
                rank=rank,
                top_k=top_k,
                temperature=temperature,
                threshold=threshold,
            ),
            at=at,
        )
