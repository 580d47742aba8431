"""Accuracy of a method on a stream, estimated without labels; costs passes of its own.

| kind | estimate for one batch | passes an image |
|---|---|---|
| `agreement` | share of the images that the method and the method as it was one batch before predict alike | 1 |
| `aetta` | 1 - disagreement of the answer with predictions under dropout, corrected by the entropy of their mean, averaged over time | `passes` |

Both as in AETTA (Lee et al., CVPR 2024; taeckyung/AETTA @ 1315c13, `learner/dnn.py`: `aetta`,
`evaluate_dropout`, `agreement`). With e the share of predictions under dropout, over images and passes,
that differ from the answer, H the entropy of their mean probability over images and passes, and C
classes: E = min(max(e / (H / log C)^3, 0), 1 - 1/C), and the estimated error is the moving average
0.6 x the one before + 0.4 E, begun with e of the first batch. Agreement is the baseline of that code
(generalised disagreement equality, Jiang et al., ICLR 2022).

Differences: the answer is the one that `adapt` returned and the passes are those of the method before
it learned from the batch (there the two are one forward pass); dropout goes behind the stages of every
copy of the backbone in the method, where the code knows ResNets alone; the first batch, which has
nothing before it, has no agreement (there it is 100 %); an H that rounding makes negative (one class,
sure) is zero, with the largest E (there with none). A batch that somebody else answers is left out.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import MinLen, Predicate
from torch import Tensor, nn

from driftline.core.errors import UserError, suggest
from driftline.core.ranges import Below1, Count, distinct
from driftline.core.seed import derive
from driftline.core.strategy import TTAStrategy

Kind = Literal["agreement", "aetta"]
# Of the released code, by label space; elsewhere the first, which is ours.
RATES = {"cifar10": 0.4, "cifar100": 0.3, "imagenet1k": 0.2}
KEPT, POWER = 0.6, 3  # of the estimate before; of the relative entropy


def predict_as(strategy: TTAStrategy, state: Mapping[str, Any], x: Tensor) -> Tensor:
    """What the method, as it was in `state`, predicts for `x`; it is then as it was before."""
    now = deepcopy(strategy.snapshot())
    strategy.restore(state)
    try:
        with torch.no_grad():
            return strategy.predict(x)
    finally:
        strategy.restore(now)


def aetta(answers: Tensor, dropped: Tensor, before: Tensor | None) -> Tensor:
    """Estimated error of a batch, in [0, 1], 0-dim.

    Args:
        answers: predicted classes int64 [B].
        dropped: probabilities under dropout [passes, B, C].
        before: estimate for the batch before; None for the first.
    """
    differ = (dropped.argmax(2) != answers).double().mean()
    mean = dropped.double().mean((0, 1))
    entropy = -(mean * (mean + 1e-6).log()).sum().clamp_max(-1e-12)
    classes = dropped.shape[2]
    corrected = differ / (entropy / math.log(classes)) ** POWER
    corrected = corrected.clamp(0, 1 - 1 / classes)
    return KEPT * (differ if before is None else before) + (1 - KEPT) * corrected


def stages(net: nn.Module) -> list[nn.Module]:
    """The parts of a network behind which dropout goes: about four, evenly spread.

    Those of ResNets are `layer1` to `layer4`; of other networks the row of modules (`blocks`,
    `stages`, `layers`, `features`) with the most parameters, or quarters of it.
    """
    named = dict(net.named_children())
    if all(f"layer{i}" in named for i in range(1, 5)):
        return [named[f"layer{i}"] for i in range(1, 5)]
    inside = [part for part in net.modules() if isinstance(part, nn.Sequential | nn.ModuleList)]
    rows = [row for row in inside if row is not net and len(row) > 1]
    if not rows:
        return []
    row = list(max(rows, key=lambda row: sum(p.numel() for p in row.parameters())))
    return [row[i - 1] for i in sorted({-(-len(row) * quarter // 4) for quarter in range(1, 5)})]


class Estimates:
    """Estimates for every batch that a method adapts to; a part of checkpoints.

        estimates.before(method, x)
        scores = method.adapt(x)
        row = estimates.after(scores, y)

    Args:
        kinds: agreement, aetta or both.
        passes: under dropout (aetta).
        rate: of dropout; null: 0.4 on CIFAR-10, 0.3 on CIFAR-100, 0.2 on ImageNet, as released;
            0.4 elsewhere, which is ours.
        after: names of modules in the network behind which dropout goes; null: its stages.
        label_space: of the stream.
    """

    def __init__(
        self,
        *,
        kinds: Annotated[list[Kind], MinLen(1), Predicate(distinct)],
        passes: Count,
        rate: Below1 | None,
        after: Annotated[list[str], MinLen(1)] | None,
        label_space: str,
    ) -> None:
        self.kinds, self.passes, self.names = kinds, passes, after
        self.rate = RATES.get(label_space, RATES["cifar10"]) if rate is None else rate
        self._batches = 0
        # kind -> batches, sums of the estimate and of its distance to the truth; percent
        self._sums = {kind: torch.zeros(3, dtype=torch.float64) for kind in kinds}
        self._error: Tensor | None = None  # of the last batch, by aetta
        self._previous: dict[str, Any] | None = None  # the method's state before the last batch
        self._dropped: Tensor | None = None  # of the present batch
        self._earlier: Tensor | None = None

    @torch.no_grad()
    def before(self, strategy: TTAStrategy, x: Tensor) -> None:
        """The passes for images `x` [B, 3, H, W], before the method learns from them."""
        if "aetta" in self.kinds:
            self._dropped = self._under_dropout(strategy, x)
        if "agreement" in self.kinds:
            if self._previous is not None:
                self._earlier = predict_as(strategy, self._previous, x).argmax(1)
            self._previous = deepcopy(strategy.snapshot())

    @torch.no_grad()
    def after(self, scores: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Estimated accuracy of the answers `scores` [B, C], percent, for the row of the batch.

        Args:
            y: labels int64 [B], which the estimates do not use; their distance to the truth does.
                -1 for images without one.
        """
        answers, estimates = scores.argmax(1), dict[Kind, Tensor]()
        if self._earlier is not None:
            estimates["agreement"] = (answers == self._earlier).double().mean()
        if self._dropped is not None:
            self._error = aetta(answers, self._dropped, self._error)
            estimates["aetta"] = 1 - self._error
        self._dropped = self._earlier = None
        self._batches += 1
        known = y >= 0
        truth = ((answers == y) & known).sum() / known.sum()
        for kind, estimate in estimates.items():
            distance = (estimate - truth).abs()
            row = torch.stack([torch.ones_like(estimate), estimate, distance]).nan_to_num(0.0)
            self._sums[kind] = self._sums[kind].to(row.device) + row * (~truth.isnan())
        return {f"estimate_{kind}": 100 * estimate for kind, estimate in estimates.items()}

    def _under_dropout(self, strategy: TTAStrategy, x: Tensor) -> Tensor:
        """Probabilities [passes, B, C]; random numbers of others are left alone."""
        scores = []
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self._dropout(strategy):
            torch.manual_seed(derive(strategy.seed, "estimate", self._batches))
            for _ in range(self.passes):
                out = strategy.predict(x)
                scores.append(out.softmax(1) if strategy.outputs == "logits" else out)
        return torch.stack(scores)

    @contextmanager
    def _dropout(self, strategy: TTAStrategy) -> Iterator[None]:
        def drop(module: nn.Module, args: Any, out: Any) -> Any:
            if isinstance(out, tuple):
                return (F.dropout(out[0], self.rate), *out[1:])
            return F.dropout(out, self.rate)

        hooks = [part.register_forward_hook(drop) for part in self._parts(strategy)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _parts(self, strategy: TTAStrategy) -> list[nn.Module]:
        """Modules behind which dropout goes, in every copy of the backbone, each once.

        Raises:
            UserError: where there are none, or not those that are named.
        """
        kind: Any = type(strategy.backbone)
        nets = [copy.net for copy in strategy.modules() if isinstance(copy, kind)]
        if self.names is None:
            parts = [part for net in nets for part in stages(net)]
            if not parts:
                raise UserError(
                    "estimate=accuracy: this network has no stages that are known here; name the "
                    "modules behind which dropout goes: estimate.after=[...]"
                )
        else:
            known = dict(nets[0].named_modules())
            for name in self.names:
                if name not in known:
                    near = suggest(name, known)
                    raise UserError(f"estimate.after: the network has no module {name!r}{near}")
            parts = [net.get_submodule(name) for net in nets for name in self.names]
        return list({id(part): part for part in parts}.values())

    def summary(self) -> dict[str, float]:
        """`estimate/KIND`, mean over the batches, percent; `_mae`: mean distance to the truth."""
        metrics = {}
        for kind, sums in self._sums.items():
            batches, estimate, distance = sums.tolist()
            if batches:
                metrics[f"estimate/{kind}"] = 100 * estimate / batches
                metrics[f"estimate/{kind}_mae"] = 100 * distance / batches
        return metrics

    def snapshot(self) -> dict[str, Any]:
        return {
            "batches": self._batches,
            "sums": {kind: sums.clone() for kind, sums in self._sums.items()},
            "error": self._error,
            "previous": self._previous,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._batches, self._error = state["batches"], state["error"]
        self._sums = {kind: sums.clone() for kind, sums in state["sums"].items()}
        self._previous = state["previous"]
