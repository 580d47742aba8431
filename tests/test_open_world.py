"""Unknown classes among the known ones: how well scores tell them apart, and whole runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import copied, write_images
from PIL import Image
from test_analysis import write_run
from test_runs import records
from test_streams import make
from torchvision import transforms as T

from driftline.analysis import load_runs, select
from driftline.analysis.tables import by_place, group_table
from driftline.core.errors import UserError
from driftline.core.open_world import OpenWorld, auroc, fpr95
from driftline.runs.execute import run_experiment
from driftline.streams import corruptions as C


def by_pairs(known, unknown) -> float:
    """AUROC as the definition says it."""
    return np.mean([[float(a > b) + 0.5 * (a == b) for b in unknown] for a in known])


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_the_share_of_pairs_in_order_ties_half(ties):
    rng = np.random.default_rng(ties)
    for n, m in ((1, 1), (7, 3), (40, 25)):
        known, unknown = rng.normal(1, 1, n), rng.normal(0, 1, m)
        if ties:
            known, unknown = known.round(), unknown.round()
        assert auroc(known, unknown) == pytest.approx(by_pairs(known, unknown))
    assert auroc(np.ones(3), np.zeros(2)) == 1 and auroc(np.zeros(3), np.zeros(2)) == 0.5


def test_fpr95_is_taken_where_95_percent_of_the_known_pass():
    known = np.arange(1, 21.0)  # 19 of 20 pass at 2
    assert fpr95(known, np.array([1.9, 2.0, 2.1, 50])) == 0.75
    assert fpr95(known[:10], np.array([0.9, 1.0])) == 0.5  # all have to pass
    assert fpr95(np.ones(5), np.ones(4)) == 1


LOGITS = torch.tensor(
    [[3.0, 0, 0], [0, 2.0, 0], [0, 0, 1.0], [0.5, 0, 0], [2.5, 0, 0], [0, 0, 0.1], [9.0, 9, 9]]
)
LABELS = torch.tensor([0, 1, 0, -1, -1, -1, -1])
DOMAINS = torch.tensor([0, 0, 0, 0, 0, 0, 1])


def expected(score: torch.Tensor) -> list[float]:
    """auroc, fpr95, h_score in percent; the domain of unknown images alone has no part."""
    known, unknown = score[:3].numpy(), score[3:6].numpy()
    area, right = by_pairs(known, unknown), 2 / 3
    passed = (unknown >= known.min()).mean()
    return [100 * area, 100 * passed, 100 * 2 * area * right / (area + right)]


def test_metrics_by_hand_in_any_cut_into_batches_and_through_a_checkpoint():
    probability, energy = LOGITS.double().softmax(1).amax(1), LOGITS.double().logsumexp(1)
    names = ("auroc", "fpr95", "h_score")
    hand = dict(zip(names, expected(probability), strict=True)) | {"unknown": 4}
    hand |= {f"{n}_energy": v for n, v in zip(names, expected(energy), strict=True)}
    for size in (7, 3, 1):
        meter = OpenWorld(domains=2)
        for i in range(0, 7, size):
            part = slice(i, i + size)
            meter.update(LOGITS[part], LABELS[part], DOMAINS[part], "logits")
            other = OpenWorld(domains=2)
            other.restore(copied(meter.snapshot()))
            meter = other
        assert meter.summary() == pytest.approx(hand)
    meter = OpenWorld(domains=2)
    meter.update(LOGITS.softmax(1), LABELS, DOMAINS, "probabilities")
    # A method that returns probabilities has no energy.
    assert meter.summary() == pytest.approx({k: v for k, v in hand.items() if "energy" not in k})
    assert OpenWorld(domains=2).summary() == {}


def test_scores_that_are_not_finite_look_least_known():
    scores = LOGITS.clone()
    scores[4, 0] = torch.nan
    scores[0, 0] = torch.inf
    meter = OpenWorld(domains=2)
    meter.update(scores, LABELS, DOMAINS, "logits")
    p = LOGITS.double().softmax(1).amax(1)
    p[[0, 4]] = -np.inf
    metrics = meter.summary()
    assert metrics["auroc"] == pytest.approx(100 * by_pairs(p[:3].numpy(), p[3:6].numpy()))
    assert metrics["fpr95"] == 100


# ------------------------------------------------------------------------ the stream

WORDS = ["scenario.images=20", "scenario.corruptions=[contrast,fog]", "scenario.batch_size=8"]
WORDS += ["scenario.probe_images=0", "scenario.clean_images=0"]
OPEN = [*WORDS, "scenario.unknown_share=0.25"]


def delivered(stream) -> list:
    return [batch for segment in stream.segments for batch in segment.batches()]


@pytest.mark.parametrize("order", ["continual", "mixed", "recurring+correlated"])
def test_every_batch_has_its_share_and_the_known_images_are_those_of_the_plain_stream(
    configure, order
):
    words = [f"scenario.order={order}", "scenario.rounds=2"]
    plain, mixed = (make(configure(*some, *words)) for some in (WORDS, OPEN))
    batches = delivered(mixed)
    assert mixed.open_world and not plain.open_world
    for segment in mixed.segments:
        unknown = [int((b.y < 0).sum()) for b in segment.batches()]
        assert set(unknown[:-1]) == {2} and 0 <= unknown[-1] <= 2  # of eight
        rest = [b.index.tolist() for b in segment.batches(1)]
        assert rest == [b.index.tolist() for b in segment.batches()][1:]
    known = [
        sorted((b.domain[i].item(), b.index[i].item()) for i in range(len(b.y)) if b.y[i] >= 0)
        for b in batches
    ]
    pairs = (zip(b.domain.tolist(), b.index.tolist(), strict=True) for b in delivered(plain))
    before = [pair for of_batch in pairs for pair in of_batch]
    for part in known:
        assert part == sorted(before[: len(part)])
        before = before[len(part) :]
    assert not before
    strangers = [
        (int(b.domain[i]), int(b.index[i])) for b in batches for i in range(len(b.y)) if b.y[i] < 0
    ]
    rounds = 2 if order.startswith("recurring") else 1
    assert len(set(strangers)) * rounds == len(strangers)  # none twice in a round
    assert {d for d, _ in strangers} == {0, 1}
    assert mixed.facts["unknown"] == {"share": 0.25, "images": len(strangers)}
    assert mixed.facts["fingerprint"] != plain.facts["fingerprint"] and "unknown" not in plain.facts
    assert (mixed.order["label"] < 0).sum() == len(strangers)
    assert set(mixed.order["domain"]) == {0, 1}


def test_unknown_images_get_the_size_and_the_shift_of_the_known_ones(
    configure, cifar10_c_root, tmp_path
):
    """Beside released arrays; as they are in the folder, with 40 px, none would fit in."""
    folder = tmp_path / "others"
    write_images(folder, [f"boat/{i}.png" for i in range(4)], size=40)
    small = T.Resize(32)
    levels = np.stack([small(Image.open(folder / f"boat/{i}.png")) for i in range(4)])
    expected = {
        name: C.corrupt_batch(
            torch.from_numpy(levels).permute(0, 3, 1, 2), name, 5, range(4), preset="cifar", seed=2
        )
        for name in ("gaussian_noise", "fog")
    }
    words = [f"data.root={cifar10_c_root}", "scenario=cifar10_c", *OPEN[1:], "scenario.images=10"]
    words += ["scenario.corruptions=[gaussian_noise,fog]"]
    stream = make(configure(*words, f"scenario.unknown_from={folder}"))
    batches = delivered(stream)
    shown = 0
    for batch in batches:
        for i in (batch.y < 0).nonzero().flatten().tolist():
            name = ("gaussian_noise", "fog")[batch.domain[i]]
            assert torch.equal((255 * batch.x[i]).round(), expected[name][batch.index[i]].float())
            shown += 1
    assert shown == 6
    for more, text in (
        ([f"scenario.unknown_from={folder}", "scenario.unknown_share=0.5"], "than the 4 of scen"),
        ([], "needs scenario.unknown_from: a folder of class folders"),
        (["scenario.unknown_from=/nowhere"], "/nowhere does not exist"),
        (["scenario.unknown_share=0.01"], "makes 0 of the 8 images of a batch unknown"),
        (["data.root=null", f"scenario.unknown_from={folder}"], "give data.root, or leave it out"),
    ):
        with pytest.raises(UserError, match=text):
            make(configure(*words, *more))


def test_a_frozen_model_errs_on_the_known_images_as_without_unknown_ones(configure):
    """Its answers do not depend on the batch; what it buys late is an option of the stream."""
    plain, mixed = (run_experiment(configure("strategy=source", *w), []) for w in (WORDS, OPEN))
    with_errors = {k: v for k, v in mixed["metrics"].items() if k.startswith("err")}
    assert with_errors == {k: v for k, v in plain["metrics"].items() if k.startswith("err")}
    assert mixed["metrics"]["unknown"] == 14 and 0 <= mixed["metrics"]["auroc"] <= 100
    rows = records(mixed["run"]["folder"])["batches"]
    assert sum(row["n"] for row in rows) == 40 and sum(row["unknown"] for row in rows) == 14
    assert make(configure(*WORDS, "scenario.label_delay=3")).label_delay == 3


def test_reports_show_how_unknown_classes_are_told_apart(tmp_path):
    for name, area in (("tent", 60.0), ("cotta", 70.0)):
        metrics = {"auroc": area, "fpr95": 100 - area, "h_score": 50.0, "estimate/aetta_mae": 9.0}
        write_run(tmp_path, name, metrics=metrics)
    ((_, runs),) = by_place(select(load_runs(tmp_path)))
    estimated = group_table(runs, "estimate")
    assert estimated is not None and estimated.head[2:] == ["estimate/aetta_mae ↓"]
    table = group_table(runs, "open")
    assert table is not None and table.head[2:] == ["auroc ↑", "fpr95 ↓", "h_score ↑"]
    best = {table.head[c] for (r, c), rank in table.marks.items() if r == 0 and rank == 1}
    assert best == {"auroc ↑", "fpr95 ↓"}  # of cotta
