"""Single images through a method that wants batches: a ring buffer of the last W images.

Follows github.com/mariodoebler/test-time-adaptation @ 8b2ed63 (`WINDOW_LENGTH`): the buffer fills
up, then its oldest place is overwritten; when the write position is the last one the method adapts
to the whole buffer, otherwise it predicts only, on the whole buffer if its predictions depend on
the batch and on the one image if not. With W = 1 every image is an update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from driftline.core.errors import UserError
from driftline.core.ranges import Count
from driftline.core.strategy import TTAStrategy, Wrapper
from driftline.core.stream import SINGLE_IMAGES


class Window(Wrapper):
    """Gives the method the last W images in place of one; a reset empties the buffer.

    Args:
        inner: the method, or the rule, inside, for which a batch is a full buffer.
        length: W.

    Raises:
        UserError: for a method that buys labels: those of earlier images are for sale no more.
    """

    images: Tensor | None

    def __init__(self, *, inner: TTAStrategy, length: Count) -> None:
        super().__init__(inner, needs=inner.needs | {SINGLE_IMAGES})
        if self.buys_labels:
            raise UserError(
                f"around=window: {type(self.method).__name__} buys labels of the batch that it "
                "gets, and of a window only the newest image is still for sale; leave it out"
            )
        self.length = length
        self.position = -1  # of the newest image
        self.register_buffer("images", None)  # [1..W, 3, H, W]

    def get_extra_state(self) -> int:
        return self.position

    def set_extra_state(self, state: int) -> None:
        self.position = state

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] of images `x` [B, 3, H, W], one after the other."""
        return torch.cat([self._adapt(image[None]) for image in x])

    def _adapt(self, x: Tensor) -> Tensor:
        self.position = (self.position + 1) % self.length
        if self.images is None:
            self.images = x.clone()
        elif len(self.images) < self.length:
            self.images = torch.cat([self.images, x])
        else:
            self.images[self.position] = x[0]
        here = slice(self.position, self.position + 1)
        if self.position == self.length - 1:
            return self.inner.adapt(self.images)[here]
        if self.batch_dependent:
            return self.inner.predict(self.images)[here]
        return self.inner.predict(x)
