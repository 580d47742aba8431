"""Directions of the inputs of layers that earlier tasks have used, and what is left of them.

    with input_moments(layers) as moments:          # name -> linear layer
        for batch in task.fit():
            backbone.features(batch.x)
    for name, moment in moments.items():
        subspaces[name].add(moment.mean(), share)
    weight.grad = subspaces[name].free_part(weight.grad.T).T     # of a weight [D_out, D]

A layer's weight [D_out, D] moved by rows within the free directions gives the same outputs for
inputs within the used ones.

`Subspace.add` is the rule of DualGPM (Liang and Li, NeurIPS 2023, arXiv 2302.12187) as in
liangyanshuo/InfLoRA e08b00e, `methods/inflora.py`; with `dual=False` it is that of GPM (Saha et
al., ICLR 2021, arXiv 2103.09762). GPM reads inputs where InfLoRA reads their second moment: hand
it `root(moment.mean())`.

Deviations: sums and decompositions are float64, where the official code has float32. A first task
that uses more than half of the directions is kept by what it leaves, as later ones are; the
official code marks what it uses as free and stops. Directions without any input are never added.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from driftline.core.distributed import full_batch_size, sum_of_shares
from driftline.core.errors import Diverged

ROUNDING = 1e-6  # singular values below this share of all are float32's rounding


class Moment:
    """Sum of x x' over the inputs x of a layer, all tokens of all images.

    Args:
        dim: length D of x.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self.sum = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self.count = 0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Inputs [..., D]."""
        x = x.flatten(0, -2).float()
        self.sum += sum_of_shares(x.T @ x)
        self.count += full_batch_size(len(x))

    def mean(self) -> Tensor:
        """float64 [D, D]; zeros before the first input."""
        return self.sum / max(1, self.count)


@contextmanager
def input_moments(layers: Mapping[str, nn.Module]) -> Generator[dict[str, Moment]]:
    """Inside, every pass through linear layers is added up, by the names given.

    Raises:
        Diverged: at the end, for inputs that are not finite, naming the layer.
    """
    moments: dict[str, Moment] = {}
    handles = []
    for name, layer in layers.items():
        weight: Any = layer.weight
        moment = moments[name] = Moment(weight.shape[1], weight.device)
        handles.append(
            layer.register_forward_pre_hook(lambda _, args, moment=moment: moment.add(args[0]))
        )
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()
    for name, moment in moments.items():
        if not moment.sum.isfinite().all():
            raise Diverged(
                f"{name} gets inputs that are not finite: look for images or weights that are not "
                "finite numbers"
            )


def root(moment: Tensor) -> Tensor:
    """A matrix float64 [D, D] with R R' = `moment`, its columns by falling size.

    Its left singular vectors and values are those of the inputs as columns, over sqrt(count).
    """
    values, vectors = torch.linalg.eigh(moment.double())
    return (vectors * values.clamp_min(0).sqrt()).flip(1)


def within(x: Tensor, basis: Tensor) -> Tensor:
    """Of the columns of `x` [D, N] the part in the span of the orthonormal columns of `basis`."""
    return basis @ (basis.T @ x)


def without(x: Tensor, basis: Tensor) -> Tensor:
    """Of the columns of `x` [D, N] the part outside of that span."""
    return x - within(x, basis)


class Subspace(nn.Module):
    """Directions that the inputs of one layer have used so far, at first none.

    Args:
        dim: length D of an input.
        dual: once more than half of the directions are used, keep a basis of the others.
    """

    basis: Tensor  # [D, k], orthonormal: of what is used or, `inverse`, of what is free
    inverse: Tensor  # bool []

    def __init__(self, dim: int, *, dual: bool = True) -> None:
        super().__init__()
        self.dual = dual
        self.register_buffer("basis", torch.zeros(dim, 0))
        self.register_buffer("inverse", torch.zeros((), dtype=torch.bool))

    @property
    def free(self) -> int:
        """How many directions are left."""
        dim, columns = self.basis.shape
        return columns if self.inverse else dim - columns

    def free_part(self, x: Tensor) -> Tensor:
        """Of the columns of `x` [D, N] what lies in no direction that is used."""
        basis = self.basis.to(x.dtype)
        return within(x, basis) if self.inverse else without(x, basis)

    @torch.no_grad()
    def add(self, inputs: Tensor, share: float) -> None:
        """Use as many further directions as it takes to hold `share` of the squared `inputs`.

        The first time, one fewer than it takes (at least one), as in the official code.

        Args:
            inputs: [D, N], columns that span what a task uses: inputs of the layer, their second
                moment, or `root` of it.
            share: in [0, 1], of the squared Frobenius norm.
        """
        inputs = inputs.to(self.basis.device, torch.float64)
        total = inputs.square().sum()
        if not total:
            return
        rest = self.free_part(inputs)
        vectors, values, _ = torch.linalg.svd(rest, full_matrices=False)
        shares = values.square() / total
        held = 1 - rest.square().sum() / total + shares.cumsum(0)  # with the first 1, 2, ... more
        # Those of size 0 are arbitrary, and may be used already.
        real = int((values > ROUNDING * total.sqrt()).sum())
        if not self.inverse and not self.basis.shape[1]:
            count = max(1, int((held < share).sum()))
        elif self.inverse:
            count = int((1 - held + shares >= 1 - share).sum())
        else:
            count = int((held - shares < share).sum())
        self._use(vectors[:, : min(count, real, self.free)])

    def _use(self, new: Tensor) -> None:
        """Add orthonormal directions [D, n], all of them free."""
        if not new.shape[1]:
            return
        basis = self.basis.double()
        if self.inverse:
            kept = basis.shape[1] - new.shape[1]
            left, _, _ = torch.linalg.svd(without(basis, new), full_matrices=False)
            basis = left[:, :kept]
        else:
            basis = torch.cat([basis, new], 1)
        dim, columns = basis.shape
        if self.dual and not self.inverse and columns > dim / 2:
            basis = torch.linalg.qr(basis, mode="complete").Q[:, columns:]
            self.inverse = torch.ones_like(self.inverse)
        self.basis = basis.to(self.basis.dtype)
