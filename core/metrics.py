"""Every number that a result reports, for continual learning and for adaptation, defined once.

`AccuracyMatrix` holds R and derives stability and plasticity from it. `OnlineError` scores the
predictions made while adapting. Free functions at the end reproduce what other code bases print
under the same names, each under its own name.

Terms follow Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory" (learning accuracy, backward
and forward transfer), Chaudhry et al. 2018, "Riemannian Walk" (forgetting, intransigence), and
Hendrycks and Dietterich 2019 (mean corruption error).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from driftline.core.errors import UserError, suggest

F64 = NDArray[np.float64]
FORGETTING = ("standard", "nonnegative", "first_minus_last")
BINS = 15
SINGLE = 64  # images that wait to be added at once


def _mean(values: ArrayLike) -> float:
    """Mean, NaN of nothing; a NaN among the values makes the result NaN."""
    array = np.asarray(values, np.float64)
    return float(array.mean()) if array.size else math.nan


class AccuracyMatrix:
    """R[i, j]: accuracy in percent on column j (a task, a domain) after row i (a task, a segment).

    `l(j)` is the row after which column j was first learned; a column is seen at row i if
    l(j) <= i. Rows that were never recorded do not exist ("evaluated rows"); e is the last one.
    A column whose test set is empty is left out of everything. Where classes come back, the column
    of a task is the classes that come for the first time in it, so that each image counts once.

    Args:
        columns: names of the columns.
        learned: l(j) per column; None means l(j) = j (one column per task).
    """

    def __init__(self, columns: Sequence[str], learned: Sequence[int] | None = None) -> None:
        self.columns = tuple(columns)
        self.learned = list(range(len(self.columns)) if learned is None else learned)
        if len(self.learned) != len(self.columns) or min(self.learned, default=0) < 0:
            raise ValueError("learned needs one row, 0 or later, for each column")
        self._cells: dict[int, NDArray[np.int64]] = {}  # row -> [2, C]: correct, total; -1 unknown
        self._empty = np.zeros(len(self.columns), bool)  # columns with a cell without images

    def record(self, after: int, on: int, correct: int, total: int) -> None:
        """Set one cell; recording it again replaces it.

        Args:
            after: row; -1 is the start row, before anything was learned.
            on: column.
            correct, total: test images.

        Raises:
            ValueError: for a row below -1, an unknown column or impossible counts.
        """
        if after < -1 or not 0 <= on < len(self.columns) or not 0 <= correct <= total:
            raise ValueError(f"no such cell: after={after}, on={on}, {correct} of {total}")
        row = self._cells.setdefault(after, np.full((2, len(self.columns)), -1, np.int64))
        before = row[1, on]
        row[:, on] = correct, total
        if 0 in (before, total):
            self._empty[on] = any(c[1, on] == 0 for c in self._cells.values())

    def _row(self, i: int) -> F64:
        if i not in self._cells:
            return np.full(len(self.columns), np.nan)
        correct, total = self._cells[i].astype(np.float64)
        return np.divide(100 * correct, total, out=np.full_like(total, np.nan), where=total > 0)

    def table(self) -> F64:
        """R, float64 [rows, columns] in percent up to the last evaluated row; NaN where unknown."""
        rows = [self._row(i) for i in range(max(self._cells, default=-1) + 1)]
        return np.array(rows, np.float64).reshape(len(rows), len(self.columns))

    def start(self) -> F64:
        """The start row b, float64 [columns] in percent; NaN where unknown."""
        return self._row(-1)

    def _columns(self, i: int) -> list[int]:
        return [j for j, row in enumerate(self.learned) if row <= i and not self._empty[j]]

    def _rows(self) -> list[int]:
        return sorted(i for i in self._cells if i >= 0 and self._columns(i))

    def curve(self, *, macro: bool = False) -> dict[int, float]:
        """Accuracy over the columns seen, in percent, for every evaluated row (NaN if incomplete).

        Micro A_i = 100 * sum_j correct[i, j] / sum_j total[i, j]; macro = mean_j R[i, j].
        """
        accuracies = {}
        for i in self._rows():
            seen = self._columns(i)
            correct, total = self._cells[i][:, seen].astype(np.float64)
            micro = 100 * correct.sum() / total.sum() if (total > 0).all() else math.nan
            accuracies[i] = _mean(self._row(i)[seen]) if macro else float(micro)
        return accuracies

    def summary(self, forgetting: str = "standard") -> dict[str, float]:
        """All metrics that the recorded cells define, in percent; others are absent, never 0.

        Sums run over the columns seen at the last evaluated row e; "old" columns have l(j) < e.
        A metric that needs a cell which was not recorded is left out as a whole.

        acc_last        A_e, weighted by images (micro)
        acc_inc         mean of A_i over the evaluated rows i (average incremental accuracy)
        acc_last_macro  mean_j R[e, j]
        acc_inc_macro   the same mean of the unweighted row means
        plasticity      mean_j R[l(j), j] (learning accuracy)
        stability       100 * mean of min(1, R[i, j] / R[l(j), j]) over all evaluated rows i and
                        columns j with i > l(j); the ratio counts as 1 if R[l(j), j] = 0, since
                        nothing was there to lose
        bwt             mean over old j of R[e, j] - R[l(j), j]
        fwt             mean over j with l(j) >= 1 of R[l(j)-1, j] - b_j, b = start row
        forgetting      mean over old j of
            standard          max_{l(j) <= i < e} R[i, j] - R[e, j]; may be negative
            nonnegative       the same with the maximum up to and including e
            first_minus_last  R[l(j), j] - R[e, j] = -bwt

        Raises:
            UserError: for an unknown definition of forgetting.
        """
        if forgetting not in FORGETTING:
            hint = suggest(forgetting, FORGETTING)
            raise UserError(f"forgetting={forgetting!r} must be one of {FORGETTING}{hint}")
        rows = self._rows()
        if not rows:
            return {}
        end, learned = rows[-1], self.learned
        seen = self._columns(end)
        old = [j for j in seen if learned[j] < end]
        at = {i: self._row(i) for i in {-1, *rows, *learned, *(k - 1 for k in learned)}}
        first = {j: at[learned[j]][j] for j in seen}
        later = [(i, j) for j in old for i in rows if i > learned[j]]
        new = [j for j in seen if learned[j] >= 1]
        shares = [1.0 if first[j] == 0 else min(1.0, at[i][j] / first[j]) for i, j in later]
        whole = all(not math.isnan(at[i][j] + first[j]) for i, j in later)

        def lost(j: int) -> float:
            if forgetting == "first_minus_last":
                return first[j] - at[end][j]
            stop = end + (forgetting == "nonnegative")
            best = np.max([first[j], *(at[i][j] for i in rows if learned[j] < i < stop)])
            return float(best - at[end][j])

        metrics = {
            "acc_last": self.curve()[end],
            "acc_inc": _mean(list(self.curve().values())),
            "acc_last_macro": self.curve(macro=True)[end],
            "acc_inc_macro": _mean(list(self.curve(macro=True).values())),
            "plasticity": _mean(list(first.values())),
            "stability": 100 * _mean(shares) if whole else math.nan,
            "forgetting": _mean([lost(j) for j in old]),
            "bwt": _mean([at[end][j] - first[j] for j in old]),
            "fwt": _mean([at[learned[j] - 1][j] - at[-1][j] for j in new]),
        }
        return {k: float(v) for k, v in metrics.items() if not math.isnan(v)}

    def snapshot(self) -> dict[str, Any]:
        """Rows int64 [N] and cells int64 [N, 2, C]."""
        rows = sorted(self._cells)
        cells = [self._cells[i] for i in rows]
        shape = (len(rows), 2, len(self.columns))
        return {
            "rows": torch.tensor(rows, dtype=torch.int64),
            "cells": torch.from_numpy(np.array(cells, np.int64).reshape(shape)),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `snapshot`.

        Raises:
            UserError: if the state has another number of columns.
        """
        cells = state["cells"].cpu().numpy()
        if cells.shape[2] != len(self.columns):
            raise UserError(
                f"the checkpoint holds {cells.shape[2]} columns, this stream {len(self.columns)}. "
                "Use on_exists=rerun to start again."
            )
        self._cells = {int(i): c.copy() for i, c in zip(state["rows"], cells, strict=True)}
        self._empty = (cells[:, 1] == 0).any(0)


def _one_by_one(total: Tensor, parts: Tensor) -> Tensor:
    """`total` [K, ...] plus `parts` [K, B, ...], rounded after each of the B, as B sums are."""
    return torch.cat([total[:, None], parts], 1).cumsum(1)[:, -1].contiguous()


class OnlineError:
    """Errors and calibration of the predictions made along an adaptation stream.

    Accumulators live on the device of the scores and are read in `summary` and `segment` only, so
    `update` never waits for the device. Everything but `collapse` is independent of how the
    stream is cut into batches. On a CPU single images wait until several can be added at once, to
    the same bits: sixty small operations for each would cost more than a small network.

    Args:
        domains: names of the stream's domains, `corruption:severity`, or without severities.
        classes: length C of a score vector.
        rounds: segment -> round of a recurring stream; empty if nothing recurs.
    """

    def __init__(
        self, domains: Sequence[str], classes: int, rounds: Mapping[int, int] | None = None
    ) -> None:
        self.domains, self.classes = tuple(domains), classes
        self.rounds = dict(rounds or {})
        self._counts: dict[int, Tensor] = {}  # segment -> int64 [2, D]: images, wrong
        self._sums = torch.zeros(2, dtype=torch.float64)  # NLL, Brier
        self._bins = torch.zeros(3, BINS, dtype=torch.float64)  # images, correct, confidence
        # NaN/inf rows, batches, collapsed batches
        self._flags = torch.zeros(3, dtype=torch.int64)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # scores [1, C], y [1], domain [1]
        self._of_waiting: tuple[int, str] = (0, "")  # their segment and kind

    def _to(self, device: torch.device) -> None:
        if self._sums.device != device:
            for name in ("_sums", "_bins", "_flags"):
                setattr(self, name, getattr(self, name).to(device))
            self._counts = {k: v.to(device) for k, v in self._counts.items()}

    @torch.no_grad()
    def update(
        self,
        scores: Tensor,
        y: Tensor,
        segment: int,
        domain: Tensor,
        kind: Literal["logits", "probabilities"],
    ) -> Tensor:
        """Add one batch.

        Args:
            scores: float [B, C]; rows with a NaN count as wrong.
            y, domain: int64 [B], label and position in `domains`.
            segment: number of the segment the batch belongs to.
            kind: logits go through a softmax; probabilities are taken as they are (rows are
                neither checked nor rescaled).

        Returns:
            Number of wrong predictions, int64, 0-dim, on the device of `scores`.

        Raises:
            ValueError: for scores of another width or an unknown kind.
        """
        if scores.ndim != 2 or scores.shape[1] != self.classes:
            raise ValueError(f"scores must be [B, {self.classes}], got {tuple(scores.shape)}")
        if kind not in ("logits", "probabilities"):
            raise ValueError(f"kind must be logits or probabilities, got {kind!r}")
        if len(y) == 1 and scores.device.type == "cpu":
            if self._of_waiting != (segment, kind) or len(self._waiting) == SINGLE:
                self._add_waiting()
                self._of_waiting = segment, kind
            scores = scores.detach().to(torch.float64, copy=True)
            self._waiting.append((scores, y.clone(), domain.clone()))
            return ((scores.argmax(1) != y) | scores.isnan().any(1)).sum()
        self._add_waiting()
        return self._add(scores.detach().double(), y, segment, domain, kind)

    @torch.no_grad()
    def _add_waiting(self) -> None:
        """Add the single images that wait."""
        if self._waiting:
            scores, y, domain = (torch.cat(part) for part in zip(*self._waiting, strict=True))
            segment, kind = self._of_waiting
            self._waiting = []
            self._add(scores, y, segment, domain, kind, single=True)

    def _add(
        self,
        scores: Tensor,
        y: Tensor,
        segment: int,
        domain: Tensor,
        kind: str,
        *,
        single: bool = False,
    ) -> Tensor:
        """As `update`, for scores float64 [B, C]: of one batch, or of B batches of one image."""
        device = scores.device
        self._to(device)
        predicted = scores.argmax(1)
        right = (predicted == y) & ~scores.isnan().any(1)
        here = domain[:, None] == torch.arange(len(self.domains), device=device)
        counts = torch.stack([here.sum(0), (here & ~right[:, None]).sum(0)])
        self._counts[segment] = counts + self._counts.get(segment, 0)

        finite = scores.isfinite().all(1)
        weight = finite.double()
        scores = torch.where(finite[:, None], scores, 0.0)
        if kind == "logits":
            log_p = scores.log_softmax(1)
            p = log_p.exp()
        else:
            p = scores
            log_p = p.clamp_min(torch.finfo(torch.float32).tiny).log()
        nll = -log_p.gather(1, y[:, None]).squeeze(1)
        brier = p.square().sum(1) - 2 * p.gather(1, y[:, None]).squeeze(1) + 1
        sums = torch.stack([nll * weight, brier * weight])
        if single:
            self._sums = _one_by_one(self._sums, sums)
        else:
            self._sums += torch.stack([one.sum() for one in sums])
        confidence = p.amax(1)
        index = ((confidence * BINS).ceil() - 1).clamp(0, BINS - 1)  # bins (k/15, (k+1)/15]
        inside = (index[:, None] == torch.arange(BINS, device=device)) & finite[:, None]
        rows = torch.stack([weight, right.double(), confidence])
        bins = rows[:, :, None] * inside
        self._bins = _one_by_one(self._bins, bins) if single else self._bins + bins.sum(1)
        self._flags[0] += (~finite).sum()
        if len(y) > 2 and not single:  # smaller batches cannot hold three classes
            distinct = predicted.sort().values.diff().ne(0).sum() + 1
            self._flags[1] += 1
            self._flags[2] += distinct <= 2
        return counts[1].sum()

    def error(self) -> float:
        """Error over all images so far, percent; NaN without one."""
        self._add_waiting()
        if not self._counts:
            return math.nan
        images, wrong = torch.stack([*self._counts.values()]).sum((0, 2)).tolist()
        return 100 * wrong / images if images else math.nan

    def segment(self, i: int) -> dict[str, float]:
        """`err` in percent (NaN without images) and `n` images of segment `i`."""
        self._add_waiting()
        n, wrong = self._counts[i].sum(1).tolist() if i in self._counts else (0, 0)
        return {"err": 100 * wrong / n if n else math.nan, "n": n}

    def summary(self) -> dict[str, float]:
        """Metrics of everything so far; keys without data are absent.

        err_mean      mean over the domains that occurred of the error of each, percent
        err_images    error over all images, percent
        err_worst     largest of the domains' errors, percent
        err/<domain>  error of one domain over all its segments, percent
        err_segments  mean over the segments of the error of each; only where it can differ from
                      err_mean: some domain comes in several segments or some segment mixes domains
        err_round/<r> mean over the domains of the error in round r, percent; recurring streams only
        err_severity/<s>  mean over the segments of severity s, percent; with several severities
        mce           mean corruption error in percent of AlexNet's; 15 corruptions, 5 severities
        ece           sum_b n_b/N |accuracy_b - confidence_b| over 15 equal-width bins, in [0, 1]
        nll           mean of -log p_y, nats; p is floored at 1.2e-38 where probabilities are given
        brier         mean of sum_c (p_c - [c = y])^2, in [0, 2]
        collapse      share of the batches of more than 2 images whose predictions fall in <= 2
                      classes, in [0, 1]
        nan           number of score rows with a NaN or an infinity; these have no part in ece,
                      nll and brier
        """
        self._add_waiting()
        if not self._counts:
            return {}
        images, wrong = torch.stack(list(self._counts.values())).sum(0).cpu().double().numpy()
        some = [d for d in range(len(self.domains)) if images[d]]
        errors = {f"err/{self.domains[d]}": float(100 * wrong[d] / images[d]) for d in some}
        if not some:
            return {}
        metrics = {
            "err_mean": _mean(list(errors.values())),
            "err_images": float(100 * wrong.sum() / images.sum()),
            "err_worst": max(errors.values()),
            **errors,
            **self._segments(),
        }
        by_name: dict[str, list[float]] = {}
        for d in sorted(some, key=lambda d: self.domains[d].rpartition(":")[2]):
            by_name.setdefault(self.domains[d].rpartition(":")[0], []).append(
                errors[f"err/{self.domains[d]}"]
            )
        if set(by_name) == set(ALEXNET) and all(len(v) == 5 for v in by_name.values()):
            metrics["mce"] = mean_corruption_error(by_name)
        n, correct, confidence = self._bins.cpu().numpy()
        nan, batches, collapsed = self._flags.tolist()
        if n.sum():
            nll, brier = (self._sums / n.sum()).tolist()
            ece = float(np.abs(correct - confidence).sum() / n.sum())
            metrics |= {"ece": ece, "nll": nll, "brier": brier}
        if batches:
            metrics["collapse"] = collapsed / batches
        return {**metrics, "nan": nan}

    def _segments(self) -> dict[str, float]:
        """The means that run over segments, see `summary`."""
        counts = {i: c.cpu().double().numpy() for i, c in self._counts.items()}
        here = {i: np.flatnonzero(c[0]) for i, c in counts.items()}
        errors_by_name: dict[str, float] = {}
        single = {i: int(d[0]) for i, d in here.items() if len(d) == 1}
        if len(set(single.values())) < len(counts):
            errors = [self.segment(i)["err"] for i in counts if len(here[i])]
            errors_by_name["err_segments"] = _mean(errors)
        for r in sorted(set(self.rounds.values())):
            inside = [counts[i] for i in counts if self.rounds[i] == r]
            if inside:
                n, wrong = np.sum(inside, axis=0)
                errors_by_name[f"err_round/{r}"] = _mean(100 * wrong[n > 0] / n[n > 0])
        of_domain = [name.rpartition(":") for name in self.domains]  # "fog:5", or a name alone
        severity = {i: of_domain[d][2] for i, d in single.items() if of_domain[d][1]}
        if len(set(severity.values())) > 1:
            for s in sorted(set(severity.values())):
                of = [self.segment(i)["err"] for i in severity if severity[i] == s]
                errors_by_name[f"err_severity/{s}"] = _mean(of)
        return errors_by_name

    def snapshot(self) -> dict[str, Any]:
        """Copies of the accumulators."""
        self._add_waiting()
        return {
            "counts": {k: v.clone() for k, v in self._counts.items()},
            "sums": self._sums.clone(),
            "bins": self._bins.clone(),
            "flags": self._flags.clone(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `snapshot`."""
        self._waiting = []
        self._counts = {int(k): v.clone() for k, v in state["counts"].items()}
        self._sums, self._bins = state["sums"].clone(), state["bins"].clone()
        self._flags = state["flags"].clone()


class Predictions:
    """Whether the answers on the test images of all tasks seen are finite and take many classes."""

    def __init__(self) -> None:
        self._nan = self._evaluations = self._collapsed = 0

    def update(self, predicted: Sequence[int], nan: int, tasks: Sequence[range]) -> str:
        """Add the evaluation after a task.

        Args:
            predicted: how often each class was predicted, over all test images.
            nan: rows of scores with a NaN or an infinity.
            tasks: the classes of every task seen, the newest last.

        Returns:
            What is wrong, or an empty text.
        """
        seen = max(classes.stop for classes in tasks)
        few = min(2, len(tasks[-1]) - 1)  # a task of two may well get all predictions
        distinct = sum(n > 0 for n in predicted)
        self._nan += nan
        text = f"{nan} rows of scores are not finite" if nan else ""
        if seen > 2 and sum(predicted) > 2 and few:
            self._evaluations += 1
            if distinct <= few:
                self._collapsed += 1
                text = text or f"all predictions fall in {distinct} of {seen} classes"
        return text

    def summary(self) -> dict[str, float]:
        """collapse  share of the evaluations of more than 2 classes, after a task each, whose
                  predictions fall in at most 2 classes and in fewer than the newest task has
        nan       number of rows of scores with a NaN or an infinity, in all evaluations
        """
        share = {"collapse": self._collapsed / self._evaluations} if self._evaluations else {}
        return {**share, "nan": self._nan}

    def snapshot(self) -> dict[str, Any]:
        return {"counts": [self._nan, self._evaluations, self._collapsed]}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._nan, self._evaluations, self._collapsed = state["counts"]


# AlexNet's error as a fraction, mean over the five severities, in the benchmark's order. Published
# in many evaluation scripts; the script of hendrycks/robustness prints un-normalised means only.
ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    """mCE = mean over the 15 corruptions of 100 * (sum_s E[s, c]) / (sum_s E_AlexNet[s, c]).

    Args:
        errors: per corruption the five errors in percent, severity 1 to 5.

    Raises:
        ValueError: unless exactly the 15 standard corruptions come with 5 errors each.
    """
    wrong = sorted(set(ALEXNET) ^ set(errors)) or [c for c in errors if len(errors[c]) != 5]
    if wrong:
        raise ValueError(f"mCE needs the 15 corruptions with 5 severities each; see {wrong}")
    return _mean([np.mean(np.asarray(errors[c], np.float64)) / a for c, a in ALEXNET.items()])


def near_future_shift(labels: NDArray[np.int64], batch_size: int) -> int:
    """Smallest shift, in batches, at which knowing recent labels no longer helps to predict.

    A blind classifier answers with the commonest label of the batch before; where its accuracy on
    the batch `shift` later is no better than always answering with the commonest label of the
    stream, correlation between labels explains nothing any more.

    Args:
        labels: int64 [N], in stream order.
    """
    batches = [labels[i : i + batch_size] for i in range(0, len(labels), batch_size)]
    recent = np.asarray([np.bincount(b).argmax() for b in batches])
    chance = np.bincount(labels).max() / len(labels)
    for shift in range(1, len(batches)):
        pairs = zip(recent[:-shift], batches[shift:], strict=True)
        hits = np.concatenate([later == guess for guess, later in pairs])
        if hits.mean() <= chance:
            return shift
    return max(1, len(batches) - 1)


class NearFuture:
    """Near-future accuracy of a single-pass stream, with a blind classifier as control.

    Before the update on batch t the method predicts batch t + shift (Hammoud et al. 2023, "Rapid
    Adaptation in Online Continual Learning: Are We Evaluating It Right?", `drimpossible/EvalOCL`).

    Args:
        labels: int64 [N], in stream order.
        batch_size: images a batch.
    """

    def __init__(self, labels: NDArray[np.int64], batch_size: int) -> None:
        self.shift = near_future_shift(labels, batch_size)
        batches = [labels[i : i + batch_size] for i in range(0, len(labels), batch_size)]
        recent = [int(np.bincount(b).argmax()) for b in batches]
        pairs = list(zip(recent, batches[self.shift :], strict=False))
        hits = [float((later == guess).sum()) for guess, later in pairs]
        images = sum(len(later) for _, later in pairs)
        self.blind = 100 * sum(hits) / images if images else math.nan
        self._counts = torch.zeros(2, dtype=torch.int64)  # images, right

    @torch.no_grad()
    def update(self, scores: Tensor, y: Tensor) -> None:
        """Scores [B, C] of a later batch with labels int64 [B]; unseen classes count as wrong."""
        self._counts = self._counts.to(y.device)
        right = (scores.argmax(1) == y).sum()
        self._counts += torch.stack([torch.tensor(len(y), device=y.device), right])

    def summary(self) -> dict[str, float]:
        """nfa, nfa_blind in percent; nfa_shift in batches."""
        images, right = self._counts.tolist()
        if not images:
            return {}
        control = {"nfa_shift": float(self.shift), "nfa_blind": self.blind}
        return {"nfa": 100 * right / images, **control}

    def snapshot(self) -> dict[str, Any]:
        return {"counts": self._counts.clone()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._counts = state["counts"].clone()


# ------------------------------------------------------- other definitions, under their own names
# `table` is R float64 [T, T], in any unit unless noted; NaN above the diagonal is allowed.


def intransigence(table: F64, joint: ArrayLike) -> float:
    """Mean over j of R*_j - R[j, j]; R*_j: jointly trained on tasks 0..j, scored on task j."""
    return _mean(np.asarray(joint, np.float64) - np.diagonal(table))


def pilot_forgetting(table: F64) -> float:
    """LAMDA-PILOT 5240714 `trainer.py`: maximum over all rows, the last included, minus the last.

    Entries (percent) are rounded to two decimals first and missing ones count as 0.
    """
    known = np.nan_to_num(np.round(table, 2))
    return _mean((known.max(0) - known[-1])[:-1])


def pilot_average_accuracy(curve: ArrayLike) -> list[float]:
    """LAMDA-PILOT 5240714: running means of the accuracies A_i (percent), each rounded first."""
    top1 = np.round(np.asarray(curve, np.float64), 2)
    return [float(np.mean(top1[: i + 1])) for i in range(len(top1))]


def pilot_grouped_accuracy(
    predicted: ArrayLike, y: ArrayLike, known: int, first: int, increment: int
) -> dict[str, float]:
    """LAMDA-PILOT 5240714 `utils/toolkit.py`: percent, rounded to two decimals, per class group.

    The loop over groups ends before the largest label, so a last group of one class is dropped.

    Args:
        predicted, y: int [N].
        known: classes learned before the current task ("old"); "old" is 0 without such images.
        first, increment: classes of the first and of every later group.
    """
    hit, y = np.asarray(predicted) == np.asarray(y), np.asarray(y)

    def share(start: int, stop: int) -> float:
        inside = (y >= start) & (y < stop)
        return float(np.round(100 * hit[inside].sum() / inside.sum(), 2)) if inside.any() else 0.0

    top = int(y.max())
    shares = {"total": share(0, top + 1), f"00-{first - 1:02d}": share(0, first)}
    for start in range(first, top, increment):
        stop = start + increment
        shares[f"{start:02d}-{stop - 1:02d}"] = share(start, stop)
    return {**shares, "old": share(0, known), "new": share(known, top + 1)}


def mammoth_forgetting(table: F64) -> float:
    """Mammoth e75a491 `utils/metrics.py`: maximum over all rows, the last and those before the
    task was learned included, minus the last; missing entries count as 0."""
    known = np.nan_to_num(table)
    return _mean((known.max(0) - known[-1])[:-1])


def mammoth_backward_transfer(table: F64) -> float:
    """Mammoth e75a491: mean over j < T-1 of R[T-1, j] - R[j, j]."""
    return _mean((table[-1] - np.diagonal(table))[:-1])


def mammoth_forward_transfer(table: F64, start: ArrayLike) -> float:
    """Mammoth e75a491: mean over j >= 1 of R[j-1, j] - b_j, b a randomly initialised model."""
    return _mean(np.diagonal(table, 1) - np.asarray(start, np.float64)[1:])


def avalanche_forgetting(table: F64, after: int) -> dict[int, float]:
    """Avalanche eb075be: R[j, j] - R[after, j] per earlier experience j, without a maximum.

    Its stream forgetting is the mean of these (0 without any) and its BWT their negative.
    """
    return {j: float(table[j, j] - table[after, j]) for j in range(after)}


def avalanche_forward_transfer(table: F64, start: ArrayLike, after: int) -> dict[int, float]:
    """Avalanche eb075be: R[j-1, j] - b_j for every experience j up to the next one.

    Its stream value is their mean (0 without any); b is the model at initialisation.
    """
    base = np.asarray(start, np.float64)
    last = min(after + 1, table.shape[1] - 1)
    return {j: float(table[j - 1, j] - base[j]) for j in range(1, last + 1)}


def avalanche_stream_accuracy(correct: ArrayLike, total: ArrayLike) -> float:
    """Avalanche eb075be: correct over all images of the whole stream, unseen experiences too."""
    return float(np.sum(correct) / np.sum(total))
