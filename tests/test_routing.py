"""Which set of adapters answers for an image: against loops, and in the methods that ask."""

from __future__ import annotations

import pytest
import test_mos
import test_tuna
import torch
from torch import Tensor

from driftline.parts.routing import by_distance, by_entropy, scores_of

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
