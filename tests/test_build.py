"""`build` turns a node into an object or says exactly what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import pytest
from annotated_types import Predicate
from omegaconf import OmegaConf

from driftline.core.build import build, check_value, locate
from driftline.core.errors import UserError
from driftline.core.ranges import Later
from driftline.runs.schema import device_name

TENT = {"_target_": "tests.test_build.Thing", "name": "thing"}


class Thing:
    def __init__(self, backbone: object, *, lr: float, steps: int, mode: str | None) -> None:
        self.backbone, self.lr, self.steps, self.mode = backbone, lr, steps, mode


def node(**options):
    return OmegaConf.create({**TENT, "lr": 1e-3, "steps": 1, "mode": None, **options})


def test_live_objects_keep_their_identity_and_integers_become_floats():
    live = object()
    made = build(node(lr=1), at="strategy", backbone=live, unused=3)
    assert made.backbone is live and made.lr == 1.0 and isinstance(made.lr, float)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrr": 1}, "strategy has no option 'lrr'; did you mean 'lr'"),
        ({"lr": "abc"}, "strategy.lr must be a finite number, got 'abc'"),
        ({"steps": 1.5}, "strategy.steps must be a whole number, got 1.5"),
        ({"steps": True}, "strategy.steps must be a whole number, got True"),
        ({"mode": 3}, "strategy.mode must be text that is not empty or null, got 3"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message.replace("'", ".")):
        build(node(**options), at="strategy", backbone=None)


def test_missing_option_is_named():
    with pytest.raises(UserError, match="strategy.steps is missing"):
        build({"_target_": TENT["_target_"], "lr": 1.0, "mode": None}, at="strategy", backbone=0)


def test_a_target_makes_something_of_a_known_class():
    for target in ("os.system", "os.path.join", "builtins.eval"):
        with pytest.raises(UserError, match="neither a class nor a function with an annotated"):
            build({"_target_": target}, at="strategy")
    for target in ("tent", "a b.C", "..x", 3, None):
        with pytest.raises(UserError, match="no dotted name"):
            locate(target)
    with pytest.raises(UserError, match="write driftline.tta.tent.Tent"):
        locate("tta.tent.Tent")
    for target in ("driftline.tta.nothing.Here", "no_such_package.Here"):
        with pytest.raises(UserError, match="no module"):
            locate(target)
    with pytest.raises(UserError, match="has no 'Nothing'"):
        locate("driftline.tta.source.Nothing")


def test_a_nested_node_is_built_first():
    warmup = {
        "_target_": "driftline.parts.warmup.WarmUp",
        **dict.fromkeys(("epochs", "batch_size", "every"), 1),
        "augment": "none",
        "optim": {"_target_": "driftline.parts.optim.Optim", "kind": "sgd", "lr": 0.5},
    }
    assert build(warmup, at="strategy.warmup").optim.lr == 0.5
    wrong = warmup | {"optim": warmup["optim"] | {"schedule": "cosin"}}
    with pytest.raises(UserError, match=r"strategy\.warmup\.optim\.schedule must be one of"):
        build(wrong, at="strategy.warmup")


class Owner:
    def __init__(
        self, *, inner: Annotated[Callable[..., Thing], Later(("backbone", "steps"))]
    ) -> None:
        self.inner = inner


def test_what_its_owner_calls_is_like_any_other_node():
    """Converted, without its name, with nodes of its own; but for what the call gives."""
    inner = {**TENT, "lr": 1, "mode": None}
    made = build({"_target_": "tests.test_build.Owner", "inner": inner}, at="strategy")
    live = object()
    thing = made.inner(backbone=live, steps=3)
    assert thing.backbone is live and thing.steps == 3 and isinstance(thing.lr, float)
    other = {"_target_": "tests.test_build.Owner", "inner": inner}
    for wrong, said in (("tent", "_target_, got"), ({"lr": 1}, "_target_, got"), (other, "Thing")):
        with pytest.raises(UserError, match=f"strategy.inner must be .*{said}"):
            build({"_target_": "tests.test_build.Owner", "inner": wrong}, at="strategy")
    with pytest.raises(UserError, match="strategy.inner has no option .lrr."):
        build({"_target_": "tests.test_build.Owner", "inner": inner | {"lrr": 1}}, at="strategy")


@pytest.mark.parametrize("value", [float("nan"), True, 0, -0.5])
def test_quotes_are_proposed_only_where_the_text_would_be_taken(value):
    with pytest.raises(UserError) as error:
        check_value(value, Annotated[str, Predicate(device_name)], at="runtime.device")
    assert "quotes" not in str(error.value) and "cuda:<number>" in str(error.value)
    with pytest.raises(UserError, match="quotes: 'backbone.tag="):
        check_value(value, str, at="backbone.tag")
