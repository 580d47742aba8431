"""UnMix-TNS: several sets of normalisation statistics a layer, mixed anew for every image.

Paper: "Un-Mixing Test-Time Normalization Statistics: Combatting Label Temporal Correlation"
(Tomar, Vray, Thiran, Bozorgtabar, ICLR 2024, arXiv 2401.08328).
Code: github.com/devavratTomar/unmixtns @ 8e12b9f. The layers go under any method (`inner`).

Deviations that change no number: components are called components, the source statistics are not
kept beside them; a layer without scale and shift is taken.
Deviations that do: `predict` leaves the components as they are (the code moves them in every
forward pass, whatever it is for); under a method with networks that it declares frozen (the anchor
of CoTTA) theirs stay; BatchNorm1d layers are left to the method inside (the code gives them the
source statistics); with `batch_size` null a short last batch weighs less; a fused layer of timm
keeps its activation (the code's replacement would drop it); methods that bring layers of their own
(RoTTA, NOTE) are refused as `inner`, where the code runs them without theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core import distributed
from driftline.core.build import locate, made
from driftline.core.errors import UserError
from driftline.core.ranges import Below1, Count, Later, Positive
from driftline.core.seed import generator
from driftline.core.strategy import TTAStrategy, Wrapper
from driftline.parts.norms import replace_batch_norms

Inner = Annotated[Callable[..., TTAStrategy], Later(("backbone", "seed", "num_classes"))]


class UnmixedNorm(nn.BatchNorm2d):
    """K components of mean and variance in place of one; the same in both modes.

    A subclass of BatchNorm2d, so that methods find its scale and shift where they look for them.

    Args:
        layer: whose scale, shift and running statistics these are.
        noise: standard normal [K, C], spreads the means.
        alpha: share of the variance that lies between the components at the start.
        temperature: of the similarity.
        batch_size, largest_batch: see `UnMixTNS`.
    """

    means: Tensor  # [K, C]
    variances: Tensor  # [K, C]

    def __init__(
        self,
        layer: nn.BatchNorm2d,
        noise: Tensor,
        *,
        alpha: float,
        temperature: float,
        batch_size: int | None,
        largest_batch: int,
    ) -> None:
        assert layer.running_mean is not None and layer.running_var is not None
        count, channels = noise.shape
        super().__init__(channels, layer.eps, layer.momentum, False, track_running_stats=False)
        self.weight, self.bias, self.affine = layer.weight, layer.bias, layer.affine
        self.temperature = temperature
        self.batch_size, self.largest_batch = batch_size, largest_batch
        self.moving = True
        alpha = alpha if count > 1 else 0.0  # a single component has nothing to differ from
        mean, variance = (s.repeat(count, 1) for s in (layer.running_mean, layer.running_var))
        spread = math.sqrt(alpha * count / max(1, count - 1)) * variance.sqrt()
        self.register_buffer("means", mean + spread * noise.to(mean))
        self.register_buffer("variances", (1 - alpha) * variance)

    def rate(self, images: int) -> float:
        """Weight of a batch in the moving average of the components."""
        assert self.momentum is not None
        return 1 - (1 - self.momentum) ** ((self.batch_size or images) / self.largest_batch)

    def forward(self, input: Tensor) -> Tensor:
        x = input  # the name is torch's
        variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)  # of each image, [B, C]
        with torch.no_grad():
            similarity = F.normalize(mean, dim=1) @ F.normalize(self.means, dim=1).T
            p = (similarity / self.temperature).softmax(1)[..., None]  # [B, K, 1]
        means = (1 - p) * self.means + p * mean[:, None]  # [B, K, C]
        variances = (1 - p) * self.variances + p * variance[:, None]
        mixed = means.mean(1)
        spread = variances.mean(1) + (means**2).mean(1) - mixed**2
        if self.moving:
            self.move(p, mean.detach(), variance.detach())
        x = (x - mixed[..., None, None]) / torch.sqrt(spread[..., None, None] + self.eps)
        return x * self.weight[:, None, None] + self.bias[:, None, None] if self.affine else x

    @torch.no_grad()
    def move(self, p: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Each component goes towards the images that resemble it."""
        rate = self.rate(len(mean))
        self.means = self.means + rate * (p * (mean[:, None] - self.means)).mean(0)
        self.variances = self.variances + rate * (p * (variance[:, None] - self.variances)).mean(0)


class UnMixTNS(Wrapper):
    """Unmixed statistics under a method; under `source` they are all that adapts.

    Args:
        backbone: a network with BatchNorm2d.
        seed: of the noise at the start, and of the method inside.
        num_classes: of the method inside.
        inner: the method whose networks get the layers; it runs as it would without.
        components: K of each layer.
        alpha: share of the source variance that lies between the components at the start, the rest
            within them; a single component starts at the source statistics.
        temperature: of the cosine between an image's mean and a component's.
        batch_size: images of a batch, B; None: of the batch at hand.
        largest_batch: B at which a layer's own momentum m is the weight of a batch in the moving
            average of the components; otherwise that is 1 - (1 - m)^(B / largest_batch).

    One image, a short batch and blank images are like any other, also on maps of one pixel (unless
    the method inside asks for batch statistics, as Tent does: then a UserError). A network without
    BatchNorm2d is a UserError.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        seed: int,
        num_classes: int,
        inner: Inner,
        components: Count,
        alpha: Below1,
        temperature: Positive,
        batch_size: Count | None,
        largest_batch: Count,
    ) -> None:
        if distributed.size() > 1:
            raise UserError("strategy=unmix_tns moves statistics by whole batches: use one process")
        numbers = generator(seed, "strategy", "components")

        def unmixed(name: str, layer: nn.BatchNorm2d) -> UnmixedNorm:
            if layer.running_mean is None or layer.momentum is None:
                raise UserError(
                    f"strategy=unmix_tns starts from the running statistics and the momentum of "
                    f"BatchNorm, and the layer {name} of {backbone.tag} lacks one of them"
                )
            return UnmixedNorm(
                layer,
                self.noise(name, (components, layer.num_features), numbers),
                alpha=alpha,
                temperature=temperature,
                batch_size=batch_size,
                largest_batch=largest_batch,
            )

        layers = list(replace_batch_norms(backbone.net, unmixed).values())
        if not layers:
            raise UserError(
                f"strategy=unmix_tns replaces BatchNorm2d, and {backbone.tag} has none: choose a "
                "backbone with BatchNorm, or run the method inside alone"
            )
        live = {"backbone": backbone, "seed": seed, "num_classes": num_classes}
        method = made(inner, live, at="strategy.inner")
        super().__init__(method, needs=method.needs | {"batch_norm"}, static=False)
        if missing := {*layers} - {*self.modules()}:
            raise UserError(
                f"strategy.inner={type(method).__name__} puts layers of its own in the place of "
                f"{len(missing)} of the layers of UnMix-TNS: run one of the two alone"
            )
        frozen = method.frozen()  # whoever says so resets and resumes without them
        for name, layer in method.named_modules():
            if isinstance(layer, UnmixedNorm):
                layer.moving = f"{name}.means" not in frozen

    @classmethod
    def uses_source(cls, options: Mapping[str, Any]) -> bool:
        inner = options["inner"]
        return locate(inner["_target_"]).uses_source(inner)

    @property
    def method(self) -> TTAStrategy:
        """With its layers; it is no rule."""
        return self

    def noise(self, name: str, shape: tuple[int, int], numbers: torch.Generator) -> Tensor:
        """Standard normal numbers [K, C] of the layer `name`, asked for in module order."""
        return torch.randn(shape, generator=numbers)

    def preparation(self) -> dict[str, Any] | None:
        inner = self.inner.preparation()
        layer = next(m for m in self.modules() if isinstance(m, UnmixedNorm))
        at = {k: getattr(layer, k) for k in ("temperature", "batch_size", "largest_batch")}
        start = float(layer.means.double().sum()), float(layer.variances.double().sum())
        kind = f"{type(self.inner).__module__}.{type(self.inner).__name__}"
        return inner if inner is None else {kind: inner, "layers": at, "start": start}

    def predict(self, x: Tensor) -> Tensor:
        """Scores of the method inside, with the components as they are."""
        with self._held():
            return self.inner.predict(x)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """No component moves inside."""
        layers = [m for m in self.modules() if isinstance(m, UnmixedNorm) and m.moving]
        for layer in layers:
            layer.moving = False
        try:
            yield
        finally:
            for layer in layers:
                layer.moving = True
