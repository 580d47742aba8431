"""Killed processes hold no lock and leave no process; a lock that cannot be had is said so."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from driftline.core import processes
from driftline.core.errors import UserError
from driftline.core.processes import Lock, lasting_imports
from driftline.core.stream import Skipped
from driftline.runs.sweep import new_folder, plan
from driftline.streams.images import Arrays
from driftline.streams.loading import Reader, Rows
from driftline.streams.pipelines import as_stored


def killed(work) -> None:
    """Run `work(ready)` in a forked process and kill that as soon as it calls `ready`."""
    mine, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=lambda: (work(lambda: other.send(True)), os.kill(os.getpid(), signal.SIGSTOP))
    )
    process.start()
    other.close()
    assert mine.recv()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_child_does_not_hold_the_lock_of_its_dead_parent(tmp_path):
    read, write = os.pipe()

    def work(ready) -> None:
        assert Lock(tmp_path).acquire()
        if os.fork() == 0:
            os.close(write)
            os.read(read, 1)  # lives until this test ends
            os._exit(0)
        ready()

    killed(work)
    assert Lock(tmp_path).acquire()
    os.close(write)
    os.close(read)


def test_loader_processes_end_with_the_process_that_reads_from_them(tmp_path):
    """Their pipe is full: without a signal they would wait in it for ever."""
    read, write = os.pipe()
    images = Arrays(np.zeros((600, 64, 64, 3), np.uint8), np.zeros(600), ["a"])
    rows = Rows.of(images, np.arange(600))

    def work(ready) -> None:
        os.close(read)
        assert Lock(tmp_path).acquire()
        next(Reader([images], Skipped(), workers=2).batches(rows, 50, as_stored))
        ready()

    killed(work)
    os.close(write)
    assert os.read(read, 1) == b""  # the end of a pipe that its last writer has left
    os.close(read)
    assert Lock(tmp_path).acquire()


def test_loader_processes_never_get_a_signal_to_stop(monkeypatch):
    """Not even while they start, before they could say that they leave it to the main process."""
    blocked: list[set[int]] = []
    start = multiprocessing.process.BaseProcess.start

    def noted(self) -> None:
        blocked.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
        start(self)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", noted)
    images = Arrays(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4), ["a"])
    rows = Rows.of(images, np.arange(4))
    assert len(list(Reader([images], Skipped(), workers=2).batches(rows, 2, as_stored))) == 2
    assert len(blocked) == 2 and all({signal.SIGINT, signal.SIGTERM} <= one for one in blocked)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_loader_processes_end_at_a_signal_of_their_parent_alone():
    images = Arrays(np.zeros((600, 64, 64, 3), np.uint8), np.zeros(600), ["a"])
    rows = Rows.of(images, np.arange(600))
    before = set(multiprocessing.active_children())
    batches = Reader([images], Skipped(), workers=2).batches(rows, 50, as_stored)
    seen = len(list(islice(batches, 2)))
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:  # from elsewhere, as a cluster stops a job
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    assert seen + len(list(batches)) == 12
    batches = Reader([images], Skipped(), workers=2).batches(rows, 50, as_stored)
    next(batches)
    for worker in set(multiprocessing.active_children()) - before:
        worker.terminate()
        worker.join()  # as Python does at its end
        assert worker.exitcode == 0


# ------------------------------------------------------------------------ no locks


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def without_locks(request, monkeypatch) -> None:
    """A file system such as Lustre without `-o flock`."""

    def refused(*_: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(processes.fcntl, "flock", refused)


@pytest.mark.usefixtures("without_locks")
@pytest.mark.filterwarnings("ignore:.*without locks")
def test_without_locks_of_the_file_system_a_file_holds_the_folder(tmp_path):
    first, second = Lock(tmp_path), Lock(tmp_path)
    with pytest.warns(UserWarning, match="a file system without locks"):
        assert first.acquire()
    assert not second.acquire() and f"pid {os.getpid()}" in second.holder()
    second.release()
    assert not Lock(tmp_path).acquire()  # it was not the second's to give back
    first.release()
    assert not (tmp_path / ".held").exists()

    def work(ready) -> None:
        assert Lock(tmp_path).acquire()
        ready()

    killed(work)
    assert (tmp_path / ".held").exists() and Lock(tmp_path).acquire()


@pytest.mark.usefixtures("without_locks")
@pytest.mark.filterwarnings("ignore:.*without locks")
@pytest.mark.parametrize("text", ["elsewhere pid 1 7", "", "\xff", "elsewhere"])
def test_nobody_waits_for_a_process_that_cannot_be_asked(tmp_path, text):
    (tmp_path / ".held").write_text(text)
    with pytest.raises(UserError, match=r"cannot be asked .* If it is gone, delete .*\.held"):
        Lock(tmp_path).acquire()


@pytest.mark.usefixtures("without_locks")
@pytest.mark.filterwarnings("ignore:.*without locks")
def test_another_process_with_the_number_of_a_dead_one_holds_nothing(tmp_path):
    (tmp_path / ".held").write_text(f"{socket.gethostname()} pid {os.getpid()} 1")
    assert Lock(tmp_path).acquire()
    assert [p.name for p in tmp_path.glob(".held*")] == [".held"]


def test_a_holder_of_another_machine_that_did_not_end_by_itself_is_said(tmp_path):
    (tmp_path / ".lock").write_text("elsewhere pid 1")
    lock = Lock(tmp_path)
    with pytest.warns(UserWarning, match="a process of elsewhere held"):
        assert lock.acquire()
    lock.release()
    assert (tmp_path / ".lock").read_text() == ""


# ------------------------------------------------------------------------ sweeps


def test_two_sweeps_never_share_a_folder(tmp_path):
    folders = {new_folder(tmp_path) for _ in range(20)}
    assert len(folders) == 20
    folder = folders.pop()
    plan(folder, [["seed=0"]])
    with pytest.raises(UserError, match="is the folder of another sweep"):
        plan(folder, [["seed=1"]])
    assert "seed=0" in (folder / "sweep.json").read_text()


def test_the_folder_of_a_sweep_holds_the_microsecond():
    assert "%f" in (Path(processes.__file__).parents[1] / "conf" / "config.yaml").read_text()


def test_lasting_imports_end_with_garbage_collected_again():
    frozen = gc.get_freeze_count()
    with pytest.raises(ImportError), lasting_imports():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > frozen
