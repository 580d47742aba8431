"""Named tensors whose number and sizes change, as part of a module's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Store(nn.Module):
    """Named tensors that are part of the state although their number and sizes change.

    Names may hold dots. Loading a state replaces everything that is held.
    """

    where: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("where", torch.empty(0), persistent=False)  # follows `.to(device)`

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep `tensor` itself, not a copy."""
        self.register_buffer(name.replace(".", "/"), tensor)

    def __contains__(self, name: str) -> bool:
        return name.replace(".", "/") in self._buffers

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._buffers[name.replace(".", "/")]
        assert tensor is not None
        return tensor

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in set(self._buffers) - {"where"}:
            delattr(self, name)
        for key, value in state_dict.items():
            if key.startswith(prefix):
                self.put(key.removeprefix(prefix), value.to(self.where.device, copy=True))
