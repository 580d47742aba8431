"""Low-rank updates that read fixed random directions and write few numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from driftline.core.ranges import NonNegative, Share, Size, Unit
from driftline.parts.adapters.adapter import Adapter
from driftline.parts.adapters.lora import LoRA


class LoRI(LoRA):
    """`s * (M * B) A x` with a fixed random A and a mask M of B.

    As it is made, M lets everything through: the paper's LoRI-D. LoRI-S has the mask of the largest
    numbers of a trained LoRI-D, which `keep_largest` sets, for a loop of your own. With
    `strategy.adapter.start=lori` the mask is there before the training: the numbers of B whose
    gradient on the first batches is largest, those that the first step of LoRI-D would move most.

    Source: Zhang et al., "LoRI: Reducing Cross-Task Interference in Multi-Task Low-Rank
    Adaptation", COLM 2025, arXiv 2504.07448. Checked against the formula in float64.
    What A is drawn from (here LoRA's distribution) was not compared with the authors' code.

    Args:
        dim, out: input and output width.
        rank: of A and B.
        scale: s.
        share: of the numbers of B that `start=lori` lets through; the paper has 0.1. None without.
        generator: of A; B starts at 0.
    """

    mask: Tensor  # bool [out, rank]

    def __init__(
        self,
        dim: int,
        out: int,
        rank: Size,
        *,
        scale: NonNegative = 1.0,
        share: Share | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, out, rank, scale=scale, generator=generator)
        self.a.requires_grad_(False)
        self.share = share
        self.register_buffer("mask", torch.ones(out, rank, dtype=torch.bool))

    @torch.no_grad()
    def choose(self, gradient: Tensor) -> None:
        """Mask all but the numbers of B with the largest gradient.

        Args:
            gradient: of the loss with respect to the layer's weight, [out, dim].
        """
        assert self.share is not None
        slopes = (gradient @ self.a[0].to(gradient).T).abs().flatten()
        chosen = _largest(slopes, max(1, round(self.share * len(slopes))))
        self.mask.copy_(chosen.view_as(self.mask))

    def _factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        down, up, scales = super()._factors()
        return down, up * self.mask, scales

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """None: what is read does not learn."""
        return []


def _largest(sizes: Tensor, count: int) -> Tensor:
    """bool [n], true at the `count` largest of [n]."""
    return torch.zeros_like(sizes, dtype=torch.bool).scatter(0, sizes.topk(count).indices, True)


@torch.no_grad()
def keep_largest(adapters: Iterable[Adapter], share: Unit) -> None:
    """Mask all but the largest numbers of B and start B anew at 0: LoRI-S after LoRI-D.

    Args:
        adapters: a trained set; the numbers of all its `LoRI` are compared with each other.
        share: of the numbers that go on learning; the paper has 0.1.
    """
    members = [a for a in adapters if isinstance(a, LoRI)]
    sizes = torch.cat([a.b[0].abs().flatten() for a in members])
    kept = _largest(sizes, round(share * len(sizes)))
    for a, mask in zip(members, kept.split([a.mask.numel() for a in members]), strict=True):
        a.mask.copy_(mask.view_as(a.mask))
        a.b[0].zero_()
