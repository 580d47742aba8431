"""Networks as people have them: what they return in training, and sizes that do not fit."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import driftline
from driftline.backbones.backbone import Backbone, scores_of
from driftline.core.errors import UserError


class Net(nn.Module):
    """A linear classifier on mean colours that wraps its scores."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.norm, self.fc, self.wrap = nn.LayerNorm(3), nn.Linear(3, 5), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.fc(self.norm(x.mean(dim=(2, 3)))))


class Outputs(NamedTuple):
    logits: Tensor
    aux_logits: Tensor | None


class ModelOutput(OrderedDict[str, Tensor]):
    """As of transformers: a mapping whose entries are attributes as well."""


IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: (s, s + 1),
        lambda s: [s],
        lambda s: Outputs(s, None),
        lambda s: {"logits": s, "hidden_states": s},
        lambda s: ModelOutput(logits=s),
    ],
)
def test_scores_are_taken_out_of_what_a_network_returns(wrap: Any) -> None:
    method: Any = driftline.make("tent", Net(wrap), layers="norm")
    net = Net(wrap)
    net.load_state_dict(method.backbone.net.state_dict())
    torch.testing.assert_close(method.predict(IMAGES), scores_of(net(IMAGES), "net"))
    assert method.adapt(IMAGES).shape == (4, 5)
    lame: Any = driftline.make("lame", Net(wrap))
    assert lame.adapt(IMAGES).shape == (4, 5)


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: {"out": s[:, :, None, None], "aux": s}, "a mapping with the keys out, aux"),
        (lambda s: s[:, :, None, None], r"a tensor of shape \[4, 5, 1, 1\]"),
        (lambda s: (s[..., None],), "tuple"),
        (lambda s: None, "NoneType"),
    ],
)
def test_anything_else_is_refused_in_one_line(wrap: Any, said: str) -> None:
    method: Any = driftline.make("source", Net(wrap), num_classes=5)
    with pytest.raises(UserError, match=f"custom returns {said}, not scores") as error:
        method.adapt(IMAGES)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_give_the_main_scores(arch: str) -> None:
    torch.manual_seed(0)
    net = torchvision.models.get_model(arch, weights=None, num_classes=4, init_weights=False)
    backbone = Backbone(net.train())
    x = torch.rand(2, 3, 80, 80)
    assert backbone.head is net.fc and backbone.num_classes == 4
    for child in net.children():  # the auxiliary heads need more pixels than a test has time for
        if "Aux" in type(child).__name__:
            child.forward = lambda x: torch.zeros(len(x), 4)  # type: ignore[method-assign]
    assert isinstance(net(x), tuple)
    assert backbone.logits(x).shape == (2, 4) and backbone.features(x).shape == (2, backbone.dim)


class Fixed(Net):
    """Takes 16 x 16 alone."""

    def forward(self, x: Tensor) -> Any:
        assert x.shape[-1] == 16, f"Input width ({x.shape[-1]}) doesn't match model (16)."
        return super().forward(x)


def test_images_of_another_size_name_the_setting() -> None:
    backbone = Backbone(Fixed(lambda s: s), tag="fixed", input_size=16)
    assert backbone.logits(IMAGES).shape == (4, 5)
    for call in (backbone.logits, backbone.features):
        with pytest.raises(UserError) as error:
            call(torch.rand(2, 3, 32, 32))
        text = str(error.value)
        assert text.startswith("fixed fails on images of 32 x 32 pixels (Input width (32) doesn't")
        assert "scenario.resize=16" in text and "backbone.input_size=32" in text


FORM = r"images must be a float tensor \[B, 3, H, W\] in \[0, 1\], got "


@pytest.mark.parametrize("call", [Backbone.logits, Backbone.features])
@pytest.mark.parametrize("mean", [None, [0.5, 0.4, 0.3]])
@pytest.mark.parametrize(
    ("images", "said"),
    [
        (torch.ones(2, 3, 8, 8).byte(), FORM + r"torch.uint8 \[2, 3, 8, 8\]"),
        (IMAGES[0], FORM + r"torch.float32 \[3, 16, 16\]"),
        (IMAGES[:, :1], FORM + r"torch.float32 \[4, 1, 16, 16\]"),
        (IMAGES.numpy(), FORM + "ndarray"),
        ((IMAGES, torch.zeros(4)), FORM + "tuple"),
        (IMAGES.double(), "the images are torch.float64 on cpu and the weights torch.float32"),
        (255 * IMAGES, r"must be in \[0, 1\], and these are in \[.*, 255\]. Divide"),
        (4 * IMAGES - 2, r"must be in \[0, 1\], and these are in \[-2, .*leave Normalize out"),
    ],
    ids=["uint8", "one", "grey", "numpy", "with labels", "double", "255", "normalised"],
)
def test_what_is_no_batch_of_images_is_told_from_a_size(images, said, mean, call) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    backbone = Backbone(net, mean=mean, std=mean)
    backbone.checks_images = True
    if mean is not None and images is not None and getattr(images, "shape", [0])[1:2] == (1,):
        images = images.expand(4, 2, 16, 16)  # a single channel would take three constants
        said = said.replace("4, 1", "4, 2")
    with pytest.raises(UserError, match=said) as error:
        call(backbone, images)
    assert "scenario" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ([0.5] * 3, None, "mean is given and std is not"),
        (None, [0.5] * 3, "std is given and mean is not"),
        ([123.7, 116.3, 103.5], [58.0, 57.0, 57.0], "divided by 255"),
        ([0.5] * 2, [0.5] * 2, "mean must be three numbers"),
        ([0.5] * 3, [0.2, 0.2, 0.0], "std divides the images"),
    ],
)
def test_constants_that_no_images_have_are_refused(mean, std, said) -> None:
    with pytest.raises(UserError, match=said):
        driftline.make("source", Net(lambda s: s), mean=mean, std=std)


@pytest.mark.parametrize("net", [Net, "resnet18", None], ids=["class", "name", "none"])
def test_what_is_no_network_is_refused(net: Any) -> None:
    with pytest.raises(UserError, match="must be a torch.nn.Module, an object"):
        driftline.make("source", net)


def test_learning_in_inference_mode_says_why_it_cannot() -> None:
    tent: Any = driftline.make("tent", Net(lambda s: s), layers="norm")
    lame: Any = driftline.make("lame", Net(lambda s: s))
    with torch.inference_mode():
        assert tent.predict(IMAGES).shape == lame.adapt(IMAGES).shape
        with pytest.raises(UserError, match="call adapt outside of it"):
            tent.adapt(IMAGES)
    with torch.no_grad():
        assert tent.adapt(IMAGES).shape == (4, 5)


class Configured(Net):
    """Says its size as networks of transformers do."""

    def __init__(self, image_size: Any) -> None:
        super().__init__(lambda s: s)
        self.config = SimpleNamespace(image_size=image_size)


SIZED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "timm, transformer": (lambda: timm.create_model("test_vit", img_size=64, num_classes=2), 64),
    "timm, weights": (lambda: timm.create_model("test_resnet", num_classes=2), 160),
    "torchvision, transformer": (
        lambda: VisionTransformer(32, 16, 1, 2, 8, 8, num_classes=2),
        32,
    ),
    "torchvision, Inception": (
        lambda: torchvision.models.inception_v3(weights=None, num_classes=2, init_weights=False),
        299,
    ),
    "transformers": (lambda: Configured(48), 48),
    "transformers, two": (lambda: Configured([48, 48]), 48),
    "transformers, none": (lambda: Configured(None), 224),
    "own": (lambda: Net(lambda s: s), 224),
}


@pytest.mark.parametrize("kind", SIZED)
def test_the_size_that_a_network_says_of_itself_is_taken(kind: str) -> None:
    net, size = SIZED[kind][0](), SIZED[kind][1]
    method: Any = driftline.make("source", net)
    assert method.backbone.input_size == size
    with pytest.raises(UserError, match=f"Its input_size is {size}: give it images of that size"):
        method.backbone.net.forward = unhappy
        method.predict(torch.rand(2, 3, 20, 20))
    assert driftline.make("source", net, input_size=20).backbone.input_size == 20


def unhappy(x: Tensor) -> Tensor:
    raise RuntimeError("the size does not match")


def test_a_size_that_is_given_reaches_prompts_and_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="input_size= of driftline.make"):
        driftline.make("vdp", Net(lambda s: s)).adapt(IMAGES)
    method = driftline.make("vdp", Net(lambda s: s), input_size=16)
    before = deepcopy(method.backbone.net)
    scores = method.adapt(IMAGES)
    driftline.save(method, tmp_path / "one.safetensors")
    loaded = driftline.load(tmp_path / "one.safetensors", before)
    assert scores.shape == (4, 5) and loaded.adapt(IMAGES).equal(method.adapt(IMAGES))
    for wrong in (0, -1, 16.0, "16"):
        with pytest.raises(UserError, match="input_size must be a number of pixels above 0"):
            driftline.make("source", Net(lambda s: s), input_size=wrong)


def test_other_faults_stay_what_they_are() -> None:
    net = Net(lambda s: s)
    net.fc = nn.Linear(4, 5)
    with pytest.raises(RuntimeError, match="shapes"):
        Backbone(net, input_size=16).logits(IMAGES)
