"""Methods for single images or without backward passes, against recorded runs or by formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from golden_case import Case, both, names, record
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.tta.neo import NEO
from driftline.tta.t3a import T3A


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def backbone(name: str = "test_resnet") -> Backbone:
    torch.manual_seed(3)
    extra = {"img_size": 64} if name == "test_vit" else {}
    net = timm.create_model(name, num_classes=10, **extra).eval()
    torch.nn.init.normal_(net.get_classifier().weight, std=0.3)
    return Backbone(net, tag=name)


# ------------------------------------------------------------------------------ T3A


@both
@pytest.mark.parametrize("name", names("t3a_*"))
def test_t3a(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    limit = case.hyper["filter_K"]
    method = T3A(Backbone(case.net()), supports="all_but_last" if limit < 0 else limit)
    counts: list[Any] = []
    select = method.select

    def note() -> None:
        select()
        counts.append(method.classes.bincount(minlength=10).numpy())

    method.select = note  # type: ignore[method-assign]
    results: dict[str, Any] = record(method, case)
    assert np.array_equal(counts, case.data["n_supports"])
    norms = method.features.norm(dim=1).sort().values
    case.check_all(results | {"support_l2": norms, "support_entropy": method.entropies})


def test_t3a_keeps_all_or_loses_a_lonely_support() -> None:
    x = images(6)
    every = T3A(backbone(), supports="all")
    every.adapt(x)
    assert len(every.features) == 10 + len(x)
    losing = T3A(backbone(), supports="all_but_last")
    losing.adapt(x)
    lonely = every.classes.bincount(minlength=10) == 1
    assert lonely.any() and (losing.class_vectors()[:, lonely] == 0).all()
    assert losing.predict(x).isfinite().all()


# ------------------------------------------------------------------------------ NEO


@pytest.mark.parametrize("mean", ["stream", "moving"])
def test_neo_is_the_official_formula(mean: Any) -> None:
    """Written from the official code, which has no recorded run."""
    net = backbone("test_vit").double()
    method, x = NEO(net, mean=mean, momentum=0.1), images(9).double()
    with torch.no_grad():
        z = net.features(x)
    center, weight, bias = torch.zeros_like(z[0]), net.head.weight, net.head.bias
    for seen, part in ((4, slice(0, 4)), (7, slice(4, 7)), (9, slice(7, 9))):
        moving = 0.9 * center + 0.1 * z[part].mean(0)
        center = z[:seen].mean(0) if mean == "stream" else moving
        want = (z[part] - center) @ weight.T + bias
        torch.testing.assert_close(method.adapt(x[part]), want.detach())
    torch.testing.assert_close(method.predict(x), ((z - center) @ weight.T + bias).detach())


@pytest.mark.parametrize(
    "make", [lambda b: T3A(b, supports=1), lambda b: NEO(b, mean="stream", momentum=0.1)]
)
def test_a_network_without_a_linear_head_is_refused(make: Any) -> None:
    net = timm.create_model("test_resnet", num_classes=0)
    with pytest.raises(UserError, match="no single linear layer"):
        make(Backbone(net, tag="headless"))
