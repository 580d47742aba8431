"""ImageNet-R: renditions of 200 ImageNet classes."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published

ABOUT = About(
    title="ImageNet-R",
    paper="Hendrycks et al., ICCV 2021",
    published="https://github.com/hendrycks/imagenet-r",
    licence="MIT, as its repository; the rights of the images are their owners'",
    layout="<data.root>/imagenet-r/<wnid>/*.jpg",
    label_space="imagenet1k",
    name="imagenet_r",
    download=Download(
        (
            Published(
                "https://people.eecs.berkeley.edu/~hendrycks/imagenet-r.tar",
                ("imagenet-r",),
                size=2_191_079_936,
                checksum="sha256:18c6bf493b39a0d975d48e587437f562caab9c52ae6327dcfa9dd8eb54aa1b52",
            ),
        ),
        sources="size and SHA-256: TensorFlow Datasets (imagenet_r)",
    ),
)
