"""How well a stream's unknown classes are told from the known ones, by the method's own scores.

Images of classes outside the label space have label -1. They have no part in any error; what is asked
is whether the method is less sure of them. One number an image says how known it looks:

| suffix | score of an image | source |
|---|---|---|
| none | largest softmax probability | Hendrycks and Gimpel, ICLR 2017 |
| `_energy` | log sum exp of the logits, which is minus the energy; not of methods that return probabilities | Liu et al., NeurIPS 2020; UniEnt (Gao et al., CVPR 2024; gaozhengqing/UniEnt @ af7faa8, `cifar/main.py`) |

Metrics are taken in each domain and averaged over the domains with images of both kinds, as UniEnt and
STAMP (Yu et al., ECCV 2024; yuyongcan/STAMP @ dbdb2a9, `test-time-evaluation.py`) do:

auroc    chance that a known image has a higher score than an unknown one, ties count half; percent
fpr95    unknown images, percent, that pass the highest threshold which 95 % of the known ones pass
         (UniEnt interpolates between two thresholds)
h_score  2 a A / (a + A) with the accuracy a on known images and A = auroc; percent. STAMP takes the
         negative entropy for A where a method has no score of its own.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from driftline.core.strategy import ScoreKind

F64 = NDArray[np.float64]


def auroc(known: F64, unknown: F64) -> float:
    """Share of pairs in which the known one is higher, in [0, 1]; ties count half.

    Args:
        known, unknown: scores [N], [M], neither empty.
    """
    _, place, count = np.unique(
        np.concatenate([known, unknown]), return_inverse=True, return_counts=True
    )
    rank = np.cumsum(count) - (count - 1) / 2  # of equal values: the mean, from 1
    n, m = len(known), len(unknown)
    return float((rank[place[:n]].sum() - n * (n + 1) / 2) / (n * m))


def fpr95(known: F64, unknown: F64) -> float:
    """Share of `unknown` scores [M] at or above the threshold that 95 % of `known` [N] pass."""
    passing = -(-19 * len(known) // 20)  # at least 95 %, in whole numbers
    return float((unknown >= np.sort(known)[-passing]).mean())


class OpenWorld:
    """Scores of every image of a stream, about 22 bytes each: exact metrics need them all.

    Args:
        domains: number of the stream's domains.
    """

    def __init__(self, domains: int) -> None:
        self.domains = domains
        self._scores: list[Tensor] = []  # float64 [2, B]: probability, minus energy (NaN: none)
        self._about: list[Tensor] = []  # int16 [2, B]: domain; 0 unknown, 1 wrong, 2 right

    @torch.no_grad()
    def update(self, scores: Tensor, y: Tensor, domain: Tensor, kind: ScoreKind) -> None:
        """Add a batch: scores [B, C], labels int64 [B] (-1: unknown), domain int64 [B].

        Rows of scores that are not finite look least known and are wrong.
        """
        scores = scores.detach().double()
        finite = scores.isfinite().all(1)
        probability = (scores.softmax(1) if kind == "logits" else scores).amax(1)
        energy = scores.logsumexp(1) if kind == "logits" else torch.full_like(probability, np.nan)
        both = torch.stack([probability, energy])
        self._scores.append(torch.where(finite, both, -torch.inf))
        right = (scores.argmax(1) == y) & finite
        answer = torch.where(y < 0, 0, 1 + right.long())
        self._about.append(torch.stack([domain, answer]).to(torch.int16))

    def summary(self) -> dict[str, float]:
        """`auroc`, `fpr95`, `h_score`, percent, and the same with `_energy`; `unknown`: images."""
        if not self._scores:
            return {}
        scores = torch.cat(self._scores, 1).cpu().numpy()
        domain, answer = torch.cat(self._about, 1).cpu().numpy()
        metrics = {"unknown": float((answer == 0).sum())}
        rows: dict[str, list[Sequence[float]]] = {"": [], "_energy": []}
        for suffix, score in zip(rows, scores, strict=True):
            for d in range(self.domains):
                here = domain == d
                known, unknown = score[here & (answer > 0)], score[here & (answer == 0)]
                if not len(known) or not len(unknown) or np.isnan(score[here]).any():
                    continue
                area, right = auroc(known, unknown), (answer[here & (answer > 0)] == 2).mean()
                both = right + area
                harmonic = 2 * right * area / both if both else 0.0
                rows[suffix].append([area, fpr95(known, unknown), harmonic])
        for suffix, some in rows.items():
            if some:
                means = 100 * np.mean(some, 0)
                names = (f"{name}{suffix}" for name in ("auroc", "fpr95", "h_score"))
                metrics |= dict(zip(names, means.tolist(), strict=True))
        return metrics

    def snapshot(self) -> dict[str, Any]:
        if not self._scores:
            return {"scores": None, "about": None}
        self._scores, self._about = [torch.cat(self._scores, 1)], [torch.cat(self._about, 1)]
        return {"scores": self._scores[0].clone(), "about": self._about[0].clone()}

    def restore(self, state: Mapping[str, Any]) -> None:
        kept = state["scores"] is not None
        self._scores = [state["scores"].clone()] if kept else []
        self._about = [state["about"].clone()] if kept else []
