"""Random numbers: one generator per purpose, each a pure function of the run's seed and a path."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from driftline.core import distributed


def derive(seed: int, *path: str | int) -> int:
    """A 63-bit seed that depends on `seed` and every element of `path`, stable across processes."""
    text = "/".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *path: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for one purpose, for example `generator(seed, "shuffle", task, epoch)`."""
    rng = torch.Generator(device=device)
    rng.manual_seed(derive(seed, *path))
    return rng


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of every global generator, as tensors and plain values (`weights_only`-loadable)."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, pos, has_gauss, cached = legacy
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), pos, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def standing() -> tuple[Any, ...]:
    """The global generators as they stand, to be compared."""
    legacy: Any = np.random.get_state(legacy=True)
    _, keys, *rest = legacy
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    states = [torch.get_rng_state(), *cuda]
    return random.getstate(), keys.tobytes(), rest, [s.numpy().tobytes() for s in states]


class Draws:
    """Whether a number was drawn from a global generator since `seed_all`.

    As long as none was, all of them stand as they were seeded. What draws and puts them back has to
    be followed by `look` in between.

    Args:
        seed: that they were seeded with.
    """

    def __init__(self, seed: int) -> None:
        now = rng_state()
        seed_all(seed)
        self._seeded, self.drawn = standing(), False
        set_rng_state(now)
        self.look()

    def look(self) -> bool:
        """Whether something has drawn by now."""
        self.drawn = self.drawn or standing() != self._seeded
        return self.drawn

    def snapshot(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.drawn = state["drawn"]


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of `rng_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, pos, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), pos, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        if distributed.size() > 1:  # all draw alike, each on a device of its own
            torch.cuda.set_rng_state(state["cuda"][0])
        else:
            torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
