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
from driftline.parts.rules.rails import CREDIT, Rails, agreement, mean_of, variety
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
    both = torch.stack([torch.zeros_like(various), various], 1)[:, None]  # method and source
    assert variety(both, 4) == pytest.approx([0, math.log(4)])


def test_the_mean_is_that_of_the_probabilities():
    one, two = torch.randn(5, 4, generator=torch.manual_seed(0)), torch.randn(5, 4)
    expected = (one.softmax(1) + two.softmax(1)) / 2
    torch.testing.assert_close(mean_of(one, two, "logits").exp(), expected)
    assert mean_of(one.softmax(1), two.softmax(1), "probabilities").equal(expected)
    assert mean_of(1e4 * one, -1e4 * one, "logits").isfinite().all()


class Sees(nn.Module):
    """Reads the class off the image: the mean of all its pixels, which no mirror moves."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.one_hot((4 * x.mean((1, 2, 3))).long().clamp(0, 3), 4)


class Moody(TTAStrategy):
    """As its network, and sharp or flat as `sharpness` says, where `mood` is "good".

    "collapsed": always the first class. "shaken": various answers that a mirror moves. "broken":
    none that is finite.
    """

    def __init__(self) -> None:
        super().__init__(Backbone(Sees()))
        self.weight = nn.Parameter(torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.mood, self.sharpness = "good", 1.0

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        scores = self.sharpness * self.backbone(x)
        if self.mood == "collapsed":
            return torch.tensor([self.sharpness * 9, 0, 0, 0]).expand(len(x), 4)
        if self.mood == "broken":
            return scores * math.nan
        left = x[..., 0].mean((1, 2)) < x[..., -1].mean((1, 2))
        return (
            torch.where(left[:, None], scores.roll(1, 1), scores)
            if self.mood == "shaken"
            else scores
        )

    def adapt(self, x: Tensor) -> Tensor:
        self.updates += 1
        return self.predict(x)


def images(n: int = 10) -> Tensor:
    """Of a mean that names their class, darker on the left for some and on the right for others."""
    mean = (torch.arange(n) % 4 + 0.5) / 4
    slope = torch.linspace(-0.1, 0.1, 8) * torch.where(torch.arange(n) % 3 == 0, 1, -1)[:, None]
    return (mean[:, None] + slope)[:, None, None].expand(n, 3, 8, 8)


def railed(**options: Any) -> tuple[Rails, Moody]:
    method = Moody()
    settings = {"share": 0, "images": 20, "few": 5, **options}
    source = Backbone(Sees())
    rule = build(rule_node("rails", **settings), at="around.rails", inner=method, source=source)
    rule.begin_stream()
    return rule, method


def passed(rule: Rails, method: Moody, mood: str, batches: int = 6, n: int = 10) -> list[str]:
    """What the rule did at each batch, and that its answers are those of whom it trusts."""
    method.mood = mood
    events = []
    for _ in range(batches):
        scores = rule.adapt(images(n))
        answer, source = method.predict(images(n)), Sees()(images(n))
        if rule.trust == "source" or mood == "broken":
            assert scores.equal(source)
        elif rule.trust == "both" or n < rule.few:
            assert scores.equal(mean_of(answer, source, "logits"))
        else:
            assert scores.equal(answer)
        events.append(rule.event)
    return events


def test_a_collapse_is_seen_at_once_and_trust_comes_back_in_two_steps():
    rule, method = railed()
    assert set(passed(rule, method, "good")) == {""} and rule.counts["probes"] == 2  # one window
    method.sharpness = 2.0  # the entropy jumps
    events = passed(rule, method, "collapsed", 5)
    assert events == ["", "", "likely worse than the source", "", ""]  # mirrored from the second on
    assert rule.counts["back"] == 0  # perhaps it recovers by itself
    passed(rule, method, "collapsed", 5)
    assert rule.counts["back"] == 1  # three windows later
    events = passed(rule, method, "good", 12)
    assert [event for event in events if event] == ["in doubt: both answer", "adapts again"]
    report = rule.report()
    assert report["rails_by_source"] >= 4 and report["rails_by_both"] >= 2
    assert 0 < report["rails_worse"] < report["rails_judged"] == 27  # of 28 batches, not the first
    assert report["rails_probes"] < 27


def test_answers_that_only_waver_are_doubted_in_small_batches_alone():
    """On real images those of batch statistics do, and are right."""
    rule, method = railed()
    assert set(passed(rule, method, "shaken", 8)) == {""} and rule.trust == "method"
    rule, method = railed(few=11)
    events = passed(rule, method, "shaken", 4)
    assert events == ["", "likely worse than the source", "", ""]
    rule, method = railed(few=11)
    assert set(passed(rule, method, "good", 8)) == {""} and rule.counts["by_both"] == 8


def test_watching_alone_changes_no_answer():
    rule, method = railed(answer="method")
    alone = Moody()
    alone.mood = method.mood = "collapsed"
    for _ in range(12):
        assert rule.adapt(images()).equal(alone.adapt(images()))
    assert rule.report()["rails_worse"] > 0 == rule.report()["rails_by_source"]
    assert method.updates == alone.updates == 12
    without = build(rule_node("rails"), at="around.rails", inner=Moody(), source=None)
    without.begin_stream()  # no source: no verdict
    assert without.adapt(images()).shape == (10, 4) and without.report()["rails_probes"] == 0


def test_comparisons_take_their_share_of_the_passes():
    """A window for the start, then as many images as the method's passes pay for."""
    rule, method = railed(share=0.1, jump=None)
    start = rule.passes.forward
    passed(rule, method, "good", 300)
    inside = 300 * 10 * 2  # of the method, and of this test
    watched = rule.passes.forward - start - inside
    assert watched == 10 * rule.counts["probes"]
    assert 0.08 * 3000 < watched <= 0.1 * 3000 + CREDIT * rule.images


def test_only_a_window_of_a_large_batch_is_compared_and_all_of_it_answered():
    rule, method = railed(images=4)
    start = rule.passes.forward
    rule.adapt(images(40))
    assert rule.passes.forward - start == 44
    rule.seen = None
    assert passed(rule, method, "collapsed", 2, n=40)[0] == "likely worse than the source"


def test_scores_that_are_not_finite_are_answered_by_the_source_and_taken_back():
    rule, method = railed(jump=None)
    events = passed(rule, method, "broken", 3)
    assert events[0] == "likely worse than the source" and rule.counts["back"] == 3
    assert method.updates == 0  # the update of each was


def test_the_gate_pauses_updates_and_lets_them_go_on():
    rule, method = railed(gate=0.5, answer="method", jump=None)
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
    assert method.backbone.passes.forward == 30  # type: ignore[union-attr]  # one of each, one of this test


HOSTILE = ["scenario.corruptions=[zoom_blur,black]", "scenario.images=80"]
HOSTILE += ["scenario.batch_size=4", "scenario.order=continual+correlated"]
HOSTILE += ["scenario.probe_images=0", "scenario.clean_images=0"]
HOSTILE += ["around=rails", "around.rails.images=40"]


@pytest.mark.release
def test_a_killed_run_on_rails_ends_as_an_undisturbed_one(configure, monkeypatch):
    """Sorted labels in batches of four ruin batch statistics; the table and the figure say so."""
    words = ["strategy=tent", *HOSTILE, "checkpoint.every=5"]
    whole = run_experiment(configure(*words), [])
    assert whole["method"]["rails_worse"] and whole["method"]["rails_by_source"]
    assert "batches, told without labels (around=rails)" in result_table(whole)
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
