"""A bottleneck that learns part by part."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from driftline.core.errors import UserError
from driftline.core.ranges import NonNegative, Size
from driftline.parts.adapters.bottleneck import Bottleneck


class MoSA(Bottleneck):
    """A bottleneck whose weights are split at random into parts, none of which overlap.

    A training pass draws one part of the down-projection and one of the up-projection; the numbers
    of the other parts count as they began, so that these two alone get a gradient. In evaluation
    all count: the merged adapter, which is an ordinary bottleneck. Biases always learn.

    Source: Zhang et al., "MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning", 2023,
    arXiv 2312.02923, and Theia-4869/MoSA, read and not run: there every expert has biases of its
    own, a LayerNorm stands in front, the activation is GELU and one projection can be shared. They
    are left out, as is the second pass of its training with a loss that both agree. Checked against
    the formula.

    Args:
        dim, rank, act, scale, generator: as of `Bottleneck`; the parts are drawn after the weights.
        experts: number of parts. Those of a pass are drawn from torch's global generator, like
            dropout; checkpoints contain it.

    Raises:
        UserError: for more parts than a projection has numbers.
    """

    part_down: Tensor  # int16 [rank, dim], the part of each number
    part_up: Tensor  # int16 [dim, rank]
    start_down: Tensor  # [rank, dim], as it began; the up-projection began at 0

    def __init__(
        self,
        dim: int,
        rank: Size,
        *,
        experts: Size,
        act: Literal["relu", "gelu"] = "relu",
        scale: NonNegative | None = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, rank, act=act, scale=scale, generator=generator)
        if experts > (most := dim * rank):
            raise UserError(
                f"strategy.adapter.kind.experts={experts}: a projection at this point has {most} "
                "numbers, and a part without one learns nothing; lower it"
            )
        self.experts = experts
        for name, layer in (("part_down", self.down), ("part_up", self.up)):
            drawn = torch.rand(layer.weight.shape, generator=generator)
            self.register_buffer(name, split(drawn, experts))
        self.register_buffer("start_down", self.down.weight.detach().clone())

    def _weights(self) -> tuple[Tensor, Tensor]:
        down, up = super()._weights()
        if not self.training:
            return down, up
        of_down, of_up = torch.randint(self.experts, (2,)).tolist()
        down = torch.where(self.part_down == of_down, down, self.start_down)
        return down, torch.where(self.part_up == of_up, up, 0)


def split(drawn: Tensor, parts: int) -> Tensor:
    """The part 0 ... parts - 1 of each number of a matrix, int16, of sizes that differ by one.

    Args:
        drawn: random numbers, as many; their order decides.
    """
    order = drawn.flatten().argsort().argsort()
    return (order % parts).to(torch.int16).view_as(drawn)
