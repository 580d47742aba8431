"""Result tables: seeds are averaged, settings are not."""

from __future__ import annotations

from pathlib import Path

from core.experiment import run_experiment
from scripts.make_tables import load_runs, tables

TINY = ["scenario.images=20", "scenario.corruptions=[contrast,fog]", "scenario.probe_images=0",
        "scenario.clean_images=0", "strategy=source"]  # fmt: skip


def test_settings_are_rows_seeds_are_averaged_and_keys_on_request(configure):
    cfg = None
    for words in (["seed=0"], ["seed=1"], ["scenario.corruptions=[fog,contrast]"]):
        cfg = configure(*TINY, *words)
        run_experiment(cfg, [])
    runs = load_runs(Path(cfg.root))
    rows = [line for line in tables(runs).splitlines() if line.startswith("| source")]
    assert len(rows) == 4  # two settings, in two tables
    assert "| source (scenario.corruptions=['contrast', 'fog']) | 2 |" in rows[0]
    (row, _) = (
        line
        for line in tables(runs, ["scenario.corruptions"]).splitlines()
        if line.startswith("| source")
    )
    assert row.startswith("| source | 3 |") and "±" in row
