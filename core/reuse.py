"""Answers beside a stream, counted again only where the method's state has changed.

What `predict` says follows from the method's snapshot and the images alone: tests/test_contract.py
tries it on every method. So the answers to fixed images are the same as long as the snapshot is,
bit by bit. Left out are random generators, of which `predict` draws nothing, and counters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from driftline.core.exact import content
from driftline.core.strategy import Strategy, TTAStrategy

Leaf = tuple[str, Any]  # where a value stands in a state, and the value


class Answered:
    """Images right and images seen, by the name of their set, of the state that answered last.

    States are compared by SHA-256, value by value and up to the first that differs: a method that
    moves pays for one tensor. One that has moved and then stands still is asked once more than it
    need be, since only then all of its state is known.
    """

    def __init__(self) -> None:
        self.counts: dict[str, tuple[int, int]] = {}
        self._digests: list[str] = []  # of the state, in its order; perhaps of its beginning alone
        self._whole = False  # whether of all of it

    def now(self, state: Iterable[Leaf]) -> None:
        """Forget all counts if `state` is not the one that they belong to."""
        before, whole = self._digests, self._whole
        self._digests, self._whole = [], True
        for digest in map(_digest, state):
            at = len(self._digests)
            self._digests.append(digest)
            if at < len(before) and digest != before[at]:
                self._whole = False
                break
        if not (whole and self._whole and len(before) == len(self._digests)):
            self.counts = {}

    def snapshot(self) -> dict[str, Any]:
        counts = {name: list(pair) for name, pair in self.counts.items()}
        return {"counts": counts, "digests": list(self._digests), "whole": self._whole}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.counts = {name: (pair[0], pair[1]) for name, pair in state["counts"].items()}
        self._digests, self._whole = list(state["digests"]), state["whole"]


def predicting(strategy: Strategy) -> Iterator[Leaf]:
    """What `predict` may depend on: the snapshot without generators and counters."""
    yield from _predicting(strategy, strategy.snapshot())


def _predicting(strategy: Strategy, state: Mapping[str, Any]) -> Iterator[Leaf]:
    counters = strategy.counters if isinstance(strategy, TTAStrategy) else ()
    yield from leaves({k: v for k, v in state["tensors"].items() if k not in counters})
    for name, one in strategy.strategies().items():
        yield name, None
        yield from _predicting(one, state["inner"][name])
    # Behind the tensors: where optimisers have moved, so have these.
    yield from leaves({k: state[k] for k in ("empty", "learning", "optimizers")})


def leaves(value: Any, at: str = "") -> Iterator[Leaf]:
    """The tensors and plain values in nested mappings and sequences, in their order."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{at}/{key}")
    elif isinstance(value, list | tuple):
        yield at, len(value)
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{at}/{index}")
    else:
        yield at, value


def _digest(leaf: Leaf) -> str:
    at, value = leaf
    if not isinstance(value, Tensor):
        return hashlib.sha256(f"{at} {value!r}".encode()).hexdigest()[:32]
    digest = hashlib.sha256(f"{at} {value.dtype} {tuple(value.shape)}".encode())
    digest.update(content(value))
    return digest.hexdigest()[:32]
