"""A low-rank update of the direction of a weight, and a magnitude of each of its rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from driftline.core.ranges import NonNegative, Size
from driftline.kernels import adapter
from driftline.kernels.dora import Kept, weight_norm
from driftline.parts.adapters.adapter import Adapter, kaiming


class DoRA(Adapter):
    """Magnitude and direction of a linear layer, the direction with a low-rank update.

    `m / n * (W + s B A) x + bias`, n_j the norm of row j of `W + s B A`, a constant in the backward
    pass. From the layer's output y that is `m / n * (y + s B A x) + (1 - m / n) * bias`.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, section 4.

    Args:
        module: the frozen linear layer whose output is seen; not a submodule.
        rank, scale: of the update.
        generator: of the initial A; B starts at 0 and m at the norms of W.
    """

    def __init__(
        self,
        module: nn.Linear,
        rank: Size,
        *,
        scale: NonNegative = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self._linear, self._kept = [module], Kept()
        self.a = nn.Parameter(torch.empty(rank, module.in_features))
        self.b = nn.Parameter(torch.zeros(module.out_features, rank))
        kaiming(self.a, generator)
        self.scale = scale
        self.magnitude = nn.Parameter(self._norm().clone())

    def _norm(self) -> Tensor:
        parts = self._linear[0].weight, self.a, self.b, self.scale
        if not torch.is_grad_enabled():
            return self._kept.get(weight_norm, *parts)
        with torch.no_grad():
            return weight_norm(*parts)

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        factor, bias = self.magnitude / self._norm(), self._linear[0].bias
        options = {"scale": self.scale, "column_scale": factor, "in_place": True}
        y = adapter(inp, self.a, self.b, base=out, **options)
        return y if bias is None else y + (1 - factor) * bias
