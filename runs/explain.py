"""`python run.py explain strategy=cotta`: settings with what the configuration files say of them.

    python run.py explain                                   # settings of any run, groups of options
    python run.py explain strategy                          # the options of a group
    python run.py explain strategy=cotta                    # value, meaning, source, range of each
    python run.py explain strategy=cotta scenario=cifar10_c strategy.optim.lr=1
    python run.py explain strategy=cotta strategy.optim     # these alone

Values are those of the run that the same words would start; `<-` marks one that is not the value of
its file, and says whence it is. What a setting may be comes from the signature it is passed to.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from driftline.core import papers
from driftline.core.comments import as_typed, comments, head
from driftline.core.errors import UserError, suggest
from driftline.core.paths import CONF, run_line
from driftline.runs import command, help

WIDTH = 98
SHOWN = ("strategy", "scenario", "backbone", "around", "time", "estimate", "logger")
PARTS = {"adapter": "strategy.adapter", "experiment": "", "recipe": ""}  # group -> its node


class Source(NamedTuple):
    """A file and the node that it fills, `""` for the whole configuration."""

    path: Path
    node: str

    def comment(self, key: str) -> str | None:
        return comments(self.path).get(key[len(self.node) :].lstrip("."))

    def value(self, key: str) -> Any:
        """Of the file itself; `...` where it does not say."""
        content = OmegaConf.load(self.path)
        return OmegaConf.select(content, key[len(self.node) :].lstrip("."), default=...)


def explained(words: list[str]) -> Iterator[str]:
    """The lines of an answer.

    Args:
        words: settings as for a run, and names of groups or settings to look at.

    Raises:
        UserError: for a word that names nothing, or settings that a run would not take.
    """
    flags = command.FLAGS & set(words)
    names = [w for i, w in enumerate(words) if "=" not in w and not _flag(words, i)]
    typed = [w for w in words if w not in names and not (flags and _flag(words, words.index(w)))]
    chosen = {w.partition("=")[0].lstrip("+~").split(".")[0] for w in typed}
    if "adapter" in chosen and not chosen & {"strategy", "experiment"}:
        typed.append("strategy=finetune")  # any one that takes adapters
    for name in names:
        if name in (*help.GROUPS, *papers.GROUPS) and name not in chosen:
            yield f"{name}=..."
            yield from help.listing(name, command.config_folders())
    asked = [n for n in names if not (n in (*help.GROUPS, *papers.GROUPS) and n not in chosen)]
    if names and not asked:
        return
    cfg = command.composed(typed, choices=True)
    options = dict(cfg.hydra.runtime.choices)
    node = cfg.copy()
    OmegaConf.set_struct(node, False)
    node.pop("hydra")
    rows = list(_rows(node))
    if not words:
        yield from _overview()
        shown = [row for row in rows if row[0].split(".")[0] not in (*SHOWN, "reference")]
    else:
        shown = [row for row in rows if _wanted(row[0], chosen, asked)]
    keys = [key for key, _, _ in rows]
    for name in asked:
        if not any(key == name or key.startswith(f"{name}.") for key in keys):
            raise UserError(f"{name}: no such group or setting{suggest(name, [*options, *keys])}")
    sources, given = _sources(options), _given(typed, options)
    titled = set()
    for key, value, kind in shown:
        group = "adapter" if key.startswith("strategy.adapter.") else key.split(".")[0]
        if group not in titled and group in (*SHOWN, "adapter") and not asked:
            titled.add(group)
            yield from _title(group, options, node)
        yield from _setting(key, value, kind, sources, given, node)
    from driftline.runs.schema import check_settings

    try:
        check_settings(node)
    except UserError as error:
        # Options alone were asked about: what they leave open is no mistake.
        if not {word.partition("=")[0].lstrip("+~") for word in typed} <= options.keys():
            raise
        yield f"\nnot yet a run: {error}"


def _flag(words: list[str], index: int) -> bool:
    """Whether a word is a flag of Hydra, or the value of one."""
    return words[index].startswith("-") or (index > 0 and words[index - 1] in command.FLAGS)


def _wanted(key: str, chosen: set[str], asked: list[str]) -> bool:
    """Whether a setting is shown: of what is asked for, else of every group that a word is in."""
    if asked:
        return any(key == name or key.startswith(f"{name}.") for name in asked)
    places = {PARTS.get(group, group) for group in chosen}
    if "" in places:
        places = {"strategy", "scenario", "backbone"}
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _overview() -> Iterator[str]:
    listing = f"{run_line('explain GROUP')} lists one, GROUP=OPTION its settings"
    yield f"Groups of options ({listing}):"
    for group, title in help.GROUPS.items():
        yield f"  {title if title.startswith(group) else group}"
    yield "\nSettings of any run:\n"


def _title(group: str, options: Mapping[str, Any], cfg: DictConfig) -> Iterator[str]:
    """What is chosen of a group, and the comment at the head of its file."""
    option = options.get("adapter@strategy.adapter" if group == "adapter" else group)
    names = option if isinstance(option, list) else [option]
    for name in names if option else ():
        path = help.file_of(group, name, command.config_folders())
        yield f"\n{group}={name}"
        yield from _wrapped(head(path) if path else [], "  ")
    if group == "backbone" and cfg.backbone.get("name") == "auto":
        from driftline.runs.compose import complete

        yield f"  here: backbone={complete(cfg).backbone.name}"
    yield ""


def _setting(
    key: str,
    value: Any,
    kind: Any,
    sources: list[Source],
    given: Mapping[str, str],
    cfg: DictConfig,
) -> Iterator[str]:
    """One setting: value and whence it is, comments, range."""
    from driftline.core.ranges import describe

    line = f"{key}={_yaml(value)}"
    if (group := key.split(".")[0]) == "scenario" and value is None:
        from driftline.runs.schema import embedded

        images = "embedded" if embedded(cfg) else "real"
        filled = OmegaConf.select(cfg, f"scenario.{images}.{key.removeprefix('scenario.')}")
        line += f"    here {_yaml(filled)}, for {images} images" if filled is not None else ""
    if key == "channels_last" and value is None:
        from driftline.runs.compose import complete

        line += f"    here {_yaml(complete(cfg).channels_last)}"
    near = [s for s in sources if not s.node or key.startswith(f"{s.node}.")]
    near.sort(key=lambda source: -len(source.node))
    if whence := next((w for k, w in given.items() if key == k or key.startswith(f"{k}.")), None):
        own = next((v for s in reversed(near) if s.node and (v := s.value(key)) is not ...), ...)
        own = next((v for s in near if (v := s.value(key)) is not ...), ...) if own is ... else own
        line += f"    <- {whence}" + (f", else {_yaml(own)}" if own not in (..., value) else "")
    yield line
    texts: list[str] = []
    seen: set[str] = set()  # nodes: of files that fill the same one, the first speaks
    for source in near:
        text = None if source.node in seen else source.comment(key)
        if text and (source.node or group not in SHOWN):
            seen.add(source.node)
            texts.append(text)
    yield from _wrapped(texts, "    ", joined=False)
    if kind is not None and (words := describe(kind)) not in ("Any", ""):
        yield from _wrapped([words], "    allowed: ", joined=False)


def _wrapped(texts: list[str], indent: str, *, joined: bool = True) -> Iterator[str]:
    """Lines as they are, or texts wrapped to the width."""
    for text in texts:
        rest = " " * len(indent)
        yield from (
            [f"{indent}{text}".rstrip()]
            if joined
            else textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=rest)
        )


def _yaml(value: Any) -> str:
    """A value as it is typed."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=False)
    return as_typed(value)


def _rows(cfg: DictConfig) -> Iterator[tuple[str, Any, Any]]:
    """Key, value and type (None where any is taken) of every setting."""
    from driftline.core.sinks import SINKS
    from driftline.runs.schema import LIVE, global_options

    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    kinds = global_options()
    for group in [*(g for g in SHOWN if plain.get(g)), *(k for k in plain if k not in SHOWN)]:
        value = plain[group]
        if group == "around":
            for name, rule in value.items():
                yield from _of_node(rule, f"around.{name}", LIVE["around"])
        elif group == "logger":
            for name, sink in value.items():
                target = SINKS.get(name)
                yield from _of_node(sink or {}, f"logger.{name}", LIVE["logger"], target)
        elif group in SHOWN:
            yield from _of_node(value, group, LIVE[group])
        elif isinstance(value, dict) and group not in kinds:
            yield from ((f"{group}.{k}", v, kinds.get(f"{group}.{k}")) for k, v in value.items())
        else:
            yield group, value, kinds.get(group)


def _of_node(
    node: Mapping[str, Any], at: str, live: tuple[str, ...], target: Any = None
) -> Iterator[tuple[str, Any, Any]]:
    """The settings of a node, nested ones included, without those that its owner does not read."""
    from driftline.core.build import later, locate, options_of, unread

    target = locate(node["_target_"], at) if "_target_" in node else target
    kinds = options_of(target, node, at=at, live=live) if target else {}
    for name, value in node.items():
        if name == "_target_" or (name == "name" and at != "backbone"):
            continue
        kind = kinds.get(name)
        if isinstance(value, dict) and "_target_" in value:
            skipped = {f"{at}.{name}.{k}" for k in unread(kind)}
            inner = _of_node(value, f"{at}.{name}", (*live, *later(kind)))
            yield from (row for row in inner if row[0] not in skipped)
        else:
            yield f"{at}.{name}", value, kind


def _sources(options: Mapping[str, Any]) -> list[Source]:
    """The files of conf/ behind a configuration, an option before what it builds on."""
    found = [Source(CONF / "config.yaml", "")]
    for choice, names in options.items():
        group, _, node = choice.partition("@")
        for name in names if isinstance(names, list) else [names]:
            if name and not group.startswith("hydra") and group not in papers.GROUPS:
                files = help.chain(group, str(name), command.config_folders())
                found += [Source(path, node or group) for path in files]
    return found


def _given(typed: list[str], options: Mapping[str, Any]) -> dict[str, str]:
    """Key -> whence its value is, where that is not the file of its option."""
    given = {}
    for word in typed:
        key = word.partition("=")[0].lstrip("+~")
        if "." in key or key not in (*SHOWN, *PARTS):
            given[key] = "typed"
    local = CONF / "local" / "default.yaml"
    if options.get("local") and local.is_file():
        given |= {k: "conf/local" for k in _leaves(OmegaConf.load(local)) if k not in given}
    for group in ("experiment", "recipe"):
        name = options.get(group)
        if name and papers.exists(group, name):
            keys = (k.replace("scenario.real.", "scenario.") for k in papers.words(group, name))
            given |= {k: f"{group}={name}" for k in keys if "." in k and k not in given}
    return given


def _leaves(node: Any, above: str = "") -> Iterator[str]:
    for name, value in node.items():
        if OmegaConf.is_dict(value):
            yield from _leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"
