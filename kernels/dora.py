"""Low-rank updates of a linear layer: LoRA's products or merged weights, and DoRA's norms.

DoRA (Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024): with magnitude m [d_out]
and n_j = ||W_j + s B_j A|| the Euclidean norm of row j,

    y = (m / n) * (x W^T + s (x A^T) B^T) + bias

The norm is a constant in the backward pass (section 4.3 of the paper). While gradients are
recorded it is computed from the dense sum, which is the fastest form at the widths of a vision
transformer; otherwise it is kept until a weight changes. A change through `weight.data`, or by a
CUDA graph that is replayed, leaves no trace that could be seen here: call `Kept.forget`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.kernels.adapter import adapter


class Kept:
    """A value made from tensors and numbers, kept until one of them is another or has changed."""

    def __init__(self) -> None:
        self._parts: tuple[Any, ...] = ()
        self._versions: tuple[int, ...] | None = None
        self._value: Any = None

    def get(self, make: Callable[..., Tensor], *parts: Tensor | float) -> Tensor:
        """`make(*parts)`, or what it returned before for the same parts.

        Tensors made in inference mode have no version: with one of them nothing is kept.
        """
        tensors = [p for p in parts if isinstance(p, Tensor)]
        if any(t.is_inference() for t in tensors):
            return make(*parts)
        versions = tuple(t._version for t in tensors)
        if versions != self._versions or not self._same(parts):
            with torch.inference_mode(False), torch.no_grad():
                self._value = make(*parts)
            self._parts, self._versions = parts, versions
        return self._value

    def forget(self) -> None:
        """Make the value again at the next call."""
        self._parts, self._versions, self._value = (), None, None

    def _same(self, parts: tuple[Any, ...]) -> bool:
        if len(parts) != len(self._parts):
            return False
        pairs = zip(parts, self._parts, strict=True)
        return all(a is b if isinstance(a, Tensor) else a == b for a, b in pairs)


def merged_weight(weight: Tensor, down: Tensor, up: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """`W + s B A` [d_out, d_in], added in at least float32 and rounded once to W's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    update = (up.to(wide) @ down.to(wide)) * scale
    return (weight.to(wide) + update).to(weight.dtype)


def weight_norm(weight: Tensor, down: Tensor, up: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Norm of every row of `W + s B A`, [d_out] in float32 (float64 for float64 weights)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return merged_weight(weight.to(wide), down, up, scale).norm(dim=1)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    scale: float | Tensor = 1.0,
    kept: Kept | None = None,
) -> Tensor:
    """`x (W + s B A)^T + bias`, x [..., d_in] -> [..., d_out].

    While gradients are recorded, the two thin products are added to the layer's output; otherwise
    one product with the merged weight, which `kept` holds.

    Args:
        weight, bias: the layer's, [d_out, d_in] and [d_out].
        down, up: A [r, d_in] and B [d_out, r]; several frozen pairs can be concatenated along r.
    """
    if torch.is_grad_enabled() or kept is None:
        return adapter(x, down, up, scale=scale, base=F.linear(x, weight, bias), in_place=True)
    return F.linear(x, kept.get(merged_weight, weight, down, up, scale), bias)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    magnitude: Tensor,
    scale: float | Tensor = 1.0,
    kept: Kept | None = None,
) -> Tensor:
    """The formula at the top of this file, x [..., d_in] -> [..., d_out].

    Args:
        magnitude: m [d_out].
        kept: holds the norm while no gradients are recorded.
    """
    if torch.is_grad_enabled() or kept is None:
        with torch.no_grad():
            norm = weight_norm(weight, down, up, scale)
    else:
        norm = kept.get(weight_norm, weight, down, up, scale)
    base = F.linear(x, weight)
    gamma = magnitude / norm  # at least float32: near 1, bfloat16 loses what was learnt
    y = adapter(x, down, up, scale=scale, base=base, column_scale=gamma, in_place=True)
    return y if bias is None else y + bias
