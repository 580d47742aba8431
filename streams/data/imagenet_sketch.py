"""ImageNet-Sketch: drawings of the 1,000 ImageNet classes."""

from __future__ import annotations

from dataclasses import dataclass

from driftline.streams.dataset import About
from driftline.streams.domain_folders import ImageNetDomains
from driftline.streams.downloads import Download, Published

ABOUT = About(
    title="ImageNet-Sketch",
    paper="Wang et al., NeurIPS 2019",
    published="https://github.com/HaohanWang/ImageNet-Sketch",
    licence="MIT, as its repository; the rights of the images are their owners'",
    layout="<data.root>/sketch/<wnid>/*.JPEG",
    label_space="imagenet1k",
    name="imagenet_sketch",
    download=Download(
        (
            Published(
                "https://huggingface.co/datasets/songweig/imagenet_sketch/resolve/main/data/"
                "ImageNet-Sketch.zip",
                ("sketch",),
                size=7_593_573_012,
                checksum="sha256:4d3ce6b82a7c48aabf14aeac105eb533e75707f152cc858f55bfc022031a72ed",
            ),
        ),
        sources="size and SHA-256: TensorFlow Datasets (imagenet_sketch), of the authors' file on "
        "Google Drive; the address is that of a copy of it",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ImageNetSketch(ImageNetDomains):
    """All its images, resized and cropped to 224 px."""

    about = ABOUT
    tops = ("ImageNet-Sketch", "imagenet-sketch")
    spellings = {"imagenet_sketch": ("sketch", "ImageNet-Sketch", "imagenet-sketch")}
