"""Numbers that go bad: noticed, counted, answered; in adaptation and on tasks, killed or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import copied, write_images
from test_runs import TINY, Kill, records, stop_after
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import Diverged, UserError
from driftline.core.guard import EVERY, KEPT, KINDS, TEXT, Guard, Kind
from driftline.core.strategy import CLStrategy, TTAStrategy
from driftline.core.stream import Batch
from driftline.runs import execute
from driftline.runs.execute import run_experiment
from driftline.runs.table import result_table

NAN = float("nan")
BARE = ["scenario.corruptions=[contrast]", "scenario.probe_images=0", "scenario.clean_images=0"]
BAD: dict[str, Kind] = {  # what goes wrong in a batch -> the kind that it counts as
    "images": "input",
    "scores": "scores",
    "gave up": "loss",
    "gradient": "gradients",
    "large gradient": "exploding",
    "weights": "weights",
    "infinite weights": "weights",
}


class Learner:
    """One weight, moved by a gradient of 1 a batch; `trouble` is what its next batch brings."""

    def begin(self) -> None:
        self.weight = nn.Parameter(torch.ones(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.01)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))  # type: ignore[attr-defined]
        self.trouble = ""

    def learn(self) -> Tensor:
        gradient = {"gradient": NAN, "large gradient": 1e6}.get(self.trouble, 1.0)
        if self.trouble == "gave up":
            raise Diverged("the loss is nan")
        self.updates += 1
        self.weight.grad = torch.full((1,), gradient)
        self.optimizer.step()
        if "weights" in self.trouble:
            self.weight.data.fill_(torch.inf if "infinite" in self.trouble else 1e3)
        return torch.tensor(NAN if self.trouble == "scores" else 0.0)


class Adapting(Learner, TTAStrategy):
    """Predicts `script`, one class after the other."""

    def __init__(self, *script: int) -> None:
        TTAStrategy.__init__(self, Backbone(nn.Linear(1, 1)))
        self.script = itertools.cycle(script or range(10))
        self.begin()
        self.begin_stream()

    def predict(self, x: Tensor) -> Tensor:
        classes = torch.tensor([next(self.script) for _ in x])
        return nn.functional.one_hot(classes, 10).float()

    def adapt(self, x: Tensor) -> Tensor:
        return self.predict(x) + self.learn()


class Learning(Learner, CLStrategy):
    def __init__(self) -> None:
        CLStrategy.__init__(self, Backbone(nn.Linear(1, 1)))
        self.begin()

    def observe(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.learn()}


def batch(trouble: str = "", size: int = 2) -> Batch:
    x = torch.full((size, 3, 2, 2), NAN if trouble == "images" else 0.5)
    zeros = torch.zeros(size, dtype=torch.int64)
    return Batch(x, zeros, zeros, zeros)


def watch(method: Adapting | Learning, answer: str) -> tuple[Guard, Callable[..., None]]:
    """A guard, and a function that passes batches, each with its trouble."""
    said: list[str] = []
    guard = Guard(method, answer, said.append, 10)  # type: ignore[arg-type]
    guard.begin()

    def run(*troubles: str) -> None:
        for trouble in troubles:
            method.trouble = trouble
            one = batch(trouble)
            if isinstance(method, TTAStrategy):
                assert guard.adapt(one.x, "here").shape == (2, 10)
            else:
                guard.observe(one, "here")

    return guard, run


def counts(guard: Guard) -> dict[str, int]:
    summary = guard.summary()
    return {kind: summary[kind] for kind in KINDS if summary[kind]}


@pytest.mark.parametrize("trouble", BAD)
@pytest.mark.parametrize("kind", [Adapting, Learning])
def test_what_goes_bad_is_noticed_in_both_loops_and_answered_as_asked(kind, trouble):
    expected = "loss" if trouble == "scores" and kind is Learning else BAD[trouble]
    good = 20  # batches before it
    for answer, learned in {"skip": good, "rollback": EVERY, "reset": 0}.items():
        method = kind()
        guard, run = watch(method, answer)
        run(*[""] * good, trouble)
        assert counts(guard)[expected] == 1 and guard.summary()["first"][expected] == good
        assert expected in guard.row["guard"].split(",")  # bad gradients spoil weights as well
        assert int(method.updates) == learned  # it is as it was then, weight included
        assert float(method.weight.detach()) == pytest.approx(1 - 0.01 * learned)
        run("")
        assert int(method.updates) == learned + 1 and guard.row == {}
        assert guard.summary()["answered"] == 1
    guard, run = watch(kind(), "stop")
    run(*[""] * good)
    with pytest.raises(Diverged, match="the loss is nan" if trouble == "gave up" else "in here"):
        run(trouble)


@pytest.mark.parametrize("trouble", [one for one in BAD if one != "gave up"])
def test_by_default_it_is_counted_and_said_once_and_nothing_is_changed(trouble):
    said: list[str] = []
    methods = Adapting(), Adapting()
    guard = Guard(methods[0], "warn", said.append, 10)
    guard.begin()
    for i in range(2 * EVERY):
        for method in methods:
            method.trouble = trouble if i in (EVERY - 1, 2 * EVERY - 1) else ""
        scores = guard.adapt(batch(methods[0].trouble).x, "here")
        assert scores.equal(methods[1].adapt(batch().x)) or scores.isnan().all()
    same = methods[0].weight.detach(), methods[1].weight.detach()
    assert torch.allclose(*same, rtol=0, atol=0, equal_nan=True)
    assert counts(guard)[BAD[trouble]] >= 1
    assert guard.summary()["first"][BAD[trouble]] == EVERY - 1
    lines = [line for line in said if TEXT[BAD[trouble]] in line]
    assert len(lines) == 1 and f"first in batch {EVERY - 1} of the run" in lines[0]
    assert "guard=warn: " in said[0] and guard.summary()["answered"] == 0


@pytest.mark.parametrize("size", [1, 2, 50])
def test_predictions_of_few_classes_are_noticed_whatever_the_batch(size):
    """95 of 100 in two classes; in a class more, or fewer of them, is no collapse."""
    few = [*[3, 4] * 47, 3, 0, 1, 2, 5, 6]
    for script, found in ((few, 1), ([*few[:94], 7, *few[95:]], 0), ([3, 4, 5], 0)):
        guard = Guard(Adapting(*script), "warn", print, 10)
        guard.begin()
        for _ in range(100 // size):
            guard.adapt(batch(size=size).x, "here")
        assert guard.collapse() == {"collapse": float(found)} and bool(counts(guard)) == bool(found)
    assert Guard(Adapting(), "warn", print, 10).collapse() == {}  # too few images to say


def test_a_state_that_went_bad_again_is_left_for_older_ones():
    method = Adapting()
    _, run = watch(method, "rollback")
    run(*[""] * (EVERY * (KEPT + 2)))
    seen = []
    for _ in range(KEPT + 2):
        run("scores")
        seen.append(int(method.updates))
    assert seen == [EVERY * n for n in (KEPT + 2, KEPT + 1, KEPT)] + [0, 0]


def test_between_two_looks_nothing_waits_for_the_device(monkeypatch):
    """Values are read by one of these; under `warn` none is for 15 batches of 16."""
    _, run = watch(Adapting(), "warn")
    reads: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        real = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda *a, real=real, name=name: (reads.append(name), real(*a))[1]
        )
    run(*[""] * (EVERY - 1))
    assert reads == []
    run("")
    assert reads == ["tolist", "tolist"]  # numbers, and predicted classes


def test_what_is_known_survives_a_checkpoint():
    whole, parts = Adapting(), Adapting()
    (guard, run), (half, begin) = watch(whole, "rollback"), watch(parts, "rollback")
    troubles = ["", "", *["gradient"] * 2, *[""] * EVERY, "large gradient", "", "weights"]
    run(*troubles, *troubles)
    begin(*troubles)
    other = Adapting()
    again, go_on = watch(other, "rollback")
    again.restore(copied(half.snapshot()))
    other.restore(copied(parts.snapshot()))
    go_on(*troubles)
    assert again.summary() == guard.summary() and guard.summary()["answered"] > 4
    assert other.weight.equal(whole.weight) and other.updates == whole.updates


# ------------------------------------------------------------------------------ whole runs


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["tta", "cl"])
def test_a_killed_run_that_was_answered_ends_as_an_undisturbed_one(configure, monkeypatch, kind):
    words = {
        "tta": ["strategy=tent", "strategy.optim.lr=1e6", *TINY["tta"], *BARE],
        "cl": ["strategy=er", "strategy.optim.lr=1e5", "strategy.epochs=1", *TINY["cl"]],
    }[kind]
    words += ["guard=rollback", "checkpoint.every=1"]
    whole = run_experiment(configure(*words), [])
    assert whole["guard"]["answered"] > 1 and "guard=rollback: " in result_table(whole)
    cfg = configure(*words, "on_exists=rerun")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(Kill):
            run_experiment(cfg, [])
    again = run_experiment(cfg, [])
    assert again["metrics"] == whole["metrics"] and again["guard"] == whole["guard"]
    assert records(again["run"]["folder"]) == records(whole["run"]["folder"])


@pytest.mark.parametrize(("lr", "bad"), [("1e6", True), ("0.01", False)])
def test_a_run_on_tasks_says_what_went_bad(configure, capsys, lr, bad):
    """Accuracies of a head of weights near 1e6 used to be the whole result."""
    words = ["strategy=linear_probe", f"strategy.optim.lr={lr}", "strategy.epochs=1", *TINY["cl"]]
    summary = run_experiment(configure(*words), [])
    assert {"nan", "collapse"} <= summary["metrics"].keys()
    assert bool(summary["guard"]["weights"]) == bad
    out = capsys.readouterr().out
    assert ("guard=warn: weights that are not finite or have exploded" in out) == bad
    assert ("guard=warn: weights" in result_table(summary)) == bad
    assert ("nan" in result_table(summary)) == bool(summary["metrics"]["nan"])


@pytest.mark.parametrize("scores", [NAN, 1.0])
def test_answers_on_test_images_are_looked_at(configure, monkeypatch, scores):
    real = execute.make_strategy

    def broken(*args):
        strategy, weights = real(*args)
        predict = strategy.predict
        strategy.predict = lambda x: (
            predict(x) * 0 + scores * (torch.arange(10)[None] == 0)[:, : predict(x).shape[1]]
        )
        strategy.extractors = lambda: None
        return strategy, weights

    monkeypatch.setattr(execute, "make_strategy", broken)
    words = ["strategy=simplecil", *TINY["cl"]]
    metrics = run_experiment(configure(*words), [])["metrics"]
    assert metrics["nan"] == (0 if scores == 1 else 66) and metrics.get("collapse", 1) == 1
    with pytest.raises(UserError, match=r"guard=stop: .* after task 0 \("):
        run_experiment(configure(*words, "guard=stop"), [])


def test_the_guard_makes_another_run_of_the_method_and_not_of_the_source(configure):
    words = ["strategy=bn_adapt", *TINY["tta"], *BARE]
    plain = run_experiment(configure(*words), [])
    skip = run_experiment(configure(*words, "guard=skip"), [])
    assert skip["run"]["folder"] != plain["run"]["folder"]
    assert skip["source"]["folder"] == plain["source"]["folder"]
    same = {k: v for k, v in plain["metrics"].items() if "err" in k or k in ("nan", "collapse")}
    assert same.items() <= skip["metrics"].items()


# ------------------------------------------------------------------------------ nothing to learn


def spoil(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no image")


FOLDER = ["scenario=split_imagefolder", "backbone=test_vit", "scenario.increment=2"]
FOLDER += ["data.on_error=skip", "runtime.workers=0"]


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("strategy", ["finetune", "simplecil"])
@pytest.mark.parametrize(("place", "said"), [
    ("train", r"task 0 \(classes 0-1\) has no training image"),
    ("train/class2,train/class0", "has no training image"),
    ("test", "no test image can be read"),
])  # fmt: skip
def test_a_run_without_readable_images_is_an_error(
    configure, image_folder_root, strategy, place, said
):
    for one in place.split(","):
        spoil(image_folder_root / one)
    words = [f"strategy={strategy}", *FOLDER, f"data.root={image_folder_root}"]
    words += ["strategy.epochs=1"] if strategy == "finetune" else []
    words += ["scenario.class_order=[0,2,1,3]"]
    with pytest.raises(UserError, match=f"{said}.* left out by data.on_error=skip, the first: "):
        run_experiment(configure(*words), [])


@pytest.mark.filterwarnings("ignore:skipped")
def test_a_stream_without_readable_images_is_an_error(configure, tmp_path):
    names = [f"ImageNet-C/fog/5/{c}/{i}.png" for c in ("n01440764", "n01443537") for i in range(3)]
    write_images(tmp_path / "data", names)
    spoil(tmp_path / "data")
    words = ["strategy=bn_adapt", "scenario.corruptions=[fog]", "scenario.image_list=all"]
    words += [f"data.root={tmp_path / 'data'}", "data.on_error=skip", "runtime.workers=0"]
    words += ["backbone=test_resnet", "backbone.num_classes=1000", "backbone.classes=imagenet1k"]
    words += ["scenario.probe_images=0"]
    with pytest.raises(UserError, match="no image of the stream can be read: 6 were left out"):
        run_experiment(configure(*words), [])
