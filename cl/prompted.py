"""Methods whose prompts depend on the image, which goes twice through the frozen network."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Count
from driftline.core.strategy import CLStrategy
from driftline.core.stream import Batch, Task
from driftline.parts.adapters.bank import AdapterBank
from driftline.parts.modes import evaluation_mode
from driftline.parts.objectives import scoped_cross_entropy
from driftline.parts.optim import Optim

NAME = "prompts"  # of the one set in the bank


class Prompted(CLStrategy):
    """A frozen transformer with prompts, one linear head for all classes of the stream.

    The query of an image is its feature without prompts; the prompts that it selects enter a
    second pass, whose feature the head reads. Learned by cross-entropy over the classes of the task
    alone. A subclass puts its prompts into `bank` under NAME and says what they read of the query
    (`context`) and what is added to the loss (`penalty`).

    Args:
        num_classes: classes of the whole stream.
        epochs: passes over the training images of a task.
        optim: of the groups of `groups`, made anew for each task.
    """

    needs = frozenset({"features"})
    averageable = True
    unmergeable = "prompts of a pool are chosen for each image"

    def __init__(
        self, backbone: Backbone, *, seed: int, num_classes: int, epochs: Count, optim: Optim
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.epochs = epochs
        self.optim = self.task_optim = optim
        backbone.eval().requires_grad_(False)
        self.bank = AdapterBank(backbone, "strategy.blocks")
        self.head = cast(nn.Linear, nn.utils.skip_init(nn.Linear, backbone.dim, num_classes))
        self.start_head(self.head, self.rng("init"))
        self.seen = 0
        self.columns: Sequence[int] = range(0)

    @torch.no_grad()
    def start_head(self, head: nn.Linear, generator: torch.Generator) -> None:
        """Initial values: N(0, 0.02^2), biases 0."""
        head.weight.normal_(0, 0.02, generator=generator)
        head.bias.zero_()

    def places(self, blocks: Sequence[int], setting: str) -> list[str]:
        """The points of the bank at the keys and values of `blocks`, those of a deeper network left
        out with a warning.

        Raises:
            UserError: where none is left.
        """
        backbone = cast(Backbone, self.backbone)
        depth = len(getattr(backbone.net, "blocks", ())) or max(blocks) + 1
        here = [i for i in blocks if i < depth]
        if len(here) < len(blocks):
            text = f"{setting}={list(blocks)}: {backbone.tag} has the blocks 0 to {depth - 1}"
            if not here:
                raise UserError(f"{text}; name some of them")
            warnings.warn(f"{text}; the others get no prompts", stacklevel=2)
        return [f"blocks.{i}.attn:keys" for i in here]

    # ------------------------------------------------------------------ tasks

    def groups(self) -> dict[str, Iterable[nn.Parameter]]:
        """What learns, by the name of its group."""
        return {"prompts": self.bank.parameters_of(NAME), "head": self.head.parameters()}

    def grow(self, task: Task) -> None:
        self.seen = max(self.seen, task.classes.stop)
        self.columns = task.own
        self.task_optim = self.optim.of_task(task.index)
        self.optimizer = self.task_optim.optimizer(self.groups())

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        if len(task.classes) == 1:
            self.warn_once(
                "one class",
                f"task {task.index} has one class: its cross-entropy is 0 and teaches nothing; "
                "take larger tasks (scenario.increment)",
            )

    def begin_epoch(self, task: Task, epoch: int) -> None:
        self.task_optim.set_rates(self.optimizer, epoch, self.epochs)

    # ------------------------------------------------------------------ passes

    @torch.no_grad()
    def query(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D], features of the network without prompts."""
        return cast(Backbone, self.backbone).features(x)

    def context(self, query: Tensor) -> Tensor:
        """What the prompts read of the queries [B, D]; [B, ...]."""
        raise NotImplementedError

    def training_context(self, query: Tensor) -> Tensor:
        """As `context`, while the present task is learned."""
        return self.context(query)

    def penalty(self, query: Tensor, context: Tensor) -> Tensor | float:
        """Added to the cross-entropy."""
        return 0.0

    def losses(self, batch: Batch, query: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, C] and the loss []."""
        context = self.training_context(query)
        scores = self.head(self.bank.features(batch.x, NAME, context))
        loss = scoped_cross_entropy(scores, batch.y, self.columns)
        return scores, loss + self.penalty(query, context)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step; returns the loss and the accuracy in percent over the classes seen.

        Raises:
            Diverged: for a loss that is not finite, before anything is changed.
        """
        self.train()
        self.backbone.eval()
        query = self.query(batch.x)
        scores, loss = self.losses(batch, query)
        self.task_optim.step(self.optimizer, loss, lambda: self.losses(batch, query)[1])
        right = scores.detach()[:, : self.seen].argmax(1) == batch.y
        return {"loss": loss.detach(), "acc": 100 * right.float().mean()}

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen] for x float [B, 3, H, W] in [0, 1]."""
        with evaluation_mode(self):
            context = self.context(self.query(x))
            return self.head(self.bank.features(x, NAME, context))[:, : self.seen]
