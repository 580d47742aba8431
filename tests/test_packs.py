"""Large tensors of saved states: written once, whole or said to be lost, never more than twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import begins_again, checkpointer
from test_runs import Kill, records, settings, stop_after
from torch import Tensor

from driftline.core import packs
from driftline.core.checkpoint import Checkpointer
from driftline.runs.execute import run_experiment


class Growing:
    """A strategy whose finished tasks stay and whose present one moves."""

    def __init__(self) -> None:
        self.finished: list[Tensor] = []
        self.present = torch.zeros(200, 100)

    def snapshot(self) -> dict[str, Any]:
        own = {f"task{i}": t for i, t in enumerate(self.finished)}
        return {"tensors": {**own, "present": self.present}, "many": [(1, self.present[:2])]}

    def end_task(self) -> None:
        self.finished.append(torch.randn(200, 100))


def files(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_size for p in sorted(folder.glob("last*"))}


def save(saves: Checkpointer, strategy: Any) -> None:
    strategy.present = strategy.present + 1
    saves.save(strategy, {}, batch=1)


def loaded(folder: Path) -> dict[str, Any]:
    state = checkpointer(folder).load()
    assert state is not None
    return state["strategy"]


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(alike, one, other))
    return one == other


def test_finished_tasks_are_written_once_and_come_back(tmp_path):
    saves, strategy = checkpointer(tmp_path), Growing()
    written = []
    for _ in range(6):
        strategy.end_task()
        for _ in range(3):
            before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("last-*")}
            save(saves, strategy)
            assert alike(loaded(tmp_path), strategy.snapshot())
            after = {p: p.stat().st_mtime_ns for p in tmp_path.glob("last-*")}
            assert before.items() <= after.items()  # no pack is written again
            written.append(files(tmp_path)["last.pt"])
    task = strategy.present.nbytes
    assert len(files(tmp_path)) == 1 + 6
    assert max(written) < 2.4 * task  # the present one, and a task that has just ended
    assert sum(files(tmp_path).values()) < 7.6 * task


def test_a_resumed_run_goes_on_with_the_packs_of_before(tmp_path):
    saves, strategy = checkpointer(tmp_path), Growing()
    strategy.end_task()
    save(saves, strategy)
    save(saves, strategy)
    first = files(tmp_path)
    assert set(first) == {"last.pt", "last-1.pt"}
    again = checkpointer(tmp_path)
    assert again.load() is not None
    strategy.end_task()
    for _ in range(2):
        save(again, strategy)
    assert set(files(tmp_path)) == {"last.pt", "last-1.pt", "last-2.pt"}
    assert alike(loaded(tmp_path), strategy.snapshot())


def test_packs_that_nothing_names_are_deleted_and_half_empty_ones_written_anew(tmp_path):
    saves, strategy = checkpointer(tmp_path), Growing()
    for _ in range(5):
        strategy.end_task()
    for _ in range(2):
        save(saves, strategy)
    assert set(files(tmp_path)) == {"last.pt", "last-1.pt"}
    for left, count in ((3, 1), (1, 1), (0, 0)):
        del strategy.finished[left:]
        save(saves, strategy)
        assert alike(loaded(tmp_path), strategy.snapshot())
        packed = [size for name, size in files(tmp_path).items() if name != "last.pt"]
        assert len(packed) == count
        assert sum(packed) < 2.1 * left * strategy.present.nbytes + 1
    (tmp_path / "last-9.pt").write_bytes(b"of a save that was killed")
    save(saves, strategy)
    assert set(files(tmp_path)) == {"last.pt"}


@pytest.mark.parametrize("damage", ["lost", "empty", "half", "flipped", "of another save"])
def test_a_damaged_pack_is_said_and_the_run_begins_again(tmp_path, damage):
    saves, strategy = checkpointer(tmp_path), Growing()
    strategy.end_task()
    for _ in range(2):
        save(saves, strategy)
    pack, whole = tmp_path / "last-1.pt", (tmp_path / "last-1.pt").read_bytes()
    if damage == "lost":
        pack.unlink()
    elif damage == "of another save":
        strategy.finished = [torch.ones(200, 100)]
        other = tmp_path / "other"
        other.mkdir()
        for _ in range(2):
            save(saves_there := checkpointer(other), strategy)
        for _ in range(2):
            save(saves_there, strategy)
        pack.write_bytes((other / "last-1.pt").read_bytes())
    else:
        flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
        pack.write_bytes({"empty": b"", "half": whole[: len(whole) // 2]}.get(damage, flipped))
    assert begins_again(tmp_path, r"last(-1)?\.pt is (damaged|lost).*; this run begins again$")


def test_removing_a_checkpoint_removes_its_packs(tmp_path):
    saves, strategy = checkpointer(tmp_path), Growing()
    strategy.end_task()
    for _ in range(2):
        save(saves, strategy)
    (tmp_path / "lasting.pt").touch()
    packs.remove(tmp_path / "last.pt")
    assert set(files(tmp_path)) == {"lasting.pt"}


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_of_every_type_and_layout_come_back(tmp_path, kind):
    saves, strategy = checkpointer(tmp_path), Growing()
    values = torch.randint(0, 2, (400, 300)).to(kind)
    strategy.finished = [values, values.T, values[:, ::2], values.to_sparse()]
    for _ in range(3):
        save(saves, strategy)
    state = loaded(tmp_path)["tensors"]
    assert all(
        torch.equal(state[f"task{i}"].to_dense(), t.to_dense())
        for i, t in enumerate(strategy.finished)
    )
    assert (tmp_path / "last-1.pt").exists()


def added(t: Tensor) -> None:
    t.data[3, 5] += 1


def in_numpy(t: Tensor) -> None:
    t.numpy()[7, 1] += 1


def permuted(t: Tensor) -> None:
    t.data.copy_(t.flip(0))


def two_exchanged(t: Tensor) -> None:
    t.data[0, 1], t.data[128, 1] = 0.0, 1.0


@pytest.mark.parametrize("change", [added, in_numpy, permuted, two_exchanged])
def test_changes_that_torch_does_not_count_are_seen(tmp_path, change):
    saves, strategy = checkpointer(tmp_path), Growing()
    strategy.end_task()
    strategy.finished[0][0, 1], strategy.finished[0][128, 1] = 1.0, 0.0
    for _ in range(2):
        save(saves, strategy)
    (tensor,) = strategy.finished
    before = tensor._version
    change(tensor)
    assert tensor._version == before
    save(saves, strategy)
    assert alike(loaded(tmp_path), strategy.snapshot())


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["cotta", "petal", "ease", "mos", "icarl"])
def test_a_killed_run_goes_on_from_packs_bit_for_bit(configure, monkeypatch, strategy):
    """Networks of tests are small: here every tensor may lie in a pack."""
    monkeypatch.setattr(packs, "SMALLEST", 1)
    words = settings(strategy)
    whole = run_experiment(configure(*words), [])
    cfg = configure(*words, "on_exists=rerun", "checkpoint.every=1")
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(Kill):
            run_experiment(cfg, [])
    folder = Path(whole["run"]["folder"] + "-2")
    assert files(folder).keys() > {"last.pt"}
    again = run_experiment(cfg, [])
    assert again["run"]["folder"] == str(folder)
    assert again["metrics"] == whole["metrics"]
    assert records(folder) == records(whole["run"]["folder"])
    assert not files(folder)
