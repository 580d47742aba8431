"""Joint training: the upper bound, from the pretrained weights on the union of the tasks seen.

Settings: RanPAC/RanPAC 012927f, joint full fine-tuning and joint linear probe. Cross-entropy over
all classes seen, constant rate. With `when=per_task` the diagonal of the accuracy matrix is the
R* that intransigence needs (T trainings).

Deviations: aimagelab/mammoth e75a491 augments once, when it collects the images; here every epoch
augments anew. Images of all tasks are mixed within a batch. Training happens at the end of a task,
so an interrupted one starts this task's training again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.finetune import Finetune, Trained
from driftline.core.ranges import Count
from driftline.core.stream import OWN_CLASSES, Batch, Task
from driftline.parts.heads import ExpandingLinear
from driftline.parts.optim import Optim


class Joint(Finetune):
    """Options as in `Finetune`, and:

    Args:
        when: `per_task`: after every task, on all tasks so far. `final_only`: once, after the
            last; until then predictions come from the untrained head, so of the accuracy matrix
            only the last row, hence `acc_last`, has a meaning.
    """

    needs = Finetune.needs | {OWN_CLASSES}
    averageable = False
    unmergeable = "it learns all tasks so far together"

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optim: Optim,
        freeze_bn: bool,
        trains: Trained,
        when: Literal["per_task", "final_only"],
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optim=optim,
            loss_scope="seen",
            freeze_bn=freeze_bn,
            trains=trains,
            adapter=None,
            penalty=None,
        )
        self.epochs = 0  # the runner hands over nothing: all training is in `end_task`
        self.when = when
        # Not part of the state: a resumed run is built from the same pretrained weights.
        self._pretrained = {
            k: v.to("cpu", copy=True) for k, v in backbone.state_dict().items() if trains == "all"
        }

    def grow(self, task: Task) -> None:
        self.extend(task)
        self.tasks_begun.append(task)  # with its images

    def begin_task(self, task: Task) -> None:
        self.grow(task)

    def end_task(self, task: Task) -> None:
        """Start again from the pretrained weights and train on every task begun so far."""
        if self.when == "final_only" and self.seen < self.num_classes:
            return
        if self._pretrained:
            self.backbone.load_state_dict(self._pretrained)
        self.head = ExpandingLinear(self.head.weight.shape[1]).to(self.device)
        self.head.grow(self.seen, self.rng("init"))
        self.make_optimizer(task)
        sizes: dict[int, int] = {}  # found anew each time: a resumed run could not know them
        for epoch in range(self.train_epochs):
            self.begin_epoch(task, epoch)
            for batch in mixed(self.tasks_begun, epoch, self.rng("mix"), sizes):
                self.observe(batch.to(self.device))
        self.optimizer = None

    def updated_parameters(self) -> Iterable[Tensor]:
        return [p for p in self.parameters() if p.requires_grad]


class _Pool:
    """The images of one task in the order in which its batches bring them."""

    def __init__(self, batches: Iterator[Batch | None]) -> None:
        self.batches = (b for b in batches if b is not None)
        self.ready: Batch | None = next(self.batches, None)
        self.given = 0

    def take(self, count: int) -> list[Batch]:
        """The next `count` images, fewer at the end, as parts to be joined."""
        parts = []
        while count > 0 and self.ready is not None:
            part = Batch(*(t[:count] for t in self.ready))
            left = Batch(*(t[count:] for t in self.ready))
            self.ready = left if len(left.y) else next(self.batches, None)
            count, self.given = count - len(part.y), self.given + len(part.y)
            parts.append(part)
        return parts


def _join(parts: Sequence[Batch]) -> Batch:
    return Batch(*(torch.cat(t) for t in zip(*parts, strict=True)))


def mixed(
    tasks: Sequence[Task], epoch: int, generator: torch.Generator, sizes: dict[int, int]
) -> Iterator[Batch]:
    """One epoch over the union of `tasks`, in batches as large as those of the largest task.

    Each task delivers its images in its own random order; a random arrangement of task numbers
    decides whose image is next, which makes the union uniformly shuffled with one batch of every
    task in memory.

    Args:
        sizes: images per task, filled here. In the first epoch a task counts as `steps` full
            batches, so the batches of that epoch can come out a little smaller.
    """
    pools = [_Pool(task.train(epoch)) for task in tasks]
    full = [len(p.ready.y) if p.ready is not None else 0 for p in pools]
    count = torch.tensor(
        [sizes.get(t.index, t.steps * n) for t, n in zip(tasks, full, strict=True)]
    )
    turns = torch.arange(len(tasks)).repeat_interleave(count)
    turns = turns[torch.randperm(len(turns), generator=generator)]
    size = max(full, default=0) or 1
    for chunk in turns.split(size):
        wanted = chunk.bincount(minlength=len(tasks)).tolist()
        parts = [b for pool, n in zip(pools, wanted, strict=True) for b in pool.take(n)]
        if parts:
            yield _join(parts)
    for pool in pools:  # left over only if images were skipped in a first batch
        while parts := pool.take(size):
            yield _join(parts)
    sizes.update({t.index: p.given for t, p in zip(tasks, pools, strict=True)})
