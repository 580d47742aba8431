"""Data sets: one file each, named by a scenario; one of another package; options of their own."""

from __future__ import annotations

import importlib
import pkgutil
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, scenario_node, write_images
from omegaconf import OmegaConf
from torch import nn

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.streams import data
from driftline.streams.dataset import (
    About,
    CleanData,
    DomainData,
    ShiftData,
    SplitData,
    SubsetData,
    about,
)
from driftline.streams.images import Files, image_folder
from driftline.streams.natural import NaturalData
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
    for key in ("name", "backbones"):
        own.pop(key)
    counts = {"batch_size": 4, "probe_images": 2, "clean_images": 3, "images": 5}
    return scenario_node("base/stream", **own, **counts)


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
        ({"dataset": "imagenet_x"}, "dataset=imagenet_x is nothing.*did you mean 'imagenet_"),
        ({"dataset": "cifar10"}, "dataset=cifar10 is nothing .*It can use .*cifar100_c, "),
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


# ------------------------------------------------------------------------ a part of the classes

NETWORK = ["ant", "bee", "cat", "dog", "eel", "fox"]  # what the outputs of a network mean


@dataclass(frozen=True, kw_only=True)
class Pets(SubsetData, NaturalData):
    """Two of the network's classes in the domain, all of them among the clean images."""

    about = About("Pets", "", "nowhere", "none", "<data.root>", "animals", subset=(3, 2))
    all_domains = ("home",)

    def read(self, root, domain):
        files = image_folder(root / domain, "")
        labels = np.asarray([NETWORK.index(files.class_names[y]) for y in files.labels])
        return Files(files.root, files.names, labels, NETWORK)

    def clean(self, root):
        return self.read(root, "clean")

    def training(self, folder):
        return self.read(folder, "train")


@pytest.fixture
def pets(birds, tmp_path) -> dict[str, Any]:
    for folder, classes in (("home", ["cat", "dog"]), ("clean", NETWORK), ("train", NETWORK)):
        write_images(
            tmp_path / folder, [f"{c}/{i}.png" for c in classes for i in range(2)], size=32
        )
    birds.pop("night")
    return birds | {"dataset": f"{__name__}.Pets", "images": None, "clean_images": 12}


@pytest.mark.parametrize("scores", ["masked", "all"])
def test_a_part_of_the_classes_is_scored_alone_or_among_all(pets, tmp_path, scores):
    made = stream(pets | {"subset_scores": scores}, tmp_path)
    dog, cat = (0, 1) if scores == "masked" else (3, 2)
    shown = {int(r): int(y) for s in made.segments for b in s.batches()
             for r, y in zip(b.index, b.y, strict=True)}  # fmt: skip
    assert shown == {0: cat, 1: cat, 2: dog, 3: dog}
    beside = [y for images in (made.holdout(), made.source().batches(5)) for b in images
              for y in b.y.tolist()]  # fmt: skip
    assert made.facts["subset"] == {"classes": 2, "scores": scores}
    if scores == "all":
        assert made.num_classes == 6 and made.outputs is None and made.source().images == 12
        assert sorted(beside) == sorted([*range(6)] * 4)
    else:
        assert made.num_classes == 2 and made.outputs == ((3, 2), 6) and made.source().images == 4
        assert sorted(beside) == [0, 0, 0, 0, 1, 1, 1, 1]
        other = stream(pets | {"subset_scores": "all"}, tmp_path)
        assert other.facts["fingerprint"] != made.facts["fingerprint"]
        assert other.source().fingerprint != made.source().fingerprint


@pytest.mark.parametrize("bias", [True, False])
def test_outputs_that_are_kept_have_the_scores_they_had(bias):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6, bias=bias))
    backbone, x = Backbone(net), torch.rand(3, 3, 2, 2)
    before = backbone(x)
    backbone.keep_outputs([4, 1])
    assert backbone.num_classes == 2 and backbone.head is not None
    assert torch.allclose(backbone(x), before[:, [4, 1]], atol=1e-7)
    assert torch.allclose(backbone.head(backbone.features(x)), backbone(x))
    with pytest.raises(UserError, match="no linear layer at its end"):
        Backbone(nn.Sequential(nn.Conv2d(3, 6, 2), nn.Flatten())).keep_outputs([1])


# ------------------------------------------------------------------------ evaluation and training


@pytest.mark.parametrize("form", ["the folder", "a link", "the clean images"])
def test_evaluation_images_are_never_training_images(pets, tmp_path, form):
    """Whatever leads there: the root itself, links, images that the run is judged on besides."""
    source = tmp_path / "other"
    (source / "train").mkdir(parents=True)
    shown = tmp_path / ("clean" if form == "the clean images" else "home")
    for path in shown.glob("*/*"):
        copy = source / "train" / path.parent.name / path.name
        copy.parent.mkdir(exist_ok=True)
        copy.symlink_to(path)
    if form == "the folder":
        (source / "train").rename(tmp_path / "links")
        (source / "train").symlink_to(shown)
    node = pets | {"subset_scores": "all", "source_from": str(source)}
    with pytest.raises(UserError, match=r"scenario.source_from=.* are images that the run is judg"):
        stream(node, tmp_path).source()
    assert stream(node | {"source_from": "train"}, tmp_path).source().images == 12


@pytest.mark.parametrize("corrupt", ["on_the_fly", "released"])
def test_validation_images_of_imagenet_are_no_training_images(configure, tmp_path, corrupt):
    """Copies keep their names, which no training image has."""
    from test_streams import make

    names = [f"n01440764/ILSVRC2012_val_{i:08d}.JPEG" for i in range(6)]
    write_images(tmp_path / "val", names, size=40)
    write_images(tmp_path / "ImageNet-C" / "fog" / "5", names, size=40)
    write_images(tmp_path / "train", [f"n01440764/n01440764_{i}.JPEG" for i in range(3)], size=40)
    words = ["scenario=imagenet_c", "scenario.image_list=all", "scenario.images=4"]
    words += ["scenario.corruptions=[fog]", "scenario.probe_images=2", "scenario.clean_images=2"]
    words += [f"scenario.corrupt={corrupt}"]

    def source(root: Path, *more: str) -> Any:
        return make(configure(*words, f"data.root={root}", *more)).source()

    assert source(tmp_path).description == "training images"
    with pytest.raises(UserError, match="source_from=.*val: . of 6 source images are images"):
        source(tmp_path, f"scenario.source_from={tmp_path / 'val'}")
    if corrupt == "on_the_fly":
        with pytest.raises(UserError, match="scenario.source_from=train: 6 of 6 source images"):
            source(tmp_path / "val")
    else:
        held_out = source(tmp_path, "scenario.source_from=held_out", "scenario.probe_images=0")
        assert held_out.images == 2
