"""A data set counts by what its files hold, wherever they lie and whatever they are called."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from PIL import Image
from split_layouts import LAYOUTS, published_files  # noqa: F401
from test_shift_sets import LAYOUTS as SHIFTS
from test_streams import make

from driftline.core.files import read_record
from driftline.runs.execute import run_experiment
from driftline.streams import content
from driftline.streams.corruption_ops.frost import FROST_FILES
from driftline.streams.images import Files, NpyRows, image_folder
from driftline.streams.store import ImageStore

WNIDS = ("n01440764", "n01443537")


@pytest.fixture
def settled(monkeypatch):
    """Digests of files that were written a moment ago are kept too."""
    monkeypatch.setattr(content, "SETTLED", -(10**9))


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The files whose bytes were read for a digest."""
    found: list[str] = []
    real = content._sampled

    def sampled(path: str) -> bytes:
        found.append(path)
        return real(path)

    monkeypatch.setattr(content, "_sampled", sampled)
    return found


def flip(path: Path, place: int) -> None:
    """Change one bit; size and modification time stay."""
    stat = path.stat()
    whole = bytearray(path.read_bytes())
    whole[place] ^= 1
    path.write_bytes(whole)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    while path.stat().st_ctime_ns == stat.st_ctime_ns:  # the clock of files is a coarse one
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# ------------------------------------------------------------------------ every scenario

Built = tuple[list[str], list[tuple[Path, int]]]  # words of the command, bytes that count


def build_imagenet_c(root: Path) -> Built:
    names = [f"ImageNet-C/fog/5/{w}/{i}.JPEG" for w in WNIDS for i in range(3)]
    write_images(root, names, 32)
    words = ["scenario.corruptions=[fog]", "scenario.image_list=all", "scenario.probe_images=2"]
    return words, [(root / name, -1) for name in names]


def build_on_the_fly(root: Path) -> Built:
    names = [f"val/{w}/{i}.png" for w in WNIDS for i in range(3)]
    write_images(root, names, 32)
    words = ["scenario.corrupt=on_the_fly", "scenario.corruptions=[fog]"]
    words += ["scenario.image_list=all", "scenario.images=4", "scenario.probe_images=2"]
    return words, [(root / name, -1) for name in names]


def build_cifar_c(root: Path, classes: int = 10) -> Built:
    folder = root / f"CIFAR-{classes}-C"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    np.save(folder / "fog.npy", rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(10), 5))
    words = ["scenario.corruptions=[fog]", "scenario.probe_images=2", "scenario.severity=3"]
    return words, [(folder / "fog.npy", 128 + 3072 * 25), (folder / "labels.npy", 128 + 8 * 25)]


def build_cifar(root: Path, classes: int = 10) -> Built:
    rng = np.random.default_rng(0)
    if classes == 10:
        folder = root / "cifar-10-batches-py"
        files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
        meta, labels = ("batches.meta", "label_names"), "labels"
    else:
        folder = root / "cifar-100-python"
        files, meta, labels = ["train", "test"], ("meta", "fine_label_names"), "fine_labels"
    folder.mkdir(parents=True)
    for name in files:
        data = rng.integers(0, 256, (classes, 3072), dtype=np.uint8)
        with open(folder / name, "wb") as file:
            pickle.dump({"data": data, labels: list(range(classes))}, file)
    with open(folder / meta[0], "wb") as file:
        pickle.dump({meta[1]: [str(i) for i in range(classes)]}, file)
    return [], [(folder / name, 3072 * classes // 2) for name in files]


def build_folders(root: Path, *domains: str) -> Built:
    names = [
        f"{domain}/{split}/class{c}/{i}.png"
        for domain in domains or (".",)
        for split in ("train", "test")
        for c in range(2)
        for i in range(2)
    ]
    write_images(root, names, 32)
    words = [] if domains else ["scenario.increment=1"]
    return [*words, "scenario.pipeline=plain"], [(root / name, -1) for name in names]


def build_ccc(root: Path) -> Built:
    names = [f"val/{w}/{i}.png" for w in WNIDS for i in range(2)]
    write_images(root, names, 64)
    side = np.linspace(90, 10, 6)
    grid = {"accuracy": {f"n1_{a}_n2_{b}": np.minimum.outer(side, side).tolist()
                         for a, b in (("fog", "contrast"), ("contrast", "fog"))}}  # fmt: skip
    path = root.parent / "grid.json"
    path.write_text(json.dumps(grid))
    words = [f"scenario.calibration={path}", "scenario.corruptions=[fog,contrast]"]
    words += ["scenario.images=16", "scenario.speed=4"]
    return words, [(root / name, -1) for name in names]


def build_shift(root: Path) -> Built:
    names = [f"test/{c}/{i}.png" for c in "ab" for i in range(2)]
    write_images(root, names)
    words = ["scenario.side=null", "scenario.probe_images=1", "scenario.clean_images=0"]
    places = [(root / names[0], -1), (root / names[-1], -1)]
    return [*words, "backbone=embedded_resnet"], places


CASES: dict[str, tuple[str, Callable[[Path], Built]]] = {
    "imagenet_c": ("imagenet_c", build_imagenet_c),
    "imagenet_c, on the fly": ("imagenet_c", build_on_the_fly),
    "cifar10_c": ("cifar10_c", build_cifar_c),
    "cifar100_c": ("cifar100_c", lambda root: build_cifar_c(root, 100)),
    "split_cifar": ("split_cifar", lambda root: build_cifar(root, 100)),
    "split_cifar10": ("split_cifar10", build_cifar),
    "split_cifar100": ("split_cifar100", lambda root: build_cifar(root, 100)),
    "split_imagefolder": ("split_imagefolder", build_folders),
    "domains_imagefolder": ("domains_imagefolder", lambda root: build_folders(root, "a", "b")),
    "ccc": ("ccc", build_ccc),
    "folders": ("folders", build_shift),
}
NAMED = {name: (layout.scenario, layout.built) for name, layout in LAYOUTS.items()}
NAMED |= {f"{name}, shift": (name, layout.built) for name, layout in SHIFTS.items()}


@pytest.fixture
def any_cifar(monkeypatch):
    """The published MD5 sums are not those of our files."""
    monkeypatch.setattr("driftline.streams.data.cifar10.intact", lambda *a: True)


def test_every_scenario_is_among_the_cases():
    known = {p.stem for p in (ROOT / "conf" / "scenario").glob("*.yaml")}
    assert {scenario for scenario, _ in (CASES | NAMED).values()} == known


@pytest.mark.slow
@pytest.mark.one_in(8)
@pytest.mark.parametrize("case", CASES | NAMED)
@pytest.mark.filterwarnings("ignore:.*are published")
@pytest.mark.usefixtures("published_files")
def test_a_copy_is_the_same_data_set_and_a_changed_bit_makes_another(
    configure, tmp_path, settled, case
):
    scenario, build = (CASES | NAMED)[case]
    words, places = build(tmp_path / "one")
    composed = configure(f"scenario={scenario}", *words)

    def fingerprint(root: str) -> object:
        cfg = deepcopy(composed)
        cfg.data.root = str(tmp_path / root)
        return make(cfg).facts["fingerprint"]

    first = fingerprint("one")
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    assert fingerprint("one") == fingerprint("two") == first
    seen = {first}
    for path, place in places:  # digests are kept by now: each must be noticed to be stale
        flip(path, place)
        seen.add(fingerprint("one"))
    assert len(seen) == 1 + len(places)
    assert fingerprint("two") == first
    for path, place in places:
        flip(path, place)
    assert fingerprint("one") == first


def test_the_names_and_labels_of_images_count(tmp_path):
    write_images(tmp_path, ["a/0.png", "a/1.png", "b/0.png"])
    base = image_folder(tmp_path, "").content()
    (tmp_path / "a" / "1.png").rename(tmp_path / "b" / "1.png")
    moved = image_folder(tmp_path, "").content()
    (tmp_path / "b" / "1.png").rename(tmp_path / "b" / "2.png")
    assert len({base, moved, image_folder(tmp_path, "").content()}) == 3


def test_images_that_a_stream_does_not_use_are_not_read(tmp_path, reads):
    names = [f"{i}.png" for i in range(6)]
    write_images(tmp_path, names)
    images = Files(tmp_path, names, np.zeros(6), ["a"])
    one = images.content(np.asarray([4, 1]))
    assert sorted(os.path.basename(p) for p in reads) == ["1.png", "4.png"]
    flip(tmp_path / "0.png", -1)
    assert Files(tmp_path, names, np.zeros(6), ["a"]).content(np.asarray([4, 1])) == one
    assert images.content(np.asarray([1, 4])) != one


def test_missing_images_are_left_to_the_reader(tmp_path):
    write_images(tmp_path, ["0.png"])
    images = Files(tmp_path, ["0.png", "1.png"], np.zeros(2), ["a"])
    assert images.content() != Files(tmp_path, ["0.png"], np.zeros(1), ["a"]).content()


# ------------------------------------------------------------------------ what a digest covers


@pytest.mark.parametrize("kind", ["png", "bmp", "ppm"])
def test_one_pixel_anywhere_makes_another_digest_although_names_and_sizes_agree(tmp_path, kind):
    """200 x 200 px are more than what is read whole, in every format that could hide a pixel."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)
    path = tmp_path / f"x.{kind}"
    seen = set()
    for at in (None, 0, 61, 99, 160, 199):
        other = pixels.copy()
        if at is not None:
            other[at, 199 - at] ^= 1
        Image.fromarray(other).save(path, **({"compress_level": 0} if kind == "png" else {}))
        assert path.stat().st_size > content.WHOLE
        seen.add((path.stat().st_size, content._sampled(str(path))))
    assert len(seen) == 6 and len({size for size, _ in seen}) == 1


@pytest.mark.parametrize("size", [0, 1, content.WHOLE, content.WHOLE + 1, 3 * content.WHOLE])
def test_head_middle_and_tail_of_large_files_count_and_all_of_small_ones(tmp_path, size):
    path = tmp_path / "x.jpg"
    path.write_bytes(bytes(size))
    base = content._sampled(str(path))
    places = {0, size // 2, size - 1} if size else set()
    if size <= content.WHOLE:
        places |= set(range(0, size, 7777))
    for place in places:
        flip(path, place)
        assert content._sampled(str(path)) != base
        flip(path, place)
    path.write_bytes(bytes(size + 1))
    assert content._sampled(str(path)) != base


def test_rows_of_an_array_count_with_all_their_bytes(tmp_path, settled):
    rows = np.arange(40, dtype=np.uint8).reshape(10, 2, 2)
    np.save(tmp_path / "x.npy", rows)
    blocks = [NpyRows(tmp_path / "x.npy", s, np.zeros(5), ["a"]) for s in (0, 5)]
    before = [b.content() for b in blocks]
    rows[7, 1, 0] += 1
    np.save(tmp_path / "x.npy", rows)
    after = [NpyRows(tmp_path / "x.npy", s, np.zeros(5), ["a"]).content() for s in (0, 5)]
    assert before[0] == after[0] and before[1] != after[1] and before[0] != before[1]


# ------------------------------------------------------------------------ digests that are kept


def write_again(path: Path) -> None:
    flip(path, -1)


def replace_by_another(path: Path) -> None:
    stat = path.stat()
    other = path.with_name("other")
    shutil.copyfile(path, other)
    flip(other, -1)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(other, path)


def link_elsewhere(path: Path) -> None:
    replace_by_another(path)
    target = path.rename(path.with_name("target"))
    path.symlink_to(target)


@pytest.mark.parametrize("change", [write_again, replace_by_another, link_elsewhere])
def test_a_changed_file_is_read_again_and_no_other(tmp_path, settled, reads, change):
    names = [f"{i}.png" for i in range(5)]
    write_images(tmp_path, names)
    first = content.file_digests(tmp_path, names)
    assert len(reads) == 5
    assert np.array_equal(content.file_digests(tmp_path, names), first) and len(reads) == 5
    change(tmp_path / "3.png")
    second = content.file_digests(tmp_path, names)
    assert reads[5:] == [str(tmp_path / "3.png")]
    assert (second != first).any(1).tolist() == [False, False, False, True, False]
    assert np.array_equal(content.file_digests(tmp_path, names), second) and len(reads) == 6


def test_times_and_folders_are_no_part_of_a_digest(tmp_path, settled):
    write_images(tmp_path / "a", ["0.png"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "0.png", (1, 1))
    one, two = (content.file_digests(tmp_path / d, ["0.png"]) for d in "ab")
    assert np.array_equal(one, two)


@pytest.mark.parametrize(("age", "reads_in_all"), [(1.9, 2), (2.1, 1)])
def test_a_file_that_changed_just_now_is_not_trusted(
    tmp_path, monkeypatch, reads, age, reads_in_all
):
    """It could change again within the same step of the file system's clock."""
    write_images(tmp_path, ["0.png"])
    now = (tmp_path / "0.png").stat().st_ctime_ns + int(age * 1e9)
    monkeypatch.setattr(content.time, "time_ns", lambda: now)
    for _ in range(2):
        content.file_digests(tmp_path, ["0.png"])
    assert len(reads) == reads_in_all


def test_a_damaged_or_unwritable_cache_changes_no_digest(
    tmp_path, settled, own_cache, reads, monkeypatch
):
    names = ["0.png", "1.png"]
    write_images(tmp_path, names)
    want = content.file_digests(tmp_path, names)
    (path,) = own_cache.glob("digests/*")
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        before = len(reads)
        assert np.array_equal(content.file_digests(tmp_path, names), want), place
        assert len(reads) == before + 2, f"a flip of byte {place} was not noticed"
    for junk in (b"", whole[:100], b"junk" * 100):
        path.write_bytes(junk)
        assert np.array_equal(content.file_digests(tmp_path, names), want)
    blocked = tmp_path / "a file"
    blocked.write_text("")
    monkeypatch.setenv("DRIFTLINE_CACHE", str(blocked / "below"))
    assert np.array_equal(content.file_digests(tmp_path, names), want)


def test_the_digests_of_another_folder_are_not_taken(tmp_path, settled, own_cache):
    """A cache file under the name of another one's: the key inside says whose it is."""
    for folder, seed in (("a", 0), ("b", 1)):
        write_images(tmp_path / folder, ["0.png"], seed=seed)
        content.file_digests(tmp_path / folder, ["0.png"])
    first, second = (content.Kept.place(tmp_path / d)[0] for d in "ab")
    shutil.copyfile(first, second)
    assert content.Kept.load(tmp_path / "b").names == []


def test_where_digests_are_kept_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("DRIFTLINE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert content.cache_folder() == tmp_path / "driftline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert content.cache_folder() == tmp_path / ".cache" / "driftline"
    monkeypatch.setenv("DRIFTLINE_CACHE", "~/own")
    assert content.cache_folder() == tmp_path / "own"


def test_partly_known_folders_are_completed(tmp_path, settled, reads):
    names = [f"{i}.png" for i in range(4)]
    write_images(tmp_path, names)
    content.file_digests(tmp_path, names[:2])
    content.file_digests(tmp_path, names[1:])
    content.file_digests(tmp_path, names)
    assert sorted(map(os.path.basename, reads)) == names


# ------------------------------------------------------------------------ what is keyed by content


def twins(tmp_path: Path, build: Callable[[Path], Built]) -> list[str]:
    """Two data sets, `one` and `two`, with the same names and other pictures; the words."""
    words, _ = build(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    rng = np.random.default_rng(1)
    for path in (tmp_path / "two").rglob("*.png"):
        pixels = np.asarray(Image.open(path))
        Image.fromarray(rng.integers(0, 256, pixels.shape, dtype=np.uint8)).save(path)
    return words


def delivered(stream) -> torch.Tensor:
    return torch.cat([b.x for s in stream.segments for b in s.batches()])


def test_the_second_data_set_does_not_get_the_first_ones_result(configure, tmp_path):
    words = twins(tmp_path, build_folders)
    words += ["scenario=split_imagefolder", "strategy=simplecil", "backbone=embedded_vit"]
    one, two = (run_experiment(configure(*words, f"data.root={tmp_path / d}"), [])
                for d in ("one", "two"))  # fmt: skip
    assert one["run"]["folder"] != two["run"]["folder"]
    again = run_experiment(configure(*words, f"data.root={tmp_path / 'one'}"), [])
    assert again == read_record(Path(one["run"]["folder"]) / "summary.json")


def test_images_in_the_cache_are_those_of_their_data_set(configure, tmp_path):
    words = ["scenario=imagenet_c", *twins(tmp_path, build_on_the_fly)]
    cached = [*words, f"data.cache={tmp_path / 'cache'}"]
    for root in ("one", "two"):
        want = delivered(make(configure(*words, f"data.root={tmp_path / root}")))
        for _ in range(2):  # filled, then read
            found = delivered(make(configure(*cached, f"data.root={tmp_path / root}")))
            assert torch.equal(found, want)


def test_a_damaged_image_in_the_cache_is_made_again(configure, tmp_path):
    words, _ = build_on_the_fly(tmp_path / "one")
    words += ["scenario=imagenet_c", f"data.root={tmp_path / 'one'}"]
    words += [f"data.cache={tmp_path / 'cache'}"]
    want = delivered(make(configure(*words)))
    files = sorted(p for p in (tmp_path / "cache").rglob("*") if p.is_file())
    flip(files[0], -5000)
    shutil.copyfile(files[1], files[2])  # another row's
    assert torch.equal(delivered(make(configure(*words))), want)
    assert torch.equal(delivered(make(configure(*words))), want)


def test_source_images_count_by_content(configure, tmp_path):
    words = ["scenario=imagenet_c", *twins(tmp_path, build_on_the_fly)]
    found = set()
    for root in ("one", "two"):
        shutil.copytree(tmp_path / root / "val", tmp_path / root / "train")
        for choice in ("train", "held_out", str(tmp_path / root / "train")):
            more = [f"data.root={tmp_path / root}", f"scenario.source_from={choice}"]
            if choice == "held_out":
                more.append("scenario.images=2")
            found.add(make(configure(*words, *more)).source().fingerprint)
    assert len(found) == 4  # train and the folder by name are one set


def test_a_store_serves_each_data_set_its_own_images(configure, tmp_path):
    words = ["scenario=imagenet_c", *twins(tmp_path, build_on_the_fly)]
    store = ImageStore("cpu", 100)
    for _ in range(2):
        for root in ("one", "two"):
            cfg = configure(*words, f"data.root={tmp_path / root}")
            shared, own = (make(cfg, store=s) for s in (store, ImageStore()))
            for images in (lambda s: s.holdout(), lambda s: s.probes[0]()):
                found, want = (torch.cat([b.x for b in images(s)]) for s in (shared, own))
                assert torch.equal(found, want)
    words = ["scenario=split_imagefolder", *twins(tmp_path / "more", build_folders)]
    for root in ("one", "two"):
        cfg = configure(*words, f"data.root={tmp_path / 'more' / root}")
        for size in (32, 24):
            shared, own = (make(cfg, size, store=s) for s in (store, ImageStore()))
            for images in (lambda s: s.tasks[0].test(), lambda s: s.tasks[0].train(1)):
                found, want = (torch.cat([b.x for b in images(s)]) for s in (shared, own))
                assert torch.equal(found, want)


def test_the_manifest_of_generated_images_counts_as_far_as_they_are_used(configure, tmp_path):
    words, _ = build_cifar_c(tmp_path / "one")
    words += ["scenario=cifar10_c", f"data.root={tmp_path / 'one'}"]

    def fingerprint(manifest: dict | None) -> object:
        if manifest is not None:
            path = tmp_path / "one" / "CIFAR-10-C" / "manifest.json"
            path.write_text(json.dumps(manifest))
        return make(configure(*words)).facts["fingerprint"]

    base = {"settings": {"seed": 0, "source": "a"}, "sha256": {"fog/3": "x", "fog/4": "y"}}
    seen = [fingerprint(None), fingerprint(base)]
    for settings in ({"seed": 1, "source": "a"}, {"seed": 0, "source": "b"}):
        seen.append(fingerprint({**base, "settings": settings}))
    seen.append(fingerprint({**base, "sha256": {"fog/3": "z", "fog/4": "y"}}))
    assert len(set(seen)) == len(seen)
    more = {"fog/4": "z", "snow/3": "w", "fog/3": "x"}  # others were made since, or again
    assert fingerprint({**base, "sha256": more}) == seen[1]


def test_frost_photographs_count_by_content(configure, tmp_path, settled):
    words, _ = build_on_the_fly(tmp_path / "one")
    words += [
        "scenario=imagenet_c",
        f"data.root={tmp_path / 'one'}",
        "scenario.corruptions=[frost]",
    ]
    write_images(tmp_path / "a", list(FROST_FILES), 400)
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def stream(folder: str):
        return make(configure(*words, f"scenario.frost_dir={tmp_path / folder}"))

    first, second = stream("a"), stream("b")
    assert first.facts["fingerprint"] == second.facts["fingerprint"]
    before = delivered(first)
    assert torch.equal(before, delivered(second))
    write_images(tmp_path / "b", list(FROST_FILES), 400, seed=1)
    other = stream("b")
    assert other.facts["fingerprint"] != first.facts["fingerprint"]
    assert not torch.equal(before, delivered(other))
