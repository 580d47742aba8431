"""CORe50: 50 objects in 11 sessions of video."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published

FILES = {  # address -> MD5, what it creates
    "http://bias.csr.unibo.it/maltoni/download/core50/core50_128x128.zip": (
        "745f3373fed08d69343f1058ee559e13",
        "core50_128x128",
    ),
    "https://vlomonaco.github.io/core50/data/batches_filelists.zip": (
        "e3297508a8998ba0c99a83d6b36bde62",
        "batches_filelists",
    ),
    "https://vlomonaco.github.io/core50/data/labels2names.pkl": (
        "557d0b9f0ec32765ccea65624aa51b3b",
        "labels2names.pkl",
    ),
}

ABOUT = About(
    title="CORe50",
    paper="Lomonaco and Maltoni, CoRL 2017",
    published="https://vlomonaco.github.io/core50/",
    licence="CC BY 4.0",
    layout="<data.root>/core50/core50_128x128/s<session>/o<object>/*.png and batches_filelists/",
    label_space="",
    name="core50",
    download=Download(
        tuple(
            Published(url, (f"core50/{name}",), checksum=f"md5:{md5}", into="core50")
            for url, (md5, name) in FILES.items()
        ),
        sources="addresses and MD5: Avalanche (core50_data.py)",
    ),
)
