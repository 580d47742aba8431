"""LAE: an online adapter learns each task, an offline average of it accumulates them, both vote.

Paper: Gao et al., "A Unified Continual Learning Framework with General Parameter-Efficient
Tuning", ICCV 2023, arXiv 2303.10070. Official code: gqk/LAE 1680e49.

A small module (adapter, LoRA or prefix) sits on the first blocks of a frozen transformer. Task by
task the online copy is trained with a softmax over the new classes alone; from the second task on
it stays frozen for the first epochs, and after every step the offline copy follows it,
`off = m * off + (1 - m) * on`. The score of a class is the larger of its two probabilities.

The official code differs from LAMDA-PILOT's port, which freezes in the first task as well
(`freeze_first_task`) and averages from the very start (`ema_start=init`); the defaults are the
official ones. The port's adapter is never called and its LoRA stops with an error; here both work.

Deviations: the classifiers of all tasks are one matrix (rows of earlier tasks have zero gradients
and Adam without decay leaves them where they are). While the module is frozen no graph is made.
A low-rank update is computed beside the weight, not added to it: rounding. Both copies are
evaluated in one pass. A task smaller than a batch is learned from that batch, not skipped. More
than one offline copy, Swin and ConvNeXt are left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, CountOrZero, Unit
from driftline.core.strategy import CLStrategy
from driftline.core.stream import BOUNDARIES, Batch, Task
from driftline.parts.adapters.plan import Plan
from driftline.parts.heads import NearZeroLinear
from driftline.parts.modes import evaluation_mode
from driftline.parts.objectives import Scope, scope_columns, scoped_cross_entropy
from driftline.parts.optim import SameOptim

FROZEN, BATCH = "frozen", "batch"  # facts kept with the optimiser's state, hence in checkpoints


class LAE(CLStrategy):
    """Online and offline modules on a frozen transformer, one linear classifier.

    Args:
        epochs: passes over the training images of a task.
        adapter: the module.
        lr: of Adam, made anew for each task.
        freeze_epochs: first epochs of a task in which only the classifier learns, from the second
            task on. freeze_first_task: in the first one as well.
        ema_decay: m, per step.
        ema_start: `after_first_task`: the offline copy is made when the second task begins.
            `init`: it starts with the untrained module and is averaged in the first task.
        loss_scope: see `parts.objectives.scope_columns`.
        drop_last: leave out the batch of an epoch that is smaller than the others.
        experts: whose probabilities count; in the absence of an offline copy the online ones do.
    """

    needs = frozenset({"features", BOUNDARIES})
    averageable = True
    unmergeable = ""
    outputs = "probabilities"

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        adapter: Plan,
        optim: SameOptim,
        freeze_epochs: CountOrZero,
        freeze_first_task: bool,
        ema_decay: Unit,
        ema_start: Literal["after_first_task", "init"],
        loss_scope: Scope,
        drop_last: bool,
        experts: Literal["both", "online", "offline"],
    ) -> None:
        super().__init__(backbone, seed=seed)
        if freeze_epochs >= epochs:
            warnings.warn(
                f"strategy.freeze_epochs={freeze_epochs} covers all {epochs} epochs of a task: the "
                "adapter does not learn "
                + ("at all" if freeze_first_task else "after the first task"),
                stacklevel=2,
            )
        self.num_classes, self.epochs, self.optim = num_classes, epochs, optim
        self.freeze_epochs, self.freeze_first_task = freeze_epochs, freeze_first_task
        self.ema_decay, self.ema_start, self.experts = ema_decay, ema_start, experts
        self.loss_scope: Scope = loss_scope
        self.drop_last = drop_last

        backbone.eval().requires_grad_(False)
        self.adapter, self.bank = adapter, adapter.bank(backbone, calibrates=True)
        adapter.add(self.bank, "online", self.rng("init"))
        self.head = NearZeroLinear(backbone.dim)
        self.seen = 0
        self.begun = 0  # tasks
        self.columns: Sequence[int] = range(0)

    # ------------------------------------------------------------------ tasks

    def grow(self, task: Task) -> None:
        self.begun += 1
        self.seen = max(self.seen, task.classes.stop)
        rows = self.num_classes if self.loss_scope == "all" else self.seen
        self.head.grow(rows, self.rng("init"))
        self.columns = scope_columns(self.loss_scope, task.own, self.seen, self.num_classes)
        if "offline" not in self.bank.sets and (self.begun > 1 or self.ema_start == "init"):
            self.bank.copy("online", "offline")
            self.bank.freeze("offline")
        groups = {"adapter": self.bank.parameters_of("online"), "head": self.head.parameters()}
        self.optimizer = self.optim.optimizer(groups, self.bank.second_factors("online"))
        for group in self.optimizer.param_groups:
            group |= {FROZEN: False, BATCH: 0}

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if self.begun == 1:
            self.adapter.calibrate(self.bank, "online", task, lambda b: self.loss(b)[1])
            if "offline" in self.bank.sets:
                self.bank.sets["offline"].load_state_dict(self.bank.sets["online"].state_dict())
        if len(self.columns) == 1:
            self.warn_once(
                "one class",
                f"task {task.index} has one class in its softmax under "
                f"strategy.loss_scope={self.loss_scope}: the loss is 0 and nothing is learned; "
                "strategy.loss_scope=seen compares it with earlier classes",
            )

    def begin_epoch(self, task: Task, epoch: int) -> None:
        assert self.optimizer is not None
        self.optim.set_rates(self.optimizer, epoch, self.epochs)
        freezes = self.begun > 1 or self.freeze_first_task
        self.optimizer.param_groups[0][FROZEN] = freezes and epoch < self.freeze_epochs

    # ------------------------------------------------------------------ training

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step; returns loss and online accuracy in percent, or nothing for a dropped batch.

        Raises:
            Diverged: for a loss that is not finite, before anything is changed.
        """
        assert self.optimizer is not None
        modules = self.optimizer.param_groups[0]
        modules[BATCH] = max(modules[BATCH], len(batch.y))
        if self.drop_last and len(batch.y) < modules[BATCH]:
            return {}
        self.train()
        self.backbone.eval()

        learns = not modules[FROZEN]
        scores, loss = self.loss(batch, learns)
        # The optimiser passes over parameters without gradient.
        self.optim.step(self.optimizer, loss, lambda: self.loss(batch, learns)[1])
        self._average()
        right = scores.detach()[:, : self.seen].argmax(1) == batch.y
        return {"loss": loss.detach(), "acc": 100 * right.float().mean()}

    def loss(self, batch: Batch, learns: bool = True) -> tuple[Tensor, Tensor]:
        """Scores [B, C] of the online copy, which `learns` or is frozen, and the loss []."""
        with torch.set_grad_enabled(learns):
            features = self.bank.features(batch.x, "online")
        scores = self.head(features)
        return scores, scoped_cross_entropy(scores, batch.y, self.columns)

    @torch.no_grad()
    def _average(self) -> None:
        """One step of the offline copy, also while the online one is frozen."""
        if "offline" not in self.bank.sets:
            return
        offline = cast(list[Tensor], self.bank.parameters_of("offline"))
        online = cast(list[Tensor], self.bank.parameters_of("online"))
        torch._foreach_mul_(offline, self.ema_decay)
        torch._foreach_add_(offline, online, alpha=1 - self.ema_decay)

    # ------------------------------------------------------------------ prediction

    @torch.no_grad()
    def probabilities(self, x: Tensor) -> dict[str, Tensor]:
        """Expert -> probabilities [B, C_seen]; one pass of the frozen weights for both."""
        names = [n for n in ("online", "offline") if n in self.bank.sets]
        if len(names) == 2 and self.experts != "both":
            names = [self.experts]
        with evaluation_mode(self):
            scores = self.head(self.bank.features_each(x, names))[..., : self.seen]
        return dict(zip(names, scores.softmax(-1), strict=True))

    def predict(self, x: Tensor) -> Tensor:
        """Largest probability of the experts [B, C_seen], for x float [B, 3, H, W] in [0, 1]."""
        return torch.stack([*self.probabilities(x).values()]).amax(0)
