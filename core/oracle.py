"""Labels that may be bought while a stream passes: few, counted, and of the present batch alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from driftline.core.errors import UserError


class Oracle:
    """Sells labels of the images of the present batch, up to a budget.

        with oracle.batch(y):                       # whoever has the stream: the runner
            method.adapt(x)                         # in it: oracle.ask([0, 5]) -> labels [2]

    Where labels take time, a method keeps the images that it asks about, each with the number of
    its order, and takes the labels when they are there; `ask` is the two in one:

        first, second = oracle.order([0, 5])
        labels = oracle.delivered()                 # {number: label}, of earlier batches too

    A label of -1 is paid, too: the image is of no class of the network.

    Args:
        budget: labels in all (a whole number), or their share of the images of the stream (a
            fraction); None: as many as are asked for.
        images: of the stream, for a share.
        delay: batches from the one of an image to the one in which its label is there.
    """

    def __init__(self, budget: float | None = None, images: int = 0, delay: int = 0) -> None:
        self.budget = round(budget * images) if isinstance(budget, float) else budget
        self.bought = self.seen = 0  # labels; images that came by
        self.delay, self._batches = delay, 0
        self._orders = 0
        self._due: list[tuple[int, int, int]] = []  # batch in which it is there, number, label
        self._labels: Tensor | None = None  # of the present batch; None: nothing is for sale
        self._known: set[int] = set()  # positions in it that are paid

    @contextmanager
    def batch(self, labels: Tensor) -> Iterator[None]:
        """Inside, `labels` int64 [B] are for sale; outside, none are."""
        self._labels, self.seen = labels, self.seen + len(labels)
        try:
            yield
        finally:
            self._labels, self._known = None, set()
            self._batches += 1

    @property
    def left(self) -> int:
        """How many labels more may be bought of this batch."""
        here = 0 if self._labels is None else len(self._labels) - len(self._known)
        return here if self.budget is None else min(here, self.budget - self.bought)

    def ask(self, positions: Sequence[int]) -> Tensor:
        """Labels int64 [n] of the images at `positions` in the present batch; each is paid once.

        Raises:
            UserError: for more than are `left`; none of them is bought then. Where labels come
                later.
        """
        if self.delay:
            raise UserError(
                f"scenario.label_delay={self.delay}: this method needs labels at once; one that "
                "can wait calls oracle.order and oracle.delivered"
            )
        return self._sell(positions)

    def order(self, positions: Sequence[int]) -> list[int]:
        """Buy the labels of the images at `positions` in the present batch; each is paid once.

        Returns:
            Numbers, one an image, under which `delivered` hands out the labels.

        Raises:
            UserError: as `ask`.
        """
        labels, first = self._sell(positions).tolist(), self._orders
        self._orders += len(labels)
        numbers = list(range(first, self._orders))
        there = self._batches + self.delay
        self._due += [(there, number, label) for number, label in zip(numbers, labels, strict=True)]
        return numbers

    def delivered(self) -> dict[int, int]:
        """Labels that are there by now, under the numbers of their orders; each once.

        Nothing outside a batch: whoever adapts to other images there gets no label.
        """
        if self._labels is None:
            return {}
        there = [order for order in self._due if order[0] <= self._batches]
        self._due = self._due[len(there) :]
        return {number: label for _, number, label in there}

    def _sell(self, positions: Sequence[int]) -> Tensor:
        new = set(positions) - self._known
        if self._labels is None or len(new) > self.left:
            raise UserError(
                f"{len(new)} labels are asked for and {self.left} are left "
                f"(scenario.label_budget: {'none' if self.budget is None else self.budget}): a "
                "method asks for at most oracle.left, while a batch is adapted to"
            )
        self._known |= new
        self.bought += len(new)
        return self._labels[torch.tensor(positions, dtype=torch.int64, device=self._labels.device)]

    def report(self) -> dict[str, float]:
        """Labels that were bought, and their share of the images that came by."""
        share = self.bought / max(1, self.seen)
        return {"labels_bought": float(self.bought), "labels_share": share}

    def snapshot(self) -> dict[str, Any]:
        counts = {"bought": self.bought, "seen": self.seen, "batches": self._batches}
        return {**counts, "orders": self._orders, "due": list(self._due)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.bought, self.seen = state["bought"], state["seen"]
        self._batches, self._orders = state["batches"], state["orders"]
        self._due = list(state["due"])
