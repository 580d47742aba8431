"""Orders of streams of tasks: which classes come when, what a method may know, what is scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import write_images
from test_runs import Kill, records, stop_after

from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.metrics import AccuracyMatrix
from driftline.core.stream import BOUNDARIES, NEW_CLASSES, OWN_CLASSES
from driftline.parts.objectives import scoped_cross_entropy
from driftline.runs.execute import complete, run_experiment
from driftline.streams.pipelines import Geometry
from driftline.streams.store import ImageStore
from driftline.streams.task_orders import (
    Options,
    by_first_occurrence,
    parse,
    tasks_of,
    without_boundaries,
)

CLASSES, EACH = 20, 10
PLACE = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), EACH))
NUMBERS = Options(
    base=0, increment=4, tasks=10, skew=0.0, first=0.2, zipf=1.0, task_images=60,
    disjoint=0.5, blurry=0.1,
)  # fmt: skip


def draw(order: str, seed: int = 0, **numbers) -> list[np.ndarray]:
    options = NUMBERS._replace(**numbers)
    return tasks_of(order, PLACE, CLASSES, options, np.random.default_rng(seed))


def classes_of(tasks: list[np.ndarray]) -> list[set[int]]:
    return [set(PLACE[task].tolist()) for task in tasks]


@pytest.mark.parametrize("order", ["scole", "cir", "si_blurry", "increment+scole", "scole+cir"])
def test_task_orders_are_functions_of_their_seed_and_join(order):
    first, again, other = draw(order), draw(order), draw(order, seed=1)
    assert len(first) == len(again) and all(map(np.array_equal, first, again))
    assert len(first) != len(other) or not all(map(np.array_equal, first, other))
    assert all(len(np.unique(task)) == len(task) > 0 for task in first)
    if order.startswith("increment+"):
        assert classes_of(first[:5]) == [set(range(i, i + 4)) for i in range(0, 20, 4)]
    with pytest.raises(UserError, match="'scol' is none of.*did you mean 'scole'"):
        parse("increment+scol")


def test_scole_draws_a_few_classes_and_skew_favours_some():
    tasks = draw("scole", tasks=400)
    assert all(len(found) == 4 for found in classes_of(tasks))
    assert all(len(task) == 4 * EACH for task in tasks)  # all images of a class
    counts = np.bincount(np.concatenate([PLACE[t] for t in tasks])) / EACH
    assert np.abs(counts / 80 - 1).max() < 0.35  # 400 * 4 / 20 visits, binomial
    skewed = np.bincount(np.concatenate([PLACE[t] for t in draw("scole", tasks=400, skew=3.0)]))
    assert skewed.max() > 4 * max(1, skewed.min())


def test_cir_has_early_first_occurrences_and_returns_by_a_power_law():
    tasks = draw("cir", tasks=300, zipf=1.5)
    found = classes_of(tasks)
    assert set.union(*found) == set(range(CLASSES))
    first = [next(t for t, here in enumerate(found) if c in here) for c in range(CLASSES)]
    assert np.mean(np.array(first) < 10) > 0.7  # geometric with 0.2
    returns = np.sort([sum(c in here for here in found) for c in range(CLASSES)])[::-1]
    expected = len(tasks) * np.arange(1, CLASSES + 1) ** -1.5
    assert np.abs(returns[:5] / expected[:5] - 1).max() < 0.35 and returns[-1] < 25
    assert max(len(task) for task in tasks) <= 60
    sizes = [np.bincount(PLACE[t], minlength=CLASSES) for t in tasks]
    assert all(np.ptp(n[n > 0]) <= 1 for n in sizes)  # shared evenly


def test_cir_says_where_tasks_are_smaller_or_fewer_than_asked(recwarn):
    draw("cir", task_images=10)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"scenario.task_images=999: 10 of 10 tasks hold fewer, "):
        draw("cir", task_images=999)
    with pytest.warns(UserWarning, match=r"scenario.tasks=400: \d+ of them have no class"):
        draw("cir", task_images=10, tasks=400, first=0.01, zipf=20.0)


def test_si_blurry_keeps_some_classes_apart_and_leads_images_of_the_others_astray():
    for seed in range(5):
        tasks = draw("si_blurry", seed, tasks=5)
        assert np.array_equal(np.sort(np.concatenate(tasks)), np.arange(len(PLACE)))
        visits = np.array([[(PLACE[t] == c).sum() for t in tasks] for c in range(CLASSES)])
        assert (visits.max(1) == EACH).sum() >= CLASSES // 2  # N: in one task alone
        strays = visits.sum() - visits.max(1).sum()
        assert strays <= 0.1 * 10 * EACH  # M of the images of the other classes
    assert len(set(map(len, tasks))) > 1  # stochastic sizes
    still = draw("si_blurry", tasks=5, blurry=0.0)
    assert sum(map(len, classes_of(still))) == CLASSES
    odd = draw("si_blurry", tasks=6)  # 6 of 10 and 12 of 14 classes, as in the code
    assert len(set.union(*classes_of(odd))) == 18
    with pytest.raises(UserError, match="tasks=30.*there are 20"):
        draw("si_blurry", tasks=30)


def test_boundaries_are_cut_away_and_classes_named_by_first_occurrence():
    tasks = [np.flatnonzero(np.isin(PLACE, c)) for c in ([7, 3], [3], [0, 7, 9])]
    name, seen = by_first_occurrence(PLACE, tasks, CLASSES)
    assert [name[c] for c in (3, 7, 0, 9)] == [0, 1, 2, 3] and seen == [2, 2, 4]
    assert sorted(name) == list(range(CLASSES))
    stretches = without_boundaries(tasks, 25, np.random.default_rng(0))
    assert [len(s) for s in stretches] == [25, 25, 10]  # 20 + 10 + 30 images
    whole = np.concatenate(stretches)
    assert np.array_equal(np.sort(whole[:20]), tasks[0])
    assert np.array_equal(np.sort(whole[30:]), tasks[2])


def test_a_loss_over_some_classes_is_the_loss_of_their_columns():
    scores, y = torch.randn(6, 9), torch.tensor([1, 4, 8, 4, 1, 8])
    chosen = torch.nn.functional.cross_entropy(
        scores[:, [1, 4, 8]], torch.tensor([0, 1, 2, 1, 0, 2])
    )
    assert torch.equal(scoped_cross_entropy(scores, y, (1, 4, 8)), chosen)
    part = scoped_cross_entropy(scores, y, range(1, 9))
    assert torch.equal(part, scoped_cross_entropy(scores, y, tuple(range(1, 9))))


def test_recurring_classes_are_scored_once_and_their_return_is_no_forgetting():
    """Tasks {0, 1}, {0, 2}, {1}: the columns are {0, 1}, {2} and nothing."""
    matrix = AccuracyMatrix(["a", "b", "c"])
    cells = {0: [(8, 10)], 1: [(4, 10), (5, 5)], 2: [(9, 10), (3, 5)]}
    for row, columns in cells.items():
        for column, counts in enumerate(columns):
            matrix.record(row, column, *counts)
        if row == 2:
            matrix.record(row, 2, 0, 0)
    summary = matrix.summary()
    assert summary["acc_last"] == pytest.approx(100 * 12 / 15)
    assert summary["acc_inc"] == pytest.approx((80 + 60 + 80) / 3)
    assert summary["forgetting"] == pytest.approx(((80 - 90) + (100 - 60)) / 2)
    assert summary["plasticity"] == pytest.approx(90)
    again = AccuracyMatrix(["a", "b", "c"])
    again.restore(matrix.snapshot())
    assert again.summary() == summary
    matrix.record(2, 2, 1, 2)  # recorded again with images: no longer empty
    assert matrix.summary()["acc_last"] == pytest.approx(100 * 13 / 17)


# ------------------------------------------------------------------------ whole streams

SPLIT = ["scenario=split_cifar10", "scenario.embedded_images=[8,2]", "scenario.batch_size=8"]
SCOLE = [*SPLIT, "scenario.order=increment+scole", "scenario.increment=3", "scenario.tasks=3"]
BLURRY = [*SPLIT, "scenario.order=si_blurry", "scenario.tasks=3", "scenario.disjoint=0.4",
          "scenario.single_pass=true", "scenario.evaluate_every=20"]  # fmt: skip


def make(configure, *words: str):
    cfg = complete(configure(*words))
    return build(
        cfg.scenario, at="scenario", data_root=None, on_error="raise", workers=0, seed=0,
        geometry=Geometry(size=32), store=ImageStore(),
    )  # fmt: skip


def test_tasks_of_a_recurring_stream_name_what_is_new_and_what_is_there(configure):
    stream = make(configure, *SCOLE)
    assert not {NEW_CLASSES, OWN_CLASSES} & stream.provides and BOUNDARIES in stream.provides
    tested = []
    for task in stream.tasks:
        labels = torch.cat([b.y for b in task.train(0)]).tolist()
        assert tuple(sorted(set(labels))) == task.present == tuple(task.own)
        assert set(labels) <= set(task.classes) and task.classes.start == 0
        tested += [label for b in task.test() for label in b.y.tolist()]
    assert sorted(tested) == sorted(list(range(10)) * 2)  # every test image in one task
    assert [len(t.tested) for t in stream.tasks] == [3, 3, 3, 1, 0, 0, 0]
    plain = make(configure, *SPLIT, "scenario.increment=3")
    assert plain.tasks[0].present is plain.tasks[0].new is None
    assert "order" not in plain.facts and NEW_CLASSES in plain.provides
    assert stream.facts["fingerprint"] != plain.facts["fingerprint"]


def test_a_stream_without_boundaries_arrives_in_its_order_once(configure):
    stream = make(configure, *BLURRY)
    assert stream.provides == {"num_classes"}
    delivered = [b.index for t in stream.tasks for b in t.train(0)]
    assert np.array_equal(torch.cat(delivered).numpy(), stream.order["row"])
    assert [len(torch.cat([b.y for b in t.train(0)])) for t in stream.tasks][:-1] == [20] * (
        len(stream.tasks) - 1
    )
    assert all(t.present is None for t in stream.tasks)  # nobody tells
    late = [b.index for b in stream.tasks[1].train(0, 1)]
    assert torch.equal(torch.cat(late), torch.cat([b.index for b in stream.tasks[1].train(0)])[8:])
    for words, text in (
        (BLURRY[:-1], "hides where its tasks begin.*evaluate_every"),
        ([*BLURRY, "scenario.single_pass=false"], "set scenario.single_pass=true"),
        ([*SPLIT, "scenario.order=scole", "scenario.increment=11"], "do not fit 10 classes"),
    ):
        with pytest.raises(UserError, match=text):
            make(configure, *words)


@pytest.mark.parametrize(("words", "classes"), [(SCOLE, 10), (BLURRY, 9)])  # 9: 3 tasks of 3
def test_methods_run_on_recurring_streams(configure, words, classes):
    summary = run_experiment(configure("strategy=slda", "strategy.base=stream", *words), [])
    metrics = summary["metrics"]
    assert {"acc_last", "acc_inc", "plasticity", "forgetting"} <= set(metrics)
    assert not any(key.startswith("til/") for key in metrics)
    assert len(summary["per_class"]) == classes


def test_fine_tuning_learns_among_the_classes_that_are_there(configure):
    words = [*SCOLE, "strategy.epochs=1", "backbone=test_resnet", "scenario.tasks=1"]
    words += ["scenario.embedded_images=[3,1]"]
    summary = run_experiment(configure("strategy=finetune", *words), [])
    assert summary["metrics"]["acc_last"] >= 0


def test_a_killed_run_with_a_memory_of_several_corruptions_resumes(configure, monkeypatch):
    words = ["strategy=er", "strategy.capacity=10", "strategy.replay_batch=4", *BLURRY]
    words += ["backbone=test_resnet", "scenario.corruptions=[contrast,clean]"]
    words += ["scenario.embedded_images=[4,1]"]
    whole = run_experiment(configure(*words), [])
    cfg = configure(*words, "on_exists=rerun", "checkpoint.every=2")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)  # in the second stretch
        with pytest.raises(Kill):
            run_experiment(cfg, [])
    again = run_experiment(cfg, [])
    assert again["metrics"] == whole["metrics"] and "nfa" in whole["metrics"]
    assert records(again["run"]["folder"]) == records(whole["run"]["folder"])


@pytest.mark.parametrize(
    ("method", "words", "text"),
    [
        ("ease", SCOLE, "needs own_classes.*Set scenario.order=increment, or take"),
        ("ewc", BLURRY, "needs boundaries.*Set scenario.evaluate_every=null, or take"),
        ("icarl", BLURRY, "needs new_classes.*order=increment and scenario.evaluate_every=null"),
    ],
)
def test_methods_that_cannot_run_on_a_stream_say_so(configure, method, words, text):
    with pytest.raises(UserError, match=text):
        run_experiment(configure(f"strategy={method}", *words, "strategy.epochs=1"), [])


def test_the_same_statistics_follow_from_any_cut(configure):
    """What a method makes of images does not depend on where evaluations fall."""
    found = []
    for every in (20, 1000):
        words = [*BLURRY, f"scenario.evaluate_every={every}", "strategy=simplecil"]
        found.append(run_experiment(configure(*words), [])["per_class"])
    assert found[0] == pytest.approx(found[1])


# ------------------------------------------------------------------------ under corruption


def images_of(batches) -> dict[tuple[int, int], torch.Tensor]:
    """Images by row and domain."""
    return {
        (int(row), int(domain)): x
        for b in batches
        for row, domain, x in zip(b.index, b.domain, b.x, strict=True)
    }


def test_classes_arrive_under_a_corruption_of_their_own(configure):
    words = [*SPLIT, "scenario.corruptions=[clean,contrast]"]
    clean, stream = make(configure, *SPLIT), make(configure, *words)
    assert stream.facts["corruptions"] == ["clean", "contrast"]
    assert stream.facts["fingerprint"] != clean.facts["fingerprint"]
    for t, (task, plain) in enumerate(zip(stream.tasks, clean.tasks, strict=True)):
        for name in ("fit", "test"):
            found, as_is = images_of(getattr(task, name)()), images_of(getattr(plain, name)())
            assert {row for row, _ in found} == {row for row, _ in as_is}
            same = [torch.equal(x, as_is[row, 0]) for (row, _), x in found.items()]
            assert all(same) if t % 2 == 0 else not any(same)
            assert {domain for _, domain in found} == {t % 2}
        rows = torch.tensor([row for row, _ in list(images_of(task.fit()))[:2]])
        again = task.again(rows, None)  # what a memory reads is what was seen
        assert torch.equal(again[1], images_of(task.fit())[int(rows[1]), t % 2])
    first, second = stream.tasks[:2]
    row = torch.tensor([next(iter(images_of(first.fit())))[0]])
    kept = images_of(second.train(0, 0, (row, torch.zeros(1, dtype=torch.int64))))
    assert {domain for (r, domain) in kept if r == int(row)} == {0}  # an exemplar stays clean
    tested = make(configure, *words, "scenario.corrupt_test=clean").tasks[1]
    assert all(
        torch.equal(x, images_of(clean.tasks[1].test())[key])
        for key, x in images_of(tested.test()).items()
    )
    every = make(configure, *words, "scenario.corrupt_test=all").tasks[1]
    assert len(images_of(every.test())) == 2 * len(images_of(tested.test()))


def test_corruptions_join_with_orders_and_hidden_boundaries(configure):
    words = ["scenario.corruptions=[contrast,fog,clean]", "scenario.severity=3"]
    for order in (SCOLE, BLURRY):
        stream, plain = make(configure, *order, *words), make(configure, *order)
        for a, b in zip(stream.tasks, plain.tasks, strict=True):
            assert torch.equal(*(torch.cat([x.index for x in t.fit()]) for t in (a, b)))
    whole = torch.cat([b.domain for t in stream.tasks for b in t.train(0)])
    assert len(whole.unique()) == 3 and (whole.diff() != 0).sum() == 2  # three hidden tasks
    metrics = run_experiment(configure("strategy=simplecil", *SCOLE, *words), [])["metrics"]
    assert metrics["acc_last"] > 20
    for wrong, text in (("[fgo]", "did you mean 'fog'"), ("[fog,noise]", "noise leaves nothing")):
        with pytest.raises(UserError, match=text):
            make(configure, *SPLIT, f"scenario.corruptions={wrong}")


def test_class_folders_are_cropped_before_they_are_corrupted(configure, tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split, ["a/0.png", "b/0.png", "b/1.png"], size=40)
    words = ["scenario=split_imagefolder", f"data.root={tmp_path}", "scenario.increment=1"]
    cfg = complete(configure(*words, "scenario.corruptions=[contrast,clean]"))
    assert cfg.scenario.label == "split_imagefolder[on_the_fly]"
    assert complete(configure(*words)).scenario.label == "split_imagefolder"
    cfg.scenario.pipeline = "raw"
    stream = build(
        cfg.scenario, at="scenario", data_root=str(tmp_path), on_error="raise", workers=0, seed=0,
        geometry=Geometry(size=32), store=ImageStore(),
    )  # fmt: skip
    assert all(next(iter(t.fit())).x.shape[-2:] == (224, 224) for t in stream.tasks)
