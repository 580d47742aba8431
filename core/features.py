"""Features of test images under frozen extractors, computed once a run.

After every task a class-incremental run scores the test images of all tasks so far. What a frozen
adapter says about an image does not change, so each (image, extractor) is computed once: T passes
an image over a run of T tasks instead of about T/2 * T. An entry is dropped when the extractor's
hash changes. Past a size limit the arrays lie in a file that is mapped into memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from driftline.core.strategy import CLStrategy
from driftline.core.stream import Images


class FeatureCache:
    """Features by (set of images, extractor).

    Args:
        folder: where files go once the entries in memory exceed the limit; deleted with the cache.
        limit_mb: of the entries in memory, MiB.
    """

    def __init__(self, folder: Path | None = None, limit_mb: float = 2048) -> None:
        self.limit = int(limit_mb * 2**20)
        self._folder = folder
        for stale in folder.glob("features-*") if folder else []:  # of a run that was killed
            shutil.rmtree(stale, ignore_errors=True)
        self._files: tempfile.TemporaryDirectory[str] | None = None
        self._features: dict[tuple[str, str], tuple[str, Tensor]] = {}  # -> hash, [N, D]
        self._labels: dict[str, list[Tensor]] = {}  # per batch
        self._held = 0
        self._together: dict[
            tuple[str, str], tuple[str, list[str]]
        ] = {}  # -> hash, one pass's names
        self.computed = 0  # images times extractors
        self.reused = 0

    @torch.no_grad()
    def scores(
        self, key: str, images: Images, strategy: CLStrategy, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`(scores [B, C], labels [B])` batch by batch, in the order and cut of `images`.

        Args:
            key: names the set of images; `images` must always yield the same ones in one order.
        """
        wanted = strategy.extractors()
        assert wanted is not None
        known = {n: self._features.get((key, n)) for n in wanted}
        missing = [n for n, h in wanted.items() if (e := known[n]) is None or e[0] != h]
        lost = [n for n in missing if self._together.get((key, n), (None,))[0] == wanted[n]]
        self._compute_again(key, lost, wanted, images, strategy, device)
        missing = [n for n in missing if n not in lost]
        fresh: dict[str, Tensor] = {}
        if missing:
            fresh = self._compute(key, missing, missing, wanted, images, strategy, device)
        labels = self._labels.get(key, [])
        count = sum(map(len, labels))
        self.computed += count * len(missing)
        self.reused += count * (len(wanted) - len(missing))
        start = 0
        for y in labels:
            rows = slice(start, start + len(y))
            start += len(y)
            features = {
                n: fresh[n][rows] if n in fresh else self._features[key, n][1][rows].to(device)
                for n in wanted
            }
            yield strategy.classify(features), y.to(device)

    def _compute(
        self,
        key: str,
        names: list[str],
        wanted: list[str],
        versions: Mapping[str, str],
        images: Images,
        strategy: CLStrategy,
        device: torch.device,
    ) -> dict[str, Tensor]:
        """One pass of all images through the extractors `names`; stores what `wanted` lists.

        Returns:
            features [N, D] by extractor, on the device.
        """
        parts: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in images():
            parts.append(strategy.embed(batch.x.to(device), names))
            labels.append(batch.y)
        self._labels[key] = labels
        features = dict(zip(names, torch.cat(parts, 1), strict=True)) if parts else {}
        for name, one in features.items():
            if name in wanted:
                self._put(key, name, versions[name], one)
        for name in wanted:
            self._together[key, name] = versions[name], names
        return features

    def _compute_again(
        self,
        key: str,
        lost: list[str],
        versions: Mapping[str, str],
        images: Images,
        strategy: CLStrategy,
        device: torch.device,
    ) -> None:
        """After a resume: what the interrupted process had computed, uncounted.

        In passes of the same extractors as then: a grouped product rounds otherwise than a single
        one, and a resumed run shall be that of an undisturbed one to the last bit.
        """
        passes: Any = strategy.backbone.passes
        before = passes.forward
        while lost:
            names = self._together[key, lost[0]][1]
            wanted = [n for n in lost if self._together[key, n][1] == names]
            there = [n for n in names if n in versions]
            self._compute(key, there, wanted, versions, images, strategy, device)
            lost = [n for n in lost if n not in wanted]
        passes.forward = before

    def snapshot(self) -> dict[str, Any]:
        """Counters, and which features were computed in which pass; not the features."""
        together = [[*place, *entry] for place, entry in self._together.items()]
        return {"computed": self.computed, "reused": self.reused, "together": together}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `snapshot`; the features are computed again where they are asked for."""
        self.computed, self.reused = state["computed"], state["reused"]
        self._together = {(k, n): (version, names) for k, n, version, names in state["together"]}

    def _put(self, key: str, name: str, version: str, features: Tensor) -> None:
        size = features.nbytes
        if self._held + size > self.limit:
            if self._files is None:
                self._files = tempfile.TemporaryDirectory(prefix="features-", dir=self._folder)
            path = Path(self._files.name) / f"{len(self._features)}.bin"
            _reserve(path, size)
            mapped = torch.from_file(
                str(path), shared=True, size=features.numel(), dtype=features.dtype
            ).view(features.shape)
            features = mapped.copy_(features)
        else:  # not a view of the batch of all extractors
            features = features.to("cpu", copy=True)
            self._held += size
        self._features[key, name] = version, features

    def close(self) -> None:
        """Drop everything, files included."""
        self._features.clear()
        self._labels.clear()
        if self._files is not None:
            self._files.cleanup()
            self._files = None


def _reserve(path: Path, size: int) -> None:
    """Make a file with room for `size` bytes: writing to memory mapped onto a full disk kills."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
