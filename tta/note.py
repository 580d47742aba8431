"""NOTE: statistics corrected by the image, and updates on a memory that is balanced by prediction.

Paper: "NOTE: Robust Continual Test-time Adaptation Against Temporal Correlation" (Gong, Jeong, Kim,
Kim, Shin, Lee, NeurIPS 2022, arXiv 2208.05117).
Code: github.com/TaesikGong/NOTE @ a714a2a, both variants: NOTE and, for streams without
correlation, NOTE* (`statistics=batch`, `memory=fifo`).

The authors train their source networks with these layers in the place of BatchNorm (train_src.sh,
k = 4), and their figures are of such networks. The parameters are the same as those of BatchNorm,
so a state dict trained with the layers loads into the plain network (without `_bn.` in its names).
On a network that was trained with BatchNorm the method runs, but is not the one of the paper.

Deviations that change no number: an image is forwarded once for its pseudo-label and its score (the
code does the same computation twice); images between two updates are forwarded together, which
is equal up to rounding, since running statistics make an image independent of the others; the
memory is not shuffled.
Deviations that do: images after the last update are predicted as well (the code leaves out what
does not fill `every`); a memory of any size is one batch (the code shuffles one of more than 128 or
256 images into several); with `statistics=batch` a batch that comes is a batch of the statistics
(the code waits until `every` images are there: let the stream have batches of that size);
BatchNorm1d layers stay as they are; a non-finite loss stops the run.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Count, NonNegative, Positive, Unit
from driftline.core.strategy import TTAStrategy
from driftline.parts.memory import Memory
from driftline.parts.modes import evaluating
from driftline.parts.norms import (
    batch_norms,
    collect_parameters,
    enough_values,
    replace_batch_norms,
    train_only,
)
from driftline.parts.optim import StreamOptim

TINY = 1e-6  # inside the logarithm of the loss


class InstanceAwareNorm(nn.BatchNorm2d):
    """Batch normalisation that goes towards the statistics of an image where those are unusual.

    In training mode the statistics to start from are those of the batch, with the unbiased
    variance and the gradient through both, and the running ones move; in evaluation mode they are
    the running ones, or again the batch's if there are none.

    Args:
        layer: whose scale, shift and running statistics these are.
        k: standard errors that the statistics of an image may be away without a correction.
        momentum: weight of a batch in the running statistics; None: no running statistics.
    """

    def __init__(self, layer: nn.BatchNorm2d, k: float, momentum: float | None) -> None:
        super().__init__(layer.num_features, layer.eps, momentum, False, track_running_stats=False)
        self.weight, self.bias, self.affine = layer.weight, layer.bias, layer.affine
        self.k = k
        if momentum is not None:
            self.running_mean, self.running_var = layer.running_mean, layer.running_var

    def forward(self, input: Tensor) -> Tensor:
        x = input  # the name is torch's
        var, mean = self.statistics(x)
        pixels = x.shape[2] * x.shape[3]
        if pixels > 1:
            own_var, own_mean = torch.var_mean(x, (2, 3), keepdim=True)  # of each image
            error = torch.sqrt((var + self.eps) / pixels)
            error_of_var = (var + self.eps) * (2 / (pixels - 1)) ** 0.5
            mean = mean + shrink(own_mean - mean, self.k * error)
            var = (var + shrink(own_var - var, self.k * error_of_var)).relu()
        x = (x - mean) * torch.rsqrt(var + self.eps)
        return x * self.weight[:, None, None] + self.bias[:, None, None] if self.affine else x

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and mean [1, C, 1, 1] before the correction."""
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return self.running_var[:, None, None], self.running_mean[:, None, None]
        enough_values(self, (x,))
        var, mean = torch.var_mean(x, (0, 2, 3), keepdim=True)
        if self.training and self.running_mean is not None and self.running_var is not None:
            assert self.momentum is not None
            with torch.no_grad():
                self.running_mean.lerp_(mean.flatten(), self.momentum)
                self.running_var.lerp_(var.flatten(), self.momentum)
        return var, mean


def shrink(x: Tensor, threshold: Tensor) -> Tensor:
    """`x`, but nearer to 0 by `threshold`, and 0 within it."""
    return (x - threshold).relu() - (-x - threshold).relu()


class NOTE(TTAStrategy):
    """Predicts image by image; learns scales and shifts on a memory, every so many images.

    Args:
        backbone: a network with BatchNorm2d, better one that was trained with such layers.
        seed: of the memory.
        optim: of the one group `trained`.
        k: see `InstanceAwareNorm`.
        statistics: `running`: a score depends on its image alone; `batch`: on its batch, and
            there are no running statistics (NOTE*).
        momentum: weight of a batch of the memory in the running statistics.
        memory: `pbrs`: as many images of each predicted class as of any other, each class a
            reservoir; `fifo`: the last ones.
        capacity: images in the memory.
        every: images from one update to the next.
        epochs: passes over the memory an update.
        temperature: divides the scores in the loss.
        mean_over: `classes`: the loss is the mean over images and classes, as in the code;
            `images`: over images alone, which is larger by the number of classes.

    One image and a short batch only bring the next update nearer; an update comes after a full
    `every`, so the memory is not empty then. Equal or blank images have variance 0 and give finite
    scores. A network without BatchNorm2d is a UserError.
    """

    needs = frozenset({"head", "batch_norm"})

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        optim: StreamOptim,
        k: NonNegative,
        statistics: Literal["running", "batch"],
        momentum: Unit,
        memory: Literal["pbrs", "fifo"],
        capacity: Count,
        every: Count,
        epochs: Count,
        temperature: Positive,
        mean_over: Literal["classes", "images"],
    ) -> None:
        super().__init__(backbone, seed=seed)
        vars(self)["batch_dependent"] = statistics == "batch"  # of this instance

        def aware(name: str, layer: nn.BatchNorm2d) -> InstanceAwareNorm:
            if statistics == "running" and layer.running_mean is None:
                raise UserError(
                    f"strategy=note predicts with running statistics, and the layer {name} of "
                    f"{backbone.tag} has none: set strategy.statistics=batch, or run it alone"
                )
            return InstanceAwareNorm(layer, k, momentum if statistics == "running" else None)

        layers = replace_batch_norms(backbone.net, aware)
        learned = collect_parameters(backbone.net, lambda n, m: isinstance(m, InstanceAwareNorm))
        if not learned:
            raise UserError(
                f"strategy=note trains BatchNorm2d, and {backbone.tag} has none with a scale; use "
                "strategy=tent with layers=norm, or strategy=source"
            )
        train_only(backbone.eval(), learned.values())
        own = {*layers.values()}
        self.others = [m for m in batch_norms(backbone.net).values() if m not in own]
        self.optim, self.optimizer = optim, optim.optimizer({"trained": learned.values()})
        self.memory, self.balanced = Memory(), memory == "pbrs"
        self.capacity, self.every, self.epochs = capacity, every, epochs
        self.temperature, self.mean_over = temperature, mean_over
        self.images = 0  # of the stream
        self.seen = [0] * backbone.num_classes  # images by predicted class, kept or not
        self.rng("memory")  # part of the state from the start

    def get_extra_state(self) -> dict[str, Any]:
        return {"images": self.images, "seen": list(self.seen)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.images, self.seen = state["images"], list(state["seen"])

    def predict(self, x: Tensor) -> Tensor:
        with evaluating(self.backbone):
            return self.backbone(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C], of each image from before the update that it brings about."""
        scores: list[Tensor] = []
        while len(x):
            room = self.every - self.images % self.every
            now, x = x[:room], x[room:]
            scores.append(self.predict(now))
            for image, label in zip(now, scores[-1].argmax(1).tolist(), strict=True):
                self.offer(image, label)
            self.images += len(now)
            if self.images % self.every == 0:
                self._update()
        return torch.cat(scores)

    def offer(self, image: Tensor, label: int) -> None:
        """Let an image into the memory or not, at the cost of another one or not."""
        self.seen[label] += 1
        if len(self.memory) == self.capacity:
            place = self.place(label) if self.balanced else 0
            if place is None:
                return
            self.memory.remove(place)
        self.memory.insert(image, label)

    def place(self, label: int) -> int | None:
        """Position of the image that goes for one of the class `label`; None: that one goes."""
        largest = self.memory.largest()
        if label not in largest:
            rivals = self.memory.of_class(largest[int(self.draw("class") * len(largest))])
        else:
            rivals = self.memory.of_class(label)
            if self.draw("stay") > len(rivals) / self.seen[label]:
                return None
        return rivals[int(self.draw("place") * len(rivals))]

    def draw(self, what: Literal["class", "place", "stay"]) -> float:
        """A number from [0, 1): which class, which of its images, whether it goes at all."""
        return float(torch.rand((), generator=self.rng("memory")))

    @torch.enable_grad()
    def _update(self) -> None:
        x = self.memory.images(self.memory.by_class() if self.balanced else None)
        self.backbone.train()
        for layer in self.others:
            layer.eval()
        try:
            for _ in range(self.epochs):
                loss = self.loss(self.backbone(x))
                self.optim.step(self.optimizer, loss, lambda: self.loss(self.backbone(x)))
        finally:
            self.backbone.eval()

    def loss(self, logits: Tensor) -> Tensor:
        """Entropy of the predictions `logits` [B, C]."""
        p = F.softmax(logits / self.temperature, 1)
        each = -p * torch.log(p + TINY)
        return each.mean() if self.mean_over == "classes" else each.sum(1).mean()
