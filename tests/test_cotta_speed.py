"""CoTTA's exact speed-ups: against the plain transcription of the benchmark, and each by itself."""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from conftest import ROOT, strategy_node
from torch import nn

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.parts.norms import batch_norms, use_batch_statistics, view_statistics


def network(kind: str = "test_resnet") -> Backbone:
    torch.manual_seed(0)
    extra = {"img_size": 32} if "vit" in kind else {}
    net = timm.create_model(kind, num_classes=10, **extra)
    nn.init.normal_(net.get_classifier().weight, std=0.3)
    return Backbone(net)


def make(net: Backbone, **options: Any) -> Any:
    return build(strategy_node("cotta", **options), at="strategy", backbone=net, seed=0)


def images(count: int = 2, side: int = 64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.rand(6, 3, side, side, generator=g) for _ in range(count)]


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("bench_tta", ROOT / "benchmarks" / "bench_tta.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("threshold", "views"), [(2.0, 3), (0.0, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_the_plain_transcription(bench, threshold, views, layout):
    """Scores, weights and the random numbers used, over two updates with restoration."""
    start = network().double()
    ours = make(
        deepcopy(start).to(memory_format=layout), threshold=threshold, views=views, view_chunk=2
    )
    plain = bench.PlainCoTTA(start, bench.same_random(ours), views, threshold)
    for x in images():
        x = x.double()
        torch.testing.assert_close(ours.adapt(x), plain.adapt(x).detach(), rtol=0, atol=2e-5)
    for mine, theirs in ((ours.backbone, plain.student), (ours.teacher, plain.teacher)):
        for name, value in mine.state_dict().items():
            torch.testing.assert_close(value, theirs.state_dict()[name], rtol=0, atol=2e-5)
    assert torch.equal(ours.rng("method").get_state(), plain.rng.get_state())
    moved = ours.backbone.net.conv1[0].weight - ours.anchor.net.conv1[0].weight
    assert moved.abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["test_resnet", "test_efficientnet", "test_vit"])
def test_views_in_one_forward_keep_their_own_statistics(kind):
    net = network(kind).net
    side = 32 if "vit" in kind else 64
    use_batch_statistics(net)
    (x,) = images(1, side)
    views = [x, x.flip(3) * 0.5, x**2]
    joined = torch.cat(views)
    with torch.no_grad():
        apart = torch.cat([net(v) for v in views])
        with view_statistics(net, 3):
            together = net(joined)
        mixed = net(joined)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    assert torch.allclose(mixed, apart, atol=1e-3) == ("vit" in kind)
    assert all("forward" not in vars(layer) for layer in net.modules())


def test_view_statistics_of_layers_with_running_statistics():
    """In training mode they are updated view after view; in evaluation mode nothing changes."""
    one, other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    g = torch.Generator().manual_seed(1)
    x = torch.rand(6, 4, 3, 3, generator=g)
    with view_statistics(nn.Sequential(one), 2):
        joined = one(x)
    torch.testing.assert_close(joined, torch.cat([other(part) for part in x.chunk(2)]))
    torch.testing.assert_close(one.running_var, other.running_var)
    with view_statistics(one.eval(), 2):
        assert "forward" not in vars(one)
        torch.testing.assert_close(one(x), other.eval()(x))


def test_view_statistics_end_after_an_error_and_refuse_single_values():
    net = nn.Sequential(nn.BatchNorm2d(4))
    use_batch_statistics(net)
    with pytest.raises(UserError, match="two values per channel"), view_statistics(net, 2):
        net(torch.rand(2, 4, 1, 1))
    assert "forward" not in vars(batch_norms(net)["0"])


@pytest.mark.parametrize("gate", ["batch", "sample"])
def test_the_size_of_a_chunk_changes_nothing(gate):
    """Four views as 1+1+1+1, 3+1 and 4: the same views in the same order."""
    (x,) = images(1)
    results, ends = [], []
    for chunk in (1, 3, 9):
        method = make(network(), threshold=2.0, views=4, view_chunk=chunk, gate=gate)
        results.append(method.adapt(x))
        ends.append(method.rng("method").get_state())
    for result, end in zip(results[1:], ends[1:], strict=True):
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-4)
        assert torch.equal(end, ends[0])
    with pytest.raises(UserError, match="strategy.view_chunk must be a whole number, at least 1"):
        make(network(), view_chunk=0)


def test_channels_last_survives_copies_updates_and_reset():
    method = make(network().to(memory_format=torch.channels_last), threshold=2.0, views=2)
    plain = make(network(), threshold=2.0, views=2)
    for x in images():
        ahead = method.adapt(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(ahead, plain.adapt(x), rtol=0, atol=5e-3)
    method.reset()
    moments = [s["momentum_buffer"] for s in method.optimizer.state.values()]
    networks = (method.backbone, method.teacher, method.anchor)
    weights = [p for n in networks for p in n.parameters()]
    for tensor in (*weights, *moments):
        if tensor.ndim == 4:
            assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_no_graph_but_the_students_and_no_clean_pass_beside_views():
    method, (x,) = make(network(), threshold=2.0, views=2), images(1)
    graphs: dict[str, list[bool]] = {"backbone": [], "teacher": [], "anchor": []}
    for name, seen in graphs.items():
        getattr(method, name).net.register_forward_hook(
            lambda module, inputs, out, seen=seen: seen.append(out.requires_grad)
        )
    method.adapt(x)
    assert graphs == {"backbone": [True], "teacher": [False, False], "anchor": [False]}
