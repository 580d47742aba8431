"""scripts/generate_corruptions.py: the released layout, round trips, interruptions, refusals."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from test_streams import make

from driftline.core.errors import UserError
from scripts import generate_corruptions
from scripts.generate_corruptions import main


@pytest.fixture
def cifar_root(tmp_path, monkeypatch) -> Path:
    """CIFAR-10 in torchvision's layout, ten test images, which have other MD5 sums."""
    there = tmp_path / "cifar"
    monkeypatch.setattr("driftline.streams.data.cifar10.intact", lambda *a: True)
    folder = there / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        with open(folder / name, "wb") as file:
            pickle.dump({"data": data, "labels": list(range(10))}, file)
    with open(folder / "batches.meta", "wb") as file:
        pickle.dump({"label_names": [str(i) for i in range(10)]}, file)
    return there


@pytest.fixture
def imagenet_root(tmp_path) -> Path:
    """Six validation images of three classes; one grey, one with an alpha channel."""
    root = tmp_path / "imagenet"
    for c, wnid in enumerate(("n01440764", "n01443537", "n01484850")):
        write_images(root / "val" / wnid, [f"ILSVRC2012_val_{c}{i}.JPEG" for i in (0, 1)], 40, c)
    grey = root / "val" / "n01440764" / "ILSVRC2012_val_00.JPEG"
    Image.open(grey).convert("L").save(grey)
    alpha = root / "val" / "n01443537" / "ILSVRC2012_val_10.JPEG"
    Image.open(alpha).convert("RGBA").save(alpha, "PNG")
    return root


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def stream(
    configure: Callable, dataset: str, root: Path, *more: str
) -> tuple[str, dict[tuple[str, int], torch.Tensor]]:
    """Name and images by (segment, label)."""
    words = [f"scenario={dataset}", f"data.root={root}", "scenario.probe_images=0"]
    words += ["scenario.image_list=all", *more]
    made = make(configure(*words, "scenario.corruptions=[gaussian_noise,frost,jpeg_compression]"))
    found = {}
    for segment in made.segments:
        for batch in segment.batches():
            for x, y in zip(batch.x, batch.y.tolist(), strict=True):
                found.setdefault((segment.name, y), []).append(x)
    # the two file orders may differ
    return made.name, {
        k: torch.stack(sorted(v, key=lambda x: x.sum().item())) for k, v in found.items()
    }


NAMES = ["--corruptions", "gaussian_noise,frost,jpeg_compression"]


@pytest.mark.parametrize("dataset", ["cifar10_c", "imagenet_c"])
def test_generated_files_hold_what_is_generated_on_the_fly(
    configure, tmp_path, cifar_root, imagenet_root, dataset
):
    root = cifar_root if dataset == "cifar10_c" else imagenet_root
    common = ["--dataset", dataset, "--out", str(tmp_path / "out"), "--seed", "3"]
    severities = ["1", "2", "3", "4", "5"] if dataset == "cifar10_c" else ["1", "5"]
    asked = f"scenario.severity=[{','.join(severities)}]"
    main(["--data", str(root), *common, *NAMES, "--severities", *severities, "--workers", "0"])
    main([*common, "--verify"])
    name, fly = stream(
        configure, dataset, root, asked, "scenario.corrupt=on_the_fly", "scenario.corruption_seed=3"
    )
    name_made, made = stream(configure, dataset, tmp_path / "out", asked)
    assert (name, name_made) == (f"{dataset}[on_the_fly]", f"{dataset}[generated]")
    classes = 10 if dataset == "cifar10_c" else 3
    assert len(fly) == 3 * len(severities) * classes and set(fly) == set(made)
    for key, images in fly.items():
        assert torch.equal(images, made[key]), key
    if dataset == "imagenet_c":
        path = next((tmp_path / "out" / "ImageNet-C" / "frost" / "5").rglob("*.JPEG"))
        assert path.name.startswith("ILSVRC2012_val_")
        with Image.open(path) as image:
            assert image.size == (224, 224) and image.mode == "RGB"
            assert image.quantization[0][0] == 5  # the first luminance step at quality 85
            assert image.layer[0][1:3] == (2, 2) and image.layer[1][1:3] == (1, 1)  # 4:2:0
    else:
        saved = np.load(tmp_path / "out" / "CIFAR-10-C" / "frost.npy")
        assert saved.shape == (50, 32, 32, 3) and saved.dtype == np.uint8
        labels = np.load(tmp_path / "out" / "CIFAR-10-C" / "labels.npy")
        assert np.array_equal(labels, np.tile(np.arange(10), 5))


def test_severities_of_a_cifar_file_are_joined_once_all_are_there(tmp_path, cifar_root):
    def call(out: str, *words: str) -> None:
        main(
            ["--data", str(cifar_root), "--dataset", "cifar10_c", "--out", str(tmp_path / out),
             "--corruptions", "fog", "--workers", "0", *words]
        )  # fmt: skip

    call("parts", "--severities", "5", "2")
    assert not (tmp_path / "parts" / "CIFAR-10-C" / "fog.npy").exists()
    main(["--dataset", "cifar10_c", "--out", str(tmp_path / "parts"), "--verify"])
    call("parts", "--severities", "1", "3", "4")
    call("whole")
    parts, whole = contents(tmp_path / "parts"), contents(tmp_path / "whole")
    name = "CIFAR-10-C/manifest.json"
    sums = [json.loads(c.pop(name))["sha256"] for c in (parts, whole)]
    assert parts == whole and sums[0] == sums[1]
    assert set(parts) == {"CIFAR-10-C/fog.npy", "CIFAR-10-C/labels.npy"}


def test_an_interrupted_call_is_completed_with_equal_bytes(tmp_path, monkeypatch):
    root = tmp_path / "imagenet"
    write_images(root / "val" / "n01440764", [f"{i:03d}.png" for i in range(50)], 32)
    words = ["--data", str(root), "--dataset", "imagenet_c", "--corruptions", "contrast,pixelate"]
    words += ["--severities", "3", "--device", "cpu", "--workers", "0"]
    out = tmp_path / "out"
    write, written = generate_corruptions.write_bytes, []

    def stopped(path: Path, content: bytes) -> None:
        if len(written) == 60:
            raise KeyboardInterrupt
        write(path, content)
        written.append(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate_corruptions, "write_bytes", stopped)
        main([*words, "--out", str(out)])
    base = out / "ImageNet-C"
    assert (base / "contrast" / "3").exists() and not (base / "pixelate" / "3").exists()
    stamps = {p.name: p.stat().st_mtime_ns for p in base.rglob(".3.part/*/*.JPEG")}
    assert len(stamps) == 10
    main([*words, "--out", str(out)])
    finished = {p.name: p.stat().st_mtime_ns for p in (base / "pixelate" / "3").rglob("*.JPEG")}
    assert len(finished) == 50 and finished | stamps == finished  # what was there stays
    main([*words, "--out", str(tmp_path / "again")])
    assert contents(out) == contents(tmp_path / "again")


def test_damage_is_named_by_verify(tmp_path, imagenet_root):
    words = ["--dataset", "imagenet_c", "--out", str(tmp_path / "out")]
    main(["--data", str(imagenet_root), *words, "--corruptions", "contrast", "--severities", "1"])
    path = next((tmp_path / "out").rglob("*.JPEG"))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match=f"{path.name} is missing or was changed"):
        main([*words, "--verify"])


def test_wrong_arguments_and_folders_are_refused(tmp_path, imagenet_root):
    out = tmp_path / "out"
    words = ["--data", str(imagenet_root), "--dataset", "imagenet_c", "--workers", "0"]
    small = ["--corruptions", "contrast", "--severities", "1"]
    main([*words, *small, "--out", str(out)])
    (tmp_path / "file").write_text("")
    (tmp_path / "theirs" / "ImageNet-C" / "fog").mkdir(parents=True)
    cases: list[tuple[list[str], str]] = [
        (["--out", str(out), *small, "--seed", "1"], "other settings .seed: 0 there, 1 asked for"),
        (["--out", str(out), *small, "--jpeg-quality", "90"], "jpeg_quality: 85 there, 90 asked"),
        (["--out", str(tmp_path / "theirs"), *small], "holds files, but no manifest.json"),
        (["--out", str(tmp_path / "file"), *small], "cannot write there"),
        (["--out", str(out), "--corruptions", "contrst"], "did you mean 'contrast'"),
        (["--out", str(out), "--severities", "0"], "--severities must be from 1 to 5"),
        (["--out", str(out), "--severities", "6"], "--severities must be from 1 to 5"),
        (["--out", str(out), "--jpeg-quality", "0"], "--jpeg-quality must be from 1 to 95"),
        (["--out", str(out), *small, "--device", "gpu"], "is no device here"),
        (["--out", str(out), "--corruptions", "frost", "--frost", "/nowhere"], "lacks frost1.png"),
    ]
    for more, message in cases:
        with pytest.raises(UserError, match=message):
            main([*words, *more])
    with pytest.raises(UserError, match="--data is missing"):
        main(["--dataset", "imagenet_c", "--out", str(out)])
    with pytest.raises(UserError, match=r"manifest\.json is missing or damaged"):
        main(["--dataset", "cifar10_c", "--out", str(out), "--verify"])
