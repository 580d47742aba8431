"""Labelled source images that a method goes on reading during the stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from driftline.core.errors import UserError
from driftline.core.ranges import Size
from driftline.core.stream import Batch, SourceImages


class Replay(nn.Module):
    """Batches of the source, pass after pass, every pass in another random order.

    The state is the position: which order, how many batches of it are used. So a resumed run reads
    what the run that nobody stopped reads, and after a reset a new pass begins.

    Args:
        size: images a batch; the last one of a pass may be shorter.
        numbers: the method's generator that draws the order of every pass.
        strategy: name of the method, for the error.
    """

    def __init__(self, size: Size, numbers: torch.Generator, *, strategy: str) -> None:
        super().__init__()
        self.size, self.numbers, self.strategy = size, numbers, strategy
        self.order: int | None = None  # key of the present pass; None: none has begun
        self.used = 0  # batches of it
        self._source: SourceImages | None = None
        self._batches: Iterator[Batch] | None = None  # from `used` on, where it was opened

    def get_extra_state(self) -> dict[str, Any]:
        return {"order": self.order, "used": self.used}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.order, self.used = state["order"], state["used"]
        self._batches = None

    def use(self, source: SourceImages) -> None:
        """Read from these images; the position stays."""
        self._source, self._batches = source, None

    def next(self) -> Batch:
        """The next batch.

        Raises:
            UserError: if `use` was not called, or no image can be read.
        """
        if self._source is None:
            raise UserError(
                f"strategy={self.strategy} with these settings reads labelled source images during "
                "the stream: driftline.prepare(method, source) before adapt"
            )
        if self.order is not None and self._batches is None:
            self._batches = self._source.batches(self.size, epoch=self.order, start=self.used)
        batch = None if self._batches is None else next(self._batches, None)
        if batch is None:
            self.order = int(torch.randint(2**31, (), generator=self.numbers))
            self.used = 0
            self._batches = self._source.batches(self.size, epoch=self.order)
            batch = next(self._batches, None)
        if batch is None:
            raise UserError(f"strategy={self.strategy}: none of the source images can be read")
        self.used += 1
        return batch
