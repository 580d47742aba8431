"""ROID, CMF and AdaContrast against numbers recorded from mariodoebler/test-time-adaptation."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import strategy_node
from golden_case import Case, both, names, optim, record, views, weights
from torch import Tensor, nn
from torchvision.transforms import functional as transform

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.parts.norms import batch_norms
from driftline.tta.adacontrast import JITTER, AdaContrast, blur, jitter, strong_view
from driftline.tta.cmf import CMF
from driftline.tta.roid import ROID


class Recorded(ROID):
    """With the recorded views; keeps what the reference recorded of its insides."""

    case: Case
    drawn = 0
    kept: dict[str, list[Any]]

    def augment(self, x: Tensor) -> Tensor:
        self.drawn += 1
        return self.case.view(x, (self.drawn - 1) % len(self.case.data["view_scale"]))

    def corrected(self, logits: Tensor) -> Tensor:
        self.kept["raw_logits"].append(logits.numpy())
        self.kept["class_probs_ema"].append(self.class_average.numpy())
        return super().corrected(logits)


class RecordedCMF(Recorded, CMF):
    def gain(self) -> float:
        gain = super().gain()
        self.kept["beta"].append(gain)
        self.kept["hidden_var"].append(self.variance)
        return gain


def run(kind: Any, case: Case, **options: float | str | bool) -> tuple[Recorded, dict[str, Any]]:
    """The method at the end of the recorded stream, and its results."""
    assert case.hyper["use_weighting"] and case.hyper["use_prior_correction"]
    net = case.net()
    method = kind(
        Backbone(net),
        seed=0,
        layers="norm",
        optim=optim(case.hyper),
        weighting=True,
        temperature=case.hyper["temperature"],
        class_ema=case.hyper["momentum_probs"],
        consistency=case.hyper["use_consistency"],
        prior_on="logits",
        divisor="largest",
        **options,
    )
    method.case, method.kept = case, defaultdict(list)
    results: dict[str, Any] = record(method, case)
    results |= method.kept | weights("p", net, case.net(), case)
    assert method.drawn == (len(case.batches()) if method.consistency else 0)
    return method, results


@both
@pytest.mark.parametrize("name", names("roid_*"))
def test_roid(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    case.check_all(run(Recorded, case, ensemble=case.hyper["momentum_src"])[1])


@both
@pytest.mark.parametrize("name", names("cmf_*"))
def test_cmf(name: str, dtype: torch.dtype) -> None:
    """Both types of the reference are `updated`; of its hidden model, only norms ever move."""
    case = Case(name, dtype)
    hyper = case.hyper
    method, results = run(
        RecordedCMF,
        case,
        ensemble=hyper["gamma"],
        return_rate=hyper["alpha"],
        noise=hyper["q"],
        anchor="updated",
        keep_variance=False,
    )
    source = dict(case.net().named_parameters())
    learned = [n for n, p in method.backbone.net.named_parameters() if p.requires_grad]
    order = {id(p): i for i, p in enumerate(method.trained)}
    now = dict(method.backbone.net.named_parameters())
    hidden = source | {n: method.hidden[order[id(now[n])]] for n in learned}
    case.check_all(results | views("hidden", hidden, source, case))


def small(kind: type, **options: Any) -> Any:
    case = Case(names("roid_*")[0])
    node = strategy_node(kind.__name__.lower(), **options)
    return build(node, at="strategy", backbone=Backbone(case.net()), seed=0), case.batches()


@pytest.mark.parametrize("kind", [ROID, CMF])
def test_equal_images_do_not_stand_out(kind: Any) -> None:
    """The reference gives 0 / 0, and weights that are no numbers after one update."""
    method, (x, *_) = small(kind)
    logits = method.predict(x[:1]).expand(4, -1)
    assert method.weights(logits).tolist() == [1, 1, 1, 1]
    for _ in range(2):
        assert method.adapt(x[:1].expand(4, -1, -1, -1)).isfinite().all()
    assert all(p.isfinite().all() for p in method.backbone.parameters())


def test_what_is_switched_off_is_off() -> None:
    """Without weights, views, mean and prior: a plain likelihood ratio, and plain scores."""
    off = {"weighting": False, "consistency": False, "prior_on": None, "divisor": "batch"}
    method, (x, *_) = small(ROID, ensemble=1.0, **off)
    plain = method.backbone(x).detach()
    p = plain.double().softmax(1).clamp(max=0.99)
    want = -(p * (p / (1 - p) + 1e-5).log()).sum(1).mean()
    loss = method.loss(plain, method.weights(plain), None)
    torch.testing.assert_close(loss, want.to(loss), rtol=1e-5, atol=0)
    assert torch.equal(method.adapt(x), plain)
    before = [p.clone() for p in method.trained]
    method.merge()
    assert all(torch.equal(a, b) for a, b in zip(before, method.trained, strict=True))
    assert torch.equal(method.class_average, torch.full((10,), 0.1))


def test_the_prior_of_probabilities_multiplies_probabilities() -> None:
    method, (x, *_) = small(ROID, prior_on="probabilities")
    logits = method.backbone(x).detach()
    p = logits.softmax(1)
    prior = p.mean(0)
    smooth = 0.1 / prior.max()
    want = p * (prior + smooth) / (1 + 10 * smooth)
    torch.testing.assert_close(method.corrected(logits).exp(), want)


def test_a_short_batch_is_divided_by_what_divisor_says() -> None:
    losses = {}
    for divisor in ("largest", "batch", 1):
        method, (x, *_) = small(ROID, consistency=False, divisor=divisor)
        method.largest.fill_(16)
        logits = method.backbone(x[:4])
        losses[divisor] = method.loss(logits, torch.ones(4), None)
    torch.testing.assert_close(losses["batch"], 4 * losses["largest"])
    torch.testing.assert_close(losses[1], 4 * losses["batch"])


def test_the_filter_of_cmf() -> None:
    """By hand for one scalar: three batches, both anchors."""
    results = {}
    for anchor in ("updated", "predicted"):
        method, _ = small(CMF, anchor=anchor, noise=9.0, return_rate=0.9, ensemble=0.8)
        q = 9.0 * sum(p.numel() for p in method.trained) / 38_400
        method.trained = [nn.Parameter(torch.tensor(2.0), requires_grad=False)]
        one = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        method.source, method.hidden = nn.ParameterList([one]), nn.ParameterList([one.clone()])
        variance, hidden, weight = 0.0, 1.0, 2.0
        for _ in range(3):
            method.merge()
            predicted = 0.9 * hidden + 0.1
            variance = 0.81 * variance + q
            gain = max((1 - q) / (variance + 1 - q), 0.89)
            variance *= gain
            hidden = gain * predicted + (1 - gain) * weight
            weight = 0.8 * weight + 0.2 * (hidden if anchor == "updated" else predicted)
        assert method.variance == pytest.approx(variance)
        assert method.trained[0].item() == pytest.approx(weight)
        results[anchor] = weight
    assert results["updated"] != results["predicted"]


@pytest.mark.parametrize("keep", [False, True])
def test_reset_of_cmf_keeps_the_variance_where_it_shall(keep: bool) -> None:
    method, (x, *_) = small(CMF, keep_variance=keep)
    method.begin_stream()
    method.adapt(x)
    variance = method.variance
    method.reset()
    assert variance > 0 and method.variance == (variance if keep else 0)
    assert all(torch.equal(a, b) for a, b in zip(method.hidden, method.source, strict=True))


class RecordedAdaContrast(AdaContrast):
    """With the recorded queue and views; keeps what the reference recorded of its insides."""

    case: Case
    kept: dict[str, list[Any]]
    turn = -1  # batch
    drawn = 0  # views of it

    def adapt(self, x: Tensor) -> Tensor:
        self.turn, self.drawn = self.turn + 1, 0
        if self.turn == 2 and "state_preset" in self.case.info:
            self.seen = 1024
        scores = super().adapt(x)
        self.kept["bank_ptr"].append([self.queue_at, self.bank_at, len(self.bank)])
        return scores

    def weak(self, x: Tensor) -> Tensor:
        self.drawn += 1
        return self.case.view(x, 3 * self.turn + self.drawn - 1)

    strong = weak

    def draw_queue(self) -> tuple[Tensor, Tensor]:
        keys = torch.from_numpy(self.case.data["queue_feat_init"]).to(self.case.dtype)
        labels = torch.from_numpy(self.case.data["queue_label_init"])
        return F.normalize(keys, dim=0).T.contiguous(), labels.clone()

    def pseudo_labels(self, features: Tensor, logits: Tensor) -> Tensor:
        labels = super().pseudo_labels(features, logits)
        self.kept["pseudo_labels"].append(labels.tolist())
        return labels

    def losses(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        values = super().losses(*args)
        for name, value in zip(("loss_cls", "loss_ins", "loss_div"), values, strict=True):
            self.kept[name].append(value.item())
        return values


@both
@pytest.mark.parametrize("name", names("adacontrast_*"))
def test_adacontrast(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    hyper, net = case.hyper, case.net()
    assert hyper["ce_sup_type"] == "weak_strong" and hyper["contrast_type"] == "class_aware"
    method = RecordedAdaContrast(
        Backbone(net),
        seed=0,
        optim=optim(hyper),
        queue_size=hyper["queue_size"],
        ema=hyper["m_teacher"],
        temperature=hyper["temperature"],
        neighbours=hyper["num_neighbors"],
        distance=hyper["dist_type"],
        refine_from=1024,
        classification=hyper["alpha"],
        contrast=hyper["beta"],
        diversity=hyper["eta"],
        mask_labels="new",
        replace="official",
    )
    method.case, method.kept = case, defaultdict(list)
    results: dict[str, Any] = record(method, case)
    results |= method.kept | weights("p", net, case.net(), case)
    results |= weights("momentum", method.momentum.net, case.net(), case)
    results["bank_features_l2"] = method.bank.double().norm(dim=1)
    results["bank_probs"] = method.bank_probabilities
    for prefix, network in (("base", net), ("momentum", method.momentum.net)):
        for path, layer in batch_norms(network).items():
            path = path.replace("conv1.1", "bn1") if path.startswith("conv1") else path
            results[f"buffer/{prefix}.{path}.mean"] = layer.running_mean
            results[f"buffer/{prefix}.{path}.var"] = layer.running_var
    case.check_all(results)
    for key in ("pseudo_labels", "bank_ptr"):
        assert results[key] == case.data[key].tolist()


def test_queue_and_bank() -> None:
    """Which rows go, a batch above the size, what a batch costs, a new queue after a reset."""
    short = {"queue_size": 6, "refine_from": 8, "neighbours": 2}
    lost = {}
    for replace in ("official", "oldest"):
        method, (x, *_) = small(AdaContrast, replace=replace, **short)
        method.begin_stream()
        for _ in range(2):
            method.adapt(x[:4])
        assert len(method.bank) == 8 and method.seen == 8
        before = method.bank.clone()
        method.adapt(x[:2])
        lost[replace] = (method.bank != before).any(1).nonzero()[:, 0].tolist()
    assert lost == {"official": [4, 5], "oldest": [0, 1]}
    passes, old = method.backbone.passes, method.queue.clone()
    forward, backward = passes.forward, passes.backward
    method.adapt(x[:10])
    assert (passes.forward - forward, passes.backward - backward) == (50, 10)
    assert len(method.queue) == 6 and (method.queue != old).any(1).all()
    torch.testing.assert_close(method.queue.norm(dim=1), torch.ones(6))
    method.reset()
    assert method.queue is None and method.bank is None and method.seen == 0
    method.adapt(x[:1])
    assert method.queue_at == 1 and not torch.equal(method.queue[1:], old[1:])


def test_one_image_with_a_map_of_one_pixel_is_refused() -> None:
    method, (x, *_) = small(AdaContrast)
    with pytest.raises(UserError, match="one image with a map of one pixel"):
        method.adapt(x[:1, :, ::2, ::2])
    assert method.predict(x[:1, :, ::2, ::2]).isfinite().all()


def test_the_strong_view_is_what_torchvision_does_to_each_image() -> None:
    x = torch.rand(3, 3, 24, 30, generator=torch.Generator().manual_seed(1))
    factors = torch.tensor([0.6, 1.1, 1.4])
    for name in JITTER:
        values = (factors - 1) / 4 if name == "hue" else factors
        mine = jitter(x, name, values[:, None, None, None])
        operation = getattr(transform, f"adjust_{name}")
        want = [operation(image, f.item()) for image, f in zip(x, values, strict=True)]
        torch.testing.assert_close(mine, torch.stack(want), rtol=0, atol=2e-6)
    sigmas = torch.tensor([0.1, 0.8, 2.0])
    want = [
        transform.gaussian_blur(F.pad(image, [8] * 4, mode="replicate"), [17, 17], [s.item()] * 2)
        for image, s in zip(x, sigmas, strict=True)
    ]
    mine = blur(x, sigmas)
    torch.testing.assert_close(mine, torch.stack(want)[..., 8:-8, 8:-8], rtol=0, atol=1e-6)
    many = x[:1].expand(64, -1, -1, -1)
    views = strong_view(many, torch.Generator().manual_seed(2))
    assert len(views.flatten(1).unique(dim=0)) > 50  # drawn for each image
    assert views.min() >= 0 and views.max() <= 1 and torch.equal(many[0], x[0])
