"""APER: tune the network once, on the first task; then class means of plain and tuned features.

Paper: Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models:
Generalizability and Adaptivity are All You Need", IJCV 2024, arXiv 2303.07338 (first named ADAM).
Official code: LAMDA-CL/LAMDA-PILOT 5240714, `models/aper_*.py`; settings: zhoudw-zdw/RevisitingCIL.

First task: adapters (or scale and shift, prompts, a copy of the whole network) and a cosine head
learn by cross-entropy. That head is thrown away. From then on nothing is trained: a class is the
mean of [plain feature, tuned feature] of its training images, scores are cosines with it. The two
halves are normalised together, so that the longer one weighs more.

Deviations: the frozen network is in evaluation mode while adapters learn (the official one is in
training mode, which is the same for ViTs without dropout). Means are kept as sums and counts, so a
class that comes back updates its mean; the official code overwrites it. Left out: the BatchNorm
variant for ResNets, and the evaluation after every epoch (a side effect of which, other shuffles,
disappears as well).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.first_task import PLAIN, TUNED, FirstTask
from driftline.core.ranges import Count
from driftline.core.stream import Task
from driftline.parts.adapters.plan import Plan
from driftline.parts.heads import PrototypeHead
from driftline.parts.optim import FirstOptim


class APER(FirstTask):
    """Plain and once tuned features side by side, nearest class mean by cosine.

    Args:
        adapter: what learns on the first task; None: a copy of the whole network.
        epochs: passes over the training images of the first task; the others need none.
        optim: of the groups `tuned` and `head`, biases included.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        adapter: Plan | None,
        epochs: Count,
        optim: FirstOptim,
    ) -> None:
        super().__init__(backbone, seed=seed, adapter=adapter, epochs=epochs, optim=optim)
        self.reads = [PLAIN, TUNED]
        self.head = PrototypeHead(2 * backbone.dim)

    def grow(self, task: Task) -> None:
        self.head.grow(task.classes.stop)
        super().grow(task)

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Freeze what was tuned and add the training images of `task` to the class means.

        Raises:
            Diverged: for a feature that is not finite.
        """
        for features, y in self.measured(task):
            both = torch.cat(features, 1)
            self.check(both, y)
            self.head.update(both, y)

    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        """Cosines [B, C_seen]."""
        return self.head(torch.cat([features[PLAIN], features[TUNED]], 1))
