"""ImageNet-3DCC: corruptions that follow the depth of the scene."""

from __future__ import annotations

from dataclasses import dataclass

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published
from driftline.streams.released import ReleasedCorruptions

CORRUPTIONS = (
    "near_focus",
    "far_focus",
    "fog_3d",
    "flash",
    "color_quant",
    "low_light",
    "xy_motion_blur",
    "z_motion_blur",
    "iso_noise",
    "bit_error",
    "h265_abr",
    "h265_crf",
)

ABOUT = About(
    title="ImageNet-3DCC (3D common corruptions)",
    paper="Kar et al., CVPR 2022",
    published="https://github.com/EPFL-VILAB/3DCommonCorruptions",
    licence="CC BY-NC 4.0",
    layout="<data.root>/ImageNet-3DCC/<corruption>/<severity 1-5>/<wnid>/*.JPEG",
    label_space="imagenet1k",
    name="imagenet_3dcc",
    download=Download(
        tuple(
            Published(
                f"https://datasets.epfl.ch/3dcc/imagenet_3dcc/{name}.tar.gz",
                (f"ImageNet-3DCC/{name}",),
                into="ImageNet-3DCC",
                part=name,
            )
            for name in CORRUPTIONS
        ),
        sources="addresses: tools/download_imagenet_3dcc.sh of its repository",
    ),
)


@dataclass(frozen=True, kw_only=True)
class ImageNet3DCC(ReleasedCorruptions):
    """The twelve corruptions that are released for ImageNet."""

    about = ABOUT
    folders = ("ImageNet-3DCC", "imagenet-3dcc", "imagenet_3dcc", "3DCC")
    all_corruptions = CORRUPTIONS
