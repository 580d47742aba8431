"""Relaxed reflections on both sides of a weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.core.errors import UserError
from driftline.core.ranges import Size
from driftline.kernels import adapter
from driftline.parts.adapters.adapter import Adapter, kaiming


class EtherPlus(Adapter):
    """ETHER+: the weight `H2 W H1`, each H block-diagonal with blocks `I - u u' + v v'`.

    u and v are unit vectors; at first v = -u, which gives the identity up to rounding. Plain ETHER,
    `I - 2 u u'`, is a reflection and never the identity, so it cannot be a kind. Both sides are
    low-rank products, `y + (W V1) U1 x` and the same on the output without its bias, so no weight
    of the layer's size is made.

    Source: Bini et al., "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane
    Reflections", ICML 2024, arXiv 2405.20271; v = -u as in mwbini/ether d28e47f. That
    code cuts the weight of the input's side into blocks of rows, not of columns; here it is the
    paper's block-diagonal matrix. Checked against the formula in float64.

    Args:
        module: the frozen linear layer; not a submodule.
        blocks: of each H, a divisor of both widths.
        generator: of the initial u.
    """

    def __init__(
        self, module: nn.Linear, blocks: Size, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        for width in (module.in_features, module.out_features):
            if width % blocks:
                raise UserError(
                    f"strategy.adapter.kind.blocks={blocks}: the layer has a width of {width}, "
                    "which does not make whole blocks; name a divisor"
                )
        self._linear = [module]
        self.u, self.v = nn.ParameterList(), nn.ParameterList()  # of the input, of the output
        for width in (module.in_features, module.out_features):
            start = torch.empty(blocks, width // blocks)
            kaiming(start, generator)
            self.u.append(nn.Parameter(start))
            self.v.append(nn.Parameter(-start))

    def factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Down and up of H1 - I, [2 blocks, D_in] and [D_in, 2 blocks], then of H2 - I."""
        sides = []
        for u, v in zip(self.u, self.v, strict=True):
            out, back = (torch.block_diag(*F.normalize(w, dim=1)[:, None]) for w in (u, v))
            sides += [torch.cat([out, back]), torch.cat([-out, back]).T]
        return sides[0], sides[1], sides[2], sides[3]

    def _act(self, factors: Sequence[Tensor], inp: Tensor, out: Tensor) -> Tensor:
        """The new output; with factors of T adapters [T, ...] on T chunks."""
        down, up, down_out, up_out = factors
        weight, bias = self._linear[0].weight, self._linear[0].bias
        y = adapter(inp, down, weight @ up, base=out, in_place=True)
        shift = None if bias is None else -(down_out @ bias)  # H2 acts on what the weight gives
        return adapter(y, down_out, up_out, down_bias=shift, add_input=True)

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        return self._act(self.factors(), inp, out)

    @staticmethod
    def after_grouped(  # type: ignore[override]
        adapters: Sequence[EtherPlus], inp: Tensor, out: Tensor
    ) -> Tensor:
        rows = zip(*(a.factors() for a in adapters), strict=True)
        return adapters[0]._act([torch.stack(row) for row in rows], inp, out)
