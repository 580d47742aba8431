"""The main job on real images, on cuts small enough for every test run."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from driftline.runs.execute import run_experiment
from driftline.streams.images import image_folder

pytestmark = pytest.mark.realdata


def imagenet(realdata, tmp_path, images: int, *more: str) -> list[str]:
    """Settings of a stream made on the fly from the first images of the real pack."""
    return [
        "scenario=imagenet_c",
        "scenario.corrupt=on_the_fly",
        "scenario.image_list=all",
        f"scenario.images={images}",
        f"scenario.batch_size={images}",
        f"data.root={realdata / 'imagenet_real'}",
        f"data.cache={tmp_path / 'cache'}",
        "backbone=efficientnet_lite0_in1k",
        f"backbone.checkpoint={realdata / 'efficientnet_lite0/tf_efficientnet_lite0.safetensors'}",
        "channels_last=true",
        "runtime.workers=0",
        *more,
    ]


def test_labels_of_the_pack_are_canonical(realdata):
    from driftline.streams.data.imagenet import imagenet_clean, wnids

    images = imagenet_clean(realdata / "imagenet_real")
    with open(realdata / "imagenet_real" / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [wnids()[label] for label in images.labels] == [r["wnid"] for r in rows]


@pytest.mark.release
def test_adaptation_beats_source_on_real_images(configure, realdata, tmp_path):
    """Contrast at severity 5, 50 images: source fails nearly always, batch statistics help."""
    words = imagenet(
        realdata,
        tmp_path,
        50,
        "scenario.corruptions=[contrast]",
        "scenario.probe_images=0",
        "scenario.clean_images=50",
        "scenario.clean_adapting=false",
    )
    error = {}
    for strategy in ("source", "bn_adapt", "tent", "cotta"):
        cfg = configure(*words, f"strategy={strategy}", "root=" + str(tmp_path / "results"))
        if strategy == "cotta":
            cfg.strategy.threshold = 0.0  # without views
        summary = run_experiment(cfg, [])
        assert summary["run"]["scenario"] == "imagenet_c[on_the_fly]"
        error[strategy] = summary["metrics"]["err_mean"]
        if strategy == "source":
            assert summary["metrics"]["clean_err_before"] <= 24  # 12 % on the whole pack
    assert error["source"] > 80
    assert max(error["bn_adapt"], error["tent"], error["cotta"]) < error["source"] - 5
    assert abs(error["bn_adapt"] - error["tent"]) <= 2  # one batch: Tent has not moved yet


@pytest.mark.slow
def test_cotta_views_on_real_images(configure, realdata, tmp_path):
    words = imagenet(
        realdata,
        tmp_path,
        4,
        "scenario.corruptions=[contrast]",
        "scenario.probe_images=0",
        "scenario.clean_images=0",
    )
    cfg = configure(*words, "strategy=cotta", "strategy.threshold=2", "strategy.views=4")
    summary = run_experiment(cfg, [])
    assert summary["cost"]["forward_per_image"] == 6  # student, anchor, four views of the teacher


@pytest.mark.release
def test_split_of_real_cifar_images(configure, realdata, tmp_path):
    """5 tasks x 2 classes: SimpleCIL keeps what it learns, fine-tuning does not."""
    import numpy as np

    from scripts.export_images import export

    root = tmp_path / "cifar10_subset"
    root.mkdir()
    for split, count in (("train", 300), ("test", 200)):
        with np.load(realdata / "cifar10_real" / f"{split}.npz") as data:
            cut = {k: data[k] if k == "classes" else data[k][:count] for k in data.files}
        np.savez(tmp_path / split, **cut)
        assert export(tmp_path / f"{split}.npz", root / split) == count
    words = [
        "scenario=split_imagefolder",
        "scenario.label=split_cifar10_subset",
        "scenario.increment=2",
        "scenario.pipeline=plain",
        "scenario.batch_size=32",
        f"data.root={root}",
        "backbone=embedded_vit",
        "runtime.workers=0",
        "runtime.threads=1",
    ]
    found = {}
    for name, more in (
        ("simplecil", []),
        ("finetune", ["strategy.epochs=3", "strategy.optim.lr=0.01"]),
    ):
        found[name] = run_experiment(configure(*words, f"strategy={name}", *more), [])["metrics"]
        assert (tmp_path / "results" / "split_cifar10_subset" / name).is_dir()
    assert found["simplecil"]["acc_last"] > 15  # chance is 10
    assert found["simplecil"]["forgetting"] < found["finetune"]["forgetting"]
    assert (ROOT / "results" / "split_cifar10_subset").exists() is False


def network_of_photos(realdata, folder: Path) -> Path:
    """A file of EfficientNet-Lite0 whose seven outputs are nearest class means of photos."""
    net = timm.create_model("tf_efficientnet_lite0")
    net.load_state_dict(
        load_file(realdata / "efficientnet_lite0" / "tf_efficientnet_lite0.safetensors")
    )
    net.reset_classifier(7)
    images = image_folder(folder / "PACS" / "photo", "")
    pixels = [np.asarray(images.image(i).resize((224, 224))) for i in range(len(images.labels))]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        features = net.eval().forward_head(net.forward_features(x), pre_logits=True)
        means = torch.stack([features[images.labels == c].mean(0) for c in range(7)])
        net.classifier.weight.copy_(means)
        net.classifier.bias.copy_(-means.square().sum(1) / 2)
    save_file(net.state_dict(), folder / "photos.safetensors")
    return folder / "photos.safetensors"


def test_a_network_of_photos_meets_the_sketches_of_pacs(configure, realdata, tmp_path):
    """It knows other photos better than sketches; these photos are none it was made of."""
    for part, place, each in (("train", tmp_path / "train", 3), ("test", tmp_path, 2)):
        pack = np.load(realdata / "pacs_real" / f"{part}.npz")
        for row in range(each * 28):  # `each` images of each class in each domain
            domain = str(pack["domain_names"][pack["domains"][row]])
            path = (
                place / "PACS" / domain / str(pack["classes"][pack["labels"][row]]) / f"{row}.jpg"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            start, stop = pack["offsets"][row : row + 2]
            path.write_bytes(pack["jpeg"][start:stop].tobytes())
    words = [
        "scenario=pacs",
        "scenario.domains=[photo,sketch]",
        "scenario.batch_size=14",
        "scenario.probe_images=0",
        f"data.root={tmp_path}",
        "backbone=efficientnet_lite0_in1k",
        "backbone.num_classes=7",
        "backbone.classes=pacs",
        f"backbone.checkpoint={network_of_photos(realdata, tmp_path / 'train')}",
        "channels_last=true",
        "runtime.workers=0",
    ]
    cfg = configure(*words, "strategy=source", "root=" + str(tmp_path / "results"))
    summary = run_experiment(cfg, [])
    assert summary["run"]["scenario"] == "pacs" and summary["data"]["label_space"] == "pacs"
    error = summary["metrics"]
    assert error["err/photo"] < 25 < 50 < error["err/sketch"] < 100
