"""RoTTA: slow batch statistics, a class-balanced memory, a teacher that weighs images by age.

Paper: "Robust Test-Time Adaptation in Dynamic Scenarios" (CVPR 2023, arXiv 2303.13899).
Code: github.com/BIT-DA/RoTTA @ 67e34c9; variant `layers=norm` from
github.com/mariodoebler/test-time-adaptation @ 8b2ed63, which is also what the recorded runs are of.

Only scales and shifts learn, which the text does not say and the author confirms (issue 5 of the
repository). The sample ages are numbers of single precision, as in the code.

Deviations that change no number: labels and entropies of a batch reach the host in one transfer;
frozen weights exist once for student and teacher and are not averaged with themselves;
normalisation is one multiplication and addition.
Deviations that do: a non-finite loss stops the run; a last batch of one image is adapted to like
any other (the code leaves it out, scores and all); stream and random numbers are separate.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Literal

import torch
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Count, NonNegative, Unit
from driftline.core.strategy import TTAStrategy
from driftline.parts import teacher, views
from driftline.parts.memory import Memory
from driftline.parts.modes import evaluating
from driftline.parts.norms import by_kind, collect_parameters, replace_batch_norms, train_only
from driftline.parts.optim import StreamOptim

LAYERS = {"bn": by_kind("bn2d", "bn1d"), "norm": by_kind("bn2d", "bn1d", "ln", "gn")}


class RobustBatchNorm(nn.Module):
    """Batch normalisation with statistics that move slowly from those of the source.

    In training mode they take a step `alpha` towards the (biased) statistics of the batch, through
    which the gradient flows, and normalise with the new values; in evaluation mode they stay.

    Raises:
        UserError: for a layer that has no statistics of the source.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, name: str, layer: nn.BatchNorm2d, alpha: float) -> None:
        super().__init__()
        if layer.running_mean is None or layer.running_var is None:
            raise UserError(
                f"strategy=rotta starts from the source's statistics, and {name} keeps none "
                "(track_running_stats=False); use strategy=tent"
            )
        self.weight, self.bias, self.eps, self.alpha = layer.weight, layer.bias, layer.eps, alpha
        self.register_buffer("mean", layer.running_mean.clone())
        self.register_buffer("var", layer.running_var.clone())

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.mean, self.var
        if self.training:
            dims = [d for d in range(x.ndim) if d != 1]
            batch_var, batch_mean = torch.var_mean(x, dims, correction=0)
            mean = (1 - self.alpha) * mean + self.alpha * batch_mean
            var = (1 - self.alpha) * var + self.alpha * batch_var
            self.mean, self.var = mean.detach(), var.detach()
        scale = torch.rsqrt(var + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        shape = (-1, *(1 for _ in x.shape[2:]))
        return torch.addcmul(shift.view(shape), x, scale.view(shape))


class RoTTA(TTAStrategy):
    """Student and teacher (moving average) of one network, which learn on a memory.

    Args:
        backbone: a network with normalisation layers; becomes the student.
        seed: of the views.
        layers: whose scales and shifts learn. `bn`: batch normalisation (official); `norm`: also
            LayerNorm and GroupNorm.
        optim: of the student, the one group `trained`.
        capacity: images that the memory holds.
        every: images of the stream from one update to the next, also within a batch.
        ema: weight of the old teacher in the moving average.
        alpha: step of the statistics of batch normalisation towards those of a batch.
        age_weight, entropy_weight: of an item's age and of its entropy, relative to ln(classes), in
            the score by which items leave the memory.

    A batch of any size, one image included, is predicted as a whole and then enters the memory
    image by image. The first image always enters, so no update finds the memory empty. With more
    classes than places in the memory, each class has at most one.
    """

    needs = frozenset({"head"})

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        layers: Literal["bn", "norm"],
        optim: StreamOptim,
        capacity: Count,
        every: Count,
        ema: Unit,
        alpha: Unit,
        age_weight: NonNegative,
        entropy_weight: NonNegative,
    ) -> None:
        super().__init__(backbone, seed=seed)
        trained = list(collect_parameters(backbone.net, LAYERS[layers]).values())
        if not trained:
            other = "strategy=source" if layers == "norm" else "strategy.layers=norm"
            raise UserError(
                f"strategy=rotta with layers={layers} has nothing to train: {backbone.tag} has no "
                f"such normalisation layer with a scale; use {other}"
            )
        replace_batch_norms(
            backbone.net, lambda n, m: RobustBatchNorm(n, m, alpha), ("bn2d", "bn1d")
        )
        train_only(self.backbone.train(), trained)
        fixed = {id(p): p for p in backbone.parameters() if not p.requires_grad}
        self.teacher = deepcopy(backbone, fixed).requires_grad_(False)
        names = [name for name, p in backbone.named_parameters() if p.requires_grad]
        self.learned = [backbone.get_parameter(name) for name in names]
        self.averaged = [self.teacher.get_parameter(name) for name in names]
        self.optim, self.optimizer = optim, optim.optimizer({"trained": trained})
        self.capacity, self.every, self.ema = capacity, every, ema
        self.age_weight, self.entropy_weight = age_weight, entropy_weight
        self.memory, self.classes = Memory(), backbone.num_classes
        self.seen = 0  # images of the stream
        self.rng("method")  # part of the state from the start

    def get_extra_state(self) -> int:
        return self.seen

    def set_extra_state(self, state: int) -> None:
        self.seen = state

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the teacher, with its own statistics."""
        with evaluating(self.teacher):
            return self.teacher(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] of the teacher from before this batch.

        Raises:
            Diverged: when the loss is not finite.
        """
        scores = self.predict(x)
        p = scores.softmax(1)
        entropy = -(p * (p + 1e-6).log()).sum(1)
        read = torch.stack([p.argmax(1).double(), entropy.double()], 1).tolist()
        for image, (label, uncertainty) in zip(x, read, strict=True):
            self.offer(image, int(label), uncertainty)
            self.seen += 1
            if self.seen % self.every == 0:
                self._update()
        return scores

    def offer(self, image: Tensor, label: int, entropy: float) -> None:
        """Let an image into the memory or not, at the cost of another one or not."""
        memory, count = self.memory, self.memory.counts()[label]
        small = count < self.capacity / self.classes
        if small and len(memory) < self.capacity:
            memory.insert(image, label, entropy)
        else:
            rivals = memory.of_class(*(memory.largest() if small else [label]))
            worst = max(
                reversed(rivals), key=lambda i: self.score(memory.ages[i], memory.scores[i])
            )
            if self.score(memory.ages[worst], memory.scores[worst]) > self.score(0, entropy):
                memory.remove(worst)
                memory.insert(image, label, entropy)
        memory.grow_older()

    def score(self, age: int, entropy: float) -> float:
        """By which an item is the next to leave, between the classes that may lose one."""
        timeliness = 1 / (1 + math.exp(-age / self.capacity))
        uncertainty = entropy / math.log(max(2, self.classes))
        return self.age_weight * timeliness + self.entropy_weight * uncertainty

    @torch.enable_grad()
    def _update(self) -> None:
        order = self.memory.by_class()
        images = self.memory.images(order)
        ages = images.new_tensor([self.memory.ages[i] / self.capacity for i in order])
        view = self.augment(images)
        with torch.no_grad():
            target = self.teacher(images)

        def loss() -> Tensor:
            return self.loss(self.backbone(view), target, ages)

        self.optim.step(self.optimizer, loss(), loss)
        teacher.move_average([*self.averaged], [*self.learned], self.ema)

    def augment(self, x: Tensor) -> Tensor:
        """One random view of the batch `x`."""
        return views.apply(x, views.draw(self.rng("method"), x.shape))

    def loss(self, logits: Tensor, target: Tensor, ages: Tensor) -> Tensor:
        """Cross-entropy against the teacher's `target` [B, C], less for older images.

        Args:
            ages: [B], in units of the memory's capacity.
        """
        share = (-ages.float()).exp()
        each = -(target.softmax(1) * logits.log_softmax(1)).sum(1)
        return (each * (share / (1 + share))).mean()
