"""Orders of adaptation streams: permutations, correlation, reproducibility, the CoTTA sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.stream import ShiftStream
from driftline.runs.execute import complete
from driftline.streams import corruptions as C
from driftline.streams.corrupted import corruption_names
from driftline.streams.orders import LABEL_ORDERS, SEQUENCES, Options, parse, plan
from driftline.streams.pipelines import Geometry
from driftline.streams.store import ImageStore

ONCE = ("shuffled", "correlated", "dirichlet_note", "dirichlet_rotta", "lame_grouped", "bursts")
OPTIONS = Options(delta=0.1, imbalance=100.0, zipf=2.0)
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 40))


def draw(name: str, options: Options = OPTIONS, seed: int = 0) -> np.ndarray:
    return LABEL_ORDERS[name](LABELS, options, np.random.default_rng(seed))


def same_as_next(order: np.ndarray) -> float:
    """Share of neighbours with equal labels."""
    return float((np.diff(LABELS[order]) == 0).mean())


@pytest.mark.parametrize("name", LABEL_ORDERS)
def test_label_orders_are_functions_of_their_seed(name):
    first, again, other = draw(name), draw(name), draw(name, seed=1)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(first) == len(LABELS) and first.dtype == np.int64
    complete_once = np.array_equal(np.sort(first), np.arange(len(LABELS)))
    assert complete_once == (name in ONCE)


def test_correlated_and_grouped_visit_each_label_in_one_run():
    for name in ("correlated", "lame_grouped", "lame_zipf_grouped"):
        labels = LABELS[draw(name)]
        assert (np.diff(labels) != 0).sum() == len(np.unique(labels)) - 1
    assert np.array_equal(LABELS[draw("correlated")], np.sort(LABELS))
    assert not np.array_equal(LABELS[draw("lame_grouped")], np.sort(LABELS))


@pytest.mark.parametrize("name", ["dirichlet_note", "dirichlet_rotta"])
def test_smaller_concentration_is_more_correlated(name):
    shares = [
        np.mean([same_as_next(draw(name, OPTIONS._replace(delta=d), s)) for s in range(5)])
        for d in (100.0, 1.0, 0.1)
    ]
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.8 and same_as_next(draw("shuffled")) < 0.1


def test_rotta_slots_have_the_dirichlet_second_moment():
    """E[sum_s p_s^2] = (1 + d) / (1 + n d) for n slots of concentration d."""
    delta, count, per_class = 0.1, 20, 400
    labels = np.repeat(np.arange(count), per_class)
    squares = []
    for seed in range(20):
        order = LABEL_ORDERS["dirichlet_rotta"](
            labels, OPTIONS._replace(delta=delta), np.random.default_rng(seed)
        )
        run = np.concatenate([[0], np.flatnonzero(np.diff(labels[order])) + 1, [len(order)]])
        pieces = np.diff(run) / per_class  # one run of a label is its share of one slot
        squares.append((pieces**2).sum() / count)
    expected = (1 + delta) / (1 + count * delta)
    assert abs(np.mean(squares) / expected - 1) < 0.1


def test_note_chunks_hold_ten_images_and_few_are_refused():
    with pytest.raises(UserError, match=r"images_list=all|image_list=all"):
        LABEL_ORDERS["dirichlet_note"](np.arange(50) % 25, OPTIONS, np.random.default_rng(0))
    order = draw("dirichlet_note")
    assert len(order) == 800


def test_zipf_shares_are_skewed_and_label_shift_favours_one_label_at_a_time():
    counts = np.sort(np.bincount(LABELS[draw("lame_zipf")], minlength=20))
    assert counts[-2:].sum() > 0.3 * len(LABELS) and counts[-2:].sum() < 0.9 * len(LABELS) + 20
    labels = LABELS[draw("label_shift", OPTIONS._replace(imbalance=5e5))].reshape(20, 40)
    assert all(len(set(row)) == 1 for row in labels) and len(set(labels[:, 0])) == 20
    flat = LABELS[draw("label_shift", OPTIONS._replace(imbalance=1.0))].reshape(20, 40)
    assert np.mean([len(set(row)) for row in flat]) > 12


def shares_of_one(name: str, rounds: int, options: Options = OPTIONS) -> np.ndarray:
    """Share of the commonest label in each round of ten images, mean over seeds."""
    labels = np.repeat(np.arange(20), rounds // 2)
    found = []
    for seed in range(30):
        drawn = labels[LABEL_ORDERS[name](labels, options, np.random.default_rng(seed))]
        common = np.bincount(drawn).argmax()
        found.append((drawn.reshape(rounds, 10) == common).mean(1))
    return np.mean(found, 0)


def test_priors_drift_along_the_curves_of_their_source():
    """E[share of the favoured label] = (1 - a) / 20 + a."""
    rounds, t = 64, np.arange(64)
    curves = {
        "prior_drift": np.sin(t % 8 * np.pi / 8),
        "prior_monotone": t / 64,
        "prior_square": (t // 8) % 2,
    }
    for name, a in curves.items():
        assert np.abs(shares_of_one(name, rounds) - (1 - a) / 20 - a).max() < 0.16, name
    labels = np.repeat(np.arange(20), rounds // 2)
    drawn = labels[LABEL_ORDERS["prior_bernoulli"](labels, OPTIONS, np.random.default_rng(0))]
    common = (drawn == np.bincount(drawn).argmax()).reshape(rounds, 10).mean(1)
    assert set(common[common > 0.6]) == {1.0} and common[0] < 0.6  # one label alone, or all
    assert 2 <= (np.diff(common == 1) != 0).sum() <= 20  # about sqrt(64) turns


def test_drawn_images_of_a_label_come_in_turn():
    order = draw("markov")
    times = np.bincount(order, minlength=len(LABELS))
    for value in np.unique(LABELS):
        assert np.ptp(times[value == LABELS]) <= 1


def test_a_markov_chain_stays_as_often_as_asked_and_bursts_are_runs():
    for stay in (0.95, 0.5, 1.0):
        found = np.mean(
            [same_as_next(draw("markov", OPTIONS._replace(stay=stay), s)) for s in range(9)]
        )
        assert abs(found - stay) < 0.03
    order = draw("bursts")
    runs = np.split(LABELS[order], np.flatnonzero(np.diff(LABELS[order])) + 1)
    assert sum(len(run) >= 10 for run in runs) == 40  # two of each label: half of 40 images
    assert np.mean([len(run) == 1 for run in runs]) > 0.8
    assert same_as_next(draw("bursts", OPTIONS._replace(burst_share=0.0))) < 0.1


def test_domains_come_back_by_a_power_law():
    names = [f"d{i}" for i in range(5)]
    counts = np.zeros(5)
    for seed in range(20):
        steps = plan("recurring_zipf", names, [5], 200, 1.5, np.random.default_rng(seed))
        assert [s.name for s in steps[:5]] == [f"r1/{n}:5" for n in names]  # all of them once
        assert [s.round for s in steps] == sorted(s.round for s in steps)
        back = [s.domain[0] for s in steps[5:]]
        counts += np.sort([back.count(n) for n in names])[::-1]
    expected = 20 * 199 * np.arange(1, 6) ** -1.5
    assert np.abs(counts / expected - 1).max() < 0.1


def test_orders_are_parsed_and_typos_named():
    assert parse("correlated") == ("continual", "correlated")
    assert parse("mixed+dirichlet_rotta") == ("mixed", "dirichlet_rotta")
    assert parse("recurring") == ("recurring", None)
    for wrong in ("corelated", "mixed+gradual", "mixed+"):
        with pytest.raises(UserError, match="is no order|are of one kind"):
            parse(wrong)
    with pytest.raises(UserError, match="did you mean 'correlated'"):
        parse("corelated")


def test_named_sequences_are_permutations_of_the_fifteen():
    assert set(SEQUENCES) == {f"cotta_{i}" for i in range(10)} | {"rotta"}
    for name, sequence in SEQUENCES.items():
        assert sorted(sequence) == sorted(C.STANDARD)
        assert corruption_names(name) == list(sequence)
    assert len({SEQUENCES[f"cotta_{i}"] for i in range(10)}) == 10
    assert SEQUENCES["cotta_0"][:3] == ("brightness", "pixelate", "gaussian_noise")


def test_plan_crosses_severities_and_numbers_rounds():
    steps = plan("continual", ["fog", "snow"], [1, 5], 1)
    assert [s.domain for s in steps] == [("fog", 1), ("fog", 5), ("snow", 1), ("snow", 5)]
    again = plan("recurring", ["fog", "snow"], [5], 3)
    assert [s.round for s in again] == [1, 1, 2, 2, 3, 3]
    assert again[2].name == "r2/fog:5"


# ------------------------------------------------------------------------ whole streams


def make(configure, *more: str, workers: int = 0) -> ShiftStream:
    cfg = complete(
        configure(
            "scenario=imagenet_c",
            "scenario.corruptions=[contrast,brightness]",
            "scenario.images=60",
            "scenario.probe_images=20",
            "scenario.clean_images=20",
            *more,
        )
    )
    return build(
        cfg.scenario,
        at="scenario",
        data_root=None,
        on_error="raise",
        cache=None,
        workers=workers,
        seed=0,
        geometry=Geometry(),
        store=ImageStore(),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        "mixed+correlated", "correlated", "dirichlet_rotta", "gradual", "recurring+shuffled",
        "recurring_zipf+markov", "mixed+prior_drift",
    ],
)  # fmt: skip
@pytest.mark.one_in(2)
def test_a_stream_delivers_what_its_stored_order_says(configure, order):
    words = [f"scenario.order={order}", "scenario.rounds=2"]
    stream = make(configure, *words, "scenario.batch_size=7")
    other = make(configure, *words, "scenario.batch_size=16", workers=2)
    for key, values in stream.order.items():
        assert np.array_equal(values, other.order[key]), key
    fields = {"row": "index", "label": "y", "domain": "domain"}
    for source in (stream, other):
        batches = [b for s in source.segments for b in s.batches()]
        for key, field in fields.items():
            delivered = torch.cat([getattr(b, field) for b in batches]).numpy()
            assert np.array_equal(delivered, stream.order[key]), key
    if order == "mixed+correlated":
        labels = stream.order["label"]
        assert np.array_equal(labels, np.sort(labels)) and len(stream.segments) == 1
        assert len(set(stream.order["domain"][:6])) == 2
    if order == "recurring_zipf+markov":
        assert [s.round for s in stream.segments] in ([1, 1, 2], [1, 1, 2, 2])
    elif order.startswith("recurring"):
        assert [s.round for s in stream.segments] == [1, 1, 2, 2]


def test_images_can_be_enlarged(configure):
    stream = make(configure, "scenario.resize=48")
    assert next(iter(stream.segments[0].batches())).x.shape[-2:] == (48, 48)
    assert stream.source is not None
    assert next(iter(stream.source().batches(2))).x.shape[-2:] == (48, 48)


def test_an_index_file_replaces_the_listed_order(configure, tmp_path):
    np.save(tmp_path / "order.npy", np.asarray([3, 3, 0]))
    stream = make(configure, f"scenario.index_file={tmp_path / 'order.npy'}")
    assert stream.order["row"].tolist() == [3, 3, 0] * 2
    np.save(tmp_path / "order.npy", np.asarray([60]))
    with pytest.raises(UserError, match="positions 0..59"):
        make(configure, f"scenario.index_file={tmp_path / 'order.npy'}")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["scenario.severity=[5,6]"], "scenario.severity must be one of 1, 2, 3, 4, 5 or a list"),
        (["scenario.severity=6"], r"scenario\.severity must be one of 1, 2, 3, 4, 5.*got 6"),
        (["scenario.severity=0"], r"scenario\.severity must be one of 1, 2, 3, 4, 5.*got 0"),
        (
            ["scenario.order=dirichlet_note", "scenario.delta=0"],
            "scenario.delta must be a finite number, above 0",
        ),
        (["scenario.source_images=0"], None),
    ],
)
def test_wrong_stream_settings_are_named(configure, words, expected):
    if expected is None:
        stream = make(configure, *words)
        assert stream.source is not None and stream.source().images == 400
        return
    with pytest.raises(UserError, match=expected):
        make(configure, *words)


# ------------------------------------------------------------------------ source images


def test_source_images_are_shuffled_by_epoch_and_can_be_entered_midway(configure):
    stream = make(configure, "scenario.source_images=50")
    assert stream.source is not None
    source = stream.source()
    first, again = ([b.index for b in source.batches(16, epoch=e)] for e in (0, 0))
    other = [b.index for b in source.batches(16, epoch=1)]
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(other))
    assert sorted(torch.cat(first).tolist()) == sorted(torch.cat(other).tolist())
    late = list(source.batches(16, epoch=0, start=2))
    assert torch.equal(torch.cat([b.index for b in late]), torch.cat(first[2:]))
    plain, changed = (
        next(iter(source.batches(50, epoch=0, augment=a))).x for a in ("none", "photometric")
    )
    changed_images = (plain != changed).flatten(1).any(1).float().mean()
    assert 0.2 < changed_images < 0.9


def test_held_out_source_images_are_outside_stream_probe_and_clean(imagenet_clean_root, configure):
    cfg = complete(
        configure(
            "scenario=imagenet_c",
            "scenario.corrupt=on_the_fly",
            "scenario.image_list=all",
            "scenario.corruptions=[contrast]",
            "scenario.images=6",
            "scenario.probe_images=2",
            "scenario.clean_images=12",
            "scenario.source_from=held_out",
            f"data.root={imagenet_clean_root}",
        )
    )
    OmegaConf.resolve(cfg)
    stream = build(
        cfg.scenario,
        at="scenario",
        data_root=cfg.data.root,
        on_error="raise",
        cache=None,
        workers=0,
        seed=0,
        geometry=Geometry(),
        store=ImageStore(),
    )
    held = set(torch.cat([b.index for b in stream.source().batches(4)]).tolist())
    used = set(stream.order["row"].tolist())
    probe = set(torch.cat([b.index for b in stream.probes[0]()]).tolist())
    clean = set(torch.cat([b.index for b in stream.holdout()]).tolist())
    assert len(held) == 4 and not held & (used | probe | clean) and len(clean) == 8
    cfg.scenario.source_from = "train"
    stream = build(
        cfg.scenario, at="scenario", data_root=cfg.data.root, on_error="raise", cache=None,
        workers=0, seed=0, geometry=Geometry(), store=ImageStore(),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"source_from.*held_out"):
        stream.source()
