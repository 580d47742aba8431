"""Arithmetic that gives the same bits on every device, and the bits of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def divide_(values: Tensor, number: float) -> Tensor:
    """`values / number` in place, rounded once, for any shape and float type.

    On CUDA torch multiplies by the reciprocal of a Python number, which rounds twice; division by
    a tensor on the device does not.
    """
    if values.device.type == "cpu":
        return values.div_(number)
    return values.div_(torch.full((), number, dtype=values.dtype, device=values.device))


def content(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in the order of its shape, whatever its strides and its device."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
