"""Loading, averaging and reporting of runs that are written here by hand, and the HTML page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import HANG, ROOT, python
from PIL import Image

from driftline.analysis import load_batches, load_experiences, load_matrix, load_runs, notes, select
from driftline.analysis import runs as runs_module
from driftline.analysis.plots import COLOURS, looks, pareto_front
from driftline.analysis.tables import (
    grid,
    latex,
    main_table,
    markdown,
    published_table,
    statistics,
)
from driftline.core.errors import UserError

DOMAINS = {"fog:5": 40.0, "snow:5": 50.0}


def write_run(
    root: Path,
    strategy: str = "tent",
    *,
    seed: int = 0,
    scenario: dict | None = None,
    settings: dict | None = None,
    metrics: dict | None = None,
    summary: dict | None = None,
    label: str = "imagenet_c[embedded]",
    commit: str = "a" * 40,
    when: str = "2026-01-01T00:00:00+0000",
    suffix: str = "",
) -> Path:
    """A finished run with the files and keys of a real one; `settings` are the strategy's."""
    config = {
        "seed": seed,
        "precision": "fp32",
        "data": {"root": None, "on_error": "raise", "cache": None},
        "root": str(root),
        "runtime": {"threads": 1},
        "scenario": {"name": "imagenet_c", "label": label, "severity": 5, "order_seed": 1},
        "strategy": {"_target_": f"driftline.tta.{strategy}", "name": strategy, "lr": 0.1},
        "backbone": {"name": "embedded_resnet", "arch": "embedded_resnet"},
    }
    config["scenario"] |= scenario or {}
    config["strategy"] |= settings or {}
    key = f"{abs(hash(json.dumps(config, sort_keys=True))) % 16**8:08x}"
    about = {"scenario": label, "strategy": strategy, "backbone": "embedded_resnet"}
    about |= {"seed": seed, "key": key}
    folder = root / label / strategy / "embedded_resnet" / f"s{seed}-{key}{suffix}"
    folder.mkdir(parents=True)
    data = {"segments": list(DOMAINS), "fingerprint": f"o{config['scenario']['order_seed']}"}
    errors = {f"err/{name}": value + seed for name, value in DOMAINS.items()}
    known = {"err_mean": 45.0 + seed, **errors, "plasticity": 55.0, "stability": 90.0 + seed}
    content = {
        "run": {**about, "folder": str(folder), "git": commit},
        "data": data,
        "weights": {"tag": "embedded/resnet", "hash": "0123456789abcdef"},
        "metrics": known | (metrics or {}),
        "cost": {"seconds_total": 2.0 + seed, "images": 40, "peak_memory_mb": 100.0},
    }
    environment = {**about, "time": when, "device": "cpu", "packages": {"torch": "2.15.0"}}
    environment["git"] = {"commit": commit, "dirty": False}
    (folder / "summary.json").write_text(json.dumps(content | (summary or {})))
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write_rows(folder, "batches", [
        {"segment": s, "batch": b, "n": 10, "wrong": 4 + s} for s in (0, 1) for b in (0, 1)
    ])  # fmt: skip
    write_rows(folder, "experiences", [{"index": i, "name": d} for i, d in enumerate(DOMAINS)])
    write_rows(folder, "matrix", [
        {"after": i, "after_name": a, "on": on, "acc": 50.0 + i, "correct": 5, "n": 10}
        for i, a in enumerate(DOMAINS) for on in DOMAINS
    ])  # fmt: skip
    return folder


def write_rows(folder: Path, name: str, rows: list[dict]) -> None:
    label = folder.parents[2].name
    lines = [json.dumps({"scenario": label, **row}) for row in rows]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


# ------------------------------------------------------------------------------ loading


def test_one_row_a_run_a_batch_and_a_cell_and_unknown_keys_are_kept(tmp_path):
    write_run(tmp_path, seed=1, metrics={"mine/new": 7.0}, summary={"extra": {"deep": [1, 2]}})
    write_run(tmp_path, "source", seed=2)
    runs = load_runs(tmp_path).set_index("strategy")
    assert list(runs["state"]) == ["done", "done"]
    assert runs.at["tent", "metrics.mine/new"] == 7 and runs.at["tent", "extra.deep"] == [1, 2]
    assert pd.isna(runs.at["source", "metrics.mine/new"])
    assert runs.at["tent", "config.strategy.lr"] == 0.1 and runs.at["source", "seed"] == 2
    batches, cells = load_batches(tmp_path), load_matrix(tmp_path)
    assert len(batches) == 8 and set(batches["strategy"]) == {"source", "tent"}
    assert batches.groupby("seed")["wrong"].sum().to_dict() == {1: 18, 2: 18}
    assert len(cells) == 8 and list(cells.columns).count("scenario") == 1
    assert len(load_experiences(tmp_path)) == 4


def test_a_configuration_read_in_blocks_is_what_yaml_reads():
    for path in sorted((ROOT / "results" / "example").rglob("config.yaml")):
        text = path.read_text()
        assert runs_module.read_config(text) == yaml.safe_load(text)
    odd = "a:\n- 1\n- b: 2\n# note\n'c:d': {e: f}\ng: \"x\n  y\"\n"
    assert runs_module.read_config(odd) == yaml.safe_load(odd)


def test_what_counts_as_no_setting_is_what_the_identity_of_a_run_leaves_out():
    from driftline.core.identity import VOLATILE, VOLATILE_DATA

    assert runs_module.VOLATILE == VOLATILE
    assert {f"data.{key}" for key in VOLATILE_DATA} <= set(runs_module.NO_SETTING)


@pytest.mark.slow
def test_a_thousand_runs_parse_what_they_share_once(tmp_path):
    for i in range(1000):
        write_run(tmp_path, ("tent", "source")[i % 2], seed=i)
    runs_module._parsed.cache_clear()
    assert len(load_runs(tmp_path)) == 1000
    # a block of YAML each: 1,000 seeds, and the handful that all runs of a strategy share
    assert runs_module._parsed.cache_info().misses < 1020


def test_committed_example_runs_are_read_only_where_they_are_asked_for(tmp_path):
    write_run(tmp_path / "example")
    own = write_run(tmp_path, "cotta")
    assert load_runs(tmp_path)["path"].tolist() == [str(own)]
    assert load_runs(tmp_path / "example")["strategy"].tolist() == ["tent"]


def test_failed_unfinished_and_damaged_runs_are_listed_and_in_no_mean(tmp_path):
    write_run(tmp_path, seed=0)
    failed, killed, half, empty = (write_run(tmp_path, seed=s) for s in (1, 2, 3, 4))
    (failed / "summary.json").unlink()
    (failed / "failure.txt").write_text("Traceback\n  x\ncore.errors.Diverged: loss is nan\n")
    (killed / "summary.json").unlink()
    batches = killed / "batches.jsonl"
    batches.write_text(batches.read_text()[:-10])  # killed while it wrote a line
    (half / "summary.json").write_text('{"run": {')
    shutil.rmtree(empty)
    empty.mkdir()
    (empty / ".lock").write_text("host pid 1")
    runs = load_runs(tmp_path)
    states = runs["state"].value_counts().to_dict()
    assert states == {"done": 1, "failed": 1, "unfinished": 2, "unreadable": 1}
    why = runs.set_index("state")["problem"]
    assert why["failed"] == "core.errors.Diverged: loss is nan"
    assert "summary.json is damaged" in why["unreadable"]
    assert runs[runs["state"] == "failed"]["seed"].item() == 1
    used = select(runs)
    assert list(used["seed"]) == [0]
    assert len(load_batches(runs[runs["seed"] == 2])) == 3
    told = " ".join(notes(runs, used))
    assert all(f"{n} {state}" in told for n, state in ((1, "failed"), (2, "unfinished")))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: None, "no folder"),
        (lambda root: root.mkdir(), "no run under"),
        (lambda root: (write_run(root) / "summary.json").unlink(), "no finished run (1 unfinished"),
        (lambda root: (write_run(root) / "summary.json").write_text("{"), "is damaged"),
        (lambda root: (write_run(root) / "config.yaml").write_text("a: [1"), "1 unreadable"),
        (lambda root: write_run(root, summary={"metrics": [1]}), "without config.yaml or metrics"),
    ],
    ids=["missing", "empty", "unfinished", "corrupt summary", "corrupt config", "no metrics"],
)
def test_nothing_to_show_is_one_message(tmp_path, monkeypatch, capsys, make, said):
    from scripts import report

    make(tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "results")])
    assert report.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_run_with_a_few_metrics_and_nothing_else_is_enough(tmp_path):
    from scripts.report import report

    folder = write_run(tmp_path / "results")
    (folder / "summary.json").write_text(json.dumps({"metrics": {"err_mean": 12.34, "ece": 0.1}}))
    for name in ("environment.json", "batches.jsonl", "matrix.jsonl", "experiences.jsonl"):
        (folder / name).unlink()
    text = report([tmp_path / "results"], tmp_path / "out", metrics=["ece", "err_mean"])
    assert re.search(r"^tent +1 +0.100 +12.3$", text, re.M)
    assert (tmp_path / "out" / "report.html").exists()
    with pytest.raises(UserError, match="err_mena.*did you mean 'err_mean'"):
        report([tmp_path / "results"], tmp_path / "out", metrics=["err_mena"])


# ------------------------------------------------------------------------------ averaging


def test_the_name_of_a_nested_node_stands_for_what_its_file_holds(tmp_path):
    def plan(name, **kind):
        return {"adapter": {"name": name, "at": [name], "kind": {"_target_": name, **kind}}}

    for node in (plan("lora", rank=8), plan("prompt", count=5)):
        write_run(tmp_path, "ease", settings=node, metrics={"acc_last": 50})
    methods = set(select(load_runs(tmp_path))["method"])
    assert methods == {"ease (adapter=lora)", "ease (adapter=prompt)"}
    write_run(tmp_path, "ease", settings=plan("lora", rank=4), metrics={"acc_last": 50})
    methods = set(select(load_runs(tmp_path))["method"])
    rank = "strategy.adapter.kind.rank"
    assert methods == {
        f"ease (adapter=lora, {rank}=4)",
        f"ease (adapter=lora, {rank}=8)",
        "ease (adapter=prompt)",  # which has no rank
    }


def test_seeds_are_averaged_and_two_settings_never_are(tmp_path):
    for seed in (0, 1):
        for lr in (0.1, 0.2):
            write_run(tmp_path, seed=seed, settings={"lr": lr}, metrics={"err_mean": 40 + seed})
        write_run(tmp_path, "source", seed=seed)
    runs = select(load_runs(tmp_path))
    assert set(runs["method"]) == {
        "source",
        "tent (strategy.lr=0.1)",
        "tent (strategy.lr=0.2)",
    }
    long = statistics(runs).set_index(["method", "metric"])
    row = long.loc[("tent (strategy.lr=0.1)", "err_mean")]
    assert (row["n"], row["mean"], row["std_seeds"]) == (2, 40.5, pytest.approx(0.5**0.5))
    assert json.loads(row["values"]) == [40, 41] and np.isnan(row["std_orders"])


def test_settings_of_the_stream_make_tables_of_their_own_and_are_not_ranked_together(tmp_path):
    for severity in (3, 5):
        write_run(tmp_path, "source", scenario={"severity": severity})
    write_run(tmp_path, "tent", metrics={"err_mean": 99.0})
    runs = select(load_runs(tmp_path))
    assert set(runs["stream"]) == {"scenario.severity=3", "scenario.severity=5"}
    ranks = statistics(runs).query("metric == 'err_mean'").set_index(["stream", "method"])["rank"]
    assert ranks["scenario.severity=3", "source"] == 0  # alone
    assert ranks["scenario.severity=5", "source"] == 1
    assert ranks["scenario.severity=5", "tent"] == 2


def test_orders_and_seeds_have_deviations_of_their_own(tmp_path):
    for order, seed, err in ((1, 0, 40.0), (1, 1, 42.0), (2, 0, 50.0), (2, 1, 52.0)):
        write_run(tmp_path, seed=seed, scenario={"order_seed": order}, metrics={"err_mean": err})
    runs = select(load_runs(tmp_path))
    row = statistics(runs).set_index("metric").loc["err_mean"]
    assert row["mean"] == 46 and row["orders"] == 2 and row["n"] == 4
    assert row["std_seeds"] == pytest.approx(2**0.5) and row["std_orders"] == pytest.approx(50**0.5)
    assert "46.0 ± 1.4 ± 7.1" in markdown(main_table(runs))
    strict = select(load_runs(tmp_path), average=())
    assert set(strict["stream"]) == {"scenario.order_seed=1", "scenario.order_seed=2"}


def test_other_images_under_one_name_are_not_averaged(tmp_path):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1, summary={"data": {"segments": [], "fingerprint": "other"}})
    assert select(load_runs(tmp_path))["stream"].nunique() == 2


def test_of_runs_made_twice_the_newest_counts_and_versions_are_told(tmp_path):
    old = write_run(tmp_path, metrics={"err_mean": 10.0})
    write_run(tmp_path, metrics={"err_mean": 20.0}, when="2026-01-01T00:00:01+0000",
              commit="b" * 40, suffix="-2")  # fmt: skip
    write_run(tmp_path, "source", scenario={"batch_size": 7})
    runs = load_runs(tmp_path)
    used = select(runs)
    assert list(used[used["strategy"] == "tent"]["metrics.err_mean"]) == [20]
    told = "\n".join(notes(runs, used))
    assert f"made twice, the newer run counts: {old}" in told
    assert "more than one code version (aaaaaaaaaa, bbbbbbbbbb)" in told
    assert "not all runs agree in scenario.batch_size" in told


# ------------------------------------------------------------------------------ tables


def test_best_is_bold_second_underlined_and_joint_is_unranked(tmp_path):
    for name, err in (("tent", 20.0), ("cotta", 30.0), ("source", 40.0), ("joint", 1.0)):
        write_run(tmp_path, name, metrics={"err_mean": err, "acc_last": 100 - err})
    table = grid(select(load_runs(tmp_path)), ["err_mean", "acc_last"])
    rows = {row[0]: r for r, row in enumerate(table.rows)}
    for column in (2, 3):
        marks = {name: table.marks.get((r, column), 0) for name, r in rows.items()}
        assert marks == {"tent": 1, "cotta": 2, "source": 0, "joint": 0}
    assert "| tent | 1 | **20.0** | **80.00** |" in markdown(table)
    assert r"cotta & 1 & \underline{30.0} & \underline{70.00} \\" in latex(table)
    assert all(rule in latex(table) for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert r"imagenet\_c{[}embedded{]}" in latex(table)


def test_a_published_figure_stands_beside_ours_only_where_it_compares(tmp_path):
    row = {"strategy": "tent", "metric": "err_mean", "value": 43.5, "status": "seen"}
    row |= {"source": "the paper", "ours": 45.0}
    for label, same in (("imagenet_c", True), ("imagenet_c[embedded]", False)):
        write_run(tmp_path, label=label, summary={"reference": [{**row, "comparable": same}]})
    runs = select(load_runs(tmp_path))
    real, embedded = (runs[runs["scenario"] == s] for s in sorted(runs["scenario"].unique()))
    table = main_table(real)
    assert table.rows[0][table.head.index("err_mean, published")] == "43.5"
    assert published_table(real).rows[0][2:6] == ["45.0", "43.5", "+1.50", "yes"]
    assert "err_mean, published" not in main_table(embedded).head
    assert published_table(embedded).rows[0][2:6] == ["45.0", "43.5", "", "no"]


def test_pareto_front():
    points = [(1, 5), (2, 4), (2, 6), (3, 1), (0, 9), (3, 1)]
    assert pareto_front(points) == [(0, 9), (2, 6), (3, 1)]


def test_every_strategy_looks_unlike_those_it_is_drawn_with():
    kinds: dict[str, list[str]] = {}
    for path in (ROOT / "conf" / "strategy").glob("*.yaml"):
        kind = yaml.safe_load(path.read_text())["_target_"].split(".")[1]
        kinds.setdefault(kind, []).append(path.stem)
    for names in kinds.values():
        drawn = looks([*names, "own_method", "tent (around=window)"])
        seen = {(look["color"], look["marker"], look["linestyle"]) for look in drawn.values()}
        assert len(seen) == len(drawn)
        named = [drawn[name]["color"] for name in names if name in COLOURS]
        assert len(set(named)) == len(named)


# ------------------------------------------------------------------------------ the report


@pytest.fixture(scope="module")
def example_report(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    words = ["scripts/report.py", "results/example", "--out", str(out), "--figures"]
    command = [python(), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert "(* best, + second)" in done.stdout and "note: " in done.stdout
    return out


@pytest.mark.slow
def test_the_report_of_the_example_results(example_report):
    places = ("imagenet_c[embedded]", "split_cifar[embedded]")
    for name in ("tables.md", "tables.tex", "tables.csv", "runs.csv", "report.html"):
        text = (example_report / name).read_text().replace("{[}", "[").replace("{]}", "]")
        assert all(place.replace("_", r"\_" if ".tex" in name else "_") in text for place in places)
        assert str(ROOT) not in text
    tables = (example_report / "tables.md").read_text()
    assert tables.count("mbedded stand-in images") >= tables.count("### ")
    assert not list(example_report.rglob("*.tmp"))


@pytest.mark.slow
def test_figures_are_png_and_pdf_and_know_their_runs(example_report):
    keys = set(load_runs(ROOT / "results" / "example")["key"])
    files = sorted((example_report / "figures").iterdir())
    assert len(files) >= 16
    for path in files:
        assert "[embedded]" in path.name
        if path.suffix == ".png":
            said = Image.open(path).text["Description"]
            assert path.with_suffix(".pdf") in files
        else:
            said = re.search(rb"/Keywords \((.*?)\)", path.read_bytes(), re.S).group(1).decode()
        named = set(re.findall(r"\b[0-9a-f]{8}\b", said))
        assert named and named <= keys


CATCH = """<script>
const seen = [];
addEventListener("error", e => seen.push(e.message || `not loaded: ${e.target.outerHTML}`), true);
addEventListener("securitypolicyviolation", e => seen.push(`request: ${e.blockedURI}`));
const error = console.error; console.error = (...a) => { seen.push(a.join(" ")); error(...a); };
addEventListener("load", () => { const page = document.documentElement;
  document.title = "RESULT" + JSON.stringify({seen, inner: innerWidth, scroll: page.scrollWidth,
    images: [...document.images].map(i => i.naturalWidth)}) + "END"; });
</script>"""
POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:\">"
)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(example_report, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    browser = browser or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on PATH")
    text = (example_report / "report.html").read_text()
    assert "<script" not in text and not re.search(r'(?:src|href)="(?!data:|#)', text)
    # The frame has the width of a phone: windows of a headless browser may be wider than asked.
    page, frame = tmp_path / "page.html", tmp_path / "frame.html"
    page.write_text(text.replace("<head>", f"<head>{POLICY}{CATCH}", 1))
    frame.write_text(
        f'<iframe src="page.html" style="width:{width}px;height:800px;border:0"></iframe>'
        "<script>addEventListener('load', () => { document.title = "
        "document.querySelector('iframe').contentDocument.title; });</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--no-first-run", "--disable-quic"]
    flags += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [browser, *flags, "--window-size=1400,900", "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=HANG, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    found = re.search(r"RESULT(\{.*?\})END", done.stdout)
    assert found, done.stderr
    seen = json.loads(found.group(1))
    assert seen["seen"] == []
    assert len(seen["images"]) >= 8 and min(seen["images"]) > 0
    assert seen["inner"] == width and seen["scroll"] <= width


def test_make_tables_prints_the_same_tables(tmp_path, monkeypatch, capsys):
    from scripts import make_tables, report

    write_run(tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["make_tables.py", str(tmp_path / "results")])
    assert make_tables.main() == 0
    report.report([tmp_path / "results"], tmp_path / "out", formats=["md"])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tables.md"]
    assert capsys.readouterr().out == (tmp_path / "out" / "tables.md").read_text() + "\n"
    monkeypatch.setattr(sys, "argv", ["make_tables.py", str(tmp_path / "nowhere")])
    assert make_tables.main() == 2 and "no folder" in capsys.readouterr().err


def test_seeds_that_agree_are_no_spread(tmp_path):
    same = ("err_mean", *(f"err/{name}" for name in DOMAINS), "stability")
    for seed in (0, 1, 2):
        write_run(tmp_path, "source", seed=seed, metrics=dict.fromkeys(same, 34.93))
        write_run(tmp_path, "tent", seed=seed, metrics={"err_mean": 30.0 + seed})
    runs = load_runs(tmp_path)
    used = select(runs)
    said = [note for note in notes(runs, used) if "every seed gave the same numbers" in note]
    assert len(said) == 1 and "source" in said[0] and "scenario.order_seed" in said[0]
    table = main_table(used)
    shown = {row[0]: row[1:3] for row in table.rows}
    assert shown["source"] == ["3 equal", "34.9"] and "±" in shown["tent"][1]
    assert "source: 3 seeds gave equal numbers" in table.caption and "tent:" not in table.caption
