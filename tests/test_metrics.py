"""Metrics: hand-worked matrices, numbers recorded from other code bases, invariances."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal

from driftline.core import metrics
from driftline.core.errors import UserError
from driftline.core.metrics import (
    ALEXNET,
    AccuracyMatrix,
    NearFuture,
    OnlineError,
    mean_corruption_error,
    near_future_shift,
)

GOLDEN = Path(__file__).parent / "golden" / "cl" / "metrics"


def saved(state):
    """The state after a round trip through a file that may hold plain values and tensors only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def fill(table, totals=None, learned=None, start=None) -> AccuracyMatrix:
    """A matrix from percentages; NaN cells are not recorded."""
    table = np.asarray(table, float)
    totals = totals or [100] * table.shape[1]
    matrix = AccuracyMatrix([f"c{j}" for j in range(table.shape[1])], learned)
    for i, row in enumerate([*([start] if start else []), *table], -1 if start else 0):
        for j, value in enumerate(row):
            if not math.isnan(value):
                matrix.record(i, j, round(value * totals[j] / 100), totals[j])
    return matrix


NAN = math.nan
HAND = [[80, NAN, NAN], [90, 60, NAN], [50, 75, 40]]


# ------------------------------------------------------------------------------ AccuracyMatrix


def test_hand_worked_matrix():
    got = fill(HAND, totals=[100, 200, 50]).summary()
    assert got == pytest.approx(
        {
            "acc_last": 100 * (50 + 150 + 20) / 350,
            "acc_inc": (80 + 100 * (90 + 120) / 300 + 100 * 220 / 350) / 3,
            "acc_last_macro": 55.0,
            "acc_inc_macro": (80 + 75 + 55) / 3,
            "plasticity": 60.0,
            "stability": 100 * (1 + 50 / 80 + 1) / 3,  # pairs (1,0), (2,0), (2,1)
            "forgetting": ((90 - 50) + (60 - 75)) / 2,
            "bwt": ((50 - 80) + (75 - 60)) / 2,
        }
    )


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("standard", (40 - 15) / 2),
        ("nonnegative", (40 + 0) / 2),
        ("first_minus_last", (30 - 15) / 2),
    ],
)
def test_three_kinds_of_forgetting(kind, value):
    assert fill(HAND).summary(kind)["forgetting"] == pytest.approx(value)


def test_unknown_kind_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'nonnegative'"):
        fill(HAND).summary("non_negative")


def test_forward_transfer_needs_start_row_and_cells_above_the_diagonal():
    full = [[80, 30, 10], [90, 60, 20], [50, 75, 40]]
    start = [5, 10, 15]
    assert fill(full, start=start).summary()["fwt"] == pytest.approx(((30 - 10) + (20 - 15)) / 2)
    assert "fwt" not in fill(full).summary()
    assert "fwt" not in fill(HAND, start=start).summary()


def test_columns_not_seen_yet_do_not_count():
    full = [[80, 30, 10], [90, 60, 20]]
    assert fill(full).summary() == fill([[80, NAN, NAN], [90, 60, NAN]]).summary()


def test_one_row_defines_no_stability_and_no_forgetting():
    assert set(fill([[80.0]]).summary()) == {
        "acc_last", "acc_inc", "acc_last_macro", "acc_inc_macro", "plasticity",
    }  # fmt: skip
    assert AccuracyMatrix(["a"]).summary() == {}
    assert AccuracyMatrix(["a"]).table().shape == (0, 1)


def test_zero_accuracy_after_learning_counts_as_kept():
    got = fill([[0, NAN], [0, 50], [30, 25]], learned=[0, 1]).summary()
    assert got["stability"] == pytest.approx(100 * (1 + 1 + 0.5) / 3)


def test_missing_cells_leave_metrics_out_rather_than_zero():
    got = fill([[NAN, NAN, NAN], [90, 60, NAN], [50, 75, 40]]).summary()
    assert set(got) == {"acc_last", "acc_inc", "acc_last_macro", "acc_inc_macro"}
    assert got["acc_inc_macro"] == pytest.approx((75 + 55) / 2)
    got = fill([[80, NAN, NAN], [NAN, 60, NAN], [50, 75, 40]]).summary()
    assert "acc_inc" not in got and "stability" not in got and "forgetting" not in got
    assert got["bwt"] == pytest.approx((-30 + 15) / 2)


def test_recurring_stream_has_more_rows_than_columns():
    table = [[80, 20], [70, 60], [60, 50], [85, 40]]
    got = fill(table, learned=[0, 1], start=[10, 30]).summary()
    assert got["plasticity"] == 70 and got["fwt"] == pytest.approx(20 - 30)
    assert got["forgetting"] == pytest.approx(((80 - 85) + (60 - 40)) / 2)
    assert got["stability"] == pytest.approx(100 * (70 / 80 + 60 / 80 + 1 + 50 / 60 + 40 / 60) / 5)


def test_rows_evaluated_now_and_then():
    sparse = AccuracyMatrix(["a", "b"], learned=[0, 2])
    for after, a, b in ((0, 80, 10), (2, 70, 60), (4, 60, 30)):
        sparse.record(after, 0, a, 100)
        sparse.record(after, 1, b, 100)
    got = sparse.summary()
    assert sparse.table().shape == (5, 2) and np.isnan(sparse.table()[1]).all()
    assert got["plasticity"] == 70 and got["forgetting"] == 25
    assert sparse.curve() == {0: 80, 2: 65, 4: 45}


def test_column_without_test_images_is_left_out():
    with_empty = fill(HAND, totals=[100, 200, 50])
    matrix = AccuracyMatrix(["c0", "c1", "c2", "empty"], [0, 1, 2, 1])
    for i, j in np.argwhere(~np.isnan(with_empty.table())):
        matrix.record(i, j, *with_empty._cells[i][:, j].tolist())
        matrix.record(i, 3, 0, 0)
    assert matrix.summary() == with_empty.summary()


@pytest.mark.parametrize("cell", [(-2, 0, 1, 1), (0, 3, 1, 1), (0, 0, 2, 1), (0, 0, -1, 1)])
def test_impossible_cells_are_refused(cell):
    with pytest.raises(ValueError, match="no such cell"):
        AccuracyMatrix(["a"]).record(*cell)


def test_learned_must_fit_the_columns():
    with pytest.raises(ValueError, match="learned"):
        AccuracyMatrix(["a", "b"], [0])


def test_matrix_snapshot_round_trip():
    matrix = fill(HAND, start=[1, 2, 3])
    copy = AccuracyMatrix(matrix.columns)
    copy.restore(saved(matrix.snapshot()))
    assert copy.summary() == matrix.summary() and np.array_equal(copy.start(), [1, 2, 3])
    np.testing.assert_array_equal(copy.table(), matrix.table())
    copy.record(3, 0, 1, 2)
    assert matrix.table().shape == (3, 3)
    empty = AccuracyMatrix(["a"])
    empty.restore(saved(AccuracyMatrix(["a"]).snapshot()))
    assert empty.summary() == {}
    with pytest.raises(UserError, match="3 columns, this stream 1"):
        empty.restore(matrix.snapshot())


def test_bounds_on_random_matrices():
    rng = np.random.default_rng(0)
    for _ in range(20):
        got = fill(rng.integers(0, 101, (5, 5)))
        kinds = [got.summary(k)["forgetting"] for k in metrics.FORGETTING]
        assert kinds[1] >= max(0, kinds[0]) and kinds[0] >= kinds[2]
        assert kinds[2] == pytest.approx(-got.summary()["bwt"])
        assert 0 <= got.summary()["stability"] <= 100


# ------------------------------------------------------------------------------ other code bases


@pytest.fixture(scope="module")
def golden():
    info = json.loads((GOLDEN / "cl_metrics.json").read_text())
    data = dict(np.load(GOLDEN / "cl_metrics.npz"))
    matrix = AccuracyMatrix([f"t{j}" for j in range(5)])
    for j, total in enumerate(data["test_counts"]):
        matrix.record(-1, j, round(data["untrained_accuracy"][j] * total), int(total))
        for i in range(5):
            matrix.record(i, j, int(data["correct_counts"][i, j]), int(total))
    return info["results"], data, matrix


def test_textbook_definitions(golden):
    want, data, matrix = golden
    want, got = want["definitions_for_reference"], matrix.summary()
    np.testing.assert_allclose(matrix.table(), 100 * data["accuracy_matrix"], rtol=1e-12)
    np.testing.assert_allclose(matrix.start(), 100 * data["untrained_accuracy"], rtol=1e-12)
    pairs = {
        "acc_last_macro": "average_accuracy_final",
        "acc_inc_macro": "average_incremental_accuracy_unweighted",
        "forgetting": "forgetting_chaudhry_max_over_earlier_stages",
        "bwt": "bwt_lopez_paz",
        "fwt": "fwt_lopez_paz",
    }
    assert {k: got[k] for k in pairs} == pytest.approx(
        {k: 100 * want[name] for k, name in pairs.items()}, abs=1e-9
    )


def test_mammoth(golden):
    want, _, matrix = golden
    want, table = want["mammoth"], matrix.table()
    seen = np.where(np.tri(5, dtype=bool), table, np.nan)
    assert metrics.mammoth_backward_transfer(table) == pytest.approx(want["backward_transfer"])
    assert metrics.mammoth_forward_transfer(table, matrix.start()) == pytest.approx(
        want["forward_transfer"]
    )
    assert metrics.mammoth_forgetting(seen) == pytest.approx(want["forgetting_rows_seen_only"])
    assert metrics.mammoth_forgetting(table) == pytest.approx(want["forgetting_full_rows"])
    assert list(matrix.curve(macro=True).values()) == pytest.approx(
        want["mean_accuracy_per_stage"], abs=1e-9
    )


def test_mammoth_counts_rows_before_learning():
    """Where the row before learning is the best one, only that definition notices."""
    table = np.array([[80.0, 95.0], [80.0, 60.0], [70.0, 50.0]])
    assert metrics.mammoth_forgetting(table) == 10
    table = np.array([[80.0, 95.0, 0], [80.0, 60.0, 0], [70.0, 50.0, 40.0]])
    assert metrics.mammoth_forgetting(table) == (10 + 45) / 2
    assert fill(table).summary()["forgetting"] == (10 + 10) / 2


def test_pilot(golden):
    want, data, matrix = golden
    want = want["pilot"]
    seen = np.where(np.tri(5, dtype=bool), matrix.table(), np.nan)
    assert metrics.pilot_forgetting(seen) == pytest.approx(want["forgetting_cnn"])
    curve = list(matrix.curve().values())
    assert np.round(curve, 2).tolist() == want["top1_curve"]
    assert metrics.pilot_average_accuracy(curve) == pytest.approx(
        want["average_accuracy_curve"], abs=1e-12
    )
    y, predicted = data["accuracy_fn/y_true"], data["accuracy_fn/y_pred"]
    grouped = {k: v for k, v in want.items() if k.startswith("accuracy_fn")}
    first, second = grouped.values()
    assert metrics.pilot_grouped_accuracy(predicted, y, 7, 4, 3) == first
    kept = y <= 8
    assert metrics.pilot_grouped_accuracy(predicted[kept], y[kept], 4, 4, 4) == second
    assert "08-11" not in second


def test_pilot_rounds_before_it_subtracts():
    third = 100 / 3
    assert metrics.pilot_forgetting(np.array([[100.0, 0], [third, 0]])) == 66.67
    assert metrics.pilot_forgetting(np.array([[third, NAN], [100.0, 0]])) == 0  # never negative


def test_avalanche(golden):
    want, data, matrix = golden
    table, start = matrix.table() / 100, matrix.start() / 100
    for after, row in enumerate(want["avalanche"]["after_training_experience"]):
        lost = metrics.avalanche_forgetting(table, after)
        assert lost == pytest.approx(
            {int(k): v for k, v in row["ExperienceForgetting"].items()}, abs=1e-12
        )
        stream = np.mean(list(lost.values())) if lost else 0.0
        assert stream == pytest.approx(row["StreamForgetting"], abs=1e-12)
        assert -stream == pytest.approx(row["StreamBWT"], abs=1e-12)
        gain = metrics.avalanche_forward_transfer(table, start, after)
        assert np.mean(list(gain.values())) == pytest.approx(row["StreamForwardTransfer"])
        for key, value in row["ExperienceForwardTransfer"].items():
            assert gain[int(key)] == pytest.approx(value)
        counts = data["correct_counts"][after], data["test_counts"]
        assert metrics.avalanche_stream_accuracy(*counts) == pytest.approx(row["StreamAccuracy"])


def test_intransigence():
    table = np.array([[80.0, NAN], [70.0, 50.0]])
    assert metrics.intransigence(table, [80, 60]) == 5


# ------------------------------------------------------------------------------ OnlineError


def stream(images=230, classes=7, domains=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(images, classes, generator=g)
    y = torch.randint(classes, (images,), generator=g)
    return scores, y, torch.randint(domains, (images,), generator=g)


def feed(online, scores, y, domain, size, kind="logits", segments=1):
    for i in range(0, len(y), size):
        at = slice(i, i + size)
        segment = i * segments // len(y)
        online.update(scores[at], y[at], segment, domain[at], kind)
    return online


def test_online_error_against_plain_loops():
    scores, y, domain = stream()
    got = feed(OnlineError(["a", "b", "c"], 7), scores, y, domain, 50).summary()
    p = scores.double().softmax(1).numpy()
    wrong = p.argmax(1) != y.numpy()
    errors = [100 * wrong[domain.numpy() == d].mean() for d in range(3)]
    assert [got[f"err/{d}"] for d in "abc"] == pytest.approx(errors)
    assert got["err_mean"] == pytest.approx(np.mean(errors))
    assert got["err_images"] == pytest.approx(100 * wrong.mean())
    assert got["nll"] == pytest.approx(-np.log(p[np.arange(len(y)), y]).mean())
    assert got["brier"] == pytest.approx(((p - np.eye(7)[y]) ** 2).sum(1).mean())
    confidence, ece = p.max(1), 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs((~wrong[inside]).mean() - confidence[inside].mean())
    assert got["ece"] == pytest.approx(ece)
    assert got["nan"] == 0 and got["collapse"] == 0


@pytest.mark.parametrize("size", [1, 7, 64])
def test_online_error_is_independent_of_the_batch_split(size):
    scores, y, domain = stream()
    scores[5, 2], scores[9, 1], scores[11] = NAN, math.inf, -math.inf
    whole = feed(OnlineError("abc", 7), scores, y, domain, 1000).summary()
    split = feed(OnlineError("abc", 7), scores, y, domain, size).summary()
    whole.pop("collapse"), split.pop("collapse", None)
    assert split == pytest.approx(whole, rel=1e-12)
    assert whole["nan"] == 3


def test_probabilities_and_logits_agree():
    scores, y, domain = stream()
    logits = feed(OnlineError("abc", 7), scores.double(), y, domain, 64).summary()
    p = scores.double().softmax(1)
    other = feed(OnlineError("abc", 7), p, y, domain, 64, "probabilities").summary()
    assert other == pytest.approx(logits, rel=1e-12)
    zero = OnlineError(["a"], 2)
    zero.update(torch.tensor([[1.0, 0.0]]), torch.ones(1).long(), 0, torch.zeros(1).long(),
                "probabilities")  # fmt: skip
    assert 87 < zero.summary()["nll"] < 88


def test_rows_with_nan_are_wrong_and_counted():
    scores, y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    scores[:, 0] = 5
    scores[0, 1], scores[1] = NAN, NAN
    online = OnlineError(["a"], 3)
    wrong = online.update(scores, y, 0, torch.zeros_like(y), "logits")
    got = online.summary()
    assert int(wrong) == 2 and wrong.shape == () and got["err_mean"] == 50 and got["nan"] == 2
    assert math.isfinite(got["nll"]) and math.isfinite(got["ece"]) and math.isfinite(got["brier"])
    only = OnlineError(["a"], 3)
    only.update(torch.full((2, 3), NAN), y[:2], 0, y[:2], "logits")
    means = dict.fromkeys(("err_mean", "err_images", "err_worst", "err/a"), 100)
    assert only.summary() == {**means, "nan": 2}


def test_mean_over_domains_is_not_the_mean_over_images():
    y = torch.zeros(4, dtype=torch.int64)
    scores = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    online = OnlineError(["a", "b", "never"], 2)
    online.update(scores, y, 0, torch.tensor([0, 0, 0, 1]), "logits")
    got = online.summary()
    assert got["err_images"] == 25 and got["err_mean"] == 50 and "err/never" not in got


def test_segments_and_collapse():
    online = OnlineError(["a"], 4)
    y = torch.tensor([0, 1, 2, 3])
    online.update(torch.eye(4), y, 0, torch.zeros(4).long(), "logits")
    online.update(torch.eye(4)[[0, 0, 1, 1]], y, 3, torch.zeros(4).long(), "logits")
    online.update(torch.eye(4)[[0]], y[:1], 3, torch.zeros(1).long(), "logits")  # too small
    assert online.segment(0) == {"err": 0, "n": 4}
    assert online.segment(3) == {"err": 60, "n": 5}
    assert math.isnan(online.segment(1)["err"]) and online.segment(1)["n"] == 0
    assert online.summary()["collapse"] == 0.5
    assert OnlineError(["a"], 4).summary() == {}


@pytest.mark.parametrize("classes", [2, 7, 100, 1000])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_single_images_that_wait_give_the_bits_of_adding_each_at_once(classes, kind):
    g = torch.Generator().manual_seed(classes)
    scores = torch.randn(150, classes, generator=g) * 3
    scores[40, 1], scores[41] = math.nan, math.inf
    scores = scores.softmax(1) if kind == "probabilities" else scores
    y = torch.randint(0, classes, (150,), generator=g)
    domain = torch.arange(150) % 3
    waits, at_once = OnlineError("abc", classes), OnlineError("abc", classes)
    for i in range(150):  # 64 and 36 of one segment, 50 of another
        one = scores[i : i + 1], y[i : i + 1], i // 100, domain[i : i + 1], kind
        assert waits.update(*one) == at_once._add(one[0].double(), *one[1:])
    batch = scores[:5], y[:5], 1, domain[:5], kind
    waits.update(*batch)
    at_once.update(*batch)
    assert equal(waits.snapshot(), at_once.snapshot())


def test_online_snapshot_in_the_middle():
    scores, y, domain = stream()
    whole = feed(OnlineError("abc", 7), scores, y, domain, 23, segments=4)
    half = feed(OnlineError("abc", 7), scores[:115], y[:115], domain[:115], 23, segments=2)
    state = saved(half.snapshot())
    feed(half, scores, y, domain, 23)  # must not reach the saved state
    rest = OnlineError("abc", 7)
    rest.restore(state)
    for i in range(115, 230, 23):
        at = slice(i, i + 23)
        rest.update(scores[at], y[at], i * 4 // 230, domain[at], "logits")
    assert rest.summary() == whole.summary()
    assert [rest.segment(i) for i in range(4)] == [whole.segment(i) for i in range(4)]


def test_online_error_refuses_other_shapes():
    online, y = OnlineError(["a"], 3), torch.zeros(2).long()
    with pytest.raises(ValueError, match=r"\[B, 3\]"):
        online.update(torch.zeros(2, 4), y, 0, y, "logits")
    with pytest.raises(ValueError, match="kind"):
        online.update(torch.zeros(2, 3), y, 0, y, "scores")


# ------------------------------------------------------------------------------ mCE


def test_mean_corruption_error():
    same = {c: [100 * a] * 5 for c, a in metrics.ALEXNET.items()}
    assert mean_corruption_error(same) == pytest.approx(100)
    spread = {c: [100 * a + d for d in (-2, -1, 0, 1, 2)] for c, a in metrics.ALEXNET.items()}
    assert mean_corruption_error(spread) == pytest.approx(100)
    flat = sum(50 / a for a in metrics.ALEXNET.values()) / 15
    assert mean_corruption_error(dict.fromkeys(metrics.ALEXNET, [50.0] * 5)) == pytest.approx(flat)
    with pytest.raises(ValueError, match="fog"):
        mean_corruption_error({c: v for c, v in same.items() if c != "fog"})
    with pytest.raises(ValueError, match="snow"):
        mean_corruption_error({**same, "snow": [50.0]})


def _stream_of_errors(online: OnlineError, plan: list[tuple[int, int, int]]) -> None:
    """Feed 10 images a segment; plan: (segment, domain, how many are wrong)."""
    for segment, domain, wrong in plan:
        scores = torch.zeros(10, 2)
        scores[:wrong, 1] = 1
        scores[wrong:, 0] = 1
        y = torch.zeros(10, dtype=torch.int64)
        online.update(scores, y, segment, torch.full_like(y, domain), "logits")


def test_rounds_segments_and_severities_have_their_own_means():
    online = OnlineError(["fog:4", "fog:5", "snow:5"], 2, {0: 1, 1: 1, 2: 2, 3: 2})
    _stream_of_errors(online, [(0, 0, 2), (1, 1, 4), (2, 0, 6), (3, 2, 8)])
    got = online.summary()
    assert got["err_worst"] == 80 and got["err/fog:4"] == 40
    assert got["err_round/1"] == 30 and got["err_round/2"] == 70
    assert got["err_segments"] == 50 and got["err_mean"] == pytest.approx((40 + 40 + 80) / 3)
    assert got["err_severity/4"] == 40 and got["err_severity/5"] == 60
    online = OnlineError(["day", "night", "dusk"], 2)  # places have names, and no severities
    _stream_of_errors(online, [(0, 0, 2), (1, 1, 4), (2, 2, 6)])
    assert not [key for key in online.summary() if key.startswith("err_severity")]
    assert "mce" not in got


def test_mce_comes_once_all_severities_ran():
    domains = [f"{c}:{s}" for c in ALEXNET for s in range(1, 6)]
    online = OnlineError(domains, 2)
    _stream_of_errors(online, [(i, i, 5) for i in range(len(domains))])
    wanted = mean_corruption_error({c: [50.0] * 5 for c in ALEXNET})
    assert online.summary()["mce"] == pytest.approx(wanted)
    assert wanted == pytest.approx(sum(50 / a for a in ALEXNET.values()) / 15)


def test_near_future_shift_is_where_recent_labels_stop_helping():
    rng = np.random.default_rng(0)
    mixed = rng.integers(0, 10, 400)
    blocks = np.repeat(np.arange(10), 40)  # one label for 4 batches of 10
    assert near_future_shift(mixed, 10) <= 3
    assert near_future_shift(blocks, 10) == 4


def test_near_future_accuracy_counts_later_batches_and_reports_the_blind_control():
    labels = np.repeat(np.arange(4), 20)
    ahead = NearFuture(labels, 10)
    assert ahead.shift == 2 and ahead.blind == 0
    assert ahead.summary() == {}
    scores = torch.eye(4)[torch.tensor([0, 1, 2, 3])]
    ahead.update(scores, torch.tensor([0, 1, 2, 0]))
    got = NearFuture(labels, 10)
    got.restore(ahead.snapshot())
    assert got.summary() == {"nfa": 75.0, "nfa_shift": 2.0, "nfa_blind": 0.0}
