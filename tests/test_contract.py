"""What every method of conf/strategy promises, property by property (table in CONTRIBUTING.md).

A method is covered by existing: each YAML file is a case, on a tiny network with random weights.
Every adaptation method is tried a second time with a rule around it, and every rule of conf/around
around some methods. That each property can fail is shown on methods that break it
(broken_methods.py).

By default a method is tried on half of the properties in SHARED, with one other kind of adapter in
turn, a variant on what it adds, a kill by every third method, and one rule around the methods in
INSIDE; `--all` runs every property of every pair, `-k NAME` every property of one method.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from importlib.util import find_spec
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import broken_methods
import pytest
import timm
import torch
import yaml
from conftest import ROOT, copied, equal, rule_node, strategy_node
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.build import build, locate
from driftline.core.checkpoint import Checkpointer, Signals
from driftline.core.console import Console
from driftline.core.cost import state_bytes
from driftline.core.errors import UserError
from driftline.core.oracle import Oracle
from driftline.core.record import RunLogger
from driftline.core.runner import Context, run_shifts, run_tasks
from driftline.core.seed import generator
from driftline.core.strategy import FACTS, CLStrategy, Strategy, TTAStrategy, Wrapper
from driftline.core.stream import (
    Batch,
    Segment,
    ShiftStream,
    Skipped,
    SourceImages,
    Task,
    TaskStream,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of tiny tasks
CONF = ROOT / "conf" / "strategy"
SIDES = {"resnet": 64, "vit": 32}  # pixels; at 32 the last maps of the ResNet have one pixel
CLASSES = 10

# ------------------------------------------------------------------------------ cases

# Settings that keep a strategy quick or make it do what it is for on eight random images. One that
# is not listed runs as its YAML says, with `epochs` at 2.
QUICK: dict[str, dict[str, Any]] = {
    "note": {"capacity": 5, "every": 3},
    "cotta": {"views": 2, "threshold": 2.0, "restore_prob": 0.1},
    "vida": {"views": 2, "rank_high": 8},
    "petal": {"views": 2, "threshold": 2.0, "quantile": 0.1, "reg_weight": 1e-4},
    "becotta": {"blocks": 1, "restore_prob": 0.1, "optim": {"lr": 1e-3}},
    "psmt": {"quantile": 0.1, "fisher_images": 6, "fisher_batch": 4},
    "rotta": {"capacity": 25, "every": 3},
    "memo": {"views": 2},
    "sotta": {"capacity": 5, "every": 3, "threshold": 0.16},
    "adacontrast": {"queue_size": 9, "refine_from": 8, "neighbours": 2},
    "eta": {"margin": 0.9, "similarity": 2.0},
    "foa": {"prompts": 2, "population": 6, "source_images": 8},
    "eata": {"margin": 0.9, "similarity": 2.0, "fisher_batch": 3},
    "sar": {"margin": 0.9},
    "deyo": {"margin": 0.9, "drop": 0.0},
    "recap": {"margin": 9.0, "drop": 0.0, "recover_below": 0.0},
    "come_eata": {"margin": 0.9, "similarity": 2.0, "fisher_batch": 3},
    "come_sar": {"margin": 0.9},
    "shot": {"pseudo": 0.1},
    "simatta": {"clusters": 2, "max_updates": 2, "train_batch": 4, "keep_below": 1.5, "keep": 2},
    "rmt": {"warmup_images": 128},
    "lae": {"freeze_epochs": 1},
    "mos": {"align_epochs": 1, "align_samples": 8, "rank": 4},
    "er": {"capacity": 12, "replay_batch": 3},
    "der": {"capacity": 12, "replay_batch": 3},
    "derpp": {"capacity": 12, "replay_batch": 3},
    "adab2n": {"capacity": 12, "replay_batch": 3},
    "icarl": {"capacity": 20},
    "ser": {"capacity": 12, "replay_batch": 3},
    "hpcr": {"capacity": 12, "replay_batch": 3, "period": 4},
    "rogo": {"images": 8, "open_at": [1], "share": 0.5, "closeness": 0.1},
    "ease": {"rank": 4},
    "slca": {"align_epochs": 1, "align_samples": 8},
    "ssiat": {"align_epochs": 1, "align_samples": 8, "rank": 4, "epochs_later": 1},
    "aper": {"rank": 4},
    "ranpac": {"rank": 4, "projection": 32},
    "fecam": {"rank": 4},
    "fsa": {"lr": 0.001},
    "acil": {"lr": 0.01, "rise": 0, "projection": 32},
    "coda": {"pool": 12, "blocks": [0, 1]},
    "codyra": {"rank": 4, "levels": 2, "threshold": 0.3},
    "moram": {"rank": 4, "top_k": 4},
    "tuna": {"align_epochs": 1, "align_samples": 8, "rank": 4},
    "coil": {"capacity": 20, "refresh": 2},
    "sema": {"rank": 4, "hidden": 8, "expandable": 2, "threshold": 0.9, "sweep_batch": 3}
    | {"epochs_descriptor": 1},
}
# Further settings with a state of their own: case -> strategy, options, network.
VARIANTS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "bn_adapt-mixed": ("bn_adapt", {"statistics": "mixed"}, None),
    "bn_adapt-ema": ("bn_adapt", {"statistics": "ema"}, None),
    "tent-adam": ("tent", {"optim": {"kind": "adam"}, "mode": "eval", "steps": 2}, None),
    "tent-norm": ("tent", {"layers": "norm"}, "vit"),
    "cotta-adam": ("cotta", {"optim": {"kind": "adam"}, "loss": "ce", "gate": "sample"}, "vit"),
    "cotta-source": ("cotta", {"threshold": "source", "rng": "device"}, None),
    "petal-random": (
        "petal",
        {"restore": "random", "restore_prob": 0.1, "threshold": "source", "loss": "ce"},
        "vit",
    ),
    "becotta-legacy": ("becotta", {"router": "legacy", "noise": False, "blocks": 2}, None),
    "lsa-cotta": ("lsa", {"inner": strategy_node("cotta", **QUICK["cotta"])}, None),
    "psmt-augmented": (
        "psmt",
        {"augmented": True, "views": 2, "threshold": 2.0, "mode": "train", "rng": "device"},
        "vit",
    ),
    "rmt-sourcefree": (
        "rmt",
        {"replay_weight": 0.0, "warmup_images": 0, "optim": {"kind": "adam"}},
        "vit",
    ),
    "gtta-skip": ("gtta", {"on_empty": "skip", "steps": 2, "source_batch": 3}, "vit"),
    "vida-restore": ("vida", {"optim": {"kind": "adam"}, "restore_prob": 0.1}, None),
    "vida-adapters": ("vida", {"train_base": False, "rng": "device"}, None),
    "rotta-norm": ("rotta", {"layers": "norm", "optim": {"kind": "sgd"}}, "vit"),
    "ecotta-joint": ("ecotta", {"procedure": "joint", "optim": {"kind": "adam"}}, None),
    "eata-norm": (
        "eata",
        {"layers": "norm", "optim": {"kind": "adam"}, "steps": 2},
        "vit",
    ),
    "deyo-pixel": ("deyo", {"margin": None, "destroy": "pixel", "weight_entropy": None}, "vit"),
    "recap-all": ("recap", {"selection": "all", "recover_below": 2.0}, "vit"),
    "shot-extractor": (
        "shot",
        {"layers": "extractor", "batch_statistics": False, "labels": "confidence", "steps": 2},
        "vit",
    ),
    "sar-recovers": (
        "sar",
        {"recover_below": 3.0, "keep_average_on_recovery": True, "top": "position"},
        None,
    ),
    "finetune-resnet": ("finetune", {"loss_scope": "seen"}, "resnet"),
    "icarl-nme": ("icarl", {"memory": "per_class", "capacity": 2, "answer": "nme"}, "resnet"),
    "derpp-seen": (
        "derpp",
        {"loss_scope": "seen", "insertion": "balanced", "capacity": 12, "replay_batch": 3},
        "resnet",
    ),
    "hpcr-seen": (
        "hpcr",
        {"loss_scope": "seen", "pairs": "all", "capacity": 12, "replay_batch": 3},
        None,
    ),
    "ease-one": ("ease", {"sets": "one", "rank": 4}, None),
    "ease-adam": ("ease", {"use_init_ptm": True, "optim": {"kind": "adam"}}, None),
    "tuna-merged": (
        "tuna",
        {"universal": "merged", "orthogonality": 0.1, "shrink": "code", "statistics": "variance"},
        None,
    ),
    "mos-arrow": ("mos", {"router": "arrow"}, None),
    "mos-official": ("mos", {"mode": "official", "statistics": "variance"}, None),
    "slca-resnet": ("slca", {"final_norm": "pretrained", "statistics": "variance"}, "resnet"),
    "ssiat-unpaired": ("ssiat", {"shift_pairing": "unpaired", "statistics": "variance"}, None),
    "lae-lora": (
        "lae",
        {"adapter": "lae_lora", "freeze_epochs": 1, "ema_start": "init", "start": "lora_ga"},
        None,
    ),
    "lae-prefix": ("lae", {"adapter": "lae_prefix", "freeze_epochs": 1, "length": 3}, None),
    "ranpac-cosine": (
        "ranpac",
        {"adapter": None, "score": "cosine", "projection": 0, "epochs": 1},
        "resnet",
    ),
    "slda-stream": ("slda", {"base": "stream", "first_image": "skipped"}, None),
    "fsa-film": (
        "fsa",
        {"adapter": "fsa_film", "at": ["bn1:out", "layer*.*.bn*:out"], "epochs": 1},
        "resnet",
    ),
    "fecam-cnn": (
        "fecam",
        {"adapter": None, "unit_length": "after", "power": 0.5, "first_scores": "head"},
        "resnet",
    ),
    "fecam-common": ("fecam", {"epochs": 0, "spread": "common", "adapter": None}, None),
    "aper-finetune": ("aper", {"adapter": None}, "resnet"),
    "ewc-each": ("ewc", {"theta_star": "each", "gamma": 1.0}, "resnet"),
    "note-batch": ("note", {"statistics": "batch", "memory": "fifo", "epochs": 2}, None),
    "memo-batch": (
        "memo",
        {"marginal": "batch", "episodic": False, "steps": 2, "optim": {"kind": "adam"}},
        None,
    ),
    "unmix_tns-tent": ("unmix_tns", {"inner": strategy_node("tent")}, None),
    "unmix_tns-cotta": ("unmix_tns", {"inner": strategy_node("cotta", **QUICK["cotta"])}, None),
    "cllora-fresh": ("cllora", {"second_gradient": "fresh", "general": 1}, None),
    "sdlora-branches": ("sdlora", {"evaluation": "branches", "restart": False}, None),
    "l2p-alone": ("l2p", {"vote": None, "optim": {"clip": 1.0}}, None),
    "dualprompt-alone": ("dualprompt", {"vote": None, "pool": 2}, None),
    "dualprompt-reshaped": ("dualprompt", {"vote": None, "layout": "reshaped", "top_k": 2}, None),
    "coda-ortho": (
        "coda",
        {"pool": 12, "tasks": 6, "blocks": [1], "ortho": 0.5, "drop_last": False},
        None,
    ),
    "olora-merged": ("olora", {"evaluation": "branches", "lambda2": 0.1}, None),
}


# The rule around every method, and the methods that every other rule is tried around: one whose
# predictions depend on the batch, one with random numbers and two networks; of those that learn
# tasks one with a memory, one that copies weights.
RULE = "reset_every"
INSIDE = ("tent", "cotta", "er", "dualprompt")
RULES = [p.stem for p in sorted((CONF.parent / "around").glob("*.yaml"))]
# Settings with which a rule does something within a few batches.
QUICK_RULES: dict[str, dict[str, Any]] = {
    "reset_every": {"every": 2},
    "reset_on_collapse": {"below": 2.0, "ema": 0.5},
    "window": {"length": 3},
    "weight_average": {"decay": 0.9, "every": 2},
    "merge": {"rule": "dare_ties", "start": "last"},
    "rails": {"images": 4, "few": 3, "gate": 0.99},
}
# Kinds that a method refuses: O-LoRA sums the updates of all tasks; SAFT reads images before the
# training.
HEAD_ALONE = "linear_probe"
# On finetune, Tent and RanPAC, which are tried with every kind; or with one set, as LAE's.
DERIVED = (
    "l2",
    "ewc",
    "lwf",
    "come",
    "er",
    "der",
    "derpp",
    "ser",
    "fecam",
    "fsa",
    "acil",
    "ssiat",
    "tuna",
)
REFUSED = {
    ("olora", kind): "adds no product of two learned factors"
    for kind in (
        *("block_expansion", "dora", "dylora", "ether_plus", "film", "growing_ranks", "hra"),
        *("hydra", "ladder", "lora_mixture", "lori", "self_activated"),
        *("moslora", "neuroada", "nola", "oft", "paca", "prefix", "prompt", "rank_budget"),
        *("scale_shift", "sora", "tied_lora", "vera"),
    )
}
if find_spec("peft"):
    REFUSED["olora", "peft/vera"] = "adds no product of two learned factors"
for kind, other in (("saft", "neuroada"), ("lori_s", "lori")):
    REFUSED |= {(name, kind): f"use adapter={other}, or one" for name in ("mos", "olora", "tent")}


@dataclass(frozen=True)
class Case:
    """One method with its settings on one network.

    Args:
        node: the strategy's node, without nested strategies.
        rule: of conf/around, put around it.
    """

    name: str
    node: dict[str, Any] = field(hash=False)
    network: str
    rule: str = ""

    @property
    def kind(self) -> type[Strategy]:
        return locate(self.node["_target_"])

    @property
    def adapts(self) -> bool:
        return issubclass(self.kind, TTAStrategy)


def settings(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """A strategy's YAML as plain values, two epochs where it has any."""
    node = strategy_node(name, **options)
    for part in (node, *(v for v in node.values() if isinstance(v, dict))):
        part.update({k: 2 for k in ("epochs",) if k in part and k not in options})
    return node


def case_of(name: str, plain: dict[str, Any], network: str | None = None) -> Case:
    kind = locate(plain["_target_"])
    vit = issubclass(kind, CLStrategy) or kind.prefers == "vit" or "blocks" in kind.needs
    vit = vit and "batch_norm" not in kind.needs
    return Case(name, plain, network or ("vit" if vit else "resnet"))


def strategies() -> list[Case]:
    cases = [
        case_of(p.stem, settings(p.stem, QUICK.get(p.stem, {}))) for p in sorted(CONF.glob("*"))
    ]
    for name, (strategy, options, network) in VARIANTS.items():
        quick = {} if "adapter" in options else QUICK.get(strategy, {})
        cases.append(case_of(name, settings(strategy, quick | options), network))
    return cases


def with_other_kinds(cases: list[Case]) -> list[Case]:
    """Every method with adapters, with every kind that it takes and that no paper named."""
    methods = {p.stem for p in CONF.glob("*")}
    kinds = [p.stem for p in sorted((CONF.parent / "adapter").glob("*.yaml"))]
    kinds = [k for k in kinds if not {k, *k.split("_")} & methods]
    if find_spec("peft"):
        kinds += ["peft/lora", "peft/vera"]  # of their own in each layer, and shared by all layers
    many = []
    for case in cases:
        for kind in kinds if "adapter" in case.node and case.name in methods else ():
            quick = {k: v for k, v in QUICK.get(case.name, {}).items() if k != "rank"}
            node = settings(case.name, quick | {"adapter": kind})
            if (case.name, kind) in REFUSED or case.name == HEAD_ALONE:
                continue
            if kind == "lora" or case.name not in DERIVED:
                many.append(replace(case, name=f"{case.name}+{kind}", node=node, network="vit"))
    return many


def wrapped(cases: list[Case], rule: str = RULE) -> list[Case]:
    """The same methods, those of the rule's kind, with the rule around them."""
    adapts = issubclass(locate(rule_node(rule)["_target_"]), TTAStrategy)
    return [replace(c, name=f"{c.name}-in-{rule}", rule=rule) for c in cases if c.adapts == adapts]


PLAIN = strategies()
OF_FILES = [c for c in PLAIN if c.name in {p.stem for p in CONF.glob("*")}]
IN_RULES = [c for rule in RULES if rule != RULE for c in wrapped(OF_FILES, rule)]
IN_RULES = [c for c in IN_RULES if c.name.split("-")[0] in INSIDE]
IN_RULES = [c for c in IN_RULES if c.rule != "merge" or not c.kind.unmergeable]
CASES = PLAIN + wrapped(OF_FILES) + IN_RULES


def network(kind: str, *, confident: bool = True) -> Backbone:
    """Random weights with dropout before the head and random statistics of the source."""
    torch.manual_seed(3)
    extra = {"img_size": SIDES["vit"]} if kind == "vit" else {}
    net = timm.create_model(f"test_{kind}", num_classes=CLASSES, drop_rate=0.3, **extra)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    nn.init.normal_(net.get_classifier().weight, std=0.3 if confident else 1e-4)
    return Backbone(net, name=kind, tag=f"test_{kind}", input_size=SIDES[kind])


def images(case: Case, *sizes: int, seed: int = 5) -> list[Tensor]:
    side, g = SIDES[case.network], torch.Generator().manual_seed(seed)
    return [torch.rand(n, 3, side, side, generator=g) for n in sizes]


def batches_of(x: Tensor, y: Tensor, size: int, rows: Tensor | None = None) -> list[Batch]:
    rows = torch.arange(len(y)) if rows is None else rows
    parts = zip(x.split(size), y.split(size), rows.split(size), strict=True)
    return [Batch(a, b, c, torch.zeros_like(b)) for a, b, c in parts]


def source_images(case: Case) -> SourceImages:
    def batches(batch_size: int, *, epoch=None, start=0, augment="none") -> Iterator[Batch]:
        (x,) = images(case, 8, seed=9)
        yield from batches_of(x, torch.arange(8), batch_size)[start:]

    return SourceImages(8, "random images", "random", batches)


class NoProgress:
    """A preparation that is never interrupted."""

    def load(self) -> None:
        return None

    def save(self, state: Any) -> None:
        pass

    def say(self, text: str) -> None:
        pass


class AnyLabel(Oracle):
    """Sells whatever is asked for: a label that follows from the position."""

    left = 10**9
    _labels = torch.zeros(0)  # there is always a batch

    def __init__(self) -> None:
        super().__init__()
        del self._labels

    def _sell(self, positions: Sequence[int]) -> Tensor:
        return torch.tensor(positions) % CLASSES


def construct(case: Case, **options: Any) -> Strategy:
    net = network(case.network, **options)
    source = deepcopy(net) if case.rule == "rails" else None
    strategy = build(case.node, at="strategy", backbone=net, seed=0, num_classes=CLASSES)
    if not case.rule:
        return strategy
    node = rule_node(case.rule, **QUICK_RULES.get(case.rule, {}))
    return build(node, at=f"around.{case.rule}", inner=strategy, source=source)


@cache
def artefact(case: Case) -> dict[str, Tensor]:
    strategy = construct(case)
    assert isinstance(strategy, TTAStrategy)
    prepared = strategy.prepare(source_images(case), NoProgress())
    return {key: value.clone() for key, value in prepared.items()}


def in_turn(cases: list[Case]) -> set[str]:
    """Names of some of the cases METHOD+KIND: every method, and every kind."""
    methods: dict[str, list[Case]] = {}
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        method, _, kind = case.name.partition("+")
        methods.setdefault(method, []).append(case)
        kinds.setdefault(kind, []).append(case)
    names = {group[i % len(group)].name for i, group in enumerate(methods.values())}
    for i, group in enumerate(kinds.values()):
        if not any(case.name in names for case in group):
            names.add(group[i % len(group)].name)
    return names


KINDS = with_other_kinds(PLAIN)
KINDS_IN_TURN = in_turn(KINDS)
KNOWN: list[Case] = (
    CASES + KINDS + wrapped(PLAIN)
)  # also those of the tutorials and the broken ones


def make(case: Case, **options: Any) -> Any:
    """The method at the start of its stream, as the runner has it."""
    strategy = construct(case, **options)
    if isinstance(strategy, TTAStrategy):
        if strategy.preparation() is not None:
            strategy.use_prepared(artefact(case))
        if strategy.method.replays_source(case.node):
            strategy.use_source(source_images(case))
        if strategy.buys_labels:
            strategy.use_oracle(AnyLabel())
        strategy.begin_stream()
    torch.manual_seed(1)
    return strategy


# ------------------------------------------------------------------------------ a stream


def task(case: Case, index: int, classes: range, per_class: int = 4) -> Task:
    y = torch.arange(classes.start, classes.stop).repeat_interleave(per_class)
    (x,) = images(case, len(y), seed=20 + index)

    def train(epoch: int, start: int = 0, more: Any = None) -> Iterator[Batch]:
        rows, labels = torch.arange(len(y)), y
        if more is not None:  # images of other tasks; here some of this one stand for them
            rows, labels = torch.cat([rows, more[0] % len(y)]), torch.cat([labels, more[1]])
        order = torch.randperm(len(rows), generator=generator(7, "order", index, epoch))
        rows, labels = rows[order], labels[order]
        yield from batches_of(x[rows], labels, 5, rows)[start:]

    def fixed() -> Iterator[Batch]:
        yield from batches_of(x, y, 5)

    return Task(index, f"t{index}", classes, -(-len(y) // 5), train, fixed, fixed)


@cache
def tasks(name: str) -> list[Task]:
    """Three tasks of three, two and two classes, with short last batches."""
    case = next(c for c in KNOWN if c.name == name)
    return [
        task(case, i, classes) for i, classes in enumerate((range(3), range(3, 5), range(5, 7)))
    ]


SIZES = (4, 4, 3, 4)
SEGMENTS = (0, 2)  # batches at which one begins
Cursor = tuple[int, int, int, int]  # batch; or task, begun, epoch, step: as in core/runner.py
START: Cursor = (0, 0, 0, 0)


def drive(strategy: Any, case: Case, at: Cursor = START) -> Iterator[tuple[Cursor, Any]]:
    """What the runner does, from a cursor on: the next cursor and what came out, step by step."""
    if case.adapts:
        for i, x in enumerate(images(case, *SIZES)[at[0] :], at[0]):
            if i in SEGMENTS:
                strategy.begin_segment()
            yield (i + 1, 0, 0, 0), strategy.adapt(x)
        return
    first, begun, epoch, step = at
    for t in tasks(case.name)[first:]:
        if not begun:
            strategy.begin_task(t)
        for e in range(epoch, strategy.epochs):
            if step == 0:
                strategy.begin_epoch(t, e)
            for i, batch in enumerate(strategy.batches(t, e, step), step):
                yield (t.index, 1, e, i + 1), strategy.observe(batch)
            step = 0
        strategy.end_task(t)
        yield (t.index + 1, 0, 0, 0), strategy.predict(images(case, 4)[0])
        begun = epoch = 0


def run(strategy: Any, case: Case, steps: int | None = None) -> list[tuple[Cursor, Any]]:
    """The first `steps` steps of the stream."""
    rows = drive(strategy, case)
    return list(rows) if steps is None else [next(rows) for _ in range(steps)]


@dataclass
class Pass:
    """The whole stream of a method, with nothing in between that could change it.

    Args:
        strategy: the method at the end: to be asked, and not to be changed.
        weights: of the backbone, at the start.
        rows: cursors and results step by step, then what `end` gives.
        cuts: of each place to stop: steps before it, cursor, state, random numbers.
        modes: of a method that adapts, at the start and after every step.
        named: what `updated_parameters` named in some step (the first of an epoch), by id.
        scores: of the features that can be kept and of `predict`, where the runner evaluates.
    """

    strategy: Any
    weights: dict[str, Tensor]
    rows: list[tuple[Cursor, Any]] = field(default_factory=list)
    cuts: dict[str, tuple[int, Cursor, Any, Tensor]] = field(default_factory=dict)
    modes: list[Any] = field(default_factory=list)
    named: set[int] = field(default_factory=set)
    scores: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@lru_cache(maxsize=4)  # the properties of a case follow each other
def undisturbed(name: str) -> Pass:
    """One pass, of which many properties are read off."""
    case = next(c for c in KNOWN if c.name == name)
    strategy = make(case)
    record = Pass(strategy, deepcopy(strategy.backbone.state_dict()), modes=[modes(strategy)])
    for cursor, got in drive(strategy, case):
        record.rows.append((cursor, got))
        if case.adapts:
            record.modes.append(modes(strategy))
        if case.adapts or cursor[3] <= 1:
            record.named |= {id(p) for p in strategy.updated_parameters()}
        if place := cut(case, cursor):  # of a place that comes again, the last one stays
            state = deepcopy(strategy.snapshot()), torch.get_rng_state()
            record.cuts[place] = (len(record.rows), cursor, *state)
        if not (case.adapts or cursor[1]) and (names := list(strategy.extractors() or ())):
            (x,) = images(case, 4, seed=6)
            features = dict(zip(names, strategy.embed(x, names), strict=True))
            record.scores.append((strategy.classify(features), strategy.predict(x)))
    record.rows.append(((-1, 0, 0, 0), end(strategy, case)))
    return record


def cut(case: Case, cursor: Cursor) -> str:
    """The place where a run may stop that a cursor is at, if any."""
    if case.adapts:
        return f"batch {cursor[0]}" if cursor[0] in (1, 3) else ""
    if cursor[0] == 2:
        return "before the end of the last task"
    return {(0, 1, 0, 1): "within the first task", (1, 0, 0, 0): "between tasks"}.get(cursor, "")


def end(strategy: Any, case: Case) -> list[Any]:
    """What is compared of a method at the end of its stream."""
    names = {} if case.adapts else dict(strategy.extractors() or {})
    return [deepcopy(strategy.snapshot()), strategy.predict(images(case, 4)[0]), names]


def resumed(
    case: Case, state: dict[str, Any], cursor: Cursor, dice: Tensor, steps: int | None = None
) -> tuple[Any, list[Any]]:
    """A fresh object that goes on from `state`; what it gives, and its state at the end.

    Args:
        steps: after which it stops.
    """
    strategy = make(case)
    if not case.adapts:
        for t in tasks(case.name)[: cursor[0] + cursor[1]]:
            strategy.grow(t)
    return strategy, rest_of(strategy, case, state, cursor, dice, steps)


def rest_of(
    strategy: Any,
    case: Case,
    state: dict[str, Any],
    cursor: Cursor,
    dice: Tensor,
    steps: int | None = None,
) -> list[Any]:
    """What the object gives after `state` is put into it, and its state at the end."""
    strategy.restore(state)
    torch.set_rng_state(dice)
    rest = [row for _, row in islice(drive(strategy, case, cursor), steps)]
    return [*rest, end(strategy, case)]


def modes(strategy: nn.Module) -> list[tuple[bool, int]]:
    """Of every module: whether it trains, and how many hooks it has."""
    return [(m.training, len(m._forward_hooks)) for m in strategy.modules()]


def generators(strategy: nn.Module) -> dict[str, torch.Generator]:
    """Every generator that a module holds, by a name."""
    held: dict[str, torch.Generator] = {}
    for name, module in strategy.named_modules():
        values = vars(module) | getattr(module, "_generators", {})
        held |= {f"{name}.{k}": v for k, v in values.items() if isinstance(v, torch.Generator)}
    return held


def counted(strategy: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The counters of a method and of those inside it, as they are."""
    parts = [part for part in strategy.modules() if isinstance(part, TTAStrategy)]
    return [(part, {k: deepcopy(getattr(part, k)) for k in part.counters}) for part in parts]


# ------------------------------------------------------------------------------ properties


def predict_changes_nothing(case: Case) -> None:
    """State, modes, gradients and random numbers stay; the stream goes on as without it.

    Nor does it read generators and counters: see `core/reuse.py`.
    """
    want = [row for _, row in undisturbed(case.name).rows]
    strategy = make(case)
    start = counted(strategy)
    (x,) = images(case, 3, seed=6)
    for (cursor, got), expected in zip(drive(strategy, case), want, strict=False):
        assert equal(got, expected), f"another result at {cursor} after a prediction before it"
        if cursor[3] > 1 or (case.adapts and cursor[0] in range(2, len(SIZES))):
            continue  # within a task, within a stream: once is enough
        state, dice = deepcopy(strategy.snapshot()), torch.get_rng_state()
        trains, graded = modes(strategy), [p.grad is None for p in strategy.parameters()]
        scores = strategy.predict(x)
        assert not scores.requires_grad, "scores carry a graph"
        assert torch.equal(strategy.predict(x), scores), "a second prediction differs"
        assert equal(strategy.snapshot(), state), "the state changed"
        assert torch.equal(torch.get_rng_state(), dice), "random numbers were drawn"
        assert modes(strategy) == trains, "a mode or a hook was left behind"
        assert [p.grad is None for p in strategy.parameters()] == graded, "gradients were left"
    scores = strategy.predict(x)
    for rng in generators(strategy).values():
        rng.manual_seed(99)
    for part, counts in start:
        vars(part).update(counts)
    assert torch.equal(strategy.predict(x), scores), "it reads a generator or a counter"


def a_snapshot_is_the_whole_state(case: Case) -> None:
    """A fresh object with it, from a file, goes on bit by bit; so does an object put back.

    From each place to the next one, whose state is then compared, and from the last to the end.
    """
    record = undisturbed(case.name)
    cuts = list(record.cuts.items())
    for (place, (steps, cursor, state, dice)), (_, goal) in zip_longest(
        cuts, cuts[1:], fillvalue=("", None)
    ):
        rows = [row for _, row in record.rows[steps : goal and goal[0]]]
        want = [*rows, *goal[2:]] if goal else rows
        left = len(rows) if goal else None
        strategy, rest = resumed(case, copied(state), cursor, dice, left)
        assert equal(reached(rest, goal), want), f"resumed {place}: differs"
        if case.adapts and not goal:
            strategy.restore(deepcopy(state))
            assert equal(strategy.snapshot(), state), "restore is not the identity"
            rest = rest_of(strategy, case, deepcopy(state), cursor, dice, left)
            assert equal(reached(rest, goal), want), "put back in place: differs"


def reached(rest: list[Any], goal: Any) -> list[Any]:
    """Results and, at a place to stop, the state and the random numbers there."""
    return [*rest[:-1], rest[-1][0], torch.get_rng_state()] if goal else rest


def reset_and_the_same_stream_give_the_same(case: Case) -> None:
    """`reset` is the start of the stream; generators run on, so they are put back here."""
    if not case.adapts:
        return
    want = [row for _, row in undisturbed(case.name).rows[:-1]]
    strategy = make(case)
    start = {name: g.get_state() for name, g in generators(strategy).items()}
    run(strategy, case, 2)
    for steps in (len(want), 2):
        strategy.reset()
        for name, g in generators(strategy).items():
            g.set_state(start[name])
        torch.manual_seed(1)
        rows = [row for _, row in run(strategy, case, steps)]
        assert equal(rows, want[:steps]), "another stream after reset"


def frozen_weights_stay(case: Case) -> None:
    """What snapshots leave out is what a fresh object has; no weight of the backbone moves that
    `updated_parameters` does not name."""
    record, fresh = undisturbed(case.name), make(case)
    strategy = record.strategy
    if not case.adapts:
        for t in tasks(case.name):
            fresh.grow(t)
    now, start = strategy.state_dict(), fresh.state_dict()
    moved = [name for name in strategy.frozen() if not torch.equal(now[name], start[name])]
    assert not moved, f"frozen, but moved: {moved[:3]}"
    left_out = now.keys() - strategy.snapshot()["tensors"].keys()
    outside = {f"{name}." for name in strategy.strategies()}
    left_out = {n for n in left_out if not n.startswith(tuple(outside))}
    assert left_out <= strategy.frozen(), f"not saved: {sorted(left_out)[:3]}"
    for name, p in strategy.backbone.named_parameters():
        if id(p) not in record.named and name in record.weights:
            still = torch.equal(p, record.weights[name])
            assert still, f"{name} moved, but is no updated parameter"


def modes_are_put_back(case: Case) -> None:
    """A batch of the stream, `reset` and `restore` leave training modes and hooks as they were."""
    if not case.adapts:
        return
    start, *after = undisturbed(case.name).modes
    for number, now in enumerate(after, 1):
        assert now == start, f"after batch {number}"
    strategy = make(case)
    run(strategy, case, 1)
    strategy.restore(copied(strategy.snapshot()))
    strategy.reset()
    assert modes(strategy) == start, "after reset and restore"


def batching_of_test_images_is_no_matter(case: Case) -> None:
    """Scores of an image are the same alone, in a batch and in another order."""
    strategy = undisturbed(case.name).strategy
    if strategy.batch_dependent:
        return
    (x,) = images(case, 5, seed=6)
    whole = strategy.predict(x)
    single = torch.cat([strategy.predict(one[None]) for one in x])
    turned = strategy.predict(x.flip(0)).flip(0)
    for other in (single, turned):
        torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-5)


def odd_batches_are_taken(case: Case) -> None:
    """One image, a short batch, equal images, one class, nothing confident, a single-class task."""
    strategy = make(case)
    (x,) = images(case, 4)
    if not case.adapts:
        first, odd = tasks(case.name)[0], task(case, 1, range(3, 4), per_class=1)
        for t in (first, odd):
            strategy.begin_task(t)
            for epoch in range(strategy.epochs):
                strategy.begin_epoch(t, epoch)
                for batch in strategy.batches(t, epoch):
                    if len(batch.y) > 1 or case.network == "vit":  # BatchNorm wants two values
                        strategy.observe(batch)
            strategy.end_task(t)
        for batch in (x[:1], x, x[:1].expand(3, -1, -1, -1), torch.zeros_like(x)):
            scores = strategy.predict(batch)
            assert scores.shape == (len(batch), 4) and scores.isfinite().all()
        return
    odd = [x[:1], x, x[:1].expand(3, -1, -1, -1), x[:2], torch.zeros_like(x), x[:1]]
    for start in (strategy, make(case, confident=False)):
        for batch in odd:
            scores = start.adapt(batch)
            assert scores.shape == (len(batch), CLASSES) and not scores.requires_grad
            assert scores.isfinite().all() and start.predict(batch).shape == scores.shape


class Kill(BaseException):
    """As sudden as SIGKILL: nothing is saved on the way out."""


class Killer(Checkpointer):
    """Dies after `ticks` batches and ends of tasks."""

    ticks: int | None = None

    def tick(self, *args: Any, **cursor: int) -> None:
        super().tick(*args, **cursor)
        self.count()

    def save(self, *args: Any, **cursor: int) -> None:
        super().save(*args, **cursor)
        if cursor.get("begun") == 0:
            self.count()

    def count(self) -> None:
        if self.ticks is not None:
            self.ticks -= 1
            if self.ticks == 0:
                raise Kill


def through_the_runner(
    case: Case,
    folder: Path,
    ticks: int | None = None,
    labels: int = 0,
    budget: int | None = None,
    *,
    probed: bool = True,
) -> tuple[dict[str, Any], Any]:
    """Metrics and counts of a run in `folder` and its last state; a run that is there goes on.

    Args:
        ticks: batches after which the run is killed; then there are checkpoints between them.
        labels: added to every label of an adaptation stream.
        budget: labels that may be bought of it.
        probed: whether the stream has probes, which matter to metrics alone.
    """
    folder.mkdir(exist_ok=True)
    strategy, device = make(case), torch.device("cpu")
    log = RunLogger(folder, "tiny")
    checkpoint = Killer(log, Signals(), every=2 if ticks else 0, key="tiny")
    checkpoint.ticks = ticks
    context = Context(log, checkpoint, Console("tiny", mute=True), device)
    if not case.adapts:
        stream = TaskStream("tiny", CLASSES, tasks(case.name)[:2], {}, Skipped())
        result = run_tasks(strategy, stream, context)
    else:

        def batches(segment: int, start: int = 0) -> Iterator[Batch]:
            x = torch.cat(images(case, 4, 4, 3, seed=5 + segment))
            yield from batches_of(x, (torch.arange(len(x)) + labels) % CLASSES, 4)[start:]

        segments = [
            Segment(i, name, (i,), 11, 4, lambda start=0, i=i: batches(i, start))
            for i, name in enumerate(("fog", "snow"))
        ]
        probes = {i: lambda i=i: batches(i, 2) for i in range(2)} if probed else {}
        stream = ShiftStream(
            "tiny",
            CLASSES,
            ["fog", "snow"],
            segments,
            {},
            Skipped(),
            probes=probes,
            label_budget=budget,
        )
        result = run_shifts(strategy, stream, context)
    return result["metrics"] | result["method"], copied(strategy.snapshot())


@lru_cache(maxsize=4)
def to_its_end(name: str) -> tuple[dict[str, Any], Any]:
    """A run that nobody killed."""
    case = next(c for c in KNOWN if c.name == name)
    with tempfile.TemporaryDirectory() as folder:
        return through_the_runner(case, Path(folder))


def a_killed_run_goes_on(case: Case, folder: Path) -> None:
    """Metrics and state at the end are those of the run that nobody killed.

    A batch after the last checkpoint is lost with it: the third of six, or of the second task.
    """
    cursors = [] if case.adapts else [cursor for cursor, _ in undisturbed(case.name).rows]
    ticks = 3 if case.adapts else max(1, cursors.index((2, 0, 0, 0)) - 1)
    with pytest.raises(Kill):
        through_the_runner(case, folder, ticks)
    assert equal(list(through_the_runner(case, folder)), list(to_its_end(case.name)))


def labels_never_arrive(case: Case, folder: Path) -> None:
    """Other labels in the stream: the same method at its end, where it buys none of them."""
    if case.kind.buys_labels:
        ends = []
        for labels in (0, 3):
            place = folder / f"{labels}"
            ends.append(through_the_runner(case, place, labels=labels, budget=0, probed=False)[1])
        assert equal(*ends)
    elif case.adapts:
        other = through_the_runner(case, folder, labels=3, probed=False)
        assert equal(other[1], to_its_end(case.name)[1])


def kept_features_give_the_prediction(case: Case) -> None:
    """Where a method names extractors, `classify` of what `embed` gives is `predict`."""
    for classified, predicted in () if case.adapts else undisturbed(case.name).scores:
        torch.testing.assert_close(classified, predicted)


PROPERTIES: list[Callable[..., None]] = [
    predict_changes_nothing,
    a_snapshot_is_the_whole_state,
    reset_and_the_same_stream_give_the_same,
    frozen_weights_stay,
    modes_are_put_back,
    batching_of_test_images_is_no_matter,
    odd_batches_are_taken,
    a_killed_run_goes_on,
    labels_never_arrive,
    kept_features_give_the_prediction,
]


OF_KINDS = [  # properties that the kind of adapter can break
    a_snapshot_is_the_whole_state,
    reset_and_the_same_stream_give_the_same,
    frozen_weights_stay,
    modes_are_put_back,
    batching_of_test_images_is_no_matter,
    kept_features_give_the_prediction,
]
OF_EVERY_KIND = [a_snapshot_is_the_whole_state, frozen_weights_stay]  # those tried by default
OF_RULES = [  # properties that a rule can break; kills and all others are tried on INSIDE
    reset_and_the_same_stream_give_the_same,
    modes_are_put_back,
]
OF_TASK_RULES = [
    predict_changes_nothing,
    a_snapshot_is_the_whole_state,
    frozen_weights_stay,
    a_killed_run_goes_on,
]
KILLED = {*INSIDE, *(case.name for case in OF_FILES[::4])}
SHARED = [  # properties of which a method has every third one by default
    predict_changes_nothing,
    labels_never_arrive,
    odd_batches_are_taken,
    reset_and_the_same_stream_give_the_same,
]
EXEMPT = {  # what a method breaks on purpose
    ("mos-official", "predict_changes_nothing"): "the released code pulls in every forward pass",
}


def check(property_: Callable[..., None], case: Case, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = {"folder": folder} if "folder" in property_.__annotations__ else {}
        property_(case, **extra)


def trials() -> list[Any]:
    """Every case with every property that it is tried on; the quick tier takes plain methods."""
    rows = []
    for case in CASES:
        inside = case.name.split("-")[0]
        tried = PROPERTIES
        if case.rule and not case.adapts:
            tried = OF_TASK_RULES
        elif case.rule and inside != INSIDE[0]:
            tried = [*OF_RULES, a_killed_run_goes_on] if inside in INSIDE else OF_RULES
        elif case.name in VARIANTS:  # the runner treats a variant as it treats the method
            tried = [p for p in PROPERTIES if p not in (labels_never_arrive, a_killed_run_goes_on)]
        marks = [pytest.mark.slow] if case.rule or case.name in VARIANTS else []
        for p in tried:
            more = [pytest.mark.release] if not by_default(case, p) else []
            rows.append(pytest.param(case, p, id=f"{case.name}-{p.__name__}", marks=marks + more))
    return rows


def by_default(case: Case, property_: Callable[..., None]) -> bool:
    """Whether the pair is tried without `--all`: other pairs try the same code."""
    if case.name in VARIANTS:  # what it adds is state
        return property_ not in SHARED or (case.name, property_.__name__) in EXEMPT
    if not case.rule:  # a snapshot of each is tried; the runner treats all of a kind alike
        if property_ in SHARED:
            return (OF_FILES.index(case) + SHARED.index(property_)) % 3 == 0
        return property_ is not a_killed_run_goes_on or case.name in KILLED
    inside = case.name.split("-")[0]
    if not case.adapts or inside == INSIDE[0]:
        return True
    if property_ is a_killed_run_goes_on:
        return case.rule == RULE
    return case.rule != RULE or inside in INSIDE or "inner" in case.node  # methods in methods, too


@pytest.mark.parametrize(("case", "property_"), trials())
def test_contract(case, property_, tmp_path):
    if reason := EXEMPT.get((case.name, property_.__name__)):
        with pytest.raises(AssertionError):
            check(property_, case, tmp_path)
        pytest.skip(reason)
    check(property_, case, tmp_path)


def test_by_default_every_method_has_a_kind_in_turn_and_every_kind_a_method():
    pairs = [name.partition("+")[::2] for name in KINDS_IN_TURN]
    every = [case.name.partition("+")[::2] for case in KINDS]
    assert {method for method, _ in pairs} == {method for method, _ in every}
    assert {kind for _, kind in pairs} == {kind for _, kind in every}
    assert len(pairs) < len(every) / 2


def test_by_default_no_method_no_property_and_no_rule_is_left_out():
    tried = {
        (case.name, case.rule, property_)
        for case, property_ in (
            row.values for row in trials() if pytest.mark.release not in row.marks
        )
    }
    for case in OF_FILES:
        properties = {p for name, _, p in tried if name == case.name}
        assert {*PROPERTIES} - {*SHARED, a_killed_run_goes_on} <= properties, case.name
        assert properties & {*SHARED}, case.name
    for p in (*SHARED, a_killed_run_goes_on):
        assert sum((c.name, "", p) in tried for c in OF_FILES) >= len(OF_FILES) / 4, p
    assert {(n, "", a_snapshot_is_the_whole_state) for n in VARIANTS} <= tried
    for rule in RULES:
        properties = {p for _, held, p in tried if held == rule}
        assert properties >= set(OF_TASK_RULES), rule


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "property_"),
    [
        pytest.param(c, p, id=f"{c.name}-{p.__name__}", marks=[pytest.mark.release] * more)
        for c in KINDS
        for p in OF_KINDS
        for more in [c.name not in KINDS_IN_TURN or p not in OF_EVERY_KIND]
    ],
)
def test_contract_with_another_kind_of_adapter(case, property_, tmp_path):
    check(property_, case, tmp_path)


@pytest.mark.parametrize("name", ["finetune", "tent"])
def test_an_adapter_learns_in_place_of_the_network(name):
    case = next(c for c in KINDS if c.name == f"{name}+lora")
    strategy = make(case)
    run(strategy, case, 1)
    learned = {id(p) for p in strategy.updated_parameters()}
    head = [] if case.adapts else strategy.head.parameters()
    assert learned == {id(p) for p in (*strategy.bank.parameters_of("tuned"), *head)}
    assert case.kind.preferred_backbone(case.node) == "vit"
    assert case.kind.preferred_backbone(case.node | {"adapter": None}) is None


@pytest.mark.parametrize(("name", "kind"), sorted(REFUSED))
def test_a_kind_that_makes_no_sense_is_refused_with_the_reason(name, kind):
    with pytest.raises(UserError, match=REFUSED[name, kind]):
        construct(case_of(name, settings(name, {"adapter": kind})))


def test_a_head_that_learns_alone_takes_no_adapter():
    with pytest.raises(UserError, match="learns the head alone"):
        construct(case_of(HEAD_ALONE, settings(HEAD_ALONE, {"adapter": "lora"})))


# ------------------------------------------------------------------------------ another process


def resume_all(path: Path) -> None:
    """What the other process does: one step more from every state in the file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rests = {}
    by_name = {case.name: case for case in CASES}
    for name, (state, cursor, dice) in torch.load(path, weights_only=True).items():
        rests[name] = resumed(by_name[name], state, tuple(cursor), dice, 1)[1]
    torch.save(rests, path)


SHARES = 6


@pytest.mark.slow
@pytest.mark.one_in(SHARES)
@pytest.mark.parametrize("share", range(SHARES))
def test_a_fresh_process_goes_on_bit_by_bit(tmp_path, share):
    """From the third batch, or within the second task; every sixth method."""
    saved, want, path = {}, {}, tmp_path / "states.pt"
    for case in OF_FILES[share::SHARES]:
        strategy = make(case)
        rows = drive(strategy, case)
        before = (3,) if case.adapts else (1, 1)
        cursor = next(cursor for cursor, _ in rows if cursor >= before)
        saved[case.name] = [copied(strategy.snapshot()), list(cursor), torch.get_rng_state()]
        want[case.name] = [next(rows)[1], end(strategy, case)]
    torch.save(saved, path)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, __file__, str(path)], cwd=ROOT, env=env, check=True)
    rests = torch.load(path, weights_only=True)
    for name, rows in want.items():
        assert equal(rests[name], rows), name


# ------------------------------------------------------------------------------ rules


@pytest.mark.slow
@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", wrapped(PLAIN), ids=lambda c: c.name)
def test_a_rule_costs_what_the_method_inside_costs(case):
    plain, rule = make(replace(case, rule="")), make(case)
    assert rule.method is rule.inner and rule.backbone is rule.inner.backbone
    for strategy in (plain, rule):
        torch.manual_seed(1)
        for x in images(case, 4, 4):
            strategy.adapt(x)
    names = [
        sorted(n for n, p in s.named_parameters() if id(p) in ids)
        for s, ids in ((s, {id(p) for p in s.updated_parameters()}) for s in (plain, rule.inner))
    ]
    assert names[0] == names[1]
    assert {id(p) for p in rule.updated_parameters()} == {
        id(p) for p in rule.inner.updated_parameters()
    }
    assert state_bytes(rule) == state_bytes(plain)
    assert rule.report() == plain.report()
    for fact in FACTS:
        assert getattr(rule, fact) == getattr(plain, fact)


def test_a_rule_resets_before_the_batch_after_every_n():
    case = next(c for c in CASES if c.name == "cotta-in-reset_every")
    rule, plain = make(case), make(replace(case, rule=""))
    for i, x in enumerate(images(case, 4, 4, 4, 4, 4)):
        if i in (2, 4):
            plain.reset()
        torch.manual_seed(i)
        scores = rule.adapt(x)
        torch.manual_seed(i)
        assert torch.equal(scores, plain.adapt(x))


# ------------------------------------------------------------------------------ tutorials


def taught(page: str, code: str, settings_: str) -> Case:
    """The method of a tutorial, from its text."""
    text = (ROOT / "docs" / "tutorials" / page).read_text()
    blocks = dict(re.findall(r"```(?:python|yaml)\n# ([\w/]+\.\w+)\n(.*?)```", text, re.S))
    name = "driftline." + code.removesuffix(".py").replace("/", ".")
    module = types.ModuleType(name)
    exec(compile(blocks[code], code, "exec"), module.__dict__)
    sys.modules.setdefault(name, module)
    return case_of(f"tutorial-{Path(code).stem}", yaml.safe_load(blocks[settings_]))


TAUGHT = [
    taught("tta_method.md", "tta/class_bias.py", "conf/strategy/class_bias.yaml"),
    taught("cl_method.md", "cl/ridge.py", "conf/strategy/ridge.yaml"),
]
TAUGHT += wrapped(TAUGHT)


def fixture(kind: type) -> Case:
    """A method of broken_methods.py, or a rule of it around `Sound`, as `build` accepts it."""
    module = types.ModuleType(f"driftline.tta.fixture_{kind.__name__}")
    setattr(module, kind.__name__, kind)
    sys.modules[module.__name__] = module
    node: dict[str, Any] = {"_target_": f"{module.__name__}.{kind.__name__}"}
    if issubclass(kind, Wrapper):
        node["inner"] = fixture(broken_methods.Sound).node
    return case_of(kind.__name__, node)


SOUND = [fixture(kind) for kind in broken_methods.SOUND]
SOUND += [case for rule in RULES for case in wrapped(SOUND[:1], rule)] + wrapped(SOUND[1:])
KNOWN += [*TAUGHT, *SOUND]


@pytest.mark.parametrize(
    ("case", "property_"),
    [
        pytest.param(c, p, id=f"{c.name}-{p.__name__}", marks=[pytest.mark.release] * more)
        for c in (*TAUGHT, *SOUND)
        for p in PROPERTIES
        for more in [bool(c.rule) and p not in OF_RULES]
    ],
)
def test_a_method_written_as_the_tutorial_teaches_keeps_the_contract(case, property_, tmp_path):
    check(property_, case, tmp_path)


# ------------------------------------------------------------------------------ broken methods

BROKEN = [(fixture(kind), name) for kind, names in broken_methods.BROKEN.items() for name in names]
KNOWN += [case for case, _ in BROKEN]


@pytest.mark.parametrize(("case", "name"), BROKEN, ids=[f"{c.name}-{n}" for c, n in BROKEN])
def test_a_broken_method_fails(case, name, tmp_path):
    (broken,) = [p for p in PROPERTIES if p.__name__ == name]
    make(case)  # it can be built: what fails is the property
    with pytest.raises((AssertionError, UserError, RuntimeError)):
        check(broken, case, tmp_path)


def test_every_property_has_a_method_that_breaks_it():
    assert {name for _, name in BROKEN} == {p.__name__ for p in PROPERTIES}


if __name__ == "__main__":
    resume_all(Path(sys.argv[1]))
