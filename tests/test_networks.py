"""Networks as people have them: what they return in training, and sizes that do not fit."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn

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
        assert text.startswith("fixed takes images of 16 x 16 pixels, and these are 32 x 32 (Input")
        assert "scenario.resize=16" in text and "backbone.input_size=32" in text


def test_other_faults_stay_what_they_are() -> None:
    net = Net(lambda s: s)
    net.fc = nn.Linear(4, 5)
    with pytest.raises(RuntimeError, match="shapes"):
        Backbone(net, input_size=16).logits(IMAGES)
