"""Which settings make a run another one; needs no torch."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

# Keys that cannot change a number; everything else is part of a run's identity.
VOLATILE = ("logger", "runtime", "root", "stage", "on_exists", "checkpoint", "reference", "sweep")
VOLATILE_DATA = ("root", "cache")


def identity(cfg: DictConfig, *facts: str) -> str:
    """First 8 hex digits of SHA-256 over the resolved configuration without volatile keys.

    Args:
        facts: what the configuration names but does not hold: data and checkpoint hashes.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    for key in VOLATILE:
        plain.pop(key, None)
    for key in VOLATILE_DATA:
        plain["data"].pop(key, None)
    text = json.dumps([plain, *facts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
