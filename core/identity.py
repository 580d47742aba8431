"""Which settings make a run another one, and how its method is called; needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Keys that cannot change a number; everything else is part of a run's identity.
VOLATILE = ("logger", "runtime", "root", "stage", "on_exists", "checkpoint", "reference", "sweep")
VOLATILE_DATA = ("root", "cache")


# Options younger than the runs that lie about: where one has the value that all earlier runs had
# without it, it does not count, so that their folders are still the ones of the same command.
# `_target_` of a node ("" for the top level) -> option -> that value.
OURS = "driftline."  # before our targets, which had no such prefix at first
SINCE: dict[str, dict[str, Any]] = {
    "": {"around": [], "guard": "warn"},
    "driftline.backbones.load.timm_backbone": {"checkpoint_key": None},
    "driftline.backbones.load.torchvision_backbone": {"checkpoint_key": None},
    "driftline.backbones.load.robustbench_backbone": {"checkpoint_key": None},
    "driftline.cl.ease.Ease": {"sets": "each"},
    "driftline.cl.finetune.Finetune": {"adapter": None},
    "driftline.cl.mos.Mos": {"router": "refined"},
    "driftline.cl.tuna.Tuna": {"router": "entropy"},
    "driftline.parts.adapters.plan.Plan": {"start": None, "start_batches": 8},
    "driftline.tta.tent.Tent": {"adapter": None},
    "driftline.streams.shifts.corruption_stream": {
        "probe_cells": "metrics",  # the cells of earlier runs are all there are
        "label_budget": None,
        "label_delay": 0,
        "unknown_share": 0.0,
        "unknown_from": None,
        "stay": 0.95,
        "burst_share": 0.5,
        "burst_length": 10,
    },
    "driftline.streams.pairs.pair_stream": {"label_budget": None, "label_delay": 0},
    "driftline.streams.domain_incremental.domain_stream": {"test_batches": "mixed"},
    "driftline.streams.class_incremental.split_stream": {
        "test_batches": "mixed",
        "order": "increment",
        "tasks": 10,
        "skew": 0,
        "first": 0.2,
        "zipf": 1.0,
        "task_images": 500,
        "disjoint": 0.5,
        "blurry": 0.1,
        "evaluate_every": None,
        "corruptions": None,
        "severity": 5,
        "corrupt_test": "same",
        "corruption_seed": 0,
    },
}
# Options that are gone, with the value at which a run of then is a run of now.
UNTIL: dict[str, dict[str, Any]] = {
    "": {"on_nan": "stop"},
    "driftline.streams.shifts.corruption_stream": {"reset": "never", "window": None},
    "driftline.streams.pairs.pair_stream": {"reset": "never"},
}


def identity(cfg: DictConfig, *facts: str, with_seed: bool = True) -> str:
    """First 8 hex digits of SHA-256 over the resolved configuration without volatile keys.

    Args:
        facts: what the configuration names but does not hold: data and checkpoint hashes.
        with_seed: False leaves `seed` itself out, not what other settings have taken from it
            (`scenario.order_seed=${seed}`), and gives 16 digits.

    Options of `SINCE` with their value of old do not count, those of `UNTIL` still do. The code of
    the method does not enter: it is compared with that of the folder, see `core/provenance.py`.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    for key in VOLATILE if with_seed else (*VOLATILE, "seed"):
        plain.pop(key, None)
    for key in VOLATILE_DATA:
        plain["data"].pop(key, None)
    plain["around"] = [list(rule) for rule in plain["around"].items()]  # their order counts
    text = json.dumps([_as_before(plain, ""), *facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[: 8 if with_seed else 16]


def method_name(strategy: str, around: Sequence[str]) -> str:
    """How a method is called in tables and plots: `tent`, `tent (around=[window,rollback])`."""
    return f"{strategy} ({rules})" if (rules := typed_rules(around)) else strategy


def method_folder(strategy: str, around: Sequence[str]) -> str:
    """How a method is called in paths and in names of runs: `tent`, `tent+window+rollback`."""
    return "+".join([strategy, *around])


def typed_rules(around: Sequence[str]) -> str:
    """The rules around a method as they are typed, `around=window`; empty without one."""
    names = ",".join(around)
    return f"around=[{names}]" if len(around) > 1 else names and f"around={names}"


def _as_before(node: Any, kind: str = "other") -> Any:
    """The node, and all nodes in it, as they were when the oldest runs were made.

    Args:
        kind: where the node has no `_target_`: its key in the two tables; `other` is in none.
    """
    if isinstance(node, list):
        return [_as_before(one) for one in node]
    if not isinstance(node, dict):
        return node
    kind = node.get("_target_", kind)
    young = SINCE.get(kind, {})
    before = {k: _as_before(v) for k, v in node.items() if k not in young or v != young[k]}
    if "_target_" in before:
        before["_target_"] = before["_target_"].removeprefix(OURS)
    return UNTIL.get(kind, {}) | before
