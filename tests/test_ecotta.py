"""EcoTTA against recorded numbers, on several networks, and its own properties."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import copied, equal, strategy_node, with_options
from golden_case import FOLDER, Case, both, names, names_in, optim, record
from safetensors.torch import load_file
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.backbones.wide_resnet import WideResNet
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.stream import Batch, SourceImages
from driftline.parts.warmup import WarmUp
from driftline.tta.ecotta import EcoTTA, blocks_per_part, residual_blocks, trace


def make(backbone: Backbone, seed: int = 0, **changes: Any) -> EcoTTA:
    """The shipped settings with `changes`."""
    return build(strategy_node("ecotta", **changes), at="strategy", backbone=backbone, seed=seed)


class Follow:
    """Running statistics of normalisation layers, which the method itself does not keep."""

    def __init__(self, layers: dict[str, nn.Module], starts: dict[str, Tensor]) -> None:
        self.values = {k: v.float() for k, v in starts.items()}
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda _, args, name=name: self.add(name, args[0]))

    def add(self, name: str, x: Tensor) -> None:
        var, mean = torch.var_mean(x.detach(), dim=(0, 2, 3))
        for key, new in (("running_mean", mean), ("running_var", var)):
            old = self.values[f"{name}.{key}"]
            self.values[f"{name}.{key}"] = 0.9 * old + 0.1 * new


def golden_method(case: Case) -> EcoTTA:
    """The recorded network with the recorded meta networks."""
    warmed = {
        k.removeprefix("meta_parts."): v.to(case.dtype) if v.is_floating_point() else v
        for k, v in load_file(FOLDER / "ecotta_meta.safetensors").items()
    }
    assert case.hyper["e_margin"] == "0.4*ln(10)"
    method = make(
        Backbone(case.net()),
        parts="stages",
        meta_kernel=3,
        init="community",
        warmup=None,
        frozen_bn="batch",
        meta_bn="batch",
        procedure="community",
        entropy_margin=0.4,
        reg_weight=case.hyper["lambda_reg"],
        on_empty="momentum",
        optim=vars(optim({"weight_decay": 0.0, **case.hyper})),
    )
    kept = method.meta.state_dict()
    method.use_prepared({k: v for k, v in warmed.items() if k in kept})
    return method


@both
@pytest.mark.parametrize("name", names("ecotta_*"))
def test_golden(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    pretrained = {f"frozen.{k}": v for k, v in case.net().state_dict().items()}
    warmed = load_file(FOLDER / "ecotta_meta.safetensors")
    method = golden_method(case)
    order = names_in(case.info["param_names"])
    assert order == [f"meta_parts.{k}" for k, _ in method.meta.named_parameters()]
    start = {k: p.detach().double().clone() for k, p in method.meta.named_parameters()}

    # The first forward, before anything moves.
    first = case.batches()[0]
    with torch.no_grad():
        outputs = []
        stages = [method.backbone.net.get_submodule(f"layer{k}") for k in (1, 2, 3, 4)]
        hooks = [s.register_forward_hook(lambda *a: outputs.append(a[2])) for s in stages]
        logits = method._forward(first, "joint")
        for hook in hooks:
            hook.remove()
    results: dict[str, Any] = {
        "forward_logits_batch0": logits,
        "forward_l1_batch0": torch.stack(method._distances),
        "forward_encoder_rms_batch0": [o.square().mean().sqrt() for o in outputs],
        "forward_encoder_slice_batch0": torch.cat([o[:2, :4].flatten() for o in outputs]),
    }

    watched = {"frozen.bn1": "bn1", "frozen.layer4.0.bn2": "layer4.0.bn2"}
    layers = {k: method.backbone.net.get_submodule(v) for k, v in watched.items()}
    layers["meta_parts.0.meta_bn"] = method.networks[0].meta_bn
    everything = {**pretrained, **warmed}
    starts = {k: v for k, v in everything.items() if k.rpartition(".")[0] in layers}
    follow = Follow(layers, {k: v for k, v in starts.items() if "running" in k})

    forwards: list[Tensor] = []
    method.backbone.register_forward_hook(lambda *a: forwards.append(a[2].detach()))
    regularisers: list[Tensor] = []
    original = method._step

    def step(loss: Tensor) -> None:
        if method._distances:
            weighted = method.reg_weight * torch.stack(method._distances)
            regularisers.append(weighted.detach())
        original(loss)

    method._step = step
    recorded = record(method, case)
    now = {k: p.detach().double() for k, p in method.meta.named_parameters()}
    results |= {
        "logits": recorded["logits"],
        "logits_first_forward": torch.stack(forwards[::2]),
        "loss_reg": torch.stack(regularisers),
        "loss_ent": recorded["loss"],
        "meta_l2": [v.norm().item() for v in now.values()],
        "meta_moved": [(now[k] - start[k]).norm().item() for k in now],
    }
    results |= {f"full/meta_parts.{k}": v.numpy() for k, v in now.items()}
    results |= {f"buffer/{k}": v.numpy() for k, v in follow.values.items()}
    case.check_all(results)
    assert torch.equal(method.skipped, torch.tensor(0))


# ------------------------------------------------------------------ networks and their parts

SIDE = 64


def network(name: str, **options: Any) -> Backbone:
    """Random weights and source statistics, 10 classes; images of 64 px (WideResNet: 32)."""
    torch.manual_seed(3)
    if name == "wrn":
        net: nn.Module = WideResNet(depth=16, widen=1, num_classes=10)
    elif name.startswith("torchvision/"):
        net = torchvision.models.get_model(name.split("/")[1], num_classes=10, **options)
    else:
        net = timm.create_model(name, num_classes=10, **options)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    heads = [m for m in net.modules() if isinstance(m, nn.Linear)]
    nn.init.normal_(heads[-1].weight, std=0.3)
    return Backbone(net, name=name, tag=name, input_size=32 if name == "wrn" else SIDE)


def images(count: int, side: int = SIDE, seed: int = 5) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def source_images(side: int = SIDE, count: int = 80) -> SourceImages:
    x, y = images(count, side, seed=6), torch.arange(count) % 10

    def batches(size: int, *, epoch: int | None = None, start: int = 0, augment: str = "none"):
        order = torch.arange(count)
        if epoch is not None:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(size)[start:]:
            yield Batch(x[rows], y[rows], rows, torch.zeros_like(rows))

    return SourceImages(count, "noise", "fingerprint", batches)


class Notes:
    """`Progress` in memory; stops after `limit` saves."""

    def __init__(self, state: dict[str, Any] | None = None, limit: int = 1000) -> None:
        self.state, self.limit = state, limit

    def load(self) -> dict[str, Any] | None:
        return self.state

    def save(self, state: Any) -> None:
        self.state = copy.deepcopy(dict(state))
        self.limit -= 1
        if not self.limit:
            raise KeyboardInterrupt

    def say(self, text: str) -> None:
        pass


def warm_up(**changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "_target_": "driftline.parts.warmup.WarmUp",
        "epochs": 2,
        "batch_size": 40,
        "optim": {
            "_target_": "driftline.parts.optim.Optim",
            "kind": "sgd",
            "lr": 0.01,
            "momentum": 0.9,
        },
        "augment": "none",
        "every": 1,
    }
    return with_options(options, **changes)


def ready(name: str = "test_resnet", seed: int = 0, **changes: Any) -> EcoTTA:
    """Prepared, at the start of a stream. A wide margin, so that noise images are confident."""
    backbone = network(name)
    method = make(backbone, seed, **{"entropy_margin": 1.0, "lr": 0.02, **changes})
    if method.preparation() is not None:
        side = backbone.input_size
        method.use_prepared(method.prepare(source_images(side), Notes()))
    method.begin_stream()
    return method


@pytest.mark.parametrize(
    ("name", "parts", "counts", "channels"),
    [
        ("test_resnet", "stages", [1, 1, 1, 1], [(32, 32, 1), (32, 48, 2), (48, 192, 2)]),
        ("test_resnet", 5, [1, 1, 1, 1], [(32, 32, 1)]),
        ("test_efficientnet", "stages", [1, 1, 1, 1, 1], [(24, 16, 1), (16, 24, 2)]),
        ("torchvision/resnet18", 4, [2, 2, 2, 2], [(64, 64, 1), (64, 128, 2), (128, 256, 2)]),
        ("torchvision/resnet18", [1, 2, 5], [1, 2, 5], [(64, 64, 1), (64, 128, 2), (128, 512, 4)]),
        ("torchvision/mobilenet_v2", "stages", [1, 2, 3, 7, 4], [(32, 16, 1), (16, 24, 2)]),
        ("torchvision/efficientnet_b0", 5, [2, 2, 4, 4, 4], [(32, 24, 2), (24, 40, 2)]),
        ("regnety_002", "stages", [1, 1, 4, 7], [(32, 24, 2)]),
        ("wrn", 3, [2, 2, 2], [(16, 16, 1), (16, 32, 2), (32, 64, 2)]),
    ],
)
def test_parts_are_found(name, parts, counts, channels):
    backbone = network(name)
    before = copy.deepcopy(backbone.state_dict())
    blocks = residual_blocks(backbone.net.eval())
    shapes = trace(backbone, blocks)
    assert blocks_per_part(parts, shapes) == counts
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    method = make(backbone, parts=parts, init="community")
    convs = [m.conv_block.conv for m in method.networks]
    found = [(c.in_channels, c.out_channels, c.stride[0]) for c in convs]
    assert len(found) == len(counts) and found[: len(channels)] == channels
    assert method.adapt(images(2, backbone.input_size)).shape == (2, 10)
    odd = 45 if name == "wrn" else 97  # any other size gives maps that fit, too
    assert method.predict(images(2, odd)).isfinite().all()


@pytest.mark.parametrize(
    ("network", "parts", "kernel", "expected"),
    [
        ("WRN-28-10", 4, 3, 2_562_560),
        ("WRN-28-10", 5, 3, 3_485_440),
        ("WRN-28-10", 5, 1, 392_960),
        ("WRN-40-2", 4, 3, 107_008),
        ("WRN-40-2", 5, 3, 144_128),
        ("WRN-40-2", 4, 1, 12_800),
        ("ResNet-50", 4, 1, 2_784_256),
        ("ResNet-50", 5, 1, 3_836_928),
        ("ResNet-50", 5, 3, 34_376_704),
    ],
)
def test_parameter_counts_of_the_paper_s_networks(network, parts, kernel, expected):
    with torch.device("meta"):
        if network == "ResNet-50":
            net: nn.Module = torchvision.models.resnet50()
        else:
            depth, widen = (28, 10) if network == "WRN-28-10" else (40, 2)
            net = WideResNet(depth=depth, widen=widen, num_classes=10)
        backbone = Backbone(net, input_size=224 if network == "ResNet-50" else 32)
        method = make(backbone, parts=parts, meta_kernel=kernel, init="community")
    assert sum(p.numel() for p in method.updated_parameters()) == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test_vit", "no batch normalisation"),
        ("torchvision/vgg11_bn", "does not know where"),
        ("hrnet_w18_small", "not a plain chain"),
    ],
)
def test_other_networks_are_refused_with_the_reason(name, said):
    options = {"img_size": SIDE} if name == "test_vit" else {}
    with pytest.raises(UserError, match=said):
        make(network(name, **options))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parts": [1, 1]}, "add up to 4"),
        ({"parts": [2, 2, 0]}, "at least 1"),
        ({"parts": []}, "one or more"),
        ({"parts": 0}, "strategy.parts must be a whole number, at least 1"),
        ({"parts": "halves"}, "strategy.parts"),
        ({"entropy_margin": 0.0}, "strategy.entropy_margin"),
        ({"reg_weight": -1.0}, "strategy.reg_weight"),
        ({"meta_kernel": 2}, "strategy.meta_kernel"),
    ],
)
def test_wrong_settings_are_named(changes, said):
    with pytest.raises(UserError, match=said):
        make(network("test_resnet"), **changes)


# ------------------------------------------------------------------ preparation


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "wrn"])
def test_identity_starts_as_the_source(name, kernel):
    x = images(4, network(name).input_size)
    with torch.no_grad():
        expected = network(name).eval()(x)
    changes = {"init": "identity", "frozen_bn": "running", "meta_kernel": kernel}
    method = ready(name, **changes, meta_bn="running")
    torch.testing.assert_close(method.predict(x), expected, rtol=1e-3, atol=1e-4)
    default = ready(name, init="community", frozen_bn="running", meta_bn="running")
    assert (default.predict(x) - expected).abs().max() > 0.1
    # A batch with the moments of the source images changes nothing either.
    everything = next(iter(source_images(len(x[0, 0])).batches(80))).x
    with torch.no_grad():
        expected = network(name).eval()(everything)
    method = ready(name, **changes, meta_bn="batch")
    torch.testing.assert_close(method.predict(everything), expected, rtol=1e-3, atol=1e-3)


def test_the_convolution_branch_learns_after_an_identity_start():
    method = ready(init="identity")
    start = copy.deepcopy(method.meta.state_dict())
    for _ in range(2):  # its scale is 0 at first, so the kernel follows one step later
        method.adapt(images(8))
    moved = {k for k, v in method.meta.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == {k for k, _ in method.meta.named_parameters()}


def test_preparation_names_what_it_depends_on():
    assert make(network("test_resnet"), init="community", warmup=None).preparation() is None
    settings = make(network("test_resnet"), init="identity", warmup=warm_up()).preparation()
    assert settings is not None and settings["parts"] == [1, 1, 1, 1]
    assert settings["warmup"]["epochs"] == 2
    other = make(network("test_resnet"), 1, init="identity", warmup=warm_up()).preparation()
    assert other != settings  # another seed, other convolutions


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_warm_up_trains_the_meta_networks_only(statistics):
    changes = {"frozen_bn": statistics, "meta_bn": statistics, "warmup": warm_up(lr=0.05)}
    method = make(network("test_resnet"), **changes)
    frozen = copy.deepcopy(method.backbone.state_dict())
    start = copy.deepcopy(method.meta.state_dict())
    losses: list[float] = []
    original = method._warmup_loss
    method._warmup_loss = lambda b: losses.append(original(b).item()) or original(b)
    artefact = method.prepare(source_images(), Notes())
    assert losses[-1] < losses[0] and len(losses) == 4
    assert all(torch.equal(v, frozen[k]) for k, v in method.backbone.state_dict().items())
    changed = {k for k, v in artefact.items() if not torch.equal(v, start[k])}
    assert {k for k, _ in method.meta.named_parameters()} <= changed
    assert any("running_mean" in k for k in changed) == (statistics == "running")
    assert not any(m.training for part in (method.meta, method.backbone) for m in part.modules())

    # What `prepare` returns is all that a run needs.
    used = make(network("test_resnet"), **changes)
    used.use_prepared({k: v.clone() for k, v in artefact.items()})
    x = images(4)
    assert torch.equal(used.predict(x), method.predict(x))


def test_interrupted_warm_up_goes_on():
    whole = make(network("test_resnet"), warmup=warm_up()).prepare(source_images(), Notes())
    notes = Notes(limit=2)
    with pytest.raises(KeyboardInterrupt):
        make(network("test_resnet"), warmup=warm_up()).prepare(source_images(), notes)
    again = make(network("test_resnet"), warmup=warm_up())
    rest = again.prepare(source_images(), Notes(notes.state))
    assert all(torch.equal(rest[k], v) for k, v in whole.items())


def test_construction_leaves_the_global_generator_alone():
    backbone = network("test_resnet")
    torch.manual_seed(9)
    first = torch.get_rng_state()
    a = make(backbone, seed=4)
    assert torch.equal(torch.get_rng_state(), first)
    b = make(network("test_resnet"), seed=4)
    c = make(network("test_resnet"), seed=5)
    weight = [m.networks[0].conv_block.conv.weight for m in (a, b, c)]
    assert torch.equal(weight[0], weight[1]) and not torch.equal(weight[0], weight[2])


# ------------------------------------------------------------------ on the stream

KINDS = {
    "community": {},
    "joint": {"procedure": "joint"},
    "batch": {"frozen_bn": "batch"},
    "running": {"meta_bn": "running"},
    "adam": {"optim": {"kind": "adam", "lr": 1e-3}, "init": "community"},
}
every = pytest.mark.parametrize("kind", KINDS)


@every
def test_the_frozen_network_stays(kind):
    method = ready(**KINDS[kind])
    before = copy.deepcopy(method.backbone.state_dict())
    for seed in range(2):
        method.adapt(images(6, seed=seed))
    assert all(torch.equal(v, before[k]) for k, v in method.backbone.state_dict().items())
    passes = method.backbone.passes
    passes.forward = passes.backward = 0
    method.adapt(images(6))
    assert (passes.forward, passes.backward) == (6 if kind == "joint" else 12, 6)


def test_without_update_nothing_moves():
    method = ready(update=False)
    assert list(method.updated_parameters()) == []
    start, x = copied(method.snapshot()), images(6)
    assert torch.equal(method.adapt(x), method.predict(x))
    assert equal({**method.snapshot()["tensors"], "seen": 0}, {**start["tensors"], "seen": 0})


@pytest.mark.parametrize("procedure", ["community", "joint"])
def test_empty_confident_set(procedure):
    """Skipped and counted; `momentum` moves the weights by what SGD remembers."""
    common = {"procedure": procedure, "reg_weight": 0.0, "lr": 0.02}
    methods = {k: ready(**common, on_empty=k) for k in ("skip", "momentum")}
    for method in methods.values():
        method.adapt(images(8))
        assert method.skipped == 0
        method.entropy_margin = 1e-9  # from now on nothing is confident
    moved = {}
    for key, method in methods.items():
        start = copy.deepcopy(method.meta.state_dict())
        assert method.adapt(images(8, seed=1)).isfinite().all()
        assert method.skipped == 1
        moved[key] = not equal(dict(method.meta.state_dict()), dict(start))
    # community: the regulariser's step is made in any case, with a gradient of zero here
    assert moved == {"skip": procedure == "community", "momentum": True}
    fresh = ready(**common, on_empty="skip")
    fresh.entropy_margin = 1e-9
    start = copy.deepcopy(fresh.meta.state_dict())
    fresh.adapt(images(8))
    assert equal(dict(fresh.meta.state_dict()), dict(start))


def test_joint_and_community_differ_by_more_than_rounding():
    x = images(8)
    two, one = (ready(procedure=p, reg_weight=1.0) for p in ("community", "joint"))
    assert torch.equal(two.predict(x), one.predict(x))
    for method in (two, one):
        method.adapt(x)
    assert (two.predict(x) - one.predict(x)).abs().max() > 1e-4


def test_single_image_and_one_pixel_maps():
    method = ready()
    for count in (1, 3, 1):
        assert method.adapt(images(count)).isfinite().all()
    with pytest.raises(UserError, match=r"two values per channel.*source"):
        ready().adapt(images(1, side=32))


def test_divergence_is_explained():
    method = ready()
    with torch.no_grad():
        method.networks[0].meta_bn.weight.fill_(float("inf"))
    with pytest.raises(UserError, match=r"batch 1 are not finite.*strategy\.optim\.lr.*0\.02"):
        method.adapt(images(4))


def test_recipes_hold_the_community_s_cifar_settings(configure):
    for scenario in ("cifar10_c", "cifar100_c"):
        node = configure("strategy=ecotta", f"scenario={scenario}").strategy
        assert (node.init, node.parts, node.meta_kernel) == ("community", 5, 3)
        warmup = build(node.warmup, at="strategy.warmup")
        assert isinstance(warmup, WarmUp)
        # linear from 0 within the first epoch, then times 0.2 at epochs 3, 6 and 8
        rates = [warmup.optim.lr * warmup.optim.factor(e, 10, 0, 10) for e in range(10)]
        assert [round(rate, 6) for rate in rates] == [
            0.0, *[0.05] * 2, *[0.01] * 3, *[0.002] * 2, *[0.0004] * 2,
        ]  # fmt: skip
