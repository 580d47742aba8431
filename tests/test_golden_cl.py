"""SimpleCIL against numbers recorded from LAMDA-CL/LAMDA-PILOT 5240714 on a tiny ViT.

Rule of the recording: max|got - want| <= rtol * max|want| + 1e-7, rtol per array group.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from driftline.backbones.backbone import Backbone
from driftline.cl.simplecil import SimpleCIL
from driftline.core import metrics
from driftline.core.metrics import AccuracyMatrix
from driftline.core.stream import Batch, Task

FOLDER = Path(__file__).parent / "golden" / "cl"


def backbone() -> Backbone:
    net = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0
    )
    net.load_state_dict(load_file(FOLDER / "vit_a.safetensors"), strict=True)
    return Backbone(net, input_size=32)  # no normalisation: the recorded input is (x - 128) / 64


def tasks(sizes: list[int], size: int = 12) -> list[Task]:
    data = np.load(FOLDER / "data_a.npz")

    def batches(split: str, classes: range):
        x = (torch.from_numpy(data[f"{split}_x"]).float() - 128) / 64
        y = torch.from_numpy(data[f"{split}_y"])
        for rows in torch.nonzero((y >= classes.start) & (y < classes.stop)).flatten().split(size):
            yield Batch(x[rows], y[rows], rows, torch.zeros_like(rows))

    found, first = [], 0
    for index, n in enumerate(sizes):
        classes = range(first, first + n)
        found.append(
            Task(
                index=index,
                name=f"task {index}",
                classes=classes,
                steps=0,
                train=lambda epoch, start=0: iter(()),
                fit=lambda c=classes: batches("train", c),
                test=lambda c=classes: batches("test", c),
            )
        )
        first += n
    return found


@pytest.fixture(scope="module")
def recorded():
    info = json.loads((FOLDER / "pilot" / "simplecil.json").read_text())
    return info, dict(np.load(FOLDER / "pilot" / "simplecil.npz"))


def test_simplecil_reproduces_every_task(recorded):
    info, data = recorded

    def close(name: str, got: torch.Tensor) -> None:
        want = data[name]
        rtol = info["tolerance"]["task*/" + name.split("/")[1]]["rtol"]
        assert got.shape == want.shape, name
        assert np.abs(got.numpy() - want).max() <= rtol * np.abs(want).max() + 1e-7, name

    strategy = SimpleCIL(backbone())
    stream = tasks(info["hyperparameters"]["task_sizes"])
    matrix = AccuracyMatrix([t.name for t in stream])
    events = [e for e in info["events"] if e[0] in ("accuracy", "grouped")]
    official = {(e[0], e[1]): e[2] for e in events}
    for task in stream:
        t = task.index
        strategy.begin_task(task)
        strategy.end_task(task)
        seen = [b for s in stream[: t + 1] for b in s.test()]
        assert np.array_equal(torch.cat([b.index for b in seen]), data[f"task{t}/test_indices"])
        scores = torch.cat([strategy.predict(b.x) for b in seen])
        y = torch.cat([b.y for b in seen])
        with torch.no_grad():
            close(f"task{t}/test_features", strategy.backbone.features(
                torch.cat([b.x for b in seen])))  # fmt: skip
        close(f"task{t}/fc_weight", strategy.head.weight)
        close(f"task{t}/test_outputs", scores)
        assert data[f"task{t}/fc_sigma"] == 1  # the scale that ours leaves out
        predicted = scores.argmax(1)
        assert torch.equal(predicted, torch.from_numpy(data[f"task{t}/test_outputs"]).argmax(1))
        for s in stream[: t + 1]:
            mine = (y >= s.classes.start) & (y < s.classes.stop)
            matrix.record(t, s.index, int((predicted == y)[mine].sum()), int(mine.sum()))
        assert round(matrix.curve()[t], 2) == official["accuracy", t]
        grouped = metrics.pilot_grouped_accuracy(predicted, y, task.classes.start, 4, 3)
        assert grouped == official["grouped", t]
    curve = list(matrix.curve().values())
    assert matrix.summary()["acc_last"] == 77.5
    assert metrics.pilot_average_accuracy(curve)[-1] == pytest.approx(np.mean([93.75, 89.29, 77.5]))


def test_means_do_not_depend_on_the_batches(recorded):
    _, data = recorded
    for size in (1, 5, 48):
        strategy = SimpleCIL(backbone())
        for task in tasks([4, 3, 3], size):
            strategy.begin_task(task)
            strategy.end_task(task)
        assert np.abs(strategy.head.weight.numpy() - data["task2/fc_weight"]).max() < 1e-5
