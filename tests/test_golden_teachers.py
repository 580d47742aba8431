"""PETAL and PSMT against recorded runs of the authors' code; teachers without code by formula."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from conftest import strategy_node
from golden_case import Case, both, names, optim, record, weights
from test_golden_tta import Recorded
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.stream import Batch, SourceImages
from driftline.parts.norms import collect_parameters
from driftline.parts.warmup import WarmUp
from driftline.tta import petal
from driftline.tta.becotta import Mixture, information
from driftline.tta.cotta import CoTTA
from driftline.tta.petal import PETAL, quantile, smallest_gradients
from driftline.tta.psmt import PSMT

SGD = optim({"optimizer": "SGD", "lr": 0.1, "weight_decay": 0.0})
WARMUP = WarmUp(epochs=2, batch_size=4, optim=SGD, augment="none", every=9)


class Selects:
    """Notes the thresholds of the squared gradients and how many lie below."""

    below: list[int]

    def smallest_gradients(self) -> list[Tensor]:
        masks = super().smallest_gradients()  # type: ignore[misc]
        self.below.append(sum(int(m.sum()) for m in masks))
        return masks


class RecordedPETAL(Selects, PETAL, Recorded):
    """PETAL with recorded views and masks; `parts` are the two terms of its loss."""

    parts: dict[str, list[float]]

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        self.parts["loss_entropy"].append(CoTTA.loss(self, logits, target).item())
        return super().loss(logits, target)

    def penalty(self) -> Tensor:
        value = super().penalty()
        self.parts["regulariser"].append(value.item())
        return value


@pytest.fixture
def thresholds(monkeypatch) -> list[float]:
    """The quantiles that were taken, in order."""
    taken: list[float] = []
    original = petal.quantile

    def note(values: Tensor, share: float) -> Tensor:
        taken.append((value := original(values, share)).item())
        return value

    monkeypatch.setattr(petal, "quantile", note)
    return taken


def posterior(net: torch.nn.Module) -> dict[str, Tensor]:
    """What the recorded cases start from."""
    start = dict(net.named_parameters())
    return {f"mean.{n}": p.detach().clone() for n, p in start.items()} | {
        f"variance.{n}": 1e-4 + 0.05 * p.detach().square() for n, p in start.items()
    }


SLOW = ("petal_fim_cifar_resnet_official", "petal_sres_cifar_resnet")  # 32 views a batch
LONGER = (pytest.mark.release, pytest.mark.slow)


@both
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=LONGER if n in SLOW else ()) for n in names("petal_*")]
)
def test_petal(name: str, dtype: torch.dtype, thresholds: list[float]) -> None:
    case = Case(name, dtype)
    net, hyper = case.net(), case.hyper
    method = RecordedPETAL(
        Backbone(net),
        seed=0,
        loss="sce" if hyper["loss"].startswith("symmetric") else "ce",
        threshold=hyper["ap"],
        gate="batch",
        views=hyper["n_aug"],
        average="logits",
        always_draw=False,
        restore="fisher" if "fim" in name else "random",
        quantile=hyper["perc"],
        restore_prob=hyper.get("rst", 0.0),
        reg_weight=hyper["spw"],
        clamp_variance=False,
        ema=hyper["mt"],
        steps=hyper["steps"],
        mode="train",
        rng="reference",
        view_chunk=1,
        warmup=WARMUP,
        averages=1,
        averages_from=0,
        checkpoint=None,
        update=True,
        optim=optim(hyper),
    )
    method.use_prepared(posterior(net))
    method.case, method.below = case, []
    method.parts = {"loss_entropy": [], "regulariser": []}
    student: list[Any] = []
    method.backbone.register_forward_hook(lambda *a: student.append(a[2].detach().numpy()))
    results: dict[str, Any] = {"logits": record(method, case)["logits"], "student_logits": student}
    results |= method.parts
    results |= {"fisher_threshold": thresholds, "n_below_threshold": method.below}
    results |= weights("student", method.backbone.net, case.net(), case)
    results |= weights("teacher", method.teacher.net, case.net(), case)
    case.check_all(results)
    views = hyper["n_aug"] if hyper["ap"] > 0.5 else 1  # in place of the teacher's clean pass
    images = case.info["batches"] * case.info["batch_size"]
    assert method.backbone.passes.forward == (2 + views) * images
    assert method.backbone.passes.backward == images


class RecordedPSMT(Selects, PSMT):
    """PSMT whose source images are the recorded ones, in their order."""


@both
@pytest.mark.parametrize("name", names("psmt_*"))
def test_psmt(name: str, dtype: torch.dtype, thresholds: list[float]) -> None:
    case = Case(name, dtype)
    net, hyper = case.net(), case.hyper
    size = case.info["batch_size"]
    method = RecordedPSMT(
        Backbone(net),
        seed=0,
        augmented=False,
        threshold=hyper["ap"],
        views=hyper["n_augmentations"],
        quantile=hyper["perc"],
        fisher_weight=hyper["fisher_alpha"],
        fisher_images=10_000,
        fisher_batch=size,
        ema=hyper["m_teacher"],
        steps=hyper["steps"],
        mode="eval",
        rng="reference",
        view_chunk=1,
        optim=optim(hyper),
    )

    def batches(size: int, *, epoch=None, start=0, augment="none"):
        for x, y in case.source(size)[start:]:
            yield Batch(x, y, y, y)

    artefact = method.prepare(SourceImages(32, "recorded", "recorded", batches), NoProgress())
    method.use_prepared(artefact)
    passes = method.backbone.passes
    assert (passes.forward, passes.backward) == (32, 32)
    method.below = []
    student: list[Any] = []
    method.backbone.register_forward_hook(lambda *a: student.append(a[2].detach().numpy()))
    results: dict[str, Any] = record(method, case)
    results |= {"student_logits": student, "threshold": thresholds}
    results["n_below_threshold"] = method.below
    results["fisher_l2"] = [f.double().norm().item() for f in method.fisher]
    results |= weights("student", method.backbone.net, case.net(), case)
    results |= weights("teacher", method.teacher.net, case.net(), case)
    case.check_all(results)
    images = case.info["batches"] * size
    assert passes.forward - 32 == 2 * images and passes.backward - 32 == images


@pytest.mark.parametrize("share", [0.0, 0.003, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("zeros", [0, 50])
def test_the_quantile_is_between_two_values_and_ends_at_the_largest(share: float, zeros: int):
    values = torch.rand(777, generator=torch.Generator().manual_seed(1))
    values[:zeros] = 0
    assert quantile(values, share).item() == pytest.approx(values.quantile(share).item(), abs=1e-7)
    assert quantile(values[:1], share) == values[0]


def test_nothing_returns_where_more_than_the_share_has_no_gradient():
    a, b, c = (torch.nn.Parameter(torch.ones(n)) for n in (10, 2, 3))
    a.grad, b.grad = torch.tensor([0.0] * 5 + [1, 2, 3, 4, 5]), torch.tensor([-6.0, 0.5])
    assert not any(mask.any() for mask in smallest_gradients([a, b, c], 0.3))
    masks = smallest_gradients([a, b, c], 0.5)
    assert [int(m.sum()) for m in masks] == [5, 1, 0] and masks[1].tolist() == [False, True]


def network(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 5),
    )  # fmt: skip
    net[1].running_mean.normal_(0, 0.1)
    net[1].running_var.uniform_(0.5, 2)
    return Backbone(net.eval())


def make(backbone: Backbone, strategy: str = "petal", **options: Any) -> Any:
    return build(strategy_node(strategy, **options), at="strategy", backbone=backbone, seed=0)


def labelled(images: int = 8, side: int = 8) -> SourceImages:
    g = torch.Generator().manual_seed(3)
    x, y = torch.rand(images, 3, side, side, generator=g), torch.arange(images) % 5

    def batches(size: int, *, epoch=None, start=0, augment="none"):
        for i in range(start, -(-images // size)):
            part = slice(i * size, (i + 1) * size)
            yield Batch(x[part], y[part], y[part], y[part])

    return SourceImages(images, "random images", "random", batches)


class NoProgress:
    say = staticmethod(lambda text: None)

    def load(self) -> None:
        return None

    def save(self, state: Any) -> None:
        pass


def test_the_posterior_is_the_mean_and_variance_of_the_weights_on_the_way():
    """Against a loop of plain steps in evaluation mode, averaged after epochs 1 and 2."""
    plain, source = network(), labelled()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    seen: list[dict[str, Tensor]] = []
    for epoch in range(3):
        for batch in source.batches(4, epoch=epoch):
            loss = torch.nn.functional.cross_entropy(plain(batch.x), batch.y)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
        seen.append({n: p.detach().clone() for n, p in plain.net.named_parameters()})
    warmup = {"epochs": 3, "batch_size": 4, "optim": {"lr": 0.1, "weight_decay": 0.0}}
    options = {"warmup": warmup, "averages": 1, "averages_from": 1, "reg_weight": 0.1}
    artefact = make(network(), **options).prepare(source, NoProgress())
    for name in seen[0]:
        both_ = torch.stack([seen[1][name], seen[2][name]])
        close = {"rtol": 1e-4, "atol": 5e-7}  # a difference of averages
        torch.testing.assert_close(artefact[f"mean.{name}"], both_.mean(0), **close)
        variance = both_.var(0, correction=0)
        torch.testing.assert_close(artefact[f"variance.{name}"], variance, **close)
    method = make(network(), **options)
    method.use_prepared(artefact)
    for copy in (method.backbone, method.teacher, method.anchor):
        assert torch.equal(copy.net[5].weight, artefact["mean.5.weight"])
    assert method.penalty() == 0
    still = make(network(), **options, update=False)
    still.use_prepared(artefact)
    (x, *_) = next(source.batches(4))
    assert torch.equal(still.adapt(x), method.predict(x)) and not still.updated_parameters()
    assert torch.equal(still.predict(x), method.predict(x))


def test_the_authors_files_are_read_and_negative_variances_can_be_cut(tmp_path):
    net = network(1).net
    state = net.state_dict()
    torch.save(state, tmp_path / "Standard_swa.pt")
    torch.save({k: v - v**2 for k, v in state.items()}, tmp_path / "Standard_cov.pt")
    path = str(tmp_path / "Standard_swa.pt")
    kept, cut = (make(network(), checkpoint=path, clamp_variance=c) for c in (False, True))
    assert kept.preparation() is None and torch.equal(kept.anchor.net[0].weight, net[0].weight)
    for (weight, _), one, other in zip(kept.restorable, kept.variances, cut.variances, strict=True):
        torch.testing.assert_close(one.detach(), (weight - weight**2).detach())
        assert torch.equal(other, one.clamp_min(0))
    with pytest.raises(UserError, match="ends in _swa.pt"):
        make(network(), checkpoint=str(tmp_path / "Standard_cov.pt"))
    (tmp_path / "Standard_cov.pt").unlink()
    with pytest.raises(UserError, match=r"strategy.checkpoint=.*Standard_cov.pt"):
        make(network(), checkpoint=path)


def test_a_penalty_without_a_posterior_is_refused():
    with pytest.raises(UserError, match="there is none: set strategy.warmup"):
        make(network(), warmup=None)
    assert make(network(), warmup=None, reg_weight=0.0).preparation() is None
    with pytest.raises(UserError, match="leaves no epoch to average in"):
        make(network(), averages_from=2)


def test_psmt_with_views_learns_from_one_and_averages_many():
    """`augmented=true`, by the formulas of the comments in the code; not checked against a run."""
    method = make(network(3), "psmt", augmented=True, threshold=2.0, views=2, fisher_images=6)
    turns = iter((1, 2, 3))  # two for the target, one for the student
    method.augment = lambda x: x.flip(3) * 0.5 ** next(turns)
    artefact = method.prepare(labelled(), NoProgress())
    method.use_prepared(artefact)
    method.begin_stream()
    (x, *_) = next(labelled().batches(8))
    plain = network(3)
    with torch.no_grad():  # batch statistics
        plain.net[1].train()
        target = (plain(x.flip(3) * 0.5) + plain(x.flip(3) * 0.25)) / 2
        student, view = plain(x), plain(x.flip(3) * 0.125)

    def sce(z: Tensor) -> Tensor:
        there = -(target.softmax(1) * z.log_softmax(1)).sum(1)
        return (there - (z.softmax(1) * target.log_softmax(1)).sum(1)).mean() / 2

    losses: list[Tensor] = []
    original = method.loss
    method.loss = lambda *a: losses.append(original(*a)) or losses[-1]
    torch.testing.assert_close(method.adapt(x), target + student)
    torch.testing.assert_close(losses[0].detach(), (sce(student) + sce(view)) / 2)


def test_psmt_measures_at_most_so_many_source_images_and_pairs_masks_by_name():
    method = make(network(3), "psmt", fisher_images=6, fisher_batch=4)
    sizes: list[int] = []
    handle = method.backbone.register_forward_hook(lambda m, x, out: sizes.append(len(x[0])))
    method.prepare(labelled(8), None)
    handle.remove()
    assert sizes == [4, 2]
    net = timm.create_model("test_vit", num_classes=5, img_size=32)
    torch.nn.init.normal_(net.cls_token)
    method = make(Backbone(net), "psmt", quantile=0.3, ema=0.5, fisher_weight=0.0)
    start = {n: p.clone() for n, p in method.teacher.net.named_parameters()}
    method.adapt(torch.rand(4, 3, 32, 32))
    student = dict(method.backbone.net.named_parameters())
    masks = dict(zip(collect_parameters(method.backbone.net), method._small, strict=True))
    for name, after in method.teacher.net.named_parameters():
        if name not in masks:
            assert torch.equal(after, start[name])
        elif masks[name].any():
            small = masks[name]
            assert torch.equal(after[small], start[name][small])  # the source, by the student
            assert torch.equal(student[name][small], start[name][small])


# ------------------------------------------------------------------------------ VDP, by formula


def test_vdp_is_the_two_prompts_the_teacher_and_the_penalty():
    """Two batches with a jump of the confidence between them, against the formulas written out."""
    backbone = network(2)
    backbone.input_size = 8
    method = make(backbone, "vdp", jump=0.0, reg_weight=3.0, ema=0.9, share=0.5,
                  optim={"kind": "sgd", "lr": 0.5, "rates": {"agnostic": 0.25}})  # fmt: skip
    method.augment = lambda x: x.flip(3)
    method.begin_stream()
    (a, _, _, _), (b, _, _, _) = labelled().batches(4)
    specific, agnostic = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    teacher_, begin, sensitivity = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    net = network(2)

    def scores(x: Tensor, prompt: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, 2:6, 2:6] = x[:, :, 2:6, 2:6] + prompt
        return net(x)

    for step, x in enumerate((a, b)):
        if step:  # a new domain: where the agnostic prompt went in the first one
            sensitivity, begin = agnostic**2, agnostic.clone()
        specific.requires_grad_(), agnostic.requires_grad_()
        logits = scores(x, specific + agnostic)
        target = scores(x.flip(3), teacher_).detach()
        loss = -(target.softmax(1) * logits.log_softmax(1)).sum(1).mean()
        loss = loss + 3.0 * (sensitivity * (agnostic - begin) ** 2).sum()
        to_specific, to_agnostic = torch.autograd.grad(loss, (specific, agnostic))
        mine = method.adapt(x)
        torch.testing.assert_close(mine, logits.detach(), rtol=1e-5, atol=1e-6)
        specific = (specific - 0.5 * to_specific).detach()
        agnostic = (agnostic - 0.25 * to_agnostic).detach()
        teacher_ = 0.9 * teacher_ + 0.1 * (specific + agnostic)
        close = {"rtol": 1e-4, "atol": 1e-7}
        torch.testing.assert_close(method.prompts["specific"].detach(), specific, **close)
        torch.testing.assert_close(method.prompts["agnostic"].detach(), agnostic, **close)
        torch.testing.assert_close(sum(method.averaged.values()).detach(), teacher_, **close)
    assert method.report() == {"domains_noticed": 2.0} and method.sensitivity.abs().sum() > 0
    method.reset()
    assert method.report() == {"domains_noticed": 1.0} and not method.prompts["agnostic"].any()


def test_vdp_starts_the_specific_prompt_anew_and_refuses_other_sizes():
    backbone = network(2)
    backbone.input_size = 8
    method = make(backbone, "vdp", jump=0.2, forget_specific=True)
    for confidence, domains in ((0.5, 1), (0.6, 1), (0.9, 2), (0.8, 2)):
        method.prompts["specific"].data.fill_(1.0)
        method.notice(torch.tensor(confidence))
        assert int(method.domains) == domains
        assert bool(method.prompts["specific"].any()) == (confidence != 0.9)
    with pytest.raises(UserError, match="prompts for images of 8 pixels"):
        method.predict(torch.rand(2, 3, 9, 8))


# ------------------------------------------------------------------------------ LSA, by formula


def long_tailed(classes: int = 5, images: int = 200) -> SourceImages:
    """Images of one colour per class; twice as many of each class as of the next."""
    g = torch.Generator().manual_seed(3)
    p = 0.5 ** torch.arange(classes)
    y = torch.multinomial(p, images, replacement=True, generator=g)
    colours = torch.rand(classes, 3, 1, 1, generator=g)
    x = colours[y] + 0.3 * torch.randn(images, 3, 8, 8, generator=g)

    def batches(size: int, *, epoch=None, start=0, augment="none"):
        for i in range(start, -(-images // size)):
            part = slice(i * size, (i + 1) * size)
            yield Batch(x[part], y[part], y[part], y[part])

    return SourceImages(images, "coloured", "coloured", batches)


def made(strategy: str, backbone: Backbone, **options: Any) -> Any:
    node = strategy_node(strategy, **options)
    return build(node, at="strategy", backbone=backbone, seed=0, num_classes=5)


def test_lsa_reads_the_degree_and_shifts_every_network_of_the_method_inside():
    method = made("lsa", network(), inner=strategy_node("cotta", views=1, threshold=0.0), ema=0.75)
    prior = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    method.log_prior.copy_(prior.log())
    for degree in (-1.0, -0.3, 0.0, 0.8, 1.0):
        of_degree = prior**degree / (prior**degree).sum()
        assert method.imbalance(of_degree).item() == pytest.approx(degree, abs=1e-5)
    assert method.imbalance(prior**3 / (prior**3).sum()) == 1
    method.begin_stream()
    (x, *_) = next(long_tailed().batches(8))
    plain = network().net
    plain[1].train()
    expected = plain(x).detach()  # the adapter starts without effect
    torch.testing.assert_close(method.adapt(x), expected)
    estimate = 0.75 * torch.full((5,), 0.2) + 0.25 * expected.softmax(1).mean(0)
    torch.testing.assert_close(method.estimate, estimate)
    logs, axis = estimate.log(), prior.log() - prior.log().mean()
    slope = (axis * (logs - logs.mean())).sum() / (axis**2).sum()
    torch.testing.assert_close(method.shift.degree, slope)
    with torch.no_grad():
        method.shift.out.bias[-5:] = torch.arange(5.0)
    shifted = method.inner.teacher(x) - method.inner.anchor(x)
    assert method.inner.teacher.net[5] is not method.backbone.net[5]
    with torch.no_grad():
        method.shift.out.bias[-5:] = 0
    torch.testing.assert_close(method.inner.teacher(x) - method.inner.anchor(x), shifted)


def test_lsa_learns_the_classifier_of_each_label_distribution():
    """Scores follow the degree: more of the frequent classes at 1 than at -1."""
    backbone, source = network(), long_tailed()
    options = {"warmup": {"epochs": 60, "batch_size": 50, "optim": {"lr": 0.01}}}
    method = made("lsa", backbone, inner=strategy_node("source"), **options)
    weights_ = {k: v.clone() for k, v in backbone.net.state_dict().items()}
    artefact = method.prepare(source, NoProgress())
    assert all(torch.equal(v, weights_[k]) for k, v in backbone.net.state_dict().items())
    method.use_prepared(artefact)
    counts = torch.bincount(next(source.batches(200)).y, minlength=5) + 1.0
    torch.testing.assert_close(method.log_prior, (counts / counts.sum()).log())
    (x, *_) = next(source.batches(200))
    frequent = []
    for degree in (-1.0, 0.0, 1.0):
        method.shift.degree.fill_(degree)
        frequent.append(method.predict(x).softmax(1)[:, 0].mean().item())
    assert frequent[0] < frequent[1] < frequent[2]
    assert frequent[2] == pytest.approx(counts[0].item() / counts.sum().item(), abs=0.1)


def test_lsa_on_a_balanced_source_shifts_nothing():
    method = made("lsa", network())
    assert method.imbalance(torch.tensor([0.9, 0.1, 0.0, 0.0, 0.0])) == 0


# ------------------------------------------------------------------------------ BECoTTA, by formula


def vit() -> Backbone:
    torch.manual_seed(0)
    net = timm.create_model("test_vit", num_classes=5, img_size=32).eval()
    torch.nn.init.normal_(net.head.weight, std=0.3)
    return Backbone(net)


@pytest.mark.parametrize("legacy", [False, True])
def test_experts_are_mixed_by_the_router_of_the_domain(legacy: bool):
    """Image by image and expert by expert."""
    g = torch.Generator().manual_seed(1)
    mixture = Mixture(8, 4, 2, 3, legacy=legacy, numbers=g)
    for p in mixture.parameters():
        torch.nn.init.normal_(p, generator=g)
    x, domain = torch.randn(3, 5, 8, generator=g), torch.tensor([0, 3, 1])
    gates = mixture.gates(x, domain, None)
    mixed = mixture(x, gates)
    sums = [(x[i] @ mixture.routers[d][:4].T).sum(0) for i, d in enumerate(domain)]
    best = torch.stack([s.topk(2).values for s in sums])
    for i, s in enumerate(sums):
        index, shares = s.topk(2).indices.tolist(), best[i].softmax(0)
        if legacy:
            index, shares = [0, 1], ((best - best.min()) / (best.max() - best.min()))[0].softmax(0)
        out = x[i].clone()
        for e, share in zip(index, shares, strict=True):
            inner = torch.nn.functional.gelu(x[i] @ mixture.down[e].T + mixture.down_bias[e])
            out = out + share * (inner @ mixture.up[e].T + mixture.up_bias[e])
        torch.testing.assert_close(mixed[i], out, rtol=1e-4, atol=1e-4)
    (slope,) = torch.autograd.grad(mixed.sum(), mixture.routers, allow_unused=True)
    assert (slope is None) == legacy


def test_information_is_that_of_domain_and_expert():
    domain = torch.tensor([0, 0, 1, 1])
    apart = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert information(apart, domain).item() == pytest.approx(0.6931472)
    assert information(torch.full((4, 2), 0.5), domain).item() == pytest.approx(0, abs=1e-6)


def test_becotta_learns_from_own_labels_where_it_is_sure_and_from_the_frozen_network_else():
    method = made("becotta", vit(), blocks=2, noise=False, optim={"lr": 0.01}, restore_prob=0.5,
                  confidence=0.5, warmup={"epochs": 2, "batch_size": 8})  # fmt: skip
    method.use_prepared(method.prepare(labelled(side=32), NoProgress()))
    method.begin_stream()
    (x, *_) = next(labelled(side=32).batches(8))
    frozen = vit()(x).softmax(1)
    torch.testing.assert_close(method.scores(x, on=False).softmax(1), frozen)
    own, mirrored = method.predict(x).softmax(1), method.predict(x.flip(3)).softmax(1)
    keeps = (own.amax(1) > 0.5) & (own.amax(1) >= frozen.amax(1))
    assert keeps.any() and not keeps.all()
    target = torch.where(keeps[:, None], (own + mirrored) / 2, frozen)
    torch.testing.assert_close(method.target(x), target.detach())
    before = method.backbone.passes.forward
    method.adapt(x)
    assert method.backbone.passes.forward - before == 4 * 8
    back = [torch.isclose(p, s).float().mean() for p, s in zip(method.mixtures.parameters(),
            method.start, strict=True)]  # fmt: skip
    assert 0.3 < torch.stack(back).mean() < 0.9
    with pytest.raises(UserError, match="more than strategy.experts"):
        made("becotta", vit(), experts=2, selected=3)
