"""What torchrun tells its processes through the environment; needs no torch."""

from __future__ import annotations

import os


def requested() -> int:
    """Processes that were started for this run, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def speaks() -> bool:
    """Until they have met, the processes of a machine fail alike: whether this one says so."""
    return requested() == 1 or os.environ.get("LOCAL_RANK", os.environ["RANK"]) == "0"
