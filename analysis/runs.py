"""Runs, finished or not, as pandas tables: one row a run, a batch, an experience, a cell of R.

    runs = load_runs("results")    # columns: state, scenario, strategy, seed, metrics.*, ...
    done = select(runs)            # the finished ones; runs of one `method` may be averaged
    cells = load_matrix(done[done.strategy == "ease"])

Everything a run wrote is kept, nested keys joined by dots; what a run did not write is NaN. Folder
names are never parsed. Labels such as `[embedded]` are part of the column `scenario`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from core.errors import UserError

MARKERS = {"summary.json", "config.yaml", "environment.json", "failure.txt"}
IDENTITY = ("scenario", "strategy", "backbone", "seed")
PLACE = ["scenario", "backbone", "stream"]  # what is never averaged over, nor ranked across
AVERAGE = ("scenario.order_seed",)  # settings that are repetitions, as the seed is
# Keys of a configuration that no number depends on (core.record.VOLATILE; importing it would take
# seconds, for torch), names, and the record of a search.
VOLATILE = ("logger", "runtime", "root", "stage", "on_exists", "checkpoint", "reference", "sweep")
NO_SETTING = (*VOLATILE, "data.root", "data.cache", "seed", "tuned")
NO_SETTING += tuple(f"{group}.{key}" for group in IDENTITY[:3] for key in ("name", "label"))
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def load_runs(*roots: str | Path) -> pd.DataFrame:
    """All runs under some folders, one row each, in the order of their paths.

    Columns: `path`; `state` (done, failed, unfinished, unreadable) and `problem`, its reason;
    scenario, strategy, backbone, seed, key, git, time, device; then what the files hold: metrics.*,
    cost.*, data.*, weights.*, source.*, reference (list), ... of summary.json, environment.*,
    config.*. A list in a file is a list in its cell.

    Raises:
        UserError: if a folder does not exist or none holds a run.
    """
    found = {place: files for root in roots for place, files in _folders(Path(root))}
    if not found:
        places = " or ".join(map(str, roots))
        raise UserError(f"no run under {places}; make one with python run.py root={roots[0]}")
    rows = [_row(place, files) for place, files in found.items()]
    settings = [{k: row.pop(k) for k in list(row) if k.startswith("config.")} for row in rows]
    # As objects, so that an integer beside a missing value stays an integer.
    frame = pd.concat([pd.DataFrame(rows), pd.DataFrame(settings, dtype=object)], axis=1)
    return frame.astype({"seed": "Int64"})


def _folders(root: Path) -> list[tuple[Path, set[str]]]:
    """Run folders and their files; a folder with nothing but a lock was killed while starting."""
    if not root.is_dir():
        raise UserError(f"no folder {root}; give one that runs were written to")
    found = []
    for place, below, files in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        if Path(place) == root and "example" in below:
            below.remove("example")  # committed runs are nobody's results; they are asked for
        if MARKERS & set(files) or (".lock" in files and not below):
            found.append((Path(place), set(files)))
    return found


def _row(folder: Path, files: set[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"path": str(folder), "state": "unfinished", "problem": None}
    row |= dict.fromkeys((*IDENTITY, "key", "git", "time", "device"))
    row |= dict.fromkeys(("weights.tag", "weights.hash", "data.fingerprint"))
    try:
        config = _read(folder / "config.yaml") if "config.yaml" in files else {}
        environment = _read(folder / "environment.json") if "environment.json" in files else {}
        summary = _read(folder / "summary.json") if "summary.json" in files else {}
        metrics = summary.get("metrics")
        if "summary.json" in files and not (config and metrics and isinstance(metrics, dict)):
            raise ValueError("summary.json without config.yaml or metrics")
    except (ValueError, yaml.YAMLError, OSError) as error:
        reason = str(error).split("\n")[0]
        told = f"{reason} (delete the folder and run it again)"
        return row | {"state": "unreadable", "problem": told}
    if summary:
        row["state"] = "done"
    elif "failure.txt" in files:
        row["state"] = "failed"
        lines = (folder / "failure.txt").read_text(errors="replace").splitlines()
        row["problem"] = next((line for line in reversed(lines) if line.strip()), "no message")
    else:
        row["problem"] = "stopped before its end; the same command continues it"
    about = summary.pop("run", None) or environment or _named_in(config)
    row |= {name: about.get(name) for name in (*IDENTITY, "key")}
    row["git"] = about["git"].get("commit") if "packages" in about else about.get("git")
    row |= {name: environment.get(name) for name in ("time", "device")}
    for name, node in (("", summary), ("environment.", environment), ("config.", config)):
        _flatten(node, name, row)
    return row


def _named_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """Identity of a run that was stopped between its first files."""
    parts = {k: config.get(k) or {} for k in ("scenario", "strategy", "backbone")}
    return {
        "scenario": parts["scenario"].get("label"),
        "strategy": parts["strategy"].get("name"),
        "backbone": parts["backbone"].get("name"),
        "seed": config.get("seed"),
    }


def _flatten(node: Mapping[str, Any], prefix: str, row: dict[str, Any]) -> None:
    for key, value in node.items():
        if isinstance(value, dict):
            _flatten(value, f"{prefix}{key}.", row)
        else:
            row[f"{prefix}{key}"] = value


def _read(path: Path) -> dict[str, Any]:
    """A JSON or YAML file that holds a mapping."""
    text = path.read_text()
    try:
        found = read_config(text) if path.suffix == ".yaml" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is damaged: it holds no mapping")
    return found


def read_config(text: str) -> dict[str, Any]:
    """A stored configuration as nested dictionaries, which must not be changed.

    Equal to parsing the whole text and 20 times as fast: a top-level block of resolved YAML means
    the same wherever it stands, and the runs of a sweep share most of their blocks.
    """
    config: dict[str, Any] = {}
    for block in re.split(r"\n(?=[^\s\-#])", text):
        config |= _parsed(block)
    return config


@functools.lru_cache(maxsize=4096)
def _parsed(block: str) -> dict[str, Any]:
    found = yaml.load(block, Loader) or {}
    if not isinstance(found, dict):
        raise ValueError("it holds no mapping")
    return found


# ------------------------------------------------------------------------------ rows of runs


def load_batches(runs: pd.DataFrame | str | Path) -> pd.DataFrame:
    """batches.jsonl of runs (or of all under a folder), one row a batch; identity in front."""
    return _rows(runs, "batches")


def load_experiences(runs: pd.DataFrame | str | Path) -> pd.DataFrame:
    """experiences.jsonl of runs, one row a task or segment."""
    return _rows(runs, "experiences")


def load_matrix(runs: pd.DataFrame | str | Path) -> pd.DataFrame:
    """matrix.jsonl of runs, one row a cell of R: after, after_name, on, acc, correct, n.

    `after` is -1 before anything was learned; `acc` is in percent.
    """
    return _rows(runs, "matrix")


def _rows(runs: pd.DataFrame | str | Path, name: str) -> pd.DataFrame:
    if not isinstance(runs, pd.DataFrame):
        runs = load_runs(runs)
    found = [json_lines(Path(path) / f"{name}.jsonl") for path in runs["path"]]
    rows = pd.DataFrame([row for some in found for row in some])
    known = [k for k in ("path", "state", *IDENTITY, "method") if k in runs]
    about = runs[known].loc[runs.index.repeat([len(some) for some in found])]
    rows = rows.drop(columns=known, errors="ignore")  # each row repeats the scenario's label
    return pd.concat([about.reset_index(drop=True), rows], axis=1)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """All rows; the last line of a killed run may be half a line and is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    for kept in (lines, lines[:-1]):
        try:
            return json.loads(f"[{','.join(kept)}]")
        except ValueError:
            continue
    warnings.warn(f"{path} is damaged and was left out", stacklevel=3)
    return []


# ------------------------------------------------------------------------------ what is averaged


def select(runs: pd.DataFrame, average: Sequence[str] = AVERAGE) -> pd.DataFrame:
    """Finished runs with `stream`, `method` and `order`; of runs made twice only the newest.

    Runs that agree in scenario, backbone, stream and method differ in nothing but the seed and the
    keys of `average`, whose values `order` holds. `stream` names the scenario's settings that some
    strategy was run with several of, `method` the strategy and its other settings that differ.

    Raises:
        UserError: if no run is finished.
    """
    done = runs[runs["state"] == "done"].copy()
    if done.empty:
        states = ", ".join(f"{n} {state}" for state, n in runs["state"].value_counts().items())
        first = runs["problem"].iloc[0]
        raise UserError(f"no finished run ({states}; the first: {first})")
    left_out = {f"config.{k}" for k in average}
    settings = [k for k in _settings(done) if k not in left_out]
    told = done[settings].astype(object).where(done[settings].notna(), "unset").map(str)
    for fact in ("weights.hash", "data.fingerprint"):
        told[fact] = done[fact].fillna("unknown")
    orders = done[[k for k in named(done, "config.") if k in left_out]]
    done["order"] = orders.map(str).agg(", ".join, axis=1) if len(orders.columns) else ""
    done["stream"], done["method"] = "", done["strategy"]
    for _, group in done.groupby(["scenario", "backbone"]):
        of_stream = [k for k in settings if k.startswith("config.scenario.")]
        varied = [
            k
            for k in of_stream
            if told.loc[group.index].groupby(group["strategy"])[k].nunique().max() > 1
        ]
        same = [group["strategy"], group["order"], *(told.loc[group.index, k] for k in varied)]
        if told.loc[group.index].groupby(same)["data.fingerprint"].nunique().max() > 1:
            varied.append("data.fingerprint")  # other images under one name
        done.loc[group.index, "stream"] = _label(told.loc[group.index, varied])
    for _, group in done.groupby([*PLACE, "strategy"]):
        here = told.loc[group.index].drop(columns="data.fingerprint")
        name = _label(here[[k for k in here if here[k].nunique() > 1]])
        done.loc[group.index, "method"] += name.map(lambda text: f" ({text})" if text else "")
    when = pd.to_datetime(done["time"], utc=True, errors="coerce", format="ISO8601")
    newest = done.assign(when=when).sort_values("when", kind="stable", na_position="first")
    older = newest.index[newest.duplicated([*PLACE, "method", "order", "seed"], keep="last")]
    return done.drop(older)


def _settings(runs: pd.DataFrame) -> list[str]:
    """Columns of settings that may change a number, but for the seed."""
    skipped = tuple(f"config.{name}." for name in NO_SETTING)
    return [k for k in named(runs, "config.") if not f"{k}.".startswith(skipped)]


def named(frame: pd.DataFrame, prefix: str) -> list[str]:
    """Columns whose names begin with `prefix`."""
    return [str(k) for k in frame if str(k).startswith(prefix)]


def _label(columns: pd.DataFrame) -> pd.Series:
    """`key=value, key=value` for each row."""
    said = pd.Series("", columns.index)
    for name in sorted(named(columns, "")):
        said += f", {name.removeprefix('config.')}=" + columns[name]
    return said.str.removeprefix(", ")


# ------------------------------------------------------------------------------ what to tell


def notes(runs: pd.DataFrame, used: pd.DataFrame, average: Sequence[str] = AVERAGE) -> list[str]:
    """What a reader must know before comparing: stand-in data, runs left out, mixed versions.

    Args:
        runs: all runs, as `load_runs` returns them.
        used, average: those of them that are averaged, as `select` returns them, and over what.
    """
    found = [f"{name}: {what}" for name in used["scenario"].unique() if (what := stand_in(name))]
    for state, some in runs[runs["state"] != "done"].groupby("state"):
        found.append(f"{len(some)} {state} (listed, in no mean)")
    for _, run in runs[(runs["state"] == "done") & ~runs.index.isin(used.index)].iterrows():
        found.append(f"made twice, the newer run counts: {run['path']} is left out")
    versions = {"git": "code version", "environment.packages.torch": "version of torch"}
    for place, some in used.groupby(PLACE):
        for name, what in {**versions, "device": "device"}.items():
            values = sorted(some[name].dropna().astype(str).unique()) if name in some else []
            if len(values) > 1:
                shown = ", ".join(v[:10] if name == "git" else v for v in values)
                found.append(f"{title(place)}: runs of more than one {what} ({shown})")
        shared = [k for k in _settings(some) if not k.startswith("config.strategy.")]
        varied = [k.removeprefix("config.") for k in shared if some[k].map(str).nunique() > 1]
        if varied := [k for k in varied if k not in average]:
            found.append(f"{title(place)}: not all runs agree in {', '.join(varied)}")
        for name, what in {
            "environment.git.dirty": "runs of changed code (their patch.diff says how)",
            "skipped_images": "runs that skipped unreadable images",
        }.items():
            n = int(some[name].fillna(0).astype(int).gt(0).sum()) if name in some else 0
            found += [f"{title(place)}: {n} {what}"] if n else []
    return found


def stand_in(scenario: str) -> str:
    """What the label of a scenario says about its images; empty for released data sets."""
    if "[embedded]" in scenario:
        return "embedded stand-in images, not the data set of that name"
    return (
        "corruptions made on the fly, not the released files" if "[on_the_fly]" in scenario else ""
    )


def title(place: Iterable[Any]) -> str:
    """A scenario, backbone and stream in words."""
    return ", ".join(str(part) for part in place if part)
