"""Packages are installed by uv as pip would install them, and by pip where uv cannot."""

from __future__ import annotations

import runpy
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

LISTING = """\
:env:.default-timeout='180'
:env:.find-links='/wheels /more'
global.constraint='/etc/constraints.txt'
global.find-links='/elsewhere'
global.index-url='https://pypi.example/simple'
freeze.format='columns'
"""


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "install.py"))


def answers(monkeypatch, listing: str, failing: str = "") -> list[str]:
    """Programs that are started from here on, as lines; those that contain `failing` fail."""
    lines: list[str] = []

    def start(words: list[str], **options: Any) -> Any:
        lines.append(" ".join(words[2:]))
        failed = bool(failing) and failing in lines[-1]
        return SimpleNamespace(returncode=int(failed), stdout=listing)

    monkeypatch.setattr(subprocess, "run", start)
    return lines


def test_settings_of_pip_are_read_as_pip_reads_them(script):
    assert script["settings_of_pip"](LISTING) == {
        "default-timeout": "180",
        "find-links": "/wheels /more",
        "constraint": "/etc/constraints.txt",
        "index-url": "https://pypi.example/simple",
    }


def test_uv_gets_the_settings_of_pip(script, monkeypatch):
    lines = answers(monkeypatch, LISTING)
    assert script["main"](["-e", ".[dev]"]) == 0
    assert len(lines) == 3 and lines[-1].startswith(
        f"uv pip install --quiet --python {sys.executable}"
    )
    for words in (
        "--find-links /wheels --find-links /more",
        "--constraint /etc/constraints.txt",
        "--default-index https://pypi.example/simple",
        "--index-strategy unsafe-best-match",
    ):
        assert words in lines[-1]
    assert lines[-1].endswith("-e .[dev]")


@pytest.mark.parametrize("name", ["no-binary", "require-hashes", "no-index", "unheard-of"])
def test_pip_installs_where_uv_has_no_such_setting(script, monkeypatch, name):
    lines = answers(monkeypatch, f"global.{name}='true'\n")
    assert script["main"](["-e", ".[dev]"]) == 0
    assert [line.split()[0] for line in lines] == ["pip", "pip"]
    assert lines[-1].startswith("pip install") and lines[-1].endswith("-e .[dev]")


@pytest.mark.parametrize("failing", ["config", "uv>=", "uv pip install"])
def test_pip_installs_where_uv_cannot_be_had_or_fails(script, monkeypatch, failing):
    lines = answers(monkeypatch, LISTING, failing)
    assert script["main"](["-e", ".[dev]"]) == 0
    assert lines[-1].startswith("pip install") and lines[-1].endswith("-e .[dev]")


def test_what_pip_cannot_install_either_is_an_error(script, monkeypatch):
    answers(monkeypatch, LISTING, "-e .[dev]")
    assert script["main"](["-e", ".[dev]"]) == 1


def test_the_makefile_installs_the_project_with_it():
    rules = [
        x for x in (ROOT / "Makefile").read_text().splitlines() if "-e " in x and "[docs]" not in x
    ]
    assert len(rules) == 2 and all("tools/install.py" in rule for rule in rules)


@pytest.mark.parametrize("written", [True, False])
def test_where_python_writes_no_bytecode_it_comes_with_the_packages(script, monkeypatch, written):
    monkeypatch.setattr(sys, "dont_write_bytecode", not written)
    lines = answers(monkeypatch, LISTING)
    assert script["main"](["timm"]) == 0
    assert ("--compile-bytecode" in lines[-1]) is not written
