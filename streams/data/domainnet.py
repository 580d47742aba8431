"""DomainNet, cleaned version: 345 classes in six domains, with the official splits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from driftline.core.errors import UserError, suggest
from driftline.streams.dataset import About, DomainData, Split, first_folder
from driftline.streams.downloads import Download, Published
from driftline.streams.images import Files
from driftline.streams.listings import read_labelled
from driftline.streams.splits import entries

BASE = "http://csr.bu.edu/ftp/visda/2019/multi-source"
ARCHIVES = {  # domain -> folder of the server, bytes, SHA-256
    "clipart": (
        "groundtruth/",
        1_270_909_081,
        "f8f248a3e8bbc9868c523ae24e6601b4c2ad102afc60c0efeb4f3255df22354d",
    ),
    "infograph": (
        "",
        4_338_659_804,
        "891e14f476317e97b6f06d6498c11d0a5b8d0c8b57210765ed9beb072da611fa",
    ),
    "painting": (
        "groundtruth/",
        3_679_366_174,
        "fa47e6d405503ea0286cabd767f176bd30e988b63ddd7b9db16cf030c9770015",
    ),
    "quickdraw": (
        "",
        459_920_701,
        "9f37df2a8c3733703dbb35ad9964202a65f675ca30137756457537536b485d84",
    ),
    "real": (
        "",
        6_062_039_589,
        "d7fe010b430c5b510f85d657d38c4a1924822695fabea4fef57bd00dba251d63",
    ),
    "sketch": (
        "",
        2_633_992_926,
        "23a7dbae7016b343e934399beaa8a68728fb5e570ebe2c71df9b75cf91c499fc",
    ),
}
LISTS = {  # <domain>_<split> -> bytes, SHA-256
    "clipart_test": (
        628_917,
        "62c8e36aaba1c41ad9e249099739707220a44c08f167b37ef420f34a31628a6b",
    ),
    "clipart_train": (
        1_443_819,
        "affdadf5f95a7583e6b98030a3d35007e2613ee4dd942393c5a705ec2b429312",
    ),
    "infograph_test": (
        728_028,
        "413cfa54ac92e7e6b242f4f09fbd9c8ace85c4deaf3cb6c81ff6b68264460136",
    ),
    "infograph_train": (
        1_683_098,
        "36b44cbd41a2915e0dc73b4f4be8862a6f3c220f93c8d63fb2439beeae3aefda",
    ),
    "painting_test": (
        971_888,
        "11472b13b5188e09f06918b12eebb660588c97a20e43e268d9b02e3e37eb8f97",
    ),
    "painting_train": (
        2_241_901,
        "f1da38d50a702fddf1329f85bc607d7a2abcae7e6aec75e1fd49cc1bd340d47b",
    ),
    "quickdraw_test": (
        2_213_400,
        "2a00a60650a453c65c356da748fec54084a197272137c440e7d52d08947357bf",
    ),
    "quickdraw_train": (
        5_164_600,
        "3a5edd3bc215772010eebc87f158707703dd7e48091d13b816af81326a9d1c0f",
    ),
    "real_test": (
        1_911_327,
        "2b3f75bcde309aeb5931292084b2162e936b5f189e3bb1ad716f0f74c460864c",
    ),
    "real_train": (
        4_440_944,
        "19d483256d24aef19e581b65eda8333fd918aef3eb733fe499ff384120e3a289",
    ),
    "sketch_test": (
        850_581,
        "3fb48fca18c507c4321f007c3f62b308ec232ff6928cbfe2af64e76ec366e840",
    ),
    "sketch_train": (
        1_960_222,
        "72f4bc6afa5702a1ccba800d0053c1427de87439dfaf246dbc9a2e71abfec54f",
    ),
}


def archive(domain: str) -> Published:
    """The images of a domain."""
    folder, size, sha256 = ARCHIVES[domain]
    return Published(
        f"{BASE}/{folder}{domain}.zip",
        (f"DomainNet/{domain}",),
        size=size,
        checksum=f"sha256:{sha256}",
        into="DomainNet",
        part=domain,
    )


def split(name: str) -> Published:
    """The list of a split, `<domain>_<train or test>`: a path and a label a line."""
    size, sha256 = LISTS[name]
    return Published(
        f"{BASE}/domainnet/txt/{name}.txt",
        (f"DomainNet/{name}.txt",),
        size=size,
        checksum=f"sha256:{sha256}",
        into="DomainNet",
        part=name.partition("_")[0],
    )


ABOUT = About(
    title="DomainNet (cleaned version)",
    paper="Peng et al., ICCV 2019",
    published="http://ai.bu.edu/M3SDA/",
    licence="academic research; the rights of the images are their owners'",
    layout="<data.root>/DomainNet/<domain>/<class>/*.jpg and <domain>_<train or test>.txt",
    label_space="",
    name="domainnet",
    download=Download(
        (*map(archive, ARCHIVES), *map(split, LISTS)),
        command="scenario=domains_domainnet",
        sources="sizes and SHA-256: TensorFlow Datasets (domainnet)",
    ),
)


@dataclass(frozen=True, kw_only=True)
class DomainNetTasks(DomainData):
    """The official split of each domain; without `domains` all six, sorted.

    The lists name 345 classes by the folders of their images. Not every domain has training images
    of each (painting has none of t-shirt), so the classes are those of all lists together.
    """

    about = ABOUT

    def read(self, root: Path) -> dict[str, Split]:
        names = self.domains or list(ARCHIVES)
        for name in names:
            if name not in ARCHIVES:
                raise UserError(
                    f"scenario.domains: {name!r} is no domain of DomainNet"
                    f"{suggest(name, ARCHIVES)}. Known: {', '.join(ARCHIVES)}"
                )
        tops = ("DomainNet", "domainnet")
        needed = [*names, *(f"{n}_{part}.txt" for n in names for part in ("train", "test"))]
        folder = first_folder(root, tops, needed) or root / tops[0]
        lists = {p.stem: read_labelled(p) for p in entries(folder, needed, ABOUT)[len(names) :]}
        classes: dict[int, str] = {}
        for files, labels in lists.values():
            classes |= {y: f.split("/")[-2] for f, y in zip(files, labels.tolist(), strict=True)}
        named = [classes.get(label, f"class {label}") for label in range(max(classes) + 1)]

        def part(name: str) -> Files:
            return Files(folder, *lists[name], named)

        return {n: (part(f"{n}_train"), part(f"{n}_test")) for n in names}
