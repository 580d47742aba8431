"""ROID, CMF and AdaContrast against numbers recorded from mariodoebler/test-time-adaptation."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from conftest import strategy_node
from golden_case import Case, both, names, optim, record, views, weights
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
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


def small(kind: Any, **options: Any) -> Any:
    case = Case(names("roid_*")[0])
    node = strategy_node("cmf" if kind is CMF else "roid", **options)
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
