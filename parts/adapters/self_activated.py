"""Low-rank updates whose ranks answer to their own activations."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import MinLen, Predicate
from torch import Tensor

from driftline.core.errors import UserError
from driftline.core.ranges import NonNegative, Positive, Size, distinct
from driftline.parts.adapters.adapter import Adapter
from driftline.parts.adapters.lora import LoRA
from driftline.parts.routing import shares


class SelfActivated(LoRA):
    """`s * sum over ranks of w_i (a_i . x) b_i` with shares w that follow from the a_i . x alone.

    For each token, w is the softmax of the activations, divided by their length and by
    `temperature`, over the `top` largest; the others have none. Every block of rows chooses among
    its own ranks.

    Source: the layer of Lu et al., "Little By Little: Continual Learning via Incremental Mixture of
    Rank-1 Associative Memory Experts" (MoRAM, first named MoRA), arXiv 2506.21035, which the method
    `moram` has with the ranks of all tasks. Checked against that layer.

    Args:
        dim, out, rank, parts, scale, generator: as of `LoRA`.
        top: ranks of a block that answer for a token.
        temperature: of the softmax.

    Raises:
        UserError: for a `top` above `rank`.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        rank: Size,
        *,
        top: Size,
        temperature: Positive,
        parts: Annotated[list[Literal["q", "k", "v"]], MinLen(1), Predicate(distinct)]
        | None = None,
        scale: NonNegative = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, out, rank, parts=parts, scale=scale, generator=generator)
        at = "strategy.adapter.kind"
        if top > rank:
            raise UserError(f"{at}.top={top} is more than {at}.rank={rank}: lower it")
        self.top, self.temperature = top, temperature

    def forward(self, x: Tensor) -> Tensor:
        down, up = self._stacked()
        u = F.linear(x, down).unflatten(-1, (len(self.a), -1))  # [..., blocks, rank]
        w = shares(F.normalize(u, dim=-1), self.top, self.temperature)
        assert self.scale is not None
        return self.scale * F.linear((w * u).flatten(-2), up)

    add = Adapter.add  # not one product, as LoRA's
    add_grouped = Adapter.add_grouped
    after_grouped = Adapter.after_grouped

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """None: what is added differs between tokens."""
        return []
