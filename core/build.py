"""From a configuration node to an object: the one place where `_target_` is resolved.

What an option may be stands in the signature of its target (`core/ranges.py`); `check` compares a
node with it without building anything, `build` checks and then calls the target.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from driftline.core.errors import UserError, suggest
from driftline.core.ranges import Flat, Later, Without, alternatives, bare, describe, fits

FOLDERS = ("cl", "tta", "backbones", "parts", "streams", "core", "kernels")


def locate(target: Any, at: str = "", key: str = "_target_") -> Any:
    """The class or function that a dotted `_target_` names: one of ours or of any other package.

    Whether it makes what is wanted at its place is for the caller to check.

    Args:
        at: where the node stands in the configuration, for messages.
        key: the option that holds the name.

    Raises:
        UserError: for a target that does not exist.
    """
    key = f"{at}.{key}" if at else key
    if not isinstance(target, str) or not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", target):
        raise UserError(
            f"{key}={target!r} is no dotted name; write it like driftline.tta.tent.Tent or "
            "mypackage.mine.Mine"
        )
    module, _, name = target.rpartition(".")
    if module.split(".")[0] in FOLDERS:
        raise UserError(f"{key}={target!r}: write driftline.{target}")
    try:
        thing = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            raise UserError(f"{key}={target!r}: there is no module {error.name!r}") from error
        raise
    except AttributeError as error:
        raise UserError(f"{key}={target!r}: {module} has no {name!r}") from error
    if not callable(thing):
        raise UserError(f"{key}={target!r} is neither a class nor a function")
    return thing


def result(target: Any) -> Any:
    """What a located target makes: the class itself, or the annotated result of a function."""
    return target if inspect.isclass(target) else _hints(target).get("return", Any)


@cache
def _hints(target: Any) -> dict[str, Any]:
    if inspect.isclass(target) and not dataclasses.is_dataclass(target):
        target = target.__init__  # the fields of a dataclass may come from several modules
    try:
        return typing.get_type_hints(target, include_extras=True)
    except TypeError:  # compiled code has no annotations
        return {}


def check(node: Mapping[str, Any], /, *, at: str, live: Collection[str] = ()) -> None:
    """Compare the options of a node that has a `_target_` with the signature of that target.

    Args:
        node: plain mapping with `_target_`, an optional `name` and keyword options; nested nodes
            are compared with their own targets.
        at: where the node stands in the configuration, for messages (`"strategy"`).
        live: parameters, of nested nodes too, that get an object no configuration can hold.

    Raises:
        UserError: for an unknown, missing or wrongly typed option, one outside its range, or a
            target that makes something else, naming the nearest option.
    """
    if "_target_" not in node:
        raise UserError(f"{at}._target_ is missing: what {at} is made of")
    name = node["_target_"]
    options = {k: v for k, v in node.items() if k != "_target_"}
    target = locate(name, at)
    if result(target) is Any:
        raise UserError(
            f"{at}._target_={name} is neither a class nor a function with an annotated result"
        )
    check_call(target, options, at=at, live=live, of=f" ({at}._target_={name})")


def check_call(
    target: Any,
    options: Mapping[str, Any],
    *,
    at: str,
    live: Collection[str] = (),
    of: str = "",
) -> None:
    """Compare keyword options with the signature of a class or function.

    Raises:
        UserError: as for `check`, which says what the arguments are.
    """
    kinds, required = _kinds(target, options, at, live)
    if "name" not in kinds:
        options = {k: v for k, v in options.items() if k != "name"}
    for rule in _flat(target).values():
        of = f" ({at}.{rule.by}={options[rule.by]})" if rule.by else of
    check_options(options, kinds, required, at=at, of=of, live=live)


def options_of(
    target: Any, options: Mapping[str, Any], *, at: str = "", live: Collection[str] = ()
) -> dict[str, Any]:
    """All options of a target by name, those of its flat parts among them, and what each may be.

    Args:
        options: of its node, which may choose the class of a part.
        live: parameters that are no options.
    """
    return _kinds(target, options, at, live)[0]


def unread(kind: Any) -> set[str]:
    """Options of a nested node that its owner does not read (`core.ranges.Without`)."""
    return {name for rule in _rules(kind) if isinstance(rule, Without) for name in rule.names}


def later(kind: Any) -> tuple[str, ...]:
    """Names of the arguments that the owner of an option gives when it calls it."""
    return next((rule.names for rule in _rules(kind) if isinstance(rule, Later)), ())


def _kinds(
    target: Any, options: Mapping[str, Any], at: str, live: Collection[str]
) -> tuple[dict[str, Any], set[str]]:
    """What each option of a target may be, and which of them must be there."""
    parameters = inspect.signature(target).parameters
    hints = _hints(target)  # once: resolving annotations is slow
    flat = _flat(target)
    names = [k for k in parameters if k not in live and k not in flat and k != "self"]
    kinds = {k: hints.get(k, Any) for k in names}
    required = {k for k in kinds if parameters[k].default is inspect.Parameter.empty}
    for key, rule in flat.items():
        if rule.by:
            kinds[rule.by] = str
            required.add(rule.by)
        inner, needed = _kinds(_chosen(hints[key], rule, options, at), options, at, live)
        kinds |= inner
        required |= needed
    return kinds, required


@cache
def _flat(target: Any) -> dict[str, Flat]:
    """The parameters of a target that are made of options of its own node."""
    rules = {k: next((r for r in bare(v)[1] if isinstance(r, Flat)), None)
             for k, v in _hints(target).items()}  # fmt: skip
    return {k: rule for k, rule in rules.items() if rule is not None}


def _chosen(kind: Any, rule: Flat, options: Mapping[str, Any], at: str) -> Any:
    """The class of a flat part.

    Raises:
        UserError: if its name is missing or names nothing of that kind.
    """
    part, _ = bare(kind)
    if not rule.by:
        return part
    name = options.get(rule.by)
    if name is None:
        raise UserError(f"{at}.{rule.by} is missing")
    if not isinstance(name, str) or "." in name:
        chosen = locate(name, at, rule.by)
        if not inspect.isclass(chosen) or not issubclass(chosen, part):
            raise UserError(f"{at}.{rule.by}={name} is no subclass of {part.__name__}")
        return chosen
    package = importlib.import_module(rule.within)
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    own = _of_file(part, f"{rule.within}.{name}") if name in names else None
    if own is None:
        fitting = [n for n in names if _of_file(part, f"{rule.within}.{n}")]
        raise UserError(
            f"{at}.{rule.by}={name} is nothing that this {at} can use{suggest(name, fitting)}. "
            f"It can use {', '.join(fitting)}, or the dotted path of a class of yours"
        )
    return own


def _of_file(part: Any, module: str) -> Any:
    """The class of a file that is a `part`; None where there is none."""
    things = vars(importlib.import_module(module)).values()
    return next(
        (t for t in things
         if inspect.isclass(t) and issubclass(t, part) and t.__module__ == module), None
    )  # fmt: skip


def check_options(
    options: Mapping[str, Any],
    kinds: Mapping[str, Any],
    required: Collection[str],
    *,
    at: str,
    of: str = "",
    live: Collection[str] = (),
) -> None:
    """Every option is known and of its kind, and none is missing.

    Args:
        at: what stands before the names of the options, empty at the top level.
        of: said of an unknown option at the end.
        live: parameters of nested nodes that get an object no configuration can hold.

    Raises:
        UserError: for the first that is not.
    """
    for key, value in options.items():
        if key not in kinds:
            near = suggest(str(key), kinds)
            raise UserError(f"{at or 'the configuration'} has no option {key!r}{near}{of}")
        check_value(value, kinds[key], at=f"{at}.{key}" if at else key, live=live)
    for key in kinds:
        if key in required and key not in options:
            raise UserError(f"{at}.{key} is missing" if at else f"{key} is missing")


def check_value(value: Any, kind: Any, *, at: str, live: Collection[str] = ()) -> None:
    """One value, nested ones included.

    Raises:
        UserError: what is allowed at `at`, what was found, and the nearest allowed word.
    """
    options = [bare(one)[0] for one in alternatives(kind)]
    if names := later(kind):
        if not isinstance(value, dict) or "_target_" not in value:
            raise UserError(f"{at} must be settings with a {at}._target_, got {value!r}")
        check(value, at=at, live=names)
        classes = [one for o in options for one in alternatives(typing.get_args(o)[1])]
        _check_result(value["_target_"], classes, kind, at=at)
        return
    free = any((typing.get_origin(one) or one) is dict for one in options)
    if isinstance(value, dict) and "_target_" in value and not free:
        check(value, at=at, live=live)
        _check_result(value["_target_"], options, kind, at=at)
        _check_unread(value, kind, at=at)
        return
    groups = [one for one in options if typing.is_typeddict(one)]
    if isinstance(value, dict) and groups:
        hints = typing.get_type_hints(groups[0], include_extras=True)
        check_options(value, hints, groups[0].__required_keys__, at=at)
        return
    if isinstance(value, list):
        rows = [a for o in options for a in typing.get_args(o) if typing.is_typeddict(a)]
        for index, row in enumerate(value if rows else []):
            check_value(row, rows[0], at=f"{at}[{index}]")
    if not fits(value, kind):
        raise UserError(f"{at} must be {describe(kind)}, got {value!r}{_hint(value, kind, at)}")


def _check_result(target: str, options: Sequence[Any], kind: Any, *, at: str) -> None:
    returned = result(locate(target, at))
    classes = [one for one in options if inspect.isclass(one)]
    if classes and not any(inspect.isclass(returned) and issubclass(returned, c) for c in classes):
        raise UserError(f"{at} must be {describe(kind)}, got {target}")


def _check_unread(node: Mapping[str, Any], kind: Any, *, at: str) -> None:
    """Settings of a nested node that would do nothing."""
    parameters = inspect.signature(locate(node["_target_"], at)).parameters
    for rule in _rules(kind):
        for name in rule.names if isinstance(rule, Without) else ():
            if (value := node.get(name)) and value != parameters[name].default:
                raise UserError(f"{at}.{name}={value!r} would do nothing: {rule.why}")


def _rules(kind: Any) -> list[Any]:
    """Those of all members of a union."""
    return [rule for one in alternatives(kind) for rule in bare(one)[1]]


def _hint(value: Any, kind: Any, at: str) -> str:
    """The nearest allowed word, or how to type what was meant."""
    options = [bare(one)[0] for one in alternatives(kind)]
    literals = [one for one in options if typing.get_origin(one) is typing.Literal]
    words = [word for one in literals for word in typing.get_args(one)]
    groups = [one for one in options if typing.is_typeddict(one)]
    if words and isinstance(value, str):
        return suggest(value, [w for w in words if isinstance(w, str)])
    if groups:
        return f"; set one of {', '.join(f'{at}.{k}' for k in groups[0].__annotations__)}"
    classes = [one for one in options if inspect.isclass(one) and one.__module__ != "builtins"]
    if classes and isinstance(value, str):
        return f"; a named one is chosen with {at.rpartition('.')[2]}={value}"
    if str in options and isinstance(value, int | float) and fits(str(value), kind):
        return f"; a text that looks like a number needs quotes: '{at}=\"{value}\"'"
    return ""


def build(node: DictConfig | dict[str, Any], /, *, at: str, **live: Any) -> Any:
    """Call the target of `node` with its options and those `live` objects it has parameters for.

    Args:
        node: mapping with `_target_`, an optional `name`, and keyword options; an option that is
            such a mapping itself is built first, with the same live objects.
        at: where the node stands in the configuration, for messages (`"strategy"`).
        live: objects that no configuration can hold (backbone, stream facts, seed).

    Raises:
        UserError: as for `check`.
    """
    plain = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    options = {str(k): v for k, v in typing.cast(dict[Any, Any], plain).items()}
    check(options, at=at, live=live)
    return _call(options, at, live)()


def _call(node: Mapping[str, Any], at: str, live: Mapping[str, Any]) -> partial[Any]:
    """The target of a checked node with its options; without the arguments known later alone."""
    options = {k: v for k, v in node.items() if k != "_target_"}
    return _bound(locate(node["_target_"], at), options, at, live)


def build_part(kind: Any, options: Mapping[str, Any], /, *, at: str, **live: Any) -> Any:
    """One flat part of checked options, `kind` being `Annotated[Part, Flat(...)]`."""
    rule = next(r for r in bare(kind)[1] if isinstance(r, Flat))
    return _bound(_chosen(kind, rule, options, at), options, at, live)()


def _bound(
    target: Any, options: Mapping[str, Any], at: str, live: Mapping[str, Any]
) -> partial[Any]:
    """A target with those of the checked options that are its own."""
    hints = _hints(target)
    flat = _flat(target)
    parts = {key: build_part(hints[key], options, at=at, **live) for key in flat}
    names = inspect.signature(target).parameters
    options = {k: v for k, v in options.items() if k in names and k not in flat}
    for key, value in options.items():
        kind, _ = bare(hints.get(key, Any))
        if later(hints.get(key, Any)):
            options[key] = _call(value, f"{at}.{key}", {})
        elif isinstance(value, dict) and "_target_" in value:
            options[key] = build(value, at=f"{at}.{key}", **live)
        elif kind is float:
            options[key] = float(value)
        elif typing.get_origin(kind) is tuple:
            options[key] = tuple(value)
    return partial(target, **asked(target, live), **parts, **options)


def asked(make: Callable[..., Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the live objects that `make` has a parameter for."""
    parameters = inspect.signature(make).parameters
    return {k: v for k, v in live.items() if k in parameters}


def made(make: Callable[..., Any], live: Mapping[str, Any], *, at: str) -> Any:
    """What an option that is called by its owner makes (`core.ranges.Later`), as in `build`.

    Args:
        at: where its node stands in the configuration: its own messages name its settings as if it
            stood at `strategy`.

    Raises:
        UserError: as raised by `make`, with the names of settings as they are typed.
    """
    try:
        return make(**asked(make, live))
    except UserError as error:
        error.args = (re.sub(r"\bstrategy\.(?=\w)", f"{at}.", str(error)),)
        raise


def takes(node: DictConfig, name: str, at: str) -> bool:
    """Whether `build` hands the live object `name` to the target of a node or to one inside it."""
    return any(_takes(locate(one._target_), one, name, at) for one in nodes(node))


def _takes(target: Any, options: Mapping[str, Any], name: str, at: str) -> bool:
    hints = _hints(target)
    parts = [_chosen(hints[key], rule, options, at) for key, rule in _flat(target).items()]
    own = name in inspect.signature(target).parameters
    return own or any(_takes(part, options, name, at) for part in parts)


def nodes(node: DictConfig) -> Iterator[DictConfig]:
    """`node` and every node with a `_target_` inside it."""
    yield node
    for value in node.values():
        if isinstance(value, DictConfig) and "_target_" in value:
            yield from nodes(value)
