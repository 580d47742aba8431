"""Saved states: every changed bit and every file of another run is noticed, and costs little."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_runs import Kill, settings, stop_after

from driftline.core.checkpoint import Checkpointer, Signals
from driftline.core.errors import UserError
from driftline.core.files import LINE, BadFile, read_checked, replacing, write_checked
from driftline.core.record import RunLogger
from driftline.runs.execute import run_experiment


class Stub:
    """What a checkpoint asks of a strategy: a state."""

    def snapshot(self) -> dict[str, Any]:
        return {"weight": torch.arange(3000.0), "half": torch.ones(5, dtype=torch.float16), "n": 3}


def checkpointer(
    folder: Path, key: str = "0123abcd", say: Callable[[str], None] = print
) -> Checkpointer:
    return Checkpointer(RunLogger(folder, "s"), Signals(), key=key, every=1, say=say)


def begins_again(folder: Path, pattern: str) -> bool:
    """Whether the run in `folder` begins again, and one line says why."""
    lines: list[str] = []
    state = checkpointer(folder, say=lines.append).load()
    return state is None and len(lines) == 1 and bool(re.search(pattern, lines[0]))


@pytest.fixture
def saved(tmp_path) -> Path:
    checkpointer(tmp_path).save(Stub(), {}, batch=7)  # type: ignore[arg-type]
    return tmp_path / "last.pt"


def places(size: int) -> list[int]:
    """14 places of the content, its first and last byte among them, and all of the last line."""
    content = np.linspace(0, size - LINE - 1, 14).astype(int).tolist()
    return [*content, *range(size - LINE, size)]


def test_a_checkpoint_comes_back_as_it_was(saved, tmp_path):
    state = checkpointer(tmp_path).load()
    assert state is not None and state["cursor"] == {"batch": 7}
    for name, want in Stub().snapshot().items():
        have = state["strategy"][name]
        assert torch.equal(have, want) if isinstance(want, torch.Tensor) else have == want
    # Other programs need not know of the line at the end.
    assert torch.load(saved, weights_only=True)["cursor"] == {"batch": 7}


def test_every_flipped_bit_of_a_checkpoint_is_noticed(saved, tmp_path):
    whole = saved.read_bytes()
    for place in places(len(whole)):
        for bit in (0, 3, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            saved.write_bytes(damaged)
            assert begins_again(tmp_path, r"last\.pt is damaged.*; this run begins again$")
    for size in (0, 10, LINE, LINE + 1, len(whole) - LINE, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        assert begins_again(tmp_path, r"last\.pt is damaged")
    saved.write_bytes(whole + b"\0")
    assert begins_again(tmp_path, r"last\.pt is damaged")


def test_a_checkpoint_without_one_of_its_tensors_is_noticed(saved, tmp_path):
    state = checkpointer(tmp_path).load()
    assert state is not None
    del state["strategy"]["weight"]
    line = saved.read_bytes()[-LINE:]
    with open(saved, "wb") as file:
        torch.save(state, file)
        file.write(line)
    assert begins_again(tmp_path, r"last\.pt is damaged")


def test_a_checkpoint_of_another_run_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match=r"of another run.*key 0123abcd, not 00000000.*Delete it"):
        checkpointer(tmp_path, "00000000").load()


def test_a_checkpoint_of_an_earlier_format_gets_one_sentence(tmp_path):
    torch.save({"format": 1, "cursor": {}}, tmp_path / "last.pt")
    assert begins_again(tmp_path, "of another version of this project")
    with write_checked(tmp_path / "last.pt", "checkpoint-9", "0123abcd") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"of another version \(checkpoint-9, not checkpoint-"):
        checkpointer(tmp_path).load()


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["tent", "finetune"])
def test_a_run_does_not_go_on_from_the_state_of_another_seed(configure, monkeypatch, strategy):
    words = [*settings(strategy), "checkpoint.every=1"]
    if strategy == "tent":  # its companion first, so that the kill does not hit that
        for seed in (0, 1):
            run_experiment(configure(*settings("source"), f"seed={seed}"), [])
    for seed in (0, 1):
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            with pytest.raises(Kill):
                run_experiment(configure(*words, f"seed={seed}"), [])
    root = Path(configure().root)
    first, second = (next(root.glob(f"*/{strategy}/*/s{seed}-*/last.pt")) for seed in (0, 1))
    shutil.copyfile(first, second)
    with pytest.raises(UserError, match=r"last\.pt is of another run"):
        run_experiment(configure(*words, "seed=1"), [])
    second.unlink()
    assert run_experiment(configure(*words, "seed=1"), [])["metrics"]


# ------------------------------------------------------------------------ the files themselves


def test_what_fails_while_it_is_written_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x"
    for shared in (False, True):
        with write_checked(path, "kind-1", "ab", shared=shared) as file:
            file.write(b"old")
        with (
            pytest.raises(ZeroDivisionError),
            write_checked(path, "kind-1", "ab", shared=shared) as file,
        ):
            file.write(b"new")
            _ = 1 / 0
        with pytest.raises(KeyboardInterrupt), replacing(path, shared=shared) as part:
            part.write_bytes(b"new")
            raise KeyboardInterrupt
        assert [p.name for p in tmp_path.iterdir()] == ["x"]
        with read_checked(path, "kind-1", "ab") as file:
            assert file.read(3) == b"old"


def test_a_checked_file_belongs_to_a_kind_and_a_key(tmp_path):
    path = tmp_path / "x"
    with write_checked(path, "kind-1", "ab") as file:
        file.write(b"content")
    for kind, key in (("kind-2", "ab"), ("kind-1", "ac")):
        with pytest.raises(BadFile, match=kind if kind != "kind-1" else key):  # noqa: SIM117
            with read_checked(path, kind, key):
                pass
    with pytest.raises(AssertionError, match="too long"), write_checked(path, "k" * 50, "ab"):
        pass
    with read_checked(path, "kind-1", "ab") as file:
        assert file.read(7) == b"content"


def test_at_a_terminal_the_first_ctrl_c_says_what_happens_next(monkeypatch):
    said: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda stream, text: said.append(text))
    for terminal in (False, True):
        monkeypatch.setattr(os, "isatty", lambda stream, terminal=terminal: terminal)
        with Signals() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert signals.stop == signal.SIGTERM
    assert len(said) == 1 and b"stopping after this step" in said[0]
