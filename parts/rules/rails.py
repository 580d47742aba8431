"""A method is watched without labels, and the frozen network answers where it is likely better.

What batch statistics or entropy minimisation do to a stream of sorted labels or of batches of a few
images is wrong from the first batch on, so going back to the start is no help: only the source is.
Every few batches the source answers as well, and both are judged on the same images by

    A = mean over images of [image and mirror image get one class] * -log(share of that class)

in nats, where the share is that among all answers of the window. It is large where answers hold
against what does not matter and are various together; it falls with a collapse, with answers that
became arbitrary and with batch statistics that do not fit; and it asks for no confidence, which
entropy minimisation moves as it likes. Ours, after the mutual information of two views (Ji et al.,
"Invariant Information Clustering", ICCV 2019), whose estimate needs many images a class. On seven
methods and seven streams of embedded images, in windows of 100 images in which the method was more
than 3 points better or worse: 96 % of those that A called worse were, and it called 78 % of those
that were; in windows of 200 images 100 and 91 %.

The pieces, each an option:

* `probe`, `images`, `margin`: the comparison; ours. ASR (Lim et al., ICLR 2026, arXiv 2603.03796;
  YonseiML/asr @ 361560c) asks the source too, in every batch, how many predictions differ.
* `jump`: a mean entropy far from its moving average asks for a new window at once; ours.
* `gate`: no update while the moving average of the entropy is high, as the entropy gate of
  StableSleep (Arasu and Jahangiri, 2025, arXiv 2509.02982; ahritik/StableSleep @ 7a2c158), which
  looks at the batch itself; here at those before, so that nothing has to be taken back.
* `ring`: states of the method that were judged better than the source; the method goes back to the
  newest, and with none left to its start, as RDumb (NeurIPS 2023), SAR (ICLR 2023) and ASR do.
* `answer`: who answers while the method is likely worse; `method` leaves it at a warning.

Nothing is drawn, and no label is read.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any, Literal, cast

import torch
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.errors import UserError
from driftline.core.ranges import Count, CountOrZero, NonNegative, Positive, Unit
from driftline.core.strategy import TTAStrategy, Wrapper
from driftline.parts.rules.reset_on_collapse import mean_entropy
from driftline.parts.rules.window import Window

EMA = 0.9  # weight of the old moving average of the entropy
SETTLED = 10  # batches before which it says nothing
# The newest images of a window, as shares of it, and standard errors beyond which they are enough.
SHARES, CERTAIN = (0.25, 0.5, 1), 2.0
TRIAL = 4  # times `probe`: batches that are compared one by one after the source has answered
COUNTS = ("probes", "judged", "worse", "by_source", "paused", "back")


class Rails(Wrapper):
    """Compares with the source from time to time, pauses, goes back, and lets the source answer.

    Args:
        inner: the method, or the rule, inside.
        source: the network before any method touched it; None: nothing is compared.
        probe: batches without a comparison for each that was compared, between two windows.
        images: of a window.
        margin: by how much, in nats, A of the method is below that of the source where it is likely
            worse.
        rest: of so many batches that the source answers, the method adapts to one and is judged.
        jump: standard deviations from its moving average at which the entropy asks for a new
            window at once; None: never.
        gate: share of log C of the entropy above which the method only predicts; None: never.
        ring: states that are kept.
        answer: `source`, or `method` whatever comes out.

    Raises:
        UserError: around a window.
    """

    counters = ("counts",)
    window: Tensor | None

    def __init__(
        self,
        *,
        inner: TTAStrategy,
        source: Backbone | None,
        probe: Count,
        images: Count,
        margin: NonNegative,
        rest: Count,
        jump: Positive | None,
        gate: Unit | None,
        ring: CountOrZero,
        answer: Literal["source", "method"],
    ) -> None:
        super().__init__(inner)
        if any(isinstance(rule, Window) for rule in self.rules()):
            raise UserError(
                "around=[window,rails] judges single images, which a window answers otherwise; "
                "around=[rails,window] judges the batches that it gathers"
            )
        self.source = source
        if source is not None:
            source.eval().requires_grad_(False)
            source.passes = cast(Backbone, inner.backbone).passes  # they count as passes of the run
        self.probe, self.images, self.margin, self.rest = probe, images, margin, rest
        self.jump, self.gate, self.ring, self.by_source = jump, gate, ring, answer == "source"
        # Classes by method and source, for images and mirror images, of those compared last.
        self.register_buffer("window", None)  # int64 [up to `images`, 2, 2]
        self.burst, self.asleep = 0, 0  # batches compared for this window, and left until the next
        self.good = False  # it was judged better than the source since it last was at its start
        self.trial = 0  # batches that are still compared one by one, after the source has answered
        self.resting, self.rested = False, 0  # the source answers, for so many batches now
        self.entropy = [0.0, 0.0, 0]  # moving mean and variance, batches
        self.states: list[dict[str, Any]] = []  # of the method, judged good, the newest last
        self.counts = dict.fromkeys(COUNTS, 0)

    def frozen(self) -> set[str]:
        return super().frozen() | {n for n in self.state_dict() if n.startswith("source.")}

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "flags": [self.resting, self.good],
            "batches": [self.burst, self.asleep, self.rested, self.trial],
            "entropy": self.entropy,
            "states": self.states,
            "counts": self.counts,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.resting, self.good = state["flags"]
        self.burst, self.asleep, self.rested, self.trial = state["batches"]
        self.entropy, self.states = [*state["entropy"]], [*state["states"]]
        self.counts = dict(state["counts"])

    def report(self) -> dict[str, float]:
        """Batches that both answered, judgements, those against the method, batches answered by
        the source, batches without an update, and how often the method went back."""
        return super().report() | {f"rails_{k}": float(n) for k, n in self.counts.items()}

    # ------------------------------------------------------------------ one batch

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] of the method, or of the source where the method is likely worse."""
        self.event = ""
        if self.resting:
            return self._rest(x)
        if self._uncertain():
            self.counts["paused"] += 1
            self.event = "paused: entropy"
            with torch.no_grad():
                scores = self.inner.predict(x)
        else:
            scores = self.inner.adapt(x)
        jumped = self._follow(scores)
        if self.source is None:
            return scores
        if jumped:
            self.window, self.asleep = None, 0
        self.trial = max(0, self.trial - 1)
        if self.asleep and not self.trial:
            self.asleep -= 1
            return scores
        answers = self._source(x)
        self.burst += 1
        better = self._compare(x, scores, answers)
        if better is None:
            return scores
        self.asleep, self.burst = self.probe * self.burst, 0
        if not self.trial:
            self.window = None  # the next one is of new images
        if better < -self.margin:
            self.event = "likely worse than the source"
            if self.by_source:
                if self.good:
                    self._go_back()  # a method that was never better needs time, not its start
                self.resting, self.rested, self.window = True, 0, None
                self.counts["by_source"] += 1
                return answers
            self.trial = TRIAL * self.probe
        elif better > self.margin:
            self.good = True
            if self.ring:
                self.states = [*self.states, deepcopy(self.inner.snapshot())][-self.ring :]
        return scores

    def _rest(self, x: Tensor) -> Tensor:
        """The source's answer to a batch; some of them the method adapts to and is judged on."""
        answers = self._source(x)
        self.counts["by_source"] += 1
        self.rested += 1
        if self.rested % self.probe == 0:
            self._go_back()  # it did not recover
        if self.rested % self.rest == 0:
            better = self._compare(x, self.inner.adapt(x), answers, shares=(1,))
            if better is not None and better > self.margin:
                self.resting, self.window, self.trial = False, None, TRIAL * self.probe
                self.good = True
                self.event = "adapts again"
        return answers

    def _go_back(self) -> None:
        self.counts["back"] += 1
        if self.states:
            self.inner.restore(self.states.pop())
        else:
            self.inner.reset()
            self.good = False

    @torch.no_grad()
    def _source(self, x: Tensor) -> Tensor:
        assert self.source is not None
        scores = self.source(x)
        return scores.softmax(1) if self.outputs == "probabilities" else scores

    @torch.no_grad()
    def _compare(
        self, x: Tensor, scores: Tensor, answers: Tensor, shares: tuple[float, ...] = SHARES
    ) -> float | None:
        """A of the method minus that of the source; None: too few images yet.

        Args:
            shares: of a window, the newest images of which may be enough; to trust the method
                again they are not.
        """
        self.counts["probes"] += 1
        mirrored = x.flip(3)
        pairs = [(scores, self.inner.predict(mirrored)), (answers, self._source(mirrored))]
        now = torch.stack([torch.stack([one.argmax(1) for one in pair], 1) for pair in pairs], 1)
        self.window = now if self.window is None else torch.cat([self.window, now])
        self.window = self.window[-self.images :]
        better = self._verdict(scores.shape[1], shares)
        if better is None:
            return None
        if not scores.isfinite().all():
            better = -math.inf
        self.counts["judged"] += 1
        self.counts["worse"] += better < -self.margin
        return better

    def _verdict(self, classes: int, shares: tuple[float, ...]) -> float | None:
        """From the newest images alone where they leave no doubt, else from the full window."""
        assert self.window is not None
        for share in shares:
            n = round(share * self.images)
            if n > len(self.window):
                return None
            method, source = (agreement(self.window[-n:, i], classes) for i in range(2))
            gain = method - source
            better, error = float(gain.mean()), float(gain.std()) / math.sqrt(n)
            if share == 1 or abs(better) > max(self.margin, CERTAIN * error):
                return better
        return None

    # ------------------------------------------------------------------ moving average

    def _follow(self, scores: Tensor) -> bool:
        """Take the batch into the moving average; whether its entropy is far from it."""
        if self.jump is None and self.gate is None:
            return False
        value = float(mean_entropy(scores.detach(), self.outputs))
        if not math.isfinite(value):
            return True
        mean, variance, batches = self.entropy
        far = self.jump is not None and abs(value - mean) > self.jump * math.sqrt(variance)
        weight = max(1 - EMA, 1 / (batches + 1))
        step = value - mean
        mean, variance = mean + weight * step, (1 - weight) * (variance + weight * step * step)
        self.entropy = [mean, variance, batches + 1]
        return far and batches >= SETTLED

    def _uncertain(self) -> bool:
        if self.gate is None or self.entropy[2] < 1:
            return False
        return self.entropy[0] > self.gate * math.log(cast(Backbone, self.backbone).num_classes)


def agreement(classes: Tensor, count: int) -> Tensor:
    """What A is the mean of, float [N], for `classes` int64 [N, 2] of `count` ones."""
    share = torch.bincount(classes.flatten(), minlength=count) / classes.numel()
    same = classes[:, 0] == classes[:, 1]
    return torch.where(same, -share[classes[:, 0]].log(), 0)
