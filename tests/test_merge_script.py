"""scripts/merge.py: finished runs in, a method for `driftline.load` out, or one line why not."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, equal

import driftline
from driftline.parts import merging
from driftline.runs.execute import MODEL

sys.path.insert(0, str(ROOT / "scripts"))
import merge

SMALL = ["scenario=split_cifar10", "scenario.increment=5", "scenario.embedded_images=[2,1]"]
SMALL += ["strategy.epochs=1", "checkpoint.model=true", "scenario.order_seed=0"]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
RUNS = {
    "first": ["strategy=finetune", "adapter=lora"],
    "second": ["strategy=finetune", "adapter=lora", "seed=1"],
    "other_order": ["strategy=finetune", "adapter=lora", "scenario.order_seed=3"],
    "rank": ["strategy=finetune", "adapter=lora", "strategy.adapter.kind.rank=4"],
    "kind": ["strategy=finetune", "adapter=bottleneck"],
    "scale": ["strategy=finetune", "adapter=lora", "strategy.adapter.kind.scale=2"],
    "columns": ["strategy=finetune", "adapter=paca"],
    "other_columns": ["strategy=finetune", "adapter=paca", "seed=1"],
    "factor": ["strategy=finetune", "adapter=lori"],
    "other_factor": ["strategy=finetune", "adapter=lori", "seed=1"],
    "images": ["strategy=finetune", "adapter=lora", "strategy.adapter.start=eva"],
    "network": ["strategy=finetune", "backbone=embedded_resnet"],
    "averaged": ["strategy=finetune", "adapter=lora", "around=weight_average"],
    "merged": ["strategy=finetune", "adapter=lora", "around=merge", "around.merge.rule=mean"],
    "ease": ["strategy=ease"],
    "probe": ["strategy=linear_probe"],
    "no_model": ["strategy=finetune", "adapter=lora", "seed=2", "checkpoint.model=false"],
}
TENT = ["strategy=tent", "scenario=cifar10_c", "scenario.corruptions=[fog]", "scenario.images=4"]
TENT += ["scenario.clean_images=4", "scenario.probe_images=4", "checkpoint.model=true"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    rows = {name: [*SMALL, *words] for name, words in RUNS.items()} | {"tent": TENT}
    made = {}
    for name, words in rows.items():
        driftline.run([*words, f"root={root / name}"])
        made[name] = next(
            path.parent
            for path in (root / name).rglob("summary.json")
            if "/source/" not in str(path)
        )
    return made


def call(monkeypatch, capsys, *words: Any) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, words)])
    status = merge.main()
    return status, *capsys.readouterr()


def parameters(method: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in method.named_parameters()}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("rule", merging.RULES)
def test_runs_of_one_stream_become_one_method(runs, rule, tmp_path, monkeypatch, capsys):
    out = tmp_path / "m.safetensors"
    pair = runs["first"], runs["second"]
    status, said, _ = call(monkeypatch, capsys, *pair, "--rule", rule, "--out", out)
    assert status == 0 and "2 runs" in said and "heads: averaged" in said and "other seeds" in said
    merged: Any = driftline.load(out)
    one, two = (parameters(driftline.load(folder / MODEL)) for folder in pair)
    got = parameters(merged)
    moved = [n for n in one if n.startswith("bank.")]
    assert moved and any(not torch.equal(got[n], one[n]) for n in moved)
    for name, value in got.items():
        if name.startswith("head.") or (rule == "mean" and name in moved):
            torch.testing.assert_close(value, (one[name] + two[name]) / 2)
        elif name not in moved:
            assert torch.equal(value, one[name])
    about = merged.made_of["merged"]
    assert about["rule"] == rule and about["runs"] == [str(p) for p in pair]
    assert merged.predict(torch.rand(3, 3, 32, 32)).shape == (3, 10)
    assert list(tmp_path.iterdir()) == [out]


def test_runs_of_other_streams_keep_the_first_head_and_can_be_evaluated(
    runs, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "m.safetensors"
    words = [runs["first"], runs["other_order"], "--rule", "task_arithmetic", "--evaluate"]
    status, said, _ = call(
        monkeypatch, capsys, *words, "--option", "scale=0", "weights=[1,2]", "--out", out
    )
    assert status == 0 and f"head: that of {runs['first']}" in said and "other seeds" not in said
    before, after = said.splitlines()[-2:]
    assert before.startswith(str(runs["first"])) and after.startswith("merged: ")
    merged: Any = driftline.load(out)
    head = parameters(driftline.load(runs["first"] / MODEL))["head.weight"]
    assert torch.equal(parameters(merged)["head.weight"], head)
    assert merged.made_of["merged"]["options"]["weights"] == [1, 2]
    fresh = merge.beginning(merge.read(runs["first"]))  # scale 0: what the first run began with
    got = parameters(merged)
    assert equal({n: got[n] for n in fresh}, fresh)


def test_a_run_merged_task_by_task_and_a_merged_file_are_used_without_the_rule(
    runs, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "m.safetensors"
    words = runs["first"], runs["merged"], "--rule", "mean", "--out", out
    assert call(monkeypatch, capsys, *words)[0] == 0
    assert type(driftline.load(out)).__name__ == "Finetune"


BAD: dict[str, tuple[list[str], str]] = {
    "one run": (["first", "--rule", "ties"], "nothing to merge with one run"),
    "twice": (["first", "first", "--rule", "ties"], "is named twice"),
    "no folder": (["first", "NOWHERE", "--rule", "ties"], "no folder of a run"),
    "no model": (["first", "no_model", "--rule", "ties"], "on_exists=rerun checkpoint.model=true"),
    "backbone": (["first", "network", "--rule", "ties"], "another backbone"),
    "shape": (["first", "rank", "--rule", "ties"], r"is \[4, .* in set 1 and \[8, .* in set 0"),
    "names": (["first", "kind", "--rule", "ties"], "do not hold the same tensors: 'bank"),
    "scale": (["first", "scale", "--rule", "ties"], "do not correspond .*: other settings"),
    "columns": (
        ["columns", "other_columns", "--rule", "ties"],
        "chosen differs and does not learn",
    ),
    "factor": (["factor", "other_factor", "--rule", "ties"], "differs and does not learn"),
    "images": (
        ["first", "images", "--rule", "ties"],
        "strategy.adapter.start=eva.*merge runs with",
    ),
    "grows": (["first", "ease", "--rule", "ties"], "strategy=ease cannot be merged: each task has"),
    "head": (["probe", "first", "--rule", "ties"], "strategy=linear_probe .* the head alone"),
    "adapts": (["first", "tent", "--rule", "ties"], "strategy=tent adapts at test time"),
    "rule around": (["first", "averaged", "--rule", "ties"], "around=weight_average answers"),
    "rule": (["first", "second", "--rule", "tise"], "--rule tise is none; did you mean 'ties'"),
    "option": (["first", "second", "--rule", "ties", "--option", "densty=1"], "did you mean 'dens"),
    "value": (["first", "second", "--rule", "ties", "--option", "density=2"], "at most 1, got 2"),
    "text": (["first", "second", "--rule", "ties", "--option", "density=x"], "must be a number"),
    "form": (["first", "second", "--rule", "ties", "--option", "density"], "form key=value"),
    "yaml": (["first", "second", "--rule", "ties", "--option", "density=["], "is no value"),
    "weights": (
        ["first", "second", "--rule", "ties", "--option", "weights=[1]"],
        "1 values for 2 runs",
    ),
    "seed": (["first", "second", "--rule", "dare", "--option", "seed=-1"], "dare.seed must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_merged_is_one_line_and_no_file(runs, name, tmp_path, monkeypatch, capsys):
    words, message = BAD[name]
    words = [str(runs.get(word, word)) for word in words]
    out = tmp_path / "m.safetensors"
    status, said, error = call(monkeypatch, capsys, *words, "--out", out)
    assert status == 2 and not said and len(error.splitlines()) == 1
    assert error.startswith("error: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "unfinished", "foreign"])
def test_a_damaged_run_is_refused(runs, damage, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(runs["second"], copy)
    if damage == "unfinished":
        (copy / "summary.json").unlink()
    else:
        content = (copy / MODEL).read_bytes()
        (copy / MODEL).write_bytes(content[:-9] if damage == "cut" else b"no tensors")
    out = tmp_path / "m.safetensors"
    words = runs["first"], copy, "--rule", "ties", "--out", out
    status, said, error = call(monkeypatch, capsys, *words)
    assert status == 2 and str(copy) in error and not said and not out.exists()


def test_a_file_is_not_replaced_and_none_is_left_half_written(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "m.safetensors"
    words = [runs["first"], runs["second"], "--rule", "ties", "--out"]
    out.write_text("mine")
    status, _, error = call(monkeypatch, capsys, *words, out)
    assert status == 2 and "exists already" in error and out.read_text() == "mine"
    status, _, error = call(monkeypatch, capsys, *words, tmp_path / "m.pt")
    assert status == 2 and "does not end with .safetensors" in error
    out.unlink()

    def full(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("driftline.runs.tensor_file.save_file", full)
    status, _, error = call(monkeypatch, capsys, *words, out)
    assert status == 2 and "No space left" in error and not list(tmp_path.iterdir())
