"""What `import driftline` offers: a strategy around a network, a run, a table of runs.

Files and exported networks are in `runs/saving.py` and `runs/export.py`, tasks of own data sets in
`streams/own.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset

from driftline.backbones.backbone import Backbone
from driftline.core.build import locate
from driftline.core.errors import UserError, suggest
from driftline.core.strategy import CLStrategy, Strategy, TTAStrategy
from driftline.core.stream import OF_STREAMS, Task
from driftline.runs.command import check_single, composed, spelled_out
from driftline.runs.compose import replays_source
from driftline.runs.execute import run_experiment
from driftline.runs.saving import begun, construct, name_of, wrap
from driftline.streams.own import source_images

if TYPE_CHECKING:
    import pandas

# What `needs` of a strategy asks a network for.
FACTS = {
    "batch_norm": "batch normalisation",
    "blocks": "the blocks of a timm vision transformer",
    "features": "features",
    "head": "scores of classes",
}


def make(
    strategy: str,
    net: nn.Module,
    *,
    num_classes: int | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    input_size: int | None = None,
    **options: Any,
) -> Strategy:
    """A strategy with the settings of conf/strategy/NAME.yaml around a network.

    An adaptation method is ready: call `adapt` on every batch. One that works on labelled source
    images gets them by `driftline.prepare` first; without, `adapt` says so. A continual method
    takes tasks: `driftline.tasks` and `driftline.learn`.

    Args:
        strategy: name of a file in conf/strategy.
        net: the classifier, on the device to work on; changed by the method as it learns. A
            `Backbone` is taken as it is, any other network is wrapped in one.
        num_classes: of the whole stream; None: the outputs of the network.
        seed: of everything the method draws.
        mean, std: per channel, of images in [0, 1]; None: the network normalises by itself.
        input_size: side in pixels of the images that the network is for; None: what it says of
            itself (networks of timm, transformers of torchvision and of transformers, Inception),
            else 224. Prompts on images and auxiliary networks are made for it.
        options: settings of the strategy or of a node in it, by name (`lr=1e-3`, `rank=4`) or
            dotted where two have one name (`**{"warmup.optim.lr": 1e-4}`); `adapter` names a file
            of conf/adapter, `around` one or several rules of conf/around, from the inside out, and
            `**{"around.merge.rule": "ties"}` a setting of a rule.

    Raises:
        UserError: for a strategy or setting that does not exist, or a network that the strategy
            cannot work on.
    """
    if not isinstance(strategy, str):
        raise UserError(
            f'the first argument names a strategy, as in driftline.make("tent", net), got '
            f"{type(strategy).__name__}"
        )
    rules = options.pop("around", [])
    names = [rules] if isinstance(rules, str) else list(rules)
    of_rules = {key: options.pop(key) for key in list(options) if key.startswith("around.")}
    node = settings(strategy, **options)
    words = [f"strategy={strategy}", f"around=[{','.join(names)}]"]
    around = composed(words).around if names else OmegaConf.create({})
    for key, value in of_rules.items():
        known = [f"around.{place}" for place in _places(around)]
        if key not in known:
            raise UserError(f"{key}: no such setting with {words[1]}{suggest(key, known)}")
        OmegaConf.update(around, key.removeprefix("around."), value)
    backbone = net if isinstance(net, Backbone) else wrap(net, mean, std, input_size)
    kind = locate(node._target_)
    classes = num_classes or backbone.num_classes
    if issubclass(kind, CLStrategy) and not classes:
        raise UserError(
            f"num_classes is missing: strategy={strategy} must know how many classes all tasks "
            "have together, and this network has no outputs to count"
        )
    made_of: dict[str, Any] = {
        "strategy": OmegaConf.to_container(node, resolve=True),
        "around": OmegaConf.to_container(around, resolve=True),
        "seed": seed,
        "num_classes": classes,
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
        "input_size": input_size,
    }
    prepares = issubclass(kind, TTAStrategy) and kind.uses_source(node)
    before = deepcopy(backbone) if prepares else None
    built = construct(made_of, backbone)
    if lacking := built.needs - backbone.provides - OF_STREAMS:
        raise UserError(
            f"strategy={strategy} needs {' and '.join(FACTS[fact] for fact in sorted(lacking))}, "
            "which this network lacks"
        )
    if isinstance(built, TTAStrategy):
        if built.preparation() is None:
            built.begin_stream()
        elif before is not None:
            built.method.make_another = lambda: cast(TTAStrategy, construct(made_of, before)).method
            built.adapt = partial(_unprepared, strategy)
            built.use_prepared = MethodType(_use_prepared, built)
    return built


def _unprepared(strategy: str, images: Any) -> Tensor:
    """Stands before `adapt` of a method until `prepare`.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"strategy={strategy} works on labelled source images before its stream: "
        "driftline.prepare(method, source) first"
    )


def _use_prepared(method: TTAStrategy, artefact: Mapping[str, Tensor]) -> None:
    """Lifts `_unprepared`, for who calls the protocol of `TTAStrategy` and not `prepare`."""
    _lift(method)
    method.use_prepared(artefact)


def _lift(method: TTAStrategy) -> None:
    for name in ("adapt", "use_prepared"):
        vars(method).pop(name, None)


def learn(method: Strategy, task: Task) -> None:
    """One task of a continual method, as the runner does it: all that `core/runner.py` calls.

    Args:
        method: of `driftline.make`.
        task: of `driftline.tasks`, the next one.

    Raises:
        UserError: for a method of test-time adaptation, or a task that is not the next.
    """
    if not isinstance(method, CLStrategy):
        raise UserError(f"{name_of(method)} adapts at test time and learns no tasks: call adapt")
    if task.index != len(begun(method)):
        raise UserError(
            f"this is task {task.index} and the method has learned {len(begun(method))}: tasks are "
            "learned in order, each once"
        )
    method.begin_task(task)
    for epoch in range(method.epochs):
        method.begin_epoch(task, epoch)
        for batch in method.batches(task, epoch):
            if batch is not None:
                method.observe(batch.to(method.device))
    method.end_task(task)


def prepare(method: Strategy, images: Dataset[Any], *, seed: int = 0, workers: int = 0) -> None:
    """What a method of test-time adaptation does on labelled source images before its stream.

    A method that prepares does so, on an object of its own; one that reads source images during
    the stream gets them. The first is part of a file of `driftline.save`; after `driftline.load`, a
    method that reads source images during the stream gets them again by this function.

    Args:
        method: of `driftline.make` or `driftline.load`.
        images: a data set: image float [3, H, W] in [0, 1] and label.
        seed: of the order of the images.
        workers: processes that load images; 0: none.

    Raises:
        UserError: for a method that uses no source images.
    """
    replays = prepares = False
    if isinstance(method, TTAStrategy) and method.made_of is not None:
        replays = replays_source(OmegaConf.create({"strategy": method.made_of["strategy"]}))
        prepares = method.preparation() is not None and method.method.prepared is None
    if not isinstance(method, TTAStrategy) or not (replays or prepares):
        raise UserError(f"{name_of(method)} needs no source images, or has what it needs of them")
    source = source_images(images, seed=seed, workers=workers)
    if replays:
        method.use_source(source)
    if prepares:
        bare = method.method
        assert bare.make_another is not None
        bare.prepared = bare.make_another().prepare(source, _NoProgress())
        bare.make_another = None
        _lift(method)
        bare.use_prepared(bare.prepared)
        method.begin_stream()


class _NoProgress:
    """Of a preparation that is not interrupted."""

    say = staticmethod(lambda text: None)

    def load(self) -> None:
        return None

    def save(self, state: Mapping[str, Any]) -> None:
        pass


def settings(strategy: str, **options: Any) -> DictConfig:
    """The node of a strategy with its file's values and these options, see `make`.

    Raises:
        UserError: for a strategy or setting that does not exist.
    """
    words = [f"strategy={strategy}"]
    if isinstance(options.get("adapter"), str):
        words.append(f"adapter={options.pop('adapter')}")
    node = composed(words).strategy
    OmegaConf.set_struct(node, False)  # rates of groups have names of their own
    places = _places(node)
    for key, value in options.items():
        matches = [place for place in places if f".{place}".endswith(f".{key}")]
        if not matches:
            last = {place.rpartition(".")[2] for place in places}
            near = suggest(key, sorted(last))
            near = near or f"; it has {', '.join(sorted(last - {'name'}))}"
            raise UserError(f"strategy={strategy} has no setting {key!r}{near}")
        OmegaConf.update(node, min(matches, key=lambda place: place.count(".")), value)
    return node


def _places(node: DictConfig, above: str = "") -> list[str]:
    """Dotted names of all settings in a node."""
    places = []
    for name in node:
        if name != "_target_":
            places.append(f"{above}{name}")
        inner = node._get_node(name)
        if isinstance(inner, DictConfig) and not inner._is_none():
            places += _places(inner, f"{above}{name}.")
    return places


def run(words: Sequence[str]) -> dict[str, Any]:
    """One run, as `python run.py WORDS` does it; a finished one is not run again.

    Args:
        words: settings such as `["strategy=cotta", "scenario=cifar10_c", "root=results"]`.

    Returns:
        what the run's summary.json holds: `metrics`, `cost`, `run` (its folder), ...

    Raises:
        UserError: for anything that the settings are wrong in.
    """
    if isinstance(words, str):
        raise UserError(f"driftline.run takes a list of settings: {words.split()}")
    cfg = composed(list(words), choices=True)
    check_single(cfg.hydra.sweeper, spelled_out(list(words)))
    OmegaConf.set_struct(cfg, False)
    del cfg.hydra
    OmegaConf.set_struct(cfg, True)
    return run_experiment(cfg, list(words))


def load_runs(*roots: str | Path) -> pandas.DataFrame:
    """All runs under some folders as a pandas table; see `driftline.analysis.runs.load_runs`.

    Raises:
        UserError: if pandas is not installed, a folder does not exist or none holds a run.
    """
    try:
        from driftline.analysis import runs
    except ModuleNotFoundError as error:
        raise UserError(
            f'load_runs needs the package {error.name}: pip install "driftline[analysis]"'
        ) from error
    return runs.load_runs(*roots)
