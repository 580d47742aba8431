"""Adapters of the peft library: every type that is installed, and what is said of those refused."""

from __future__ import annotations

import copy
import dataclasses
import sys
from functools import cache, partial
from typing import Any

import pytest
import timm
import torch
from conftest import copied, equal, strategy_node
from golden_cl_case import backbone, images

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.seed import generator
from driftline.parts.adapters.bank import AdapterBank
from driftline.parts.adapters.lora import LoRA
from driftline.parts.adapters.peft import REFUSED, peft_adapters
from driftline.parts.adapters.plan import Plan

X = images("test", range(4)).x
QKV = ["blocks.*.attn.qkv:out"]
RANK4 = {"r": 4, "lora_alpha": 8}


def plan(peft_type: str = "lora", at: list[str] = QKV, **options: Any) -> Plan:
    kind = partial(peft_adapters, peft_type=peft_type, options=options)
    return Plan(at=at, blocks=None, kind=kind)


def added(net: Backbone, chosen: Plan, *names: str) -> AdapterBank:
    bank = chosen.bank(net)
    for i, name in enumerate(names):
        chosen.add(bank, name, generator(i, "init"))
    return bank


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[peft\]"'):
        added(backbone(), plan(**RANK4), "a")


@pytest.fixture(autouse=True)
def installed(request):
    if "library" not in request.node.name:
        pytest.importorskip("peft", reason="the peft library is not installed")


def wake(bank: AdapterBank, name: str, seed: int = 1) -> None:
    """Give everything that a set learns a value."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in bank.parameters_of(name):
            p.add_(0.2 * torch.randn(p.shape, generator=draw))


def train(bank: AdapterBank, name: str) -> None:
    optimizer = torch.optim.SGD(bank.parameters_of(name), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        bank.features(X, name)[:, ::2].square().mean().backward()
        optimizer.step()
    optimizer.zero_grad()


# ------------------------------------------------------------------------------ every type

# Options that fit a width of 32, where the library's own do not.
SMALL: dict[str, dict[str, Any]] = {
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 20},
    "frod": {"progressbar": False},
    "ia3": {"feedforward_modules": r".*\.fc2"},
    "oft": {"oft_block_size": 4},
    "road": {"group_size": 8},
    "vblora": {"vector_length": 8, "num_vectors": 16, "topk": 2},
    "waveft": {"n_frequency": 20},
}
PROMPTS = {f"{kind}_tuning" for kind in ("prompt", "p", "prefix", "multitask_prompt")}
PROMPTS |= {"cpt", "cartridge"}


def types() -> list[str]:
    try:
        import peft
    except ImportError:
        return []
    return [kind.value.lower() for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING]


def small(kind: str) -> Plan:
    import peft

    if kind == "ln_tuning":
        return plan(kind, ["blocks.*.norm1:out", "norm:out"])
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind.upper()]
    options = dict(SMALL.get(kind, {}))
    if kind not in ("oft", "tinylora") and "r" in {f.name for f in dataclasses.fields(config)}:
        options["r"] = 4
    return plan(kind, ["blocks.*.attn.qkv:out", "blocks.*.mlp.fc2:out"], **options)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", types())
def test_sets_of_every_type_are_independent_or_the_type_is_refused(kind):
    net = backbone()
    net.requires_grad_(False)
    before, want = copied(net.state_dict()), net.features(X)
    chosen = small(kind)
    try:
        bank = added(net, chosen, "a", "b")
    except UserError as error:
        needs_more = "pip install" in str(error)  # a type with a library of its own
        assert needs_more or kind in {*REFUSED, *PROMPTS}, error
        return
    assert kind not in {*REFUSED, *PROMPTS}

    bank.eval()

    def unchanged() -> bool:
        return torch.equal(net.features(X), want) and torch.equal(bank.features(X), want)

    assert unchanged() and equal(copied(net.state_dict()), before)
    for i, name in enumerate("ab"):
        wake(bank, name, i)
    one, two = (bank.features(X, name).detach() for name in "ab")
    assert not torch.allclose(one, two, atol=1e-3) and not torch.allclose(one, want, atol=1e-3)
    each = bank.features_each(X, ["a", "b"])
    torch.testing.assert_close(each, torch.stack([one, two]), rtol=1e-4, atol=1e-5)

    state = copied(bank.state_dict())
    train(bank, "b")
    now = copied(bank.state_dict())
    moved = [k for k in now if not torch.equal(now[k], state[k])]
    assert moved and all(k.startswith("sets.b.") for k in moved)
    assert torch.equal(bank.features(X, "a"), one)
    assert not torch.equal(bank.features(X, "b"), two)
    assert unchanged() and equal(copied(net.state_dict()), before)

    bank.copy("a", "c")
    assert torch.equal(bank.features(X, "c"), one)
    learned = [p.shape for p in bank.parameters_of("a")]
    bank.freeze("a")
    assert not any(p.requires_grad for p in bank.sets["a"].parameters())
    bank.freeze("a", False)
    assert [p.shape for p in bank.sets["a"].parameters() if p.requires_grad] == learned
    train(bank.eval(), "c")
    assert torch.equal(bank.features(X, "a"), one) and unchanged()

    bank.load_state_dict(state | {k: v for k, v in now.items() if k not in state}, strict=False)
    assert torch.equal(bank.features(X, "b"), two), "reset"
    other = added(backbone(), chosen, "a", "b")
    other.eval().load_state_dict(state)
    assert torch.equal(other.features(X, "a"), one) and torch.equal(other.features(X, "b"), two)


@cache
def of_files() -> list[str]:
    from conftest import ROOT

    return [f"peft/{p.stem}" for p in sorted((ROOT / "conf" / "adapter" / "peft").glob("*.yaml"))]


@pytest.mark.parametrize("name", of_files())
def test_the_settings_of_every_file_start_at_the_identity_and_learn(name):
    """On ViT-B's widths; a set that starts elsewhere would move the features before training."""
    torch.manual_seed(0)
    size = {"img_size": 32, "depth": 1, "num_heads": 12, "embed_dim": 768, "num_classes": 0}
    net = Backbone(timm.create_model("vit_base_patch16_224", **size).eval())
    node = strategy_node("aper", adapter=name)
    strategy: Any = build(node, at="strategy", backbone=net, seed=0)
    strategy.adapter.add(strategy.bank, "a", generator(0, "init"))
    want, got = net.features(X), strategy.bank.features(X, "a")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    train(strategy.bank, "a")
    assert not torch.equal(strategy.bank.features(X, "a"), got)


# ------------------------------------------------------------------------------ single facts


@torch.no_grad()
def test_lora_equals_the_lora_of_this_project():
    net, d = backbone(), 32
    at = ["blocks.*.attn.qkv:out", "blocks.*.mlp.fc1:out"]
    theirs = added(net, plan(at=at, **RANK4), "a", "b")
    ours = AdapterBank(net)
    for i, name in enumerate("ab"):
        wake(theirs, name, i)
        adapters = {}
        for point, one in theirs.adapters(name).items():
            ((down, up),) = one.pairs()
            adapters[point] = LoRA(d, len(up), 4, scale=8 / 4)
            adapters[point].a[0].copy_(down)
            adapters[point].b[0].copy_(up)
        ours.add(name, adapters)
    for use in ("a", {"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 2.0}):
        got, want = theirs.features(X, use), ours.features(X, use)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_kinds_that_do_not_add_say_so_when_summed():
    bank = added(backbone(), plan(use_dora=True, **RANK4), "a", "b")
    assert not any(one.pairs() for one in bank.adapters("a").values())
    with pytest.raises(ValueError, match="cannot be summed"):
        bank.features(X, {"a": 1.0, "b": 1.0})


@torch.no_grad()
def test_the_mean_of_sets_leaves_what_does_not_learn():
    bank = added(backbone(), plan("vera", r=4), "a", "b", "c")
    for i, name in enumerate("ab"):
        wake(bank, name, i)
    a, b = (copied(bank.sets[n].state_dict()) for n in "ab")
    bank.merge(["a", "b"], "c", [1, 3])
    for key, value in bank.sets["c"].state_dict().items():
        if "lambda" in key:
            torch.testing.assert_close(value, 0.25 * a[key] + 0.75 * b[key])
        else:
            assert torch.equal(value, a[key])
    chosen = plan("vera", r=4, projection_prng_key=1)
    chosen.add(bank, "d", generator(0, "init"))
    with pytest.raises(ValueError, match="does not learn"):
        bank.merge(["a", "d"], "c")


def test_what_layers_share_stays_shared_in_a_set_and_its_copy():
    bank = added(backbone(), small("vblora"), "a")
    bank.copy("a", "b")
    tables = [
        {one.layer.vblora_vector_bank["default"].data_ptr() for one in bank.adapters(n).values()}
        for n in "ab"
    ]
    assert len(tables[0]) == len(tables[1]) == 1 and tables[0] != tables[1]


def test_mos_refuses_to_pull_block_by_block_what_blocks_share():
    options = {"adapter": "peft/lora", "peft_type": "vblora", "options": SMALL["vblora"]}
    node = strategy_node("mos", **options)
    build(node, at="strategy", backbone=backbone(), seed=0, num_classes=4)
    with pytest.raises(UserError, match="share tensors; use mode=functional"):
        node = node | {"mode": "official"}
        build(node, at="strategy", backbone=backbone(), seed=0, num_classes=4)


def test_dropout_follows_the_mode_until_frozen():
    net = backbone()
    bank = added(net, plan(lora_dropout=0.5, **RANK4), "a")
    wake(bank, "a")
    bank.eval()
    assert torch.equal(bank.features(X, "a"), bank.features(X, "a"))
    bank.train()
    assert not torch.equal(bank.features(X, "a"), bank.features(X, "a"))
    bank.freeze("a")
    bank.train()
    assert torch.equal(bank.features(X, "a"), bank.features(X, "a"))


def test_initial_values_follow_the_generator_and_leave_the_global_one_alone():
    values = []
    for seed in (1, 2):
        net = backbone()
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        values.append([p.detach() for p in added(net, plan(**RANK4), "a").parameters()])
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    bank = added(backbone(), plan(**RANK4), "a", "b")
    assert not torch.equal(bank.parameters_of("a")[0], bank.parameters_of("b")[0])


def test_a_network_that_learns_goes_on_learning():
    net = backbone()
    added(net, plan(**RANK4), "a")
    assert all(p.requires_grad for p in net.parameters())


@torch.no_grad()
def test_convolutional_networks_have_places_too():
    net = Backbone(timm.create_model("test_resnet", num_classes=0, zero_init_last=False).eval())
    x, want = torch.rand(2, 3, 64, 64), None
    want = net.features(x)
    bank = added(net, plan(at=["layer1.*.conv1:out"], r=2), "a", "b")
    for i, name in enumerate("ab"):
        wake(bank, name, i)
    assert torch.equal(net.features(x), want)
    one = torch.stack([bank.features(x, name) for name in "ab"])
    assert not torch.allclose(one[0], want)
    torch.testing.assert_close(bank.features_each(x, ["a", "b"]), one)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"peft_type": "lorra"}, "peft has no peft_type 'lorra'; did you mean 'lora'"),
        ({"at": ["blocks.*.attn.qvk:out"]}, "no module has such a name"),
        ({"at": ["blocks.*.mlp:parallel"], "r": 4}, "peft has no adapters at blocks.0.mlp:paral"),
        ({"at": ["blocks.*.norm1:out"], "r": 4}, "not supported"),
        ({"at": ["blocks.*.attn.attn_drop:out"], "r": 4}, "peft has no adapters at"),
        ({"rr": 4}, "unexpected keyword argument 'rr'"),
        ({"r": 0}, "positive integer"),
        ({"target_modules": ["qkv"]}, "options.target_modules: say where with strategy.adapter.at"),
        ({"modules_to_save": ["head"]}, "it trains whole layers of the frozen network"),
        ({"bias": "all"}, "leave out the option bias"),
        ({"peft_type": "pvera", "sample_at_inference": True}, "would change from call to call"),
        ({"peft_type": "adalora"}, "cannot serve here: its ranks are pruned by a call"),
        ({"peft_type": "poly"}, "cannot serve here: it mixes adapters by inputs"),
        ({"peft_type": "prompt_tuning"}, "use adapter=prompt or adapter=prefix"),
        ({"init_lora_weights": "eva"}, "in a calibration pass"),
        ({"init_lora_weights": "corda"}, "in a calibration pass"),
        ({"init_lora_weights": "lora_ga"}, "in a calibration pass"),
        ({"init_lora_weights": "pissa"}, "changes the frozen weights"),
        ({"init_lora_weights": "pissa_niter_2"}, "changes the frozen weights"),
        ({"init_lora_weights": "olora"}, "changes the frozen weights"),
    ],
)
def test_what_cannot_be_is_one_short_message(options, text):
    net = backbone()
    before = copied(net.state_dict())
    with pytest.raises(UserError) as caught:
        added(net, plan(**options), "a")
    assert text in str(caught.value)
    assert equal(copied(net.state_dict()), before)


def test_attention_that_bypasses_its_qkv_layer_is_served():
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    plain = timm.create_model("beit_base_patch16_224", num_classes=0, **size).eval()
    for key, p in plain.named_parameters():
        if "gamma" in key:  # layer scale starts at 1e-5
            torch.nn.init.ones_(p)
    net = Backbone(plain)
    want = net.features(X)
    bank = added(net, plan(**RANK4), "a")
    wake(bank, "a")
    bank.features(X, "a").square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bank.parameters_of("a"))
    assert torch.equal(net.features(X), want)


def test_a_frozen_layer_is_not_computed_twice():
    net = backbone()
    bank = added(net, plan(**RANK4), "a")
    calls = []
    for block in net.net.blocks:
        block.attn.qkv.forward = partial(_counted, calls, copy.copy(block.attn.qkv.forward))
    bank.features(X, "a")
    assert len(calls) == len(net.net.blocks)


def _counted(calls: list[int], forward: Any, x: torch.Tensor) -> torch.Tensor:
    calls.append(1)
    return forward(x)
