"""DeYO and ReCAP against recorded runs (README in tests/golden); ZeroSiam and SPA by formula."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from golden_case import Case, both, names, names_in, optim, part_of_log, weights
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.parts.objectives import entropy
from driftline.parts.optim import Optim
from driftline.tta.deyo import DeYO, drops, occluded, shuffled_patches, shuffled_pixels
from driftline.tta.recap import ReCAP
from driftline.tta.spa import SPA
from driftline.tta.tent import Tent
from driftline.tta.zerosiam import ZeroSiam


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


# ------------------------------------------------------------------------------ ZeroSiam, SPA

MODELS = ("deyo_resnet_official", "deyo_vit")  # for their networks and images
NORMALIZED = {"mean": (0.5, 0.4, 0.3), "std": (0.3, 0.4, 0.5)}


class Descent:
    """SGD with momentum 0.9, written out; each parameter has a rate, below zero to climb."""

    def __init__(self, rates: dict[Tensor, float]) -> None:
        self.rates, self.moving = rates, {p: torch.zeros_like(p) for p in rates}

    def step(self, loss: Tensor) -> None:
        for p, g in zip(self.rates, torch.autograd.grad(loss, [*self.rates]), strict=True):
            self.moving[p] = 0.9 * self.moving[p] + g
            p.data -= self.rates[p] * self.moving[p]


def by_hand(case: Case, **more: Any) -> tuple[Backbone, list[Tensor], Tensor]:
    """A network that uses batch statistics, its normalisation layers, and an identity."""
    backbone = Backbone(case.net(), **more).to(case.dtype)
    learning: list[Tensor] = []
    for module in backbone.net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.LayerNorm):
            learning += [module.weight, module.bias]
    return backbone, learning, torch.eye(backbone.dim, dtype=case.dtype, requires_grad=True)


def scores(backbone: Backbone, x: Tensor, layer: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities with and without the layer before the head."""
    head = backbone.head
    assert head is not None
    features = backbone.features(x)
    with_layer = features @ layer.T @ head.weight.T + head.bias
    return with_layer.softmax(1), (features @ head.weight.T + head.bias).softmax(1)


def zerosiam(backbone: Backbone, **more: Any) -> ZeroSiam:
    learning = Optim(kind="sgd", lr=0.02, factors={"predictor": 5.0}, momentum=0.9)
    settings = {"layers": "norm", "top": "all", "mode": "train", "optim": learning, "steps": 1}
    return ZeroSiam(backbone, **settings | {"align": 0.7} | more)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_zerosiam(name: str) -> None:
    case = Case(name, torch.float64)
    backbone, norms, layer = by_hand(case)
    descent = Descent(dict.fromkeys(norms, 0.02) | {layer: 0.1})
    method = zerosiam(Backbone(case.net()))
    method.begin_stream()
    for x in case.batches()[:3]:
        p, q = scores(backbone, x, layer)
        adapted = method.adapt(x)
        torch.testing.assert_close(adapted.softmax(1), q.detach())
        q = q.detach()
        both = q * (q / p).log() + p * (p / q).log()
        descent.step(((-p * p.log()).sum(1) + 0.7 * both.sum(1)).mean())
    torch.testing.assert_close(method.predictor.weight, layer)
    assert (layer - torch.eye(len(layer))).abs().max() > 1e-4
    for mine, theirs in zip(method.backbone.parameters(), backbone.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    passes = method.backbone.passes
    assert passes.forward == passes.backward == 3 * len(x)


def test_the_first_step_of_zerosiam_is_that_of_tent() -> None:
    case = Case("deyo_resnet_official", torch.float64)
    x = case.batches()[0]
    first = zerosiam(Backbone(case.net()), align=3.0)
    learning = Optim(kind="sgd", lr=0.02, momentum=0.9)
    tent = Tent(
        Backbone(case.net()),
        seed=0,
        layers="norm",
        mode="train",
        optim=learning,
        steps=1,
        adapter=None,
    )
    torch.testing.assert_close(first.adapt(x), tent.adapt(x))
    torch.testing.assert_close(first.predict(x), tent.predict(x))


def spa(backbone: Backbone, **more: Any) -> SPA:
    learning = Optim(
        kind="sgd", lr=0.02, rates={"predictor": 0.1, "noise": 0.5}, momentum=0.9, nesterov=False
    )
    settings: dict[str, Any] = {
        "seed": 0,
        "layers": "norm",
        "top": "all",
        "mode": "train",
        "optim": learning,
        "steps": 1,
        "masked": 0.3,
        "noise": 0.2,
        "patches": 4,
        "limits": "unit",
        "entropy": 0.0,
    }
    return SPA(backbone, **settings | more).to(next(backbone.net.parameters()).dtype)


def without(x: Tensor, kept: Tensor) -> Tensor:
    """Images of 64 pixels whose low frequencies, 12 of a side, are kept or not, pair by pair."""
    middle, factors = 32, torch.ones_like(x)
    for i in range(12):
        for j in range(12):
            row, column = i - 6, j - 6  # 0 is the mean
            if row < 0 or (row == 0 and column >= 0):
                factors[..., middle + row, middle + column] = kept[..., i, j]
                factors[..., middle - row, middle - column] = kept[..., i, j]
    spectrum = torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1)) * factors
    image = torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1)))
    assert image.imag.abs().max() < 1e-9
    return image.real


@pytest.mark.parametrize("weight", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_spa(name: str, weight: float) -> None:
    case = Case(name, torch.float64)
    backbone, norms, layer = by_hand(case, **NORMALIZED)
    roots = torch.full((16,), 0.2**0.5, dtype=torch.float64, requires_grad=True)
    descent = Descent(dict.fromkeys(norms, 0.02) | {layer: 0.1, roots: -0.5})
    method = spa(Backbone(case.net(), **NORMALIZED), entropy=weight)
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in NORMALIZED.values())
    mean, std = mean.float().double(), std.float().double()  # as they are stored
    numbers = deepcopy(method.rng("views"))
    method.begin_stream()
    counted = []
    for x in case.batches()[:3]:
        kept = (torch.rand(len(x), 3, 12, 12, generator=numbers) >= 0.3).double()
        noise = torch.randn(3, 64, 64, generator=numbers).double()
        image = (x - mean) / std
        noisy = torch.empty_like(image)
        for i, root in enumerate(roots):
            part = (..., slice(i // 4 * 16, i // 4 * 16 + 16), slice(i % 4 * 16, i % 4 * 16 + 16))
            noisy[part] = (1 - root**2) * image[part] + root**2 * noise[part]
        copies = without(image, kept), noisy.clamp(-1, 1)
        target = scores(backbone, x, layer)[1]
        loss = weight * -(target * target.log()).sum(1).mean()
        for copy in copies:
            p, q = scores(backbone, copy * std + mean, layer)[0], target.detach()
            surer = q.max(1).values > p.max(1).values
            counted.append(int(surer.sum()))
            loss = loss + (q * (q / p).log())[surer].sum() / counted[-1]
        torch.testing.assert_close(method.adapt(x).softmax(1), target.detach())
        descent.step(loss)
        roots.data = (roots.data * (0.2 / (roots.data**2).mean()).sqrt()).clamp(-1, 1)
    assert min(counted) < 16 and min(counted) > 0
    torch.testing.assert_close(method.roots.flatten(), roots)
    assert roots.std() > 1e-3
    torch.testing.assert_close(method.predictor.weight, layer)
    for mine, theirs in zip(method.backbone.parameters(), backbone.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    passes = method.backbone.passes
    assert passes.forward == 9 * len(x)
    assert passes.backward == (9 if weight else 6) * len(x)


def test_no_image_is_surer_than_its_copies() -> None:
    """The gradient is zero: nothing moves before there is momentum, and nothing is NaN."""
    case = Case("deyo_resnet_official")
    method = spa(Backbone(case.net()))
    method.predictor.weight.data.mul_(1000)
    before = deepcopy(method.state_dict())
    scored = method.adapt(case.batches()[0])
    assert scored.isfinite().all()
    for key, value in method.state_dict().items():
        torch.testing.assert_close(value, before[key])


def test_copies_of_images_of_any_size() -> None:
    x = torch.rand(2, 3, 30, 45, generator=torch.Generator().manual_seed(1))
    backbone = Backbone(Case("deyo_resnet_official").net(), **NORMALIZED)
    method = spa(backbone, patches=14, limits="image", noise=0.9)
    kept, noise = method.draw(x)
    masked, noisy = method.views(x, torch.ones_like(kept), noise)
    torch.testing.assert_close(masked, x)
    assert noisy.min() == 0 and noisy.max() == 1
    grey, _ = method.views(x, torch.zeros_like(kept), noise)  # without its mean, too
    torch.testing.assert_close(grey.mean((0, 2, 3)), torch.tensor(NORMALIZED["mean"]))
