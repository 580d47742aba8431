# pyrefly: ignore-errors
"""Device code of the fused adapter; `kernels/triton_adapter.py` has the formula and the launches.

The language is Triton's: what Python's type checker and linters think of it has no meaning.

Capital names are constants at compile time: R the rank, R1 and R2 its two padded tiles (R2 = 0: one
tile), RT their sum, BM the row tile, BK and BD the chunk of the widths, CD the compute type.
"""

import triton
import triton.language as tl

INTERPRETED = bool(triton.knobs.runtime.interpret)
_INTERPRETED = tl.constexpr(INTERPRETED)

# ------------------------------------------------------------------ wrappers


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b; the interpreter multiplies the raw bits of bfloat16, so it gets float32."""
    if _INTERPRETED:
        out = acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        out = tl.dot(a, b, acc, input_precision=PRECISION)
    return out


@triton.jit
def _cast(x, DTYPE: tl.constexpr):
    """x in another type, to nearest even; the interpreter truncates float32 to bfloat16."""
    if x.dtype == DTYPE:
        out = x
    elif _INTERPRETED and tl.bfloat16 == DTYPE:
        wide = x.to(tl.float32)
        bits = wide.to(tl.uint32, bitcast=True)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        rounded = bits.to(tl.float32, bitcast=True)
        out = tl.where(wide == wide, rounded, wide).to(tl.bfloat16)
    else:
        out = x.to(DTYPE)
    return out


# ------------------------------------------------------------------ activations


@triton.jit
def _act(p, ACT: tl.constexpr):
    """ReLU by comparison: `tl.maximum` drops NaN on a GPU. GELU in its erf form."""
    if ACT == "relu":
        out = tl.where(p < 0, 0.0, p)
    elif ACT == "gelu":
        out = 0.5 * p * (1 + tl.erf(p * 0.7071067811865476))
    else:
        out = p
    return out


@triton.jit
def _act_grad(p, grad, ACT: tl.constexpr):
    """grad * act'(p)."""
    if ACT == "relu":
        out = tl.where(p <= 0, 0.0, grad)
    elif ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * p * p)
        out = grad * (0.5 * (1 + tl.erf(p * 0.7071067811865476)) + p * density)
    else:
        out = grad
    return out


# ------------------------------------------------------------------ loads


@triton.jit
def _adapter(segment, index, SHARED: tl.constexpr):
    """Adapter of a segment, int64."""
    if index is not None:
        adapter = tl.load(index + segment).to(tl.int64)
    elif SHARED:
        adapter = segment * 0
    else:
        adapter = segment
    return adapter


@triton.jit
def _tile(rows, cols, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, columns] of a tensor; `rows` are pointers to row starts; zero outside."""
    pointers = rows[:, None] + cols[None, :]
    if D % BLOCK == 0:
        out = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        out = tl.load(pointers, mask=inside[:, None] & (cols < D)[None, :], other=0.0)
    return out


@triton.jit
def _vector(pointer, cols, D: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of a vector of length D, float32, zero outside."""
    if D % BLOCK == 0:
        out = tl.load(pointer + cols)
    else:
        out = tl.load(pointer + cols, mask=cols < D, other=0.0)
    return out.to(tl.float32)


@triton.jit
def _down_tile(
    down, cols, D_IN: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, R0: tl.constexpr,
    RP: tl.constexpr,
):  # fmt: skip
    """Wd[R0:R0 + RP, cols] transposed, [BLOCK, RP]."""
    ranks = R0 + tl.arange(0, RP)
    pointers = down + ranks[None, :] * D_IN + cols[:, None]
    if D_IN % BLOCK == 0:
        if R0 + RP <= R:
            out = tl.load(pointers)
        else:
            out = tl.load(pointers, mask=(ranks < R)[None, :], other=0.0)
    else:
        out = tl.load(pointers, mask=(ranks < R)[None, :] & (cols < D_IN)[:, None], other=0.0)
    return out


@triton.jit
def _up_tile(
    up, cols, D_OUT: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr, R0: tl.constexpr,
    RP: tl.constexpr,
):  # fmt: skip
    """Wu[cols, R0:R0 + RP], [BLOCK, RP]."""
    ranks = R0 + tl.arange(0, RP)
    pointers = up + cols[:, None] * R + ranks[None, :]
    if D_OUT % BLOCK == 0:
        if R0 + RP <= R:
            out = tl.load(pointers)
        else:
            out = tl.load(pointers, mask=(ranks < R)[None, :], other=0.0)
    else:
        out = tl.load(pointers, mask=(ranks < R)[None, :] & (cols < D_OUT)[:, None], other=0.0)
    return out


@triton.jit
def _rank_vector(pointer, R: tl.constexpr, R0: tl.constexpr, RP: tl.constexpr):
    """[RP] of a vector over rank columns, float32."""
    ranks = R0 + tl.arange(0, RP)
    return tl.load(pointer + ranks, mask=ranks < R, other=0.0).to(tl.float32)


@triton.jit
def _hide(h, R: tl.constexpr, R0: tl.constexpr, RP: tl.constexpr):
    """Zero in padded rank columns: an infinite x would leave NaN there."""
    if R0 + RP > R:
        ranks = R0 + tl.arange(0, RP)
        out = tl.where((ranks < R)[None, :], h, 0.0)
    else:
        out = h
    return out


@triton.jit
def _multiply(
    h, keep_rows, inside, rank_scale, R: tl.constexpr, R0: tl.constexpr, RP: tl.constexpr
):
    """h times the keep mask and the rank scale."""
    if keep_rows is not None:
        ranks = R0 + tl.arange(0, RP)
        mask = inside[:, None] & (ranks < R)[None, :]
        kept = tl.load(keep_rows[:, None] + ranks[None, :], mask=mask, other=0.0)
        h = h * kept.to(tl.float32)
    if rank_scale is not None:
        h = h * _rank_vector(rank_scale, R, R0, RP)[None, :]
    return h


# ------------------------------------------------------------------ first product


@triton.jit
def _accumulate(
    acc, total, offset, xk, cols, down, gain, shift, D_IN: tl.constexpr, BK: tl.constexpr,
    R: tl.constexpr, R0: tl.constexpr, RP: tl.constexpr, CD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of x Wd^T; with a LayerNorm also of c = rowsum(Wg) and Wd shift."""
    w = _down_tile(down, cols, D_IN, BK, R, R0, RP)
    if gain is not None:
        wide = w.to(tl.float32)
        offset += tl.sum(wide * _vector(shift, cols, D_IN, BK)[:, None], 0)
        w = _cast(wide * _vector(gain, cols, D_IN, BK)[:, None], CD)
        total += tl.sum(w.to(tl.float32), 0)
    acc = _dot(xk, _cast(w, CD), acc, PRECISION)
    return acc, total, offset


@triton.jit
def _prepare(
    xk, cols, origin, row_sum, row_square, gain, D_IN: tl.constexpr, BK: tl.constexpr,
    CD: tl.constexpr,
):  # fmt: skip
    """The chunk in the compute type; with a LayerNorm moved by `origin` and added to the sums."""
    if gain is not None:
        moved = xk.to(tl.float32) - origin[:, None]
        if D_IN % BK != 0:
            moved = tl.where((cols < D_IN)[None, :], moved, 0.0)
        row_sum += tl.sum(moved, 1)
        row_square += tl.sum(moved * moved, 1)
        out = _cast(moved, CD)
    else:
        out = _cast(xk, CD)
    return out, row_sum, row_square


@triton.jit
def _origin(x_rows, inside, gain, D_IN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr):
    """Mean of each row's first chunk."""
    if gain is not None:
        count: tl.constexpr = BK if BK < D_IN else D_IN
        out = tl.sum(_tile(x_rows, tl.arange(0, BK), inside, D_IN, BK).to(tl.float32), 1) / count
    else:
        out = tl.zeros([BM], tl.float32)
    return out


@triton.jit
def _moments(origin, row_sum, row_square, gain, EPS: tl.constexpr, D_IN: tl.constexpr):
    """Mean less origin, mean, 1 / standard deviation of each row; unused without a LayerNorm."""
    moved = row_sum / D_IN
    rstd = row_sum
    if gain is not None:
        variance = row_square / D_IN - moved * moved
        rstd = 1 / tl.sqrt(tl.where(variance < 0, 0.0, variance) + EPS)
    return moved, origin + moved, rstd


@triton.jit
def _hidden(
    acc, total, offset, moved, rstd, down_bias, gain, R: tl.constexpr, R0: tl.constexpr,
    RP: tl.constexpr,
):  # fmt: skip
    """p from the finished product, and its part that does not depend on x, [RP]."""
    constant = tl.zeros([RP], tl.float32)
    if gain is not None:
        acc = rstd[:, None] * (acc - moved[:, None] * total[None, :])
        constant = offset
    if down_bias is not None:
        constant += _rank_vector(down_bias, R, R0, RP)
    return acc + constant[None, :], constant


@triton.jit
def _project(
    x_rows, inside, down, down_bias, gain, shift, EPS: tl.constexpr, D_IN: tl.constexpr,
    R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    CD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p of both rank tiles, with x streamed. Without a second tile the first one comes twice."""
    RB: tl.constexpr = R2 if R2 > 0 else R1
    acc1 = tl.zeros([BM, R1], tl.float32)
    acc2 = tl.zeros([BM, RB], tl.float32)
    total1 = tl.zeros([R1], tl.float32)
    total2 = tl.zeros([RB], tl.float32)
    offset1 = tl.zeros([R1], tl.float32)
    offset2 = tl.zeros([RB], tl.float32)
    row_sum = tl.zeros([BM], tl.float32)
    row_square = tl.zeros([BM], tl.float32)
    origin = _origin(x_rows, inside, gain, D_IN, BK, BM)
    for k in range(0, D_IN, BK):
        cols = k + tl.arange(0, BK)
        xk = _tile(x_rows, cols, inside, D_IN, BK)
        xk, row_sum, row_square = _prepare(
            xk, cols, origin, row_sum, row_square, gain, D_IN, BK, CD
        )
        acc1, total1, offset1 = _accumulate(
            acc1, total1, offset1, xk, cols, down, gain, shift, D_IN, BK, R, 0, R1, CD, PRECISION
        )
        if R2 > 0:
            acc2, total2, offset2 = _accumulate(
                acc2, total2, offset2, xk, cols, down, gain, shift, D_IN, BK, R, R1, R2, CD,
                PRECISION,
            )  # fmt: skip
    moved, mean, rstd = _moments(origin, row_sum, row_square, gain, EPS, D_IN)
    p1, constant1 = _hidden(acc1, total1, offset1, moved, rstd, down_bias, gain, R, 0, R1)
    p2 = p1
    constant2 = constant1
    if R2 > 0:
        p2, constant2 = _hidden(acc2, total2, offset2, moved, rstd, down_bias, gain, R, R1, R2)
    return p1, p2, constant1, constant2, total1, total2, mean, rstd


# ------------------------------------------------------------------ forward


@triton.jit
def _finish_tile(
    h1, h2, x_tile, n, y_rows, base_rows, inside, up, up_bias, factor, column_scale,
    D_OUT: tl.constexpr, R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, CD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns n to n + BN of y."""
    cols = n + tl.arange(0, BN)
    w = _cast(_up_tile(up, cols, D_OUT, BN, R, 0, R1), CD)
    out = _dot(h1, tl.trans(w), tl.zeros([BM, BN], tl.float32), PRECISION)
    if R2 > 0:
        w = _cast(_up_tile(up, cols, D_OUT, BN, R, R1, R2), CD)
        out = _dot(h2, tl.trans(w), out, PRECISION)
    if up_bias is not None:
        out += _vector(up_bias, cols, D_OUT, BN)[None, :]
    out *= factor
    if base_rows is not None:
        out += _tile(base_rows, cols, inside, D_OUT, BN).to(tl.float32)
    if x_tile is not None:
        out += x_tile.to(tl.float32)
    if column_scale is not None:
        out *= _vector(column_scale, cols, D_OUT, BN)[None, :]
    mask = inside[:, None]
    if D_OUT % BN != 0:
        mask = mask & (cols < D_OUT)[None, :]
    tl.store(y_rows[:, None] + cols[None, :], _cast(out, y_rows.dtype.element_ty), mask=mask)


@triton.jit
def adapter_forward(
    x, base, down, up, down_bias, up_bias, scale, rank_scale, index, keep, gain, shift,
    column_scale, y, L, x_segment, x_row, base_segment, base_row,
    EPS: tl.constexpr, D_IN: tl.constexpr, D_OUT: tl.constexpr, R: tl.constexpr,
    R1: tl.constexpr, R2: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
    ADD_INPUT: tl.constexpr, RESIDENT: tl.constexpr, SHARED: tl.constexpr,
    PER_SEGMENT: tl.constexpr, NORM_SHARED: tl.constexpr, CD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, segments). RESIDENT keeps the row tile of x in registers (d_in = d_out)."""
    segment = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < L
    wide = rows.to(tl.int64)
    adapter = _adapter(segment, index, SHARED)
    x_rows = x + segment * x_segment + wide * x_row
    y_rows = y + (segment * L + wide) * D_OUT
    base_rows = None
    if base is not None:
        base_rows = base + segment * base_segment + wide * base_row
    keep_rows = None
    if keep is not None:
        keep_rows = keep + (segment * L + wide) * R
    if down_bias is not None:
        down_bias += adapter * R
    if up_bias is not None:
        up_bias += adapter * D_OUT
    if rank_scale is not None:
        rank_scale += (segment if PER_SEGMENT else adapter) * R
    if gain is not None and not NORM_SHARED:
        gain += adapter * D_IN
        shift += adapter * D_IN
    down += adapter * R * D_IN
    up += adapter * D_OUT * R
    factor = tl.load(scale + adapter).to(tl.float32)

    if RESIDENT:
        RB: tl.constexpr = R2 if R2 > 0 else R1
        acc1 = tl.zeros([BM, R1], tl.float32)
        acc2 = tl.zeros([BM, RB], tl.float32)
        total1 = tl.zeros([R1], tl.float32)
        total2 = tl.zeros([RB], tl.float32)
        offset1 = tl.zeros([R1], tl.float32)
        offset2 = tl.zeros([RB], tl.float32)
        row_sum = tl.zeros([BM], tl.float32)
        row_square = tl.zeros([BM], tl.float32)
        origin = _origin(x_rows, inside, gain, D_IN, BK, BM)
        tiles = ()
        for k in tl.static_range(0, D_IN, BK):
            cols = k + tl.arange(0, BK)
            tile = _tile(x_rows, cols, inside, D_IN, BK)
            tiles = tiles + (tile,)  # noqa: RUF005
            xk, row_sum, row_square = _prepare(
                tile, cols, origin, row_sum, row_square, gain, D_IN, BK, CD
            )
            acc1, total1, offset1 = _accumulate(
                acc1, total1, offset1, xk, cols, down, gain, shift, D_IN, BK, R, 0, R1, CD,
                PRECISION,
            )  # fmt: skip
            if R2 > 0:
                acc2, total2, offset2 = _accumulate(
                    acc2, total2, offset2, xk, cols, down, gain, shift, D_IN, BK, R, R1, R2, CD,
                    PRECISION,
                )  # fmt: skip
        moved, _, rstd = _moments(origin, row_sum, row_square, gain, EPS, D_IN)
        p1, _ = _hidden(acc1, total1, offset1, moved, rstd, down_bias, gain, R, 0, R1)
        p2 = p1
        if R2 > 0:
            p2, _ = _hidden(acc2, total2, offset2, moved, rstd, down_bias, gain, R, R1, R2)
    else:
        p1, p2, _, _, _, _, _, _ = _project(
            x_rows, inside, down, down_bias, gain, shift, EPS, D_IN, R, R1, R2, BM, BK, CD,
            PRECISION,
        )  # fmt: skip

    h = _multiply(_act(p1, ACT), keep_rows, inside, rank_scale, R, 0, R1)
    h1 = _cast(_hide(h, R, 0, R1), CD)
    h2 = h1
    if R2 > 0:
        h = _multiply(_act(p2, ACT), keep_rows, inside, rank_scale, R, R1, R2)
        h2 = _cast(_hide(h, R, R1, R2), CD)

    if RESIDENT:
        for n in tl.static_range(0, D_OUT, BK):
            _finish_tile(
                h1, h2, tiles[n // BK], n, y_rows, base_rows, inside, up, up_bias, factor,
                column_scale, D_OUT, R, R1, R2, BM, BK, CD, PRECISION,
            )  # fmt: skip
    else:
        for n in range(0, D_OUT, BK):
            x_tile = None
            if ADD_INPUT:
                x_tile = _tile(x_rows, n + tl.arange(0, BK), inside, D_IN, BK)
            _finish_tile(
                h1, h2, x_tile, n, y_rows, base_rows, inside, up, up_bias, factor, column_scale,
                D_OUT, R, R1, R2, BM, BK, CD, PRECISION,
            )  # fmt: skip


# ------------------------------------------------------------------ backward


@triton.jit
def _row_gradients(
    p, t, constant, total, keep_rows, rank_scale, factor, wide, rows_base, inside, scaled, dp_out,
    sums, rstd, gain, D_IN: tl.constexpr, R: tl.constexpr, R0: tl.constexpr, RP: tl.constexpr,
    RT: tl.constexpr, ACT: tl.constexpr, CD: tl.constexpr,
):  # fmt: skip
    """Rank-sized part of the first backward kernel for one rank tile.

    Writes s h and dp (with a LayerNorm dp * rstd) and the row tile's sums of dp and of
    act(p) * keep * t. Returns dp in the compute type and the two LayerNorm row means.
    """
    ranks = R0 + tl.arange(0, RP)
    kept = _multiply(_act(p, ACT), keep_rows, inside, None, R, R0, RP)
    inner = _multiply(t * factor, keep_rows, inside, rank_scale, R, R0, RP)
    dp = _hide(_act_grad(p, inner, ACT), R, R0, RP)
    tl.store(sums + ranks, tl.sum(dp, 0))
    tl.store(sums + RT + ranks, tl.sum(_hide(kept * t, R, R0, RP), 0))
    low = _cast(dp, CD)
    m1 = tl.sum(tl.zeros_like(dp), 1)
    m2 = m1
    if gain is not None:
        m1 = tl.sum(low.to(tl.float32) * total[None, :], 1) / D_IN
        m2 = tl.sum(low.to(tl.float32) * (p - constant[None, :]), 1) / D_IN
    if scaled is not None:
        pointers = (rows_base + wide * RT)[:, None] + ranks[None, :]
        h = kept * factor
        if rank_scale is not None:
            h = h * _rank_vector(rank_scale, R, R0, RP)[None, :]
        tl.store(scaled + pointers, _cast(_hide(h, R, R0, RP), CD), mask=inside[:, None])
        stored = low
        if gain is not None:
            stored = _cast(dp * rstd[:, None], CD)
        tl.store(dp_out + pointers, stored, mask=inside[:, None])
    return low, m1, m2


@triton.jit
def adapter_backward_rows(
    g, x, down, up, down_bias, scale, rank_scale, keep, gain, shift, column_scale, dx, scaled,
    dp_out, mean_out, tile_sums, L, g_segment, g_row, x_segment, x_row,
    EPS: tl.constexpr, D_IN: tl.constexpr, D_OUT: tl.constexpr, R: tl.constexpr,
    R1: tl.constexpr, R2: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
    ADD_INPUT: tl.constexpr, SHARED: tl.constexpr, PER_SEGMENT: tl.constexpr,
    NORM_SHARED: tl.constexpr, CD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, segments): dx, the scratch s h and dp, sums per row tile."""
    RT: tl.constexpr = R1 + R2
    segment = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = rows < L
    wide = rows.to(tl.int64)
    adapter = _adapter(segment, None, SHARED)
    x_rows = x + segment * x_segment + wide * x_row
    g_rows = g + segment * g_segment + wide * g_row
    keep_rows = None
    if keep is not None:
        keep_rows = keep + (segment * L + wide) * R
    if down_bias is not None:
        down_bias += adapter * R
    if rank_scale is not None:
        rank_scale += (segment if PER_SEGMENT else adapter) * R
    if gain is not None and not NORM_SHARED:
        gain += adapter * D_IN
        shift += adapter * D_IN
    down += adapter * R * D_IN
    up += adapter * D_OUT * R
    factor = tl.load(scale + adapter).to(tl.float32)

    p1, p2, constant1, constant2, total1, total2, mean, rstd = _project(
        x_rows, inside, down, down_bias, gain, shift, EPS, D_IN, R, R1, R2, BM, BK, CD, PRECISION
    )

    RB: tl.constexpr = R2 if R2 > 0 else R1
    t1 = tl.zeros([BM, R1], tl.float32)
    t2 = tl.zeros([BM, RB], tl.float32)
    for n in range(0, D_OUT, BK):
        cols = n + tl.arange(0, BK)
        gk = _tile(g_rows, cols, inside, D_OUT, BK)
        if column_scale is not None:
            gk = gk.to(tl.float32) * _vector(column_scale, cols, D_OUT, BK)[None, :]
        gk = _cast(gk, CD)
        w = _cast(_up_tile(up, cols, D_OUT, BK, R, 0, R1), CD)
        t1 = _dot(gk, w, t1, PRECISION)
        if R2 > 0:
            w = _cast(_up_tile(up, cols, D_OUT, BK, R, R1, R2), CD)
            t2 = _dot(gk, w, t2, PRECISION)

    rows_base = segment * L * RT
    tiles = tl.num_programs(0)
    sums = tile_sums + (segment * tiles + tl.program_id(0)) * 2 * RT
    dp1, m1, m2 = _row_gradients(
        p1, t1, constant1, total1, keep_rows, rank_scale, factor, wide, rows_base, inside, scaled,
        dp_out, sums, rstd, gain, D_IN, R, 0, R1, RT, ACT, CD,
    )  # fmt: skip
    dp2 = dp1
    if R2 > 0:
        dp2, n1, n2 = _row_gradients(
            p2, t2, constant2, total2, keep_rows, rank_scale, factor, wide, rows_base, inside,
            scaled, dp_out, sums, rstd, gain, D_IN, R, R1, R2, RT, ACT, CD,
        )  # fmt: skip
        m1 += n1
        m2 += n2
    if mean_out is not None:
        tl.store(mean_out + segment * L + wide, mean, mask=inside)

    if dx is not None:
        dx_rows = dx + (segment * L + wide) * D_IN
        for k in range(0, D_IN, BK):
            cols = k + tl.arange(0, BK)
            w = _down_tile(down, cols, D_IN, BK, R, 0, R1)
            if gain is not None:
                w = w.to(tl.float32) * _vector(gain, cols, D_IN, BK)[:, None]
            out = _dot(dp1, tl.trans(_cast(w, CD)), tl.zeros([BM, BK], tl.float32), PRECISION)
            if R2 > 0:
                w = _down_tile(down, cols, D_IN, BK, R, R1, R2)
                if gain is not None:
                    w = w.to(tl.float32) * _vector(gain, cols, D_IN, BK)[:, None]
                out = _dot(dp2, tl.trans(_cast(w, CD)), out, PRECISION)
            if gain is not None:
                xk = _tile(x_rows, cols, inside, D_IN, BK).to(tl.float32)
                xh = (xk - mean[:, None]) * rstd[:, None]
                out = rstd[:, None] * (out - m1[:, None] - xh * m2[:, None])
            if ADD_INPUT:
                gk = _tile(g_rows, cols, inside, D_IN, BK).to(tl.float32)
                if column_scale is not None:
                    gk = gk * _vector(column_scale, cols, D_IN, BK)[None, :]
                out += gk
            mask = inside[:, None]
            if D_IN % BK != 0:
                mask = mask & (cols < D_IN)[None, :]
            tl.store(dx_rows[:, None] + cols[None, :], _cast(out, dx.dtype.element_ty), mask=mask)


@triton.jit
def _slab_product(
    side, side_row, factors, mean, cols, first, L, D: tl.constexpr, BD: tl.constexpr,
    R1: tl.constexpr, R2: tl.constexpr, CH: tl.constexpr, BM: tl.constexpr, SUM: tl.constexpr,
    CD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """side[slab, cols]^T factors[slab], [BD, R1] and [BD, R2], and the column sums of `side`."""
    RT: tl.constexpr = R1 + R2
    RB: tl.constexpr = R2 if R2 > 0 else R1
    acc1 = tl.zeros([BD, R1], tl.float32)
    acc2 = tl.zeros([BD, RB], tl.float32)
    column_sum = tl.zeros([BD], tl.float32)
    for i in range(0, CH, BM):
        rows = first + i + tl.arange(0, BM)
        inside = rows < L
        wide = rows.to(tl.int64)
        mask = inside[None, :]
        if D % BD != 0:
            mask = mask & (cols < D)[:, None]
        a = tl.load(side + cols[:, None] + (wide * side_row)[None, :], mask=mask, other=0.0)
        if SUM:
            column_sum += tl.sum(a.to(tl.float32), 1)
        if mean is not None:
            row_mean = tl.load(mean + wide, mask=inside, other=0.0)
            a = tl.where(mask, a.to(tl.float32) - row_mean[None, :], 0.0)
        a = _cast(a, CD)
        pointers = factors + (wide * RT)[:, None]
        b = tl.load(pointers + tl.arange(0, R1)[None, :], mask=inside[:, None], other=0.0)
        acc1 = _dot(a, b, acc1, PRECISION)
        if R2 > 0:
            b = tl.load(pointers + R1 + tl.arange(0, R2)[None, :], mask=inside[:, None], other=0.0)
            acc2 = _dot(a, b, acc2, PRECISION)
    return acc1, acc2, column_sum


@triton.jit
def _store_partial(
    out, acc, cols, col_stride, rank_stride, D: tl.constexpr, R: tl.constexpr, R0: tl.constexpr,
    RP: tl.constexpr,
):  # fmt: skip
    """acc [BD, RP] to a weight's place in a row of partials."""
    ranks = R0 + tl.arange(0, RP)
    mask = (cols < D)[:, None] & (ranks < R)[None, :]
    tl.store(out + cols[:, None] * col_stride + ranks[None, :] * rank_stride, acc, mask=mask)


@triton.jit
def adapter_backward_weights(
    g, x, scaled, dp, mean, tile_sums, column_scale, partials, L, TILES, g_segment, g_row,
    x_segment, x_row, D_IN: tl.constexpr, D_OUT: tl.constexpr, R: tl.constexpr,
    R1: tl.constexpr, R2: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, CH: tl.constexpr,
    TILES_PER_SLAB: tl.constexpr, ROW: tl.constexpr,
    X_BLOCKS: tl.constexpr, G_BLOCKS: tl.constexpr, CD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (column blocks of x, then of g, then one for sums; slabs; segments).

    A row of `partials` holds dWd [r, d_in], dWu [d_out, r], colsum(g) [d_out], colsum(dp) [r] and
    colsum(act(p) keep t) [r] of one slab.
    """
    RT: tl.constexpr = R1 + R2
    block = tl.program_id(0)
    slab = tl.program_id(1)
    segment = tl.program_id(2).to(tl.int64)
    first = slab * CH
    out = partials + (segment * tl.num_programs(1) + slab) * ROW
    if block < X_BLOCKS:
        cols = block * BD + tl.arange(0, BD)
        row_mean = None
        if mean is not None:
            row_mean = mean + segment * L
        acc1, acc2, _ = _slab_product(
            x + segment * x_segment, x_row, dp + segment * L * RT, row_mean, cols, first, L,
            D_IN, BD, R1, R2, CH, BM, False, CD, PRECISION,
        )  # fmt: skip
        _store_partial(out, acc1, cols, 1, D_IN, D_IN, R, 0, R1)
        if R2 > 0:
            _store_partial(out, acc2, cols, 1, D_IN, D_IN, R, R1, R2)
    elif block < X_BLOCKS + G_BLOCKS:
        cols = (block - X_BLOCKS) * BD + tl.arange(0, BD)
        acc1, acc2, column_sum = _slab_product(
            g + segment * g_segment, g_row, scaled + segment * L * RT, None, cols, first, L,
            D_OUT, BD, R1, R2, CH, BM, True, CD, PRECISION,
        )  # fmt: skip
        if column_scale is not None:
            gamma = _vector(column_scale, cols, D_OUT, BD)
            acc1 = acc1 * gamma[:, None]
            acc2 = acc2 * gamma[:, None]
            column_sum = column_sum * gamma
        out += R * D_IN
        _store_partial(out, acc1, cols, R, 1, D_OUT, R, 0, R1)
        if R2 > 0:
            _store_partial(out, acc2, cols, R, 1, D_OUT, R, R1, R2)
        tl.store(out + D_OUT * R + cols, column_sum, mask=cols < D_OUT)
    else:
        tile = slab * TILES_PER_SLAB + tl.arange(0, TILES_PER_SLAB)
        mask = tile < TILES
        sums = tile_sums + (segment * TILES + tile) * 2 * RT
        out += R * D_IN + D_OUT * R + D_OUT
        for which in tl.static_range(2):
            ranks = tl.arange(0, R1)
            part = tl.load(
                sums[:, None] + which * RT + ranks[None, :], mask=mask[:, None], other=0.0
            )
            tl.store(out + which * R + ranks, tl.sum(part, 0), mask=ranks < R)
            if R2 > 0:
                ranks = R1 + tl.arange(0, R2)
                part = tl.load(
                    sums[:, None] + which * RT + ranks[None, :], mask=mask[:, None], other=0.0
                )
                tl.store(out + which * R + ranks, tl.sum(part, 0), mask=ranks < R)


@triton.jit
def _sum_rows(partials, cols, mask, ROWS, ROW: tl.constexpr, ROWS_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of `cols` over the rows of one adapter, in the order of the rows, 16 at a time."""
    STEP: tl.constexpr = 16
    acc = tl.zeros([BLOCK], tl.float32)
    for i in range(0, ROWS_PADDED, STEP):
        rows = i + tl.arange(0, STEP)
        pointers = partials + (rows.to(tl.int64) * ROW)[:, None] + cols[None, :]
        part = tl.load(pointers, mask=(rows < ROWS)[:, None] & mask[None, :], other=0.0)
        acc += tl.sum(part, 0)
    return acc


@triton.jit
def _sum_and_store(
    partials, out, block, adapter, factor, ROWS, START: tl.constexpr, SIZE: tl.constexpr,
    ROW: tl.constexpr, ROWS_PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of one gradient: `SIZE` columns of the partials from `START` on."""
    cols = block * BLOCK + tl.arange(0, BLOCK)
    mask = cols < SIZE
    total = _sum_rows(partials, START + cols, mask, ROWS, ROW, ROWS_PADDED, BLOCK) * factor
    place = out + adapter * SIZE + cols
    tl.store(place, _cast(total, out.dtype.element_ty), mask=mask)


@triton.jit
def adapter_backward_sum(
    partials, down_out, up_out, up_bias_out, down_bias_out, scale_out, up_bias, rank_scale, scale,
    ROWS, D_IN: tl.constexpr, D_OUT: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    ROW: tl.constexpr, ROWS_PADDED: tl.constexpr, BLOCK: tl.constexpr, DOWN_BLOCKS: tl.constexpr,
    UP_BLOCKS: tl.constexpr, UP_BIAS_BLOCKS: tl.constexpr, DOWN_BIAS_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of dWd, dWu, dbu, dbd and one for ds; adapters): sums over the slabs.

    ds = sum_j rank_scale_j q_j + <bu, colsum(g)> with q = colsum(act(p) keep t).
    """
    UP: tl.constexpr = R * D_IN
    UP_BIAS: tl.constexpr = UP + D_OUT * R
    DOWN_BIAS: tl.constexpr = UP_BIAS + D_OUT
    Q: tl.constexpr = DOWN_BIAS + R
    UP_END: tl.constexpr = DOWN_BLOCKS + UP_BLOCKS
    UP_BIAS_END: tl.constexpr = UP_END + UP_BIAS_BLOCKS
    DOWN_BIAS_END: tl.constexpr = UP_BIAS_END + DOWN_BIAS_BLOCKS
    block = tl.program_id(0)
    adapter = tl.program_id(1).to(tl.int64)
    partials += adapter * ROWS * ROW
    if block < DOWN_BLOCKS:
        if down_out is not None:
            _sum_and_store(
                partials, down_out, block, adapter, 1.0, ROWS, 0, UP, ROW, ROWS_PADDED, BLOCK
            )
    elif block < UP_END:
        if up_out is not None:
            _sum_and_store(
                partials, up_out, block - DOWN_BLOCKS, adapter, 1.0, ROWS, UP, D_OUT * R, ROW,
                ROWS_PADDED, BLOCK,
            )  # fmt: skip
    elif block < UP_BIAS_END:
        if up_bias_out is not None:
            factor = tl.load(scale + adapter).to(tl.float32)
            _sum_and_store(
                partials, up_bias_out, block - UP_END, adapter, factor, ROWS, UP_BIAS, D_OUT, ROW,
                ROWS_PADDED, BLOCK,
            )  # fmt: skip
    elif block < DOWN_BIAS_END:
        if down_bias_out is not None:
            _sum_and_store(
                partials, down_bias_out, block - UP_BIAS_END, adapter, 1.0, ROWS, DOWN_BIAS, R,
                ROW, ROWS_PADDED, BLOCK,
            )  # fmt: skip
    else:
        if scale_out is not None:
            ranks = tl.arange(0, RP)
            q = _sum_rows(partials, Q + ranks, ranks < R, ROWS, ROW, ROWS_PADDED, RP)
            if rank_scale is not None:
                q = q * _rank_vector(rank_scale + adapter * R, R, 0, RP)
            total = tl.sum(q, 0)
            if up_bias is not None:
                for n in range(0, D_OUT, BLOCK):
                    cols = n + tl.arange(0, BLOCK)
                    mask = cols < D_OUT
                    bias = tl.load(up_bias + adapter * D_OUT + cols, mask=mask, other=0.0)
                    g_sum = _sum_rows(partials, UP_BIAS + cols, mask, ROWS, ROW, ROWS_PADDED, BLOCK)
                    total += tl.sum(bias.to(tl.float32) * g_sum, 0)
            tl.store(scale_out + adapter, total)
