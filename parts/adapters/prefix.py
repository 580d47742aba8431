"""Learned keys and values of an attention layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from driftline.core.ranges import Size
from driftline.parts.adapters.adapter import Adapter


class Rows(Adapter):
    """What an attention layer gets beside the keys and values of its tokens."""

    compensate = False  # see `Prefix`

    def rows(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [length, D] each; of a kind that reads the context [B, length, D]."""
        raise NotImplementedError


class Prefix(Rows):
    """Learned rows for keys and values, put in after the class token.

    Args:
        dim: width D.
        length: rows.
        compensate: divide the attention on the prefix by its own sum (LAE's calibration), so that
            it always counts fully; the other columns stay as they are.
        learn_scale: one learnable factor each for keys and values, starting at 1.
    """

    def __init__(
        self,
        dim: int,
        length: Size,
        *,
        compensate: bool = True,
        learn_scale: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        draw = [torch.empty(length, dim).uniform_(0, 0.01, generator=generator) for _ in range(2)]
        self.key, self.value = (nn.Parameter(d) for d in draw)
        ones = [torch.ones(()) for _ in range(2)]
        if learn_scale:
            self.key_scale, self.value_scale = (nn.Parameter(o) for o in ones)
        else:
            self.register_buffer("key_scale", ones[0])
            self.register_buffer("value_scale", ones[1])
        self.compensate = compensate

    def rows(self) -> tuple[Tensor, Tensor]:
        return self.key * self.key_scale, self.value * self.value_scale
