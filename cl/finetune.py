"""Sequential fine-tuning, the lower bound of every table, and the family of penalties around it.

Official code: LAMDA-CL/LAMDA-PILOT 5240714, `models/finetune.py` and `exps/finetune.json`.
Cross-entropy over the current classes only from the second task on (over all of them in the
first, which is the same thing), SGD over backbone and head, no replay, no penalty; prediction
over all classes seen. Mammoth's variant puts all classes of the stream into the softmax.

`trains=head` is the continual linear probe. No official code trains that one task by task; head
and loss are those above, the optimiser's settings those of the joint probe of RanPAC/RanPAC
012927f. The backbone then stays in evaluation mode, so BatchNorm statistics do not drift.

Deviations: the pretrained classifier is left untouched, as PILOT loads none. Rates of backbone
and head may differ. New head rows alone are drawn (see `parts/heads.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone, weights_hash
from driftline.core.errors import UserError
from driftline.core.ranges import Count
from driftline.core.strategy import CLStrategy, Preferred
from driftline.core.stream import BOUNDARIES, Batch, Task
from driftline.parts.adapters.plan import Plan
from driftline.parts.heads import ExpandingLinear, freeze_pretrained_head
from driftline.parts.modes import evaluation_mode
from driftline.parts.norms import batch_norms
from driftline.parts.objectives import Scope, scope_columns, scoped_cross_entropy
from driftline.parts.optim import Optim

NAME = "tuned"  # of the one set of adapters
Trained = Literal["all", "head"]


class Penalty(nn.Module):
    """What keeps earlier tasks while `method` learns the present one; this one keeps nothing.

    Its tensors are part of the method's state.
    """

    def begin_task(self, method: Finetune, task: Task, known: int) -> None:
        """The head has its new rows; `known` classes are older than `task`."""

    def loss(self, scores: Tensor, batch: Batch) -> Tensor | float:
        """Added to the loss of scores [B, C]; 0-dim."""
        return 0.0

    def add_gradients(self, method: Finetune) -> dict[str, Tensor]:
        """Adds to the gradients of the loss; returns what to log."""
        return {}

    def end_task(self, method: Finetune, task: Task) -> None:
        """The last epoch of `task` is over."""


class Finetune(CLStrategy):
    """Backbone and expanding linear head, trained on one task after the other.

    Args:
        num_classes: classes of the whole stream.
        epochs: passes over the training images of a task.
        optim: of the groups `backbone` and `head`, made anew for each task.
        loss_scope: see `parts.objectives.scope_columns`.
        freeze_bn: BatchNorm layers keep their running statistics (scale and shift still learn).
        trains: `all`, or the `head` alone.
        penalty: what pulls back to earlier tasks; None: nothing.
        adapter: learns in place of the backbone, which stays frozen in evaluation mode.

    Raises:
        UserError: for a network that lacks the points of `adapter`, or an adapter where the head
            alone learns.
    """

    needs = frozenset({"features"})
    averageable = True
    unmergeable = ""

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optim: Optim,
        loss_scope: Scope,
        freeze_bn: bool,
        trains: Trained,
        adapter: Plan | None,
        penalty: Penalty | None,
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.num_classes, self.epochs, self.train_epochs = num_classes, epochs, epochs
        self.optim = self.task_optim = optim
        self.loss_scope: Scope = loss_scope
        self.freeze_bn, self.trains = freeze_bn, trains
        freeze_pretrained_head(backbone)
        if trains == "head" and adapter is not None:
            raise UserError(
                "strategy.trains=head learns the head alone, and an adapter would learn beside it; "
                "use strategy=finetune adapter=..."
            )
        self.adapter = adapter
        self.bank = None if adapter is None else adapter.bank(backbone, calibrates=True)
        if trains == "head":
            self.unmergeable = "the head alone learns"
        if trains == "head" or adapter is not None:
            backbone.requires_grad_(False)
        if adapter is not None and self.bank is not None:
            adapter.add(self.bank, NAME, self.rng("init"))
        self.head = ExpandingLinear(backbone.dim)
        self.penalty = penalty
        if penalty is not None:  # it pulls to what the end of a task left
            vars(self)["needs"] = self.needs | {BOUNDARIES}
        self.seen = 0
        self.columns: Sequence[int] = range(0)
        self._hash = ""

    @classmethod
    def preferred_backbone(cls, options: Mapping[str, Any]) -> Preferred:
        return "vit" if options.get("adapter") else cls.prefers

    # ------------------------------------------------------------------ tasks

    def extend(self, task: Task) -> None:
        """Grow the head to the classes of `task` and note which the loss covers."""
        self.seen = max(self.seen, task.classes.stop)
        rows = self.num_classes if self.loss_scope == "all" else self.seen
        self.head.grow(rows, self.rng("init"))
        self.columns = scope_columns(self.loss_scope, task.own, self.seen, self.num_classes)

    def grow(self, task: Task) -> None:
        self.extend(task)
        self.make_optimizer(task)  # here, since `begin_task` is not called again

    def begin_task(self, task: Task) -> None:
        known = self.seen
        super().begin_task(task)
        if len(self.columns) == 1:
            chosen = "loss_scope" in inspect.signature(type(self)).parameters
            under = f" under strategy.loss_scope={self.loss_scope}" if chosen else ""
            self.warn_once(
                "one class",
                f"task {task.index} has one class in its softmax{under}: the loss is 0 and nothing "
                "is learned; take larger tasks (scenario.increment)",
            )
        if self.adapter is not None and self.bank is not None and not known:
            self.adapter.calibrate(self.bank, NAME, task, lambda batch: self._loss(batch)[1])
        if self.penalty is not None:
            self.penalty.begin_task(self, task, known)

    def make_optimizer(self, task: Task) -> None:
        """A fresh optimiser for one task, without momentum from the one before."""
        learned = [p for p in self.backbone.parameters() if p.requires_grad]
        second: list[nn.Parameter] = []
        if self.bank is not None:
            learned, second = self.bank.parameters_of(NAME), self.bank.second_factors(NAME)
        self.task_optim = self.optim.of_task(task.index)
        groups = {"backbone": learned, "head": self.head.parameters()}
        self.optimizer = self.task_optim.optimizer(groups, second)

    def begin_epoch(self, task: Task, epoch: int) -> None:
        self.task_optim.set_rates(self.optimizer, epoch, self.train_epochs)

    def end_task(self, task: Task) -> None:
        if self.penalty is not None:
            self.penalty.end_task(self, task)

    # ------------------------------------------------------------------ training

    def modes(self) -> Iterator[tuple[nn.Module, bool]]:
        """Modules and whether they train; later entries override earlier ones."""
        yield self, True
        if self.trains == "head" or self.bank is not None:
            yield self.backbone, False
        elif self.freeze_bn:
            yield from ((m, False) for m in batch_norms(self.backbone).values())

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D]."""
        if self.bank is not None:
            return self.bank.features(x, NAME)
        return cast(Backbone, self.backbone).features(x)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step; returns the loss and the accuracy in percent over the classes seen.

        Raises:
            Diverged: for a loss that is not finite, before the parameters change.
        """
        for module, mode in self.modes():
            module.train(mode)
        scores, loss, penalties = self._gradients(batch)
        self.task_optim.update(self.optimizer, lambda: self._gradients(batch))
        right = scores[:, : self.seen].argmax(1) == batch.y
        return {"loss": loss, "acc": 100 * right.float().mean(), **penalties}

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores [B, C] and the loss [] without the penalty."""
        scores = self.head(self.features(batch.x))
        return scores, scoped_cross_entropy(scores, batch.y, self.columns)

    def _gradients(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Backward pass; scores [B, C], loss [] and what the penalty logs."""
        scores, loss = self._loss(batch)
        if self.penalty is not None:
            loss = loss + self.penalty.loss(scores, batch)
        self.task_optim.backward(self.optimizer, loss)
        penalties = {} if self.penalty is None else self.penalty.add_gradients(self)
        return scores.detach(), loss.detach(), penalties

    # ------------------------------------------------------------------ prediction

    def extractors(self) -> Mapping[str, str] | None:
        """The network, where it does not learn."""
        if self.trains != "head":
            return None
        self._hash = self._hash or weights_hash(self.backbone.state_dict())
        return {"plain": self._hash}

    @torch.no_grad()
    def embed(self, x: Tensor, names: Sequence[str]) -> Tensor:
        with evaluation_mode(self):
            return self.features(x)[None]

    @torch.no_grad()
    def classify(self, features: Mapping[str, Tensor]) -> Tensor:
        return self.head(features["plain"])[:, : self.seen]

    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen] for x float [B, 3, H, W] in [0, 1]."""
        return self.classify({"plain": self.embed(x, ["plain"])[0]})
