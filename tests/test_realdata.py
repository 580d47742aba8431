"""The main job on real images, on cuts small enough for every test run."""

from __future__ import annotations

import csv

import pytest
from conftest import ROOT

from driftline.runs.execute import run_experiment

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
