"""Adapters of the peft library: formulas, selection, freezing, and what is said without it."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
from golden_cl_case import backbone, images

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.seed import generator
from driftline.parts.adapters.bank import AdapterBank
from driftline.parts.adapters.lora import LoRA
from driftline.parts.adapters.peft_bank import PeftBank

X = images("test", range(6)).x
RANK4 = {"r": 4, "lora_alpha": 8, "target_modules": ["qkv", "fc1"]}
KINDS = {
    "lora": RANK4,
    "dora": {**RANK4, "use_dora": True},
    "loha": {"peft_type": "loha", "r": 2, "alpha": 2, "target_modules": ["qkv"]},
    "lokr": {"peft_type": "LOKR", "r": 2, "alpha": 2, "target_modules": ["proj"]},
    "ia3": {"peft_type": "ia3", "target_modules": ["qkv", "fc2"], "feedforward_modules": ["fc2"]},
}


def test_without_the_library_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[peft\]"'):
        PeftBank(backbone())


@pytest.fixture(autouse=True)
def installed(request):
    if "library" not in request.node.name:
        pytest.importorskip("peft", reason="the peft library is not installed")


def wake(bank: PeftBank, name: str, seed: int = 1) -> None:
    """Give every parameter of an adapter a value."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in bank.parameters_of(name):
            p.add_(0.2 * torch.randn(p.shape, generator=draw))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_act_inside_a_call_alone(kind):
    net, want = backbone(), backbone().features(X)
    bank = PeftBank(net)
    bank.add("a", KINDS[kind], generator(0, "init"))
    assert torch.equal(net.features(X), want) and torch.equal(bank.features(X), want)
    if kind != "loha":
        torch.testing.assert_close(bank.features(X, "a"), want)  # starts as the identity
    wake(bank, "a")
    assert not torch.allclose(bank.features(X, "a"), want, atol=1e-3)
    assert torch.equal(net.features(X), want)


@torch.no_grad()
def test_lora_equals_the_lora_of_this_project():
    net, d = backbone(), 32
    theirs = PeftBank(net)
    theirs.add("a", RANK4, generator(0, "init"))
    wake(theirs, "a")
    ours, plain = {}, backbone()
    for i in range(2):
        for place, out in (("attn.qkv", 3 * d), ("mlp.fc1", 4 * d)):
            layer = net.net.get_submodule(f"blocks.{i}.{place}")
            made = LoRA(d, out, 4, scale=8 / 4)
            made.a[0].copy_(layer.lora_A["a"].weight)
            made.b[0].copy_(layer.lora_B["a"].weight)
            ours[f"blocks.{i}.{place}:out"] = made
    bank = AdapterBank(plain)
    bank.add("a", ours)
    torch.testing.assert_close(theirs.features(X, "a"), bank.features(X, "a"), rtol=1e-5, atol=1e-5)


def test_adapters_are_chosen_trained_and_frozen_by_name():
    net = backbone()
    net.requires_grad_(False)
    bank = PeftBank(net)
    for i, name in enumerate("ab"):
        bank.add(name, RANK4, generator(i, "init"))
        wake(bank, name, i)
    one, two = (bank.features(X, n) for n in "ab")
    assert not torch.allclose(one, two, atol=1e-3)
    bank.freeze("a")
    assert not any(p.requires_grad for p in bank.parameters_of("a"))
    (bank.features(X, "a").sum() + bank.features(X, "b").sum()).backward()
    assert all(p.grad is None for p in bank.parameters_of("a"))
    assert all(p.grad is not None for p in bank.parameters_of("b"))
    mine = {id(p) for n in "ab" for p in bank.parameters_of(n)}
    assert all(p.grad is None for p in net.parameters() if id(p) not in mine)
    assert len(bank.parameters_of("a")) == 2 * 2 * 2
    assert bank.tensor_names("a") | bank.tensor_names("b") == bank.tensor_names()
    with pytest.raises(KeyError, match="there is no adapter 'c'"):
        bank.features(X, "c")
    with pytest.raises(ValueError, match="already"):
        bank.add("a", RANK4)


def test_a_network_that_learns_goes_on_learning():
    net = backbone()
    PeftBank(net).add("a", RANK4)
    weights = [p for n, p in net.named_parameters() if "lora" not in n]
    assert all(p.requires_grad for p in weights)


def test_dropout_follows_the_mode_until_frozen():
    net = backbone()
    bank = PeftBank(net)
    bank.add("a", {**RANK4, "lora_dropout": 0.5})
    wake(bank, "a")
    bank.train()
    net.eval()
    assert torch.equal(bank.features(X, "a"), bank.features(X, "a"))
    bank.train()  # after the network's mode
    assert not torch.equal(bank.features(X, "a"), bank.features(X, "a"))
    bank.freeze("a")
    bank.train()
    assert torch.equal(bank.features(X, "a"), bank.features(X, "a"))


def test_initial_values_follow_the_generator_and_leave_the_global_one_alone():
    values = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        bank, before = PeftBank(backbone()), torch.get_rng_state()
        draw = generator(0, "init")
        values.append([p.detach() for p in bank.add("a", RANK4, draw)])
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*values, strict=True))
    other = PeftBank(backbone()).add("a", RANK4, generator(1, "init"))
    assert not torch.equal(other[0], values[0][0])


def test_state_is_kept_by_the_network():
    nets = [backbone(), backbone()]
    banks = [PeftBank(n) for n in nets]
    for i, bank in enumerate(banks):
        bank.add("a", RANK4)
        wake(bank, "a", i)
    nets[1].load_state_dict(nets[0].state_dict())
    with torch.no_grad():
        assert torch.equal(banks[0].features(X, "a"), banks[1].features(X, "a"))
    assert banks[0].tensor_names() <= set(nets[0].net.state_dict())


@torch.no_grad()
def test_convolutional_networks_have_places_too():
    net = Backbone(timm.create_model("test_resnet", num_classes=0, zero_init_last=False).eval())
    x, bank = torch.rand(2, 3, 64, 64), PeftBank(net)
    want = net.features(x)
    bank.add("a", {"r": 2, "target_modules": r"layer1\..*conv1"})
    wake(bank, "a")
    assert torch.equal(net.features(x), want)
    assert not torch.allclose(bank.features(x, "a"), want)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"peft_type": "lorra", "r": 4}, "peft has no peft_type 'lorra'; did you mean 'lora'"),
        ({"r": 4, "target_modules": ["qvk"]}, "Target modules"),
        ({"rr": 4, "target_modules": ["qkv"]}, "unexpected keyword argument 'rr'"),
        ({"r": 0, "target_modules": ["qkv"]}, "positive integer"),
    ],
)
def test_what_peft_refuses_is_a_short_message(config, text):
    with pytest.raises(UserError) as caught:
        PeftBank(backbone()).add("a", config)
    assert text in str(caught.value)


def test_attention_that_bypasses_its_qkv_layer_is_served():
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    plain = timm.create_model("beit_base_patch16_224", num_classes=0, **size).eval()
    for key, p in plain.named_parameters():
        if "gamma" in key:  # layer scale starts at 1e-5
            torch.nn.init.ones_(p)
    net = Backbone(plain)
    want = net.features(X)
    bank = PeftBank(net)
    bank.add("a", RANK4, generator(0, "init"))
    wake(bank, "a")
    bank.features(X, "a").square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bank.parameters_of("a"))
    assert torch.equal(net.features(X), want)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_start_that_changes_the_frozen_network_is_refused_and_undone(start):
    net = backbone()
    options = {**RANK4, "init_lora_weights": start}
    with pytest.raises(UserError, match="changes the frozen weights"):
        PeftBank(net).add("a", options)
    for name, p in net.net.named_parameters():
        if "base_layer.weight" in name:
            plain = dict(backbone().net.named_parameters())[name.replace("base_layer.", "")]
            assert torch.equal(p, plain), name
