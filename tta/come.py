"""COME: the entropy of a subjective opinion, with a share for "I do not know", in place of softmax.

Paper: "COME: Test-time Adaption by Conservatively Minimizing Entropy" (ICLR 2025,
arXiv 2410.10894).
Code: github.com/BlueWhaleLab/COME @ 5499c29 (`tent_come.py`, `eata_come.py`, `sar_come.py`), from
which this is written; no run of it is recorded, the formulas are checked by hand.

The opinion also takes the place of the softmax where EATA and SAR compare entropies with their
margin, weight images and watch for a collapse; EATA's mean prediction and its Fisher information
stay those of the softmax.

Deviations that change no number for 1,000 classes: K is the number of classes, which the code has
as 1,000; it normalises exponentials, here logarithms are normalised, so that large scores do not
overflow. Deviation that does: scores that are all zero have a length of 1e-12, where the code
divides by zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from driftline.tta.eata import EATA
from driftline.tta.sar import SAR
from driftline.tta.tent import Tent

DAMP = 1e-7  # added to every share before its logarithm


def opinion_entropy(logits: Tensor) -> Tensor:
    """Entropy [B], in nats, of K beliefs and the uncertainty for `logits` [B, K].

    The evidence of a class is exp(score); of the total, and of K more for uncertainty, each class
    has its share. The length of a row of scores takes no part in the gradient, so that confidence
    cannot be had by making all of them larger.
    """
    length = logits.norm(dim=1, keepdim=True)
    logits = logits / length.clamp_min(1e-12) * length.detach()
    rest = torch.full_like(logits[:, :1], math.log(logits.shape[1]))
    shares = torch.cat([logits, rest], 1).softmax(1) + DAMP
    return -(shares * shares.log()).sum(1)


class COME(Tent):
    """Tent on the entropy of the opinion; options as there."""

    option = "come"

    def loss(self, logits: Tensor) -> Tensor:
        """Mean entropy, in nats, of the opinions of `logits` [B, C]."""
        return opinion_entropy(logits).mean(0)


class COMEEATA(EATA):
    """EATA on the entropy of the opinion; options as there."""

    option = "come_eata"

    def entropy(self, logits: Tensor) -> Tensor:
        return opinion_entropy(logits)


class COMESAR(SAR):
    """SAR on the entropy of the opinion; options as there."""

    option = "come_sar"

    def entropy(self, logits: Tensor) -> Tensor:
        return opinion_entropy(logits)
