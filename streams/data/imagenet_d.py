"""ImageNet-D: the images of DomainNet whose classes are classes of ImageNet, too."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download

ABOUT = About(
    title="ImageNet-D",
    paper="Rusak et al., TMLR 2022",
    published="https://github.com/bethgelab/robustness/tree/main/examples/imagenet_d",
    licence="that of DomainNet: academic research",
    layout="<data.root>/imagenet-d/<domain>/<class>/*.jpg",
    label_space="imagenet1k",
    name="imagenet_d",
    download=Download(
        by_hand="It is made from DomainNet: load that (scripts/get_data.py domainnet), then let "
        "map_files.py of https://github.com/bethgelab/robustness (examples/imagenet_d) sort them",
    ),
)
