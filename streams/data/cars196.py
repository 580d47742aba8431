"""Stanford Cars: 196 models of cars."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published

FILES = {  # archive -> bytes, SHA-256
    "cars_train.tgz": (
        979_269_282,
        "512b227b30e2f0a8aab9e09485786ab4479582073a144998da74d64b801fd288",
    ),
    "cars_test.tgz": (
        977_350_468,
        "bffea656d6f425cba3c91c6d83336e4c5f86c6cffd8975b0f375d3a10da8e243",
    ),
    "cars_test_annos_withlabels.mat": (
        185_758,
        "790f75be8ea34eeded134cc559332baf23e30e91367e9ddca97d26ed9b895f05",
    ),
    "car_devkit.tgz": (
        330_960,
        "b97deb463af7d58b6bfaa18b2a4de9829f0f79e8ce663dfa9261bf7810e9accd",
    ),
}
CREATES = {"car_devkit.tgz": "devkit"}

ABOUT = About(
    title="Stanford Cars",
    paper="Krause et al., 3dRR workshop, 2013",
    published="https://ai.stanford.edu/~jkrause/cars/car_dataset.html (no longer there)",
    licence="non-commercial research",
    layout="<data.root>/stanford_cars/cars_train/*.jpg, cars_test/, devkit/ and "
    "cars_test_annos_withlabels.mat (torchvision's own layout)",
    label_space="",
    name="cars196",
    download=Download(
        tuple(
            Published(
                "",
                (f"stanford_cars/{CREATES.get(name, name.removesuffix('.tgz'))}",),
                size=size,
                checksum=f"sha256:{sha256}",
                into="stanford_cars",
                name=name,
            )
            for name, (size, sha256) in FILES.items()
        ),
        by_hand="The publisher took it off the net; where you have the four files "
        f"({', '.join(FILES)}), scripts/get_data.py cars196 --from THAT_FOLDER checks and "
        "unpacks them",
        sources="sizes and SHA-256: TensorFlow Datasets (cars196)",
    ),
)
