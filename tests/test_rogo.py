"""ROGO: directions, projected steps and the scale against a few lines of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import copied, strategy_node
from golden_cl_case import ClCase, images
from golden_cl_case import backbone as recorded_backbone
from test_contract import network

from driftline.backbones.backbone import Backbone
from driftline.cl.rogo import ROGO, Directions
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.stream import Batch, Task

SIZES = [4, 3, 3]


def make(net: Backbone | None = None, **options: object) -> ROGO:
    quick = {"epochs": 2, "images": 8, "open_at": [1], "share": 0.5, "closeness": 0.2} | options
    node = strategy_node("rogo", **quick)
    net = net or recorded_backbone()
    return build(node, at="strategy", backbone=net, seed=3, num_classes=10)


def task(index: int, rows: list[int]) -> Task:
    """Of the recorded stream with one batch."""
    batches = [images("train", rows)] if rows else []
    return replace(ClCase("replay/er_run").task(index, SIZES), train=lambda *_: iter(batches))


def second_task(strategy: ROGO) -> Batch:
    """The first task is over, directions are open in the second."""
    first, second = task(0, [0, 13, 25, 40, 1, 14]), task(1, [51, 63, 74, 52])
    strategy.begin_task(first)
    strategy.begin_epoch(first, 0)
    strategy.observe(images("train", [0, 13, 25, 40]))
    strategy.end_task(first)
    strategy.begin_task(second)
    strategy.begin_epoch(second, 0)
    strategy.begin_epoch(second, 1)
    return images("train", [50, 62, 75])


def test_all_used_directions_close_to_the_gradient_are_opened_and_no_others():
    g = torch.Generator().manual_seed(0)
    held = Directions(20)
    held.used.basis = torch.linalg.qr(torch.randn(20, 9, generator=g)).Q
    for times in range(2):
        gradient = torch.randn(20, 5, generator=g) @ torch.diag(torch.tensor([5.0, 4, 3, 2, 0.1]))
        before = held.opened
        held.open(gradient, 0.99, 0.7)
        new = held.opened[:, before.shape[1] :]
        assert torch.equal(held.opened[:, : before.shape[1]], before) and new.shape[1]
        assert torch.allclose(
            held.opened.T @ held.opened, torch.eye(held.opened.shape[1]), atol=1e-5
        )
        basis = held.used.basis
        assert torch.allclose(basis @ (basis.T @ new), new, atol=1e-5)
        u = torch.linalg.svd(gradient).U[:, :4]  # hold more than 99 %
        lengths = (u.T @ new).norm(dim=0)
        assert (lengths >= 0.7 - 1e-5).all()
        closed = basis @ basis.T - held.opened @ held.opened.T  # what is used and not open
        assert torch.linalg.svd(u.T @ closed).S[0] < 0.7 + 1e-5, times
    assert torch.equal(held.scale, torch.eye(held.opened.shape[1]))


def test_a_step_moves_weights_in_free_directions_and_the_scale():
    strategy = make()
    batch = second_task(strategy)
    layers = list(strategy.parts())
    assert any(len(held.scale) for _, _, held in layers)
    with torch.no_grad():
        for _, _, held in layers:
            held.scale += 0.1 * torch.randn(held.scale.shape)
    before, scales = (
        copied(strategy.state_dict()),
        {n: h.scale.detach().clone() for n, _, h in layers},
    )
    effective = {
        n: layer.weight.detach() @ (torch.eye(layer.in_features) + h.opened @ h.change @ h.opened.T)
        for n, layer, h in layers
    }
    twin = recorded_backbone()  # of the effective weights, which autograd reads
    twin.load_state_dict({k[9:]: v for k, v in before.items() if k.startswith("backbone.")})
    for name in effective:
        twin.net.get_submodule(name).weight.data = effective[name].detach().clone()
    head = before["head.weight"], before["head.bias"]
    loss = F.cross_entropy(F.linear(twin.features(batch.x), *head)[:, 4:7], batch.y - 4)
    loss.backward()
    penalty = sum(((s - torch.eye(len(s))) ** 2).sum() for s in scales.values())
    rates = {group["lr"] for group in strategy.optimizer.param_groups}
    assert len(rates) == 1
    got = strategy.observe(batch)["loss"]
    torch.testing.assert_close(got, (loss + penalty).detach())
    for name, layer, held in layers:
        gradient, lr = twin.net.get_submodule(name).weight.grad, next(iter(rates))
        basis, opened, scale = held.used.basis, held.opened, scales[name]
        weight = before[f"backbone.net.{name}.weight"]
        bent = torch.eye(len(opened)) + opened @ (scale - torch.eye(len(scale))) @ opened.T
        own = gradient @ bent.T
        want = weight - lr * (own - own @ basis @ basis.T)
        torch.testing.assert_close(layer.weight.detach(), want, rtol=1e-4, atol=1e-6)
        of_scale = opened.T @ weight.T @ gradient @ opened + 2 * (scale - torch.eye(len(scale)))
        torch.testing.assert_close(held.scale.detach(), scale - lr * of_scale, rtol=1e-4, atol=1e-6)
    moved = {
        n
        for n, p in strategy.backbone.named_parameters()
        if not torch.equal(p, before[f"backbone.{n}"])
    }
    assert moved == {f"net.{n}.weight" for n in strategy.layers}
    scores = strategy.predict(batch.x)
    strategy.end_task(task(1, []))
    torch.testing.assert_close(strategy.predict(batch.x), scores, rtol=1e-4, atol=1e-5)
    assert not any(len(held.scale) for _, _, held in layers)


def test_adam_and_weight_decay_stay_in_the_free_directions():
    strategy = make(optim={"kind": "adamw", "weight_decay": 0.1})
    batch = second_task(strategy)
    before = {name: layer.weight.detach().clone() for name, layer, _ in strategy.parts()}
    strategy.observe(batch)
    for name, layer, held in strategy.parts():
        moved = layer.weight.detach() - before[name]
        assert moved.norm() > 0 and (moved @ held.used.basis).norm() < 1e-4 * moved.norm()


def test_a_layer_without_free_directions_and_a_network_without_layers_are_refused():
    strategy = make()
    strategy.begin_task(task(0, []))
    name, layer, held = list(strategy.parts())[1]
    held.used.basis = torch.eye(layer.in_features)
    with pytest.raises(UserError, match=rf"task 1 .*directions of {name} \(1 such"):
        strategy.begin_task(task(1, []))
    with pytest.raises(UserError, match="linear layers"):
        make(network("resnet"))


def test_directions_that_are_never_opened_are_said():
    with pytest.warns(UserWarning, match=r"open_at=\[10, 15\] is after the last.*epochs=5"):
        assert not make(epochs=5, open_at=[10, 15]).open_at
