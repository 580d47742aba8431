"""Training images that a method sees again: which ones, with label and, if wanted, with scores.

    self.buffer = Buffer()
    self.buffer.offer(batch, task.index, capacity, "reservoir", self.rng("buffer"))
    positions = self.buffer.draw(32, self.rng("replay"))
    x, y = self.buffer.images(positions, readers, draws), self.buffer.labels_of(positions)

An image is kept by its row in the set of its task and read again, augmented anew, when it is drawn
(`Task.again`): nothing is stored twice, and images of any size may lie beside each other. Counted
is what it would take to keep the images themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.core.stream import Batch
from driftline.parts.memory import choose, most_frequent

Rule = Literal["reservoir", "balanced", "per_class"]
Reader = Callable[[Tensor, int | None], Tensor]
ABSENT = float("inf")  # score of a class that did not exist when the image came
FIELDS = ("tasks", "rows", "labels", "pixels")


class Buffer(nn.Module):
    """A list of images; `tasks`, `rows` and `labels` are lists in the same order."""

    scores: Tensor | None  # [n, C], ABSENT where the class did not exist

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[int] = []
        self.rows: list[int] = []
        self.labels: list[int] = []
        self.offered: Counter[int] = Counter()  # images by label, kept or not
        self.largest_once: set[int] = set()  # classes that were the largest of a full buffer
        self.pixels = 0  # values of one image
        self.register_buffer("scores", None)

    def __len__(self) -> int:
        return len(self.rows)

    # ------------------------------------------------------------------ which images

    def offer(
        self,
        batch: Batch,
        task: int,
        capacity: int,
        rule: Rule,
        generator: torch.Generator,
        scores: Tensor | None = None,
    ) -> None:
        """Show the images of `batch` to the buffer, one after the other.

        Args:
            task: index of the task whose images these are.
            capacity: images in all, or of each class for `per_class`.
            rule: `reservoir`: each image so far is kept with the same chance (Vitter 1985; draws
                as in aimagelab/mammoth). `balanced`: as many images of each class as the stream
                allows (Chrysakis and Moens, ICML 2020, algorithm 1). `per_class`: one reservoir of
                each class.
            scores: [B, C], kept beside the images; None: none are.
        """
        self.pixels = batch.x[0].numel()
        items = zip(batch.index.tolist(), batch.y.tolist(), strict=True)
        for i, (row, label) in enumerate(items):
            position = self._place(label, capacity, rule, generator)
            self.offered[label] += 1
            if position is not None:
                self.put(position, task, row, label, None if scores is None else scores[i])

    def _place(
        self, label: int, capacity: int, rule: Rule, generator: torch.Generator
    ) -> int | None:
        """Where the next image goes, `len(self)` for a new place; None: nowhere."""
        mine = [] if rule == "reservoir" else self.of_class(label)
        if len(mine if rule == "per_class" else self.rows) < capacity:
            return len(self)
        if rule == "reservoir":
            drawn = uniform(self.offered.total() + 1, generator)
            return drawn if drawn < capacity else None
        if rule == "balanced":
            largest = most_frequent(self.labels)
            self.largest_once |= set(largest)
            if label not in self.largest_once:
                return choose(self.of_class(choose(largest, generator)), generator)
        drawn = uniform(self.offered[label] + 1, generator)
        return mine[drawn] if drawn < len(mine) else None

    def put(
        self, position: int, task: int, row: int, label: int, scores: Tensor | None = None
    ) -> None:
        """Place an image in the stead of another, or at the end (`position = len(self)`)."""
        new = position == len(self)
        for held, value in ((self.tasks, task), (self.rows, row), (self.labels, label)):
            held[position : position + 1] = [value]
        if scores is None:
            return
        width = len(scores)
        held = scores.new_empty(0, width) if self.scores is None else self.scores
        if width > held.shape[1]:
            held = F.pad(held, (0, width - held.shape[1]), value=ABSENT)
        self.scores = torch.cat([held, scores[None]]) if new else held
        self.scores[position] = scores

    def keep(self, positions: Sequence[int]) -> None:
        """Only the images at `positions`, in that order."""
        for name in ("tasks", "rows", "labels"):
            held = getattr(self, name)
            setattr(self, name, [held[i] for i in positions])
        self.scores = None if self.scores is None else self.scores[list(positions)]

    def of_class(self, label: int) -> list[int]:
        """Positions of the images of one class."""
        return [i for i, held in enumerate(self.labels) if held == label]

    # ------------------------------------------------------------------ seeing them again

    def draw(self, size: int, generator: torch.Generator) -> list[int]:
        """`size` different positions, or all of fewer, in random order."""
        return sample(len(self), min(size, len(self)), generator)

    def images(
        self, positions: Sequence[int], readers: Mapping[int, Reader], draws: int | None
    ) -> Tensor:
        """Images [n, 3, H, W] at `positions`, augmented anew.

        Args:
            readers: `Task.again` by index of the task.
            draws: number of the random draws of the augmentation; None: the test pipeline.
        """
        by_task: dict[int, list[int]] = {}
        for place, position in enumerate(positions):
            by_task.setdefault(self.tasks[position], []).append(place)
        parts = [
            readers[task](torch.tensor([self.rows[positions[i]] for i in places]), draws)
            for task, places in by_task.items()
        ]
        order = torch.tensor([i for places in by_task.values() for i in places])
        return torch.cat(parts)[order.argsort().to(parts[0].device)]

    def labels_of(self, positions: Sequence[int]) -> Tensor:
        """Labels int64 [n] of the images at `positions`."""
        return torch.tensor([self.labels[i] for i in positions])

    def report(self) -> dict[str, float]:
        """What is kept, for a result: images, and MiB of them (uint8, as the network sees them)."""
        scores = 0 if self.scores is None else self.scores.nbytes
        size = len(self) * self.pixels + scores
        return {"memory_images": len(self), "memory_mib": size / 2**20}

    def get_extra_state(self) -> dict[str, Any]:
        held: dict[str, Any] = {name: getattr(self, name) for name in FIELDS}
        held = {name: list(v) if isinstance(v, list) else v for name, v in held.items()}
        return held | {"offered": dict(self.offered), "largest": sorted(self.largest_once)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name in FIELDS:
            value = state[name]
            setattr(self, name, list(value) if isinstance(value, list) else value)
        self.offered, self.largest_once = Counter(state["offered"]), set(state["largest"])


def uniform(stop: int, generator: torch.Generator) -> int:
    """A whole number from 0 to `stop - 1`; `generator` is on the CPU."""
    return int(torch.randint(stop, (1,), generator=generator))


def sample(count: int, size: int, generator: torch.Generator) -> list[int]:
    """`size` different ones of 0..count-1; `generator` is on the CPU."""
    return torch.randperm(count, generator=generator)[:size].tolist()
