"""The configuration outside of scenario, strategy and backbone: every key and what it may be.

`check_settings` compares a composed configuration with these types and with the signatures that its
`_target_`s name, before anything is computed or written. Keys are those of conf/config.yaml, where
they are explained. Needs no torch before a strategy is looked up.
"""

# No `from __future__ import annotations`: it would hide NotRequired from TypedDict.
import inspect
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, NotRequired, TypedDict, get_type_hints, is_typeddict

from annotated_types import Ge, Le, Predicate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from driftline.core.build import check, check_call, check_options, check_value, locate, result
from driftline.core.errors import UserError, suggest
from driftline.core.paths import CONF
from driftline.core.ranges import CountOrZero, OwnLabel, PlainName, Positive, Reaction, Seed
from driftline.core.sinks import SINKS


def device_name(text: str) -> bool:
    """auto, cpu, cuda or cuda:<number>"""
    return re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text) is not None


class Kernel(TypedDict):
    backend: Literal["auto", "triton", "reference", "compile"]


class Data(TypedDict):
    root: str | None
    on_error: Literal["raise", "skip"]
    cache: str | None


class Checkpoint(TypedDict):
    every: CountOrZero
    keep: bool
    model: bool


class Runtime(TypedDict):
    device: Annotated[str, Predicate(device_name)]
    workers: Annotated[int, Ge(0), Le(256)] | None
    image_store_mb: CountOrZero
    feature_cache_mb: CountOrZero
    feature_store: str | None
    feature_store_gb: Positive
    wait: bool
    share_seeds: bool
    threads: Annotated[int, Ge(1), Le(1024)] | None


class Reference(TypedDict):
    strategy: str
    metric: str
    value: float
    status: Literal["seen", "quoted", "unverified"]
    comparable: bool
    source: str


class Settings(TypedDict):
    seed: Seed
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    deterministic: bool
    channels_last: bool | None
    kernel: Kernel
    forgetting: Literal["standard", "nonnegative", "first_minus_last"]
    guard: Reaction
    data: Data
    root: str
    stage: Literal["run", "prepare"]
    on_exists: Literal["skip", "rerun", "error"]
    checkpoint: Checkpoint
    reference: list[Reference] | None
    runtime: Runtime
    scenario: dict[str, Any]
    strategy: dict[str, Any]
    backbone: dict[str, Any]
    around: dict[str, Any]
    logger: dict[str, Any]
    time: NotRequired[dict[str, Any] | None]
    estimate: NotRequired[dict[str, Any] | None]
    tuned: NotRequired[dict[str, Any]]  # by scripts/tune.py


class Choice(TypedDict):
    """`backbones` of a scenario: what backbone=auto stands for."""

    real: str | None
    embedded: str | None
    real_vit: NotRequired[str | None]
    embedded_vit: NotRequired[str | None]
    real_cnn: NotRequired[str | None]
    embedded_cnn: NotRequired[str | None]


# Parameters that get an object no configuration can hold, see runs/compose.py.
LIVE = {
    "scenario": ("data_root", "on_error", "cache", "workers", "seed", "geometry", "store"),
    "strategy": ("backbone", "seed", "num_classes"),
    "backbone": (),
    "around": ("inner", "source"),
    "logger": ("about",),
    "time": (),
    "estimate": ("label_space",),
}


@cache
def global_options() -> dict[str, Any]:
    """Every option outside of scenario, strategy, backbone and logger: dotted name -> type."""
    options: dict[str, Any] = {}
    for key, kind in get_type_hints(Settings, include_extras=True).items():
        if is_typeddict(kind):
            inner = get_type_hints(kind, include_extras=True)
            options |= {f"{key}.{k}": v for k, v in inner.items()}
        elif key not in LIVE:
            options[key] = kind
    return options


def embedded(cfg: DictConfig | dict[str, Any]) -> bool:
    """Whether images are this project's stand-ins: no data.root, and a scenario of its own."""
    target = str(cfg["scenario"].get("_target_"))
    return cfg["data"]["root"] is None and target.startswith("driftline.")


def check_settings(cfg: DictConfig) -> None:
    """Compare the whole configuration with what each option may be.

    Raises:
        UserError: one line with the option, what is allowed, what was found and the nearest word.
    """
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        raise UserError(f"{key} cannot be resolved: {str(error).splitlines()[0]}") from error
    check_value({k: v for k, v in plain.items() if k != "hydra"}, Settings, at="")
    for place in ("scenario", "strategy"):
        check_value(plain[place].get("name"), PlainName, at=f"{place}.name")
    check_strategy(plain["strategy"])
    check_around(plain["around"], plain["strategy"])
    for group, kind in (("time", "Clock"), ("estimate", "Estimates")):
        _check_beside(plain.get(group), plain["strategy"], group, kind)
    _check_scenario(plain["scenario"], real=not embedded(plain))
    name = plain["backbone"].get("name")
    if name == "auto":
        _check_choice(plain["scenario"]["backbones"])
    if "_target_" in plain["backbone"]:
        _made(plain["backbone"], "backbone", "Backbone")
        check(plain["backbone"], at="backbone")
    elif name != "auto":
        raise UserError(f"backbone.name={name} chooses no backbone: write backbone={name}")
    _check_logger(plain["logger"])


def _made(node: Mapping[str, Any], at: str, *wanted: str) -> None:
    """The target makes something of a class named in `wanted`, which tests need not import."""
    kind = result(locate(node["_target_"], at))
    names = {c.__name__ for c in inspect.getmro(kind)} if inspect.isclass(kind) else set()
    if not names & set(wanted):
        raise UserError(f"{at}._target_={node['_target_']} makes no {at}")


def check_strategy(node: Mapping[str, Any]) -> None:
    """That a node makes a strategy and its settings are in range.

    Raises:
        UserError: naming the first that is not.
    """
    if "_target_" in node:
        _made(node, "strategy", "CLStrategy", "TTAStrategy")
    check(node, at="strategy", live=LIVE["strategy"])


def check_around(rules: Mapping[str, Any], strategy: Mapping[str, Any]) -> None:
    """That the rules exist, their settings are in range and they go around this kind of strategy.

    Raises:
        UserError: naming the rule, or the strategy that it does not go around.
    """
    names = [path.stem for path in (CONF / "around").glob("*.yaml")]
    for name, node in rules.items():
        at = f"around.{name}"
        if not isinstance(node, dict) or "_target_" not in node:
            if name in names:
                raise UserError(f"{at} holds the settings of a rule; set one of them, got {node!r}")
            raise UserError(f"{at} is no rule{suggest(name, names)}; one is chosen with around=...")
        _made(node, at, "Wrapper", "TaskWrapper")
        check(node, at=at, live=LIVE["around"])
    adapts = _adapts(strategy, "strategy")
    misfits = [name for name, node in rules.items() if _adapts(node, f"around.{name}") != adapts]
    if misfits:
        of = (
            ("methods that learn tasks", "adapts at test time")
            if adapts
            else ("methods of test-time adaptation", "learns tasks")
        )
        raise UserError(
            f"around=[{','.join(misfits)}]: goes around {of[0]}, and "
            f"strategy={strategy['name']} {of[1]}: leave around out"
        )


def _check_beside(
    node: Mapping[str, Any] | None, strategy: Mapping[str, Any], group: str, kind: str
) -> None:
    """What `time=...` or `estimate=...` puts beside the loop of adaptation, if anything."""
    if node is None:
        return
    check(node, at=group, live=LIVE[group])
    _made(node, group, kind)
    if not _adapts(strategy, "strategy"):
        raise UserError(
            f"{group}={node.get('name')} is for test-time adaptation, and "
            f"strategy={strategy['name']} learns tasks: leave {group} out"
        )


def _adapts(node: Mapping[str, Any], at: str) -> bool:
    """Whether a strategy or a rule is one of test-time adaptation."""
    return "TTAStrategy" in {c.__name__ for c in inspect.getmro(locate(node["_target_"], at))}


def _check_scenario(node: Mapping[str, Any], *, real: bool) -> None:
    """As it will be once the values for real or for embedded images are filled in."""
    extra = ("backbones", "real", "embedded", "label", "name")
    check_value(node.get("backbones"), Choice, at="scenario.backbones")
    check_value(node.get("label"), OwnLabel | None, at="scenario.label")
    options = {k: v for k, v in node.items() if k not in extra}
    for key in ("real", "embedded"):
        defaults = node.get(key, {})
        check_value(defaults, dict[str, Any], at=f"scenario.{key}")
        for option, value in defaults.items():
            if option not in options:
                raise UserError(f"scenario.{key}.{option}: scenario has no option {option!r}")
            if options[option] is None and key == ("real" if real else "embedded"):
                options[option] = value
    if "_target_" in node:
        _made(node, "scenario", "ShiftStream", "TaskStream")
    check({**options, "label": node["name"]}, at="scenario", live=LIVE["scenario"])


def _check_choice(choice: Mapping[str, str | None]) -> None:
    """What backbone=auto may stand for exists."""
    names = [path.stem for path in (CONF / "backbone").glob("*.yaml") if path.stem != "auto"]
    for kind, name in choice.items():
        if name is not None and name not in names:
            raise UserError(
                f"scenario.backbones.{kind}={name}: no such backbone{suggest(name, names)}"
            )


def _check_logger(node: Mapping[str, Any]) -> None:
    kinds = {name: dict[str, Any] | None for name in SINKS}
    check_options(node, kinds, SINKS, at="logger")
    for name, options in node.items():
        if options is not None:
            check_call(SINKS[name], options, at=f"logger.{name}", live=LIVE["logger"])
