"""Whole runs on embedded images: they complete, resume bit for bit and label what they write."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import HANG, ROOT, equal, plain_yaml, python, strategy_node
from omegaconf import OmegaConf
from test_contract import KILLED, OF_FILES, by_default, labels_never_arrive

from driftline.core import checkpoint
from driftline.core.build import locate
from driftline.core.errors import UserError
from driftline.core.features import FeatureCache
from driftline.core.processes import Lock
from driftline.runs import compose, execute
from driftline.runs import folder as folders
from driftline.runs.compose import complete, make_stream
from driftline.runs.execute import run_experiment
from driftline.streams.pipelines import Geometry

CONF = ROOT / "conf" / "strategy"
TARGETS = {p.stem: plain_yaml(p)["_target_"] for p in sorted(CONF.glob("*.yaml"))}
TTA = [n for n, t in TARGETS.items() if t.startswith("driftline.tta.")]
CL = [n for n, t in TARGETS.items() if t.startswith("driftline.cl.")]
TINY = {
    "tta": [
        "scenario=imagenet_c",
        "scenario.corruptions=[contrast,brightness,pixelate]",
        "scenario.images=40",
        "scenario.batch_size=16",  # the last batch of a segment is short
        "scenario.probe_images=20",
        "scenario.clean_images=20",
    ],
    "cl": [
        "scenario=split_cifar10",
        "scenario.increment=4",
        "scenario.embedded_images=[6,3]",
        "scenario.batch_size=10",
    ],
}
QUICK = {  # what keeps a run of seconds
    "cotta": ["strategy.views=2", "strategy.threshold=2"],
    "vida": ["strategy.views=2", "strategy.rank_high=8", "scenario.source_images=40"],
    "ecotta": ["scenario.source_images=40"],
    "ranpac": ["strategy.projection=32"],
    "acil": ["strategy.projection=32", "strategy.optim.lr=0.01"],
    **{name: ["strategy.replay_batch=4"] for name in ("adab2n", "er", "der", "derpp", "ser")},
    "hpcr": ["strategy.replay_batch=4"],
    "coda": ["strategy.pool=30"],
    "becotta": ["strategy.blocks=1", "scenario.source_images=40"],
    "lsa": ["scenario.source_images=40"],
    "psmt": ["scenario.source_images=40"],
    "eata": ["scenario.source_images=40"],
    "come_eata": ["scenario.source_images=40"],
    "rmt": ["strategy.warmup_images=128", "scenario.source_images=40"],
    "memo": ["strategy.views=2"],
    "simatta": ["strategy.max_updates=1", "strategy.train_batch=4"],
    "foa": ["strategy.population=6", "scenario.source_images=40"],
    "petal": ["strategy.views=2", "scenario.source_images=40"],
}


def settings(strategy: str) -> list[str]:
    kind = TARGETS[strategy].split(".")[1]
    trains = "epochs" in strategy_node(strategy)
    epochs = ["strategy.epochs=2"] if trains else []
    return [f"strategy={strategy}", *TINY[kind], *epochs, *QUICK.get(strategy, [])]


def records(folder: str | Path) -> dict[str, list[dict]]:
    """All rows of a run without their durations."""
    found = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.stem] = [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    return found


class Kill(BaseException):
    """As sudden as SIGKILL: nothing is saved on the way out."""


def stop_after(monkeypatch, batches: int) -> None:
    """The next run dies after so many batches."""
    ticks = iter(range(batches - 1))
    real = checkpoint.Checkpointer.tick

    def tick(self, *args, **cursor):
        real(self, *args, **cursor)
        if next(ticks, None) is None:
            raise Kill

    monkeypatch.setattr(checkpoint.Checkpointer, "tick", tick)


# ------------------------------------------------------------------------ contracts


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Results of many runs, for which the run of the source model is made once."""
    return tmp_path_factory.mktemp("results")


RUN = KILLED | {c.name for c in OF_FILES if c.adapts and by_default(c, labels_never_arrive)}
RECORDED = [  # by default those that go through no other run
    pytest.param(name, marks=[pytest.mark.release] * (name in RUN - {"source", "cotta", "ease"}))
    for name in (*TTA, *CL)
]
SMALL = ["scenario.images=24", "scenario.probe_images=8", "scenario.clean_images=8"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", RECORDED)
def test_run_records_stability_plasticity_and_cost(configure, results, strategy, capsys):
    small = ["scenario.increment=5", "scenario.embedded_images=[4,2]"]  # two tasks
    if strategy in TTA:
        small = [*SMALL, "scenario.images=12"]
    summary = run_experiment(configure(*settings(strategy), *small, f"root={results}"), [])
    folder = Path(summary["run"]["folder"])
    label = "imagenet_c[embedded]" if strategy in TTA else "split_cifar10[embedded]"
    assert folder.parts[-4] == label
    node = strategy_node(strategy)
    prepares = strategy in TTA and locate(node["_target_"]).uses_source(node)
    assert ("prepared" in summary) == prepares
    replays = strategy in TTA and locate(node["_target_"]).replays_source(node)
    assert ("replayed" in summary) == replays
    assert ("frozen" in summary) == (prepares and "update" in node)
    metrics, cost = summary["metrics"], summary["cost"]
    assert {"plasticity", "stability", "forgetting", "bwt"} <= set(metrics)
    assert cost["parameters_total"] > 0 and cost["peak_memory_mb"] > 0
    for path in folder.glob("*.jsonl"):
        assert set(pd.read_json(path, lines=True).scenario) == {label}
    stored = json.loads((folder / "environment.json").read_text())
    assert len(stored["weights"]["hash"]) == 16 and stored["packages"]["torch"]
    out = capsys.readouterr().out
    assert all(line.startswith(f"{label} | ") for line in out.splitlines())
    assert "data.root=/path/to/data" in out.splitlines()[0]
    assert not (folder / "last.pt").exists()
    if strategy in TTA and strategy != "source":
        assert Path(summary["source"]["folder"]).is_dir()
        assert set(summary["source"]["metrics"]) >= {"err_mean", "err/contrast:5"}
        assert cost["images"] == 36 and cost["forward_images"] >= 36


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "batches"),
    [
        ("ecotta", 5),
        pytest.param("gtta", 5, marks=pytest.mark.release),
        pytest.param("aper", 3, marks=pytest.mark.release),
        ("ease", 9),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(configure, monkeypatch, strategy, batches):
    """In test_contract.py every strategy is killed; here with folder, records and companions."""
    words = [*settings(strategy), *(SMALL if strategy in TTA else [])]
    whole = run_experiment(configure(*words), [])
    want = records(whole["run"]["folder"])
    cfg = configure(*words, "on_exists=rerun", "checkpoint.every=2")
    with monkeypatch.context() as patch:
        stop_after(patch, batches)
        with pytest.raises(Kill):
            run_experiment(cfg, [])
    again = run_experiment(cfg, [])
    assert again["metrics"] == whole["metrics"]
    assert records(again["run"]["folder"]) == want
    assert again["run"]["folder"] == whole["run"]["folder"] + "-2"


@pytest.mark.one_in(2)
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["finetune", "ease"])
def test_how_test_images_are_batched_changes_no_metric(configure, strategy):
    base = run_experiment(configure(*settings(strategy)), [])
    other = run_experiment(configure(*settings(strategy), "scenario.test_batch_size=3"), [])
    assert base["metrics"] == other["metrics"] and base["per_class"] == other["per_class"]


@pytest.mark.one_in(3)
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["source", "cotta", "finetune"])
def test_same_seed_same_numbers_in_one_process(configure, strategy):
    """State does not leak from one run into the next, as in a sweep."""
    words = [*settings(strategy), *(SMALL if strategy in TTA else [])]
    first = run_experiment(configure(*words), [])
    torch.rand(7)
    second = run_experiment(configure(*words, "on_exists=rerun"), [])
    assert first["metrics"] == second["metrics"]
    assert records(first["run"]["folder"]) == records(second["run"]["folder"])


@pytest.mark.slow
def test_worker_processes_do_not_change_a_number(configure):
    words = [*settings("tent"), *SMALL]
    base = run_experiment(configure(*words), [])
    more = run_experiment(configure(*words, "on_exists=rerun", "runtime.workers=2"), [])
    assert base["metrics"] == more["metrics"]


def test_finished_run_is_found_and_not_run_again(configure, monkeypatch, capsys):
    cfg = configure(*settings("source"))
    first = run_experiment(cfg, [])
    with monkeypatch.context() as patch:
        patch.setattr(execute, "make_strategy", None)  # not even a network is built
        assert run_experiment(cfg, [])["metrics"] == first["metrics"]
    assert "already done" in capsys.readouterr().out
    cfg.on_exists = "error"
    with pytest.raises(UserError, match="finished already"):
        run_experiment(cfg, [])


def test_the_source_row_is_the_source_run(configure):
    """What `strategy=source` gives is what other runs are compared with: one folder, run once."""
    source = run_experiment(configure(*settings("source")), [])
    other = run_experiment(configure(*settings("bn_adapt")), [])
    assert other["source"]["folder"] == source["run"]["folder"]
    gain = other["source"]["gain"]["err_mean"]
    assert gain == source["metrics"]["err_mean"] - other["metrics"]["err_mean"]


def test_matrix_of_a_source_run_has_equal_rows(configure):
    """Without adaptation nothing is forgotten: every row of R equals the start row."""
    summary = run_experiment(configure(*settings("source")), [])
    frame = pd.read_json(Path(summary["run"]["folder"]) / "matrix.jsonl", lines=True)
    table = frame.pivot(index="after", columns="on", values="acc")
    assert list(table.index) == [-1, 0, 1, 2] and "clean" in table
    assert (table == table.iloc[0]).all().all()
    assert summary["metrics"]["forgetting"] == 0 and summary["metrics"]["stability"] == 100


@pytest.mark.slow
def test_the_source_phase_alone_is_cached_by_the_weights(configure):
    words = ["strategy=ecotta", *TINY["tta"], *SMALL, "scenario.source_images=40"]
    first = run_experiment(configure(*words, "stage=prepare"), [])["prepared"]
    again = run_experiment(configure(*words, "stage=prepare"), [])["prepared"]
    assert not first["cached"] and again["cached"] and first["artefact"] == again["artefact"]
    other = ["backbone=test_resnet", "backbone.num_classes=20", "backbone.classes=embedded"]
    changed = run_experiment(configure(*words, *other, "stage=prepare"), [])["prepared"]
    assert not changed["cached"] and changed["key"] != first["key"]
    summary = run_experiment(configure(*words), [])
    assert summary["prepared"]["cached"] and summary["prepared"]["key"] == first["key"]
    assert summary["prepared"]["source"] == "embedded training images"
    assert "batches_without_confident_image" in summary["method"]
    with pytest.raises(UserError, match="needs no preparation"):
        run_experiment(configure("strategy=tent", *TINY["tta"], "stage=prepare"), [])
    with pytest.raises(UserError, match="stage must be one of 'run', 'prepare', got 'prep'"):
        run_experiment(configure("strategy=tent", "stage=prep"), [])


@pytest.mark.slow
def test_cotta_takes_its_threshold_from_the_source(configure):
    words = ["strategy=cotta", *TINY["tta"], *SMALL, "strategy.views=2"]
    words += ["scenario.source_images=100"]
    summary = run_experiment(configure(*words, "strategy.threshold=source"), [])
    assert 0 < summary["method"]["threshold"] < 1 and summary["prepared"]["source_images"] == 100
    assert "frozen" not in summary
    value = summary["method"]["threshold"]
    same = run_experiment(configure(*words, f"strategy.threshold={value!r}"), [])
    assert same["metrics"] == summary["metrics"] and "prepared" not in same


@pytest.mark.slow
def test_kept_features_change_no_metric_and_save_passes(configure, monkeypatch):
    words = ["strategy=ease", *TINY["cl"], "scenario.increment=2", "strategy.epochs=1"]
    kept = run_experiment(configure(*words), [])
    fresh = run_experiment(configure(*words, "runtime.feature_cache_mb=0", "on_exists=rerun"), [])
    monkeypatch.setattr(
        "driftline.core.runner.FeatureCache", lambda place, _: FeatureCache(place, 0.001)
    )
    filed = run_experiment(configure(*words, "on_exists=rerun"), [])
    assert kept["metrics"] == fresh["metrics"] == filed["metrics"]
    passes = [r["cost"]["evaluation_forward_images"] for r in (kept, fresh, filed)]
    images = 10 * 3  # 5 tasks: 5 sets an image against a sum of (seen images) * (sets)
    assert passes[0] == passes[2] == 5 * images
    assert passes[1] == sum(6 * t * t for t in range(1, 6)) > 1.9 * passes[0]
    assert kept["cost"]["features_reused"] > 0 and "features_reused" not in fresh["cost"]
    assert not list(Path(filed["run"]["folder"]).glob("features-*"))


def test_batch_of_one(configure):
    one = ["scenario.batch_size=1", "scenario.images=3", "scenario.corruptions=[contrast]"]
    assert run_experiment(configure(*settings("tent"), *one), [])["cost"]["batches"] == 3


def test_labels_outside_the_head_are_refused(configure):
    cfg = configure(*settings("source"))
    cfg.backbone = OmegaConf.load(ROOT / "conf" / "backbone" / "test_resnet.yaml")
    if "num_classes" in cfg.backbone:
        cfg.backbone.num_classes = 7
    with pytest.raises(UserError, match="has 20 classes.*7 outputs"):
        run_experiment(cfg, [])


def test_a_run_whose_checkpoint_is_damaged_begins_again(configure, monkeypatch, capsys):
    run_experiment(configure(*settings("source"), *SMALL), [])  # else the kill would hit this one
    words = [*settings("tent"), *SMALL]
    whole = run_experiment(configure(*words), [])
    cfg = configure(*words, "checkpoint.every=1", "on_exists=rerun")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Kill):
            run_experiment(cfg, [])
    stored = next(Path(cfg.root).rglob("tent/**/last.pt"))
    stored.write_bytes(stored.read_bytes()[:100])
    assert run_experiment(cfg, [])["metrics"] == whole["metrics"]
    assert re.search(r"last\.pt is damaged.*; this run begins again", capsys.readouterr().out)


def test_skipped_images_are_counted_in_the_summary(configure, image_folder_root):
    broken = image_folder_root / "train" / "class1" / "3.png"
    broken.write_bytes(b"no image")
    words = ["scenario=split_imagefolder", f"data.root={image_folder_root}"]
    words += ["scenario.increment=2", "scenario.pipeline=plain", "backbone=embedded_vit"]
    cfg = configure("strategy=simplecil", *words)
    with pytest.raises(UserError, match=r"class1/3\.png.*data\.on_error=skip"):
        run_experiment(cfg, [])
    cfg.data.on_error = "skip"
    with pytest.warns(UserWarning, match=r"skipped: .*class1/3\.png"):
        assert run_experiment(cfg, [])["skipped_images"] == 1


@pytest.mark.slow
def test_wandb_mirrors_a_run_and_the_files_stay_the_same(configure, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    words = [*settings("source"), *SMALL]
    plain = run_experiment(configure(*words), [])
    both = run_experiment(configure(*words, "logger=wandb", "on_exists=rerun"), [])
    assert both["metrics"] == plain["metrics"]
    folder = Path(both["run"]["folder"])
    assert records(folder) == records(plain["run"]["folder"])
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


# ------------------------------------------------------------------------ the phenomena


@pytest.mark.release
@pytest.mark.slow
def test_embedded_shifts_hurt_the_source_and_adaptation_helps(configure):
    found = {}
    words = ["scenario.corruptions=[gaussian_noise,defocus_blur,fog,contrast,pixelate]"]
    words += ["scenario.images=100", "scenario.probe_images=0"]
    for strategy in ("source", "bn_adapt", "tent", "cotta"):
        cfg = configure(f"strategy={strategy}", *words)
        found[strategy] = run_experiment(cfg, [])["metrics"]
    source = found["source"]["err_mean"]
    assert source >= 35 and source >= 3 * found["source"]["clean_err_before"]
    for strategy in ("bn_adapt", "tent", "cotta"):
        assert found[strategy]["err_mean"] < source - 10


@pytest.mark.slow
def test_embedded_tasks_are_forgotten_by_finetuning_and_kept_by_class_means(configure):
    quick = ["strategy.epochs=3", "strategy.optim.lr=0.03", "strategy.optim.schedule=cosine"]
    stream = ["scenario=split_cifar10", "scenario.increment=2", "scenario.embedded_images=[30,10]"]
    finetune = configure(*stream, "strategy=finetune", *quick)
    simplecil = configure(*stream, "strategy=simplecil")
    assert run_experiment(finetune, [])["metrics"]["forgetting"] >= 30
    assert run_experiment(simplecil, [])["metrics"]["forgetting"] < 10


# ------------------------------------------------------------------------ real processes


def launch(root: Path, *words: str, script: tuple[str, ...] = ("run.py",)) -> subprocess.Popen[str]:
    command = [sys.executable, *script, *words, f"root={root}", "runtime.threads=1"]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def pausing(marker: Path, strategy: str, batches: int) -> tuple[str, ...]:
    """The script that stands still after so many batches of `strategy`."""
    return ("tests/paused_run.py", str(marker), strategy, str(batches))


def wait_for(marker: Path, process: subprocess.Popen[str]) -> int:
    """The process number that the script writes into `marker`, once it does."""
    while not marker.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    return int(marker.read_text())


@pytest.mark.slow
def test_ctrl_c_and_kill_leave_a_run_that_the_same_command_completes(configure, tmp_path):
    words = [*settings("cotta"), "checkpoint.every=1"]
    whole = run_experiment(configure(*words), [])
    broken = tmp_path / "broken"
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
        marker = tmp_path / f"paused{number}"
        process = launch(broken, *words, script=pausing(marker, "cotta", 2))
        wait_for(marker, process)
        process.send_signal(number)
        out, _ = process.communicate(timeout=HANG)
        assert process.returncode == code, out
        assert "Traceback" not in out
    process = launch(broken, *words)
    out, _ = process.communicate(timeout=HANG)
    assert process.returncode == 0 and "resuming in segment 1, batch 2" in out, out  # 3 + 2 seen
    stored = next(broken.rglob("cotta/*/*/summary.json"))
    assert json.loads(stored.read_text())["metrics"] == whole["metrics"]
    assert records(stored.parent) == records(whole["run"]["folder"])


@pytest.mark.slow
def test_a_second_process_on_the_same_run_is_refused(configure, tmp_path):
    words = settings("cotta")
    first = launch(tmp_path, *words, script=pausing(tmp_path / "paused", "cotta", 1))
    wait_for(tmp_path / "paused", first)
    with pytest.raises(UserError, match="is being written by"):
        run_experiment(configure(*words, f"root={tmp_path}"), [])
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=HANG)
    assert first.returncode == 130, out


def test_in_a_sweep_a_run_waits_for_another_one_that_is_at_it(configure, monkeypatch, capsys):
    words = settings("source")
    done = run_experiment(configure(*words), [])
    folder = Path(done["run"]["folder"])
    summary = (folder / "summary.json").rename(folder / "kept.json")
    other = Lock(folder)
    assert other.acquire()

    def finish() -> None:
        summary.rename(folder / "summary.json")
        other.release()

    monkeypatch.setattr(folders.time, "sleep", lambda seconds: finish())  # while it waits
    assert run_experiment(configure(*words, "runtime.wait=true"), []) == done
    assert "which is at the same run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("strategy", "word", "message"),
    [
        ("tent", "strategy.optim.lr=fast", "strategy.optim.lr must be a finite number, at least 0"),
        (
            "ease",
            "strategy.optim.lr=-1",
            "strategy.optim.lr must be a finite number, at least 0, got -1",
        ),
        ("tent", "kernel.backend=tritn", "did you mean 'triton'"),
    ],
)
def test_a_mistake_in_the_settings_shows_before_anything_is_run(
    configure, tmp_path, strategy, word, message
):
    with pytest.raises(UserError, match=message):
        run_experiment(configure(*settings(strategy), word), [])
    assert not list(tmp_path.rglob("embedded_*"))


@pytest.mark.release
@pytest.mark.slow
def test_sweep_goes_on_after_a_failed_run(tmp_path):
    words = ["-m", "strategy=source,finetune,bn_adapt", *TINY["tta"], f"root={tmp_path}"]
    sweep = subprocess.run(
        [python(), "run.py", *words], cwd=ROOT, text=True, capture_output=True, timeout=HANG
    )
    out = sweep.stdout + sweep.stderr
    assert sweep.returncode == 2 and "failed: strategy=finetune" in out, out
    done = {p.parts[-4] for p in tmp_path.rglob("summary.json")}
    assert done == {"source", "bn_adapt"}


def test_a_network_is_built_once_and_a_method_where_the_runs_to_compare_with_are_done(
    configure, monkeypatch
):
    made: list[str] = []
    networks: list[str] = []
    make, build = execute.make_strategy, compose.build

    def counted_make(cfg, *rest):
        made.append(cfg.strategy.name)
        return make(cfg, *rest)

    def counted_build(node, *, at, **given):
        networks.extend([node.name] if at == "backbone" else [])
        return build(node, at=at, **given)

    monkeypatch.setattr(execute, "make_strategy", counted_make)
    monkeypatch.setattr(compose, "build", counted_build)
    first = run_experiment(configure(*settings("tent")), [])
    assert made == ["tent", "source", "tent"]  # the source run needs the memory
    assert networks == ["embedded_resnet"]  # of which both begin
    made.clear()
    second = run_experiment(configure(*settings("tent"), "on_exists=rerun"), [])
    assert made == ["tent"] and second["metrics"] == first["metrics"]


def test_the_second_network_is_as_the_first_was_built_and_shares_nothing_with_it(configure):
    cfg = complete(configure(*settings("tent")))
    stream = make_stream(cfg, Geometry(), torch.device("cpu"))
    network = compose.Network()
    first, weights = network.fresh(cfg, stream)
    drawn = torch.rand(3)
    before = deepcopy(first.state_dict())
    for tensor in first.state_dict().values():
        tensor.zero_()
    first.passes.forward = 5
    second, same = network.fresh(cfg, stream)
    assert same == weights and equal(second.state_dict(), before)
    assert torch.equal(torch.rand(3), drawn) and second.passes.forward == 0
