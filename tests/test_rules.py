"""Rules around a method: what each does batch by batch, together, through whole runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT, copied, rule_node
from test_runs import TINY, Kill, records, stop_after
from torch import Tensor

from driftline.analysis import load_runs, select
from driftline.backbones.backbone import Backbone
from driftline.core.build import build, locate
from driftline.core.errors import Diverged, UserError
from driftline.core.strategy import TTAStrategy, Wrapper
from driftline.core.stream import SINGLE_IMAGES
from driftline.runs.execute import run_experiment

RULES = [p.stem for p in sorted((ROOT / "conf" / "around").glob("*.yaml"))]
RULES = [r for r in RULES if issubclass(locate(rule_node(r)["_target_"]), Wrapper)]


class Counter(TTAStrategy):
    """Scores [B, 2] are (0, what `script` says for this update); it notes what it was given."""

    script: list[float | Exception] = [0.0]

    def __init__(self, *script: float | Exception, batch_dependent: bool = True) -> None:
        super().__init__(Backbone(torch.nn.Linear(1, 1)))
        self.script, self.batch_dependent = [*script], batch_dependent  # type: ignore[misc]
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.seen: list[tuple[str, list[float]]] = []
        self.calls = 0  # runs on at a reset

    def _scores(self, x: Tensor, value: float) -> Tensor:
        return torch.tensor([0.0, value]).repeat(len(x), 1)

    def adapt(self, x: Tensor) -> Tensor:
        self.seen.append(("adapt", x[:, 0, 0, 0].tolist()))
        value = self.script[self.calls % len(self.script)] if self.script else 0.0
        self.calls += 1
        self.updates += 1
        if isinstance(value, Exception):
            raise value
        return self._scores(x, value)

    def predict(self, x: Tensor) -> Tensor:
        self.seen.append(("predict", x[:, 0, 0, 0].tolist()))
        return self._scores(x, float(self.updates))


def around(method: TTAStrategy, *rules: str, **options: object) -> Wrapper:
    """The rules from the inside to the outside, `options` those of the last one."""
    made = method
    for name in rules:
        given = options if name == rules[-1] else {}
        made = build(rule_node(name, **given), at=f"around.{name}", inner=made, source=None)
    made.begin_stream()
    assert isinstance(made, Wrapper)
    return made


def image(value: float, count: int = 1) -> Tensor:
    return torch.full((count, 3, 2, 2), value)


def updates(rule: Wrapper, batches: int) -> list[int]:
    """Updates of the method since its last reset, after each batch."""
    counts = []
    for i in range(batches):
        rule.adapt(image(i))
        counts.append(int(rule.method.updates))  # type: ignore[arg-type]
    return counts


# ------------------------------------------------------------------------------ resets


def test_reset_every_counts_batches_and_begins_anew_after_a_reset_from_outside():
    rule = around(Counter(), "reset_every", every=3)
    assert updates(rule, 7) == [1, 2, 3, 1, 2, 3, 1]
    rule.reset()
    assert updates(rule, 4) == [1, 2, 3, 1]


def test_episodic_adapts_to_every_batch_from_the_start():
    assert updates(around(Counter(), "episodic"), 3) == [1, 1, 1]


def test_reset_each_domain_follows_the_segments_through_other_rules():
    rule = around(Counter(), "reset_each_domain", "rollback")
    assert updates(rule, 2) == [1, 2]
    rule.begin_segment()
    assert updates(rule, 2) == [1, 2]


def test_reset_on_collapse_waits_for_the_average_and_forgets_it():
    """Entropies 0.69, 0, 0, ...: averages 0.69, 0.35, 0.17 with a weight of a half."""
    rule = around(Counter(0.0, 99.0, 99.0), "reset_on_collapse", below=0.2, ema=0.5)
    assert updates(rule, 4) == [1, 2, 0, 1]
    assert rule.report() == {"resets_on_collapse": 1.0}
    assert float(rule.average) == pytest.approx(0.6931, abs=1e-4)  # type: ignore[arg-type]


def test_reset_on_collapse_leaves_its_average_alone_where_scores_are_not_finite():
    rule = around(Counter(0.0, float("nan")), "reset_on_collapse", below=0.1, ema=0.5)
    assert updates(rule, 2) == [1, 2]
    assert float(rule.average) == pytest.approx(0.6931, abs=1e-4)  # type: ignore[arg-type]


def test_reset_on_collapse_reads_probabilities_as_they_are():
    method = Counter(1.0)  # (0, 1): certain as probabilities, 0.58 nats as logits
    method.outputs = "probabilities"  # type: ignore[misc]
    assert updates(around(method, "reset_on_collapse", below=0.5), 2) == [0, 0]
    assert updates(around(Counter(1.0), "reset_on_collapse", below=0.5), 2) == [1, 2]


# ------------------------------------------------------------------------------ the window


def scores(rule: Wrapper, *values: float) -> list[tuple[str, list[float]]]:
    """What the method inside was asked, for one image after the other."""
    for value in values:
        assert rule.adapt(image(value)).shape == (1, 2)
    method = rule.method
    assert isinstance(method, Counter)
    return method.seen


def test_a_window_fills_up_and_then_overwrites_its_oldest_place():
    assert scores(around(Counter(), "window", length=3), *range(7)) == [
        ("predict", [0]),
        ("predict", [0, 1]),
        ("adapt", [0, 1, 2]),
        ("predict", [3, 1, 2]),
        ("predict", [3, 4, 2]),
        ("adapt", [3, 4, 5]),
        ("predict", [6, 4, 5]),
    ]


def test_without_batch_statistics_only_the_image_is_predicted():
    rule = around(Counter(batch_dependent=False), "window", length=2)
    assert scores(rule, 0, 1, 2) == [("predict", [0]), ("adapt", [0, 1]), ("predict", [2])]


def test_a_window_of_one_adapts_to_every_image_and_a_snapshot_goes_on():
    assert scores(around(Counter(), "window", length=1), 0) == [("adapt", [0])]
    rule, again = (around(Counter(), "window", length=3) for _ in range(2))
    scores(rule, 0, 1, 2, 3)
    again.restore(copied(rule.snapshot()))
    assert scores(rule, 9)[-1] == scores(again, 9)[-1] == ("predict", [3, 9, 2])


def test_a_reset_empties_the_window_outside_the_rule_only():
    outside = around(Counter(), "window", "reset_every", every=2)
    assert scores(outside, 0, 1, 2)[-1] == ("predict", [2])
    inside = around(Counter(), "reset_every", "window", length=2)
    assert scores(inside, 0, 1, 2)[-1] == ("predict", [2, 1])


def test_a_window_takes_a_batch_image_by_image():
    rule = around(Counter(), "window", length=2)
    assert rule.adapt(torch.cat([image(i) for i in range(3)])).shape == (3, 2)
    assert [asked for asked, _ in rule.method.seen] == ["predict", "adapt", "predict"]  # type: ignore[union-attr]


# ------------------------------------------------------------------------------ diverging


@pytest.mark.parametrize("trouble", [float("nan"), float("inf"), Diverged("the loss is nan")])
def test_rollback_predicts_with_the_start_and_counts(trouble):
    rule = around(Counter(0.0, trouble), "rollback")
    assert updates(rule, 3) == [1, 0, 1]
    assert rule.adapt(image(0)).tolist() == [[0, 0]]  # of the start, which has seen no update
    rule.reset()
    assert rule.report() == {"rollbacks": 2.0}  # a count of the stream
    again = around(Counter(), "rollback")
    again.restore(copied(rule.snapshot()))
    assert again.report() == rule.report()


def test_record_nan_hands_the_scores_on_and_a_method_that_gives_up_still_stops():
    rule = around(Counter(float("nan")), "record_nan")
    assert rule.records_nan and rule.adapt(image(0)).isnan().any()
    with pytest.raises(Diverged):
        around(Counter(Diverged("the loss is nan")), "record_nan").adapt(image(0))


# ------------------------------------------------------------------------------ together

REFUSED = {  # pairs from the inside to the outside -> what the error says
    **{(a, b): "leave one out" for a, b in itertools.permutations(("rollback", "record_nan"))},
    ("window", "episodic"): "around=[episodic,window]",
    ("rails", "episodic"): "around=[episodic,rails]",
    ("window", "rails"): "around=[rails,window]",
}
for other in ("reset_every", "reset_each_domain", "reset_on_collapse"):
    REFUSED |= {pair: "leave one out" for pair in [("episodic", other), (other, "episodic")]}


@pytest.mark.parametrize("pair", [*itertools.permutations(RULES, 2)], ids="+".join)
def test_two_rules_work_together_or_say_why_not(pair):
    if said := REFUSED.get(pair):
        with pytest.raises(UserError) as error:
            around(Counter(), *pair)
        assert said in str(error.value) and "around=" in str(error.value)
        return
    rule = around(Counter(), *pair)
    assert type(rule.inner).__module__.endswith(pair[0]) and [*rule.rules()] == [rule.inner]
    assert len(updates(rule, 3)) == 3 and rule.method is rule.inner.method
    assert (SINGLE_IMAGES in rule.needs) == ("window" in pair)


SMALL = [*TINY["tta"][:1], "scenario.corruptions=[contrast,fog]", "scenario.images=12"]
SMALL += ["scenario.batch_size=4", "scenario.probe_images=8", "scenario.clean_images=8"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["around=window"], r"tent \(around=window\) needs single images \(scenario.batch_size=1"),
        (["around=[rollback,record_nan]"], "leave one out"),
        (["around=reset_every", "around.reset_every.every=0"], "around.reset_every.every must be"),
        (["around=reset_every", "+around.reset_every.often=1"], "no option 'often'"),
        (["+around.mine=3"], "around.mine is no rule"),
        (["+around.mine={_target_: driftline.tta.tent.Tent}"], "makes no around.mine"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused_before_anything_is_written(configure, words, said):
    cfg = configure("strategy=tent", *SMALL, *words)
    with pytest.raises(UserError, match=said):
        run_experiment(cfg, [])
    assert not Path(cfg.root).exists()


def test_a_rule_is_for_adaptation_or_for_tasks(configure):
    cfg = configure("strategy=ease", "scenario=split_cifar10", "around=[rollback,reset_every]")
    with pytest.raises(UserError, match=r"around=\[rollback,reset_every\].*strategy=ease learns"):
        run_experiment(cfg, [])
    cfg = configure("strategy=tent", *SMALL, "around=[rollback,weight_average]")
    with pytest.raises(UserError, match=r"around=\[weight_average\].*strategy=tent adapts"):
        run_experiment(cfg, [])


# ------------------------------------------------------------------------------ whole runs


def test_a_stream_of_single_images_runs_through_a_window(configure):
    words = ["strategy=tent", "scenario.corruptions=[contrast]", "scenario.images=12"]
    words += ["scenario.batch_size=1", "scenario.probe_images=0", "scenario.clean_images=6"]
    summary = run_experiment(configure(*words, "around=window", "around.window.length=4"), [])
    assert summary["cost"]["batches"] == 12
    # 3 updates on 4 images; 9 predictions on the buffer so far (1+2+3, then 4 each)
    assert summary["cost"]["forward_images"] == 3 * 4 + 1 + 2 + 3 + 6 * 4
    assert summary["cost"]["backward_images"] == 3 * 4


def test_runs_with_rules_lie_and_stand_beside_those_without(configure, capsys):
    plain = run_experiment(configure("strategy=tent", "strategy.optim.lr=0.01", *SMALL), [])
    rule = ["strategy=tent", "strategy.optim.lr=0.01", *SMALL, "around=reset_each_domain"]
    reset = run_experiment(configure(*rule), [])
    fog, contrast = "err/fog:5", "err/contrast:5"
    alone = run_experiment(configure(*rule, "scenario.corruptions=[fog]"), [])["metrics"]
    assert reset["metrics"][fog] == alone[fog]
    assert reset["metrics"][contrast] == plain["metrics"][contrast]
    assert reset["source"]["folder"] == plain["source"]["folder"]  # no rule around the source
    assert "/tent+reset_each_domain/" in reset["run"]["folder"]
    assert reset["run"]["around"] == ["reset_each_domain"] and plain["run"]["around"] == []
    assert "tent (around=reset_each_domain) on imagenet_c[embedded]" in capsys.readouterr().out
    runs = load_runs(Path(configure().root))
    runs = runs[runs["data.fingerprint"] == plain["data"]["fingerprint"]]
    assert {*select(runs)["method"]} == {"source", "tent", "tent (around=reset_each_domain)"}


def test_runs_that_differ_in_a_setting_of_a_rule_have_names_of_their_own(configure):
    for every in (1, 2):
        rule = ["around=reset_every", f"around.reset_every.every={every}"]
        run_experiment(configure("strategy=bn_adapt", *SMALL, *rule), [])
    methods = {*select(load_runs(Path(configure().root)))["method"]} - {"source"}
    assert methods == {
        f"bn_adapt (around=reset_every, around.reset_every.every={every})" for every in (1, 2)
    }


def test_the_adapting_clean_score_is_that_of_the_method_in_its_rules(configure):
    """Reset before every batch, it is as good after the stream as before."""
    words = ["strategy=tent", "strategy.optim.lr=0.1", *SMALL, "scenario.clean_images=40"]
    free = run_experiment(configure(*words), [])["metrics"]
    bound = run_experiment(configure(*words, "around=episodic"), [])["metrics"]
    assert bound["source_forgetting_adapting"] == 0 != free["source_forgetting_adapting"]


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize("rules", ["reset_each_domain", "reset_on_collapse,rollback", "window"])
def test_a_killed_run_with_rules_ends_as_an_undisturbed_one(configure, monkeypatch, rules):
    words = ["strategy=tent", *SMALL, f"around=[{rules}]", "checkpoint.every=1"]
    words += ["around.window.length=3", "scenario.batch_size=1"] if rules == "window" else []
    words += ["around.reset_on_collapse.below=3"] if "collapse" in rules else []
    whole = run_experiment(configure(*words), [])
    assert whole["method"].get("resets_on_collapse", 1) > 0
    for cut in (2, 4):
        cfg = configure(*words, "on_exists=rerun")
        with monkeypatch.context() as patch:
            stop_after(patch, cut)
            with pytest.raises(Kill):
                run_experiment(cfg, [])
        again = run_experiment(cfg, [])
        assert again["metrics"] == whole["metrics"] and again["method"] == whole["method"]
        assert records(again["run"]["folder"]) == records(whole["run"]["folder"])


def test_a_finished_run_with_rules_is_found_again(configure):
    words = ["strategy=bn_adapt", *SMALL, "around=[reset_every,rollback]"]
    first = run_experiment(configure(*words), [])
    assert run_experiment(configure(*words), [])["run"]["folder"] == first["run"]["folder"]
    turned = configure(*words, "around=[rollback,reset_every]")
    assert run_experiment(turned, [])["run"]["folder"] != first["run"]["folder"]
    code = json.loads((Path(first["run"]["folder"]) / "environment.json").read_text())["code"]
    assert {"parts/rules/reset_every.py", "parts/rules/rollback.py"} <= code["method"].keys()
    assert "parts/rules/window.py" not in code["method"]
