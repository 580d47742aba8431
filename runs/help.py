"""`python run.py --help`: the options of every group, one line each; needs no torch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from driftline.core import papers
from driftline.core.comments import summary
from driftline.core.paths import CHECKOUT, CONF

HEAD = """\
Driftline: continual and test-time adaptation of vision backbones.

  python run.py strategy=cotta scenario=imagenet_c            stand-in images, no data needed
  python run.py strategy=cotta scenario=imagenet_c data.root=/data
  python run.py -m strategy=source,bn_adapt,tent,cotta seed=0,1,2
  python run.py explain strategy=cotta scenario=imagenet_c    every setting with its meaning
"""
FOOT = """\
An option is chosen with group=option, a setting with its key: scenario.severity=3
  python run.py explain strategy          the options of a group;  explain: the settings of any run
  python run.py explain strategy=cotta    its settings: value, meaning, source, range
  python run.py strategy=cotta --cfg job  the composed configuration alone
  python scripts/paper.py                 {rows} presets (experiment=...) of papers' rows, by method
  python scripts/doctor.py strategy=cotta data.root=/data    will it run here, how long
"""
GROUPS = {  # group -> title
    "strategy": "strategy: test-time adaptation, then continual learning",
    "scenario": "scenario: streams for test-time adaptation, then tasks",
    "adapter": "adapter: of a strategy that has adapters, instead of its own",
    "backbone": "backbone",
    "around": "around: rules around a strategy, 'around=[window,reset_every]'",
    "time": "time: a stream that does not wait",
    "estimate": "estimate: accuracy without labels",
    "logger": "logger",
    "hydra/launcher": "hydra/launcher: of sweeps (-m)",
}


def text(folders: Sequence[Path] = (CONF,)) -> str:
    """What --help prints.

    Args:
        folders: of option groups: conf/, and one of the user's own.
    """
    parts = [HEAD]
    for group, title in GROUPS.items():
        parts.append("\n".join([title, *listing(group, folders)]) + "\n")
    parts.append(FOOT.format(rows=len(papers.options("experiment"))))
    whole = "\n".join(parts).rstrip()
    return whole if CHECKOUT else _installed(whole)


def _installed(whole: str) -> str:
    """The same for a wheel, which has the command and no programs."""
    lines = whole.replace("python run.py", "driftline").splitlines()
    programs = [line for line in lines if line.startswith("  python scripts/")]
    rest = [line for line in lines if line not in programs]
    return "\n".join([*rest, "\nIn a checkout, not in the installed package:", *programs])


def listing(group: str, folders: Sequence[Path] = (CONF,)) -> list[str]:
    """The options of a group, one line each, cut at the width of the terminal."""
    if group in papers.GROUPS:
        return [f"  {name}" for name in papers.options(group)]
    rows = [(name, _about(group, name, path)) for name, path in options(group, folders)]
    width = max((len(name) for name, _ in rows), default=0)
    columns = max(60, shutil.get_terminal_size((100, 24)).columns)
    return [cut(f"  {name.ljust(width)}  {about}".rstrip(), columns) for name, about in rows]


def cut(line: str, columns: int) -> str:
    """A line that fits; `...` stands for the rest."""
    return line if len(line) <= columns else line[: columns - 3].rstrip() + "..."


def options(group: str, folders: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Names and files of a group; those that adapt to streams before those that learn tasks."""
    files: dict[str, Path] = {}
    for folder in folders:
        for path in sorted((folder / group).rglob("*.yaml")):
            name = path.relative_to(folder / group).with_suffix("").as_posix()
            if not name.startswith("base/"):
                files.setdefault(name, path)
    if group in ("strategy", "scenario"):
        for tasks in (False, True):
            yield from (
                (name, path)
                for name, path in files.items()
                if _of_tasks(chain(group, name, folders)) == tasks
            )
    else:
        yield from files.items()


def file_of(group: str, name: str, folders: Sequence[Path]) -> Path | None:
    """The file of an option."""
    paths = (folder / group / f"{name}.yaml" for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def chain(group: str, name: str, folders: Sequence[Path]) -> Iterator[Path]:
    """The file of an option, then those that it includes at the same place."""
    path = file_of(group, name, folders)
    if path is None:
        return
    yield path
    block = re.search(r"^defaults:\n((?:  .*\n)+)", path.read_text(), re.M)
    for base in re.findall(
        r"^  - ([\w/]+)(?:@_here_)?\s*(?:#.*)?$", block[1] if block else "", re.M
    ):
        if base != "_self_":
            yield from chain(group, base, folders)


def _of_tasks(files: Iterator[Path]) -> bool:
    """Whether a strategy or scenario is one of continual learning, as its target says."""
    for path in files:
        if target := re.search(r"^_target_: (\S+)", path.read_text(), re.M):
            return bool(re.search(r"\.(cl|\w+_incremental)\.", target[1]))
    return False


def _about(group: str, name: str, path: Path) -> str:
    """What an option is, in a few words: the publication of a strategy, else its first comment."""
    fact = papers.published().get(name) if group == "strategy" else None
    if fact is None or path.parent != CONF / "strategy":
        return summary(path)
    words = [fact.get("title"), fact.get("about")]
    if "paper" in fact:
        words = [f"{fact['paper']} {fact['year']}", *words]
    plain = "; ".join(word for word in words if word)
    return re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", plain).replace("`", "")
