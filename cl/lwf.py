"""LwF: the answers of the old network on the new images are kept by distillation.

Paper: Li and Hoiem, "Learning without Forgetting", TPAMI 2017, arXiv 1606.09282. Official code of
the default: aimagelab/mammoth e75a491, `models/lwf.py`.

From the second task on: the head alone is trained on the new classes (warm-up, plain SGD), the
scores of the old classes are recorded for every training image without augmentation, then the whole
network learns by `CE over all classes seen + alpha * distillation`, the cross-entropy between the
recorded and the present probabilities of the old classes, both softened by tau. Mammoth raises
probabilities to 1/tau and normalises them again, which is the same as to divide scores by tau.

Deviations: the recorded images go through the test pipeline (mammoth: none at all). Warm-up epochs
are further epochs of the stream, so that they draw other augmentations than the training. No second
network is kept; the recorded scores are part of a checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.cl.finetune import Finetune, Penalty
from driftline.core.ranges import CountOrZero, NonNegative, Positive
from driftline.core.stream import Batch, Task
from driftline.parts.modes import evaluation_mode
from driftline.parts.objectives import scoped_cross_entropy
from driftline.parts.optim import Optim
from driftline.parts.store import Store


class LwF(Penalty):
    """Distillation of the old classes.

    Args:
        alpha: factor of the distillation.
        tau: temperature (`softmax_temp` in mammoth).
        warmup_epochs: of the head alone, at its initial rate; None: as many as `epochs`.
    """

    def __init__(
        self, *, alpha: NonNegative, tau: Positive, warmup_epochs: CountOrZero | None
    ) -> None:
        super().__init__()
        self.alpha, self.tau, self.warmup_epochs = alpha, tau, warmup_epochs
        self.old = Store()  # of the current task: `index` int64 [N], ascending; `scores` [N, C_old]

    def begin_task(self, method: Finetune, task: Task, known: int) -> None:
        if known:
            self._warm_up(method, task)
            self._record(method, task, known)

    def _warm_up(self, method: Finetune, task: Task) -> None:
        """Train the head on the classes of `task`, everything else as it is."""
        optim = Optim(kind="sgd", lr=method.optim.rate("head"))
        optimizer = optim.optimizer({"head": method.head.parameters()})
        first = method.train_epochs
        epochs = first if self.warmup_epochs is None else self.warmup_epochs
        with evaluation_mode(method):
            for epoch in range(first, first + epochs):
                for batch in task.train(epoch):
                    if batch is None:
                        continue
                    batch = batch.to(method.device)
                    with torch.no_grad():
                        features = method.features(batch.x)
                    loss = scoped_cross_entropy(method.head(features), batch.y, task.own)
                    optim.step(optimizer, loss)

    @torch.no_grad()
    def _record(self, method: Finetune, task: Task, known: int) -> None:
        """Note the scores of the `known` old classes for every training image."""
        index, scores = [], []
        with evaluation_mode(method):
            for batch in task.fit():
                index.append(batch.index.to(method.device))
                features = method.features(batch.x.to(method.device))
                scores.append(method.head(features)[:, :known])
        order = torch.cat(index).argsort()
        self.old.put("index", torch.cat(index)[order])
        self.old.put("scores", torch.cat(scores)[order])

    def loss(self, scores: Tensor, batch: Batch) -> Tensor | float:
        """`alpha` times the cross-entropy between old and present answers, both softened."""
        if "index" not in self.old:  # the first task
            return 0.0
        rows = torch.searchsorted(self.old["index"], batch.index)
        target = (self.old["scores"][rows] / self.tau).softmax(1)
        mine = scores[:, : target.shape[1]] / self.tau
        return self.alpha * F.cross_entropy(mine, target)
