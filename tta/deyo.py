"""DeYO: entropy of the images whose prediction rests on the shape of the object.

Paper: "Entropy is not Enough for Test-Time Adaptation: From the Perspective of Disentangled
Factors" (ICLR 2024, arXiv 2403.07366). Code: github.com/Jhyun17/DeYO @ 3d7d289; variant
`mode=eval` from github.com/mariodoebler/test-time-adaptation @ 8b2ed63, which is also what the
recorded runs are of.

What the codes do, and may surprise: only the images that pass the first filter are destroyed and
go through the network again, so that under batch statistics the drop of an image depends on which
others are there; permutations are drawn for these images in turn, so that one image more or less
changes all that follow (`draw_for`); sides that the number of patches does not divide are resized
twice, which smooths images even where no patch moved.

Deviation that changes no number: images keep their size where nothing has to be resized.
Deviations that do: the window of `destroy=occlusion` is given as a part of the side; `reset` works
(the authors' class never stores what it would go back to); where the filter of entropy is off,
nothing is compared (the authors' code compares with ln 1000 whatever the classes); BatchNorm1d
layers learn too; an empty selection of layers is an error.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, NonNegative, Size, Unit
from driftline.core.strategy import TTAStrategy
from driftline.parts.modes import evaluating
from driftline.parts.norms import Layers, Top, train_norms
from driftline.parts.objectives import entropy
from driftline.parts.optim import StreamOptim

Destroy = Literal["patch", "occlusion", "pixel"]


def shuffled_patches(x: Tensor, order: Tensor) -> Tensor:
    """Images [B, 3, H, W] whose patches, in a grid of L x L, stand in another order.

    Args:
        order: int64 [B, L * L]; patch k of image b is taken from place `order[b, k]`, row by row.
    """
    images, channels, *size = x.shape
    grid = math.isqrt(order.shape[1])
    fitting = [max(1, side // grid) * grid for side in size]
    if fitting != size:
        x = F.interpolate(x, fitting, mode="bilinear", antialias=True)
    height, width = (side // grid for side in fitting)
    patches = x.view(images, channels, grid, height, grid, width).permute(0, 2, 4, 1, 3, 5)
    patches = patches.flatten(1, 2)[torch.arange(images, device=x.device)[:, None], order]
    patches = patches.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5)
    x = patches.reshape(images, channels, *fitting)
    if fitting == size:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True)


def occluded(x: Tensor, share: float) -> Tensor:
    """Images [B, 3, H, W] with their mean colour in the middle, on `share` of each side."""
    x, mean = x.clone(), x.mean((2, 3), keepdim=True)
    (top, down), (left, right) = (
        (round(side * (1 - share) / 2), round(side * (1 + share) / 2)) for side in x.shape[2:]
    )
    x[:, :, top:down, left:right] = mean
    return x


def shuffled_pixels(x: Tensor, order: Tensor) -> Tensor:
    """Images [B, 3, H, W] whose pixels, row by row, are taken from the places `order` [H * W]."""
    return x.flatten(2)[:, :, order].view_as(x)


def drops(logits: Tensor, destroyed: Tensor) -> Tensor:
    """By how much the probability of the predicted class falls, [B], from scores [B, C] of both."""
    p, q = logits.softmax(1), destroyed.softmax(1)
    label = p.argmax(1, keepdim=True)
    return (p.gather(1, label) - q.gather(1, label))[:, 0]


class DeYO(TTAStrategy):
    """Images that are certain, and less so once the object is destroyed; entropy weighted by both.

    Args:
        backbone: a network with normalisation layers.
        seed: of the permutations.
        layers: which layers learn, see `parts/norms.py`; `norm` is official.
        top: whether the uppermost ones learn, see `parts.norms.below_top`; `names` is official.
        mode: of the whole network while adapting; decides on dropout and stochastic depth only.
        optim: of the one group `trained`.
        steps: updates per batch, at least 1.
        margin: images whose entropy is at least `margin` ln(classes) are left out; None: none is.
        drop: images whose probability of the predicted class falls by no more than this are.
        destroy: `patch`: the patches of a grid change places, in each image by itself;
            `occlusion`: a window in the middle gets the mean colour of the image; `pixel`: all
            pixels change places, in all images alike.
        patches: on a side of the grid, `patch` only.
        window: part of the side that the window covers, `occlusion` only.
        draw_for: permutations are drawn for the `kept` images in turn (official), or for every
            `image` of the batch, so that they do not depend on which ones are kept. `patch` only.
        weight_entropy: images weigh exp(`weight_entropy` ln(classes) - entropy) more; None: no.
        weight_drop: images weigh exp(drop) more. With neither, every image weighs 1.

    Where no image is left, nothing is updated, momentum included. One image and a short last batch
    adapt like any other batch. A single kept image whose map has one pixel has no batch
    statistics: a UserError.
    """

    needs = frozenset({"head"})
    batch_dependent = True
    counters = ("certain", "learned")

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
        margin: NonNegative | None,
        drop: Unit,
        destroy: Destroy,
        patches: Size,
        window: Unit,
        draw_for: Literal["kept", "image"],
        weight_entropy: NonNegative | None,
        weight_drop: bool,
    ) -> None:
        super().__init__(backbone, seed=seed)
        trained = train_norms(backbone, layers, strategy="deyo", top=top)
        self.backbone.train(mode == "train")
        self.optim, self.optimizer = optim, optim.optimizer({"trained": trained.values()})
        log_classes = math.log(backbone.num_classes)
        self.steps, self.drop = steps, drop
        self.margin = math.inf if margin is None else margin * log_classes
        self.destroy, self.patches, self.window = destroy, patches, window
        self.draw_for, self.weight_drop = draw_for, weight_drop
        self.level = None if weight_entropy is None else weight_entropy * log_classes
        self.certain = self.learned = 0  # images so far: below the margin, and learned from
        self.rng("permutations")  # part of the state from the start

    def get_extra_state(self) -> list[int]:
        return [self.certain, self.learned]

    def set_extra_state(self, state: list[int]) -> None:
        self.certain, self.learned = state

    def report(self) -> dict[str, float]:
        """Images below the margin, and those of them learned from, in the whole stream."""
        return {"images_certain": float(self.certain), "images_learned": float(self.learned)}

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
        kept, fall = self.select(x, logits.detach())
        if len(kept):
            self.loss(logits[kept], fall).backward()
            again = lambda: self.loss(self.backbone(x)[kept], fall).backward()  # noqa: E731
            self.optim.update(self.optimizer, again)
        return logits.detach()

    @torch.no_grad()
    def select(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [n] of the batch to learn from, and the fall [n] of their probabilities."""
        rows = (entropy(logits) < self.margin).nonzero()[:, 0]
        self.certain += len(rows)
        if not len(rows):
            return rows, logits.new_empty(0)
        fall = drops(logits[rows], self.backbone(self.destroyed(x, rows)))
        enough = fall > self.drop
        self.learned += int(enough.sum())
        return rows[enough], fall[enough]

    def destroyed(self, x: Tensor, rows: Tensor) -> Tensor:
        """The images `rows` of the batch without the shape of what they show."""
        if self.destroy == "occlusion":
            return occluded(x[rows], self.window)
        if self.destroy == "pixel":
            order = self.permutations(1, x[0, 0].numel())[0]
            return shuffled_pixels(x[rows], order.to(x.device))
        if self.draw_for == "image":
            order = self.permutations(len(x), self.patches**2)[rows.cpu()]
        else:
            order = self.permutations(len(rows), self.patches**2)
        return shuffled_patches(x[rows], order.to(x.device))

    def permutations(self, count: int, length: int) -> Tensor:
        """Random orders, int64 [count, length]."""
        return torch.rand(count, length, generator=self.rng("permutations")).argsort(1)

    def loss(self, logits: Tensor, fall: Tensor) -> Tensor:
        """Mean weighted entropy of the selected `logits` [n, C] with their `fall` [n]."""
        values = entropy(logits)
        weights: Any = 0.0
        if self.level is not None:
            weights = weights + (self.level - values.detach()).exp()
        if self.weight_drop:
            weights = weights + fall.exp()
        weighs = self.level is not None or self.weight_drop
        return (weights * values if weighs else values).mean(0)
