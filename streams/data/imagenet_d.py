"""ImageNet-D: the images of DomainNet whose classes are classes of ImageNet, too."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from driftline.core.errors import UserError
from driftline.streams.data.imagenet import cropped, wnids
from driftline.streams.dataset import About, SubsetData
from driftline.streams.domain_folders import ImageNetDomains
from driftline.streams.downloads import Download
from driftline.streams.images import Files, ImageSet, image_folder

# Folders of DomainNet with one class of ImageNet-1k each: as map_files.py of bethgelab/robustness
# maps them, run on their names, and as mariodoebler/test-time-adaptation has them (D109).
LABELS = {
    "aircraft_carrier": 403,
    "ambulance": 407,
    "ant": 310,
    "backpack": 414,
    "banana": 954,
    "barn": 425,
    "basket": 790,
    "basketball": 430,
    "bathtub": 435,
    "bed": 831,
    "bee": 309,
    "belt": 785,
    "bench": 703,
    "binoculars": 447,
    "bottlecap": 455,
    "bowtie": 457,
    "broccoli": 937,
    "broom": 462,
    "bucket": 463,
    "camel": 354,
    "candle": 470,
    "cannon": 471,
    "canoe": 472,
    "castle": 483,
    "cello": 486,
    "church": 497,
    "compass": 635,
    "crocodile": 49,
    "dishwasher": 534,
    "door": 799,
    "dragon": 48,
    "drill": 740,
    "duck": 103,
    "dumbbell": 543,
    "ear": 998,
    "envelope": 549,
    "eraser": 767,
    "fan": 545,
    "feather": 552,
    "flamingo": 130,
    "frying_pan": 567,
    "hammer": 587,
    "hat": 515,
    "hedgehog": 334,
    "hockey_puck": 746,
    "hot_air_balloon": 417,
    "hourglass": 604,
    "kangaroo": 104,
    "knee": 615,
    "knife": 623,
    "lantern": 607,
    "lighter": 626,
    "lighthouse": 437,
    "lipstick": 629,
    "mailbox": 637,
    "microphone": 650,
    "microwave": 651,
    "mushroom": 947,
    "nail": 677,
    "necklace": 679,
    "ocean": 628,
    "oven": 544,
    "owl": 24,
    "paintbrush": 696,
    "parachute": 701,
    "penguin": 145,
    "pillow": 721,
    "pineapple": 953,
    "pizza": 963,
    "purse": 748,
    "remote_control": 761,
    "saw": 491,
    "saxophone": 776,
    "scorpion": 71,
    "screwdriver": 784,
    "sheep": 349,
    "shovel": 792,
    "sleeping_bag": 797,
    "snail": 113,
    "snorkel": 801,
    "soccer_ball": 805,
    "sock": 806,
    "speedboat": 814,
    "spoon": 910,
    "squirrel": 335,
    "stethoscope": 823,
    "stop_sign": 919,
    "stove": 827,
    "strawberry": 949,
    "submarine": 833,
    "swing_set": 843,
    "syringe": 845,
    "t-shirt": 610,
    "teapot": 849,
    "teddy-bear": 850,
    "television": 851,
    "tent": 672,
    "tiger": 292,
    "toaster": 859,
    "tractor": 866,
    "traffic_light": 920,
    "train": 466,
    "trombone": 875,
    "trumpet": 513,
    "umbrella": 879,
    "vase": 883,
    "violin": 889,
    "washing_machine": 897,
    "zebra": 340,
}
# Folders of DomainNet whose images go to the class of another one.
MERGED = {"hot_tub": "bathtub", "couch": "bed", "ceiling_fan": "fan"}

ABOUT = About(
    title="ImageNet-D (109 classes)",
    paper="Rusak et al., TMLR 2022; the 109 classes: Marsden et al., WACV 2024",
    published="https://github.com/bethgelab/robustness/tree/main/examples/imagenet_d",
    licence="that of DomainNet: academic research",
    layout="<data.root>/DomainNet/<domain>/<class>/*.jpg, as DomainNet has them, or imagenet-d/"
    "<domain>/<class>/*, as the official map_files.py sorts them",
    label_space="imagenet1k",
    subset=tuple(sorted(LABELS.values())),
    name="imagenet_d",
    download=Download(
        by_hand="It is read from the folders of DomainNet: scripts/get_data.py domainnet",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ImageNetD(SubsetData, ImageNetDomains):
    """The 109 classes with one class of ImageNet each (ImageNet-D109), in six domains.

    The other 55 classes of ImageNet-D stand for several classes of ImageNet at once.
    """

    about = ABOUT
    tops = ("imagenet-d", "ImageNet-D", "DomainNet", "DomainNet-126", "domainnet", "domain_net")
    spellings = {
        name: (name,)
        for name in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    }

    def read(self, root: Path, domain: str) -> ImageSet:
        files = image_folder(self.folder(root, domain), self.about.expected)
        position = np.asarray([LABELS.get(MERGED.get(c, c), -1) for c in files.class_names])
        labels = position[files.labels]
        rows = np.flatnonzero(labels >= 0)
        if not len(rows):
            raise UserError(
                f"{files.root} has no class of ImageNet-D: its folders are named like "
                f"{files.class_names[0]}. {self.about.expected}"
            )
        return cropped(
            Files(files.root, [files.names[row] for row in rows.tolist()], labels[rows], wnids())
        )
