"""Kinds of adapters by methods: the sweep, its tables and figures, and what a task costs."""

from __future__ import annotations

import json
import re

import pytest
import torch
from conftest import ROOT, plain_yaml, strategy_node
from test_analysis import write_run
from test_ease import learn, stream, tiny

from driftline.analysis import load_runs, select
from driftline.analysis.plots import MOST, figures, kind_costs, kind_map
from driftline.analysis.runs import by_kind, refused
from driftline.analysis.tables import by_place, kind_table
from driftline.core.build import build
from driftline.core.cost import Costs, state_bytes
from driftline.core.errors import UserError
from driftline.core.files import write_record
from driftline.runs import sweep
from driftline.runs.command import check_single, composed
from scripts.report import report

CONF = ROOT / "conf"
ADAPTER = "adapter@strategy.adapter"
FILES = {
    p.relative_to(CONF / "adapter").with_suffix("").as_posix(): plain_yaml(p)
    for p in sorted((CONF / "adapter").rglob("*.yaml"))
}
STRATEGIES = {p.stem for p in (CONF / "strategy").glob("*.yaml")}
GRID = plain_yaml(CONF / "experiment" / "grid" / "adapters.yaml")["hydra"]["sweeper"]["params"]
KINDS = GRID[ADAPTER].split(", ")


# ------------------------------------------------------------------------------ the sweep


def test_every_kind_that_is_not_named_after_a_method_stands_in_the_grid():
    general = [name for name in FILES if name.split("_")[0] not in STRATEGIES]
    assert sorted(KINDS) == sorted(general)
    for name, node in FILES.items():  # by which a report knows a kind
        assert "name" not in node or node["name"] == name.replace("/", "_")


def test_every_kind_of_the_grid_has_its_source_and_on_what_that_tried_it():
    text = (ROOT / "docs" / "adapters.md").read_text()
    table = text.partition("| kind | paper | evidence |")[2].partition("\n\n")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in table.splitlines()[2:]]
    kinds = [name for name in KINDS if not name.startswith("peft/")]
    assert sorted(row[1] for row in rows) == sorted(kinds)
    assert {row[3] for row in rows} <= {"language", "vision", "both", "not looked up"}
    assert all(row[2] and row[4] for row in rows)


def test_the_grid_is_methods_by_kinds_by_three_orders():
    runs = sweep.expand([f"{key}={value}" for key, value in GRID.items()])
    assert len(runs) == 6 * len(KINDS) * 3
    assert len({tuple(run) for run in runs}) == len(runs)
    words = [f"{key}={value}" for key, value in GRID.items()]
    assert len(sweep.expand([*words, "strategy=ease,mos", f"{ADAPTER}=lora,hra"])) == 2 * 2 * 3


def test_the_grid_is_no_single_run_unless_one_is_chosen():
    one = [f"{key}={value.split(',')[0]}" for key, value in GRID.items()]
    check_single({"params": GRID}, one)
    check_single({"params": None}, [])
    for word in one:
        left = word.partition("=")[0].partition("@")[0]
        with pytest.raises(UserError, match=f"sweep over {re.escape(left)}: add -m, or give one"):
            check_single({"params": GRID}, [w for w in one if w != word])


@pytest.mark.parametrize("strategy", GRID["strategy"].split(","))
def test_each_method_of_the_grid_takes_the_settings_of_all(strategy):
    cfg = composed(["experiment=grid/adapters", f"strategy={strategy}", "adapter=peft/lora"])
    assert cfg.strategy.name == strategy and cfg.strategy.adapter.name == "peft_lora"
    assert cfg.strategy.epochs == 5 and cfg.scenario.name == "split_imagefolder"
    assert cfg.runtime.feature_cache_mb == 0  # else the time of a test image is not measured


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ([["a=1"]], ["a=1"]),
        ([["a=1", "b=x"], ["a=1", "b=y"]], ["a=1 b=x,y"]),
        ([["a=1", "b=x"], ["a=2", "b=y"]], ["a=1 b=x", "a=2 b=y"]),
        ([["a=1", "b=x"], ["a=1", "b=x"]], ["a=1 b=x", "a=1 b=x"]),
        ([["c=[fog,snow]"], ["c=[fog]"]], ["c=[fog,snow],[fog]"]),
        ([[], []], ["", ""]),
    ],
    ids=str,
)
def test_runs_that_failed_for_one_reason_are_one_line_if_they_are_combinations(runs, text):
    assert sweep._together(runs) == text


# ------------------------------------------------------------------------------ the report

HIGH = {"ease": 60.0, "mos": 50.0}


def write_grid(root, kinds=("lora", "hra"), orders=(1993, 1, 2), cached=False, methods=HIGH):
    """Runs of two methods; accuracy is 60 or 50, + 2 for each kind, + 0, 1, 2 for the order."""
    for strategy in methods:
        for k, kind in enumerate(kinds):
            for o, order in enumerate(orders):
                cost = {
                    "seconds_total": 2.0 + k,
                    "images": 40,
                    "end_of_task_seconds": 1.0,
                    "peak_memory_mb": 9.0,
                    "parameters_updated": 100 * (k + 1),
                    "state_bytes_per_task": 2**20 * (k + 1),
                    "evaluation_seconds": 3.0,
                    "evaluation_images": 1000,
                    **({"features_reused": 9} if cached else {}),
                }
                folder = write_run(
                    root, strategy, label="photographs", scenario={"order_seed": order},
                    settings={"adapter": {"name": kind, "rank": 4 + k}}, summary={"cost": cost},
                )  # fmt: skip
                summary = json.loads((folder / "summary.json").read_text())
                acc = methods[strategy] + 2 * k + o
                summary["metrics"] = {"acc_inc": acc, "acc_last": acc - 20}
                summary["data"] |= {"train_images": 500, "test_images": 400}
                (folder / "summary.json").write_text(json.dumps(summary))


def runs_of(root):
    ((_, runs),) = by_place(select(load_runs(root)))
    return runs


def refuse(root, strategy, kind, **how):
    words = [f"strategy={strategy}", f"{ADAPTER}={kind}", "seed=0"]
    note = {"state": "failed", "overrides": words, "error": "no\nmore", "wrong_settings": True}
    folder = root / ".sweeps" / "one"
    folder.mkdir(parents=True, exist_ok=True)
    write_record(folder / f"{len(list(folder.iterdir()))}.json", note | how)


def test_a_row_is_a_method_and_a_kind_with_the_spread_over_the_orders(tmp_path):
    write_grid(tmp_path)
    rows = by_kind(runs_of(tmp_path), "acc_inc").set_index(["base", "kind"])
    assert rows["mean"].to_dict() == {("ease", "lora"): 61, ("ease", "hra"): 63,
                                      ("mos", "lora"): 51, ("mos", "hra"): 53}  # fmt: skip
    assert rows["error"].tolist() == pytest.approx([1 / 3**0.5] * 4) and set(rows["n"]) == {3}
    at = rows.loc["mos", "hra"]
    assert at["cost.task_mib"] == 2 and at["cost.test_ms"] == 3
    assert by_kind(runs_of(tmp_path), "forgetting") is None


def test_kept_features_give_no_time_of_a_test_image(tmp_path):
    write_grid(tmp_path, cached=True)
    assert "cost.test_ms" not in runs_of(tmp_path)


@pytest.mark.parametrize("kinds", [("lora",), ()], ids=["one kind", "no adapters"])
def test_without_several_kinds_there_is_no_grid(tmp_path, kinds):
    write_grid(tmp_path, kinds=kinds)
    if not kinds:
        write_run(tmp_path, "simplecil", metrics={"acc_inc": 1.0})
    runs = runs_of(tmp_path)
    assert kind_table(runs) is None and kind_map(runs) is None and kind_costs(runs) is None


def test_other_settings_stay_in_the_name_of_a_method(tmp_path):
    write_grid(tmp_path)
    write_run(tmp_path, "ease", label="photographs", metrics={"acc_inc": 9.0},
              settings={"adapter": {"name": "lora", "rank": 4}, "lr": 0.5})  # fmt: skip
    every = select(load_runs(tmp_path))
    assert set(by_kind(every, "acc_inc")["base"]) == {
        "ease (strategy.lr=0.1)", "ease (strategy.lr=0.5)", "mos",
    }  # fmt: skip


def test_a_cell_is_a_number_refused_or_not_run_and_nothing_else(tmp_path):
    write_grid(tmp_path)
    write_grid(tmp_path, kinds=("dora",), orders=(1993,), methods={"ease": 60.0})
    refuse(tmp_path, "mos", "dora")
    refuse(tmp_path, "ease", "lora")  # taken since
    refuse(tmp_path, "mos", "peft/boft")
    refuse(tmp_path, "mos", "fog", wrong_settings=False)  # it failed otherwise
    refuse(tmp_path, "tent", "film")  # of another grid
    refusals = refused(tmp_path)
    assert refusals["mos", "peft_boft"] == "no" and ("mos", "fog") not in refusals
    table = kind_table(runs_of(tmp_path), "acc_inc", refusals)
    assert table.head == ["adapter", "ease", "mos"]
    assert dict((row[0], row[1:]) for row in table.rows) == {
        "dora": ["60.00", "refused"], "hra": ["63.00 ± 0.58", "53.00 ± 0.58"],
        "lora": ["61.00 ± 0.58", "51.00 ± 0.58"], "peft_boft": ["-", "refused"],
    }  # fmt: skip
    said = "over 1 to 3 class orders. 500 train images, 400 test images. Seeds: 0."
    assert said in table.caption and "photographs" in table.title
    shown = kind_map(runs_of(tmp_path), None, refusals)
    texts = sorted(text.get_text() for text in shown.axes[0].texts)
    assert texts == sorted(cell for row in table.rows for cell in row[1:])


def test_the_report_draws_the_grid_and_names_the_kinds_on_the_front(tmp_path):
    write_grid(tmp_path / "runs")
    refuse(tmp_path / "runs", "mos", "dora")
    report([tmp_path / "runs"], tmp_path / "out", formats=["html"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Acc_inc of kinds of adapters" in page and "<td>refused</td>" in page
    for what in ("heat map of kinds", "quality against cost", "accuracy matrices"):
        assert page.count(what) == 1
    drawn = kind_costs(runs_of(tmp_path / "runs"))
    panels = [axes for axes in drawn.axes if axes.get_visible()]
    assert [axes.get_xlabel() for axes in panels] == [
        "trained parameters", "MiB a task", "seconds of learning", "milliseconds a test image",
    ]  # fmt: skip
    # All cost the same time of a test image; elsewhere the cheaper kind of ease is on the front.
    assert [sorted(t.get_text() for t in a.texts) for a in panels] == [
        *[["hra", "lora"]] * 3, ["hra"],
    ]  # fmt: skip


def test_a_grid_of_many_kinds_is_drawn_by_the_figures_of_kinds_alone(tmp_path):
    write_grid(tmp_path, kinds=[f"kind{i}" for i in range(MOST // 2 + 1)], orders=(1,))
    assert set(figures(runs_of(tmp_path))) == {"kinds", "kind-costs"}


# ------------------------------------------------------------------------------ bytes a task


@pytest.mark.parametrize(
    ("sizes", "expected"), [([], {}), ([5], {}), ([5, 9, 17], {"state_bytes_per_task": 6})]
)
def test_bytes_a_task_are_what_the_later_tasks_add(sizes, expected):
    costs = Costs.__new__(Costs)
    costs.bytes_after_task = sizes
    assert costs._growth() == expected


def test_a_task_of_ease_adds_its_adapters_and_class_means_and_no_moments():
    node = strategy_node("ease", rank=4, epochs=1)
    strategy = build(node, at="strategy", backbone=tiny(), seed=3, num_classes=6)
    costs = Costs(strategy.backbone, torch.device("cpu"))
    sizes, classes = [], 0
    for now in stream()[:2]:
        learn(strategy, now)
        costs.task_ended(strategy)
        adapters = sum(p.numel() for p in strategy.bank.parameters_of(strategy.names[-1]))
        spaces, classes = len(strategy.names), len(strategy.owner)
        head = sum(p.numel() for p in strategy.head.parameters())
        means = spaces * classes * strategy.backbone.dim
        # int64: the task of each class, and how many tasks have ended
        sizes.append(4 * (spaces * adapters + head + means) + 8 * (classes + 1))
    assert costs.bytes_after_task == sizes and sizes[0] < state_bytes(strategy, moments=False)
    assert state_bytes(strategy) > sizes[-1]  # the momentum of the last task
