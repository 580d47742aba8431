"""Orders of adaptation streams, as index arithmetic: which domain when, which labels when.

An order is a domain part and a label part joined by `+`, each optional:

| domain part  | segments |
|---|---|
| continual    | one per corruption and severity (CoTTA) |
| gradual      | severities 5 4 3 2 1, then 1 2 3 4 5 4 3 2 1 for each further corruption (CoTTA) |
| gradual_full | 1 2 3 4 5 4 3 2 1 for every corruption (mariodoebler/test-time-adaptation) |
| mixed        | one segment: all domains joined and shuffled |
| recurring    | the continual sequence, `rounds` times |
| recurring_zipf | the same with gaps: in rounds 2.. a domain comes with probability k^-zipf (CIR) |

| label part (within each segment) | every image once | source |
|---|---|---|
| (none): as listed        | yes | |
| shuffled                 | yes | |
| correlated               | yes | TTA-MD: shuffled, then sorted by label |
| dirichlet_note           | yes | NOTE, TTA-MD |
| dirichlet_rotta          | yes | RoTTA |
| lame_grouped             | yes | LAME `IID=False`: groups of a label by first occurrence |
| lame_zipf                | no  | LAME `IMBALANCE_SHIFT`: label shares by Zipf's law |
| lame_zipf_grouped        | no  | both: LAME's own non-i.i.d. stream |
| label_shift              | no  | SAR: one label at a time is `imbalance` times as likely |
| prior_drift              | no  | OLS `sinusoidal`: label shares move smoothly, there and back |
| prior_monotone           | no  | OLS `monotone`: from equal shares to one label alone |
| prior_square             | no  | OLS `square`: the shares jump there and back, regularly |
| prior_bernoulli          | no  | OLS `bernouli`: they jump at random times |
| markov                   | no  | UniTTA: the label stays with probability `stay` |
| bursts                   | yes | ours: runs of `burst_length` images of a label amid others |

TTA-MD is github.com/mariodoebler/test-time-adaptation. OLS is acmi-lab/OnlineLabelShift d573d6f,
`utils/label_shift_utils.py` (Baby et al., NeurIPS 2023, arXiv 2305.19570). UniTTA is
LeapLabTHU/UniTTA 11d4270, `core/data/unittasampler.py` (Du et al., 2024, arXiv 2407.20080). CIR is
HamedHemati/CIR 0a8941a, `cir/benchmarks/cir_utils.py` (Hemati et al., CoLLAs 2023, arXiv
2301.11396), which has classes where domains are meant here; k is a place in a random ranking.

So `correlated` is `continual+correlated`, and `mixed+dirichlet_note` the mixed stream with
correlated labels. All draws come from the generator that is passed in. CCC, whose images change
with their place in the stream, is a scenario of its own (streams/pairs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from driftline.core.errors import UserError, suggest

Domain = tuple[str, int]  # corruption, severity; severity 0: there are none

DOMAIN_ORDERS = (
    "continual", "gradual", "gradual_full", "mixed", "recurring", "recurring_zipf",
)  # fmt: skip
NOTE_MINIMUM = 10  # images that a NOTE chunk holds at least
NOTE_ATTEMPTS = 10_000
ROUND = 10  # images of a round of OLS, in which the label shares stand still

# Sequences of the 15 corruptions with a name. cotta_i: qinenergy/cotta,
# imagenet/cfgs/10orders/cotta/cotta{i}.yaml; its published mean is over all ten.
_SHORT = dict(
    brig="brightness", cont="contrast", defo="defocus_blur", elas="elastic_transform", fog="fog",
    fros="frost", gaus="gaussian_noise", glas="glass_blur", impu="impulse_noise",
    jpeg="jpeg_compression", moti="motion_blur", pixe="pixelate", shot="shot_noise", snow="snow",
    zoom="zoom_blur",
)  # fmt: skip
_NAMED = {
    "cotta_0": "brig pixe gaus moti zoom glas impu jpeg defo elas shot fros snow fog cont",
    "cotta_1": "jpeg shot zoom fros cont fog defo elas gaus brig glas impu pixe snow moti",
    "cotta_2": "cont defo gaus shot snow fros glas zoom elas jpeg pixe brig impu moti fog",
    "cotta_3": "shot fog glas pixe snow elas brig impu defo fros cont gaus moti jpeg zoom",
    "cotta_4": "pixe glas zoom snow fog impu brig moti fros jpeg gaus shot cont defo elas",
    "cotta_5": "moti snow fog shot defo cont zoom brig fros elas glas gaus pixe jpeg impu",
    "cotta_6": "fros impu jpeg cont zoom glas pixe snow defo moti brig elas shot fog gaus",
    "cotta_7": "glas zoom impu fog snow jpeg gaus fros shot brig cont moti pixe defo elas",
    "cotta_8": "defo moti zoom shot gaus glas jpeg fog cont pixe fros snow brig elas impu",
    "cotta_9": "cont gaus defo zoom fros glas jpeg fog pixe elas shot impu snow moti brig",
    "rotta": "moti snow fog shot defo cont zoom brig fros elas glas gaus pixe jpeg impu",
}
SEQUENCES = {name: tuple(_SHORT[w] for w in text.split()) for name, text in _NAMED.items()}


class Options(NamedTuple):
    """Numbers that the label orders read."""

    delta: float  # Dirichlet concentration; smaller = more correlated
    imbalance: float  # label_shift: probability of the favoured label over that of another
    zipf: float  # lame_zipf: exponent
    stay: float = 0.95  # markov: probability that the next image has the same label
    burst_share: float = 0.5  # bursts: share of the images of a label that come in runs
    burst_length: int = 10  # bursts: images of a run


class Step(NamedTuple):
    """One segment before images are dealt out."""

    name: str
    domain: Domain
    round: int


def parse(order: str) -> tuple[str, str | None]:
    """Domain part and label part of an order.

    Raises:
        UserError: naming the nearest known part.
    """
    domain, label = None, None
    for part in order.split("+"):
        if part in DOMAIN_ORDERS and domain is None:
            domain = part
        elif part in LABEL_ORDERS and label is None:
            label = part
        else:
            known = [*DOMAIN_ORDERS, *LABEL_ORDERS]
            before = domain if part in DOMAIN_ORDERS else label
            what = "is no order" if part not in known else f"and {before!r} are of one kind"
            raise UserError(
                f"scenario.order={order}: {part!r} {what}{suggest(part, known)}. Join one of "
                f"{', '.join(DOMAIN_ORDERS)} and one of {', '.join(LABEL_ORDERS)} with '+'"
            )
    return domain or "continual", label


def called(domain: Domain) -> str:
    """`fog:5`, or the name alone where there are no severities (0)."""
    name, severity = domain
    return f"{name}:{severity}" if severity else name


def plan(
    order: str,
    names: list[str],
    severities: list[int],
    rounds: int,
    zipf: float = 2.0,
    rng: np.random.Generator | None = None,
) -> list[Step]:
    """Segments of a domain order; `mixed` gives the domains that are to be joined.

    Args:
        zipf, rng: of `recurring_zipf`: exponent, and the generator of ranking and returns.
    """
    if order in ("gradual", "gradual_full"):
        ups, downs = [1, 2, 3, 4], [4, 3, 2, 1]
        steps = []
        for i, name in enumerate(names):
            first = order == "gradual" and i == 0
            steps += [(name, s) for s in ([5, *downs] if first else [*ups, 5, *downs])]
        return [Step(f"{i}/{n}:{s}", (n, s), 1) for i, (n, s) in enumerate(steps)]
    once = [(n, s) for n in names for s in severities]
    if order == "recurring":
        return [
            Step(f"r{r}/{called((n, s))}", (n, s), r) for r in range(1, rounds + 1) for n, s in once
        ]
    if order == "recurring_zipf":
        assert rng is not None
        chance = (1.0 + rng.permutation(len(once))) ** -zipf
        back = rng.random((rounds, len(once))) < chance
        back[0] = True
        return [
            Step(f"r{r + 1}/{called((n, s))}", (n, s), r + 1)
            for r in range(rounds)
            for (n, s), comes in zip(once, back[r], strict=True)
            if comes
        ]
    return [Step(called((n, s)), (n, s), 1) for n, s in once]


# ------------------------------------------------------------------ labels
# Each takes labels int64 [N], the options and a generator; returns positions int64.

LabelOrder = Callable[[np.ndarray, Options, np.random.Generator], np.ndarray]


def shuffled(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """A uniform permutation."""
    return rng.permutation(len(labels))


def correlated(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """Shuffled, then sorted by label, keeping the shuffled order within a label."""
    order = rng.permutation(len(labels))
    return order[np.argsort(labels[order], kind="stable")]


def dirichlet_note(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """As many chunks as labels; each label is spread over them by Dirichlet(delta) shares.

    A chunk that holds N/C images already gets no more; all is drawn again until every chunk has
    10 images. Where all shares of a label fall on full chunks, its shares are drawn again (the
    reference divides by zero there).

    Raises:
        UserError: when the chunks cannot hold 10 images each.
    """
    values = np.unique(labels)
    count, full = len(values), len(labels) / len(values)
    if full < NOTE_MINIMUM:
        raise UserError(
            f"scenario.order=dirichlet_note needs {NOTE_MINIMUM} images per label and chunk, but "
            f"{len(labels)} images of {count} labels give {full:.1f}. Use more images "
            "(scenario.images, image_list=all), mixed+dirichlet_note, or dirichlet_rotta"
        )
    for _ in range(NOTE_ATTEMPTS):
        chunks: list[list[np.ndarray]] = [[] for _ in range(count)]
        sizes = np.zeros(count, np.int64)
        for value in values:
            rows = rng.permutation(np.flatnonzero(labels == value))
            share = np.zeros(count)
            for _ in range(NOTE_ATTEMPTS):
                share = rng.dirichlet(np.full(count, options.delta)) * (sizes < full)
                if share.sum() > 0:
                    break
            share = share / share.sum() if share.sum() > 0 else (sizes < full) / sum(sizes < full)
            cuts = (np.cumsum(share)[:-1] * len(rows)).astype(np.int64)
            for chunk, part in zip(chunks, np.split(rows, cuts), strict=True):
                chunk.append(part)
            sizes += [len(part) for part in np.split(rows, cuts)]
        if sizes.min() >= NOTE_MINIMUM:
            break
    else:
        raise UserError(
            f"scenario.order=dirichlet_note found no chunks of {NOTE_MINIMUM} images in "
            f"{NOTE_ATTEMPTS} draws at scenario.delta={options.delta}; raise delta or use more "
            "images"
        )
    return np.concatenate([chunk[i] for chunk in chunks for i in rng.permutation(count)])


def dirichlet_rotta(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """Each label is cut into min(C, 100) slots by Dirichlet(delta) shares, without balancing.

    Within a slot the labels' pieces follow each other in random order.
    """
    values = np.unique(labels)
    count = min(len(values), 100)
    slots: list[list[np.ndarray]] = [[] for _ in range(count)]
    for value in values:
        rows = np.flatnonzero(labels == value)
        share = rng.dirichlet(np.full(count, options.delta))
        cuts = (np.cumsum(share)[:-1] * len(rows)).astype(np.int64)
        for slot, part in zip(slots, np.split(rows, cuts), strict=True):
            slot.append(part)
    return np.concatenate([slot[i] for slot in slots for i in rng.permutation(len(slot))])


def _grouped(labels: np.ndarray) -> np.ndarray:
    values, first, group = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(values), np.int64)
    rank[np.argsort(first)] = np.arange(len(values))
    return np.argsort(rank[group], kind="stable")


def lame_grouped(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """Shuffled, then grouped by label; groups in the order in which labels first occur."""
    order = rng.permutation(len(labels))
    return order[_grouped(labels[order])]


def lame_zipf(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """Labels in shares by Zipf's law, drawn with replacement and shuffled; N images in all.

    The shares are drawn again until the largest tenth of the labels holds less than 90 %.
    """
    values = np.unique(labels)
    largest, share = max(1, round(0.1 * len(values))), np.zeros(len(values))
    for _ in range(NOTE_ATTEMPTS):
        share = rng.zipf(options.zipf, len(values)).astype(np.float64)
        share /= share.sum()
        if np.sort(share)[-largest:].sum() < 0.9:
            break
    quota = np.floor(share * len(labels)).astype(np.int64)
    quota[np.argsort(quota)[-1]] += len(labels) - quota.sum()
    drawn = [rng.choice(np.flatnonzero(labels == v), n) for v, n in zip(values, quota, strict=True)]
    return rng.permutation(np.concatenate(drawn))


def lame_zipf_grouped(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """`lame_zipf`, then grouped by label as `lame_grouped`."""
    order = lame_zipf(labels, options, rng)
    return order[_grouped(labels[order])]


def label_shift(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """The favoured label moves through all labels in random order, N/C draws each.

    At each draw it is `imbalance` times as likely as any other; images with replacement.
    """
    values = np.unique(labels)
    count, ratio = len(values), options.imbalance
    rows = [np.flatnonzero(labels == v) for v in values]
    bounds = np.linspace(0, len(labels), count + 1).astype(np.int64)
    found = []
    for favoured, n in zip(rng.permutation(count), np.diff(bounds), strict=True):
        chance = np.full(count, 1 / (ratio + count - 1))
        chance[favoured] = ratio / (ratio + count - 1)
        found += [rng.choice(rows[c]) for c in rng.choice(count, n, p=chance)]
    return np.asarray(found, np.int64)


def _in_turn(labels: np.ndarray, drawn: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An image of each label in `drawn`; those of a label in random order, then from the start."""
    order = np.empty(len(drawn), np.int64)
    for value in np.unique(drawn):
        rows = rng.permutation(np.flatnonzero(labels == value))
        places = np.flatnonzero(drawn == value)
        order[places] = rows[np.arange(len(places)) % len(rows)]
    return order


def _drifting(
    labels: np.ndarray, share: Callable[[np.ndarray], np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """Labels drawn from (1 - a) uniform + a (one label alone), a share for rounds of 10 images.

    The one label is drawn (the code takes label 0, and images of a round without replacement).

    Args:
        share: a of the rounds, from their numbers 0..T-1.
    """
    values = np.unique(labels)
    rounds = -(-len(labels) // ROUND)
    chosen = rng.choice(values)
    alone = rng.random(len(labels)) < np.repeat(share(np.arange(rounds)), ROUND)[: len(labels)]
    drawn = np.where(alone, chosen, rng.choice(values, len(labels)))
    return _in_turn(labels, drawn, rng)


def _period(rounds: np.ndarray) -> int:
    return max(1, int(len(rounds) ** 0.5))


def prior_drift(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """a = sin(pi (t mod L) / L) in round t of T, L = floor(sqrt(T)); see `_drifting`."""
    return _drifting(labels, lambda t: np.sin(t % _period(t) * np.pi / _period(t)), rng)


def prior_monotone(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """a = t / T in round t of T."""
    return _drifting(labels, lambda t: t / len(t), rng)


def prior_square(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """a = 0 for floor(sqrt(T)) rounds, then 1 for as many, and so on."""
    return _drifting(labels, lambda t: t // _period(t) % 2 * 1.0, rng)


def prior_bernoulli(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """a = 0 at first; after each round it becomes 1 - a with probability 1 / sqrt(T)."""

    def share(t: np.ndarray) -> np.ndarray:
        turns = rng.random(len(t)) < len(t) ** -0.5
        return (np.cumsum(turns) - turns) % 2 * 1.0  # a turn counts from the round after it

    return _drifting(labels, share, rng)


def markov(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """A chain over the labels: the same one with probability `stay`, else any other."""
    values = np.unique(labels)
    count = len(values)
    leaves = rng.random(len(labels)) >= options.stay
    step = leaves * rng.integers(1, max(2, count), len(labels))
    step[0] = rng.integers(count)
    return _in_turn(labels, values[np.cumsum(step) % count], rng)


def bursts(labels: np.ndarray, options: Options, rng: np.random.Generator) -> np.ndarray:
    """As many whole runs of each label as `burst_share` of its images fill, amid single images."""
    pieces: list[np.ndarray] = []
    for value in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == value))
        length = options.burst_length
        together = int(options.burst_share * len(rows)) // length * length
        pieces += np.split(rows[:together], together // length) if together else []
        pieces += np.split(rows[together:], len(rows) - together) if together < len(rows) else []
    return np.concatenate([pieces[i] for i in rng.permutation(len(pieces))])


LABEL_ORDERS: dict[str, LabelOrder] = {
    f.__name__: f
    for f in (
        shuffled, correlated, dirichlet_note, dirichlet_rotta, lame_grouped, lame_zipf,
        lame_zipf_grouped, label_shift, prior_drift, prior_monotone, prior_square,
        prior_bernoulli, markov, bursts,
    )
}  # fmt: skip
