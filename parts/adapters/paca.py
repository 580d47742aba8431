"""Some columns of a weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.core.errors import UserError
from driftline.core.ranges import Size
from driftline.parts.adapters.adapter import Adapter


class PaCA(Adapter):
    """`P x[columns]` is added: the change of `columns` of a weight, drawn once.

    Nothing is read but the inputs of these columns, so the backward pass keeps r of D numbers a
    token and has no second product as LoRA has. Merged: `W[:, columns] + P`.

    Source: Woo et al., "PaCA: Partial Connection Adaptation for Efficient Fine-Tuning", ICLR 2025,
    arXiv 2503.01905, section 3. Checked against training those columns of the weight itself.

    Args:
        dim, out: input and output width.
        columns: how many.
        generator: of their choice; P starts at 0.
    """

    chosen: Tensor  # [columns]

    def __init__(
        self, dim: int, out: int, columns: Size, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        if columns > dim:
            raise UserError(
                f"strategy.adapter.kind.columns={columns}: the layer has {dim} columns; name fewer"
            )
        self.register_buffer("chosen", torch.randperm(dim, generator=generator)[:columns])
        self.p = nn.Parameter(torch.zeros(out, columns))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x[..., self.chosen], self.p)
