"""Class-incremental task streams: one function for CIFAR, image folders and the embedded set."""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np

from driftline.core.errors import UserError
from driftline.core.ranges import Count, CountOrZero, PlainName, Seed
from driftline.core.seed import derive
from driftline.core.stream import NEW_CLASSES, Skipped, Task, TaskStream
from driftline.streams.datasets import cifar, existing_root, expected
from driftline.streams.images import ImageSet, fingerprint, image_folder
from driftline.streams.loading import Reader, Rows
from driftline.streams.pipelines import Geometry, Name
from driftline.streams.store import ImageStore, TaskImages


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


def _load(
    dataset: Literal["cifar10", "cifar100", "imagefolder"],
    root: str | None,
    per_class: tuple[int, int],
) -> tuple[ImageSet, ImageSet]:
    if root is None:
        from driftline.streams.embedded import TASK_CLASSES, EmbeddedImages

        classes = TASK_CLASSES[:10] if dataset == "cifar10" else TASK_CLASSES
        train, test = (
            EmbeddedImages(classes=classes, split=split, per_class=n)
            for split, n in zip(("train", "test"), per_class, strict=True)
        )
        return train, test
    path = existing_root(root, dataset)
    if dataset == "imagefolder":
        train, test = (image_folder(path / s, expected(dataset)) for s in ("train", "test"))
        unknown = sorted(set(test.class_names) - set(train.class_names))
        if unknown:
            raise UserError(f"{path / 'test'} has classes that train lacks: {unknown[:5]}")
        position = np.asarray([train.class_names.index(c) for c in test.class_names])
        test.labels, test.class_names = position[test.labels], train.class_names
        return train, test
    return cifar(path, dataset, train=True), cifar(path, dataset, train=False)


def split_stream(
    *,
    label: PlainName,
    dataset: Literal["cifar10", "cifar100", "imagefolder"],
    base: CountOrZero,
    increment: Count,
    class_order: Literal["seeded", "fixed"] | list[CountOrZero],
    order_seed: Seed,
    batch_size: Count,
    test_batch_size: Count,
    pipeline: Name,
    embedded_images: tuple[Count, Count],
    shots: Count | None,
    single_pass: bool,
    data_root: str | None,
    on_error: Literal["raise", "skip"],
    workers: int,
    seed: int,
    geometry: Geometry,
    store: ImageStore,
) -> TaskStream:
    """A class-incremental stream (B0-IncN, Bm-IncN) with a fixed class order.

    With `shots` the tasks after the first hold so many images a class (few-shot sessions); with
    `single_pass` every image is seen once (online), whatever the strategy's epochs.

    Labels are renamed by position in the order, so tasks hold contiguous ranges. The order of
    epoch e is a function of (seed, task, epoch); augmentation draws are keyed by image as well.

    Raises:
        UserError: for missing data or settings that do not fit.
    """
    train, test = _load(dataset, data_root, embedded_images)
    order = order_of_classes(train.num_classes, class_order, order_seed)
    position = np.argsort(order)
    sizes = task_sizes(train.num_classes, base, increment)
    skipped = Skipped()
    images = {
        split: TaskImages(
            Reader([found], skipped, workers, on_error, store.device),
            pipeline,
            geometry,
            dataset != "imagefolder",
            store,
        )
        for split, found in (("train", train), ("test", test))
    }

    def rows(images: ImageSet, classes: range) -> Rows:
        label = position[images.labels]
        row = np.flatnonzero((label >= classes.start) & (label < classes.stop))
        return Rows(row, label[row], np.zeros(len(row), np.int64))

    tasks, dealt = [], []
    for index, size in enumerate(sizes):
        first = sum(sizes[:index])
        classes = range(first, first + size)
        pool = rows(train, classes)
        if shots is not None and index:
            pool = _few(pool, shots, np.random.default_rng(derive(order_seed, "shots", index)))
        if not len(pool):
            raise UserError(f"task {index} of scenario={label} has no training images")
        shuffle = np.random.default_rng(derive(seed, "shuffle", index, 0))
        dealt.append(pool.take(shuffle.permutation(len(pool))))
        tasks.append(
            Task(
                index=index,
                name=f"classes {classes.start}-{classes.stop - 1}",
                classes=classes,
                steps=-(-len(pool) // batch_size),
                train=partial(images["train"].shuffled, index, pool, batch_size, seed),
                fit=partial(images["train"].fixed, pool, test_batch_size),
                test=partial(images["test"].fixed, rows(test, classes), test_batch_size),
                read=images["train"].again,
            )
        )
    facts: dict[str, object] = {
        "classes": train.num_classes,
        "class_order": order,
        "task_sizes": sizes,
        "pipeline": pipeline,
        "train_images": len(train.labels),
        "test_images": len(test.labels),
        "shots": shots,
        "single_pass": single_pass,
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
        single_pass=single_pass,
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
