"""EATA, ETA, RDumb and SAR against recorded runs; COME against its formulas.

The recorded runs are those of the README in tests/golden; COME has none, so its formulas are
compared with a few lines that follow its code literally.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import strategy_node
from golden_case import Case, both, names, names_in, optim, part_of_log, weights
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.strategy import TTAStrategy
from driftline.core.stream import Batch, SourceImages
from driftline.parts.norms import by_kind, collect_parameters, use_batch_statistics
from driftline.parts.objectives import entropy
from driftline.parts.optim import Optim
from driftline.parts.rules.reset_every import ResetEvery
from driftline.tta.come import opinion_entropy
from driftline.tta.eata import EATA, ETA
from driftline.tta.sar import SAR

NONE = torch.full((10,), torch.nan)


def source_images(case: Case, size: int) -> SourceImages:
    """The recorded ones; asked for in batches of `size`, in their order."""

    def batches(batch_size: int, **_: Any) -> Any:
        assert batch_size == size
        for x, y in case.source(size):
            yield Batch(x, y, torch.arange(len(y)), torch.zeros_like(y))

    return SourceImages(32, "recorded", "recorded", batches)


def selecting(base: type[ETA]) -> type[ETA]:
    """A class that notes what is recorded of a batch besides scores: entropies and selections."""

    class Noting(base):  # type: ignore[misc, valid-type]
        def adapt(self, x: Tensor) -> Tensor:
            before = self.certain, self.learned
            self.notes["loss"].append(math.nan)
            scores = super().adapt(x)
            self.notes["entropy"].append(entropy(scores).numpy())
            kept = [self.certain - before[0], self.learned - before[1]]
            self.notes["kept_after_entropy_and_diversity"].append(kept)
            mean = NONE if self.mean is None else self.mean
            self.notes["mean_probs"].append(mean.numpy())
            return scores

        def loss(self, logits: Tensor) -> Tensor:
            value = super().loss(logits)
            self.notes["loss"][-1] = value.item()
            return value

    return Noting


def eta(case: Case, **more: Any) -> Any:
    hyper = case.hyper
    base = EATA if hyper["fisher_alpha"] else ETA
    if base is EATA:
        more |= {
            "fisher_weight": hyper["fisher_alpha"],
            "fisher_images": hyper["fisher_samples"],
            "fisher_batch": hyper["fisher_batch_size"],
        }
    method: Any = selecting(base)(
        Backbone(case.net()),
        layers="bn",
        mode="eval",
        optim=optim(hyper),
        steps=hyper["steps"],
        margin=part_of_log(hyper["e_margin"]),
        similarity=hyper["d_margin"],
        **{"keep_mean_on_reset": False} | more,
    )
    method.notes = {k: [] for k in ("loss", "entropy", "mean_probs")}
    method.notes["kept_after_entropy_and_diversity"] = []
    return method


@both
@pytest.mark.parametrize("name", names("eata_*") + names("eta_*") + names("rdumb_*"))
def test_eata(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    method = eta(case)
    results: dict[str, Any] = {}
    if isinstance(method, EATA):
        source = source_images(case, case.hyper["fisher_batch_size"])
        method.use_prepared(eta(case).prepare(source, None))
        held = zip(method.trained, method.fisher, strict=True)
        results |= {f"fisher/{name}": value.detach().numpy() for name, value in held}
    else:
        assert not EATA.uses_source({"fisher_weight": 0.0})
    every = case.hyper.get("reset_after_num_updates")
    whole = method if every is None else ResetEvery(inner=method, every=every)
    whole.begin_stream()
    results["logits"] = [whole.adapt(x).numpy() for x in case.batches()]
    if every is not None:  # the recorded mean of the code, which resets after the batch
        for i in range(every - 1, len(results["logits"]), every):
            method.notes["mean_probs"][i] = NONE.numpy()
    net = method.backbone.net
    exact = case.data["kept_after_entropy_and_diversity"].tolist()
    assert method.notes["kept_after_entropy_and_diversity"] == exact
    case.check_all(results | method.notes | weights("p", net, case.net(), case))


def test_a_reset_forgets_the_mean_prediction_or_leaves_it() -> None:
    case = Case("eta_resnet_official")
    for keep in (False, True):
        method = eta(case, keep_mean_on_reset=keep)
        method.begin_stream()
        for x in case.batches()[:2]:
            method.adapt(x)
        mean, learned = method.mean, method.report()["images_learned"]
        method.reset()
        assert (method.mean is mean) if keep else (method.mean is None)
        assert method.report()["images_learned"] == learned > 0


def test_nothing_selected_changes_nothing() -> None:
    case = Case("eta_resnet_loud")
    method = eta(case)
    method.margin = 0.0
    method.begin_stream()
    for x in case.batches()[:2]:
        method.adapt(x)
    assert not method.optimizer.state and method.mean is None
    before = dict(case.net().named_parameters())
    assert all(torch.equal(p, before[n]) for n, p in method.backbone.net.named_parameters())
    assert method.backbone.passes.backward == 0


class Noted(SAR):
    """SAR that notes what is recorded of a batch besides scores."""

    def adapt(self, x: Tensor) -> Tensor:
        scores, before = [], self.recoveries
        handle = self.backbone.register_forward_hook(lambda *a: scores.append(a[2].detach()))
        result = super().adapt(x)
        handle.remove()
        self.notes["entropy_first_second"].append(np.stack([entropy(s).numpy() for s in scores]))
        self.notes["ema"].append(math.nan if self.average is None else self.average)
        self.notes["reset_after_batch"].append(self.recoveries - before)
        return result


def sar(case: Case, kind: type[SAR] = Noted, **more: Any) -> Any:
    hyper = case.hyper
    settings = optim({**hyper, "optimizer": "sgd", "weight_decay": 0.0})
    settings = Optim(**{**vars(settings), "sam": hyper["rho"]})
    method: Any = kind(
        Backbone(case.net()),
        **{
            "layers": "norm",
            "top": "names",
            "mode": "eval",
            "optim": settings,
            "steps": hyper["steps"],
            "margin": part_of_log(hyper["e_margin"]),
            "recover_below": hyper["reset_constant_em"],
            "keep_momentum_on_recovery": True,
            "keep_average_on_recovery": False,
        }
        | more,
    )
    method.notes = {k: [] for k in ("entropy_first_second", "ema", "reset_after_batch")}
    return method


@both
@pytest.mark.parametrize("name", names("sar_*"))
def test_sar(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    method = sar(case)
    net = method.backbone.net
    adapted = {n for n, p in net.named_parameters() if p.requires_grad}
    assert adapted == set(names_in(case.info["adapted_parameters"]))
    method.begin_stream()
    logits = [method.adapt(x).numpy() for x in case.batches()]
    assert method.notes["reset_after_batch"] == case.data["reset_after_batch"].tolist()
    results = {"logits": logits} | method.notes
    # The weights have come back to within rounding: 6.4 on a processor with AMX, 1 elsewhere.
    slack = {"p_moved": 10.0} if name == "sar_resnet_reset" else {}
    case.check_all(results | weights("p", net, case.net(), case), slack)
    assert method.backbone.passes.forward == method.backbone.passes.backward == 2 * 16 * 5


def test_no_certain_image_still_moves_the_weights_by_momentum() -> None:
    case = Case("sar_resnet_loud")
    method = sar(case)
    method.begin_stream()
    first, second, *_ = case.batches()
    method.adapt(first)
    before = [p.detach().clone() for p in method.updated_parameters()]
    method.margin = 0.0
    method.adapt(second)
    for p, old in zip(method.updated_parameters(), before, strict=True):
        momentum = method.optimizer.state[p]["momentum_buffer"]
        torch.testing.assert_close(p, old - case.hyper["lr"] * momentum)
        assert momentum.any()


@pytest.mark.parametrize("keep", [True, False])
def test_what_a_recovery_keeps(keep: bool) -> None:
    case = Case("sar_resnet_reset")
    keeps = {"keep_average_on_recovery": keep, "keep_momentum_on_recovery": keep}
    method = sar(case, recover_below=0.75, **keeps)
    method.begin_stream()
    for batch, x in enumerate(case.batches()[:2], 1):
        method.adapt(x)
        # The loss of the first batch is below 0.75 nats, that of the second is not.
        assert method.recoveries == (batch if keep else 1)
    assert (method.average < 0.75) == keep
    assert bool(method.optimizer.state) or not keep
    method.reset()
    assert method.average is None and not method.optimizer.state
    assert method.report() == {"recoveries": 2.0 if keep else 1.0}


# ------------------------------------------------------------------------------ COME


def entropy_of_the_code(x: Tensor, classes: int = 10) -> Tensor:
    """As in `tent_come.py`, for another number of classes than 1,000."""
    x = x / x.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True).detach()
    total = x.exp().sum(1, keepdim=True) + classes
    p = torch.cat([x.exp() / total, classes / total], 1) + 1e-7
    return -(p * p.log()).sum(1)


def test_entropy_of_an_opinion() -> None:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 10, generator=g, dtype=torch.float64) * torch.tensor([[0.1], [1], [9]] * 2)
    (ours, theirs) = [], []
    for function, found in ((opinion_entropy, ours), (entropy_of_the_code, theirs)):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        found += [value.detach(), *torch.autograd.grad(value.square().sum(), leaf)]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    # The length of the scores is left alone: no gradient along them.
    torch.testing.assert_close((ours[1] * x).sum(1), torch.zeros(6).double(), atol=1e-9, rtol=0)
    odd = torch.stack([torch.zeros(10), torch.full((10,), 1e4), torch.eye(10)[0] * 1e4])
    leaf = odd.requires_grad_()
    opinion_entropy(leaf).sum().backward()
    assert opinion_entropy(leaf).isfinite().all() and leaf.grad is not None
    assert leaf.grad.isfinite().all()


def come_by_hand(name: str, net: Any, x: Tensor, state: dict[str, Any], margin: float) -> Tensor:
    """One batch as in the code, with its filters; `state` holds optimiser and averages."""
    parameters = [p for g in state["optimizer"].param_groups for p in g["params"]]
    z, step = net(x), state["optimizer"].step
    h = entropy_of_the_code(z)
    if name == "come":
        h.mean().backward()
    elif name == "come_eata":
        p, kept = z.detach().softmax(1), h.detach() < margin
        if "mean" in state:
            m = state["mean"]
            kept &= (p @ m) / (p.norm(dim=1) * m.norm()) < 0.6
        if not kept.any():
            return z.detach()
        new = p[kept].mean(0)
        state["mean"] = 0.9 * state["mean"] + 0.1 * new if "mean" in state else new
        ((margin - h[kept]).exp().detach() * h[kept]).mean().backward()
    else:
        kept = h.detach() < margin
        h[kept].mean().backward()
        grads = [p.grad.clone() for p in parameters]
        length = torch.cat([g.flatten() for g in grads]).norm()
        shifts = [0.05 * g / (length + 1e-12) for g in grads]
        with torch.no_grad():
            for p, shift in zip(parameters, shifts, strict=True):
                p.add_(shift)
                p.grad = None
        second = entropy_of_the_code(net(x))[kept]
        second[second.detach() < margin].mean().backward()
        with torch.no_grad():
            for p, shift in zip(parameters, shifts, strict=True):
                p.sub_(shift)
    step()
    state["optimizer"].zero_grad()
    return z.detach()


@pytest.mark.parametrize("name", ["come", "come_eata", "come_sar"])
def test_come_by_hand(name: str) -> None:
    """Five batches in double precision; margins that divide the images of every batch."""
    case, margin, lr = Case("sar_resnet_loud", torch.float64), 0.62, 0.02
    changes: dict[str, Any] = {"optim": {"lr": lr}, "mode": "eval"}
    if name != "come":
        changes["margin"] = margin
    if name == "come_eata":
        changes |= {"similarity": 0.6, "fisher_weight": 0.0}
    live = {"backbone": Backbone(case.net()), "seed": 0, "num_classes": 10}
    method: Any = build(strategy_node(name, **changes), at="strategy", **live)
    assert isinstance(method, TTAStrategy)
    method.begin_stream()
    net = case.net()
    use_batch_statistics(net)
    norms = collect_parameters(net, by_kind("bn2d"))
    learned = {n: p for n, p in norms.items() if name != "come_sar" or "layer4" not in n}
    net.requires_grad_(False)
    for p in learned.values():
        p.requires_grad_(True)
    state = {"optimizer": torch.optim.SGD(learned.values(), lr=lr, momentum=0.9)}
    for x in case.batches():
        want = come_by_hand(name, net, x, state, margin * math.log(10))
        torch.testing.assert_close(method.adapt(x), want, rtol=1e-9, atol=1e-9)
        below = int((entropy_of_the_code(want) < margin * math.log(10)).sum())
        assert name == "come" or 0 < below < len(x)
    torch.testing.assert_close(
        dict(method.backbone.net.named_parameters()), dict(net.named_parameters())
    )
