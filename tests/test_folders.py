"""Labelled images of the user's own as a stream: layouts, classes, domains, corruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import write_images
from test_streams import make

from driftline.core.errors import UserError
from driftline.runs.execute import run_experiment

CLASSES = ("ant", "bee", "cat")


def images(root: Path, *folders: str, classes: tuple[str, ...] = CLASSES, count: int = 4) -> Path:
    for folder in folders:
        names = [f"{c}/{i}.png" for c in classes for i in range(count)]
        write_images(root / folder, names, size=40, seed=len(folder))
    return root


def folders(configure: Any, root: Path | None, *words: str) -> Any:
    cfg = configure(
        "scenario=folders",
        "backbone=test_resnet",
        *([] if root is None else [f"data.root={root}"]),
        *("scenario.batch_size=5", "scenario.probe_images=2", "scenario.clean_images=4"),
        *("scenario.side=32", *words),
    )
    return make(cfg)


def shown(stream: Any) -> list[int]:
    """Labels in stream order."""
    return [y for s in stream.segments for b in s.batches() for y in b.y.tolist()]


# ------------------------------------------------------------------------ layouts


def table(root: Path) -> Path:
    images(root, "pictures")
    rows = [f"pictures/{c}/{i}.png;{c}" for c in CLASSES for i in range(4)]
    (root / "labels.csv").write_text("filename;class\n" + "\n".join(rows) + "\n")
    return root


LAYOUTS = {
    "root": lambda root: images(root, "."),
    "test": lambda root: images(root, "test"),
    "test beside train": lambda root: images(root, "train", "test"),
    "val alone": lambda root: images(root, "train", "val"),
    "labels.csv": table,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_folder_of_images_is_one_domain(configure, tmp_path, layout):
    stream = folders(configure, LAYOUTS[layout](tmp_path / "mine"), "scenario.images=9")
    assert stream.name == "folders" and stream.domains == ["images"] and stream.num_classes == 3
    labels = shown(stream)
    assert len(labels) == 9 and set(labels) == {0, 1, 2} and labels != sorted(labels)
    batch = next(iter(stream.segments[0].batches()))
    assert batch.x.shape == (5, 3, 32, 32) and stream.facts["label_space"] == "own"
    assert stream.facts["probe_from"] == {"images": "held_out"}


def test_folders_of_folders_are_domains(configure, tmp_path):
    root = images(tmp_path, "train", "val", "day", "night/test")
    stream = folders(configure, root)
    assert stream.domains == ["day", "night"]
    assert stream.source().images == 12
    assert sum(len(b.y) for b in stream.holdout()) == 4  # of val
    turned = folders(configure, root, "scenario.domains=[night,day]", "scenario.order=shuffled")
    assert [s.name for s in turned.segments] == ["night", "day"]
    with pytest.raises(UserError, match="'nigt' is no folder of labelled images.* 'night'"):
        folders(configure, root, "scenario.domains=[nigt]")


def test_corruptions_are_made_of_every_domain(configure, tmp_path):
    root = images(tmp_path, "day", "night")
    words = ["scenario.corrupt=on_the_fly", "scenario.corruptions=[fog,contrast,black]"]
    stream = folders(configure, root, *words, "scenario.severity=[1,5]")
    assert stream.name == "folders[on_the_fly]" and len(stream.domains) == 12
    assert stream.domains[0] == "day/fog:1" and stream.domains[-1] == "night/black:5"
    assert stream.facts["parameters"] == "those of cifar" and stream.holdout is None
    assert sorted(stream.probes) == [1, 3, 7, 9]  # the hardest, and none where nobody can be right
    one = folders(configure, root / "day", *words, "scenario.images=5", "scenario.order=gradual")
    assert one.segments[0].name == "0/fog:5" and one.holdout is not None
    with pytest.raises(UserError, match="would do nothing; add scenario.corrupt=on_the_fly"):
        folders(configure, root, "scenario.severity=3")


def test_source_images_are_held_out_or_of_a_folder(configure, tmp_path):
    root, other = images(tmp_path / "a", "."), images(tmp_path / "b", ".")
    words = ["scenario.corrupt=on_the_fly", "scenario.corruptions=[fog]", "scenario.images=5"]
    held_out = folders(configure, root, *words, "scenario.source_from=held_out").source()
    assert held_out.images == 5 and held_out.description.startswith("clean evaluation images")
    assert folders(configure, root, f"scenario.source_from={other}").source().images == 12
    with pytest.raises(UserError, match=r"source_from=train: 12 of 12 .* the run is judged on"):
        folders(configure, root).source()
    with pytest.raises(UserError, match="no training images under .*scenario.source_from"):
        folders(configure, table(tmp_path / "c"), f"scenario.source_from={tmp_path}").source()


def test_stand_ins_need_no_data(configure):
    stream = folders(configure, None, "scenario.images=20")
    assert stream.name == "folders[embedded]" and len(stream.domains) == 3
    corrupted = ["scenario.corrupt=on_the_fly", "scenario.corruptions=[fog]"]
    assert folders(configure, None, "scenario.images=20", *corrupted).domains == ["fog:5"]
    assert folders(configure, None, "scenario.domains=[a,b]").domains == ["a", "b"]


# ------------------------------------------------------------------------ classes


def test_labels_are_positions_among_the_classes_of_the_network(configure, tmp_path):
    """Those of `train` where it is there, those of a list, else those that have images."""
    root = images(tmp_path / "mine", "test", classes=("bee", "dog"))
    assert set(shown(folders(configure, root))) == {0, 1}
    (tmp_path / "names.txt").write_text("dog\nant\nbee\n")
    words = [f"scenario.classes={tmp_path / 'names.txt'}"]
    masked = folders(configure, root, *words)
    assert masked.outputs == ((0, 2), 3) and masked.num_classes == 2
    assert folders(configure, root, *words, "scenario.subset_scores=all").num_classes == 3
    images(root, "train", classes=("ant", "bee", "cat", "dog"))
    stream = folders(configure, root)
    assert set(shown(stream)) == {1, 3} and stream.num_classes == 4 and stream.outputs is None
    images(root, "test", classes=("eel",))
    with pytest.raises(UserError, match=r"not among the 4 of the list .*\['eel'\]"):
        folders(configure, root)


def test_numbers_in_a_table_are_positions_among_the_classes(configure, tmp_path):
    write_images(tmp_path, ["a.png", "b.png"], size=40)
    (tmp_path / "labels.csv").write_text("filename,class_index\na.png,2\nb.png,0\n")
    assert sorted(shown(folders(configure, tmp_path))) == [0, 2]
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    stream = folders(configure, tmp_path, f"scenario.classes={tmp_path / 'names.txt'}")
    assert stream.outputs == ((0, 2), 4) and sorted(shown(stream)) == [0, 1]
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    with pytest.raises(UserError, match=r"not among the 2 of the list .*\[2\]"):
        folders(configure, tmp_path, f"scenario.classes={tmp_path / 'names.txt'}")


def test_folders_of_synset_ids_are_classes_of_imagenet(configure, tmp_path):
    images(tmp_path, "test", classes=("n01440764", "n01484850"))
    stream = folders(configure, tmp_path, "scenario.classes=imagenet1k")
    assert stream.outputs == ((0, 2), 1000) and stream.facts["label_space"] == "imagenet1k"
    assert stream.facts["subset"] == {"classes": 2, "scores": "masked"}


@pytest.mark.parametrize(
    ("text", "message"),
    [("ant\nant\n", "each class once"), ("", "each class once"), (None, "no such file")],
)
def test_a_list_of_classes_that_cannot_be_one_is_refused(configure, tmp_path, text, message):
    path = tmp_path / "names.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"scenario.classes=.*{message}"):
        folders(configure, images(tmp_path, "test"), f"scenario.classes={path}")


# ------------------------------------------------------------------------ whole runs


def saved(path: Path, outputs: int) -> Path:
    torch.manual_seed(1)
    net = torchvision.models.mobilenet_v3_small(weights=None, num_classes=outputs)
    torch.save(net.state_dict(), path)
    return path


def test_a_network_of_ones_own_runs_on_a_part_of_its_classes(configure, tmp_path):
    root = images(tmp_path / "mine", "test", classes=("bee", "dog"))
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    words = ["scenario=folders", "strategy=source", "scenario.side=32", "scenario.batch_size=4"]
    words += ["backbone=torchvision", "backbone.arch=mobilenet_v3_small", "scenario.probe_images=0"]
    words += [f"data.root={root}", f"scenario.classes={tmp_path / 'names.txt'}"]
    fitting, wide = (f"backbone.checkpoint={saved(tmp_path / f'{n}.pt', n)}" for n in (4, 6))
    summary = run_experiment(configure(*words, fitting), [])
    assert summary["data"]["subset"] == {"classes": 2, "scores": "masked"}
    assert summary["data"]["classes"] == 2 and "err_mean" in summary["metrics"]
    every = run_experiment(configure(*words, fitting, "scenario.subset_scores=all"), [])
    assert every["data"]["classes"] == 4
    assert every["run"]["folder"] != summary["run"]["folder"]
    among, alone = (r["metrics"]["err_mean"] for r in (every, summary))
    assert among >= alone  # more ways to be wrong
    with pytest.raises(UserError, match="scenario=folders has 4 classes, but .* has 6 outputs"):
        run_experiment(configure(*words, wide), [])
    with pytest.raises(UserError, match="holds own classes.*, set scenario.classes=imagenet1k"):
        run_experiment(configure(*words[:4], words[-2], "backbone=embedded_resnet"), [])
    with pytest.raises(UserError, match="none is agreed on for scenario=folders"):
        run_experiment(configure(*words[:2], words[-2]), [])
