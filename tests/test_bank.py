"""Adapters on timm ViTs: nothing changes until they are used, and then only what they say."""

from __future__ import annotations

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, plain_yaml
from torch import nn

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.parts.adapters.adapter import Adapter
from driftline.parts.adapters.bank import AdapterBank
from driftline.parts.adapters.bottleneck import Bottleneck
from driftline.parts.adapters.dora import DoRA
from driftline.parts.adapters.dual_rank import DualRank
from driftline.parts.adapters.lora import LoRA
from driftline.parts.adapters.plan import Plan
from driftline.parts.adapters.prefix import Prefix
from driftline.parts.adapters.prompt import Prompt
from driftline.parts.adapters.scale_shift import ScaleShift

VITS = {
    "vit_tiny_patch16_224": {},
    "deit3_small_patch16_224": {},  # layer scale
    "vit_small_patch14_dinov2": {"patch_size": 8},
    "vit_base_patch32_clip_quickgelu_224": {"patch_size": 8, "embed_dim": 192, "num_heads": 3},
    "vit_small_patch16_18x2_224": {},  # parallel sub-blocks: not the plain Block
}


def backbone(name: str = "vit_tiny_patch16_224", depth: int = 3, **extra) -> Backbone:
    torch.manual_seed(0)
    options = {"img_size": 32, "num_classes": 0, "depth": depth} | VITS.get(name, {}) | extra
    return Backbone(timm.create_model(name, **options).eval())


def wake(bank: AdapterBank, name: str, seed: int = 1) -> None:
    """Give every parameter of a set a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in bank.parameters_of(name):
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def check_file_of_kind(name: str, *, depth: int = 3, rounding: float = 1e-5) -> None:
    """A file of conf/adapter attaches, is the identity up to `rounding`, learns and groups."""
    node = plain_yaml(ROOT / "conf" / "adapter" / f"{name}.yaml")
    net = backbone(depth=depth)
    net.requires_grad_(False)
    plan = build({k: v for k, v in node.items() if k != "name"}, at="adapter")
    bank, want = plan.bank(net, calibrates=True), net.features(X)
    assert isinstance(bank, AdapterBank)
    for i in range(3):
        plan.add(bank, f"t{i}", torch.Generator().manual_seed(i))
        first = bank.features(X, f"t{i}")
        torch.testing.assert_close(first, want, rtol=rounding, atol=rounding)
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


def sets(d: int, depth: int) -> dict[str, dict[str, Adapter]]:
    """One set of every kind; all of them are the identity."""
    return {
        "parallel": {f"blocks.{i}.mlp:parallel": Bottleneck(d, 4) for i in range(depth)},
        "attention": {
            f"blocks.{i}.attn:out": Bottleneck(d, 5, act="gelu", scale=None) for i in range(2)
        },
        "before": {"blocks.1.attn:in": Bottleneck(d, 5, act="gelu", scale=None)},
        "lora": {
            f"blocks.{i}.attn.qkv:out": LoRA(d, 3 * d, 4, parts=["q", "v"]) for i in range(depth)
        },
        "lora_all": {
            "blocks.0.attn.proj:out": LoRA(d, d, 2, scale=None),
            "blocks.1.mlp.fc1:out": LoRA(d, 4 * d, 2),
            "blocks.2.mlp.fc2:out": LoRA(4 * d, d, 2),
        },
        "serial": {"blocks.1.mlp:out": Bottleneck(d, 4, after="serial")},
        "dual": {f"blocks.{i}.attn.proj:out": DualRank(d, d, 1, 4) for i in range(2)},
        "ssf": {
            "patch_embed:out": ScaleShift(d, std=0.0),
            "blocks.0.norm1:out": ScaleShift(d, std=0.0),
            "norm:out": ScaleShift(d, std=0.0),
        },
    }


X = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [n for n in VITS if "18x2" not in n])
@torch.no_grad()
def test_zero_adapters_leave_every_vit_as_it_was(name):
    plain, patched = backbone(name), backbone(name)
    bank = AdapterBank(patched)
    for key, made in sets(plain.dim, 3).items():
        bank.add(key, made)
    want = plain.features(X)
    assert torch.equal(patched.features(X), want)
    for key in bank.sets:
        assert torch.equal(bank.features(X, key), want), key
        wake(bank, key)
        assert not torch.allclose(bank.features(X, key), want), key
    assert torch.equal(bank.features(X), want)
    keys = patched.net.state_dict().keys()
    assert list(keys) == list(plain.net.state_dict().keys())


@torch.no_grad()
def test_prefix_and_prompts_change_the_sequence_and_nothing_stays_behind():
    net = backbone()
    bank, want, d = AdapterBank(net), net.features(X), net.dim
    bank.add("prefix", {f"blocks.{i}.attn:keys": Prefix(d, 3) for i in range(2)})
    bank.add("plain", {"blocks.0.attn:keys": Prefix(d, 3, compensate=False)})
    bank.add("deep", {f"blocks.{i}:tokens": Prompt(d, 2) for i in range(3)})
    bank.add("shallow", {"blocks:tokens": Prompt(d, 2)})
    for key in bank.sets:
        assert bank.features(X, key).shape == want.shape
        assert not torch.allclose(bank.features(X, key), want), key
        assert torch.equal(net.features(X), want), key


@torch.no_grad()
@pytest.mark.parametrize(
    "key",
    [
        "parallel",
        "attention",
        "before",
        "lora",
        "lora_all",
        "serial",
        "dual",
        "ssf",
        "prefix",
        "deep",
    ],
)
def test_one_grouped_pass_equals_one_pass_per_set(key):
    net = backbone()
    bank, d = AdapterBank(net), net.dim
    for i in range(3):
        made = sets(d, 3) | {
            "prefix": {f"blocks.{i}.attn:keys": Prefix(d, 3) for i in range(2)},
            "deep": {f"blocks.{i}:tokens": Prompt(d, 2) for i in range(3)},
        }
        bank.add(f"t{i}", made[key])
        wake(bank, f"t{i}", seed=i)
    names = ["t0", "t1", "t2"]
    one = torch.stack([bank.features(X, n) for n in names])
    before = net.passes.forward
    each = bank.features_each(X, names)
    assert torch.allclose(each, one, rtol=1e-4, atol=1e-5)
    assert net.passes.forward - before == 3 * len(X)
    assert not torch.allclose(one[0], one[1])


def test_dora_is_the_identity_at_first_and_then_what_its_definition_says():
    net = backbone(depth=1)
    net.requires_grad_(False)
    bank, layer = AdapterBank(net), net.net.blocks[0].attn.qkv
    with torch.no_grad():
        plain = net.features(X)
    dora = DoRA(layer, 4, scale=0.5)
    bank.add("d", {"blocks.0.attn.qkv:out": dora})
    with torch.no_grad():
        assert torch.equal(bank.features(X, "d"), plain)
    wake(bank, "d")
    x, weight = torch.rand(2, 5, net.dim), layer.weight + 0.5 * dora.b @ dora.a
    want = F.linear(x, weight) * (dora.magnitude / weight.detach().norm(dim=1)) + layer.bias
    g = torch.rand_like(want)
    expected = torch.autograd.grad(want, [dora.a, dora.b, dora.magnitude], g)
    got = dora.after(x, layer(x))
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(got, [dora.a, dora.b, dora.magnitude], g)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    bank.copy("d", "e")
    assert bank.adapters("e")["blocks.0.attn.qkv:out"]._linear[0] is layer
    with torch.no_grad():  # the kept norm follows the weights
        assert torch.allclose(dora.after(x, layer(x)), want, rtol=1e-4, atol=1e-5)
        dora.b.mul_(2)
        assert not torch.allclose(dora.after(x, layer(x)), want, rtol=1e-3, atol=1e-3)


BYPASSED = ("beit_base_patch16_224", "beitv2_base_patch16_224", "eva02_tiny_patch14_224")


@pytest.mark.parametrize("name", BYPASSED)
def test_attention_that_bypasses_its_qkv_layer_is_served(name):
    """A low-rank update beside `qkv` is the same as one added to its weight."""
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    net = Backbone(timm.create_model(name, num_classes=0, **size).eval(), input_size=32)
    for key, p in net.named_parameters():
        if "gamma" in key or key.endswith(("q_bias", "v_bias")):  # layer scale starts at 1e-5
            nn.init.normal_(p)
    x = torch.rand(3, 3, 32, 32)
    plain = net.features(x)
    bank = AdapterBank(net)
    adapters = {f"blocks.{i}.attn.qkv:out": LoRA(32, 96, 4, scale=0.5) for i in range(2)}
    bank.add("a", adapters)
    for adapter in adapters.values():
        nn.init.normal_(adapter.b[0])
    got = bank.features(x, "a")
    each = bank.features_each(x, ["a", "a"])
    assert torch.equal(net.features(x), plain) and not torch.allclose(got, plain, atol=1e-2)
    got.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bank.parameters_of("a"))
    for block, adapter in zip(net.net.blocks, adapters.values(), strict=True):
        block.attn.qkv.weight.data += 0.5 * adapter.b[0] @ adapter.a[0]
    torch.testing.assert_close(net.features(x), got, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(each[1], got, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"no place.*blocks\.0:tokens.*any number of tokens"):
        bank.add("prompts", {"blocks.0:tokens": Prompt(32, 2)})


def test_the_sides_of_the_benchmark_differ_and_are_put_back(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_end_to_end as bench

    from driftline import kernels
    from driftline.parts.adapters import bottleneck

    fused = kernels.adapter
    with bench.side("plain"):
        assert bottleneck.adapter is bench.plain and kernels.adapter is fused
    assert bottleneck.adapter is fused and kernels.adapter is fused


class Bypassing(nn.Module):
    """Reads the weight of its layer and never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.num_features = nn.Linear(12, 5), 5

    def forward_features(self, x):
        return F.linear(x.flatten(1), self.layer.weight)

    def forward_head(self, x, pre_logits=False):
        return x


def test_a_point_that_is_never_reached_is_an_error_that_names_it():
    bank = AdapterBank(Backbone(Bypassing(), tag="bypassing"))
    bank.add("a", {"layer:out": LoRA(12, 5, 2)})
    for call in (
        lambda x: bank.features(x, "a"),
        lambda x: bank.features_each(x, ["a"]),
    ):
        with pytest.raises(UserError, match=r"bypassing: adapters at layer:out are never reached"):
            call(torch.rand(2, 3, 2, 2))
    assert bank.features(torch.rand(2, 3, 2, 2)).shape == (2, 5)


@torch.no_grad()
def test_a_set_for_each_image_in_one_pass():
    net = backbone()
    bank = AdapterBank(net)
    for i in range(3):
        bank.add(f"t{i}", sets(net.dim, 3)["parallel"])
        wake(bank, f"t{i}", seed=i)
    index = torch.tensor([2, 0, 2, 1])[: len(X)]
    names = ["t0", "t1", "t2"]
    before = net.passes.forward
    got = bank.features_indexed(X, names, index)
    assert net.passes.forward - before == len(X)
    want = torch.stack([bank.features(x[None], names[i])[0] for x, i in zip(X, index, strict=True)])
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, bank.features(X, "t0"))
    bank.add("lora", sets(net.dim, 3)["lora"])
    with pytest.raises(ValueError, match="a set for each image needs bottlenecks"):
        bank.features_indexed(X, ["lora"], index * 0)


@torch.no_grad()
def test_no_adapter_writes_into_the_input_of_a_module():
    net = backbone(depth=1)
    bank = AdapterBank(net)
    bank.add("a", {"blocks.0.drop_path1:out": Bottleneck(net.dim, 4)})  # returns its input
    wake(bank, "a")
    seen = []
    handle = net.net.blocks[0].ls1.register_forward_hook(
        lambda _, args, out: seen.extend([out, out.clone()])
    )
    bank.features(X, "a")
    handle.remove()
    assert torch.equal(*seen)


@torch.no_grad()
def test_sums_are_weighted_and_selection_is_not_left_behind():
    net = backbone(depth=1)
    bank, d = AdapterBank(net), net.dim
    block = net.net.blocks[0]
    for name in ("a", "b"):
        bank.add(name, {"blocks.0.mlp:parallel": Bottleneck(d, 4, scale=1.0)})
        wake(bank, name, seed=ord(name))
    seen = []
    handle = block.norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with bank.using({"a": 1.0, "b": 0.5}):
        out = net.net.forward_features(net.normalize(X))
    handle.remove()
    u = seen[0]
    a, b = (bank.adapters(n)["blocks.0.mlp:parallel"] for n in ("a", "b"))
    want = net.net.norm(u + block.mlp(block.norm2(u)) + a(u) + 0.5 * b(u))
    assert torch.allclose(out, want, atol=1e-5)
    with pytest.raises(KeyError, match="did you mean"), bank.using("aa"):
        pass


def test_gradients_reach_the_chosen_set_alone():
    net = backbone()
    net.requires_grad_(False)
    bank = AdapterBank(net)
    for name in ("old", "new"):
        bank.add(name, sets(net.dim, 3)["parallel"])
        wake(bank, name)
    bank.freeze("old")
    bank.features(X, {"old": 1.0, "new": 1.0}).sum().backward()
    assert all(p.grad is None for p in bank.parameters_of("old"))
    assert all(p.grad is not None for p in bank.parameters_of("new"))
    assert all(p.grad is None for p in net.parameters())


def test_a_frozen_set_stays_in_evaluation_mode():
    net = backbone()
    bank = AdapterBank(net)
    bank.add("a", {"blocks.0.mlp:parallel": Bottleneck(net.dim, 4, dropout=0.5)})
    bank.add("b", {"blocks.0.mlp:parallel": Bottleneck(net.dim, 4, dropout=0.5)})
    bank.freeze("a")
    bank.train()
    assert not bank.adapters("a")["blocks.0.mlp:parallel"].training
    assert bank.adapters("b")["blocks.0.mlp:parallel"].training
    nn.Sequential(bank).train()
    assert not bank.adapters("a")["blocks.0.mlp:parallel"].training


def test_a_bank_is_saved_copied_and_shrunk():
    net = backbone()
    bank = AdapterBank(net)
    bank.add("a", sets(net.dim, 3)["parallel"])
    wake(bank, "a")
    bank.copy("a", "b")
    other = AdapterBank(backbone())
    for name in ("a", "b"):
        other.add(name, sets(net.dim, 3)["parallel"])
    other.load_state_dict(bank.state_dict())
    with torch.no_grad():
        assert torch.equal(other.features(X, "b"), bank.features(X, "a"))
    bank.remove("a")
    assert list(bank.sets) == ["b"]
    assert not any(k.startswith("sets.a.") for k in bank.state_dict())
    assert not [k for k in bank.state_dict() if "patch_embed" in k]
    with pytest.raises(ValueError, match="already"):
        bank.add("b", {})


def test_networks_without_a_place_are_refused_with_the_reason():
    cnn = AdapterBank(Backbone(timm.create_model("resnet10t", num_classes=0)))
    with pytest.raises(UserError, match=r"no place for adapters.*timm ViT"):
        cnn.add("a", {"blocks.0.mlp:parallel": Bottleneck(8, 2)})
    wide = AdapterBank(backbone("vit_small_patch16_18x2_224", depth=2))
    with pytest.raises(UserError, match="no place for adapters"):
        wide.add("a", {"blocks.0.mlp:parallel": Bottleneck(384, 2)})
    eva = timm.create_model("eva02_tiny_patch14_224", img_size=28, num_classes=0, depth=2)
    with pytest.raises(UserError, match="pre-norm Block"):
        AdapterBank(Backbone(eva)).add("a", {"blocks.0.mlp:parallel": Bottleneck(192, 2)})
    with pytest.raises(UserError, match=r"did you mean 'blocks\.0\.attn\.qkv'"):
        AdapterBank(backbone()).add("a", {"blocks.0.attn.qvk:out": Bottleneck(192, 2)})
    bank = AdapterBank(backbone())
    assert "blocks.0.mlp:parallel" in bank.points() and "blocks.0.attn.qkv:out" in bank.points()


@torch.no_grad()
def test_the_class_token_prefix_matches_timm_when_it_is_empty():
    """Our attention restates timm's; without rows both must agree."""
    from driftline.parts.adapters.bank import attend

    net = backbone()
    attention = net.net.blocks[0].attn
    x = torch.randn(2, 5, net.dim)
    empty = Prefix(net.dim, 0, compensate=False)
    assert torch.allclose(attend(attention, x, [empty]), attention(x), atol=1e-6)
    calibrated = Prefix(net.dim, 0)
    assert torch.allclose(attend(attention, x, [calibrated]), attention(x), atol=1e-6)


@torch.no_grad()
def test_sets_merge_into_their_weighted_mean():
    net = backbone()
    bank = AdapterBank(net)
    for seed, name in enumerate("abc"):
        bank.add(name, sets(net.dim, 3)["parallel"])
        wake(bank, name, seed)
    a, b = (bank.sets[n].state_dict() for n in "ab")
    want = {k: 0.25 * a[k] + 0.75 * b[k] for k in a}
    bank.merge(["a", "b"], "c", [1, 3])
    got = bank.sets["c"].state_dict()
    assert all(torch.allclose(got[k], want[k], atol=1e-7) for k in want)
    bank.add("d", sets(net.dim, 3)["lora"])
    with pytest.raises(ValueError, match="same tensors"):
        bank.merge(["a", "d"], "c")


def test_dual_rank_is_the_sum_of_its_scaled_branches():
    module = DualRank(6, 8, 1, 4)
    with torch.no_grad():
        for up in module.up:
            up.normal_()
        module.scales.copy_(torch.tensor([0.5, 2.0]))
        x = torch.randn(3, 6)
        parts = [x @ d.T @ u.T for d, u in zip(module.down, module.up, strict=True)]
        assert torch.allclose(module(x), 0.5 * parts[0] + 2 * parts[1], atol=1e-5)


class PrefixPool(Prefix):
    """A prefix an image, a mixture of a pool by the likeness of its query to keys (CODA-Prompt)."""

    reads_context = True

    def __init__(self, dim: int, size: int, length: int) -> None:
        super().__init__(dim, length, compensate=False, learn_scale=False)
        generator = torch.Generator().manual_seed(4)
        self.keys = nn.Parameter(torch.randn(size, dim, generator=generator))
        self.pool = nn.Parameter(torch.randn(size, 2, length, dim, generator=generator))

    def rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.context is not None
        share = F.normalize(self.context, dim=1) @ F.normalize(self.keys, dim=1).T
        keys, values = torch.einsum("bm,mkld->kbld", share, self.pool)
        return keys, values


class PromptPool(Prompt):
    """The prompts of the key that is nearest to the query (L2P)."""

    reads_context = True

    def __init__(self, dim: int, size: int, count: int) -> None:
        super().__init__(dim, count)
        generator = torch.Generator().manual_seed(5)
        self.keys = nn.Parameter(torch.randn(size, dim, generator=generator))
        self.pool = nn.Parameter(torch.randn(size, count, dim, generator=generator))

    def tokens(self) -> torch.Tensor:
        assert self.context is not None
        nearest = (F.normalize(self.context, dim=1) @ F.normalize(self.keys, dim=1).T).argmax(1)
        return self.pool[nearest]


@pytest.mark.parametrize(
    ("kind", "point"),
    [(PrefixPool, "blocks.1.attn:keys"), (PromptPool, "blocks.1:tokens")],
)
def test_each_image_has_rows_of_its_own_where_a_kind_reads_the_context(kind, point):
    net = backbone()
    bank, x = AdapterBank(net), torch.rand(5, 3, 32, 32)
    plain = bank.features(x).detach()
    bank.add("pool", {point: kind(net.dim, 6, 3)})
    queries = torch.randn(5, net.dim, generator=torch.Generator().manual_seed(6))
    batch = bank.features(x, "pool", queries)
    pairs = zip(x, queries, strict=True)
    single = torch.cat([bank.features(i[None], "pool", q[None]) for i, q in pairs])
    torch.testing.assert_close(batch, single, rtol=1e-5, atol=5e-6)
    other = bank.features(x, "pool", queries.flip(0))
    assert not torch.allclose(other, batch) and not torch.allclose(plain, batch)
    batch.sum().backward()
    learned = dict(bank.sets["pool"].named_parameters())
    assert any(p.grad is not None and p.grad.any() for n, p in learned.items() if "pool" in n)
    assert torch.equal(bank.features(x), plain)
    assert all(a.context is None for a in bank.adapters("pool").values())


def test_named_blocks_that_a_network_lacks_are_said():
    net = Backbone(timm.create_model("test_vit", img_size=32, num_classes=4))
    plan = partial(Plan, at=["blocks.*.mlp:parallel"], kind=partial(Bottleneck, rank=2))
    with pytest.raises(UserError, match=r"strategy\.adapter\.blocks=\[6, 7\].*blocks 0 to 5"):
        plan(blocks=[6, 7]).bank(net)
    with pytest.raises(UserError, match=r"strategy\.adapter\.at=blocks\.\*.*'blocks\.\*:out'"):
        plan(at=["blocks.*"], blocks=None).bank(net)
    with pytest.warns(UserWarning, match=r"blocks=\[1, 6\].*the others get no adapter"):
        plan(blocks=[1, 6]).bank(net)
    assert len(plan(blocks=9).adapters(net)) == 6
