"""What a stream is made of: batches, tasks (continual learning), segments (adaptation)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from driftline.core.errors import UserError


class Batch(NamedTuple):
    """Images and what is known of them. A TTA method receives `x` alone."""

    x: Tensor  # float32 [B, 3, H, W] in [0, 1], not normalised
    y: Tensor  # int64 [B], position in the stream's label space; -1: of no class of it
    index: Tensor  # int64 [B], row in the image set
    domain: Tensor  # int64 [B], position in the stream's list of domains (0 where there is one)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`; itself if it is there."""
        if self.x.device == self.y.device == device:
            return self
        return Batch(*(t.to(device, non_blocking=True) for t in self))


# None stands for a batch of which every image was skipped (data.on_error=skip).
Batches = Callable[..., Iterator[Batch | None]]
Images = Callable[..., Iterator[Batch]]


@dataclass(frozen=True)
class SourceImages:
    """Labelled images of the source domain, for methods that prepare before deployment."""

    images: int
    description: str  # where they come from, for tables
    fingerprint: str
    # (batch_size, *, epoch=None, start=0, augment="none"): shuffled where an epoch is given; a
    # pure function of its arguments; `augment` names a pipeline of streams/pipelines.py
    batches: Callable[..., Iterator[Batch]] = field(repr=False)


class Skipped:
    """Images left out because they cannot be read (data.on_error=skip), each counted once."""

    def __init__(self) -> None:
        self.reasons: dict[str, None] = {}  # in the order of appearance

    def add(self, reason: str) -> bool:
        """Note one image by the message that names it; True the first time."""
        new = reason not in self.reasons
        self.reasons[reason] = None
        return new

    def snapshot(self) -> dict[str, Any]:
        return {"reasons": list(self.reasons)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.reasons = dict.fromkeys(state["reasons"])


@dataclass(frozen=True)
class Task:
    """One experience of a class-incremental stream.

    `read`, where a stream has it, takes the arguments of `again` and gives what that promises, a
    pure function of them.
    """

    index: int
    name: str
    # Label positions that images of this task may have: those introduced here, contiguous after the
    # class order is applied; where classes come back, all that have come so far.
    classes: range
    steps: int  # batches per training epoch, for schedules
    # (epoch, start=0): shuffled, training pipeline. With more=(rows, labels), int64 [n] each, which
    # the streams of this framework take: those images of the same set among them.
    train: Batches = field(repr=False)
    fit: Images = field(repr=False)  # (): training images, test pipeline, fixed order
    test: Images = field(repr=False)  # (): test images of the classes `tested`
    read: Callable[[Tensor, int | None], Tensor] | None = field(default=None, repr=False)
    # Where classes come back: those that come for the first time, so that every test image belongs
    # to one task. None: `classes`.
    new: range | None = None
    present: tuple[int, ...] | None = None  # those with images, ascending; None: `classes`

    @property
    def tested(self) -> range:
        """Label positions of what `test` gives."""
        return self.classes if self.new is None else self.new

    def without_images(self) -> Task:
        """The same task, for a method that grows to what it was after it.

        Raises:
            UserError: later, where images are asked for.
        """

        def gone(*_: Any, **__: Any) -> Iterator[Any]:
            raise UserError(
                f"the images of task {self.index} ({self.name}) are not at hand: a saved method "
                "goes on with new tasks, and this one reads those of earlier tasks again"
            )

        return replace(self, train=gone, fit=gone, test=gone, read=None)

    @property
    def own(self) -> Sequence[int]:
        """Label positions that have images in this task, as far as a method may know."""
        return self.classes if self.present is None else self.present

    def again(self, rows: Tensor, draws: int | None) -> Tensor:
        """Training images [n, 3, H, W] by `Batch.index`, augmented once more.

        Args:
            draws: number of the random draws; the same one gives the same images. None: the test
                pipeline. A stream without `read` gives them as `fit` does, whatever the number.
        """
        if self.read is not None:
            return self.read(rows, draws)
        pairs = (p for b in self.fit() for p in zip(b.index.tolist(), b.x, strict=True))
        images = dict(pairs)
        return torch.stack([images[row] for row in rows.tolist()])


@dataclass(frozen=True)
class Segment:
    """One stretch of an adaptation stream."""

    index: int
    name: str  # "gaussian_noise:5", "mixed", "r2/fog:5"
    domains: tuple[int, ...]  # the stream domains that occur in it
    images: int
    steps: int
    batches: Batches = field(repr=False)  # (start=0)
    round: int = 1  # of a recurring sequence, from 1


# Of what a TaskStream may provide:
NEW_CLASSES = "new_classes"  # no class comes twice
OWN_CLASSES = "own_classes"  # all `classes` of a task have images in it
BOUNDARIES = "boundaries"  # a task ends where its classes do
NUM_TASKS = "num_tasks"
SINGLE_IMAGES = "single images (scenario.batch_size=1)"  # of what a ShiftStream may provide
OF_STREAMS = frozenset({NEW_CLASSES, OWN_CLASSES, BOUNDARIES, NUM_TASKS, SINGLE_IMAGES})


@dataclass(frozen=True)
class TaskStream:
    """A sequence of tasks."""

    name: str
    num_classes: int
    tasks: Sequence[Task]
    facts: dict[str, object]  # recorded with every result: order, pipeline, counts, fingerprint
    skipped: Skipped
    batch_size: int = 0
    single_pass: bool = False  # online: every training image once, near-future accuracy reported
    order: Mapping[str, np.ndarray] = field(default_factory=dict)  # int64 [N]: training images
    provides: frozenset[str] = frozenset({BOUNDARIES, OWN_CLASSES})


class Outputs(NamedTuple):
    """Which outputs of a network are the classes of a stream, in the order of its labels."""

    kept: tuple[int, ...]
    of: int  # how many the network has


class Labels(NamedTuple):
    """What the outputs of a network for a stream mean."""

    space: str  # "imagenet1k"
    names: tuple[str, ...]  # one a class; empty: not known


@dataclass(frozen=True)
class ShiftStream:
    """A sequence of segments over a list of domains."""

    name: str
    num_classes: int  # scores that a method sees and that count
    domains: Sequence[str]
    segments: Sequence[Segment]
    facts: dict[str, object]
    skipped: Skipped
    probes: Mapping[int, Batches] = field(default_factory=dict)  # domain -> images scored as is
    probe_every: int = 1  # segments between two evaluations of the probes
    probe_all: bool = False  # those of every domain each time, read by a metric or not
    holdout: Batches | None = None  # clean images, for source forgetting
    holdout_adapting: bool = False  # score them a second time with a method that adapts to them
    source: Callable[[], SourceImages] | None = None  # raises UserError where there are none
    label_budget: float | None = None  # labels that may be bought, see core/oracle.py
    label_delay: int = 0  # batches until they are there
    open_world: bool = False  # images with label -1 among the others, see core/open_world.py
    order: Mapping[str, np.ndarray] = field(default_factory=dict)  # int64 [N] each: what, when
    provides: frozenset[str] = frozenset()
    outputs: Outputs | None = None  # None: every output is a class of the stream
    class_names: Sequence[str] = ()  # of the label space, in its order; empty: not known

    def scored(self) -> dict[int, tuple[set[int], bool]]:
        """Rows of the accuracy matrix: after which segment (-1: the start) what is scored.

        Returns:
            the domains, and whether the clean images are, too. With `probe_all` everything each
            time; else what a metric reads (`AccuracyMatrix.summary`): the domains so far and the
            next one, at both ends all domains and the clean images.
        """
        last = len(self.segments) - 1
        rows = [-1, *(i for i in range(last + 1) if (i + 1) % self.probe_every == 0 or i == last)]
        first = {d: s.index for s in reversed(self.segments) for d in s.domains}
        cells = {}
        for i in rows:
            whole = self.probe_all or i in (-1, last)
            cells[i] = {d for d in self.probes if whole or first[d] <= i + 1}, whole
        return cells
