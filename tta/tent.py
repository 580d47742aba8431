"""Tent: entropy minimisation on the normalisation layers.

Paper: "Tent: Fully Test-Time Adaptation by Entropy Minimization" (ICLR 2021, arXiv 2006.10726).
Code: github.com/DequanWang/tent @ e9e926a; the same class in github.com/qinenergy/cotta @ c212a20.
Variants: github.com/mariodoebler/test-time-adaptation @ 8b2ed63 (`layers=norm`, `mode=eval`) and
github.com/Yangsenqiao/vida @ c26b0db (`layers=name`).

Deviations: an empty selection is an error instead of a silent no-op; parameters that are not
trained are frozen under `layers=name` too (the code computes their gradients for nothing); no
running statistics are kept for BatchNorm1d either, which changes no prediction in training mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count
from driftline.core.strategy import Preferred, TTAStrategy
from driftline.parts.adapters.plan import Plan
from driftline.parts.modes import evaluating
from driftline.parts.norms import Layers, train_norms, train_only
from driftline.parts.objectives import entropy
from driftline.parts.optim import StreamOptim

NAME = "tuned"  # of the one set of adapters


class Tent(TTAStrategy):
    """Each batch: forward, mean softmax entropy, one optimiser step on scales and shifts.

    Args:
        backbone: a network with normalisation layers.
        seed: of an adapter's initial values.
        layers: which normalisation layers learn, see `parts/norms.py`; `bn` is official.
        mode: of the whole network while adapting; decides on dropout and stochastic depth only,
            batch normalisation uses batch statistics in both.
        optim: of the one group `trained`.
        steps: updates per batch, at least 1.
        adapter: learns in place of normalisation layers, which stay as pretrained, whatever
            `layers` says; None: see `layers`.

    One image and a short last batch adapt like any other batch; only a map of a single pixel for
    a single image raises a UserError.
    """

    needs = frozenset({"head"})
    batch_dependent = True
    option: ClassVar[str] = "tent"  # of conf/strategy

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        layers: Layers,
        mode: Literal["train", "eval"],
        optim: StreamOptim,
        steps: Count,
        adapter: Plan | None,
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.bank = None if adapter is None else adapter.bank(backbone)
        if adapter is not None and self.bank is not None:
            trained = adapter.add(self.bank, NAME, self.rng("init"))
            self.bank.train(mode == "train")
            train_only(self.backbone, trained)
        else:
            trained = list(train_norms(backbone, layers, strategy=self.option).values())
        self.backbone.train(mode == "train")
        self.steps, self.optim = steps, optim
        second = [] if self.bank is None else self.bank.second_factors(NAME)
        self.optimizer = optim.optimizer({"trained": trained}, second)

    @classmethod
    def preferred_backbone(cls, options: Mapping[str, Any]) -> Preferred:
        return "vit" if options.get("adapter") else cls.prefers

    @classmethod
    def takes_seed(cls, options: Mapping[str, Any]) -> bool:
        return options.get("adapter") is not None

    def scores(self, x: Tensor) -> Tensor:
        """Scores [B, C] of the network as it is, in its present mode."""
        return self.backbone(x) if self.bank is None else self.bank.logits(x, NAME)

    def loss(self, logits: Tensor) -> Tensor:
        """Mean entropy, in nats, of the predictions `logits` [B, C]."""
        return entropy(logits).mean(0)

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the current weights; dropout is off whatever the mode."""
        with evaluating(self):
            return self.scores(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] from before the (last) update on this batch."""
        for _ in range(self.steps - 1):
            self._update(x)
        return self._update(x)

    @torch.enable_grad()
    def _update(self, x: Tensor) -> Tensor:
        logits = self.scores(x)
        self.loss(logits).backward()
        self.optim.update(self.optimizer, lambda: self.loss(self.scores(x)).backward())
        return logits.detach()
