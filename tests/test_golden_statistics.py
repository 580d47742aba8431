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
from driftline.parts.norms import replace_batch_norms, use_batch_statistics
from driftline.tta.note import NOTE
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


class RecordedNOTE(NOTE):
    """NOTE with the recorded draws; notes what is in the memory at each update."""

    case: Case
    stream: Tensor  # of the case, image by image
    held: list[list[int]]

    def draw(self, what: str) -> float:
        image = sum(self.seen) - 1
        return float(self.case.data["memory_draws"][image, ("class", "place", "stay").index(what)])

    def _update(self) -> None:
        images = self.memory.images(self.memory.by_class() if self.balanced else None)
        self.held.append([int((self.stream == x).all((1, 2, 3)).nonzero()) for x in images])
        super()._update()


def note(case: Case, net: nn.Module) -> RecordedNOTE:
    hyper = case.hyper
    method = RecordedNOTE(
        Backbone(net),
        seed=0,
        optim=optim(hyper),
        k=hyper["k"],
        statistics="running" if hyper["use_learned_stats"] else "batch",
        momentum=hyper["bn_momentum"],
        memory=hyper["memory_type"].lower(),
        capacity=hyper["memory_size"],
        every=hyper["update_every_x"],
        epochs=hyper["epoch"],
        temperature=hyper["temperature"],
        mean_over="classes",
    )
    method.case, method.held = case, []
    case.info["batches"], case.info["batch_size"] = 5, 16
    method.stream = torch.cat(case.batches())
    return method


@both
@pytest.mark.parametrize("name", names("note_*"))
def test_note(name: str, dtype: torch.dtype) -> None:
    """In batches of 16, which updates every 10 images cut across."""
    case = Case(name, dtype)
    net = case.net()
    method = note(case, net)
    results: dict[str, Any] = record(method, case) | {"memory_samples": method.held}
    held = case.data["memory_samples"]
    assert [row + [-1] * (held.shape[1] - len(row)) for row in method.held] == held.tolist()
    moved = {k: v.numpy() for k, v in net.named_buffers() if v is not None}
    results |= {f"buffer/{k.replace('running_', '')}": v for k, v in moved.items()}
    results |= weights("p", net, case.net(), case)
    case.check_all(results)


def test_note_forwards_every_image_once_and_as_well_alone() -> None:
    case = Case("note_resnet_official", torch.float64)
    one, other = note(case, case.net()), note(case, case.net())
    together = torch.cat([one.adapt(x) for x in case.batches()])
    alone = torch.cat([other.adapt(x[None]) for x in other.stream])
    torch.testing.assert_close(alone, together)
    assert one.held == other.held
    passes = one.backbone.passes
    assert (passes.forward, passes.backward) == (80 + 5 * 16, 5 * 16)


def test_the_loss_of_note_is_a_mean_over_images_and_classes_unless_told_otherwise() -> None:
    case = Case("note_resnet_official")
    method, logits = note(case, case.net()), torch.randn(6, 10)
    p = logits.softmax(1)
    total = -(p * (p + 1e-6).log()).sum()
    torch.testing.assert_close(method.loss(logits), total / 60)
    method.mean_over = "images"
    torch.testing.assert_close(method.loss(logits), total / 6)


def test_note_needs_running_statistics_unless_it_takes_those_of_the_batch() -> None:
    case = Case("note_resnet_official")
    net = case.net()
    use_batch_statistics(net)
    with pytest.raises(UserError, match="set strategy.statistics=batch"):
        note(case, net)
    case.hyper |= {"use_learned_stats": False, "update_every_x": 1, "memory_type": "FIFO"}
    method = note(case, case.net())
    with pytest.raises(UserError, match="two values per channel"):
        method.adapt(torch.rand(1, 3, 32, 32))  # its last maps have one pixel
