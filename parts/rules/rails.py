"""A method is watched without labels, and the frozen network answers where it is likely better.

What the statistics of a batch do to a few images is wrong from the first batch on, so going back to
the start is no help there: only the source is. What learning does to a stream takes time. So there
are two kinds of watching.

* **Batches of fewer than `few` images.** The source sees every one, and both answer: the mean of
  their probabilities. The statistics of three neighbours leave the method with little confidence,
  and a method that is better than the source is confident, too. Logits that are flat by a factor
  (as those of ROID, which a prior scales) get the spread of the source's first.
* **Larger ones.** The method answers, and the source is asked now and then, for at most `share` of
  the passes that the method itself takes, with a credit of two windows for the start and for
  batches at which the answers change (`jump`). The first question costs one pass of the source: are
  the method's answers less various? A collapse makes them so. Only where they are, the mirror
  images are compared as well, until a window has decided.

Two numbers judge a window of images, in nats, each of the method and of the source:

    V = entropy of the shares of the classes among all answers
    A = mean over images of [image and mirror image get one class] * -log(share of that class)

A is large where answers hold against what does not matter and are various together, and asks for no
confidence. The method is *likely worse* where its A is below that of the source by more than
`margin` and by more than its standard error, and its V by more than `margin`; in small batches A
alone decides, because statistics of a few images spread the answers over classes that are not
there. It is likely better where its A is above. A alone is not enough for larger batches: networks
learn from mirrored images, but not with the statistics of a batch, and on real images A then calls
a method worse that is 19 points better. A is ours, after the mutual information of two views (Ji et
al., "Invariant Information Clustering", ICCV 2019), whose estimate needs many images a class. What
all this is worth: results/reference/rails.md.

Where the method is likely worse the source answers, and the method adapts beside it until a full
window no longer says so; then both answer, until a window says that the method is better or a
further one says nothing. The pieces, each an option:

* `share`, `images`, `margin`, `few`: the comparison and the mean; ours. ASR (Lim et al., ICLR 2026,
  arXiv 2603.03796; YonseiML/asr @ 361560c) asks the source too, in every batch, how many
  predictions differ.
* `jump`: a mean entropy that is many standard errors from the mean of earlier images asks for a new
  window at once, and so do answers that became far less various; ours.
* `gate`: no update while the mean of the entropy is high, as the entropy gate of StableSleep (Arasu
  and Jahangiri, 2025, arXiv 2509.02982; ahritik/StableSleep @ 7a2c158), which looks at the batch
  itself; here at those before, so that nothing has to be taken back.
* `ring`, `patience`: states of the method that were not judged worse; one that has not recovered by
  itself after some windows goes back to the newest, and with none left to its start, as those of
  RDumb (NeurIPS 2023), SAR (ICLR 2023) and ASR do.
* `answer`: who answers while the method is in doubt; `method` leaves it at a warning.

Restoring single weights at random (CoTTA) or by Fisher information (PETAL) is an option of those
methods. Nothing is drawn, and no label is read.
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
from driftline.parts.rules.window import Window

ENOUGH = 32  # images of a window that may judge, where they leave little doubt
CERTAIN = 2.0  # standard errors of A beyond which they do; of a full window one is enough
CREDIT = 2  # windows for which the source may be asked at once
MEMORY = 400  # images that the mean of the entropy remembers
FALL = 0.7  # of V of the method in its last window, below which its answers ask for a new one
FLAT = 0.2  # of the spread of the source's logits, below which those of the method get that
COUNTS = ("probes", "judged", "worse", "by_source", "by_both", "paused", "back")
WORSE, UNSURE, BETTER = -1, 0, 1
Trust = Literal["method", "both", "source"]


class Rails(Wrapper):
    """Compares with the source from time to time, pauses, goes back, and lets the source answer.

    Args:
        inner: the method, or the rule, inside.
        source: the network before any method touched it; None: nothing is compared.
        share: of the passes of the method, what comparisons may take while it is trusted.
        images: of a window.
        margin: by how much, in nats, A and V of the method are below those of the source where it
            is likely worse.
        few: of batches with fewer images than this, each is compared, and both answer.
        jump: standard errors from its mean at which the entropy asks for a new window at once;
            None: never, nor does anything else.
        gate: share of log C of the entropy above which the method only predicts; None: never.
        ring: states that are kept.
        patience: windows that the source answers for before the method goes back to one of them.
        answer: `source`, or `method` whatever comes out.

    Raises:
        UserError: around a window.
    """

    counters = ("counts",)
    seen: Tensor | None
    turned: Tensor | None
    own: Tensor | None

    def __init__(
        self,
        *,
        inner: TTAStrategy,
        source: Backbone | None,
        share: Unit,
        images: Count,
        margin: NonNegative,
        few: CountOrZero,
        jump: Positive | None,
        gate: Unit | None,
        ring: CountOrZero,
        patience: Count,
        answer: Literal["source", "method"],
    ) -> None:
        super().__init__(inner)
        if any(isinstance(rule, Window) for rule in self.rules()):
            raise UserError(
                "around=[window,rails] judges single images, which a window answers otherwise; "
                "around=[rails,window] judges the batches that it gathers"
            )
        self.source = source
        self.passes = cast(Backbone, inner.backbone).passes
        if source is not None:
            source.eval().requires_grad_(False)
            source.passes = self.passes  # they count as passes of the run
        self.share, self.images, self.margin, self.few = share, images, margin, few
        self.jump, self.gate, self.watches = jump, gate, answer == "method"
        self.ring, self.patience = ring, patience
        # Classes of the newest images that were compared, by method and source; and of those whose
        # mirror images were, for image and mirror image.
        self.register_buffer("seen", None)  # int64 [up to `images`, 2]
        self.register_buffer("turned", None)  # int64 [up to `images`, 2, 2]
        self.register_buffer("own", None)  # int64 [up to `images`], classes of the method alone
        self.usual = 0.0  # V of the method in the last window that trusted it
        self.trust: Trust = "method"
        self.judged = False  # once at least
        self.credit = float(CREDIT * images)  # images for which the source may be asked
        self.since = 0  # images since a turn, or since the method went back
        self.entropy = [0.0, 0.0, 0]  # mean and variance over images, and their number
        self.states: list[dict[str, Any]] = []  # of the method, the newest last
        self.counts = dict.fromkeys(COUNTS, 0)

    def frozen(self) -> set[str]:
        return super().frozen() | {n for n in self.state_dict() if n.startswith("source.")}

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "plain": [self.trust, self.credit, self.since, self.usual, self.judged],
            "entropy": self.entropy,
            "states": self.states,
            "counts": self.counts,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.trust, self.credit, self.since, self.usual, self.judged = state["plain"]
        self.entropy, self.states = [*state["entropy"]], [*state["states"]]
        self.counts = dict(state["counts"])

    def report(self) -> dict[str, float]:
        """Batches that both predicted, those since the first judgement, those of a method that was
        likely worse, those answered by the source and by both, those without an update, and how
        often the method went back."""
        return super().report() | {f"rails_{k}": float(n) for k, n in self.counts.items()}

    # ------------------------------------------------------------------ one batch

    def adapt(self, x: Tensor) -> Tensor:
        """Scores [B, C] of the method, of the source, or of both, see above."""
        self.event = ""
        before = self._taken()
        if self._uncertain():
            self.counts["paused"] += 1
            self.event = "paused: entropy"
            with torch.no_grad():
                scores = self.inner.predict(x)
        else:
            scores = self.inner.adapt(x)
        broken = not scores.isfinite().all()
        jumped = not broken and self._follow(scores)
        if self.source is None:
            return scores
        taken = self.share * (self._taken() - before)
        self.credit = min(CREDIT * self.images, self.credit + taken)
        part, alone = x[: self.images], self._alone(x)
        self.counts["judged"] += self.judged
        if alone and not broken and not self._due(len(part), jumped or self._fallen(scores)):
            return scores
        self.counts["probes"] += 1
        answers = self._source(part)
        verdict = WORSE if broken else self._judge(x, scores, answers, alone)
        self._turn(verdict, len(part), len(x) < self.few, broken)
        if verdict is not None and not self.judged:
            self.judged, self.counts["judged"] = True, 1
        self.counts["worse"] += self.trust == "source"
        if self.watches or (self._alone(x) and not broken):
            return scores
        if len(part) < len(x):
            answers = torch.cat([answers, self._source(x[len(part) :])])
        if self.trust == "source" or broken:
            self.counts["by_source"] += 1
            return answers
        self.counts["by_both"] += 1
        return mean_of(scores, answers, self.outputs)

    def _alone(self, x: Tensor) -> bool:
        """Whether the method is trusted with batches of this size."""
        return self.trust == "method" and len(x) >= self.few

    def _due(self, images: int, jumped: bool) -> bool:
        """Whether the source is asked about so many images of a trusted method."""
        if self.turned is not None:
            return True  # a suspicion is followed whatever it takes
        if jumped:
            self.seen = None  # what was known is of other images
        elif self._full(self.seen):
            if self.credit < CREDIT * self.images:
                return False
            self.seen = None  # a new window
        if self.credit < images:
            return False
        self.credit -= images
        return True

    def _judge(self, x: Tensor, scores: Tensor, answers: Tensor, alone: bool) -> int | None:
        """What the window says with this batch; None: too few images yet.

        Args:
            answers: of the source to the first images `x`.
            alone: the method is trusted with batches of this size.
        """
        classes, part = scores.shape[1], x[: len(answers)]
        now = torch.stack([scores[: len(part)].argmax(1), answers.argmax(1)], 1)
        self.seen = self._newest(self.seen, now)
        if alone:
            if len(self.seen) < min(ENOUGH, self.images):
                return None
            own, source = variety(self.seen[:, None], classes)
            if own >= source - self.margin:
                self.usual, self.turned = own, None
                return UNSURE
        with torch.no_grad():
            mirrored = self.inner.predict(x.flip(3))[: len(part)]
        other = torch.stack([mirrored.argmax(1), self._source(part.flip(3)).argmax(1)], 1)
        self.turned = self._newest(self.turned, torch.stack([now, other], 1))
        return self._verdict(self.turned, classes, len(x) < self.few)

    def _verdict(self, turned: Tensor, classes: int, few: bool) -> int | None:
        """What images and their mirror images say, `turned` int64 [N, views, method and source]."""
        count = len(turned)
        if count < min(ENOUGH, self.images):
            return None
        own, source = variety(turned, classes)
        if source < self.margin:
            return None  # black images, say: nothing can be told
        gain = agreement(turned[:, :, 0], classes) - agreement(turned[:, :, 1], classes)
        better = float(gain.mean())
        certain = 1.0 if count >= self.images else CERTAIN
        if abs(better) > max(self.margin, certain * float(gain.std()) / math.sqrt(count)):
            if better > 0:
                return BETTER
            if few or own < source - self.margin:
                return WORSE
        return UNSURE if count >= self.images else None

    def _turn(self, verdict: int | None, images: int, few: bool, broken: bool) -> None:
        """Who is trusted after this batch, and where the method goes on from."""
        self.since += images
        full = self._full(self.turned)
        if self.trust == "source":
            if verdict == WORSE and (broken or self.since >= self.patience * self.images):
                self._go_back()  # it did not recover by itself
            elif full and verdict in (UNSURE, BETTER):
                self.trust, self.since = "both", 0
                self.event = "in doubt: both answer"
        elif verdict == WORSE:
            self.trust = "source"
            self.event = "likely worse than the source"
            self.since = 0
            if broken:
                self._go_back()
        elif self.trust == "both" and (verdict == BETTER or (full and self.since >= self.images)):
            self.trust, self.since = "method", 0
            self.seen = self.turned = None  # and is watched anew
            self.credit = float(CREDIT * self.images)
            self.event = "adapts again"
        elif self.trust == "method" and verdict is not None and self._full(self.seen):
            if full and not few:
                self.turned = None  # the suspicion was wrong
            if self.ring and self.since >= self.images:
                self.since = 0
                self.states = [*self.states, deepcopy(self.inner.snapshot())][-self.ring :]

    def _full(self, window: Tensor | None) -> bool:
        return window is not None and len(window) >= self.images

    def _go_back(self) -> None:
        if self.watches:
            return
        self.counts["back"] += 1
        self.since = 0
        if self.states:
            self.inner.restore(self.states.pop())
        else:
            self.inner.reset()

    @torch.no_grad()
    def _source(self, x: Tensor) -> Tensor:
        assert self.source is not None
        scores = self.source(x)
        return scores.softmax(1) if self.outputs == "probabilities" else scores

    def _newest(self, window: Tensor | None, now: Tensor) -> Tensor:
        joined = now if window is None else torch.cat([window, now])
        return joined[-self.images :]

    def _taken(self) -> int:
        """Passes so far, a backward one as two forward ones."""
        return self.passes.forward + 2 * self.passes.backward

    # ------------------------------------------------------------------ entropy

    @torch.no_grad()
    def _follow(self, scores: Tensor) -> bool:
        """Take the batch into mean and variance; whether its entropy is far from them."""
        if self.jump is None and self.gate is None:
            return False
        p = scores if self.outputs == "probabilities" else scores.softmax(1)
        each = torch.special.entr(p).sum(1)
        mean, variance, images = self.entropy
        count = len(each)
        value, spread = torch.stack([each.mean(), (each - mean).square().mean()]).tolist()
        error = math.sqrt(variance * (1 / count + 1 / max(1, images)))
        far = images > 0 and self.jump is not None and abs(value - mean) > self.jump * error
        if far or not images:
            inside = float(each.var(correction=0)) if count > 1 else variance or 1.0
            self.entropy = [value, inside, count]
        else:
            weight = count / min(images + count, MEMORY)
            mean, variance = mean + weight * (value - mean), variance + weight * (spread - variance)
            self.entropy = [mean, variance, min(images + count, MEMORY)]
        return far

    def _fallen(self, scores: Tensor) -> bool:
        """Whether the method's answers are far less various than when it was last trusted."""
        if self.jump is None:
            return False
        self.own = self._newest(self.own, scores.argmax(1))
        if len(self.own) < self.images:
            return False
        now = variety(self.own[:, None, None], scores.shape[1])[0]
        if now >= FALL * self.usual:
            return False
        self.usual = now  # asked once
        return True

    def _uncertain(self) -> bool:
        if self.gate is None or self.entropy[2] < 1:
            return False
        return self.entropy[0] > self.gate * math.log(cast(Backbone, self.backbone).num_classes)


def agreement(classes: Tensor, count: int) -> Tensor:
    """What A is the mean of, float [N], for `classes` int64 [N, 2] of `count` ones."""
    share = torch.bincount(classes.flatten(), minlength=count) / classes.numel()
    same = classes[:, 0] == classes[:, 1]
    return torch.where(same, -share[classes[:, 0]].log(), 0)


def variety(classes: Tensor, count: int) -> list[float]:
    """V in nats of each of P predictors, for `classes` int64 [N, views, P] of `count` ones."""
    shares = [torch.bincount(one.flatten(), minlength=count) for one in classes.unbind(2)]
    return torch.special.entr(torch.stack(shares) / shares[0].sum()).sum(1).tolist()


def mean_of(scores: Tensor, answers: Tensor, outputs: str) -> Tensor:
    """Scores [B, C] of the mean of the probabilities of both, as what they are (`outputs`).

    Logits [B, C] of the method that are flat, as those that ROID scales by a prior, get the spread
    of the source's: they are no sign of doubt.
    """
    if outputs == "probabilities":
        return (scores + answers) / 2
    ratio = answers.std(1).mean() / scores.std(1).mean().clamp_min(1e-12)
    scores = torch.where(FLAT * ratio > 1, scores * ratio, scores)
    return torch.logaddexp(scores.log_softmax(1), answers.log_softmax(1)) - math.log(2)
