"""EATA and ETA: entropy of images that are certain and not redundant, weighted by confidence.

Paper: "Efficient Test-Time Model Adaptation without Forgetting" (ICML 2022, arXiv 2204.02610).
Code: github.com/mr-eggplant/EATA @ f739b36; variants `mode=eval` and `layers=norm` from
github.com/mariodoebler/test-time-adaptation @ 8b2ed63, which is also what the recorded runs are of.
RDumb (Press et al., NeurIPS 2023, arXiv 2306.05401, github.com/oripress/CCC @ 656dec3) is ETA with
the rule `around=reset_every`.

What the code does, and may surprise: the whole batch goes forward and backward, images that are
left out weigh nothing, so the savings of the paper are counts of images; the mean prediction is
that of the images learned from, and an external reset leaves it (`keep_mean_on_reset`).

Deviations that change no number: no absolute value around a cosine of probabilities; the penalty
is summed over tensors before it is weighted.
Deviations that do: the Fisher images are those of `scenario.source_from`, where the authors take
2,000 of the clean evaluation images (`held_out` comes closest); an empty selection of layers is an
error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, NonNegative
from driftline.core.strategy import Progress, TTAStrategy
from driftline.core.stream import SourceImages
from driftline.parts.fisher import first_images, fisher
from driftline.parts.modes import evaluating
from driftline.parts.norms import Layers, train_norms
from driftline.parts.objectives import entropy
from driftline.parts.optim import StreamOptim

OLD = 0.9  # weight of the old mean prediction


class ETA(TTAStrategy):
    """EATA without its penalty: needs no source.

    Args:
        backbone: a network with normalisation layers.
        layers: which of them learn, see `parts/norms.py`; `bn` is official.
        mode: of the whole network while adapting; decides on dropout and stochastic depth only.
        optim: of the one group `trained`.
        steps: updates per batch, at least 1; each selects anew.
        margin: images whose entropy is at least `margin` ln(classes) are left out.
        similarity: so are those whose prediction has a cosine of at least this with the mean
            prediction of the images learned from; above 1 none is.
        keep_mean_on_reset: whether `reset` leaves that mean as it is (official) or forgets it.

    A batch from which nothing is selected changes nothing, and the next one is compared with the
    same mean. One image and a short last batch adapt like any other batch; only a map of a single
    pixel for a single image raises a UserError.
    """

    needs = frozenset({"head"})
    batch_dependent = True
    counters = ("certain", "learned")
    option: ClassVar[str] = "eta"  # of conf/strategy
    mean: Tensor | None  # prediction [C] of the images learned from; None before the first

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        mode: Literal["train", "eval"],
        optim: StreamOptim,
        steps: Count,
        margin: NonNegative,
        similarity: NonNegative,
        keep_mean_on_reset: bool,
    ) -> None:
        super().__init__(backbone)
        self.trained = train_norms(backbone, layers, strategy=self.option)
        self.backbone.train(mode == "train")
        self.optim, self.steps = optim, steps
        self.optimizer = optim.optimizer({"trained": self.trained.values()})
        self.margin, self.similarity = margin * math.log(backbone.num_classes), similarity
        self.keep_mean = keep_mean_on_reset
        self.register_buffer("mean", None)
        self.certain = self.learned = 0  # images so far: below the margin, and learned from

    def get_extra_state(self) -> list[int]:
        return [self.certain, self.learned]

    def set_extra_state(self, state: list[int]) -> None:
        self.certain, self.learned = state

    def report(self) -> dict[str, float]:
        """Images below the margin, and those of them learned from, in the whole stream."""
        return {"images_certain": float(self.certain), "images_learned": float(self.learned)}

    def reset(self) -> None:
        mean = self.mean
        super().reset()
        if self.keep_mean:
            self.mean = mean

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the current weights; dropout is off whatever the mode."""
        with evaluating(self):
            return self.backbone(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] from before the (last) update on this batch."""
        for _ in range(self.steps - 1):
            self._update(x)
        return self._update(x)

    @torch.enable_grad()
    def _update(self, x: Tensor) -> Tensor:
        logits = self.backbone(x)
        kept = self.select(logits.detach())
        if len(kept):
            self.loss(logits[kept]).backward()
            self.optim.update(self.optimizer, lambda: self.loss(self.backbone(x)[kept]).backward())
        return logits.detach()

    def entropy(self, logits: Tensor) -> Tensor:
        """What is minimised and compared with the margin, [B] for `logits` [B, C], in nats."""
        return entropy(logits)

    @torch.no_grad()
    def select(self, logits: Tensor) -> Tensor:
        """Rows [n] of `logits` [B, C] to learn from, which the mean prediction then follows."""
        p = logits.softmax(1)
        kept = self.entropy(logits) < self.margin
        certain = kept.nonzero()[:, 0]
        if self.mean is not None:
            kept = kept & (F.cosine_similarity(self.mean[None], p) < self.similarity)
        rows = kept.nonzero()[:, 0]
        if len(rows):
            new = p[rows].mean(0)
            self.mean = new if self.mean is None else OLD * self.mean + (1 - OLD) * new
        self.certain, self.learned = self.certain + len(certain), self.learned + len(rows)
        return rows

    def loss(self, logits: Tensor) -> Tensor:
        """Mean entropy of the selected `logits` [n, C], weighted by how certain they are."""
        values = self.entropy(logits)
        return ((self.margin - values.detach()).exp() * values).mean()


class EATA(ETA):
    """ETA with a penalty that holds back the weights that matter on the source.

    Args:
        backbone, layers, mode, optim, steps, margin, similarity, keep_mean_on_reset: as in ETA.
        fisher_weight: factor on the squared distance of the weights from the start, each weighted
            by its Fisher information; 0 is ETA.
        fisher_images: source images that the Fisher information is measured on, without labels;
            all where there are fewer.
        fisher_batch: images of a batch of these. Gradients are averaged over a batch before they
            are squared, so that the size matters.
    """

    option = "eata"

    def __init__(
        self,
        backbone: Backbone,
        *,
        layers: Layers,
        mode: Literal["train", "eval"],
        optim: StreamOptim,
        steps: Count,
        margin: NonNegative,
        similarity: NonNegative,
        keep_mean_on_reset: bool,
        fisher_weight: NonNegative,
        fisher_images: Count,
        fisher_batch: Count,
    ) -> None:
        super().__init__(
            backbone,
            layers=layers,
            mode=mode,
            optim=optim,
            steps=steps,
            margin=margin,
            similarity=similarity,
            keep_mean_on_reset=keep_mean_on_reset,
        )
        self.fisher_weight, self.fisher_batch = fisher_weight, fisher_batch
        self.fisher_images = fisher_images
        pairs = [(torch.zeros_like(p), p.detach().clone()) for p in self.trained.values()]
        held = pairs if fisher_weight else []
        self.fisher = nn.ParameterList(nn.Parameter(f, requires_grad=False) for f, _ in held)
        self.anchor = nn.ParameterList(nn.Parameter(w, requires_grad=False) for _, w in held)

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        return options["fisher_weight"] > 0

    def preparation(self) -> dict[str, Any] | None:
        if not self.fisher_weight:
            return None
        return {
            "fisher": [self.fisher_images, self.fisher_batch],
            "of": list(self.trained),
            "training_mode": self.backbone.training,
        }

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        """Fisher information of the weights that learn, by name."""
        images = first_images(source, self.fisher_batch, self.fisher_images, self.device)
        return fisher(self.backbone, self.trained, images)

    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, held in zip(self.trained, self.fisher, strict=True):
                held.copy_(artefact[name])

    def frozen(self) -> set[str]:
        """Fisher information and start come with the source phase and the pretrained weights."""
        held = [f"{which}.{i}" for which in ("fisher", "anchor") for i in range(len(self.fisher))]
        return super().frozen() | set(held)

    def loss(self, logits: Tensor) -> Tensor:
        """ETA's loss and the weighted penalty."""
        loss = super().loss(logits)
        return loss + self.fisher_weight * self.penalty() if self.fisher_weight else loss

    def penalty(self) -> Tensor:
        """Squared distance of the weights from the start, weighted by what they matter; 0-dim."""
        each = zip(self.trained.values(), self.fisher, self.anchor, strict=True)
        return torch.stack([(f * (p - start) ** 2).sum() for p, f, start in each]).sum()
