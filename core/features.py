"""Features of test images under frozen extractors, computed once a run.

After every task a class-incremental run scores the test images of all tasks so far. What a frozen
adapter says about an image does not change, so each (image, extractor) is computed once: T passes
an image over a run of T tasks instead of about T/2 * T. An entry is dropped when the extractor's
hash changes. Past a size limit the arrays lie in a file that is mapped into memory.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from core.strategy import CLStrategy
from core.stream import Images


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
        if missing:
            parts: list[Tensor] = []
            labels: list[Tensor] = []
            for batch in images():
                parts.append(strategy.embed(batch.x.to(device), missing).cpu())
                labels.append(batch.y)
            self._labels[key] = labels
            if parts:
                for name, found in zip(missing, torch.cat(parts, 1), strict=True):
                    self._put(key, name, wanted[name], found)
        labels = self._labels.get(key, [])
        count = sum(map(len, labels))
        self.computed += count * len(missing)
        self.reused += count * (len(wanted) - len(missing))
        start = 0
        for y in labels:
            rows = slice(start, start + len(y))
            start += len(y)
            features = {n: self._features[key, n][1][rows].to(device) for n in wanted}
            yield strategy.classify(features), y.to(device)

    def _put(self, key: str, name: str, version: str, features: Tensor) -> None:
        size = features.nbytes
        if self._held + size > self.limit:
            if self._files is None:
                self._files = tempfile.TemporaryDirectory(prefix="features-", dir=self._folder)
            path = Path(self._files.name) / f"{len(self._features)}.bin"
            mapped = torch.from_file(
                str(path), shared=True, size=features.numel(), dtype=features.dtype
            ).view(features.shape)
            features = mapped.copy_(features)
        else:
            features = features.clone()  # not a view of the batch of all extractors
            self._held += size
        self._features[key, name] = version, features

    def close(self) -> None:
        """Drop everything, files included."""
        self._features.clear()
        self._labels.clear()
        if self._files is not None:
            self._files.cleanup()
            self._files = None
