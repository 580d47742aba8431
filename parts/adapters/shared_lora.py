"""Low-rank updates whose two factors are the same in every layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.core.errors import UserError
from driftline.core.ranges import Seed, Size
from driftline.parts.adapters.adapter import AdapterSet, kaiming
from driftline.parts.adapters.lora import Factored
from driftline.parts.adapters.seeded import seeded


class Shared(Factored):
    """`b * B (d * A x)` with vectors b and d of each layer; a subclass says what A and B are.

    Args:
        inner, outer: initial d [rank] and b [out].
    """

    scale = None  # the vectors are the scales

    def __init__(self, inner: Tensor, outer: Tensor) -> None:
        super().__init__()
        self.inner, self.outer = nn.Parameter(inner), nn.Parameter(outer)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A [rank, dim] and B [out, rank]."""
        raise NotImplementedError

    def _factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        down, up = self.pair()
        return down, self.outer[:, None] * up, self.inner


class VeRA(Shared):
    """`b * B (d * A x)`: the vectors b and d learn.

    A and B are random and the same for all layers of the same widths, in every set: they follow
    from `seed`, take memory once and are in no saved file.

    Source: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024, arXiv
    2310.11454, section 3. Checked against the layer of peft 0.21, which gives the same A and B for
    the same seed (its `projection_prng_key`) where all layers have the same widths.

    Args:
        dim, out: input and output width.
        rank: of A and B.
        start: of d; b starts at 0.
        seed: of A and B, Kaiming-uniform: U(-sqrt(6 / width), sqrt(6 / width)) of what is read.
    """

    def __init__(
        self, dim: int, out: int, rank: Size, *, start: float = 0.1, seed: Seed = 0
    ) -> None:
        super().__init__(torch.full((rank,), start), torch.zeros(out))
        bounds = (6 / dim) ** 0.5, (6 / rank) ** 0.5
        self._drawn = seeded(seed, ((rank, dim), bounds[0]), ((out, rank), bounds[1]))

    def pair(self) -> tuple[Tensor, Tensor]:
        down, up = self._drawn.like(self.inner)
        return down, up

    def add(self, x: Tensor, base: Tensor, weight: float = 1.0) -> Tensor:
        if not torch.is_grad_enabled():
            return super().add(x, base, weight)
        down, up = self.pair()  # one product `b * B` would need the gradient of a whole B
        return base + weight * self.outer * F.linear(self.inner * F.linear(x, down), up)


class Pair(nn.Module):
    """A and B of a set whose layers learn them together; B starts at 0."""

    def __init__(self, dim: int, out: int, rank: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, dim))
        self.b = nn.Parameter(torch.zeros(out, rank))
        kaiming(self.a, generator)


class TiedLoRA(Shared):
    """`b * B (d * A x)`, everything of which learns: A and B for a whole set, b and d for a layer.

    Source: Renduchintala et al., "Tied-LoRA: Enhancing Parameter Efficiency of LoRA with Weight
    Tying", NAACL 2024, arXiv 2311.09578, the configuration in which everything learns. Checked
    against the formula in float64. The start is LoRA's with both vectors at 1; that of the paper
    was not looked up.

    Args:
        out: output width.
        tied: of the set.
        owner: whether `tied` is a submodule here, once in a set, so that it is saved once.
    """

    def __init__(self, out: int, tied: Pair, *, owner: bool) -> None:
        super().__init__(torch.ones(len(tied.a)), torch.ones(out))
        self._tied = [tied]
        if owner:
            self.tied = tied

    def pair(self) -> tuple[Tensor, Tensor]:
        return self._tied[0].a, self._tied[0].b


def tied_lora(
    modules: Mapping[str, nn.Module], rank: Size, *, generator: torch.Generator | None = None
) -> AdapterSet:
    """A set of `TiedLoRA`.

    Args:
        modules: point -> frozen linear layer, all of the same widths.
        rank: of A and B.
        generator: of the initial A; B starts at 0.

    Raises:
        UserError: for layers of different widths, or modules that are no linear layers.
    """
    layers = [m for m in modules.values() if isinstance(m, nn.Linear)]
    widths = {(m.in_features, m.out_features) for m in layers}
    if len(widths) != 1 or len(layers) < len(modules):
        raise UserError(
            "Tied-LoRA shares its factors between linear layers of the same widths: choose such "
            "points (strategy.adapter.at), for example ['blocks.*.attn.qkv:out']"
        )
    ((dim, out),) = widths
    tied = Pair(dim, out, rank, generator)
    rows = enumerate(modules)
    return AdapterSet({point: TiedLoRA(out, tied, owner=i == 0) for i, point in rows})
