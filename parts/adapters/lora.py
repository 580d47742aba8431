"""Low-rank updates of linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import MinLen, Predicate
from torch import Tensor, nn

from driftline.core.ranges import NonNegative, Size, distinct
from driftline.kernels import adapter
from driftline.parts.adapters.adapter import Product, kaiming


class Factored(Product):
    """Adds one low-rank product `scale * up down x`; a subclass says what its factors are."""

    scale: float | None  # None: 1, the factors have what scales them

    def _factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Down [R, dim] and up [out, R]; scales of the R columns of `up`, [R], or None."""
        raise NotImplementedError

    def _call(self, x: Tensor, weight: float = 1.0, **residual: Any) -> Tensor:
        down, up, columns = self._factors()
        scale = weight * (1.0 if self.scale is None else self.scale)
        return adapter(x, down, up, scale=scale, rank_scale=columns, **residual)

    @staticmethod
    def add_grouped(  # type: ignore[override]
        adapters: Sequence[Factored], x: Tensor, base: Tensor
    ) -> Tensor:
        down, up, columns = zip(*(a._factors() for a in adapters), strict=True)
        return adapter(
            x,
            torch.stack(down),
            torch.stack(up),
            scale=1.0 if adapters[0].scale is None else adapters[0].scale,
            rank_scale=None if columns[0] is None else torch.stack(columns),
            base=base,
            in_place=True,
        )

    @staticmethod
    def after_grouped(  # type: ignore[override]
        adapters: Sequence[Factored], inp: Tensor, out: Tensor
    ) -> Tensor:
        return Factored.add_grouped(adapters, inp, out)


class LoRA(Factored):
    """Low-rank update of some row blocks of a linear layer: `sum over blocks of s * B A x`.

    Args:
        dim: input width.
        out: output width of the layer.
        parts: of a fused qkv, each a block of its own; None: one block of all rows.
        rank: of each block.
        scale: fixed factor; None makes one learnable scalar a block that starts at 1 (LAE).
        generator: of the initial A; B starts at 0.
    """

    start_down: Tensor | None  # [R, dim], A0 of all blocks; None: nothing is taken off
    start_up: Tensor | None  # [out, R], B0

    def __init__(
        self,
        dim: int,
        out: int,
        rank: Size,
        *,
        parts: Annotated[list[Literal["q", "k", "v"]], MinLen(1), Predicate(distinct)]
        | None = None,
        scale: NonNegative | None = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        third = out // 3
        starts = [third * "qkv".index(part) for part in parts or ()]
        rows = [(start, start + third) for start in starts] or [(0, out)]
        self.rows, self.out = tuple(rows), out
        self.a = nn.ParameterList(nn.Parameter(torch.empty(rank, dim)) for _ in rows)
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(e - s, rank)) for s, e in rows)
        for a in self.a:
            kaiming(a, generator)
        learned = [nn.Parameter(torch.ones(())) for _ in rows] if scale is None else []
        self.scales = nn.ParameterList(learned)
        self.scale = scale
        self.register_buffer("start_down", None)
        self.register_buffer("start_up", None)

    @torch.no_grad()
    def begin(self, pairs: Sequence[tuple[Tensor, Tensor]], *, kept: bool) -> None:
        """Go on from these factors (`parts/adapters/starts.py`).

        Args:
            pairs: A [rank, dim] and B [rows of the block, rank], one pair a block.
            kept: their product is taken off again, so that nothing is added: `s (B A - B0 A0) x`.
        """
        for a, b, (down, up) in zip(self.a, self.b, pairs, strict=True):
            a.copy_(down)
            b.copy_(up)
        if kept:
            self.start_down, self.start_up = (t.clone() for t in self._stacked())

    def _stacked(self) -> tuple[Tensor, Tensor]:
        """A and B of all blocks as one pair of rank R: [R, dim], [out, R]."""
        rows = zip(self.rows, self.b, strict=True)
        up = [F.pad(b, (0, 0, start, self.out - stop)) for (start, stop), b in rows]
        return torch.cat(list(self.a)), torch.cat(up, 1)

    def _factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is added as one pair, [R, dim], [out, R]; learned scales by column [R]."""
        down, up = self._stacked()
        scales = None
        if self.scale is None:
            ranks = zip(self.scales, self.a, strict=True)
            scales = torch.cat([s.expand(len(a)) for s, a in ranks])
        if self.start_down is None or self.start_up is None:
            return down, up, scales
        # B A - B0 A0 = (B - B0) A + B0 (A - A0), which is exactly 0 at the start.
        down = torch.cat([down, down - self.start_down])
        up = torch.cat([up - self.start_up, self.start_up], 1)
        return down, up, scales if scales is None else scales.repeat(2)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Empty where a start is taken off: what is added is no product of two parameters."""
        return [] if self.start_down is not None else list(zip(self.a, self.b, strict=True))
