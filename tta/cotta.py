"""CoTTA: an averaged teacher, augmentation-averaged targets and stochastic restoration.

Paper: "Continual Test-Time Domain Adaptation" (CVPR 2022, arXiv 2203.13591).
Code: github.com/qinenergy/cotta @ c212a20, whose `cifar` and `imagenet` folders differ; variant
`mode=eval` from github.com/mariodoebler/test-time-adaptation @ 8b2ed63.

Deviations that change no number: anchor and teacher run without gradients; views are not forwarded
when the gate does not ask for them and the clean teacher not when views replace it; the target is
computed before the student's pass; the anchor is also the copy that weights are restored from;
restoration selects instead of multiplying; tensors that are never optimised (class token, position
table) get no gradient.
Deviations that do: a non-finite loss stops the run; BatchNorm1d layers use batch statistics too;
stream and random numbers are separate (`rng=reference` reproduces a torch generator that starts
in the same state, for networks without dropout).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.errors import Diverged
from driftline.core.ranges import Count, NonNegative, Unit
from driftline.core.strategy import Progress, TTAStrategy
from driftline.core.stream import SourceImages
from driftline.parts import teacher, views
from driftline.parts.modes import evaluating
from driftline.parts.norms import (
    collect_parameters,
    train_only,
    use_batch_statistics,
    view_statistics,
)
from driftline.parts.objectives import consistency
from driftline.parts.optim import StreamOptim

SOURCE_BATCH = 64  # images, while the threshold is measured


class CoTTA(TTAStrategy):
    """Student, teacher (moving average) and anchor (source copy) of one network.

    Args:
        backbone: any classifier; becomes the student.
        seed: of the views and of the restoration.
        optim: of the student, the one group `weights`.
        loss: `ce`: H(teacher, student); `sce`: mean of both directions.
        threshold: anchor confidence below which the views replace the clean teacher; `source`
            takes the authors' rule (issue 16 of their repository): the 5 % quantile of the anchor's
            confidence on source images, minus 0.05.
        gate: `batch` compares the mean confidence, `sample` decides for each image.
        views: transformed copies of the batch that are averaged.
        average: of the views' `logits`, or of their `probabilities` (returned as logarithms).
        always_draw: consume the random numbers of the views even where they are not needed.
        restore_prob: chance per weight and update of returning to its source value.
        ema: weight of the old teacher in the moving average.
        steps: updates per batch, at least 1.
        mode: of all three networks while adapting; decides on dropout and stochastic depth only.
        rng: `reference` draws everything from one CPU generator in the code's order; `device`
            draws noise and masks where the weights are (other numbers, same distribution).
        view_chunk: views per forward of the teacher; each keeps its own batch statistics, so the
            results are equal up to rounding. More than 1 costs memory and serves accelerators.

    One image and a short last batch adapt like any other batch; only a map of a single pixel for
    a single image raises a UserError.
    """

    needs = frozenset({"head"})
    batch_dependent = True
    seen: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        optim: StreamOptim,
        loss: Literal["ce", "sce"],
        threshold: NonNegative | Literal["source"],
        gate: Literal["batch", "sample"],
        views: Count,
        average: Literal["logits", "probabilities"],
        always_draw: bool,
        restore_prob: Unit,
        ema: Unit,
        steps: Count,
        mode: Literal["train", "eval"],
        rng: Literal["reference", "device"],
        view_chunk: Count,
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.symmetric, self.gate, self.average = loss == "sce", gate, average
        self.by_source = threshold == "source"
        self.threshold = math.nan if threshold == "source" else threshold
        self.views, self.always_draw = views, always_draw
        self.restore_prob, self.ema = restore_prob, ema
        self.steps, self.view_chunk = steps, view_chunk

        trained = list(collect_parameters(backbone.net).values())
        train_only(self.backbone.train(mode == "train"), trained)
        use_batch_statistics(backbone.net)
        self.teacher = deepcopy(backbone).requires_grad_(False)
        self.anchor = backbone.frozen_copy()
        sources = collect_parameters(self.anchor.net).values()
        self.restorable = list(zip(trained, sources, strict=True))
        self.optim = optim
        self.optimizer = optim.optimizer({"weights": trained})
        self._unused = deepcopy(self.optimizer.state_dict())
        self.on_device = rng == "device"
        # Both are made now: `restore` can only set a generator that is on the right device.
        self.rng("method")
        self._bulk()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        return options["threshold"] == "source"

    def preparation(self) -> dict[str, Any] | None:
        """Only `threshold=source` needs the source."""
        return (
            {"rule": "5 % quantile - 0.05", "batch_size": SOURCE_BATCH} if self.by_source else None
        )

    @torch.no_grad()
    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        """The threshold, from the anchor's confidence on every source image."""
        batches = source.batches(SOURCE_BATCH, epoch=0)  # shuffled: batches of mixed classes
        confidences = [self.anchor(b.x.to(self.device)).softmax(1).amax(1) for b in batches]
        return {"threshold": torch.cat(confidences).quantile(0.05) - 0.05}

    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        self.threshold = float(artefact["threshold"])

    def report(self) -> dict[str, float]:
        """The threshold, where it comes from the source."""
        return {"threshold": self.threshold} if self.by_source else {}

    def frozen(self) -> set[str]:
        """The anchor never changes and is rebuilt from the pretrained weights."""
        return super().frozen() | {f"anchor.{name}" for name in self.anchor.state_dict()}

    def begin_stream(self) -> None:
        """Nothing to prepare: the start is the anchor, so no further copy is kept."""

    @torch.no_grad()
    def reset(self) -> None:
        """Student and teacher equal the source, the optimiser is unused; generators run on."""
        for network in (self.backbone, self.teacher):
            network.load_state_dict(self.anchor.state_dict())
        assert self.optimizer is not None
        self.optimizer.load_state_dict(deepcopy(self._unused))

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the teacher on the images as they are; dropout is off whatever the mode."""
        with evaluating(self.teacher):
            return self.teacher(x)

    def adapt(self, x: Tensor) -> Tensor:
        """The teacher's target [B, C] from before the (last) update on this batch.

        Raises:
            Diverged: when the loss is not finite; nothing is updated then.
        """
        self.seen += 1
        for _ in range(self.steps - 1):
            self._update(x)
        return self._update(x)

    @torch.enable_grad()
    def _update(self, x: Tensor) -> Tensor:
        target = self.target(x)  # first: its memory is free again when the student needs much
        self.backward(x, target)
        self.optim.update(self.optimizer, lambda: self.loss(self.backbone(x), target).backward())
        self.average_teacher()
        self.restore_weights()
        return target

    def backward(self, x: Tensor, target: Tensor) -> Tensor:
        """Leave the gradients of the loss; returns the student's logits [B, C].

        Raises:
            Diverged: when the loss is not finite.
        """
        logits = self.backbone(x)
        loss = self.loss(logits, target)
        if not torch.isfinite(loss):
            name = type(self).__name__.lower()
            raise Diverged(
                f"strategy={name}: the loss of batch {int(self.seen)} is {loss.item()}; the "
                "weights diverged, and restoring a part of them per update cannot heal that. Lower "
                "strategy.optim.lr, or reset between domains."
            )
        loss.backward()
        return logits.detach()

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of the student's `logits` [B, C] against the teacher's `target`."""
        return consistency(logits, target, symmetric=self.symmetric)

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        """What the student learns, and what is returned: logits [B, C] of the teacher."""
        confidence = self.anchor.frozen_logits(x).softmax(1).amax(1)
        if self.gate == "batch":
            confidence = confidence.mean(0, keepdim=True)
        unsure = confidence < self.threshold  # [1] or [B]
        some, every = torch.stack([unsure.any(), unsure.all()]).tolist()
        if not some:
            if self.always_draw:
                for _ in range(self.views):
                    self.draw(x)
            return self.teacher(x)
        averaged = self._average(self.view_scores(x))
        return averaged if every else torch.where(unsure[:, None], averaged, self.teacher(x))

    def view_scores(self, x: Tensor) -> list[Tensor]:
        """Logits [B, C] of the teacher on each view of `x`."""
        scores: list[Tensor] = []
        while len(scores) < self.views:
            size = min(self.view_chunk, self.views - len(scores))
            views = [self.augment(x) for _ in range(size)]
            with view_statistics(self.teacher, size):
                logits = self.teacher(views[0] if size == 1 else torch.cat(views))
            scores += logits.chunk(size)
        return scores

    def _average(self, scores: list[Tensor]) -> Tensor:
        if self.average == "logits":
            return torch.stack(scores).mean(0)
        logs = torch.stack([s.log_softmax(1) for s in scores])
        return logs.logsumexp(0) - math.log(len(scores))  # a mean of underflows is not -inf

    def _bulk(self) -> torch.Generator:
        return self.rng("device", self.device) if self.on_device else self.rng("method")

    def draw(self, x: Tensor) -> views.Draws:
        """Random numbers of one view of `x`."""
        return views.draw(self.rng("method"), x.shape, noise=self._bulk())

    def augment(self, x: Tensor) -> Tensor:
        """One random view of the batch `x`."""
        return views.apply(x, self.draw(x))

    @torch.no_grad()
    def average_teacher(self) -> None:
        """`teacher = ema * teacher + (1 - ema) * student` for every parameter."""
        teacher.move_average([*self.teacher.parameters()], [*self.backbone.parameters()], self.ema)

    def restore_mask(self, parameter: Tensor) -> Tensor:
        """Boolean, shaped like `parameter`: True where it returns to its source value."""
        return teacher.restore_mask(parameter, self.restore_prob, self._bulk())

    @torch.no_grad()
    def restore_weights(self) -> None:
        """Put a random subset of the optimised weights back to the source."""
        for parameter, source in self.restorable:
            torch.where(self.restore_mask(parameter), source, parameter, out=parameter)
