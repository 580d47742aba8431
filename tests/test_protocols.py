"""Every continual method on an online stream of few-shot tasks, and what its result holds."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from conftest import scenario_node
from test_contract import OF_FILES, construct

from driftline.core.build import build
from driftline.core.checkpoint import Checkpointer, Signals
from driftline.core.console import Console
from driftline.core.errors import UserError
from driftline.core.record import RunLogger
from driftline.core.runner import TOLD, Context, run_tasks
from driftline.core.stream import Task, TaskStream
from driftline.parts.buffer import Buffer
from driftline.parts.memory import Memory
from driftline.streams.pipelines import Geometry
from driftline.streams.store import ImageStore

METHODS = [case for case in OF_FILES if not case.adapts]
EVERYTHING = ("joint",)  # reads all images again by definition, the upper bound
PASSES = ("sema",)  # one after the other: sweeps, adapters, descriptors


def few_shot_online() -> TaskStream:
    """Eight classes with two images each, then two with one each; one pass."""
    node = scenario_node(
        "split_cifar",
        dataset="cifar10",
        base=8,
        increment=2,
        class_order="fixed",
        order_seed=0,
        batch_size=5,
        test_batch_size=10,
        test_batches="mixed",
        pipeline="pilot",
        embedded_images=[2, 1],
        shots=1,
        single_pass=True,
    )
    return build(
        node,
        at="scenario",
        data_root=None,
        on_error="raise",
        workers=0,
        seed=1,
        geometry=Geometry(32),
        store=ImageStore(),
    )


def holds_images(method: torch.nn.Module) -> bool:
    """Whether a part of it holds images, or what reads those of earlier tasks again."""
    for part in method.modules():
        if isinstance(part, Buffer | Memory):
            return True
        for name, value in vars(part).items():
            if name == "tasks_begun":
                continue  # tasks without their images
            items = [*value.values()] if isinstance(value, dict) else value
            items = items if isinstance(items, list | tuple) else [items]
            if any(isinstance(getattr(i, "__self__", i), Task) for i in items):
                return True
    return False


@pytest.mark.one_in(5)
@pytest.mark.parametrize("case", METHODS, ids=lambda c: c.name)
def test_few_shots_in_one_pass_give_a_whole_result(case, tmp_path):
    epochs = {"epochs": 1} if "epochs" in case.node else {}
    method = construct(replace(case, node=case.node | epochs))
    log = RunLogger(tmp_path, "tiny")
    checkpoint = Checkpointer(log, Signals(), every=100, key="tiny")
    run = Context(log, checkpoint, Console("tiny", mute=True), torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tiny tasks
        if case.name in PASSES:
            with pytest.raises(UserError, match="goes through a task once"):
                run_tasks(method, few_shot_online(), run)
            return
        result = run_tasks(method, few_shot_online(), run)
    metrics, counts = result["metrics"], result["method"]
    for name in TOLD:
        assert math.isfinite(metrics[name]) and math.isfinite(metrics[f"til/{name}"])
    assert metrics["til/acc_last"] >= metrics["acc_last"]  # the task is known
    assert "nfa" in metrics or not method.epochs
    if holds_images(method) and case.name not in EVERYTHING:
        assert counts["memory_images"] > 0
        assert counts["memory_mib"] >= counts["memory_images"] * 3 * 32 * 32 / 2**20
    outside = {id(t) for t in method.backbone.state_dict(keep_vars=True).values()}
    held = {t.data_ptr(): t.nbytes for t in method.buffers() if id(t) not in outside}
    assert result["cost"]["state_bytes"] >= sum(held.values())
