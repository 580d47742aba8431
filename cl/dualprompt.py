"""DualPrompt: keys and values that all tasks share in lower blocks, those of experts above them.

Paper: Wang et al., "DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning",
ECCV 2022, arXiv 2204.04799.
Official code: google-research/l2p dd8836e (JAX); recorded from the port in LAMDA-CL/LAMDA-PILOT
5240714, `models/dualprompt.py` and `backbone/prompt.py`, which descends from
JH-LEE-KR/dualprompt-pytorch.

Task t learns expert t, which starts where expert t - 1 ended, its key, and the general prompts;
once the pool is used up, training images select an expert as test images do, by the cosine of their
query with the keys. Loss and vote as in L2P (`cl/l2p.py`). What the vote is worth was reported for
the PyTorch version: 75.6 in test batches of 128, 65.2 image by image.

`layout`: the experts of a batch are stacked as [key and value, image]. The PyTorch versions reshape
that to [image, key and value] (`reshaped`), so that with one expert the first half of a batch gets
its key prompts in both roles and the second half its value prompts; JAX does not. The default,
`permuted`, gives each image both; PILOT's recorded numbers need `reshaped`.

Other codes: JAX and JH-LEE-KR/dualprompt-pytorch 7eb457d clip gradients at norm 1
(`optim.clip=1.0`) and do not vote on ImageNet-R; the latter predicts among all classes of the
stream, unseen ones included; JAX draws prompts from U(0, 0.01), here they come from U(-1, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from annotated_types import MinLen
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.cl.l2p import Matched, uniform
from driftline.cl.prompted import NAME
from driftline.core.errors import UserError
from driftline.core.ranges import Count, CountOrZero, NonNegative, Size
from driftline.core.stream import BOUNDARIES, Task
from driftline.parts.adapters.adapter import Adapter
from driftline.parts.adapters.prefix import Rows
from driftline.parts.optim import Optim

Blocks = Annotated[list[CountOrZero], MinLen(1)]
Layout = Literal["permuted", "reshaped"]


class GeneralPrefix(Rows):
    """The same keys and values for every image."""

    def __init__(self, dim: int, length: int, generator: torch.Generator) -> None:
        super().__init__()
        self.prompt = uniform(2, length, dim, generator=generator)

    def rows(self) -> tuple[Tensor, Tensor]:
        return self.prompt[0], self.prompt[1]


class ExpertPrefix(Rows):
    """Keys and values of the experts whose numbers the context [B, k] holds."""

    reads_context = True

    def __init__(
        self, dim: int, pool: int, length: int, layout: Layout, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.prompt = uniform(2, pool, length, dim, generator=generator)
        self.layout = layout

    def rows(self) -> tuple[Tensor, Tensor]:
        assert self.context is not None
        chosen = self.prompt[:, self.context].flatten(2, 3)  # [2, B, k * length, D]
        if self.layout == "reshaped":
            chosen = chosen.reshape(-1, 2, *chosen.shape[2:]).transpose(0, 1)
        return chosen[0], chosen[1]


class DualPrompt(Matched):
    """General prefixes and a pool of experts.

    Args:
        pool, top_k, vote, pull: see `Matched`; of the experts. Task t learns those from
            `top_k * t` on.
        length: rows that one expert adds to the keys and to the values of each of `blocks`.
        blocks: numbers of the blocks of the experts.
        general_length, general_blocks: as `length` and `blocks`, of the general prompts.
        layout: `permuted`: each image gets the keys and the values of its experts; `reshaped`: as
            in the PyTorch versions, see above.
        num_classes, epochs, optim: see `Prompted`; groups `prompts`, `keys` and `head`.

    Raises:
        UserError: for blocks of which the network has none, or that are named twice.
    """

    needs = Matched.needs | {BOUNDARIES}

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optim: Optim,
        general_length: Size,
        general_blocks: Blocks,
        pool: Size,
        length: Size,
        blocks: Blocks,
        top_k: Size,
        vote: Literal["batch"] | None,
        layout: Layout,
        pull: NonNegative,
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            num_classes=num_classes,
            epochs=epochs,
            optim=optim,
            pool=pool,
            top_k=top_k,
            vote=vote,
            pull=pull,
        )
        if len({*general_blocks, *blocks}) < len(general_blocks) + len(blocks):
            raise UserError(
                f"strategy.general_blocks={list(general_blocks)} and strategy.blocks="
                f"{list(blocks)}: a block takes one prompt; name each block once"
            )
        if layout == "reshaped":  # what an image gets depends on its place in the batch
            vars(self)["batch_dependent"] = True
        self.expert = range(0)  # experts of the present task; empty: images choose
        dim, draw = backbone.width, self.rng("init")
        shared = self.places(general_blocks, "strategy.general_blocks")
        own = self.places(blocks, "strategy.blocks")
        prompts: dict[str, Adapter] = {p: GeneralPrefix(dim, general_length, draw) for p in shared}
        prompts |= {p: ExpertPrefix(dim, pool, length, layout, draw) for p in own}
        self.bank.add(NAME, prompts)

    @property
    def experts(self) -> Sequence[ExpertPrefix]:
        """Block by block."""
        return [a for a in self.bank.adapters(NAME).values() if isinstance(a, ExpertPrefix)]

    def grow(self, task: Task) -> None:
        super().grow(task)
        own = range(task.index * self.top_k, (task.index + 1) * self.top_k)
        self.expert = own if own.stop <= self.pool else range(0)

    @torch.no_grad()
    def begin_task(self, task: Task) -> None:
        """The prompts of the task's expert start where the last expert ended; its key does not."""
        super().begin_task(task)
        if task.index and self.expert:
            start, stop = self.expert.start, self.expert.stop
            for expert in self.experts:
                expert.prompt[:, start:stop] = expert.prompt[:, start - self.top_k : start].clone()

    def training_context(self, query: Tensor) -> Tensor:
        if not self.expert:
            return self.context(query)
        own = torch.arange(self.expert.start, self.expert.stop, device=query.device)
        return own.expand(len(query), -1)
