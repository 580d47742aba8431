"""Class-incremental task streams: the classes of a data set, some at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np

from driftline.core.errors import UserError
from driftline.core.ranges import Count, CountOrZero, Flat, PlainName, Seed
from driftline.core.seed import derive
from driftline.core.stream import NEW_CLASSES, Skipped, Task, TaskStream
from driftline.streams.dataset import NAMED, SplitData
from driftline.streams.images import ImageSet, fingerprint
from driftline.streams.loading import Rows
from driftline.streams.store import TaskLoading


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


def task_sizes(classes: int, base: int, increment: int) -> list[int]:
    """Classes per task: `base` first (0: as the others), then `increment`, then what is left.

    Raises:
        UserError: if base or increment do not fit the number of classes.
    """
    if not 1 <= increment <= classes or not 0 <= base <= classes:
        raise UserError(
            f"scenario.base={base} and scenario.increment={increment} do not fit {classes} classes"
        )
    sizes = [base or increment]
    while sum(sizes) + increment <= classes:
        sizes.append(increment)
    if sum(sizes) < classes:
        sizes.append(classes - sum(sizes))
    return sizes


@dataclass(frozen=True, kw_only=True)
class Classes:
    """Which classes a task brings, and how many images of them.

    With `shots` the tasks after the first hold so many images a class (few-shot sessions); with
    `single_pass` every image is seen once (online), whatever the strategy's epochs.
    """

    base: CountOrZero
    increment: Count
    class_order: Literal["seeded", "fixed"] | list[CountOrZero]
    order_seed: Seed
    shots: Count | None
    single_pass: bool


def split_stream(
    *,
    label: PlainName,
    data: Annotated[SplitData, NAMED],
    classes: Annotated[Classes, Flat()],
    loading: Annotated[TaskLoading, Flat()],
    seed: int,
) -> TaskStream:
    """A class-incremental stream (B0-IncN, Bm-IncN) with a fixed class order.

    Labels are renamed by position in the order, so tasks hold contiguous ranges. The order of
    epoch e is a function of (seed, task, epoch); augmentation draws are keyed by image as well.

    Raises:
        UserError: for missing data or settings that do not fit.
    """
    train, test = data.split()
    shots, order_seed, batch_size = classes.shots, classes.order_seed, loading.batch_size
    order = order_of_classes(train.num_classes, classes.class_order, order_seed)
    position = np.argsort(order)
    sizes = task_sizes(train.num_classes, classes.base, classes.increment)
    skipped = Skipped()
    images = {
        split: loading.images(found, skipped, data.cifar)
        for split, found in (("train", train), ("test", test))
    }

    def rows(images: ImageSet, positions: range) -> Rows:
        label = position[images.labels]
        row = np.flatnonzero((label >= positions.start) & (label < positions.stop))
        return Rows(row, label[row], np.zeros(len(row), np.int64))

    tasks, dealt = [], []
    for index, size in enumerate(sizes):
        first = sum(sizes[:index])
        positions = range(first, first + size)
        pool = rows(train, positions)
        if shots is not None and index:
            pool = _few(pool, shots, np.random.default_rng(derive(order_seed, "shots", index)))
        if not len(pool):
            raise UserError(f"task {index} of scenario={label} has no training images")
        shuffle = np.random.default_rng(derive(seed, "shuffle", index, 0))
        dealt.append(pool.take(shuffle.permutation(len(pool))))
        tasks.append(
            Task(
                index=index,
                name=f"classes {positions.start}-{positions.stop - 1}",
                classes=positions,
                steps=-(-len(pool) // batch_size),
                train=partial(images["train"].shuffled, index, pool, batch_size, seed),
                fit=partial(images["train"].fixed, pool, loading.test_batch_size),
                test=partial(images["test"].fixed, rows(test, positions), loading.test_batch_size),
                read=images["train"].again,
            )
        )
    facts: dict[str, object] = {
        "classes": train.num_classes,
        "class_order": order,
        "task_sizes": sizes,
        "pipeline": loading.pipeline,
        "train_images": len(train.labels),
        "test_images": len(test.labels),
        "shots": shots,
        "single_pass": classes.single_pass,
        "fingerprint": fingerprint(
            train.content(), test.content(), order, sizes, *([shots] if shots else [])
        ),
    }
    return TaskStream(
        name=label,
        num_classes=train.num_classes,
        tasks=tasks,
        facts=facts,
        skipped=skipped,
        batch_size=batch_size,
        single_pass=classes.single_pass,
        order={  # as the first epoch delivers them
            "task": np.concatenate([np.full(len(r), i) for i, r in enumerate(dealt)]),
            "row": np.concatenate([r.row for r in dealt]),
            "label": np.concatenate([r.label for r in dealt]),
        },
        provides=frozenset({"boundaries", "num_tasks", "num_classes", NEW_CLASSES}),
    )


def _few(pool: Rows, shots: int, rng: np.random.Generator) -> Rows:
    """At most `shots` images of each class, drawn without replacement, in the pool's order."""
    chosen = [
        rng.permutation(np.flatnonzero(pool.label == c))[:shots] for c in np.unique(pool.label)
    ]
    return pool.take(np.sort(np.concatenate(chosen)))
