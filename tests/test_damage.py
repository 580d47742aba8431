"""Damaged files: never a traceback, never other numbers; what can be made anew is, and said."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image
from test_runs import settings

from driftline.analysis.runs import load_batches, load_runs
from driftline.core.checkpoint import Checkpointer, Signals
from driftline.core.files import Damaged, read_record, write_record
from driftline.core.record import RunLogger
from driftline.runs import sweep
from driftline.runs.execute import run_experiment
from driftline.runs.folder import choose_folder
from driftline.streams.images import Arrays, Derived

CODE = {"python": "3.11", "method": {"a.py": "1"}, "framework": {"b.py": "2"}}
SUMMARY = {"run": {"seed": 0}, "metrics": {"err_mean": 12.5}, "cost": {"batches": 3}}


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),  # what some file systems leave after a power cut
    "flipped": flipped,
    "no text": lambda content: b"\xff\xfe\x00" + content,
    "list": lambda content: b"[1, 2]\n",
    "other": lambda content: b'{"format": 99}\n',
    "nested": lambda content: b"[" * 100_000,
}
damaged = pytest.mark.parametrize("damage", DAMAGES)


def harm(path: Path, damage: str) -> None:
    path.write_bytes(DAMAGES[damage](path.read_bytes()))


def test_every_changed_byte_of_a_record_is_noticed_or_changes_nothing(tmp_path):
    path = tmp_path / "summary.json"
    write_record(path, SUMMARY)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 3):
            content = bytearray(whole)
            content[place] ^= 1 << bit
            path.write_bytes(content)
            try:
                record = read_record(path)
            except Damaged:
                continue
            # A changed name of the field `checksum` leaves a record as earlier versions wrote it.
            assert {k: record[k] for k in SUMMARY} == SUMMARY


# ------------------------------------------------------------------------ of a run


@pytest.fixture
def finished(tmp_path) -> Path:
    """The folder of a run that is done, as far as its files are looked at."""
    folder = tmp_path / "s0-0123abcd"
    folder.mkdir()
    write_record(folder / "environment.json", {"code": CODE})
    write_record(folder / "summary.json", SUMMARY)
    return folder


@damaged
def test_a_run_whose_result_is_damaged_is_made_again_in_its_folder(finished, damage):
    assert choose_folder(finished.parent, finished.name, "skip", CODE).finished == SUMMARY
    harm(finished / "summary.json", damage)
    place = choose_folder(finished.parent, finished.name, "skip", CODE)
    assert place.folder == finished and place.finished is None
    assert re.fullmatch(r".*summary\.json is damaged: .*; the run is made again", place.notes[0])


@damaged
@pytest.mark.parametrize("last", ["summary.json", "last.pt"])
def test_a_run_of_which_nobody_knows_the_code_is_left_alone(finished, damage, last):
    (finished / "summary.json").rename(finished / last)
    harm(finished / "environment.json", damage)
    place = choose_folder(finished.parent, finished.name, "skip", CODE)
    assert place.folder.name == f"{finished.name}-2" and place.finished is None
    assert "is not recorded" in place.notes[0]


def test_a_state_without_the_record_of_its_code_is_left_alone(finished):
    (finished / "summary.json").rename(finished / "last.pt")
    (finished / "environment.json").unlink()
    assert choose_folder(finished.parent, finished.name, "skip", CODE).folder != finished


@pytest.mark.parametrize("table", ["batches", "matrix"])
@pytest.mark.parametrize("damage", [*DAMAGES, "gone"])
def test_a_state_that_has_lost_its_rows_begins_again(tmp_path, table, damage):
    class Stub:
        def snapshot(self) -> dict[str, int]:
            return {"n": 1}

    lines: list[str] = []

    def opened() -> Checkpointer:
        log = RunLogger(tmp_path, "s")
        return Checkpointer(log, Signals(), key="0123abcd", every=1, say=lines.append)

    checkpoint = opened()
    for name in ("batches", "matrix", "matrix"):
        checkpoint.log.log(name, batch=7)
    checkpoint.save(Stub(), {}, batch=7)  # type: ignore[arg-type]
    checkpoint.log.log("matrix", batch=8)
    checkpoint.log.flush()  # rows after the checkpoint are dropped
    assert opened().load() is not None and len([*opened().log.rows("matrix")]) == 2
    path = tmp_path / f"{table}.jsonl"
    path.unlink() if damage == "gone" else harm(path, damage)
    assert opened().load() is None
    assert len(lines) == 1 and re.search(rf"{table}\.jsonl is damaged.*begins again$", lines[0])
    assert all(not path.read_bytes() for path in tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize("damage", ["flipped", "half", "empty"])
def test_changed_rows_of_a_finished_run_are_in_no_table(finished, damage):
    log = RunLogger(finished, "s")
    for batch in range(9):
        log.log("batches", batch=batch, wrong=batch)
    OmegaConf.save({"seed": 0}, finished / "config.yaml")
    log.finish({**SUMMARY, "rows": log.checksums()})
    assert len(load_batches(load_runs(finished.parent))) == 9
    harm(finished / "batches.jsonl", damage)
    with pytest.warns(UserWarning, match=r"batches\.jsonl is damaged and was left out"):
        assert load_batches(load_runs(finished.parent)).empty


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["config.yaml", "environment.json", "summary.json"])
def test_a_finished_run_with_a_damaged_file_is_in_no_table(finished, file, damage):
    OmegaConf.save({"seed": 0, "strategy": {"name": "tent"}}, finished / "config.yaml")
    checksum = zlib.crc32((finished / "config.yaml").read_bytes())
    record = {"code": CODE, "config_checksum": f"{checksum:08x}"}
    write_record(finished / "environment.json", record)
    assert load_runs(finished.parent)["state"].tolist() == ["done"]
    if file == "environment.json" and damage == "other":
        return  # as an earlier version may have written it
    harm(finished / file, damage)
    runs = load_runs(finished.parent)
    assert runs["state"].tolist() == ["unreadable"] and file in runs["problem"].item()


def test_a_run_made_again_has_the_same_numbers(configure, capsys):
    """Its own result and that of the source beside it are damaged."""
    cfg = configure(*settings("tent"))
    whole = run_experiment(cfg, [])
    for path in Path(cfg.root).rglob("summary.json"):
        harm(path, "half")
        path.with_name("failure.txt.tmp").touch()  # left by a process that was killed
    again = run_experiment(cfg, [])
    assert again["metrics"] == whole["metrics"]
    assert again["source"]["metrics"] == whole["source"]["metrics"]
    assert again["run"]["folder"] == whole["run"]["folder"]
    assert "summary.json is damaged" in capsys.readouterr().out
    assert not list(Path(cfg.root).rglob("*.tmp"))


# ------------------------------------------------------------------------ of other things


@damaged
def test_a_damaged_note_of_a_sweep_is_a_line_of_its_report(tmp_path, damage):
    sweep.plan(tmp_path, [["seed=0"], ["seed=1"]])
    for number in range(2):
        sweep.note(tmp_path, number, state="finished", run=str(tmp_path), overrides=[])
    harm(tmp_path / "1.json", damage)
    text, status = sweep.report(tmp_path)
    assert "1 finished, 1 failed" in text and "what became of it is lost" in text and status == 1


@damaged
def test_a_damaged_cached_image_is_made_again(tmp_path, damage):
    made: list[int] = []

    def change(image: Image.Image, row: int) -> Image.Image:
        made.append(row)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    pixels = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    images = Derived(Arrays(pixels, np.zeros(2), ["a"]), change, "flip", tmp_path)
    whole = np.asarray(images.image(0))
    assert np.array_equal(images.image(0), whole) and made == [0]
    harm(next(tmp_path.rglob("*.npy")), damage)
    assert np.array_equal(images.image(0), whole) and made == [0, 0]
    assert np.array_equal(images.image(0), whole) and made == [0, 0]
