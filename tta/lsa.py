"""LSA: a small network turns an estimate of the label distribution into changes of the classifier.

Paper: "Label Shift Adapter for Test-Time Adaptation under Covariate and Label Shifts" (ICCV 2023,
arXiv 2308.08810). No official code exists, and the paper's text was not at hand.

Written from the abstract and a public reading note (Jo-wang/Daily-Paper-Reading): before
deployment, with the network frozen, an adapter is trained on long-tailed source images with a
logit-adjusted cross-entropy; it maps one number, the imbalance degree of a label distribution, to a
scale and a shift of the features and to differences of the classifier's weight and bias; on the
stream, a moving average of predictions estimates the label distribution, and any method adapts on
top (`inner`). Checked against these formulas by hand, and against nothing of the authors.

What the note leaves open was chosen here. The degree d of a distribution p is the slope of ln p
over ln s, with s the label distribution of the source: 1 is the source's own, 0 balanced, -1 its
reverse (s^d, normalised, has the degree d). While training, degrees are spread evenly over the
range, and the loss is the cross-entropy of scores + ln s - ln s^d, whose minimum is the classifier
for s^d. The adapter has one hidden layer and starts without effect; a batch is predicted with the
estimate from before it. All rates are ours. A balanced source has no degree: d is 0 and nothing is
shifted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.build import made
from driftline.core.ranges import Positive, Size, Unit
from driftline.core.seed import generator
from driftline.core.strategy import Progress, TTAStrategy, Wrapper
from driftline.core.stream import Batch, SourceImages
from driftline.parts.heads import linear_head
from driftline.parts.modes import evaluating
from driftline.parts.warmup import WarmUp
from driftline.tta.unmix_tns import Inner

GOLDEN = 0.6180339887498949  # multiples of it, without their whole parts, fill [0, 1) evenly


class Shift(nn.Module):
    """What is done to the features and scores of a classifier D -> C at the present degree.

    Args:
        width: of the hidden layer.
        numbers: of its initial values.
    """

    degree: Tensor
    count: Tensor

    def __init__(self, dim: int, classes: int, width: int, numbers: torch.Generator) -> None:
        super().__init__()
        self.sizes, self.shape = [dim, dim, classes * dim, classes], (classes, dim)
        self.hidden, self.out = nn.Linear(1, width), nn.Linear(width, sum(self.sizes))
        for parameter in self.hidden.parameters():
            nn.init.uniform_(parameter, -1, 1, generator=numbers)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("degree", torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))  # of training batches

    def forward(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Scores [..., C] of features [..., D]: (W + dW) ((1 + gamma) h + beta) + b + db."""
        changes = self.out(self.hidden(self.degree[None]).relu()).split(self.sizes)
        gamma, beta, of_weight, of_bias = changes
        bias = of_bias if bias is None else bias + of_bias
        return F.linear(h + gamma * h + beta, weight + of_weight.view(self.shape), bias)


class NotKept:
    """Progress of what the method inside prepares: an interrupted preparation starts it anew."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say

    def load(self) -> None:
        return None

    def save(self, state: Mapping[str, Any]) -> None:
        pass


class LSA(Wrapper):
    """A label shift adapter at the classifier of every network of the method inside.

    Args:
        backbone: a network whose classifier is a linear layer.
        seed: of the adapter's start, and of the method inside.
        num_classes: of the method inside.
        inner: the method that adapts; it runs as it would without.
        width: of the adapter's hidden layer.
        limit: degrees are trained, and cut, within -limit and limit.
        ema: weight of the old estimate of the label distribution.
        warmup: training of the adapter on labelled source images.

    One image and a short last batch count in the estimate like any other batch.

    Raises:
        UserError: for a network without a linear classifier.
    """

    estimate: Tensor
    log_prior: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        inner: Inner,
        width: Size,
        limit: Positive,
        ema: Unit,
        warmup: WarmUp,
    ) -> None:
        head = linear_head(backbone, "lsa")
        numbers = generator(seed, "strategy", "label shift adapter")
        shift = Shift(head.in_features, head.out_features, width, numbers).to(head.weight)
        shift.requires_grad_(False)
        # No bound method: copies of the network share the adapter instead of copying it.
        head.register_forward_hook(lambda layer, x, out: shift(x[0], layer.weight, layer.bias))
        live = {"backbone": backbone, "seed": seed, "num_classes": num_classes}
        method = made(inner, live, at="strategy.inner")
        super().__init__(method, needs=method.needs | {"head"}, static=False)
        self.shift, self.limit, self.ema, self.warmup = shift, limit, ema, warmup
        balanced = torch.full((head.out_features,), 1 / head.out_features).to(head.weight)
        self.register_buffer("estimate", balanced)
        self.register_buffer("log_prior", balanced.log())

    # ------------------------------------------------------------------ before the stream

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        return True

    @property
    def method(self) -> TTAStrategy:
        """With its adapter; it is no rule."""
        return self

    def preparation(self) -> dict[str, Any] | None:
        kind = f"{type(self.inner).__module__}.{type(self.inner).__name__}"
        return {
            "width": self.shift.hidden.out_features,
            "limit": self.limit,
            "warmup": self.warmup.settings(),
            "seed": self.seed,
            kind: self.inner.preparation(),
        }

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        """The adapter, the source's label distribution, and what the method inside prepares."""
        counts = torch.ones_like(self.estimate)  # one more of each: none has probability zero
        for batch in source.batches(self.warmup.batch_size):
            counts += torch.bincount(batch.y, minlength=len(counts)).to(counts)
        self.log_prior = (counts / counts.sum()).log()
        network: Any = self.backbone
        weight = network.head.weight.detach()
        bias = None if network.head.bias is None else network.head.bias.detach()

        def loss(batch: Batch) -> Tensor:
            self.shift.count += 1
            self.shift.degree = self.limit * (2 * (self.shift.count * GOLDEN % 1) - 1)
            with evaluating(network):
                h = network.features(batch.x)
            target = (self.shift.degree * self.log_prior).log_softmax(0)
            return F.cross_entropy(self.shift(h, weight, bias) + self.log_prior - target, batch.y)

        self.shift.requires_grad_(True)
        self.warmup.run(self.shift, loss, source, progress)
        artefact = {f"shift.{k}": v.detach() for k, v in self.shift.named_parameters()}
        artefact["log_prior"] = self.log_prior
        if self.inner.preparation() is None:
            return artefact
        self.shift.requires_grad_(False)
        self.shift.degree = torch.zeros_like(self.shift.degree)
        inside = self.inner.prepare(source, NotKept(progress.say))
        return artefact | {f"inner.{k}": v for k, v in inside.items()}

    @torch.no_grad()
    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        for name, parameter in self.shift.named_parameters():
            parameter.copy_(artefact[f"shift.{name}"])
        self.log_prior.copy_(artefact["log_prior"])
        self.shift.degree.zero_()
        if self.inner.preparation() is not None:
            inside = {k: v for k, v in artefact.items() if k.startswith("inner.")}
            self.inner.use_prepared({k.removeprefix("inner."): v for k, v in inside.items()})

    def frozen(self) -> set[str]:
        """The adapter and the source's label distribution never change on the stream."""
        own = {f"shift.{name}" for name, _ in self.shift.named_parameters()}
        return super().frozen() | own | {"log_prior"}

    # ------------------------------------------------------------------ adaptation

    def report(self) -> dict[str, float]:
        """The present degree beside what the method inside reports."""
        return self.inner.report() | {"imbalance_degree": float(self.shift.degree)}

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] of the method inside, at the degree from before this batch."""
        scores = self.inner.adapt(x)
        with torch.no_grad():
            p = (scores.softmax(1) if self.outputs == "logits" else scores).mean(0)
            # Scores that are no numbers would stay in the estimate for ever.
            p = torch.where(p.isfinite().all(), p, self.estimate)
            self.estimate.mul_(self.ema).add_(p, alpha=1 - self.ema)
            self.shift.degree.copy_(self.imbalance(self.estimate))
        return scores

    def imbalance(self, distribution: Tensor) -> Tensor:
        """The degree of a label distribution [C], cut to the limit; 0-dim."""
        axis = self.log_prior - self.log_prior.mean()
        spread = axis.square().sum()
        logs = distribution.clamp_min(1e-12).log()
        slope = (axis * (logs - logs.mean())).sum() / spread.clamp_min(1e-12)
        return torch.where(spread > 1e-6, slope, 0).clamp(-self.limit, self.limit)
