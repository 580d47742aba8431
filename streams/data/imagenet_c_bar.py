"""ImageNet-C-bar: ten corruptions that are unlike those of ImageNet-C."""

from __future__ import annotations

from dataclasses import dataclass

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published
from driftline.streams.released import ReleasedCorruptions

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

# Parameters of the severities 1 to 5, by which make_imagenet_c_bar.py names folders
# (imagenet_c_bar.csv of its repository).
PARAMETERS = {
    "blue_noise_sample": (0.8, 1.6, 2.4, 4.0, 5.6),
    "brownish_noise": (1.0, 2.0, 3.0, 4.0, 5.0),
    "caustic_refraction": (2.35, 3.2, 4.9, 6.6, 9.15),
    "checkerboard_cutout": (2.0, 3.0, 4.0, 5.0, 6.0),
    "cocentric_sine_waves": (3.0, 5.0, 8.0, 9.0, 10.0),
    "inverse_sparkles": (1.0, 2.0, 4.0, 9.0, 10.0),
    "perlin_noise": (4.6, 5.2, 5.8, 7.6, 8.8),
    "plasma_noise": (4.75, 7.0, 8.5, 9.25, 10.0),
    "single_frequency_greyscale": (1.0, 1.5, 2.0, 4.5, 5.0),
    "sparkles": (1.0, 2.0, 3.0, 5.0, 6.0),
}

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


@dataclass(frozen=True, kw_only=True)
class ImageNetCBar(ReleasedCorruptions):
    """Images as released (folders 1 to 5), or as the authors' script names its folders."""

    about = ABOUT
    folders = ("ImageNet-C-bar", "ImageNet-C-Bar", "imagenet-c-bar", "cbar_download")
    all_corruptions = CORRUPTIONS
    parameters = PARAMETERS
