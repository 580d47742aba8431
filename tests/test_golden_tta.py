"""Methods against numbers recorded from the reference implementations (`tests/golden/README.md`).

Float32 results must lie within the recorded tolerance. Where the reference also ran in float64,
ours does too, and the two must agree to 1e-7.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from golden_case import Case, both, names, names_in, optim, record, weights
from torch import Tensor, nn
from torchvision import transforms

from driftline.backbones.backbone import Backbone
from driftline.core.strategy import TTAStrategy
from driftline.parts import views
from driftline.parts.norms import collect_parameters, use_batch_statistics
from driftline.parts.rules.episodic import Episodic
from driftline.tta.bn_adapt import BNAdapt
from driftline.tta.cotta import CoTTA
from driftline.tta.tent import Tent


@both
@pytest.mark.parametrize("name", names("00_model_check*"))
def test_model(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    backbone, results = Backbone(case.net()), {}
    with torch.no_grad():
        results["logits"] = np.stack([backbone(x).numpy() for x in case.batches()])
        results["features"] = np.stack([backbone.features(x).numpy() for x in case.batches()])
        fresh = Backbone(case.net())
        use_batch_statistics(fresh.net)
        results["logits_trainmode"] = np.stack([fresh(x).numpy() for x in case.batches()])
    results["p_l2"] = [p.double().norm().item() for p in backbone.net.parameters()]
    assert np.array_equal(results["logits"].argmax(-1), case.data["argmax"])
    case.check_all(results)


@both
@pytest.mark.parametrize("name", names("norm_*"))
def test_bn_adapt(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    statistics = "mixed" if "alpha" in name else "ema" if "ema" in name else "batch"
    net = case.net()
    # The reference keeps statistics that it never reads: recompute them from the layers' inputs.
    buffers: dict[str, Any] = {}
    for layer in {k.split("/")[1].rpartition(".")[0] for k in case.data if k.startswith("buffer")}:
        module = net.get_submodule(layer)
        buffers[f"buffer/{layer}.running_mean"] = module.running_mean.clone()
        buffers[f"buffer/{layer}.running_var"] = module.running_var.clone()

        def follow(_: nn.Module, inputs: tuple[Tensor, ...], layer: str = layer) -> None:
            var, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
            buffers[f"buffer/{layer}.last_batch_mean"] = mean
            buffers[f"buffer/{layer}.last_batch_var_unbiased"] = var
            for key, new in (("running_mean", mean), ("running_var", var)):
                old = buffers[f"buffer/{layer}.{key}"]
                buffers[f"buffer/{layer}.{key}"] = 0.9 * old + 0.1 * new

        module.register_forward_pre_hook(follow)
    method = BNAdapt(
        Backbone(net),
        statistics=statistics,
        alpha=case.hyper.get("alpha", 0.1),
        momentum=case.hyper.get("momentum", 0.1),
        official_eps="eps" in case.hyper,
    )
    results: dict[str, Any] = record(method, case)
    state = net.state_dict() if statistics == "ema" else {}
    case.check_all(buffers | {f"buffer/{k}": v for k, v in state.items()} | results)


@both
@pytest.mark.parametrize("name", names("tent_*"))
def test_tent(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    net = case.net()
    layers = "name" if "byname" in name else "norm" if "_ln_" in name else "bn"
    method: TTAStrategy = Tent(
        Backbone(net),
        seed=0,
        adapter=None,
        layers=layers,
        mode="eval" if case.info["mode"].startswith("model.eval") else "train",
        steps=case.hyper["steps"],
        optim=optim(case.hyper),
    )
    if case.hyper.get("episodic"):
        method = Episodic(inner=method)
    adapted = [n for n, p in net.named_parameters() if p.requires_grad]
    assert set(adapted) == set(names_in(case.info["adapted_parameters"]))
    results: dict[str, Any] = record(method, case)
    case.check_all(results | weights("p", net, case.net(), case))


class Recorded(CoTTA):
    """CoTTA with the recorded views and masks in place of random ones."""

    case: Case
    turn = -1  # batch
    view = 0  # of the batch
    masks = 0  # restore masks used so far
    confidence: list[float]

    def adapt(self, x: Tensor) -> Tensor:
        self.turn, self.view = self.turn + 1, 0
        return super().adapt(x)

    def draw(self, x: Tensor) -> views.Draws:
        raise AssertionError("a recorded run draws nothing")

    def augment(self, x: Tensor) -> Tensor:
        data, i = self.case.data, self.view
        self.view += 1
        if "views" in data:
            image = data["views"][self.turn, i].astype(np.float32) / np.float32(255)
            return torch.from_numpy(image).to(x)
        if "view_scale" in data:
            return self.case.view(x, i)
        assert "identity" in self.case.info["random_draws"]["augmentation"]
        return x

    def restore_mask(self, parameter: Tensor) -> Tensor:
        data, j = self.case.data, self.masks
        self.masks += 1
        mask = torch.zeros(parameter.numel(), dtype=torch.bool)
        if "mask_index" in data:
            first, last = data["mask_offset"][j : j + 2]
            mask[torch.from_numpy(data["mask_index"][first:last]).long()] = True
        elif self.case.hyper["rst"] == 1:
            mask.fill_(True)
        return mask.view_as(parameter)


LONG = {f"cotta_cifar_resnet_{kind}" for kind in ("views_official", "views_loud", "switch")}
LONGER = (pytest.mark.release, pytest.mark.slow)  # 32 views; others draw views, too, and switch
COTTA = [
    pytest.param(name, marks=LONGER if name in LONG else ())
    for name in names("cotta_*")
    if name != "cotta_transform"
]


@both
@pytest.mark.parametrize("name", COTTA)
def test_cotta(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    net = case.net()
    method = Recorded(
        Backbone(net),
        seed=0,
        loss="sce" if case.hyper["loss"].startswith("symmetric") else "ce",
        threshold=case.hyper["ap"],
        gate="batch",
        views=2 if "identityaug" in name else case.hyper["n_aug"],  # equal views: two are enough
        average="logits",
        always_draw=False,
        restore_prob=case.hyper["rst"],
        ema=case.hyper["mt"],
        steps=case.hyper["steps"],
        mode="eval" if "eval mode" in case.info["mode"] else "train",
        rng="reference",
        view_chunk=1,
        optim=optim(case.hyper),
    )
    method.case, method.confidence = case, []
    visited = list(collect_parameters(net))
    assert visited == names_in(case.info["visit_order"])
    if "multiplied by 2.0" in case.info.get("teacher_init", ""):
        head = method.teacher.head
        head.weight.data.mul_(2.0)
    student: list[Any] = []
    method.backbone.register_forward_hook(lambda *a: student.append(a[2].detach().numpy()))
    method.anchor.net.register_forward_hook(
        lambda *a: method.confidence.append(a[2].softmax(1).amax(1).mean().item())
    )
    results: dict[str, Any] = record(method, case)
    results |= {"student_logits": student, "anchor_confidence": method.confidence}
    results |= weights("student", method.backbone.net, case.net(), case)
    results |= weights("teacher", method.teacher.net, case.net(), case)
    case.check_all(results)
    used = [c < case.hyper["ap"] for c in method.confidence]
    assert used == case.info["augmentation_branch_per_batch"]
    assert method.masks == len(visited) * len(case.batches())


def test_transform() -> None:
    case = Case("cotta_transform")
    x = torch.from_numpy(case.data["x"].astype(np.float32) / np.float32(255))
    for i, calls in enumerate(case.info["calls_recorded"]):
        given = dict(calls)
        angle, shift, scale, shear = given["affine"]
        assert shear == [0.0, 0.0]
        draws = views.Draws(
            colour=[(k[7:], v[0]) for k, v in calls if k.startswith("adjust_")],
            angle=angle,
            shift=tuple(shift),
            scale=scale,
            sigma=given["gaussian_blur"][1][0],
            flip="hflip" in given,
            noise=torch.from_numpy(case.data[f"noise{i}"]),
        )
        case.check(f"out{i}", views.apply(x, draws))


def test_draw_follows_the_order_of_the_reference() -> None:
    """Compare with torchvision's own transforms on the global generator."""
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ranges = {name: [low, high] for name, low, high in views.COLOUR}
    for seed in range(20):
        ours = views.draw(torch.Generator().manual_seed(seed), x.shape)
        torch.manual_seed(seed)
        for i, (name, factor) in zip(torch.randperm(5).tolist(), ours.colour, strict=True):
            assert name == list(ranges)[i]
            assert factor == torch.tensor(1.0).uniform_(*ranges[name]).item()
        affine = transforms.RandomAffine.get_params(
            [-15.0, 15.0], [1 / 16, 1 / 16], [0.9, 1.1], None, [64, 64]
        )
        assert affine == (ours.angle, ours.shift, ours.scale, (0.0, 0.0))
        assert transforms.GaussianBlur.get_params(0.001, 0.5) == ours.sigma
        assert bool(torch.rand(1) < 0.5) == ours.flip
        assert torch.equal(torch.randn(x.shape), ours.noise)
