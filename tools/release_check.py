"""What has to hold before a release: one version everywhere, complete archives, results that open.

    make release-check                       # builds wheel and sdist into dist/, then checks them
    python tools/release_check.py            # the files of the checkout alone
    python tools/release_check.py dist       # and the archives in dist/

Prints what is wrong, one line each, and ends with status 1.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
KINDS = (".py", ".yaml", ".safetensors", ".json", ".txt")
SMALL = "scenario.corruptions=[fog] scenario.images=4 scenario.batch_size=4"
SMALL += " scenario.probe_images=2 scenario.clean_images=2"


def project(root: Path = ROOT) -> dict[str, Any]:
    return tomllib.loads((root / "pyproject.toml").read_text())


def released(root: Path = ROOT) -> dict[str, str]:
    """Version -> date, of the changelog, newest first; `Unreleased` is none."""
    heads = re.findall(r"^## \[([^\]]+)\](?: - (.+))?$", (root / "CHANGELOG.md").read_text(), re.M)
    return {version: date for version, date in heads if version != "Unreleased"}


def of_checkout(root: Path = ROOT) -> Iterator[str]:
    """What is wrong with the files of a checkout."""
    version = project(root)["project"]["version"]
    entries = released(root)
    if next(iter(entries), None) != version:
        yield f"CHANGELOG.md: the newest entry is not that of version {version}"
    for name, date in entries.items():
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
            yield f"CHANGELOG.md: the entry of {name} has no date, `## [{name}] - 2026-01-31`"
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    for key, value in {"version": version, "date-released": entries.get(version)}.items():
        if str(citation.get(key)) != value:
            yield f"CITATION.cff: {key} is {citation.get(key)}, not {value}"
    if not (root / "tests" / "data" / "results" / version).is_dir():
        yield f"tests/data/results/{version} is missing: python tools/release_results.py"


def packaged(root: Path = ROOT) -> set[str]:
    """Files of the checkout that an installed package needs, as paths below `driftline/`."""
    folders = project(root)["tool"]["setuptools"]["package-dir"]
    listed = subprocess.run(
        ["git", "ls-files", *folders.values()], cwd=root, capture_output=True, text=True, check=True
    )
    names = [name for name in listed.stdout.splitlines() if name.endswith(KINDS)]
    return {name.removeprefix("driftline/") for name in names if (root / name).is_file()}


def missing(wanted: Set[str], inside: Set[str], archive: str) -> Iterator[str]:
    """One line for the files that an archive lacks."""
    if lacking := sorted(wanted - inside):
        yield f"{archive} lacks {len(lacking)} files: {', '.join(lacking[:3])}"


def of_archives(folder: Path, root: Path = ROOT) -> Iterator[str]:
    """What is wrong with the wheel and the sdist of this version in `folder`."""
    version = project(root)["project"]["version"]
    wheel = folder / f"driftline-{version}-py3-none-any.whl"
    sdist = folder / f"driftline-{version}.tar.gz"
    for path in (wheel, sdist):
        if not path.is_file():
            yield f"there is no {path}; make release-check builds it"
            return
    wanted = packaged(root)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    inside = {name.removeprefix("driftline/") for name in names if name.startswith("driftline/")}
    yield from missing(wanted, inside, wheel.name)
    yield from missing({"LICENSE", "NOTICE"}, {Path(name).name for name in names}, wheel.name)
    if foreign := {name.split("/")[0] for name in names} - {
        "driftline",
        f"driftline-{version}.dist-info",
    }:
        yield f"{wheel.name} holds {', '.join(sorted(foreign))} beside the package"
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    yield from missing(
        {f"driftline/{name}" if (root / "driftline" / name).is_file() else name for name in wanted}
        | {"pyproject.toml", "README.md", "LICENSE", "NOTICE"},
        inside,
        sdist.name,
    )
    yield from runs_from(wheel, version)


def runs_from(wheel: Path, version: str) -> Iterator[str]:
    """Whether the package of a wheel runs in an empty folder, and says its version."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(Path(folder) / "installed")
        code = "import driftline, sys; print(driftline.__version__); "
        code += "print(driftline.run(sys.argv[1:])['run']['folder'])"
        done = subprocess.run(
            [sys.executable, "-c", code, "strategy=tent", "scenario=cifar10_c", *SMALL.split()],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(Path(folder) / "installed")},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        yield f"{wheel.name} does not run: {done.stderr.strip().splitlines()[-1]}"
    elif done.stdout.split()[0] != version:
        yield f"{wheel.name} says that it is version {done.stdout.split()[0]}"


def main() -> int:
    problems = list(of_checkout())
    for folder in sys.argv[1:]:
        problems += of_archives(Path(folder))
    print("\n".join(problems) or f"version {project()['project']['version']}: nothing is wrong")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
