"""Loading of pretrained networks: identity, refusals, normalisation, strictness."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from driftline.backbones import load
from driftline.backbones.backbone import Backbone, weights_hash
from driftline.backbones.checkpoints import load_strict
from driftline.backbones.resnext_cifar import CifarResNeXt
from driftline.backbones.wide_resnet import WideResNet
from driftline.core.build import build
from driftline.core.errors import UserError

CONF = Path(__file__).parents[1] / "conf" / "backbone"
IMAGENET_MEAN = [0.485, 0.456, 0.406]


def config(name: str, **changes: Any) -> Backbone:
    """The backbone of a configuration file with some options changed."""
    return build(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), changes), at="backbone")


def images(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache and a hub address where nothing listens; gives the cache folder."""
    constants = huggingface_hub.constants
    address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(
        constants.ENDPOINT, "http://127.0.0.1:9"
    )
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# ---------------------------------------------------------------- identity


def test_full_tags_pass_and_single_tags_are_completed() -> None:
    full = "vit_base_patch16_224.augreg_in21k_ft_in1k"
    assert load.resolve_tag(full) == full
    assert load.resolve_tag("resnet50_gn") == "resnet50_gn.a1h_in1k"
    assert load.resolve_tag("tf_efficientnet_lite0") == "tf_efficientnet_lite0.in1k"
    assert load.resolve_tag("botnet50ts_256") == "botnet50ts_256"  # no weights are published


@pytest.mark.parametrize("tag", ["hf_hub:timm/resnet18.a1_in1k", "timm/resnet18.a1_in1k"])
def test_a_tag_has_no_hub_before_it(tag: str) -> None:
    with pytest.raises(UserError, match=r"^backbone\.tag must be .*, without hf_hub: or timm/"):
        config("timm", tag=tag)


@pytest.mark.parametrize(
    ("tag", "named"),
    [
        ("vit_base_patch16_224", ["augreg_in21k_ft_in1k", "augreg2_in21k_ft_in1k", "0.6", "dino"]),
        ("resnet50", ["resnet50.tv_in1k", "IMAGENET1K_V1", "resnet50.a1_in1k", "a2_in1k"]),
        ("convnext_tiny", ["ambiguous", "convnext_tiny.in12k_ft_in1k", "fb_in22k_ft_in1k"]),
        ("vit_base_patch16_224_in21k", ["backbone.tag=vit_base_patch16_224.augreg_in21k"]),
        ("resnet50.tv_in1", ["did you mean 'tv_in1k'?", "a1_in1k"]),
        ("resnet_50", ["did you mean", "resnet50"]),
        ("botnet50ts_256.a1", ["publishes none"]),
    ],
)
def test_unclear_names_are_refused_with_the_choices(tag: str, named: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        load.resolve_tag(tag)
    for text in named:
        assert text in str(refusal.value)


def test_every_configuration_names_weights_that_exist() -> None:
    for file in CONF.glob("*.yaml"):
        cfg = OmegaConf.load(file)
        target = cfg.get("_target_", "")
        if file.stem == "timm":
            cfg.tag = "convnext_tiny.fb_in22k_ft_in1k"
            assert cfg.name == cfg.tag
        if file.stem == "torchvision":
            cfg.arch = "resnet18"
            assert cfg.name == cfg.arch
        if target.endswith("timm_backbone"):
            assert load.resolve_tag(cfg.tag) == cfg.tag
        elif target.endswith("torchvision_backbone"):
            kinds = torchvision.models.get_model_weights(cfg.arch)
            assert cfg.weights in kinds.__members__
        elif target.endswith("robustbench_backbone"):
            assert (cfg.dataset, cfg.model) in load.ROBUSTBENCH_FILES


def test_the_general_configuration_asks_for_a_tag() -> None:
    with pytest.raises(UserError, match="backbone.tag must be architecture.tag as in .*, got None"):
        config("timm")
    with pytest.raises(UserError, match="backbone.arch must be text that is not empty, got None"):
        config("torchvision")


def test_random_weights_are_asked_for_labelled_and_repeatable() -> None:
    state = torch.get_rng_state()
    first, second = config("test_resnet"), config("test_resnet")
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    assert first.tag == "test_resnet@random" and first.classes is None and not first.training
    assert weights_hash(first.net.state_dict()) == weights_hash(second.net.state_dict())
    with pytest.raises(UserError, match="no weights are published.*checkpoint=random"):
        config("test_resnet", tag="botnet50ts_256", checkpoint=None)


def test_number_of_outputs() -> None:
    assert config("test_vit").num_classes == 1000
    headless = config("test_vit", num_classes=0)
    assert headless.num_classes == 0 and headless.head is None and headless.classes is None
    assert headless.features(images(1, 160)).shape == (1, headless.dim)
    with pytest.raises(UserError, match="num_classes=7.*1000"):
        config("vit_b16_in1k", num_classes=7)


# ---------------------------------------------------------------- downloads


def test_unreachable_hub_is_one_message_without_waiting(
    no_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("waits to try again"))
    with pytest.raises(UserError) as failure:
        config("vit_b16_in1k")
    assert "vit_base_patch16_224.augreg_in21k_ft_in1k" in str(failure.value)
    assert "backbone.checkpoint=/path/to/file.safetensors" in str(failure.value)
    assert "\n" not in str(failure.value)


def test_hub_is_asked_once(no_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fail(url: str) -> None:
        asked.append(url)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: pytest.fail("retried"))
    with pytest.raises(UserError, match="ConnectionError: no route"):
        config("efficientnet_lite0_in1k")
    assert len(asked) == 1 and "timm/tf_efficientnet_lite0.in1k" in asked[0]


def test_cached_weights_load_without_the_hub(no_hub: Path) -> None:
    saved = timm.create_model("test_resnet").state_dict()
    model = no_hub / "models--timm--test_resnet.r160_in1k"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0123abcd")
    file = model / "snapshots" / "0123abcd" / "model.safetensors"
    file.parent.mkdir(parents=True)
    safetensors.torch.save_file(saved, file)

    backbone = config("test_resnet", checkpoint=None)
    assert backbone.tag == "test_resnet.r160_in1k" and backbone.classes == "imagenet1k"
    assert weights_hash(backbone.net.state_dict()) == weights_hash(saved)
    headless = config("test_resnet", checkpoint=None, num_classes=0)
    assert torch.equal(headless.net.conv1[0].weight, saved["conv1.0.weight"])
    assert headless.num_classes == 0

    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot be read.*delete"):
        config("test_resnet", checkpoint=None)


def test_unreachable_torchvision_names_the_address(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "urlopen", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError) as failure:
        config("vit_b16_tv_in1k", arch="resnet18")
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in str(failure.value)
    assert "backbone.checkpoint=" in str(failure.value)
    with pytest.raises(UserError, match="IMAGENET1K_V2"):
        config("resnet50_in1k", weights="IMAGENET1K_V3")
    with pytest.raises(UserError, match="did you mean 'resnet50'"):
        config("resnet50_in1k", arch="resnet5O")


# ---------------------------------------------------------------- weight files


def test_another_architecture_is_named_by_its_first_tensor(tmp_path: Path) -> None:
    small = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    other = {k: v.clone() for k, v in small.state_dict().items()}
    load_strict(small, other, "x.pt")
    other["0.weight"], other["1.bias"] = torch.ones(3, 5), torch.ones(7)
    with pytest.raises(UserError) as refusal:
        load_strict(small, other, "x.pt")
    assert "'0.weight' has shape (3, 5) in the file, (3, 2) in the network" in str(refusal.value)
    assert "1 more mismatch" in str(refusal.value) and "x.pt" in str(refusal.value)
    del other["0.weight"]
    with pytest.raises(UserError, match="'0.weight' of the network is missing"):
        load_strict(small, other, "x.pt")
    with pytest.raises(UserError, match="'extra' of the file is unknown"):
        load_strict(small, {**small.state_dict(), "extra": torch.ones(1)}, "x.pt")

    file = tmp_path / "resnet.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), file)
    with pytest.raises(UserError, match="does not fit VisionTransformer: 'cls_token'"):
        config("test_vit", checkpoint=str(file))


def test_same_names_with_another_patch_size_are_not_resampled(tmp_path: Path) -> None:
    # timm's own loading would resize these embeddings without a word
    net = timm.create_model("test_vit", img_size=96, patch_size=8)
    safetensors.torch.save_file(net.state_dict(), tmp_path / "p8.safetensors")
    with pytest.raises(UserError, match=r"'pos_embed' has shape \(1, 145, 64\)"):
        config("test_vit", checkpoint=str(tmp_path / "p8.safetensors"))


def test_local_files_of_timm_networks(tmp_path: Path) -> None:
    tuned = timm.create_model("test_vit", num_classes=5).state_dict()
    file = tmp_path / "tuned.safetensors"
    safetensors.torch.save_file(tuned, file)
    with pytest.raises(UserError, match="head for 5 classes.*one for 1000.*num_classes=5"):
        config("test_vit", checkpoint=str(file))
    kept = config("test_vit", checkpoint=str(file), num_classes=5, classes="mine")
    assert kept.tag == "test_vit.r160_in1k@tuned.safetensors"
    assert kept.classes == "mine" and kept.num_classes == 5
    assert weights_hash(kept.net.state_dict()) == weights_hash(tuned)
    dropped = config("test_vit", checkpoint=str(file), num_classes=0)
    assert dropped.num_classes == 0 and dropped.classes is None
    x = images(2, 160)
    with torch.no_grad():
        assert torch.equal(dropped.features(x), kept.features(x))
    headless = {k: v for k, v in tuned.items() if not k.startswith("head.")}
    torch.save({"state_dict": headless}, tmp_path / "headless.pt")
    with pytest.raises(UserError, match="has no head.*1000 classes.*backbone.num_classes=0"):
        config("test_vit", checkpoint=str(tmp_path / "headless.pt"))
    again = config("test_vit", checkpoint=str(tmp_path / "headless.pt"), num_classes=0)
    assert weights_hash(again.net.state_dict()) == weights_hash(dropped.net.state_dict())
    larger = config("test_vit", checkpoint=str(file), num_classes=5, input_size=192)
    assert larger.input_size == 192 and larger.logits(images(1, 192)).shape == (1, 5)


@pytest.mark.parametrize(("name", "size"), [("test_vit", 7), ("test_vit", 161)])
def test_input_sizes_that_do_not_fit_are_named(name: str, size: int) -> None:
    with pytest.raises(UserError, match=rf"backbone\.input_size={size} does not fit {name}"):
        config(name, input_size=size)
    own, other = config("test_resnet"), config("test_resnet", input_size=64)
    assert weights_hash(own.net.state_dict()) == weights_hash(other.net.state_dict())


def test_hash_sees_one_bit_and_no_order() -> None:
    tensors = {"a": torch.randn(4, 3), "b": torch.zeros(2)}
    first = weights_hash(tensors)
    assert weights_hash(dict(reversed(tensors.items()))) == first
    assert weights_hash({"a": tensors["b"], "b": tensors["a"]}) != first
    changed = {k: v.clone() for k, v in tensors.items()}
    changed["a"].view(torch.int32)[2, 1] ^= 1
    assert weights_hash(changed) != first
    changed["a"].view(torch.int32)[2, 1] ^= 1
    assert weights_hash(changed) == first


# ---------------------------------------------------------------- normalisation and features


def test_normalisation_is_that_of_the_checkpoint() -> None:
    x = images(2, 160)
    stored = timm.get_pretrained_cfg("test_resnet.r160_in1k")
    assert stored.mean == (0.5, 0.5, 0.5)
    own, none, imagenet = (
        config("test_resnet", normalize=n) for n in ("checkpoint", "none", "imagenet")
    )
    assert torch.equal(own.normalize(x), (x - 0.5) / 0.5)
    assert torch.equal(none.normalize(x), x)
    assert imagenet.mean is not None and imagenet.mean.flatten().tolist() == pytest.approx(
        IMAGENET_MEAN
    )
    with torch.no_grad():
        a, b, c = own.logits(x), none.logits(x), imagenet.logits(x)
        assert torch.equal(a, own.net((x - 0.5) / 0.5)) and torch.equal(b, none.net(x))
    assert not torch.allclose(a, b) and not torch.allclose(a, c)
    assert (own.input_size, own.interpolation) == (160, stored.interpolation)
    with pytest.raises(UserError, match="normalize must be one of 'checkpoint'"):
        config("test_resnet", normalize="cifar")


@pytest.mark.parametrize(
    ("name", "changes", "side", "dim"),
    [
        ("test_resnet", {}, 64, 96),
        ("test_vit", {}, 160, 64),
        ("test_resnet", {"tag": "test_efficientnet.r160_in1k"}, 64, 256),
        ("test_resnet", {"tag": "test_convnext.r160_in1k"}, 64, 64),
        ("resnet50_in1k", {"arch": "resnet18", "checkpoint": "random"}, 64, 512),
        ("wrn40_2_augmix_cifar10", {"checkpoint": "random"}, 32, 128),
        ("resnext29_augmix_cifar100", {"checkpoint": "random"}, 32, 1024),
        ("embedded_resnet", {}, 32, 128),
    ],
)
def test_head_of_features_is_logits(
    name: str, changes: dict[str, Any], side: int, dim: int
) -> None:
    backbone, x = config(name, **changes), images(2, side)
    with torch.no_grad():
        features, logits = backbone.features(x), backbone.logits(x)
        assert backbone.head is not None
        torch.testing.assert_close(backbone.head(features), logits)
    assert features.shape == (2, dim) and backbone.dim == dim
    assert logits.shape == (2, backbone.num_classes)


def test_torchvision_preset_and_file(tmp_path: Path) -> None:
    file = tmp_path / "own.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    backbone = config("resnet50_in1k", arch="resnet18", checkpoint=str(file))
    assert backbone.tag == "torchvision/resnet18.IMAGENET1K_V1@own.pth"
    assert (backbone.input_size, backbone.interpolation) == (224, "bilinear")
    assert backbone.classes == "imagenet1k" and backbone.mean is not None
    assert backbone.mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN)
    with pytest.raises(UserError, match="layer1.0.conv1.weight.*in the network"):
        config("resnet50_in1k", checkpoint=str(file))


# ---------------------------------------------------------------- CIFAR and embedded networks


@pytest.mark.parametrize("arch", load.RESCALING)
def test_a_file_of_a_network_that_rescales_its_images_answers_as_the_published_one(
    arch: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    own = torchvision.models.get_model(
        arch, weights=None, transform_input=True, init_weights=False, num_classes=7
    ).eval()
    path = tmp_path / "net.pth"
    torch.save(own.state_dict(), path)
    backbone = load.torchvision_backbone(
        name="x", arch=arch, weights="IMAGENET1K_V1", checkpoint=str(path), checkpoint_key=None,
        normalize="none",
    )  # fmt: skip
    x = torch.rand(2, 3, backbone.input_size, backbone.input_size)
    with torch.no_grad():
        assert torch.equal(backbone.logits(x), own(x))
        assert isinstance(backbone.train()(x), torch.Tensor)  # no tuple
    assert not [w for w in recwarn if "initialization" in str(w.message)]


def test_cifar_networks_have_the_published_layout() -> None:
    with torch.device("meta"):
        wide = WideResNet(depth=28, widen=10, num_classes=10)
        augmix = WideResNet(depth=40, widen=2, num_classes=10)
        next29 = CifarResNeXt(depth=29, cardinality=4, base_width=32, num_classes=100)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (wide, augmix, next29)]
    assert sizes == [36_479_194, 2_243_546, 6_900_132]  # 36.5 M and 2.2 M in the WRN paper
    shapes = {k: tuple(v.shape) for k, v in wide.state_dict().items()}
    assert shapes["block1.layer.0.convShortcut.weight"] == (160, 16, 1, 1)
    assert shapes["block3.layer.3.conv2.weight"] == (640, 640, 3, 3)
    assert shapes["bn1.running_mean"] == (640,) and shapes["fc.bias"] == (10,)
    assert "block1.layer.1.convShortcut.weight" not in shapes and "block1.layer.4.bn1" not in shapes
    shapes = {k: tuple(v.shape) for k, v in next29.state_dict().items()}
    assert shapes["conv_1_3x3.weight"] == (64, 3, 3, 3)
    assert shapes["stage_1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["stage_2.0.conv_conv.weight"] == (256, 64, 3, 3)
    assert shapes["stage_3.2.bn_expand.running_var"] == (1024,)
    assert shapes["classifier.weight"] == (100, 1024)
    assert "stage_1.1.downsample.0.weight" not in shapes


def test_robustbench_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"drive\.google\.com.*1wy7gSRs.*backbone\.checkpoint="):
        config("wrn40_2_augmix_cifar10")
    with pytest.raises(UserError, match="not published for cifar100"):
        config("wrn28_10_cifar10", dataset="cifar100")
    net = WideResNet(depth=40, widen=2, num_classes=10)
    saved = {f"module.{k}": v for k, v in net.state_dict().items()}
    file = tmp_path / "wrn.pt"
    torch.save({"epoch": 99, "state_dict": saved, "optimizer": {"lr": 0.1}}, file)
    backbone = config("wrn40_2_augmix_cifar10", checkpoint=str(file))
    assert backbone.tag == "robustbench/cifar10/Hendrycks2020AugMix_WRN@wrn.pt"
    assert (backbone.classes, backbone.input_size) == ("cifar10", 32)
    x = images(2, 32)
    with torch.no_grad():
        assert torch.equal(backbone.logits(x), net.eval()((x - 0.5) / 0.5))

    half = {**net.state_dict(), "mu": torch.full((1, 3, 1, 1), 0.5)}
    torch.save(half, file)
    assert config("wrn40_2_augmix_cifar10", checkpoint=str(file)).num_classes == 10
    torch.save({**half, "mu": torch.full((1, 3, 1, 1), 0.4)}, file)
    with pytest.raises(UserError, match="mu=.*not that of"):
        config("wrn40_2_augmix_cifar10", checkpoint=str(file))
    with pytest.raises(UserError, match="does not fit CifarResNeXt: 'conv_1_3x3.weight'"):
        torch.save(net.state_dict(), file)
        config("resnext29_augmix_cifar100", checkpoint=str(file))


def test_embedded_networks_load() -> None:
    resnet, vit = config("embedded_resnet"), config("embedded_vit")
    assert (resnet.classes, resnet.num_classes, resnet.input_size) == ("embedded", 20, 32)
    assert (vit.classes, vit.num_classes, vit.tag) == (None, 0, "embedded/embedded_vit")
    assert "batch_norm" in resnet.provides and "blocks" in vit.provides
    assert vit.features(images(2, 32)).shape == (2, vit.dim) == (2, 96)
    for backbone in (resnet, vit):
        assert all(p.dtype == torch.float32 for p in backbone.parameters())
        assert torch.equal(backbone.normalize(images(1, 32)), (images(1, 32) - 0.5) / 0.5)


# ---------------------------------------------------------------- real weights, real images


@pytest.mark.realdata
def test_efficientnet_lite0_accuracy() -> None:
    if "REALDATA" not in os.environ:
        pytest.skip("set REALDATA to the folder of efficientnet_lite0/ and imagenet_real/")
    root = Path(os.environ["REALDATA"])
    file = root / "efficientnet_lite0" / "tf_efficientnet_lite0.safetensors"
    backbone = config("efficientnet_lite0_in1k", checkpoint=str(file))
    assert backbone.classes == "imagenet1k"
    with (root / "imagenet_real" / "labels.csv").open() as table:
        rows = list(csv.DictReader(table))[:200]
    right = 0
    for start in range(0, len(rows), 50):
        batch = rows[start : start + 50]
        pixels = np.stack(
            [
                np.asarray(Image.open(root / "imagenet_real" / r["filename"]))[16:240, 16:240]
                for r in batch
            ]
        )
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        labels = torch.tensor([int(r["class_index"]) for r in batch])
        with torch.no_grad():
            right += int((backbone.logits(x).argmax(1) == labels).sum())
    assert right / len(rows) >= 0.87  # ImageNet mean and std would cost ten points
