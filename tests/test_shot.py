"""SHOT's losses against the formulas of the codes, in NumPy; no run of any is recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import strategy_node
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.tta.shot import SHOT, prototype_labels


def make(name: str = "test_resnet", **options: Any) -> SHOT:
    torch.manual_seed(3)
    extra = {"img_size": 64} if name == "test_vit" else {}
    net = timm.create_model(name, num_classes=10, **extra)
    nn.init.normal_(net.get_classifier().weight, std=0.3)
    node = strategy_node("shot", **options)
    return build(node, at="strategy", backbone=Backbone(net, tag=name), seed=0, num_classes=10)


def batch(seed: int = 0, images: int = 8) -> Tensor:
    return torch.rand(images, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def information(p: np.ndarray, diversity: float = 1.0) -> float:
    """Entropy of a prediction less that of the mean one, with the offset of the codes."""
    mean = p.mean(0)
    single = -(p * np.log(p + 1e-5)).sum(1).mean()
    return float(single - diversity * -(mean * np.log(mean + 1e-5)).sum())


def labels_of_the_paper(z: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Class by class and image by image, with the cosine distance."""
    z = np.concatenate([z, np.ones((len(z), 1))], 1)
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    weights, labels = p, p.argmax(1)
    for _ in range(2):
        present = sorted(set(labels))
        means = [sum(w[k] * row for w, row in zip(weights, z, strict=True)) for k in present]
        means = [m / np.linalg.norm(m) for m in means]
        labels = np.array([present[int(np.argmin([1 - m @ row for m in means]))] for row in z])
        weights = np.eye(p.shape[1])[labels]
    return labels


def test_the_loss_is_that_of_the_codes() -> None:
    g = torch.Generator().manual_seed(1)
    z = torch.randn(40, 6, generator=g, dtype=torch.float64)
    logits = 2 * torch.randn(40, 5, generator=g, dtype=torch.float64)
    logits[:, 3] -= 50  # a class that no image is given
    p, z_np = logits.softmax(1).numpy(), z.numpy().copy()
    assert abs(make().loss(z, logits).item() - information(p)) < 1e-12
    assert abs(make(diversity=0.5).loss(z, logits).item() - information(p, 0.5)) < 1e-12
    want = labels_of_the_paper(z_np, p)
    assert (want != p.argmax(1)).any() and 3 not in want
    assert np.array_equal(prototype_labels(z, logits.softmax(1)).numpy(), want)
    own = -np.log(p[np.arange(40), want]).mean()
    loss = make(pseudo=0.3).loss(z, logits).item()
    assert abs(loss - information(p) - 0.3 * own) < 1e-12
    sure = p.max(1) > 0.9
    assert 0 < sure.sum() < 40
    loss = make(pseudo=0.3, labels="confidence").loss(z, logits).item()
    assert abs(loss - information(p) - 0.3 * -np.log(p.max(1)[sure]).mean()) < 1e-12
    nobody = make(pseudo=0.3, labels="confidence", threshold=1.0).loss(z, logits).item()
    assert abs(nobody - information(p)) < 1e-12


def test_the_benchmark_s_step_on_the_first_batch() -> None:
    """Scores from before the step; scales and shifts move by its rate along the gradient."""
    method, other, x = make(), make(), batch()
    weight = "bn1.weight"
    before = method.backbone.net.get_parameter(weight).clone()
    logits = other.backbone(x)
    p = logits.softmax(1)
    loss = -(p * (p + 1e-5).log()).sum(1).mean() + (p.mean(0) * (p.mean(0) + 1e-5).log()).sum()
    gradient = torch.autograd.grad(loss, other.backbone.net.get_parameter(weight))[0]
    torch.testing.assert_close(method.adapt(x), logits.detach())
    moved = method.backbone.net.get_parameter(weight) - before
    assert moved.abs().max() > 1e-5
    torch.testing.assert_close(moved, -0.01 * gradient, rtol=1e-3, atol=1e-7)
    assert (method.backbone.passes.forward, method.backbone.passes.backward) == (8, 8)


def test_the_classifier_stays_and_the_rest_learns() -> None:
    method = make("test_vit", layers="extractor", pseudo=0.1)
    start = {n: p.detach().clone() for n, p in method.backbone.net.named_parameters()}
    method.adapt(batch())
    stays = {n for n, p in method.backbone.net.named_parameters() if torch.equal(p, start[n])}
    assert {"head.weight", "head.bias"} <= stays and "cls_token" not in stays
    assert not any("qkv.weight" in n for n in stays)
    with pytest.raises(UserError, match="no BatchNorm2d; set strategy.layers=norm"):
        make("test_vit")


def test_statistics_of_the_source_stay() -> None:
    method = make(layers="extractor", batch_statistics=False)
    layer = method.backbone.net.bn1
    mean = layer.running_mean.clone()
    method.adapt(batch())
    assert torch.equal(layer.running_mean, mean) and method.backbone.training
    x = batch(1)
    single = torch.cat([method.predict(one[None]) for one in x])
    torch.testing.assert_close(single, method.predict(x))


def test_one_image_has_no_information() -> None:
    method, x = make(), batch(images=1)
    start = [p.clone() for p in method.backbone.parameters()]
    assert method.adapt(x).isfinite().all()
    for p, before in zip(method.backbone.parameters(), start, strict=True):
        torch.testing.assert_close(p, before, rtol=0, atol=1e-6)
