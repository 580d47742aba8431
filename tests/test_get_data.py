"""Every record of a data set says truly how it is loaded, and the script does what it says."""

from __future__ import annotations

import re
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from conftest import ROOT
from test_downloads import BIRDS, md5

from driftline.core.errors import UserError
from driftline.core.paths import CONF
from driftline.streams.corrupted import frost_source
from driftline.streams.data import cifar10, cifar10_c, imagenet, imagenet_c
from driftline.streams.dataset import About, about, named
from driftline.streams.downloads import STATE, Download, Published, escapes
from driftline.streams.images import Arrays

sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "tools"))
import data_table
import get_data

LOADED = [name for name in named() if about(name).download is not None]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", LOADED)
def test_a_record_can_be_loaded_or_says_what_to_do(name, configure):
    record, download = get_data.record(name)
    assert record.name == name and record.licence and record.published
    assert download.by_hand or all(file.url for file in download.files)
    files = [file.file for file in download.files]
    assert all(files) and len(set(files)) == len(files)
    for file in download.files:
        assert not file.url or re.fullmatch(r"https?://[^\s]+", file.url)
        assert re.fullmatch(r"|md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}", file.checksum)
        assert not file.checksum or download.sources
        assert file.part or not file.optional
        for place in file.creates:
            assert not escapes(place) and PurePosixPath(place).is_relative_to(file.into)
    tops = {place.partition("/")[0] for file in download.files for place in file.creates}
    assert all(top in record.layout for top in tops if not top.startswith("imagenetv2"))
    command = get_data.use(name, download, Path("/data"))
    if command.startswith("python run.py"):
        configure(*command.split()[2:])
    else:
        assert not (CONF / "scenario" / f"{name}.yaml").exists()


@pytest.mark.parametrize("name", LOADED)
def test_errors_about_missing_data_name_the_command(name):
    loads = "loads it" if about(name).download.by_program else "says how to get it"
    assert f"`python scripts/get_data.py {name} --to <data.root>` {loads}" in about(name).expected


def test_errors_know_what_is_there_and_where_the_rest_is(
    imagenet_clean_root, tmp_path, monkeypatch
):
    with pytest.raises(UserError, match=r"get_data.py imagenet_c --to") as error:
        imagenet_c.imagenet_c(imagenet_clean_root, ["fog"], [5])
    way = "scenario.corrupt=on_the_fly scenario.image_list=all makes the corruptions of them"
    assert f"12 clean images are in {imagenet_clean_root}: {way}" in str(error.value)
    with pytest.raises(UserError, match=r"no ImageNet training images.*get_data.py imagenet --to"):
        imagenet.imagenet_train(tmp_path / "none")
    with pytest.raises(UserError, match=r"lacks frost1.png.*get_data.py frost --to"):
        frost_source(str(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"get_data.py cifar10_c --to") as error:
        cifar10_c.cifar_c(tmp_path / "none", "cifar10", ["fog"], [5])
    assert "clean images" not in str(error.value)
    clean = Arrays(np.zeros((3, 32, 32, 3), np.uint8), np.zeros(3), ["a"])
    monkeypatch.setattr(cifar10, "cifar", lambda root, which, *, train: clean)
    way = "3 clean images are in .*none: scenario.corrupt=on_the_fly makes"
    with pytest.raises(UserError, match=way):
        cifar10_c.cifar_c(tmp_path / "none", "cifar10", ["fog"], [5])


def test_sets_that_papers_use_can_be_loaded():
    by_program = {name for name in LOADED if about(name).download.by_program}
    assert by_program >= {
        "cifar10", "cifar100", "cifar10_c", "cifar100_c", "imagenet_c", "imagenet_r", "imagenet_a",
        "imagenet_v2", "tiny_imagenet", "cub200", "domainnet", "core50",
    }  # fmt: skip
    assert {"imagenet", "objectnet", "pacs", "office_home"} <= set(LOADED) - by_program


def test_the_page_is_current():
    text = data_table.PAGE.read_text()
    assert data_table.filled(text) == text, "run python tools/data_table.py"


@pytest.fixture
def birds(tmp_path, monkeypatch) -> str:
    """A set of the user's own package; its file is in the folder `hand`."""
    hand = tmp_path / "hand"
    hand.mkdir()
    (hand / "birds.tar.gz").write_bytes(BIRDS)
    file = Published("", ("birds",), len(BIRDS), md5(BIRDS), name="birds.tar.gz")
    record = About(
        title="Birds",
        paper="",
        published="the garden",
        licence="CC0",
        layout="<data.root>/birds/<class>/*.png",
        label_space="",
        name="garden.Birds",
        download=Download((file,), "Ask the gardener.", "scenario=split_imagefolder"),
    )
    (tmp_path / "garden.py").write_text("class Birds:\n    about = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import garden  # pyrefly: ignore[missing-import]

    monkeypatch.setattr(garden.Birds, "about", record)
    return "garden.Birds"


def test_a_set_from_the_licence_to_the_command(birds, tmp_path, capsys):
    to = tmp_path / "data"
    assert get_data.main([birds, "--to", str(to), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "licence: CC0" in out and "birds.tar.gz: " in out and "free at" in out
    assert not to.exists()
    assert get_data.main([birds, "--to", str(to)]) == 2
    assert "cannot be loaded by a program. Ask the gardener." in capsys.readouterr().err
    assert get_data.main([birds, "--to", str(to), "--from", str(tmp_path / "hand")]) == 0
    out = capsys.readouterr().out
    assert f"python run.py scenario=split_imagefolder data.root={to}" in out
    assert (to / "birds/a/1.png").read_bytes() == b"one"
    assert get_data.main([birds, "--to", str(to)]) == 0 and "there" in capsys.readouterr().out
    assert {path.name for path in to.iterdir()} == {"birds", STATE}


def test_one_set_that_fails_keeps_no_other_back(birds, tmp_path, capsys):
    words = ["cifar_10", birds, "--to", str(tmp_path / "data"), "--from", str(tmp_path / "hand")]
    assert get_data.main(words) == 2
    assert "no data set 'cifar_10'; did you mean 'cifar10'?" in capsys.readouterr().err
    assert (tmp_path / "data/birds").is_dir()


def test_bad_input_is_one_line(birds, tmp_path, capsys):
    taken = tmp_path / "file"
    taken.touch()
    hand = ["--from", str(tmp_path / "hand")]
    for words, text in (
        ([birds, "--to", str(taken), *hand], "cannot write there"),
        ([birds, "--to", str(tmp_path / "d"), "--parts", "a"], "the set has no parts"),
        (["imagefolder", "--to", str(tmp_path)], "there is nothing to load"),
        (["no.such.Thing", "--to", str(tmp_path)], "there is no module"),
    ):
        assert get_data.main(words) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1 and error.startswith("error: ")
    for words in ([], ["cifar10"]):
        with pytest.raises(SystemExit) as end:
            get_data.main(words)
        assert end.value.code == 2


def test_the_list_names_every_set_once(capsys):
    assert get_data.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == LOADED
    assert re.search(r"cifar100_c +2\.9 GB +by program +CC BY 4\.0", "\n".join(lines))
    with pytest.raises(UserError, match="--list names all"):
        get_data.record("nothing_like_it")
