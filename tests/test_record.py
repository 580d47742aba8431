"""Run folders: records that pandas reads, locks, identity."""

from __future__ import annotations

import json
import multiprocessing
import os

import pandas as pd
import pytest
import torch

from driftline.core.errors import UserError
from driftline.core.files import read_record, write_json
from driftline.core.identity import identity
from driftline.core.processes import Lock
from driftline.core.record import RunLogger


def test_rows_are_tidy_tables_and_carry_the_label(tmp_path):
    log = RunLogger(tmp_path, "imagenet_c[embedded]")
    for i in range(3):
        log.log("batches", segment=0, batch=i, wrong=torch.tensor(i), loss=torch.tensor(0.5))
    log.log("experiences", index=0, err=12.5)
    log.flush()
    frame = pd.read_json(log.path("batches"), lines=True)
    assert list(frame.columns) == ["scenario", "segment", "batch", "wrong", "loss"]
    assert frame.wrong.tolist() == [0, 1, 2] and frame.wrong.dtype.kind == "i"
    assert set(frame.scenario) == {"imagenet_c[embedded]"}
    assert [*log.rows("experiences")] == [
        {"scenario": "imagenet_c[embedded]", "index": 0, "err": 12.5}
    ]


def test_rewind_cuts_rows_written_after_a_checkpoint(tmp_path):
    log = RunLogger(tmp_path, "s")
    log.log("batches", batch=0)
    log.flush()
    offsets = log.offsets()
    log.log("batches", batch=1)
    log.log("matrix", after=0)
    log.flush()
    log.rewind(offsets)
    log.log("batches", batch=7)
    log.flush()
    assert [r["batch"] for r in log.rows("batches")] == [0, 7] and not [*log.rows("matrix")]


def test_finish_is_atomic_and_failure_keeps_the_traceback(tmp_path):
    log = RunLogger(tmp_path, "s")
    try:
        raise ValueError("boom")
    except ValueError as error:
        log.fail(error)
    assert "boom" in (tmp_path / "failure.txt").read_text()
    assert not (tmp_path / "summary.json").exists()
    log.finish({"a": 1})
    assert read_record(tmp_path / "summary.json") == {"a": 1}
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "failure.txt").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Circular"):
        loop: list = []
        loop.append(loop)
        write_json(path, loop)
    assert json.loads(path.read_text()) == {"a": 1}


def test_lock_keeps_a_second_process_out_and_dies_with_its_holder(tmp_path):
    def another_process() -> tuple[bool, str]:
        """Takes the lock if it can and ends without giving it back."""
        mine, other = multiprocessing.Pipe()

        def take() -> None:
            lock = Lock(tmp_path)
            other.send((lock.acquire(), lock.holder()))
            os._exit(0)

        process = multiprocessing.get_context("fork").Process(target=take)
        process.start()
        other.close()  # so that a process that dies early ends the wait
        answer = mine.recv()
        process.join()
        return answer

    lock = Lock(tmp_path)
    assert lock.acquire()
    acquired, holder = another_process()
    assert not acquired and f"pid {os.getpid()}" in holder
    lock.release()
    assert another_process()[0]
    assert Lock(tmp_path).acquire()  # the other process is gone, and its lock with it


def test_folder_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "results").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write.*root="):
        Lock(tmp_path / "results" / "run")


def test_identity_ignores_what_cannot_change_a_number(configure, tmp_path):
    base = identity(configure(), "data")
    same = ["runtime.workers=3", "logger=wandb", "data.root=/x", f"root={tmp_path}/elsewhere"]
    for change in [*same, "on_exists=rerun", "checkpoint.every=1", "data.cache=/tmp/c"]:
        assert identity(configure(change), "data") == base, change
    arithmetic = ("precision=tf32", "precision=bf16", "channels_last=true", "deterministic=true")
    for change in ("seed=1", "scenario.severity=4", *arithmetic):
        assert identity(configure(change), "data") != base, change
    assert identity(configure(), "other data") != base
