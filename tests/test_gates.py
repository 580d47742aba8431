"""Gates on ranks and sparse changes of a weight: at first the identity, then what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, plain_yaml
from test_bank import X, backbone, wake
from torch import Tensor, nn

from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.parts.adapters.adapter import Adapter
from driftline.parts.adapters.gated_lora import GatedLoRA
from driftline.parts.adapters.sparse import SparseRows

DIM, OUT = 12, 18
PRESETS = ("sora", "rank_budget", "dylora", "neuroada")


def layer() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(DIM, OUT).double().requires_grad_(False)


def gated(gate: str, **options: Any) -> GatedLoRA:
    """Three ranks for q and three for v, away from the identity."""
    draws = torch.Generator().manual_seed(3)
    options = {"parts": ["q", "v"], "scale": 0.5, "generator": draws} | options
    adapter = GatedLoRA(DIM, OUT, 3, gate=gate, **options).double()
    with torch.no_grad():
        for b in adapter.b:
            b.normal_(generator=draws)
        if gate != "nested":
            adapter.gate.copy_(torch.tensor([0.9, -0.2, 0.05, -0.6, 0.3, 0.01]))
    return adapter


def low_rank(a: GatedLoRA, gates: list[float]) -> Tensor:
    """The change of the weight, [OUT, DIM]."""
    g = torch.tensor(gates, dtype=torch.float64)
    q, v = (0.5 * b @ g.diag() @ d for d, b, g in zip(a.a, a.b, g.split(3), strict=True))
    return torch.cat([q, torch.zeros_like(q), v])


def sparse() -> SparseRows:
    adapter = SparseRows(layer(), 2).double()
    nn.init.normal_(adapter.values)
    return adapter


def scattered(a: SparseRows) -> Tensor:
    weight, change = layer().weight, torch.zeros(OUT, DIM, dtype=torch.float64)
    for row in range(OUT):
        largest = sorted(weight[row].abs().argsort(descending=True)[:2].tolist())
        for place, column in enumerate(largest):
            change[row, column] = a.values[row, place]
    return change


# name -> adapter, and the change of the weight that it stands for
CASES: dict[str, tuple[Any, Any]] = {
    "soft": (
        lambda: gated("soft", threshold=0.25),
        lambda a: low_rank(a, [0.65, 0, 0, -0.35, 0.05, 0]),
    ),
    "soft without threshold": (
        lambda: gated("soft"),
        lambda a: low_rank(a, [0.9, -0.2, 0.05, -0.6, 0.3, 0.01]),
    ),
    "budget": (
        lambda: gated("budget", budget=3),
        lambda a: low_rank(a, [0.9, 0, 0, -0.6, 0.3, 0]),
    ),
    "nested": (lambda: gated("nested").eval(), lambda a: low_rank(a, [1, 1, 1, 1, 1, 1])),
    "sparse": (sparse, scattered),
}


def tokens(seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, DIM, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_merged_weight(name):
    adapter: Adapter = CASES[name][0]()
    plain, x = layer(), tokens().requires_grad_()
    want = F.linear(x, plain.weight + CASES[name][1](adapter), plain.bias)
    ours = adapter.after(x, plain(x))
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-7)  # gates are float32 numbers
    with torch.no_grad():
        torch.testing.assert_close(adapter.after(x, plain(x)), want, rtol=1e-6, atol=1e-7)
    learned = [x, *(p for n, p in adapter.named_parameters() if n != "gate")]
    one, other = (
        torch.autograd.grad(out.square().sum(), learned, retain_graph=True) for out in (ours, want)
    )
    for g, h in zip(one, other, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["soft", "budget"])
def test_a_gate_that_is_shut_gets_the_gradient_of_an_open_one(name):
    adapter, x = CASES[name][0](), tokens()
    aim = tokens(7)[..., :1]
    (ours,) = torch.autograd.grad((adapter(x) * aim).sum(), [adapter.gate])
    shut = adapter.gates() == 0
    assert 0 < shut.sum() < len(shut)
    down, up = torch.cat(list(adapter.a)), torch.block_diag(*adapter.b)
    up = torch.cat([up[:6], torch.zeros(6, 6), up[6:]])
    want = torch.einsum("bnd,rd,or,bno->r", x, down, up, 0.5 * aim.expand(2, 3, OUT))
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-10)


def test_nested_ranks_are_drawn_in_training_and_a_state_of_the_generator_gives_them_again():
    adapter, x = gated("nested"), tokens()
    torch.manual_seed(4)
    state = torch.random.get_rng_state()
    rows = [adapter.gates().tolist() for _ in range(40)]
    allowed = [[1.0] * b + [0.0] * (3 - b) for b in (1, 2, 3)]
    assert {tuple(row) for row in rows} == {tuple(2 * row) for row in allowed}
    torch.random.set_rng_state(state)
    assert [adapter.gates().tolist() for _ in range(40)] == rows
    state = torch.random.get_rng_state()
    adapter.eval()(x)
    assert torch.equal(torch.random.get_rng_state(), state)  # evaluation draws nothing


@pytest.mark.parametrize("name", PRESETS)
def test_the_file_of_a_kind_attaches_learns_and_groups(name):
    node = plain_yaml(ROOT / "conf" / "adapter" / f"{name}.yaml")
    net = backbone(depth=2)
    net.requires_grad_(False)
    plan = build({k: v for k, v in node.items() if k != "name"}, at="adapter")
    bank, want = plan.bank(net), net.features(X)
    for i in range(3):
        plan.add(bank, f"t{i}", torch.Generator().manual_seed(i))
        assert torch.equal(bank.features(X, f"t{i}"), want)
        bank.features(X, f"t{i}").square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in bank.parameters_of(f"t{i}"))
        wake(bank, f"t{i}", seed=i)
    bank.eval()
    names = ["t0", "t1", "t2"]
    with torch.no_grad():
        one = torch.stack([bank.features(X, n) for n in names])
        torch.testing.assert_close(bank.features_each(X, names), one, rtol=1e-4, atol=1e-5)
        assert torch.equal(net.features(X), want)
    assert not torch.allclose(one[0], one[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gated("budget"), "gate=budget needs .*budget, a number of 1 ... 6 ranks"),
        (lambda: gated("budget", budget=7), "a number of 1 ... 6 ranks"),
        (lambda: gated("soft", budget=2), "budget=2 would do nothing: .*gate is soft"),
        (lambda: gated("nested", threshold=0.5), "threshold=0.5 would do nothing: .*is nested"),
        (lambda: SparseRows(layer(), 13), "entries=13: a row of the layer has 12; name fewer"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
