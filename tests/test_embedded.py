"""The procedural stand-in images and the two networks that ship with them."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from driftline.backbones import embedded as builders
from driftline.streams import embedded
from driftline.streams.embedded import (
    PRETRAIN_CLASSES,
    SHIFT_CLASSES,
    TASK_CLASSES,
    EmbeddedImages,
    render,
)

WEIGHTS = Path(__file__).parents[1] / "backbones" / "weights"
NETWORKS = {"embedded_resnet": SHIFT_CLASSES, "embedded_vit": PRETRAIN_CLASSES}


def pixels(images: EmbeddedImages) -> np.ndarray:
    return np.stack([np.asarray(images.image(row)) for row in range(len(images))])


def shipped(name: str) -> torch.nn.Module:
    tensors = load_file(WEIGHTS / f"{name}.safetensors")
    assert all(t.dtype == torch.float16 for t in tensors.values() if t.is_floating_point())
    net = getattr(builders, name)()
    net.load_state_dict(
        {k: t.float() if t.is_floating_point() else t for k, t in tensors.items()}, strict=True
    )
    return net.eval()


def as_input(images: np.ndarray) -> torch.Tensor:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (builders.MEAN, builders.STD))
    return (x - mean) / std


def test_pinned_bytes() -> None:
    """One image of every shape and texture: any change of these bytes needs a new VERSION."""
    digest = hashlib.sha256()
    for i in range(10):
        digest.update(render((i, (3 * i) % 10, i % 6), [0, 7], "train", seed=1).tobytes())
    assert embedded.VERSION == 1
    assert digest.hexdigest()[:16] == "93be126b723dfd9d"


def test_pure_function_of_the_arguments() -> None:
    triple = TASK_CLASSES[3]
    block = render(triple, [0, 1, 2, 3], "test", seed=5)
    assert block.shape == (4, 32, 32, 3) and block.dtype == np.uint8
    for i in (3, 0):
        assert np.array_equal(block[i], render(triple, [i], "test", seed=5)[0])
    first = render(triple, [0], "test", seed=5)
    others = (
        render(triple, [1], "test", seed=5),
        render(triple, [0], "train", seed=5),
        render(triple, [0], "probe", seed=5),
        render(triple, [0], "test", seed=6),
        render(TASK_CLASSES[4], [0], "test", seed=5),
    )
    assert not any(np.array_equal(first, other) for other in others)


def test_size_changes_the_resolution_not_the_scene() -> None:
    triple = TASK_CLASSES[0]
    large = Image.fromarray(render(triple, [0], size=128)[0]).resize((32, 32), Image.Resampling.BOX)
    small = render(triple, [0], size=32)[0]
    assert np.abs(np.asarray(large).astype(int) - small).mean() < 3
    images = EmbeddedImages(classes=[triple], per_class=1, size=128)
    assert images.image(0).size == (128, 128)
    assert np.array_equal(np.asarray(images.image(0)), render(triple, [0], size=128)[0])


def test_class_lists() -> None:
    assert len(SHIFT_CLASSES) == 20 and len(TASK_CLASSES) == 100 and len(PRETRAIN_CLASSES) >= 100
    everything = SHIFT_CLASSES + TASK_CLASSES + PRETRAIN_CLASSES
    assert len(set(everything)) == len(everything)
    names = [embedded.class_name(triple) for triple in everything]
    assert len(set(names)) == len(names)
    assert embedded.class_name((3, 1, 0)) == "striped red star"
    # features can only transfer to new triples if each part was seen
    for axis, values in enumerate((embedded.SHAPES, embedded.TEXTURES, embedded.COLOURS)):
        assert {triple[axis] for triple in PRETRAIN_CLASSES} == set(range(len(values)))


def test_set_is_balanced_and_consistent() -> None:
    images = EmbeddedImages(classes=TASK_CLASSES[:7], split="test", per_class=3)
    assert (len(images), images.num_classes, images.name) == (21, 7, "embedded")
    assert images.labels.dtype == np.int64 and images.labels.shape == (21,)
    for n in range(1, 22):
        counts = np.bincount(images.labels[:n], minlength=7)
        assert counts.max() - counts.min() <= 1
    assert images.class_names == [embedded.class_name(t) for t in TASK_CLASSES[:7]]
    image = images.image(9)
    assert isinstance(image, Image.Image) and image.mode == "RGB" and image.size == (32, 32)
    assert np.array_equal(np.asarray(image), render(TASK_CLASSES[2], [1], "test")[0])
    # fewer images per class are a prefix of more
    assert np.array_equal(
        pixels(images), pixels(EmbeddedImages(TASK_CLASSES[:7], "test", per_class=4))[:21]
    )
    copy = pickle.loads(pickle.dumps(images))
    assert copy.fingerprint == images.fingerprint and np.array_equal(pixels(copy), pixels(images))


def test_fingerprint_tells_settings_apart() -> None:
    default = {"classes": SHIFT_CLASSES, "split": "train", "per_class": 2, "size": 32, "seed": 0}
    variants = [
        {},
        {"classes": TASK_CLASSES},
        {"split": "test"},
        {"per_class": 3},
        {"size": 64},
        {"seed": 1},
    ]
    prints = [EmbeddedImages(**{**default, **variant}).fingerprint for variant in variants]
    assert len(set(prints)) == len(prints)
    assert prints[0] == EmbeddedImages(**default).fingerprint


def test_wrong_arguments() -> None:
    for bad in (
        {"classes": []},
        {"classes": [(0, 0, 0), (0, 0, 0)]},
        {"classes": [(0, 0, 99)]},
        {"split": "validation"},
        {"per_class": 0},
        {"size": 4},
        {"seed": -1},
    ):
        with pytest.raises(ValueError):
            EmbeddedImages(**bad)
    images = EmbeddedImages(per_class=1)
    for row in (-1, 20):
        with pytest.raises(IndexError):
            images.image(row)


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_shipped_weights_load(name: str) -> None:
    net = shipped(name)
    out = net(as_input(pixels(EmbeddedImages(per_class=1))[:2]))
    assert out.shape == (2, 20 if name == "embedded_resnet" else net.num_features)
    with safe_open(WEIGHTS / f"{name}.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["data_version"] == str(embedded.VERSION)
    kwargs = builders.RESNET_KWARGS if name == "embedded_resnet" else builders.VIT_KWARGS
    assert json.loads(metadata["kwargs"]) == kwargs
    assert float(metadata["clean_accuracy"]) > 50 and "pretrain_embedded" in metadata["command"]


def test_shipped_weights_are_small() -> None:
    assert sum((WEIGHTS / f"{name}.safetensors").stat().st_size for name in NETWORKS) < 3_000_000


def test_task_is_learnable_but_not_trivial() -> None:
    """The network is nearly always right; comparing raw pixels with class means is not."""
    train = EmbeddedImages(SHIFT_CLASSES, "train", per_class=20)
    test = EmbeddedImages(SHIFT_CLASSES, "test", per_class=10)
    with torch.no_grad():
        found = shipped("embedded_resnet")(as_input(pixels(test))).argmax(1).numpy()
    error = 100 * np.mean(found != test.labels)
    assert error < 10
    x, z = (as_input(pixels(s)).flatten(1).numpy() for s in (train, test))
    means = np.stack([x[train.labels == c].mean(0) for c in range(20)])
    nearest = ((z[:, None] - means) ** 2).sum(2).argmin(1)
    assert 100 * np.mean(nearest != test.labels) > 40


def test_features_transfer_to_unseen_classes() -> None:
    """Class means of frozen features tell unseen triples apart far better than chance."""
    net = shipped("embedded_vit")
    classes = TASK_CLASSES[:20]
    train = EmbeddedImages(classes, "train", per_class=10)
    test = EmbeddedImages(classes, "test", per_class=5)
    with torch.no_grad():
        x, z = (torch.nn.functional.normalize(net(as_input(pixels(s)))) for s in (train, test))
    means = torch.stack([x[torch.from_numpy(train.labels) == c].mean(0) for c in range(20)])
    found = (z @ torch.nn.functional.normalize(means).T).argmax(1).numpy()
    assert 100 * np.mean(found == test.labels) > 60
