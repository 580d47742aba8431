"""A continual method is evaluated on the moving average of the weights that it trains.

Paper: Stojanovski et al., "Momentum-based Weight Interpolation of Strong Zero-Shot Models for
Continual Learning", INTERPOLATE at NeurIPS 2022, arXiv 2211.03186. No code is public; the abstract
and a summary were read, and the same average in later code of its authors (student distillation:
`slow = tau * slow + (1 - tau) * fast` after every N-th step). Checked against these few lines.

The method learns as without the rule; its answers are those of the slow weights, which begin where
the trained ones do. Ours: what the method itself sets at the beginning of a task (rows of new
classes, a new adapter, a copied prompt) is set in the average, too, which otherwise would lag by
1 / (1 - decay) steps; buffers (BatchNorm statistics) are the present ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from driftline.core.errors import UserError
from driftline.core.ranges import Count, Unit
from driftline.core.strategy import CLStrategy, TaskWrapper
from driftline.core.stream import Batch, Task
from driftline.parts.store import Store
from driftline.parts.teacher import move_average


class WeightAverage(TaskWrapper):
    """Answers with the average; trains what is inside.

    Args:
        inner: the method inside.
        decay: weight of the old average.
        every: training steps from one update of the average to the next; the first step is one.

    Raises:
        UserError: for a method whose answer holds more than trained weights.
    """

    def __init__(self, *, inner: CLStrategy, decay: Unit, every: Count) -> None:
        super().__init__(inner)
        if not inner.averageable:
            raise UserError(
                f"around=weight_average: {type(inner).__name__} answers with what it makes of its "
                "weights at the end of a task (class means, statistics, merged or retrained "
                "weights), which does not fit an average of them; leave around out, or take a "
                "method that answers with trained weights, such as strategy=finetune or er"
            )
        self.decay, self.every = decay, every
        self.average = Store()  # by the name of the parameter in the method
        self.steps = 0

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state

    def report(self) -> dict[str, float]:
        """Weight of the start in the average, beside what the method reports."""
        updates = -(-self.steps // self.every)
        return super().report() | {"weight_of_start": self.decay**updates}

    def _averaged(self) -> tuple[list[Tensor], list[Tensor]]:
        """The average and the trained weights, in one order."""
        named = [(n, p.detach()) for n, p in self.inner.named_parameters() if n in self.average]
        return [self.average[n] for n, _ in named], [p for _, p in named]

    # ------------------------------------------------------------------ training

    def begin_task(self, task: Task) -> None:
        named = self.inner.named_parameters()
        before = {n: p.detach().clone() for n, p in named if n in self.average}
        super().begin_task(task)
        moved = {id(p) for p in self.inner.updated_parameters()}
        for name, p in self.inner.named_parameters():
            if name in before:
                self.average.put(name, carried(self.average[name], before[name], p.detach()))
            elif id(p) in moved:
                self.average.put(name, p.detach().clone())

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        logged = super().observe(batch)
        if self.steps % self.every == 0:
            move_average(*self._averaged(), self.decay)
        self.steps += 1
        return logged

    # ------------------------------------------------------------------ prediction

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The average stands where the trained weights stand.

        Values are copied, so that what is kept of weights (`kernels/dora.py`) is made again.
        """
        slow, fast = self._averaged()
        kept = [p.clone() for p in fast]
        with torch.no_grad():
            for p, value in zip(fast, slow, strict=True):
                p.copy_(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(fast, kept, strict=True):
                    p.copy_(value)

    def predict(self, x: Tensor) -> Tensor:
        with self._in_place():
            return super().predict(x)

    def extractors(self) -> Mapping[str, str] | None:
        with self._in_place():
            return super().extractors()

    def embed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        with self._in_place():
            return super().embed(x, names)

    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        with self._in_place():
            return super().classify(features)


def carried(average: Tensor, before: Tensor, now: Tensor) -> Tensor:
    """`average` with the values `now` where these are new or other than `before`."""
    begun = now.clone()
    shared = tuple(slice(min(a, b)) for a, b in zip(before.shape, now.shape, strict=True))
    same = begun[shared] == before[shared]
    begun[shared] = torch.where(same, average[shared], begun[shared])
    return begun
