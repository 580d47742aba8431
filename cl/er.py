"""Experience replay: every batch is joined by images of a small memory.

Papers: Ratcliff, Psychological Review 1990; Chaudhry et al., "On Tiny Episodic Memories in
Continual Learning", 2019, arXiv 1902.10486. Official code of the default: aimagelab/mammoth
e75a491, `models/er.py`, `utils/buffer.py`.

Per step: as many images as `replay_batch` are drawn from the memory without replacement (fewer
while it holds fewer), augmented anew and put behind the batch; one forward pass, one mean of the
cross-entropy over all. After the step the batch, not the drawn images, is offered to the memory.

Deviations that change no number: the memory holds which images, not their pixels (see
`parts/buffer.py`). Deviations that do: random draws come from the run's own generators instead of
NumPy's global one; two copies of one image in a draw get the same augmentation.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.finetune import Finetune
from driftline.core.errors import UserError
from driftline.core.ranges import Count, Size
from driftline.core.stream import Batch, Task
from driftline.parts.adapters.plan import Plan
from driftline.parts.buffer import Buffer, Reader, Rule
from driftline.parts.optim import Optim


class ER(Finetune):
    """Fine-tuning on each batch together with images of the memory.

    Args:
        num_classes, epochs, optim, freeze_bn, adapter: as in `Finetune`.
        loss_scope: `all`: classes of the future are in the softmax; `seen`: every class so far.
        capacity: images in the memory, in all or of each class.
        insertion: `reservoir`, `balanced` or, with `capacity` images of each class, `per_class`;
            see `Buffer.offer`.
        replay_batch: images drawn from the memory a step.

    Raises:
        UserError: for a memory that is smaller than the number of classes.
    """

    draws = 1  # batches from the memory a step

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optim: Optim,
        loss_scope: Literal["seen", "all"],
        freeze_bn: bool,
        adapter: Plan | None,
        capacity: Count,
        insertion: Rule,
        replay_batch: Size,
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optim=optim,
            loss_scope=loss_scope,
            freeze_bn=freeze_bn,
            trains="all",
            adapter=adapter,
            penalty=None,
        )
        if insertion != "per_class" and capacity < num_classes:
            raise UserError(
                f"strategy.capacity={capacity} images for {num_classes} classes: some classes "
                f"would have none; set strategy.capacity to {num_classes} or more, or "
                "strategy.insertion=per_class"
            )
        self.capacity, self.replay_batch = capacity, replay_batch
        self.insertion: Rule = insertion
        self.buffer = Buffer()
        self.drawn: list[tuple[list[int], Tensor, Tensor]] = []  # positions, images, labels
        self._task = 0
        self._readers: dict[int, Reader] = {}  # of every task so far

    def grow(self, task: Task) -> None:
        super().grow(task)
        self._task, self._readers[task.index] = task.index, task.again

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step on `batch` and what is drawn beside it; the accuracy is that on `batch`.

        Raises:
            Diverged: for a loss that is not finite, before the parameters change.
        """
        self.drawn = [self._draw() for _ in range(self.draws if len(self.buffer) else 0)]
        logged = super().observe(batch)
        self.remember(batch)
        return logged

    def _draw(self) -> tuple[list[int], Tensor, Tensor]:
        positions = self.buffer.draw(self.replay_batch, self.rng("replay"))
        draws = int(torch.randint(2**31, (), generator=self.rng("augment")))
        x = self.buffer.images(positions, self._readers, draws).to(self.device)
        return positions, x, self.buffer.labels_of(positions).to(self.device)

    def remember(self, batch: Batch, scores: Tensor | None = None) -> None:
        """Offer `batch` to the memory, with scores [B, C] if they are kept."""
        rng = self.rng("buffer")
        self.buffer.offer(batch, self._task, self.capacity, self.insertion, rng, scores)

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        own = len(batch.y)
        for _, x, y in self.drawn:
            batch = batch._replace(x=torch.cat([batch.x, x]), y=torch.cat([batch.y, y]))
        scores, loss, logged = super()._gradients(batch)
        return scores[:own], loss, logged

    def report(self) -> dict[str, float]:
        return super().report() | self.buffer.report()
