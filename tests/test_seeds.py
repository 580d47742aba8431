"""A run in which nothing depends on the seed is made once, and only such a run."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal, strategy_node
from omegaconf import OmegaConf
from test_contract import OF_FILES, make, run

from driftline.analysis import load_runs, notes, select
from driftline.analysis.tables import by_place, main_table, state_table, statistics
from driftline.core.build import takes
from driftline.core.identity import identity
from driftline.core.processes import Lock
from driftline.core.seed import Draws, rng_state, seed_all, set_rng_state
from driftline.runs import execute, seeds
from driftline.runs.compose import complete
from driftline.runs.execute import run_experiment
from driftline.tta.tent import Tent

TINY = ["scenario.images=4", "scenario.batch_size=4", "scenario.corruptions=[contrast]"]
TINY += ["scenario.probe_images=2", "scenario.clean_images=2"]
TABLES = ("batches.jsonl", "experiences.jsonl", "matrix.jsonl")


@pytest.fixture
def loops(monkeypatch) -> list[str]:
    """The loops that were run, by the name of the method."""
    real, names = execute.run_shifts, []

    def counted(strategy, stream, context):
        names.append(type(strategy).__name__)
        return real(strategy, stream, context)

    monkeypatch.setattr(execute, "run_shifts", counted)
    return names


@pytest.fixture
def source(configure):
    """`source(seed, ...)`: the frozen model's run."""
    return lambda seed, *words: run_experiment(
        configure("strategy=source", *TINY, f"seed={seed}", *words), []
    )


def folder(summary) -> Path:
    return Path(summary["run"]["folder"])


def test_another_seed_takes_over_the_result(configure, source, loops, capsys):
    tent = [
        run_experiment(configure("strategy=tent", *TINY, f"seed={seed}"), []) for seed in (0, 1)
    ]
    first, second = source(0), source(1)
    assert loops == ["Source", "Tent"]  # and each found again
    assert "nothing in this run depends on the seed" in capsys.readouterr().out
    for a, b in (tent, (first, second)):
        same = {"folder": str(folder(a)), "seed": 0, "key": a["run"]["key"]}
        assert b["same_as"] == same and "same_as" not in a and a["any_seed"] == b["any_seed"]
        assert b["run"]["seed"] == 1 and folder(a) != folder(b)
        for key in ("metrics", "cost", "rows", "guard"):
            assert a[key] == b[key]
        for name in TABLES:
            assert (folder(a) / name).read_bytes() == (folder(b) / name).read_bytes()
    assert tent[1]["source"]["folder"] == str(folder(second))

    shutil.rmtree(folder(first))  # what it was copied to serves as well
    third = source(2)
    assert third["same_as"] == second["same_as"] and third["metrics"] == first["metrics"]
    assert len(loops) == 2
    for stale in ("summary.json", "config.yaml"):  # killed while it was copied
        (folder(third) / stale).unlink()
    (folder(third) / "batches.jsonl").write_text('{"half": ')
    again = source(2)
    assert again["rows"] == third["rows"] and len(loops) == 2


def test_tables_count_one_run(configure, source):
    for seed in (0, 1, 2):
        source(seed)
    runs = select(load_runs(configure().root))
    assert len(runs) == 3
    long = statistics(runs).set_index("metric").loc["err_mean"]
    assert (long["n"], long["seeds"]) == (1, 3) and np.isnan(long["std_seeds"])
    assert any("source: one run stands for every seed" in said for said in notes(runs, runs))
    assert [row[-2] for row in state_table(runs).rows] == ["", *["result of seed 0"] * 2]
    (_, some), *_ = by_place(runs)
    table = main_table(some)
    assert table.rows[0][1] == "1" and "one run stands for 3 seeds" in table.caption


def damage_summary(first) -> None:
    path = folder(first) / "summary.json"
    path.write_text(path.read_text().replace('"err_mean": ', '"err_mean": 1'))


def damage_rows(first) -> None:
    with open(folder(first) / "batches.jsonl", "a") as file:
        file.write("{}\n")


def change(first, **values) -> None:
    """Another machine, or other code: what environment.json says."""
    path = folder(first) / "environment.json"
    record = json.loads(path.read_text())
    del record["checksum"]
    path.write_text(json.dumps(record | values))


BROKEN = {
    "damaged summary": damage_summary,
    "damaged rows": damage_rows,
    "lost summary": lambda first: (folder(first) / "summary.json").unlink(),
    "lost rows": lambda first: (folder(first) / "matrix.jsonl").unlink(),
    "lost code": lambda first: (folder(first) / "environment.json").unlink(),
    "another device": lambda first: change(first, device="cpu (another)"),
    "other threads": lambda first: change(first, threads=77),
    "other packages": lambda first: change(first, packages={"torch": "1.0"}),
    "other code": lambda first: change(first, code={"method": {}, "framework": {}}),
    "other weights": lambda first: change(first, weights={"tag": "a", "hash": "b"}),
}


def test_a_run_is_made_where_the_first_is_not_whole_or_of_other_conditions(source, loops, tmp_path):
    first = source(0)
    place, whole = folder(first), tmp_path / "whole"
    shutil.copytree(place, whole)
    known = json.loads((place / "environment.json").read_text())
    for why, break_it in BROKEN.items():
        assert seeds._find(place.parent, first["any_seed"], known), why
        break_it(first)
        assert seeds._find(place.parent, first["any_seed"], known) is None, why
        shutil.rmtree(place)
        shutil.copytree(whole, place)
    assert seeds._find(place.parent, "another", known) is None
    damage_rows(first)
    assert "same_as" not in source(1) and len(loops) == 2


@pytest.mark.parametrize(
    "word", ["runtime.share_seeds=false", "on_exists=rerun", "checkpoint.keep=true"]
)
def test_where_a_run_is_asked_for_it_is_made(source, loops, word):
    source(0)
    assert "same_as" not in source(1, word) and len(loops) == 2


def test_estimates_draw_by_the_seed_of_the_method(configure, monkeypatch):
    """From a fork of the global generator, which shows nowhere."""
    monkeypatch.setattr(execute, "_source_run", lambda *_: None)
    words = ["strategy=tent", *TINY, "estimate=accuracy"]
    assert "any_seed" not in run_experiment(configure(*words), [])


def test_an_order_that_follows_the_seed_is_no_part_of_it(configure):
    cfgs = [
        complete(configure("strategy=source", *TINY, f"seed={seed}", *words))
        for words in ([], ["scenario.order_seed=${seed}"])
        for seed in (3, 4)
    ]
    keys = [identity(cfg, with_seed=False) for cfg in cfgs]
    assert keys[0] == keys[1] and len(set(keys)) == 3


DRAW = {
    "python": random.random,
    "numpy": lambda: np.random.rand(1),
    "normal of numpy": lambda: np.random.normal(),
    "torch": lambda: torch.rand(1),
}


@pytest.mark.parametrize("name", DRAW)
def test_a_draw_is_noticed_and_no_generator_moves_by_looking(name):
    torch.rand(3)
    before = rng_state()
    assert Draws(5).drawn  # they do not stand as seeded with 5
    assert equal(rng_state(), before)
    seed_all(5)
    draws, seeded = Draws(5), rng_state()
    assert not draws.look()
    DRAW[name]()
    assert draws.look()
    set_rng_state(seeded)
    assert draws.look()  # once drawn, always drawn
    again = Draws(5)
    assert not again.drawn
    again.restore(draws.snapshot())
    assert again.look()


@pytest.mark.parametrize("where", ["stream", "clean images", "generator"])
def test_a_method_that_draws_is_run_for_every_seed(configure, monkeypatch, loops, where):
    real = execute.make_strategy

    def drawing(*args):
        strategy, weights = real(*args)
        adapt, count = strategy.adapt, iter(range(9))

        def with_draw(x):
            if where == "generator":
                strategy.rng("mine")
            elif (next(count) == 0) == (where == "clean images"):  # first, on a copy
                torch.rand(1)
            return adapt(x)

        strategy.adapt = with_draw
        return strategy, weights

    words = ["strategy=bn_adapt", *TINY]
    monkeypatch.setattr(execute, "_source_run", lambda *_: None)
    monkeypatch.setattr(execute, "make_strategy", drawing)
    both = [run_experiment(configure(*words, f"seed={seed}"), []) for seed in (0, 1)]
    assert not any({"any_seed", "same_as"} & set(one) for one in both)
    assert loops == ["BNAdapt", "BNAdapt"]


class Heir(Tent):
    """Takes a seed, and does not say what for."""


IDLE = [
    case
    for case in OF_FILES
    if case.adapts and not case.rule and not seeds._takes_seed(OmegaConf.create(case.node))
]


def test_what_takes_a_seed_is_known():
    assert {"source", "lame", "bn_adapt", "tent"} <= {case.name for case in IDLE}
    node = OmegaConf.create(strategy_node("tent"))
    heir = OmegaConf.create({**strategy_node("tent"), "_target_": f"{__name__}.Heir"})
    tuned = OmegaConf.create(strategy_node("tent", adapter="lora"))
    assert [seeds._takes_seed(n) for n in (node, heir, tuned)] == [False, True, True]
    inner = OmegaConf.create(strategy_node("unmix_tns", inner=strategy_node("cotta")))
    assert takes(inner, "seed", "strategy") and not takes(node, "nothing", "strategy")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", IDLE, ids=lambda c: c.name)
def test_a_method_that_takes_no_seed_gives_the_same_whatever_it_is(case):
    """Unless it visibly draws from the global generators."""
    results = []
    for seed in (1, 2):
        strategy = make(case)
        seed_all(seed)
        results.append([row for _, row in run(strategy, case)])
        drawn = Draws(seed).drawn
    assert drawn or equal(*results)


def test_of_several_at_once_one_works_and_the_others_wait(configure, source, monkeypatch, loops):
    first = source(0)
    lock = Lock(Path(configure().root) / ".seeds" / first["any_seed"])
    assert lock.acquire()
    path = folder(first) / "summary.json"
    text = path.read_text()
    path.unlink()
    waits = []

    def finishes(_):
        waits.append("finishes")
        path.write_text(text)

    def draws(_):
        waits.append("draws")
        lock.release()

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(seeds, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        source(1)
    monkeypatch.setattr(seeds, "sleep", finishes)
    assert "same_as" in source(1) and len(loops) == 1
    for summary in path.parent.parent.glob("s*/summary.json"):
        summary.unlink()
    monkeypatch.setattr(seeds, "sleep", draws)
    assert "same_as" not in source(2) and len(loops) == 2
    assert waits == ["finishes", "draws"]


def test_the_lock_is_given_back_with_the_first_draw(tmp_path):
    seed_all(0)
    use, other = seeds.SeedUse(0), Lock(tmp_path)
    use.lock = Lock(tmp_path)
    assert use.lock.acquire() and not use.look() and not other.acquire()
    torch.rand(1)
    assert use.look() and other.acquire()
    other.release()
