"""Domain-incremental task streams: the same classes in every task, another domain each time."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from annotated_types import MinLen, Predicate
from PIL import Image

from driftline.core.errors import UserError, suggest
from driftline.core.ranges import Count, PlainName, distinct
from driftline.core.stream import Skipped, Task, TaskStream
from driftline.streams import corruptions as C
from driftline.streams.datasets import existing_root, expected
from driftline.streams.images import Derived, Files, ImageSet, fingerprint, image_folder
from driftline.streams.loading import Reader, Rows
from driftline.streams.pipelines import Geometry, Name
from driftline.streams.store import ImageStore, TaskImages

EMBEDDED_DOMAINS = ("clean", "contrast", "fog", "pixelate", "gaussian_noise")


def _corrupt(image: Image.Image, row: int, *, name: str) -> Image.Image:
    pixels = C.corrupt(np.asarray(image), name, 3, preset="cifar", seed=0, index=row)
    return Image.fromarray(pixels)


def _embedded(domain: str, split: str, per_class: int) -> ImageSet:
    from driftline.streams.embedded import TASK_CLASSES, EmbeddedImages

    images = EmbeddedImages(classes=TASK_CLASSES[:10], split=split, per_class=per_class)
    if domain == "clean":
        return images
    return Derived(images, partial(_corrupt, name=domain), f"{domain}:3 {C.VERSION}", "memory")


def _folders(root: Path, domain: str) -> tuple[Files, Files]:
    train, test = (image_folder(root / domain / s, expected("domains")) for s in ("train", "test"))
    return train, test


def domain_stream(
    *,
    label: PlainName,
    dataset: Literal["domains"],
    domains: Annotated[list[str], MinLen(1), Predicate(distinct)] | None,
    batch_size: Count,
    test_batch_size: Count,
    pipeline: Name,
    embedded_images: tuple[Count, Count],
    data_root: str | None,
    on_error: Literal["raise", "skip"],
    workers: int,
    seed: int,
    geometry: Geometry,
    store: ImageStore,
) -> TaskStream:
    """One task per domain over a common list of classes.

    Real data: `<data.root>/<domain>/<train|test>/<class>/<image>`; without `domains` every folder
    of data.root is one, in sorted order.

    Raises:
        UserError: for missing folders, or domains whose classes differ.
    """
    if data_root is None:
        names = domains or list(EMBEDDED_DOMAINS)
        known = ["clean", *C.STANDARD, *C.EXTRA]
        for name in names:
            if name not in known:
                raise UserError(
                    f"scenario.domains: {name!r} is no embedded domain{suggest(name, known)}"
                )
        found: list[tuple[ImageSet, ImageSet]] = [
            (_embedded(n, "train", embedded_images[0]), _embedded(n, "test", embedded_images[1]))
            for n in names
        ]
    else:
        root = existing_root(data_root, "domains")
        names = domains or sorted(p.name for p in root.iterdir() if (p / "train").is_dir())
        if not names:
            raise UserError(f"no domains under data.root={data_root}. {expected('domains')}")
        found = [_folders(root, n) for n in names]
    classes = list(found[0][0].class_names)
    for name, sets in zip(names, found, strict=True):
        if any(list(s.class_names) != classes for s in sets):
            raise UserError(f"domain {name!r} has other classes than {names[0]!r}")
    skipped = Skipped()

    def delivered(images: ImageSet) -> TaskImages:
        reader = Reader([images], skipped, workers, on_error, store.device)
        return TaskImages(reader, pipeline, geometry, False, store)

    def everything(images: ImageSet) -> Rows:
        return Rows.of(images, np.arange(len(images.labels)))

    tasks = [
        Task(
            index=i,
            name=name,
            classes=range(len(classes)),
            steps=-(-len(train.labels) // batch_size),
            train=partial(delivered(train).shuffled, i, everything(train), batch_size, seed),
            fit=partial(delivered(train).fixed, everything(train), test_batch_size),
            test=partial(delivered(test).fixed, everything(test), test_batch_size),
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
            "pipeline": pipeline,
            "fingerprint": fingerprint(*(s.content() for sets in found for s in sets)),
        },
        skipped=skipped,
        batch_size=batch_size,
        order={
            "task": np.concatenate([np.full(len(t.labels), i) for i, (t, _) in enumerate(found)]),
            "label": np.concatenate([t.labels for t, _ in found]),
        },
        provides=frozenset({"boundaries", "num_tasks", "num_classes"}),
    )
