"""Low-rank updates whose factors are sums of random matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from driftline.core.ranges import NonNegative, Seed, Size
from driftline.parts.adapters.lora import Factored
from driftline.parts.adapters.seeded import seeded


class NOLA(Factored):
    """`s * B A x` with `A = A_0 + sum of alpha_i A_i` and `B = sum of beta_j B_j`.

    The coefficients alone learn. The random matrices follow from `seed`: they take memory once for
    all layers of the same widths in all sets (`bases * rank * (dim + out)` numbers), and are in no
    saved file.

    Source: Koohpayegani et al., "NOLA: Compressing LoRA using Linear Combination of Random Basis",
    ICLR 2024, arXiv 2310.02556; start and distributions as in gpt/src/model_nola.py of
    UCDvision/NOLA e009fdc, which draws every layer's matrices anew in each pass. Checked against
    the formula in float64.

    Args:
        dim, out: input and output width.
        rank: of A and B.
        bases: i and j run up to here.
        scale: s.
        seed: of A_0 as in LoRA, and of A_i and B_j, U(-1, 1) / sqrt(bases); all coefficients
            start at 0.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        rank: Size,
        bases: Size,
        *,
        scale: NonNegative = 1.0,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        first, others = dim**-0.5, bases**-0.5
        shapes = (rank, dim), (bases, rank, dim), (bases, out, rank)
        self._drawn = seeded(seed, *zip(shapes, (first, others, others), strict=True))
        self.alpha, self.beta = (nn.Parameter(torch.zeros(bases)) for _ in range(2))
        self.scale = scale

    def _factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        first, of_a, of_b = self._drawn.like(self.alpha)
        down = first + torch.einsum("k,krd->rd", self.alpha, of_a)
        return down, torch.einsum("k,kor->or", self.beta, of_b), None
