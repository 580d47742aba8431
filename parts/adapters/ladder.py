"""A small network beside the frozen one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import driftline.core.vision  # noqa: F401
from driftline.core.errors import UserError
from driftline.core.ranges import Size
from driftline.parts.adapters.adapter import Adapter, AdapterSet, NotSummable, kaiming


class Rung(Adapter):
    """One block of the network beside: reads what a frozen block gives, and the rung below.

    The network's own tokens stay as they are up to the last rung, which adds to them. So no
    gradient goes through a frozen block, and none of its activations are kept.

    Args:
        dim: width of the tokens.
        width: of the network beside.
        below: the rung before this one, which is no submodule here; None for the first.
        last: whether this one adds to the tokens.
        generator: of the initial weights.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        below: Rung | None,
        *,
        last: bool,
        generator: torch.Generator | None,
    ) -> None:
        from timm.models.vision_transformer import Block

        super().__init__()
        heads = next(n for n in (4, 3, 2, 1) if width % n == 0)
        with torch.device("meta"):  # so that the global generator stays where it is
            self.down = nn.Linear(dim, width)
            self.block = Block(width, heads, qkv_bias=True)
            self.up = nn.Linear(width, dim) if last else None
        self.to_empty(device="cpu")
        for module in self.modules():
            if isinstance(module, nn.Linear):
                kaiming(module.weight, generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        if self.up is not None:
            nn.init.zeros_(self.up.weight)
        self.gate = nn.Parameter(torch.zeros(())) if below is not None else None
        self._below = [below]
        self._state: Tensor | None = None  # [B, N, width] within a pass

    def after(self, inp: Tensor, out: Tensor) -> Tensor:
        read = self.down(out)
        below = self._below[0]
        if below is not None and self.gate is not None:
            assert below._state is not None
            share = torch.sigmoid(self.gate / 0.1)
            read = share * read + (1 - share) * below._state
            below._state = None
        state = self.block(read)
        if self.up is not None:
            return out + self.up(state)
        self._state = state
        return out

    def add(self, x: Tensor, base: Tensor, weight: float = 1.0) -> Tensor:
        raise NotSummable("networks beside the frozen one cannot be summed; use one set")


def ladder(
    modules: Mapping[str, nn.Module],
    reduction: Size,
    *,
    generator: torch.Generator | None = None,
) -> AdapterSet:
    """Ladder side-tuning: a set of `Rung`, each of which mixes its two inputs by a learned gate.

    Source: Sung et al., "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer
    Learning", NeurIPS 2022, arXiv 2206.06522, section 3: gates sigmoid(alpha / 0.1) with alpha at
    0, blocks of the same form `reduction` times narrower. Ours: what comes up is added to the
    tokens and starts at 0, as every kind here has to be the identity at first; blocks start at
    random and not as pruned ones of the network. Checked against the formula.

    Args:
        modules: point -> frozen block, from the first to the last.
        reduction: the width of the tokens divided by that of the network beside.
        generator: of the initial weights.

    Raises:
        UserError: for modules that are no blocks of timm's ViTs, or tokens narrower than
            `reduction`.
    """
    from timm.models.vision_transformer import Block

    rungs = AdapterSet()
    below: Rung | None = None
    for number, (point, module) in enumerate(modules.items(), 1):
        if not isinstance(module, Block) or not isinstance(module.norm1, nn.LayerNorm):
            raise UserError(
                f"a ladder reads Blocks of timm's ViTs, not {type(module).__name__}: choose "
                "other points (strategy.adapter.at)"
            )
        (dim,) = module.norm1.normalized_shape
        if reduction > dim:
            raise UserError(
                f"strategy.adapter.kind.reduction={reduction}: tokens have {dim} channels; name "
                "fewer"
            )
        last = number == len(modules)
        rungs[point] = below = Rung(dim, dim // reduction, below, last=last, generator=generator)
    return rungs
