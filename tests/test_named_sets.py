"""Named sets of continual learning: their classes, splits and orders in the published layouts."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from split_layouts import LAYOUTS, NUMBERS, Layout, published_files  # noqa: F401
from test_streams import make

from driftline.core.errors import UserError
from driftline.core.stream import TaskStream

pytestmark = pytest.mark.usefixtures("published_files")


@pytest.fixture(scope="module", params=LAYOUTS)
def case(request, tmp_path_factory) -> tuple[Layout, Path]:
    """A set on a disk."""
    layout = LAYOUTS[request.param]
    root = tmp_path_factory.mktemp("set")
    layout.build(root)
    return layout, root


def stream(configure, layout: Layout, root: Path, *words: str) -> TaskStream:
    settings = [f"scenario={layout.scenario}", f"data.root={root}", "scenario.pipeline=raw"]
    return make(configure(*settings, *layout.words, *words))


@pytest.mark.one_in(2)
def test_classes_and_split_are_those_of_the_set(configure, case):
    layout, root = case
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = stream(configure, layout, root)
    assert made.num_classes == layout.classes
    said = [str(w.message) for w in caught]
    assert len(said) == (layout.warns is not None) and all(layout.warns in s for s in said)
    task, label = made.order["task"], made.order["label"]
    if layout.domains:
        assert tuple(t.name for t in made.tasks) == layout.domains
    for t in made.tasks if layout.domains else made.tasks[-1:]:
        learned = np.bincount(label[(task == t.index) | (not layout.domains)])
        lacking = [1] if t.name == "painting" else []  # the class that has no training images there
        assert np.flatnonzero(learned == 0).tolist() == lacking
        assert set(learned.tolist()) - {0} == {layout.images[0]}
        tested = np.bincount([y for batch in t.test() for y in batch.y.tolist()])
        assert set(tested[t.tested.start :].tolist()) == {layout.images[1]}


@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore:.*published")
def test_a_missing_part_is_one_clear_error(configure, case, tmp_path):
    layout, root = case
    for part in layout.parts:
        (root / part).rename(tmp_path / "away")
        try:
            with pytest.raises(UserError, match=f"lacks .*{Path(part).name}") as error:
                stream(configure, layout, root)
        finally:
            (tmp_path / "away").rename(root / part)
        assert "Expected layout: <data.root>/" in str(error.value)
    with pytest.raises(UserError, match="lacks ") as error:
        stream(configure, layout, tmp_path)
    assert str(error.value).count("lacks") == 1


@pytest.mark.one_in(3)
@pytest.mark.filterwarnings("ignore:.*published")
def test_a_set_with_a_class_too_many_is_not_taken_for_it(configure, case):
    layout, root = case
    folder = next(p for p in sorted(root.rglob("*")) if p.is_dir() and any(p.glob("*.png")))
    folder = folder.parent if folder.name == "images" else folder
    shutil.copytree(folder, folder.with_name("stranger"))
    try:
        if not layout.stranger:
            assert stream(configure, layout, root).num_classes == layout.classes
            return
        with pytest.raises(UserError, match=layout.stranger):
            stream(configure, layout, root)
    finally:
        shutil.rmtree(folder.with_name("stranger"))


@pytest.mark.filterwarnings("ignore:.*published")
def test_class_orders_mean_the_classes_that_they_mean_in_the_official_code(configure, tmp_path):
    """torchvision's ImageFolder sorts folders as texts, 10 before 2; seed 1993 permutes these."""
    from torchvision.datasets import ImageFolder

    layout = LAYOUTS["objectnet"]
    layout.build(tmp_path)
    official = ImageFolder(str(tmp_path / "objectnet" / "train"))
    assert official.classes != NUMBERS[:200]
    made = stream(configure, layout, tmp_path)
    order = made.facts["class_order"]
    # As logged by several public runs of LAMDA-PILOT on sets of 200 classes.
    assert order[:8] == [168, 136, 51, 9, 183, 101, 171, 99] and order[-3:] == [177, 185, 161]
    rows = made.order["row"][made.order["task"] == 0]
    assert {official.targets[row] for row in rows} == set(order[:10])


def test_vtab_is_not_shuffled(configure, tmp_path):
    layout = LAYOUTS["vtab"]
    layout.build(tmp_path)
    with pytest.warns(UserWarning, match="1,796 and 8,619 are published"):
        made = stream(configure, layout, tmp_path)
    assert made.facts["class_order"] == list(range(50))
    assert [task.classes for task in made.tasks] == [range(i, i + 10) for i in range(0, 50, 10)]


def test_the_subsets_that_are_called_imagenet_100():
    """Facts of the lists: they differ, and what is common to them is little."""
    from driftline.streams.data.imagenet import wnids
    from driftline.streams.data.imagenet100 import subset

    sets = {name: subset(name, ["b", "a"]) for name in ("first", "seeded", "cmc", "folders", "all")}
    assert sets.pop("folders") == ["a", "b"] and sets.pop("all") == wnids()
    assert all(len(s) == len(set(s)) == 100 and s == sorted(s) for s in sets.values())
    assert all(set(s) <= set(wnids()) for s in sets.values())
    assert sets["first"][-1] == wnids()[99]
    text = "\n".join(sets["cmc"])  # of the sorted lines of imagenet100.txt
    sha256 = "d61d354b64beb3ce2c2c9cf04a874298362dc9fcd589e15ee34c5e4592145746"
    assert hashlib.sha256(text.encode()).hexdigest() == sha256
    drawn = [54, 7, 894, 512, 126, 337, 988, 11, 284, 493]  # as public code prints them
    assert {wnids()[i] for i in drawn} <= set(sets["seeded"])
