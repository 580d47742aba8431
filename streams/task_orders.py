"""Orders of streams of tasks, as index arithmetic: which classes when, which images of them.

An order is one part, or several joined by `+`, whose tasks follow each other:

| part      | tasks | every image once | source |
|---|---|---|---|
| increment | `base` classes, then `increment` a task, in the class order | yes | LAMDA-PILOT |
| scole     | `tasks` of `increment` classes, drawn; `skew` favours some | no | SCoLe |
| cir       | `tasks`; a class comes early and comes back by a power law | no | CIR |
| si_blurry | `tasks`; some classes in one alone, images of others astray | yes | Si-Blurry |

SCoLe is TLESORT/SCoLe-SCaling-Continual-Learning 7998f32, `sampling.py` (Lesort et al., CoLLAs
2023, arXiv 2207.04543). CIR is HamedHemati/CIR 0a8941a, `cir/benchmarks/cir_sampling_based.py` and
`cir_utils.py` (Hemati et al., CoLLAs 2023, arXiv 2301.11396). Si-Blurry is KHU-AGI/Si-Blurry
2bb41d5, `utils/online_sampler.py` (Moon et al., ICCV 2023, arXiv 2308.09303).

So `increment+scole` lets every class come once and then some of them come back.
`without_boundaries` cuts any of them into stretches that tell a method nothing of its tasks. All
draws come from the generator that is passed in.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from driftline.core.errors import UserError, suggest


class Options(NamedTuple):
    """Numbers that the parts read."""

    base: int  # increment: classes of the first task; 0: as the others
    increment: int  # classes of a task
    tasks: int  # of a part other than increment
    skew: float  # scole: 0 = every class as likely
    first: float  # cir: probability with which a class that has not come yet comes in a task
    zipf: float  # cir: exponent of the law of returns
    task_images: int  # cir: images of a task
    disjoint: float  # si_blurry: share of the classes that come in one task alone (N)
    blurry: float  # si_blurry: share of the images of the others that go astray (M)


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


# ------------------------------------------------------------------ parts
# Each takes the place of every image's class in the class order, int64 [N], the number of classes,
# the options and a generator; returns positions int64, an array a task, none of them empty.

TaskOrder = Callable[[np.ndarray, int, Options, np.random.Generator], list[np.ndarray]]


def increment(
    place: np.ndarray, classes: int, options: Options, rng: np.random.Generator
) -> list[np.ndarray]:
    """All images of the next classes, in the order of the data set."""
    stops = np.cumsum(task_sizes(classes, options.base, options.increment))
    return [np.flatnonzero(np.searchsorted(stops, place, "right") == t) for t in range(len(stops))]


def scole(
    place: np.ndarray, classes: int, options: Options, rng: np.random.Generator
) -> list[np.ndarray]:
    """All images of classes drawn without replacement, anew for every task.

    A class of rank k from 0, in a random ranking, has a probability proportional to
    (1 - f k)^skew, with f = 0.05 up to 20 classes and 1 / classes beyond (the code: 0.01 for 100
    classes and 0.05 for any other number, which is no probability beyond 20).
    """
    task_sizes(classes, 0, options.increment)
    weight = (1 - min(0.05, 1 / classes) * rng.permutation(classes)) ** options.skew
    drawn = (
        rng.choice(classes, options.increment, replace=False, p=weight / weight.sum())
        for _ in range(options.tasks)
    )
    return [np.flatnonzero(np.isin(place, chosen)) for chosen in drawn]


def cir(
    place: np.ndarray, classes: int, options: Options, rng: np.random.Generator
) -> list[np.ndarray]:
    """Class k first comes in task t with a probability proportional to first (1 - first)^t.

    From then on it comes in every task with probability r^-zipf, r its place from 1 in a random
    ranking. Tasks without a class are left out. `task_images` are divided among the classes of a
    task, whose images are drawn anew, without replacement within a task. A warning says where the
    classes have too few images for that, and how many tasks are left out.
    """
    geometric = (1 - options.first) ** np.arange(options.tasks)
    starts = rng.choice(options.tasks, classes, p=geometric / geometric.sum())
    chance = (1.0 + rng.permutation(classes)) ** -options.zipf
    time = np.arange(options.tasks)[:, None]
    comes = (time > starts) & (rng.random((options.tasks, classes)) < chance) | (time == starts)
    rows = [np.flatnonzero(place == c) for c in range(classes)]
    tasks = []
    for here in comes:
        present = rng.permutation(np.flatnonzero(here))
        quota = np.diff(np.linspace(0, options.task_images, len(present) + 1).astype(np.int64))
        drawn = [rng.permutation(rows[c])[:n] for c, n in zip(present, quota, strict=True)]
        tasks.append(np.concatenate(drawn or [np.zeros(0, np.int64)]))
    held = [task for task in tasks if len(task)]
    short = [len(task) for task in held if len(task) < options.task_images]
    notes = []
    if short:
        notes.append(
            f"scenario.task_images={options.task_images}: {len(short)} of {len(held)} tasks hold "
            f"fewer, {min(short)} at the least, as their classes have no more images"
        )
    if len(held) < options.tasks:
        notes.append(
            f"scenario.tasks={options.tasks}: {options.tasks - len(held)} of them have no class "
            "and are left out"
        )
    for text in notes:
        warnings.warn(f"{text} (scenario.order=cir)", stacklevel=2)
    return held


def si_blurry(
    place: np.ndarray, classes: int, options: Options, rng: np.random.Generator
) -> list[np.ndarray]:
    """The stochastic form (`--rnd_NM`, as in all scripts): nothing is of the same size twice.

    A share `disjoint` of the classes, and the others, are each cut at random places into as many
    pieces as there are tasks. A share `blurry` of the images of the others is cut likewise; so many
    leave a task, all that left are shuffled, and as many come in. Numbers of classes are rounded
    down to multiples of the number of tasks, and classes beyond that never come, as in the code;
    those that leave are drawn (the code: the first of the data set).
    """
    count = options.tasks
    disjoint = int(classes * options.disjoint) // count * count
    others = (classes - disjoint) // count * count
    if not disjoint + others:
        raise UserError(
            f"scenario.tasks={count} tasks of scenario.order=si_blurry need as many classes, and "
            f"there are {classes}"
        )
    order = rng.permutation(classes)
    own = _pieces(order[:disjoint], count, rng)
    shared = _pieces(order[disjoint : disjoint + others], count, rng)
    fixed = [np.flatnonzero(np.isin(place, c)) for c in own]
    moving = [rng.permutation(np.flatnonzero(np.isin(place, c))) for c in shared]
    astray = int(sum(map(len, moving)) * options.blurry)
    leave = [len(piece) for piece in _pieces(np.arange(astray), count, rng)]
    pool = rng.permutation(np.concatenate([m[:n] for m, n in zip(moving, leave, strict=True)]))
    arrive = np.split(pool, np.minimum(np.cumsum(leave), len(pool))[:-1])
    tasks = [
        np.concatenate([f, m[n:], a])
        for f, m, n, a in zip(fixed, moving, leave, arrive, strict=True)
    ]
    return [task for task in tasks if len(task)]


def _pieces(whole: np.ndarray, count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """`whole` cut at random places, some pieces perhaps empty."""
    cuts = np.sort(rng.integers(0, max(1, len(whole)), count - 1))
    return np.split(whole, cuts)


TASK_ORDERS: dict[str, TaskOrder] = {f.__name__: f for f in (increment, scole, cir, si_blurry)}


# ------------------------------------------------------------------ from parts to streams


def parse(order: str) -> list[str]:
    """The parts of an order.

    Raises:
        UserError: naming the nearest known part.
    """
    parts = order.split("+")
    for part in parts:
        if part not in TASK_ORDERS:
            raise UserError(
                f"scenario.order={order}: {part!r} is none of {', '.join(TASK_ORDERS)}, which may "
                f"be joined with '+'{suggest(part, list(TASK_ORDERS))}"
            )
    return parts


def tasks_of(
    order: str, place: np.ndarray, classes: int, options: Options, rng: np.random.Generator
) -> list[np.ndarray]:
    """Positions int64 of each task of `order`, in turn; see `TaskOrder` for the arguments.

    Raises:
        UserError: for an unknown order, or numbers that do not fit.
    """
    return [t for part in parse(order) for t in TASK_ORDERS[part](place, classes, options, rng)]


def without_boundaries(
    tasks: Sequence[np.ndarray], length: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """The images of all tasks, each task shuffled, in stretches of `length` images."""
    whole = np.concatenate([rng.permutation(task) for task in tasks])
    return np.split(whole, np.arange(length, len(whole), length))


def by_first_occurrence(
    place: np.ndarray, tasks: Sequence[np.ndarray], classes: int
) -> tuple[np.ndarray, list[int]]:
    """New names of the classes: by the task in which they first come, then by the class order.

    Returns:
        int64 [classes], the name of each place in the class order; and how many classes have come
        by the end of each task. Classes that never come are the last.
    """
    first = np.full(classes, len(tasks))
    for t, task in reversed(list(enumerate(tasks))):
        first[place[task]] = t
    name = np.empty(classes, np.int64)
    name[np.argsort(first, kind="stable")] = np.arange(classes)
    return name, [int((first <= t).sum()) for t in range(len(tasks))]
