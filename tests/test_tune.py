"""Tuning: the space, the choice, and the rule that nothing is chosen on what is reported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from driftline.core.errors import UserError

sys.path.insert(0, str(ROOT / "scripts"))
import tune

SMALL = ["scenario.images=20", "scenario.batch_size=10", "scenario.probe_images=0"]
SMALL += ["scenario.clean_images=0"]


def main(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tune.py", *words])
    return tune.main()


def test_a_grid_has_every_combination():
    space = [tune.Dimension("strategy.optim.lr=1e-4,1e-3"), tune.Dimension("a.b=x,[1,2]")]
    points = tune.grid(space)
    assert len(points) == 4 and {"strategy.optim.lr": 1e-3, "a.b": [1, 2]} in points
    with pytest.raises(UserError, match=r"a\.c is an interval"):
        tune.grid([tune.Dimension("a.c=interval(0,1)")])


def test_random_points_lie_in_the_space_and_follow_the_seed():
    words = ["a.lr=tag(log,interval(1e-5,1e-1))", "a.n=int(interval(1,8))", "a.s=x,y"]
    space = [tune.Dimension(w) for w in words]
    points = tune.draws(space, 200, 0)
    assert points == tune.draws(space, 200, 0) != tune.draws(space, 200, 1)
    assert {p["a.n"] for p in points} <= set(range(1, 9)) and {p["a.s"] for p in points} == {
        "x",
        "y",
    }
    rates = sorted(p["a.lr"] for p in points)
    assert rates[0] >= 1e-5 and rates[-1] <= 1e-1 and 2e-4 < rates[100] < 5e-3  # logarithmic
    assert len(tune.draws([tune.Dimension("a=1,2")], 10, 0)) == 2


def test_one_value_is_no_search():
    with pytest.raises(UserError, match="give several values"):
        tune.Dimension("strategy.optim.lr=3")


def test_the_stream_of_the_search_is_not_reported(monkeypatch, capsys):
    same = "scenario=imagenet_c seed=0"
    words = ["strategy=tent", "--search", "strategy.optim.lr=1,2", "--tune-on", same]
    assert main(monkeypatch, *words, "--evaluate-on", "seed=0 scenario=imagenet_c") == 2
    assert "no measurement" in capsys.readouterr().err


def fake(monkeypatch, score):
    """Replace sweeps by finished runs of metric `score(values)`."""
    from omegaconf import OmegaConf

    calls = []

    def sweep(self, names, words):
        calls.append((names, words))
        found = []
        for name in names:
            node = OmegaConf.load(self.folder / "trial" / f"{name}.yaml")
            folder = self.folder / "runs" / f"{name}-{len(calls)}"
            folder.mkdir(parents=True)
            value = score(node.strategy.optim.lr)
            (folder / "summary.json").write_text(json.dumps({"metrics": {"err_mean": value}}))
            state = "failed" if value is None else "finished"
            found.append({"trial": name, "state": state, "run": str(folder), "error": "e"})
        return found

    monkeypatch.setattr(tune.Study, "sweep", sweep)
    monkeypatch.setattr(tune, "headline", lambda study: "err_mean")
    return calls


def test_the_lowest_error_wins_and_failed_points_are_left_out(monkeypatch, tmp_path, capsys):
    calls = fake(monkeypatch, lambda lr: None if lr == 0.5 else abs(lr - 2))
    words = ["strategy=tent", f"root={tmp_path}", "--search", "strategy.optim.lr=0.5,1,2.5,4"]
    words += ["--tune-on", "scenario=cifar10_c", "--evaluate-on", "scenario=imagenet_c"]
    assert main(monkeypatch, *words, "--name", "n") == 0
    winner = (tmp_path / ".tune" / "n" / "trial" / "winner.yaml").read_text()
    assert winner.startswith("# @package _global_\nstrategy:\n  optim:\n    lr: 2.5\n")
    assert calls[-1] == (["winner"], ["scenario=imagenet_c"])
    study = json.loads((tmp_path / ".tune" / "n" / "study.json").read_text())
    assert study["tuned"]["chosen"] == {"strategy.optim.lr": 2.5}
    assert (study["tuned"]["points"], study["tuned"]["finished"]) == (4, 3)
    assert "chosen on scenario=cifar10_c: strategy.optim.lr=2.5" in capsys.readouterr().out


def test_a_search_in_which_every_point_fails_is_an_error(monkeypatch, tmp_path, capsys):
    fake(monkeypatch, lambda lr: None)
    words = [
        "strategy=tent",
        f"root={tmp_path}",
        "--search",
        "strategy.optim.lr=1,2",
        "--tune-on",
        "a=b",
    ]
    assert main(monkeypatch, *words) == 2
    assert "no point of the search finished" in capsys.readouterr().err


def test_optuna_comes_near_the_best_and_repeats_itself(monkeypatch, tmp_path):
    pytest.importorskip("optuna")
    chosen = []
    for name in ("a", "b"):
        fake(monkeypatch, lambda lr: (lr - 2) ** 2)
        words = [
            "strategy=tent",
            f"root={tmp_path}",
            "--search",
            "strategy.optim.lr=interval(0,10)",
        ]
        words += ["--tune-on", "a=b", "--method", "optuna", "--trials", "25", "--at-once", "5"]
        assert main(monkeypatch, *words, "--metric", "err_mean", "--name", name) == 0
        study = json.loads((tmp_path / ".tune" / name / "study.json").read_text())
        chosen.append(study["tuned"]["chosen"]["strategy.optim.lr"])
    assert chosen[0] == chosen[1] and abs(chosen[0] - 2) < 1


@pytest.mark.release
@pytest.mark.slow
def test_what_was_tuned_on_what_is_in_the_result(monkeypatch, tmp_path):
    words = ["strategy=tent", *SMALL, f"root={tmp_path}", "--search", "strategy.optim.lr=1e-4,1e-2"]
    words += ["--tune-on", "scenario=imagenet_c scenario.corruptions=[contrast]"]
    words += ["--evaluate-on", "scenario=imagenet_c scenario.corruptions=[fog] seed=0,1"]
    assert main(monkeypatch, *words) == 0
    found = {}
    for path in tmp_path.glob("imagenet_c*/*/*/*/summary.json"):
        summary = json.loads(path.read_text())
        found[summary["run"]["strategy"], Path(path).parent.name] = summary
    tuned = [s["tuned"] for (name, _), s in found.items() if name == "tent" and "tuned" in s]
    assert len(tuned) == 2 and tuned[0] == tuned[1]
    assert tuned[0]["on"] == "scenario=imagenet_c 'scenario.corruptions=[contrast]'"
    assert not any("tuned" in s for (name, _), s in found.items() if name == "source")
