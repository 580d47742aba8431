"""The Triton kernels against the plain formula in float64.

Run by `tests/test_triton_kernels.py` in a process of its own with TRITON_INTERPRET=1, which Triton
reads when the kernels are imported; the file's name keeps it out of the ordinary collection. The
cases, inputs and checks serve the tests on a GPU, too. What is computed here is the kernels'
arithmetic and masks; the interpreter runs programs one after another and shows no race.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pytest
import timm
import torch
from test_kernels import GRADIENTS, assert_matches, error, learn, operands, oracle, wide
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.kernels import adapter, dispatch, triton_adapter, tuning
from driftline.kernels.reference import formula
from driftline.kernels.triton_adapter import backward, forward, supported
from driftline.parts.adapters.bank import AdapterBank
from driftline.parts.adapters.bottleneck import Bottleneck
from driftline.parts.adapters.lora import LoRA

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
LIMITS = {FP32: 5e-6, FP16: 1e-3, BF16: 5e-3}
GUARD = 64  # elements in front of and behind every buffer


class Case(NamedTuple):
    """One call. `form`: S adds x, P adds x and base, B adds base, N nothing."""

    dtype: torch.dtype
    act: str
    form: str
    width: int
    rank: int
    rows: int
    out: int | None = None  # d_out, default `width`
    bias: bool = True
    segments: int = 1
    adapters: int = 1
    rank_scale: str | None = None  # "adapter" or "segment": a row for each
    keep: bool = False
    norm: bool = False
    column_scale: bool = False
    index: tuple[int, ...] | None = None
    compute: torch.dtype | None = None  # default `dtype`; x stays in `dtype`


def make(
    case: Case, device: str = "cpu", seed: int = 0
) -> tuple[list[Any], dict[str, Any], Tensor]:
    """Arguments of `forward`, its settings, and dL/dy."""
    generator = torch.Generator().manual_seed(seed)
    compute = case.compute or case.dtype

    def draw(*shape: int, dtype: torch.dtype = FP32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(device, dtype)

    s, t, n, r, d = case.segments, case.adapters, case.rows, case.rank, case.width
    out = case.out or d
    rank_rows = {"adapter": t, "segment": s, None: 0}[case.rank_scale]
    base = draw(s, n, out, dtype=compute) if case.form in "PB" else None
    arguments = [
        draw(s, n, d, dtype=case.dtype),
        base,
        draw(t, r, d, dtype=compute, scale=d**-0.5),
        draw(t, out, r, dtype=compute, scale=r**-0.5),
        draw(t, r, dtype=compute) if case.bias else None,
        draw(t, out, dtype=compute) if case.bias else None,
        draw(t).abs() + 0.5,
        draw(rank_rows, r) if rank_rows else None,
        None if case.index is None else torch.tensor(case.index, device=device),
        ((draw(s, n, r) > -1.3) / 0.9).to(case.dtype) if case.keep else None,
        (1 + draw(t, d, scale=0.1), draw(t, d, scale=0.1), 1e-5) if case.norm else None,
        1 + draw(out, scale=0.1) if case.column_scale else None,
    ]
    settings = {
        "act": case.act,
        "add_input": case.form in "SP",
        "compute_dtype": compute,
        "per_segment": case.rank_scale == "segment",
    }
    y_dtype = triton_adapter.output_dtype(arguments[0], base, settings["add_input"], compute)
    return arguments, settings, draw(s, n, out, dtype=y_dtype)


NAMES = ("x", "down", "up", "down_bias", "up_bias", "scale", "rank_scale")
NEEDS = {*NAMES, "norm_gain", "norm_shift", "column_scale"}


def truth(
    arguments: list[Any], settings: dict[str, Any], g: Tensor
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """y and every gradient in float64, and the norms that errors are measured against.

    The gradient of the scale is a sum with signs: its error counts against the sum of magnitudes.
    """

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().requires_grad_()

    x, base, down, up, down_bias, up_bias, scale, rank_scale, index, keep, norm, gamma = arguments
    leaves = dict(
        zip(NAMES, map(wide, (x, down, up, down_bias, up_bias, scale, rank_scale)), strict=True)
    )
    leaves["column_scale"] = wide(gamma)
    if norm is not None:
        leaves["norm_gain"], leaves["norm_shift"] = wide(norm[0]), wide(norm[1])
    segments = x.shape[0]
    if index is None:
        index = torch.arange(segments, device=x.device) % down.shape[0]

    def chosen(name: str) -> Tensor | None:
        tensor = leaves.get(name)
        own = name == "rank_scale" and settings["per_segment"]
        return tensor if tensor is None or own else tensor[index]

    of_norm = None if norm is None else (chosen("norm_gain"), chosen("norm_shift"), norm[2])
    y = formula(
        leaves["x"],
        wide(base),
        *(chosen(n) for n in ("down", "up", "down_bias", "up_bias", "scale", "rank_scale")),
        None,
        wide(keep),
        of_norm,
        leaves["column_scale"],
        act=settings["act"],
        add_input=settings["add_input"],
        compute_dtype=torch.float64,
    )
    present = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    grads = torch.autograd.grad(y, list(present.values()), g.double())
    found = {"y": y.detach(), **dict(zip(present, grads, strict=True))}
    norms = {name: max(float(tensor.norm()), 1e-30) for name, tensor in found.items()}
    with torch.no_grad():
        parts = _scale_terms(present, chosen, of_norm, index, g.double(), settings, keep)
    norms["scale"] = max(float(parts), 1e-30)
    return found, norms


def _scale_terms(leaves, chosen, norm, index, g, settings, keep) -> Tensor:
    """sum |h t| + sum |bu colsum(g)| of all segments."""
    x = leaves["x"]
    if norm is not None:
        gain, shift, eps = norm
        x = torch.layer_norm(x, x.shape[-1:], eps=eps) * gain[:, None] + shift[:, None]
    if "column_scale" in leaves:
        g = g * leaves["column_scale"]
    p = x @ chosen("down").mT
    if (bias := chosen("down_bias")) is not None:
        p = p + bias[:, None]
    h = {"none": lambda v: v, "relu": torch.relu, "gelu": torch.nn.functional.gelu}[
        settings["act"]
    ](p)
    h = h if keep is None else h * keep.double()
    if (rank_scale := chosen("rank_scale")) is not None:
        h = h * rank_scale[:, None]
    total = (h * (g @ chosen("up"))).abs().sum()
    if (bias := chosen("up_bias")) is not None:
        total = total + (bias * g.sum(1)).abs().sum()
    return total


class Guarded:
    """Replaces allocations by slices of larger buffers, all NaN; knows whether the rims changed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rims: list[Tensor] = []
        empty_like, plain = torch.empty_like, torch.Tensor.new_empty

        def new_empty(
            like: Tensor, shape: Any, *, dtype: torch.dtype | None = None, **options: Any
        ) -> Tensor:
            if options:  # the interpreter's own
                return plain(like, shape, dtype=dtype, **options)
            size = torch.Size(shape).numel()
            nan = torch.full((size + 2 * GUARD,), torch.nan, device=like.device)
            buffer = nan.to(dtype or like.dtype)
            self.rims += [buffer[:GUARD], buffer[GUARD + size :]]
            return buffer[GUARD : GUARD + size].view(shape)

        def like(tensor: Tensor, **options: Any) -> Tensor:
            return empty_like(tensor, **options) if options else new_empty(tensor, tensor.shape)

        monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
        monkeypatch.setattr(torch, "empty_like", like)

    def check(self) -> None:
        assert self.rims
        assert all(rim.isnan().all() for rim in self.rims)


def run(
    arguments: list[Any], settings: dict[str, Any], g: Tensor, needs: set[str] = NEEDS
) -> dict[str, Tensor]:
    """y and the gradients from the kernels."""
    y = forward(*arguments, **settings)
    if arguments[8] is not None:
        return {"y": y}
    return {"y": y, **backward(g, *arguments, needs=needs, **settings)}


def errors(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, float]:
    """Relative error of y and of every gradient against float64."""
    arguments, settings, g = make(case, device, seed)
    expected, norms = truth(arguments, settings, g)
    found = run(arguments, settings, g)
    if case.index is None:
        assert found.keys() == expected.keys()
    return {n: float((t.double() - expected[n]).norm()) / norms[n] for n, t in found.items()}


def limit(case: Case) -> float:
    """For the low type that took part."""
    return LIMITS[case.compute or case.dtype]


CASES = {
    "relu S": Case(FP32, "relu", "S", 40, 5, 33),
    "gelu P": Case(FP32, "gelu", "P", 67, 20, 33),
    "linear, no residual, other width": Case(FP32, "none", "N", 40, 4, 33, out=67, bias=False),
    "base alone, rank 64": Case(FP32, "none", "B", 67, 64, 33, out=40),
    "bf16 relu": Case(BF16, "relu", "P", 67, 16, 33),
    "bf16 gelu, three adapters": Case(BF16, "gelu", "S", 40, 5, 33, segments=3, adapters=3),
    "fp16 relu": Case(FP16, "relu", "P", 40, 20, 33),
    "fp16 none": Case(FP16, "none", "N", 67, 1, 33, out=24),
    "one row": Case(FP32, "relu", "S", 40, 1, 1),
    "several tiles": Case(BF16, "gelu", "P", 40, 16, 197),
    "several slabs": Case(FP32, "relu", "S", 24, 4, 300, bias=False),
    "full chunks": Case(BF16, "relu", "P", 192, 16, 33),
    "two rank tiles": Case(FP32, "none", "B", 24, 129, 17, rank_scale="adapter"),
    "two rank tiles, bf16": Case(BF16, "gelu", "P", 40, 40, 33, keep=True),
    "segments of one adapter": Case(
        FP32, "relu", "P", 40, 5, 33, segments=2, rank_scale="segment", keep=True
    ),
    "norm": Case(FP32, "gelu", "S", 67, 20, 33, norm=True),
    "norm, two adapters": Case(
        FP32, "relu", "P", 24, 40, 33, segments=2, adapters=2, norm=True, rank_scale="adapter"
    ),
    "norm, bf16": Case(BF16, "gelu", "P", 40, 5, 33, norm=True, keep=True),
    "column scale": Case(FP32, "none", "B", 40, 5, 33, out=56, bias=False, column_scale=True),
    "column scale, all": Case(
        FP32, "gelu", "P", 40, 5, 33, norm=True, keep=True, column_scale=True, rank_scale="adapter"
    ),
    "autocast": Case(FP32, "gelu", "P", 67, 16, 33, compute=BF16),
    "autocast, norm": Case(FP32, "gelu", "N", 67, 16, 33, compute=BF16, norm=True),
    "index": Case(FP32, "relu", "P", 40, 5, 19, segments=5, adapters=3, index=(2, 0, 2, 1, 0)),
    "index, rank scale": Case(
        BF16, "gelu", "S", 40, 5, 19, segments=3, adapters=4, index=(3, 0, 3), rank_scale="segment"
    ),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", CASES)
def test_against_float64_twice_over_poison(name, monkeypatch):
    case = CASES[name]
    arguments, settings, g = make(case)
    expected, norms = truth(arguments, settings, g)
    guarded = Guarded(monkeypatch)
    first, second = (run(arguments, settings, g) for _ in range(2))
    guarded.check()
    assert first.keys() == (expected.keys() if case.index is None else {"y"})
    for key, tensor in first.items():
        error = float((tensor.double() - expected[key]).norm()) / norms[key]
        assert error <= limit(case), key
        assert torch.equal(tensor, second[key]), key
        assert tensor.shape == expected[key].shape
        assert tensor.is_contiguous()
    stored = dict(zip(("x", "base", "down", "up", "down_bias"), arguments, strict=False))
    assert all(first[n].dtype == t.dtype for n, t in stored.items() if n in first)


@pytest.mark.parametrize(
    "case",
    [Case(FP32, "relu", "P", 40, 5, 33), Case(BF16, "gelu", "S", 67, 16, 33, norm=True)],
)
def test_resident_and_streamed(case, monkeypatch):
    arguments, settings, g = make(case)
    expected, norms = truth(arguments, settings, g)
    Guarded(monkeypatch)
    for columns in (16, 64):
        for resident in (True, False):
            config = tuning.Config(32, columns, 4, 2, resident)
            y = forward(*arguments, **settings, config=config)
            error = float((y.double() - expected["y"]).norm()) / norms["y"]
            assert error <= limit(case), config


@pytest.mark.parametrize("layout", ["transposed", "sliced rows", "shared x", "expanded g"])
def test_layouts(layout):
    case = Case(FP32, "relu", "P", 24, 5, 9, segments=2, adapters=2)
    arguments, settings, g = make(case)
    x = arguments[0]
    if layout == "transposed":
        arguments[0] = x.transpose(0, 1).contiguous().transpose(0, 1)
        arguments[1] = arguments[1].transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "sliced rows":
        arguments[0] = torch.full((2, 18, 30), torch.nan)[:, ::2, 5:29].copy_(x)
    elif layout == "shared x":
        arguments[0] = x[:1].expand(2, -1, -1)
    else:
        g = torch.ones(()).expand(g.shape)
    found = run(arguments, settings, g)
    plain = [t.contiguous() if isinstance(t, Tensor) else t for t in arguments]
    same = run(plain, settings, g.contiguous())
    expected, norms = truth(plain, settings, g)
    for name, tensor in found.items():
        assert torch.equal(tensor, same[name]), name
        assert float((tensor.double() - expected[name]).norm()) / norms[name] <= 5e-6, name


def test_every_subset_of_gradients_has_the_same_bits():
    for norm in (False, True):
        case = Case(FP32, "gelu", "S", 24, 4, 17, norm=norm, rank_scale="adapter")
        arguments, settings, g = make(case)
        everything = run(arguments, settings, g)
        for name in everything.keys() - {"y"}:
            alone = backward(g, *arguments, needs={name}, **settings)
            assert alone.keys() == {name}
            assert torch.equal(alone[name], everything[name]), name
    assert backward(g, *arguments, needs=set(), **settings) == {}


def test_groups_are_exactly_a_loop():
    case = Case(BF16, "gelu", "P", 40, 5, 33, segments=2, adapters=2)
    arguments, settings, g = make(case)
    together = run(arguments, settings, g)
    for t in range(2):
        one = [a[t : t + 1] if isinstance(a, Tensor) else a for a in arguments]
        alone = run(one, settings, g[t : t + 1])
        for name, tensor in alone.items():
            assert torch.equal(together[name][t : t + 1], tensor), name


def test_index_is_exactly_a_choice_of_weights():
    case = Case(FP32, "relu", "P", 40, 5, 19, segments=4, adapters=4, index=(2, 0, 2, 3))
    arguments, settings, _ = make(case)
    y = forward(*arguments, **settings)
    index = arguments[8]
    chosen = [a[index] if i in range(2, 7) else a for i, a in enumerate(arguments)]
    chosen[8] = None
    assert torch.equal(y, forward(*chosen, **settings))


def test_smaller_ranks_may_be_padded_with_zeros():
    case = Case(FP32, "gelu", "S", 40, 5, 33)
    arguments, settings, g = make(case)
    y = forward(*arguments, **settings)
    wider = list(arguments)
    wider[2] = torch.cat([arguments[2], torch.zeros(1, 15, 40)], 1)
    wider[3] = torch.cat([arguments[3], torch.randn(1, 40, 15)], 2)
    wider[4] = torch.cat([arguments[4], torch.zeros(1, 15)], 1)
    torch.testing.assert_close(forward(*wider, **settings), y)
    gradient = backward(g, *wider, needs={"up"}, **settings)["up"]
    assert gradient[..., 5:].eq(0).all()


@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
def test_nan_and_infinity_stay_in_their_row(act):
    arguments, settings, g = make(Case(FP32, act, "S", 40, 5, 33))
    clean = forward(*arguments, **settings)
    arguments[0][0, 3, 7], arguments[0][0, 20, 1] = torch.nan, torch.inf
    y = forward(*arguments, **settings)
    assert y[0, 3].isnan().all()
    assert not y[0, 20].isfinite().all()
    others = [i for i in range(33) if i not in (3, 20)]
    assert torch.equal(y[0, others], clean[0, others])
    # an infinite input leaves finite columns where a hidden column is dropped by ReLU
    expected = formula(
        *(a[0] if isinstance(a, Tensor) else a for a in arguments), **_plain(settings)
    )
    assert torch.equal(y[0, 20].isnan(), expected[20].isnan())
    dx = backward(g, *arguments, needs={"x"}, **settings)["x"]
    assert dx[0, others].isfinite().all()


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k != "per_segment"}


def test_relu_keeps_nan_of_the_weights():
    arguments, settings, _ = make(Case(FP32, "relu", "N", 40, 5, 3))
    arguments[4][0, 2] = torch.nan
    assert forward(*arguments, **settings).isnan().all()


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_norm_far_from_zero(dtype):
    """Rows with mean 20 and channels at +300, as in trained transformers."""
    case = Case(FP32, "gelu", "N", 96, 16, 33, norm=True, compute=dtype)
    arguments, settings, g = make(case)
    arguments[0] += 20
    arguments[0][..., 5] += 300
    expected, norms = truth(arguments, settings, g)
    for name, tensor in run(arguments, settings, g).items():
        error = float((tensor.double() - expected[name]).norm()) / norms[name]
        assert error <= (2e-4 if dtype == FP32 else 1e-2), name


def test_gelu_deep_in_its_tail():
    arguments, settings, g = make(Case(FP32, "gelu", "N", 40, 5, 1))
    arguments[4] -= 3
    expected, norms = truth(arguments, settings, g)
    for name, tensor in run(arguments, settings, g).items():
        assert float((tensor.double() - expected[name]).norm()) / norms[name] <= 1e-4, name


def test_scale_zero_has_a_gradient():
    case = Case(FP32, "relu", "S", 40, 5, 33)
    arguments, settings, g = make(case)
    arguments[6].zero_()
    expected, norms = truth(arguments, settings, g)
    found = run(arguments, settings, g)
    assert torch.equal(found["y"], arguments[0])
    assert found["up"].eq(0).all()
    assert abs(found["scale"].double() - expected["scale"]) <= 5e-6 * norms["scale"]


@pytest.mark.parametrize("shape", [(1, 0), (0, 4)])
def test_empty_inputs_launch_nothing(shape):
    arguments, settings, _ = make(Case(FP32, "relu", "P", 24, 4, 4))
    arguments[0], arguments[1] = torch.empty(*shape, 24), torch.empty(*shape, 24)
    found = run(arguments, settings, torch.empty(*shape, 24))
    assert found["y"].shape == (*shape, 24)
    assert found["x"].shape == (*shape, 24)
    assert all(found[n].eq(0).all() for n in ("down", "up", "down_bias", "up_bias", "scale"))


def test_what_is_not_supported_is_said():
    arguments, settings, g = make(Case(FP32, "relu", "P", 24, 4, 4))
    x, base, down, up = arguments[:4]
    assert supported(*arguments) is None
    assert supported(x, base, down, up, compute_dtype=BF16) is None
    assert supported(x.double(), base, down, up) == "dtype float64"
    assert supported(x, base, down.new_zeros(1, 300, 24), up) == "rank 300 > 144"
    assert supported(x, base, down, up.new_zeros(1, 5000, 4)) == "width 5000 > 4096"
    assert "x is not contiguous" in supported(x.mT.contiguous().mT, base, down, up)
    with pytest.raises(ValueError, match="no backward for `index`"):
        arguments[8] = torch.zeros(1, dtype=torch.long)
        backward(g, *arguments, needs={"x"}, **settings)
    with pytest.raises(ValueError, match="2 adapters for 1 segments"):
        forward(*make(Case(FP32, "relu", "P", 24, 4, 4, adapters=2))[0], **settings)


@pytest.mark.parametrize(
    ("rank", "tiles"),
    [(1, (16, 0)), (16, (16, 0)), (20, (32, 0)), (40, (32, 16)), (64, (64, 0)), (80, (64, 16)),
     (97, (128, 0)), (128, (128, 0)), (129, (128, 16)), (144, (128, 16))],
)  # fmt: skip
def test_rank_tiles(rank, tiles):
    assert triton_adapter.rank_tiles(rank) == tiles


def test_tuning_table():
    exact = tuning.lookup("forward", 768, 64, "bf16", 12608, "S")
    assert exact == tuning.Config(32, 64, 4, 3)
    assert tuning.lookup("forward", 700, 64, "bf16", 12608, "N") == exact
    assert tuning.lookup("forward", 96, 64, "bf16", 100, "S").rows == 32
    small = tuning.lookup("forward", 192, 16, "bf16", 12608, "S")
    assert small.resident
    assert not tuning.lookup("forward", 192, 16, "bf16", 12608, "N").resident
    assert not tuning.lookup("forward", 500, 16, "bf16", 12608, "S").resident
    assert tuning.lookup("backward_rows", 40, 144, "ieee", 10, "S") == tuning.Config(32, 32, 8, 2)


@pytest.fixture
def forced():
    """kernel.backend=triton for the public call."""
    dispatch.use("triton")
    yield
    assert dispatch.chosen()["used"] == "triton"
    dispatch.use("auto")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("form", "SPN")
@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
def test_public_call_and_its_gradients(form, act, forced):
    assert_matches(learn(operands((3, 11), 40, 5, form=form) | {"act": act}))
    grouped = operands((2, 9), 40, 5, groups=3, form=form, rank_scale=act == "gelu")
    assert_matches(learn(grouped | {"act": act}))


def test_public_call_with_every_part(forced):
    assert_matches(learn(operands((7,), out=67, form="N", scale=0.3, bias=False)))
    samples = operands((3, 7), out=67, form="N") | {"rank_scale": torch.rand(3, 4)}
    assert_matches(learn(samples))
    strided = operands((3, 7)) | {"x": torch.randn(7, 3, 40).transpose(0, 1)}
    assert_matches(learn(strided))
    for groups in (None, 3):
        lead = () if groups is None else (3,)
        call = operands((2, 9), 40, 5, groups=groups, rank_scale=True) | {"act": "relu"}
        call["keep"] = (torch.rand(*lead, 2, 9, 5) > 0.3) / 0.7
        norm = (torch.rand(40), torch.rand(40), 1e-5)
        call |= {"norm": norm, "column_scale": torch.rand(40)}
        call = learn(call, (*GRADIENTS, "column_scale"))
        truth = wide(call) | {"norm": (norm[0].double(), norm[1].double(), norm[2])}
        y, expected = adapter(**call), oracle(truth)
        assert error(y, expected) < LIMITS[FP32]
        leaves = [n for n, v in call.items() if isinstance(v, Tensor) and v.requires_grad]
        g = torch.randn(y.shape)
        found = torch.autograd.grad(y, [call[n] for n in leaves], g)
        right = torch.autograd.grad(expected, [truth[n] for n in leaves], g.double())
        for name, a, b in zip(leaves, found, right, strict=True):
            assert error(a, b) < 4 * LIMITS[FP32], name


def test_public_call_by_index(forced):
    call = operands((1, 9), 40, 5, groups=4, form="S") | {"act": "relu"}
    call |= {"x": torch.randn(6, 9, 40), "base": torch.randn(6, 9, 40)}
    index = torch.tensor([3, 0, 3, 2, 2, 0])
    assert error(adapter(**call, index=index), oracle(wide(call) | {"index": index})) < LIMITS[FP32]


def test_a_vit_trains_alike_with_both_backends():
    """Eight steps of a timm ViT with bottlenecks of learnt scale and a LoRA."""

    def train(backend: str) -> Tensor:
        dispatch.use(backend)
        torch.manual_seed(0)
        net = timm.create_model(
            "vit_tiny_patch16_224",
            **{"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 0},
        )
        bank = AdapterBank(Backbone(net.eval()))
        made = {f"blocks.{i}.mlp:parallel": Bottleneck(24, 5, scale=None) for i in range(2)}
        lora = LoRA(24, 72, 4, parts=["q", "v"])
        leaves = bank.add("task", {**made, "blocks.0.attn.qkv:out": lora})
        images, target = torch.rand(3, 3, 32, 32), torch.randn(3, 24)
        optimizer = torch.optim.SGD(leaves, lr=0.1, momentum=0.9)
        losses = []
        for _ in range(8):
            loss = (bank.features(images, "task") - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        assert dispatch.chosen()["used"] == backend
        return torch.stack(losses)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = train("triton"), train("reference")
    dispatch.use("auto")
    assert expected[-1] < 0.8 * expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
