"""The source phase: cached by what it depends on, resumable, and reported beside the run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.files import BadFile
from driftline.core.strategy import Progress, TTAStrategy
from driftline.core.stream import Batch, SourceImages
from driftline.parts.optim import Optim
from driftline.parts.warmup import WarmUp
from driftline.runs.prepare import PartialFile, _load, prepare


def warmup(**changes: Any) -> WarmUp:
    options: dict[str, Any] = dict(
        epochs=3, batch_size=4, augment="none", every=1
    )  # fmt: skip
    own = {k: v for k, v in changes.items() if k in options}
    learning = {k: v for k, v in changes.items() if k not in options}
    optim = Optim(**{"kind": "sgd", "lr": 0.1, "momentum": 0.9} | learning)
    return WarmUp(**options | own, optim=optim)


def source(fingerprint: str = "a") -> SourceImages:
    x = torch.rand(10, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2, 3)) > 0.5).long()

    def batches(batch_size, *, epoch=None, start=0, augment="none"):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(epoch or 0))
        for i in range(start * batch_size, 10, batch_size):
            rows = order[i : i + batch_size]
            yield Batch(x[rows], y[rows], rows, torch.zeros_like(rows))

    return SourceImages(10, "stub images", fingerprint, batches)


class Warmed(TTAStrategy):
    """A linear layer that is trained on the source."""

    def __init__(self, backbone: Backbone, *, recipe: WarmUp, calls: list[str]) -> None:
        super().__init__(backbone)
        self.extra = nn.Linear(12, 2)
        nn.init.zeros_(self.extra.weight)
        nn.init.zeros_(self.extra.bias)
        self.recipe, self.calls = recipe, calls

    def preparation(self) -> dict[str, Any]:
        return self.recipe.settings()

    def prepare(self, source: SourceImages, progress: Progress) -> dict[str, Tensor]:
        self.calls.append("prepare")

        def loss(batch: Batch) -> Tensor:
            return nn.functional.cross_entropy(self.extra(batch.x.flatten(1)), batch.y)

        self.recipe.run(self.extra, loss, source, progress)
        return dict(self.extra.state_dict())

    def use_prepared(self, artefact: Mapping[str, Tensor]) -> None:
        self.extra.load_state_dict(dict(artefact))


@pytest.fixture
def run(tmp_path):
    """`run(weights=..., images=..., **recipe)` prepares; returns (strategy, report, calls).

    `run.said` holds the lines of the console.
    """
    calls: list[str] = []

    def make(**recipe: Any) -> Warmed:
        torch.manual_seed(0)
        backbone = Backbone(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)))
        return Warmed(backbone, recipe=warmup(**recipe), calls=calls)

    def go(weights: str = "w", images: str = "a", **recipe: Any):
        strategy = make(**recipe)
        report = prepare(
            strategy,
            lambda: make(**recipe),
            lambda: source(images),
            weights=weights,
            folder=tmp_path,
            say=go.said.append,
        )
        return strategy, report, calls

    go.said = []
    return go


def test_the_artefact_is_made_once_and_then_read(run):
    first, report, calls = run()
    again, cached, _ = run()
    assert calls == ["prepare"] and not report["cached"] and cached["cached"]
    assert report["key"] == cached["key"] and first.extra.weight.abs().sum() > 0
    assert torch.equal(first.extra.weight, again.extra.weight)
    assert not list(Path(report["artefact"]).parent.glob("*.partial"))
    assert report["source_images"] == 10 and report["source"] == "stub images"


@pytest.mark.parametrize("change", [{"weights": "v"}, {"images": "b"}, {"lr": 0.2}])
def test_other_weights_images_or_settings_never_reuse_it(run, change):
    _, before, _ = run()
    _, after, calls = run(**change)
    assert before["key"] != after["key"] and calls == ["prepare"] * 2


def test_an_edited_method_prepares_again(run, monkeypatch):
    _, before, _ = run()
    monkeypatch.setattr("driftline.core.provenance.fingerprint", lambda path: "another tree")
    _, after, calls = run()
    assert before["key"] != after["key"] and calls == ["prepare"] * 2


def test_how_often_progress_is_kept_is_not_part_of_the_key(run):
    _, before, _ = run()
    _, after, calls = run(every=2)
    assert before["key"] == after["key"] and calls == ["prepare"]


def test_an_interrupted_warm_up_goes_on_to_the_same_result(run, tmp_path, monkeypatch):
    whole, _, _ = run()
    saves = iter(range(4))
    real = PartialFile.save

    def save(self, state):
        real(self, state)
        if next(saves, None) is None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run(weights="other")
    assert list(tmp_path.glob("*.partial"))
    resumed, report, _ = run(weights="other")
    assert not report["cached"]
    for a, b in zip(whole.extra.parameters(), resumed.extra.parameters(), strict=True):
        assert torch.equal(a, b)


def flips(size: int, header: int) -> list[int]:
    """Places of bytes: all of the header, 14 of what follows."""
    return [*range(header), *np.linspace(header, size - 1, 14).astype(int).tolist()]


def test_every_flipped_bit_of_an_artefact_is_noticed(run):
    _, report, _ = run()
    path = Path(report["artefact"])
    whole = path.read_bytes()
    with safe_open(path, framework="pt") as file:
        text = file.metadata()["depends"]
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in flips(len(whole), header):
        for bit in (0, 3, 6):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(BadFile):
                _load(path, text)
    path.write_bytes(whole)
    assert set(_load(path, text)[0]) == {"weight", "bias"}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 4
    path.write_bytes(whole)


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
    del tensors["bias"]
    save_file(tensors, path, metadata=facts)


def without_facts(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [cut, flip, without_a_tensor, without_facts])
def test_a_damaged_artefact_is_made_again_and_that_is_said(run, damage):
    first, report, _ = run()
    damage(Path(report["artefact"]))
    again, remade, calls = run()
    assert calls == ["prepare"] * 2 and not remade["cached"]
    assert any("is damaged" in line and "made again" in line for line in run.said)
    assert torch.equal(first.extra.weight, again.extra.weight)
    assert run()[1]["cached"]


def test_the_artefact_of_other_settings_is_not_taken(run):
    _, other, _ = run(lr=0.2)
    _, mine, _ = run()
    shutil.copyfile(other["artefact"], mine["artefact"])
    again, remade, calls = run()
    assert not remade["cached"] and calls == ["prepare"] * 3
    assert any("made for other settings" in line for line in run.said)
    fresh, _, _ = run(weights="v")
    assert torch.equal(again.extra.weight, fresh.extra.weight)


@pytest.mark.parametrize("damage", ["flip", "foreign", "old"])
def test_an_unfinished_preparation_that_cannot_be_used_starts_again(run, tmp_path, damage):
    whole, report, _ = run()
    key = report["key"]
    Path(report["artefact"]).unlink()
    partial = PartialFile(tmp_path / f"{key}.partial", key, print)
    if damage == "old":
        torch.save({"epoch": 1}, partial.path)
    else:
        theirs = PartialFile(partial.path, "0" * 16 if damage == "foreign" else key, print)
        theirs.save({"epoch": 1})
    if damage == "flip":
        flip(partial.path)
    again, _, _ = run()
    assert any("the unfinished preparation" in line and "starts again" in line for line in run.said)
    assert torch.equal(whole.extra.weight, again.extra.weight) and not partial.path.exists()


def test_without_source_images_the_error_says_so(run, tmp_path):
    strategy, _, _ = run()
    with pytest.raises(UserError, match="this scenario has none"):
        prepare(
            strategy, lambda: strategy, None, weights="w", folder=tmp_path, say=lambda text: None
        )


def test_rates_follow_the_published_schedules():
    cifar = Optim(kind="sgd", lr=0.05, rise=1, schedule="steps", milestones=(3, 6, 8), decay=0.2)
    assert cifar.factor(0, 10, 0, 10) == 0 and cifar.factor(0, 10, 5, 10) == 0.5
    factors = [cifar.factor(e, 10, 0, 10) for e in (1, 2, 3, 6, 8)]
    assert factors == pytest.approx([1, 1, 0.2, 0.04, 0.008])
    cosine = Optim(kind="sgd", lr=1.0, rise=1, schedule="cosine")
    assert [cosine.factor(e, 3, 0, 5) for e in (1, 2)] == pytest.approx([1.0, 0.5])
    swa = Optim(kind="sgd", lr=8e-4, schedule="linear", milestones=(1, 4), decay=12.5)
    rates = [8e-4 * swa.factor(e, 5) for e in range(5)]  # torch's SWALR within three epochs
    assert rates == pytest.approx([8e-4, 8e-4, 8e-4 * 2 / 3 + 0.01 / 3, 0.02 / 3 + 8e-4 / 3, 0.01])
    with pytest.raises(UserError, match="two epochs in strategy.optim.milestones"):
        Optim(kind="sgd", lr=1.0, schedule="linear")


def test_a_diverging_warm_up_stops_and_names_the_rate():
    model = nn.Linear(12, 2)

    class Nowhere:
        say = staticmethod(lambda text: None)

        def load(self):
            return None

        def save(self, state):
            pass

    with pytest.raises(UserError, match=r"strategy\.warmup\.optim\.lr"):
        warmup().run(model, lambda batch: model(batch.x.flatten(1)).sum() * torch.inf, source(),
                     Nowhere())  # fmt: skip
