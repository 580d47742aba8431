"""DomainNet-126: 126 classes in four domains of DomainNet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from driftline.streams.data.domainnet import archive
from driftline.streams.dataset import About
from driftline.streams.domain_folders import TrainedOnADomain, image_list
from driftline.streams.downloads import Download, Published
from driftline.streams.images import Files

LISTS = {  # domain -> bytes, SHA-256
    "clipart": (
        782_730,
        "057b0496db8b60a90804b1267b65d64e6f9bd548ef555521b4d63d9cfb3bdb6e",
    ),
    "painting": (
        1_312_543,
        "0d91298e5777ff28b8d1dabf673af566d1002e2331bea1972ac9dea27978f0db",
    ),
    "real": (
        2_503_856,
        "c567b5ddc123a243f010d2048123d57c987717febd064a298e2c155d24795af8",
    ),
    "sketch": (
        963_323,
        "4c52172cc37acc3bda07adf14e8ec8c7e542886175844ef2186ac787ea7a3c44",
    ),
}
# In the order of the labels in the lists: sorted without regard to capitals and underscores.
CLASSES = (
    "aircraft_carrier", "alarm_clock", "ant", "anvil", "asparagus", "axe", "banana", "basket",
    "bathtub", "bear", "bee", "bird", "blackberry", "blueberry", "bottlecap", "broccoli", "bus",
    "butterfly", "cactus", "cake", "calculator", "camel", "camera", "candle", "cannon", "canoe",
    "carrot", "castle", "cat", "ceiling_fan", "cello", "cell_phone", "chair", "chandelier",
    "coffee_cup", "compass", "computer", "cow", "crab", "crocodile", "cruise_ship", "dog",
    "dolphin", "dragon", "drums", "duck", "dumbbell", "elephant", "eyeglasses", "feather",
    "fence", "fish", "flamingo", "flower", "foot", "fork", "frog", "giraffe", "goatee", "grapes",
    "guitar", "hammer", "helicopter", "helmet", "horse", "kangaroo", "lantern", "laptop", "leaf",
    "lion", "lipstick", "lobster", "microphone", "monkey", "mosquito", "mouse", "mug", "mushroom",
    "onion", "panda", "peanut", "pear", "peas", "pencil", "penguin", "pig", "pillow", "pineapple",
    "potato", "power_outlet", "purse", "rabbit", "raccoon", "rhinoceros", "rifle", "saxophone",
    "screwdriver", "sea_turtle", "see_saw", "sheep", "shoe", "skateboard", "snake", "speedboat",
    "spider", "squirrel", "strawberry", "streetlight", "string_bean", "submarine", "swan",
    "table", "teapot", "teddy-bear", "television", "The_Eiffel_Tower", "The_Great_Wall_of_China",
    "tiger", "toe", "train", "truck", "umbrella", "vase", "watermelon", "whale", "zebra",
)  # fmt: skip
COMMIT = "e8053164a2a078cda722af9c1536032fa6985288"
BASE = f"https://raw.githubusercontent.com/DianCh/AdaContrast/{COMMIT}/datasets/domainnet-126"

ABOUT = About(
    title="DomainNet-126",
    paper="Saito et al., ICCV 2019",
    published="http://ai.bu.edu/M3SDA/; lists: https://github.com/DianCh/AdaContrast",
    licence="that of DomainNet: academic research; the rights of the images are their owners'",
    layout="<data.root>/DomainNet/<domain>/<class>/*.jpg and <domain>_list.txt",
    label_space="domainnet126",
    name="domainnet126",
    download=Download(
        (
            *map(archive, LISTS),
            *(
                Published(
                    f"{BASE}/{domain}_list.txt",
                    (f"DomainNet/{domain}_list.txt",),
                    size=size,
                    checksum=f"sha256:{sha256}",
                    into="DomainNet",
                    part=domain,
                )
                for domain, (size, sha256) in LISTS.items()
            ),
        ),
        sources="archives as of domainnet; lists: the files of AdaContrast at one commit",
    ),
)


@dataclass(frozen=True, kw_only=True)
class DomainNet126(TrainedOnADomain):
    """The images of the published lists, resized and cropped to 224 px as AdaContrast does it."""

    about = ABOUT
    classes = CLASSES
    tops = ("DomainNet", "domainnet-126", "DomainNet-126", "domainnet126", "domainnet")
    spellings = {name: (name,) for name in ("clipart", "painting", "real", "sketch")}

    def place(self, root: Path, domain: str) -> Path | None:
        """A domain is there if its images and its list are."""
        return next(
            (p for p in self.places(root, domain) if p.is_dir() and list_of(p).is_file()), None
        )

    def files(self, root: Path, domain: str) -> Files:
        folder = self.folder(root, domain)
        return image_list(list_of(folder), folder.parent, self.classes)


def list_of(folder: Path) -> Path:
    """The published list of a domain, beside its images."""
    return folder.parent / f"{folder.name}_list.txt"
