"""Files as people have them: read as they were meant, or one line that says what to do."""

from __future__ import annotations

import pickle
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from test_streams import make

from driftline.backbones.load import label_space
from driftline.core.errors import UserError
from driftline.core.stream import Skipped
from driftline.runs import compose
from driftline.runs.execute import run_experiment
from driftline.streams.corrupted import corrupted
from driftline.streams.data.cifar10_c import cifar_c
from driftline.streams.data.imagenet import imagenet_clean, wnids
from driftline.streams.data.imagenet_c import imagenet_c
from driftline.streams.images import (
    Derived,
    Files,
    ImageError,
    corruption_arrays,
    image_folder,
    open_rgb,
)
from driftline.streams.listings import find_listed, read_labels, read_list
from driftline.streams.loading import Reader, Rows, as_stored, remember

# ------------------------------------------------------------------------ folders


def folder(root: Path, *names: str) -> Path:
    """A folder with small images, or with other files where a name has another suffix."""
    write_images(root, [n for n in names if n.endswith((".png", ".JPEG", ".tif"))], size=4)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if not (root / name).exists():
            (root / name).write_bytes(b"?")
    return root


@pytest.mark.parametrize(
    "stray",
    [
        ".ipynb_checkpoints/a.png",
        "__MACOSX/a/b.png",
        "@eaDir/a.png",
        "lost+found/a.png",
        "cat/._0.png",
        "cat/.DS_Store",
        "cat/Thumbs.db",
        ".hidden.png",
    ],
)
def test_what_systems_leave_beside_images_is_no_class_and_no_image(tmp_path, stray):
    folder(tmp_path, "cat/0.png", "dog/0.png", "dog/1.png", stray)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        files = image_folder(tmp_path, "")
    assert files.class_names == ["cat", "dog"]
    assert list(files.names) == ["cat/0.png", "dog/0.png", "dog/1.png"]
    assert files.labels.tolist() == [0, 1, 1]


def test_files_that_are_not_read_are_counted_and_so_are_classes_without_images(tmp_path):
    folder(tmp_path, "a/0.png", "a/1.tif", "a/2.TIF", "a/x.heic", "a/README", "b/0.gif", "c/0.PNG")
    (tmp_path / "d").mkdir()
    with pytest.warns(UserWarning) as caught:
        files = image_folder(tmp_path, "")
    said = [str(w.message) for w in caught]
    assert list(files.names) == ["a/0.png", "c/0.PNG"] and files.labels.tolist() == [0, 2]
    assert "5 entries" in said[0] and ".tif (2)" in said[0] and ".heic (1)" in said[0]
    assert "without an extension (1)" in said[0] and ".webp" in said[0]
    assert "2 of 4 classes have no images: b, d" in said[1]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a/0.tif"], r"class folders hold \.tif \(1\)\. Images end with \.jpg"),
        (["0.png", "1.png"], "it holds 2 images, but no folders"),
        (["a.tar", "b.zip"], r"holds a\.tar, b\.zip, not unpacked: cd .* && tar -xf a\.tar"),
        (["n1.zip"], r"unzip n1\.zip"),
        (["a/x/0.png", "a/y/0.png"], r"hold folders \(2\)"),
    ],
)
def test_a_folder_without_images_says_what_is_in_it(tmp_path, names, said):
    with pytest.raises(UserError, match=said):
        image_folder(folder(tmp_path, *names), "EXPECTED")


def test_an_archive_that_lies_where_its_folder_is_expected_is_named(tmp_path):
    folder(tmp_path, "train.tar.gz")
    with pytest.raises(UserError, match=r"does not exist.*tar -xf train\.tar\.gz.*EXPECTED"):
        image_folder(tmp_path / "train", "EXPECTED")


@pytest.mark.parametrize("deeper", ["train/{}/{}.png", "{}/images/{}.png", "{}/{}/{}.png"])
def test_a_folder_within_a_folder_is_read(tmp_path, deeper):
    """An archive unpacked into a folder of its name; Tiny ImageNet's `images` folders."""
    names = [deeper.format(*[c] * (deeper.count("{}") - 1), i) for c in "ab" for i in (0, 1)]
    files = image_folder(folder(tmp_path / "train", *names), "")
    assert files.class_names == ["a", "b"] and files.labels.tolist() == [0, 0, 1, 1]
    files.image(3)


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["10", "2", "0", "1"], ["0", "1", "2", "10"]),
        (["010", "002"], ["002", "010"]),
        (["10", "2", "x"], ["10", "2", "x"]),
    ],
)
def test_class_folders_by_index_are_in_the_order_of_numbers(tmp_path, names, order):
    files = image_folder(folder(tmp_path, *(f"{n}/0.png" for n in names)), "")
    assert files.class_names == order and list(files.names) == [f"{n}/0.png" for n in order]


# ------------------------------------------------------------------------ images

LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, -1)


def quantised() -> Image.Image:
    return Image.fromarray(COLOUR).quantize(16)


FORMS = {
    "16-bit png": (lambda p: Image.fromarray(LEVELS * np.uint16(257)).save(p, "PNG"), rgb(LEVELS)),
    "16-bit pgm": (
        lambda p: p.write_bytes(
            b"P5 16 16 65535\n" + (LEVELS * np.uint16(256)).byteswap().tobytes()
        ),
        rgb(LEVELS),
    ),
    "16-bit tiff": (
        lambda p: Image.fromarray(LEVELS * np.uint16(257)).save(p, "TIFF"),
        rgb(LEVELS),
    ),
    "32-bit tiff": (
        lambda p: Image.fromarray(LEVELS.astype(np.int32) * 257).save(p, "TIFF"),
        rgb(LEVELS),
    ),
    "float to 1": (
        lambda p: Image.fromarray((LEVELS / 255).astype(np.float32)).save(p, "TIFF"),
        rgb(LEVELS),
    ),
    "float to 255": (
        lambda p: Image.fromarray(LEVELS.astype(np.float32)).save(p, "TIFF"),
        rgb(LEVELS),
    ),
    "palette": (lambda p: quantised().save(p, "PNG"), np.asarray(quantised().convert("RGB"))),
    "palette with alpha": (
        lambda p: quantised().save(p, "PNG", transparency=bytes([0, 99, *[255] * 14])),
        np.asarray(quantised().convert("RGB")),
    ),
    "grey with alpha": (
        lambda p: Image.fromarray(np.stack([LEVELS, 255 - LEVELS], -1)).save(p, "PNG"),
        rgb(LEVELS),
    ),
    "one bit": (
        lambda p: Image.fromarray(LEVELS > 99).save(p, "PNG"),
        rgb(np.uint8(255) * (LEVELS > 99)),
    ),
    "32-bit bmp": (
        lambda p: Image.fromarray(np.dstack([COLOUR, LEVELS])).save(p, "BMP"),
        COLOUR,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_images_of_any_depth_and_palette_keep_their_values(tmp_path, form):
    write, want = FORMS[form]
    write(tmp_path / "image")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_rgb(tmp_path / "image")
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), want)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda p: Image.fromarray(LEVELS.astype(np.int32) << 20).save(p, "TIFF"), "8 or 16 bits"),
        (lambda p: Image.fromarray(LEVELS.astype(np.float32) - 9).save(p, "TIFF"), "from -9 to"),
        (lambda p: Image.fromarray(np.float32([[np.nan, 1]])).save(p, "TIFF"), "from nan to"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda p: p.write_bytes(b"<!DOCTYPE html><html>"), "a web page"),
        (lambda p: None, "No such file"),
    ],
)
def test_what_cannot_be_an_image_is_said(tmp_path, write, said):
    write(tmp_path / "image.png")
    with pytest.raises(ImageError, match=f"image\\.png: .*{said}"):
        open_rgb(tmp_path / "image.png")


def test_a_missing_file_is_noticed_before_anything_is_read(tmp_path):
    names = [f"{i}.png" for i in range(4)]
    write_images(tmp_path, names, size=4)
    (tmp_path / "2.png").unlink()
    files = Files(tmp_path, names, np.zeros(4), ["a"])
    sets = [files, Derived(files, lambda image, row: image, "same")]
    row = np.asarray([1, 2])
    with pytest.raises(UserError, match=r"are missing.*: 1 \(first: .*2\.png.*data\.on_error=skip"):
        Reader(sets, Skipped()).contents([row, None])
    kept = Reader(sets, Skipped(), on_error="skip").contents([row, None])
    assert kept == [files.content(row), sets[1].content()]
    other = np.asarray([0, 3])  # nobody asks for the missing one
    assert Reader([files], Skipped()).contents([other]) == [files.content(other)]


# ------------------------------------------------------------------------ arrays of CIFAR-C


@pytest.fixture
def arrays(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "fog.npy", rng.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8))
    np.save(tmp_path / "labels.npy", np.tile(rng.permutation(10), 5).astype(np.uint8))
    return tmp_path


ARRAYS = {
    "0 to 1": ("fog", lambda a: (a / 255).astype(np.float32)),
    "0 to 255": ("fog", lambda a: a.astype(np.float64)),
    "integers": ("fog", lambda a: a.astype(np.int64)),
    "channels first": ("fog", lambda a: a.transpose(0, 3, 1, 2)),
    "tensors": ("fog", lambda a: (a / 255).astype(np.float16).transpose(0, 3, 1, 2)),
    "labels of one severity": ("labels", lambda a: a[:10]),
    "labels as floats": ("labels", lambda a: a.astype(np.float32)),
    "labels in a column": ("labels", lambda a: a[:, None]),
}


@pytest.mark.parametrize("form", ARRAYS)
def test_arrays_of_other_types_and_shapes_are_the_same_images(arrays, form):
    want = corruption_arrays(arrays, ["fog"], [3], 10)["fog", 3]
    pixels = np.stack([np.asarray(want.image(i)) for i in range(10)])
    assert np.array_equal(pixels, np.load(arrays / "fog.npy")[20:30])
    file, change = ARRAYS[form]
    path = arrays / f"{file}.npy"
    np.save(path, change(np.load(path)))
    images = corruption_arrays(arrays, ["fog"], [3], 10)["fog", 3]
    assert np.array_equal(np.stack([np.asarray(images.image(i)) for i in range(10)]), pixels)
    assert np.array_equal(images.labels, want.labels)


@pytest.mark.parametrize("labels", ["once", "five times"])
def test_arrays_of_one_severity_are_the_one_that_is_asked_for(arrays, labels):
    pixels, five = np.load(arrays / "fog.npy"), np.load(arrays / "labels.npy")
    np.save(arrays / "fog.npy", pixels[20:30])
    if labels == "once":
        np.save(arrays / "labels.npy", five[:10])
    with pytest.warns(UserWarning, match=r"fog\.npy holds one severity.*scenario\.severity=3"):
        images = corruption_arrays(arrays, ["fog"], [3], 10)["fog", 3]
    assert np.array_equal(np.asarray(images.image(9)), pixels[29])
    assert np.array_equal(images.labels, five[:10])
    with pytest.raises(UserError, match=r"one severity \(10 images\).*asks for 2"):
        corruption_arrays(arrays, ["fog"], [3, 5], 10)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("fog", lambda a: a[:40], r"fog\.npy holds 40 images, but .* labels of 10"),
        ("fog", lambda a: a[..., :2], r"expected images \[N, H, W, 3\]"),
        ("fog", lambda a: a / 255 - 0.5, r"values from -0\.5 to 0\.5.*normalised"),
        ("fog", lambda a: a.astype(np.int32) * 2, "values from 0 to 510"),
        ("labels", lambda a: a + 0.5, r"labels\.npy: expected labels 0\.\.9"),
        ("labels", lambda a: a + 1, r"labels\.npy: expected labels 0\.\.9"),
        ("labels", lambda a: np.float64(a) * np.nan, r"labels\.npy: expected labels 0\.\.9"),
    ],
)
def test_arrays_that_are_no_images_or_labels_are_said(arrays, file, change, said):
    path = arrays / f"{file}.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(UserError, match=said):
        corruption_arrays(arrays, ["fog"], [3], 10)


def test_a_bad_image_in_the_middle_of_an_array_is_named(arrays):
    pixels = np.load(arrays / "fog.npy") / 255
    pixels[25] = 7
    images = corruption_arrays(arrays, ["fog"], [1], 10)["fog", 1]
    np.save(arrays / "fog.npy", pixels)
    images.start, images.white = 20, 1
    with pytest.raises(ImageError, match=r"image 25 of .*fog\.npy: values from 7 to 7"):
        images.image(5)


# ------------------------------------------------------------------------ lists

TABLES = {
    "as it should be": "filename,class_index\na b.png,3\nsub/c.png,10\n",
    "byte order mark": "\ufefffilename,class_index\na b.png,3\nsub/c.png,10\n",
    "semicolons": "filename;class_index\na b.png;3\nsub/c.png;10\n",
    "tabs": "filename\tclass_index\na b.png\t3\nsub/c.png\t10\n",
    "blanks": "\n Filename , class_index \n a b.png , 3 \n\nsub/c.png,  10\n , \n",
    "fractions": "filename,class_index\na b.png,3.0\nsub/c.png,1e1\n",
    "commas in numbers": "filename;class_index\na b.png;3,0\nsub/c.png;10,0\n",
    "backslashes": "filename,class_index\n.\\a b.png,3\nsub\\c.png,10\n",
    "quotes": '"filename","class_index"\r\n"a b.png","3"\r\n"sub/c.png","10"\r\n',
    "other columns": "class_index,wnid,FILENAME,name\n3,n1,a b.png,x\n10,n2,sub/c.png,\n",
    "excel": "sep=;\nfilename;class_index\na b.png;3\nsub/c.png;10\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("form", TABLES)
def test_a_table_of_labels_is_read_as_programs_write_it(tmp_path, form, encoding):
    (tmp_path / "labels.csv").write_bytes(TABLES[form].encode(encoding))
    table = read_labels(tmp_path / "labels.csv", 11)
    assert table.names == ["a b.png", "sub/c.png"] and table.labels.tolist() == [3, 10]
    assert read_labels(tmp_path / "labels.csv").classes is None


def test_a_table_may_name_the_classes(tmp_path):
    (tmp_path / "labels.csv").write_text("filename,class\n0.png,dog\n1.png,cat\n2.png,dog\n")
    table = read_labels(tmp_path / "labels.csv")
    assert table.classes == ["cat", "dog"] and table.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty"),
        ("filename,class_index\n", "lists no image"),
        ("file,label\na,1\n", "its first line is 'file,label'"),
        ("filename,class_index\na,1\n\nb,\n", "line 4 has no class_index"),
        ("filename,class_index\na,1\n ,2\n", "line 3 has no filename"),
        ("filename,class_index\na,1\nb\n", "line 3 has no class_index"),
        ("filename,class_index\na,3.5\n", r"line 2: class_index '3\.5' is none of 0 \.\.\. 10"),
        ("filename,class_index\na,-1\n", "line 2: class_index '-1'"),
        ("filename,class_index\na,11\n", "line 2: class_index '11'"),
        ("filename,class_index\na,cat\n", "line 2: class_index 'cat'"),
        ("filename,class_index\na,1\nb,1\na,2\n", "a has two labels, 1 and 2"),
        ("filename,class_index\na,inf\n", "line 2: class_index 'inf'"),
    ],
)
def test_a_wrong_table_of_labels_names_the_line(tmp_path, text, said):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=said):
        read_labels(tmp_path / "labels.csv", 11)


NAMES = ["a/0.JPEG", "a/x y.JPEG", "b/0.JPEG", "b/only.v2.png"]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a/x y.JPEG\nb/0.JPEG\n", [1, 2]),
        ("\ufeff\n  a/x y.JPEG  \r\n\r\nb/0.JPEG", [1, 2]),
        ("a/x y\nb/0\nb/only.v2", [1, 2, 3]),
        ("a/0.JPEG b/0.JPEG\n", [0, 2]),
        ("a/x y.JPEG 65\nb/0.JPEG,3\nb/0.JPEG;3", [1, 2, 2]),
        (".\\a\\x y.JPEG\n./b/0.JPEG", [1, 2]),
        ("only.v2.png\nx y.jpg 4", [3, 1]),
    ],
)
def test_a_list_of_images_is_read_as_people_write_it(tmp_path, text, rows):
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "list.txt").write_bytes(text.encode(encoding))
        positions, missing = find_listed(read_list(tmp_path / "list.txt"), NAMES)
        assert positions.tolist() == rows and not missing


def test_what_is_listed_and_not_there_is_returned(tmp_path):
    lines = ["a/0.JPEG", "a/1.JPEG", "0.JPEG", "c d.png 4"]  # there are two of the name 0.JPEG
    positions, missing = find_listed(lines, NAMES)
    assert positions.tolist() == [0] and missing == lines[1:]
    (tmp_path / "list.txt").write_bytes(b"a\xff\x00")
    with pytest.raises(UserError, match=r"list\.txt is not a text in UTF-8 or UTF-16"):
        read_list(tmp_path / "list.txt")


# ------------------------------------------------------------------------ labels and networks

PHOTOS = ["scenario=imagenet_c", "scenario.corrupt=on_the_fly", "scenario.image_list=all"]
PHOTOS += ["scenario.corruptions=[fog]", "scenario.probe_images=0", "scenario.clean_images=0"]


@pytest.mark.parametrize(
    ("tag", "outputs", "space"),
    [
        ("resnet50.a1_in1k", 1000, "imagenet1k"),
        ("convnext_tiny.fb_in22k_ft_in1k", 1000, "imagenet1k"),
        ("resmlp_12_224.fb_dino", 1000, "fb_dino"),
        ("vit_base_patch16_224.augreg_in21k", 21843, "imagenet21k_goog"),
        ("resnet50.mine", 7, None),
    ],
)
def test_a_thousand_outputs_are_not_always_those_of_imagenet(tag, outputs, space):
    assert label_space(tag, outputs) == space


def test_label_spaces_that_only_look_alike_are_refused_before_the_first_batch(
    configure, imagenet_clean_root, tmp_path
):
    words = [*PHOTOS, f"data.root={imagenet_clean_root}", "backbone=test_resnet"]
    said = r"predicts fb_dino classes.*holds imagenet1k.*1000, says nothing.*classes=imagenet1k"
    with pytest.raises(UserError, match=said):
        run_experiment(configure(*words, "backbone.classes=fb_dino"), [])
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("labels", [[0, 20], [-1, 3]])
def test_labels_outside_the_range_of_the_network_are_one_line(configure, monkeypatch, labels):
    made = compose.make_stream

    def other(*args):
        return replace(made(*args), order={"label": np.asarray(labels)})

    monkeypatch.setattr("driftline.runs.execute.make_stream", other)
    said = rf"has labels from {labels[0]} to {labels[1]}, but its 20 classes are 0 \.\.\. 19"
    with pytest.raises(UserError, match=said):
        run_experiment(configure("scenario.images=20", "scenario.corruptions=[fog]"), [])


# ------------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("workers", "limit", "kept"), [(0, 0, 0), (0, 3 * 32 * 32 * 3, 3), (0, 2**20, 5), (2, 2**20, 5)]
)
def test_clean_images_are_decoded_once_where_memory_allows(tmp_path, workers, limit, kept):
    """Their files are gone after the first of two corruptions."""
    names = [f"{i}.png" for i in range(5)]
    write_images(tmp_path, names, size=40)
    files = Files(tmp_path, names, np.zeros(5), ["a"])
    base = Derived(files, small, "32 px")
    options = {"preset": "cifar", "seed": 0, "jpeg_quality": None, "frost_dir": None}
    sets = list(corrupted(base, [("fog", 1), ("contrast", 2)], None, **options).values())

    def images(number: int, skipped: Skipped) -> torch.Tensor:
        reader = Reader(sets, skipped, workers, "skip")
        rows = Rows.of(sets[number], np.arange(5), number)
        read = [b.x for b in reader.batches(rows, 2, as_stored) if b is not None]
        return torch.cat([torch.zeros(0, 3, 32, 32), *read])

    whole = [images(number, Skipped()) for number in (0, 1)]
    remember(sets, limit)
    assert torch.equal(images(0, Skipped()), whole[0])
    for name in names:
        (tmp_path / name).unlink()
    skipped = Skipped()
    with warnings.catch_warnings(action="ignore"):
        again = images(1, skipped)
    assert len(again) == kept and len(skipped.reasons) == 5 - kept
    assert all((row == whole[1]).flatten(1).all(1).any() for row in again)
    assert pickle.loads(pickle.dumps(base)).stored(0) is None


def small(image: Image.Image, row: int) -> Image.Image:
    return image.resize((32, 32))


# ------------------------------------------------------------------------ whole scenarios


def built(configure, scenario: str, root: Path, *words: str):
    return make(configure(f"scenario={scenario}", f"data.root={root}", *words))


CIFAR_C = ["scenario.corruptions=[gaussian_noise,fog]", "scenario.probe_images=2"]
RELEASED = [*CIFAR_C, "scenario.image_list=all"]


def test_a_file_that_a_later_corruption_lacks_is_noticed_before_the_first_batch(
    configure, imagenet_c_root
):
    (first, *_) = sorted(imagenet_c_root.glob("ImageNet-C/fog/5/*/*.JPEG"))
    first.unlink()
    with pytest.raises(UserError, match=rf"missing.*: 1 \(first: .*fog/5/.*{first.name}\)"):
        built(configure, "imagenet_c", imagenet_c_root, *RELEASED)
    stream = built(configure, "imagenet_c", imagenet_c_root, *RELEASED, "data.on_error=skip")
    with pytest.warns(UserWarning, match=first.name):
        counts = [sum(len(b.y) for b in s.batches()) for s in stream.segments]
    assert counts == [12, 11]


def test_a_link_without_its_file_and_a_listed_file_that_is_missing_are_noticed(
    configure, image_folder_root, imagenet_clean_root
):
    words = ["scenario.increment=2", "scenario.pipeline=plain"]
    (image_folder_root / "train" / "class1" / "z.png").symlink_to("/nowhere/z.png")
    with pytest.raises(UserError, match=r"missing.*class1/z\.png"):
        built(configure, "split_imagefolder", image_folder_root, *words)
    (imagenet_clean_root / "image03.png").unlink()
    with pytest.raises(UserError, match=r"missing.*image03\.png"):
        built(configure, "imagenet_c", imagenet_clean_root, *PHOTOS[1:])


def test_classes_without_test_images_are_counted_and_named(configure, image_folder_root):
    shutil.rmtree(image_folder_root / "test" / "class1")
    (image_folder_root / "test" / "class2" / "._0.png").write_bytes(b"?")
    with pytest.warns(UserWarning, match="1 of 4 classes have no test images: class1"):
        built(configure, "split_imagefolder", image_folder_root, "scenario.increment=2")
    shutil.move(image_folder_root / "test" / "class2", image_folder_root / "test" / "Class2")
    with pytest.raises(UserError, match="has classes that .*train lacks: Class2"):
        built(configure, "split_imagefolder", image_folder_root, "scenario.increment=2")


@pytest.mark.parametrize("kind", ["wnid", "index"])
@pytest.mark.parametrize("place", ["val", "val/val", "imagenet/val", "."])
def test_clean_images_are_found_by_synset_or_label_and_in_nested_folders(tmp_path, kind, place):
    names = wnids()
    labels = [0, 2, 10, 999]
    folders = [names[label] if kind == "wnid" else str(label) for label in labels]
    folder(tmp_path / place, *(f"{f}/0.JPEG" for f in [*folders, "__MACOSX"]))
    with warnings.catch_warnings(record=True) as caught:
        files = imagenet_clean(tmp_path)
    assert files.labels.tolist() == labels and files.num_classes == 1000
    assert len(caught) == (kind == "index")
    folder(tmp_path / place, "1000/0.JPEG")
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(UserError, match=r"no ImageNet-1k synset ids: \['1000'\].*0 to 999"),
    ):
        imagenet_clean(tmp_path)


def test_folders_of_severities_are_no_labels(tmp_path):
    folder(tmp_path / "fog", *(f"{s}/n01440764/0.JPEG" for s in range(1, 6)))
    with pytest.raises(UserError, match="no clean ImageNet images"):
        imagenet_clean(tmp_path / "fog")


@pytest.mark.parametrize("nested", ["ImageNet-C/{}", "{}", "ImageNet-C/ImageNet-C/{}"])
@pytest.mark.parametrize("group", ["", "noise/", "noise/noise/"])
def test_corrupted_images_are_found_in_groups_and_nested_folders(tmp_path, nested, group):
    place = nested.format(f"{group}gaussian_noise/5/n01440764/0.JPEG")
    folder(tmp_path, place)
    found = imagenet_c(tmp_path, ["gaussian_noise"], [5])
    assert found["gaussian_noise", 5] == (tmp_path / place).parents[1]


@pytest.mark.parametrize("nested", ["CIFAR-10-C", ".", "CIFAR-10-C/CIFAR-10-C"])
def test_arrays_are_found_in_nested_folders(tmp_path, arrays, nested):
    root = tmp_path / "root"
    (root / nested).mkdir(parents=True, exist_ok=True)
    for file in ("fog", "labels"):
        shutil.copy(arrays / f"{file}.npy", root / nested)
    assert len(cifar_c(root, "cifar10", ["fog"], [1])["fog", 1].labels) == 10


MISSING = {
    "archive of ImageNet-C": ("imagenet_c", ["ImageNet-C.tar"], r"tar -xf ImageNet-C\.tar"),
    "archives of its parts": (
        "imagenet_c",
        ["ImageNet-C/noise.tar", "ImageNet-C/blur.tar"],
        r"holds blur\.tar, noise\.tar, not unpacked: cd .*/ImageNet-C && tar -xf blur\.tar",
    ),
    "one part is there": (
        "imagenet_c",
        ["ImageNet-C/fog/5/n01440764/0.JPEG", "ImageNet-C/noise.tar"],
        r"lacks 1 of 2 corruption folders: gaussian_noise/5\. .*tar -xf noise\.tar",
    ),
    "clean images instead": (
        "imagenet_c",
        ["val/n01440764/0.JPEG"],
        r"scenario\.corrupt=on_the_fly.*scenario\.image_list=all",
    ),
    "clean images and a part": (
        "imagenet_c",
        ["val/n01440764/0.JPEG", "ImageNet-C/fog/5/n01440764/0.JPEG"],
        r"lacks 1 of 2.*scenario\.corrupt=on_the_fly.*scenario\.image_list=all",
    ),
    "archive of CIFAR": ("cifar10_c", ["CIFAR-10-C.tar"], r"tar -xf CIFAR-10-C\.tar"),
    "archive in the folder": ("cifar10_c", ["CIFAR-10-C/a.zip"], r"holds no arrays.*unzip a\.zip"),
    "archive of clean CIFAR": (
        "split_cifar10",
        ["cifar-10-python.tar.gz"],
        r"missing or damaged.*tar -xf cifar-10-python\.tar\.gz",
    ),
    "archives of domains": ("domains_imagefolder", ["art.zip"], r"no domains.*unzip art\.zip"),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_there_in_the_place_of_missing_data_is_named_with_what_to_do(
    configure, tmp_path, case
):
    scenario, names, said = MISSING[case]
    root = folder(tmp_path / "data", *names)
    words = CIFAR_C if scenario.endswith("_c") else []
    with pytest.raises(UserError, match=f"{said}.*Expected layout"):
        built(configure, scenario, root, *words)


def test_corrupted_images_in_the_place_of_clean_ones_are_named(configure, imagenet_c_root):
    with pytest.raises(UserError, match=r"scenario\.corrupt=released takes them.*no clean"):
        built(configure, "imagenet_c", imagenet_c_root, "scenario.corrupt=on_the_fly", *CIFAR_C)


def test_an_archive_is_no_data_root(configure, tmp_path):
    (tmp_path / "CIFAR-10-C.tar").write_bytes(b"?")
    for name, said in (("CIFAR-10-C.tar", "is a file; unpack it"), ("CIFAR-10-C", "tar -xf CIFAR")):
        with pytest.raises(UserError, match=f"data.root=.*{said}"):
            built(configure, "cifar10_c", tmp_path / name, *CIFAR_C)


def test_a_list_of_the_stream_may_hold_blanks_and_must_be_complete(configure, imagenet_clean_root):
    (imagenet_clean_root / "image03.png").rename(imagenet_clean_root / "image 03.png")
    table = imagenet_clean_root / "labels.csv"
    table.write_text(table.read_text().replace("image03", "image 03"), encoding="utf-16")
    listing = imagenet_clean_root / "list.txt"
    listing.write_text("image 03.png\nimage01.png\n", encoding="utf-8-sig")
    words = [w for w in PHOTOS[1:] if "image_list" not in w]
    words.append(f"scenario.image_list={listing}")
    stream = built(configure, "imagenet_c", imagenet_clean_root, *words)
    assert stream.order["row"].tolist() == [3, 1] and stream.order["label"].tolist() == [3, 1]
    for text, said in (("image99.png\n", "image99"), ("", "none is listed")):
        listing.write_text(text)
        with pytest.raises(UserError, match=rf"{said}.*image00\.png.*image_list=all"):
            built(configure, "imagenet_c", imagenet_clean_root, *words)
