"""Images that a method keeps: with label, score and age each, as part of a module's state.

    self.memory = Memory()
    if len(self.memory) == capacity:
        self.memory.remove(choose(self.memory.of_class(label), self.rng("memory")))
    self.memory.insert(image, label, score)

A memory stores and counts; which item enters or goes is the rule of the method. Images stay on the
device, everything that rules read is on the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor, nn


class Memory(nn.Module):
    """A list of images of one size; `labels`, `scores` and `ages` are lists in the same order."""

    pool: Tensor | None  # [slots, 3, H, W]; doubles when it is full
    labels: list[int]
    scores: list[float]
    ages: list[int]  # calls of `grow_older` since the image came

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pool", None)
        self.slots: list[int] = []  # where in the pool each image lies
        self._free: list[int] | None = None  # slots without one, a heap; None: to be looked up
        self.labels, self.scores, self.ages = [], [], []

    def __len__(self) -> int:
        return len(self.slots)

    def insert(self, image: Tensor, label: int, score: float = 0.0) -> None:
        """Put a copy of `image` [3, H, W] at the end, with age 0."""
        size = 0 if self.pool is None else len(self.pool)
        if len(self) == size:
            more = image.new_zeros(max(1, size), *image.shape)
            self.pool = more if self.pool is None else torch.cat([self.pool, more])
            self._free = [*range(size, len(self.pool))]
        assert self.pool is not None
        if self._free is None:
            self._free = sorted(set(range(len(self.pool))) - set(self.slots))
        slot = heappop(self._free)
        self.pool[slot] = image
        self.slots.append(slot)
        self.labels.append(label)
        self.scores.append(score)
        self.ages.append(0)

    def remove(self, position: int) -> None:
        """Later images move up by one."""
        if self._free is not None:
            heappush(self._free, self.slots[position])
        for held in (self.slots, self.labels, self.scores, self.ages):
            held.pop(position)

    def replace(self, position: int, image: Tensor, label: int, score: float = 0.0) -> None:
        """Put a copy of `image` [3, H, W] at `position`, with age 0; the one there goes."""
        assert self.pool is not None
        self.pool[self.slots[position]] = image
        self.labels[position], self.scores[position], self.ages[position] = label, score, 0

    def grow_older(self) -> None:
        """Every age by 1."""
        self.ages = [age + 1 for age in self.ages]

    def images(self, positions: Sequence[int] | None = None) -> Tensor:
        """Copies [n, 3, H, W] of the images at `positions`, in that order; None: of all."""
        assert self.pool is not None, "an empty memory has no images"
        chosen = range(len(self)) if positions is None else positions
        return self.pool[torch.tensor([self.slots[i] for i in chosen], device=self.pool.device)]

    def of_class(self, *labels: int) -> list[int]:
        """Positions of the images of these classes, class by class, in each the oldest first."""
        return [i for label in labels for i, held in enumerate(self.labels) if held == label]

    def by_class(self) -> list[int]:
        """Every position, class by class in rising order, in each the oldest first."""
        return sorted(range(len(self)), key=self.labels.__getitem__)

    def counts(self) -> Counter[int]:
        """Number of images by label; 0 for a label that is not there."""
        return Counter(self.labels)

    def largest(self) -> list[int]:
        """The labels that most images have, in rising order; empty without images."""
        return most_frequent(self.labels)

    def get_extra_state(self) -> dict[str, Any]:
        names = ("slots", "labels", "scores", "ages")
        return {name: list(getattr(self, name)) for name in names}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, held in state.items():
            setattr(self, name, list(held))
        self._free = None


def most_frequent(labels: Sequence[int]) -> list[int]:
    """The labels that stand there most often, in rising order; empty for none."""
    counts = Counter(labels)
    most = max(counts.values(), default=0)
    return sorted(label for label, n in counts.items() if n == most)


def choose(items: Sequence[int], generator: torch.Generator) -> int:
    """One of `items`, each as likely as the others; `generator` is on the CPU."""
    return items[int(torch.randint(len(items), (1,), generator=generator))]
