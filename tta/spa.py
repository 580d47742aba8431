"""SPA: predictions on degraded copies of an image follow that on the image itself.

Paper: "Self-Bootstrapping for Versatile Test-Time Adaptation" (ICML 2025, arXiv 2504.08010).
Written from the official code, github.com/mr-eggplant/SPA @ b4a66ea; no recorded run.

One copy loses a random part of its low frequencies, the other is mixed with noise, patch by patch.
How much of a patch is noise is learned against the network, at a constant mean. Copies are scored
through a linear layer that starts as the identity (as in ZeroSiam, which came later).

What the code does, and may surprise: the mean colour of an image is one of the frequencies that it
may lose; both copies are made of normalised images, and the noisy one is clipped at -1 and 1 there,
which is the range of images for a mean and deviation of 0.5, but cuts bright and dark parts off
with those of ImageNet (`limits`); one picture of noise serves the whole batch; an image counts for
a copy only where its own prediction is the surer one; every normalisation layer learns, the
uppermost too.

Deviations that change no number: the images as they are run without gradients, where the code
builds a graph that it does not use; frequencies are masked in half of a spectrum that is symmetric;
where no image counts the loss is 0, not NaN, with the same gradient of zero, and momentum still
moves what learns; one optimiser with three groups takes the place of two.
Deviations that do: random numbers; the share of noise in the first batch of all is that of every
later start, where the code begins with 0.4 whatever is set; images of any size, as `patches` are
counted and not measured in pixels; a loss that is not finite stops the run; BatchNorm1d layers
learn too; an empty selection of layers is an error.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt, Le
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.ranges import Count, NonNegative, Size, Unit
from driftline.core.strategy import TTAStrategy
from driftline.parts.heads import linear_head
from driftline.parts.modes import evaluating
from driftline.parts.norms import Layers, Top, train_norms
from driftline.parts.objectives import entropy
from driftline.parts.optim import StreamOptim
from driftline.tta.zerosiam import identity

LOW = 0.2  # part of each side of the shifted spectrum that counts as low frequencies


def low_block(side: int) -> slice:
    """The low frequencies of a side, in a spectrum with its zero in the middle."""
    length = max(1, int(LOW * side))
    margin = (side - length) // 2
    return slice(side - margin - length, side - margin)


def symmetric(block: Tensor, height: int, width: int) -> Tensor:
    """Factors [B, 3, H, W] of a spectrum as `fft2` gives it, from those of its low frequencies.

    Frequencies and their opposites get one factor, so that the image stays real: of each pair, the
    one with the smaller row, and in the row of zero that with the larger column, decides.
    """
    mask = block.new_ones(*block.shape[:2], height, width)
    mask[..., low_block(height), low_block(width)] = block
    mask = torch.fft.ifftshift(mask, dim=(-2, -1))
    row = torch.fft.fftfreq(height, device=block.device)[:, None]
    column = torch.fft.fftfreq(width, device=block.device)
    opposite = mask.flip(-2, -1).roll((1, 1), (-2, -1))
    return torch.where((row < 0) | ((row == 0) & (column >= 0)), mask, opposite)


class SPA(TTAStrategy):
    """Three forwards a batch: the images, without low frequencies, and with noise.

    Args:
        backbone: a classifier with a linear head and normalisation layers.
        seed: of the masks and the noise.
        layers: which normalisation layers learn, see `parts/norms.py`; `norm` is official.
        top: whether the uppermost ones do, see `parts.norms.below_top`; `all` is official.
        mode: of the whole network while adapting; decides on dropout and stochastic depth only.
        optim: of three groups: `norms`; `predictor`, the layer between features and head; `noise`,
            one number a patch, whose square is the share of noise there, which climbs its gradient.
        steps: updates per batch, at least 1.
        masked: chance of a low frequency, in each image and channel, to be lost.
        noise: mean share of noise, over patches.
        patches: on a side of the grid in which that share is learned.
        limits: of images with noise. `unit`: -1 and 1 after normalisation (official); `image`:
            0 and 1 before it.
        entropy: weight of the mean entropy, in nats, of the images as they are ("SPA+Tent"); 0
            saves their backward pass.

    One image and a short last batch adapt like any other batch; only a map of a single pixel for
    a single image raises a UserError.
    """

    needs = frozenset({"head", "features"})
    batch_dependent = True
    backbone: Any  # a Backbone; the parent promises less

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
        masked: Unit,
        noise: Annotated[float, Gt(0), Le(1)],
        patches: Size,
        limits: Literal["unit", "image"],
        entropy: NonNegative,
    ) -> None:
        super().__init__(backbone, seed=seed)
        head = linear_head(backbone, "spa")
        self.predictor = identity(head)
        self.roots = nn.Parameter(head.weight.new_full((patches, patches), math.sqrt(noise)))
        trained = train_norms(backbone, layers, strategy="spa", top=top)
        self.backbone.train(mode == "train")
        self.optim, self.steps, self.limits, self.entropy = optim, steps, limits, entropy
        self.lost, self.noise = masked, noise
        self.optimizer = optim.optimizer(
            {
                "norms": trained.values(),
                "predictor": self.predictor.parameters(),
                "noise": [self.roots],
            }
        )
        self.rng("views")  # part of the state from the start

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the current weights, without the layer; dropout is off whatever the mode."""
        with evaluating(self):
            return self.backbone(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] of the images as they are, from before the (last) update on this batch.

        Raises:
            Diverged: when the loss is not finite; nothing is updated then.
        """
        for _ in range(self.steps - 1):
            self._update(x)
        return self._update(x)

    @torch.enable_grad()
    def _update(self, x: Tensor) -> Tensor:
        numbers = self.draw(x)

        def gradients() -> Tensor:
            with torch.set_grad_enabled(self.entropy > 0):
                logits = self.backbone(x)
            copies = [self.degraded_scores(view) for view in self.views(x, *numbers)]
            self.optim.backward(self.optimizer, self.loss(logits, *copies))
            assert self.roots.grad is not None
            self.roots.grad.neg_()
            return logits.detach()

        logits = gradients()
        self.optim.update(self.optimizer, gradients)
        self.rescale()
        return logits

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Kept low frequencies, 0 or 1, [B, 3, h, w], and a picture of noise [3, H, W]."""
        numbers, (*_, height, width) = self.rng("views"), x.shape
        size = [torch.ones(side)[low_block(side)].numel() for side in (height, width)]
        kept = torch.rand(*x.shape[:2], *size, generator=numbers) >= self.lost
        return kept.to(x), torch.randn(x.shape[1:], generator=numbers).to(x)

    def views(self, x: Tensor, kept: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Both copies of the images [B, 3, H, W], not normalised."""
        x = self.backbone.normalize(x)
        height, width = x.shape[2:]
        half = symmetric(kept, height, width)[..., : width // 2 + 1]
        masked = torch.fft.irfft2(torch.fft.rfft2(x) * half, s=(height, width))
        row, column = (
            torch.arange(side, device=x.device) * len(self.roots) // side
            for side in (height, width)
        )
        share = self.roots.square()[row][:, column]
        noisy = (1 - share) * x + share * noise
        if self.limits == "unit":
            noisy = noisy.clamp(-1, 1)
        masked, noisy = (self.pixels(view) for view in (masked, noisy))
        return masked, noisy.clamp(0, 1) if self.limits == "image" else noisy

    def pixels(self, x: Tensor) -> Tensor:
        """What the network normalises to `x`."""
        mean, std = self.backbone.mean, self.backbone.std
        return x if mean is None or std is None else x * std + mean

    def degraded_scores(self, view: Tensor) -> Tensor:
        """Scores [B, C] through the layer between features and head."""
        head = linear_head(self.backbone, "spa")
        return head(self.predictor(self.backbone.features(view)))

    def loss(self, logits: Tensor, *copies: Tensor) -> Tensor:
        """Divergences, in nats, of the `copies` [B, C] from `logits` [B, C] of surer images."""
        p = logits.detach().softmax(1)
        total = self.entropy * entropy(logits).mean(0) if self.entropy else logits.new_zeros(())
        for scores in copies:
            q = scores.log_softmax(1)
            surer = p.amax(1) > q.detach().exp().amax(1)
            divergence = F.kl_div(q[surer], p[surer], reduction="sum")
            total = total + divergence / max(1, len(q[surer]))
        return total

    @torch.no_grad()
    def rescale(self) -> None:
        """Bring the mean share of noise back, then limit each share to 1."""
        self.roots.div_((self.roots.square().mean() / self.noise).sqrt()).clamp_(-1, 1)
