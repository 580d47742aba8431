"""VDP: two prompts are added to the images, and nothing of the network learns.

Paper: "Decorate the Newcomers: Visual Domain Prompt for Continual Test Time Adaptation" (AAAI 2023,
arXiv 2212.04145). No official code exists, and the paper's text was not at hand.

Written from the abstract and a public reading note (Jo-wang/Daily-Paper-Reading): the sum of a
domain-specific and a domain-agnostic prompt on a part of the image; a teacher with averaged
prompts, cross-entropy of the student against it, augmented images beside the plain ones; a
quadratic penalty that holds what is sensitive to domains in the agnostic prompt near its value at
the end of the domain before; a jump of the confidence as the sign of a new domain. Checked against
these formulas by hand, and against nothing of the authors.

What the note leaves open was chosen here: prompts lie on a square in the middle, start at 0, and
are added to the [0, 1] image before the network's normalisation and without a clamp; the teacher
sees the augmented images, the student the plain ones (with equal input the gradient would be zero
for ever); sensitivity is the square of the distance that a weight went within a domain, summed over
domains; the student's scores are the answer. All rates and limits are ours.

A network that is fed images without the normalisation that it was trained with may gain from a
prompt what the missing normalisation took: set backbone.normalize rightly before comparing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Count, NonNegative, Positive, Unit
from driftline.core.strategy import TTAStrategy
from driftline.parts import teacher, views
from driftline.parts.modes import evaluating
from driftline.parts.norms import use_batch_statistics
from driftline.parts.objectives import consistency
from driftline.parts.optim import StreamOptim


class VDP(TTAStrategy):
    """Student and teacher prompts in front of one frozen network.

    Args:
        backbone: any classifier, in evaluation mode throughout.
        seed: of the views.
        share: side of the square with prompts, relative to that of the image.
        views: augmented copies of the batch whose scores the teacher averages.
        ema: weight of the old teacher in the moving average.
        reg_weight: factor on the agnostic prompt's penalty, per squared unit of the [0, 1] image.
        jump: change of the mean confidence between two batches from which a new domain begins.
        forget_specific: whether the specific prompt starts anew with a domain.
        statistics: of BatchNorm layers: `running`, the pretrained ones, or of the `batch`.
        optim: of two groups, the prompts `specific` and `agnostic`.

    One image and a short last batch adapt like any other batch, and networks without BatchNorm too.

    Raises:
        UserError: in `adapt` and `predict`, for images of another size than the network's.
    """

    needs = frozenset({"head"})
    last_confidence: Tensor
    domains: Tensor
    begin: Tensor
    sensitivity: Tensor

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        share: Positive,
        views: Count,
        ema: Unit,
        reg_weight: NonNegative,
        jump: Unit,
        forget_specific: bool,
        statistics: Literal["running", "batch"],
        optim: StreamOptim,
    ) -> None:
        super().__init__(backbone, seed=seed)
        backbone.eval().requires_grad_(False)
        if statistics == "batch":
            use_batch_statistics(backbone.net)
        self.batch_dependent = statistics == "batch"  # type: ignore[misc]
        self.views, self.ema, self.reg_weight = views, ema, reg_weight
        self.jump, self.forget_specific, self.optim = jump, forget_specific, optim
        self.side = backbone.input_size
        inner = max(1, min(self.side, round(share * self.side)))
        self.first = (self.side - inner) // 2
        blank = torch.zeros(3, inner, inner).to(next(backbone.parameters()))
        names = ("specific", "agnostic")
        self.prompts = nn.ParameterDict({k: nn.Parameter(blank.clone()) for k in names})
        averaged = {k: nn.Parameter(blank.clone(), requires_grad=False) for k in names}
        self.averaged = nn.ParameterDict(averaged)
        # Of the agnostic prompt: its value at the begin of this domain, which is that at the end of
        # the one before, and how far it went in earlier ones.
        self.register_buffer("begin", blank.clone())
        self.register_buffer("sensitivity", blank.clone())
        self.register_buffer("last_confidence", torch.full((), -1.0).to(blank))
        self.register_buffer("domains", torch.ones((), dtype=torch.int64, device=blank.device))
        self.optimizer = optim.optimizer({k: [self.prompts[k]] for k in names})
        self.rng("views")

    def report(self) -> dict[str, float]:
        """Domains that were told apart since the last reset, the first included."""
        return {"domains_noticed": float(self.domains)}

    def decorate(self, x: Tensor, prompts: nn.ParameterDict) -> Tensor:
        """Images with both prompts on them.

        Raises:
            UserError: for images of another size than the prompts were made for.
        """
        if x.shape[-2:] != (self.side, self.side):
            raise UserError(
                f"strategy=vdp has prompts for images of {self.side} pixels a side (input_size of "
                f"the backbone), and these are {tuple(x.shape[-2:])}: set backbone.input_size, in "
                "the library input_size= of driftline.make, or resize the images"
            )
        after = self.side - self.first - prompts["specific"].shape[-1]
        margins = (self.first, after, self.first, after)
        return x + nn.functional.pad(prompts["agnostic"] + prompts["specific"], margins)

    def predict(self, x: Tensor) -> Tensor:
        """Scores [B, C] with the student's prompts."""
        with evaluating(self.backbone):
            return self.backbone(self.decorate(x, self.prompts))

    @torch.enable_grad()
    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] of the student from before the update on this batch.

        Raises:
            Diverged: when the loss is not finite; nothing is updated then.
        """
        target = self.target(x)
        self.notice(target.softmax(1).amax(1).mean())
        logits = self.backbone(self.decorate(x, self.prompts))

        def again() -> Tensor:
            return self.loss(self.backbone(self.decorate(x, self.prompts)), target)

        self.optim.step(self.optimizer, self.loss(logits, target), again)
        names = list(self.prompts)
        averaged = [self.averaged[k] for k in names]
        teacher.move_average(averaged, [self.prompts[k] for k in names], self.ema)
        return logits.detach()

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        """Scores [B, C] with the teacher's prompts, averaged over augmented images."""
        images = (self.decorate(self.augment(x), self.averaged) for _ in range(self.views))
        return torch.stack([self.backbone(image) for image in images]).mean(0)

    def augment(self, x: Tensor) -> Tensor:
        """One random view of the batch `x`."""
        return views.apply(x, views.draw(self.rng("views"), x.shape))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy against the teacher, and the penalty of the agnostic prompt."""
        away = (self.prompts["agnostic"] - self.begin).square()
        penalty = (self.sensitivity * away).sum()
        return consistency(logits, target, symmetric=False) + self.reg_weight * penalty

    @torch.no_grad()
    def notice(self, confidence: Tensor) -> None:
        """Begin a new domain where the mean confidence jumps; the first batch cannot."""
        known = self.last_confidence >= 0
        if known and (confidence - self.last_confidence).abs() > self.jump:
            self.domains += 1
            agnostic = self.prompts["agnostic"]
            self.sensitivity += (agnostic - self.begin).square()
            self.begin.copy_(agnostic)
            if self.forget_specific:
                self.prompts["specific"].zero_()
                self.averaged["specific"].zero_()
        self.last_confidence.copy_(confidence)
