"""The photographs that the corruption `frost` blends in: for corruptions made on the fly."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published

COMMIT = "8190fe329f5f072a06e3a2aea02bb5dda69aed9f"
BASE = f"https://raw.githubusercontent.com/hendrycks/robustness/{COMMIT}/ImageNet-C/imagenet_c"
FILES = {  # file -> bytes, SHA-256
    "frost1.png": (
        1_199_930,
        "ff9f907860bd7a835d459e32f9d588062b7f61ee267343cc7222b56753a14755",
    ),
    "frost2.png": (
        299_002,
        "fe211a89b336999c207a852ce05818d4545d0b57c5beadd824b4cc9d9a9b6137",
    ),
    "frost3.png": (
        299_002,
        "2d0d50b4a9bb213f38b024ef7768731bb83cc08d2f26b5766bbc167cdfa0e504",
    ),
    "frost4.jpg": (
        36_734,
        "3f8b91ca1a9fa7167b09e773da53f5ae60d0a1fd88f02a783f6e328a72887f6e",
    ),
    "frost5.jpg": (
        155_150,
        "5fc6a19df4a429ba68abdcc8f8a4278d4c9f81c9ccafd2c92ab0c8cf8992ebd2",
    ),
}

ABOUT = About(
    title="Photographs of frost",
    paper="Hendrycks and Dietterich, ICLR 2019",
    published="https://github.com/hendrycks/robustness",
    licence="Apache 2.0",
    layout="<data.root>/frost/frost1.png to frost5.jpg",
    label_space="",
    name="frost",
    download=Download(
        tuple(
            Published(
                f"{BASE}/imagenet_c/frost/{name}",
                (f"frost/{name}",),
                size=size,
                checksum=f"sha256:{sha256}",
                into="frost",
            )
            for name, (size, sha256) in FILES.items()
        ),
        command="scenario=imagenet_c scenario.corrupt=on_the_fly scenario.frost_dir={root}/frost",
        sources="sizes and SHA-256: TensorFlow Datasets (imagenet2012_corrupted), and the files at "
        "this commit",
    ),
)
