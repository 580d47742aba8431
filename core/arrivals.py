"""Time counts: what a method is worth where the stream does not wait for it.

| `time=` | batches | what is reported |
|---|---|---|
| `deadline` | arrive every `interval`; one that finds the method busy is missed | errors with the missed batches answered by `missed`; availability, error on the served ones, discrete utility |
| `decay` | wait, but a late answer is worth less: 1 / (1 + delay / (threshold - 1)) | timeliness, alignment, continuous utility |
| `budget` | are adapted to until the extra seconds are spent; from then on the method stands still | batches adapted to, amortised utility |

The loop simulates this, it never sleeps. Times are in units of the source's own time for a batch, so
that figures of two machines can be compared; with `source=1` the unit is a second. A method's latency
is the measured duration of `adapt`, or the same given number of seconds for every batch. Given
latencies make a run repeatable to the last bit; a measured one belongs to the device that the result
names.

Sources. Evaluation of Test-Time Adaptation Under Computational Time Constraints (Alfarra et al., ICML
2024; MotasemAlfarra/Online_Test_Time_Adaptation @ 8e21fad, `utils/online_eval.py`): `deadline` with
`queue=0`, where the source answers missed batches; there eta is 1 / `interval`. Tempora (Sreeram et
al., ICML 2026, arXiv 2602.06136; sudotensor/tempora @ 6a4bc08): the three utilities, `queue=1`, and
the source's own time as mean + 6 standard deviations; read were the released scripts and the
abstract, not the text of the paper. Ours: an answer is there when `adapt` returns, with all of its
latency (the scripts count what a method does after its prediction on the next batch); a missed batch
costs the method nothing; time goes on from one domain to the next; `missed=last`, which is the state
before the batch that the method is busy with.
"""  # noqa: E501

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor

from driftline.core.ranges import NonNegative, Positive

Latency = Literal["measured"] | Positive  # seconds a batch
Who = Literal["method", "source", "last", "frozen"]  # answers a batch
TOLERANCE = 1e-9  # of an interval: rounding in sums of times


def begin(
    arrival: float, free: float, interval: float, queue: int = 0, last: bool = False
) -> float | None:
    """When a method begins with the batch that arrives at `arrival`; None: never, it is missed.

    Args:
        free: when the method is done with its batch before.
        interval: until the next arrival.
        queue: 1: a batch may wait until the next one arrives and takes its place.
        last: of the stream; nobody takes its place.
    """
    slack = TOLERANCE * interval
    if free <= arrival + slack:
        return arrival
    return free if queue and (last or free <= arrival + interval + slack) else None


def discount(latency: float, source: float, threshold: float) -> float:
    """What an answer after `latency` is worth: 1 within the source's time, 1/2 at the threshold.

    Args:
        latency, source, threshold: seconds; the threshold is above `source`.
    """
    return 1 / (1 + max(0.0, latency - source) / (threshold - source))


class Clock:
    """Simulated time of one method on one stream; a part of checkpoints.

        clock.calibrate(seconds)                         # of passes of the source; once
        who = clock.who(last=False)                      # answers the batch that arrives now
        clock.answered(who, seconds, wrong, images)

    Args:
        latency: of the method, seconds a batch; `measured`: how long `adapt` takes.
        source: the source's own time, seconds a batch; `measured`: mean + 6 standard deviations
            of some of its passes on the first batch.
    """

    name: ClassVar[str]
    missed: Literal["source", "last"] | None = None  # who answers missed batches

    def __init__(self, latency: Latency, source: Latency) -> None:
        self.latency, self.source = latency, source
        self.unit = 0.0 if source == "measured" else float(source)  # seconds; 0: not known yet
        self.images = 0  # of all batches
        self.right = torch.zeros((), dtype=torch.int64)  # predictions that count

    @property
    def measured(self) -> bool:
        """Whether the figures depend on the machine."""
        return "measured" in (self.latency, self.source)

    def calibrate(self, seconds: Sequence[float]) -> None:
        """Learn the source's own time from its passes on one batch."""
        self.unit = statistics.fmean(seconds) + 6 * statistics.pstdev(seconds)

    def took(self, seconds: float) -> float:
        """Latency of a batch for which `seconds` were measured."""
        return seconds if self.latency == "measured" else float(self.latency)

    def who(self, last: bool) -> Who:
        """Who answers the batch that arrives now; `last`: of the stream."""
        return "method"

    def answered(self, who: Who, seconds: float, wrong: Tensor, images: int) -> None:
        """Note the answer to the batch that `who` was about.

        Args:
            seconds: that were measured.
            wrong: number of wrong predictions, 0-dim.
            images: whose label is known.
        """
        self.images += images
        self.right = self.right.to(wrong.device) + (images - wrong)

    def about(self) -> dict[str, Any]:
        """For the summary: what was simulated, in seconds."""
        known = {"protocol": self.name, "latency": self.latency, "source_seconds": self.unit}
        return {**known, "repeatable": not self.measured}

    def summary(self) -> dict[str, float]:
        """Metrics `time/...`."""
        raise NotImplementedError

    def _percent(self, right: Tensor) -> float:
        return 100 * float(right) / max(1, self.images)

    def snapshot(self) -> dict[str, Any]:
        return deepcopy(vars(self))

    def restore(self, state: Mapping[str, Any]) -> None:
        vars(self).update(deepcopy(dict(state)))


class Deadline(Clock):
    """Batches arrive all the time; one that finds the method busy is missed.

    time/availability  images in batches that the method answered, percent of all
    time/err_served    error of these, percent
    time/utility       right predictions among these, percent of all images (discrete utility)
    time/missed        batches, a number

    The other errors of the run are those of all images, where `missed` answers missed batches.

    Args:
        interval: between two arrivals, in the source's own time.
        queue: 1: the newest missed batch waits for the method, until the next one arrives.
        missed: who answers missed batches: the source, or the method as it was before the batch
            that it is busy with.
    """

    name = "deadline"

    def __init__(
        self,
        *,
        interval: Positive,
        queue: Literal[0, 1],
        missed: Literal["source", "last"],
        latency: Latency,
        source: Latency,
    ) -> None:
        super().__init__(latency, source)
        self.interval, self.queue, self.missed = interval, queue, missed
        self.arrived = self.late = self.served = 0  # batches, missed ones; images served
        self.free = self.start = 0.0  # when the method is done; when it begins
        self.before: dict[str, Any] | None = None  # the method's state then, for missed=last

    def who(self, last: bool) -> Who:
        interval = self.interval * self.unit
        start = begin(self.arrived * interval, self.free, interval, self.queue, last)
        self.arrived += 1
        if start is None:
            assert self.missed is not None
            return self.missed
        self.start = start
        return "method"

    def answered(self, who: Who, seconds: float, wrong: Tensor, images: int) -> None:
        in_time = who == "method"
        if in_time:
            self.free = self.start + self.took(seconds)
            self.served += images
        else:
            self.late += 1
        super().answered(who, seconds, wrong if in_time else torch.full_like(wrong, images), images)

    def about(self) -> dict[str, Any]:
        interval = {"interval_seconds": self.interval * self.unit, "queue": self.queue}
        return {**super().about(), **interval, "missed": self.missed}

    def summary(self) -> dict[str, float]:
        served = max(1, self.served)
        return {
            "time/availability": 100 * self.served / max(1, self.images),
            "time/err_served": 100 - 100 * int(self.right) / served,
            "time/utility": self._percent(self.right),
            "time/missed": float(self.late),
        }


class Decay(Clock):
    """Every batch is adapted to, and a late answer is worth less.

    time/timeliness  mean of the discount, percent
    time/alignment   covariance of accuracy and discount over the batches (n - 1), in points: above
                     zero where late batches are the worse ones
    time/utility     mean accuracy of the batches x timeliness + alignment, percent (continuous)

    Args:
        threshold: delay at which an answer is worth half, in the source's own time, from the
            arrival of the batch.
    """

    name = "decay"

    def __init__(
        self, *, threshold: Annotated[float, Gt(1)], latency: Latency, source: Latency
    ) -> None:
        super().__init__(latency, source)
        self.threshold = threshold
        # batches; sums of accuracy, of the discount and of their product
        self.sums = torch.zeros(4, dtype=torch.float64)

    def answered(self, who: Who, seconds: float, wrong: Tensor, images: int) -> None:
        super().answered(who, seconds, wrong, images)
        if images:
            worth = discount(self.took(seconds), self.unit, self.threshold * self.unit)
            accuracy = (images - wrong).double() / images
            one = torch.ones_like(accuracy)
            row = torch.stack([one, accuracy, worth * one, worth * accuracy])
            self.sums = self.sums.to(row.device) + row

    def about(self) -> dict[str, Any]:
        return {**super().about(), "threshold_seconds": self.threshold * self.unit}

    def summary(self) -> dict[str, float]:
        n, *sums = self.sums.tolist()
        accuracy, timeliness, both = (value / max(1, n) for value in sums)
        alignment = (both - accuracy * timeliness) * n / (n - 1) if n > 1 else 0.0
        return {
            "time/timeliness": 100 * timeliness,
            "time/alignment": 100 * alignment,
            "time/utility": 100 * (accuracy * timeliness + alignment),
        }


class Budget(Clock):
    """The method adapts until the time beyond the source's own is spent; then it stands still.

    time/adapted  batches, a number
    time/spent    seconds beyond the source's own time, over the batches adapted to
    time/utility  right predictions, percent of all images (amortised utility)

    Args:
        budget: time beyond the source's own, in units of that.
    """

    name = "budget"

    def __init__(self, *, budget: NonNegative, latency: Latency, source: Latency) -> None:
        super().__init__(latency, source)
        self.budget = budget
        self.adapted, self.spent = 0, 0.0  # batches; seconds

    def who(self, last: bool) -> Who:
        slack = TOLERANCE * self.unit
        return "frozen" if self.spent + slack >= self.budget * self.unit else "method"

    def answered(self, who: Who, seconds: float, wrong: Tensor, images: int) -> None:
        super().answered(who, seconds, wrong, images)
        if who == "method":
            self.adapted += 1
            self.spent += max(0.0, self.took(seconds) - self.unit)

    def about(self) -> dict[str, Any]:
        return {**super().about(), "budget_seconds": self.budget * self.unit}

    def summary(self) -> dict[str, float]:
        utility = {"time/utility": self._percent(self.right)}
        return {"time/adapted": float(self.adapted), "time/spent": self.spent, **utility}
