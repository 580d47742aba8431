"""Some entries of a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.core.errors import UserError
from driftline.core.ranges import Size
from driftline.parts.adapters.adapter import Adapter


class SparseWeight(Adapter):
    """`D x` is added, a change of some entries of the layer's weight, `entries` for each output.

    Merged: `W + D`. D is laid out as a whole matrix for the product, which costs as much as that of
    the layer; learned and stored are its entries alone.

    Which ones: the largest weights of each output, by magnitude, which needs no images. Source:
    Zhang et al., "NeuroAda: Activating Each Neuron's Potential for Parameter-Efficient
    Fine-Tuning", 2025, arXiv 2510.18940, section 3. Checked against training those entries of the
    weight itself. The paper's code computes the product from the entries alone.

    With `strategy.adapter.start=saft` those whose gradient is largest in magnitude before the
    training (`choose`). Source: Nguyen et al., "SAFT: Towards Out-of-Distribution Generalization in
    Fine-Tuning", ECCV 2024, arXiv 2407.03036, where they are a share of all parameters of the
    network. Here each layer has a number of its own, so that a state has its shapes before images
    are read. Checked against the gradient of the weight itself; no code of the authors is known.

    Args:
        module: the frozen linear layer whose output is seen; not a submodule.
        entries: of the weight, times the number of outputs; they start at 0.

    Raises:
        UserError: for more entries than a row has.
    """

    index: Tensor  # int64 [out, entries], places in the flattened weight, in their order

    def __init__(self, module: nn.Linear, entries: Size) -> None:
        super().__init__()
        weight = module.weight.detach()
        out, self.width = weight.shape
        if entries > self.width:
            raise UserError(
                f"strategy.adapter.kind.entries={entries}: a row of the layer has "
                f"{self.width}; name fewer"
            )
        columns = weight.abs().topk(entries, dim=1).indices.sort(1).values
        first = self.width * torch.arange(out, device=weight.device)
        self.register_buffer("index", first[:, None] + columns)
        self.values = nn.Parameter(torch.zeros(out, entries, device=weight.device))

    @torch.no_grad()
    def choose(self, gradient: Tensor) -> None:
        """Change the entries with the largest gradient instead, as many as before.

        Args:
            gradient: of the loss with respect to the weight, [out, dim].
        """
        places = gradient.abs().flatten().topk(self.index.numel()).indices.sort().values
        self.index.copy_(places.view_as(self.index))

    def change(self) -> Tensor:
        """D [out, dim]."""
        zeros = self.values.new_zeros(len(self.values) * self.width)
        return zeros.scatter(0, self.index.flatten(), self.values.flatten()).view(-1, self.width)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.change().to(x.dtype))

    @staticmethod
    def add_grouped(  # type: ignore[override]
        adapters: Sequence[SparseWeight], x: Tensor, base: Tensor
    ) -> Tensor:
        changes = torch.stack([a.change() for a in adapters]).to(x.dtype)
        return base + (x.flatten(1, -2) @ changes.mT).view(base.shape)

    @staticmethod
    def after_grouped(  # type: ignore[override]
        adapters: Sequence[SparseWeight], inp: Tensor, out: Tensor
    ) -> Tensor:
        return SparseWeight.add_grouped(adapters, inp, out)
