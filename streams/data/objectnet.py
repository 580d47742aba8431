"""ObjectNet: 313 household objects, photographed turned and in unusual places."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download

ABOUT = About(
    title="ObjectNet",
    paper="Barbu et al., NeurIPS 2019",
    published="https://objectnet.dev/download.html",
    licence="its own: for tests alone, nothing may be tuned on it; images keep their red border",
    layout="<data.root>/objectnet-1.0/images/<class>/*.png",
    label_space="",
    name="objectnet",
    download=Download(
        by_hand="Read the licence at https://objectnet.dev/download.html, load objectnet-1.0.zip "
        "there and unpack it with the password that the page gives. The 200 classes of PILOT and "
        "RanPAC (train/<class>, test/<class>): https://github.com/LAMDA-CL/LAMDA-PILOT",
    ),
)
