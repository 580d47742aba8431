"""A factor and a summand for each channel of a module's output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from driftline.core.ranges import NonNegative
from driftline.parts.adapters.adapter import Adapter


class ScaleShift(Adapter):
    """`y * scale + shift` after a module (SSF).

    Args:
        out: last dimension of the module's output.
        std: of the initial draws, N(1, std^2) and N(0, std^2); 0 starts at the identity.
    """

    def __init__(
        self, out: int, *, std: NonNegative = 0.02, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        draw = [torch.empty(out).normal_(0, 1, generator=generator) * std for _ in range(2)]
        self.scale, self.shift = nn.Parameter(1 + draw[0]), nn.Parameter(draw[1])

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        return out * self.scale + self.shift
