"""The adapter operator on a CPU against its formula in float64."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vmap

from driftline.core.errors import UserError
from driftline.kernels import adapter, chosen, dispatch, use
from driftline.kernels import dora as dora_module
from driftline.kernels.adapter import SECOND_DERIVATIVE, Operands
from driftline.kernels.dora import Kept, dora_linear, lora_linear, merged_weight
from driftline.kernels.reference import formula

LIMIT = 5e-6
PARAMETERS = ("down", "up", "down_bias", "up_bias", "scale", "rank_scale")
GRADIENTS = ("x", "base", *PARAMETERS)


@pytest.fixture(autouse=True)
def automatic():
    """Every test starts and ends with kernel.backend=auto."""
    use("auto")
    yield
    use("auto")


def operands(
    rows: tuple[int, ...] = (33,),
    d: int = 40,
    r: int = 4,
    *,
    out: int | None = None,
    groups: int | None = None,
    form: str = "P",
    bias: bool = True,
    scale: float | None = None,
    rank_scale: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, Any]:
    """Random arguments of a call; `form` is S (x added), P (x and base) or N (neither).

    `scale` None makes a tensor of it.
    """
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    lead, out = () if groups is None else (groups,), out or d
    return {
        "x": draw(*lead, *rows, d),
        "base": draw(*lead, *rows, out) if form == "P" else None,
        "down": draw(*lead, r, d) / d**0.5,
        "up": draw(*lead, out, r) / r**0.5,
        "down_bias": draw(*lead, r) if bias else None,
        "up_bias": draw(*lead, out) if bias else None,
        "scale": draw(*lead) if scale is None else scale,
        "rank_scale": draw(*lead, r) if rank_scale else None,
        "add_input": form != "N",
    }


def oracle(call: dict[str, Any]) -> Tensor:
    """The formula; names are those of `adapter`."""
    call = {"base": None} | call
    return formula(**{k: v for k, v in call.items() if k != "in_place"})


def learn(call: dict[str, Any], names: tuple[str, ...] = GRADIENTS) -> dict[str, Any]:
    """Copies of the tensors, of which `names` want gradients."""
    made = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in call.items()}
    for name in names:
        if isinstance(made.get(name), Tensor):
            made[name].requires_grad_()
    return made


def wide(call: dict[str, Any]) -> dict[str, Any]:
    """The same call in float64."""
    return {
        k: v.detach().double().requires_grad_(v.requires_grad) if is_float(v) else v
        for k, v in call.items()
    }


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def error(found: Tensor, truth: Tensor) -> float:
    assert found.shape == truth.shape
    assert torch.isfinite(found).all()
    found, truth = found.detach(), truth.detach()
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-30))


def wanted(call: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in call.items() if isinstance(v, Tensor) and v.requires_grad}


def gradients(y: Tensor, call: dict[str, Any], g: Tensor) -> dict[str, Tensor]:
    tensors = wanted(call)
    return dict(zip(tensors, torch.autograd.grad(y, [*tensors.values()], g), strict=True))


def assert_matches(call: dict[str, Any], limit: float = LIMIT) -> None:
    """y without and with gradients, and each gradient, against float64."""
    truth = wide(call)
    expected = oracle(truth)
    with torch.no_grad():
        plain = adapter(**call)
    assert error(plain, expected.detach()) < limit
    if not wanted(call):
        return
    y = adapter(**call)
    assert torch.equal(y, plain)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    found, right = gradients(y, call, g), gradients(expected, truth, g.double())
    for name, value in found.items():
        assert value.dtype == call[name].dtype
        size = right[name].norm()
        if name == "scale":  # it can cancel
            rest = {**truth, "scale": 1.0, "base": None, "add_input": False, "column_scale": None}
            size = (g * oracle(rest)).abs().sum()
        assert (value.double() - right[name]).norm() <= limit * size, name


# ------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("form", "SPN")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
def test_matches_formula(form, bias, act):
    for d, r, rows in ((40, 1, (1,)), (40, 16, (33,)), (67, 4, (1,)), (67, 5, (3, 11))):
        for scale in (None, 0.1, 0.0):
            call = operands(rows, d, r, form=form, bias=bias, scale=scale)
            assert_matches(learn(call | {"act": act}))


def test_matches_plain_module():
    """Within 1e-6 of the module that the strategies use, at a ViT's shape."""
    torch.manual_seed(0)
    down, up = torch.nn.Linear(192, 16), torch.nn.Linear(16, 192)
    x, base = torch.randn(2, 197, 192), torch.randn(2, 197, 192)
    with torch.no_grad():
        truth = x.double() + base + 0.1 * (up.double()(down.double()(x.double()).relu()))
        y = adapter(
            x,
            down.float().weight,
            up.float().weight,
            down_bias=down.bias,
            up_bias=up.bias,
            act="relu",
            scale=0.1,
            base=base,
            add_input=True,
        )
    assert error(y, truth) < 1e-6


def test_different_widths_and_rank_scale():
    assert_matches(learn(operands(out=67, form="N", rank_scale=True)))
    call = operands((3, 11), out=67, form="N") | {"rank_scale": torch.rand(3, 4), "act": "gelu"}
    assert_matches(learn(call))
    base = operands((3, 11), out=67) | {"add_input": False}
    assert_matches(learn(base))


@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
@pytest.mark.parametrize("form", "SPN")
def test_groups_equal_loop(act, form):
    for count in (1, 3):
        call = operands((2, 9), 40, 5, groups=count, form=form, rank_scale=act == "gelu")
        call["act"] = act
        assert_matches(learn(call))
        y = adapter(**call)
        for t in range(count):
            one = {k: v[t] if isinstance(v, Tensor) else v for k, v in call.items()}
            assert error(y[t], adapter(**one).double()) < 1e-6
    assert_matches(learn(operands((9,), groups=2, scale=0.3, bias=False)))


def test_groups_of_padded_ranks():
    """Columns of zeros are exact where act(0) = 0."""
    small = operands((9,), r=3, form="S", scale=0.5)
    call = operands((9,), r=3, groups=1, form="S", scale=0.5)
    for name, dim in (("down", 1), ("up", 2), ("down_bias", 1)):
        value = small[name][None]
        shape = list(value.shape)
        shape[dim] = 2
        call[name] = torch.cat([value, torch.zeros(shape)], dim)
    call |= {"x": small["x"][None], "up_bias": small["up_bias"][None], "act": "relu"}
    assert error(adapter(**call)[0], adapter(**small, act="relu").double()) < 1e-6


def test_index_picks_adapters():
    call = operands((1, 9), 40, 5, groups=4, rank_scale=True, form="S")
    index = torch.tensor([3, 0, 3, 2, 2, 0])
    x, base = torch.randn(6, 9, 40), torch.randn(6, 9, 40)
    norm = (torch.rand(4, 40), torch.rand(40), 1e-6)
    call |= {"x": x, "base": base, "act": "relu", "rank_scale": torch.rand(6, 5), "norm": norm}
    y = adapter(**call, index=index)
    assert error(y, oracle(wide(call) | {"index": index, "norm": double(norm)})) < LIMIT
    for b, t in enumerate(index.tolist()):
        one = {k: v[t] if k in PARAMETERS else v for k, v in call.items()}
        one |= {"rank_scale": call["rank_scale"][b], "norm": (norm[0][t], norm[1], 1e-6)}
        one |= {"x": x[b], "base": base[b]}
        assert error(y[b], adapter(**one).double()) < 1e-6
    others = ({"scale": 0.3}, {"base": None, "add_input": False}, {"base": base.double()})
    for other in others:
        changed = call | other | {"norm": None, "index": index}
        assert error(adapter(**changed), oracle(wide(changed))) < LIMIT
    with pytest.raises(RuntimeError, match="no backward pass"):
        adapter(**learn(call, ("x",)), index=index)
    for wrong in (torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([-1, 0, 0, 0, 0, 0])):
        with pytest.raises(ValueError, match="holds 4 adapters"):
            adapter(**call, index=wrong)


def double(norm: tuple[Tensor, Tensor, float]) -> tuple[Tensor, Tensor, float]:
    return norm[0].double(), norm[1].double(), norm[2]


def test_norm_keep_and_column_scale():
    for groups in (None, 3):
        call = operands((2, 9), 40, 5, groups=groups, rank_scale=True) | {"act": "relu"}
        lead = () if groups is None else (3,)
        call["keep"] = (torch.rand(*lead, 2, 9, 5) > 0.3) / 0.7
        assert_matches(learn(call))
        call |= {"norm": (torch.rand(40), torch.rand(*lead, 40), 1e-5)}
        call |= {"column_scale": torch.rand(40)}
        call = learn(call, (*GRADIENTS, "column_scale"))
        gain, shift, _ = (t.requires_grad_() if is_float(t) else t for t in call["norm"])
        truth = wide(call) | {"norm": double(call["norm"])}
        y, expected = adapter(**call), oracle(truth)
        assert error(y, expected) < LIMIT
        with torch.no_grad():
            assert error(adapter(**call), expected) < LIMIT
        inputs = [call["x"], call["column_scale"], gain, shift]
        found = torch.autograd.grad(y.sum(), inputs)
        right = torch.autograd.grad(
            expected.sum(), [truth["x"], truth["column_scale"], gain, shift]
        )
        for a, b in zip(found, right, strict=True):
            assert error(a, b.double()) < LIMIT


def test_gradcheck():
    for act in ("none", "relu", "gelu"):
        call = learn(operands((3,), 5, 2, rank_scale=True, dtype=torch.float64))
        tensors = wanted(call)

        def both(*values, function, call=call, tensors=tensors, act=act):
            return function(call | dict(zip(tensors, values, strict=True)) | {"act": act})

        inputs = tuple(tensors.values())
        for function in (oracle, lambda c: adapter(**c)):
            torch.autograd.gradcheck(
                lambda *v, f=function, both=both: both(*v, function=f), inputs, fast_mode=True
            )


# ------------------------------------------------------------------ layouts and dtypes


def test_layouts():
    call = operands((6, 11), form="P")
    x, base = call["x"], call["base"]
    swapped = {"x": x.transpose(0, 1), "base": base.transpose(0, 1)}
    sliced = {"x": torch.cat([x, x])[::2, 1:], "base": torch.cat([base, base])[1::2, :-1]}
    strided = {"x": torch.randn(6, 11, 80)[..., ::2], "base": torch.randn(6, 40, 11).mT}
    for other in (swapped, sliced, strided):
        assert_matches(learn(call | {k: v.contiguous() for k, v in other.items()}))
        for in_place in (False, True):
            layout = {k: v.clone(memory_format=torch.preserve_format) for k, v in other.items()}
            y = adapter(**(call | layout), in_place=in_place)
            assert y.is_contiguous()
            assert error(y, oracle(wide(call | other))) < LIMIT


def test_layouts_with_gradients():
    call = operands((6, 11))
    leaf = torch.randn(11, 6, 40, requires_grad=True)
    g = torch.randn(40, 11, 6).permute(2, 1, 0)  # a gradient that is not contiguous either
    y = adapter(**(call | {"x": leaf.transpose(0, 1)}))
    expected = oracle(call | {"x": leaf.transpose(0, 1)})
    (found,), (right,) = (torch.autograd.grad(v, leaf, g) for v in (y, expected))
    assert error(found, right.double()) < LIMIT


def test_shared_input_of_groups():
    call = operands((5, 9), groups=3, form="S")
    one = call["x"][0].clone().requires_grad_()
    shared = one.expand(3, 5, 9, 40)
    y = adapter(**(call | {"x": shared}))
    expected = oracle(call | {"x": shared})
    assert error(y, expected.double()) < LIMIT
    g = torch.randn(y.shape)
    (found,), (right,) = (torch.autograd.grad(v, one, g) for v in (y, expected))
    assert error(found, right.double()) < LIMIT
    assert torch.equal(adapter(**(call | {"x": shared.detach()})), y)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_the_stream(x_dtype, base_dtype):
    """Weights are cast, x and base keep their dtypes; the result has the promoted one."""
    call = learn(operands((3, 11), 40, 5) | {"act": "relu"})
    for name, dtype in (("x", x_dtype), ("base", base_dtype)):
        call[name] = call[name].detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = adapter(**call)
        with torch.no_grad():
            assert torch.equal(adapter(**call), y)
    assert y.dtype == torch.promote_types(x_dtype, base_dtype)
    truth = wide(call)
    expected = oracle(truth)
    assert error(y, expected) < 5e-3
    g = torch.randn(y.shape).to(y.dtype)
    found, right = gradients(y, call, g), gradients(expected, truth, g.double())
    for name, value in found.items():
        assert value.dtype == call[name].dtype
        assert error(value, right[name]) < 3e-2, name  # t and dh are rounded as in eager


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    call = operands((3, 11), 40, 5, dtype=dtype, scale=0.5) | {"act": "gelu"}
    y = adapter(**call)
    assert y.dtype == dtype
    limit = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-14}[dtype]
    assert error(y, oracle(wide(call))) < limit
    mixed = call | {"base": call["base"].float()}
    assert adapter(**mixed).dtype == torch.promote_types(dtype, torch.float32)
    assert adapter(**(mixed | {"add_input": False})).dtype == torch.float32


@pytest.mark.parametrize("groups", [None, 2])
def test_subsets_of_gradients(groups):
    call = operands((3, 5), groups=groups, rank_scale=True) | {"act": "relu"}
    every = learn(call)
    y = adapter(**every)
    g = torch.randn(y.shape)
    whole = gradients(y, every, g)
    for names in (*((n,) for n in GRADIENTS), ("x", "base"), ("down", "up_bias"), PARAMETERS):
        some = learn(call, names)
        found = gradients(adapter(**some), some, g)
        assert set(found) == set(names)
        for name, value in found.items():
            assert torch.allclose(value, whole[name], rtol=1e-5, atol=1e-5), name


def test_empty_batch_gives_zero_gradients():
    for groups in (None, 2):
        call = learn(operands((0, 5), groups=groups))
        y = adapter(**call)
        assert y.shape == call["x"].shape
        for name, value in gradients(y, call, torch.ones_like(y)).items():
            assert value.shape == call[name].shape
            assert not value.any()


def test_nan_passes_through():
    call = operands((4,), form="S", scale=1.0) | {"act": "relu"}
    call["x"][2, 3] = torch.nan
    y = adapter(**call)
    assert y[2].isnan().all()
    assert not y[[0, 1, 3]].isnan().any()


# ------------------------------------------------------------------ in place, repeats


def test_in_place_writes_base_only_without_gradients():
    call = operands((3, 11)) | {"act": "relu"}
    expected, kept = adapter(**call), call["base"].clone()
    assert torch.equal(call["base"], kept)
    learning = learn(call, ("down",))
    adapter(**learning, in_place=True)
    assert torch.equal(learning["base"], kept)
    y = adapter(**call, in_place=True)
    assert y.data_ptr() == call["base"].data_ptr()
    assert torch.allclose(y, expected, rtol=1e-6, atol=1e-6)
    alone = call | {"base": kept.clone(), "add_input": False}  # as of a LoRA
    y = adapter(**alone)
    assert torch.equal(adapter(**alone, in_place=True), y)
    assert torch.equal(alone["base"], y)
    shared = call | {"base": torch.randn(11, 40).expand(3, 11, 40)}  # cannot be written
    before = shared["base"].clone()
    adapter(**shared, in_place=True)
    assert torch.equal(shared["base"], before)


def test_repeats_bit_for_bit():
    call = learn(operands((5, 33), 67, 5) | {"act": "gelu"})
    g = torch.randn(5, 33, 67)
    first, second = (gradients(adapter(**call), call, g) for _ in range(2))
    assert torch.equal(adapter(**call), adapter(**call))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_saves_the_hidden_columns_only():
    call = learn(operands((5, 33), 67, 5) | {"act": "relu"})
    known = {t.data_ptr() for t in wanted(call).values()}
    extra = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            extra.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        adapter(**call)
    assert extra == [(165, 5)]


# ------------------------------------------------------------------ tracing and transforms


def op_arguments(call: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    scale = call["scale"]
    norm = call.get("norm") or (None, None, 0.0)
    given = Operands(
        *(call["x"], call["down"], call["up"], call["down_bias"], call["up_bias"]),
        scale if isinstance(scale, Tensor) else None,
        *(call["rank_scale"], call.get("index"), call.get("keep"), norm[0], norm[1]),
        call.get("column_scale"),
    )
    factor = 1.0 if isinstance(scale, Tensor) else scale
    return (*given, factor, norm[2], "relu", call["add_input"], dtype, "reference")


@pytest.mark.parametrize("case", ["plain", "bare", "groups", "index", "rare"])
def test_opcheck(case):
    groups = 2 if case in ("groups", "index") else None
    call = operands((3, 5), 8, 2, groups=groups, bias=case != "bare", form="N")
    if case == "plain":
        call |= {"base": torch.randn(3, 5, 8), "rank_scale": torch.rand(2), "add_input": True}
    if case == "index":
        call |= {"index": torch.tensor([1, 0]), "scale": 0.5}
    if case == "rare":
        call |= {"keep": torch.rand(3, 5, 2), "column_scale": torch.rand(8), "scale": 0.5}
        call |= {"norm": (torch.rand(8), torch.rand(8), 1e-5)}
    arguments = op_arguments(call)
    torch.library.opcheck(torch.ops.driftline.adapter_forward, (call["base"], *arguments))
    if case in ("index", "rare"):
        return
    y, hidden = torch.ops.driftline.adapter_forward(call["base"], *arguments)
    present = [getattr(Operands(*arguments[:12]), n) is not None for n in NAMES]
    for needs in (present, [True] + [False] * 9):
        torch.library.opcheck(
            torch.ops.driftline.adapter_backward,
            (torch.randn_like(y), hidden, call["base"], *arguments, needs),
        )


NAMES = (
    *("x", "down", "up", "down_bias", "up_bias", "scale", "rank_scale"),
    *("norm_gain", "norm_shift", "column_scale"),
)


@pytest.mark.parametrize("groups", [None, 2])
def test_compiled_is_bit_equal(groups):
    torch.compiler.reset()
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    call = learn(operands((3, 5), 8, 2, groups=groups) | {"act": "gelu"})
    y, eager = compiled(**call), adapter(**call)
    assert torch.equal(y, eager)
    g = torch.randn(y.shape)
    found, right = gradients(y, call, g), gradients(eager, call, g)
    assert all(torch.equal(found[k], right[k]) for k in right)
    with torch.no_grad():
        assert torch.equal(compiled(**call), eager)


def test_compiled_under_autocast_and_with_dynamic_rows():
    torch.compiler.reset()
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 7):
        call = learn(operands((rows,), 8, 2, scale=0.1), ("x", "down"))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, eager = compiled(**call), adapter(**call)
        assert torch.equal(y, eager)
        g = torch.ones_like(y)
        found, right = gradients(y, call, g), gradients(eager, call, g)
        assert all(torch.equal(found[k], right[k]) for k in right)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", ["vmap", "grad", "vmap of grad"])
def test_compiled_transforms_give_the_eager_values(transform):
    call = operands((4, 3), 8, 2, form="S", scale=0.5) | {"act": "gelu"}
    rest = {k: v for k, v in call.items() if k != "x"}
    y = lambda x: adapter(x, **rest)  # noqa: E731
    loss = lambda x: y(x).pow(2).sum()  # noqa: E731
    function = {"vmap": vmap(y), "grad": grad(loss), "vmap of grad": vmap(grad(loss))}[transform]
    torch.compiler.reset()
    compiled = torch.compile(lambda x: function(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(call["x"]), function(call["x"]))


def test_compiled_second_derivative_is_an_error():
    torch.compiler.reset()
    call = learn(operands((3, 5), 8, 2))
    y = torch.compile(adapter, fullgraph=True, backend="aot_eager")(**call)
    (first,) = torch.autograd.grad(y.pow(2).sum(), call["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


def of_down(call: dict[str, Any], function: Any) -> Any:
    """A function of `down` and `x` alone."""
    rest = {k: v for k, v in call.items() if k not in ("down", "x")}
    return lambda down, x: function(rest | {"down": down, "x": x})


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_agree_with_the_formula():
    call = operands((4, 3), 8, 2, form="S", dtype=torch.float64, scale=0.5) | {"act": "gelu"}
    down, x = call["down"], call["x"]
    ours, right = (of_down(call, f) for f in (lambda c: adapter(**c), oracle))
    for axes in ((None, 0), (0, 0)):
        weights = down if axes[0] is None else torch.stack([down] * 4)
        torch.testing.assert_close(vmap(ours, axes)(weights, x), vmap(right, axes)(weights, x))

        def loss(function):
            return lambda d, v: function(d, v).pow(2).sum()

        each = [vmap(grad(loss(f)), axes)(weights, x) for f in (ours, right)]
        torch.testing.assert_close(*each)

    def normed(function: Any) -> Any:  # the plain formula, whatever the transforms hide
        norm = (torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64), 1e-5)
        each = of_down(call | {"norm": norm}, function)
        return grad(lambda d: vmap(each, (None, 0))(d, x).pow(2).sum())(down)

    torch.testing.assert_close(normed(lambda c: adapter(**c)), normed(oracle))
    one = [jacrev(lambda d, f=f: f(d, x[0]))(down) for f in (ours, right)]
    torch.testing.assert_close(*one)
    torch.testing.assert_close(grad(loss(ours))(down, x), grad(loss(right))(down, x))


def test_no_forward_mode_and_no_second_derivative():
    call = operands((3,), 8, 2, form="S", scale=0.5) | {"act": "gelu"}
    ours = of_down(call, lambda c: adapter(**c))
    with pytest.raises(RuntimeError, match="jvp"):
        jvp(lambda x: ours(call["down"], x), (call["x"],), (call["x"],))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        ours(call["down"], torch.autograd.forward_ad.make_dual(call["x"], call["x"]))
    learning = learn(call)
    y = adapter(**learning)
    with pytest.raises(RuntimeError, match=SECOND_DERIVATIVE):
        torch.autograd.grad(y.sum(), learning["x"], create_graph=True)
    with torch.enable_grad():  # a plain backward pass is no second derivative
        adapter(**learning).sum().backward()

    def inner(down: Tensor) -> Tensor:
        return grad(lambda d: ours(d, call["x"]).pow(2).sum())(down).sum()

    with pytest.raises(RuntimeError, match=SECOND_DERIVATIVE):
        grad(inner)(call["down"])


# ------------------------------------------------------------------ checks and dispatch


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"down": torch.rand(4, 39)}, r"x \(33, 40\) and down \(4, 39\)"),
        ({"up": torch.rand(40, 5)}, r"down \(4, 40\) and up \(40, 5\)"),
        ({"up": torch.rand(2, 40, 4)}, r"down \(4, 40\) and up \(2, 40, 4\)"),
        ({"down_bias": torch.rand(5)}, r"down_bias \(5,\) does not fit down \(4, 40\)"),
        ({"up_bias": torch.rand(1)}, r"up_bias \(1,\) does not fit up \(40, 4\)"),
        ({"base": torch.rand(32, 40)}, r"base \(32, 40\) does not fit x \(33, 40\)"),
        ({"scale": torch.rand(2)}, r"scale \(2,\) is neither"),
        ({"rank_scale": torch.rand(3)}, r"rank_scale \(3,\) does not fit"),
        ({"keep": torch.rand(33, 5)}, r"keep \(33, 5\) is not \(33, 4\)"),
        ({"column_scale": torch.rand(4)}, r"column_scale \(4,\)"),
        ({"norm": (torch.rand(4), torch.rand(40), 1e-5)}, r"gain \(4,\) does not fit x"),
        ({"index": torch.zeros(33, dtype=torch.int64)}, r"index \(33,\)"),
        ({"act": "rellu"}, "did you mean 'relu'"),
        ({"x": torch.rand(33, 40).double()}, "cast one of them"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        adapter(**(operands() | changes))


def test_bad_groups():
    call = operands((5,), groups=2)
    with pytest.raises(ValueError, match="number of groups"):
        adapter(**(call | {"x": torch.rand(3, 5, 40), "base": None}))
    with pytest.raises(ValueError, match="three dimensions"):
        adapter(**(call | {"x": torch.rand(2, 40), "base": None}))
    wide = operands(out=67, form="N") | {"add_input": True}
    with pytest.raises(ValueError, match="differ in width"):
        adapter(**wide)


def test_backends(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # auto on a CPU is silent
        assert chosen()["used"] == "none"
        adapter(**operands())
    assert chosen() == {"requested": "auto", "used": "reference", "reason": "no CUDA device"}
    use("reference")
    adapter(**operands())
    assert chosen()["reason"] == "asked for"
    with pytest.raises(dispatch.BackendError, match="did you mean 'triton'"):
        use("tritn")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="kernel=triton needs a CUDA device"):
        use("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    use("triton")
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1 for tests"):
        adapter(**operands())  # tensors on the CPU


def test_fall_back_warns_once(monkeypatch):
    """What a GPU would answer, with the check replaced."""
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    monkeypatch.setattr(dispatch, "_unfit", lambda *_: "rank 300 > 144")
    use("triton")
    with pytest.raises(RuntimeError, match=r"rank 300 > 144; set kernel.backend=auto"):
        adapter(**operands())
    use("auto")
    monkeypatch.setattr(dispatch, "_on_cpu", lambda _: False)
    with pytest.warns(UserWarning, match="rank 300 > 144"):
        adapter(**operands())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter(**operands())
    assert chosen()["used"] == "reference"
    assert "rank 300 > 144" in chosen()["reason"]


@pytest.mark.parametrize("lacking", ["triton", "triton.knobs"])
def test_a_triton_that_cannot_serve_falls_back_with_its_reason(monkeypatch, lacking):
    """As with torch 2.6 and 2.7, whose Triton has no knobs, and with no Triton at all."""
    find_spec = importlib.util.find_spec
    if lacking == "triton.knobs":
        pytest.importorskip("triton", reason="Triton is not installed")
    names = [lacking] if lacking == "triton.knobs" else ["triton", "triton.knobs"]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name in names else find_spec(name)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_on_cpu", lambda _: False)
    cached = (dispatch.no_triton, dispatch._found_unfit)
    for function in cached:
        function.cache_clear()
    reason = "not installed" if lacking == "triton" else "has no triton.knobs"
    try:
        with pytest.warns(UserWarning, match=reason):
            adapter(**operands())
        assert chosen()["used"] == "reference"
        assert reason in chosen()["reason"]
        with pytest.raises(UserError, match=f"{reason}.*set kernel.backend=auto"):
            use("triton")
    finally:
        for function in cached:
            function.cache_clear()


def test_float32_of_a_high_rank_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(dispatch, "_unfit", lambda *_: None)
    monkeypatch.setattr(dispatch, "_on_cpu", lambda _: False)
    for rank, backend in ((64, "triton"), (65, "reference")):
        call = operands(r=rank)
        dispatch.use("auto")
        chosen = dispatch.select(call["x"], None, call["down"], call["up"], torch.float32)
        assert chosen == backend


def test_too_many_segments_fall_back(monkeypatch):
    monkeypatch.setattr(dispatch, "_unfit", lambda *_: None)
    monkeypatch.setattr(dispatch, "_on_cpu", lambda _: False)
    call = operands((), 2, 1, groups=dispatch.MAX_SEGMENTS + 1, form="N")
    call |= {"x": call["x"][:, None], "scale": 1.0}
    with pytest.warns(UserWarning, match="more than 65535 samples or groups"):
        assert adapter(**call).shape == (dispatch.MAX_SEGMENTS + 1, 1, 2)


def test_compile_backend(monkeypatch):
    module = __import__("sys").modules["driftline.kernels.adapter"]
    torch.compiler.reset()
    compiled = torch.compile(formula, backend="aot_eager")
    monkeypatch.setattr(module, "_compiled", lambda: compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        use("compile")
    assert_matches(learn(operands((3, 5), 8, 2) | {"act": "relu"}))
    assert chosen()["used"] == "compile"


# ------------------------------------------------------------------ LoRA and DoRA


def pair(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = ((3, 9, 40), (67, 40), (67,), (5, 40), (67, 5), (67,))
    return tuple(torch.randn(s, dtype=dtype) for s in shapes)


def test_lora_merges_without_gradients():
    x, weight, bias, down, up, _ = pair()
    down.requires_grad_()
    truth = x.double() @ (weight + 0.3 * up @ down).double().T + bias
    kept = Kept()
    y = lora_linear(x, weight, bias, down, up, 0.3, kept)
    assert y.requires_grad
    assert error(y.detach(), truth.detach()) < LIMIT
    with torch.no_grad():
        assert error(lora_linear(x, weight, bias, down, up, 0.3, kept), truth) < LIMIT
        held = kept.get(merged_weight, weight, down, up, 0.3)
        assert kept.get(merged_weight, weight, down, up, 0.3) is held
        down.mul_(2)
        assert kept.get(merged_weight, weight, down, up, 0.3) is not held
        assert kept.get(merged_weight, weight, down, up, 0.4) is not held
        assert error(lora_linear(x, weight, bias, down, up, 0.3), truth) > LIMIT


def test_dora(monkeypatch):
    x, weight, bias, down, up, magnitude = pair(torch.float64)
    norm = (weight + 0.3 * up @ down).norm(dim=1)
    for tensor in (x, down, up, magnitude):
        tensor.requires_grad_()
    merged = weight + 0.3 * up @ down
    truth = (magnitude / norm) * (x @ merged.T) + bias
    kept = Kept()
    y = dora_linear(x, weight, bias, down, up, magnitude, 0.3, kept)
    torch.testing.assert_close(y, truth)
    found, right = (
        torch.autograd.grad(v.square().sum(), (x, down, up, magnitude)) for v in (y, truth)
    )
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)
    calls = []
    real = dora_module.weight_norm
    monkeypatch.setattr(dora_module, "weight_norm", lambda *a: calls.append(1) or real(*a))
    with torch.no_grad():
        for _ in range(3):
            y = dora_linear(x, weight, bias, down, up, magnitude, 0.3, kept)
        torch.testing.assert_close(y, truth)
        assert len(calls) == 1
        up.mul_(1.5)
        dora_linear(x, weight, bias, down, up, magnitude, 0.3, kept)
        assert len(calls) == 2
    with torch.inference_mode():
        inference = up.clone()
        for _ in range(2):
            dora_linear(x, weight, bias, down, inference, magnitude, 0.3, kept)
    assert len(calls) == 4


def test_launchers_take_segments():
    """One adapter for several segments, as the Triton launchers name them: S > T = 1."""
    call = wide(operands((4, 9), 40, 5, rank_scale=True))
    named = [call[k] for k in ("x", "base", "down", "up", "down_bias", "up_bias", "scale")]
    segments = [
        t[None] if isinstance(t, Tensor) and i > 1 and t.dim() else t for i, t in enumerate(named)
    ]
    y = formula(*segments, call["rank_scale"][None].expand(4, -1), add_input=True)
    torch.testing.assert_close(y, oracle(call))
