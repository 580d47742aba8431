"""A hidden vector between two linear layers, beside, before or after a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from driftline.core.distributed import dropout
from driftline.core.ranges import Below1, NonNegative, Size
from driftline.kernels import adapter
from driftline.parts.adapters.adapter import Adapter, Product, kaiming


class Bottleneck(Product):
    """`scale * (up(dropout(act(down(x)))))` with biases.

    Args:
        dim: width D.
        rank: hidden width.
        act: `relu` (EASE, MOS, APER) or `gelu` (LAE).
        scale: fixed factor; None makes it a learnable scalar that starts at 1 (LAE).
        dropout: on the hidden vector, in training only.
        generator: of the initial down weights; up and both biases start at 0.
        after: at the point `out`, what is returned. `parallel`: out + forward(inp); `serial`:
            out + forward(out); `skip_input`: inp + forward(out) (LAE's `after` mode).
    """

    def __init__(
        self,
        dim: int,
        rank: Size,
        *,
        act: Literal["relu", "gelu"] = "relu",
        scale: NonNegative | None = 0.1,
        dropout: Below1 = 0.0,
        after: Literal["parallel", "serial", "skip_input"] = "parallel",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, rank), nn.Linear(rank, dim)
        kaiming(self.down.weight, generator)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.act, self.dropout, self.placement = act, dropout, after
        self.scale = nn.Parameter(torch.ones(())) if scale is None else scale

    def _keep(self, x: Tensor) -> Tensor | None:
        """Dropout as factors of the hidden vectors, [..., rank]."""
        if not (self.training and self.dropout):
            return None
        return dropout(x.new_ones(*x.shape[:-1], self.down.out_features), self.dropout)

    def _weights(self) -> tuple[Tensor, Tensor]:
        """Down [rank, D] and up [D, rank] of this pass."""
        return self.down.weight, self.up.weight

    def _call(self, x: Tensor, weight: float = 1.0, **residual: Any) -> Tensor:
        return adapter(
            x,
            *self._weights(),
            down_bias=self.down.bias,
            up_bias=self.up.bias,
            act=self.act,
            scale=self.scale if weight == 1 else weight * self.scale,
            keep=self._keep(x),
            **residual,
        )

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.down.weight, self.up.weight)] if self.placement == "parallel" else []

    def before(self, inp: Tensor) -> Tensor:
        return self._call(inp, add_input=True)

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        if self.placement == "parallel":
            return self.add(inp, out)
        if self.placement == "serial":
            return self._call(out, add_input=True)
        return self._call(out, base=inp)

    @staticmethod
    def _stacked(adapters: Sequence[Bottleneck], x: Tensor, **more: Any) -> Tensor:
        """One call for T adapters: chunks of x [T, B, N, D], or samples by `index`."""
        first = adapters[0]
        down, up = zip(*(a._weights() for a in adapters), strict=True)
        scale = first.scale
        if isinstance(scale, Tensor):
            scale = torch.stack([torch.as_tensor(a.scale) for a in adapters])
        return adapter(
            x,
            torch.stack(down),
            torch.stack(up),
            down_bias=torch.stack([a.down.bias for a in adapters]),
            up_bias=torch.stack([a.up.bias for a in adapters]),
            act=first.act,
            scale=scale,
            **more,
        )

    @staticmethod
    def add_grouped(  # type: ignore[override]
        adapters: Sequence[Bottleneck], x: Tensor, base: Tensor
    ) -> Tensor:
        if any(a.training and a.dropout for a in adapters):
            return Adapter.add_grouped(adapters, x, base)
        return Bottleneck._stacked(adapters, x, base=base, in_place=True)

    @staticmethod
    def after_grouped(  # type: ignore[override]
        adapters: Sequence[Bottleneck], inp: Tensor, out: Tensor
    ) -> Tensor:
        placement = adapters[0].placement
        if placement == "parallel":
            return Bottleneck.add_grouped(adapters, inp, out)
        if any(a.training and a.dropout for a in adapters):
            return Adapter.after_grouped(adapters, inp, out)
        return Bottleneck._stacked(adapters, out, base=out if placement == "serial" else inp)

    @staticmethod
    def add_indexed(
        adapters: Sequence[Bottleneck], index: Tensor, x: Tensor, base: Tensor
    ) -> Tensor:
        """`add` in evaluation mode, sample b [N, D] through adapter index[b], int64 [B].

        Without gradients only.
        """
        return Bottleneck._stacked(adapters, x, index=index, base=base, in_place=True)
