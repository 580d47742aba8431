"""The tables of papers/: an option is what its keys say when typed; mistakes have one answer."""

from __future__ import annotations

import os
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from driftline.core import papers
from driftline.core.errors import UserError
from driftline.runs import command

OPTIONS = [(group, name) for group in papers.GROUPS for name in papers.options(group)]
GOOD = """\
sources:
  logs: {metrics: [acc_inc, acc_last], status: seen, comparable: true, source: "a/b"}
  readme: {metrics: [err_mean], status: seen, comparable: true, source: "c/d"}
common: {strategy: tent, strategy.lr: 0.1}
blocks:
  slow: {strategy.lr: 0.01, scenario.severity: 3}
recipes:
  cifar10_c: {use: [slow], strategy.mode: eval}
rows:
  plain: {figures: {readme: {source: 43.5, tent: 18.6}}}
  slow: {use: [slow], scenario.severity: 1, figures: {logs: {tent: [2.0, 1.0]}}}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write(text)` makes papers/mine.yaml of a folder of its own the only table."""
    monkeypatch.setattr(papers, "PAPERS", tmp_path)

    def make(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return make


def settings(*words: str) -> dict[str, Any]:
    """The composed configuration, without published figures."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg: Any = OmegaConf.to_container(compose("config", list(words)))
    return {key: value for key, value in cfg.items() if key != "reference"}


def typed(key: str, value: Any) -> str:
    """A key of a table as a word of the command line."""
    return f"{papers.CHOICES.get(key, key)}={'null' if value is None else value}"


@pytest.mark.slow
@pytest.mark.one_in(30)
@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_an_option_is_what_its_words_say_when_typed(group, name):
    """Only mappings and the runs of a sweep are not simple words."""
    words = papers.words(group, name)
    plain = [typed(k, v) for k, v in words.items() if not isinstance(v, dict)]
    choice = [f"{group}={name}"]
    if group == "recipe":
        choice += (own := [f"strategy={name.partition('/')[0]}", "scenario=split_cifar10"])
        plain += own
    nested = {k for k, v in words.items() if isinstance(v, dict)}
    a, b = settings(*choice), settings(*plain)
    for side in (a, b):
        for key in nested:
            *above, last = key.split(".")
            reduce(lambda node, part: node.get(part, {}), above, side).pop(last, None)
    assert a == b


def test_everything_that_a_table_defines_is_used():
    """Blocks and sources, but for those of recipes named after their scenario."""
    for paper in papers.papers():
        table = papers.table(paper)
        every = [*table["rows"].values(), *table["recipes"].values()]
        assert {b for one in every for b in one.get("use", ())} == set(table["blocks"]), paper
        sources = {s for row in table["rows"].values() for s in row["figures"]}
        assert sources == set(table["sources"]), paper


def test_later_keys_replace_earlier_ones(write):
    write(GOOD)
    assert papers.papers() == ["mine"]
    assert papers.options("experiment") == ["mine/plain", "mine/slow"]
    assert papers.words("experiment", "mine/plain") == {"strategy": "tent", "strategy.lr": 0.1}
    assert papers.option("experiment", "mine/slow") == {
        "defaults": [{"override /strategy": "tent"}],
        "strategy": {"lr": 0.01},
        "scenario": {"severity": 1},
        "reference": papers.figures("mine/slow"),
    }
    assert papers.option("recipe", "mine/cifar10_c") == {
        "strategy": {"lr": 0.01, "mode": "eval"},
        "scenario": {"severity": 3},
    }


def test_figures_carry_their_source(write):
    write(GOOD)
    about = {"status": "seen", "comparable": True}
    assert papers.figures("mine/slow") == [
        {"strategy": "tent", "metric": "acc_inc", "value": 2.0, **about, "source": "a/b"},
        {"strategy": "tent", "metric": "acc_last", "value": 1.0, **about, "source": "a/b"},
    ]
    assert [row["value"] for row in papers.figures("mine/plain")] == [43.5, 18.6]


def test_a_changed_table_is_read_again(write):
    path = write(GOOD)
    assert papers.words("experiment", "mine/plain")["strategy.lr"] == 0.1
    later = path.stat().st_mtime_ns + 1
    write(GOOD.replace("strategy.lr: 0.1}", "strategy.lr: 0.2}"))
    os.utime(path, ns=(later, later))
    assert papers.words("experiment", "mine/plain")["strategy.lr"] == 0.2


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("rows:", "row:", "a table has no key 'row'; did you mean 'rows'?"),
        ("use: [slow], scenario", "use: [slw], scenario", "block 'slw', not there; did you mean"),
        ("{logs:", "{log:", "source 'log', not in `sources`; did you mean 'logs'?"),
        ("[2.0, 1.0]", "[2.0]", "1 for the columns ['acc_inc', 'acc_last']"),
        ("common: {", "common: {{", "cannot be read"),
        ("metrics:", "metric:", "sources.logs lacks metrics"),
        ("{strategy.lr: 0.01, scenario.severity: 3}", "", "blocks.slow must be settings, got None"),
    ],
)
def test_a_mistake_in_a_table_has_one_answer(write, right, wrong, said):
    assert right in GOOD
    write(GOOD.replace(right, wrong))
    with pytest.raises(UserError) as error:
        papers.exists("experiment", "mine/slow")
        papers.option("experiment", "mine/slow")
    assert said in str(error.value) and "mine.yaml" in str(error.value)
    with pytest.raises(HydraException) as raised:
        settings("experiment=mine/slow")
    assert said in command.explain(raised.value)


def test_rows_are_looked_up_among_all_tables(write):
    write(GOOD)
    assert command.check_words(["experiment=mine/slow", "recipe=mine/cifar10_c"]) is None
    for word in ("experiment=mine/slo", "experiment=mine", "experiment=other/slow", "recipe=slow"):
        text = command.check_words([word])
        assert text is not None and text.startswith(f"{word}: no such option"), text
    text = command.check_words(["experiment=mine/slo"])
    assert text is not None and "did you mean 'mine/slow'?" in text


@pytest.mark.parametrize(
    ("words", "lr", "batch"),
    [
        ("strategy=ranpac scenario=split_cub", 0.01, 48),  # recipe/ranpac/split_imagefolder
        ("strategy=mos scenario=split_cub", 0.01, 32),  # recipe/mos/cub
        ("strategy=ease scenario=split_imagenet_r", 0.05, 16),
        ("strategy=slca scenario=split_cars", 0.01, 128),
        ("strategy=tuna scenario=split_objectnet", 0.05, 48),
        ("strategy=ease scenario=split_objectnet", 0.025, 128),  # two recipes, by the weights
        ("strategy=ranpac scenario=split_tiny_imagenet", 0.01, 128),  # no set of the papers
    ],
)
def test_a_named_set_takes_the_recipe_of_its_name_or_of_class_folders(words, lr, batch):
    cfg = settings(*words.split())
    assert (cfg["scenario"]["real"]["batch_size"], cfg["strategy"]["optim"]["lr"]) == (batch, lr)


def test_the_named_sets_of_class_folders_are_scenarios():
    for name in papers.OF_FOLDERS:
        assert (ROOT / "conf" / "scenario" / f"split_{name}.yaml").is_file()
