"""Single images through a method that wants batches: a ring buffer of the last W images.

Follows github.com/mariodoebler/test-time-adaptation @ 8b2ed63 (`WINDOW_LENGTH`): the buffer fills
up, then its oldest place is overwritten; when the write position is the last one the method adapts
to the whole buffer, otherwise it predicts only, on the whole buffer if its predictions depend on
the batch and on the one image if not. With W = 1 every image is an update.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from driftline.core.strategy import TTAStrategy


class Window:
    """The buffer; part of the checkpoint.

    Args:
        length: W.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.position = -1  # of the newest image
        self.images: Tensor | None = None  # [1..W, 3, H, W]

    def adapt(self, strategy: TTAStrategy, x: Tensor) -> Tensor:
        """Scores [1, C] of the one image `x` [1, 3, H, W]."""
        self.position = (self.position + 1) % self.length
        if self.images is None:
            self.images = x.clone()
        elif len(self.images) < self.length:
            self.images = torch.cat([self.images, x])
        else:
            self.images[self.position] = x[0]
        here = slice(self.position, self.position + 1)
        if self.position == self.length - 1:
            return strategy.adapt(self.images)[here]
        if strategy.batch_dependent:
            return strategy.predict(self.images)[here]
        return strategy.predict(x)

    def clear(self) -> None:
        """Forget the images: the method was put back to its start."""
        self.position, self.images = -1, None

    def snapshot(self) -> dict[str, Any]:
        return {"position": self.position, "images": self.images}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.position, self.images = state["position"], state["images"]
