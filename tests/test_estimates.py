"""Accuracy estimated without labels: the formulas, where dropout goes, and what a run says."""

from __future__ import annotations

import math

import pytest
import timm
import torch
import torchvision
from conftest import copied, equal
from test_runs import Kill, records, stop_after
from torch import nn

from driftline.backbones.embedded import embedded_resnet, embedded_vit_head
from driftline.core.errors import UserError
from driftline.core.estimates import Estimates, aetta, stages
from driftline.runs.execute import run_experiment

TINY = ["scenario.images=12", "scenario.corruptions=[contrast,fog]", "scenario.batch_size=4"]
TINY += ["scenario.probe_images=0", "scenario.clean_images=0"]


def test_aetta_by_hand():
    """Two passes over two images of three classes; numbers by hand."""
    p = torch.tensor([[[0.8, 0.1, 0.1], [0.2, 0.7, 0.1]], [[0.6, 0.3, 0.1], [0.7, 0.2, 0.1]]])
    answers = torch.tensor([0, 1])  # one of four predictions differs: e = 0.25
    mean = (0.575, 0.325, 0.1)
    entropy = -sum(q * math.log(q + 1e-6) for q in mean)
    corrected = min(0.25 / (entropy / math.log(3)) ** 3, 2 / 3)
    assert aetta(answers, p, None).item() == pytest.approx(0.6 * 0.25 + 0.4 * corrected)
    second = aetta(answers, p, torch.tensor(0.5, dtype=torch.float64))
    assert second.item() == pytest.approx(0.6 * 0.5 + 0.4 * corrected)
    sure = torch.tensor([[[1.0, 0.0, 0.0]]])  # collapsed: entropy 0
    assert aetta(torch.tensor([1]), sure, None).item() == pytest.approx(0.6 + 0.4 * 2 / 3)
    assert aetta(torch.tensor([0]), sure, None).item() == 0


def test_dropout_goes_behind_about_four_stages_of_any_network():
    with torch.device("meta"):
        vit, resnet = embedded_vit_head(), embedded_resnet()
        deep = timm.create_model("vit_tiny_patch16_224", num_classes=3)
        swin = torchvision.models.swin_t()
    assert stages(resnet) == [resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4]
    assert stages(vit) == list(vit.blocks)  # three
    assert stages(deep) == [deep.blocks[i] for i in (2, 5, 8, 11)]
    assert len(stages(swin)) == 4
    assert stages(nn.Sequential(nn.Flatten(), nn.Linear(2, 2))) == []  # not behind the scores


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Results that the runs here are compared with are made once."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def run(configure, shared):
    return lambda *words: run_experiment(configure(f"root={shared}", *TINY, *words), [])


def rows(summary: dict) -> list[dict]:
    return records(summary["run"]["folder"])["batches"]


def bare(found: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("estimate")} for row in found]


def test_a_run_with_estimates_is_the_same_run_and_counts_their_passes(run):
    """With a method that draws random numbers and asks a copy of the network."""
    words = ["strategy=cotta", "strategy.threshold=0", "strategy.optim.lr=0.1"]
    plain, both = run(*words), run(*words, "estimate=accuracy", "estimate.passes=3")
    assert bare(rows(both)) == rows(plain)
    cost = ("forward_images", "backward_images", "images")
    assert [both["cost"][k] for k in cost] == [plain["cost"][k] for k in cost]
    assert both["cost"]["estimate_forward_images"] == 24 * 3 + 20 * 1
    metrics = both["metrics"]
    assert {k: v for k, v in metrics.items() if "estimate" not in k} == plain["metrics"]
    shown = rows(both)
    assert "estimate_agreement" not in shown[0] and "estimate_agreement" in shown[1]
    estimates = [row["estimate_aetta"] for row in shown]
    truths = [100 * (1 - row["wrong"] / row["n"]) for row in shown]
    distances = [abs(e - t) for e, t in zip(estimates, truths, strict=True)]
    assert metrics["estimate/aetta"] == pytest.approx(sum(estimates) / 6)
    assert metrics["estimate/aetta_mae"] == pytest.approx(sum(distances) / 6)
    assert len(set(estimates)) > 1  # dropout reaches the teacher, which answers


def test_a_method_that_stands_still_agrees_with_itself(run):
    metrics = run("strategy=source", "estimate=accuracy", "estimate.kinds=[agreement]")["metrics"]
    assert metrics["estimate/agreement"] == 100 and "estimate/aetta" not in metrics


def test_estimates_resume_to_the_last_bit(run, monkeypatch):
    words = ["strategy=tent", "strategy.optim.lr=0.1", "estimate=accuracy", "estimate.passes=2"]
    words += ["checkpoint.every=1"]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Kill):
            run(*words)
    again = run(*words)
    whole = run(*words, "on_exists=rerun")
    assert rows(again) == rows(whole) and again["metrics"] == whole["metrics"]
    assert whole["metrics"]["estimate/agreement"] < 100  # the learning rate is large


def test_images_without_a_label_have_no_part_in_the_truth():
    """A batch that has none of known classes has an estimate and no distance."""
    settings = {"passes": 1, "rate": None, "after": None, "label_space": "imagenet1k"}
    estimates = Estimates(kinds=["agreement"], **settings)
    assert estimates.rate == 0.2
    scores = torch.eye(3)
    for y in ([0, -1, 0], [-1, -1, -1]):
        estimates._earlier = torch.tensor([0, 1, 0])
        row = estimates.after(scores, torch.tensor(y))
        assert row["estimate_agreement"].item() == pytest.approx(200 / 3)
    assert estimates.summary() == {
        "estimate/agreement": pytest.approx(200 / 3),
        "estimate/agreement_mae": pytest.approx(100 * (2 / 3 - 1 / 2)),
    }
    other = Estimates(kinds=["agreement"], **settings)
    other.restore(copied(estimates.snapshot()))
    assert equal(other.snapshot(), estimates.snapshot())


def test_a_network_without_known_stages_or_with_other_names_is_said(run, configure):
    words = ("strategy=simplecil", "scenario=split_cifar")
    with pytest.raises(UserError, match="estimate.after: the network has no module 'layer5'; did"):
        run("strategy=source", "estimate=accuracy", "estimate.after=[layer5]")
    with pytest.raises(UserError, match="estimate=accuracy is for test-time adaptation"):
        run_experiment(configure(*words, "estimate=accuracy"), [])
