"""Pages of the site that are made from the code: settings, public functions, a gallery of reports.

Settings come from the YAML files of conf/ (value, comment) and from the signatures that they are
passed to (what a value may be); functions from their docstrings. Nothing of it is committed:
`tools/mkdocs_hook.py` makes the pages when the site is built.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import yaml

import driftline
from driftline.core import papers
from driftline.core.build import locate, options_of
from driftline.core.comments import as_typed, comments, head
from driftline.core.paths import CONF
from driftline.core.ranges import bare, describe
from driftline.core.sinks import SINKS
from driftline.parts.optim import Optim
from driftline.runs.schema import LIVE, global_options

ROOT = Path(__file__).parents[1]
GROUPS = {  # group -> title, what is above its sections
    "scenario": ("Scenarios", "The page on [scenarios](../scenarios.md) says what each is for."),
    "backbone": (
        "Backbones",
        "Networks and their weights: [scenarios](../scenarios.md#backbones).",
    ),
    "adapter": (
        "Adapters",
        "`adapter=NAME` for every method that has some: [adapters](../adapters.md).",
    ),
    "around": ("Rules", "`around=[NAME,...]` around any method: [rules](../rules.md)."),
    "time": (
        "Time",
        "`time=NAME`: a stream that does not wait ([scenarios](../scenarios.md#time)).",
    ),
    "estimate": (
        "Estimates",
        "`estimate=NAME` ([scenarios](../scenarios.md#accuracy-without-labels)).",
    ),
    "logger": ("Loggers", "`logger=NAME` mirrors a run; files are written either way."),
}
MODULES = ("core.strategy", "core.stream", "core.metrics", "core.ranges", "core.errors")
SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Attributes):$")
OTHER = {  # an entry of a defaults list -> where its settings stand
    "optim": "Settings of learning that are not named here: [learning](../optim.md).",
    "adapter": "Its adapters are `adapter={}`: [adapters](../adapter.md#{}).",
    "no adapter": "It takes adapters of any kind: `adapter=NAME` ([adapters](../adapter.md)).",
    "base": "And those of [every stream](#base/stream).",
}


class Setting(NamedTuple):
    """A setting of a file: dotted key, value, what it may be, what its comment says."""

    key: str
    value: Any
    allowed: str
    meaning: str


def settings_of(path: Path, live: Sequence[str], target: Any = None) -> Iterator[Setting]:
    """The settings that a file of conf/ states.

    Args:
        live: parameters that get an object no configuration can hold.
        target: what the settings are passed to, where the file does not say.
    """
    content: dict[str, Any] = yaml.safe_load(path.read_text()) or {}
    node = _with_base(path, content)
    texts = comments(path)
    for key, value, kind in _rows(content, node, target, tuple(live)):
        allowed = "" if kind is None else describe(kind)
        yield Setting(key, value, "" if allowed == "Any" else allowed, texts.get(key, ""))


def _with_base(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """A node with what the file behind it (`base/stream@_here_`) states."""
    node: dict[str, Any] = {}
    for entry in content.get("defaults", ()):
        if isinstance(entry, str) and entry.endswith("@_here_"):
            other = path.parent / f"{entry.removesuffix('@_here_')}.yaml"
            node |= _with_base(other, yaml.safe_load(other.read_text()))
    if path.parent.name == "base":  # its options are the same with any data set
        node["dataset"] = "imagenet_c"
    return node | dict(content)


def _rows(
    content: Mapping[str, Any],
    node: Mapping[str, Any],
    target: Any,
    live: tuple[str, ...],
    above: str = "",
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, value and type (None: not known) of every setting."""
    target = locate(node["_target_"]) if "_target_" in node else target
    kinds = options_of(target, node, live=live) if target else {}
    for name, value in content.items():
        if name in ("_target_", "defaults") or (name == "name" and "name" not in kinds):
            continue
        kind = kinds.get(name)
        part = None if kind is None else bare(kind)[0]
        nested = isinstance(value, dict) and (
            "_target_" in value or (inspect.isclass(part) and part.__module__.startswith("drift"))
        )
        if nested and "_target_" not in value and not hasattr(part, "__total__"):
            yield from _rows(value, value, part, live, f"{above}{name}.")
        elif nested and "_target_" in value:
            yield from _rows(value, value, None, live, f"{above}{name}.")
        else:
            yield f"{above}{name}", value, kind


def table(settings: Sequence[Setting], at: str) -> str:
    """A table of settings; the keys are those that are typed after `at.`."""
    if not settings:
        return "No settings.\n"
    rows = ["| setting | value | may be | meaning |", "|---|---|---|---|"]
    for key, value, allowed, meaning in settings:
        allowed = allowed.replace(" and at most 1,000,000,000", "")  # no limit that anybody meets
        cells = (f"`{at}{key}`", f"`{as_typed(value)}`", allowed, meaning)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows) + "\n"


def _beside(content: Mapping[str, Any]) -> str:
    """Where the settings stand that a file takes from others."""
    lines = []
    for entry in content.get("defaults", ()):
        name, option = next(iter(entry.items())) if isinstance(entry, dict) else (entry, "")
        group = re.split(r"[/@]", name.lstrip("/"))[0]
        text = OTHER.get("no adapter" if group == "adapter" and option is None else group)
        if text:
            lines.append(text.format(option, option))
    return "\n".join(lines) + "\n" if lines else ""


# ------------------------------------------------------------------------------ strategies


def strategy_page(name: str) -> str:
    """What a strategy is, where it comes from, how it deviates, and its settings."""
    path = CONF / "strategy" / f"{name}.yaml"
    content = yaml.safe_load(path.read_text())
    kind = locate(content["_target_"])
    fact = papers.facts().get(name, {})
    module = inspect.getdoc(inspect.getmodule(kind)) or ""
    shift = kind.__module__.split(".")[1] == "tta"
    scenario = "imagenet_c" if shift else "split_cifar"
    title = f": {fact['title']}" if "title" in fact else ""
    parts = [
        f"# {name}{title}",
        f"{'Test-time adaptation' if shift else 'Continual learning'}. {' '.join(_links(fact))} "
        "[All methods](../../methods.md)",
        f"```bash\npython run.py strategy={name} scenario={scenario}\n```",
        re.sub(r"\n(?=[A-Z][a-z ]+: )", "  \n", markdown(module)),  # Paper: and Code: begin a line
        "## Settings",
        " ".join(head(path)),
        table(list(settings_of(path, LIVE["strategy"])), "strategy."),
        _beside(content),
        f"## `{kind.__name__}`",
        f"In `{kind.__module__.removeprefix('driftline.').replace('.', '/')}.py`.",
        markdown(inspect.getdoc(kind) or ""),
    ]
    return "\n\n".join(part for part in parts if part.strip())


def _links(fact: Mapping[str, Any]) -> Iterator[str]:
    """Publication and repositories of a strategy."""
    if "paper" in fact:
        address = f"https://arxiv.org/abs/{fact['arxiv']}" if "arxiv" in fact else fact.get("url")
        text = f"{fact['paper']} {fact['year']}"
        yield f"[{text}]({address})." if address else f"{text}."
    yield from (f"[{name}](https://github.com/{name})." for name in fact.get("code", ()))


# ------------------------------------------------------------------------------ other groups


def group_page(group: str) -> str:
    """All options of a group, a section each."""
    title, about = GROUPS[group]
    parts = [f"# {title}", about]
    files = sorted((CONF / group).rglob("*.yaml"), key=lambda p: (p.parent != CONF / group, p))
    for path in files:
        name = path.relative_to(CONF / group).with_suffix("").as_posix()
        content = yaml.safe_load(path.read_text())
        parts.append(f"## {name if name != 'base/stream' else 'Every stream'} {{ #{name} }}")
        parts.append(" ".join(head(path)))
        if group == "logger":
            rows: list[Setting] = []
            texts = comments(path)
            for sink, node in content.items():
                for key, value, kind in _rows(node or {}, {}, SINKS[sink], LIVE["logger"]):
                    key = f"{sink}.{key}"
                    rows.append(Setting(key, value, describe(kind), texts.get(key, "")))
        elif group == "around":
            (inner,) = content.values()
            parts.append(markdown(inspect.getdoc(locate(inner["_target_"])) or ""))
            rows = [
                Setting(
                    f"{name}.{key}", value, describe(kind), comments(path).get(f"{name}.{key}", "")
                )
                for key, value, kind in _rows(inner, inner, None, LIVE["around"])
            ]
        else:
            rows = list(settings_of(path, LIVE.get(group, ())))
        at = "strategy.adapter." if group == "adapter" else f"{group}."
        parts += [table(rows, at), _beside(content)]
    return "\n\n".join(part for part in parts if part.strip())


def optim_page() -> str:
    """How any method learns."""
    path = CONF / "optim" / "default.yaml"
    rows = list(settings_of(path, ()))
    about = f"{' '.join(head(path))} What each does: [learning](../learning.md)."
    return "\n\n".join(
        ["# Learning", about, table(rows, "strategy.optim."), markdown(inspect.getdoc(Optim) or "")]
    )


def global_page() -> str:
    """The settings of any run."""
    path = CONF / "config.yaml"
    texts, kinds = comments(path), global_options()
    content = yaml.safe_load(path.read_text())
    rows = []
    for name, value in content.items():
        inner = value if isinstance(value, dict) and name not in kinds else {"": value}
        for key, one in inner.items():
            dotted = f"{name}.{key}".rstrip(".")
            if dotted in kinds:
                rows.append(Setting(dotted, one, describe(kinds[dotted]), texts.get(dotted, "")))
    return f"# Settings of any run\n\n{' '.join(head(path))}\n\n{table(rows, '')}"


# ------------------------------------------------------------------------------ functions


def markdown(text: str) -> str:
    """A docstring as Markdown: sections of arguments and errors become lists."""
    lines, section = [], False
    for line in text.splitlines():
        if SECTION.match(line):
            section = True
            lines += ["", f"**{line}**", ""]
        elif section and line.startswith("    ") and line.strip():
            entry = re.match(r"    (\*{0,2}\w[\w*,. ]*): (.*)", line)
            if entry:
                lines.append(f"- `{entry[1]}`: {entry[2]}")
            else:
                lines.append(line if line.startswith("     ") else f"- {line.strip()}")
        else:
            section = section and not line.strip()
            lines.append(line)
    return "\n".join(lines).strip()


def signature(name: str, thing: Any) -> str:
    """A call as it stands in the source, one line or an argument a line."""
    try:
        parameters = list(inspect.signature(thing).parameters.values())
    except (TypeError, ValueError):
        return name
    words: list[str] = []
    starred = False
    for one in parameters:
        if one.kind is one.KEYWORD_ONLY and not starred:
            words.append("*")
        starred = starred or one.kind in (one.KEYWORD_ONLY, one.VAR_POSITIONAL)
        mark = {one.VAR_POSITIONAL: "*", one.VAR_KEYWORD: "**"}.get(one.kind, "")
        note = one.annotation if isinstance(one.annotation, str) else ""
        word = f"{mark}{one.name}" + (f": {note}" if note else "")
        if one.default is not one.empty:
            default = repr(one.default) if len(repr(one.default)) < 40 else "..."
            word += f" = {default}"
        words.append(word)
    line = f"{name}({', '.join(words)})"
    return line if len(line) <= 88 else f"{name}(\n    " + ",\n    ".join(words) + ",\n)"


def module_page(module: ModuleType, title: str, names: Sequence[str] = ()) -> str:
    """The public functions and classes of a module with their docstrings.

    Args:
        names: which; none: all that are defined in it.
    """
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    parts = [f"# {title}", markdown(inspect.getdoc(module) or "")]
    for name in names or own:
        thing = getattr(module, name)
        callable_ = inspect.isclass(thing) or inspect.isfunction(thing)
        if name.startswith("_") or not callable_ or not inspect.getdoc(thing):
            continue
        kind = "class " if inspect.isclass(thing) else ""
        parts.append(f"## {name}\n\n```text\n{kind}{signature(name, thing)}\n```")
        parts.append(markdown(inspect.getdoc(thing) or ""))
        for inner, method in vars(thing).items() if inspect.isclass(thing) else ():
            function = getattr(method, "__func__", method)
            if not inner.startswith("_") and inspect.isfunction(function) and function.__doc__:
                parts.append(f"### {name}.{inner}\n\n```text\n{signature(inner, function)}\n```")
                parts.append(markdown(inspect.getdoc(function) or ""))
    return "\n\n".join(part for part in parts if part.strip())


def modules() -> Iterator[tuple[str, ModuleType]]:
    """Dotted names below `driftline` and modules with public functions."""
    package = importlib.import_module("driftline.parts")
    found = pkgutil.walk_packages(package.__path__, "parts.")
    for name in (*MODULES, *sorted(one.name for one in found if not one.ispkg)):
        yield name, importlib.import_module(f"driftline.{name}")


def pages() -> dict[str, str]:
    """Address on the site -> Markdown, of settings and functions."""
    from driftline import analysis

    found = {
        f"settings/strategy/{path.stem}.md": strategy_page(path.stem)
        for path in sorted((CONF / "strategy").glob("*.yaml"))
    }
    found |= {f"settings/{group}.md": group_page(group) for group in GROUPS}
    found |= {"settings/optim.md": optim_page(), "settings/run.md": global_page()}
    names = [name for name in driftline.__all__ if not name.startswith("_")]
    found["python/driftline.md"] = module_page(driftline, "driftline", names)
    found["python/analysis.md"] = module_page(analysis, "driftline.analysis", analysis.__all__)
    rows = ["| module | what |", "|---|---|"]
    for name, module in modules():
        uri = f"python/{name.replace('.', '_')}.md"
        page = module_page(module, f"driftline.{name}")
        if "\n## " in page:
            found[uri] = page
            first = (inspect.getdoc(module) or "").partition("\n")[0].replace("|", "\\|")
            rows.append(f"| [{name}]({uri.removeprefix('python/')}) | {first} |")
    found["python/parts.md"] = "# Parts and contracts\n\n" + "\n".join(rows) + "\n"
    return found


# ------------------------------------------------------------------------------ gallery


def gallery() -> dict[str, str | bytes]:
    """Address on the site -> content: the report of results/example, its figures and tables."""
    from scripts.report import report

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        report([ROOT / "results" / "example"], out, figures=True, formats=("html", "md"))
        files: dict[str, str | bytes] = {"gallery/report.html": (out / "report.html").read_bytes()}
        figures = sorted((out / "figures").glob("*.png"))
        names = {path: f"gallery/{_plain(path.stem)}.png" for path in figures}
        files |= {names[path]: path.read_bytes() for path in figures}
        tables = re.sub(r"^(#+) ", r"#\1 ", (out / "tables.md").read_text(), flags=re.M)
    pictures = "\n\n".join(f"![{p.stem}]({name})\n\n{p.stem}" for p, name in names.items())
    files["gallery.md"] = f"""# Gallery

What `python scripts/report.py results/example` makes of 24 small runs in this repository
([what they are](example.md)). **Every number is of embedded stand-in images** and
says nothing about ImageNet or CIFAR: this page shows forms, not results.

[The whole report, one file](gallery/report.html)

## Figures

{pictures}

## Tables

{tables}
"""
    return files


def _plain(stem: str) -> str:
    """A file name without brackets and blanks."""
    return re.sub(r"[^\w-]+", "-", stem).strip("-")
