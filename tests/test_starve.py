"""A machine that lacks something: one line, nothing half written, and the run goes on later."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import resource
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_runs import records

from driftline.core import features, files
from driftline.core.errors import UserError, shortage
from driftline.core.files import replacing, sweep_away, write_checked
from driftline.runs import command
from driftline.runs.execute import run_experiment
from driftline.streams import content, loading
from driftline.streams.images import Arrays, Derived, ImageError, open_rgb

SHORT = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "disk quota exceeded",
    errno.EFBIG: "file too large",
    errno.EMFILE: "too many open files",
    errno.ENFILE: "too many open files",
    errno.ENOMEM: "out of memory",
    errno.EAGAIN: "resource temporarily unavailable",
    errno.EROFS: "read-only file system",
    errno.EACCES: "permission denied",
    errno.EIO: "input/output error",
}


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("number", SHORT)
def test_what_is_short_is_one_line_however_it_is_told(number):
    text = os.strerror(number)
    told = [
        OSError(number, text, "/runs/last.pt.tmp"),
        RuntimeError(f"Caught OSError in DataLoader worker process 0.\n[Errno {number}] {text}"),
        OSError(f"Caught OSError in DataLoader worker process 0.\n[Errno {number}] {text}"),
        Exception(f'Error while serializing: Os {{ code: {number}, message: "{text}" }}'),
        caused(RuntimeError("file write failed"), OSError(number, text)),
    ]
    for error in told:
        line = shortage(error)
        assert line is not None and "\n" not in line and line.startswith(SHORT[number])
        assert "The same command goes on from the last saved state" in line
    assert "(/runs/last.pt)" in str(shortage(told[0]))


def test_words_of_libraries_for_too_little_memory():
    for error in (
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        RuntimeError("can't start new thread"),
        ImportError("libx.so: failed to map segment from shared object"),
    ):
        assert shortage(error), error


@pytest.mark.parametrize(
    "error",
    [
        SystemError("error return without exception set"),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not execute a primitive"),
    ],
    ids=str,
)
def test_a_lack_of_memory_without_an_exception_of_its_own(error, monkeypatch):
    """CPython has no memory left for a MemoryError; oneDNN does not say what it lacked."""
    assert shortage(error) is None  # of other origin
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (2**30, 2**30))
    assert str(shortage(error)).startswith("out of memory")


def test_a_worker_that_lacks_something_prints_no_traceback(capsys, monkeypatch):
    """`multiprocessing` prints one by this function, beside the line that the run ends with."""
    monkeypatch.setattr(traceback, "print_exc", traceback.print_exc)  # put back afterwards
    threads = torch.get_num_threads()
    loading._begin_worker(0)
    torch.set_num_threads(threads)
    for error, lines in ((RuntimeError("can't start new thread"), 1), (ValueError("a fault"), 4)):
        try:
            raise error
        except Exception:
            traceback.print_exc()
        printed = capsys.readouterr().err.splitlines()
        assert len(printed) == lines and printed[-1] == f"{type(error).__name__}: {error}"


def test_what_is_wrong_otherwise_is_no_shortage():
    for error in (
        FileNotFoundError(errno.ENOENT, "no such file", "x"),
        ValueError("lr must be positive"),
        UserError("the disk quota of Permission denied"),
        # An answer of our own is better than this one ...
        caused(UserError("cannot write to the results folder"), PermissionError(errno.EACCES, "")),
    ):
        assert shortage(error) is None, error
    # ... but not where it blames a file for what the machine lacks.
    wrong = UserError("cannot read the checkpoint. Delete it")
    assert "too many open files" in str(shortage(caused(wrong, OSError(errno.EMFILE, ""))))


@pytest.mark.parametrize("size", [64, 5_000])
def test_a_run_without_room_ends_with_a_line_and_goes_on_when_there_is_some(configure, size):
    """No file may be larger: the process hits the limit at another file each time."""
    words = ["strategy=source", "scenario.corruptions=[contrast]", "scenario.images=10"]
    words += ["scenario.probe_images=0", "scenario.clean_images=0", "checkpoint.every=1"]
    cfg = configure(*words)
    mine, other = multiprocessing.Pipe()

    def starved() -> None:
        sys.stdout = io.StringIO()  # pytest keeps what it says in a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            run_experiment(cfg, [])
            other.send("it was enough")
        except UserError as error:
            other.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=starved)
    process.start()
    other.close()
    text = mine.recv()
    process.join()
    assert text.startswith("file too large (") and "\n" not in text
    root = Path(cfg.root)
    assert not list(root.rglob("*.tmp")) and not list(root.rglob("summary.json"))
    after = run_experiment(cfg, [])
    cfg.root = str(root / "whole")
    whole = run_experiment(cfg, [])
    assert after["metrics"] == whole["metrics"]
    assert records(after["run"]["folder"]) == records(whole["run"]["folder"])


# ------------------------------------------------------------------------ images


def test_a_lack_of_file_handles_is_no_fault_of_an_image(tmp_path, monkeypatch):
    """It would be left out under data.on_error=skip, or be another image to the fingerprint."""
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)

    def none_left(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", none_left)
        with pytest.raises(OSError, match="Too many open files") as caught:
            open_rgb(path)
        assert not isinstance(caught.value, ImageError)
        patch.setattr(content, "_sampled", none_left)
        with pytest.raises(OSError, match="Too many open files"):
            content.file_digests(tmp_path, ["a.png"])
    path.unlink()
    with pytest.raises(ImageError):
        open_rgb(path)
    assert not content.file_digests(tmp_path, ["a.png"]).any()


def test_images_that_cannot_be_kept_are_made_each_time(tmp_path, monkeypatch):
    pixels = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    made: list[int] = []

    def change(image: Image.Image, row: int) -> Image.Image:
        made.append(row)
        return image

    images = Derived(Arrays(pixels, np.zeros(2), ["a"]), change, "same", tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.warns(UserWarning, match=r"no more images go to data\.cache: .*No space left"):
        assert np.array_equal(images.image(1), pixels[1])
    assert np.array_equal(images.image(1), pixels[1]) and made == [1, 1]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_features_on_a_full_disk_are_an_error_and_not_a_dead_process(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features.os, "posix_fallocate", full)
    cache = features.FeatureCache(tmp_path, limit_mb=0)
    with pytest.raises(OSError, match="No space left"):
        cache._put("test0", "net", "v", features.torch.zeros(4, 2))
    cache.close()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ files


def test_a_rename_outlasts_a_power_cut(tmp_path, monkeypatch):
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        files.os, "fsync", lambda d: calls.append(os.readlink(f"/proc/self/fd/{d}")) or fsync(d)
    )
    monkeypatch.setattr(files.os, "replace", lambda a, b: calls.append("rename") or replace(a, b))
    with write_checked(tmp_path / "last.pt", "kind-1", "0a") as file:
        file.write(b"state")
    assert calls == [str(tmp_path / "last.pt.tmp"), "rename", str(tmp_path)]


def test_a_failed_write_names_its_file(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="x.json"), replacing(tmp_path / "x.json") as part:
        part.write_text("{}")
    assert not list(tmp_path.iterdir())


def test_temporary_files_of_killed_processes_go_and_those_of_others_stay(tmp_path):
    for name in ("000001.npy.7.tmp", "000002.npy.8.tmp", "000003.npy"):
        (tmp_path / name).write_bytes(b"half")
    old = time.time() - 7200
    for name in ("000001.npy.7.tmp", "000003.npy"):
        os.utime(tmp_path / name, (old, old))
    sweep_away(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000002.npy.8.tmp", "000003.npy"]


@pytest.mark.parametrize("stage", ["check_words", "check_launcher", "spelled_out", "sweep", "run"])
def test_no_memory_at_any_stage_of_a_command_is_one_line(monkeypatch, capsys, stage):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(command, stage, fail)
    monkeypatch.setattr(sys, "argv", ["run.py", *(["-m"] if stage == "sweep" else [])])
    assert command.main() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory") and err.count("\n") == 1
