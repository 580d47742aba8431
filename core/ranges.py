"""What the options of the configuration may be, as types that a signature states.

    def __init__(self, backbone, *, lr: NonNegative, betas: tuple[Below1, Below1]) -> None: ...

`core.build` reads them and answers a value outside its range with one line. The rules are those of
the package annotated-types, so any of its `Gt`, `Ge`, `Lt`, `Le`, `MinLen` or `Predicate` may stand
in `Annotated[...]`. Without a rule, a number is finite (at most 1e12 in size) and a text not empty.
Needs no torch.
"""

from __future__ import annotations

import collections.abc
import inspect
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen, Predicate

LARGEST = 1e12  # of numbers without an upper limit; beyond it, float32 arithmetic overflows


@dataclass(frozen=True)
class Later:
    """In `Annotated[Callable, Later(names)]`: an option that is a node, called by its owner.

    Args:
        names: of the arguments that are known at the call alone.
    """

    names: tuple[str, ...]


@dataclass(frozen=True)
class Flat:
    """In `Annotated[Part, Flat()]`: a parameter made of options that stand in the owner's node.

    The parameters of `Part` are options of that node like those of its owner; several parts may
    read the same one.

    Args:
        by: option that chooses the class, a subclass of `Part`: the name of a file in the package
            `within`, or the dotted path of a class anywhere. Empty: `Part` itself.
    """

    by: str = ""
    within: str = ""


@dataclass(frozen=True)
class Without:
    """In `Annotated[Part, Without(...)]`: options of that node which its owner does not read.

    Args:
        names: each has its default value or is empty.
        why: what the owner has not, for the message.
    """

    names: tuple[str, ...]
    why: str


def plain_name(text: str) -> bool:
    """a name that can be a folder: not empty, no dot in front, no '/', at most 120 characters"""
    return (
        bool(text.strip())
        and not text.startswith(".")
        and not set(text) & set("/\\")
        and text.isprintable()
        and (len(text.encode()) <= 120)
    )


def own_label(text: str) -> bool:
    """a name that can be a folder, without '[' and ']', which mark stand-in data"""
    return plain_name(text) and not set(text) & set("[]")


def distinct(values: Sequence[Any]) -> bool:
    """each value once"""
    return len(set(map(str, values))) == len(values)


Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Unit = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Gt(0), Le(1)]
Below1 = Annotated[float, Ge(0), Lt(1)]
Percent = Annotated[float, Ge(0), Le(100)]
Count = Annotated[int, Ge(1), Le(10**9)]
CountOrZero = Annotated[int, Ge(0), Le(10**9)]
Size = Annotated[int, Ge(1), Le(2**14)]  # of a layer, a kernel, a side in pixels, a batch of loops
Seed = Annotated[int, Ge(0), Lt(2**32)]  # NumPy's legacy generator takes no other
PlainName = Annotated[str, Predicate(plain_name)]
OwnLabel = Annotated[str, Predicate(own_label)]
Reaction = Literal["warn", "stop", "skip", "rollback", "reset"]  # of core/guard.py


def bare(kind: Any) -> tuple[Any, list[Any]]:
    """A type without `Annotated` and `NotRequired`, and the rules that stood there."""
    rules: list[Any] = []
    while typing.get_origin(kind) in (Annotated, typing.NotRequired):
        for rule in getattr(kind, "__metadata__", ()):
            rules += list(rule) if isinstance(rule, Interval) else [rule]
        kind = typing.get_args(kind)[0]
    return kind, rules


def alternatives(kind: Any) -> Iterator[Any]:
    """The members of a union, in order; any other type alone."""
    plain, _ = bare(kind)
    if typing.get_origin(plain) in (typing.Union, types.UnionType):
        for one in typing.get_args(plain):
            yield from alternatives(one)
    else:
        yield kind


def fits(value: Any, kind: Any) -> bool:
    """Whether a value of the configuration is of `kind` and within its rules.

    Lists stand for every sequence; a `tuple[A, B]` is a list of that length. Booleans are no
    numbers. A dictionary type (`TypedDict`) is compared by `core.build`, key by key.
    """
    options = list(alternatives(kind))
    if len(options) > 1:
        return any(fits(value, one) for one in options)
    plain, rules = bare(kind)
    return _is(value, plain, rules) and all(_keeps(value, rule) for rule in rules)


def _is(value: Any, plain: Any, rules: Sequence[Any]) -> bool:
    origin, args = typing.get_origin(plain), typing.get_args(plain)
    if plain in (Any, inspect.Parameter.empty) or isinstance(plain, typing.TypeVar):
        return True
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if plain in (None, type(None)):
        return value is None
    if plain is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        limited = any(isinstance(r, Le | Lt) for r in rules)
        return number and math.isfinite(value) and (limited or abs(value) <= LARGEST)
    if plain is int:
        limited = any(isinstance(r, Le | Lt) for r in rules)
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and (limited or abs(value) <= LARGEST)
    if plain is str:
        return isinstance(value, str) and bool(value.strip()) and "\0" not in value
    target = origin or plain
    if target is tuple and Ellipsis not in args and args:
        row = isinstance(value, list | tuple) and len(value) == len(args)
        return row and all(map(fits, value, args))
    if target is collections.abc.Callable:
        return callable(value)
    if target in (tuple, list) or target.__module__ == "collections.abc":
        return isinstance(value, list | tuple) and all(fits(v, args[0]) for v in value if args)
    if typing.is_typeddict(plain):
        return isinstance(value, dict)
    return isinstance(value, target) if isinstance(target, type) else True


def _keeps(value: Any, rule: Any) -> bool:
    match rule:
        case Gt(limit):
            return bool(value > limit)
        case Ge(limit):
            return bool(value >= limit)
        case Lt(limit):
            return bool(value < limit)
        case Le(limit):
            return bool(value <= limit)
        case MinLen(length):
            return len(value) >= length
        case Predicate(test):
            return bool(test(value))
    return True


def describe(kind: Any) -> str:
    """What is allowed, in words: `"a number, at least 0 and below 1, or null"`."""
    options = list(alternatives(kind))
    words = [_words(*bare(one)) for one in options]
    return " or ".join(dict.fromkeys(words))


def _words(plain: Any, rules: Sequence[Any]) -> str:
    origin, args = typing.get_origin(plain), typing.get_args(plain)
    limits = _limits(rules)
    tests = [inspect.getdoc(r.func) or "" for r in rules if isinstance(r, Predicate)]
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args)) if len(args) > 1 else repr(args[0])
    if plain in (None, type(None)):
        return "null"
    if plain is bool:
        return "true or false"
    if plain is float:
        noun = "a number" if any(isinstance(r, Le | Lt) for r in rules) else "a finite number"
        return ", ".join([noun + limits, *tests])
    if plain is int:
        return ", ".join(["a whole number" + limits, *tests])
    if plain is str:
        return tests[0] if tests else "text that is not empty"
    target = origin or plain
    if target is collections.abc.Callable:
        return f"something that makes {describe(args[1])}"
    if target is tuple and Ellipsis not in args and args:
        return f"a list of {len(args)}: " + ", then ".join(map(describe, args))
    if target in (tuple, list) or getattr(target, "__module__", "") == "collections.abc":
        least = next(
            (
                f"at least {r.min_length} " if r.min_length > 1 else ""
                for r in rules
                if isinstance(r, MinLen)
            ),
            None,
        )
        filled = "" if least is None else f"{least or 'one or more '}"
        each = f" of {filled}({describe(args[0])})" if args else ""
        return ", ".join([f"a list{each}", *tests])
    if target is dict or typing.is_typeddict(plain):
        return "settings as {key: value}"
    return getattr(plain, "__name__", str(plain))


def _limits(rules: Sequence[Any]) -> str:
    low: list[str] = []
    high: list[str] = []
    for rule in rules:
        match rule:
            case Gt(limit):
                low.append(f"above {limit:g}" if isinstance(limit, float) else f"above {limit:,}")
            case Ge(limit):
                low.append(f"at least {limit:,}")
            case Lt(limit):
                high.append(f"below {limit:,}")
            case Le(limit):
                high.append(f"at most {limit:,}")
    return f", {' and '.join(low + high)}" if low + high else ""
