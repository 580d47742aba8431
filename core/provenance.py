"""Which code a run is made of: fingerprints of its files, the commit, the patch. Needs no torch.

A fingerprint is that of the syntax tree, without comments and docstrings: new words or another
layout are the same code. The code of a method is its own file and, recursively, what that imports
of `METHOD`; a run whose method has changed is another run. Other code of the framework is
fingerprinted as well, but a change there is only reported.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
METHOD = ("cl", "tta", "parts", "backbones")  # folders whose code methods are made of
FRAMEWORK = ("core", "runs", "streams", "kernels")
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")  # statements within a statement
Code = dict[str, Any]  # "python", "method" and "framework": file -> fingerprint


def code_of(*targets: str) -> Code:
    """Fingerprints of the method, made of the dotted `targets`, and of the framework.

    Returns:
        `method` and `framework`, each a mapping from file to 12 hex digits, and `python`, the minor
        version, since a tree is written out differently by another one.
    """
    method = sorted(_closure([target.rpartition(".")[0] for target in targets]))
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "method": {_name(path): fingerprint(path) for path in method},
        "framework": {_name(path): fingerprint(path) for path in _files(*FRAMEWORK)},
    }


def read_ahead() -> None:
    """Let processes that are forked from this one find most fingerprints done.

    Of what is imported the file that it came from counts; other files are read again where they
    have changed since.
    """
    imported = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    for path in _files(*FRAMEWORK, *METHOD):
        fingerprint(path) if str(path) in imported else _read(path, *_state(path))


def _files(*packages: str) -> list[Path]:
    return [path for name in packages for path in sorted((ROOT / name).rglob("*.py"))]


def changed_files(part: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Files of `part` (`method` or `framework`) that differ between two results of `code_of`.

    Empty as well where they cannot be compared, because another minor version of Python wrote one.
    """
    if before.get("python") != now["python"]:
        return []
    old, new = before[part], now[part]
    return sorted(name for name in {*old, *new} if old.get(name) != new.get(name))


@cache
def fingerprint(path: Path) -> str:
    """12 hex digits of the file's syntax tree, as it was when this process first looked."""
    return _read(path, *_state(path))[0]


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@cache
def _read(path: Path, _changed: int, _size: int) -> tuple[str, list[ast.Import | ast.ImportFrom]]:
    """Fingerprint and imports of a file, which is parsed once."""
    tree = ast.parse(path.read_bytes())
    imports: list[ast.Import | ast.ImportFrom] = []
    waiting: list[Any] = [tree]  # what may hold a definition or an import
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(node)
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and node.body and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
        waiting += [inner for name in BLOCKS for inner in getattr(node, name, ())]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12], imports


def _closure(modules: list[str]) -> set[Path]:
    """Files of `modules` and of the modules of `METHOD` that they import, recursively."""
    paths: set[Path] = set()
    packages = {*(f"driftline.{name}" for name in METHOD), *map(_package, modules)}
    waiting = list(modules)
    while waiting:
        at = waiting.pop()
        path = _file(at)
        if path is None or path in paths:
            continue
        paths.add(path)
        waiting += [name for name in _imports(path, at) if _package(name) in packages]
    return paths


def _package(module: str) -> str:
    """`driftline.cl` of `driftline.cl.ease`; of somebody else's module the first name."""
    return ".".join(module.split(".")[: 2 if module.startswith("driftline.") else 1])


def _file(module: str) -> Path | None:
    """The file of a dotted module; None for a name inside a module."""
    if module.startswith("driftline."):
        path = ROOT.joinpath(*module.split(".")[1:])
        candidates = (path.with_suffix(".py"), path / "__init__.py")
        return next((candidate for candidate in candidates if candidate.is_file()), None)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _imports(path: Path, module: str) -> Iterator[str]:
    """Dotted names that the file of `module` imports, wherever in it.

    `from a import b` gives `a` and `a.b`; relative names are made absolute.
    """
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    for node in _read(path, *_state(path))[1]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


@cache
def version() -> str:
    """The release: that of pyproject.toml in a checkout, else of the installed package."""
    settings = ROOT / "pyproject.toml"
    if settings.is_file() and (ROOT / "run.py").is_file():
        return str(tomllib.loads(settings.read_text())["project"]["version"])
    try:
        return importlib.metadata.version("driftline")
    except importlib.metadata.PackageNotFoundError:  # a copied folder
        return "unknown"


# ------------------------------------------------------------------------------ git


def git_state() -> tuple[dict[str, Any], str]:
    """Commit and dirty flag of the working tree, and the patch that leads to it from the commit.

    Python and YAML files that git does not track are part of both: a new method is such a file.
    """

    def git(*words: str, status: int = 0) -> str:
        done = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=20
        )
        return done.stdout if done.returncode == status else ""

    try:
        commit = git("rev-parse", "HEAD").strip()
        if not commit or not git("ls-files", "core/provenance.py"):  # another project's repository
            return {"commit": None, "dirty": None}, ""
        listed = git("ls-files", "--others", "--exclude-standard", "-z", "--", "*.py", "*.yaml")
        untracked = [name for name in listed.split("\0") if name]
        patch = git("diff", "HEAD")
        # status 1: the files differ
        patch += "".join(
            git("diff", "--no-index", "--", "/dev/null", name, status=1) for name in untracked
        )
        return {"commit": commit, "dirty": bool(patch)}, patch
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}, ""
