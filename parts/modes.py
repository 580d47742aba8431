"""Training modes that are put back."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(module: nn.Module) -> Generator[None]:
    """Evaluation mode inside; afterwards every submodule has its own mode again, mixed or not."""
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, mode in before:
            m.training = mode


@contextmanager
def evaluating(net: nn.Module) -> Generator[None]:
    """As `evaluation_mode`, without gradients."""
    with evaluation_mode(net), torch.no_grad():
        yield
