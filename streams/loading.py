"""From rows of image sets to batches, with worker processes that cannot change a result."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from traceback import print_exc
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from driftline.core.errors import UserError, shortage
from driftline.core.exact import divide_
from driftline.core.processes import (
    end_with_parent,
    obey_parent,
    return_freed_memory,
    signals_wait,
)
from driftline.core.seed import derive
from driftline.core.stream import Batch, Skipped
from driftline.streams.images import (
    Derived,
    Generated,
    ImageError,
    ImageSet,
    channels_last,
    fingerprint,
    unreadable,
)
from driftline.streams.pipelines import Pipeline, as_stored, seeded

CPU = torch.device("cpu")
# Where the main process corrupts, on the device, what workers read. On a CPU the workers do it,
# each its own batch: the main process has no faster processor, and would work alone.
GENERATING = ("cuda",)


@dataclass(frozen=True)
class Rows:
    """Which images, in which order: all int64 [N]."""

    row: np.ndarray
    label: np.ndarray
    domain: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    @staticmethod
    def of(images: ImageSet, row: np.ndarray, domain: int = 0) -> Rows:
        return Rows(row, images.labels[row], np.full(len(row), domain, np.int64))

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        return Rows(
            np.concatenate([p.row for p in parts]),
            np.concatenate([p.label for p in parts]),
            np.concatenate([p.domain for p in parts]),
        )

    def take(self, order: np.ndarray) -> Rows:
        return Rows(self.row[order], self.label[order], self.domain[order])


Plan = list[list[int]]  # positions in the rows, batch by batch


def consecutive(count: int, batch_size: int) -> Plan:
    """Batches of rows that follow each other."""
    return [list(range(i, min(i + batch_size, count))) for i in range(0, count, batch_size)]


def one_class(rows: Rows, batch_size: int) -> Plan:
    """Batches of one class and one domain each, which other orders of the classes have as well."""
    groups: dict[tuple[int, int], list[int]] = {}
    for at, group in enumerate(zip(rows.domain.tolist(), rows.label.tolist(), strict=True)):
        groups.setdefault(group, []).append(at)
    starts = [(at, i) for at in groups.values() for i in range(0, len(at), batch_size)]
    return [at[i : i + batch_size] for at, i in starts]


class _Item(NamedTuple):
    at: int  # position in the rows
    pixels: np.ndarray | str  # uint8 [H, W, 3], or why there are none
    clean: bool = False  # the set's `generate` has still to be applied


class _Items(Dataset):
    def __init__(
        self,
        sets: Sequence[ImageSet],
        rows: Rows,
        change: Pipeline,
        seed: int | None,
        generate: bool,
    ) -> None:
        self.sets, self.rows, self.change, self.seed = sets, rows, change, seed
        self.generate = generate

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: list[int]) -> list[_Item] | UserError:
        items = [self._read(at) for at in positions]
        clean = [n for n, item in enumerate(items) if item.clean] if self.generate else []
        if clean:
            try:
                levels, at = _stack([items[n] for n in clean])
                generated = channels_last(_generate(self.sets, self.rows, at, levels))
            except UserError as error:
                return error  # raised by the main process, without a worker's traceback
            for n, pixels in zip(clean, generated, strict=True):
                place = items[n].at
                items[n] = _Item(place, self._changed(place, pixels))
        return items

    def _read(self, at: int) -> _Item:
        row, images = int(self.rows.row[at]), self.sets[int(self.rows.domain[at])]
        try:
            stored = images.stored(row) if isinstance(images, Generated) else None
            if isinstance(images, Generated) and stored is None:
                return _Item(at, _pixels(images.base.image(row)), clean=True)
            image = images.image(row) if stored is None else stored
        except ImageError as error:
            return _Item(at, str(error))
        return _Item(at, self._changed(at, image))

    def _changed(self, at: int, image: Image.Image | np.ndarray) -> np.ndarray:
        if isinstance(image, np.ndarray):
            if self.change is as_stored:
                return image.copy()
            image = Image.fromarray(image)
        if self.seed is None:
            return _pixels(self.change(image))
        # A random pipeline: one draw per (epoch, row), not per worker.
        row, domain = int(self.rows.row[at]), int(self.rows.domain[at])
        return _pixels(seeded(self.change, image, derive(self.seed, domain, row)))


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).copy()  # uint8 [H, W, 3]


def _as_is(items: list[_Item] | UserError) -> list[_Item] | UserError:
    return items


def _stack(items: Sequence[_Item]) -> tuple[Tensor, np.ndarray]:
    """Images as uint8 [B, 3, H, W] and their positions.

    Raises:
        UserError: if they differ in size.
    """
    pixels = [item.pixels for item in items if not isinstance(item.pixels, str)]
    if len({p.shape for p in pixels}) > 1:
        sizes = sorted({f"{p.shape[1]}x{p.shape[0]}" for p in pixels})
        raise UserError(
            f"the images of one batch differ in size ({', '.join(sizes[:4])}); "
            "choose a pipeline that resizes, for example scenario.pipeline=timm"
        )
    levels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return levels.contiguous(), np.asarray([item.at for item in items])


def _generate(sets: Sequence[ImageSet], rows: Rows, at: np.ndarray, levels: Tensor) -> Tensor:
    """What the sets make of clean images, uint8 [B, 3, H, W] at the positions `at`."""
    generated = torch.empty_like(levels)
    for domain in np.unique(rows.domain[at]):
        images = sets[int(domain)]
        assert isinstance(images, Generated)
        here = np.flatnonzero(rows.domain[at] == domain)
        place = torch.from_numpy(here).to(levels.device)
        generated[place] = images.generate(levels[place], rows.row[at[here]].tolist())
    return generated


def _begin_worker(_: int) -> None:
    torch.set_num_threads(1)
    traceback.print_exc = _print_in_short
    # One whose pipe is full would wait for ever for a main process that was killed.
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with_parent(signal.SIGKILL)
        obey_parent(parent.pid)


def remember(sets: Sequence[ImageSet], limit: int) -> None:
    """Keep in memory what several of `sets` are made from, up to `limit` bytes of each.

    Clean images that every corruption of a stream is made from are then decoded and resized once.
    """
    bases = [images.base for images in sets if isinstance(images, Generated)]
    for base, count in Counter(bases).items():
        if count > 1 and isinstance(base, Derived):
            base.remember(limit)


def _print_in_short(*args: Any, **options: Any) -> None:
    """As `traceback.print_exc`, but one line for a lack that the main process ends with."""
    error = sys.exception()
    if error is not None and shortage(error):
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    else:
        print_exc(*args, **options)


def contents(
    sets: Sequence[ImageSet],
    rows: Sequence[np.ndarray | None],
    on_error: Literal["raise", "skip"],
) -> list[str]:
    """Hash of the images of some rows of each set; None: all its rows.

    Raises:
        ImageError: naming files that are missing, which would be noticed in the middle of a run
            otherwise; not under `on_error="skip"`, which leaves them out.
    """
    hashes = [images.content(chosen) for images, chosen in zip(sets, rows, strict=True)]
    if on_error == "raise":
        pairs = zip(sets, rows, strict=True)
        lacking = list(dict.fromkeys(p for s, r in pairs for p in unreadable(s, r)))
        if lacking:
            raise ImageError(
                f"image files that are missing or cannot be opened: {len(lacking)} (first: "
                f"{lacking[0]}); complete the set, or leave them out with data.on_error=skip"
            )
    return hashes


@dataclass(frozen=True)
class Reader:
    """Loads batches of rows from image sets, one set per domain.

    Args:
        workers: processes; 0 decodes in the main process.
        skipped: where images that are left out are counted.
        device: where batches go, as uint8, to become floats there.
        on_error: `raise` stops at an unreadable image, `skip` leaves it out with a warning.
    """

    sets: Sequence[ImageSet]
    skipped: Skipped
    workers: int = 0
    on_error: Literal["raise", "skip"] = "raise"
    device: torch.device = CPU

    def batches(
        self,
        rows: Rows,
        batch_size: int,
        change: Pipeline,
        *,
        start: int = 0,
        seed: int | None = None,
        plan: Plan | None = None,
    ) -> Iterator[Batch | None]:
        """Batches from number `start` on, the last one possibly short.

        Args:
            change: pipeline from PIL to PIL.
            seed: key of the random draws of `change`; None if it draws nothing.
            plan: other batches than those of consecutive rows.

        Yields:
            A batch, or None where every image of it was skipped.

        Raises:
            ImageError: for an unreadable image under `on_error="raise"`, naming it.
            UserError: if the images of a batch differ in size.
        """
        for found in self.pixels(rows, batch_size, change, start=start, seed=seed, plan=plan):
            if found is None:
                yield None
                continue
            pixels, at = found
            yield Batch(
                x=divide_(self._sent(pixels).to(torch.float32), 255),
                y=self._sent(torch.from_numpy(rows.label[at])),
                index=self._sent(torch.from_numpy(rows.row[at])),
                domain=self._sent(torch.from_numpy(rows.domain[at])),
            )

    def contents(self, rows: Sequence[np.ndarray | None]) -> list[str]:
        """Hash of the images of some rows of each set, see `contents`."""
        return contents(self.sets, rows, self.on_error)

    def content(self, rows: Rows) -> str:
        """Hash of the images of `rows` in their order."""
        domains = np.unique(rows.domain).tolist()
        contents = [self.sets[d].content(rows.row[rows.domain == d]) for d in domains]
        return fingerprint(*contents, rows.domain, rows.row)

    def _sent(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda" or tensor.is_cuda:
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def pixels(
        self,
        rows: Rows,
        batch_size: int,
        change: Pipeline,
        *,
        start: int = 0,
        seed: int | None = None,
        plan: Plan | None = None,
    ) -> Iterator[tuple[Tensor, np.ndarray] | None]:
        """As `batches`: images uint8 [B, 3, H, W] and their positions in `rows`.

        Images are on the host, or on the device where they were generated there.
        """
        here = self.device.type in GENERATING and change is as_stored
        items = _Items(self.sets, rows, change, seed, generate=not here)
        plan = (plan or consecutive(len(rows), batch_size))[start:]
        loader = DataLoader(
            items,
            batch_sampler=plan,
            num_workers=min(self.workers, len(plan)),
            collate_fn=_as_is,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # keeps the loader away from the global generator
        )
        if loader.num_workers:
            return_freed_memory()
        with signals_wait():  # stopping is up to the main process, which saves first
            arriving = iter(loader)
        for found in arriving:
            if isinstance(found, UserError):
                raise found
            good = self._readable(found)
            if not good:
                yield None
                continue
            levels, at = _stack(good)
            clean = torch.tensor([item.clean for item in good])
            if clean.any():
                levels, clean = self._sent(levels), clean.to(self.device)
                levels[clean] = _generate(self.sets, rows, at[clean.cpu().numpy()], levels[clean])
            yield levels, at

    def _readable(self, items: Sequence[_Item]) -> list[_Item]:
        """The items with an image; the others are counted, or are an error."""
        for message in (i.pixels for i in items if isinstance(i.pixels, str)):
            if self.on_error == "raise":
                raise ImageError(f"{message}. Repair it, or leave it out with data.on_error=skip.")
            if self.skipped.add(message):
                warnings.warn(f"skipped: {message}", stacklevel=2)
        return [item for item in items if not isinstance(item.pixels, str)]
