"""Office-Home: art, clip art, products and photos of 65 classes."""

from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published

ABOUT = About(
    title="Office-Home",
    paper="Venkateswara et al., CVPR 2017",
    published="https://www.hemanthdv.org/officeHomeDataset.html",
    licence="academic research; the rights of the images are their owners'",
    layout="<data.root>/OfficeHome/<Art, Clipart, Product or Real World>/<class>/*.jpg",
    label_space="",
    name="office_home",
    download=Download(
        (
            Published(
                "",
                tuple(f"OfficeHome/{name}" for name in ("Art", "Clipart", "Product", "Real World")),
                checksum="md5:b1c14819770c4448fd5b6d931031c91c",
                into="OfficeHome",
                top="OfficeHomeDataset_10072016",
                name="OfficeHomeDataset_10072016.zip",
            ),
        ),
        by_hand="Load OfficeHomeDataset_10072016.zip in a browser from "
        "https://www.hemanthdv.org/officeHomeDataset.html (a drive), then: scripts/get_data.py "
        "office_home --from THAT_FOLDER",
        sources="MD5: as three public libraries check it",
    ),
)
