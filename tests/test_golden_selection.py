"""DeYO and ReCAP against recorded runs (README in tests/golden)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from golden_case import Case, both, names, names_in, optim, weights
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.parts.objectives import entropy
from driftline.tta.deyo import DeYO, drops, occluded, shuffled_patches, shuffled_pixels
from driftline.tta.recap import ReCAP


def part_of_log(text: str) -> float:
    """0.4 of "0.4*ln(10)"."""
    factor, _, rest = text.partition("*")
    assert rest == "ln(10)"
    return float(factor)


def noting(base: type[Any]) -> type[Any]:
    """A class that draws the recorded permutations and notes what is recorded of a batch."""

    class Noting(base):
        def permutations(self, count: int, length: int) -> Tensor:
            if "patch_perm" not in self.case.data:
                return super().permutations(count, length)
            order = self.case.data["patch_perm"][len(self.notes["kept"]), :count]
            assert order.shape == (count, length)
            return torch.from_numpy(order.astype(np.int64))

        def adapt(self, x: Tensor) -> Tensor:
            self.passes: list[Tensor] = []
            self.losses = [math.nan]
            handle = self.backbone.register_forward_hook(lambda *a: self.passes.append(a[2]))
            scores = super().adapt(x)
            handle.remove()
            self.notes["loss"].append(self.losses[-1])
            return scores

        def loss(self, logits: Tensor, *more: Tensor) -> Tensor:
            value = super().loss(logits, *more)
            self.losses.append(value.item())
            return value

    return Noting


class NotedDeYO(noting(DeYO)):  # type: ignore[misc]
    def adapt(self, x: Tensor) -> Tensor:
        before = self.certain, self.learned
        scores = super().adapt(x)
        self.notes["kept"].append([self.certain - before[0], self.learned - before[1]])
        self.notes["entropy"].append(entropy(scores).numpy())
        destroyed = np.full(scores.shape, np.nan)
        for logits in self.passes[1:]:
            destroyed[: len(logits)] = logits.numpy()
        self.notes["logits_destroyed"].append(destroyed)
        return scores


def deyo(case: Case, kind: type[DeYO] = NotedDeYO, **more: Any) -> Any:
    hyper = case.hyper
    settings = {
        "seed": 0,
        "layers": "norm",
        "top": "names",
        "mode": "eval",
        "optim": optim(hyper),
        "steps": hyper["steps"],
        "margin": part_of_log(hyper["entropy_margin"]),
        "drop": hyper["plpd_threshold"],
        "destroy": {"occ": "occlusion"}.get(hyper["aug_type"], hyper["aug_type"]),
        "patches": hyper["patch_len"],
        "window": hyper.get("occlusion_size", 32) / case.info["img_size"],
        "draw_for": "kept",
        "weight_entropy": part_of_log(hyper["e0"]) if hyper["reweight_ent"] else None,
        "weight_drop": hyper["reweight_plpd"],
    }
    method: Any = kind(Backbone(case.net()), **settings | more)
    method.case = case
    method.notes = {k: [] for k in ("loss", "kept", "entropy", "logits_destroyed")}
    return method


@both
@pytest.mark.parametrize("name", names("deyo_*"))
def test_deyo(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    method = deyo(case)
    net = method.backbone.net
    adapted = {n for n, p in net.named_parameters() if p.requires_grad}
    assert adapted == set(names_in(case.info["adapted_parameters"]))
    method.begin_stream()
    logits = [method.adapt(x).numpy() for x in case.batches()]
    kept = case.data["kept"]
    assert method.notes.pop("kept") == kept.tolist()
    case.check_all({"logits": logits} | method.notes | weights("p", net, case.net(), case))
    passes = method.backbone.passes
    assert (
        passes.forward == 80 + kept[:, 0].sum() and passes.backward == 16 * (kept[:, 1] > 0).sum()
    )


def test_images_are_destroyed_as_they_say() -> None:
    x = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6)
    order = torch.tensor([[1, 0, 2, 3], [3, 2, 1, 0]])
    moved = shuffled_patches(x, order)
    assert torch.equal(moved[0, :, :3, :3], x[0, :, :3, 3:])
    assert torch.equal(moved[0, :, 3:], x[0, :, 3:])
    assert torch.equal(moved[1, :, 3:, :3], x[1, :, :3, 3:])
    assert shuffled_patches(x, torch.arange(16).expand(2, -1)).shape == x.shape  # 4 x 4 of 6 pixels
    hidden = occluded(x, 0.5)
    assert torch.equal(hidden[..., 2:4, 2:4], x.mean((2, 3), keepdim=True).expand(-1, -1, 2, 2))
    assert torch.equal(hidden[:, :, :2], x[:, :, :2])
    assert torch.equal(shuffled_pixels(x, torch.arange(35, -1, -1)), x.flip(2, 3))
    scores = torch.tensor([[2.0, 0.0]])
    assert drops(scores, torch.tensor([[0.0, 9.0]])) == pytest.approx(0.8808 - 0.0001, abs=1e-4)


def test_permutations_for_each_image_do_not_depend_on_the_others() -> None:
    case = Case("deyo_resnet_official")
    x = case.batches()[0]
    images = {}
    for draw_for in ("image", "kept"):
        method = deyo(case, DeYO, draw_for=draw_for)
        for rows in ([1, 3], [3]):
            method.rng("permutations").manual_seed(5)
            images[draw_for, len(rows)] = method.destroyed(x, torch.tensor(rows))[-1]
    assert torch.equal(images["image", 2], images["image", 1])
    assert not torch.equal(images["kept", 2], images["kept", 1])


class NotedReCAP(noting(ReCAP)):  # type: ignore[misc]
    def select(self, x: Tensor, logits: Tensor) -> Tensor:
        rows = super().select(x, logits)
        below = self.regional_entropy(logits) < self.margin
        first = int(below.sum()) if self.selection == "drop" else len(rows)
        self.notes["regional_entropy"].append(self.regional_entropy(logits).detach().numpy())
        instability = self.regional_instability(logits).detach().numpy()
        self.notes["regional_instability"].append(instability)
        self.notes["kept"].append([first, len(rows)])
        return rows

    def adapt(self, x: Tensor) -> Tensor:
        scores = super().adapt(x)
        self.notes["ema"].append(math.nan if self.average is None else self.average)
        self.notes["resets_so_far"].append(self.recoveries)
        return scores


def recap(case: Case, **more: Any) -> Any:
    hyper = case.hyper
    plain = "margin" not in hyper
    settings = {
        "seed": 0,
        "layers": "norm",
        "top": "names",
        "mode": "train",
        "optim": optim(hyper),
        "steps": hyper["steps"],
        "selection": "all" if plain else "drop",
        "tau": hyper["tau"],
        "instability": hyper["lambda_reg"],
        "margin": 0.0 if plain else part_of_log(hyper["margin"]),
        "level": 0.0 if plain else part_of_log(hyper["L0"]),
        "cap": hyper.get("coefficient_cap", 1.0),
        "drop": hyper.get("plpd_threshold", 0.0),
        "patches": hyper.get("patch_len", 1),
        "recover_below": hyper["recovery_threshold"],
        "keep_momentum_on_recovery": False,
        "keep_average_on_recovery": True,
    }
    method: Any = NotedReCAP(Backbone(case.net()), **settings | more)
    method.case = case
    outputs = ("loss", "kept", "regional_entropy", "regional_instability", "ema", "resets_so_far")
    method.notes = {k: [] for k in outputs}
    sigmas = torch.from_numpy(case.data["sigmas"]).to(case.dtype)
    method.use_prepared({"variance": sigmas})
    return method


@both
@pytest.mark.parametrize("name", names("recap_*"))
def test_recap(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    method = recap(case)
    net = method.backbone.net
    adapted = {n for n, p in net.named_parameters() if p.requires_grad}
    assert adapted == set(names_in(case.info["adapted_parameters"]))
    method.begin_stream()
    logits = [method.adapt(x).numpy() for x in case.batches()]
    for key in ("kept", "resets_so_far"):
        assert method.notes.pop(key) == case.data[key].tolist()
    case.check_all({"logits": logits} | method.notes | weights("p", net, case.net(), case))


def test_regions_that_reach_too_far_are_one_clear_error() -> None:
    with pytest.raises(UserError, match="strategy.tau=1e\\+06"):
        recap(Case("recap_plain_vit"), tau=1e6)


def test_regions_without_extent_are_points() -> None:
    """No variance: the regional entropy is the entropy, but for the shift, and nothing differs."""
    case = Case("recap_plain_vit", torch.float64)
    method = recap(case)
    method.use_prepared({"variance": torch.zeros_like(method.variance)})
    method.shift.zero_()
    logits = torch.from_numpy(case.data["logits"][0]).double()
    torch.testing.assert_close(method.regional_entropy(logits), entropy(logits))
    torch.testing.assert_close(method.regional_instability(logits), torch.zeros(16).double())
