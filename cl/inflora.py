"""InfLoRA: low-rank updates that act on the inputs of a task and on none of the earlier ones'.

Paper: Liang and Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", CVPR
2024, arXiv 2404.00228. Official code: liangyanshuo/InfLoRA e08b00e, `methods/inflora.py` and
`models/vit_inflora.py`; the variants b5, domain and with classifier alignment are left out.

In task t, keys and values of every attention layer get the sum over s <= t of B_s A_s z. Before
training, A_t is designed: its rows are the leading left singular vectors of what the second moment
of z has outside of the directions used so far, over sqrt(3). A_t serves keys and values and stays;
the two B_t and the head learn, from the cross-entropy over the classes of the task. Afterwards the
layer uses further directions, those of the task (`parts/subspace.py`): as many as hold a share of
its second moment that grows from `share` to `last_share` over the stream.

As in the official code, both moments are those of one pass over augmented training images
(`moments=augmented`), before training with the earlier updates and after it with the new one too.

Deviations that change no number: heads of all tasks are rows of one layer, so that tasks may
differ in size; the updates of a layer are one product, and evaluation can add them to the weights
(other rounding); keys from k-means, which no score reads, are not computed. That change one:
those of `parts/subspace.py`. Where fewer directions than `rank` are left the official code fills
A_t with arbitrary ones; here that is an error, or the rows are 0 (`no_space`), as they are where a
task's few images span too little. A weight decay, which the official settings leave at 0, would
also shrink the rows of earlier classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.stacked import NAME, Stacked
from driftline.core.errors import UserError
from driftline.core.ranges import Count, Size, Unit
from driftline.core.stream import OWN_CLASSES, Task
from driftline.kernels import adapter
from driftline.parts.adapters.adapter import Product
from driftline.parts.heads import PlainLinear
from driftline.parts.modes import evaluating
from driftline.parts.optim import Optim
from driftline.parts.subspace import ROUNDING, Subspace, input_moments


class DesignedLoRA(Product):
    """Low-rank updates of k and v in a fused qkv, which share down-projections that do not learn.

    Args:
        dim, out: width d of the tokens, and 3d, of the layer's output.

    Raises:
        UserError: for a layer that is no fused qkv.
    """

    down: Tensor  # [R, d], of all tasks, the newest last
    old_up: Tensor  # [2, d, R - r]

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        if out != 3 * dim:
            raise UserError(
                f"strategy=inflora needs fused qkv layers (D to 3 D), not {dim} to {out}: use a "
                "timm ViT, for example backbone=vit_b16_in21k"
            )
        self.dim = dim
        self.register_buffer("down", torch.zeros(0, dim))
        self.register_buffer("old_up", torch.zeros(2, dim, 0))
        self.up = nn.Parameter(torch.zeros(2, dim, 0))

    @torch.no_grad()
    def extend(self, rank: int) -> None:
        """Keep the current pairs and start new ones that add nothing (a new parameter)."""
        self.old_up = torch.cat([self.old_up, self.up], 2)
        self.down = F.pad(self.down, (0, 0, 0, rank))
        self.up = nn.Parameter(self.old_up.new_zeros(2, self.dim, rank))

    def design(self, directions: Tensor) -> None:
        """Fill the newest down-projection with orthonormal columns [d, n], n <= r, and zeros."""
        newest = self.down[-self.up.shape[2] :]
        newest.zero_()[: directions.shape[1]] = directions.T / math.sqrt(3)

    def factors(self) -> tuple[Tensor, Tensor]:
        """[R, d] and [3d, R], zeros in the rows of q."""
        up = torch.cat([self.old_up, self.up], 2).flatten(0, 1)
        return self.down, F.pad(up, (0, 0, self.dim, 0))

    def _call(self, x: Tensor, weight: float = 1.0, **residual: Any) -> Tensor:
        return adapter(x, *self.factors(), scale=weight, **residual)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.down, up) for up in torch.cat([self.old_up, self.up], 2)]

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the updates amount to as a change of the weight, [3d, d]."""
        down, up = self.factors()
        return up @ down


class InfLoRA(Stacked):
    """A frozen transformer, updates of all tasks in disjoint input directions, an expanding head.

    Args:
        num_classes: classes of the whole stream.
        epochs: passes over the training images of a task.
        rank: directions that a task learns in, in each layer; at most the width.
        share, last_share: of the squared second moment that the used directions hold after task t
            of T: share + (last_share - share) t / T, with t from 0.
        tasks: T; None: classes of the stream over those of the first task, rounded up.
        moments: of the inputs on which images: `augmented`, in the training pipeline, or `plain`,
            in that of the test.
        no_space: where fewer than `rank` directions are free: `error`, or `less`: the layer learns
            in those, or not at all.
        optim: of the groups `adapter` (the new up-projections) and `head`, made anew for each task.
        evaluation: `merged`: the updates are added to the weights while predicting; `branches`:
            computed beside them. Equal up to rounding.

    Raises:
        UserError: for a network without fused qkv layers, a rank above its width, or a layer
            without enough free directions.
    """

    needs = Stacked.needs | {OWN_CLASSES}

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        rank: Size,
        share: Unit,
        last_share: Unit,
        tasks: Count | None,
        moments: Literal["augmented", "plain"],
        no_space: Literal["error", "less"],
        optim: Optim,
        evaluation: Literal["merged", "branches"],
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            epochs=epochs,
            optim=optim,
            evaluation=evaluation,
            kind=DesignedLoRA,
        )
        self.num_classes, self.rank = num_classes, rank
        self.share, self.last_share, self.tasks = share, last_share, tasks
        self.moments, self.no_space = moments, no_space
        width = min(lora.dim for lora in self.loras)
        if rank > width:
            raise UserError(
                f"strategy.rank={rank}: inputs of {width} values have at most {width} directions"
            )
        self.subspaces = nn.ModuleList(Subspace(lora.dim) for lora in self.loras)
        self.head = PlainLinear(backbone.dim)

    def parts(self) -> Iterator[tuple[str, DesignedLoRA, Subspace]]:
        """Name, updates and used directions of each layer."""
        spaces = cast(list[Subspace], list(self.subspaces))
        return zip(self.layers, self.loras, spaces, strict=True)

    # ------------------------------------------------------------------ tasks

    def grow(self, task: Task) -> None:
        if self.tasks is None:
            self.tasks = math.ceil(self.num_classes / len(task.classes))
        for lora in self.loras:
            lora.extend(self.rank)
        self.seen = max(self.seen, task.classes.stop)
        self.head.grow(self.seen, self.rng("init"))
        self.columns = task.own
        self.task_optim = self.optim.of_task(task.index)
        groups = {"adapter": [m.up for m in self.loras], "head": self.head.parameters()}
        self.optimizer = self.task_optim.optimizer(groups, self.bank.second_factors(NAME))

    def begin_task(self, task: Task) -> None:
        super().begin_task(task)
        for name, _, space in self.parts():
            self.check_space(name, space.free, task)
        moments = self.measure(task, self.epochs)
        for name, lora, space in self.parts():
            lora.design(self.directions(space, moments[name]))

    def check_space(self, layer: str, free: int, task: Task) -> None:
        """Whether a task can have its directions in `layer`.

        Raises:
            UserError: if not, under `no_space=error`.
        """
        if free >= self.rank:
            return
        text = (
            f"task {task.index}: earlier tasks leave {free} directions of the inputs of {layer}, "
            f"and strategy.rank={self.rank}"
        )
        if self.no_space == "error":
            raise UserError(
                f"{text}. Lower strategy.share and last_share (now {self.share:g}, "
                f"{self.last_share:g}) or the rank, or let the layer learn in what is left: "
                "strategy.no_space=less"
            )
        if free:
            self.warn_once("less space", f"{text}: it learns in those that are left")
        else:
            self.warn_once("no space", f"{text}: it learns nothing any more")

    @torch.no_grad()
    def directions(self, space: Subspace, moment: Tensor) -> Tensor:
        """Orthonormal columns [d, n], n <= rank: where inputs lie mostly outside of `space`."""
        vectors, values, _ = torch.linalg.svd(space.free_part(moment))
        real = int((values > ROUNDING * moment.norm()).sum())
        return vectors[:, : min(self.rank, real, space.free)].float()

    def measure(self, task: Task, epoch: int) -> Mapping[str, Tensor]:
        """Mean of z z' over the tokens of the training images, float64 [d, d], layer by layer.

        Args:
            epoch: of the augmentation, beyond those of the training.
        """
        images = task.train(epoch) if self.moments == "augmented" else task.fit()
        with evaluating(self), input_moments(self.layers) as moments:
            for batch in images:
                if batch is not None:
                    self.bank.features(batch.x.to(self.device), NAME)
        return {name: moment.mean() for name, moment in moments.items()}

    def end_task(self, task: Task) -> None:
        """Use the directions of the inputs, as many as hold the share of this task."""
        assert self.tasks is not None
        past = min(1.0, task.index / self.tasks)
        share = self.share + (self.last_share - self.share) * past
        moments = self.measure(task, self.epochs + 1)
        for name, _, space in self.parts():
            space.add(moments[name], share)
