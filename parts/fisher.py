"""How much each weight matters for what a network says of source images, without their labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.core.stream import SourceImages


def first_images(
    source: SourceImages, size: int, limit: int, device: torch.device, *, epoch: int | None = None
) -> Iterator[Tensor]:
    """Images of the source in batches of `size`, up to `limit` in all, the last batch cut.

    Args:
        epoch: shuffled, by this number; None: in an order that mixes classes.
    """
    for batch in source.batches(size, epoch=epoch):
        yield batch.x[:limit].to(device)
        limit -= len(batch.x)
        if limit <= 0:
            return


def fisher(
    scores: Callable[[Tensor], Tensor],
    parameters: Mapping[str, Tensor],
    batches: Iterable[Tensor],
) -> dict[str, Tensor]:
    """Diagonal Fisher information in the form of EATA and its successors, by parameter name.

    The mean over batches of the squared gradient of the cross-entropy to the network's own
    classes, which is averaged over the batch before it is squared: equal images in other batches
    give other numbers, and a short last batch counts like any other.

    Args:
        scores: images [B, 3, H, W] to scores [B, C], in the mode that adapts.
        parameters: of the network; their gradients (`.grad`) are left as they are. One that the
            scores do not depend on gets zeros.
        batches: images on the network's device; zeros for none.
    """
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    count = 0
    for x in batches:
        with torch.enable_grad():
            logits = scores(x)
            loss = F.cross_entropy(logits, logits.detach().argmax(1))
            gradients = torch.autograd.grad(loss, [*parameters.values()], materialize_grads=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient**2
        count += 1
    return {name: t / max(1, count) for name, t in total.items()}
