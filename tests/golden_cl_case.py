"""A recorded run of a reference implementation of continual learning, and how ours is compared.

Rule of the recording: max|got - want| <= rtol * max|want| + 1e-7, rtol per array group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from driftline.backbones.backbone import Backbone
from driftline.core.stream import Batch, Task

FOLDER = Path(__file__).parent / "golden" / "cl"


def backbone() -> Backbone:
    """The tiny ViT of the recordings; their input is (x - 128) / 64, so nothing is normalised."""
    net = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=0
    )
    net.load_state_dict(load_file(FOLDER / "vit_a.safetensors"), strict=True)
    for block in net.blocks:
        block.attn.fused_attn = False  # the references compute attention step by step
    return Backbone(net, input_size=32)


def images(split: str, rows: Any) -> Batch:
    """Images `rows` of `train` or `test` as the references fed them."""
    data = np.load(FOLDER / "data_a.npz")
    rows = np.asarray(rows)
    x = (torch.from_numpy(data[f"{split}_x"][rows]).float() - 128) / 64
    y = torch.from_numpy(data[f"{split}_y"][rows])
    return Batch(x, y, torch.from_numpy(rows), torch.zeros(len(rows), dtype=torch.int64))


class ClCase:
    """One recorded case, for example `ClCase("ease/ease_run")`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.info: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
        self.data = dict(np.load(FOLDER / f"{name}.npz"))
        self.hyper: dict[str, Any] = self.info.get("hyperparameters", {})
        self.worst = 0.0

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.data[key])

    def _rtol(self, key: str) -> float:
        """Tolerance group of an array: numbers of task, phase and block are written as `*`."""
        groups: dict[str, Any] = self.info["tolerance"]
        for name, entry in groups.items():
            pattern = re.escape(name).replace(r"\*", r"[^/]*?")
            if re.match(pattern + r"($|/|\.)", key):
                return entry.get("rtol", 0.0)
        raise KeyError(f"{self.name}: no tolerance for {key}")

    def close(self, key: str, got: Any) -> None:
        """Assert that `got` is the recorded array `key`; keeps the worst share of the tolerance."""
        want = self.data[key]
        mine = got.detach().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
        assert mine.shape == want.shape, f"{self.name} {key}: {mine.shape}, not {want.shape}"
        allowed = self._rtol(key) * np.abs(want).max(initial=0) + 1e-7
        share = float(np.abs(mine.astype(np.float64) - want).max(initial=0) / allowed)
        self.worst = max(self.worst, share)
        assert share <= 1, f"{self.name} {key}: {share:.3g} times the tolerance"

    def passes(self, source: str) -> Iterator[tuple[str, list[list[int]]]]:
        """Recorded sweeps whose label begins with `source`: label and rows of every batch."""
        for event in self.info["events"]:
            if event[0] == "pass" and event[1].startswith(source):
                yield event[1], event[2]

    def task(self, index: int, sizes: list[int], fit_size: int = 12) -> Task:
        """Task `index`: classes in order, images in the order of the files, no training batches."""
        first = sum(sizes[:index])
        classes = range(first, first + sizes[index])

        def batches(split: str) -> Iterator[Batch]:
            y = np.load(FOLDER / "data_a.npz")[f"{split}_y"]
            rows = np.flatnonzero((y >= classes.start) & (y < classes.stop))
            for start in range(0, len(rows), fit_size):
                yield images(split, rows[start : start + fit_size])

        return Task(
            index=index,
            name=f"task {index}",
            classes=classes,
            steps=0,
            train=lambda epoch, start=0: iter(()),
            fit=lambda: batches("train"),
            test=lambda: batches("test"),
        )
