"""A whole block behind a block."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

import driftline.core.vision  # noqa: F401
from driftline.core.errors import UserError
from driftline.parts.adapters.adapter import Adapter, bare_copy


class BlockExpansion(Adapter):
    """A copy of the block behind it, all of which learns.

    The last layers of its attention and of its MLP start at 0, so that it gives what it is given.
    It is by far the largest kind: 7.1 million numbers a block of a ViT-B, in every set.

    Source: Bafghi et al., "Parameter Efficient Fine-tuning of Self-supervised ViTs without
    Catastrophic Forgetting", CVPRW 2024, arXiv 2404.17245 (LLaMA Pro, Wu et al., ACL 2024, for
    ViTs). Checked against a network with such a block put in.

    Args:
        module: the frozen block.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        if not isinstance(module, Block):
            raise UserError(
                f"block expansion copies a Block of timm's ViTs, not {type(module).__name__}: "
                "choose other points (strategy.adapter.at)"
            )
        copied: Any = bare_copy(module).requires_grad_(True)
        with torch.no_grad():
            for last in (copied.attn.proj, copied.mlp.fc2):
                for p in last.parameters():
                    p.zero_()
        self.block = copied

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        return cast(Tensor, self.block(out))
