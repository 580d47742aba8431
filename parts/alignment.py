"""Classifier alignment: a head trained once more on features drawn from one Gaussian a class.

    features, y = collect(task.fit(), embed, device=device, lr=lr)
    warning = gaussians.measure(task.classes, features, y)
    gaussians.align(head.parameters(), loss, optim=optim, lr=lr, epochs=5, samples=256, rng=rng)

After Zhang et al., "SLCA", ICCV 2023, arXiv 2303.05118; SSIAT and MOS do it with other losses.

Deviations from all three codes that change no number but by rounding: means and covariances are
computed in float64. The Cholesky factor of a class is computed once, not in every epoch (same
draws, same samples), and is what is kept. A class of which no covariance can be had gets a diagonal
one; the official codes stop there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.core.errors import Diverged
from driftline.core.stream import Batch
from driftline.parts.optim import Optim
from driftline.parts.statistics import check_finite, covariance

Statistics = Literal["covariance", "variance"]


def collect(
    batches: Iterable[Batch | None],
    embed: Callable[[Tensor], Tensor],
    *,
    device: torch.device,
    lr: float,
) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels [N] of all images; none: [0, 0] and [0].

    Args:
        embed: [B, 3, H, W] -> [B, D].
        lr: see `parts.statistics.check_finite`, which says what this raises.
    """
    features, labels = [], []
    for batch in batches:
        if batch is None:
            continue
        batch = batch.to(device)
        features.append(embed(batch.x))
        labels.append(batch.y)
        check_finite(features[-1], batch.y, lr)
    if not features:
        return torch.zeros(0, 0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return torch.cat(features), torch.cat(labels)


class ClassGaussians(nn.Module):
    """Mean and spread of the features of each class.

    Args:
        dim: length D of a feature vector.
        statistics: `covariance` or `variance` (its diagonal).
        ridge: added to every variance.
    """

    means: Tensor  # float [C, D]
    factors: Tensor  # [C, D, D] Cholesky factor, or [C, D] standard deviation
    counts: Tensor  # int64 [C], images behind the statistics; 0: none

    def __init__(self, dim: int, statistics: Statistics, ridge: float) -> None:
        super().__init__()
        self.statistics, self.ridge = statistics, ridge
        spread = (dim, dim) if statistics == "covariance" else (dim,)
        self.register_buffer("means", torch.zeros(0, dim))
        self.register_buffer("factors", torch.zeros(0, *spread))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))

    def grow(self, classes: int) -> None:
        """Append classes without statistics up to `classes` in all."""
        added = max(0, classes - len(self.counts))
        self.means = F.pad(self.means, (0, 0, 0, added))
        self.factors = F.pad(self.factors, (*[0, 0] * (self.factors.ndim - 1), 0, added))
        self.counts = F.pad(self.counts, (0, added))

    def spread(self, features: Tensor) -> Tensor:
        """Covariance, float64 [D, D], of features [N, D], N > 1, with the ridge."""
        spread = covariance(features)
        return spread + self.ridge * torch.eye(len(spread)).to(spread)

    @torch.no_grad()
    def measure(self, classes: range, features: Tensor, y: Tensor) -> str:
        """Mean and spread of each class; where no covariance can be had, a diagonal one.

        Args:
            features: [N, D], of the images of these classes.
            y: int64 [N].

        Returns:
            what to warn of, or nothing.
        """
        alone, flat = [], []
        for c in classes:
            own = features[y == c]
            self.counts[c] = len(own)
            if len(own) == 0:
                continue
            self.means[c] = own.double().mean(0)
            if len(own) == 1:
                alone.append(c)
                continue
            spread = self.spread(own)
            if self.statistics == "variance":
                self.factors[c] = spread.diagonal().sqrt()
                continue
            factor, failed = torch.linalg.cholesky_ex(spread)
            if len(own) < 3 or failed or not factor.isfinite().all():
                factor = spread.diagonal().sqrt().diag()
                flat.append(c)
            self.factors[c] = factor
        for c in alone:
            several = self.factors[self.counts > 1].double()
            # The mean variance of the classes with more images; the diagonal of L L' for these.
            squares = several**2 if several.ndim == 2 else (several**2).sum(2)
            spread = squares.mean(0) if len(squares) else torch.zeros_like(self.means[c]).double()
            deviation = spread.clamp_min(self.ridge).sqrt()
            self.factors[c] = deviation if self.factors.ndim == 2 else deviation.diag()
        said = []
        if flat:
            said.append(
                f"no covariance from so few images of class {', '.join(map(str, flat[:5]))}: "
                "the variances alone are used"
            )
        if alone:
            said.append(
                f"one image of class {', '.join(map(str, alone[:5]))}: the mean variance of "
                "the other classes is used"
            )
        more = ". strategy.statistics=variance needs fewer images (this is said once)"
        return "; ".join(said) + more if said else ""

    def draw(
        self, classes: Tensor, samples: int, rng: torch.Generator, scale: Tensor | None = None
    ) -> Tensor:
        """Features [C, samples, D] of `classes` int64 [C].

        Args:
            scale: [all classes], factors of the means; None: 1.
        """
        mean, factor = self.means[classes], self.factors[classes]
        if scale is not None:
            mean = mean * scale.to(mean)[classes, None]
        size = len(classes), samples, mean.shape[1]
        noise = torch.randn(size, generator=rng).to(mean)
        spread = noise * factor[:, None] if factor.ndim == 2 else noise @ factor.mT
        return mean[:, None] + spread

    def shuffle(self, count: int, rng: torch.Generator) -> Tensor:
        """A permutation of the drawn features."""
        return torch.randperm(count, generator=rng)

    @torch.enable_grad()
    def align(
        self,
        parameters: Iterable[nn.Parameter],
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        optim: Optim,
        lr: float,
        epochs: int,
        samples: int,
        rng: torch.Generator,
        scale: Tensor | None = None,
        period: int | None = None,
    ) -> Tensor:
        """Train a head on features of all classes seen.

        An epoch draws `samples` features a class, shuffles all of them once and makes a step on
        each `samples` of them: SGD with the momentum and the weight decay of `optim`, cosine to 0.

        Args:
            parameters: of the head.
            loss: of features [samples, D] and labels [samples]; 0-dim.
            lr: initial rate, the method's `align_lr`.
            rng: CPU generator.
            scale: see `draw`.
            period: epochs in which the rate falls to 0, to rise again after them; None: `epochs`.

        Returns:
            the loss of each step.

        Raises:
            Diverged: for a loss that is not finite, after the epoch.
        """
        classes = (self.counts > 0).nonzero().flatten()
        y = classes.repeat_interleave(samples)
        settings = Optim(
            kind="sgd",
            lr=lr,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            schedule="cosine",
        )
        optimizer = settings.optimizer({"head": parameters})
        losses: list[Tensor] = []
        for epoch in range(epochs):
            settings.set_rates(optimizer, epoch, period or epochs)
            drawn = self.draw(classes, samples, rng, scale)
            order = self.shuffle(len(y), rng).to(y.device)
            for rows in order.split(samples):
                value = loss(drawn.flatten(0, 1)[rows], y[rows])
                value.backward()
                settings.update(optimizer)
                losses.append(value.detach())
            if losses and not losses[-1].isfinite():
                bad = classes[~drawn.isfinite().all(2).all(1)].tolist()
                raise Diverged(
                    f"classifier alignment gives {float(losses[-1])}"
                    + (f", first at class {bad[0]}" if bad else "")
                    + f": lower strategy.align_lr ({lr}), or use strategy.statistics=variance"
                )
        return torch.stack(losses) if losses else self.means.new_zeros(0)
