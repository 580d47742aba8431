"""A second network that follows the first: averages of weights, random returns to the start."""

from __future__ import annotations

import torch
from torch import Tensor


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
    return (uniform < probability).to(parameter.device, non_blocking=True)  # no wait for each
