"""Images kept on the device: the same batches, and fewer reads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from driftline.core.stream import Skipped
from driftline.streams.images import ImageError, ImageSet
from driftline.streams.loading import Reader, Rows
from driftline.streams.pipelines import Geometry
from driftline.streams.store import ImageStore, TaskImages


class Counted(ImageSet):
    """Ten random images, of which number 4 cannot be read; counts the reads."""

    class_names = ("a", "b")

    def __init__(self, size: int = 8) -> None:
        self.labels = np.arange(10) % 2
        self.reads = 0
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (10, size, size, 3), dtype=np.uint8)

    def content(self, rows: np.ndarray | None = None) -> str:
        return "counted"

    def image(self, row: int) -> Image.Image:
        self.reads += 1
        if row == 4:
            raise ImageError("number 4 is broken")
        return Image.fromarray(self.pixels[row])


def images(found: Counted, store: ImageStore, name: str = "plain") -> TaskImages:
    reader = Reader([found], Skipped(), on_error="skip")
    return TaskImages(reader, name, Geometry(size=8), False, store)


def equal(first, second) -> bool:
    pairs = list(zip(first, second, strict=True))
    return bool(pairs) and all(
        a is b is None or all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
        for a, b in pairs
    )


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("name", ["raw", "plain", "timm"])
def test_kept_images_give_the_same_batches_with_fewer_reads(name):
    rows = Rows.of(Counted(), np.array([1, 4, 9, 3, 7, 0, 8]))
    read, kept = Counted(), Counted()
    without, store = images(read, ImageStore(), name), images(kept, ImageStore("cpu", 1), name)
    for epoch in range(3):
        plain, held = (i.shuffled(0, rows, 3, 5, epoch, start=epoch) for i in (without, store))
        assert equal(plain, held)
    assert equal(without.fixed(rows, 2), store.fixed(rows, 2))
    assert equal(without.fixed(rows, 4), store.fixed(rows, 4))
    once = len(rows)
    assert read.reads == 7 + 4 + 1 + 2 * once
    # random crops are read every time; images that are at most flipped once in all
    assert kept.reads == (once if name != "timm" else 7 + 4 + 1 + once)


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("limit", [0, 1])
def test_batches_of_one_class_are_the_same_in_every_order_of_the_classes(limit):
    found = Counted()
    task = replace(images(found, ImageStore("cpu", limit)), test_batches="one_class")
    rows = Rows.of(found, np.arange(10))
    renamed = replace(rows, label=rows.label.max() - rows.label)  # in an order turned round
    first, second = (list(task.fixed(r, 2)) for r in (rows, renamed))
    assert sorted(b.index.tolist() for b in first) == sorted(b.index.tolist() for b in second)
    assert all(len(set(b.y.tolist())) == 1 for b in first)
    mixed = replace(task, test_batches="mixed").fixed(rows, 2)
    assert {i for b in first for i in b.index.tolist()} == {
        i for b in mixed for i in b.index.tolist()
    }


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_batch_of_unreadable_images_is_none():
    rows = Rows.of(Counted(), np.array([4, 1, 2]))
    for limit in (0, 1):
        found = list(images(Counted(), ImageStore("cpu", limit)).shuffled(0, rows, 1, 5, 0))
        assert sum(b is None for b in found) == 1 and len(found) == 3


@pytest.mark.filterwarnings("ignore:skipped")
def test_sets_that_do_not_fit_are_read_and_the_oldest_make_room():
    first, second = Rows.of(Counted(), np.arange(0, 4)), Rows.of(Counted(), np.arange(5, 9))
    bytes_each = 4 * 8 * 8 * 3
    for limit, reads in ((bytes_each - 1, 16), (bytes_each, 16), (2 * bytes_each, 8)):
        found = Counted()
        store = images(found, ImageStore("cpu", limit / 2**20))
        for _ in range(2):
            for rows in (first, second):
                assert [len(b.y) for b in store.fixed(rows, 3)] == [3, 1]
        assert found.reads == reads + (4 if limit < bytes_each else 0) * 2
