"""What others give (archives, labels, names) is data: it is not run and leads nowhere else."""

from __future__ import annotations

import csv
import io
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf, open_dict

from driftline.analysis import tables
from driftline.core.errors import UserError
from driftline.runs.schema import check_settings
from driftline.streams.data import cifar10
from driftline.streams.data.cifar10 import cifar
from driftline.streams.data.cifar10_c import cifar_c
from driftline.streams.data.imagenet import imagenet_clean
from scripts.export_images import export

OUTWARD = ("../x", "..", "a/../../x", "/tmp/x", "a\\..\\x", "x\ny", "", ".hidden")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", OUTWARD)
@pytest.mark.parametrize(
    "key", ["strategy.name", "scenario.name", "scenario.label", "backbone.name"]
)
def test_names_that_become_folders_stay_in_root(configure, key, name):
    cfg = configure("strategy=tent", "backbone=embedded_resnet")
    with open_dict(cfg):
        OmegaConf.update(cfg, key, name)
    with pytest.raises(UserError, match=re.escape(key)):
        check_settings(cfg)


@pytest.mark.parametrize("name", [name for name in OUTWARD if "/" in name or "\\" in name])
def test_an_archive_of_images_stays_in_its_folder(tmp_path, name):
    archive = tmp_path / "a.npz"
    images, labels = np.zeros((2, 4, 4, 3), np.uint8), np.arange(2)
    np.savez(archive, images=images, labels=labels, names=np.asarray(["a", name]))
    with pytest.raises(UserError, match="names of classes"):
        export(archive, tmp_path / "deep" / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(UserError, match="no archive of arrays"):
        export(archive, tmp_path / "deep" / "out")


class Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("which", ["cifar10", "cifar100"])
@pytest.mark.parametrize("damage", ["command", "half", "empty", "text", "gone", "sum"])
def test_a_pickle_of_cifar_is_read_and_not_run(tmp_path, monkeypatch, which, damage):
    """Even where somebody makes the MD5 sum fit."""
    if damage != "sum":
        monkeypatch.setattr(cifar10, "intact", lambda *a: True)
    number = 10 if which == "cifar10" else 100
    folder = tmp_path / ("cifar-10-batches-py" if which == "cifar10" else "cifar-100-python")
    test, meta = ("test_batch", "batches.meta") if which == "cifar10" else ("test", "meta")
    labels, names = (
        ("labels", "label_names")
        if which == "cifar10"
        else (
            "fine_labels",
            "fine_label_names",
        )
    )
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (number, 3072), dtype=np.uint8)
    whole = pickle.dumps({"data": pixels, labels: list(range(number))}, protocol=2)
    (folder / test).write_bytes(whole)
    (folder / meta).write_bytes(pickle.dumps({names: list(map(str, range(number)))}))
    if damage != "sum":
        images = cifar(tmp_path, which, train=False)
        assert np.array_equal(images.pixels, pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        assert images.labels.tolist() == list(range(number)) and len(images.class_names) == number
    target = tmp_path / "made by a pickle"
    contents = {
        "command": pickle.dumps({"data": Command(target)}),
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"no pickle at all",
        "sum": whole,
    }
    if damage in contents:
        (folder / test).write_bytes(contents[damage])
    else:
        (folder / test).unlink()
    with pytest.raises(UserError, match=f"{which} is missing or damaged: .*{test}"):
        cifar(tmp_path, which, train=False)
    assert not target.exists()


@pytest.mark.parametrize("file", ["labels.npy", "fog.npy"])
@pytest.mark.parametrize("damage", ["half", "empty", "text", "pickle", "floats"])
def test_damaged_arrays_are_one_line(cifar10_c_root, file, damage):
    path = cifar10_c_root / "CIFAR-10-C" / file
    whole = path.read_bytes()
    if damage == "floats":
        np.save(path, np.load(path) + 0.5)
    elif damage == "pickle":
        np.save(path, np.asarray([{}], object), allow_pickle=True)
    else:
        path.write_bytes(
            {"half": whole[: len(whole) // 2], "empty": b"", "text": b"x" * 99}[damage]
        )
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        cifar_c(cifar10_c_root, "cifar10", ["fog"], [3])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "filename\na.png\n", "filename,class_index\na.png,x\n", "filename,class_index\na\n"],
)
def test_a_damaged_list_of_labels_is_one_line(tmp_path, text):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=r"labels\.csv needs the columns"):
        imagenet_clean(tmp_path)
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match=r"labels\.csv needs the columns"):
        imagenet_clean(tmp_path)


# ------------------------------------------------------------------------ tables

EVIL = ("=cmd|' /C calc'!A0", "+1", "-1+2", "@SUM(A1)", "\tx", "<script>alert(1)</script>")
EVIL += ("a\nb", "a\r\nb", "a|b", "a\\|b", "\\input{x}", "%", "a\u2028b")


@pytest.mark.parametrize("text", EVIL)
def test_no_label_is_a_formula_a_tag_or_a_new_line(text):
    frame = pd.DataFrame({text: [1.5, 2.0], "b": [text, -3], "c": [-1.0, None]})
    rows = list(csv.reader(io.StringIO(tables.csv(frame))))
    assert not any(cell.startswith(("=", "+", "@", "\t")) for row in rows for cell in row)
    assert rows[0][0] in (text, f"'{text}") and rows[1][1] == rows[0][0]
    assert [row[2] for row in rows[1:]] == ["-1.0", ""] and rows[2][1] == "-3"  # numbers stay

    table = tables.Table(title=text, head=["m", text], rows=[[text, "1"]], marks={}, caption=text)
    lines = tables.markdown(table).splitlines()
    assert "<script" not in "".join(lines)
    body = [line for line in lines if line.startswith("|")]
    assert len(body) == 3
    cells = [re.findall(r"(?<!\\)(?:\\\\)*\|", line) for line in body]
    assert [len(found) for found in cells] == [3, 3, 3]
    assert len(tables.latex(table).splitlines()) == 12 and r"\input" not in tables.latex(table)
