"""Small trainable modules beside a frozen transformer; `bank.py` attaches them.

Every adapter is exactly the identity when created, but for rows and tokens beside those of the
image (`keys`, `tokens`), which take their share of the attention. What one does is said by the
point at which it is attached (`blocks.3.mlp:parallel`) and by the method of that point:

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
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


def kaiming(weight: Tensor, generator: torch.Generator | None) -> None:
    """Kaiming-uniform with a = sqrt(5): U(-1/sqrt(d_in), 1/sqrt(d_in))."""
    with torch.no_grad():
        bound = 1 / math.sqrt(weight.shape[1])
        weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))


def bare_copy(module: nn.Module) -> nn.Module:
    """A copy of a module of the network without what the bank hung into it."""
    copied = deepcopy(module)
    for part in copied.modules():
        part.__dict__.pop("forward", None)
        for hooks in (part._forward_hooks, part._forward_pre_hooks):
            hooks.clear()
    return copied


class NotSummable(ValueError):
    """Several sets at once of a kind that does more than to add."""


class Adapter(nn.Module):
    """Base of all adapters; a subclass defines the methods of the points that it can serve."""

    reads_context: ClassVar[bool] = False  # True: `context` is what the caller gave, see `features`
    context: Tensor | None = None  # [B, ...] within one call of the bank, not part of the state

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

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Down and up, [r, D] and [D_out, r], of every low-rank product that is added.

        Empty for adapters that do anything else: they cannot be summed over tasks.
        """
        return []

    @staticmethod
    def add_grouped(adapters: Sequence[Adapter], x: Tensor, base: Tensor) -> Tensor:
        """`add` of T adapters on T chunks: x [T, B, N, D], base [T, B, N, D_out]."""
        return torch.stack([a.add(i, o) for a, i, o in zip(adapters, x, base, strict=True)])

    @staticmethod
    def after_grouped(adapters: Sequence[Adapter], inp: Tensor, out: Tensor) -> Tensor:
        """`after` of T adapters on T chunks, as in `add_grouped`."""
        return torch.stack([a.after(i, o) for a, i, o in zip(adapters, inp, out, strict=True)])


class AdapterSet(dict[str, Adapter]):
    """Adapters by point, for a kind that makes all of a set at once."""


class Product(Adapter):
    """Adds what one call of `kernels.adapter` gives; a subclass defines `_call` and `pairs`."""

    def _call(self, x: Tensor, weight: float = 1.0, **residual: Any) -> Tensor:
        """`[base +] weight * update(x)`; `residual` goes to the operator."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._call(x)

    def add(self, x: Tensor, base: Tensor, weight: float = 1.0) -> Tensor:
        return self._call(x, weight, base=base, in_place=True)
