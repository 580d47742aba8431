"""Images that a run reads again and again, kept on the device after their fixed pipeline."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from driftline.core.exact import divide_
from driftline.core.ranges import Count
from driftline.core.seed import derive
from driftline.core.stream import Batch, Skipped
from driftline.streams.images import ImageSet
from driftline.streams.loading import Plan, Reader, Rows, consecutive, one_class
from driftline.streams.pipelines import FLIP_ONLY, Geometry, Name, Pipeline, pipeline

READ = 256  # images at a time
TestBatches = Literal["mixed", "one_class"]


@dataclass(frozen=True)
class Kept:
    """Images of some rows: uint8 [N, 3, H, W], and which rows could be read: bool [rows]."""

    pixels: Tensor
    readable: np.ndarray


class ImageStore:
    """Images as uint8 on the device, read and decoded once a run as long as they fit.

    What it delivers equals what a `Reader` delivers, bit by bit.

    Args:
        device: where batches are wanted.
        limit_mb: of all images kept, MiB; sets that were used longest ago make room. 0 keeps none.
    """

    def __init__(self, device: torch.device | str = "cpu", limit_mb: float = 0) -> None:
        self.device = torch.device(device)
        self.limit = int(limit_mb * 2**20)
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._refused: set[str] = set()

    def fixed(
        self, key: str, reader: Reader, rows: Rows, change: Pipeline, plan: Plan
    ) -> Iterator[Batch | None] | None:
        """The batches of `plan`, or None if the images do not fit.

        Args:
            key: names `change`, which must draw nothing; images are known by their content.
        """
        stored = self._find(key, reader, rows, change)
        if stored is None:
            return None
        return self._slices(stored, rows, np.arange(len(rows)), None, plan)

    def shuffled(
        self,
        key: str,
        reader: Reader,
        rows: Rows,
        change: Pipeline,
        batch_size: int,
        order: np.ndarray,
        *,
        start: int = 0,
        flip: int | None = None,
    ) -> Iterator[Batch | None] | None:
        """As `fixed`, in another order.

        Args:
            order: int64 [N], positions in `rows`.
            start: number of the first batch.
            flip: each image is flipped with probability 1/2, by the draws of a
                `RandomHorizontalFlip` under `Reader.batches(..., seed=flip)`. None: no flips.
        """
        stored = self._find(key, reader, rows, change)
        if stored is None:
            return None
        flips = None if flip is None else self._flips(rows, flip)
        plan = consecutive(len(rows), batch_size)[start:]
        return self._slices(stored, rows, order, flips, plan)

    def _flips(self, rows: Rows, seed: int) -> Tensor:
        draws = torch.Generator()

        def tossed(domain: int, row: int) -> bool:
            draws.manual_seed(derive(seed, domain, row))
            return bool(torch.rand(1, generator=draws) < 0.5)

        pairs = zip(rows.domain.tolist(), rows.row.tolist(), strict=True)
        return torch.tensor([tossed(*pair) for pair in pairs], device=self.device)

    def _find(self, key: str, reader: Reader, rows: Rows, change: Pipeline) -> Kept | None:
        if not self.limit or not len(rows):
            return None
        key = f"{key} {reader.content(rows)}"
        if key in self._refused:
            return None
        if key not in self._kept and not self._read(key, reader, rows, change):
            self._refused.add(key)
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def _read(self, key: str, reader: Reader, rows: Rows, change: Pipeline) -> bool:
        """Keep the images of `rows`; False if they are too many or differ in size."""
        parts: list[Tensor] = []
        read: list[np.ndarray] = []
        for batch in reader.pixels(rows, READ, change):
            if batch is None:
                continue
            pixels, at = batch
            if pixels[0].nbytes * len(rows) > self.limit or pixels.shape[1:] != (
                parts[0].shape[1:] if parts else pixels.shape[1:]
            ):
                return False
            parts.append(pixels)
            read.append(at)
        if not parts:
            return False
        readable = np.zeros(len(rows), bool)
        readable[np.concatenate(read)] = True
        size = sum(p.nbytes for p in parts)
        while self._kept and size + sum(k.pixels.nbytes for k in self._kept.values()) > self.limit:
            self._kept.popitem(last=False)
        self._kept[key] = Kept(torch.cat(parts).to(self.device), readable)
        return True

    def _slices(
        self,
        stored: Kept,
        rows: Rows,
        order: np.ndarray,
        flips: Tensor | None,
        plan: Plan,
    ) -> Iterator[Batch | None]:
        place = torch.from_numpy(np.cumsum(stored.readable) - 1)  # of a row among those kept
        ordered = rows.take(order)
        columns = [torch.from_numpy(c) for c in (ordered.label, ordered.row, ordered.domain)]
        positions = torch.from_numpy(order)
        place, positions, *columns = (t.to(self.device) for t in (place, positions, *columns))
        good = stored.readable[order]
        for batch in plan:
            inside = np.asarray(batch)
            inside = inside[good[inside]]
            if not len(inside):
                yield None
                continue
            at = torch.from_numpy(inside).to(self.device)
            x = stored.pixels[place[positions[at]]]
            if flips is not None:
                x = torch.where(flips[positions[at], None, None, None], x.flip(3), x)
            y, index, domain = (c[at] for c in columns)
            yield Batch(divide_(x.to(torch.float32), 255), y, index, domain)


@dataclass(frozen=True)
class TaskImages:
    """Training or test images of a task stream, from the store where they fit.

    Args:
        name: of the pipeline.
        cifar: see `streams.pipelines.pipeline`.
    """

    reader: Reader
    name: Name
    geometry: Geometry  # known once the backbone is loaded
    cifar: bool
    store: ImageStore
    test_batches: TestBatches = "mixed"

    def _change(self, train: bool) -> Pipeline:
        return pipeline(self.name, self.geometry, train=train, cifar=self.cifar)

    @property
    def _key(self) -> str:
        return f"{self.name} {self.geometry} {self.cifar}"

    def fixed(self, rows: Rows, batch_size: int) -> Iterator[Batch]:
        """Test pipeline, in the order of `rows` or class by class."""
        change = self._change(False)
        apart = self.test_batches == "one_class"
        plan = one_class(rows, batch_size) if apart else consecutive(len(rows), batch_size)
        found = self.store.fixed(self._key, self.reader, rows, change, plan)
        if found is None:
            found = self.reader.batches(rows, batch_size, change, plan=plan)
        return (batch for batch in found if batch is not None)

    def again(self, rows: Tensor, draws: int | None, *, pool: Rows | None = None) -> Tensor:
        """Training images `rows` [n, 3, H, W], see `Task.again`.

        Args:
            pool: those of the task, where they come from several sets.
        """
        row = rows.cpu().numpy()
        nothing = domain = np.zeros_like(row)
        if pool is not None:
            order = np.argsort(pool.row, kind="stable")
            domain = pool.domain[order[np.searchsorted(pool.row[order], row)]]
        reader = replace(self.reader, workers=0)  # a few images: no processes for them
        chosen = Rows(row, nothing, domain)
        change = self._change(draws is not None)
        batches = reader.batches(chosen, len(row), change, seed=draws)
        return next(batch.x for batch in batches if batch is not None)

    def shuffled(
        self,
        task: int,
        rows: Rows,
        batch_size: int,
        seed: int,
        epoch: int,
        start: int = 0,
        more: tuple[Tensor, Tensor] | None = None,
        *,
        ordered: bool = False,
        homes: np.ndarray | None = None,
    ) -> Iterator[Batch | None]:
        """Training pipeline, in an order drawn for (seed, task, epoch), from batch `start` on.

        Args:
            more: rows and labels of further images of the set, shuffled among those of the task.
            ordered: as `rows` are, instead.
            homes: int64 [C], the set from which `more` images of each class come; None: the first.
        """
        if more is not None:
            row, label = (t.cpu().numpy() for t in more)
            domain = np.zeros_like(row) if homes is None else homes[label]
            rows = Rows.join([rows, Rows(row, label, domain)])
        order = np.arange(len(rows))
        if not ordered:
            shuffle = np.random.default_rng(derive(seed, "shuffle", task, epoch))
            order = shuffle.permutation(len(rows))
        draws = derive(seed, "augment", task, epoch)
        found = None
        if self.name in FLIP_ONLY:
            found = self.store.shuffled(
                self._key,
                self.reader,
                rows,
                self._change(False),
                batch_size,
                order,
                start=start,
                flip=draws if FLIP_ONLY[self.name] else None,
            )
        if found is None:
            found = self.reader.batches(
                rows.take(order), batch_size, self._change(True), start=start, seed=draws
            )
        return found


@dataclass(frozen=True, kw_only=True)
class TaskLoading:
    """How the images of a task stream are read."""

    batch_size: Count
    test_batch_size: Count
    test_batches: TestBatches
    pipeline: Name
    on_error: Literal["raise", "skip"]
    workers: int
    geometry: Geometry
    store: ImageStore

    def images(
        self, images: ImageSet | Sequence[ImageSet], skipped: Skipped, cifar: bool = False
    ) -> TaskImages:
        """One set or several as tasks deliver them; `cifar` as of `streams.pipelines.pipeline`."""
        sets = images if isinstance(images, Sequence) else [images]
        reader = Reader(sets, skipped, self.workers, self.on_error, self.store.device)
        return TaskImages(
            reader, self.pipeline, self.geometry, cifar, self.store, self.test_batches
        )
