"""Low-rank updates whose subspaces are mixed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from driftline.core.ranges import NonNegative, Size
from driftline.parts.adapters.adapter import kaiming
from driftline.parts.adapters.lora import LoRA


class MoSLoRA(LoRA):
    """`s * B M A x` with a learned mixer M of the r subspaces; LoRA is M = I, which stays.

    Source: Wu et al., "Mixture-of-Subspaces in Low-Rank Adaptation", EMNLP 2024, arXiv 2406.11909,
    section 3. Checked against the formula in float64.

    Args:
        dim, out: input and output width.
        rank: of A and B.
        scale: s.
        mixer: how M begins: `orthogonal`, or `kaiming` as A (section 3.3 has both).
        generator: of the initial A and M; B starts at 0.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        rank: Size,
        *,
        scale: NonNegative = 1.0,
        mixer: Literal["orthogonal", "kaiming"] = "orthogonal",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, out, rank, scale=scale, generator=generator)
        self.mixer = nn.Parameter(torch.empty(rank, rank))
        if mixer == "kaiming":
            kaiming(self.mixer, generator)
        else:
            nn.init.orthogonal_(self.mixer, generator=generator)

    def _factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        down, up, scales = super()._factors()
        return self.mixer @ down, up, scales

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """None: what is read is a product of two parameters."""
        return []
