"""Methods of normalisation statistics against recorded runs, and what is special about them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from golden_case import Case, both, names, optim, record, weights
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.parts.norms import replace_batch_norms
from driftline.tta.source import Source
from driftline.tta.tent import Tent
from driftline.tta.unmix_tns import UnMixTNS


class Recorded(UnMixTNS):
    """UnMix-TNS with the recorded noise in place of random numbers."""

    case: Case

    def noise(self, name: str, shape: tuple[int, int], numbers: torch.Generator) -> Tensor:
        if shape[0] == 1:
            return torch.full(shape, 1e9)  # one component takes none
        noise = torch.from_numpy(self.case.data[f"noise/{name}"])
        assert noise.shape == shape
        return noise


def unmixed(kind: type[UnMixTNS], backbone: Backbone, inner: Any, **options: Any) -> UnMixTNS:
    plain = {"alpha": 0.5, "temperature": 0.07, "batch_size": None, "largest_batch": 16}
    return kind(backbone, seed=0, num_classes=10, inner=inner, **plain | options)


@both
@pytest.mark.parametrize("name", names("unmixtns_*"))
def test_unmix_tns(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    net = case.net()
    inner: Any = Source
    if "tent" in name:
        inner = partial(
            Tent, adapter=None, layers="bn", mode="eval", steps=1, optim=optim(case.hyper)
        )
    method = unmixed(
        type("OfThisCase", (Recorded,), {"case": case}),
        Backbone(net),
        inner,
        components=case.hyper["K"],
        temperature=case.hyper["temperature"],
        batch_size=case.hyper["batch_size"],
        largest_batch=case.hyper["batch_size_max"],
    )
    inside = method.inner
    losses: list[float] = []
    if isinstance(inside, Tent):
        loss = inside.loss
        inside.loss = lambda z: losses.append(loss(z).item()) or loss(z)  # type: ignore
    results: dict[str, Any] = record(method, case) | {"loss": losses}
    results |= {f"buffer/{k}": v.numpy() for k, v in net.named_buffers()}
    results |= {k.replace(".variances", ".vars"): v for k, v in results.items()}
    start, layer = case.net(), method.backbone.net.conv1[1]
    rate = case.info["hyperparameters"]["momentum_effective"]
    assert layer.rate(3) == pytest.approx(rate, rel=1e-9)
    case.check_all(results | weights("p", net, start, case))


def test_a_single_component_is_instance_normalisation() -> None:
    """All of an image is like the only component, whatever that is."""
    layer = nn.BatchNorm2d(5)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    net = nn.Sequential(nn.Conv2d(3, 5, 1), layer, nn.Flatten(), nn.Linear(5 * 36, 10))
    x = torch.rand(4, 3, 6, 6)
    expected = nn.functional.instance_norm(net[0](x), weight=layer.weight, bias=layer.bias)
    method = unmixed(UnMixTNS, Backbone(net), Source, components=1)
    torch.testing.assert_close(method.adapt(x), net[3](net[2](expected)))


def test_components_move_in_the_stream_alone_and_by_the_size_of_the_batch() -> None:
    net = timm.create_model("test_resnet", num_classes=10)
    method = unmixed(UnMixTNS, Backbone(net), Source, components=4)
    x = torch.rand(6, 3, 64, 64)
    start = net.bn1.means.clone()
    method.predict(x)
    assert torch.equal(net.bn1.means, start)
    assert net.bn1.rate(16) == pytest.approx(0.1) and net.bn1.rate(4) == pytest.approx(
        1 - 0.9**0.25
    )
    method.begin_stream()
    method.adapt(x)
    assert not torch.equal(net.bn1.means, start)
    method.reset()
    assert torch.equal(net.bn1.means, start)


def test_what_unmix_tns_cannot_go_under_is_refused() -> None:
    vit = Backbone(timm.create_model("test_vit", num_classes=10, img_size=32), tag="test_vit")
    with pytest.raises(UserError, match="test_vit has none"):
        unmixed(UnMixTNS, vit, Source, components=2)
    bare = Backbone(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), tag="bare")
    with pytest.raises(UserError, match="the layer 0 of bare lacks one"):
        unmixed(UnMixTNS, bare, Source, components=2)


def test_a_layer_in_place_of_a_fused_one_keeps_its_activation() -> None:
    """A copy of each layer without its activation computes what the network did."""

    class Plain(nn.Module):
        def __init__(self, layer: nn.BatchNorm2d) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            held = self.layer
            return nn.functional.batch_norm(
                x, held.running_mean, held.running_var, held.weight, held.bias, eps=held.eps
            )

    net = timm.create_model("test_efficientnet", num_classes=10).eval()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.normal_(layer.bias)
    x = torch.rand(3, 3, 64, 64)
    before = net(x)
    fused = [n for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)]
    new = replace_batch_norms(net, lambda name, layer: Plain(layer))
    assert list(new) == fused
    torch.testing.assert_close(net(x), before)
    assert not list(replace_batch_norms(nn.Sequential(nn.LayerNorm(3)), lambda n, m: m))
