"""Driftline as a library.

    import driftline

    method = driftline.make("cotta", net, lr=1e-3)          # any strategy around any classifier
    scores = method.adapt(images)                           # [B, C], images [B, 3, H, W] in [0, 1]
    driftline.save(method, "adapted.safetensors")           # and driftline.load
    net.load_state_dict(driftline.export(method, images))   # of a fresh network
    summary = driftline.run(["strategy=cotta", "scenario=cifar10_c"])
    frame = driftline.load_runs("results")                  # a row a run, as a pandas table

In a checkout the packages (`driftline.core`, `driftline.tta`, ...) are the folders beside this one,
in an installed wheel they lie inside it. Importing this file alone needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from driftline.runs.export import export, export_onnx
    from driftline.runs.library import learn, load_runs, make, prepare, run
    from driftline.runs.saving import load, save
    from driftline.streams.own import tasks

    __version__: str

_PLACES = {  # of what is imported when it is asked for
    "driftline.runs.library": ("learn", "load_runs", "make", "prepare", "run"),
    "driftline.runs.saving": ("load", "save"),
    "driftline.runs.export": ("export", "export_onnx"),
    "driftline.streams.own": ("tasks",),
}

__all__ = [
    "__version__", "export", "export_onnx", "learn", "load", "load_runs", "make", "prepare", "run",
    "save", "tasks",
]  # fmt: skip

_checkout = Path(__file__).resolve().parents[1]
if (_checkout / "run.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from driftline.core.provenance import version

        return version()
    place = next((module for module, names in _PLACES.items() if name in names), None)
    if place is None:
        raise AttributeError(f"module 'driftline' has no attribute {name!r}")
    return getattr(import_module(place), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
