"""Some entries of each row of a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.core.errors import UserError
from driftline.core.ranges import Size
from driftline.parts.adapters.adapter import Adapter


class SparseRows(Adapter):
    """`D x` is added, a change of the `entries` largest weights of each output, by magnitude.

    Merged: `W + D`. It needs no images and nothing is drawn. D is laid out as a whole matrix for
    the product, which costs as much as that of the layer; learned and stored are its entries alone.

    Source: Zhang et al., "NeuroAda: Activating Each Neuron's Potential for Parameter-Efficient
    Fine-Tuning", 2025, arXiv 2510.18940, section 3. Checked against training those entries of the
    weight itself. The paper's code computes the product from the entries alone. Not the rule of
    SAFT (Nguyen et al., ECCV 2024), which chooses by the gradient.

    Args:
        module: the frozen linear layer whose output is seen; not a submodule.
        entries: of each row; they start at 0.

    Raises:
        UserError: for more entries than a row has.
    """

    index: Tensor  # int64 [out, entries], columns

    def __init__(self, module: nn.Linear, entries: Size) -> None:
        super().__init__()
        weight = module.weight.detach()
        if entries > weight.shape[1]:
            raise UserError(
                f"strategy.adapter.kind.entries={entries}: a row of the layer has "
                f"{weight.shape[1]}; name fewer"
            )
        chosen = weight.abs().topk(entries, dim=1).indices
        self.register_buffer("index", chosen.sort(1).values)
        self.values = nn.Parameter(torch.zeros(len(weight), entries, device=weight.device))
        self.width = weight.shape[1]

    def change(self) -> Tensor:
        """D [out, dim]."""
        zeros = self.values.new_zeros(len(self.values), self.width)
        return zeros.scatter(1, self.index, self.values)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.change().to(x.dtype))

    @staticmethod
    def add_grouped(  # type: ignore[override]
        adapters: Sequence[SparseRows], x: Tensor, base: Tensor
    ) -> Tensor:
        changes = torch.stack([a.change() for a in adapters]).to(x.dtype)
        return base + (x.flatten(1, -2) @ changes.mT).view(base.shape)

    @staticmethod
    def after_grouped(  # type: ignore[override]
        adapters: Sequence[SparseRows], inp: Tensor, out: Tensor
    ) -> Tensor:
        return SparseRows.add_grouped(adapters, inp, out)
