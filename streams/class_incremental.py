"""Class-incremental task streams: the classes of a data set, some at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import numpy as np
from annotated_types import Gt, Lt, MinLen, Predicate

from driftline.core.errors import UserError
from driftline.core.ranges import (
    Count,
    CountOrZero,
    Flat,
    NonNegative,
    PlainName,
    Seed,
    Unit,
    distinct,
)
from driftline.core.seed import derive
from driftline.core.stream import (
    BOUNDARIES,
    NEW_CLASSES,
    NUM_TASKS,
    OWN_CLASSES,
    Skipped,
    Task,
    TaskStream,
)
from driftline.streams import corruptions as C
from driftline.streams.corrupted import (
    OUTAGES,
    Severity,
    corrupted,
    corruption_names,
    frost_source,
)
from driftline.streams.data.imagenet import cropped
from driftline.streams.dataset import NAMED, SplitData
from driftline.streams.images import ImageSet, fingerprint
from driftline.streams.loading import Rows, contents
from driftline.streams.store import TaskLoading
from driftline.streams.task_orders import (
    Options,
    by_first_occurrence,
    parse,
    task_sizes,
    tasks_of,
    without_boundaries,
)

CLEAN = "clean"  # among corruptions: images as they are


def order_of_classes(
    classes: int, order: Literal["seeded", "fixed"] | list[int], seed: int
) -> list[int]:
    """Class ids in the order in which they are learned.

    `seeded` is the permutation of NumPy's legacy generator, as in LAMDA-PILOT and its family
    (seed 1993); a list is taken as it is.

    Raises:
        UserError: if a given list is no permutation of the class ids.
    """
    if isinstance(order, list):
        if sorted(order) != list(range(classes)):
            raise UserError(f"scenario.class_order must hold each of 0..{classes - 1} once")
        return order
    if order == "fixed":
        return list(range(classes))
    return np.random.RandomState(seed).permutation(classes).tolist()


class Dealt(NamedTuple):
    """Training images in the order of the stream, both int64 [N]."""

    row: np.ndarray
    task: np.ndarray  # of the order, whether a method is told or not


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """Class increments that arrive under corruption, made while the stream runs.

    The images of task t come under the corruption of number t, counted round; in training and, by
    `corrupt_test`, in the test: the `same` (that of the task in which a class first came), `clean`
    images, or every image under `all` of them. Beside names, a list may hold `clean`. Images of
    class folders are first resized and cropped to 224 px, as ImageNet-C was made.
    """

    corruptions: str | Annotated[list[str], MinLen(1), Predicate(distinct)] | None
    severity: Severity
    corrupt_test: Literal["same", "clean", "all"]
    corruption_seed: Seed

    def names(self) -> list[str]:
        """One of each domain; without corruptions, `clean` alone.

        Raises:
            UserError: for an unknown name, or one that leaves nothing of an image.
        """
        if self.corruptions is None:
            return [CLEAN]
        listed = self.corruptions if isinstance(self.corruptions, list) else [self.corruptions]
        lost = sorted({*listed} & {*OUTAGES})
        if lost:
            raise UserError(
                f"scenario.corruptions={lost[0]} leaves nothing of an image that could be learned"
            )
        if CLEAN not in listed:
            return corruption_names(self.corruptions)
        known = [name for name in listed if name != CLEAN]
        corruption_names(known)
        return listed

    def sets(self, images: ImageSet, small: bool) -> list[ImageSet]:
        """`images` under each of `names`; `small`: with the settings of CIFAR-C."""
        if self.corruptions is None:
            return [images]
        base = images if small else cropped(images)
        domains = [(name, int(self.severity)) for name in self.names() if name != CLEAN]
        made = corrupted(
            base,
            domains,
            None,
            preset="cifar" if small else "imagenet",
            seed=self.corruption_seed,
            jpeg_quality=None,
            frost_dir=None,
        )
        return [base if n == CLEAN else made[n, int(self.severity)] for n in self.names()]

    def facts(self) -> dict[str, object]:
        """What a result says of it."""
        if self.corruptions is None:
            return {}
        return {
            "corruptions": self.names(),
            "severity": self.severity,
            "corrupt_test": self.corrupt_test,
            "corruption_seed": self.corruption_seed,
            "corruption_code": C.VERSION,
            **({"frost": frost_source(None)} if "frost" in self.names() else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Which classes come when, and how many images of them: an order of `streams/task_orders.py`.

    With `shots` the tasks after the first hold so many images a class (few-shot sessions); with
    `single_pass` every image of a task is seen once (online), whatever the strategy's epochs. With
    `evaluate_every`, what a strategy takes for a task is a stretch of so many images, in the order
    of the stream, after which it is evaluated: it learns nothing of where tasks begin.
    """

    order: str
    base: CountOrZero
    increment: Count
    tasks: Count
    skew: NonNegative
    first: Annotated[float, Gt(0), Lt(1)]
    zipf: NonNegative
    task_images: Count
    disjoint: Unit
    blurry: Unit
    evaluate_every: Count | None
    class_order: Literal["seeded", "fixed"] | list[CountOrZero]
    order_seed: Seed
    shots: Count | None
    single_pass: bool

    @property
    def plain(self) -> bool:
        """Whether no class comes twice, in tasks that are known."""
        return self.order == "increment" and self.evaluate_every is None

    def check(self) -> None:
        """Whether the settings fit each other.

        Raises:
            UserError: if not.
        """
        if self.evaluate_every is None and "si_blurry" in parse(self.order):
            raise UserError(
                "scenario.order=si_blurry hides where its tasks begin: set "
                "scenario.single_pass=true and scenario.evaluate_every, images between two "
                "evaluations (official: 1000)"
            )
        if self.evaluate_every is not None and (not self.single_pass or self.shots is not None):
            raise UserError(
                f"scenario.evaluate_every={self.evaluate_every} makes a stream without tasks, "
                "which is seen once and has no sessions: set scenario.single_pass=true and "
                "scenario.shots=null"
            )

    def dealt(self, place: np.ndarray, classes: int, label: str) -> list[Dealt]:
        """What each task, or stretch, holds; `place` as for `TaskOrder`.

        Raises:
            UserError: for numbers that do not fit, and a task without images.
        """
        numbers = Options(**{name: getattr(self, name) for name in Options._fields})
        rng = np.random.default_rng(derive(self.order_seed, "stream", self.order))
        tasks = tasks_of(self.order, place, classes, numbers, rng)
        for index, task in enumerate(tasks):
            if not len(task):
                raise UserError(f"task {index} of scenario={label} has no training images")
        if self.evaluate_every is None:
            return [Dealt(row, np.full(len(row), index)) for index, row in enumerate(tasks)]
        whole, lengths = np.concatenate(tasks), [len(row) for row in tasks]
        numbers_of = np.repeat(np.arange(len(tasks)), lengths)
        entries = np.split(np.arange(len(whole)), np.cumsum(lengths)[:-1])
        stretches = without_boundaries(entries, self.evaluate_every, rng)
        return [Dealt(whole[entry], numbers_of[entry]) for entry in stretches]

    def named(
        self, place: np.ndarray, tasks: list[np.ndarray], classes: int
    ) -> tuple[np.ndarray, list[int]]:
        """New names of the classes, as of `by_first_occurrence`; without images, plain ones."""
        if not self.plain:
            return by_first_occurrence(place, tasks, classes)
        sizes = task_sizes(classes, self.base, self.increment)
        return np.arange(classes), np.cumsum(sizes).tolist()

    def title(self, index: int, new: range, present: int) -> str:
        """Name of a task, or stretch."""
        if self.plain:
            return f"classes {new.start}-{new.stop - 1}"
        if self.evaluate_every is not None:
            return f"images from {index * self.evaluate_every}"
        return f"task {index}: {present} classes, {len(new)} new"


def split_stream(
    *,
    label: PlainName,
    data: Annotated[SplitData, NAMED],
    classes: Annotated[Classes, Flat()],
    corruption: Annotated[Corruption, Flat()],
    loading: Annotated[TaskLoading, Flat()],
    seed: int,
) -> TaskStream:
    """A stream of tasks over the classes of one set (B0-IncN, Bm-IncN), with a fixed class order.

    Labels are renamed by first occurrence, and by position in the class order among those that come
    together, so that new classes are contiguous. The order of epoch e is a function of (seed, task,
    epoch); augmentation draws are keyed by image as well.

    Raises:
        UserError: for missing data or settings that do not fit.
    """
    classes.check()
    train, test = data.split()
    count, shots, batch_size = train.num_classes, classes.shots, loading.batch_size
    wanted = order_of_classes(count, classes.class_order, classes.order_seed)
    place = np.argsort(wanted)[train.labels]
    dealt = classes.dealt(place, count, label)
    name, seen = classes.named(place, [part.row for part in dealt], count)
    order = [wanted[i] for i in np.argsort(name)]
    position = np.argsort(order)
    skipped, domains = Skipped(), len(corruption.names())
    small = data.cifar or data.data_root is None  # images of 32 px
    train_sets, test_sets = (corruption.sets(found, small) for found in (train, test))
    if corruption.corrupt_test == "clean" and corruption.corruptions is not None:
        test_sets = [test if small else cropped(test)]
    train_images, test_images = (
        loading.images(sets, skipped, data.cifar) for sets in (train_sets, test_sets)
    )
    labels, first = np.unique(
        position[train.labels[np.concatenate([part.row for part in dealt])]], return_index=True
    )
    homes = np.zeros(count, np.int64)  # domain in which each class first comes
    homes[labels] = np.concatenate([part.task for part in dealt])[first] % domains

    def tested(positions: range) -> Rows:
        label = position[test.labels]
        row = np.flatnonzero((label >= positions.start) & (label < positions.stop))
        if len(test_sets) > 1 and corruption.corrupt_test == "same":
            return Rows(row, label[row], homes[label[row]])
        return Rows.join(
            [Rows(row, label[row], np.full(len(row), d)) for d in range(len(test_sets))]
        )

    tasks, delivered = [], []
    for index, (row, task_of) in enumerate(dealt):
        new = range(seen[index - 1] if index else 0, seen[index])
        pool = Rows(row, position[train.labels[row]], task_of % domains)
        if shots is not None and index:
            rng = np.random.default_rng(derive(classes.order_seed, "shots", index))
            pool = _few(pool, shots, rng)
        arrive, again = train_images.shuffled, train_images.again
        if domains > 1:
            arrive, again = partial(arrive, homes=homes), partial(again, pool=pool)
        if classes.evaluate_every is None:
            shuffle = np.random.default_rng(derive(seed, "shuffle", index, 0))
            delivered.append(pool.take(shuffle.permutation(len(pool))))
        else:
            arrive = partial(arrive, ordered=True)
            delivered.append(pool)
        present = tuple(np.unique(pool.label).tolist())
        told = not classes.plain and classes.evaluate_every is None
        tasks.append(
            Task(
                index=index,
                name=classes.title(index, new, len(present)),
                classes=new if classes.plain else range(seen[index]),
                steps=-(-len(pool) // batch_size),
                train=partial(arrive, index, pool, batch_size, seed),
                fit=partial(train_images.fixed, pool, loading.test_batch_size),
                test=partial(test_images.fixed, tested(new), loading.test_batch_size),
                read=again,
                new=None if classes.plain else new,
                present=present if told else None,
            )
        )
    sizes = [len(task.tested) for task in tasks]
    made = corruption.facts()
    facts: dict[str, object] = {
        "classes": count,
        "class_order": order,
        "task_sizes": sizes,
        "pipeline": loading.pipeline,
        "train_images": len(train.labels),
        "test_images": len(test.labels),
        "shots": shots,
        "single_pass": classes.single_pass,
        "fingerprint": fingerprint(
            *contents([train, test], [None, None], loading.on_error),
            order,
            sizes,
            *([shots] if shots else []),
            *([] if classes.plain else [row for row, _ in dealt]),
            *([made] if made else []),
        ),
        **made,
    }
    if not classes.plain:
        facts |= {
            "order": classes.order,
            "classes_seen": seen[-1],
            "evaluate_every": classes.evaluate_every,
        }
    provides = {"num_classes"}
    if classes.evaluate_every is None:
        provides |= {BOUNDARIES, NUM_TASKS}
    if classes.plain:
        provides |= {NEW_CLASSES, OWN_CLASSES}
    return TaskStream(
        name=label,
        num_classes=count,
        tasks=tasks,
        facts=facts,
        skipped=skipped,
        batch_size=batch_size,
        single_pass=classes.single_pass,
        order={  # as the first epoch delivers them
            "task": np.concatenate([np.full(len(r), i) for i, r in enumerate(delivered)]),
            "row": np.concatenate([r.row for r in delivered]),
            "label": np.concatenate([r.label for r in delivered]),
        },
        provides=frozenset(provides),
    )


def _few(pool: Rows, shots: int, rng: np.random.Generator) -> Rows:
    """At most `shots` images of each class, drawn without replacement, in the pool's order."""
    chosen = [
        rng.permutation(np.flatnonzero(pool.label == c))[:shots] for c in np.unique(pool.label)
    ]
    return pool.take(np.sort(np.concatenate(chosen)))
