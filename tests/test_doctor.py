"""The doctor finds what is there, and every problem comes with its fix."""

from __future__ import annotations

import sys
import tomllib
from dataclasses import replace

import numpy as np
from conftest import ROOT, write_images

from driftline.streams.data import cifar10_c
from driftline.streams.downloads import Download, Published, get

sys.path.insert(0, str(ROOT / "scripts"))
import doctor

TINY = ["scenario.images=40", "scenario.batch_size=8", "scenario.corruptions=[contrast]"]


def said(capsys) -> str:
    return capsys.readouterr().out


def test_every_extra_of_the_project_is_known():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(doctor.EXTRAS) == set(project["optional-dependencies"]) - {"dev", "test"}


def test_versions_are_held_against_the_project_file(capsys, monkeypatch):
    report = doctor.Report()
    doctor.versions(report)
    assert report.problems == 0 and "torch " in said(capsys)
    real = doctor.importlib.metadata.version
    old = {"timm": "0.6.13"}
    monkeypatch.setattr(
        doctor.importlib.metadata, "version", lambda name: old.get(name) or real(name)
    )
    doctor.versions(report)
    text = said(capsys)
    assert report.problems == 1
    assert "PROBLEM  timm 0.6.13 is outside" in text and "fix: pip install" in text


def test_data_sets_are_counted_and_damage_is_named(capsys, tmp_path, cifar10_c_root):
    report = doctor.Report()
    base = cifar10_c_root / "CIFAR-10-C"
    doctor.data(report, str(cifar10_c_root))
    text = said(capsys)
    assert report.problems == 0 and "2 corruptions, 50 images each" in text and "sha256" in text
    np.save(base / "fog.npy", np.zeros((7, 32, 32, 3), np.uint8))
    doctor.data(report, str(cifar10_c_root))
    text = said(capsys)
    assert report.problems == 1 and "fog.npy holds 7 images, but" in text
    assert f"then: python scripts/get_data.py cifar10_c --to {cifar10_c_root}" in text
    empty = tmp_path / "empty"
    empty.mkdir()
    doctor.data(report, str(empty))
    doctor.data(report, str(tmp_path / "nowhere"))
    text = said(capsys)
    assert report.problems == 3 and "no known data set" in text and "no such folder" in text


def test_images_that_do_not_decode_are_found(capsys, imagenet_c_root, imagenet_clean_root):
    report = doctor.Report()
    doctor.data(report, str(imagenet_c_root))
    text = said(capsys)
    assert "2 corruption/severity folders, 12 images in fog/5" in text and report.problems == 0
    first = sorted((imagenet_c_root / "ImageNet-C/fog/5").rglob("*.JPEG"))[0]
    first.write_bytes(b"no image")
    doctor.data(report, str(imagenet_c_root))
    assert report.problems == 1 and first.name in said(capsys)
    doctor.data(report, str(imagenet_clean_root))
    assert report.problems == 1 and "12 clean ImageNet images of 12 classes" in said(capsys)


def test_files_of_the_release_are_compared_with_their_published_sums(capsys, tmp_path, monkeypatch):
    base = tmp_path / "CIFAR-10-C"
    base.mkdir()
    np.save(base / "labels.npy", np.arange(50000) % 10)
    np.lib.format.open_memmap(base / "fog.npy", "w+", np.uint8, (50000, 32, 32, 3))  # sparse
    monkeypatch.setattr(doctor, "_digest", lambda path, *kind: path.stem)  # it has 150 MB
    report = doctor.Report()
    doctor.data(report, str(tmp_path))
    assert report.problems == 1
    assert "labels.npy, fog.npy: MD5 sum is not the published one" in said(capsys)
    sums = {"labels.npy": "md5:labels", "fog.npy": "md5:fog"}
    monkeypatch.setattr(cifar10_c, "ABOUT", replace(cifar10_c.ABOUT, hashes=sums))
    doctor.data(report, str(tmp_path))
    assert report.problems == 1
    assert "MD5 sums of labels.npy and fog.npy as published" in said(capsys)


def test_what_was_loaded_and_what_was_not_finished_is_named(capsys, tmp_path):
    hand, root, state = tmp_path / "hand", tmp_path / "data", tmp_path / "data/.downloads/birds"
    hand.mkdir()
    (hand / "b.npy").write_bytes(b"bytes")
    file = Published("", ("birds/b.npy",), into="birds", name="b.npy")
    get("birds", Download((file,)), root, origin=str(hand))
    (state / "c.tar.part").write_bytes(b"half")
    report = doctor.Report()
    doctor.data(report, str(root))
    text = said(capsys)
    assert "ok       birds: 1 files of b.npy, sha256 " in text and report.problems == 0
    command = f"python scripts/get_data.py birds --to {root}"
    assert f"c.tar: 4 bytes of it have arrived; {command} goes on" in text
    (root / "birds/b.npy").unlink()
    doctor.data(report, str(root))
    text = said(capsys)
    assert f"birds/b.npy of b.npy is gone; {command}" in text
    assert report.problems == 1 and "get_data.py SET --to" in text


def test_damaged_weights_in_a_cache_are_named(capsys, tmp_path, monkeypatch, configure):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / "resnet50-0676ba61.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half a file")
    report = doctor.Report()
    doctor.checkpoints(report, configure("backbone=timm", "backbone.checkpoint=/no/file"))
    text = said(capsys)
    assert report.problems == 2 and f"fix: delete {file}" in text and "/no/file: no such" in text
    assert "embedded_resnet: sha256" in text


def test_a_command_is_estimated_from_a_few_batches(capsys, tmp_path, configure):
    report = doctor.Report()
    doctor.command(report, configure("strategy=tent", *TINY))
    text = said(capsys)
    assert report.problems == 0 and "5 batches, 1.0 forward and 1.0 backward passes" in text
    assert "estimated from 3 batches" in text and "memory" in text
    assert not (tmp_path / "results").exists()
    doctor.command(
        report,
        configure("strategy=finetune", "scenario=split_cifar10", "scenario.embedded_images=[6,3]"),
    )
    assert "1.0 forward and 1.0 backward" in said(capsys) and report.problems == 0
    doctor.command(report, configure("strategy=finetune", *TINY))
    assert report.problems == 1 and "Strategies for it: a" in said(capsys)


def test_a_full_or_closed_disk_is_a_problem(capsys, configure, monkeypatch):
    report = doctor.Report()
    usage = doctor.shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda p: usage._replace(free=2**30))
    doctor.disk(report, configure())
    text = said(capsys)
    assert report.problems == 2 and "1.0 GiB free" in text and "fix: free some space" in text


def test_class_folders_are_counted(capsys, tmp_path):
    write_images(tmp_path, ["train/a/0.png", "train/b/0.png", "test/a/0.png"])
    report = doctor.Report()
    doctor.data(report, str(tmp_path))
    assert "train: 2 class folders, 2 images" in said(capsys) and report.problems == 0
    write_images(tmp_path, ["sketch/test/a/0.png", "photo/a/0.png", "photo/b/0.png"])
    doctor.data(report, str(tmp_path))
    text = said(capsys)
    assert "sketch/test: 1 class folders" in text and "photo: 2 class folders" in text
    write_images(tmp_path, [".hidden/0.png", "train/.hidden/0.png"])
    (tmp_path / "train" / "a" / "1.tif").write_bytes(b"?")
    (tmp_path / "labels.csv").write_text("filename;class_index\na.png;\n")
    doctor.data(report, str(tmp_path))
    text = said(capsys)
    assert "1 entries of class folders are not read: .tif (1)" in text and "train: 2 class" in text
    assert report.problems == 1 and "line 2 has no class_index" in text
