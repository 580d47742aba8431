"""Rotations of blocks of what a layer reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from driftline.core.errors import UserError
from driftline.core.ranges import Size
from driftline.parts.adapters.adapter import Adapter


class OFT(Adapter):
    """`R' x` with a block-diagonal rotation R, learned as a skew-symmetric Q: OFTv2.

    Cayley's R = (I + Q) (I - Q)^-1 with the first terms of the Neumann series in place of the
    inverse: `(I + Q) (I + Q + ... + Q^k)`, which is orthogonal up to Q^(k + 1). Before a linear
    layer that is the weight `W R'`; the weight itself is never multiplied.

    Source: Qiu et al., "Orthogonal Finetuning Made Scalable", 2025, arXiv 2506.19847.
    Checked against the layer of peft 0.21 with the same numbers, whose `num_cayley_neumann_terms`
    is k + 2.

    Args:
        dim: width of what is read.
        block: channels of each block, a divisor of `dim`; Q starts at 0.
        terms: k.
    """

    rows: Tensor  # [block (block - 1) / 2], of the numbers above Q's diagonal
    columns: Tensor

    def __init__(self, dim: int, block: Size, *, terms: Size = 3) -> None:
        super().__init__()
        if dim % block:
            raise UserError(
                f"strategy.adapter.kind.block={block}: the layer reads {dim} channels, which do "
                "not make whole blocks; name a divisor"
            )
        rows, columns = torch.triu_indices(block, block, 1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.block, self.terms = block, terms
        self.q = nn.Parameter(torch.zeros(dim // block, len(rows)))

    def turn(self) -> Tensor:
        """R - I, [blocks, block, block]."""
        upper = self.q.new_zeros(len(self.q), self.block, self.block)
        upper[:, self.rows, self.columns] = self.q
        skew = upper - upper.mT
        series = skew
        for _ in range(self.terms - 1):
            series = skew + skew @ series  # Q + ... + Q^k
        return skew + series + skew @ series

    def before(self, inp: Tensor) -> Tensor:
        blocks = inp.unflatten(-1, (-1, self.block))
        # R - I and not R: exactly the identity at first, in every type of number
        return inp + torch.einsum("...rk,rkc->...rc", blocks, self.turn()).flatten(-2)
