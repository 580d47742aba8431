"""ImageNet-A: photographs of 200 ImageNet classes that a ResNet-50 got wrong."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published

ABOUT = About(
    title="ImageNet-A",
    paper="Hendrycks et al., CVPR 2021",
    published="https://github.com/hendrycks/natural-adv-examples",
    licence="MIT, as its repository; the rights of the images are their owners'",
    layout="<data.root>/imagenet-a/<wnid>/*.jpg",
    label_space="imagenet1k",
    name="imagenet_a",
    download=Download(
        (
            Published(
                "https://people.eecs.berkeley.edu/~hendrycks/imagenet-a.tar",
                ("imagenet-a",),
                size=687_552_512,
                checksum="sha256:3bb3632277e6ba6392ea64c02ddbf4dd2266c9caffd6bc09c9656d28f012589e",
            ),
        ),
        sources="size and SHA-256: TensorFlow Datasets (imagenet_a)",
    ),
)
