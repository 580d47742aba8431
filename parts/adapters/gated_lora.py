"""Low-rank updates whose ranks have gates."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import MinLen, Predicate
from torch import Tensor, nn

from driftline.core.errors import UserError
from driftline.core.ranges import NonNegative, Size, distinct
from driftline.parts.adapters.lora import LoRA


class GatedLoRA(LoRA):
    """`s * B diag(g) A x`, a gate g for each rank.

    `soft`: g is learned and read through a soft threshold t: sign(g) max(|g| - t, 0). A rank whose
    gate is within t adds nothing, and comes back if its gate grows: the gradient passes the
    threshold as if it were not there. From Ding et al., "Sparse Low-rank Adaptation of Pre-trained
    Language Models" (SoRA), EMNLP 2023, arXiv 2311.11696, section 3, where the optimiser shrinks g
    itself after every step, by its rate times a weight.

    `budget`: g is learned and only the largest |g| of a layer count, as many as the budget. The
    gradient passes the choice, so that the others can come back. The idea of budgets is that of
    AdaLoRA (Zhang et al., ICLR 2023) and ALoRA (Liu et al., NAACL 2024), which take other measures
    of importance, share one budget among all layers, and lower it or move it during the training.

    `nested`: no parameter. In training every layer draws a number b of 1 ... r for each pass and
    only its first b ranks count, in evaluation all; so the first ranks matter most. From Valipour
    et al., "DyLoRA", EACL 2023, arXiv 2210.07558, section 4, where one b is drawn for all layers.
    Drawn from torch's global generator, like dropout; checkpoints contain it.

    `growing`: no parameter. A block has one rank at first, and one more whenever the latest one is
    in use: when its column of B is as long as t. The others add nothing and get no gradient until
    then; ranks leave again where such a column gets shorter than t (by a decay, or a merge). The
    idea of ranks that are added where they are needed is that of IncreLoRA (Zhang et al., 2023,
    arXiv 2308.12043), which measures it by gradients and gives new ranks to the layers with the
    most of it, on a schedule.

    All are checked against these formulas in float64, and against no other code.

    Args:
        dim, out, rank, parts, scale: as of `LoRA`; several row blocks have ranks of their own.
        gate: which of these.
        threshold: t of `soft` and `growing`.
        budget: ranks of all blocks of a layer that count, of `budget`.
        generator: of the initial A and of g, N(0, 1); B starts at 0.

    Raises:
        UserError: for a budget that is missing or above the ranks of a layer, a threshold of 0 of
            `growing`, or a setting of another gate.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        rank: Size,
        *,
        gate: Literal["soft", "budget", "nested", "growing"],
        parts: Annotated[list[Literal["q", "k", "v"]], MinLen(1), Predicate(distinct)]
        | None = None,
        scale: NonNegative = 1.0,
        threshold: NonNegative = 0.0,
        budget: Size | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(dim, out, rank, parts=parts, scale=scale, generator=generator)
        ranks = rank * len(self.a)
        at = "strategy.adapter.kind"
        if gate == "budget" and (budget is None or budget > ranks):
            raise UserError(f"{at}.gate=budget needs {at}.budget, a number of 1 ... {ranks} ranks")
        if gate != "budget" and budget is not None:
            raise UserError(f"{at}.budget={budget} would do nothing: {at}.gate is {gate}")
        if gate not in ("soft", "growing") and threshold:
            raise UserError(f"{at}.threshold={threshold:g} would do nothing: {at}.gate is {gate}")
        if gate == "growing" and not threshold:
            raise UserError(f"{at}.gate=growing needs {at}.threshold above 0: at 0 all ranks count")
        self.kind, self.rank, self.threshold, self.budget = gate, rank, threshold, budget
        if gate in ("soft", "budget"):
            self.gate = nn.Parameter(torch.empty(ranks).normal_(generator=generator))

    def gates(self) -> Tensor:
        """What each rank of each block is multiplied by, [R]."""
        if self.kind == "nested":
            used = int(torch.randint(1, self.rank + 1, ())) if self.training else self.rank
            first = torch.arange(self.rank, device=self.a[0].device) < used
            return first.to(self.a[0].dtype).repeat(len(self.a))
        if self.kind == "growing":
            used = torch.stack([b.detach().norm(dim=0) >= self.threshold for b in self.b])
            used = F.pad(used, (1, 0), value=True)[:, :-1]  # the first has none before it
            return used.cumprod(1).to(self.a[0].dtype).flatten()
        g = self.gate.detach()
        if self.kind == "soft":
            read = g.sign() * (g.abs() - self.threshold).clamp_min(0)
        else:
            assert self.budget is not None
            read = torch.zeros_like(g).scatter(0, chosen := g.abs().topk(self.budget)[1], g[chosen])
        return read + (self.gate - g)  # exactly `read`; the gradient is that of the gate

    def _factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        down, up, _ = super()._factors()
        return down, up, self.gates()

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """None: what is added is a product of three."""
        return []
