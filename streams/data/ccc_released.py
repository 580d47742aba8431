"""CCC as released: images with two corruptions that change smoothly."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download

ABOUT = About(
    title="CCC (continuously changing corruptions), released images",
    paper="Press et al., NeurIPS 2023",
    published="https://github.com/oripress/CCC",
    licence="none stated; for the images the terms of ImageNet",
    layout="<data.root>/CCC/baseline_<0, 20 or 40>_transition+speed_<1000, 2000 or 5000>_seed_"
    "<43, 44 or 45>/serial_<number>.tar",
    label_space="imagenet1k",
    name="ccc_released",
    download=Download(
        by_hand="Load the numbered archives of a setting, one after the other, from "
        "https://mlcloud.uni-tuebingen.de:7443/datasets/CCC/<setting>/serial_00000.tar and so on; "
        "scenario=ccc makes such a stream from clean ImageNet images without them",
    ),
)
