"""What would end runs before they have begun, found before any of them starts."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from driftline.core.build import build, nodes
from driftline.core.errors import UserError
from driftline.core.paths import nearest_existing
from driftline.runs.compose import check_kind, complete, make_stream
from driftline.runs.machine import set_up
from driftline.runs.schema import check_settings
from driftline.streams.pipelines import Geometry

ROOM = 1.0  # GiB that results need at least
PACKAGES = {  # start of a target -> package, and the extra that it is in
    "driftline.tta.foa.": ("cma", "foa"),
    "driftline.parts.adapters.peft.": ("peft", "peft"),
}


def problems(runs: Iterable[tuple[str, DictConfig]]) -> list[str]:
    """One line a problem: settings, device, results folder, packages, data, weights.

    Data sets are opened and networks are built, each once, so that this takes seconds and not
    hours; nothing is written but what the runs would load anyway.

    Args:
        runs: name and composed configuration of each.
    """
    lines: dict[str, list[str]] = {}  # problem -> runs that have it
    answers: dict[str, str | None] = {}  # what was tried -> what was wrong

    def look(name: str, what: str, trial: Callable[[], object]) -> bool:
        """Whether a trial, made once for all runs that it is the same for, passes."""
        if what not in answers:
            try:
                trial()
                answers[what] = None
            except UserError as error:
                answers[what] = str(error)
        if (text := answers[what]) is not None:
            lines.setdefault(text, []).append(name)
        return answers[what] is None

    for name, cfg in runs:
        if not look(name, f"settings {_text(cfg)}", lambda cfg=cfg: check_settings(cfg)):
            continue
        try:
            cfg = complete(cfg)
        except UserError as error:
            lines.setdefault(str(error), []).append(name)
            continue
        look(name, f"root {cfg.root}", lambda cfg=cfg: check_folder(Path(cfg.root)))
        for kind in {node._target_ for node in nodes(cfg.strategy)}:
            look(name, f"package {kind}", lambda kind=kind: _check_package(kind))
        if look(name, f"device {cfg.runtime.device}", lambda cfg=cfg: set_up(cfg)):
            what = f"data {_text(cfg.scenario)} {cfg.data.root} {cfg.strategy._target_}"
            look(name, what, lambda cfg=cfg: _open(cfg))
        look(name, f"weights {_text(cfg.backbone)}", lambda cfg=cfg: _build(cfg))
    return [f"{text} ({_names(names)})" for text, names in lines.items()]


def check_folder(root: Path) -> None:
    """That results can be written below `root`, which need not be there yet.

    Raises:
        UserError: if not, or if there is hardly room.
    """
    there = nearest_existing(root)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is not writable" if there.is_dir() else "is a file"
        raise UserError(f"root={root}: {there} {what}; choose another folder with root=...")
    if (free := shutil.disk_usage(there).free / 2**30) < ROOM:
        raise UserError(
            f"root={root}: {free:.1f} GiB free at {there}; free some space, or choose another "
            "folder with root=..."
        )


def _text(node: DictConfig) -> str:
    plain: Any = OmegaConf.to_container(node, resolve=False)
    return json.dumps(plain, sort_keys=True, default=str)


def _names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} rows: {names[0]} ... {names[-1]}"


def _check_package(kind: str) -> None:
    for start, (package, extra) in PACKAGES.items():
        if kind.startswith(start) and importlib.util.find_spec(package) is None:
            raise UserError(f'{kind} needs the package {package}: pip install -e ".[{extra}]"')


def _open(cfg: DictConfig) -> None:
    stream = make_stream(cfg, Geometry(), set_up(cfg))
    check_kind(cfg, stream)


def _build(cfg: DictConfig) -> None:
    build(cfg.backbone, at="backbone")
