"""RMT: a mean teacher with a symmetric loss, tied to the class means of the source.

Paper: "Robust Mean Teacher for Continual and Gradual Test-Time Adaptation" (CVPR 2023, arXiv
2211.13081). Code: github.com/mariodoebler/test-time-adaptation @ 8b2ed63, of the same authors.
The source-free form: `replay_weight=0 warmup_images=0`; the class means still come from the source.

Deviations that change no number: the teacher runs without gradients; the nearest class mean is
found with one matrix product instead of 1,000 copies of the features (a tie within rounding may
fall the other way); class means are summed in float64; what was prepared is found again by the
weights, the images and the settings, where the code keys it by the name of the data set.
Deviations that do: a class without a source image has no mean and is nobody's nearest, where the
code gets NaN everywhere; after the warm-up and after a reset, the replay begins a new pass over
the source, where the code goes on in the old one; any network with a linear head is split into
features and head, where the code, with a timm network, trains features under a copied head that
stays as it is; BatchNorm1d layers use batch statistics too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.paths import run_line
from driftline.core.ranges import Count, CountOrZero, NonNegative, Positive, Size, Unit
from driftline.core.strategy import Progress, TTAStrategy
from driftline.core.stream import Batch, SourceImages
from driftline.parts import teacher, views
from driftline.parts.heads import PrototypeHead, linear_head
from driftline.parts.modes import evaluating
from driftline.parts.norms import collect_parameters, train_only, use_batch_statistics
from driftline.parts.objectives import consistency
from driftline.parts.optim import StreamOptim
from driftline.parts.replay import Replay

EVERY = 500  # steps of the warm-up between two saved states


@torch.no_grad()
def class_means(
    backbone: Backbone, source: SourceImages, size: int, limit: int, progress: Progress
) -> Tensor:
    """Mean feature [K, D] of each class that has a source image, in the order of the classes.

    Args:
        size: images a batch, whose statistics a network with batch statistics uses.
        limit: stop after the batch that passes this number of images.
    """
    weight, means = next(backbone.parameters()), PrototypeHead(backbone.dim)
    means.grow(backbone.num_classes)
    means.to(weight.device)
    for batch in source.batches(size, epoch=0):  # shuffled: batches of mixed classes
        features = backbone.features(batch.x.to(weight.device))
        means.update(features, batch.y.to(weight.device))
        if means.counts.sum() > limit:
            break
    known = means.counts > 0
    if lacking := int((~known).sum()):
        progress.say(f"{lacking} of {len(known)} classes have no source image, and so no prototype")
    return (means.sums / means.counts[:, None])[known].to(weight.dtype)


def contrastive_loss(vectors: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss (arXiv 2004.11362) of unit vectors [V, B, D]; 0-dim.

    The V vectors of an image are positives of each other; the denominator holds all vectors of the
    batch but the one itself. One image alone has no negatives.
    """
    kinds, images = vectors.shape[:2]
    flat = vectors.flatten(0, 1)
    image = torch.arange(images, device=flat.device).repeat(kinds)
    itself = torch.eye(len(flat), dtype=torch.bool, device=flat.device)
    logs = (flat @ flat.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (image[:, None] == image) & ~itself
    return -logs.masked_fill(~positive, 0).sum() / (len(flat) * (kinds - 1))


class Contrast(nn.Module):
    """Pulls features, those of a view and the nearest class mean of the source together.

    Args:
        dim: length D of a feature vector.
        width: of both layers of the projector, which learns; None compares features as they are.
        temperature: divides the cosines.
        numbers: CPU generator of the projector's start, as torch starts linear layers.
    """

    prototypes: Tensor | None  # [K, D], not normalised

    def __init__(
        self, dim: int, width: int | None, temperature: float, numbers: torch.Generator
    ) -> None:
        super().__init__()
        self.temperature = temperature
        layers: list[nn.Module] = []
        for inputs in () if width is None else (dim, width):
            layer = nn.utils.skip_init(nn.Linear, inputs, width)
            for p in layer.parameters():
                p.data.uniform_(-(inputs**-0.5), inputs**-0.5, generator=numbers)
            layers += [layer, nn.ReLU()]
        self.projector = nn.Sequential(*layers[:-1])
        self.register_buffer("prototypes", None)

    @torch.no_grad()
    def nearest(self, features: Tensor) -> Tensor:
        """The class mean [B, D] of the largest cosine to each of `features` [B, D].

        Raises:
            UserError: before the class means are known.
        """
        if self.prototypes is None:
            raise UserError(
                "the method needs class means of the source: give it what its prepare returns, "
                f"with use_prepared, before adapt (`{run_line()}` does both)"
            )
        cosines = features @ F.normalize(self.prototypes, dim=1).T  # times the features' lengths
        return self.prototypes[cosines.argmax(1)]

    def forward(self, features: Tensor, of_view: Tensor) -> Tensor:
        """Loss of the features [B, D] of images and of their views; 0-dim."""
        vectors = torch.stack([self.nearest(features), features, of_view])
        return contrastive_loss(F.normalize(self.projector(vectors), dim=-1), self.temperature)


class RMT(TTAStrategy):
    """Student and teacher (moving average) of one network, and class means of the source.

    Args:
        backbone: a classifier with a linear head; becomes the student.
        seed: of the projector, the views and the order of the source images.
        optim: of two groups, `weights` (of the student) and `projector`.
        ema: weight of the old teacher in the moving average.
        self_training_weight: of the symmetric cross-entropy of the image and of its view against
            the teacher's prediction of the image.
        contrast_weight: of the contrastive loss.
        replay_weight: of the cross-entropy on a batch of labelled source images; 0 reads none
            during the stream.
        temperature, projection: of the contrastive loss; `projection` is the width of both layers
            of the projector, null goes without.
        source_batch: source images a batch: of class means, warm-up and replay.
        prototype_images: source images after which the class means are complete.
        warmup_images: source images (counted again in every pass) on which student and teacher
            are trained against each other before the stream, while the rate rises step by step to
            its value; 0 for none.
        steps: updates per batch, at least 1.
        update: false only predicts: what the warm-up alone is worth.

    One image and a short last batch adapt like any other batch; only a map of a single pixel for
    a single image raises a UserError. Networks without BatchNorm need nothing else.
    """

    needs = frozenset({"head", "features"})
    batch_dependent = True
    backbone: Any  # a Backbone; the parent promises less

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        optim: StreamOptim,
        ema: Unit,
        self_training_weight: NonNegative,
        contrast_weight: NonNegative,
        replay_weight: NonNegative,
        temperature: Positive,
        projection: Size | None,
        source_batch: Size,
        prototype_images: Count,
        warmup_images: CountOrZero,
        steps: Count,
        update: bool,
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.optim, self.ema, self.steps, self.update = optim, ema, steps, update
        self.weights = self_training_weight, contrast_weight, replay_weight
        self.prototype_images, self.warmup_steps = prototype_images, warmup_images // source_batch
        head = linear_head(backbone, "rmt")
        trained = list(collect_parameters(backbone.net).values())
        train_only(self.backbone.eval(), trained)
        use_batch_statistics(backbone.net)
        self.teacher = deepcopy(backbone).requires_grad_(False)
        contrast = Contrast(backbone.dim, projection, temperature, self.rng("projector"))
        self.contrast = contrast.to(head.weight).eval()
        self.replay = Replay(source_batch, self.rng("replay"), strategy="rmt")
        groups = {"weights": trained, "projector": self.contrast.parameters()}
        self.optimizer = optim.optimizer(groups)
        # Made now: `restore` can only set a generator that is on the right device.
        self._numbers()

    # ------------------------------------------------------------------ before the stream

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        return True

    @classmethod
    def replays_source(cls, options: Mapping[str, Any]) -> bool:
        return options["replay_weight"] > 0 and options["update"]

    def preparation(self) -> dict[str, Any]:
        settings = {"prototype_images": self.prototype_images, "source_batch": self.replay.size}
        if self.warmup_steps:
            settings |= {"warmup_steps": self.warmup_steps, "ema": self.ema, "seed": self.seed}
            settings |= {"optim": self.optim.settings()}
        return settings

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        """Class means; student, teacher and the state of the optimiser after the warm-up."""
        done = 0
        # In another order than on the stream, which would begin with the same images again.
        self.replay = Replay(self.replay.size, self.rng("warm-up"), strategy="rmt")
        self.replay.use(source)
        if state := progress.load():
            self.restore(state["method"])
            done = state["steps"]
            progress.say(f"warm-up goes on after step {done}")
        else:
            means = class_means(
                self.backbone, source, self.replay.size, self.prototype_images, progress
            )
            self.contrast.prototypes = means
        for step in range(done + 1, self.warmup_steps + 1):
            self._warm(step)
            if step % EVERY == 0 or step == self.warmup_steps:
                progress.save({"steps": step, "method": self.snapshot()})
                progress.say(f"warm-up step {step}/{self.warmup_steps}")
        assert self.contrast.prototypes is not None
        artefact = {"prototypes": self.contrast.prototypes}
        return artefact | self._warmed() if self.warmup_steps else artefact

    @torch.enable_grad()
    def _warm(self, step: int) -> None:
        """Step number `step`, from 1, of the warm-up; labels are not used."""
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * step / self.warmup_steps
        x = self.replay.next().x.to(self.device)
        with torch.no_grad():
            target = self.teacher(x)

        def loss() -> Tensor:
            return consistency(self.backbone(x), target, symmetric=True)

        self.optim.step(self.optimizer, loss(), loss)
        self.average_teacher()

    def _warmed(self) -> dict[str, Tensor]:
        assert self.optimizer is not None
        tensors = {f"student.{n}": p for n, p in self.backbone.named_parameters()}
        tensors |= {f"teacher.{n}": p for n, p in self.teacher.named_parameters()}
        for index, held in self.optimizer.state_dict()["state"].items():
            moments = {k: v for k, v in held.items() if isinstance(v, Tensor)}
            tensors |= {f"optimizer.{index}.{key}": value for key, value in moments.items()}
        return tensors

    @torch.no_grad()
    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        """Start from these class means and, after a warm-up, from what it learned."""
        assert self.optimizer is not None
        self.contrast.prototypes = artefact["prototypes"].to(self.device, copy=True)
        for name, network in (("student", self.backbone), ("teacher", self.teacher)):
            for n, p in network.named_parameters() if self.warmup_steps else ():
                p.copy_(artefact[f"{name}.{n}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in artefact.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                state.setdefault(int(index), {})[key] = tensor.clone()
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})

    def use_source(self, source: SourceImages) -> None:
        self.replay.use(source)

    def updated_parameters(self) -> Iterable[Tensor]:
        return super().updated_parameters() if self.update else []

    # ------------------------------------------------------------------ on the stream

    def predict(self, x: Tensor) -> Tensor:
        """Scores of student and teacher, added."""
        with evaluating(self):
            return self.backbone(x) + self.teacher(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] of student and teacher, added, from before the (last) update.

        Raises:
            Diverged: when the loss is not finite; nothing is updated then.
        """
        if not self.update:
            return self.predict(x)
        for _ in range(self.steps - 1):
            self._update(x)
        return self._update(x)

    @torch.enable_grad()
    def _update(self, x: Tensor) -> Tensor:
        view = self.augment(x)
        with torch.no_grad():
            target = self.teacher(x)
        replayed = self.replay.next() if self.weights[2] else None

        def gradients() -> Tensor:
            features, of_view = self.backbone.features(x), self.backbone.features(view)
            logits, view_logits = self.backbone.head(features), self.backbone.head(of_view)
            loss = self.loss(features, logits, of_view, view_logits, target)
            self.optim.backward(self.optimizer, loss)
            if replayed is not None:  # after the other graph is freed
                self.replay_loss(replayed.to(self.device)).backward()
            return logits.detach()

        logits = gradients()
        self.optim.update(self.optimizer, gradients)
        self.average_teacher()
        return logits + target

    def loss(
        self, features: Tensor, logits: Tensor, of_view: Tensor, view_logits: Tensor, target: Tensor
    ) -> Tensor:
        """Of a batch and its view: self-training against `target` [B, C], and the contrast."""
        of_image, contrast = self.weights[:2]
        each = [consistency(one, target, symmetric=True) for one in (logits, view_logits)]
        return of_image * (each[0] + each[1]) / 2 + contrast * self.contrast(features, of_view)

    def replay_loss(self, batch: Batch) -> Tensor:
        """Weighted cross-entropy of labelled source images."""
        return self.weights[2] * F.cross_entropy(self.backbone(batch.x), batch.y)

    def augment(self, x: Tensor) -> Tensor:
        """One random view of the batch `x`."""
        draws, noise = self._numbers()
        return views.apply(x, views.draw(draws, x.shape, noise=noise))

    def _numbers(self) -> tuple[torch.Generator, torch.Generator]:
        return self.rng("views"), self.rng("noise", self.device)

    def average_teacher(self) -> None:
        """`teacher = ema * teacher + (1 - ema) * student` for every parameter."""
        teacher.move_average([*self.teacher.parameters()], [*self.backbone.parameters()], self.ema)
