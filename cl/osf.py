"""OSF: fine-tuning of weight matrices outside of their largest singular directions.

Paper: Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual
Learning", ICLR 2026, arXiv 2504.07097. Official code: huggingface/peft 5d602fd, `tuners/osf`, for
language models. In the research scripts, Red-Hat-AI-Innovation-Team/orthogonal-subspace-learning,
the factors of T5 get no gradient, and only what was not decomposed learns; peft's factors learn.

At the start of a task each weight is split by its singular values,

    W = U1 S1 V1' + U2 S2 V2',

the larger ones, taken for what is known, in U1 S1 V1'. That part stays; U2, S2 and V2 learn, the
gradient of U2 without its part in the span of U1 and that of V2 without its part in the span of V1.
After the task the sum is the weight that the next task splits.

This is a port to vision transformers; the authors report none. As peft would, it takes a fused qkv
for one matrix; biases, norms and embeddings stay. Ours: the loop over tasks, the linear head of all
classes, the cross-entropy over those of the task, more directions kept task by task (`kept`).

With momentum SGD projected gradients keep the factors outside of the kept directions; Adam scales
single numbers and leaves (2 to 3 % of U2 in the recorded run). `project=step` takes the factors
back after each step. At least one direction of every matrix always learns: `kept` is below 1.

Deviations that change no number: the network holds the rebuilt weights, so that it is a plain one
at any time, and their gradients are handed on to the factors by the chain rule; these are dropped
when a task ends, so that a checkpoint between tasks holds the weights alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, cast

import torch
from annotated_types import MinLen
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Below1, Count
from driftline.core.strategy import CLStrategy
from driftline.core.stream import BOUNDARIES, Batch, Task
from driftline.parts.adapters.plan import matches
from driftline.parts.modes import evaluation_mode
from driftline.parts.objectives import scoped_cross_entropy
from driftline.parts.optim import Optim
from driftline.parts.subspace import without


class Split(nn.Module):
    """Singular vectors and values of a weight [m, n]: k that stay and p - k that learn."""

    kept_u: Tensor  # [m, k]
    kept_s: Tensor  # [k]
    kept_v: Tensor  # [k, n]

    def __init__(self) -> None:
        super().__init__()
        for name in ("kept_u", "kept_s", "kept_v"):
            self.register_buffer(name, torch.empty(0))
        self.u = self.s = self.v = nn.Parameter(torch.empty(0))

    def make(self, weight: Tensor, kept: float) -> None:
        """Room for the factors of `weight` (new parameters), `kept` of its p values kept."""
        (m, n), p = weight.shape, min(weight.shape)
        k = int(kept * p)
        self.kept_u, self.kept_s, self.kept_v = (
            weight.new_zeros(shape) for shape in ((m, k), (k,), (k, n))
        )
        self.u, self.s, self.v = (
            nn.Parameter(weight.new_zeros(shape)) for shape in ((m, p - k), (p - k,), (p - k, n))
        )

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Split `weight`."""
        k = len(self.kept_s)
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        for tensor, part in (
            (self.kept_u, u[:, :k]),
            (self.kept_s, s[:k]),
            (self.kept_v, v[:k]),
            (self.u, u[:, k:]),
            (self.s, s[k:]),
            (self.v, v[k:]),
        ):
            tensor.copy_(part)

    def drop(self) -> None:
        """Keep nothing; the parameters stay those that an optimiser holds."""
        self.kept_u, self.kept_s, self.kept_v = (self.kept_s[:0] for _ in range(3))
        for p in (self.u, self.s, self.v):
            p.data = p.data.flatten()[:0].clone()

    @torch.no_grad()
    def weight(self) -> Tensor:
        """The sum of both parts, [m, n]."""
        left = torch.cat([self.kept_u * self.kept_s, self.u * self.s], 1)
        return left @ torch.cat([self.kept_v, self.v])

    @torch.no_grad()
    def pull_back(self, gradient: Tensor) -> None:
        """Give the factors that learn their gradients, from that of the weight, projected."""
        inner = self.u.T @ gradient
        self.u.grad = without(gradient @ (self.s[:, None] * self.v).T, self.kept_u)
        self.s.grad = (inner * self.v).sum(1)
        self.v.grad = without((self.s[:, None] * inner).T, self.kept_v.T).T

    @torch.no_grad()
    def project(self) -> None:
        """Take from the factors that learn what lies in kept directions."""
        self.u.copy_(without(self.u, self.kept_u))
        self.v.copy_(without(self.v.T, self.kept_v.T).T)


class OSF(CLStrategy):
    """Linear layers that learn in their smaller singular directions, and a linear head.

    Args:
        num_classes: classes of the whole stream.
        epochs: passes over the training images of a task.
        layers: names of linear layers as patterns, `blocks.*.mlp.fc1`.
        kept: share of the singular directions of each weight that a task leaves alone, rounded
            down; a list has one value a task, its last one goes on.
        project: onto what is outside of the kept directions. `gradient`: that of the factors;
            `step`: the factors too, after each step.
        optim: of the groups `backbone` (the factors) and `head`, made anew for each task.

    Raises:
        UserError: for a pattern without a linear layer, or a layer that the network does not use.
    """

    needs = frozenset({"features", BOUNDARIES})
    unmergeable = "it splits the weights anew for each task"

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        layers: Annotated[list[str], MinLen(1)],
        kept: Below1 | Annotated[list[Below1], MinLen(1)],
        project: Literal["gradient", "step"],
        optim: Optim,
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.epochs, self.project = epochs, project
        self.kept = list(kept) if isinstance(kept, list) else [kept]
        self.optim = self.task_optim = optim
        backbone.requires_grad_(False)
        self.layers = linear_layers(backbone, layers)
        for layer in self.layers.values():
            layer.weight.requires_grad_(True)
        self.splits = nn.ModuleList(Split() for _ in self.layers)
        self.head = cast(nn.Linear, nn.utils.skip_init(nn.Linear, backbone.dim, num_classes))
        bound = backbone.dim**-0.5
        for p in self.head.parameters():
            nn.init.uniform_(p, -bound, bound, generator=self.rng("init"))
        self.seen = 0
        self.columns: Sequence[int] = range(0)

    def parts(self) -> Iterator[tuple[str, nn.Linear, Split]]:
        """Name, layer and factors of every weight that learns."""
        splits = cast(list[Split], list(self.splits))
        for (name, layer), split in zip(self.layers.items(), splits, strict=True):
            yield name, layer, split

    # ------------------------------------------------------------------ tasks

    def grow(self, task: Task) -> None:
        kept = self.kept[min(task.index, len(self.kept) - 1)]
        for _, layer, split in self.parts():
            split.make(layer.weight.detach(), kept)
        self.seen = max(self.seen, task.classes.stop)
        self.columns = task.own
        self.task_optim = self.optim.of_task(task.index)
        factors = [p for _, _, split in self.parts() for p in split.parameters()]
        self.optimizer = self.task_optim.optimizer(
            {"backbone": factors, "head": self.head.parameters()}
        )

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        for _, layer, split in self.parts():
            split.fill(layer.weight)
        self.rebuild()
        if len(self.columns) == 1:
            self.warn_once(
                "one class",
                f"task {task.index} has one class: its cross-entropy is 0 and nothing is learned; "
                "take larger tasks (scenario.increment)",
            )

    def begin_epoch(self, task: Task, epoch: int) -> None:
        self.task_optim.set_rates(self.optimizer, epoch, self.epochs)

    def end_task(self, task: Task) -> None:
        """Keep the weights alone."""
        for _, _, split in self.parts():
            split.drop()

    # ------------------------------------------------------------------ training

    @torch.no_grad()
    def rebuild(self) -> None:
        """The weights of the network from their factors."""
        for _, layer, split in self.parts():
            layer.weight.copy_(split.weight())

    def gradients(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Backward pass to factors and head; scores [B, C] and loss []."""
        scores = self.head(cast(Backbone, self.backbone).features(batch.x))
        loss = scoped_cross_entropy(scores, batch.y, self.columns)
        self.task_optim.backward(self.optimizer, loss)
        for name, layer, split in self.parts():
            if layer.weight.grad is None:
                raise UserError(
                    f"the network never uses the layer {name}, which therefore cannot learn: leave "
                    "it out of strategy.layers"
                )
            split.pull_back(layer.weight.grad)
            layer.weight.grad = None
        return scores.detach(), loss.detach()

    def _again(self, batch: Batch) -> None:
        self.rebuild()
        self.gradients(batch)

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        """One step; returns the loss and the accuracy in percent over the classes seen.

        Raises:
            Diverged: for a loss that is not finite, before anything is changed.
        """
        self.train()
        scores, loss = self.gradients(batch)
        self.task_optim.update(self.optimizer, lambda: self._again(batch))
        if self.project == "step":
            for _, _, split in self.parts():
                split.project()
        self.rebuild()
        right = scores[:, : self.seen].argmax(1) == batch.y
        return {"loss": loss, "acc": 100 * right.float().mean()}

    def updated_parameters(self) -> list[Tensor]:
        """The optimised factors, the head, and the weights that the factors make."""
        return [*super().updated_parameters(), *(w.weight for w in self.layers.values())]

    # ------------------------------------------------------------------ prediction

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C_seen] for x float [B, 3, H, W] in [0, 1]."""
        with evaluation_mode(self):
            return self.head(cast(Backbone, self.backbone).features(x))[:, : self.seen]


def linear_layers(backbone: Backbone, patterns: list[str]) -> dict[str, nn.Linear]:
    """The linear layers whose names fit, in the order of the network.

    Raises:
        UserError: for a pattern that none fits.
    """
    linear = {n: m for n, m in backbone.net.named_modules() if isinstance(m, nn.Linear)}
    for pattern in patterns:
        if not any(matches(name, pattern) for name in linear):
            raise UserError(
                f"strategy.layers: no linear layer of {backbone.tag} fits {pattern!r}; it has "
                f"{', '.join([*linear][:6]) or 'none'}"
                + (f" and {len(linear) - 6} more" if len(linear) > 6 else "")
            )
    return {n: m for n, m in linear.items() if any(matches(n, p) for p in patterns)}
