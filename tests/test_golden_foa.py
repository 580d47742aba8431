"""FOA against recorded runs, and the state of its evolution strategy."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import copied, equal, strategy_node
from golden_case import Case, both, names, record
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.errors import Diverged, UserError
from driftline.core.stream import Batch, SourceImages
from driftline.tta.foa import FOA, evolution, go_on, state_of


def source(parts: list[tuple[Tensor, Tensor]]) -> SourceImages:
    """Images and labels in batches of 64 at most, whatever size is asked for."""
    rows = [Batch(x, y, torch.arange(len(y)), torch.zeros_like(y)) for x, y in parts]
    return SourceImages(sum(len(b.y) for b in rows), "", "", lambda size, **_: iter(rows))


class Recorded(FOA):
    """FOA with the recorded candidates; how far its own are from them is `off`."""

    case: Case
    turn = -1
    off = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.dice = np.random.RandomState(2020)
        super().__init__(*args, **kwargs)

    def draw(self, rows: int, columns: int) -> np.ndarray:
        return self.dice.randn(rows, columns)

    def candidates(self, asked: list[np.ndarray]) -> Tensor:
        self.turn += 1
        own = super().candidates(asked)
        fed = torch.from_numpy(self.case.data["population"][self.turn]).view(-1, *self.shape)
        self.off = max(self.off, (own[:-1] - fed).abs().max().item())
        return torch.cat([fed, own[-1:]])


@both
@pytest.mark.parametrize("name", names("foa_*"))
def test_foa(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    hyper = case.hyper
    method = Recorded(
        Backbone(case.net()),
        seed=0,
        prompts=hyper["num_prompts"],
        population=hyper["popsize"],
        step=hyper["cma_sigma0"],
        discrepancy=hyper["fitness_lambda"],
        history=hyper["history_momentum"],
        shift=hyper["shift_scale"],
        source_images=32,
    )
    method.case = case
    method.prompts.copy_(torch.from_numpy(case.data["prompts_init"][0]))
    artefact = method.prepare(source(case.source(16)), None)  # type: ignore[arg-type]
    method.use_prepared(artefact)
    means: list[Any] = []
    adapt = method.adapt

    def note(x: Tensor) -> Tensor:
        scores = adapt(x)
        assert method.history_mean is not None
        means.append(method.history_mean.numpy())
        return scores

    method.adapt = note  # type: ignore[method-assign]
    results: dict[str, Any] = record(method, case)
    losses = np.reshape(results["loss"], (5, -1))
    assert np.array_equal(losses.argmin(1), case.data["best_candidate"])
    assert method.off < 5e-7, "candidates of the package, in float32, from the recorded draws"
    results |= {"candidate_loss": losses, "history": means, "best_prompts": method.prompts}
    results |= {f"source_{k}": v for k, v in artefact.items()}
    case.check_all(results)
    assert method.backbone.passes.forward == 28 * 5 * 16 + 32
    assert method.backbone.passes.backward == 0


def test_a_strategy_goes_on_from_plain_values() -> None:
    """Bit by bit what the package computes when its object lives on."""
    dice = np.random.RandomState(0)
    whole = evolution(220, 27, 1.0, dice.randn)
    parts = state_of(evolution(220, 27, 1.0, dice.randn))
    seen = set()
    for turn in range(8):
        start = dice.get_state()
        asked = [*whole.ask(), np.full(220, 9.0)]  # the last is far outside and gets clipped
        dice.set_state(start)
        es = go_on(evolution(220, 27, 1.0, dice.randn), copied(parts))
        mine = [*es.ask(), np.full(220, 9.0)]
        assert np.array_equal(mine, asked), turn
        losses = [float((x**2 * np.arange(220)).sum()) for x in asked]
        whole.tell(asked, losses)
        es.tell(mine, losses)
        parts = state_of(es)
        whole.sm.B = np.ascontiguousarray(whole.sm.B)  # products round by the layout in memory
        assert equal(parts, state_of(whole)), turn
        seen.add(parts["told"] - parts["decomposed"])
    assert len(seen) > 1, "the decomposition is never older than the covariance"


def foa(**options: Any) -> FOA:
    torch.manual_seed(3)
    net = timm.create_model("test_vit", num_classes=10, img_size=64)
    node = strategy_node("foa", **({"population": 6, "source_images": 20} | options))
    method = build(node, at="strategy", backbone=Backbone(net, tag="vit"), seed=0, num_classes=10)
    x = torch.rand(20, 3, 64, 64)
    method.use_prepared(method.prepare(source([(x, torch.zeros(20))]), None))
    method.begin_stream()
    return method


def test_reset_forgets_prompts_search_and_history() -> None:
    method, x = foa(), torch.rand(4, 3, 64, 64)
    before, start = method.predict(x), copied(method.search)
    method.adapt(x)
    assert not equal(method.search, start) and method.history_mean is not None
    assert not torch.equal(method.predict(x), before)
    method.reset()
    assert equal(copied(method.search), start) and method.history_mean is None
    assert torch.equal(method.predict(x), before)


def test_without_a_shift_the_history_is_no_matter() -> None:
    x = torch.rand(3, 4, 3, 64, 64)
    still, moved = foa(shift=0.0), foa()
    assert torch.equal(still.adapt(x[0]), moved.adapt(x[0]))  # no history yet
    assert not torch.equal(still.adapt(x[1]), moved.adapt(x[1]))
    still.history_mean = None
    assert torch.equal(still.prompts, moved.prompts)
    tokens = still.class_tokens(x[2], prompts=still.prompts)
    assert torch.equal(still.predict(x[2]), still.backbone.head(still.last(tokens)))


def test_what_cannot_be_is_said() -> None:
    method, x = foa(), torch.rand(4, 3, 64, 64)
    before = copied(method.search)
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(Diverged, match="not finite"):
        method.adapt(x)
    assert equal(method.search, before)
    with pytest.raises(UserError, match="measures a spread"):
        method.prepare(source([(x[1:2], torch.zeros(1))]), None)  # type: ignore[arg-type]
    node = strategy_node("foa")
    for name, extra in (("test_resnet", {}), ("test_vit", {"global_pool": "avg"})):
        net = Backbone(timm.create_model(name, num_classes=10, **extra), tag=name)
        with pytest.raises(UserError, match=f"class token of every layer, which {name} has not"):
            build(node, at="strategy", backbone=net, seed=0, num_classes=10)


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(UserError, match=r'needs the package cma: pip install -e "\.\[foa\]"'):
        foa()
