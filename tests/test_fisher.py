"""Fisher information from the network's own classes: against the definition, a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from driftline.parts.fisher import fisher


def test_squares_of_gradients_that_are_averaged_over_a_batch() -> None:
    torch.manual_seed(0)
    net = nn.Linear(4, 3).double()
    spare = nn.Parameter(torch.ones(2))
    x = torch.randn(5, 4, dtype=torch.float64)
    found = fisher(net, {**dict(net.named_parameters()), "spare": spare}, x.split(3))

    def squares(part: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of a linear layer under softmax and cross-entropy, by hand."""
        with torch.no_grad():
            p = net(part).softmax(1)
            off = (p - nn.functional.one_hot(p.argmax(1), 3)) / len(part)
            return (off.T @ part) ** 2, off.sum(0) ** 2

    weight, bias = zip(*(squares(part) for part in x.split(3)), strict=True)
    torch.testing.assert_close(found["weight"], (weight[0] + weight[1]) / 2)
    torch.testing.assert_close(found["bias"], (bias[0] + bias[1]) / 2)
    assert not found["spare"].any()
    assert net.weight.grad is None
    assert not fisher(net, {"weight": net.weight}, [])["weight"].any()
