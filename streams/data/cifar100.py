"""CIFAR-100: its classes as tasks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from driftline.streams.data import cifar10
from driftline.streams.downloads import Download, Published

CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle",
    "bottle", "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle",
    "caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch",
    "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox",
    "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom",
    "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
    "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road",
    "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake",
    "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone",
    "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip
ABOUT = replace(
    cifar10.ABOUT,
    title="CIFAR-100",
    layout="<data.root>/cifar-100-python/ (torchvision's own layout)",
    label_space="cifar100",
    class_names=CLASSES,
    name="cifar100",
    download=Download(
        (
            Published(
                "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
                ("cifar-100-python",),
                size=169_001_437,
                checksum="md5:eb9058c3a382ffc7106e4002c42a8d85",
            ),
        ),
        command="scenario=split_cifar100",
        sources="MD5: torchvision",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Cifar100(cifar10.Cifar10):
    """The official training and test images."""

    about = ABOUT
    stand_ins = 100
    which = "cifar100"
