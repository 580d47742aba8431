"""Rails: the frozen source answers where a method is likely worse, judged without a label."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import copied, rule_node
from test_runs import Kill, records, stop_after
from torch import Tensor, nn

from driftline.analysis import load_batches, load_runs, select
from driftline.analysis.plots import stream
from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.strategy import TTAStrategy
from driftline.parts.rules.rails import Rails, agreement
from driftline.runs.execute import run_experiment
from driftline.runs.table import result_table


def test_agreement_wants_answers_that_hold_and_are_various():
    various = torch.arange(4).repeat(5)
    held = torch.stack([various, various], 1)
    assert agreement(held, 4).mean().item() == pytest.approx(math.log(4))
    assert agreement(torch.zeros_like(held), 4).mean() == 0  # a collapse
    turned = torch.stack([various, various.roll(1)], 1)
    assert agreement(turned, 4).mean() == 0  # no answer holds
    half = torch.cat([held[:10], turned[:10]])
    assert 0 < agreement(half, 4).mean() < math.log(4)


class Sees(nn.Module):
    """Reads the class off the image: the mean of all its pixels, which no mirror moves."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.one_hot((4 * x.mean((1, 2, 3))).long().clamp(0, 3), 4)


class Moody(TTAStrategy):
    """As its network, and sharp or flat as `sharpness` says; off where `mood` is "bad": then the
    first column of the image decides, which a mirror moves."""

    def __init__(self) -> None:
        super().__init__(Backbone(Sees()))
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.mood, self.sharpness = "good", 1.0

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        seen = x[..., :1].expand_as(x) if self.mood == "bad" else x
        return self.sharpness * self.backbone.net(seen)

    def adapt(self, x: Tensor) -> Tensor:
        self.updates += 1
        return self.predict(x)


def images(n: int = 10) -> Tensor:
    """Of a mean that names their class, darker on the left for some and on the right for others."""
    mean = (torch.arange(n) % 4 + 0.5) / 4
    slope = torch.linspace(-0.1, 0.1, 8) * torch.where(torch.arange(n) % 3 == 0, 1, -1)[:, None]
    return (mean[:, None] + 2 * slope)[:, None, None].expand(n, 3, 8, 8)


def railed(**options: Any) -> tuple[Rails, Moody]:
    method = Moody()
    settings = {"probe": 5, "images": 20, "rest": 1, "jump": None, **options}
    source = Backbone(Sees())
    rule = build(rule_node("rails", **settings), at="around.rails", inner=method, source=source)
    rule.begin_stream()
    return rule, method


def passed(rule: Rails, method: Moody, mood: str, batches: int = 6) -> list[str]:
    """What the rule did at each batch, and that its answers are those of `Sees` where it rests."""
    method.mood = mood
    events = []
    for _ in range(batches):
        scores = rule.adapt(images())
        assert not rule.resting or scores.equal(rule.backbone.net(images()))
        events.append(rule.event)
    return events


def test_a_bad_method_is_put_back_and_answered_for_until_it_is_good_again():
    rule, method = railed()
    assert set(passed(rule, method, "good")) == {""}
    events = passed(rule, method, "bad", 10)
    assert events.count("likely worse than the source") == 1 and rule.resting
    assert passed(rule, method, "bad", 3) == [""] * 3 and rule.resting
    method.sharpness = 2.0  # better than the source in nothing: equal is not enough
    assert "adapts again" not in passed(rule, method, "good") and rule.resting
    report = rule.report()
    assert report["rails_back"] >= 1 and report["rails_by_source"] >= 9
    assert report["rails_worse"] < report["rails_judged"] <= report["rails_probes"]


def test_watching_alone_changes_no_answer():
    rule, method = railed(answer="method")
    alone = Moody()
    alone.mood = method.mood = "bad"
    for _ in range(12):
        assert rule.adapt(images()).equal(alone.adapt(images()))
    assert rule.report()["rails_worse"] > 0 == rule.report()["rails_by_source"]
    assert method.updates == alone.updates == 12
    without = build(
        rule_node("rails"), at="around.rails", inner=Moody(), source=None
    )  # no source: no verdict
    without.begin_stream()
    assert without.adapt(images()).shape == (10, 4) and without.report()["rails_probes"] == 0


def test_a_comparison_is_seldom_and_a_jump_of_the_entropy_asks_for_one():
    rule, method = railed(probe=50, jump=3)
    passed(rule, method, "good", 30)
    assert rule.report()["rails_probes"] == 2  # the first window
    method.sharpness = 0.01
    passed(rule, method, "good", 1)
    assert rule.report()["rails_probes"] == 3


def test_the_gate_pauses_updates_and_lets_them_go_on():
    rule, method = railed(gate=0.5, answer="method")
    method.sharpness = 0.01  # uncertain
    events = passed(rule, method, "good", 6)
    assert events == ["", *["paused: entropy"] * 5] and method.updates == 1
    method.sharpness = 1.0
    passed(rule, method, "good", 20)
    assert method.updates > 5 and rule.report()["rails_paused"] >= 5


def test_the_way_back_leads_to_states_that_were_good_and_then_to_the_start():
    rule, method = railed()
    rule.states = [copied(method.snapshot())]
    method.updates += 7
    rule._go_back()
    assert method.updates == 0 and rule.states == []
    method.updates += 7
    rule._go_back()
    assert method.updates == 0 and rule.report()["rails_back"] == 2


def test_the_source_is_no_part_of_the_state_and_its_passes_count():
    rule, method = railed()
    passed(rule, method, "good", 1)
    assert not [name for name in rule.snapshot()["tensors"] if name.startswith("source")]
    assert rule.source is not None and rule.source.passes is method.backbone.passes  # type: ignore[union-attr]
    assert method.backbone.passes.forward == 20  # type: ignore[union-attr]  # images, and mirrored


HOSTILE = ["scenario.corruptions=[zoom_blur,black]", "scenario.images=80"]
HOSTILE += ["scenario.batch_size=4", "scenario.order=continual+correlated"]
HOSTILE += ["scenario.probe_images=0", "scenario.clean_images=0"]
HOSTILE += ["around=rails", "around.rails.images=40", "around.rails.probe=1"]


def test_a_killed_run_on_rails_ends_as_an_undisturbed_one(configure, monkeypatch):
    """Sorted labels in batches of four ruin batch statistics; the table and the figure say so."""
    words = ["strategy=tent", *HOSTILE, "checkpoint.every=5"]
    whole = run_experiment(configure(*words), [])
    assert whole["method"]["rails_worse"] and whole["method"]["rails_by_source"]
    assert "comparisons without labels (around=rails)" in result_table(whole)
    cfg = configure(*words, "on_exists=rerun")
    with monkeypatch.context() as patch:
        stop_after(patch, 13)
        with pytest.raises(Kill):
            run_experiment(cfg, [])
    again = run_experiment(cfg, [])
    assert again["metrics"] == whole["metrics"] and again["method"] == whole["method"]
    assert records(again["run"]["folder"]) == records(whole["run"]["folder"])
    done = select(load_runs(configure().root))
    assert "likely worse than the source" in set(load_batches(done)["event"].dropna())
    figure = stream(done)
    assert figure is not None
    ticks = [line for line in figure.axes[0].lines if line.get_marker() == "|"]
    assert sum(len(line.get_xdata()) for line in ticks) > 0  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["noise", "black"])
def test_a_failing_camera_is_a_domain_of_its_own(configure, name):
    words = ["strategy=source", f"scenario.corruptions=[{name},contrast]", "scenario.images=20"]
    summary = run_experiment(configure(*words, "scenario.clean_images=0"), [])
    assert {f"err/{name}:5", "err/contrast:5"} <= summary["metrics"].keys()
    with pytest.raises(UserError, match="at least one beside noise and black"):
        run_experiment(configure("strategy=source", f"scenario.corruptions=[{name}]"), [])
