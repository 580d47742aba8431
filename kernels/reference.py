"""The adapter in plain PyTorch: the formula that defines it, and a form with fewer passes.

With optional parts in brackets, W_down [r, d_in] and W_up [d_out, r] as in `nn.Linear`:

    xn = [LayerNorm](x)                  p = xn W_down^T [+ b_down]
    h = act(p) [* keep] [* rank_scale]   y = [column_scale *] ([x +] [base +] s (h W_up^T [+ b_up]))

`formula` is that, for ordinary autograd, any float dtype and any order of derivatives. `forward`
and `backward` compute the same with the residual as the accumulator of the second product, which
saves the passes over [rows, d_out] of a product of its own, its scaling and the additions. They
keep the hidden columns for the backward pass: on a CPU, computing them again costs more than
reading them. Neither may be called where autograd records.

Arguments of all three, in this order:
    x: [..., d_in]; with grouped weights [T, ..., d_in] and with `index` [B, ..., d_in], both of
        three or more dimensions.
    base: [..., d_out] or None.
    down, up: [r, d_in] and [d_out, r], or [T, r, d_in] and [T, d_out, r].
    down_bias, up_bias: [r] and [d_out] or [T, r] and [T, d_out] or None.
    scale: a number, a scalar tensor, or [T].
    rank_scale: [r]; a row for each entry of x's first dimension: [B, r] or [T, r]; or None.
    index: [B] integers, the adapter of each sample; or None.
    keep: [..., r] or None.
    norm: (gain, shift, eps) with [d_in] or [T, d_in]; or None.
    column_scale: [d_out] or None.
    act: "none", "relu" or "gelu" (exact).
    compute_dtype: of the two products. x and base are added in their own dtype.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Norm = tuple[Tensor, Tensor, float]


def output_dtype(
    x: Tensor, base: Tensor | None, add_input: bool, compute_dtype: torch.dtype
) -> torch.dtype:
    """The promotion of what is added, or the products' dtype where nothing is."""
    if base is None:
        return x.dtype if add_input else compute_dtype
    return torch.promote_types(x.dtype, base.dtype) if add_input else base.dtype


def _rows(parameter: Tensor, x: Tensor) -> Tensor:
    """[n] or [T, n] so that it broadcasts against [T, ..., n]."""
    if parameter.dim() == 1:
        return parameter
    return parameter.reshape(parameter.shape[0], *[1] * (x.dim() - 2), parameter.shape[-1])


def _matrices(weight: Tensor, x: Tensor) -> Tensor:
    """[o, i] or [T, o, i] as the right side of a product with [T, ..., i]."""
    if weight.dim() == 3:
        weight = weight.reshape(weight.shape[0], *[1] * (x.dim() - 3), *weight.shape[1:])
    return weight.mT


def _normalise(x: Tensor, norm: Norm) -> Tensor:
    gain, shift, eps = norm
    return F.layer_norm(x, x.shape[-1:], eps=eps) * _rows(gain, x) + _rows(shift, x)


def _picked_norm(norm: Norm | None, index: Tensor) -> Norm | None:
    if norm is None:
        return None
    gain, shift = (p[index] if p.dim() == 2 else p for p in norm[:2])
    return gain, shift, norm[2]


def formula(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scale: float | Tensor = 1.0,
    rank_scale: Tensor | None = None,
    index: Tensor | None = None,
    keep: Tensor | None = None,
    norm: Norm | None = None,
    column_scale: Tensor | None = None,
    *,
    act: str = "none",
    add_input: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """y [..., d_out] step by step; the definition that every other form is tested against."""
    dtype = compute_dtype or down.dtype
    if index is not None:
        down, up = down[index], up[index]
        down_bias, up_bias = (None if b is None else b[index] for b in (down_bias, up_bias))
        if isinstance(scale, Tensor) and scale.dim() == 1:
            scale = scale[index]
        norm = _picked_norm(norm, index)
    xn = x if norm is None else _normalise(x, norm)
    hidden = xn.to(dtype) @ _matrices(down.to(dtype), x)
    if down_bias is not None:
        hidden = hidden + _rows(down_bias.to(dtype), x)
    if act == "relu":
        hidden = F.relu(hidden)
    elif act == "gelu":
        hidden = F.gelu(hidden)
    if keep is not None:
        hidden = hidden * keep.to(dtype)
    if rank_scale is not None:
        hidden = hidden * _rows(rank_scale.to(dtype), x)
    out = hidden @ _matrices(up.to(dtype), x)
    if up_bias is not None:
        out = out + _rows(up_bias.to(dtype), x)
    if isinstance(scale, Tensor):
        scale = scale.to(dtype)
        scale = _rows(scale[:, None], x) if scale.dim() == 1 else scale
    y = out * scale
    if base is not None:
        y = base + y
    if add_input:
        y = x + y
    if column_scale is not None:
        y = y * column_scale
    return y.to(output_dtype(x, base, add_input, dtype))


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _flat(tensor: Tensor, groups: int | None) -> Tensor:
    """[..., n] -> [rows, n], or [groups, rows, n]."""
    if groups is None:
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor.reshape(groups, -1, tensor.shape[-1])


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a b [+ bias]`, for one matrix or a batch."""
    if a.dim() == 2:
        return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)
    return torch.bmm(a, b) if bias is None else torch.baddbmm(bias[:, None], a, b)


def _scaled_product(a: Tensor, b: Tensor, scale: Any, like: Tensor) -> Tensor:
    """`scale a b` in the shape of `like`, whose values do not matter; a number costs no pass."""
    if isinstance(scale, Tensor):
        return _product(a, b).mul_(scale)
    product = torch.addmm if a.dim() == 2 else torch.baddbmm
    return product(like, a, b, beta=0, alpha=scale)


def _add_products(
    y: Tensor, a: Tensor, weights: Tensor, ids: list[int], factor: float = 1.0
) -> None:
    """`y[s] += factor * a[s] weights[ids[s]]` for every sample s."""
    each = weights.unbind()
    for out, left, t in zip(y.unbind(), a.unbind(), ids, strict=True):
        out.addmm_(left, each[t], alpha=factor)


def _hidden(
    saved: Tensor, act: str, keep: Tensor | None, rank_scale: Tensor | None, groups: int | None
) -> Tensor:
    """Hidden columns as they enter the second product; a new tensor unless nothing acts on them."""
    hidden = F.gelu(saved) if act == "gelu" else saved
    if keep is not None:
        hidden = hidden * _flat(keep, groups).to(saved.dtype)
    if rank_scale is not None:
        hidden = _times_rows(hidden, rank_scale.to(saved.dtype))
    return hidden


def _times_rows(hidden: Tensor, rank_scale: Tensor) -> Tensor:
    """`hidden` [rows, r] or [T, rows, r] times [r], or [B, r] for B equal runs of rows."""
    if rank_scale.dim() == 1:
        return hidden * rank_scale
    runs = hidden.view(rank_scale.shape[0], -1, hidden.shape[-1])
    return (runs * rank_scale[:, None]).view(hidden.shape)


def forward(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scale: float | Tensor,
    rank_scale: Tensor | None,
    index: Tensor | None,
    keep: Tensor | None,
    norm: Norm | None,
    column_scale: Tensor | None,
    *,
    act: str,
    add_input: bool,
    compute_dtype: torch.dtype,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """y [..., d_out], contiguous, and the hidden columns [rows, r] or [T, rows, r] for `backward`.

    Args:
        in_place: y may take the place of `base` where dtype and layout allow it.
    """
    dtype = compute_dtype
    ids = None
    if index is not None:
        if index.device.type == "cpu":  # product by product: sorting copies x and y, gathering
            ids = index.tolist()  # the weights writes up to 0.7 of x
        else:
            down, up = down[index], up[index]
        down_bias, up_bias = (None if b is None else b[index] for b in (down_bias, up_bias))
        if isinstance(scale, Tensor) and scale.dim() == 1:
            scale = scale[index]
        norm = _picked_norm(norm, index)
    groups = x.shape[0] if down.dim() == 3 else None
    flat = _flat(x if norm is None else _normalise(x, norm), groups)
    if flat.dtype != dtype or down.dtype != dtype:
        flat, down, up = flat.to(dtype), down.to(dtype), up.to(dtype)
        down_bias, up_bias = _cast(down_bias, dtype), _cast(up_bias, dtype)
    if ids is None:
        saved = _product(flat, down.mT, down_bias)
    else:
        saved = flat.new_zeros((*flat.shape[:2], down.shape[-2]))
        saved = saved if down_bias is None else saved.add_(down_bias[:, None])
        _add_products(saved, flat, down.mT, ids)
    if act == "relu":
        saved.relu_()
    hidden = _hidden(saved, act, keep, rank_scale, groups)
    factor, up_t = 1.0, up.mT
    if not isinstance(scale, Tensor):
        factor = scale
    elif scale.numel() == 1 and scale.device.type == "cpu":
        factor = scale.item()
    else:  # one a group, or on a device: no reading back
        each = scale.to(dtype)
        hidden = hidden * (each[:, None, None] if scale.dim() == 1 else each)
        if up_bias is not None:
            up_bias = up_bias * (each[:, None] if scale.dim() == 1 else each)

    shape = (*x.shape[:-1], up.shape[-2])
    wanted = output_dtype(x, base, add_input, dtype)
    added = x if add_input else None
    in_place = in_place and base is not None and base.dtype == wanted and base.is_contiguous()
    if ids is not None and (wanted != dtype or (added is None and base is None)):
        up_t, ids = up_t[index], None  # rare: a product of its own
    if added is None and base is None:
        y = _product(hidden, up_t, up_bias).view(shape)
        y = y if factor == 1.0 else y.mul_(factor)
    elif wanted != dtype:
        part = _product(hidden, up_t, up_bias).view(shape)
        y = _accumulator(added, base, None, factor, in_place)
        y.add_(part, alpha=factor)
    else:
        bias = None if up_bias is None else _rows(up_bias, x)
        y = _accumulator(added, base, bias, factor, in_place)
        total = _flat(y, groups)  # a view
        if ids is not None:
            _add_products(total, hidden, up_t, ids, factor)
        else:
            accumulate = total.addmm_ if groups is None else total.baddbmm_
            accumulate(hidden, up_t, alpha=factor)
    return (y if column_scale is None else y.mul_(column_scale)), saved


def _accumulator(
    x: Tensor | None, base: Tensor | None, bias: Tensor | None, factor: float, in_place: bool
) -> Tensor:
    """`[x] + [base] + factor bias`, contiguous, in memory that may be written."""
    if base is not None and in_place:
        y = base if x is None else base.add_(x)
    elif base is not None and x is not None:
        y = torch.add(x, base).contiguous()
    else:
        y = base if x is None else x
        assert y is not None
        if bias is not None:  # one pass
            return torch.add(y, bias, alpha=factor).contiguous()
        return y.clone(memory_format=torch.contiguous_format)
    return y if bias is None else y.add_(bias, alpha=factor)


def backward(
    g: Tensor,
    hidden: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scale: float | Tensor,
    rank_scale: Tensor | None,
    keep: Tensor | None,
    *,
    act: str,
    add_input: bool,
    compute_dtype: torch.dtype,
    needs: Set[str],
) -> dict[str, Tensor]:
    """Gradients named in `needs` (x, down, up, down_bias, up_bias, scale, rank_scale), in fresh
    memory, from g [..., d_out] and the second result of `forward`.

    Base's gradient is g itself. `index`, `norm` and `column_scale` are not served: the first has
    no backward pass, the others use ordinary autograd of `formula`.
    """
    dtype, groups = compute_dtype, x.shape[0] if down.dim() == 3 else None
    found: dict[str, Tensor] = {}
    flat, flat_x = _flat(g, groups), _flat(x, groups)
    if flat.dtype != dtype or x.dtype != dtype or down.dtype != dtype:
        flat, flat_x, down, up = (t.to(dtype) for t in (flat, flat_x, down, up))
    s: Any = scale  # a number, or broadcasts against [T, rows, n]
    if isinstance(scale, Tensor):
        if scale.numel() == 1 and scale.device.type == "cpu":
            s = scale.item()
        else:
            s = scale.to(dtype)[:, None, None] if scale.dim() == 1 else scale.to(dtype)
    h = _hidden(hidden, act, keep, rank_scale, groups)
    total = flat.sum(-2) if "up_bias" in needs or "scale" in needs else flat
    if "scale" in needs:
        t = _product(flat, up)
        wide = torch.promote_types(dtype, torch.float32)
        found["scale"] = torch.linalg.vecdot(h.flatten(-2).to(wide), t.flatten(-2).to(wide))
        if up_bias is not None:
            found["scale"] += torch.linalg.vecdot(up_bias.to(wide), total.to(wide))
        d = t.mul_(s)
    else:
        d = _scaled_product(flat, up, s, hidden)
    if "up" in needs:
        found["up"] = _scaled_product(flat.mT, h, s, up)
    if "up_bias" in needs:
        found["up_bias"] = total * (s[:, 0] if isinstance(s, Tensor) and s.dim() else s)
    if rank_scale is not None:
        if "rank_scale" in needs:
            each = d * _hidden(hidden, act, keep, None, groups)
            runs = (rank_scale.shape[0], -1) if rank_scale.dim() == 2 else (-1,)
            found["rank_scale"] = each.reshape(*runs, each.shape[-1]).sum(-2)
        d = _times_rows(d, rank_scale.to(dtype))
    if keep is not None:
        d = d * _flat(keep, groups).to(dtype)
    if act == "relu":
        d = torch.ops.aten.threshold_backward(d, hidden, 0)
    elif act == "gelu":
        d = torch.ops.aten.gelu_backward(d, hidden)
    if "x" in needs:
        dx = _product(d, down)
        if add_input:  # one accumulating pass is faster than `addmm`, which copies g first
            dx = dx.add_(flat) if g.dtype == dtype else dx + _flat(g, groups)
        found["x"] = dx.view(x.shape)
    if "down" in needs:
        found["down"] = _product(d.mT, flat_x)
    if "down_bias" in needs:
        found["down_bias"] = d.sum(-2)
    return found
