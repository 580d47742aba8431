"""Gates on ranks and sparse changes of a weight: at first the identity, then what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, plain_yaml
from test_bank import X, backbone, check_file_of_kind
from torch import Tensor, nn

from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.stream import Batch
from driftline.parts.adapters import starts
from driftline.parts.adapters.adapter import Adapter
from driftline.parts.adapters.gated_lora import GatedLoRA
from driftline.parts.adapters.sparse import SparseWeight

DIM, OUT = 12, 18
PRESETS = ("sora", "rank_budget", "dylora", "growing_ranks", "neuroada", "saft")


def layer() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(DIM, OUT).double().requires_grad_(False)


def gated(gate: str, **options: Any) -> GatedLoRA:
    """Three ranks for q and three for v, away from the identity."""
    draws = torch.Generator().manual_seed(3)
    options = {"parts": ["q", "v"], "scale": 0.5, "generator": draws} | options
    adapter = GatedLoRA(DIM, OUT, 3, gate=gate, **options).double()
    with torch.no_grad():
        for b in adapter.b:
            b.normal_(generator=draws)
        if gate in ("soft", "budget"):
            adapter.gate.copy_(torch.tensor([0.9, -0.2, 0.05, -0.6, 0.3, 0.01]))
    return adapter


def growing(*lengths: float) -> GatedLoRA:
    """Columns of B that are so long, three for q and three for v."""
    adapter = gated("growing", threshold=0.25)
    with torch.no_grad():
        for b, own in zip(adapter.b, torch.tensor(lengths).split(3), strict=True):
            b.copy_(own * F.normalize(b, dim=0))
    return adapter


def low_rank(a: GatedLoRA, gates: list[float]) -> Tensor:
    """The change of the weight, [OUT, DIM]."""
    g = torch.tensor(gates, dtype=torch.float64)
    q, v = (0.5 * b @ g.diag() @ d for d, b, g in zip(a.a, a.b, g.split(3), strict=True))
    return torch.cat([q, torch.zeros_like(q), v])


def sparse() -> SparseWeight:
    adapter = SparseWeight(layer(), 2).double()
    nn.init.normal_(adapter.values)
    return adapter


def by_gradient() -> SparseWeight:
    adapter = sparse()
    adapter.choose(slope())
    return adapter


def slope() -> Tensor:
    """A gradient of the layer's weight whose largest entries lie in few rows."""
    rows = torch.randn(OUT, DIM, generator=torch.Generator().manual_seed(6))
    return rows.double() * 0.7 ** torch.arange(OUT)[:, None]


def scattered_by_gradient(a: SparseWeight) -> Tensor:
    places = sorted(slope().abs().flatten().argsort(descending=True)[: 2 * OUT].tolist())
    change = torch.zeros(OUT * DIM, dtype=torch.float64)
    for place, value in zip(places, a.values.flatten(), strict=True):
        change[place] = value
    return change.view(OUT, DIM)


def scattered(a: SparseWeight) -> Tensor:
    weight, change = layer().weight, torch.zeros(OUT, DIM, dtype=torch.float64)
    for row in range(OUT):
        largest = sorted(weight[row].abs().argsort(descending=True)[:2].tolist())
        for place, column in enumerate(largest):
            change[row, column] = a.values[row, place]
    return change


# name -> adapter, and the change of the weight that it stands for
CASES: dict[str, tuple[Any, Any]] = {
    "soft": (
        lambda: gated("soft", threshold=0.25),
        lambda a: low_rank(a, [0.65, 0, 0, -0.35, 0.05, 0]),
    ),
    "soft without threshold": (
        lambda: gated("soft"),
        lambda a: low_rank(a, [0.9, -0.2, 0.05, -0.6, 0.3, 0.01]),
    ),
    "budget": (
        lambda: gated("budget", budget=3),
        lambda a: low_rank(a, [0.9, 0, 0, -0.6, 0.3, 0]),
    ),
    "nested": (lambda: gated("nested").eval(), lambda a: low_rank(a, [1, 1, 1, 1, 1, 1])),
    "growing": (
        lambda: growing(0.3, 0.2, 0.4, 0.3, 0.3, 0.1),
        lambda a: low_rank(a, [1, 1, 0, 1, 1, 1]),
    ),
    "sparse": (sparse, scattered),
    "sparse by gradient": (by_gradient, scattered_by_gradient),
}


def tokens(seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, DIM, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_the_merged_weight(name):
    adapter: Adapter = CASES[name][0]()
    plain, x = layer(), tokens().requires_grad_()
    want = F.linear(x, plain.weight + CASES[name][1](adapter), plain.bias)
    ours = adapter.after(x, plain(x))
    torch.testing.assert_close(ours, want, rtol=1e-6, atol=1e-7)  # gates are float32 numbers
    with torch.no_grad():
        torch.testing.assert_close(adapter.after(x, plain(x)), want, rtol=1e-6, atol=1e-7)
    learned = [x, *(p for n, p in adapter.named_parameters() if n != "gate")]
    one, other = (
        torch.autograd.grad(out.square().sum(), learned, retain_graph=True) for out in (ours, want)
    )
    for g, h in zip(one, other, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["soft", "budget"])
def test_a_gate_that_is_shut_gets_the_gradient_of_an_open_one(name):
    adapter, x = CASES[name][0](), tokens()
    aim = tokens(7)[..., :1]
    (ours,) = torch.autograd.grad((adapter(x) * aim).sum(), [adapter.gate])
    shut = adapter.gates() == 0
    assert 0 < shut.sum() < len(shut)
    down, up = torch.cat(list(adapter.a)), torch.block_diag(*adapter.b)
    up = torch.cat([up[:6], torch.zeros(6, 6), up[6:]])
    want = torch.einsum("bnd,rd,or,bno->r", x, down, up, 0.5 * aim.expand(2, 3, OUT))
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-10)


def test_nested_ranks_are_drawn_in_training_and_a_state_of_the_generator_gives_them_again():
    adapter, x = gated("nested"), tokens()
    torch.manual_seed(4)
    state = torch.random.get_rng_state()
    rows = [adapter.gates().tolist() for _ in range(40)]
    allowed = [[1.0] * b + [0.0] * (3 - b) for b in (1, 2, 3)]
    assert {tuple(row) for row in rows} == {tuple(2 * row) for row in allowed}
    torch.random.set_rng_state(state)
    assert [adapter.gates().tolist() for _ in range(40)] == rows
    state = torch.random.get_rng_state()
    adapter.eval()(x)
    assert torch.equal(torch.random.get_rng_state(), state)  # evaluation draws nothing


def test_a_rank_is_added_when_the_latest_is_in_use_and_starts_with_nothing():
    adapter = gated("growing", threshold=0.25)
    with torch.no_grad():
        for b in adapter.b:
            b.zero_()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    counts = []
    for _ in range(12):
        counts.append(int(adapter.gates().sum()))
        shut = ~adapter.gates().bool()
        optimizer.zero_grad()
        (adapter(tokens()) * tokens(7)[..., :1]).sum().backward()
        slopes = torch.cat([b.grad.norm(dim=0) for b in adapter.b])
        assert not slopes[shut].any() and slopes[~shut].all()
        optimizer.step()
    assert counts[0] == 2 and counts[-1] > 2 and counts == sorted(counts)


@pytest.mark.parametrize("name", PRESETS)
def test_the_file_of_a_kind_attaches_learns_and_groups(name):
    check_file_of_kind(name, depth=2, rounding=0)


def test_saft_changes_the_weights_with_the_largest_gradient_of_the_first_batches():
    net = backbone(depth=2)
    net.requires_grad_(False)
    node = plain_yaml(ROOT / "conf" / "adapter" / "saft.yaml")
    plan = build({k: v for k, v in node.items() if k != "name"}, at="adapter")
    bank, want = plan.bank(net, calibrates=True), net.features(X)
    plan.add(bank, "a")
    head = torch.randn(net.dim, 3, generator=torch.Generator().manual_seed(1))
    y = torch.tensor([0, 1, 2, 1])
    batches = [Batch(x, y[:2], torch.arange(2), torch.zeros(2)) for x in X.split(2)]

    def loss(batch: Batch) -> Tensor:
        return F.cross_entropy(bank.features(batch.x, "a") @ head, batch.y)

    starts.calibrate(bank, "a", "saft", batches, loss)
    assert torch.equal(bank.features(X, "a"), want)
    for point, adapter in bank.adapters("a").items():
        weight = net.net.get_submodule(point.partition(":")[0]).weight.requires_grad_()
        slopes = [torch.autograd.grad(loss(batch), weight)[0] for batch in batches]
        weight.requires_grad_(False)
        size = sum(slopes).abs().flatten()
        taken = torch.zeros(len(size), dtype=torch.bool)
        taken[adapter.index.flatten()] = True
        assert taken.sum() == 3 * len(weight)  # each place once
        assert size[taken].min() >= size[~taken].max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gated("budget"), "gate=budget needs .*budget, a number of 1 ... 6 ranks"),
        (lambda: gated("budget", budget=7), "a number of 1 ... 6 ranks"),
        (lambda: gated("soft", budget=2), "budget=2 would do nothing: .*gate is soft"),
        (lambda: gated("growing"), "gate=growing needs .*threshold above 0: at 0 all ranks count"),
        (lambda: gated("nested", threshold=0.5), "threshold=0.5 would do nothing: .*is nested"),
        (lambda: SparseWeight(layer(), 13), "entries=13: a row of the layer has 12; name fewer"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
