"""Data sets: one file each, named by a scenario; one of another package; options of their own."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, plain_yaml, write_images
from omegaconf import OmegaConf

from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.streams import data
from driftline.streams.dataset import CleanData, DomainData, ShiftData, SplitData, about
from driftline.streams.store import ImageStore

NAMES = sorted(module.name for module in pkgutil.iter_modules(data.__path__))
LIVE = {"on_error": "raise", "cache": None, "workers": 0, "seed": 0}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_says_what_its_data_set_is(name):
    """Its record is filled in, and the classes in it carry it."""
    record = about(name)
    assert record.title and record.published and record.licence
    assert "<data.root>" in record.layout
    roles = (ShiftData, SplitData, DomainData, CleanData)
    module = importlib.import_module(f"driftline.streams.data.{name}")
    classes = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type)
        and issubclass(thing, roles)
        and thing.__module__ == module.__name__
    ]
    assert all(c.about is record and c.__doc__ for c in classes)
    for role in roles:
        assert sum(issubclass(c, role) for c in classes) <= 1  # a scenario takes the one it can use


# ------------------------------------------------------------------------ of another package


def block(first_line: str) -> str:
    """The block of docs/scenarios.md that begins with this line."""
    page = (ROOT / "docs" / "scenarios.md").read_text()
    (text,) = re.findall(rf"```\w+\n({re.escape(first_line)}\n.*?)```", page, re.DOTALL)
    return text


@pytest.fixture
def birds(tmp_path, monkeypatch) -> dict[str, Any]:
    """The scenario of the page, the module of which lies in a folder of its own."""
    (tmp_path / "birds.py").write_text(block("# birds.py"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "birds", raising=False)
    own: Any = OmegaConf.to_container(OmegaConf.create(block("# conf/scenario/birds.yaml")))
    assert own.pop("defaults") == ["base/stream@_here_"]
    node = {**plain_yaml(ROOT / "conf" / "scenario" / "base" / "stream.yaml"), **own}
    for key in ("real", "embedded", "backbones"):
        node.pop(key)
    node |= {"label": "birds", "batch_size": 4, "probe_images": 2, "clean_images": 3, "images": 5}
    return node


def stream(node: dict[str, Any], root: Path | None = None) -> Any:
    live = {**LIVE, "data_root": root and str(root), "store": ImageStore()}
    return build(node, at="scenario", **live)


def test_a_data_set_of_another_package_is_a_stream(birds, tmp_path):
    for folder, classes in (
        ("garden", "ab"),
        ("forest", "ab"),
        ("train", "ab"),
        ("garden_night", "ab"),
    ):
        write_images(
            tmp_path / folder, [f"{c}/{i}.png" for c in classes for i in range(4)], size=32
        )
    made = stream(birds, tmp_path)
    assert made.domains == ["garden", "forest"] and made.num_classes == 2
    assert [s.name for s in made.segments] == ["garden", "forest"]
    assert [len(b.y) for b in made.segments[1].batches()] == [4, 1]
    assert sorted(made.probes) == [0, 1] and made.source().images == 8
    again = stream(birds | {"order": "mixed+shuffled"}, tmp_path)
    assert [s.name for s in again.segments] == ["mixed"]
    birds |= {"night": True, "domains": ["garden"]}
    other = stream(birds, tmp_path)
    assert other.domains == ["garden"]
    assert len({s.facts["fingerprint"] for s in (made, again, other)}) == 3


def test_a_data_set_of_another_package_has_stand_ins(birds):
    made = stream(birds)
    assert made.facts["label_space"] == "embedded" and made.num_classes == 20
    first, second = (next(iter(s.batches())) for s in made.segments)
    assert np.array_equal(first.y, second.y) and not np.array_equal(first.x, second.x)
    assert made.holdout is not None and made.source().description == "embedded training images"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"night": 3}, "scenario.night must be true or false, got 3"),
        ({"severity": 5}, "scenario has no option 'severity'.*(scenario.dataset=birds.Birds)"),
        ({"domains": ["gardn"]}, "'gardn' is no domain of Birds; did you mean 'garden'"),
        ({"dataset": "birds.Bird"}, "scenario.dataset='birds.Bird': birds has no 'Bird'"),
        ({"dataset": "pathlib.Path"}, "scenario.dataset=pathlib.Path is no subclass of ShiftData"),
        ({"dataset": "imagenet_d"}, "dataset=imagenet_d is nothing.*did you mean 'imagenet_c'"),
        ({"dataset": "cifar10"}, "dataset=cifar10 is nothing .*It can use cifar100_c, cifar10_c"),
        ({"dataset": None}, "scenario.dataset is missing"),
        ({"order": "gradual"}, "scenario.order=gradual needs severities, and Birds has none"),
    ],
)
def test_what_does_not_fit_a_data_set_is_one_clear_error(birds, change, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        stream(birds | change)


def test_missing_folders_name_the_layout(birds, tmp_path):
    with pytest.raises(UserError, match=r"garden does not exist. Expected layout: .*<camera>"):
        stream(birds, tmp_path)
