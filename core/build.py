"""From a configuration node to an object: the one place where `_target_` is resolved."""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core.errors import UserError, suggest

ALLOWED = ("cl.", "tta.", "backbones.", "streams.", "core.", "kernels.")


def locate(target: str) -> Any:
    """The class or function that a dotted `_target_` names, from this project's packages only.

    Raises:
        UserError: for a target outside `ALLOWED` or one that does not exist.
    """
    if not target.startswith(ALLOWED):
        raise UserError(f"_target_={target!r} is not allowed; it must start with one of {ALLOWED}")
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise UserError(f"_target_={target!r}: there is no module {error.name!r}") from error
        raise
    except AttributeError as error:
        raise UserError(f"_target_={target!r}: {module} has no {name!r}") from error


def _fits(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind in (Any, inspect.Parameter.empty) or isinstance(kind, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is type(None) or kind is None:
        return value is None
    target = origin or kind
    if (
        isinstance(value, list) and target in (tuple, list)
    ) or target.__module__ == "collections.abc":
        return isinstance(value, list) and all(_fits(v, args[0]) for v in value if args)
    return isinstance(value, target) if isinstance(target, type) else True


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    return getattr(kind, "__name__", str(kind)) if origin is None else str(kind)


def build(node: DictConfig | dict[str, Any], /, *, at: str, **live: Any) -> Any:
    """Call the target of `node` with its options and those `live` objects it has parameters for.

    Args:
        node: mapping with `_target_`, an optional `name`, and keyword options; an option that is
            such a mapping itself is built first, with the same `live` objects.
        at: where the node stands in the configuration, for messages (`"strategy"`).
        live: objects that no configuration can hold (backbone, stream facts, seed).

    Raises:
        UserError: for an unknown, missing or wrongly typed option, naming the nearest one.
    """
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    options = {str(k): v for k, v in typing.cast(dict[Any, Any], plain).items()}
    target = locate(options.pop("_target_"))
    parameters = inspect.signature(target).parameters
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    if "name" not in parameters:
        options.pop("name", None)
    allowed = [k for k in parameters if k not in live and k != "self"]
    for key, value in options.items():
        if key not in allowed:
            raise UserError(f"{at} has no option {key!r}{suggest(key, allowed)}")
        if isinstance(value, dict) and "_target_" in value:
            value = options[key] = build(value, at=f"{at}.{key}", **live)
        kind = hints.get(key, Any)
        if not _fits(value, kind):
            raise UserError(f"{at}.{key} must be {_describe(kind)}, got {value!r}")
        if (key == "lr" or key.endswith("_lr")) and isinstance(value, int | float) and value < 0:
            raise UserError(f"{at}.{key} must not be negative, got {value}")
        if kind is float:
            options[key] = float(value)
    for key, parameter in parameters.items():
        if key in allowed and key not in options and parameter.default is parameter.empty:
            raise UserError(f"{at}.{key} is missing")
    return target(**{k: v for k, v in live.items() if k in parameters}, **options)


def nodes(node: DictConfig) -> Iterator[DictConfig]:
    """`node` and every node with a `_target_` inside it."""
    yield node
    for value in node.values():
        if isinstance(value, DictConfig) and "_target_" in value:
            yield from nodes(value)


def innermost(strategy: DictConfig) -> DictConfig:
    """The node of the method itself, without the rules around it."""
    return innermost(strategy.inner) if "inner" in strategy else strategy
