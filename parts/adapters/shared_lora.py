"""Low-rank updates whose two factors are the same in every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from driftline.core.errors import UserError
from driftline.core.ranges import Seed, Size
from driftline.kernels import adapter
from driftline.parts.adapters.adapter import Adapter, AdapterSet, kaiming
from driftline.parts.adapters.seeded import seeded


class VeRA(Adapter):
    """`b * B (d * A x)`: the vectors b and d (`outer` and `inner`) learn.

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
        super().__init__()
        bounds = (6 / dim) ** 0.5, (6 / rank) ** 0.5
        self._drawn = seeded(seed, ((rank, dim), bounds[0]), ((out, rank), bounds[1]))
        self.inner = nn.Parameter(torch.full((rank,), start))
        self.outer = nn.Parameter(torch.zeros(out))

    def factors(self) -> Sequence[Tensor]:
        """A [rank, dim] and B [out, rank]."""
        return self._drawn.like(self.inner)

    def forward(self, x: Tensor) -> Tensor:
        # outside the product, which would otherwise compute the gradient of a whole B
        return adapter(x, *self.factors(), rank_scale=self.inner) * self.outer

    @staticmethod
    def add_grouped(  # type: ignore[override]
        adapters: Sequence[VeRA], x: Tensor, base: Tensor
    ) -> Tensor:
        pairs = [a.factors() for a in adapters]
        down, up = pairs[0]
        if any(pair[0] is not down for pair in pairs):
            down, up = (torch.stack(row) for row in zip(*pairs, strict=True))
        inner = torch.stack([a.inner for a in adapters])
        outer = torch.stack([a.outer for a in adapters])
        return base + adapter(x, down, up, rank_scale=inner) * outer[:, None, None]

    @staticmethod
    def after_grouped(  # type: ignore[override]
        adapters: Sequence[VeRA], inp: Tensor, out: Tensor
    ) -> Tensor:
        return VeRA.add_grouped(adapters, inp, out)


class Factors(nn.Module):
    """A and B of a set whose layers learn them together."""

    def __init__(self, dim: int, out: int, rank: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, dim))
        self.b = nn.Parameter(torch.zeros(out, rank))
        kaiming(self.a, generator)


class TiedLoRA(VeRA):
    """As VeRA, with factors A and B that learn, one pair in each set.

    Source: Renduchintala et al., "Tied-LoRA: Enhancing Parameter Efficiency of LoRA with Weight
    Tying", NAACL 2024, arXiv 2311.09578, the configuration in which everything learns. Checked
    against the formula in float64. The start is LoRA's with both vectors at 1; that of the paper
    was not looked up.

    Args:
        dim, out: input and output width.
        factors: of the set.
        owner: whether they are a submodule here, once in a set, so that they are saved once.
    """

    def __init__(self, dim: int, out: int, factors: Factors, *, owner: bool) -> None:
        Adapter.__init__(self)
        self._tied = [factors]
        if owner:
            self.factors_of_all = factors
        self.inner = nn.Parameter(torch.ones(len(factors.a)))
        self.outer = nn.Parameter(torch.ones(out))

    def factors(self) -> Sequence[Tensor]:
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
    factors = Factors(dim, out, rank, generator)
    rows = enumerate(modules)
    return AdapterSet({p: TiedLoRA(dim, out, factors, owner=i == 0) for i, p in rows})
