"""The subspaces that earlier tasks used."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from driftline.core.errors import Diverged
from driftline.core.seed import generator
from driftline.parts.subspace import Subspace, input_moments, root

# ------------------------------------------------------------------------------ subspaces


def test_what_a_task_used_is_no_longer_free_and_may_become_nothing():
    draws = generator(5, "inputs")
    for dual in (True, False):
        subspace = Subspace(6, dual=dual)
        free = [subspace.free]
        for _ in range(5):
            inputs = torch.randn(6, 2, generator=draws, dtype=torch.float64)
            subspace.add(inputs, 0.999999)
            subspace.add(inputs, 0.999999)  # of the first pair, one is left out the first time
            free.append(subspace.free)
            left = subspace.free_part(torch.eye(6, dtype=torch.float64))
            assert torch.allclose(left @ left, left, atol=1e-6)
            assert left.trace().item() == pytest.approx(subspace.free, abs=1e-5)
            assert subspace.free_part(inputs).norm() < 2e-3 * inputs.norm()
            assert subspace.inverse == (dual and subspace.free < 3)
        assert free == [6, 4, 2, 0, 0, 0]
    subspace = Subspace(6)
    subspace.add(torch.zeros(6, 6), 0.9)  # no inputs
    assert subspace.free == 6


def test_moments_of_inputs_and_their_root():
    layer = nn.Linear(4, 3)
    x = torch.randn(5, 7, 4, generator=generator(5, "x"))
    with input_moments({"layer": layer}) as moments:
        for part in x.split(2):
            layer(part)
    layer(x)  # is not counted
    rows = x.flatten(0, 1).double()
    mean = moments["layer"].mean()
    assert torch.allclose(mean, rows.T @ rows / 35, atol=1e-7)
    of_inputs = torch.linalg.svdvals(rows.T) / 35**0.5
    assert torch.allclose(torch.linalg.svdvals(root(mean)), of_inputs)
    assert torch.allclose(root(mean) @ root(mean).T, mean)
    bad = pytest.raises(Diverged, match="layer gets inputs that are not finite")
    with bad, input_moments({"layer": layer}):
        layer(x * torch.nan)
