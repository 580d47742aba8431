"""Random tensors that follow from a seed and never learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

Draw = tuple[tuple[int, ...], float]  # a shape, and the bound c of U(-c, c)


class Seeded:
    """Tensors drawn one after the other; every adapter that asks for the same has the same.

    They are no part of an adapter's state: copies share them, saved files have none of them, and a
    run that goes on draws them again. Draws of the CPU are the same on every device.

    Args:
        seed: of the generator.
        draws: shape and bound of each.
    """

    def __init__(self, seed: int, draws: Sequence[Draw]) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._first = [torch.empty(s).uniform_(-c, c, generator=generator) for s, c in draws]
        self._cast: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Seeded:
        return self

    def like(self, x: Tensor) -> list[Tensor]:
        """The tensors on the device and in the type of `x`."""
        key = x.device, x.dtype
        if key not in self._cast:
            self._cast[key] = [t.to(x) for t in self._first]
        return self._cast[key]


_drawn: WeakValueDictionary[Any, Seeded] = WeakValueDictionary()


def seeded(seed: int, *draws: Draw) -> Seeded:
    """The `Seeded` of these arguments, which is made when nobody holds it yet."""
    one = _drawn.get((seed, draws))
    if one is None:
        one = _drawn[seed, draws] = Seeded(seed, draws)
    return one
