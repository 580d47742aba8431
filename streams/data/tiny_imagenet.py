"""Tiny ImageNet: 200 classes of ImageNet at 64 pixels."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published

ABOUT = About(
    title="Tiny ImageNet",
    paper="Le and Yang, CS 231N course project, 2015",
    published="http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    licence="none stated; for the images the terms of ImageNet",
    layout="<data.root>/tiny-imagenet-200/train/<wnid>/images/*.JPEG and val/",
    label_space="",
    name="tiny_imagenet",
    download=Download(
        (
            Published(
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                ("tiny-imagenet-200",),
                size=248_100_043,
                checksum="md5:90528d7ca1a48142e341f4ef8d21d0de",
            ),
        ),
        sources="size and MD5: as Avalanche and other libraries check them",
    ),
)
