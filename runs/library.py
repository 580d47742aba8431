"""What `import driftline` offers: a strategy around a network, a run, a table of runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError, suggest
from driftline.core.strategy import Strategy, TTAStrategy
from driftline.core.stream import OF_STREAMS
from driftline.runs.command import composed
from driftline.runs.compose import build_strategy
from driftline.runs.execute import run_experiment
from driftline.runs.schema import check_around

if TYPE_CHECKING:
    import pandas


def make(
    strategy: str,
    net: nn.Module,
    *,
    num_classes: int | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> Strategy:
    """A strategy with the settings of conf/strategy/NAME.yaml around a network.

    An adaptation method is ready: call `adapt` on every batch. One that is prepared on source
    images (`preparation()` is not None) has to be given the result of its `prepare` first, and one
    that reads source images during the stream gets them by `use_source`; without, `adapt` says so
    (docs/library.md). A continual method takes `begin_task`, `observe` and `end_task`, see
    `core/strategy.py`.

    Args:
        strategy: name of a file in conf/strategy.
        net: the classifier, on the device to work on; changed by the method as it learns. A
            `Backbone` is taken as it is, any other network is wrapped in one.
        num_classes: of the whole stream; None: the outputs of the network.
        seed: of everything the method draws.
        mean, std: per channel, of images in [0, 1]; None: the network normalises by itself.
        options: settings of the strategy or of a node in it, by name (`lr=1e-3`, `rank=4`) or
            dotted where two have one name (`**{"warmup.optim.lr": 1e-4}`); `adapter` names a file
            of conf/adapter, `around` one or several rules of conf/around, from the inside out.

    Raises:
        UserError: for a strategy or setting that does not exist, or a network that the strategy
            cannot work on.
    """
    rules = options.pop("around", [])
    names = [rules] if isinstance(rules, str) else list(rules)
    node = settings(strategy, **options)
    words = [f"strategy={strategy}", f"around=[{','.join(names)}]"]
    around = composed(words).around if names else OmegaConf.create({})
    plain: Any = [OmegaConf.to_container(part) for part in (around, node)]
    check_around(*plain)
    backbone = net if isinstance(net, Backbone) else Backbone(net.eval(), mean=mean, std=std)
    backbone.to(next(backbone.parameters()).device)  # its mean and std were made on the CPU
    built = build_strategy(
        node, around, backbone, seed=seed, num_classes=num_classes or backbone.num_classes
    )
    if lacking := built.needs - backbone.provides - OF_STREAMS:
        raise UserError(
            f"strategy={strategy} needs {', '.join(sorted(lacking))}, which this network lacks"
        )
    if isinstance(built, TTAStrategy) and built.preparation() is None:
        built.begin_stream()
    return built


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
    return run_experiment(composed(list(words)), list(words))


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
