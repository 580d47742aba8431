"""L2P: a pool of prompts; the keys nearest to an image's query say which ones enter the input.

Paper: Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022, arXiv 2112.08654.
Official code: google-research/l2p dd8836e (JAX); recorded from the port in LAMDA-CL/LAMDA-PILOT
5240714, `models/l2p.py` and `backbone/prompt.py`, which descends from JH-LEE-KR/l2p-pytorch.

Prompts and keys are learned by all tasks. The k keys of largest cosine with the query (the class
token of the network without prompts) select k prompts; they stand between class token and patches,
each token with the position of the class token. The head reads the mean of what they become. The
loss is the cross-entropy over the classes of the task less `pull` times the cosines selected.

`vote=batch`: all released codes, at test too, give each image of a batch the k prompts selected
most often in it, so that a prediction depends on how many images stand beside it and which.
`vote=null`: each image its own prompts.

Deviations that change no number: the prompts of an image and their mean are adapters of an
unchanged network. The query of a test image is computed again in every evaluation, since what comes
after it cannot be kept.

Other codes: JH-LEE-KR/l2p-pytorch f7bc994 clips gradients at norm 1 (`optim.clip=1.0`, JAX as
well) and predicts among all classes of the stream, unseen ones included; JAX draws prompts from
U(0, 0.01), here they come from U(-1, 1).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.cl.prompted import NAME, Prompted
from driftline.core.distributed import own_rows
from driftline.core.errors import UserError
from driftline.core.ranges import Count, NonNegative, Size
from driftline.parts.adapters.adapter import Adapter
from driftline.parts.optim import Optim


def uniform(*shape: int, generator: torch.Generator | None) -> nn.Parameter:
    """Drawn from U(-1, 1)."""
    return nn.Parameter(torch.empty(shape).uniform_(-1, 1, generator=generator))


def voted(choices: Tensor, pool: int) -> Tensor:
    """The k prompts that were chosen most often in choices int64 [B, k], in that order; int64 [k].

    Ties are broken as `torch.topk` breaks them on the counts of the prompts chosen, in ascending
    order. Where fewer than k different ones were chosen, the list is filled up with the one of
    lowest number among them.
    """
    counts = F.one_hot(choices, pool).sum((0, 1))
    numbers = (counts == 0).int().sort(stable=True).indices  # those that were chosen first
    ranked = numbers[counts[numbers].topk(choices.shape[1]).indices]
    return torch.where(counts[ranked] > 0, ranked, choices.min())


class PromptPool(Adapter):
    """Before the first block: the prompts whose numbers the context [B, k] holds.

    Args:
        position: [D], added to every token.
    """

    reads_context = True
    position: Tensor

    def __init__(
        self, pool: int, length: int, position: Tensor, prefix: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.prompt = uniform(pool, length, len(position), generator=generator)
        self.register_buffer("position", position.clone(), persistent=False)
        self.prefix = prefix

    def before(self, inp: Tensor) -> Tensor:
        assert self.context is not None
        tokens = self.prompt[own_rows(self.context)].flatten(1, 2) + self.position
        return torch.cat([inp[:, : self.prefix], tokens.to(inp), inp[:, self.prefix :]], 1)


class PromptMean(Adapter):
    """Behind the last norm: the mean of tokens `first` to `last - 1` in place of every token."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        return out[:, self.first : self.last].mean(1, keepdim=True).expand_as(out)


class Matched(Prompted):
    """Prompts selected by learned keys.

    Args:
        num_classes, epochs, optim: see `Prompted`; groups `prompts`, `keys` and `head`.
        pool: prompts to choose from, each with a key.
        top_k: prompts that an image gets.
        vote: `batch`: all images of a batch get the prompts that it selects most often, in training
            and at test; None: each image its own.
        pull: weight of the cosines between queries and the keys selected.

    Raises:
        UserError: for a pool smaller than `top_k`.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        pool: Size,
        top_k: Size,
        vote: Literal["batch"] | None,
        pull: NonNegative,
        **options: Any,
    ) -> None:
        super().__init__(backbone, **options)
        if top_k > pool:
            raise UserError(
                f"strategy.top_k={top_k} prompts an image cannot be chosen from strategy.pool="
                f"{pool}; enlarge the pool or lower top_k"
            )
        self.pool, self.top_k, self.vote, self.pull = pool, top_k, vote, pull
        self.keys = uniform(pool, backbone.dim, generator=self.rng("init"))
        vars(self)["batch_dependent"] = vote == "batch"  # of this instance

    def groups(self) -> dict[str, Iterable[nn.Parameter]]:
        return super().groups() | {"keys": [self.keys]}

    def similarity(self, query: Tensor) -> Tensor:
        """Cosines [B, pool] of queries [B, D] and keys."""
        return F.normalize(query, dim=1) @ F.normalize(self.keys, dim=1).T

    def context(self, query: Tensor) -> Tensor:
        """Numbers of the prompts of each image, int64 [B, k]."""
        choices = self.similarity(query).topk(self.top_k).indices
        return voted(choices, self.pool).expand_as(choices) if self.vote == "batch" else choices

    def penalty(self, query: Tensor, context: Tensor) -> Tensor:
        return -self.pull * self.similarity(query).gather(1, context).sum() / len(query)


class L2P(Matched):
    """A pool of prompts at the input.

    Args:
        pool, top_k, vote, pull: see `Matched`.
        length: tokens of a prompt.
        num_classes, epochs, optim: see `Prompted`; groups `prompts`, `keys` and `head`.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        epochs: Count,
        optim: Optim,
        pool: Size,
        length: Size,
        top_k: Size,
        vote: Literal["batch"] | None,
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
        prefix = getattr(backbone.net, "num_prefix_tokens", 1)
        tokens = PromptPool(pool, length, class_position(backbone), prefix, self.rng("init"))
        mean = PromptMean(prefix, prefix + top_k * length)
        self.bank.check("blocks.0:tokens")  # blocks that take any number of tokens
        self.bank.add(NAME, {"blocks.0:in": tokens, "norm:out": mean})


def class_position(backbone: Backbone) -> Tensor:
    """What the network adds to its class token as position; 0 where there is none. [D]."""
    table = getattr(backbone.net, "pos_embed", None)
    prefix = getattr(backbone.net, "num_prefix_tokens", 1)
    if table is None or not prefix or getattr(backbone.net, "no_embed_class", False):
        return torch.zeros(backbone.width)
    return table[0, 0].detach()
