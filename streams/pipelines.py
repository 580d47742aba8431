"""Named image pipelines: PIL to PIL, so that resizing is PIL's own, antialiased.

Sources: LAMDA-PILOT (`coda`: what it has for CODA-Prompt), gqk/LAE and RanPAC data managers; timm
`create_transform`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import driftline.core.vision  # noqa: F401  # isort: skip

import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode

Name = Literal["raw", "plain", "pilot", "lae", "coda", "ranpac", "timm"]
Pipeline = Callable[[Image.Image], Image.Image]
# Pipelines whose training form is the test form, perhaps flipped: whether it is.
FLIP_ONLY: dict[Name, bool] = {"raw": False, "plain": True}


@dataclass
class Geometry:
    """What the backbone expects; filled in once the backbone is known."""

    size: int = 224
    interpolation: str = "bicubic"
    crop: float = 0.875  # share of the resized side that the centre crop keeps


# Functions of the module, no lambdas: processes that load images may get their pipeline by pickle.
def as_stored(image: Image.Image) -> Image.Image:
    """The pipeline that changes nothing; readers know it and leave PIL out."""
    return image


def _fit(image: Image.Image, size: int) -> Image.Image:
    return image if image.size == (size, size) else T.Resize([size, size])(image)


def pipeline(name: Name, geometry: Geometry, *, train: bool, cifar: bool) -> Pipeline:
    """The pipeline `name`; sizes scale with `geometry.size` (224 in the sources).

    | name   | train                                            | test                           |
    |--------|--------------------------------------------------|--------------------------------|
    | raw    | as stored                                        | as stored                      |
    | plain  | resize if needed, horizontal flip                | resize if needed               |
    | pilot  | random crop, area .05-1, bilinear; flip          | resize 256 bicubic, crop 224   |
    | ranpac | as pilot                                         | CIFAR: resize 224; else pilot  |
    | lae    | random crop, area .08-1, bilinear; flip          | resize 256 bilinear, crop 224  |
    | coda   | as lae                                           | CIFAR: bilinear 224; else lae  |
    | timm   | random crop, area .08-1, the backbone's own; flip| resize and crop of the backbone|
    """
    size = geometry.size
    bilinear, bicubic = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
    own = InterpolationMode(geometry.interpolation)
    if name == "raw":
        return as_stored
    if name == "plain":
        fit = partial(_fit, size=size)
        return T.Compose([fit, T.RandomHorizontalFlip()] if train else [fit])
    if train:
        area, how = {
            "pilot": (0.05, bilinear),
            "ranpac": (0.05, bilinear),
            "lae": (0.08, bilinear),
            "coda": (0.08, bilinear),
            "timm": (0.08, own),
        }[name]
        crop = T.RandomResizedCrop(size, scale=(area, 1.0), interpolation=how)
        return T.Compose([crop, T.RandomHorizontalFlip()])
    how = own if name == "timm" else bicubic if name in ("pilot", "ranpac") else bilinear
    if name in ("ranpac", "coda") and cifar:
        return T.Resize([size, size], how)
    share = geometry.crop if name == "timm" else 0.875
    return T.Compose([T.Resize(int(size / share), how), T.CenterCrop(size)])


# Photometric changes of EcoTTA's source phase: no crop, no flip (Lily-Le/EcoTTA @ 85c1122).
PHOTOMETRIC: Pipeline = T.Compose(
    [
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.4),
        T.RandomApply([T.GaussianBlur(3, (0.1, 2.0))], p=0.2),
        T.RandomGrayscale(p=0.1),
    ]
)


def seeded(change: Pipeline, image: Image.Image, seed: int) -> Image.Image:
    """Apply `change` with torch's global generator seeded, and put the generator back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return change(image)
