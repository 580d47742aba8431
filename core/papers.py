"""The tables of papers/, one file a paper, as option groups of the configuration; needs no torch.

A table holds what its paper publishes and the settings behind it:

    sources:                      # where figures are from; `metrics` are the heads of columns
      logs: {metrics: [acc_inc, acc_last], status: seen, comparable: true, source: "a/b, logs"}
    common: {strategy: mos, strategy.mode: official}         # of every row
    blocks:                       # what several rows share, by a name of its own
      cub: {scenario: split_imagefolder, scenario.label: split_cub, recipe: mos/cub}
    recipes:                      # official settings by data set: recipe=mos/cub
      cub: {strategy.lr: 0.01, scenario.real.batch_size: 32}
    rows:                         # experiment=mos/cub_b0_inc10
      cub_b0_inc10: {use: [cub], scenario.increment: 10, figures: {logs: {mos: [92.9, 89.3]}}}

A source with one metric needs no brackets: `figures: {readme: {source: 43.5, tent: 18.6}}`.

Each key is what one would type: `strategy: mos` for strategy=mos, `strategy.mode: official` for
strategy.mode=official. A row is `common`, then the blocks that it uses, then its own keys; a later
one replaces an earlier one. A recipe is its blocks and its own keys. A recipe named after its
strategy and the scenario (recipe=mos/split_cifar100) is taken by itself (conf/config.yaml); for a
named set of class folders (scenario=split_cub) that is the recipe of its name (mos/cub), else that
for all class folders (mos/split_imagefolder).

Hydra reads the tables through `PaperSource`, once `register` was called. `PaperPath` puts it on the
search path where no configuration is read (glob(...) in a sweep); `hydra.searchpath` in
conf/config.yaml repeats it, so that composing without `register` is an error and not a run without
its recipe.
"""

from __future__ import annotations

import builtins
from copy import deepcopy
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from driftline.core.errors import UserError, suggest
from driftline.core.paths import CONF, PAPERS

GROUPS = {"experiment": "rows", "recipe": "recipes"}  # option group -> key of a table
# What a key without a dot chooses an option of; any other sets an option of the whole run.
CHOICES = {
    "strategy": "strategy",
    "adapter": "adapter@strategy.adapter",
    "around": "around",
    "scenario": "scenario",
    "recipe": "recipe",
    "backbone": "backbone",
    "logger": "logger",
}
FOLDERS = "split_imagefolder"  # recipe for any class folders, these named ones among them
OF_FOLDERS = ("cars", "cub", "imagenet_a", "imagenet_r", "objectnet", "omnibenchmark", "vtab")
FACTS = PAPERS.parent / "docs" / "methods.yaml"
UNKNOWN = {
    "about": "not in docs/methods.yaml",
    "checked": "-",
    "no_rows": "papers/ has none",
}
OF_SOURCE = {"metrics", "status", "comparable", "source"}
KEYS = {"sources", "common", "blocks", *GROUPS.values()}
Words = dict[str, Any]
Facts = dict[str, Any]


def papers() -> list[str]:
    """Names of the tables, which are those of their methods."""
    return sorted(path.stem for path in PAPERS.glob("*.yaml"))


def options(group: str) -> list[str]:
    """All options of `experiment` or `recipe`: `["aper/cub_b0_inc10_in21k_adapter", ...]`."""
    return [f"{paper}/{name}" for paper in papers() for name in names(group, paper)]


def exists(group: str, option: str) -> bool:
    """Whether `experiment` or `recipe` has such an option; reads one table."""
    paper, _, name = option.partition("/")
    return _name(group, paper, name) in names(group, paper)


def names(group: str, paper: str) -> list[str]:
    """The rows (`experiment`) or recipes of one table; none if there is no such table."""
    return list(table(paper)[GROUPS[group]]) if (PAPERS / f"{paper}.yaml").is_file() else []


def _name(group: str, paper: str, name: str) -> str:
    """The row or recipe that a table has for an option: of named class folders that of the set."""
    have, data = names(group, paper), name.removeprefix("split_")
    if group == "recipe" and name not in have and name != data and data in OF_FOLDERS:
        return data if data in have else FOLDERS
    return name


def table(paper: str) -> dict[str, Any]:
    """papers/<paper>.yaml, with every key that it may have.

    Raises:
        UserError: if it cannot be read or has a key that no table has.
    """
    path = PAPERS / f"{paper}.yaml"
    return _read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _read(path: Path, _changed: int) -> dict[str, Any]:
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a table has the keys {', '.join(sorted(KEYS))}")
    if wrong := sorted(set(content) - KEYS):
        raise UserError(f"{path}: a table has no key {wrong[0]!r}{suggest(wrong[0], KEYS)}")
    parts = {key: content.get(key) or {} for key in KEYS}
    for key, entries in parts.items():
        if not isinstance(entries, dict):
            raise UserError(f"{path}: {key} must be settings by name, got {entries!r}")
        for name, entry in entries.items() if key != "common" else ():
            if not isinstance(entry, dict):
                raise UserError(f"{path}: {key}.{name} must be settings, got {entry!r}")
    for name, source in parts["sources"].items():
        if lacking := sorted(OF_SOURCE - set(source)):
            raise UserError(f"{path}: sources.{name} lacks {', '.join(lacking)}")
    return parts


def words(group: str, option: str) -> Words:
    """What an option stands for, as typed: `{"strategy": "mos", "scenario.increment": 10, ...}`.

    Args:
        group: `experiment` or `recipe`.
        option: "mos/cub_b0_inc10".

    Raises:
        KeyError: if there is no such option.
        UserError: if it uses a block that its table lacks.
    """
    paper, _, name = option.partition("/")
    content = table(paper)
    own = dict(content[GROUPS[group]][_name(group, paper, name)])
    own.pop("figures", None)
    merged: Words = dict(content["common"]) if group == "experiment" else {}
    for block in own.pop("use", ()):
        if block not in content["blocks"]:
            near = suggest(str(block), content["blocks"])
            raise UserError(
                f"papers/{paper}.yaml: {name} uses the block {block!r}, not there{near}"
            )
        merged |= content["blocks"][block]
    return merged | own


def figures(row: str) -> list[dict[str, Any]]:
    """Published figures of a row: strategy, metric, value, status, comparable, source each.

    Raises:
        KeyError: if there is no such row.
        UserError: if a source is not in the table, or has another number of columns.
    """
    paper, _, name = row.partition("/")
    content = table(paper)
    rows = []
    for source, methods in (content["rows"][name].get("figures") or {}).items():
        where = f"papers/{paper}.yaml: the figures of {name}"
        if source not in content["sources"]:
            near = suggest(source, content["sources"])
            raise UserError(f"{where} name the source {source!r}, not in `sources`{near}")
        about = dict(content["sources"][source])
        metrics = about.pop("metrics")
        for strategy, values in methods.items():
            columns = values if isinstance(values, list) else [values]
            if len(columns) != len(metrics):
                raise UserError(
                    f"{where}, {source}, {strategy}: {len(columns)} for the columns {metrics}"
                )
            for metric, value in zip(metrics, columns, strict=True):
                rows.append({"strategy": strategy, "metric": metric, "value": value, **about})
    return rows


def option(group: str, name: str) -> dict[str, Any]:
    """An option as Hydra reads one from a file: its defaults list, then nested settings."""
    node: dict[str, Any] = {}
    chosen = words(group, name)
    defaults = [{f"override /{CHOICES[k]}": chosen.pop(k)} for k in CHOICES if k in chosen]
    if defaults:
        node["defaults"] = defaults
    for key, value in chosen.items():
        *above, last = key.split(".")
        inner = node
        for part in above:
            inner = inner.setdefault(part, {})
        inner[last] = value
    if group == "experiment" and (published := figures(name)):
        node["reference"] = published
    return node


@cache
def published() -> dict[str, Facts]:
    """docs/methods.yaml: what is behind strategies, by name; empty in a copy without it."""
    if not FACTS.is_file():
        return {}
    with open(FACTS) as file:
        known: Any = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return known


@cache
def facts() -> dict[str, Facts]:
    """What docs/methods.yaml says of every option of conf/strategy: title, year, code ...

    Each has its `kind`, TTA or CL; TTA comes first.
    """
    known = deepcopy(published())
    strategies = {path.stem: OmegaConf.load(path) for path in (CONF / "strategy").glob("*.yaml")}
    for name in sorted(set(strategies) - set(known)):
        known[name] = dict(UNKNOWN)
    for name, fact in known.items():
        fact["kind"] = strategies[name]._target_.split(".")[-3].upper()  # cl.mos.MOS
    return dict(sorted(known.items(), key=lambda item: item[1]["kind"] != "TTA"))


class PaperSource(ConfigSource):
    """Serves experiment/<paper>/<row> and recipe/<paper>/<name> out of papers/<paper>.yaml."""

    @staticmethod
    def scheme() -> str:
        return "papers"

    def load_config(self, config_path: str) -> ConfigResult:
        group, _, name = config_path.removesuffix(".yaml").partition("/")
        try:
            config = OmegaConf.create(option(group, name))
        except UserError as error:
            raise ConfigLoadError(str(error)) from error
        return ConfigResult(
            provider=self.provider,
            path=self.full_path(),
            config=config,
            header={"package": "_global_"},
        )

    def available(self) -> bool:
        return PAPERS.is_dir()

    def is_group(self, config_path: str) -> bool:
        group, _, paper = config_path.partition("/")
        if not paper:
            return group in (*GROUPS, "")
        return bool(_served(group, paper))

    def is_config(self, config_path: str) -> bool:
        group, _, name = config_path.removesuffix(".yaml").partition("/")
        paper = name.partition("/")[0]
        return bool(_served(group, paper)) and exists(group, name)

    def list(self, config_path: str, results_filter: ObjectType | None) -> builtins.list[str]:
        group, _, paper = config_path.partition("/")
        if paper:
            return [] if results_filter == ObjectType.GROUP else sorted(_served(group, paper))
        if results_filter == ObjectType.CONFIG:
            return []
        return sorted(p for p in papers() if _served(group, p)) if group else sorted(GROUPS)


def _served(group: str, paper: str) -> list[str]:
    """As `names`; none for the groups of other folders."""
    try:
        return names(group, paper) if group in GROUPS else []
    except UserError as error:
        raise ConfigLoadError(str(error)) from error


class PaperPath(SearchPathPlugin):
    """Has Hydra look into the tables, after the files of conf/."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("papers", f"{PaperSource.scheme()}://")


def register() -> None:
    """Make the tables known to Hydra; a second call changes nothing."""
    Plugins.instance().register(PaperSource)
    Plugins.instance().register(PaperPath)
