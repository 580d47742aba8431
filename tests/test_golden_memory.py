"""Methods with a memory of images: the memory itself, RoTTA, SoTTA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from driftline.core.strategy import TTAStrategy
from driftline.parts.memory import Memory, choose


def image(value: float) -> Tensor:
    return torch.full((3, 4, 4), float(value))


def filled() -> Memory:
    """Four images whose pixels are their number; of the classes 2, 0, 2, 1."""
    memory = Memory()
    for number, label in enumerate((2, 0, 2, 1)):
        memory.insert(image(number), label, number / 10)
        memory.grow_older()
    return memory


def numbers(images: Tensor) -> list[float]:
    return images.mean((1, 2, 3)).tolist()


def test_memory_is_a_list_of_images() -> None:
    memory = filled()
    assert memory.ages == [4, 3, 2, 1]
    assert memory.by_class() == [1, 3, 0, 2]
    assert memory.of_class(2, 1) == [0, 2, 3]
    assert (memory.counts()[2], memory.counts()[7], memory.largest()) == (2, 0, [2])
    memory.remove(0)
    assert memory.largest() == [0, 1, 2]
    memory.insert(image(9), 3)
    memory.replace(1, image(8), 5, 0.5)
    assert numbers(memory.images()) == [1, 8, 3, 9]
    assert numbers(memory.images([3, 0])) == [9, 1]
    assert (memory.labels, memory.scores) == ([0, 5, 1, 3], [0.1, 0.5, 0.3, 0.0])
    assert memory.ages == [3, 0, 1, 0]
    assert memory.pool is not None and len(memory.pool) == 4  # the free place was used again


def test_memory_keeps_copies() -> None:
    memory, one = Memory(), image(1)
    memory.insert(one, 0)
    one.zero_()
    memory.images().zero_()
    assert numbers(memory.images()) == [1]


class Keeper(TTAStrategy):
    """Nothing but a memory."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1))
        self.memory = Memory()


def test_memory_is_saved_restored_and_reset() -> None:
    keeper = Keeper()
    keeper.begin_stream()
    keeper.memory.insert(image(1), 4, 0.25)
    one = keeper.snapshot()
    other = Keeper()
    other.memory = filled()
    other.restore(one)
    assert numbers(other.memory.images()) == [1]
    assert (other.memory.labels, other.memory.scores, len(other.memory)) == ([4], [0.25], 1)
    other.memory.insert(image(2), 0)  # what is restored is no alias of the snapshot
    assert len(keeper.memory) == 1 and one["tensors"]["memory._extra_state"]["labels"] == [4]
    keeper.reset()
    assert len(keeper.memory) == 0 and keeper.memory.pool is None
    assert keeper.memory.largest() == []


def test_choices_are_the_callers() -> None:
    one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    drawn = [choose([5, 6, 7], one) for _ in range(300)]
    assert drawn == [choose([5, 6, 7], other) for _ in range(300)]
    assert all(80 <= drawn.count(item) <= 120 for item in (5, 6, 7))
