"""ImageNet-C-bar: ten corruptions that are unlike those of ImageNet-C."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published

CORRUPTIONS = (
    "blue_noise_sample",
    "brownish_noise",
    "caustic_refraction",
    "checkerboard_cutout",
    "cocentric_sine_waves",
    "inverse_sparkles",
    "perlin_noise",
    "plasma_noise",
    "single_frequency_greyscale",
    "sparkles",
)

ABOUT = About(
    title="ImageNet-C-bar",
    paper="Mintun et al., NeurIPS 2021",
    published="https://github.com/facebookresearch/augmentation-corruption",
    licence="MIT, as its repository; for the images the terms of ImageNet",
    layout="<data.root>/ImageNet-C-bar/<corruption>/<severity 1-5>/<wnid>/*.JPEG",
    label_space="imagenet1k",
    name="imagenet_c_bar",
    download=Download(
        (
            Published(
                "https://dl.fbaipublicfiles.com/inc_bar/imagenet_c_bar.tar.gz",
                tuple(f"ImageNet-C-bar/{name}" for name in CORRUPTIONS),
                into="ImageNet-C-bar",
                top="cbar_download",
            ),
        ),
        sources="address: the README of its repository",
    ),
)
