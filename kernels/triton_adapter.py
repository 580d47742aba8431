"""Fused adapter kernels in Triton: one forward, two backward kernels and one final sum.

    xn = LayerNorm(x) or x                      p = xn Wd^T + bd
    h  = act(p) * keep * rank_scale             y = column_scale * ([x] + [base] + s (h Wu^T + bu))

Adapters T, segments S of L rows each. A segment uses the adapter that `index` names, or its own
number (T = S), or adapter 0 (T = 1). Everything optional is a branch at compile time. Products
accumulate in float32; h and dp are rounded once to the compute type; residual terms are added in
float32 before the only rounding of y.

Backward keeps nothing beyond x and the weights. The first kernel recomputes p, writes dx, the two
rank-sized factors of the weight gradients and sums per row tile; the second multiplies them with x
and g, one float32 partial per slab of rows; the third adds the slabs in a fixed order. There are no
atomics and the slabs depend on L alone, so results repeat bit for bit.

LayerNorm in front takes one pass: with Wg = Wd * gain, c = rowsum(Wg), b' = bd + Wd shift,
`p = rstd (x Wg^T - mean c) + b'`. Each row is first moved by the mean of its first chunk, which
changes nothing in exact arithmetic and avoids cancellation for rows far from zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Set
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from driftline.kernels import triton_device, tuning
from driftline.kernels.dispatch import MAX_SEGMENTS
from driftline.kernels.reference import Norm, output_dtype
from driftline.kernels.triton_device import INTERPRETED

MAX_RANK = 144  # two rank tiles, 128 + 16
MAX_WIDTH = 4096
SUM_BLOCK = 256  # columns of the partial sums that one program adds up
SUM_CONFIG = tuning.Config(rows=16, columns=SUM_BLOCK, warps=4, stages=2)

NORM_MIXES = {"down", "down_bias", "norm_gain", "norm_shift"}  # computed together under a norm

DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def rank_tiles(rank: int) -> tuple[int, int]:
    """One or two powers of two >= 16 that hold `rank`, with the least padding: 129 -> (128, 16)."""
    single = max(16, triton.next_power_of_2(rank))
    first = single // 2
    if first < 16:
        return single, 0
    second = max(16, triton.next_power_of_2(rank - first))
    return (first, second) if first + second < single else (single, 0)


def slab_rows(rows: int) -> int:
    """Rows of one partial weight gradient; from the number of rows alone, so that runs repeat."""
    for limit, size in ((2048, 256), (8192, 512), (32768, 1024)):
        if rows <= limit:
            return size
    return 2048


def matmul_precision(compute_dtype: torch.dtype, rank: int) -> str:
    """Triton's `input_precision` for `torch.get_float32_matmul_precision()`.

    `highest` is `ieee` up to rank 16, where plain FMA still waits for memory, and `tf32x3` above.
    """
    if compute_dtype != torch.float32:
        return "ieee"  # has no meaning for 16-bit operands
    if torch.get_float32_matmul_precision() == "highest":
        return "tf32x3" if rank > 16 else "ieee"
    return "tf32"


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def supported(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    scale: Tensor | None = None,
    rank_scale: Tensor | None = None,
    index: Tensor | None = None,
    keep: Tensor | None = None,
    norm: Norm | None = None,
    column_scale: Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
) -> str | None:
    """None where `forward` and `backward` can run, otherwise the reason in words."""
    if INTERPRETED:
        if x.is_cuda:
            return "TRITON_INTERPRET=1 runs on CPU tensors only"
    elif not x.is_cuda:
        return f"{x.device.type} tensors"
    elif _capability(x.device.index) < (8, 0):
        return "a device of compute capability below 8.0"
    for tensor in (x, base, down, up):
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"dtype {str(tensor.dtype).removeprefix('torch.')}"
    if compute_dtype is not None and compute_dtype not in DTYPES:
        return f"dtype {str(compute_dtype).removeprefix('torch.')}"
    if down.shape[-2] > MAX_RANK:
        return f"rank {down.shape[-2]} > {MAX_RANK}"
    width = max(down.shape[-1], up.shape[-2])
    if width > MAX_WIDTH:
        return f"width {width} > {MAX_WIDTH}"
    if x.shape[0] > MAX_SEGMENTS:
        return f"{x.shape[0]} segments > {MAX_SEGMENTS}"
    for name, tensor in (("x", x), ("base", base)):
        if tensor is not None and tensor.stride(-1) != 1:
            return f"the last dimension of {name} is not contiguous"
    return None


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    config: tuning.Config,
    first: Tensor,
    *arguments: Any,
    **constants: Any,
) -> None:
    """Triton launches on the current device; that of `first` need not be it."""
    guard = contextlib.nullcontext()
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        guard = torch.cuda.device(first.device)
    with guard:
        # fusion of products and sums is said because its default differs between versions
        kernel[grid](
            first,
            *arguments,
            **constants,
            num_warps=config.warps,
            num_stages=config.stages,
            enable_fp_fusion=True,
        )


def _constants(
    x: Tensor,
    up: Tensor,
    norm: Norm | None,
    act: str,
    add_input: bool,
    compute_dtype: torch.dtype,
    per_segment: bool,
) -> dict[str, Any]:
    """Compile-time constants of the forward kernel and of the first backward kernel."""
    adapters, d_out, rank = up.shape
    first, second = rank_tiles(rank)
    return {
        "EPS": 0.0 if norm is None else norm[2],
        "D_IN": x.shape[2],
        "D_OUT": d_out,
        "R": rank,
        "R1": first,
        "R2": second,
        "ACT": act,
        "ADD_INPUT": add_input,
        "SHARED": adapters == 1,
        "PER_SEGMENT": per_segment,
        "NORM_SHARED": norm is not None and norm[0].shape[0] == 1,
        "CD": DTYPES[compute_dtype],
        "PRECISION": matmul_precision(compute_dtype, rank),
    }


def _tuned(
    kernel: str,
    x: Tensor,
    base: Tensor | None,
    add_input: bool,
    constants: dict[str, Any],
    compute_dtype: torch.dtype,
) -> tuning.Config:
    return tuning.lookup(
        kernel,
        max(constants["D_IN"], constants["D_OUT"]),
        constants["R1"] + constants["R2"],
        tuning.dtype_name(x.dtype, compute_dtype, constants["PRECISION"]),
        x.shape[0] * x.shape[1],
        "N" if not add_input else "S" if base is None else "P",
    )


def _check(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    rank_scale: Tensor | None,
    index: Tensor | None,
    add_input: bool,
    per_segment: bool,
) -> None:
    adapters, rank, d_in = down.shape
    segments = x.shape[0]
    if up.shape[0] != adapters or up.shape[2] != rank or x.shape[2] != d_in:
        raise ValueError(
            f"x {tuple(x.shape)}, down {tuple(down.shape)} and up {tuple(up.shape)} do not fit"
        )
    if index is None and adapters not in (1, segments):
        raise ValueError(f"{adapters} adapters for {segments} segments need `index`")
    if add_input and up.shape[1] != d_in:
        raise ValueError(f"add_input needs equal widths, got {d_in} and {up.shape[1]}")
    if segments > MAX_SEGMENTS:
        raise ValueError(f"{segments} segments > {MAX_SEGMENTS}, the limit of a launch")
    expected = segments if per_segment else adapters
    if rank_scale is not None and rank_scale.shape != (expected, rank):
        raise ValueError(
            f"rank_scale is {tuple(rank_scale.shape)}, expected {(expected, rank)} with "
            f"per_segment={per_segment}"
        )


def forward(
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scale: Tensor,
    rank_scale: Tensor | None,
    index: Tensor | None,
    keep: Tensor | None,
    norm: Norm | None,
    column_scale: Tensor | None,
    *,
    act: str,
    add_input: bool,
    compute_dtype: torch.dtype,
    per_segment: bool = False,
    config: tuning.Config | None = None,
) -> Tensor:
    """y [S, L, d_out], contiguous, of the formula at the top of this file.

    Args:
        x: [S, L, d_in]; any strides of S and L, last dimension contiguous.
        base: [S, L, d_out], laid out likewise.
        down, up: [T, r, d_in] and [T, d_out, r], contiguous, any of the three types.
        down_bias, up_bias: [T, r], [T, d_out].
        scale: [T].
        rank_scale: [T, r], or [S, r] with `per_segment`.
        index: [S], adapter of each segment.
        keep: [S, L, r], multiplies the hidden columns.
        norm: gain and shift [T, d_in] or [1, d_in], and eps.
        column_scale: [d_out].
        compute_dtype: of the operands of both products; sums are float32.
        config: tile sizes; None takes those of the tuning table.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(x, down, up, rank_scale, index, add_input, per_segment)
    segments, rows, _ = x.shape
    dtype = output_dtype(x, base, add_input, compute_dtype)
    y = x.new_empty((segments, rows, up.shape[1]), dtype=dtype)
    if y.numel() == 0:
        return y
    constants = _constants(x, up, norm, act, add_input, compute_dtype, per_segment)
    config = config or _tuned("forward", x, base, add_input, constants, compute_dtype)
    gain, shift, _ = norm or (None, None, 0.0)
    _launch(
        triton_device.adapter_forward,
        (triton.cdiv(rows, config.rows), segments),
        config,
        *(x, base, down, up, down_bias, up_bias, scale, rank_scale, index),
        *(None if keep is None else keep.contiguous(), gain, shift, column_scale, y),
        *(rows, *x.stride()[:2], *(base.stride()[:2] if base is not None else (0, 0))),
        **constants,
        BM=config.rows,
        BK=config.columns,
        RESIDENT=config.resident and add_input,
    )
    return y


def backward(
    g: Tensor,
    x: Tensor,
    base: Tensor | None,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    scale: Tensor,
    rank_scale: Tensor | None,
    index: Tensor | None,
    keep: Tensor | None,
    norm: Norm | None,
    column_scale: Tensor | None,
    *,
    needs: Collection[str],
    act: str,
    add_input: bool,
    compute_dtype: torch.dtype,
    per_segment: bool = False,
    row_config: tuning.Config | None = None,
    weight_config: tuning.Config | None = None,
) -> dict[str, Tensor]:
    """Gradients that `needs` names: x, down, up, down_bias, up_bias, scale, rank_scale,
    norm_gain, norm_shift, column_scale; each in its tensor's shape, type and contiguous.

    g is dL/dy [S, L, d_out]; the other arguments are those of `forward`. The gradient of base
    (column_scale * g) is the caller's. Three launches serve every case but these, which add plain
    torch on small tensors: rank_scale; norm_gain, norm_shift, and down under a LayerNorm; scale
    with a rank_scale per segment of one adapter. column_scale runs the forward kernel once more.

    Raises:
        ValueError: shapes that do not fit, or `index`, which has no backward.
    """
    if index is not None:
        raise ValueError("the fused adapter has no backward for `index`")
    _check(x, down, up, rank_scale, index, add_input, per_segment)
    gain, shift, _ = norm or (None, None, 0.0)
    named = {
        "x": x,
        "down": down,
        "up": up,
        "down_bias": down_bias,
        "up_bias": up_bias,
        "scale": scale,
        "rank_scale": rank_scale,
        "norm_gain": gain,
        "norm_shift": shift,
        "column_scale": column_scale,
    }
    wanted = {name: t for name, t in named.items() if name in needs and t is not None}
    if g.numel() == 0 or x.numel() == 0:
        return {name: t.new_zeros(t.shape) for name, t in wanted.items()}
    grads: dict[str, Tensor] = {}
    if keep is not None:
        keep = keep.contiguous()
    if column_scale is not None and "column_scale" in wanted:
        plain = forward(
            *(x, base, down, up, down_bias, up_bias, scale, rank_scale, index, keep, norm, None),
            act=act,
            add_input=add_input,
            compute_dtype=compute_dtype,
            per_segment=per_segment,
        )
        change = (g.float() * plain.float()).sum((0, 1))
        grads["column_scale"] = change.to(column_scale.dtype)
    parameters = wanted.keys() - {"x", "column_scale"}
    if not parameters and "x" not in wanted:
        return grads

    (segments, rows, d_in), (_, d_out, rank) = x.shape, up.shape
    constants = _constants(x, up, norm, act, add_input, compute_dtype, per_segment)
    padded = constants["R1"] + constants["R2"]
    if row_config is None:
        row_config = _tuned("backward_rows", x, base, add_input, constants, compute_dtype)
    if weight_config is None:
        weight_config = _tuned("backward_weights", x, base, add_input, constants, compute_dtype)
    slab = slab_rows(rows)
    slabs, tiles = triton.cdiv(rows, slab), triton.cdiv(rows, row_config.rows)
    g = g if g.stride(-1) == 1 else g.contiguous()
    strides = (*g.stride()[:2], *x.stride()[:2])

    # a LayerNorm's gain needs dWd with respect to gain * Wd
    need_down = not parameters.isdisjoint({"down", "norm_gain"})
    need_g = not parameters.isdisjoint({"up", "up_bias", "scale"})
    dx = x.new_empty(x.shape) if "x" in wanted else None
    scaled = dp = mean = None
    if parameters:
        scaled, dp = x.new_empty((2, segments, rows, padded), dtype=compute_dtype)
    if gain is not None and need_down:
        mean = x.new_empty((segments, rows), dtype=torch.float32)
    tile_sums = x.new_empty((segments, tiles, 2, padded), dtype=torch.float32)
    _launch(
        triton_device.adapter_backward_rows,
        (tiles, segments),
        row_config,
        *(g, x, down, up, down_bias, scale, rank_scale, keep, gain, shift, column_scale),
        *(dx, scaled, dp, mean, tile_sums, rows, *strides),
        **constants,
        BM=row_config.rows,
        BK=row_config.columns,
    )
    if dx is not None:
        grads["x"] = dx
    if not parameters:
        return grads

    # a row: dWd, dWu, colsum(g), colsum(dp), colsum(act(p) keep t); rows start on 64 bytes
    width = triton.cdiv(rank * (d_in + d_out) + d_out + 2 * rank, 16) * 16
    partials = x.new_empty((segments, slabs, width), dtype=torch.float32)
    x_blocks = triton.cdiv(d_in, weight_config.columns) if need_down else 0
    g_blocks = triton.cdiv(d_out, weight_config.columns) if need_g else 0
    _launch(
        triton_device.adapter_backward_weights,
        (x_blocks + g_blocks + 1, slabs, segments),
        weight_config,
        *(g, x, scaled, dp, mean, tile_sums, column_scale, partials, rows, tiles, *strides),
        **{name: constants[name] for name in ("D_IN", "D_OUT", "R", "R1", "R2", "CD")},
        PRECISION=constants["PRECISION"],
        BM=weight_config.rows,
        BD=weight_config.columns,
        CH=slab,
        TILES_PER_SLAB=slab // row_config.rows,
        ROW=width,
        X_BLOCKS=x_blocks,
        G_BLOCKS=g_blocks,
    )
    grads.update(_sum_partials(partials, named, parameters, per_segment))
    return grads


def _sum_partials(
    partials: Tensor, named: dict[str, Any], parameters: Set[str], per_segment: bool
) -> dict[str, Tensor]:
    """The last launch, and the small gradients that are plain torch."""
    down, up, up_bias, scale = (named[n] for n in ("down", "up", "up_bias", "scale"))
    rank_scale, gain, shift = (named[n] for n in ("rank_scale", "norm_gain", "norm_shift"))
    (segments, slabs, width), (adapters, rank, d_in), d_out = (
        partials.shape,
        down.shape,
        up.shape[1],
    )
    by_segment = per_segment and segments != adapters
    kernel_gives = {"down", "up", "up_bias", "down_bias"} | (set() if by_segment else {"scale"})
    sums = {n: torch.empty_like(named[n]) for n in kernel_gives if n in parameters}
    if normed := gain is not None and bool(parameters & NORM_MIXES):
        # what these are made of, in float32
        sums["down"] = down.new_empty(down.shape, dtype=torch.float32)
        sums["down_bias"] = down.new_empty((adapters, rank), dtype=torch.float32)
    sizes = (rank * d_in, d_out * rank, d_out, rank)
    blocks = [
        triton.cdiv(size, SUM_BLOCK) if name in sums else 0
        for name, size in zip(("down", "up", "up_bias", "down_bias"), sizes, strict=True)
    ]
    rows = segments // adapters * slabs
    if sums:
        _launch(
            triton_device.adapter_backward_sum,
            (sum(blocks) + ("scale" in sums), adapters),
            SUM_CONFIG,
            partials,
            *(sums.get(n) for n in ("down", "up", "up_bias", "down_bias", "scale")),
            *(up_bias, rank_scale, scale, rows),
            D_IN=d_in,
            D_OUT=d_out,
            R=rank,
            RP=triton.next_power_of_2(rank),
            ROW=width,
            ROWS_PADDED=max(16, triton.next_power_of_2(rows)),
            BLOCK=SUM_BLOCK,
            DOWN_BLOCKS=blocks[0],
            UP_BLOCKS=blocks[1],
            UP_BIAS_BLOCKS=blocks[2],
            DOWN_BIAS_BLOCKS=blocks[3],
        )
    found = {n: t for n, t in sums.items() if n in parameters}
    _, _, g_sums, _, q, _ = partials.split((*sizes, rank, width - sum(sizes) - rank), -1)
    if "rank_scale" in parameters:
        change = q.sum(1) * scale.float()[:, None]  # [S, r]
        if not per_segment and segments != adapters:
            change = change.sum(0, keepdim=True)
        found["rank_scale"] = change.to(rank_scale.dtype)
    if "scale" in parameters and by_segment:
        change = (q.sum(1) * rank_scale.float()).sum()
        if up_bias is not None:
            change = change + (g_sums.sum((0, 1)) * up_bias).sum()
        found["scale"] = change.to(scale.dtype).reshape(scale.shape)
    if normed:
        inner, bias = sums["down"], sums["down_bias"]
        changes = {
            "down": inner * gain.float()[:, None] + bias[..., None] * shift.float()[:, None],
            "down_bias": bias,
            "norm_gain": (inner * down.float()).sum(1),
            "norm_shift": (bias[:, None] @ down.float())[:, 0],
        }
        for name in changes.keys() & parameters:
            change = changes[name]
            if name.startswith("norm") and gain.shape[0] != adapters:
                change = change.sum(0, keepdim=True)
            found[name] = change.to(named[name].dtype)
    return found
