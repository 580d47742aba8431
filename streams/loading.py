"""From rows of image sets to batches, with worker processes that cannot change a result."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from core.errors import UserError
from core.seed import derive
from core.stream import Batch, Skipped
from streams.images import ImageError, ImageSet
from streams.pipelines import Pipeline, seeded

CPU = torch.device("cpu")


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


class _Items(Dataset):
    def __init__(
        self, sets: Sequence[ImageSet], rows: Rows, change: Pipeline, seed: int | None
    ) -> None:
        self.sets, self.rows, self.change, self.seed = sets, rows, change, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray | str]:
        row, domain = int(self.rows.row[index]), int(self.rows.domain[index])
        try:
            image = self.sets[domain].image(row)
        except ImageError as error:
            return index, str(error)
        if self.seed is not None:  # a random pipeline: one draw per (epoch, row), not per worker
            image = seeded(self.change, image, derive(self.seed, domain, row))
        else:
            image = self.change(image)
        return index, _pixels(image)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).copy()  # uint8 [H, W, 3]


def _quiet(_: int) -> None:
    # Stopping is up to the main process, which saves first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


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
    ) -> Iterator[Batch | None]:
        """Batches from number `start` on, the last one possibly short.

        Args:
            change: pipeline from PIL to PIL.
            seed: key of the random draws of `change`; None if it draws nothing.

        Yields:
            A batch, or None where every image of it was skipped.

        Raises:
            ImageError: for an unreadable image under `on_error="raise"`, naming it.
            UserError: if the images of a batch differ in size.
        """
        for found in self.pixels(rows, batch_size, change, start=start, seed=seed):
            if found is None:
                yield None
                continue
            pixels, at = found
            yield Batch(
                x=self._sent(pixels).to(torch.float32).div_(255),
                y=self._sent(torch.from_numpy(rows.label[at])),
                index=self._sent(torch.from_numpy(rows.row[at])),
                domain=self._sent(torch.from_numpy(rows.domain[at])),
            )

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type != "cuda":
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
    ) -> Iterator[tuple[torch.Tensor, np.ndarray] | None]:
        """As `batches`: images uint8 [B, 3, H, W] on the host and their positions in `rows`."""
        items = _Items(self.sets, rows, change, seed)
        plan = [
            list(range(i, min(i + batch_size, len(rows))))
            for i in range(start * batch_size, len(rows), batch_size)
        ]
        loader = DataLoader(
            items,
            batch_sampler=plan,
            num_workers=min(self.workers, len(plan)),
            collate_fn=list,
            worker_init_fn=_quiet,
            generator=torch.Generator(),  # keeps the loader away from the global generator
        )
        for found in loader:
            yield self._collate(found)

    def _collate(
        self, found: list[tuple[int, np.ndarray | str]]
    ) -> tuple[torch.Tensor, np.ndarray] | None:
        good = [(i, p) for i, p in found if not isinstance(p, str)]
        for _, message in found:
            if not isinstance(message, str):
                continue
            if self.on_error == "raise":
                raise ImageError(f"{message}. Repair it, or leave it out with data.on_error=skip.")
            if self.skipped.add(message):
                warnings.warn(f"skipped: {message}", stacklevel=2)
        if not good:
            return None
        if len({p.shape for _, p in good}) > 1:
            sizes = sorted({f"{p.shape[1]}x{p.shape[0]}" for _, p in good})
            raise UserError(
                f"the images of one batch differ in size ({', '.join(sizes[:4])}); "
                "choose a pipeline that resizes, for example scenario.pipeline=timm"
            )
        at = np.asarray([i for i, _ in good])
        pixels = torch.from_numpy(np.stack([p for _, p in good])).permute(0, 3, 1, 2)
        return pixels.contiguous(), at
