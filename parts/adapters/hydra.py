"""A low-rank branch beside a layer and one behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from driftline.core.ranges import NonNegative, Size
from driftline.parts.adapters.adapter import Adapter
from driftline.parts.adapters.lora import LoRA


class Hydra(Adapter):
    """`y + s (B A x + D C y)` for the output y of a layer: a parallel and a sequential branch.

    Merged into a linear layer: `W + s (B A + D C W)`, and `bias + s D C bias`.

    Source: Kim et al., "Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning",
    Neural Networks 2024, arXiv 2309.06922, section 3. Checked against the formula in float64.

    Args:
        dim, out: input and output width of the layer.
        rank: of each branch; the paper halves that of LoRA for the same number of parameters.
        scale: s.
        generator: of the initial A and C; B and D start at 0.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        rank: Size,
        *,
        scale: NonNegative = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.beside = LoRA(dim, out, rank, scale=scale, generator=generator)
        self.behind = LoRA(out, out, rank, scale=scale, generator=generator)

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        return self.beside.add(inp, out + self.behind(out))
