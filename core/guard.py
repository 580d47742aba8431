"""Numbers that go bad, in both loops: noticed, counted, and answered as `guard=` says.

A batch is bad for one of these kinds of reasons, none of which needs a label of an adaptation
stream:

| kind | what is noticed |
|---|---|
| `input` | images that are not finite |
| `scores` | scores that are not finite (adaptation) |
| `loss` | a logged loss that is not finite, or a method that gave up (`Diverged`) |
| `gradients` | gradients at a step of an optimiser that are not finite |
| `exploding` | their norm is above 100 and above 100 times the mean of earlier batches |
| `weights` | of what optimisers move: not finite, or a root mean square above 10 and above 10 times that at the start of the stream or task; under `warn` in every 16th batch |
| `collapse` | at least 95 % of the last 100 or more predictions fall in two classes (one, where there are at most four); adaptation. Labels that come sorted can look the same |

Answers: `warn` counts and says so once a kind; `stop` ends the run; the others go on: `skip` with the
method as it was before the batch, `rollback` with the last state that was noticed as good (with an
older one each time, in the end with the first), `reset` with that at the start of the stream or task.
An answered batch of a stream is predicted by the method as it then is.

The limits are ours: far from what healthy runs of the methods here show. Under `warn` a batch costs a
few small operations, and only every 16th waits for a GPU.
"""  # noqa: E501

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from driftline.core import distributed
from driftline.core.errors import Diverged
from driftline.core.ranges import Reaction
from driftline.core.strategy import CLStrategy, Strategy, TTAStrategy
from driftline.core.stream import Batch

Kind = Literal["input", "scores", "loss", "gradients", "exploding", "weights", "collapse"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TEXT: dict[str, str] = {
    "input": "images that are not finite",
    "scores": "scores that are not finite",
    "loss": "a loss that is not finite",
    "gradients": "gradients that are not finite",
    "exploding": "exploding gradients",
    "weights": "weights that are not finite or have exploded",
    "collapse": "predictions that fall in one or two classes",
}
EVERY = 16  # batches from one look to the next under `warn`, and from one kept state to the next
KEPT = 3  # states beside the first, under `rollback`
FACTOR, NORM = 100.0, 100.0  # of exploding gradients
USUAL = 10  # batches before which there is no usual norm
RMS, GROWTH = 10.0, 10.0  # of exploding weights
WINDOW, SHARE = 100, 0.95  # predictions, and the share of them that two classes hold
PLAIN = ("_batches", "_answered", "_counts", "_first", "_usual", "_rms", "_window", "_windows")


class Noted(NamedTuple):
    """What a look needs of one batch; tensors that stay on the device until then."""

    batch: int
    numbers: Tensor  # float32 [3]: sum of the images, of scores or loss, norm of the gradients
    output: Kind  # what the second one is
    predicted: Tensor | None  # int64 [B]


class Guard:
    """Watches one method on one stream; a part of checkpoints.

    Args:
        strategy: the method, with the rules around it.
        answer: see above.
        say: prints one line.
        classes: length C of a score vector.
    """

    def __init__(
        self, strategy: Strategy, answer: Reaction, say: Callable[[str], None], classes: int
    ) -> None:
        self.strategy, self.answer, self.say, self.classes = strategy, answer, say, classes
        self.row: dict[str, str] = {}  # of the last batch, for its record
        self._batches = self._answered = 0
        self._counts = {str(kind): 0 for kind in KINDS}  # of batches
        self._first: dict[str, int] = {}  # batch
        self._usual = (0.0, 0)  # sum of the norms of gradients in good batches, and their number
        self._rms = 0.0  # of the weights at the start
        self._window: list[int] = []  # classes that were predicted since the last full window
        self._windows = 0
        self._known: list[dict[str, Any]] = []  # states to go back to, the first one first
        self._said: set[str] = set()
        self._norms: list[Tensor] = []  # of the gradients at each step in this batch
        self._pending: list[Noted] = []

    @property
    def goes_on(self) -> bool:
        """Whether nothing that goes bad ends the run."""
        return self.answer not in ("warn", "stop")

    # ------------------------------------------------------------------ in the loops

    def begin(self) -> None:
        """A stream or a task begins: what explodes is judged anew."""
        self._usual, self._rms = (0.0, 0), float(self._weights())
        tasks = isinstance(self.strategy, CLStrategy)
        if self.answer == "rollback" or (self.answer == "reset" and tasks):
            self._known = [self._copy()]

    def adapt(self, x: Tensor, where: str) -> Tensor:
        """Scores [B, C] of an adapting method for images `x`, after the answer to a bad batch.

        Raises:
            Diverged: under `warn` from the method itself, under `stop` for every bad batch.
        """
        strategy = self.strategy
        assert isinstance(strategy, TTAStrategy)
        scores = self._watched(lambda: strategy.adapt(x), x, where)
        if scores is None:
            with torch.no_grad():
                return strategy.predict(x)
        return scores

    def observe(self, batch: Batch, where: str) -> dict[str, Tensor]:
        """What `observe` of a method of tasks logs; nothing of a batch that was answered.

        Raises:
            Diverged: as `adapt`.
        """
        strategy = self.strategy
        assert isinstance(strategy, CLStrategy)
        logged = self._watched(lambda: strategy.observe(batch), batch.x, where)
        return {} if logged is None else logged

    @contextmanager
    def end_of_task(self, where: str) -> Iterator[None]:
        """Around the end of a task, whose numbers are counted and answered by `stop` alone.

        Raises:
            Diverged: as `adapt`.
        """
        with self._listening():
            yield
        self._note(torch.zeros(1, device=self.strategy.device), {})
        self._stop(self._look(weights=True), where)
        self.tell()

    def evaluated(self, text: str, where: str) -> None:
        """What is wrong with the answers on test images: said, and answered by `stop` alone.

        Raises:
            Diverged: as `adapt`.
        """
        if self.answer == "stop":
            raise Diverged(f"guard=stop: {text} {where}. Lower the learning rate")
        self._say(text, f"{text} {where}")

    def tell(self) -> None:
        """Say what is new since the last time."""
        self._look()
        more = "; guard=stop, skip, rollback or reset would answer (core/guard.py)"
        for kind, first in self._first.items():
            text = f"{TEXT[kind]}, first in batch {first} of the run"
            self._say(kind, text + (more if self.answer == "warn" else ""))

    def summary(self) -> dict[str, Any]:
        """`answer`, batches per kind, batches `answered`, and the `first` batch of each kind."""
        self._look()
        known = {"answered": self._answered, "first": dict(self._first)}
        return {"answer": self.answer, **self._counts, **known}

    def warnings(self) -> list[str]:
        """What has been noticed so far, in a few words each; does not wait for a device."""
        windows = {"collapse": f"collapse in {self._counts['collapse']} of {self._windows} windows"}
        return [
            windows.get(kind, f"bad {kind} in {count:,} batches")
            for kind, count in self._counts.items()
            if count
        ]

    def collapse(self) -> dict[str, float]:
        """`collapse`, the share of the windows of predictions that fell in few classes; or {}."""
        self._look()
        few = self._counts["collapse"]
        return {"collapse": few / self._windows} if self._windows else {}

    def snapshot(self) -> dict[str, Any]:
        self._look()
        plain = deepcopy({name: getattr(self, name) for name in PLAIN})
        return {"plain": plain, "known": [*self._known], "said": sorted(self._said)}

    def restore(self, state: Mapping[str, Any]) -> None:
        vars(self).update(deepcopy(state["plain"]))
        self._known, self._said = [*state["known"]], {*state["said"]}

    # ------------------------------------------------------------------ one batch

    def _watched(self, step: Callable[[], Any], x: Tensor, where: str) -> Any:
        """What `step` returns, or None where the batch was bad and has been answered."""
        before = self._copy() if self.answer == "skip" else None
        self.row = {}
        result = None
        try:
            with self._listening():
                result = step()
        except Diverged:
            if not self.goes_on:
                raise
        self._note(x, result)
        due, acts = (self._batches + 1) % EVERY == 0, self.answer != "warn"
        bad = self._look(weights=True) if due or acts else []
        self._batches += 1
        if due:
            self.tell()
        if not bad or not acts:
            if due and self.answer == "rollback":
                self._known = [self._known[0], *self._known[1:][1 - KEPT :], self._copy()]
            return result
        self._stop(bad, where)
        self._answered += 1
        self.row = {"guard": ",".join(bad)}
        self._go_back(before)
        return None

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Notes the norm of the gradients at each step of any optimiser."""
        self._norms = []

        def note(optimizer: Optimizer, *_: Any) -> None:
            groups = optimizer.param_groups
            grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            if grads:
                self._norms.append(get_total_norm(grads).float())

        hook = register_optimizer_step_pre_hook(note)
        try:
            yield
        finally:
            hook.remove()

    @torch.no_grad()
    def _note(self, x: Tensor, result: Any) -> None:
        """Keep what the next look needs of this batch."""
        kind: Kind = "loss"
        predicted = None
        if result is None:  # the method gave up
            output = torch.full((), math.nan, device=x.device)
        elif isinstance(result, Tensor):
            kind, output, predicted = "scores", result.sum(dtype=torch.float32), result.argmax(1)
        else:
            output = torch.as_tensor(result.get("loss", 0.0), device=x.device).detach().float()
        norm = torch.stack(self._norms).amax() if self._norms else torch.zeros_like(output)
        numbers = torch.stack([x.sum(dtype=torch.float32), output, norm])
        self._pending.append(Noted(self._batches, numbers, kind, predicted))

    def _look(self, *, weights: bool = False) -> list[Kind]:
        """Count what is bad in the batches noted so far; the kinds of the newest one.

        Args:
            weights: look at them as well.
        """
        if not self._pending:
            return []
        pending, self._pending = self._pending, []
        rows = torch.stack([one.numbers for one in pending])
        rms = self._weights() if weights else torch.zeros((), device=rows.device)
        *values, last = torch.cat([rows.flatten(), rms[None]]).tolist()
        predicted = [one.predicted for one in pending if one.predicted is not None]
        classes = torch.cat(predicted).tolist() if predicted else []
        bad: dict[Kind, bool] = {}
        for i, one in enumerate(pending):
            images, output, norm = values[3 * i : 3 * i + 3]
            bad = {
                "input": not math.isfinite(images),
                one.output: not math.isfinite(output),
                "gradients": not math.isfinite(norm),
                "exploding": self._exploding(norm),
            }
            if weights and one is pending[-1]:
                grown = last > max(RMS, GROWTH * self._rms)
                bad["weights"] = grown or not math.isfinite(last)
            if one.predicted is not None:
                count = len(one.predicted)
                bad["collapse"] = self._collapsed(classes[:count])
                classes = classes[count:]
            for kind in (kind for kind in KINDS if bad.get(kind)):
                self._counts[kind] += 1
                self._first.setdefault(kind, one.batch)
        if self.answer == "warn":
            return []
        agreed = distributed.all_reduce_max(*(bad.get(kind, False) for kind in KINDS))
        return [kind for kind, flag in zip(KINDS, agreed, strict=True) if flag]

    def _exploding(self, norm: float) -> bool:
        """Whether this norm of gradients is far above the usual one, of which it else is a part."""
        total, count = self._usual
        exploding = count >= USUAL and norm > max(NORM, FACTOR * total / count)
        if norm and math.isfinite(norm) and not exploding:
            self._usual = (total + norm, count + 1)
        return exploding and math.isfinite(norm)

    def _collapsed(self, classes: list[int]) -> bool:
        """Whether a window is full with these predictions and falls in few classes."""
        self._window = [*self._window, *classes] if self.classes > 1 else []
        if len(self._window) < WINDOW:
            return False
        most = Counter(self._window).most_common(2 if self.classes > 4 else 1)
        few = sum(n for _, n in most) >= SHARE * len(self._window)
        self._window, self._windows = [], self._windows + 1
        return few

    @torch.no_grad()
    def _weights(self) -> Tensor:
        """Root mean square of what optimisers move, 0-dim; 0 of nothing."""
        moved = [p.detach() for p in self.strategy.updated_parameters()]
        if not moved:
            return torch.zeros((), device=self.strategy.device)
        return get_total_norm(moved).float() / math.sqrt(max(1, sum(p.numel() for p in moved)))

    # ------------------------------------------------------------------ answers

    def _stop(self, bad: list[Kind], where: str) -> None:
        if bad and self.answer == "stop":
            what = " and ".join(TEXT[kind] for kind in bad)
            raise Diverged(
                f"guard=stop: {what} in {where}. Lower the learning rate or look at the images; "
                "guard=skip, rollback or reset goes on without what was learned from bad batches, "
                "guard=warn counts them"
            )

    def _go_back(self, before: dict[str, Any] | None) -> None:
        if before is not None:
            self.strategy.restore(before)
        elif self.answer == "reset" and isinstance(self.strategy, TTAStrategy):
            self.strategy.reset()
        else:
            self.strategy.restore(self._known.pop() if len(self._known) > 1 else self._known[0])
        self._window = []

    def _copy(self) -> dict[str, Any]:
        return deepcopy(self.strategy.snapshot())

    def _say(self, about: str, text: str) -> None:
        """Print a line; of several about one thing, the first alone."""
        if about not in self._said:
            self._said.add(about)
            self.say(f"guard={self.answer}: {text}")
