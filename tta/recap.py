"""ReCAP: entropy and agreement of the predictions in a region around each feature, in closed form.

Paper: "Region Confidence Proxy" (ICML 2025, arXiv 2505.20704). Code: hzcar/ReCAP, which could not
be read; written from a public copy of its method file (both variants, `selection`), which is also
what the recorded runs are of. Settings come from a driver with the same header, which may differ
from the authors' (not verified).

The features around that of an image are taken as normal, with a diagonal variance that is measured
on source images. A bound on the mean entropy in that region (`regional_entropy`) and one on how far
its predictions differ (`regional_instability`) need scores and two constants of the head alone.

What the code does, and may surprise: where no image is selected the gradient is zero and momentum
still moves the weights; after a recovery the old average is written back, so that recoveries
repeat until the loss has pulled it up (`keep_average_on_recovery`).

Deviations that change no number: the constants of the head are made a few rows at a time; one
product of matrices takes the place of a tensor [B, C, C].
Deviations that do: the variance is measured here (the code reads a file), on features of the
pretrained network in evaluation mode; layers and threshold of the recovery are options; an overflow
of the constants is an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Count, NonNegative, Positive, Size, Unit
from driftline.core.strategy import Progress
from driftline.core.stream import SourceImages
from driftline.parts.heads import linear_head
from driftline.parts.modes import evaluating
from driftline.parts.norms import Layers, Top
from driftline.parts.optim import StreamOptim
from driftline.tta.deyo import drops, shuffled_patches
from driftline.tta.sar import SAR

SCALE = 0.1  # s of the paper
SOURCE_BATCH = 64  # images, while the variance is measured
VALUES = 1 << 24  # of one block of differences of rows of the head


def closeness(weight: Tensor, variance: Tensor, tau: float) -> Tensor:
    """G [C, C]: exp(tau / 2s * sum_d (W_jd - W_id)^2 variance_d) for rows W [C, D] of the head."""
    rows = max(1, VALUES // weight.numel())
    blocks = [
        ((weight[None] - part[:, None]).square() * variance).sum(2) for part in weight.split(rows)
    ]
    return (torch.cat(blocks) * (0.5 * tau / SCALE)).exp()


class ReCAP(SAR):
    """One step a batch on regional entropy and instability of the images selected.

    Args:
        backbone: a network with normalisation layers and a linear head.
        seed: of the permutations.
        layers, top, mode, optim, steps, keep_momentum_on_recovery, keep_average_on_recovery: as in
            SAR; `optim.sam` is not official.
        selection: `drop`: images below the margin whose prediction rests on the shape of the object
            ("on SAR and DeYO" in the paper), weighted by their regional entropy; `all`: every image
            with weight 1 ("on Tent"); margin, level, cap, drop and patches are not read then.
        tau: how far the region reaches.
        instability: weight of the regional instability.
        margin: images whose regional entropy is at least `margin` ln(classes) are left out.
        level: images weigh exp(`level` ln(classes) - regional entropy), at most `cap`.
        cap: largest weight.
        drop: images whose probability of the predicted class falls by no more than this, once
            patches of the image have changed places, are left out.
        patches: on a side of that grid.
        recover_below: weights go back to the start when the moving average of half the loss, in
            nats, falls below this; 0: never.

    One image and a short last batch adapt like any other batch; only a map of a single pixel for a
    single image raises a UserError.
    """

    option = "recap"
    variance: Tensor
    near: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        layers: Layers,
        top: Top,
        mode: Literal["train", "eval"],
        optim: StreamOptim,
        steps: Count,
        selection: Literal["drop", "all"],
        tau: Positive,
        instability: NonNegative,
        margin: NonNegative,
        level: NonNegative,
        cap: Positive,
        drop: Unit,
        patches: Size,
        recover_below: NonNegative,
        keep_momentum_on_recovery: bool,
        keep_average_on_recovery: bool,
    ) -> None:
        head = linear_head(backbone, "recap")
        super().__init__(
            backbone,
            layers=layers,
            top=top,
            mode=mode,
            optim=optim,
            steps=steps,
            margin=margin,
            recover_below=recover_below,
            keep_momentum_on_recovery=keep_momentum_on_recovery,
            keep_average_on_recovery=keep_average_on_recovery,
        )
        self.seed, self.selection = seed, selection
        self.tau, self.instability = tau, instability
        self.level, self.cap = level * math.log(backbone.num_classes), cap
        self.drop, self.patches = drop, patches
        weight = head.weight.detach()
        # All three follow from the pretrained weights and the source phase: no state.
        self.register_buffer("variance", torch.zeros_like(weight[0]), persistent=False)
        self.register_buffer("near", torch.ones(2 * [len(weight)]).to(weight), persistent=False)
        shift = 0.5 * SCALE * SCALE**2 * weight.square().sum(1)
        self.register_buffer("shift", shift, persistent=False)
        self.rng("permutations")  # part of the state from the start

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        return True

    def preparation(self) -> dict[str, Any] | None:
        return {"variance": "of features, unbiased", "batch_size": SOURCE_BATCH}

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        """Variance of each feature over the source images; labels are not read."""
        backbone = cast(Backbone, self.backbone)
        with evaluating(backbone):
            batches = source.batches(SOURCE_BATCH)
            features = torch.cat([backbone.features(b.x.to(self.device)) for b in batches])
        return {"variance": features.double().var(0, correction=int(len(features) > 1)).float()}

    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        self.variance.copy_(artefact["variance"])
        head = cast(Backbone, self.backbone).head
        assert head is not None
        self.near = closeness(head.weight.detach(), self.variance, self.tau)
        if not self.near.isfinite().all():
            raise UserError(
                f"strategy.tau={self.tau:g}: the regions reach so far that their bound overflows "
                "(rows of the head, or features on the source, that differ by much); lower it"
            )

    @torch.enable_grad()
    def _update(self, x: Tensor) -> Tensor:
        logits = self.backbone(x)
        kept = self.select(x, logits.detach())
        loss = self.loss(logits[kept])
        loss.backward()
        self.optim.update(self.optimizer, lambda: self.loss(self.backbone(x)[kept]).backward())
        self.follow(loss.item() / 2)
        return logits.detach()

    def regional_entropy(self, logits: Tensor) -> Tensor:
        """Bound [B], in nats, on the mean entropy around the features of `logits` [B, C]."""
        spread = (logits.softmax(1) @ self.near.T).log()
        return ((logits + self.shift).softmax(1) * (spread - logits.log_softmax(1))).sum(1)

    def regional_instability(self, logits: Tensor) -> Tensor:
        """Bound [B], in nats, on how far the predictions around the features differ."""
        p = logits.softmax(1)
        return (p * (p @ self.near.T).log()).sum(1)

    @torch.no_grad()
    def select(self, x: Tensor, logits: Tensor) -> Tensor:
        """Rows [n] of the batch to learn from."""
        if self.selection == "all":
            return torch.arange(len(x), device=x.device)
        rows = (self.regional_entropy(logits) < self.margin).nonzero()[:, 0]
        if not len(rows):
            return rows
        order = self.permutations(len(rows), self.patches**2).to(x.device)
        destroyed = self.backbone(shuffled_patches(x[rows], order))
        return rows[drops(logits[rows], destroyed) > self.drop]

    def permutations(self, count: int, length: int) -> Tensor:
        """Random orders, int64 [count, length]."""
        return torch.rand(count, length, generator=self.rng("permutations")).argsort(1)

    def loss(self, logits: Tensor) -> Tensor:
        """Mean over the selected `logits` [n, C]; for none NaN, with a gradient of zero."""
        entropy = self.regional_entropy(logits)
        values = entropy + self.instability * self.regional_instability(logits)
        if self.selection == "all":
            return values.mean(0)
        return ((self.level - entropy.detach()).exp().clamp(max=self.cap) * values).mean(0)
