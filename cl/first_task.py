"""Methods that tune the network on the first task alone and keep statistics from then on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone, weights_hash
from driftline.core.errors import Diverged
from driftline.core.ranges import CountOrZero
from driftline.core.strategy import CLStrategy
from driftline.core.stream import Batch, Task
from driftline.parts.adapters.bank import AdapterBank
from driftline.parts.adapters.plan import Plan
from driftline.parts.heads import CosineHead, freeze_pretrained_head
from driftline.parts.modes import evaluation_mode
from driftline.parts.optim import FirstOptim
from driftline.parts.statistics import check_finite

PLAIN, TUNED = "plain", "tuned"  # the network as it is, and with what the first task tuned


class FirstTask(CLStrategy):
    """Adapters (or a copy of the network) and a head learn by cross-entropy on the first task.

    The head is thrown away. A subclass says which features it reads (`reads`), what it keeps of
    them (`end_task`, with `measured`) and how it scores (`classify`).

    Args:
        adapter: what learns on the first task; None: a copy of the whole network.
        epochs: passes over the training images of the first task; 0: nothing is tuned.
        optim: of the groups `tuned` and `head`, biases included.
    """

    needs = frozenset({"features"})
    unmergeable = "it learns in the first task alone"

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        adapter: Plan | None,
        epochs: CountOrZero,
        optim: FirstOptim,
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.adapter, self.epochs, self.tuning_epochs = adapter, epochs, epochs
        self.optim = optim
        self.reads = [TUNED if epochs else PLAIN]

        backbone.eval().requires_grad_(False)
        self.tuning_head: nn.Module | None = None  # while the first task lasts
        self.bank: AdapterBank | None = None
        self.copy: Backbone | None = None
        if epochs and adapter is None:
            self.copy = deepcopy(backbone).requires_grad_(True)
            freeze_pretrained_head(self.copy)
        elif epochs and adapter is not None:
            self.bank = adapter.bank(backbone, calibrates=True)
        self._extractors: dict[str, str] = {}

    # ------------------------------------------------------------------ tasks

    def make_tuning_head(self, classes: int, generator: torch.Generator) -> nn.Module:
        """The head of the first task: features [B, D] -> scores [B, classes]."""
        return CosineHead(cast(Backbone, self.backbone).dim, classes, generator)

    def grow(self, task: Task) -> None:
        if task.index > 0 or not self.tuning_epochs:
            self.epochs, self.tuning_head, self.optimizer = 0, None, None
            self._freeze()
            return
        draw = self.rng("init")
        if self.adapter is not None and self.bank is not None:
            self.adapter.add(self.bank, TUNED, draw)
        head = self.make_tuning_head(len(task.classes), draw)
        self.tuning_head = head.to(self.device)
        self.optimizer = self.optim.optimizer(
            {"tuned": self._tuned(), "head": head.parameters()},
            self.bank.second_factors(TUNED) if self.bank is not None else (),
        )

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if task.index == 0 and self.epochs and len(task.classes) == 1:
            warnings.warn(
                "the first task has one class: its loss is 0 and nothing is tuned; let the first "
                "task have more (scenario.base)",
                stacklevel=2,
            )
        if self.adapter is not None and self.bank is not None and self.optimizer is not None:
            self.adapter.calibrate(self.bank, TUNED, task, lambda batch: self._loss(batch)[0])

    def begin_epoch(self, task: Task, epoch: int) -> None:
        if self.optimizer is not None:
            self.optim.set_rates(self.optimizer, epoch, self.tuning_epochs)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step of the tuning; returns loss and accuracy in percent.

        Raises:
            Diverged: for a loss that is not finite, before the parameters change.
        """
        self._extractors = {}
        self.train()
        self.backbone.eval()
        loss, scores = self._loss(batch)
        self.optim.step(self.optimizer, loss, lambda: self._loss(batch)[0])
        right = scores.detach().argmax(1) == batch.y
        return {"loss": loss.detach(), "acc": 100 * right.float().mean()}

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss [] and scores [B, C] of the head that is thrown away."""
        assert self.tuning_head is not None
        scores = self.tuning_head(self.features(batch.x, TUNED))
        return F.cross_entropy(scores, batch.y), scores

    def measured(self, task: Task) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Freezes what was tuned; the training images of `task`, batch by batch.

        Returns:
            features [B, D] under each extractor of `reads`, and labels [B].
        """
        self._freeze()
        self._extractors = {}
        for batch in task.fit():
            batch = batch.to(self.device)
            yield list(self.embed(batch.x, self.reads)), batch.y

    def collected(self, task: Task) -> tuple[Tensor, Tensor]:
        """All that `measured` gives for the first of `reads`: features [N, D], labels [N].

        Raises:
            Diverged: for a feature that is not finite, naming the class.
        """
        dim = cast(Backbone, self.backbone).dim
        rows = [torch.zeros(0, dim, device=self.device)]
        labels = [torch.zeros(0, dtype=torch.int64, device=self.device)]
        for features, y in self.measured(task):
            self.check(features[0], y)
            rows.append(features[0])
            labels.append(y)
        return torch.cat(rows), torch.cat(labels)

    def check(self, features: Tensor, y: Tensor) -> None:
        """Whether features [B, D] of images of the classes y [B] are finite.

        Raises:
            Diverged: if not, naming the class and, where something was tuned, the rate.
        """
        try:
            check_finite(features, y)
        except Diverged as error:
            if not self.tuning_epochs:
                raise
            raise Diverged(
                f"{error}; or lower strategy.optim.lr (now {self.optim.lr:g})"
            ) from error

    def _freeze(self) -> None:
        if self.bank is not None:
            self.bank.freeze(TUNED)
        elif self.copy is not None:
            self.copy.eval().requires_grad_(False)

    def _tuned(self) -> list[nn.Parameter]:
        """What the first task tunes, without the head."""
        if self.bank is not None:
            return self.bank.parameters_of(TUNED)
        if self.copy is None:
            return []
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
        if name == PLAIN:
            return cast(Backbone, self.backbone).frozen_features(x)
        if self.bank is not None:
            return self.bank.features(x, TUNED)
        assert self.copy is not None
        return self.copy.features(x)

    def extractors(self) -> Mapping[str, str]:
        if not self._extractors:
            tuned = self.bank.sets[TUNED] if self.bank is not None else self.copy
            modules = {PLAIN: self.backbone, TUNED: tuned}
            self._extractors = {
                n: weights_hash(cast(nn.Module, modules[n]).state_dict()) for n in self.reads
            }
        return self._extractors

    @torch.no_grad()
    def embed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        with evaluation_mode(self):
            return torch.stack([self.features(x, name) for name in names])

    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen] for x float [B, 3, H, W] in [0, 1]."""
        return self.classify(dict(zip(self.reads, self.embed(x, self.reads), strict=True)))
