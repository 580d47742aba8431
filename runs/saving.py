"""An adapted method in one file, and back: settings as JSON, state as tensors, nothing pickled."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import driftline.core.vision  # noqa: F401  # isort: skip
from torchvision.models import Inception3

from driftline.backbones.backbone import Backbone, weights_hash
from driftline.core.build import build
from driftline.core.errors import UserError
from driftline.core.files import BadFile
from driftline.core.strategy import CLStrategy, Strategy, TTAStrategy, _tensors
from driftline.core.stream import Task
from driftline.runs.compose import build_strategy
from driftline.runs.schema import check_around, check_strategy
from driftline.runs.tensor_file import read_tensors, write_tensors

FORMAT = "method-1"
STATE, PREPARED = "state.", "prepared."  # before the names of tensors


def save(method: Strategy, path: str | Path) -> None:
    """Write a method as it is now: settings, adapted weights, optimisers, random generators.

    Weights that the method never changes are left out; `load` gets them with the network. A file of
    Tent around a ResNet-50 has 0.4 MB.

    Args:
        method: of `driftline.make` or `driftline.load`.
        path: of the file, `.safetensors`; replaced whole.

    Raises:
        UserError: for a method made in another way, or a file that cannot be written.
    """
    if method.made_of is None:
        raise UserError(
            f"{type(method).__name__} was not made by driftline.make or driftline.load: what it "
            "was made of is not known, so it could not be made again"
        )
    write_method(method, path, method.made_of, begun(method))


def name_of(method: Strategy) -> str:
    """`strategy=tent`, as the user wrote it, or the name of the class."""
    made_of = method.made_of
    return f"strategy={made_of['strategy']['name']}" if made_of else type(method).__name__


def innermost(method: Strategy) -> Strategy:
    """The method without rules around it, of either sort."""
    one: Any = method
    while hasattr(one, "inner"):
        one = one.inner
    return one


def begun(method: Strategy) -> list[Task]:
    """The tasks that a continual method has begun so far."""
    one = innermost(method)
    return one.tasks_begun if isinstance(one, CLStrategy) else []


def write_method(
    method: Strategy, path: str | Path, made_of: Mapping[str, Any], tasks: Sequence[Task]
) -> None:
    """As `save`.

    Args:
        made_of: settings: `strategy` and `around` as plain nodes, `seed`, `num_classes`, `mean`,
            `std`, and, of a run, `backbone` and `outputs`.
        tasks: that a continual method has begun.
    """
    prepared = method.method.prepared if isinstance(method, TTAStrategy) else None
    if isinstance(method, TTAStrategy) and method.preparation() is not None and prepared is None:
        raise UserError(
            f"strategy={made_of['strategy']['name']} starts from a preparation on source images, "
            "and there is none to put into the file: prepare it with driftline.prepare"
        )
    tensors: dict[str, Tensor] = {}
    state = _packed(method.snapshot(), tensors, STATE.rstrip("."))
    tensors |= {f"{PREPARED}{k}": v for k, v in (prepared or {}).items()}
    about = {
        "format": FORMAT,
        "made_of": dict(made_of),
        "tasks": [_described(task) for task in tasks],
        "frozen": _frozen_hash(method),
        "state": state,
    }
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"driftline": json.dumps(about)})
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error


def load(path: str | Path, net: nn.Module | None = None, *, tasks: Sequence[Task] = ()) -> Strategy:
    """The method of a file of `save`, which predicts and goes on bit by bit as the saved one.

    Args:
        path: of the file.
        net: the network that the method was made around, with the weights that it had then, on the
            device to work on; changed by the method as it learns. None: for a file of a run
            (`checkpoint.model=true`), which says what network it was.
        tasks: with those that a continual method had begun, for one that reads images of earlier
            tasks again (replay); others need none.

    Raises:
        UserError: for a file that is damaged or none of `save`, or a network that it does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    tensors, facts = read_tensors(path, "method")
    try:
        about = json.loads(facts["driftline"])
        known = about["format"]
    except (KeyError, ValueError) as error:
        raise BadFile(f"{path} holds no method of driftline.save") from error
    if known != FORMAT:
        raise BadFile(f"{path} is of another version of this project ({known}, not {FORMAT})")
    made_of = about["made_of"]
    for node in (made_of["strategy"], made_of["around"], made_of.get("backbone")):
        _check_targets(node, path)
    method = construct(made_of, _network(path, net, made_of))
    fits = f"{path} does not fit the network"
    try:
        if isinstance(method, TTAStrategy):
            prepared = {k[len(PREPARED) :]: v for k, v in tensors.items() if k.startswith(PREPARED)}
            if prepared:
                method.method.use_prepared(prepared)
                method.method.prepared = prepared
            method.begin_stream()
        elif isinstance(method, CLStrategy):
            earlier = [_task(one) for one in about["tasks"]]
            for task in [*tasks[: len(earlier)], *earlier[len(tasks) :]]:
                method.grow(task)
            if not begun(method):
                begun(method).extend(earlier)
        method.restore(_unpacked(about["state"], tensors))
    except UserError as error:
        raise UserError(
            f"{fits} ({error}); give the one that the method was made around"
        ) from error
    except (RuntimeError, ValueError) as error:  # another structure
        text = str(error).splitlines()[0]
        raise UserError(f"{fits} ({text}); give the one that the method was made around") from error
    if _frozen_hash(method) != about["frozen"]:
        raise UserError(
            f"{fits}: weights that the method never changes are others. Give the network with the "
            "weights that it had when the method was made"
        )
    return method


def construct(made_of: Mapping[str, Any], backbone: Backbone) -> Strategy:
    """A method made of plain settings, before its stream begins."""
    node, around = (OmegaConf.create(made_of[k]) for k in ("strategy", "around"))
    check_strategy(made_of["strategy"])
    check_around(made_of["around"], made_of["strategy"])
    method = build_strategy(
        node, around, backbone, seed=made_of["seed"], num_classes=made_of["num_classes"]
    )
    method.made_of = made_of
    return method


def _network(path: Path, net: nn.Module | None, made_of: Mapping[str, Any]) -> Backbone:
    """The backbone to make the method around."""
    if net is None:
        if "backbone" not in made_of:
            raise UserError(
                f"{path} does not hold the network: driftline.load(path, net), with the one that "
                "the method was made around"
            )
        backbone: Backbone = build(made_of["backbone"], at="backbone")
        if made_of["outputs"] is not None:
            backbone.keep_outputs(made_of["outputs"])
        return backbone
    if isinstance(net, Backbone):
        return net
    return wrap(net, made_of["mean"], made_of["std"], made_of.get("input_size"))


def wrap(
    net: nn.Module,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    input_size: int | None = None,
) -> Backbone:
    """A network of somebody else as a backbone, on its device.

    Args:
        mean, std, input_size: as in `driftline.make`.

    Raises:
        UserError: for what is no network.
    """
    if not isinstance(net, nn.Module):
        raise UserError(
            f"the network must be a torch.nn.Module, an object and not its class or name, got "
            f"{net if isinstance(net, str | type) else type(net).__name__!s}"
        )
    if input_size is not None and (not isinstance(input_size, int) or input_size < 1):
        raise UserError(f"input_size must be a number of pixels above 0, got {input_size!r}")
    side = input_size or _own_size(net) or 224
    backbone = Backbone(net.eval(), mean=mean, std=std, input_size=side)
    backbone.checks_images = True
    first = next(net.parameters(), torch.empty(0))
    return backbone.to(first.device)  # its mean and std were made on the CPU


def _own_size(net: nn.Module) -> int | None:
    """The side in pixels that a network says it is for, or None."""
    published: Any = getattr(net, "pretrained_cfg", None) or {}
    sizes: list[Any] = [
        getattr(getattr(net, "patch_embed", None), "img_size", None),  # transformers of timm
        published.get("input_size"),  # weights of timm
        getattr(net, "image_size", None),  # transformers of torchvision
        getattr(getattr(net, "config", None), "image_size", None),  # networks of transformers
        299 if isinstance(net, Inception3) else None,
    ]
    for size in sizes:
        last = size[-1] if isinstance(size, tuple | list) and size else size
        if isinstance(last, int) and last > 0:
            return last
    return None


def _check_targets(node: Any, path: Path) -> None:
    """A file names code; it gets none to run that the caller does not have already.

    Raises:
        UserError: for a module outside of this project that is not imported yet.
    """
    for name in _targets(node):
        module = name.rpartition(".")[0]
        if not module.startswith("driftline.") and module not in sys.modules:
            raise UserError(
                f"{path} needs {name}, which is not of this project: import {module} first if you "
                "trust it"
            )


def _targets(node: Any) -> Iterator[str]:
    """Every `_target_` in nested settings."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        for value in node.values():
            yield from _targets(value)


def _frozen_hash(method: Strategy) -> str:
    """Of the tensors that a snapshot leaves out."""
    named = _tensors(method)
    return weights_hash({name: named[name] for name in method.frozen()})


# ------------------------------------------------------------------------------ as JSON


def _described(task: Task) -> dict[str, Any]:
    plain = {k: getattr(task, k) for k in ("index", "name", "steps", "present")}
    ranges = {"classes": task.classes, "new": task.new}
    return plain | {k: None if r is None else [r.start, r.stop] for k, r in ranges.items()}


def _task(about: Mapping[str, Any]) -> Task:
    none = cast(Any, None)
    task = Task(
        about["index"],
        about["name"],
        range(*about["classes"]),
        about["steps"],
        none,
        none,
        none,
        new=None if about["new"] is None else range(*about["new"]),
        present=None if about["present"] is None else tuple(about["present"]),
    )
    return task.without_images()


def _packed(value: Any, tensors: dict[str, Tensor], at: str) -> Any:
    """Nested containers of tensors and plain values as JSON; tensors go to `tensors` by name."""
    if isinstance(value, Tensor):
        tensors[at] = value
        return {"tensor": at}
    if isinstance(value, Mapping):
        items = [[k, _packed(v, tensors, f"{at}.{k}")] for k, v in value.items()]
        return {"dict": items}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(v, tensors, f"{at}.{i}") for i, v in enumerate(value)]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"{at} is {type(value).__name__}, which no file can hold: the state of a method is made of "
        "tensors, numbers, texts, lists, tuples and dictionaries"
    )


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_packed` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _unpacked(v, tensors) for k, v in content}
    if kind == "range":
        return range(*content)
    items = [_unpacked(v, tensors) for v in content]
    return items if kind == "list" else tuple(items)
