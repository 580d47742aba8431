"""Which settings make a run another one; needs no torch."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Keys that cannot change a number; everything else is part of a run's identity.
VOLATILE = ("logger", "runtime", "root", "stage", "on_exists", "checkpoint", "reference", "sweep")
VOLATILE_DATA = ("root", "cache")


# Options younger than the runs that lie about: where one has the value that all earlier runs had
# without it, it does not count, so that their folders are still the ones of the same command.
# `_target_` of a node ("" for the top level) -> option -> that value.
SINCE: dict[str, dict[str, Any]] = {}
OURS = "driftline."  # before our targets, which had no such prefix at first


def identity(cfg: DictConfig, *facts: str) -> str:
    """First 8 hex digits of SHA-256 over the resolved configuration without volatile keys.

    Args:
        facts: what the configuration names but does not hold: data and checkpoint hashes.

    An option of `SINCE` with its value of old does not count. The code of the method does not
    enter either: it is compared with that of the folder, see `core/provenance.py`.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    for key in VOLATILE:
        plain.pop(key, None)
    for key in VOLATILE_DATA:
        plain["data"].pop(key, None)
    text = json.dumps([_as_before(plain), *facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _as_before(node: Any) -> Any:
    """The node, and all nodes in it, without the options of `SINCE` that have their old value."""
    if isinstance(node, list):
        return [_as_before(one) for one in node]
    if not isinstance(node, dict):
        return node
    young = SINCE.get(node.get("_target_", ""), {})
    before = {k: _as_before(v) for k, v in node.items() if k not in young or v != young[k]}
    if "_target_" in before:
        before["_target_"] = before["_target_"].removeprefix(OURS)
    return before
