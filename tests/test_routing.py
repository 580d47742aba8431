"""Which set of adapters answers for an image: against loops, and in the methods that ask."""

from __future__ import annotations

from copy import deepcopy

import pytest
import test_mos
import test_tuna
import torch
from conftest import strategy_node
from test_bank import backbone
from torch import Tensor

from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.parts.adapters.bottleneck import Bottleneck
from driftline.parts.adapters.dual_rank import DualRank
from driftline.parts.adapters.lora import LoRA
from driftline.parts.adapters.mixture import ARROW, Arrow
from driftline.parts.adapters.mosa import MoSA
from driftline.parts.routing import by_distance, by_entropy, direction, scores_of, shares

DRAWS = torch.Generator().manual_seed(0)
FEATURES = torch.randn(3, 5, 4, generator=DRAWS)
MEANS = torch.randn(6, 4, generator=DRAWS)
OWNER = torch.tensor([0, 0, 1, 1, 2, 2])


def nearest(features: Tensor, means: Tensor, owner: Tensor) -> list[int]:
    chosen = []
    for b in range(features.shape[1]):
        best = {}
        for c, t in enumerate(owner.tolist()):
            if means[c].any():
                cosine = float(torch.cosine_similarity(features[t, b], means[c], dim=0))
                best[t] = max(cosine, best.get(t, -2.0))
        chosen.append(max(best, key=best.__getitem__))
    return chosen


def test_the_set_of_the_lowest_entropy_is_taken_image_by_image():
    scores = torch.tensor([[[5.0, 0.0], [0.1, 0.0]], [[1.0, 0.0], [0.0, 9.0]]])
    chosen = by_entropy(scores)
    assert chosen.tolist() == [0, 1]
    assert scores_of(scores, chosen).tolist() == [[5.0, 0.0], [0.0, 9.0]]


@pytest.mark.parametrize("without", [[], [4], [0, 1]], ids=str)
def test_the_set_with_the_nearest_mean_of_its_own_classes_is_taken(without):
    means = MEANS.index_fill(0, torch.tensor(without, dtype=torch.int64), 0)
    got = by_distance(FEATURES, means, OWNER).tolist()
    assert got == nearest(FEATURES, means, OWNER) and len(set(got)) > 1


@pytest.mark.parametrize("router", ["entropy", "distance"])
@pytest.mark.parametrize("module", [test_mos, test_tuna], ids=["mos", "tuna"])
def test_a_method_answers_from_the_set_that_is_chosen(module, router):
    strategy = module.learned(router=router)
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    names = strategy.names
    with torch.no_grad():
        features = strategy.embed(x, names)
        scores = (
            strategy.scale * strategy.cosines(features)
            if module is test_tuna
            else strategy.head(features)
        )[..., : strategy.stops[-1]]
    entropy = torch.distributions.Categorical(logits=scores).entropy()
    means = strategy.gaussians.means
    chosen = {
        "entropy": entropy.argmin(0).tolist(),
        "distance": nearest(features, means, strategy.owner),
    }[router]
    own = torch.stack([scores[t, b] for b, t in enumerate(chosen)]).softmax(1)
    if module is test_tuna:
        want = own + scores[-1].softmax(1)  # the newest set stands for the universal one
    else:
        want = own + (len(names) * strategy.prototypes(features[0])[:, : scores.shape[2]]).softmax(
            1
        )
    torch.testing.assert_close(strategy.predict(x), want)


def test_shares_are_a_softmax_over_the_largest_scores():
    scores = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 3.5]])
    assert torch.equal(shares(scores), scores.softmax(1))
    want = [[0.0, 0.8808, 0.1192], [0.2689, 0.0, 0.7311]]
    got = shares(scores, 2, temperature=0.5)
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=1e-4)
    torch.testing.assert_close(shares(scores, 7), scores.softmax(1))


@pytest.mark.parametrize("blocks", [1, 2])
def test_the_direction_of_products_is_the_input_to_which_they_answer_most(blocks):
    pairs = [(torch.randn(2, 7, generator=DRAWS), torch.randn(5, 2)) for _ in range(blocks)]
    whole = torch.cat([up @ down for down, up in pairs])
    first = torch.linalg.svd(whole).Vh[0]
    assert (first @ direction(pairs)).abs() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoRA(7, 9, 2),
        lambda: LoRA(7, 9, 2, parts=["q", "v"]),
        lambda: LoRA(7, 9, 2, parts=["q", "v"], scale=None),
        lambda: DualRank(7, 9, 1, 3),
        lambda: Bottleneck(7, 3),
        lambda: MoSA(7, 3, experts=2).eval(),
    ],
    ids=["lora", "parts", "learned scales", "dual_rank", "bottleneck", "mosa"],
)
def test_arrow_looks_where_the_whole_update_of_a_set_answers_most(make):
    adapter = make()
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(generator=draws)
        if isinstance(adapter, Bottleneck):  # of which it is the products alone
            whole = adapter.up.weight @ adapter.down.weight
        else:
            whole = adapter(torch.eye(7)).T
    first = torch.linalg.svd(whole).Vh[0]
    assert (first @ Arrow([adapter]).directions[0]).abs() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("module", [test_mos, test_tuna], ids=["mos", "tuna"])
def test_arrow_mixes_the_sets_for_each_token_and_follows_their_values(module):
    strategy = module.learned(router="arrow")
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    first = strategy.predict(x)
    point, mixed = next(iter(strategy.bank.adapters(ARROW).items()))
    sets = [strategy.bank.adapters(name)[point] for name in strategy.names]
    tokens = torch.randn(2, 4, strategy.backbone.width, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        strategy.eval()
        keys = torch.stack([direction(one.pairs()) for one in sets])
        weights = shares((tokens @ keys.T).abs(), 3)
        want = sum(weights[..., t, None] * one(tokens) for t, one in enumerate(sets))
        torch.testing.assert_close(mixed(tokens), want)
        features = strategy.embed(x, [ARROW])[0]
    head = strategy.cosines if module is test_tuna else strategy.head
    assert not torch.equal(head(features), head(strategy.embed(x, [strategy.names[0]])[0]))
    assert torch.equal(strategy.predict(x), first)
    state = deepcopy(strategy.snapshot())
    with torch.no_grad():
        for p in strategy.bank.parameters_of(strategy.names[0]):
            p.mul_(-3)
    strategy._hashes.clear()
    assert not torch.equal(strategy.predict(x), first)
    strategy.restore(state)
    assert torch.equal(strategy.predict(x), first)


@pytest.mark.parametrize("name", ["mos", "tuna"])
def test_arrow_refuses_adapters_that_are_no_products(name):
    node = strategy_node(name, adapter="prefix", router="arrow")
    if name == "tuna":
        node["orthogonality"] = 0
    extra = {"num_classes": 4} if name == "mos" else {}
    with pytest.raises(UserError, match="router=arrow needs low-rank products, and .* adds none"):
        build(node, at="strategy", backbone=backbone(), seed=0, **extra)
