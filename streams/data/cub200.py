"""CUB-200-2011: 200 kinds of birds."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published

ABOUT = About(
    title="CUB-200-2011",
    paper="Wah et al., Caltech technical report, 2011",
    published="https://data.caltech.edu/records/65de6-vp158",
    licence="non-commercial research and education; the rights of the images are their owners'",
    layout="<data.root>/CUB_200_2011/images/<class>/*.jpg, images.txt and train_test_split.txt",
    label_space="",
    name="cub200",
    download=Download(
        (
            Published(
                "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz?download=1",
                ("CUB_200_2011",),
                size=1_150_585_339,
                checksum="md5:97eceeb196236b17998738112f37df78",
            ),
        ),
        by_hand="The split of other papers (PILOT, RanPAC: train/<class>, test/<class>) is a file "
        "on a drive: see https://github.com/LAMDA-CL/LAMDA-PILOT",
        sources="size and MD5: as Avalanche and other libraries check them",
    ),
)
