"""Two low-rank updates of very different rank, weighted per call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from driftline.core.ranges import Size
from driftline.parts.adapters.lora import Factored


class DualRank(Factored):
    """`s1 * up1 down1 x + s2 * up2 down2 x`, a pair of very different rank (ViDA).

    Computed as one product of rank r1 + r2. The scales are a buffer that a method sets.

    Args:
        dim, out: input and output width.
        low, high: ranks r1 and r2.
        generator: of both `down`, N(0, 1/rank^4); both `up` start at 0.
    """

    scale = None  # one for each of the two
    scales: Tensor  # [2]

    def __init__(
        self,
        dim: int,
        out: int,
        low: Size,
        high: Size,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        draws = [torch.empty(r, dim).normal_(0, 1 / r**2, generator=generator) for r in (low, high)]
        self.down = nn.ParameterList(nn.Parameter(d) for d in draws)
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(out, r)) for r in (low, high))
        self.register_buffer("scales", torch.ones(2))

    def _factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = zip(self.scales.unbind(), self.down, strict=True)
        columns = torch.cat([scale.expand(len(down)) for scale, down in rows])
        return torch.cat(list(self.down)), torch.cat(list(self.up), 1), columns

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.down, self.up, strict=True))
