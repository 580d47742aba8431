"""What a report says of its numbers: directions, definitions, and rows that prove nothing."""

from __future__ import annotations

import html
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_analysis import write_run

from driftline.analysis import load_runs, select
from driftline.analysis.metrics import METRICS, define, sentences
from driftline.analysis.page import CSS
from driftline.analysis.plots import COLOURS, domains, looks
from driftline.analysis.tables import (
    WORSE,
    as_html,
    by_place,
    domain_table,
    grid,
    group_table,
    main_table,
    methods_in_order,
    tables_of,
)
from driftline.core import guard
from driftline.core.arrivals import Budget, Deadline, Decay
from driftline.core.estimates import Estimates
from driftline.core.metrics import AccuracyMatrix, NearFuture, OnlineError
from driftline.core.open_world import OpenWorld
from driftline.parts.rules.rails import COUNTS
from scripts.report import report

sys.path.insert(0, str(ROOT / "tools"))
import metrics_table

STILL = {"stability": 100.0, "forgetting": 0.0, "bwt": 0.0, "fwt": 0.0, "source_forgetting": 0.0}
MOVED = {"stability": 97.0, "forgetting": 2.0, "bwt": -2.0, "fwt": 1.0, "source_forgetting": 1.5}


def runs_of(folder):
    ((_, runs),) = by_place(select(load_runs(folder)))
    return runs


# ------------------------------------------------------------------------------ definitions


def reported() -> dict[str, list[str]]:
    """Names of the numbers that the meters of a run write, from each of them."""
    scores, y = torch.eye(3), torch.tensor([0, 1, 2])
    kinds = ["gaussian_noise", "fog"]
    online = OnlineError([f"{k}:{s}" for k in kinds for s in (1, 5)], 3, {0: 1, 1: 2})
    for segment in range(2):
        online.update(scores, y, segment, torch.tensor([0, 1, 3]), "logits")
    matrix = AccuracyMatrix(["a", "b"])
    for after in (-1, 0, 1):
        for on in (0, 1):
            matrix.record(after, on, 1, 2)
    unknown = OpenWorld(1)
    unknown.update(scores, torch.tensor([0, -1, 2]), torch.zeros(3, dtype=torch.long), "logits")
    ahead = NearFuture(np.array([0, 1] * 8), 2)
    ahead.update(scores[:2, :2], y[:2])
    estimates = Estimates(kinds=["agreement", "aetta"], passes=1, rate=None, after=None,
                          label_space="cifar10")  # fmt: skip
    for kind in estimates.kinds:
        estimates._sums[kind] += 1
    clocks = [
        Deadline(interval=1, queue=0, missed="source", latency=1, source=1),
        Decay(threshold=2, latency=1, source=1),
        Budget(budget=1, latency=1, source=1),
    ]
    task = matrix.summary()
    return {
        "stream": [*online.summary(), "mce"],
        "matrix": [*task, *(f"til/{name}" for name in task), "intransigence"],
        "clean": [f"{k}{v}" for k in ("clean_err_before", "clean_err_after", "source_forgetting")
                  for v in ("", "_adapting")],
        "unknown": list(unknown.summary()),
        "ahead": list(ahead.summary()),
        "estimates": list(estimates.summary()),
        "clocks": [name for clock in clocks for name in clock.summary()],
        "guard": [f"guard/{kind}" for kind in guard.KINDS],
        "rails": [f"method/rails_{name}" for name in COUNTS],
    }  # fmt: skip


def test_every_number_that_a_run_reports_is_defined_and_has_the_right_direction():
    names = reported()
    assert all(names.values())
    for meter, some in names.items():
        for name in some:
            known = define(name)
            own = known.text == define("of_nobody").text
            assert not own and known.text.endswith(".") and "  " not in known.text, (meter, name)
    every = {name for some in names.values() for name in some}
    exact = {m.name for m in METRICS if "<" not in m.name}
    derived = {"gain", *(m.name for m in METRICS if m.name.startswith(("cost/", "method/")))}
    energy = {f"{name}_energy" for name in ("auroc", "fpr95", "h_score")}
    assert exact - every - derived == {"guard/answered"}  # none is defined that no run has
    assert energy <= every
    lower = ("err", "til/forgetting", "forgetting", "source_forgetting", "clean_err", "mce", "ece")
    lower += ("nll", "brier", "fpr95", "intransigence", "time/err", "time/missed", "collapse")
    lower += ("nan", "guard/", "method/rails_worse")
    for name in every - {m for m in every if not define(m).better}:
        expected = name.startswith(lower) or name.endswith("_mae")
        assert (define(name).better == "lower") == expected, name


def test_families_are_told_once_and_what_nobody_defined_has_no_direction():
    told = sentences(["err/fog:5", "err/snow:5", "til/acc_last", "err_mean"])
    assert [name for name, *_ in told] == ["err/<domain> ↓", "til/acc_last ↑", "err_mean ↓"]
    assert "task-incremental" in told[1][1]
    assert define("mine/new").better == "" and "itself" in define("mine/new").text


def test_the_page_of_results_holds_the_same_definitions():
    text = metrics_table.PAGE.read_text()
    assert metrics_table.filled(text) == text, "run python tools/metrics_table.py"
    for metric in METRICS:
        assert metric.text in text.replace("&lt;", "<"), metric.name


@pytest.mark.parametrize("kind", ["shifts", "tasks"])
def test_every_column_of_a_report_is_defined_on_its_page(tmp_path, kind):
    metrics = {"acc_inc": 60.0, "acc_last": 50.0} | MOVED
    extra = {"time/utility": 9.0, "auroc": 70.0, "estimate/aetta_mae": 3.0, "mine": 4.0}
    summary = {"method": {"labels_bought": 3.0, "own_count": 2.0}, "guard": {"loss": 2}}
    for name in ("tent", "source"):
        here = metrics | (extra if kind == "shifts" else {})
        write_run(tmp_path / "runs", name, metrics=here, summary=summary)
    if kind == "tasks":
        for path in (tmp_path / "runs").rglob("summary.json"):
            path.write_text(re.sub(r'"err[^"]*": [\d.]+, ', "", path.read_text()))
    wanted = ["mine", "err_mean"] if kind == "shifts" else []
    report([tmp_path / "runs"], tmp_path / "out", metrics=wanted)
    page = (tmp_path / "out" / "report.html").read_text()
    links = re.findall(r'<th><a href="#([^"]+)">', page)
    assert len(links) >= 8 and page.count("<th>") - len(links) >= 2
    for target in links:
        assert page.count(f'id="{target}"') == 1, target
    shown = tables_of(runs_of(tmp_path / "runs"), wanted)
    texts = [(tmp_path / "out" / name).read_text() for name in ("tables.md", "tables.tex")]
    for table in shown:
        columns = dict(zip(table.head, table.metrics, strict=True))
        assert [head for head, metric in columns.items() if not metric] == ["strategy", "runs"]
        for metric in filter(None, columns.values()):
            assert all(define(metric).text in text for text in [page, *texts]), metric


def test_headings_are_narrow_and_lead_to_a_definition_that_says_them(tmp_path):
    for name in ("tent", "cotta"):
        cost = {"seconds_total": 2.0, "state_bytes": 2**21}
        write_run(tmp_path / "runs", name, metrics=MOVED | {"source_forgetting_adapting": 2.0},
                  summary={"cost": cost})  # fmt: skip
    report([tmp_path / "runs"], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    tables = (tmp_path / "out" / "tables.md").read_text()
    heads = re.findall(r'<th><a href="#([^"]+)">([^<]+)</a></th>', page)
    assert "sf_adapting ↓" in {head for _, head in heads}
    for target, head in heads:
        assert len(head) <= 24, head
        (meaning,) = re.findall(rf'<dt id="{target}">([^<]+)</dt>', page)
        name = head.removesuffix(" ↓").removesuffix(" ↑")
        plain = html.unescape(meaning)
        assert plain.startswith(("err/<", "method/<")) or name in plain, head
        assert plain.replace("<", "&lt;") in tables, head


@pytest.mark.parametrize("table", ["linked", "plain"])
def test_each_table_scrolls_in_a_box_of_its_own(tmp_path, table):
    write_run(tmp_path, "tent", metrics=MOVED)
    shown = as_html(main_table(runs_of(tmp_path)), linked=table == "linked")
    assert re.match(r'<div class="scroll" tabindex="0"><table>.*</table></div>', shown, re.S)
    (box,) = re.findall(r"^\.scroll \{([^}]*)\}", CSS, re.M)
    assert "overflow-x: auto" in box


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_on_its_ground_in_both_colour_schemes(scheme):
    schemes = re.findall(r":root \{([^}]*)\}", CSS)
    assert len(schemes) == 2
    light, dark = (dict(re.findall(r"--([a-z]+): (#[0-9a-f]+)", one)) for one in schemes)
    assert set(light) - set(dark) <= {"edge"}
    colours = (light, light | dark)[scheme]
    grounds = {"text": ("back", "soft", "warn"), "faint": ("back", "soft"), "link": ("back",)}
    for ink, on in (grounds | {"worse": ("back", "soft")}).items():
        for ground in on:
            two = sorted((luminance(colours[ink]), luminance(colours[ground])))
            assert (two[1] + 0.05) / (two[0] + 0.05) >= 4.5, (ink, ground)
    rules = CSS.partition("* {")[2]
    assert not re.findall(r"#[0-9a-f]{3,6}\b", rules)  # each is one of those above
    dims = re.findall(r"--dim: ([.\d]+)", CSS)
    white = round(255 * float(dims[scheme]))  # of figures: as dark as the box around them
    assert colours["paper"] in (f"#{white:02x}{white:02x}{white:02x}", "#fff")


# ------------------------------------------------------------------------------ what proves nothing


@pytest.mark.parametrize(
    ("name", "metrics", "unranked"),
    [
        ("source", STILL, True),
        ("lame", STILL, True),  # keeps nothing from batch to batch
        (
            "source",
            {"stability": 100.0, "source_forgetting": 0.0},
            True,
        ),  # no held-out images: the source, for sure
        (
            "lame",
            {"stability": 100.0, "source_forgetting": 0.0},
            False,
        ),  # any other may just have lost nothing
        ("cotta", STILL | {"fwt": 0.5}, False),  # it changed, and lost nothing
        ("cotta", STILL | {"forgetting": -1.0}, False),
        ("ease", {k: v for k, v in STILL.items() if k != "fwt"}, False),  # tasks: learned, kept all
    ],
    ids=["source", "batch", "source alone", "one number", "gained", "gained later", "tasks"],
)
def test_a_method_that_cannot_lose_is_not_the_best_at_keeping(tmp_path, name, metrics, unranked):
    write_run(tmp_path, name, metrics=metrics)
    for other, worse in (("tent", 0.0), ("sar", 1.0)):
        moved = {k: MOVED[k] - worse if k == "stability" else MOVED[k] + worse for k in metrics}
        write_run(tmp_path, other, metrics=moved)
    runs = runs_of(tmp_path)
    table = grid(
        runs, [k for k in ("stability", "forgetting", "source_forgetting") if k in metrics]
    )
    rows = {row[0]: r for r, row in enumerate(table.rows)}
    marks = {
        m: {table.marks.get((r, c)) for c in range(2, len(table.head))} for m, r in rows.items()
    }
    if unranked:
        assert marks == {name: {-1}, "tent": {1}, "sar": {2}}
    else:
        assert marks == {name: {1}, "tent": {2}, "sar": {None}}
    assert (f"{name} (answers to held-out images never changed" in table.caption) == unranked
    assert grid(runs, ["plasticity"]).marks == {}  # there all are equal


def test_the_source_is_not_the_best_in_its_own_time(tmp_path):
    for name, there, utility in (
        ("source", 100.0, 40.0),
        ("tent", 50.0, 45.0),
        ("sar", 30.0, 41.0),
    ):
        write_run(tmp_path, name, metrics={"time/availability": there, "time/utility": utility},
                  summary={"time": {"repeatable": True}})  # fmt: skip
    table = group_table(runs_of(tmp_path), "time")
    assert table is not None
    assert [table.marks.get((r, 3)) for r in range(3)] == [-1, 2, 1]  # source, sar, tent
    assert [table.marks.get((r, 2), 0) for r in range(3)] == [0, 2, 1]  # of utility, all three
    assert "units of the source's own" in table.caption


@pytest.mark.parametrize(
    ("ours", "images", "spread", "worse"),
    [
        (55.0, 40_000, 0.0, True),
        (45.0, 40_000, 0.0, False),  # better
        (50.0, 40_000, 0.0, False),
        (55.0, 200, 0.0, False),  # 5 points of 200 images are noise
        (55.0, 40_000, 10.0, False),  # seeds do not agree
    ],
    ids=["worse", "better", "equal", "few images", "seeds differ"],
)
def test_worse_than_not_adapting_is_marked_where_it_is_more_than_noise(
    tmp_path, ours, images, spread, worse
):
    source = {"err_mean": 50.0, "err/fog:5": 50.0, "err/snow:5": 50.0}
    for seed, sign in ((0, 1), (1, -1)):
        error = ours + sign * spread
        names = ("err_mean", "err/fog:5", "err/snow:5")
        write_run(
            tmp_path,
            seed=seed,
            metrics=dict.fromkeys(names, error),
            summary={
                "source": {"metrics": source, "gain": {"err_mean": 50.0 - error}},
                "cost": {"seconds_total": 2.0, "images": images, "peak_memory_mb": 1.0},
            },
        )
    runs = runs_of(tmp_path)
    table, by_domain = main_table(runs), domain_table(runs)
    assert by_domain is not None
    assert table.rows[0][2].endswith(WORSE) == worse
    assert all(text.endswith(WORSE) == worse for text in by_domain.rows[0][2:])
    assert ("worse than not adapting" in table.caption) == worse
    assert table.head[3] == "gain ↑" and table.rows[0][3].startswith(f"{50.0 - ours:.1f}")


# ------------------------------------------------------------------------------ special columns


def test_domains_come_in_the_order_of_the_stream(tmp_path):
    order = ["snow:5", "fog:5"]  # the metrics are written the other way round
    for name in ("tent", "source"):
        write_run(tmp_path, name, summary={"data": {"segments": order, "fingerprint": "f"}})
    runs = runs_of(tmp_path)
    table, figure = domain_table(runs), domains(runs)
    assert table is not None and figure is not None
    assert table.head[3:] == ["snow:5 ↓", "fog:5 ↓"] and "orders" not in table.caption
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert ticks[::-1] == order  # drawn from top to bottom
    write_run(tmp_path, scenario={"order_seed": 2},
              summary={"data": {"segments": order[::-1], "fingerprint": "g"}})  # fmt: skip
    said = domain_table(runs_of(tmp_path))
    assert said is not None and "2 orders of domains" in said.caption


SPECIAL = {  # what some runs report -> the table that it appears in, and nowhere else
    "time/utility": ("time", {"time/utility": 40.0}, {"time": {"repeatable": True}}),
    "auroc": ("unknown classes", {"auroc": 60.0}, {}),
    "estimate/aetta": ("accuracy without labels", {"estimate/aetta": 60.0}, {}),
    "resets_on_collapse": ("counted", {}, {"method": {"resets_on_collapse": 2.0}}),
    "labels_bought": ("counted", {}, {"method": {"labels_bought": 20.0}}),
    "rails_paused": ("counted", {}, {"method": {"rails_paused": 3.0}}),
    "guard: loss": ("counted", {}, {"guard": {"loss": 3, "first": {"loss": 7}}}),
    "collapse": ("counted", {"collapse": 0.5}, {}),
    "own_count": ("counted", {}, {"method": {"own_count": 4.0}}),
    "buffer images": ("cost", {}, {"method": {"memory_images": 200.0}}),
    "state MiB": ("cost", {}, {"cost": {"state_bytes": 2**21, "seconds_total": 1.0}}),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("column", SPECIAL)
def test_special_columns_stand_where_runs_have_them_and_only_there(tmp_path, column):
    title, metrics, summary = SPECIAL[column]
    quiet = {"method": {}, "guard": {"loss": 0, "collapse": 0, "first": {}, "answer": "warn"}}
    write_run(tmp_path, metrics={"collapse": 0.0, "nan": 0}, summary=quiet, label="plain")
    write_run(tmp_path, metrics=metrics, summary=quiet | summary, label="special")
    heads = {
        name: {table.title.removeprefix(f"{name}, embedded_resnet"): table.head for table in some}
        for name, some in (
            (runs["scenario"].iloc[0], tables_of(runs))
            for _, runs in by_place(select(load_runs(tmp_path)))
        )
    }
    has = [(name, t) for name, some in heads.items() for t, head in some.items()
           if any(h.split(" ↑")[0].split(" ↓")[0] == column for h in head)]  # fmt: skip
    assert has and all(name == "special" and title in t for name, t in has)
    usual = ["", ": error per domain", ": cost"]
    assert list(heads["plain"]) == usual


@pytest.mark.parametrize("seconds", [0.0, 1.5])
def test_ends_of_tasks_cost_something_or_have_no_column(tmp_path, seconds):
    write_run(tmp_path, summary={"cost": {"end_of_task_seconds": seconds, "seconds_total": 0.0}})
    table = group_table(runs_of(tmp_path), "cost")
    assert table is not None
    assert ("end of task s ↓" in table.head or "end of task s" in table.head) == bool(seconds)
    assert any(head.startswith("steps s") for head in table.head)


# ------------------------------------------------------------------------------ own methods


OWN = ["mine", "aa_mine", "zz.mine", "my-method", "Mine2", *(f"own{i}" for i in range(9))]


def test_own_methods_have_a_place_and_a_look_without_a_line_of_configuration(tmp_path):
    for name in ("source", "tent", "cotta", *OWN):
        write_run(tmp_path, name)
    runs = runs_of(tmp_path)
    order = methods_in_order(runs)
    assert order[0] == "source" and set(OWN) < set(order)
    for table in tables_of(runs):
        assert [row[0] for row in table.rows] == order
    drawn = looks(order)
    assert len({(look["color"], look["marker"]) for look in drawn.values()}) == len(order)
    taken = {COLOURS[name] for name in ("source", "tent", "cotta")}
    assert not taken & {drawn[name]["color"] for name in OWN}


def test_own_methods_have_colours_of_their_own_while_there_are_some():
    assert len({look["color"] for look in looks(list("abcdef")).values()}) == 6
    alone = {name: looks([name])[name]["color"] for name in "abcdefgh"}
    assert len(set(alone.values())) > 1  # not the first one for each: sections of a page agree
