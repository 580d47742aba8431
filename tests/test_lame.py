"""LAME: recorded numbers, degenerate batches, and that it leaves no trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from golden_case import Case, both
from omegaconf import OmegaConf
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.tta import lame
from driftline.tta.lame import LAME, affinity_matrix, distances, laplacian_assignments


def backbone(kind: str = "resnet", **options: Any) -> Backbone:
    """Random weights with a confident head; 32 px."""
    torch.manual_seed(3)
    extra = {"img_size": 32} if kind == "vit" else {}
    net = timm.create_model(f"test_{kind}", num_classes=10, **extra, **options)
    if (head := net.get_classifier()) is not None and isinstance(head, nn.Linear):
        nn.init.normal_(head.weight, std=0.3)
    return Backbone(net, name=kind, tag=f"test_{kind}")


def make(net: Backbone | None = None, **changes: Any) -> LAME:
    node = OmegaConf.merge(OmegaConf.load(ROOT / "conf" / "strategy" / "lame.yaml"), changes)
    method = build(node, at="strategy", backbone=net or backbone(), seed=0)
    method.begin_stream()
    return method


def images(count: int, seed: int = 5) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


CASES = Case("lame").hyper["cases"]


@both
@pytest.mark.parametrize("setting", CASES, ids=[c["case"] for c in CASES])
def test_recorded_numbers(setting: dict[str, Any], dtype: torch.dtype) -> None:
    case = Case("lame", dtype)
    options = {k: v for k, v in setting.items() if k != "case"}
    for i in range(4):
        feature, own = (torch.from_numpy(case.data[f"{k}{i}"]).to(dtype) for k in ("feat", "prob"))
        kernel = affinity_matrix(feature, rbf_self="count", **options)
        assert kernel is not None
        out, energies = laplacian_assignments(
            -(own + 1e-10).log(),
            kernel,
            weight=case.hyper["bound_lambda"],
            max_steps=case.hyper["max_steps"],
            tolerance=case.hyper["energy_rtol"],
        )
        prefix = f"{setting['case']}_s{i}"
        case.check(f"{prefix}_out", out)
        if dtype == torch.float32:
            case.check(f"{prefix}_kernel", kernel)
            # Where the rule strikes depends on the last bit: compare the steps that both made.
            golden, both_made = case.data[f"{prefix}_energy"], len(energies)
            both_made = min(both_made, len(golden))
            error = np.abs(np.array(energies[:both_made]) - golden[:both_made])
            assert np.all(error <= case.data[f"tol/{prefix}_energy"][:both_made]), prefix


@pytest.mark.parametrize("per_read", [1, 3, 8, 1000])
def test_reading_energies_in_blocks_gives_the_same_iterate(monkeypatch, per_read):
    class Elsewhere(Tensor):
        """A CPU tensor that says it is on an accelerator."""

        device = torch.device("cuda")  # pyrefly: ignore

    data = Case("lame").data
    unary = -(torch.from_numpy(data["prob3"]) + 1e-10).log()
    options = {"affinity": "rbf", "knn": 5, "force_symmetry": False, "rbf_self": "count"}
    kernel = affinity_matrix(torch.from_numpy(data["feat3"]), **options)
    for steps in (100, 5, 2):
        solver = {"weight": 1.0, "max_steps": steps, "tolerance": 1e-8}
        want, energies = laplacian_assignments(unary, kernel, **solver)
        monkeypatch.setattr(lame, "STEPS_PER_READ", per_read)
        got, same = laplacian_assignments(unary.as_subclass(Elsewhere), kernel, **solver)
        assert energies == same and len(energies) <= steps
        assert torch.equal(want, got.as_subclass(Tensor))
    assert len(energies) == 2


def test_distances_in_blocks_are_those_of_one_block(monkeypatch):
    h = torch.randn(13, 7)
    whole = distances(h)
    assert torch.equal(whole, whole.T) and not whole.diagonal().any()
    for values in (1, 7 * 13 * 4, 7 * 13 * 12):
        monkeypatch.setattr(lame, "BLOCK_VALUES", values)
        assert torch.equal(distances(h), whole)


def test_bandwidth_with_and_without_the_image_itself():
    h = torch.nn.functional.normalize(torch.randn(9, 5, generator=torch.Generator().manual_seed(1)))
    options = {"affinity": "rbf", "force_symmetry": False}
    skipped = affinity_matrix(h, knn=3, rbf_self="skip", **options)
    counted = affinity_matrix(h, knn=4, rbf_self="count", **options)
    assert torch.equal(skipped, counted)
    sigma = distances(h).sort(1).values[:, 3].mean()
    assert torch.allclose(skipped, torch.exp(-(distances(h) ** 2) / (2 * sigma**2)))


@pytest.mark.parametrize("kind", ["resnet", "vit", "efficientnet"])
def test_features_and_logits_come_from_one_forward(kind):
    method = make(backbone(kind))
    x, passes = images(6), method.backbone.passes
    with torch.no_grad():
        want = method.backbone.features(x), method.backbone(x)
        passes.forward = 0
        got = method.backbone.features_and_logits(x)
    assert passes.forward == 6
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not method.backbone.head._forward_pre_hooks
    assert torch.equal(method.backbone.head(got[0]), got[1])


@pytest.mark.parametrize("affinity", ["rbf", "knn", "linear"])
def test_one_image_keeps_its_probabilities(affinity):
    method, x = make(affinity=affinity), images(1)
    with torch.no_grad():
        own = method.backbone(x).softmax(1)
    assert torch.equal(method.adapt(x), own)
    assert method.unchanged == 1


def test_equal_images_keep_their_probabilities():
    method, x = make(), images(1).expand(6, -1, -1, -1)
    scores = method.adapt(x)
    with torch.no_grad():
        assert torch.equal(scores, method.backbone(x).softmax(1))
    assert method.unchanged == 1 and scores.isfinite().all()
    method.adapt(images(6))
    assert method.unchanged == 1


@pytest.mark.parametrize("affinity", ["rbf", "knn", "linear"])
def test_fewer_images_than_neighbours(affinity):
    method = make(affinity=affinity, knn=50)
    for count in (2, 3, 6):
        scores = method.adapt(images(count))
        assert scores.shape == (count, 10) and scores.isfinite().all()
        assert torch.allclose(scores.sum(1), torch.ones(count))
    assert method.unchanged == 0


def test_it_is_stateless_and_frozen():
    method, x = make(), images(8)
    weights = {k: v.clone() for k, v in method.backbone.state_dict().items()}
    first = method.adapt(x)
    with torch.no_grad():
        assert not torch.equal(first, method.backbone(x).softmax(1))
    assert torch.equal(method.predict(images(8, seed=6)), method.adapt(images(8, seed=6)))
    assert torch.equal(method.adapt(x), first) and torch.equal(method.predict(x), first)
    method.reset()
    assert torch.equal(method.adapt(x), first)
    assert all(torch.equal(v, weights[k]) for k, v in method.backbone.state_dict().items())
    assert not method.backbone.training and method.outputs == "probabilities" and method.static
    assert not torch.equal(method.predict(x[:4]), first[:4])  # it depends on the batch

    method.adapt(x[:1])
    fresh = make()
    fresh.restore(method.snapshot())
    assert fresh.unchanged == method.unchanged == 1
    assert torch.equal(fresh.adapt(x), first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"knn": 0}, "strategy.knn must be a whole number, at least 1"),
        ({"max_steps": 0}, "strategy.max_steps must be a whole number, at least 1"),
        ({"knn": 1}, r"no bandwidth.*strategy.knn=2.*strategy.rbf_self=skip"),
        ({"affinity": "cosine"}, "strategy.affinity must be one of 'rbf', 'knn', 'linear'"),
    ],
)
def test_wrong_settings_are_explained(changes, message):
    with pytest.raises(UserError, match=message):
        make(**changes)


def test_one_neighbour_is_fine_elsewhere():
    make(knn=1, affinity="knn").adapt(images(4))
    make(knn=1, rbf_self="skip").adapt(images(4))


def test_networks_without_a_single_linear_head_are_refused():
    class Twice(nn.Module):
        """A head applied to two maps."""

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mean((2, 3))) + self.fc(x.amax((2, 3)))

    class Everywhere(Twice):
        """A head applied before the pooling."""

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(2).mT).mean(1)

    with pytest.raises(UserError, match="no single linear layer that gives its scores"):
        make(Backbone(nn.Sequential(nn.Conv2d(3, 10, 1), nn.Flatten())))
    for net, shapes in ((Twice(), r"\(4, 3\), \(4, 3\)"), (Everywhere(), r"\(4, 1024, 3\)")):
        with pytest.raises(UserError, match=f"one feature vector per image.*{shapes}"):
            make(Backbone(net)).adapt(images(4))
