"""What a run is composed of: settings filled in, the stream, the backbone and the strategy."""

from __future__ import annotations

import os
from contextlib import suppress
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict

from driftline.backbones.backbone import Backbone, Passes, weights_hash
from driftline.backbones.feature_store import FeatureStore, arithmetic_of
from driftline.core import distributed
from driftline.core.build import build, locate, nodes
from driftline.core.errors import UserError
from driftline.core.identity import method_name
from driftline.core.paths import CONF, expand_paths
from driftline.core.seed import rng_state, seed_all, set_rng_state
from driftline.core.strategy import CLStrategy, Strategy, TTAStrategy
from driftline.core.stream import (
    NEW_CLASSES,
    OF_STREAMS,
    OWN_CLASSES,
    Labels,
    ShiftStream,
    TaskStream,
)
from driftline.runs.schema import embedded
from driftline.streams.pipelines import Geometry
from driftline.streams.store import ImageStore

Stream = TaskStream | ShiftStream

# How tags of timm begin whose networks channels_last makes faster by a fifth or more
# (benchmarks/bench_speed.py layout); others gain less, or lose, and keep their bits.
CHANNELS_LAST = ("efficientnet", "tf_efficientnet", "mobilenetv3", "tf_mobilenetv3", "regnet")


def load_option(group: str, name: str) -> DictConfig:
    """One file of conf/<group>/ as a node."""
    node = OmegaConf.load(CONF / group / f"{name}.yaml")
    assert isinstance(node, DictConfig)
    return node


def complete(cfg: DictConfig) -> DictConfig:
    """Fill in what depends on other settings: backbone, layout, label.

    Without `data.root` a scenario of ours is embedded and labelled so. Corruptions
    made on the fly from real images are labelled as well: they are not the released files. The
    frozen model has no rules around it and no guard that acts: one run serves all that are compared
    with it.
    """
    cfg = cfg.copy()
    expand_paths(cfg)
    real = not embedded(cfg)
    with open_dict(cfg):
        choice = cfg.scenario.pop("backbones")
        if cfg.backbone.name == "auto":
            cfg.backbone = load_option("backbone", _automatic(cfg, choice, real))
        if cfg.channels_last is None:
            cfg.channels_last = str(cfg.backbone.get("tag")).startswith(CHANNELS_LAST)
        label = cfg.scenario.pop("label", None) or cfg.scenario.name
        defaults = {k: cfg.scenario.pop(k, {}) for k in ("real", "embedded")}
        for key, value in defaults["real" if real else "embedded"].items():
            if cfg.scenario[key] is None:
                cfg.scenario[key] = value
        if cfg.scenario.get("single_pass") and "epochs" in cfg.strategy:
            cfg.strategy.epochs = 1
        if cfg.strategy.name == "source":
            cfg.around, cfg.guard = {}, "warn"
        on_the_fly = cfg.scenario.get("corrupt") == "on_the_fly" or (
            "corrupt_test" in cfg.scenario and cfg.scenario.corruptions is not None
        )
        cfg.scenario.label = (
            label + ("[on_the_fly]" if on_the_fly else "") if real else f"{label}[embedded]"
        )
    return cfg


def _automatic(cfg: DictConfig, choice: DictConfig, real: bool) -> str:
    """The backbone that `backbone=auto` stands for."""
    kind = "real" if real else "embedded"
    preferred = locate(cfg.strategy._target_).preferred_backbone(cfg.strategy)
    if preferred and f"{kind}_{preferred}" in choice:
        kind += f"_{preferred}"
    if choice[kind] is None:
        what = "a vision transformer" if kind.endswith("_vit") else "a network"
        raise UserError(
            f"strategy={cfg.strategy.name} needs {what}, and none is agreed on for "
            f"scenario={cfg.scenario.name} (scenario.backbones.{kind} is null). Name one, for "
            "example backbone=timm backbone.tag=vit_base_patch16_384.augreg_in21k_ft_in1k"
        )
    return str(choice[kind])


def make_stream(cfg: DictConfig, geometry: Geometry, device: torch.device) -> Stream:
    """The scenario's stream; `geometry` gets its size from the backbone later."""
    return build(
        cfg.scenario,
        at="scenario",
        data_root=cfg.data.root,
        on_error=cfg.data.on_error,
        cache=cfg.data.cache,
        workers=_workers(cfg),
        seed=cfg.seed,
        geometry=geometry,
        store=ImageStore(device, cfg.runtime.image_store_mb),
    )


class Network:
    """The backbone of a run, built once for it and for the runs that it is compared with.

    A copy of it as it was built is held in the host's memory until `release`.
    """

    def __init__(self) -> None:
        self._held: tuple[Backbone, dict[str, str], dict[str, Any]] | None = None

    def fresh(self, cfg: DictConfig, stream: Stream) -> tuple[Backbone, dict[str, str]]:
        """The backbone as it was built, on the CPU, and the identity of its weights.

        Random numbers are afterwards as after building it.
        """
        if self._held is None:
            backbone: Backbone = build(cfg.backbone, at="backbone", labels=_labels(stream))
            weights = {"tag": backbone.tag, "hash": weights_hash(backbone.weights())}
            with suppress(TypeError, RuntimeError):  # not every network can be copied
                self._held = deepcopy(backbone), weights, rng_state()
            return backbone, weights
        held, weights, random = self._held
        backbone = deepcopy(held)
        backbone.passes = Passes()  # copies share it
        set_rng_state(random)
        return backbone, weights

    def release(self) -> None:
        """Hold nothing any more."""
        self._held = None


def make_strategy(
    cfg: DictConfig,
    stream: Stream,
    geometry: Geometry,
    device: torch.device,
    network: Network | None = None,
) -> tuple[Strategy, dict[str, str]]:
    """A seeded strategy with its rules around a fresh backbone, and the identity of the weights.

    Args:
        network: where the backbone comes from; None builds one.
    """
    seed_all(cfg.seed)
    backbone, weights = (network or Network()).fresh(cfg, stream)
    backbone.to(device)
    if cfg.channels_last:
        backbone.to(memory_format=torch.channels_last)
    backbone.low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cfg.precision)
    geometry.size, geometry.interpolation = backbone.input_size, backbone.interpolation
    _check_labels(cfg, stream, backbone)
    if isinstance(stream, ShiftStream) and stream.outputs is not None:
        backbone.keep_outputs(stream.outputs.kept)
    backbone.store = _feature_store(cfg, backbone, device)
    strategy = build_strategy(
        cfg.strategy, cfg.around, backbone, seed=cfg.seed, num_classes=stream.num_classes
    )
    _check_needs(cfg, strategy, stream, backbone)
    return strategy, weights


def _feature_store(
    cfg: DictConfig, backbone: Backbone, device: torch.device
) -> FeatureStore | None:
    """The store that the settings name, for this network and this arithmetic.

    Raises:
        UserError: for a file in place of the folder, and in several processes, where each has a
            part of a batch.
    """
    if cfg.runtime.feature_store is None:
        return None
    folder = Path(cfg.runtime.feature_store)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"runtime.feature_store={folder} is a file; name a folder")
    if distributed.size() > 1:
        raise UserError("runtime.feature_store: a run of several processes has none; leave it out")
    words = [backbone.tag, *arithmetic(cfg), arithmetic_of(device)]
    return FeatureStore(folder, cfg.runtime.feature_store_gb, " ".join(words))


def arithmetic(cfg: DictConfig) -> list[str]:
    """In words of settings, what rounds otherwise than by default; empty by default."""
    words = [cfg.precision] if cfg.precision != "fp32" else []
    return [*words, "channels_last"] if cfg.channels_last else words


def _labels(stream: Stream) -> Labels | None:
    """What a head made of the classes' names has to score; None where classes are learned."""
    if isinstance(stream, TaskStream):
        return None
    return Labels(str(stream.facts["label_space"]), tuple(stream.class_names))


def build_strategy(
    node: DictConfig, around: DictConfig, backbone: Backbone, *, seed: int, num_classes: int
) -> Strategy:
    """A strategy with its rules around a backbone, on the device of that.

    Args:
        node: settings of the strategy.
        around: settings of the rules by name, from the inside out.
    """
    device = next(backbone.parameters()).device
    compared = any(
        "source" in signature(locate(rule._target_)).parameters for rule in around.values()
    )
    source = deepcopy(backbone) if compared else None
    strategy: Strategy = build(
        node, at="strategy", backbone=backbone, seed=seed, num_classes=num_classes
    )
    for name, rule in around.items():
        strategy = build(rule, at=f"around.{name}", inner=strategy, source=source)
    return strategy.to(device)


def replays_source(cfg: DictConfig) -> bool:
    """Whether the method, or one inside it, reads source images during the stream."""
    kinds = [(locate(node._target_), node) for node in nodes(cfg.strategy)]
    return any(
        kind.replays_source(node)
        for kind, node in kinds
        if isinstance(kind, type) and issubclass(kind, TTAStrategy)
    )


def _workers(cfg: DictConfig) -> int:
    """Loader processes: none for in-memory embedded images, else up to four."""
    if cfg.runtime.workers is not None:
        return int(cfg.runtime.workers)
    return 0 if embedded(cfg) else min(4, os.cpu_count() or 1)


def check_kind(cfg: DictConfig, stream: Stream) -> type[Strategy]:
    """The strategy's class, if it fits the kind of stream.

    Raises:
        UserError: if a task method meets a shift stream or the reverse.
    """
    kind = locate(cfg.strategy._target_)
    wanted = CLStrategy if isinstance(stream, TaskStream) else TTAStrategy
    if not issubclass(kind, wanted):
        fitting = []
        for path in sorted((CONF / "strategy").glob("*.yaml")):
            target = str(load_option("strategy", path.stem)._target_)
            if issubclass(locate(target), wanted):
                fitting.append(path.stem)
        what = "a stream of tasks" if wanted is CLStrategy else "a stream of shifts"
        raise UserError(
            f"strategy={cfg.strategy.name} does not fit scenario={cfg.scenario.name}, which is "
            f"{what}. Strategies for it: {', '.join(fitting)}"
        )
    return kind


def _check_labels(cfg: DictConfig, stream: Stream, backbone: Backbone) -> None:
    labels = stream.order.get("label")
    last = stream.num_classes - 1
    first = -1 if isinstance(stream, ShiftStream) and stream.open_world else 0
    if labels is not None and len(labels) and not first <= labels.min() <= labels.max() <= last:
        raise UserError(
            f"scenario={stream.name} has labels from {labels.min()} to {labels.max()}, but its "
            f"{stream.num_classes} classes are 0 ... {last}; correct the labels of the data set"
        )
    if isinstance(stream, TaskStream):
        return
    space = stream.facts["label_space"]
    outputs = stream.num_classes if stream.outputs is None else stream.outputs.of
    if backbone.classes is not None and backbone.classes != space:
        fix = (
            "Set data.root=/path/to/data to run on the real set, or leave backbone unset"
            if space == "embedded"
            else "Choose a backbone trained for this label space"
        )
        if space == "own":
            fix = (
                "Name a network with these outputs (backbone=torchvision or timm, "
                "backbone.checkpoint=...); where the folders are synset ids of ImageNet, set "
                "scenario.classes=imagenet1k"
            )
        elif "classes" in cfg.backbone and backbone.num_classes == outputs:
            fix += (
                f"; the number of outputs, {outputs}, says nothing about their meaning. "
                f"If yours are these classes in this order, set backbone.classes={space}"
            )
        raise UserError(
            f"backbone={cfg.backbone.name} predicts {backbone.classes} classes, but "
            f"scenario={stream.name} holds {space} classes. {fix}."
        )
    if backbone.num_classes != outputs:
        raise UserError(
            f"scenario={stream.name} has {outputs} classes, but "
            f"backbone={cfg.backbone.name} ({backbone.tag}) has {backbone.num_classes} outputs"
        )


def _check_needs(cfg: DictConfig, strategy: Strategy, stream: Stream, backbone: Backbone) -> None:
    lacking = strategy.needs - stream.provides - backbone.provides
    if lacking:
        raise UserError(
            f"strategy={method_name(cfg.strategy.name, list(cfg.around))} needs "
            f"{', '.join(sorted(lacking))}, which neither "
            f"scenario={stream.name} nor backbone={cfg.backbone.name} ({backbone.tag}) provides"
            f"{_reorder(cfg, lacking)}"
        )


def _reorder(cfg: DictConfig, lacking: frozenset[str]) -> str:
    """What to do where the order of a stream of tasks is what a method cannot work with."""
    scenario, words = cfg.scenario, []
    if lacking & {NEW_CLASSES, OWN_CLASSES} and scenario.get("order", "increment") != "increment":
        words.append("scenario.order=increment")
    if lacking & OF_STREAMS and scenario.get("evaluate_every") is not None:
        words.append("scenario.evaluate_every=null")
    if not words:
        return ""
    return (
        f": classes come back, or tasks are not known. Set {' and '.join(words)}, or take a method "
        "that learns image by image, such as strategy=simplecil, slda, finetune, er or derpp"
    )
