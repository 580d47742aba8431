"""What the methods with an averaged teacher (CoTTA, ViDA) share."""

from __future__ import annotations

import torch
from torch import Tensor


def consistency(logits: Tensor, target: Tensor, *, symmetric: bool) -> Tensor:
    """Cross-entropy of student `logits` against teacher `target`, both [B, C]; 0-dim.

    Args:
        symmetric: mean of both directions instead of H(target, logits) alone.
    """
    forward = (target.softmax(1) * logits.log_softmax(1)).sum(1)
    if not symmetric:
        return -forward.mean(0)
    backward = (logits.softmax(1) * target.log_softmax(1)).sum(1)
    return (-0.5 * forward - 0.5 * backward).mean(0)


@torch.no_grad()
def move_average(teacher: list[Tensor], student: list[Tensor], ema: float) -> None:
    """`teacher = ema * teacher + (1 - ema) * student`, in place; nothing for no tensors."""
    if not teacher:
        return
    # Three operations, not a fused one, round like the reference.
    share = torch._foreach_mul(student, 1 - ema)
    torch._foreach_mul_(teacher, ema)
    torch._foreach_add_(teacher, share)


def restore_mask(parameter: Tensor, probability: float, numbers: torch.Generator) -> Tensor:
    """Boolean, shaped like `parameter`: True with `probability`, drawn where `numbers` is."""
    uniform = torch.rand(
        parameter.shape, generator=numbers, device=numbers.device, dtype=torch.float32
    )
    return (uniform < probability).to(parameter.device)
