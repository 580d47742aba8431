"""Kinds of adapters that are a formula: at first the identity, then what the paper says."""

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
from driftline.parts.adapters.bank import AdapterBank
from driftline.parts.adapters.dora import DoRA
from driftline.parts.adapters.hra import HRA
from driftline.parts.adapters.hydra import Hydra
from driftline.parts.adapters.lora import LoRA
from driftline.parts.adapters.moslora import MoSLoRA
from driftline.parts.adapters.paca import PaCA

DIM, OUT = 12, 15


def reflections(a: HRA) -> Tensor:
    """H_1 ... H_r as in the paper."""
    whole = torch.eye(DIM, dtype=torch.float64)
    for u in a.u:
        whole = whole @ (torch.eye(DIM, dtype=torch.float64) - 2 * torch.outer(u, u) / (u @ u))
    return whole


def product(a: LoRA) -> Tensor:
    return a.scale * a.b[0] @ a.a[0]


def columns(a: PaCA, weight: Tensor) -> Tensor:
    return torch.zeros_like(weight).index_copy(1, a.chosen, a.p)


# kind -> how it is made, and the weight and bias that it stands for
KINDS: dict[str, tuple[Any, Any]] = {
    "lora": (lambda g, m: LoRA(DIM, OUT, 4, scale=0.5, generator=g), None),
    "dora": (lambda g, m: DoRA(m, 4, scale=0.5, generator=g), None),
    "hra": (lambda g, m: HRA(DIM, 4, generator=g), lambda a, w, b: (w @ reflections(a), b)),
    "moslora": (
        lambda g, m: MoSLoRA(DIM, OUT, 4, scale=0.5, generator=g),
        lambda a, w, b: (w + 0.5 * a.b[0] @ a.mixer @ a.a[0], b),
    ),
    "hydra": (
        lambda g, m: Hydra(DIM, OUT, 4, scale=0.5, generator=g),
        lambda a, w, b: (w + product(a.beside) + product(a.behind) @ w, b + product(a.behind) @ b),
    ),
    "paca": (
        lambda g, m: PaCA(DIM, OUT, 4, generator=g),
        lambda a, w, b: (w + columns(a, w), b),
    ),
}
OWN = [name for name, (_, weight) in KINDS.items() if weight is not None]


def layer_with(name: str) -> tuple[nn.Linear, Adapter]:
    torch.manual_seed(2)
    layer = nn.Linear(DIM, OUT).double().requires_grad_(False)
    adapter = KINDS[name][0](torch.Generator().manual_seed(3), layer).double()
    return layer, adapter


def moved(name: str) -> tuple[nn.Linear, Adapter]:
    """As `layer_with`, away from the identity."""
    layer, adapter = layer_with(name)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return layer, adapter


def output(adapter: Adapter, layer: nn.Linear, x: Tensor) -> Tensor:
    if isinstance(adapter, HRA):
        return layer(adapter.before(x))
    return adapter.after(x, layer(x))


def tokens(seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, DIM, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_is_the_identity_at_first(name):
    layer, adapter = layer_with(name)
    x = tokens()
    before = x.clone()
    rounding = 1e-14 if name in ("hra", "dora") else 0.0
    torch.testing.assert_close(output(adapter, layer, x), layer(x), rtol=rounding, atol=rounding)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", OWN)
def test_the_output_is_that_of_the_merged_weight(name):
    layer, adapter = moved(name)
    x = tokens()
    merged = F.linear(x, *KINDS[name][1](adapter, layer.weight, layer.bias))
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            ours = output(adapter, layer, x)
        torch.testing.assert_close(ours, merged, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(merged, layer(x))


@pytest.mark.parametrize("name", OWN)
def test_gradients_are_those_of_the_merged_weight(name):
    layer, adapter = moved(name)
    x, aim = tokens().requires_grad_(), tokens(7)[..., :1]
    ours, want = (
        torch.autograd.grad((out * aim).square().sum(), [x, *adapter.parameters()])
        for out in (
            output(adapter, layer, x),
            F.linear(x, *KINDS[name][1](adapter, layer.weight, layer.bias)),
        )
    )
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OWN)
def test_the_file_of_a_kind_attaches_learns_and_groups(name):
    node = plain_yaml(ROOT / "conf" / "adapter" / f"{name}.yaml")
    net = backbone()
    net.requires_grad_(False)
    plan = build({k: v for k, v in node.items() if k != "name"}, at="adapter")
    bank, want = plan.bank(net), net.features(X)
    assert isinstance(bank, AdapterBank)
    for i in range(3):
        plan.add(bank, f"t{i}", torch.Generator().manual_seed(i))
        torch.testing.assert_close(bank.features(X, f"t{i}"), want, rtol=1e-5, atol=1e-5)
        bank.features(X, f"t{i}").square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in bank.parameters_of(f"t{i}"))
        wake(bank, f"t{i}", seed=i)
    names = ["t0", "t1", "t2"]
    with torch.no_grad():
        one = torch.stack([bank.features(X, n) for n in names])
        torch.testing.assert_close(bank.features_each(X, names), one, rtol=1e-4, atol=1e-5)
        assert torch.equal(net.features(X), want)
    assert not torch.allclose(one[0], one[1])


def test_reflections_are_those_of_the_peft_library():
    peft = pytest.importorskip("peft", reason='peft is missing: pip install -e ".[peft]"')
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(DIM, OUT)).double()
    theirs = peft.get_peft_model(net, peft.HRAConfig(r=4, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    u = layer.hra_u["default"]  # [dim, r]
    with torch.no_grad():
        u.add_(torch.randn_like(u) * 0.3)
    ours = HRA(DIM, 4).double()
    with torch.no_grad():
        ours.u.copy_(u.T)
    x = tokens()
    torch.testing.assert_close(layer.base_layer(ours.before(x)), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 7])
def test_an_odd_number_of_reflections_is_refused(rank):
    node = {"_target_": "driftline.parts.adapters.hra.HRA", "dim": DIM, "rank": rank}
    with pytest.raises(UserError, match=r"rank must be a whole number.*, an even number, got"):
        build(node, at="strategy.adapter.kind")


def test_more_columns_than_a_layer_has_are_refused():
    with pytest.raises(UserError, match=r"columns=13: the layer has 12 columns; name fewer"):
        PaCA(DIM, OUT, 13)
