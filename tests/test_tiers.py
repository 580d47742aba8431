"""Which tests run by default, with `--all`, by name and by marker: two tiers of CONTRIBUTING.md."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import pytest

FILES = {"test_a.py": ("quick", "release"), "test_b.py": ("release",)}


class Item(SimpleNamespace):
    """A test as pytest has it, which is equal to itself alone."""

    __hash__ = object.__hash__


def left_out(
    arguments: list[str], *, every: bool = False, markers: str = "", names: str = ""
) -> list[str]:
    """Names of tests that a call of pytest leaves out of those in FILES."""
    here = Path.cwd()

    def test(file: str, mark: str) -> Any:
        marker = {mark: True}.get
        return Item(name=f"{file}::{mark}", path=here / "tests" / file, get_closest_marker=marker)

    items = [test(file, mark) for file, marks in FILES.items() for mark in marks]
    gone: list[Any] = []
    config: Any = SimpleNamespace(
        args=arguments,
        stash=pytest.Stash(),
        invocation_params=SimpleNamespace(dir=here),
        getoption={"all": every, "markexpr": markers, "keyword": names}.__getitem__,
        hook=SimpleNamespace(pytest_deselected=lambda items: gone.extend(items)),
    )
    every_name = [item.name for item in items]
    conftest.pytest_collection_modifyitems(config, items)
    names = [item.name for item in gone]
    assert [item.name for item in items] == [n for n in every_name if n not in names]
    assert config.stash.get(conftest.LEFT_OUT, 0) == len(names)
    return names


@pytest.mark.parametrize("arguments", [["tests"], ["tests/test_a.py", "tests/test_b.py"]])
def test_by_default_tests_marked_release_are_left_out(arguments):
    assert left_out(arguments) == ["test_a.py::release", "test_b.py::release"]


@pytest.mark.parametrize("how", [{"every": True}, {"markers": "release"}, {"names": "a"}])
def test_who_asks_for_them_gets_them(how):
    assert left_out(["tests"], **how) == []


def test_a_test_that_is_named_runs():
    assert left_out(["tests/test_a.py::release", "tests/test_b.py"]) == ["test_b.py::release"]
    assert left_out([str(Path.cwd() / "tests" / "test_b.py::release")]) == ["test_a.py::release"]


def test_the_count_of_a_worker_process_reaches_the_last_lines():
    config: Any = SimpleNamespace(stash=pytest.Stash())
    node = SimpleNamespace(config=config, workeroutput={"left_out": 1234})
    lines: list[str] = []
    conftest.pytest_testnodedown(node, None)
    conftest.pytest_terminal_summary(SimpleNamespace(write_line=lines.append), config)
    assert lines == ["1,234 tests marked `release` left out: --all runs them"]


@pytest.mark.parametrize("n", [2, 5])
def test_of_a_test_marked_one_in_every_nth_case_stays_and_another_test_begins_elsewhere(n):
    config: Any = SimpleNamespace(stash=pytest.Stash())
    begins = set()
    for name in ("test_one", "test_two", "test_three", "test_four"):
        marked: list[int] = []
        for case in range(3 * n):
            item: Any = Item(
                path=Path("test_a.py"),
                name=f"{name}[{case}]",
                config=config,
                get_closest_marker=lambda mark: SimpleNamespace(args=(n,)),
                add_marker=lambda mark, case=case, marked=marked: marked.append(case),
            )
            conftest.pytest_itemcollected(item)
        stay = sorted({*range(3 * n)} - {*marked})
        assert stay == [*range(stay[0], 3 * n, n)] and len(stay) == 3
        begins.add(stay[0])
    assert len(begins) > 1
