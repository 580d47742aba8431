"""CIFAR-100-C."""

from __future__ import annotations

from dataclasses import dataclass, replace

from driftline.streams.data import cifar10_c
from driftline.streams.data.cifar100 import ABOUT as CLEAN
from driftline.streams.downloads import Download, Published

ABOUT = replace(
    cifar10_c.ABOUT,
    title="CIFAR-100-C",
    published="https://zenodo.org/records/3555552",
    layout="<data.root>/CIFAR-100-C/<corruption>.npy and labels.npy",
    label_space="cifar100",
    class_names=CLEAN.class_names,
    hashes={
        "labels.npy": "md5:bb4026e9ce52996b95f439544568cdb2",
        "brightness.npy": "md5:f22d7195aecd6abb541e27fca230c171",
        "contrast.npy": "md5:322bb385f1d05154ee197ca16535f71e",
        "defocus_blur.npy": "md5:d923e3d9c585a27f0956e2f2ad832564",
        "elastic_transform.npy": "md5:a0792bd6581f6810878be71acedfc65a",
        "fog.npy": "md5:4efc7ebd5e82b028bdbe13048e3ea564",
        "frost.npy": "md5:3a39c6823bdfaa0bf8b12fe7004b8117",
        "gaussian_blur.npy": "md5:5204ba0d557839772ef5a4196a052c3e",
        "gaussian_noise.npy": "md5:ecc4d366eac432bdf25c024086f5e97d",
        "glass_blur.npy": "md5:0bf384f38e5ccbf8dd479d9059b913e1",
        "impulse_noise.npy": "md5:3b3c210ddfa0b5cb918ff4537a429fef",
        "jpeg_compression.npy": "md5:c851b7f1324e1d2ffddeb76920576d11",
        "motion_blur.npy": "md5:732a7e2e54152ff97c742d4c388c5516",
        "pixelate.npy": "md5:96c00c60f144539e14cffb02ddbd0640",
        "saturate.npy": "md5:c0697e9fdd646916a61e9c312c77bf6b",
        "shot_noise.npy": "md5:b0a1fa6e1e465a747c1b204b1914048a",
        "snow.npy": "md5:0237be164583af146b7b144e73b43465",
        "spatter.npy": "md5:12ccf41d62564d36e1f6a6ada5022728",
        "speckle_noise.npy": "md5:e3f215b1a0f9fd9fd6f0d1cf94a7ce99",
        "zoom_blur.npy": "md5:0204613400c034a81c4830d5df81cb82",
    },
    name="cifar100_c",
    download=Download(
        (
            Published(
                "https://zenodo.org/records/3555552/files/CIFAR-100-C.tar?download=1",
                (
                    "CIFAR-100-C/labels.npy",
                    "CIFAR-100-C/gaussian_noise.npy",
                    "CIFAR-100-C/zoom_blur.npy",
                ),
                size=2_918_473_216,
                checksum="sha256:30ee6543a1bfd049fa33834b7c1ada301e7064b7fbe8fc38340eb8b62ced4b33",
            ),
        ),
        sources="size and SHA-256: TensorFlow Datasets (cifar100_corrupted); MD5 of the "
        "unpacked files: as torch-uncertainty checks them",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Cifar100C(cifar10_c.Cifar10C):
    """Corrupted test images in file order, as the official code reads them."""

    about = ABOUT
    clean_about = CLEAN
    folders = ("CIFAR-100-C",)
    which = "cifar100"


@dataclass(frozen=True, kw_only=True)
class Cifar100Clean(cifar10_c.Cifar10Clean):
    """The clean test images."""

    about = ABOUT
    which = "cifar100"
