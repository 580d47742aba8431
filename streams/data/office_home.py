"""Office-Home: art, clip art, products and photos of 65 classes."""

from __future__ import annotations

from dataclasses import dataclass

from driftline.streams.dataset import About
from driftline.streams.domain_folders import TrainedOnADomain
from driftline.streams.downloads import Download, Published

# In the order of torchvision's ImageFolder: capitals before small letters, TV before Table.
CLASSES = (
    "Alarm_Clock", "Backpack", "Batteries", "Bed", "Bike", "Bottle", "Bucket", "Calculator",
    "Calendar", "Candles", "Chair", "Clipboards", "Computer", "Couch", "Curtains", "Desk_Lamp",
    "Drill", "Eraser", "Exit_Sign", "Fan", "File_Cabinet", "Flipflops", "Flowers", "Folder",
    "Fork", "Glasses", "Hammer", "Helmet", "Kettle", "Keyboard", "Knives", "Lamp_Shade", "Laptop",
    "Marker", "Monitor", "Mop", "Mouse", "Mug", "Notebook", "Oven", "Pan", "Paper_Clip", "Pen",
    "Pencil", "Postit_Notes", "Printer", "Push_Pin", "Radio", "Refrigerator", "Ruler", "Scissors",
    "Screwdriver", "Shelf", "Sink", "Sneakers", "Soda", "Speaker", "Spoon", "TV", "Table",
    "Telephone", "ToothBrush", "Toys", "Trash_Can", "Webcam",
)  # fmt: skip

ABOUT = About(
    title="Office-Home",
    paper="Venkateswara et al., CVPR 2017",
    published="https://www.hemanthdv.org/officeHomeDataset.html",
    licence="academic research; the rights of the images are their owners'",
    layout="<data.root>/OfficeHome/<Art, Clipart, Product or Real World>/<class>/*.jpg",
    label_space="office_home",
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


@dataclass(frozen=True, kw_only=True)
class OfficeHome(TrainedOnADomain):
    """All images of a domain, resized and cropped to 224 px as SHOT does it."""

    about = ABOUT
    classes = CLASSES
    tops = ("OfficeHome", "OfficeHomeDataset_10072016", "office_home", "office-home", "Office-Home")
    spellings = {
        "Art": ("Art", "art"),
        "Clipart": ("Clipart", "clipart"),
        "Product": ("Product", "product"),
        "Real_World": ("Real World", "Real_World", "RealWorld", "real_world", "Real"),
    }
