"""MEMO: for each image alone, agreement and confidence over many augmented copies.

Paper: "MEMO: Test Time Robustness via Adaptation and Augmentation" (NeurIPS 2022, arXiv
2110.09506).
Code: github.com/zhangmarvin/memo @ 228b290; variants `marginal=batch`, `trained=weights`,
`border=black` and an optimiser with Nesterov momentum from github.com/mariodoebler/
test-time-adaptation @ 8b2ed63. The views are AugMix's (ICLR 2020, arXiv 1912.02781) without the
operations that are corruptions of ImageNet-C.

What the code does: the clean image is not among the views; with Nesterov momentum an episodic first
step is `1 + momentum` times as long. The released ImageNet script has a prior of 16 images for the
statistics of batch normalisation (`alpha` 1/17, as in the paper) and no effect of it, since the
layers are only changed for options of another name: `alpha=0` is what it computes.

Deviations that change no number: weights that moved are put back after an image instead of all
before the next.
Deviations that do: views are as large as the image, whatever its size; pixels that are no multiples
of 1/255 are rounded to them for the views; a non-finite loss stops the run; random numbers are
separate from the stream's.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, Unit
from driftline.core.strategy import TTAStrategy
from driftline.parts.modes import evaluating
from driftline.parts.norms import batch_norms, collect_parameters, mix_statistics, train_only
from driftline.parts.optim import StreamOptim

OPERATIONS = (
    *("autocontrast", "equalize", "posterize", "rotate", "solarize"),
    *("shear_x", "shear_y", "translate_x", "translate_y"),
)
CHAINS, DEPTH = 3, 3  # chains of operations that are mixed, and how many each has at most
PADDING = 4  # pixels around the image, crop=padded
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of the part that is enlarged, crop=resized
# Beyond the image. The official code says 128, which Pillow reads as a dark red.
BORDERS = {"red": (128, 0, 0), "black": (0, 0, 0)}


def uniform(rng: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * torch.rand((), generator=rng, dtype=torch.float64).item()


def whole(rng: torch.Generator, low: int, high: int) -> int:
    """One of `low`, ..., `high`."""
    return int(torch.randint(low, high + 1, (), generator=rng))


def resized_crop(image: Image.Image, rng: torch.Generator) -> Image.Image:
    """A random part of the image, enlarged to the image's size."""
    width, height = image.size
    for _ in range(10):
        area = uniform(rng, *AREA) * width * height
        ratio = math.exp(uniform(rng, *map(math.log, RATIO)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = whole(rng, 0, width - w), whole(rng, 0, height - h)
    part = image.crop((left, top, left + w, top + h))
    return part.resize(image.size, Image.Resampling.BILINEAR)


def padded_crop(image: Image.Image, rng: torch.Generator) -> Image.Image:
    """The image, moved by a few pixels in front of black."""
    right, down = (whole(rng, -PADDING, PADDING) for _ in range(2))
    return image.transform(image.size, Image.Transform.AFFINE, (1, 0, right, 0, 1, down))


def operate(
    image: Image.Image, name: str, level: float, sign: int, border: tuple[int, int, int]
) -> Image.Image:
    """One operation of AugMix at a level between 0 and 10, in one of two directions."""
    width, height = image.size
    match name:
        case "autocontrast":
            return ImageOps.autocontrast(image)
        case "equalize":
            return ImageOps.equalize(image)
        case "posterize":
            return ImageOps.posterize(image, 4 - int(level * 4 / 10))
        case "solarize":
            return ImageOps.solarize(image, 256 - int(level * 256 / 10))
        case "rotate":
            angle = sign * int(level * 30 / 10)
            return image.rotate(angle, resample=Image.Resampling.BILINEAR, fillcolor=border)
        case "shear_x":
            matrix = (1, sign * level * 0.3 / 10, 0, 0, 1, 0)
        case "shear_y":
            matrix = (1, 0, 0, sign * level * 0.3 / 10, 1, 0)
        case "translate_x":
            matrix = (1, 0, sign * int(level * (width / 3) / 10), 0, 1, 0)
        case _:
            matrix = (1, 0, 0, 0, 1, sign * int(level * (height / 3) / 10))
    method, resample = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    return image.transform(image.size, method, matrix, resample=resample, fillcolor=border)


def pixels(image: Image.Image) -> Tensor:
    """[3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def augmix(image: Image.Image, rng: torch.Generator, border: tuple[int, int, int]) -> Tensor:
    """A mixture [3, H, W] of the image and of chains of operations on it, at severity 1."""
    weights = -torch.log1p(-torch.rand(CHAINS, generator=rng))  # Dirichlet(1, 1, 1)
    share = uniform(rng)  # Beta(1, 1)
    mixed = torch.zeros_like(plain := pixels(image))
    for weight in weights / weights.sum():
        chain = image
        for _ in range(whole(rng, 1, DEPTH)):
            name = OPERATIONS[whole(rng, 0, len(OPERATIONS) - 1)]
            sign = -1 if uniform(rng) > 0.5 else 1
            chain = operate(chain, name, uniform(rng, 0.1, 1), sign, border)
        mixed += weight * pixels(chain)
    return share * plain + (1 - share) * mixed


class MEMO(TTAStrategy):
    """Each image: lower the entropy of the mean prediction of its views, predict, forget.

    Args:
        backbone: any classifier.
        seed: of the views.
        optim: of the one group `weights`.
        views: augmented copies of an image for one step.
        steps: updates for an image, each on views of its own, at least 1.
        alpha: batch normalisation uses `(1 - alpha) * source + alpha * batch` statistics, the
            batch being the views or, for the prediction, the image; 0: those of the source.
        trained: `all` parameters (official), or `weights`: those called weight or bias, which
            leaves class tokens, position tables and fused attention projections.
        crop: `resized`: a view shows a random part of the image, enlarged; `padded`: the image
            moved by up to 4 pixels (CIFAR).
        border: beyond the image, where it was turned or moved. `red`: what the official code's
            value means; `black`.
        episodic: whether everything goes back to the source after each image.
        marginal: `image`: each image of a batch adapts alone (official); `batch`: one mean
            prediction over the views of all images of a batch, all of which are then predicted.

    A batch is a series of images, so its size is of no matter with `marginal=image`. A map of a
    single pixel for the image raises a UserError where there is batch normalisation and alpha is
    above 0. `predict` gives scores without adaptation to its images.
    """

    needs = frozenset({"head"})

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        optim: StreamOptim,
        views: Count,
        steps: Count,
        alpha: Unit,
        trained: Literal["all", "weights"],
        crop: Literal["resized", "padded"],
        border: Literal["red", "black"],
        episodic: bool,
        marginal: Literal["image", "batch"],
    ) -> None:
        super().__init__(backbone, seed=seed)
        self.views, self.steps, self.episodic = views, steps, episodic
        self.crop = resized_crop if crop == "resized" else padded_crop
        self.border, self.together = BORDERS[border], marginal == "batch"
        self.mixes = alpha > 0 and bool(batch_norms(backbone.net))
        self.static = episodic  # type: ignore[misc]
        self.batch_dependent = self.together and self.mixes  # type: ignore[misc]
        every = list(backbone.net.parameters())
        self.trained = (
            every if trained == "all" else list(collect_parameters(backbone.net).values())
        )
        train_only(self.backbone.eval(), self.trained)
        if self.mixes:
            mix_statistics(backbone.net, alpha)
        self.source = nn.ParameterList(p.detach().clone() for p in self.trained)
        self.source.requires_grad_(False)
        self.optim, self.optimizer = optim, optim.optimizer({"weights": self.trained})
        self.rng("views")

    def frozen(self) -> set[str]:
        """The source never changes and is rebuilt from the pretrained weights."""
        return super().frozen() | {f"source.{name}" for name in self.source.state_dict()}

    def begin_stream(self) -> None:
        """Nothing to prepare: the start is the source, so no further copy is kept."""

    @torch.no_grad()
    def reset(self) -> None:
        """Weights and optimiser as at the start; generators run on."""
        torch._foreach_copy_(self.trained, [*self.source])
        assert self.optimizer is not None
        self.optimizer.state.clear()

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the weights as they are: the source's, if episodic."""
        with evaluating(self.backbone):
            alone = self.mixes and not self.together
            return torch.cat([self.backbone(one) for one in (x.split(1) if alone else [x])])

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] of each image after the update on its views."""
        return torch.cat([self._adapt(one) for one in ([x] if self.together else x.split(1))])

    def _adapt(self, x: Tensor) -> Tensor:
        for _ in range(self.steps):
            views = torch.cat([self.augment(x, j) for j in range(self.views)])
            with torch.enable_grad():
                loss = self.loss(self.backbone(views))
                self.optim.step(
                    self.optimizer, loss, lambda views=views: self.loss(self.backbone(views))
                )
        scores = self.predict(x)
        if self.episodic:
            self.reset()
        return scores

    def augment(self, x: Tensor, view: int) -> Tensor:
        """View number `view` of each image of x [B, 3, H, W]."""
        rng, views = self.rng("views"), []
        for one in x.detach().mul(255).round().clamp(0, 255).byte().cpu():
            image = self.crop(Image.fromarray(one.permute(1, 2, 0).numpy()), rng)
            image = ImageOps.mirror(image) if uniform(rng) < 0.5 else image
            views.append(augmix(image, rng, self.border))
        return torch.stack(views).to(x)

    def loss(self, logits: Tensor) -> Tensor:
        """Entropy, in nats, of the mean prediction over all rows of `logits` [V, C]; 0-dim."""
        logs = logits.log_softmax(1).logsumexp(0) - math.log(len(logits))
        logs = logs.clamp_min(torch.finfo(logs.dtype).min)
        return -(logs * logs.exp()).sum()
