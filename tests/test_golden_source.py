"""Methods that use labelled source images, against numbers recorded from the reference code.

See test_golden_tta.py. The recorded source batches come in file order, again and again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import copied, equal
from golden_case import Case, both, names, names_in, optim, record, weights
from torch import Tensor

import driftline
from driftline.backbones.backbone import Backbone
from driftline.core.build import locate
from driftline.core.errors import UserError
from driftline.core.stream import Batch, ShiftStream, Skipped, SourceImages
from driftline.parts.norms import collect_parameters
from driftline.parts.replay import Replay
from driftline.runs.execute import _source_facts
from driftline.tta.gtta import GTTA
from driftline.tta.rmt import RMT
from driftline.tta.santa import SANTA


class NoProgress:
    """A preparation that is never interrupted."""

    def load(self) -> None:
        return None

    def save(self, state: Any) -> None:
        pass

    def say(self, text: str) -> None:
        pass


def source(case: Case) -> SourceImages:
    def batches(size: int, *, epoch=None, start=0, augment="none") -> Iterator[Batch]:
        for x, y in case.source(size)[start:]:
            yield Batch(x, y, torch.zeros_like(y), torch.zeros_like(y))

    return SourceImages(32, "recorded", "recorded", batches)


class Watched:
    """Recorded views in place of random ones; notes the contrastive losses."""

    case: Case
    turn = 0
    contrasts: list[float]

    def watch(self, case: Case) -> None:
        self.case, self.contrasts = case, []
        for name, p in self.contrast.projector.named_parameters():
            p.data.copy_(torch.from_numpy(case.data[f"projector/{name}"]))
        self.contrast.register_forward_hook(lambda *a: self.contrasts.append(a[2].item()))

    def augment(self, x: Tensor) -> Tensor:
        view = self.case.view(x, self.turn % len(self.case.data["view_scale"]))
        self.turn += 1
        return view


class WatchedRMT(Watched, RMT):
    replayed: list[float]

    def replay_loss(self, batch: Batch) -> Tensor:
        loss = super().replay_loss(batch)
        self.replayed.append(loss.item())
        return loss


class WatchedSANTA(Watched, SANTA):
    pass


def contrast_options(case: Case) -> dict[str, Any]:
    return {
        "seed": 0,
        "self_training_weight": case.hyper["lambda_ce_trg"],
        "contrast_weight": case.hyper["lambda_cont"],
        "temperature": case.hyper["temperature"],
        "projection": case.hyper["projection_dim"],
        "source_batch": 16,
        "prototype_images": 100,
        "steps": 1,
        "optim": optim(case.hyper),
    }


def projector(method: Any, start: dict[str, Tensor], case: Case) -> dict[str, Any]:
    now = {n: p.detach().double() for n, p in method.contrast.projector.named_parameters()}
    assert list(now) == case.info["projector_param_names"]
    return {
        "projector_l2": [p.norm().item() for p in now.values()],
        "projector_moved": [(p - start[n].double()).norm().item() for n, p in now.items()],
    }


def start_of(method: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in method.contrast.projector.named_parameters()}


@both
@pytest.mark.parametrize("name", names("rmt_*"))
def test_rmt(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)

    def make() -> WatchedRMT:
        method = WatchedRMT(
            Backbone(case.net()),
            ema=case.hyper["m_teacher"],
            replay_weight=case.hyper["lambda_ce_src"],
            warmup_images=16 * case.hyper["warmup_steps"],
            update=True,
            **contrast_options(case),
        )
        method.watch(case)
        method.replayed = []
        return method

    method = make()
    start = start_of(method)
    artefact = make().prepare(source(case), NoProgress())
    method.use_prepared(artefact)
    method.use_source(source(case))
    results: dict[str, Any] = {"prototypes": artefact["prototypes"].numpy()}
    warmed = weights("student", method.backbone.net, case.net(), case)
    results |= {k.replace("student", "student_after_warmup"): v for k, v in warmed.items()}
    results |= record(method, case) | {"contrastive_loss": method.contrasts}
    results["loss"] = np.asarray(results["loss"]) + (method.replayed or 0)
    results |= weights("student", method.backbone.net, case.net(), case)
    results |= weights("teacher", method.teacher.net, case.net(), case)
    case.check_all(results | projector(method, start, case))


@both
@pytest.mark.parametrize("name", names("santa_*"))
def test_santa(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    method = WatchedSANTA(Backbone(case.net()), layers="norm", **contrast_options(case))
    method.watch(case)
    start = start_of(method)
    adapted = [n for n, p in method.backbone.net.named_parameters() if p.requires_grad]
    assert adapted == names_in(case.info["adapted_parameters"])
    artefact = method.prepare(source(case), NoProgress())
    method.use_prepared(artefact)
    results: dict[str, Any] = {"prototypes": artefact["prototypes"].numpy()}
    results |= record(method, case) | {"contrastive_loss": method.contrasts}
    results |= weights("p", method.backbone.net, case.net(), case)
    case.check_all(results | projector(method, start, case))


class WatchedGTTA(GTTA):
    """Notes losses, a NaN for a step without any, pseudo-labels and average confidences."""

    def watch(self) -> None:
        self.losses: list[float] = []
        self.labels: list[Any] = []
        self.averages: list[float] = []

    def pseudo_labels(self, scores: Tensor) -> Tensor:
        labels = super().pseudo_labels(scores)
        self.labels.append(labels.numpy())
        self.averages.append(self.confidence.item())
        return labels

    def learn(self, x: Tensor, y: Tensor) -> Tensor:
        before = len(self.losses)
        scores = super().learn(x, y)
        if len(self.losses) == before:
            self.losses.append(np.nan)
        return scores

    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        value = super().loss(logits, y)
        self.losses.append(value.item())
        return value


@both
@pytest.mark.parametrize("name", names("gtta_*"))
def test_gtta(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    net, steps = case.net(), case.hyper["steps"]
    method = WatchedGTTA(
        Backbone(net),
        seed=0,
        optim=optim(case.hyper),
        mix=case.hyper["lambda_mixup"],
        confidence_start=case.hyper["avg_conf_start"],
        confidence_momentum=case.hyper["conf_momentum"],
        on_empty="momentum",
        source_batch=case.hyper["source_batch"],
        steps=steps,
    )
    method.watch()
    method.use_source(source(case))
    assert list(collect_parameters(net)) == names_in(case.info["adapted_parameters"])
    results: dict[str, Any] = {"logits": record(method, case)["logits"]}
    pairs = np.asarray(method.losses).reshape(len(case.batches()), steps, 2)
    results |= {"loss_source": pairs[..., 0], "loss_target": pairs[..., 1]}
    results |= {"avg_conf": method.averages}
    assert np.array_equal(method.labels, case.data["pseudo_labels"])
    empty = (case.data["pseudo_labels"] < 0).all(1).sum()
    assert method.report() == {"batches_without_pseudo_label": empty}
    case.check_all(results | weights("p", net, case.net(), case))


# ------------------------------------------------------------------------------ behaviour


class Notes(NoProgress):
    """Keeps what is saved; dies at a given save."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.kept: Any = None
        self.said: list[str] = []
        self.left = dies_at

    def load(self) -> Any:
        return self.kept

    def save(self, state: Any) -> None:
        self.kept = copied(dict(state))
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def say(self, text: str) -> None:
        self.said.append(text)


def noise(classes: int = 10) -> SourceImages:
    """24 images of `classes` classes, in another order in every pass."""
    x = torch.rand(24, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(24) % classes

    def batches(size: int, *, epoch=None, start=0, augment="none") -> Iterator[Batch]:
        order = torch.randperm(24, generator=torch.Generator().manual_seed(epoch or 0))
        for rows in order.split(size)[start:]:
            yield Batch(x[rows], y[rows], rows, torch.zeros_like(rows))

    return SourceImages(24, "noise", "noise", batches)


def network(model: str = "test_resnet") -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(model, num_classes=10)


def stream(batches: int = 4) -> list[Tensor]:
    return list(torch.rand(4 * batches, 3, 64, 64).split(4))


def test_the_replay_goes_through_the_source_again_and_again_and_resumes_anywhere():
    def replay() -> Replay:
        return Replay(7, torch.Generator().manual_seed(3), strategy="mine")

    whole = replay()
    whole.use(noise())
    rows = [whole.next().index for _ in range(10)]  # four batches a pass
    passes = [torch.cat(rows[i : i + 4]) for i in (0, 4)]
    assert all(torch.equal(p.sort().values, torch.arange(24)) for p in passes)
    assert not torch.equal(*passes)
    for cut in range(10):
        first, second = replay(), replay()
        first.use(noise())
        for _ in range(cut):
            first.next()
        second.load_state_dict(first.state_dict())
        second.numbers.set_state(first.numbers.get_state())
        second.use(noise())
        for want in rows[cut:]:
            assert torch.equal(second.next().index, want)
    state = replay().state_dict()
    whole.load_state_dict(state)  # as a reset does: a new pass, in an order not seen before
    fresh = torch.cat([whole.next().index for _ in range(4)])
    assert torch.equal(fresh.sort().values, torch.arange(24))
    assert not any(torch.equal(fresh, p) for p in passes)


def test_source_images_that_are_replayed_tell_runs_apart(configure):
    stream = ShiftStream("s", 10, [], [], {}, Skipped(), source=noise)
    inside = ("unmix_tns", "strategy@strategy.inner=gtta")
    for words, want in ((["gtta"], ["noise"]), (inside, ["noise"]), (["tent"], [])):
        cfg = configure(f"strategy={words[0]}", *words[1:])
        assert _source_facts(cfg, locate(cfg.strategy._target_), stream) == want


@pytest.mark.parametrize("rules", [[], ["reset_every"]], ids=["plain", "rule"])
@pytest.mark.parametrize("name", ["rmt", "gtta"])
def test_a_method_that_lacks_its_source_says_so(name, rules):
    options = {"warmup_images": 0} if name == "rmt" else {}
    method = driftline.make(name, network(), source_batch=8, around=rules, **options)
    (x,) = stream(1)
    with pytest.raises(UserError, match=rf"strategy={name}.*driftline.prepare\(method, source\)"):
        method.adapt(x)
    method.use_source(noise())
    if name == "rmt":
        with pytest.raises(UserError, match="before its stream: driftline.prepare"):
            method.adapt(x)
        other = driftline.make(name, network(), source_batch=8, **options)
        method.use_prepared(other.prepare(noise(), Notes()))
        method.begin_stream()
    assert method.adapt(x).isfinite().all()


def test_the_warm_up_of_rmt_goes_on_to_the_same_result(monkeypatch):
    monkeypatch.setattr("driftline.tta.rmt.EVERY", 2)

    def make(**options: Any) -> Any:
        options |= {"source_batch": 8, "warmup_images": 56, "kind": "adam"}
        return driftline.make("rmt", network(), **options)

    want = make().prepare(noise(), Notes())
    cut = Notes(dies_at=2)
    with pytest.raises(KeyboardInterrupt):
        make().prepare(noise(), cut)
    cut.left = None
    got = make().prepare(noise(), cut)
    assert cut.kept["steps"] == 7 and equal(got, want)
    assert not torch.equal(want["student.net.fc.weight"], want["teacher.net.fc.weight"])
    method, twin = make(), make()
    for one in (method, twin):
        one.use_prepared(want)
        one.use_source(noise())
        one.begin_stream()
    assert method.optimizer.param_groups[0]["lr"] == method.optim.lr
    held = method.optimizer.state_dict()["state"]
    assert held[0]["step"] == 7 and equal(held[0]["exp_avg"], want["optimizer.0.exp_avg"])
    (x,) = stream(1)
    still = make(update=False)
    still.use_prepared(want)
    assert torch.equal(still.adapt(x), method.predict(x)) and not still.updated_parameters()
    assert torch.equal(still.predict(x), method.predict(x))
    method.adapt(x)
    method.reset()  # the state after the warm-up, optimiser included
    assert equal(method.snapshot()["optimizers"], twin.snapshot()["optimizers"])
    assert equal(method.snapshot()["tensors"], twin.snapshot()["tensors"])


@pytest.mark.parametrize("name", ["rmt", "santa"])
def test_a_class_without_a_source_image_is_nobodys_nearest(name):
    notes = Notes()
    limit = {"warmup_images": 0} if name == "rmt" else {}
    method = driftline.make(name, network(), source_batch=8, **limit)
    artefact = method.prepare(noise(classes=7), notes)
    assert artefact["prototypes"].shape == (7, 96) and artefact["prototypes"].isfinite().all()
    assert "3 of 10 classes have no source image, and so no prototype" in notes.said
    short = driftline.make(name, network(), source_batch=8, prototype_images=15, **limit)
    few = short.prepare(noise(), Notes())["prototypes"]
    first = next(iter(noise().batches(16, epoch=0))).y
    assert len(few) == len(first.unique())  # two batches of 8 pass the limit


def test_without_a_pseudo_label_gtta_skips_the_second_step_or_makes_it_with_momentum():
    starts = {"confidence_start": 1.0, "confidence_momentum": 1.0, "kind": "sgd", "lr": 0.01}
    results = {}
    for on_empty in ("skip", "momentum"):
        method = driftline.make("gtta", network(), source_batch=8, on_empty=on_empty, **starts)
        method.use_source(noise())
        for x in stream(2):
            method.adapt(x)
        assert method.report() == {"batches_without_pseudo_label": 2}
        results[on_empty] = [p.clone() for p in method.backbone.parameters()]
    assert not equal(results["skip"], results["momentum"])


def test_gtta_mixes_each_source_image_with_the_test_image_that_agrees_most():
    method = driftline.make("gtta", network(), source_batch=8, mix=0.25)
    method.use_source(noise())
    (x,) = stream(1)
    scores = torch.eye(10)[:4] * 20  # test images 0..3 are of classes 0..3
    method._scores = lambda images: torch.eye(10)[[3, 1, 0, 2]] * 20
    mixed, y = method.mixed(x, scores)
    taken = next(iter(noise().batches(8, epoch=method.replay.order)))
    assert torch.equal(y, taken.y[:4])  # cut to the test batch
    torch.testing.assert_close(mixed, 0.25 * x[[3, 1, 0, 2]] + 0.75 * taken.x[:4])
