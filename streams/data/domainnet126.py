"""DomainNet-126: 126 classes in four domains of DomainNet."""

from driftline.streams.data.domainnet import archive
from driftline.streams.dataset import About
from driftline.streams.downloads import Download, Published

LISTS = {  # domain -> bytes, SHA-256
    "clipart": (
        782_730,
        "057b0496db8b60a90804b1267b65d64e6f9bd548ef555521b4d63d9cfb3bdb6e",
    ),
    "painting": (
        1_312_543,
        "0d91298e5777ff28b8d1dabf673af566d1002e2331bea1972ac9dea27978f0db",
    ),
    "real": (
        2_503_856,
        "c567b5ddc123a243f010d2048123d57c987717febd064a298e2c155d24795af8",
    ),
    "sketch": (
        963_323,
        "4c52172cc37acc3bda07adf14e8ec8c7e542886175844ef2186ac787ea7a3c44",
    ),
}
COMMIT = "e8053164a2a078cda722af9c1536032fa6985288"
BASE = f"https://raw.githubusercontent.com/DianCh/AdaContrast/{COMMIT}/datasets/domainnet-126"

ABOUT = About(
    title="DomainNet-126",
    paper="Saito et al., ICCV 2019",
    published="http://ai.bu.edu/M3SDA/; lists: https://github.com/DianCh/AdaContrast",
    licence="that of DomainNet: academic research; the rights of the images are their owners'",
    layout="<data.root>/DomainNet/<domain>/<class>/*.jpg and <domain>_list.txt",
    label_space="",
    name="domainnet126",
    download=Download(
        (
            *map(archive, LISTS),
            *(
                Published(
                    f"{BASE}/{domain}_list.txt",
                    (f"DomainNet/{domain}_list.txt",),
                    size=size,
                    checksum=f"sha256:{sha256}",
                    into="DomainNet",
                    part=domain,
                )
                for domain, (size, sha256) in LISTS.items()
            ),
        ),
        sources="archives as of domainnet; lists: the files of AdaContrast at one commit",
    ),
)
