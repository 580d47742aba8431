"""Result tables: seeds are averaged, settings are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from driftline.analysis import load_runs, select
from driftline.analysis.tables import with_intransigence
from driftline.runs.execute import run_experiment
from scripts.make_tables import tables

TINY = ["scenario.images=20", "scenario.corruptions=[contrast,fog]", "scenario.probe_images=0",
        "scenario.clean_images=0", "strategy=source"]  # fmt: skip


def test_settings_are_rows_seeds_are_averaged_and_keys_on_request(configure):
    cfg = None
    for words in (["seed=0"], ["seed=1"], ["scenario.corruptions=[fog,contrast]"]):
        cfg = configure(*TINY, *words)
        run_experiment(cfg, [])
    runs = load_runs(Path(cfg.root))
    rows = [line for line in tables(runs).splitlines() if line.startswith("| source")]
    assert len(rows) == 6  # two streams, each in three tables
    assert rows[0].startswith("| source | 1 |") and rows[3].startswith("| source | 1 |")
    assert "embedded_resnet, scenario.corruptions=['contrast', 'fog']\n" in tables(runs)
    (row, *_) = (
        line
        for line in tables(runs, ["scenario.corruptions"]).splitlines()
        if line.startswith("| source")
    )
    assert row.startswith("| source | 2 |") and "±" in row


def test_transfer_between_domains_and_intransigence_against_joint_training(configure):
    words = ["scenario=domains_imagefolder", "scenario.domains=[clean,contrast]"]
    words += ["scenario.embedded_images=[4,2]"]
    for strategy in ("linear_probe", "joint"):
        cfg = configure(f"strategy={strategy}", *words, "strategy.epochs=1")
        summary = run_experiment(cfg, [])
        cells = {(c["after"], c["on"]): c["acc"] for c in rows_of_matrix(summary)}
        assert len(cells) == 6  # all at the start, and the second domain before it is learned
        expected = cells[0, "contrast"] - cells[-1, "contrast"]
        assert summary["metrics"]["fwt"] == pytest.approx(expected)
    runs = with_intransigence(select(load_runs(cfg.root))).set_index("strategy")
    probe, joint = (runs.at[k, "learned"] for k in ("linear_probe", "joint"))
    gap = sum(j - p for j, p in zip(joint, probe, strict=True)) / 2
    assert runs.at["linear_probe", "metrics.intransigence"] == pytest.approx(gap)
    assert runs.at["joint", "metrics.intransigence"] == 0


def rows_of_matrix(summary) -> list[dict]:
    text = (Path(summary["run"]["folder"]) / "matrix.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
