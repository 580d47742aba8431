"""Data sets of one's own, as torch has them: tasks for continual learning, source images.

A data set here is what `torch.utils.data.DataLoader` takes: `len(data)`, and `data[i]` gives an
image, float [3, H, W] in [0, 1] as torchvision's `ToTensor` makes it, and a label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate

from driftline.core.errors import UserError
from driftline.core.seed import derive, generator
from driftline.core.stream import Batch, SourceImages, Task
from driftline.streams.pipelines import PHOTOMETRIC

Pair = Sequence[Any]  # of data sets: training, test, and perhaps training without augmentation


def tasks(
    data: Sequence[Pair],
    *,
    batch_size: int = 48,
    seed: int = 0,
    workers: int = 0,
    classes: Sequence[int] | None = None,
) -> list[Task]:
    """Tasks of own data sets, for `driftline.learn` and the loop of `core/runner.py`.

    Args:
        data: for each task (train, test), or (train, test, plain): `plain` is the training set
            without augmentation, for class means and other statistics; None: `train`. Labels count
            on: with n classes before, the k new ones of a task are n ... n + k - 1.
        batch_size: of all three.
        seed: of the order of training images, which is a function of (seed, task, epoch).
        workers: processes that load images; 0: none.
        classes: how many are new in each task; None: read off the labels, for which every training
            set is gone through once unless it has `targets` or `tensors`, as those of torchvision
            and `TensorDataset` do.

    Raises:
        UserError: for an empty task, one that is no pair of data sets, or labels that do not count
            on, naming the task.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    pairs = [_sets(one, index) for index, one in enumerate(data)]
    everything = ConcatDataset([train for train, _, _ in pairs])
    plain = ConcatDataset([fixed for _, _, fixed in pairs])
    made: list[Task] = []
    stop = 0
    for index, (train, test, fixed) in enumerate(pairs):
        if not len(train) or len(fixed) != len(train):
            raise UserError(
                f"task {index} has {len(train)} training images and {len(fixed)} without "
                "augmentation: it takes at least one, and as many of both"
            )
        if classes is None:
            new = _new_classes(labels_of(train), index, stop)
        else:
            new = range(stop, stop + classes[index])
        rows = torch.arange(len(train)) + (everything.cumulative_sizes[index] - len(train))
        loading = _Loading(everything, plain, test, rows, batch_size, seed, workers, index)
        made.append(
            Task(
                index,
                f"classes {new.start}-{new.stop - 1}",
                new,
                -(-len(train) // batch_size),
                loading.train,
                loading.fit,
                loading.test,
                loading.again,
            )
        )
        stop = new.stop
    return made


def _sets(one: Any, index: int) -> tuple[Any, Any, Any]:
    """Training, test and plain training set of a task.

    Raises:
        UserError: for anything else.
    """
    if not isinstance(one, tuple | list) or len(one) not in (2, 3):
        got = f"{len(one)} of them" if isinstance(one, tuple | list) else type(one).__name__
        raise UserError(
            f"task {index} must be a pair (train, test) of data sets, or (train, test, plain), got "
            f"{got}: driftline.tasks takes a list, [(train, test), (train, test)]"
        )
    train, test, *plain = (check_data(data, f"task {index}") for data in one)
    return train, test, plain[0] if plain else train


def check_data(data: Any, owner: str) -> Any:
    """The data set itself.

    Raises:
        UserError: for what has no length or no images by number, such as a `DataLoader`.
    """
    if isinstance(data, DataLoader):
        raise UserError(
            f"{owner} takes data sets and makes the batches itself: give loader.dataset"
        )
    sized = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not sized or isinstance(data, Tensor):
        raise UserError(
            f"{owner} takes a data set with len(data) and data[i] = (image, label), got "
            f"{type(data).__name__}"
        )
    return data


class _Loading:
    """Batches of one task; `rows` are its images among those of all tasks."""

    def __init__(
        self,
        everything: Dataset[Any],
        plain: Dataset[Any],
        tested: Dataset[Any],
        rows: Tensor,
        batch_size: int,
        seed: int,
        workers: int,
        index: int,
    ) -> None:
        self.everything, self.plain, self.tested, self.rows = everything, plain, tested, rows
        self.batch_size, self.seed, self.workers, self.index = batch_size, seed, workers, index

    def train(
        self, epoch: int, start: int = 0, more: tuple[Tensor, Tensor] | None = None
    ) -> Iterator[Batch]:
        rows = self.rows if more is None else torch.cat([self.rows, more[0].cpu()])
        labels = None if more is None else dict(zip(*(m.tolist() for m in more), strict=True))
        shuffle = generator(self.seed, "own", self.index, epoch)
        rows = rows[torch.randperm(len(rows), generator=shuffle)]
        yield from batches(self.everything, rows, self.batch_size, self.workers, start, labels)

    def fit(self) -> Iterator[Batch]:
        yield from batches(self.plain, self.rows, self.batch_size, self.workers)

    def test(self) -> Iterator[Batch]:
        rows = torch.arange(len(self.tested))  # type: ignore[arg-type]
        yield from batches(self.tested, rows, self.batch_size, self.workers)

    def again(self, rows: Tensor, draws: int | None) -> Tensor:
        data = self.plain if draws is None else self.everything
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.seed, "again", draws or 0))
            return torch.stack([torch.as_tensor(data[row][0]) for row in rows.tolist()])


_NO_IMAGE = "an image must be a float tensor [3, H, W] in [0, 1] and became"


def _collate(items: list[Any]) -> Any:
    """torch's batch of these.

    Raises:
        UserError: for an item that is no image with a label.
    """
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2:
            got = f"{len(item)} values" if isinstance(item, tuple | list) else type(item).__name__
            raise UserError(f"data[i] of a data set must be (image, label), got {got}")
        if not isinstance(item[0], Tensor | ndarray):
            raise UserError(
                f"{_NO_IMAGE} {type(item[0]).__name__}: end the transforms with torchvision's "
                "ToTensor()"
            )
    return default_collate(items)


def batches(
    data: Dataset[Any],
    rows: Tensor,
    batch_size: int,
    workers: int = 0,
    start: int = 0,
    labels: dict[int, int] | None = None,
) -> Iterator[Batch]:
    """Images by row, int64 [N], from batch number `start` on.

    Args:
        labels: of some rows, in place of those of the data set.

    Raises:
        UserError: for an image that is no float tensor [3, H, W] in [0, 1].
    """
    rows = rows[start * batch_size :]
    if not len(rows):
        return
    loader = DataLoader(
        Subset(data, rows.tolist()),
        batch_size,
        num_workers=workers,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(0),  # else one number is drawn of the global one
    )
    for (x, y), index in zip(loader, rows.split(batch_size), strict=True):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 4:
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise UserError(
                f"{_NO_IMAGE} {got} in a batch: end the transforms with torchvision's ToTensor()"
            )
        y = torch.as_tensor(y).long()
        if labels is not None:
            pairs = zip(index.tolist(), y.tolist(), strict=True)
            y = torch.tensor([labels.get(row, label) for row, label in pairs])
        yield Batch(x, y, index, torch.zeros_like(y))


def _changed(image: Tensor, seed: int) -> Tensor:
    """Colour jitter, blur and greyscale, drawn from `seed`; the global generator stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PHOTOMETRIC(image)  # type: ignore[arg-type]


def labels_of(data: Any) -> Tensor:
    """The labels of a data set, int64 [N]."""
    if getattr(data, "target_transform", None) is None and hasattr(data, "targets"):
        return torch.as_tensor(data.targets).long()
    if isinstance(data, Subset):
        return labels_of(data.dataset)[torch.as_tensor(data.indices)]
    if hasattr(data, "tensors"):
        return data.tensors[1].long()
    return torch.tensor([int(data[i][1]) for i in range(len(data))])


def _new_classes(labels: Tensor, index: int, stop: int) -> range:
    """The classes of a task, after `stop` earlier ones."""
    present = labels.unique().tolist()
    if present != list(range(stop, stop + len(present))):
        some = ", ".join(map(str, present[:6])) + (", ..." if len(present) > 6 else "")
        raise UserError(
            f"task {index} has the labels {some}, and {stop} classes come before it: its own must "
            f"be {stop} ... {stop + len(present) - 1}. Rename them with target_transform, or say "
            "how many classes are new in each task (classes=[...]) where images of some are missing"
        )
    return range(stop, stop + len(present))


def source_images(data: Dataset[Any], *, seed: int = 0, workers: int = 0) -> SourceImages:
    """Labelled source images of an own data set, for methods that prepare on them or replay them.

    Args:
        seed: of their order, a function of (seed, epoch).
        workers: processes that load images; 0: none.

    Raises:
        UserError: for what is no data set.
    """
    count = len(check_data(data, "driftline.prepare"))

    def of_source(
        batch_size: int, *, epoch: int | None = None, start: int = 0, augment: str = "none"
    ) -> Iterator[Batch]:
        rows = torch.arange(count)
        if epoch is not None:
            rows = rows[torch.randperm(count, generator=generator(seed, "own source", epoch))]
        for batch in batches(data, rows, batch_size, workers, start):
            if augment == "photometric":
                named = zip(batch.x, batch.index.tolist(), strict=True)
                seeds = partial(derive, seed, "photometric", epoch or 0)
                batch = batch._replace(x=torch.stack([_changed(x, seeds(row)) for x, row in named]))
            yield batch

    return SourceImages(count, "images of the caller", f"own {count}", of_source)
