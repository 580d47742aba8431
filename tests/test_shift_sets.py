"""Named sets of test-time adaptation, each in its published layout, made of tiny images."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, merged, plain_yaml, write_images
from PIL import Image

from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.streams.data import domainnet126, imagenet_c_bar, imagenet_d, office_home
from driftline.streams.data.imagenet import wnids
from driftline.streams.dataset import about
from driftline.streams.store import ImageStore

LIVE = {"on_error": "raise", "cache": None, "workers": 0, "seed": 0}
SMALL = {"batch_size": 8, "probe_images": 1, "clean_images": 0}


def node(name: str) -> dict[str, Any]:
    """A scenario with what its defaults list names, without what is for the command line alone."""
    own = plain_yaml(ROOT / "conf" / "scenario" / f"{name}.yaml")
    below: dict[str, Any] = {}
    for entry in own.pop("defaults", []):
        below = merged(below, node(entry.partition("@")[0]))
    return merged(below, own)


def stream(name: str, root: Path | None = None, **options: Any) -> Any:
    settings = node(name) | {"label": name} | SMALL | options
    for key in ("name", "real", "embedded", "backbones"):
        settings.pop(key, None)
    live = {**LIVE, "data_root": root and str(root), "store": ImageStore()}
    return build(settings, at="scenario", **live)


def labels(made: Any) -> dict[str, list[int]]:
    """Labels that each domain delivers, sorted."""
    return {s.name: sorted(y for b in s.batches() for y in b.y.tolist()) for s in made.segments}


# ------------------------------------------------------------------------ layouts


@dataclass(frozen=True)
class Layout:
    """Images of a set as they are published, and what the stream is to make of them.

    Args:
        files: of each domain, path -> label.
        classes: of the stream.
        more: writes what is no image file.
        options: of the scenario.
        size: of the images it delivers.
        source: domain that is no part of the stream.
        labels: of each domain, where they do not stand in `files`.
        places: folders of the domains, where they do not stand in `files`.
    """

    files: dict[str, dict[str, int]]
    classes: int
    more: Callable[[Path], None] = lambda root: None
    options: dict[str, Any] = field(default_factory=dict)
    size: int = 224
    source: str = ""
    labels: dict[str, list[int]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def write(self, root: Path) -> None:
        for number, files in enumerate(self.files.values()):
            write_images(root, list(files), size=40, seed=number)
        self.more(root)

    def built(self, root: Path) -> tuple[list[str], list[tuple[Path, int]]]:
        """As a case of tests/test_content.py."""
        self.write(root)
        shown = [root / f for d, files in self.files.items() if d != self.source for f in files]
        for place in self.places.values():
            shown += [
                p for p in (root / place).iterdir() if p.match("*_data.npy") or p.match("*.tar")
            ]
        options = {"probe_images": 1, "clean_images": 0} | self.options
        words = [f"scenario.{k}={'null' if v is None else v}" for k, v in options.items()]
        return [*words, "backbone=embedded_resnet"], [(path, -1) for path in shown[:1] + shown[-1:]]

    @property
    def expected(self) -> dict[str, list[int]]:
        of = {d: sorted(files.values()) for d, files in self.files.items() if d != self.source}
        return of | self.labels

    def folders(self) -> dict[str, str]:
        """Where each domain of the stream lies."""
        first = {d: next(iter(files)) for d, files in self.files.items() if d != self.source}
        return {d: str(Path(path).parents[1]) for d, path in first.items()} | self.places


def folders(base: str, domains: dict[str, str], classes: dict[str, int]) -> dict[str, Any]:
    """Domain -> files: one image of the first class, two of the others."""
    return {
        domain: {
            f"{base}{folder}/{name}/{i}.jpg": label
            for n, (name, label) in enumerate(classes.items())
            for i in range(1 + (n > 0))
        }
        for domain, folder in domains.items()
    }


def same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def corrupted(base: str, names: tuple[str, ...], severity: str = "5") -> dict[str, Any]:
    images = {"n01440764/ILSVRC2012_val_00000293": 0, "n15075141/ILSVRC2012_val_00000001": 999}
    return {
        f"{name}:5": {f"{base}/{name}/{severity}/{i}.JPEG": y for i, y in images.items()}
        for name in names
    }


def lists(root: Path) -> None:
    """Lists of DomainNet-126, in another order than that of the folders."""
    for name in ("clipart", "painting", "real", "sketch"):
        lines = [f"{name}/zebra/{i}.jpg 125" for i in (1, 0)] + [f"{name}/aircraft_carrier/0.jpg 0"]
        (root / f"DomainNet/{name}_list.txt").write_text("\n".join(lines) + "\n")


def labels_of_the_test(root: Path) -> None:
    (root / "VISDA-C/test_list.txt").write_text("trunk00/a.jpg 11\ntrunk00/b.jpg 4\n")


def arrays(root: Path) -> None:
    rng = np.random.default_rng(0)
    (root / "CIFAR-10.1").mkdir(parents=True)
    (root / "CIFAR-10.2").mkdir()
    for version, count in (("v6", 3), ("v4", 4)):
        pixels = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.save(root / f"CIFAR-10.1/cifar10.1_{version}_data.npy", pixels)
        np.save(root / f"CIFAR-10.1/cifar10.1_{version}_labels.npy", np.arange(count)[::-1] * 3)
    for part, count in (("test", 3), ("train", 4)):
        np.savez(
            root / f"CIFAR-10.2/cifar102_{part}.npz",
            images=rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
            labels=np.arange(count),
            label_names=np.asarray(["airplane", "automobile"]),
        )


CCC = "baseline_20_transition+speed_1000_seed_43"


def tars(root: Path) -> None:
    """Two archives of two images, whose keys begin anew in each."""
    rng = np.random.default_rng(0)
    folder = root / "CCC" / CCC
    folder.mkdir(parents=True)
    for number, names in enumerate(((7, 3), (999, 0))):
        with tarfile.open(folder / f"serial_{number:05d}.tar", "w") as archive:
            for i, label in enumerate(names):
                image = io.BytesIO()
                pixels = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(image, "JPEG")
                parts = {"info": b"?", "input.jpg": image.getvalue(), "output.cls": b"%d" % label}
                for part, content in parts.items():
                    entry = tarfile.TarInfo(f"sample_{i}.{part}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


SYNSETS = {"n01440764": 0, "n15075141": 999}
ANT, BED = (sorted(imagenet_d.LABELS.values()).index(label) for label in (310, 831))
NET = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
LAYOUTS = {
    "imagenet_r": Layout(
        folders("", {"imagenet_r": "imagenet-r"}, {"n01443537": 0, "n12267677": 199}), 200
    ),
    "imagenet_a": Layout(
        folders("", {"imagenet_a": "imagenet-a"}, {"n01498041": 0, "n12267677": 199}), 200
    ),
    "imagenet_sketch": Layout(folders("", {"imagenet_sketch": "sketch"}, SYNSETS), 1000),
    "imagenet_v2": Layout(
        folders(
            "imagenetv2-",
            {p: f"{p}-format-val" for p in ("matched-frequency", "threshold0.7", "top-images")},
            {"10": 10, "2": 2, "999": 999},
        ),
        1000,
    ),
    "imagenet_d": Layout(  # dog stands for many classes; couch counts as bed
        folders("DomainNet/", same(*NET), {"ant": ANT, "bed": BED, "couch": BED}),
        109,
        more=lambda root: write_images(root, [f"DomainNet/{d}/dog/1.jpg" for d in NET]),
    ),
    "imagenet_c_bar": Layout(
        corrupted("ImageNet-C-bar", imagenet_c_bar.CORRUPTIONS), 1000, size=40
    ),
    "imagenet_3dcc": Layout(
        corrupted(
            "ImageNet-3DCC",
            (
                "near_focus", "far_focus", "fog_3d", "flash", "color_quant", "low_light",
                "xy_motion_blur", "z_motion_blur", "iso_noise", "bit_error", "h265_abr",
                "h265_crf",
            ),
        ),
        1000,
        size=40,
    ),
    "cifar10_1": Layout(
        {}, 10, more=arrays, size=32, options={"domains": None},
        labels={"v6": [0, 3, 6], "v4": [0, 3, 6, 9]},
        places=dict.fromkeys(("v6", "v4"), "CIFAR-10.1"),
    ),
    "cifar10_2": Layout(
        {}, 10, more=arrays, size=32, labels={"test": [0, 1, 2]}, places={"test": "CIFAR-10.2"}
    ),
    "ccc_released": Layout(
        {}, 1000, more=tars, labels={CCC: [0, 3, 7, 999]}, places={CCC: f"CCC/{CCC}"}
    ),
    "domainnet126": Layout(
        folders(
            "DomainNet/",
            same("clipart", "painting", "real", "sketch"),
            {"aircraft_carrier": 0, "zebra": 125},
        ),
        126,
        more=lists,
        source="real",
    ),
    "office_home": Layout(
        folders(
            "OfficeHome/",
            same("Art", "Clipart", "Product") | {"Real_World": "Real World"},
            {"TV": 58, "Table": 59},
        ),
        65,
        source="Real_World",
    ),
    "pacs": Layout(
        folders(
            "PACS/", same("photo", "art_painting", "cartoon", "sketch"), {"dog": 0, "person": 6}
        ),
        7,
        source="photo",
    ),
    "visda_c": Layout(
        folders("VISDA-C/", same("train", "validation"), {"aeroplane": 0, "truck": 11})
        | {"test": {"VISDA-C/test/trunk00/a.jpg": 11, "VISDA-C/test/trunk00/b.jpg": 4}},
        12,
        more=labels_of_the_test,
        options={"domains": None},
        source="train",
    ),
    "vlcs": Layout(
        folders(
            "VLCS/", same("Caltech101", "LabelMe", "SUN09", "VOC2007"), {"bird": 0, "person": 4}
        ),
        5,
        source="Caltech101",
    ),
}  # fmt: skip


# Corruptions that lack a file are refused elsewhere; archives are read as far as they are shown.
WHOLE = {"imagenet_c_bar", "imagenet_3dcc", "ccc_released"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_published_layout_is_read(name, tmp_path):
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = stream(name, tmp_path, **layout.options)
    incomplete = any("classes have no image" in str(w.message) for w in caught)
    assert incomplete == (name not in WHOLE)
    assert labels(made) == layout.expected
    assert made.num_classes == layout.classes
    (batch, *_) = made.segments[0].batches()
    assert batch.x.shape[1:] == (3, layout.size, layout.size)
    record = about(name)
    assert made.facts["label_space"] == record.label_space != ""
    subset = record.subset
    assert made.facts.get("subset") == (subset and {"classes": len(subset), "scores": "masked"})


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_that_is_missing_is_named_in_one_error(name, tmp_path):
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    where = layout.folders()
    gone = list(where)[1:] or list(where)
    for domain in gone:
        shutil.rmtree(tmp_path / where[domain], ignore_errors=True)
    with pytest.raises(UserError) as error:
        stream(name, tmp_path, **layout.options)
    text = str(error.value)
    assert all(domain.replace(":", "/") in text for domain in gone[:6])
    assert "Expected layout: <data.root>" in text and f"get_data.py {name} --to" in text


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_data_stand_ins_have_the_same_domains(name):
    layout = LAYOUTS[name]
    made = stream(name, images=10, **layout.options)
    assert [s.name for s in made.segments] == list(layout.expected)
    assert made.facts["label_space"] == "embedded" and "subset" not in made.facts
    pixels = {next(iter(s.batches())).x.numpy().tobytes() for s in made.segments}
    assert len(pixels) >= min(len(layout.expected), 6)
    assert made.source().description == "embedded training images"


@pytest.mark.parametrize(
    ("name", "published", "other"),
    [
        ("imagenet_r", "imagenet-r", "."),  # data.root is the folder itself
        ("imagenet_sketch", "sketch", "ImageNet-Sketch/sketch"),
        ("imagenet_v2", ".", "imagenet-v2"),
        ("imagenet_d", "DomainNet", "imagenet-d"),
        ("imagenet_c_bar", "ImageNet-C-bar", "ImageNet-C-Bar"),
        ("imagenet_3dcc", "ImageNet-3DCC", "."),
        ("ccc_released", "CCC", "."),
        ("domainnet126", "DomainNet", "domainnet-126"),
        ("office_home", "OfficeHome", "OfficeHomeDataset_10072016"),
        ("office_home", "OfficeHome/Real World", "OfficeHome/RealWorld"),
        ("pacs", "PACS", "PACS/kfold"),
        ("pacs", "PACS", "."),
        ("visda_c", "VISDA-C", "visda-2017"),
        ("vlcs", "VLCS/SUN09", "VLCS/SUN"),
    ],
)
def test_layouts_as_people_have_them(name, published, other, tmp_path):
    layout = LAYOUTS[name]
    data = tmp_path / "data"
    layout.write(data)
    root = data
    if other == ".":
        root = data / published
    else:
        (data / published).rename(tmp_path / "moved")
        (data / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "moved").rename(data / other)
    assert labels(stream(name, root, **layout.options)) == layout.expected


def test_folders_of_the_authors_script_are_severities_too(tmp_path):
    """ImageNet-C-bar made by make_imagenet_c_bar.py: folders are named by a parameter."""
    for name, values in imagenet_c_bar.PARAMETERS.items():
        files = corrupted("ImageNet-C-Bar", (name,), f"{values[2]:.2f}")
        write_images(tmp_path, list(files[f"{name}:5"]))
    assert len(stream("imagenet_c_bar", tmp_path, severity=3).segments) == 10
    with pytest.raises(UserError, match="lacks 10 of 10 corruption folders: blue_noise_sample/4"):
        stream("imagenet_c_bar", tmp_path, severity=4)


# ------------------------------------------------------------------------ class lists


@pytest.mark.parametrize(
    ("names", "count", "digest"),
    [
        (lambda: [wnids()[i] for i in about("imagenet_r").subset], 200, "e19a59d84e3746fa"),
        (lambda: [wnids()[i] for i in about("imagenet_a").subset], 200, "f6aa4b23244554d9"),
        (
            lambda: [f"{k} {wnids()[v]}" for k, v in imagenet_d.LABELS.items()],
            109,
            "9fdb6efe63799fcc",
        ),
        (lambda: domainnet126.CLASSES, 126, "8a44e7881ca12ba8"),
        (lambda: office_home.CLASSES, 65, "00976e599f5dd6d4"),
    ],
)
def test_class_lists_are_the_published_ones(names, count, digest):
    """SHA-256 of the names, a line each, as recorded from the official files."""
    listed = list(names())
    assert len(set(listed)) == count
    assert hashlib.sha256("\n".join(listed).encode()).hexdigest()[:16] == digest


# ------------------------------------------------------------------------ sources


def test_a_network_of_one_domain_prepares_on_that_domain(tmp_path):
    LAYOUTS["pacs"].write(tmp_path)
    assert stream("pacs", tmp_path).domains == ["art_painting", "cartoon", "sketch"]
    assert stream("pacs", tmp_path).source().images == 3  # photos
    other = stream("pacs", tmp_path, source="sketch")
    assert other.domains == ["photo", "art_painting", "cartoon"]
    every = stream("pacs", tmp_path, source=None)
    assert len(every.domains) == 4
    with pytest.raises(UserError, match="scenario.source=null: name the domain"):
        every.source()
    folder = tmp_path / "PACS" / "photo"  # class folders somewhere else
    assert stream("pacs", tmp_path, source_from=str(folder)).source().images == 3
    shown = stream("pacs", tmp_path, domains=["photo"])
    with pytest.raises(UserError, match="3 of 3 source images are images that the run is judged"):
        shown.source()
    with pytest.raises(UserError, match="'foto' is no domain of PACS; did you mean 'photo'"):
        stream("pacs", tmp_path, source="foto")


def test_other_classes_are_named(tmp_path):
    LAYOUTS["pacs"].write(tmp_path)
    write_images(tmp_path, ["PACS/cartoon/elefant/1.jpg"])
    with pytest.raises(UserError, match="no classes of PACS: elefant; did you mean 'elephant'"):
        stream("pacs", tmp_path)
    (tmp_path / "DomainNet").mkdir()
    LAYOUTS["domainnet126"].write(tmp_path)
    (tmp_path / "DomainNet/sketch_list.txt").write_text("sketch/zebra/0.jpg 126\n")
    with pytest.raises(UserError, match="sketch_list.txt, line 1: .* label from 0 to 125"):
        stream("domainnet126", tmp_path)


@pytest.mark.parametrize("beside", [True, False])
def test_clean_images_are_those_beside_the_set_and_never_the_set(beside, tmp_path):
    LAYOUTS["imagenet_r"].write(tmp_path)
    files = [f"val/{w}/ILSVRC2012_val_0000000{i}.JPEG" for i, w in enumerate(wnids()[:3])]
    write_images(tmp_path, files, size=40)
    root = tmp_path if beside else tmp_path / "imagenet-r"
    made = stream("imagenet_r", root, clean_images=9)
    assert (made.holdout is not None) == beside
    if made.holdout is not None:
        assert sorted(y for b in made.holdout() for y in b.y.tolist()) == [0, 1]
    assert made.facts["clean"] == ("evaluation images of the source" if beside else "none")


# ------------------------------------------------------------------------ archives of CCC


def test_archives_are_read_in_their_order_and_no_further_than_wanted(tmp_path):
    tars(tmp_path)
    made = stream("ccc_released", tmp_path)
    assert [y for b in made.segments[0].batches() for y in b.y.tolist()] == [7, 3, 999, 0]
    folder = tmp_path / "CCC" / CCC
    (folder / "serial_00001.tar").write_bytes(b"no archive")
    two = stream("ccc_released", tmp_path, images=2, probe_images=0)
    assert [y for b in two.segments[0].batches() for y in b.y.tolist()] == [7, 3]
    assert two.facts["fingerprint"] != made.facts["fingerprint"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "serial_00000.tar").unlink(), "lacks serial_00000.tar; archives have"),
        (lambda f: _cut(f / "serial_00001.tar"), "serial_00001.tar is damaged"),
        (lambda f: (f / "serial_00000.tar").write_bytes(b""), "serial_00000.tar is damaged"),
    ],
)
def test_archives_that_are_missing_or_damaged_are_named(change, message, tmp_path):
    tars(tmp_path)
    change(tmp_path / "CCC" / CCC)
    with pytest.raises(UserError, match=message):
        stream("ccc_released", tmp_path)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:30_000])


def test_arrays_of_another_kind_are_refused(tmp_path):
    arrays(tmp_path)
    np.save(tmp_path / "CIFAR-10.1/cifar10.1_v6_labels.npy", np.arange(7))
    with pytest.raises(UserError, match=r"expected images uint8 .* with 7 labels"):
        stream("cifar10_1", tmp_path)
    np.savez(tmp_path / "CIFAR-10.2/cifar102_test.npz", pixels=np.zeros(3))
    with pytest.raises(UserError, match="cannot read .*cifar102_test.npz.*copy it here again"):
        stream("cifar10_2", tmp_path)


# ------------------------------------------------------------------------ the page


def test_the_page_says_what_each_set_was_tried_on():
    page = (ROOT / "docs" / "scenarios.md").read_text()
    part = page.partition("## Data sets of test-time adaptation")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*`) \|(?:[^|]*\|){2} ([^|]*) \|$", part, re.MULTILINE)
    tried = {name: text for names, text in rows for name in re.findall(r"`(\w+)`", names)}
    scenarios = {p.stem: node(p.stem) for p in (ROOT / "conf" / "scenario").glob("*.yaml")}
    streams = ("shifts.corruption_stream", "pairs.pair_stream")
    shifts = {n for n, s in scenarios.items() if s.get("_target_", "").endswith(streams)}
    assert tried.keys() == shifts
    assert {name for name, text in tried.items() if "made by tests" in text} >= LAYOUTS.keys()
    real = {name for name, text in tried.items() if text.startswith("real images")}
    used = re.findall(r"scenario=(\w+)", (ROOT / "tests" / "test_realdata.py").read_text())
    assert real == shifts.intersection(used)
