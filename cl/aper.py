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

import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone, weights_hash
from driftline.core.errors import Diverged
from driftline.core.ranges import Count
from driftline.core.strategy import CLStrategy
from driftline.core.stream import Batch, Task
from driftline.parts.adapters.bank import AdapterBank
from driftline.parts.adapters.plan import Plan
from driftline.parts.heads import CosineHead, PrototypeHead, freeze_pretrained_head
from driftline.parts.modes import evaluation_mode
from driftline.parts.optim import Optim

NAME = "tuned"  # of the one set of adapters


class APER(CLStrategy):
    """Plain and once tuned features side by side, nearest class mean by cosine.

    Args:
        adapter: what learns on the first task; None: a copy of the whole network.
        epochs: passes over the training images of the first task; the others need none.
        optim: of the groups `tuned` and `head`, biases included.
    """

    needs = frozenset({"features"})

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        adapter: Plan | None,
        epochs: Count,
        optim: Optim,
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.adapter, self.epochs, self.tuning_epochs = adapter, epochs, epochs
        self.optim = optim

        backbone.eval().requires_grad_(False)
        self.head = PrototypeHead(2 * backbone.dim)
        self.tuning_head: CosineHead | None = None  # while the first task lasts
        self.bank: AdapterBank | None = None
        self.copy: Backbone | None = None
        if adapter is None:
            self.copy = deepcopy(backbone).requires_grad_(True)
            freeze_pretrained_head(self.copy)
        else:
            self.bank = adapter.bank(backbone)
        self._extractors: dict[str, str] = {}

    # ------------------------------------------------------------------ tasks

    def grow(self, task: Task) -> None:
        self.head.grow(task.classes.stop)
        if task.index > 0:
            self.epochs, self.tuning_head, self.optimizer = 0, None, None
            self._freeze()
            return
        draw = self.rng("init")
        if self.adapter is not None and self.bank is not None:
            self.adapter.add(self.bank, NAME, draw)
        head = CosineHead(cast(Backbone, self.backbone).dim, len(task.classes), draw)
        self.tuning_head = head.to(self.device)
        self.optimizer = self.optim.optimizer(
            {"tuned": self._tuned(), "head": head.parameters()},
            self.bank.second_factors(NAME) if self.bank is not None else (),
        )

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.index == 0 and len(task.classes) == 1:
            warnings.warn(
                "the first task has one class: its loss is 0, so strategy=aper tunes nothing and "
                "equals simplecil; let the first task have more (scenario.base)",
                stacklevel=2,
            )

    def begin_epoch(self, task: Task, epoch: int) -> None:
        if self.optimizer is not None:
            self.optim.set_rates(self.optimizer, epoch, self.tuning_epochs)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the tuning; returns loss and accuracy in percent.

        Raises:
            Diverged: for a loss that is not finite, before the parameters change.
        """
        head = self.tuning_head
        assert head is not None
        self._extractors = {}
        self.train()
        self.backbone.eval()
        scores = head(self.features(batch.x, NAME))
        loss = F.cross_entropy(scores, batch.y)
        self.optim.step(
            self.optimizer,
            loss,
            lambda: F.cross_entropy(head(self.features(batch.x, NAME)), batch.y),
        )
        right = scores.detach().argmax(1) == batch.y
        return {"loss": loss.detach(), "acc": 100 * right.float().mean()}

    @torch.no_grad()
    def end_task(self, task: Task) -> None:
        """Freeze what was tuned and add the training images of `task` to the class means.

        Raises:
            Diverged: for a feature that is not finite.
        """
        self._freeze()
        self._extractors = {}
        for batch in task.fit():
            batch = batch.to(self.device)
            plain, tuned = self.embed(batch.x, ["plain", NAME])
            try:
                self.head.update(torch.cat([plain, tuned], 1), batch.y)
            except Diverged as error:
                raise Diverged(
                    f"{error}; or lower strategy.optim.lr (now {self.optim.lr:g})"
                ) from error

    def _freeze(self) -> None:
        if self.bank is not None:
            self.bank.freeze(NAME)
        elif self.copy is not None:
            self.copy.eval().requires_grad_(False)

    def _tuned(self) -> list[nn.Parameter]:
        """What the first task tunes, without the head."""
        if self.bank is not None:
            return self.bank.parameters_of(NAME)
        assert self.copy is not None
        head = self.copy.head  # the pretrained one, which has no part in features
        pretrained = set() if head is None else {id(p) for p in head.parameters()}
        return [p for p in self.copy.parameters() if id(p) not in pretrained]

    def updated_parameters(self) -> list[Tensor]:
        return [*self._tuned()]

    # ------------------------------------------------------------------ state

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self._extractors = {}

    # ------------------------------------------------------------------ prediction

    def features(self, x: Tensor, name: str) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D]; `name` is `plain` or `tuned`."""
        if name == "plain":
            return cast(Backbone, self.backbone).features(x)
        if self.bank is not None:
            return self.bank.features(x, NAME)
        assert self.copy is not None
        return self.copy.features(x)

    def extractors(self) -> Mapping[str, str]:
        if not self._extractors:
            tuned = self.bank.sets[NAME] if self.bank is not None else self.copy
            assert tuned is not None
            modules = {"plain": self.backbone, NAME: tuned}
            self._extractors = {n: weights_hash(m.state_dict()) for n, m in modules.items()}
        return self._extractors

    @torch.no_grad()
    def embed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        with evaluation_mode(self):
            return torch.stack([self.features(x, name) for name in names])

    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.head(torch.cat([features["plain"], features[NAME]], 1))

    def predict(self, x: Tensor) -> Tensor:
        """Cosines [B, C_seen] for x float [B, 3, H, W] in [0, 1]."""
        plain, tuned = self.embed(x, ["plain", NAME])
        return self.classify({"plain": plain, NAME: tuned})
