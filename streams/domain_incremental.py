"""Domain-incremental task streams: the same classes in every task, another domain each time."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import numpy as np

from driftline.core.errors import UserError
from driftline.core.ranges import Flat, PlainName
from driftline.core.stream import BOUNDARIES, NUM_TASKS, OWN_CLASSES, Skipped, Task, TaskStream
from driftline.streams.dataset import NAMED, DomainData
from driftline.streams.images import ImageSet, fingerprint
from driftline.streams.loading import Rows
from driftline.streams.store import TaskImages, TaskLoading


def domain_stream(
    *,
    label: PlainName,
    data: Annotated[DomainData, NAMED],
    loading: Annotated[TaskLoading, Flat()],
    seed: int,
) -> TaskStream:
    """One task per domain over a common list of classes.

    Raises:
        UserError: for missing folders, or domains whose classes differ.
    """
    splits = data.splits()
    names, found = list(splits), list(splits.values())
    classes = list(found[0][0].class_names)
    for name, sets in zip(names, found, strict=True):
        for part, s in zip(("training", "test"), sets, strict=True):
            if list(s.class_names) != classes:
                differing = sorted(set(s.class_names) ^ set(classes))
                raise UserError(
                    f"domain {name!r} has other classes than {names[0]!r} among its {part} images: "
                    f"{', '.join(differing[:6])}; every domain needs the same class folders"
                )
    skipped = Skipped()

    def delivered(images: ImageSet) -> TaskImages:
        return loading.images(images, skipped)

    def everything(images: ImageSet) -> Rows:
        return Rows.of(images, np.arange(len(images.labels)))

    tasks = [
        Task(
            index=i,
            name=name,
            classes=range(len(classes)),
            steps=-(-len(train.labels) // loading.batch_size),
            train=partial(
                delivered(train).shuffled, i, everything(train), loading.batch_size, seed
            ),
            fit=partial(delivered(train).fixed, everything(train), loading.test_batch_size),
            test=partial(delivered(test).fixed, everything(test), loading.test_batch_size),
            read=delivered(train).again,
        )
        for i, (name, (train, test)) in enumerate(zip(names, found, strict=True))
    ]
    return TaskStream(
        name=label,
        num_classes=len(classes),
        tasks=tasks,
        facts={
            "classes": len(classes),
            "domains": names,
            "pipeline": loading.pipeline,
            "fingerprint": fingerprint(
                *(c for sets in found for s in sets for c in delivered(s).reader.contents([None]))
            ),
        },
        skipped=skipped,
        batch_size=loading.batch_size,
        order={
            "task": np.concatenate([np.full(len(t.labels), i) for i, (t, _) in enumerate(found)]),
            "label": np.concatenate([t.labels for t, _ in found]),
        },
        provides=frozenset({BOUNDARIES, NUM_TASKS, OWN_CLASSES, "num_classes"}),
    )
