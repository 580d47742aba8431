"""Embedded stand-in images in the place of a data set, each domain under a corruption."""

from __future__ import annotations

from functools import partial

import driftline.core.vision  # noqa: F401  # isort: skip

import numpy as np
from PIL import Image

from driftline.core.errors import UserError, suggest
from driftline.streams import corruptions as C
from driftline.streams.embedded import TASK_CLASSES, EmbeddedImages
from driftline.streams.images import Derived, ImageSet

DOMAINS = ("clean", "contrast", "fog", "pixelate", "gaussian_noise")


def _corrupt(image: Image.Image, row: int, *, name: str) -> Image.Image:
    pixels = C.corrupt(np.asarray(image), name, 3, preset="cifar", seed=0, index=row)
    return Image.fromarray(pixels)


def _domain(domain: str, split: str, per_class: int) -> ImageSet:
    images = EmbeddedImages(classes=TASK_CLASSES[:10], split=split, per_class=per_class)
    if domain == "clean":
        return images
    return Derived(images, partial(_corrupt, name=domain), f"{domain}:3 {C.VERSION}", "memory")


def embedded_domains(
    domains: list[str] | None, per_class: tuple[int, int]
) -> dict[str, tuple[ImageSet, ImageSet]]:
    """Training and test images by domain.

    Raises:
        UserError: for a domain that is neither `clean` nor a corruption.
    """
    names = domains or list(DOMAINS)
    known = ["clean", *C.STANDARD, *C.EXTRA]
    for name in names:
        if name not in known:
            raise UserError(
                f"scenario.domains: {name!r} is no embedded domain{suggest(name, known)}"
            )
    return {n: (_domain(n, "train", per_class[0]), _domain(n, "test", per_class[1])) for n in names}
