"""Driftline as a library.

    import driftline

    method = driftline.make("cotta", net, lr=1e-3)          # any strategy around any classifier
    scores = method.adapt(images)                           # [B, C], images [B, 3, H, W] in [0, 1]
    summary = driftline.run(["strategy=cotta", "scenario=cifar10_c"])
    frame = driftline.load_runs("results")                  # a row a run, as a pandas table

In a checkout the packages (`driftline.core`, `driftline.tta`, ...) are the folders beside this one,
in an installed wheel they lie inside it. Importing this file alone needs no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from driftline.runs.library import load_runs, make, run

    __version__: str

__all__ = ["__version__", "load_runs", "make", "run"]

_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "run.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'driftline' has no attribute {name!r}")
    if name == "__version__":
        from driftline.core.provenance import version

        return version()
    from driftline.runs import library

    return getattr(library, name)
