"""Releases: one version everywhere, complete archives, results folders of every release open."""

from __future__ import annotations

import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

import driftline
from driftline.core import provenance
from driftline.core.build import nodes
from driftline.core.checkpoint import KIND
from driftline.core.errors import UserError
from scripts.report import report
from tools import release_check

KEPT = ROOT / "tests" / "data" / "results"
VERSIONS = sorted(path.name for path in KEPT.iterdir())
RUNS = [path.parent for path in sorted(KEPT.rglob("environment.json"))]


def test_nothing_is_wrong_with_the_checkout():
    assert list(release_check.of_checkout()) == []
    assert driftline.__version__ == release_check.project()["project"]["version"]


def test_every_release_has_left_a_results_folder():
    assert set(VERSIONS) == set(release_check.released()) - {"0.1.0"}  # which was never published


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The files that a release is compared by."""
    for name in ("pyproject.toml", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests" / "data" / "results" / driftline.__version__).mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "old", "new", "complaint"),
    [
        (
            "pyproject.toml",
            'version = "',
            'version = "9.',
            "newest entry is not that of version 9.",
        ),
        ("pyproject.toml", 'version = "', 'version = "9.', "python tools/release_results.py"),
        ("CITATION.cff", "\nversion: ", "\nversion: 9.", "CITATION.cff: version is 9."),
        ("CITATION.cff", "date-released: ", "date-released: 1", "CITATION.cff: date-released is"),
        ("CHANGELOG.md", "] - ", "] - soon ", "has no date"),
        ("CHANGELOG.md", "## [0", "## [x0", "CHANGELOG.md: the newest entry"),
    ],
)
def test_what_was_forgotten_is_named(checkout, name, old, new, complaint):
    assert list(release_check.of_checkout(checkout)) == []
    text = (checkout / name).read_text()
    assert old in text
    (checkout / name).write_text(text.replace(old, new))
    assert any(complaint in line for line in release_check.of_checkout(checkout))


def test_an_archive_without_a_file_is_named(tmp_path, monkeypatch):
    """The wheel itself is built by tests/test_library.py and by `make release-check`."""
    version = driftline.__version__
    assert "make release-check" in next(release_check.of_archives(tmp_path))
    monkeypatch.setattr(release_check, "runs_from", lambda wheel, version: [])
    wanted = release_check.packaged()
    for file in ("conf/config.yaml", "papers/tent.yaml", "kernels/tuning.json", "__init__.py"):
        assert file in wanted
    assert any(name.startswith("backbones/weights/") for name in wanted)
    lost = "conf/config.yaml"
    with zipfile.ZipFile(tmp_path / f"driftline-{version}-py3-none-any.whl", "w") as wheel:
        for name in wanted - {lost}:
            wheel.writestr(f"driftline/{name}", "")
        wheel.writestr("tests/test_release.py", "")
    empty = tmp_path / "empty"
    empty.touch()
    with tarfile.open(tmp_path / f"driftline-{version}.tar.gz", "w:gz") as sdist:
        for name in wanted | {"pyproject.toml", "README.md", "LICENSE"}:
            sdist.add(empty, f"driftline-{version}/{name}")
    problems = "\n".join(release_check.of_archives(tmp_path))
    assert f"whl lacks 1 files: {lost}" in problems and "holds tests beside" in problems
    assert "whl lacks 2 files: LICENSE, NOTICE" in problems
    assert "tar.gz lacks 2 files: NOTICE, driftline/__init__.py" in problems


def test_the_version_of_a_copy_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setattr(provenance.importlib.metadata, "version", lambda name: "1.2.3")
    assert provenance.version.__wrapped__() == "1.2.3"

    def not_installed(name: str) -> str:
        raise provenance.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(provenance.importlib.metadata, "version", not_installed)
    assert provenance.version.__wrapped__() == "unknown"


# ------------------------------------------------------------------------------ results folders


@pytest.mark.parametrize("version", VERSIONS)
def test_runs_of_a_release_are_in_tables_and_reports(version, tmp_path):
    runs = driftline.load_runs(KEPT / version)
    assert (runs["state"] == "unfinished").sum() == 1 and set(runs["state"]) > {"done"}
    done = runs[runs["state"] == "done"]
    for place, row in done.set_index("path").iterrows():
        stored = json.loads((Path(str(place)) / "summary.json").read_text())
        for name, value in stored["metrics"].items():
            assert row[f"metrics.{name}"] == value
    text = report([KEPT / version], tmp_path, formats=["md", "csv"])
    for row in done.itertuples():
        assert row.strategy in text and row.scenario in text
    assert "unfinished" in (tmp_path / "runs.csv").read_text()


@pytest.mark.parametrize("kept", RUNS, ids=lambda path: "-".join(path.relative_to(KEPT).parts[::2]))
def test_the_command_of_a_release_finds_its_run(kept, tmp_path):
    """The same folder, or with other code of the method one with the next number beside it; never
    another key. An unfinished run goes on, or says in one line why it does not."""
    words = (kept / "overrides.txt").read_text().split()
    if not any(word.startswith("scenario=") for word in words):
        pytest.skip("the source run of another run, which is found with that")
    root = tmp_path / "results"
    shutil.copytree(KEPT / kept.relative_to(KEPT).parts[0], root)
    here = root.joinpath(*kept.relative_to(KEPT).parts[1:])
    before = {path: path.stat().st_mtime_ns for path in here.iterdir()}
    code = json.loads((here / "environment.json").read_text())["code"]
    cfg = OmegaConf.load(here / "config.yaml")
    targets = [node._target_ for node in (*nodes(cfg.strategy), *cfg.around.values())]
    now = provenance.code_of(*targets)
    same = not provenance.changed_files("method", code, now)
    try:
        summary = driftline.run([word for word in words if word[:5] != "root="] + [f"root={root}"])
    except UserError as error:
        assert same and (here / "last.pt").exists() and "Delete it to start this run" in str(error)
        assert KIND.encode() not in (here / "last.pt").read_bytes()
        return
    folder = Path(summary["run"]["folder"])
    assert folder.parent == here.parent and folder.name.startswith(here.name)
    assert (folder == here) == same
    if same and here / "summary.json" in before:
        assert before == {path: path.stat().st_mtime_ns for path in before}
    elif same:
        assert not (here / "last.pt").exists()
        rows = (here / "batches.jsonl").read_text().splitlines()
        places = [(row["segment"], row["batch"]) for row in map(json.loads, rows)]
        assert places == [(segment, batch) for segment in (0, 1) for batch in (0, 1)]
