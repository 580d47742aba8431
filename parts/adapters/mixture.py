"""Several adapters at one point, mixed for each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.core.errors import UserError
from driftline.core.ranges import NonNegative, Size
from driftline.parts.adapters.adapter import Adapter, kaiming
from driftline.parts.adapters.bank import AdapterBank
from driftline.parts.adapters.lora import Factored
from driftline.parts.routing import direction, shares

ARROW = "arrow"  # name of the set that mixes others
ARROW_TOP = 3  # sets a token; the default of the peft library


class LoRAMixture(Adapter):
    """`s * sum over K experts of w_k B_k A_k x`, the shares w from a learned gate for each token.

    With `top=null` w is a softmax over all experts, as in Dou et al., "LoRAMoE", ACL 2024, arXiv
    2312.09979, without its loss that balances them. With a `top`, over those with the largest
    scores, as in mixtures that are sparse (Yu et al., "Boosting Continual Learning of
    Vision-Language Models via Mixture-of-Experts Adapters", CVPR 2024, arXiv 2403.11549, where one
    choice is made for all tokens of an image, with noise). Checked against the formula in float64,
    and against no other code.

    Args:
        dim, out: input and output width.
        rank: of each expert.
        experts: K.
        top: experts that answer for a token; None: all.
        scale: s.
        generator: of the initial A and gate, Kaiming-uniform; B starts at 0.

    Raises:
        UserError: for a `top` above `experts`, or one expert alone, whose share is always 1.
    """

    def __init__(
        self,
        dim: int,
        out: int,
        rank: Size,
        *,
        experts: Size,
        top: Size | None = None,
        scale: NonNegative = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        at = "strategy.adapter.kind"
        if top is not None and top > experts:
            raise UserError(f"{at}.top={top} is more than {at}.experts={experts}: lower it")
        if experts == 1 or top == 1:
            raise UserError(
                f"{at}.{'experts' if experts == 1 else 'top'}=1 leaves one expert with a share of "
                "1, and its gate would not learn: set it to 2 or more, or use adapter=lora"
            )
        self.top, self.scale = top, scale
        self.a = nn.Parameter(torch.empty(experts, rank, dim))
        self.b = nn.Parameter(torch.zeros(experts, out, rank))
        self.gate = nn.Parameter(torch.empty(experts, dim))
        kaiming(self.a.flatten(0, 1), generator)
        kaiming(self.gate, generator)

    def forward(self, x: Tensor) -> Tensor:
        weights = shares(F.linear(x, self.gate), self.top)  # [..., K]
        hidden = F.linear(x, self.a.flatten(0, 1)).unflatten(-1, self.a.shape[:2])
        up = self.b.transpose(0, 1).flatten(1)  # [out, K r]
        return self.scale * F.linear((weights[..., None] * hidden).flatten(-2), up)


class Arrow(Adapter):
    """`sum over sets of w_t f_t(x)`, of what the adapters of several sets add, without training.

    The shares w of a token x are a softmax over the `top` largest |v_t . x|, where v_t is the
    `direction` of the adapter of set t at this point.

    Source: Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs",
    ICML 2024, arXiv 2405.11157, section 4. Checked against the layer of peft 0.21, whose vectors
    are those of a power iteration. For LoRA as published; of an adapter with a nonlinearity between
    its products, v is that of the products.

    Args:
        adapters: of the sets; not submodules.
        state: a word that differs where their values do.
        top: how many sets a token is sent to.

    Raises:
        UserError: for adapters that add no low-rank products.
    """

    directions: Tensor  # [T, dim]

    def __init__(self, adapters: Sequence[Adapter], state: str = "", top: int = ARROW_TOP) -> None:
        super().__init__()
        check_directed(adapters)
        self.sets, self.state, self.top = list(adapters), state, top
        each = torch.stack([direction(_products(one)) for one in adapters])
        self.register_buffer("directions", each, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = shares(F.linear(x, self.directions).abs(), self.top)  # [..., T]
        added = torch.stack([one(x) for one in self.sets], -1)
        return torch.einsum("...dt,...t->...d", added, weights)


def check_directed(adapters: Sequence[Adapter]) -> None:
    """Whether `Arrow` can mix such adapters.

    Raises:
        UserError: if not.
    """
    for one in adapters:
        if not one.pairs():
            raise UserError(
                f"strategy.router=arrow needs low-rank products, and {type(one).__name__} adds "
                "none: use adapter=lora (without a start that is taken off), or another router"
            )


def _products(adapter: Adapter) -> list[tuple[Tensor, Tensor]]:
    """The `pairs` of an adapter as products that have rows of their own, with learned scales."""
    if not isinstance(adapter, Factored):
        return adapter.pairs()
    down, up, scales = adapter._factors()
    return [(down, up if scales is None else up * scales)]


def mix_sets(bank: AdapterBank, hashes: Mapping[str, str]) -> str:
    """Make the set `ARROW` of a bank from others, unless it is made of them as they are.

    Args:
        hashes: of the values of each of these sets, by name.

    Returns:
        A hash of them all.
    """
    state = "+".join(hashes.values())
    if ARROW in bank.sets:
        if all(one.state == state for one in bank.adapters(ARROW).values()):
            return state
        bank.remove(ARROW)
    sets = [bank.adapters(name) for name in hashes]
    bank.add(ARROW, {point: Arrow([one[point] for one in sets], state) for point in sets[0]})
    return state
