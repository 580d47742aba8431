"""Learned tokens behind those of the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from driftline.core.ranges import Size
from driftline.parts.adapters.adapter import Adapter


class Prompt(Adapter):
    """Tokens appended behind the image's, without position embedding (VPT).

    Args:
        dim: width D.
        count: tokens.
    """

    def __init__(self, dim: int, count: Size) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.zeros(count, dim))

    def tokens(self) -> Tensor:
        """[count, D]; of a kind that reads the context [B, count, D]."""
        return self.prompt
