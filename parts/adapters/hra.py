"""Reflections of what a layer reads."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from annotated_types import Predicate
from torch import Tensor, nn

from driftline.core.ranges import Size
from driftline.kernels import adapter
from driftline.parts.adapters.adapter import Product, kaiming


def even(value: int) -> bool:
    """an even number"""
    return value % 2 == 0


class HRA(Product):
    """`H_1 H_2 ... H_r x` with reflections `H_i = I - 2 u_i u_i' / (u_i' u_i)`.

    Before a linear layer that is the weight `W H_1 ... H_r`. The chain is one low-rank product:
    with the unit rows U in the order in which they act and L the part of U U' below its diagonal,
    `x - 2 U' (I + 2 L)^-1 U x`. So the weight is never multiplied, and the whole costs what LoRA of
    rank r costs.

    At first each vector stands twice, so that two reflections undo each other: the identity up to
    rounding. This is the paper's lambda = 0: the penalty on vectors that are not orthogonal and
    Gram-Schmidt, its limit, are left out.

    Source: Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation via
    Householder Reflection Adaptation", NeurIPS 2024, arXiv 2405.17484, section 3. Checked against
    the weight that the layer of peft 0.21 has with the same vectors.

    Args:
        dim: width of what is read.
        rank: reflections, an even number.
        generator: of the initial vectors.
    """

    def __init__(
        self,
        dim: int,
        rank: Annotated[Size, Predicate(even)],
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        half = torch.empty(rank // 2, dim)
        kaiming(half, generator)
        self.u = nn.Parameter(half.repeat_interleave(2, 0))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Down [r, D] and up [D, r] of the product that is added to x."""
        units = nn.functional.normalize(self.u.flip(0), dim=1)  # the last one acts first
        below = 2 * (units @ units.T).tril(-1)
        eye = torch.eye(len(units), dtype=units.dtype, device=units.device)
        down = torch.linalg.solve_triangular(eye + below, units, upper=False, unitriangular=True)
        return down, -2 * units.T

    def _call(self, x: Tensor, weight: float = 1.0, **residual: Any) -> Tensor:
        return adapter(x, *self.factors(), scale=weight, **residual)

    def before(self, inp: Tensor) -> Tensor:
        return self._call(inp, base=inp)
