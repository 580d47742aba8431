"""Small trainable modules beside a frozen transformer; `backbones/bank.py` attaches them.

Every adapter is exactly the identity when created. What one does is said by the point at which it
is attached (`blocks.3.mlp:parallel`) and by the method of that point:

| point    | where it acts                                                   | method            |
|----------|-----------------------------------------------------------------|-------------------|
| parallel | beside an MLP: reads the residual stream u before norm2, joins  | `add(u, y)`       |
|          | the block's output y                                            |                   |
| out      | at a module: sees input and output, returns the new output      | `after(inp, out)` |
| in       | before a module: returns the new input                          | `before(inp)`     |
| keys     | in attention: rows put in after the class token                 | `rows()`          |
| tokens   | around a block (or all): tokens appended behind the image's     | `tokens()`        |

Products and additions are one operation, `kernels.adapter`, whose backend no method knows.

Sources: AdaptFormer as in EASE/MOS/APER (sun-hailong/CVPR24-Ease 6d67508, LAMDA-PILOT 5240714),
LAE's three modules (gqk/LAE 1680e49), SSF and VPT as in LAMDA-PILOT; the others at their classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.distributed import dropout
from kernels import adapter
from kernels.dora import Kept, weight_norm


def _kaiming(weight: Tensor, generator: torch.Generator | None) -> None:
    """Kaiming-uniform with a = sqrt(5): U(-1/sqrt(d_in), 1/sqrt(d_in))."""
    with torch.no_grad():
        bound = 1 / math.sqrt(weight.shape[1])
        weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))


class Adapter(nn.Module):
    """Base of all adapters; a subclass defines the methods of the points that it can serve."""

    def forward(self, x: Tensor) -> Tensor:
        """What is added, from the tokens [B, N, D] that are read."""
        raise NotImplementedError

    def add(self, x: Tensor, base: Tensor, weight: float = 1.0) -> Tensor:
        """`base + weight * forward(x)`; without gradients `base` may be overwritten."""
        added = self(x)
        return base + (added if weight == 1 else weight * added)

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        """New output of a module; without gradients `out` may be overwritten."""
        return self.add(inp, out)

    def before(self, inp: Tensor) -> Tensor:
        """New input of a module."""
        return inp + self(inp)

    @staticmethod
    def add_grouped(adapters: Sequence[Adapter], x: Tensor, base: Tensor) -> Tensor:
        """`add` of T adapters on T chunks: x [T, B, N, D], base [T, B, N, D_out]."""
        return torch.stack([a.add(i, o) for a, i, o in zip(adapters, x, base, strict=True)])

    @staticmethod
    def after_grouped(adapters: Sequence[Adapter], inp: Tensor, out: Tensor) -> Tensor:
        """`after` of T adapters on T chunks, as in `add_grouped`."""
        return torch.stack([a.after(i, o) for a, i, o in zip(adapters, inp, out, strict=True)])


class Bottleneck(Adapter):
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
        rank: int,
        *,
        act: Literal["relu", "gelu"] = "relu",
        scale: float | None = 0.1,
        dropout: float = 0.0,
        after: Literal["parallel", "serial", "skip_input"] = "parallel",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, rank), nn.Linear(rank, dim)
        _kaiming(self.down.weight, generator)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.act, self.dropout, self.placement = act, dropout, after
        self.scale = nn.Parameter(torch.ones(())) if scale is None else scale

    def _keep(self, x: Tensor) -> Tensor | None:
        """Dropout as factors of the hidden vectors, [..., rank]."""
        if not (self.training and self.dropout):
            return None
        return dropout(x.new_ones(*x.shape[:-1], self.down.out_features), self.dropout)

    def _call(self, x: Tensor, weight: float = 1.0, **residual: Any) -> Tensor:
        return adapter(
            x,
            self.down.weight,
            self.up.weight,
            down_bias=self.down.bias,
            up_bias=self.up.bias,
            act=self.act,
            scale=self.scale if weight == 1 else weight * self.scale,
            keep=self._keep(x),
            **residual,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)

    def add(self, x: Tensor, base: Tensor, weight: float = 1.0) -> Tensor:
        return self._call(x, weight, base=base, in_place=True)

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
        scale = first.scale
        if isinstance(scale, Tensor):
            scale = torch.stack([torch.as_tensor(a.scale) for a in adapters])
        return adapter(
            x,
            torch.stack([a.down.weight for a in adapters]),
            torch.stack([a.up.weight for a in adapters]),
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


class LoRA(Adapter):
    """Low-rank update of some row blocks of a linear layer: `sum over blocks of s * B A x`.

    Args:
        dim: input width.
        rows: output rows of each block, e.g. `[(0, d), (2 * d, 3 * d)]` for q and v of a fused qkv.
        out: output width of the layer.
        rank: of each block.
        scale: fixed factor; None makes one learnable scalar a block that starts at 1 (LAE).
        generator: of the initial A; B starts at 0.
    """

    def __init__(
        self,
        dim: int,
        rows: Sequence[tuple[int, int]],
        out: int,
        rank: int,
        *,
        scale: float | None = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.out = tuple(rows), out
        self.a = nn.ParameterList(nn.Parameter(torch.empty(rank, dim)) for _ in rows)
        self.b = nn.ParameterList(nn.Parameter(torch.zeros(e - s, rank)) for s, e in rows)
        for a in self.a:
            _kaiming(a, generator)
        learned = [nn.Parameter(torch.ones(())) for _ in rows] if scale is None else []
        self.scales = nn.ParameterList(learned)
        self.scale = scale

    def _factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """All blocks as one pair of rank R: [R, dim], [out, R]; learned scales by column [R]."""
        rows = zip(self.rows, self.b, strict=True)
        up = [F.pad(b, (0, 0, start, self.out - stop)) for (start, stop), b in rows]
        scales = None
        if self.scale is None:
            ranks = zip(self.scales, self.a, strict=True)
            scales = torch.cat([s.expand(len(a)) for s, a in ranks])
        return torch.cat(list(self.a)), torch.cat(up, 1), scales

    def _call(self, x: Tensor, weight: float = 1.0, **residual: Any) -> Tensor:
        down, up, columns = self._factors()
        scale = weight * (1.0 if self.scale is None else self.scale)
        return adapter(x, down, up, scale=scale, rank_scale=columns, **residual)

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)

    def add(self, x: Tensor, base: Tensor, weight: float = 1.0) -> Tensor:
        return self._call(x, weight, base=base, in_place=True)

    @staticmethod
    def add_grouped(  # type: ignore[override]
        adapters: Sequence[LoRA], x: Tensor, base: Tensor
    ) -> Tensor:
        down, up, columns = zip(*(a._factors() for a in adapters), strict=True)
        return adapter(
            x,
            torch.stack(down),
            torch.stack(up),
            scale=1.0 if adapters[0].scale is None else adapters[0].scale,
            rank_scale=None if adapters[0].scale is not None else torch.stack(columns),
            base=base,
            in_place=True,
        )

    @staticmethod
    def after_grouped(  # type: ignore[override]
        adapters: Sequence[LoRA], inp: Tensor, out: Tensor
    ) -> Tensor:
        return LoRA.add_grouped(adapters, inp, out)


class DoRA(Adapter):
    """Magnitude and direction of a linear layer, the direction with a low-rank update.

    `m / n * (W + s B A) x + bias`, n_j the norm of row j of `W + s B A`, a constant in the backward
    pass. From the layer's output y that is `m / n * (y + s B A x) + (1 - m / n) * bias`.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, section 4.

    Args:
        linear: the frozen layer whose output is seen; not a submodule.
        rank, scale: of the update.
        generator: of the initial A; B starts at 0 and m at the norms of W.
    """

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        *,
        scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self._linear, self._kept = [linear], Kept()
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        _kaiming(self.a, generator)
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


class DualRank(Adapter):
    """`s1 * up1 down1 x + s2 * up2 down2 x`, a pair of very different rank (ViDA).

    Computed as one product of rank r1 + r2. The scales are a buffer that a method sets.

    Args:
        dim, out: input and output width.
        low, high: ranks r1 and r2.
        generator: of both `down`, N(0, 1/rank^4); both `up` start at 0.
    """

    scales: Tensor  # [2]

    def __init__(
        self,
        dim: int,
        out: int,
        low: int,
        high: int,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        draws = [torch.empty(r, dim).normal_(0, 1 / r**2, generator=generator) for r in (low, high)]
        self.down = nn.ParameterList(nn.Parameter(d) for d in draws)
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(out, r)) for r in (low, high))
        self.register_buffer("scales", torch.ones(2))

    def _call(self, x: Tensor, weight: float = 1.0, **residual: Any) -> Tensor:
        return dual_rank(x, list(self.down), list(self.up), self.scales, weight, **residual)

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)

    def add(self, x: Tensor, base: Tensor, weight: float = 1.0) -> Tensor:
        return self._call(x, weight, base=base, in_place=True)


def dual_rank(
    x: Tensor,
    down: Sequence[Tensor],
    up: Sequence[Tensor],
    scales: Tensor,
    weight: float = 1.0,
    **residual: Any,
) -> Tensor:
    """`[base +] weight * sum_i scales[i] * up[i] down[i] x` as one pair of rank r1 + r2.

    Args:
        x: [..., dim].
        down, up: [r_i, dim] and [out, r_i] each.
        scales: [number of pairs], stays on its device.
        residual: `base`, `in_place` of `kernels.adapter`.
    """
    columns = torch.cat([s.expand(len(d)) for s, d in zip(scales.unbind(), down, strict=True)])
    pair = torch.cat(list(down)), torch.cat(list(up), 1)
    return adapter(x, *pair, scale=weight, rank_scale=columns, **residual)


class Prefix(Adapter):
    """Learned rows for keys and values, put in after the class token.

    Args:
        dim: width D.
        length: rows.
        compensate: divide the attention on the prefix by its own sum (LAE's calibration), so that
            it always counts fully; the other columns stay as they are.
        learn_scale: one learnable factor each for keys and values, starting at 1.
    """

    def __init__(
        self,
        dim: int,
        length: int,
        *,
        compensate: bool = True,
        learn_scale: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        draw = [torch.empty(length, dim).uniform_(0, 0.01, generator=generator) for _ in range(2)]
        self.key, self.value = (nn.Parameter(d) for d in draw)
        ones = [torch.ones(()) for _ in range(2)]
        if learn_scale:
            self.key_scale, self.value_scale = (nn.Parameter(o) for o in ones)
        else:
            self.register_buffer("key_scale", ones[0])
            self.register_buffer("value_scale", ones[1])
        self.compensate = compensate

    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [length, D] each."""
        return self.key * self.key_scale, self.value * self.value_scale


class Prompt(Adapter):
    """Tokens appended behind the image's, without position embedding (VPT).

    Args:
        dim: width D.
        count: tokens.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(count, dim))

    def tokens(self) -> Tensor:
        """[count, D]."""
        return self.prompt


class ScaleShift(Adapter):
    """`y * scale + shift` after a module (SSF).

    Args:
        dim: last dimension of the module's output.
        std: of the initial draws, N(1, std^2) and N(0, std^2); 0 starts at the identity.
    """

    def __init__(
        self, dim: int, *, std: float = 0.02, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        draw = [torch.empty(dim).normal_(0, 1, generator=generator) * std for _ in range(2)]
        self.scale, self.shift = nn.Parameter(1 + draw[0]), nn.Parameter(draw[1])

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        return out * self.scale + self.shift
