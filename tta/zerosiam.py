"""ZeroSiam: entropy of a branch with a layer of its own, held to the prediction without it.

Paper: "ZeroSiam: An Efficient Asymmetry for Test-Time Entropy Optimization without Collapse" (ICLR
2026, arXiv 2509.23183). Written from the official code, github.com/Cascol-Chen/ZeroSiam @ 57dfceb;
no recorded run.

A linear layer between features and head starts as the identity. Entropy falls through it (`online`
branch), and the scores without it, which are the prediction, are a target without gradient: as long
as both are equal, the step is Tent's.

What the code does, and may surprise: every normalisation layer learns, the uppermost too; the
divergence is the sum of both directions, not their mean; the layer's rate is ten times that of the
normalisation layers on some networks and the same on others; it takes no part in the prediction.

Deviations that change no number: the scores of the target are those that are returned, the code
computes them twice; one optimiser with two groups takes the place of two.
Deviations that do: a loss that is not finite stops the run; BatchNorm1d layers learn too; an empty
selection of layers is an error. An earlier version of the code (2dd3fc4) puts back the layer alone
on `reset`; here, as in the present one, everything goes back.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, NonNegative
from driftline.core.strategy import TTAStrategy
from driftline.parts.heads import linear_head
from driftline.parts.modes import evaluating
from driftline.parts.norms import Layers, Top, train_norms
from driftline.parts.objectives import entropy
from driftline.parts.optim import StreamOptim


def identity(head: nn.Linear) -> nn.Linear:
    """A linear layer without bias that gives features as they are to `head`."""
    size = head.in_features
    layer = cast(nn.Linear, nn.utils.skip_init(nn.Linear, size, size, bias=False))
    nn.init.eye_(layer.weight)
    return layer.to(head.weight)


class ZeroSiam(TTAStrategy):
    """Each batch: one forward, entropy and divergence of two branches behind it, one step.

    Args:
        backbone: a classifier with a linear head and normalisation layers.
        layers: which normalisation layers learn, see `parts/norms.py`; `norm` is official.
        top: whether the uppermost ones do, see `parts.norms.below_top`; `all` is official.
        mode: of the whole network while adapting; decides on dropout and stochastic depth only.
        optim: of two groups, `norms` and `predictor`, the layer between features and head.
        steps: updates per batch, at least 1.
        align: weight of the divergence, in nats, between the branches.

    One image and a short last batch adapt like any other batch; only a map of a single pixel for
    a single image raises a UserError.
    """

    needs = frozenset({"head", "features"})
    batch_dependent = True
    backbone: Any  # a Backbone; the parent promises less

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        top: Top,
        mode: Literal["train", "eval"],
        optim: StreamOptim,
        steps: Count,
        align: NonNegative,
    ) -> None:
        super().__init__(backbone)
        self.predictor = identity(linear_head(backbone, "zerosiam"))
        trained = train_norms(backbone, layers, strategy="zerosiam", top=top)
        self.backbone.train(mode == "train")
        self.optim, self.steps, self.align = optim, steps, align
        groups = {"norms": trained.values(), "predictor": self.predictor.parameters()}
        self.optimizer = optim.optimizer(groups)

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the current weights, without the layer; dropout is off whatever the mode."""
        with evaluating(self):
            return self.backbone(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C], without the layer, from before the (last) update on this batch.

        Raises:
            Diverged: when the loss is not finite; nothing is updated then.
        """
        for _ in range(self.steps - 1):
            self._update(x)
        return self._update(x)

    @torch.enable_grad()
    def _update(self, x: Tensor) -> Tensor:
        online, target = self.branches(x)
        loss = self.loss(online, target)
        self.optim.step(self.optimizer, loss, lambda: self.loss(*self.branches(x)))
        return target

    def branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B, C] with the layer, and without it and without gradient."""
        head = self.backbone.head
        features = self.backbone.features(x)
        return head(self.predictor(features)), head(features.detach())

    def loss(self, online: Tensor, target: Tensor) -> Tensor:
        """Mean entropy of `online` [B, C] plus the weighted divergence from `target` [B, C]."""
        p, q = online.log_softmax(1), target.log_softmax(1)
        both = F.kl_div(p, q, reduction="none", log_target=True).sum(1)
        both = both + F.kl_div(q, p, reduction="none", log_target=True).sum(1)
        return entropy(online).mean(0) + self.align * both.mean(0)
