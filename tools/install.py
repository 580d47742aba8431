"""Install packages into this environment with uv, which needs a third of pip's time.

    .venv/bin/python tools/install.py -e ".[dev]"
    .venv/bin/python tools/install.py -c constraints-oldest.txt -e ".[test]"

Arguments are those of `pip install`. uv reads no settings of pip, so that those of this machine
(index, constraints, certificates) are handed on: both choose the same versions. Where a setting has
no counterpart, uv cannot be had or uv fails, pip does the work.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping

PIP = [sys.executable, "-m", "pip"]
QUIET = ["--quiet", "--disable-pip-version-check"]
OPTIONS = {  # setting of pip -> option of uv, once for each value
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}
VARIABLES = {"cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY", "default-timeout": "UV_HTTP_TIMEOUT"}
NO_MATTER = {  # to which versions are installed
    *("cache-dir", "disable-pip-version-check", "no-cache-dir", "no-color", "no-input"),
    *("progress-bar", "quiet", "require-virtualenv", "retries", "root-user-action", "timeout"),
    *("user", "verbose"),
}
SECTIONS = ("global", "install", ":env:")  # a later one wins


def settings_of_pip(listing: str) -> dict[str, str]:
    """Settings that hold for `pip install`, by name, from what `pip config list` prints."""
    held: dict[str, tuple[int, str]] = {}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in SECTIONS:
            rank = SECTIONS.index(section)
            held[name] = max(held.get(name, (-1, "")), (rank, ast.literal_eval(value)))
    return {name: value for name, (_, value) in held.items()}


def for_uv(settings: Mapping[str, str]) -> tuple[list[str], dict[str, str]] | None:
    """Options and environment variables of uv for these settings; None where uv has no such one."""
    options, variables = ["--index-strategy", "unsafe-best-match"], {}  # as pip looks
    for name, value in settings.items():
        if name in OPTIONS:
            for one in value.split():
                options += [OPTIONS[name], one]
        elif name in VARIABLES:
            variables[VARIABLES[name]] = value
        elif name not in NO_MATTER:
            return None
    return options, variables


def with_uv(packages: list[str]) -> bool:
    """Whether uv has installed the packages."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True)
    translated = for_uv(settings_of_pip(listed.stdout)) if listed.returncode == 0 else None
    if translated is None:
        return False
    if subprocess.run([*PIP, "install", *QUIET, "uv>=0.5"], stderr=subprocess.DEVNULL).returncode:
        return False
    options, variables = translated
    program = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", sys.executable]
    if sys.dont_write_bytecode:  # else the first import does, of what is imported
        program.append("--compile-bytecode")
    return not subprocess.run(
        [*program, *options, *packages], env=os.environ | variables
    ).returncode


def main(packages: list[str]) -> int:
    if with_uv(packages):
        return 0
    print("uv did not install the packages; pip does", file=sys.stderr)
    return subprocess.run([*PIP, "install", *QUIET, *packages]).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
