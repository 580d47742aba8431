"""Where LoRA begins: the papers' factors, a network that stays, and a state that is whole."""

from __future__ import annotations

import re
from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from conftest import strategy_node
from test_bank import X, backbone, wake
from test_distributed import together
from test_ease import task, tiny
from torch import Tensor, nn

from driftline.core import distributed
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.stream import Batch
from driftline.parts.adapters import starts
from driftline.parts.adapters.bottleneck import Bottleneck
from driftline.parts.adapters.lora import LoRA
from driftline.parts.adapters.plan import Plan
from driftline.parts.adapters.starts import CALIBRATED, CHOOSING, KEPT, Start

# Those that set factors; what the others choose is tried in test_gates.py and test_kinds.py.
STARTS = [start for start in get_args(Start) if start not in CHOOSING]
DIM, OUT, RANK = 12, 15, 3
QKV = ["blocks.*.attn.qkv:out"]


def weight() -> Tensor:
    return torch.randn(OUT, DIM, generator=torch.Generator().manual_seed(1)) / 3


def inputs() -> Tensor:
    """Rows whose directions differ clearly in how much they vary, about a mean that is not 0."""
    rows = torch.randn(40, DIM, generator=torch.Generator().manual_seed(2))
    return rows * 0.6 ** torch.arange(DIM) + 0.3


def same_up_to_sign(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Rows as lines: each may point the other way."""
    signs = (ours * theirs).sum(1, keepdim=True).sign()
    torch.testing.assert_close(ours, signs * theirs, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------ formulas


def theirs(start: str) -> tuple[Tensor, Tensor]:
    """A and B of the peft library's layer, alpha 2 r."""
    peft = pytest.importorskip("peft", reason='peft is missing: pip install -e ".[peft]"')
    lora = pytest.importorskip("peft.tuners.lora")
    corda = pytest.importorskip("peft.tuners.lora.corda")
    net = nn.Sequential(nn.Linear(DIM, OUT, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(weight())
    name = {"orthonormal": "olora"}.get(start, start)
    more: dict[str, Any] = {}
    if start == "eva":
        more = {"eva_config": lora.EvaConfig(rho=1.0)}
    if start == "corda":
        more = {"corda_config": lora.config.CordaConfig(corda_method="ipm")}
    if start == "lora_ga":
        more = {"lora_ga_config": lora.LoraGAConfig()}
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=["0"], init_lora_weights=name, **more
    )
    if start == "corda":
        corda.preprocess_corda(net, config, run_model=lambda: [net(x) for x in images()])
    if start == "lora_ga":
        lora.preprocess_loraga(net, config, lambda: net(inputs()).square().sum().backward())
    model = peft.get_peft_model(net, config)
    if start == "eva":
        peft.initialize_lora_eva_weights(
            model,
            [inputs()],
            forward_fn=lambda m, x: m(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    layer = model.base_model.model[0]
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def images() -> list[Tensor]:
    return list(inputs().view(5, 1, 8, DIM))


def gradient() -> Tensor:
    w = weight().requires_grad_()
    return torch.autograd.grad(F.linear(inputs(), w).square().sum(), w)[0]


def moment() -> Tensor:
    rows = [(x / x.max().abs()).squeeze(0) for x in images()]
    return sum(r.T @ r for r in rows) / len(rows)


OURS = {
    "pissa": lambda: starts.pissa(weight(), RANK, 2.0),
    "orthonormal": lambda: starts.orthonormal(weight(), RANK),
    "eva": lambda: starts.eva(inputs().T.cov(correction=0), OUT, RANK),
    "corda": lambda: starts.corda(weight(), moment(), RANK, 2.0),
    "lora_ga": lambda: starts.lora_ga(gradient(), RANK),
    "lora_one": lambda: starts.lora_one(gradient(), RANK),
}


def test_the_table_has_every_start():
    assert list(OURS) == STARTS
    assert all(f"`{start}`" in str(starts.__doc__) for start in get_args(Start))


@pytest.mark.parametrize("start", ["pissa", "orthonormal", "eva", "corda"])
def test_factors_are_those_of_the_peft_library(start):
    (a, b), (their_a, their_b) = OURS[start](), theirs(start)
    same_up_to_sign(a, their_a, 2e-3 if start in ("eva", "corda") else 1e-4)
    torch.testing.assert_close(b @ a, their_b @ their_a, rtol=2e-3, atol=2e-3)


def test_gradient_starts_are_their_formulas():
    (a, b), (their_a, their_b) = OURS["lora_ga"](), theirs("lora_ga")
    factor = OUT**0.25 / 4
    same_up_to_sign(a / factor, their_a, 1e-3)
    same_up_to_sign(b.T / factor, F.normalize(their_b.T, dim=1), 1e-3)
    a, b = OURS["lora_one"]()
    u, s, vh = torch.linalg.svd(gradient())
    step = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    torch.testing.assert_close(b @ a, -step / s[0] / 128, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(b.norm(dim=0), a.norm(dim=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("parts", "scale"), [(None, 0.5), (["q", "v"], 2.0), (["k"], None)])
def test_a_kept_start_is_the_change_of_the_merged_weight(parts, scale):
    layer = nn.Linear(DIM, 18).double().requires_grad_(False)
    lora = LoRA(DIM, 18, RANK, parts=parts, scale=scale).double()
    starts.prepare("pissa", "layer:out", lora, layer)
    x = torch.randn(2, 4, DIM, dtype=torch.float64, requires_grad=True)
    assert torch.equal(lora.after(x, layer(x)), layer(x)) and lora.b[0].any()
    begun = [(a.detach().clone(), b.detach().clone()) for a, b in zip(lora.a, lora.b, strict=True)]
    with torch.no_grad():
        for p in lora.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    merged = layer.weight.clone()
    scales = list(lora.scales) if scale is None else [scale] * len(lora.a)
    for i, ((first, last), (a0, b0)) in enumerate(zip(lora.rows, begun, strict=True)):
        change = scales[i] * (lora.b[i] @ lora.a[i] - b0 @ a0)
        merged = merged + F.pad(change, (0, 0, first, 18 - last))
    want, ours = F.linear(x, merged, layer.bias), lora.after(x, layer(x))
    torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-12)
    learned = [x, *lora.parameters()]
    one, other = (torch.autograd.grad(out.square().sum(), learned) for out in (ours, want))
    for g, h in zip(one, other, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------ on a network


@pytest.mark.parametrize("start", STARTS)
def test_the_network_stays_bitwise_and_the_set_is_the_identity(start):
    net = backbone(depth=2)
    net.requires_grad_(False)
    want, before = net.features(X), {k: v.clone() for k, v in net.state_dict().items()}
    kind = partial(LoRA, rank=2, parts=["q", "v"], scale=2.0)
    plan = Plan(at=QKV, blocks=None, kind=kind, start=start)
    bank = plan.bank(net, calibrates=True)
    y = torch.tensor([0, 1, 2, 1])
    batch = Batch(X, y, torch.arange(4), torch.zeros(4))
    head = torch.randn(net.dim, 3)
    for name in ("t0", "t1"):
        plan.add(bank, name, torch.Generator().manual_seed(1))
        random = bank.adapters(name)["blocks.1.attn.qkv:out"].a[0].clone()
        if start in CALIBRATED:
            assert torch.equal(bank.features(X, name), want)
            loss = lambda b, n=name: F.cross_entropy(bank.features(b.x, n) @ head, b.y)  # noqa: E731
            starts.calibrate(bank, name, start, iter([batch, batch]), loss)
            assert not torch.equal(random, bank.adapters(name)["blocks.1.attn.qkv:out"].a[0])
        assert torch.equal(bank.features(X, name), want) == (start != "lora_one")
        parameters = bank.parameters_of(name)
        assert all(p.grad is None for p in [*parameters, *net.parameters()])
    assert not any(p.requires_grad for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    lora = bank.adapters("t0")["blocks.0.attn.qkv:out"]
    assert (lora.start_down is not None) == (start in KEPT) == (not lora.pairs())
    wake(bank, "t0")
    with torch.no_grad():
        one = torch.stack([bank.features(X, n) for n in ("t0", "t1")])
        torch.testing.assert_close(bank.features_each(X, ["t0", "t1"]), one, rtol=1e-4, atol=1e-5)
        bank.copy("t0", "copy")
        assert torch.equal(bank.features(X, "copy"), one[0])


METHODS = [("finetune", "eva"), ("ease", "lora_ga"), ("lae", "corda"), ("aper", "lora_one")]
METHODS += [(name, start) for name in ("ease", "lae") for start in CHOOSING]


@pytest.mark.parametrize(("name", "start"), METHODS)
def test_a_method_calibrates_before_a_task_and_a_resumed_one_does_not(name, start):
    def make() -> Any:
        kinds = {"saft": {"adapter": "saft"}, "lori": {"adapter": "lori_s"}}
        kind = kinds.get(start, {"adapter": "lora", "rank": 2})
        node = strategy_node(name, start=start, start_batches=2, **kind)
        return build(node, at="strategy", backbone=tiny(), seed=0, num_classes=5)

    def factors(method: Any) -> list[Tensor]:
        state = method.bank.state_dict()
        return [
            v.clone()
            for k, v in state.items()
            if {"a", "start", "index", "mask"} & set(re.split(r"[._]", k))
        ]

    first, second = task(0, range(0, 3)), task(1, range(3, 5))
    method, plain = make(), tiny().state_dict()
    method.begin_task(first)
    begun = factors(method)
    other = make()
    other.grow(first)
    assert not all(map(torch.equal, factors(other), begun))
    other.restore(method.snapshot())
    assert all(map(torch.equal, factors(other), begun))
    rows = []
    for one in (method, other):
        rows.append([one.observe(batch).get("loss") for batch in first.train(0)])
        one.end_task(first)
    assert rows[0] == rows[1]
    before = factors(method)
    method.begin_task(second)
    same = [torch.equal(a, b) for a, b in zip(before, factors(method), strict=False)]
    assert all(same)  # sets of earlier tasks, and the one that goes on
    assert len(factors(method)) == len(before) * (2 if name in ("ease", "lae") else 1)
    state = method.backbone.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in plain.items())


def calibrated() -> list[Tensor]:
    """What every start that reads images makes of one batch: A^T A and B A of each layer."""
    net, rows = tiny().requires_grad_(False), []
    draws = torch.Generator().manual_seed(0)
    x, head = torch.rand(7, 3, 16, 16, generator=draws), torch.randn(16, 3, generator=draws)
    batch = Batch(x, torch.tensor([0, 1, 2, 1, 0, 2, 2]), torch.arange(7), torch.zeros(7))
    for start in (s for s in CALIBRATED if s not in CHOOSING):
        plan = Plan(at=QKV, blocks=None, kind=partial(LoRA, rank=2), start=start)
        bank = plan.bank(net, calibrates=True)
        plan.add(bank, "a", torch.Generator().manual_seed(1))
        loss = lambda b, bank=bank: F.cross_entropy(bank.features(b.x, "a") @ head, b.y)  # noqa: E731
        starts.calibrate(bank, "a", start, [batch], loss)
        for lora in bank.adapters("a").values():
            rows += [lora.a[0].T @ lora.a[0], lora.b[0] @ lora.a[0]]
    return [row.detach() for row in rows]


def test_two_processes_calibrate_as_one(tmp_path):
    want = calibrated()

    def work(rank: int) -> None:
        distributed.join(torch.device("cpu"))
        for ours, theirs in zip(calibrated(), want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)

    results = together(tmp_path, work)
    assert [status for status, _ in results] == [0, 0], results


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": partial(Bottleneck, rank=2)}, "start=pissa sets the factors of LoRA, not of Bot"),
        ({"at": ["blocks.*.attn:out"]}, "is no output of one: use strategy.adapter.at="),
        ({"kind": partial(LoRA, rank=17)}, "needs 17 singular vectors and the layer at blocks.0"),
        ({"kind": partial(LoRA, rank=2, scale=0.0)}, "needs strategy.adapter.kind.scale above 0"),
        ({"start": "saft"}, "start=saft is computed from images before the training, which this"),
        ({"start_batches": 3}, "start_batches=3 would do nothing: strategy.adapter.start=pissa re"),
        ({"start": None, "start_batches": 3}, "do nothing: strategy.adapter.start=null reads no"),
        (
            {"at": ["blocks.*.mlp.fc2:out"], "kind": partial(LoRA, rank=2, parts=["q"])},
            "kind.parts names parts of a qkv layer, and blocks.0.mlp.fc2:out has none",
        ),
        ({"start": "eva"}, "start=eva is computed from images before the training, which this"),
    ],
)
def test_starts_that_cannot_be_are_refused(options, message):
    plain = {"at": QKV, "blocks": None, "kind": partial(LoRA, rank=2), "start": "pissa"}
    plan = Plan(**plain | options)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        plan.add(plan.bank(tiny()), "a")


@pytest.mark.parametrize(("start", "adapter"), [("saft", "saft"), ("lori", "lori_s")])
def test_a_start_that_chooses_numbers_is_for_its_kind(start, adapter):
    plan = Plan(at=QKV, blocks=None, kind=partial(LoRA, rank=2), start=start)
    message = f"start={start} chooses what .* changes, and this is LoRA: use adapter={adapter}$"
    with pytest.raises(UserError, match=message):
        plan.add(plan.bank(tiny(), calibrates=True), "a")


@pytest.mark.parametrize(("start", "images"), [("eva", 0), ("lora_ga", 0), ("lora_ga", 4)])
def test_a_calibration_without_images_or_gradient_is_an_error(start, images):
    net = tiny()
    plan = Plan(at=QKV, blocks=None, kind=partial(LoRA, rank=2), start=start)
    bank = plan.bank(net, calibrates=True)
    plan.add(bank, "a")
    batch = Batch(torch.rand(4, 3, 16, 16), torch.zeros(4).long(), torch.arange(4), torch.zeros(4))
    batches = [batch] if images else []
    expected = "is 0 or not finite; take tasks of several" if images else "and there are none"
    with pytest.raises(UserError, match=expected):
        starts.calibrate(
            bank, "a", start, batches, lambda b: 0 * bank.features(b.x, "a").square().sum()
        )
