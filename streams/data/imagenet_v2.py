"""ImageNet-V2: three sets of new test images, collected as ImageNet was."""

from __future__ import annotations

from dataclasses import dataclass

from driftline.streams.dataset import About
from driftline.streams.domain_folders import ImageNetDomains
from driftline.streams.downloads import Download, Published

BASE = "https://huggingface.co/datasets/vaishaal/ImageNetV2/resolve/main"  # of the authors
FILES = {  # part -> bytes, SHA-256
    "matched-frequency": (
        1_264_079_360,
        "f0c37fdf925916b19ea1323cd9a2208cdb6959ba2c32eef2a7fc393835c9ca7c",
    ),
    "threshold0.7": (
        1_249_906_176,
        "32142bfe998f9cfa4141be691f6a80eeb1e27b24bd532a668eb08c26d98897a2",
    ),
    "top-images": (
        1_245_927_936,
        "85e4ace30f3f0d660152062254b8759dda66267b27f7ec0fd8d5768f1073a04b",
    ),
}

ABOUT = About(
    title="ImageNet-V2",
    paper="Recht et al., ICML 2019",
    published="https://github.com/modestyachts/ImageNetV2",
    licence="MIT, as its repository; the rights of the images are their owners'",
    layout="<data.root>/imagenetv2-<part>-format-val/<class index>/*.jpeg, part: "
    + ", ".join(FILES),
    label_space="imagenet1k",
    name="imagenet_v2",
    download=Download(
        tuple(
            Published(
                f"{BASE}/imagenetv2-{part}.tar.gz",
                (f"imagenetv2-{part}-format-val",),
                size=size,
                checksum=f"sha256:{sha256}",
                part=part,
            )
            for part, (size, sha256) in FILES.items()
        ),
        sources="sizes and SHA-256: TensorFlow Datasets (imagenet_v2)",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ImageNetV2(ImageNetDomains):
    """The three sets are the domains; class folders are named by label."""

    about = ABOUT
    numbered = True
    tops = ("imagenet-v2", "imagenetv2", "ImageNetV2", "ImageNet-V2")
    spellings = {
        part: (f"imagenetv2-{part}-format-val", f"ImageNetV2-{part}", f"imagenetv2-{part}")
        for part in FILES
    }
