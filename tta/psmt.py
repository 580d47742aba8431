"""PSMT: Fisher information decides what the student keeps and what its teacher takes over.

Paper: "Parameter-Selective Continual Test-Time Adaptation" (ACCV 2024, arXiv 2407.02253).
Code: github.com/JiaxuTian/PSMT @ 2c74335, a fork of mariodoebler/test-time-adaptation.

What is here is the released code, which differs from the paper as we read it: the random views are
commented out, so that teacher and student see the clean batch alone and confidence decides nothing;
the teacher takes the student's weights where the gradients are small, after they were put back to
the source, and a second step of the average elsewhere. `augmented=true` gives the views back, as
the comments of the code and CoTTA have them: unverified, no run of it is known. The four settings
files of the code are one, that of CoTTA on CIFAR100-C, so that no recipe is the authors' own.

Deviations that change no number: one student and one teacher pass stand for four and for up to 34
(32 equal ones are averaged; a mean of equal numbers may round in its last bit), and none of the
anchor is needed; the loss has one term for two equal ones; tensors that are never optimised have no
part in the penalty, which is zero for them.
Deviations that do: those of CoTTA; the views that the code draws and throws away are not drawn; the
second step of the teacher finds its mask by name, where the code counts parameters, which mixes
them up in a network with a class token or a position table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, NonNegative, Unit
from driftline.core.strategy import Progress
from driftline.core.stream import SourceImages
from driftline.parts.fisher import first_images, fisher
from driftline.parts.modes import evaluating
from driftline.parts.norms import collect_parameters
from driftline.parts.objectives import consistency
from driftline.parts.optim import StreamOptim
from driftline.tta.petal import LeastImportant


class PSMT(LeastImportant):
    """CoTTA with a penalty on changes of weights that matter to the source, and a second average.

    Args:
        backbone, seed, optim, views, ema, steps, mode, rng, view_chunk: as in CoTTA.
        augmented: false is the released code. true (unverified): the student also learns from a
            random view, and the teacher's target is the mean over `views` of them where the mean
            confidence of the source network is below `threshold`.
        threshold: see `augmented`.
        quantile: share of the weights, those with the smallest squared gradients, that return to
            the source and that the teacher takes over.
        fisher_weight: factor on the squared distance from the source weights, each weighed by its
            Fisher information.
        fisher_images: source images that it is estimated on, at most.
        fisher_batch: of so many at a time, whose mean gradient is squared.

    One image and a short last batch adapt like any other batch; networks without batch
    normalisation too; only a map of a single pixel for a single image raises a UserError.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        optim: StreamOptim,
        augmented: bool,
        threshold: NonNegative,
        views: Count,
        quantile: Unit,
        fisher_weight: NonNegative,
        fisher_images: Count,
        fisher_batch: Count,
        ema: Unit,
        steps: Count,
        mode: Literal["train", "eval"],
        rng: Literal["reference", "device"],
        view_chunk: Count,
    ) -> None:
        super().__init__(
            backbone,
            seed=seed,
            optim=optim,
            loss="sce",
            threshold=threshold,
            gate="batch",
            views=views,
            average="logits",
            always_draw=False,
            restore_prob=0.0,
            ema=ema,
            steps=steps,
            mode=mode,
            rng=rng,
            view_chunk=view_chunk,
        )
        self.augmented, self.quantile, self.fisher_weight = augmented, quantile, fisher_weight
        self.fisher_images, self.fisher_batch = fisher_images, fisher_batch
        zeros = [torch.zeros_like(source) for _, source in self.restorable]
        self.fisher = nn.ParameterList(nn.Parameter(z, requires_grad=False) for z in zeros)
        self._view: Tensor | None = None  # of the present batch

    # ------------------------------------------------------------------ before the stream

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        return True

    def preparation(self) -> dict[str, Any] | None:
        return {"fisher": {"images": self.fisher_images, "batch_size": self.fisher_batch}}

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        """The Fisher information of every optimised weight, by name."""
        parameters = collect_parameters(self.backbone.net)
        size, limit = self.fisher_batch, self.fisher_images
        images = first_images(source, size, limit, self.device, epoch=0)
        return fisher(self.backbone, parameters, images)

    @torch.no_grad()
    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        for name, held in zip(collect_parameters(self.backbone.net), self.fisher, strict=True):
            held.copy_(artefact[name])

    def frozen(self) -> set[str]:
        """The Fisher information never changes."""
        return super().frozen() | {f"fisher.{i}" for i in range(len(self.fisher))}

    # ------------------------------------------------------------------ adaptation

    def predict(self, x: Tensor) -> Tensor:
        """Scores of teacher and student, added, on the images as they are; dropout is off."""
        with evaluating(self):
            return self.teacher(x) + self.backbone(x)

    @torch.enable_grad()
    def _update(self, x: Tensor) -> Tensor:
        target = self.target(x)
        self._view = self.augment(x) if self.augmented else None
        logits = self.backward(x, target)
        self.optim.update(self.optimizer, lambda: self.loss(self.backbone(x), target).backward())
        self._view = None
        self.average_teacher()
        self.restore_weights()
        self.refresh_teacher()
        return target + logits

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        """Logits [B, C] of the teacher, over views as CoTTA's where they are `augmented`."""
        return super().target(x) if self.augmented else self.teacher(x)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Symmetric cross-entropy of student and teacher, and the penalty."""
        loss = super().loss(logits, target)
        if self._view is not None:
            second = consistency(self.backbone(self._view), target, symmetric=True)
            loss = 0.5 * loss + 0.5 * second
        return loss + self.fisher_weight * self.penalty()

    def penalty(self) -> Tensor:
        """Squared distance from the source weights, weighed by their Fisher information; 0-dim."""
        pairs = zip(self.restorable, self.fisher, strict=True)
        return torch.stack([(f * (p - source).square()).sum() for (p, source), f in pairs]).sum()

    @torch.no_grad()
    def refresh_teacher(self) -> None:
        """The student's weights where gradients are small; elsewhere one more step of the average.

        Of the weights that are optimised; the others never differ.
        """
        averaged = collect_parameters(self.teacher.net).values()
        for mine, (theirs, _), small in zip(averaged, self.restorable, self._small, strict=True):
            moved = self.ema * mine + (1 - self.ema) * theirs
            torch.where(small, theirs, moved, out=mine)
