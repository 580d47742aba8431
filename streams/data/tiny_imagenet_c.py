"""Tiny-ImageNet-C: the corruptions of ImageNet-C on Tiny ImageNet."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published

ABOUT = About(
    title="Tiny-ImageNet-C",
    paper="Hendrycks and Dietterich, ICLR 2019",
    published="https://zenodo.org/records/8206060",
    licence="CC BY 4.0 (as its first release, Zenodo 2536630)",
    layout="<data.root>/Tiny-ImageNet-C/<corruption>/<severity 1-5>/<wnid>/*.JPEG",
    label_space="",
    name="tiny_imagenet_c",
    download=Download(
        (
            Published(
                "https://zenodo.org/records/8206060/files/Tiny-ImageNet-C.tar?download=1",
                ("Tiny-ImageNet-C",),
                size=1_794_775_040,
                checksum="md5:f9c9a9dbdc11469f0b850190f7ad8be1",
            ),
        ),
        sources="MD5: as torch-uncertainty checks it",
    ),
)
