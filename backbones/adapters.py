"""Small trainable modules beside a frozen transformer; `backbones/bank.py` attaches them.

Every adapter is exactly the identity when created. What one does is said by the point at which it
is attached (`blocks.3.mlp:parallel`) and by the method of that point:

| point    | where it acts                                                   | method            |
|----------|-----------------------------------------------------------------|-------------------|
| parallel | beside an MLP: reads the residual stream u before norm2, joins  | `forward(u)`      |
|          | after the block                                                 |                   |
| out      | at a module: sees input and output, returns the new output      | `after(inp, out)` |
| in       | before a module: returns the new input                          | `before(inp)`     |
| keys     | in attention: rows put in after the class token                 | `rows()`          |
| tokens   | around a block (or all): tokens appended behind the image's     | `tokens()`        |

Sources: AdaptFormer as in EASE/MOS/APER (sun-hailong/CVPR24-Ease 6d67508, LAMDA-PILOT 5240714),
LAE's three modules (gqk/LAE 1680e49), SSF and VPT as in LAMDA-PILOT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


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

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        """New output of a module."""
        return out + self(inp)

    def before(self, inp: Tensor) -> Tensor:
        """New input of a module."""
        return inp + self(inp)

    @staticmethod
    def grouped(adapters: Sequence[Adapter], x: Tensor) -> Tensor:
        """`forward` of T adapters on T chunks: x [T, B, N, D] -> [T, B, N, D_out]."""
        return torch.stack([a(chunk) for a, chunk in zip(adapters, x, strict=True)])


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

    def forward(self, x: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.act](self.down(x))
        hidden = F.dropout(hidden, self.dropout, self.training)
        return self.up(hidden) * self.scale

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        if self.placement == "parallel":
            return out + self(inp)
        return self(out) + (out if self.placement == "serial" else inp)

    @staticmethod
    def grouped(adapters: Sequence[Bottleneck], x: Tensor) -> Tensor:  # type: ignore[override]
        first, (t, b, n, d) = adapters[0], x.shape
        if first.training and first.dropout:
            return Adapter.grouped(adapters, x)
        down = torch.stack([a.down.weight for a in adapters]).mT
        up = torch.stack([a.up.weight for a in adapters]).mT
        bias_down = torch.stack([a.down.bias for a in adapters])[:, None]
        bias_up = torch.stack([a.up.bias for a in adapters])[:, None]
        hidden = ACTIVATIONS[first.act](torch.baddbmm(bias_down, x.reshape(t, b * n, d), down))
        out = torch.baddbmm(bias_up, hidden, up).view(t, b, n, -1)
        if isinstance(first.scale, Tensor):
            return (
                out * torch.stack([torch.as_tensor(a.scale) for a in adapters])[:, None, None, None]
            )
        return out * first.scale


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

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, torch.cat(list(self.a))).split(self.a[0].shape[0], -1)
        scales = list(self.scales) or [self.scale] * len(self.rows)
        found = x.new_zeros((*x.shape[:-1], self.out))
        for (start, stop), h, b, s in zip(self.rows, hidden, self.b, scales, strict=True):
            found[..., start:stop] = F.linear(h, b) * s
        return found


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

    def forward(self, x: Tensor) -> Tensor:
        up = torch.cat([s * u for s, u in zip(self.scales.unbind(), self.up, strict=True)], 1)
        return F.linear(F.linear(x, torch.cat(list(self.down))), up)


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
