"""`adapter`: the low-rank or bottleneck module with its residual additions as one operation.

Three ways to the same launchers, because a call must not cost more on the host than the products:

* nothing needs a gradient: the launcher, directly;
* a gradient in eager mode: an `autograd.Function` that takes its context in `forward`;
* under `torch.compile`, `torch.func` or forward-mode differentiation: the operators
  `driftline::adapter_forward` and `driftline::adapter_backward` (opaque, with shapes for tracing)
  inside a `Function` with `setup_context`, which costs several times as much a call. A transform
  of `torch.func` that is itself compiled gets the plain formula.

The backend of a launch is chosen by `kernels.dispatch`.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from driftline.core.errors import suggest
from driftline.kernels import dispatch, reference

ACTIVATIONS = ("none", "relu", "gelu")
SECOND_DERIVATIVE = (
    "second derivatives of the fused adapter are not supported; use kernels.reference.formula"
)
INDEX_GRADIENT = (
    "adapter(index=...) has no backward pass: call it under torch.no_grad(), or give each "
    "adapter its own samples with weights of shape [T, r, d_in]"
)


class Operands(NamedTuple):
    """The tensors of a call as the caller gave them (shapes: `adapter`), without base."""

    x: Tensor
    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    scale: Tensor | None  # None: the number of `Settings`
    rank_scale: Tensor | None
    index: Tensor | None
    keep: Tensor | None
    norm_gain: Tensor | None
    norm_shift: Tensor | None
    column_scale: Tensor | None


DIFFERENTIABLE = (
    *("x", "down", "up", "down_bias", "up_bias", "scale", "rank_scale"),
    *("norm_gain", "norm_shift", "column_scale"),
)


class Settings(NamedTuple):
    """What is not a tensor."""

    factor: float
    eps: float
    act: str
    add_input: bool
    dtype: torch.dtype  # of the products
    backend: str


def adapter(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    act: Literal["none", "relu", "gelu"] = "none",
    scale: float | Tensor = 1.0,
    rank_scale: Tensor | None = None,
    base: Tensor | None = None,
    add_input: bool = False,
    index: Tensor | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
    keep: Tensor | None = None,
    column_scale: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """`column_scale * ([x] + [base] + scale (h up^T + up_bias))` [..., d_out], where
    `h = act(LN(x) down^T + down_bias) * keep * rank_scale`; absent parts are left out.

    Args:
        x: [..., d_in]; with grouped weights [T, ..., d_in], chunk t through adapter t; with `index`
            [B, ..., d_in]. Three or more dimensions in the last two cases.
        down, up: [r, d_in] and [d_out, r] as in `nn.Linear`; or [T, r, d_in] and [T, d_out, r].
        down_bias, up_bias: [r] and [d_out], with grouped weights [T, r] and [T, d_out].
        act: `gelu` is the exact one.
        scale: a number, a scalar tensor or, with grouped weights, [T]. A tensor can be learnt.
        rank_scale: factors of the hidden columns: [r], or [S, r] where S is the length of x's first
            dimension (the groups, or samples).
        base: [..., d_out], for example the output of the sub-module beside the adapter.
        add_input: adds x; d_in = d_out.
        index: [B] integers, which adapter each sample uses. No gradients.
        norm: gain and shift ([d_in] or [T, d_in]) and eps of a LayerNorm in front.
        keep: [..., r], multiplies the hidden columns: a dropout mask divided by its probability.
            No gradient.
        column_scale: [d_out] (DoRA's magnitude over norm).
        in_place: base is the caller's temporary and may be overwritten. Only honoured where nothing
            needs a gradient; the result may then be base itself.

    Under autocast the products are computed in autocast's dtype; x and base keep theirs. The
    result has the promoted dtype of x (if added) and base, or that of the products without them.
    Gradients of first order; with `kernel.backend=reference` also `norm` and `column_scale` have
    them, through the plain formula.

    Raises:
        ValueError: shapes or dtypes that do not fit, unknown `act`, an `index` out of range (CPU).
        RuntimeError: a gradient with `index`, a second derivative, forward-mode differentiation.
        BackendError: if `kernel.backend=triton` cannot run the call.
    """
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if autocast else down.dtype
    _check(x, down, up, down_bias, up_bias, act, scale, rank_scale, base, add_input, index)
    if norm is not None or keep is not None or column_scale is not None:
        _check_rare(x, down, up, norm, keep, column_scale)
    if x.dtype != dtype and not autocast:
        raise ValueError(
            f"x is {x.dtype} and down {dtype}: cast one of them, or use torch.autocast"
        )
    backend = dispatch.select(x, base, down, up, dtype)
    gain, shift, eps = norm or (None, None, 0.0)
    learnt, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, float(scale))
    operands = Operands(
        x, down, up, down_bias, up_bias, learnt, rank_scale, index, keep, gain, shift, column_scale
    )
    settings = Settings(factor, eps, act, add_input, dtype, backend)
    wants = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (base, *operands)
    )
    if wants and index is not None:
        raise RuntimeError(INDEX_GRADIENT)
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    rare = norm is not None or column_scale is not None
    plain = rare and backend == "reference" and (wants or transformed)
    # Dynamo drops the backward pass of a Function inside a transform: zeros instead of gradients.
    plain = plain or (transformed and torch.compiler.is_compiling())
    if plain or backend == "compile" or x.numel() == 0:
        compiles = backend == "compile" and x.numel() and not transformed
        call = _compiled() if compiles else reference.formula
        with _no_autocast(kind):
            return call(*_named(operands, base, settings), **_options(settings))
    if transformed or torch.compiler.is_compiling():
        given = (base, *operands, *settings)
        if wants or transformed:  # transforms hide whether a gradient is wanted
            return _Traced.apply(*given)[0]
        return torch.ops.driftline.adapter_forward(*given)[0]
    if wants:
        return _Eager.apply(settings, base, *operands)
    return _launch_forward(operands, base, settings, in_place)[0]


# ------------------------------------------------------------------ checks


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _check(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    act: str,
    scale: float | Tensor,
    rank_scale: Tensor | None,
    base: Tensor | None,
    add_input: bool,
    index: Tensor | None,
) -> None:
    if act not in ACTIVATIONS:
        raise ValueError(
            f"act={act!r} is not one of {', '.join(ACTIVATIONS)}{suggest(act, ACTIVATIONS)}"
        )
    of_x, of_down, of_up = x.shape, down.shape, up.shape
    if (
        len(of_down) not in (2, 3)
        or len(of_up) != len(of_down)
        or of_up[-1] != of_down[-2]
        or of_up[:-2] != of_down[:-2]
    ):
        raise ValueError(
            f"down {_shape(down)} and up {_shape(up)} do not fit: [r, d_in] and [d_out, r], or "
            "[T, r, d_in] and [T, d_out, r]"
        )
    if of_x[-1:] != of_down[-1:]:
        raise ValueError(f"x {_shape(x)} and down {_shape(down)} differ in d_in")
    if down_bias is not None and down_bias.shape != of_down[:-1]:
        raise ValueError(f"down_bias {_shape(down_bias)} does not fit down {_shape(down)}")
    if up_bias is not None and up_bias.shape != of_up[:-1]:
        raise ValueError(f"up_bias {_shape(up_bias)} does not fit up {_shape(up)}")
    width, rank = of_up[-2:]
    if base is not None and base.shape != (*of_x[:-1], width):
        raise ValueError(
            f"base {_shape(base)} does not fit x {_shape(x)} and up {_shape(up)}: it needs "
            f"{(*of_x[:-1], width)}"
        )
    if add_input and of_x[-1] != width:
        raise ValueError(f"add_input: x {_shape(x)} and up {_shape(up)} differ in width")
    if isinstance(scale, Tensor):
        if scale.dim() and scale.shape != of_down[:-2]:
            raise ValueError(
                f"scale {_shape(scale)} is neither a scalar nor [T] of down {_shape(down)}"
            )
        if scale.device != x.device:
            raise ValueError(f"scale is on {scale.device} and x on {x.device}")
    if rank_scale is not None and _shape(rank_scale) not in ((rank,), (of_x[0], rank)):
        raise ValueError(
            f"rank_scale {_shape(rank_scale)} does not fit x {_shape(x)} and down {_shape(down)}: "
            f"it needs {(rank,)} or {(of_x[0], rank)}"
        )
    if len(of_down) == 3:
        if len(of_x) < 3:
            raise ValueError(f"x {_shape(x)} needs three dimensions with down {_shape(down)}")
        if index is None and of_x[0] != of_down[0]:
            raise ValueError(
                f"x {_shape(x)} and down {_shape(down)} differ in the number of groups; with one "
                "adapter a sample give `index`"
            )
    if index is not None and (
        len(of_down) != 3
        or index.shape != of_x[:1]
        or index.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(
            f"index {_shape(index)} of {index.dtype} needs int64 [B] for x {_shape(x)} and weights "
            f"[T, r, d_in], got down {_shape(down)}"
        )


def _check_rare(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    norm: tuple[Tensor, Tensor, float] | None,
    keep: Tensor | None,
    column_scale: Tensor | None,
) -> None:
    lead, (width, rank) = down.shape[:-2], up.shape[-2:]
    if norm is not None:
        for name, part in zip(("gain", "shift"), norm[:2], strict=True):
            if part.shape not in (x.shape[-1:], (*lead, x.shape[-1])):
                raise ValueError(f"norm's {name} {_shape(part)} does not fit x {_shape(x)}")
    if keep is not None:
        if keep.shape != (*x.shape[:-1], rank):
            raise ValueError(f"keep {_shape(keep)} is not {(*x.shape[:-1], rank)}")
        if keep.requires_grad:
            raise ValueError("keep is a mask and takes no gradient: detach it")
    if column_scale is not None and column_scale.shape != (width,):
        raise ValueError(f"column_scale {_shape(column_scale)} is not {(width,)}")


# ------------------------------------------------------------------ launchers


def _named(operands: Operands, base: Tensor | None, settings: Settings) -> tuple[Any, ...]:
    """Positional arguments of the functions in `kernels.reference`."""
    x, down, up, down_bias, up_bias, scale, rank_scale, index, keep, gain, shift, gamma = operands
    norm = None if gain is None else (gain, shift, settings.eps)
    factor = settings.factor if scale is None else scale
    return (x, base, down, up, down_bias, up_bias, factor, rank_scale, index, keep, norm, gamma)


def _options(settings: Settings) -> dict[str, Any]:
    return {
        "act": settings.act,
        "add_input": settings.add_input,
        "compute_dtype": settings.dtype,
    }


def _no_autocast(kind: str) -> AbstractContextManager[Any]:
    """Launchers choose dtypes themselves."""
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _launch_forward(
    operands: Operands, base: Tensor | None, settings: Settings, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """y [..., d_out] and what the backward launch wants beside the operands (may be empty)."""
    index, x = operands.index, operands.x
    if index is not None and x.device.type == "cpu":
        low, high = (int(v) for v in index.aminmax())
        if low < 0 or high >= len(operands.down):
            raise ValueError(
                f"index runs from {low} to {high}, but down {_shape(operands.down)} holds "
                f"{len(operands.down)} adapters"
            )
    with _no_autocast(x.device.type):
        if settings.backend == "reference":
            return reference.forward(
                *_named(operands, base, settings), **_options(settings), in_place=in_place
            )
        from driftline.kernels import triton_adapter

        given, per_segment = _segments(operands, base, settings)
        y = triton_adapter.forward(*given, **_options(settings), per_segment=per_segment)
        return y.view(*x.shape[:-1], y.shape[-1]), x.new_empty(0)


def _launch_backward(
    g: Tensor,
    hidden: Tensor,
    operands: Operands,
    base: Tensor | None,
    settings: Settings,
    needs: set[str],
) -> dict[str, Tensor]:
    """Gradients of the operands in `needs`, in their shapes and dtypes."""
    with _no_autocast(g.device.type):
        if settings.backend == "reference":
            x, down, up, down_bias, up_bias, scale, rank_scale, _, keep, *_ = operands
            scale = settings.factor if scale is None else scale
            found = reference.backward(
                *(g, hidden, x, down, up, down_bias, up_bias, scale, rank_scale, keep),
                **_options(settings),
                needs=needs,
            )
        else:
            from driftline.kernels import triton_adapter

            (x, wide_base, *rest), per_segment = _segments(operands, base, settings)
            found = triton_adapter.backward(
                _last_contiguous(g.reshape(*x.shape[:2], g.shape[-1])),
                *(x, wide_base, *rest),
                **_options(settings),
                needs=needs,
                per_segment=per_segment,
            )
    return {name: _fit(found[name], getattr(operands, name)) for name in needs}


def _fit(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its tensor, contiguous."""
    if gradient.shape == like.shape and gradient.dtype == like.dtype and gradient.is_contiguous():
        return gradient
    if gradient.numel() != like.numel():  # a value that served several segments
        gradient = gradient.reshape(-1, *like.shape).sum(0)
    return gradient.reshape(like.shape).to(like.dtype).contiguous()


# ------------------------------------------------------------------ Triton's form of the operands


def _segments(
    operands: Operands, base: Tensor | None, settings: Settings
) -> tuple[tuple[Any, ...], bool]:
    """Operands as segments: x [S, L, d_in], weights [T, ...], scale [T]; and whether rank_scale
    has a row per segment."""
    x, down, up, down_bias, up_bias, scale, rank_scale, index, keep, gain, shift, gamma = operands
    per_segment = rank_scale is not None and rank_scale.dim() == 2 and down.dim() == 2
    per_segment = per_segment or (index is not None and rank_scale is not None)
    count = x.shape[0] if down.dim() == 3 or per_segment else 1
    if count == 1 and x.dim() == 3 and not (x.is_contiguous() and _contiguous(base)):
        count = x.shape[0]  # strides of samples and rows serve without a copy
    single = down.dim() == 2
    adapters = 1 if single else down.shape[0]

    def rows(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        lead = math.prod(tensor.shape[:-1])
        return _last_contiguous(tensor.reshape(count, lead // count, tensor.shape[-1]))

    def weights(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return (tensor[None] if single else tensor).contiguous()

    if rank_scale is not None:
        wanted = count if per_segment else adapters
        rank_scale = rank_scale.float().expand(wanted, -1).contiguous()
    if scale is None:
        scale = _constant(settings.factor, adapters, x.device)
    norm = None
    if gain is not None and shift is not None:
        gain, shift = torch.broadcast_tensors(torch.atleast_2d(gain), torch.atleast_2d(shift))
        norm = (gain.contiguous(), shift.contiguous(), settings.eps)
    given = (
        *(rows(x), rows(base), weights(down), weights(up), weights(down_bias), weights(up_bias)),
        *(scale.float().expand(adapters).contiguous(), rank_scale, index, rows(keep), norm, gamma),
    )
    return given, per_segment


def _contiguous(tensor: Tensor | None) -> bool:
    return tensor is None or tensor.is_contiguous()


def _last_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


_constants: dict[tuple[float, int, torch.device], Tensor] = {}


def _constant(value: float, count: int, device: torch.device) -> Tensor:
    """[count] of one value; kept, unless it belongs to the memory of a graph capture."""
    key = (value, count, device)
    found = _constants.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = torch.full((count,), value, device=device)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            if len(_constants) >= 256:
                _constants.clear()
            _constants[key] = found
    return found


# ------------------------------------------------------------------ eager autograd


class _Eager(torch.autograd.Function):
    """Context in `forward`: a `setup_context` costs more than a small adapter."""

    @staticmethod
    def forward(ctx: Any, settings: Settings, base: Tensor | None, *tensors: Tensor | None) -> Any:
        operands = Operands(*tensors)  # pyrefly: ignore
        y, hidden = _launch_forward(operands, base, settings)
        kept = base if settings.backend == "triton" and operands.column_scale is not None else None
        ctx.save_for_backward(hidden, kept, *operands)
        ctx.settings, ctx.base_dtype = settings, None if base is None else base.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(SECOND_DERIVATIVE)
        hidden, base, *tensors = ctx.saved_tensors
        of_base, found = _gradients(
            ctx.needs_input_grad[1:],
            *(grads[0], hidden, Operands(*tensors), base, ctx.base_dtype, ctx.settings),
            _launch_backward,
        )
        return (None, of_base, *found)


def _gradients(
    needed: tuple[bool, ...],
    g: Tensor,
    hidden: Tensor,
    operands: Operands,
    base: Tensor | None,
    base_dtype: torch.dtype | None,
    settings: Settings,
    launch: Any,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of base and of the operands, None where `needed` says so."""
    if operands.index is not None:
        raise RuntimeError(INDEX_GRADIENT)
    of_base = None
    if needed[0]:
        of_base = g if operands.column_scale is None else g * operands.column_scale
        of_base = of_base.to(base_dtype)
    names = {n for n, wanted in zip(Operands._fields, needed[1:], strict=True) if wanted}
    found = launch(g, hidden, operands, base, settings, names) if names else {}
    return of_base, [found.get(name) for name in Operands._fields]


# ------------------------------------------------------------------ traced path


@cache
def _compiled() -> Any:
    return torch.compile(reference.formula)


_OPERANDS = (
    "Tensor x, Tensor down, Tensor up, Tensor? down_bias, Tensor? up_bias, Tensor? scale, "
    "Tensor? rank_scale, Tensor? index, Tensor? keep, Tensor? norm_gain, Tensor? norm_shift, "
    "Tensor? column_scale, float factor, float eps, str act, bool add_input, ScalarType dtype, "
    "str backend"
)

torch.library.define(
    "driftline::adapter_forward", f"(Tensor? base, {_OPERANDS}) -> (Tensor, Tensor)"
)
torch.library.define(
    "driftline::adapter_backward",
    f"(Tensor g, Tensor hidden, Tensor? base, {_OPERANDS}, bool[] needs) -> "
    f"({', '.join(['Tensor'] * len(DIFFERENTIABLE))})",
)


def _split(given: tuple[Any, ...]) -> tuple[Operands, Settings]:
    count = len(Operands._fields)
    return Operands(*given[:count]), Settings(*given[count:])


@torch.library.impl("driftline::adapter_forward", "CompositeExplicitAutograd")
def _forward_op(base: Tensor | None, *given: Any) -> tuple[Tensor, Tensor]:
    operands, settings = _split(given)
    return _launch_forward(operands, base, settings)


@torch.library.register_fake("driftline::adapter_forward")
def _forward_fake(base: Tensor | None, *given: Any) -> tuple[Tensor, Tensor]:
    operands, settings = _split(given)
    x, up = operands.x, operands.up
    dtype = reference.output_dtype(x, base, settings.add_input, settings.dtype)
    y = x.new_empty((*x.shape[:-1], up.shape[-2]), dtype=dtype)
    if settings.backend != "reference":
        return y, x.new_empty(0)
    rows = x.shape[:-1].numel()
    shape = (x.shape[0], rows // x.shape[0]) if up.dim() == 3 else (rows,)
    return y, x.new_empty((*shape, up.shape[-1]), dtype=settings.dtype)


@torch.library.impl("driftline::adapter_backward", "CompositeExplicitAutograd")
def _backward_op(g: Tensor, hidden: Tensor, base: Tensor | None, *given: Any) -> Any:
    operands, settings = _split(given[:-1])
    needs = {name for name, wanted in zip(DIFFERENTIABLE, given[-1], strict=True) if wanted}
    found = _launch_backward(g, hidden, operands, base, settings, needs)
    return tuple(found[n] if n in needs else g.new_empty(0) for n in DIFFERENTIABLE)


@torch.library.register_fake("driftline::adapter_backward")
def _backward_fake(g: Tensor, hidden: Tensor, base: Tensor | None, *given: Any) -> Any:
    operands, _ = _split(given[:-1])
    return tuple(
        getattr(operands, name).new_empty(getattr(operands, name).shape)
        if wanted
        else g.new_empty(0)
        for name, wanted in zip(DIFFERENTIABLE, given[-1], strict=True)
    )


def _launch_backward_op(
    g: Tensor,
    hidden: Tensor,
    operands: Operands,
    base: Tensor | None,
    settings: Settings,
    needs: set[str],
) -> dict[str, Tensor]:
    flags = [name in needs for name in DIFFERENTIABLE]
    # Dynamo (torch 2.6 to 2.14 at least) cannot trace a Function inside a backward pass, and
    # torch.compile refuses second derivatives by itself.
    compiling = torch.compiler.is_compiling()
    call = torch.ops.driftline.adapter_backward if compiling else _TracedBackward.apply
    found = call(g, hidden, base, *operands, *settings, flags)
    return {name: found[i] for i, name in enumerate(DIFFERENTIABLE) if name in needs}


class _Traced(torch.autograd.Function):
    """The operators with what `torch.func` and `torch.compile` need of a Function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(base: Tensor | None, *given: Any) -> Any:
        return torch.ops.driftline.adapter_forward(base, *given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        base, *given = inputs
        operands, settings = _split(tuple(given))
        _, hidden = output
        ctx.mark_non_differentiable(hidden)
        kept = base if settings.backend == "triton" and operands.column_scale is not None else None
        ctx.save_for_backward(hidden, kept, *operands)
        ctx.settings, ctx.base_dtype = settings, None if base is None else base.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, base, *tensors = ctx.saved_tensors
        of_base, found = _gradients(
            ctx.needs_input_grad[: 1 + len(Operands._fields)],
            *(grads[0], hidden, Operands(*tensors), base, ctx.base_dtype, ctx.settings),
            _launch_backward_op,
        )
        return (of_base, *found, *[None] * len(Settings._fields))


class _TracedBackward(torch.autograd.Function):
    """The backward operator, so that a second derivative is an error and not a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*given: Any) -> Any:
        return torch.ops.driftline.adapter_backward(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(SECOND_DERIVATIVE)
