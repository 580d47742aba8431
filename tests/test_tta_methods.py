"""Properties of the adaptation methods on tiny networks with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from conftest import copied, equal, strategy_node
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, LayerNorm2d, RmsNorm
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.backbones.resnext_cifar import CifarResNeXt
from driftline.backbones.wide_resnet import WideResNet
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.seed import generator
from driftline.core.strategy import TTAStrategy
from driftline.parts.modes import evaluating
from driftline.parts.norms import (
    Top,
    batch_norms,
    below_top,
    by_kind,
    by_name,
    collect_parameters,
    use_batch_statistics,
)

BATCHES = (6, 6, 1)  # the last one is short

METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {  # id: network, strategy, options
    "bn": ("resnet", "bn_adapt", {}),
    "bn-mixed": ("resnet", "bn_adapt", {"statistics": "mixed"}),
    "bn-ema": ("resnet", "bn_adapt", {"statistics": "ema"}),
    "tent": ("resnet", "tent", {"lr": 0.01}),
    "tent-adam-eval": ("resnet", "tent", {"optim": {"kind": "adam"}, "mode": "eval", "steps": 2}),
    "tent-vit": ("vit", "tent", {"layers": "norm", "lr": 0.01}),
    "tent-name": ("vit", "tent", {"layers": "name", "lr": 0.01}),
    "cotta": ("resnet", "cotta", {"threshold": 1.0}),
    "cotta-adam": (
        "resnet",
        "cotta",
        {"optim": {"kind": "adam"}, "loss": "ce", "always_draw": True},
    ),
    "cotta-vit": ("vit", "cotta", {"threshold": 0.45, "gate": "sample", "restore_prob": 0.1}),
    "cotta-device": (
        "vit",
        "cotta",
        {"threshold": 1.0, "rng": "device", "average": "probabilities"},
    ),
}
every = pytest.mark.parametrize("name", METHODS)


def backbone(kind: str, side: int | None = None, seed: int = 3, **options: Any) -> Backbone:
    """Random weights; ResNet at 64 px (at 32 px its last maps have one pixel), ViT at 32 px."""
    torch.manual_seed(seed)
    extra = {"img_size": side or 32} if kind == "vit" else {}
    net = timm.create_model(f"test_{kind}", num_classes=10, **extra, **options)
    for module in net.modules():  # random source statistics and a confident head
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    head = net.fc if kind == "resnet" else net.head
    nn.init.normal_(head.weight, std=0.3)
    return Backbone(net, name=kind, tag=f"test_{kind}")


def make(name: str, seed: int = 0, net: Backbone | None = None, **changes: Any) -> TTAStrategy:
    kind, strategy, options = METHODS[name]
    small = {"views": 2} if strategy == "cotta" else {}
    node = strategy_node(strategy, **small | options | changes)
    method = build(node, at="strategy", backbone=net or backbone(kind), seed=seed)
    method.begin_stream()
    return method


def images(name: str, sizes: tuple[int, ...] = BATCHES) -> list[Tensor]:
    side = 32 if METHODS[name][0] == "vit" else 64
    g = torch.Generator().manual_seed(5)
    return [torch.rand(n, 3, side, side, generator=g) for n in sizes]


def run(method: TTAStrategy, batches: list[Tensor]) -> list[Tensor]:
    return [method.adapt(x) for x in batches]


@pytest.mark.parametrize("name", ["bn", "bn-mixed", "bn-ema", "tent", "cotta"])
def test_one_value_per_channel_is_explained(name):
    with pytest.raises(UserError, match=r"two values per channel.*source"):
        make(name).adapt(torch.rand(1, 3, 32, 32))
    assert make(name).adapt(torch.rand(2, 3, 32, 32)).isfinite().all()


@every
def test_only_the_trained_parameters_move(name):
    method = make(name)
    before = copied(method.backbone.state_dict())
    run(method, images(name))
    trained = {id(p) for p in method.updated_parameters()}
    names = {k for k, p in method.backbone.named_parameters() if id(p) in trained}
    moved = {k for k, v in method.backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert moved <= names | ({k for k in before if "running" in k or "num_" in k} - names)
    assert names <= moved or not names
    assert bool(moved) == (name not in ("bn", "bn-mixed"))
    for key in ("cls_token", "pos_embed"):
        assert f"net.{key}" not in names


@every
def test_passes_are_counted(name):
    method, (x, *_) = make(name), images(name)
    passes = method.backbone.passes
    passes.forward = passes.backward = 0
    method.adapt(x)
    steps = getattr(method, "steps", 0)
    assert passes.backward == steps * len(x)
    forward = {"cotta": 4, "cotta-adam": 3, "cotta-vit": 5, "cotta-device": 4, "bn-ema": 2}
    assert passes.forward == forward.get(name, max(steps, 1)) * len(x)


@pytest.mark.parametrize(
    ("kind", "name", "changes", "message"),
    [
        ("vit", "bn", {}, "test_vit has none.*layers=norm"),
        ("resnet", "bn-mixed", {"alpha": 1.0}, "strategy.statistics=batch"),
        ("vit", "tent", {}, "no BatchNorm2d; set strategy.layers=norm"),
        ("resnet", "tent", {"steps": 0}, "strategy.steps must be a whole number, at least 1"),
        ("resnet", "tent", {"momentum": 0.0}, "strategy.optim.nesterov=true needs"),
        ("resnet", "cotta", {"views": 0}, "strategy.views must be a whole number, at least 1"),
        ("resnet", "cotta", {"loss": "mse"}, "strategy.loss must be one of 'ce', 'sce'"),
    ],
)
def test_wrong_backbone_or_option_is_explained(kind, name, changes, message):
    with pytest.raises(UserError, match=message):
        make(name, net=backbone(kind), **changes)


def test_bn_adapt_epsilon_is_kept_unless_asked():
    for official, eps in ((False, 1e-3), (True, 1e-5)):
        net = backbone("resnet")
        for layer in batch_norms(net.net).values():
            layer.eps = 1e-3
        make("bn", net=net, official_eps=official)
        assert {layer.eps for layer in batch_norms(net.net).values()} == {eps}


def test_mixed_statistics_are_put_back_after_an_error():
    method = make("bn-mixed")
    before = copied(method.snapshot())
    method.backbone.net.bn1.forward = lambda x: 1 / 0  # statistics are exchanged here
    with pytest.raises(ZeroDivisionError):
        method.adapt(torch.rand(2, 3, 64, 64))
    after = method.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before["tensors"].items())


def test_gate_by_sample_takes_each_row_from_its_own_source():
    x = images("cotta-vit", (8,))[0]
    options = {"average": "logits", "gate": "batch"}
    views = make("cotta-vit", threshold=2.0, **options).adapt(x)
    clean = make("cotta-vit", threshold=0.0, **options).adapt(x)
    method = make("cotta-vit")
    with evaluating(method.anchor):
        confidence = method.anchor(x).softmax(1).amax(1)
    method.threshold = confidence.median().item()
    unsure = confidence < method.threshold
    assert 0 < unsure.sum() < 8
    rows = method.adapt(x)
    assert torch.equal(rows[unsure], views[unsure])
    assert torch.equal(rows[~unsure], clean[~unsure])
    assert not torch.equal(views, clean)
    for threshold, expected in ((2.0, views), (0.0, clean)):
        assert torch.equal(make("cotta-vit", threshold=threshold).adapt(x), expected)


def test_average_of_probabilities_is_returned_as_logarithms():
    x = images("cotta")[0]
    method = make("cotta", average="probabilities")
    logits = [torch.randn(6, 10), torch.randn(6, 10)]
    mean = torch.stack([z.softmax(1) for z in logits]).mean(0)
    assert torch.allclose(method._average(logits).exp(), mean)
    far = torch.tensor([[0.0, 500.0]])
    assert method._average([far, far]).isfinite().all()
    assert torch.allclose(method.adapt(x).exp().sum(1), torch.ones(6))


def test_random_numbers_follow_the_reference():
    """With `always_draw`, a confident batch consumes what an unsure one does: views, masks."""
    x = images("cotta")[0]
    ends = []
    for threshold, always in ((2.0, False), (0.0, True), (0.0, False)):
        method = make("cotta", threshold=threshold, always_draw=always)
        method.adapt(x)
        ends.append(method.rng("method").get_state())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])

    expected = generator(0, "strategy", "method")  # the third: masks alone, one per weight
    for p in collect_parameters(backbone("resnet").net).values():
        torch.rand(p.shape, generator=expected)
    assert torch.equal(ends[2], expected.get_state())


def test_restoration_probability_and_teacher_average():
    x = images("cotta")[0]
    still = make("cotta", restore_prob=1.0, ema=0.7)
    student = None

    def remember():
        nonlocal student
        student = copied(dict(still.backbone.named_parameters()))
        type(still).average_teacher(still)

    still.average_teacher = remember
    source = copied(dict(still.anchor.named_parameters()))
    still.adapt(x)
    for name, p in still.backbone.named_parameters():
        assert torch.equal(p, source[name])
    for name, p in still.teacher.named_parameters():
        assert torch.equal(p, 0.7 * source[name] + (1 - 0.7) * student[name])
    assert not torch.equal(student["net.fc.weight"], source["net.fc.weight"])


def test_diverged_weights_stop_the_run():
    method, (x, *_) = make("cotta"), images("cotta")
    method.adapt(x)
    with torch.no_grad():
        next(iter(method.updated_parameters())).fill_(float("nan"))
    before = copied(method.teacher.state_dict())
    with pytest.raises(UserError, match=r"batch 2 is nan.*Lower strategy.optim.lr"):
        method.adapt(x)
    assert equal(dict(method.teacher.state_dict()), dict(before))
    method.reset()
    assert method.adapt(x).isfinite().all()


def test_snapshot_of_cotta_leaves_the_anchor_out():
    tensors = make("cotta-vit").snapshot()["tensors"]
    assert {k.split(".")[0] for k in tensors} == {"backbone", "teacher", "seen"}
    assert "backbone.net.cls_token" not in tensors and "teacher.net.cls_token" in tensors


def test_what_counts_as_which_norm_layer():
    net = nn.Sequential(
        nn.BatchNorm2d(4),  # 0
        BatchNormAct2d(4),  # 1
        nn.SyncBatchNorm(4),  # 2
        FrozenBatchNormAct2d(4),  # 3
        nn.BatchNorm1d(4),  # 4
        nn.LayerNorm(4),  # 5
        LayerNorm2d(4),  # 6
        nn.GroupNorm(2, 4),  # 7
        RmsNorm(4),  # 8
        nn.InstanceNorm2d(4, affine=True),  # 9
        nn.LayerNorm(4, elementwise_affine=False),  # 10
    )

    def found(*kinds):
        return sorted({int(k.split(".")[0]) for k in collect_parameters(net, by_kind(*kinds))})

    assert found("bn2d") == [0, 1, 2]
    assert found("bn1d") == [4]
    assert found("ln", "gn") == [5, 6, 7]
    assert use_batch_statistics(net) == ["0", "1", "2", "4"]
    x = torch.rand(3, 4, 2, 2)
    for layer in (net[0], net[1].eval(), net[2].eval()):
        assert torch.allclose(layer(x), nn.functional.relu(layer(x))) == (layer is net[1])
        assert set(layer.state_dict()) == {"weight", "bias"}


def test_selection_by_name_and_own_name():
    vit = backbone("vit").net
    every = collect_parameters(vit)
    assert set(dict(vit.named_parameters())) - set(every) == {"cls_token", "pos_embed"}
    resnet = backbone("resnet").net
    named = collect_parameters(resnet, by_name("norm", "bn"))
    layers = collect_parameters(resnet, by_kind("bn2d"))
    assert "conv1.1.weight" in layers and "conv1.1.weight" not in named and set(named) < set(layers)
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert list(collect_parameters(tied)) == ["0.weight", "0.bias", "1.bias"]


# Of each network: norm layers below the uppermost ones, those above, and the first of these.
UPPERMOST = {
    "torchvision/resnet50": (43, 10, "layer4.0.bn1"),
    "resnet50": (43, 10, "layer4.0.bn1"),
    "test_resnet": (12, 3, "layer4.0.bn1"),
    "regnety_004": (34, 19, "s4.b1.conv1.bn"),
    "vit_base_patch16_224": (18, 7, "blocks.9.norm1"),
    "test_vit": (10, 3, "blocks.5.norm1"),  # six blocks count as stages
    "torchvision/vit_b_16": (18, 7, "encoder.layers.encoder_layer_9.ln_1"),
    "torchvision/swin_b": (47, 6, "features.6.norm"),
    "torchvision/convnext_tiny": (18, 5, "features.6.0"),
    "convnext_tiny": (18, 5, "stages.3.downsample.0"),
    "wrn": (16, 9, "block3.layer.0.bn1"),
    "resnext": (21, 10, "stage_3.0.bn_reduce"),
}


def split_by_top(net: nn.Module, top: Top) -> tuple[list[str], list[str]]:
    """Names of norm layers below the uppermost ones, and of those above."""
    norm, lower = by_kind("bn2d", "bn1d", "ln", "gn"), below_top(net, top)
    rows = [(name, lower(name, m)) for name, m in net.named_modules() if norm(name, m)]
    return [n for n, low in rows if low], [n for n, low in rows if not low]


@pytest.mark.parametrize("name", UPPERMOST)
def test_uppermost_layers_by_position(name):
    with torch.device("meta"):
        if name == "wrn":
            net: nn.Module = WideResNet(depth=28, widen=1, num_classes=10)
        elif name == "resnext":
            net = CifarResNeXt(depth=29, cardinality=4, base_width=32, num_classes=10)
        elif name.startswith("torchvision/"):
            net = torchvision.models.get_model(name.partition("/")[2])
        else:
            net = timm.create_model(name)
    below, above = split_by_top(net, "position")
    assert (len(below), len(above), above[0]) == UPPERMOST[name]
    if name in ("torchvision/resnet50", "resnet50", "vit_base_patch16_224"):
        assert split_by_top(net, "names") == (below, above)  # what the names were made for
    assert split_by_top(net, "all") == (
        [n for n, _ in net.named_modules() if n in below + above],
        [],
    )


def test_a_network_without_stages_has_no_uppermost_layers():
    net = nn.Module()
    net.norm, net.head = nn.LayerNorm(4), nn.Linear(4, 2)
    with pytest.raises(UserError, match="set strategy.top=all"):
        below_top(net, "position")
