"""Rules that make one named set of tensors out of several: weights of runs, adapters of tasks.

    vectors = differences(weights, base)            # task vectors: theta_t - theta_0, by name
    theta = added(base, ties(vectors, density=0.2))

A set is a mapping from names to tensors; all sets of a call have the same names and shapes, and so
has the result. `base` is what the models had in common before they were trained; adapters whose
update is 0 at zero are their own task vectors (`base=None`). Half-precision tensors are computed in
float32 and given back in their type; float64 stays float64. No rule draws from a global generator.

Four rules take one set after the other and keep one (`Running`, `step`): mean, task_arithmetic,
magmax and opcm. `RULES` names those that need task vectors alone; `fisher` needs an importance
of every value, `core_space` and `lego` pairs of low-rank factors.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from driftline.core.ranges import Below1, NonNegative, Seed, Share, Size, Unit
from driftline.parts.clusters import kmeans

Named = Mapping[str, Tensor]
Weights = Sequence[float] | None  # one for each set; None: 1 each
Pairs = Mapping[str, tuple[Tensor, Tensor]]


def differences(sets: Sequence[Named], base: Named | None) -> list[dict[str, Tensor]]:
    """Task vectors `theta_t - theta_0`; without a base, the sets themselves."""
    check(sets if base is None else [*sets, base])
    if base is None:
        return [dict(one) for one in sets]
    return [{name: value - base[name] for name, value in one.items()} for one in sets]


def added(base: Named | None, vector: Named) -> dict[str, Tensor]:
    """`theta_0 + vector`."""
    if base is None:
        return dict(vector)
    return {name: base[name] + value for name, value in vector.items()}


def check(sets: Sequence[Named]) -> None:
    """Whether sets hold the same names and shapes.

    Raises:
        ValueError: if not, naming the first tensor that differs, or for no set at all.
    """
    if not sets:
        raise ValueError("there is no set to merge")
    first = sets[0]
    for index, one in enumerate(sets[1:], 1):
        if odd := min(first.keys() ^ one.keys(), default=None):
            raise ValueError(f"set {index} and set 0 do not hold the same tensors: {odd!r}")
        for name, value in one.items():
            if value.shape != first[name].shape:
                raise ValueError(
                    f"{name!r} is {list(value.shape)} in set {index} and "
                    f"{list(first[name].shape)} in set 0"
                )


# ------------------------------------------------------------------ one set after the other


@dataclass(frozen=True)
class Running:
    """What a sequential rule keeps of the sets so far: one set and three numbers.

    Args:
        merged: what is kept, by name: a sum, the largest values, or the merged vector itself.
        count: sets so far.
        norms: sum of the norms of the task vectors (opcm).
        factor: lambda of the last step (opcm).
    """

    merged: Named
    count: int
    norms: float = 0.0
    factor: float = 1.0


def _sum_step(state: Running | None, vector: Named) -> Running:
    if state is None:
        return Running(_wide(vector), 1)
    kept = {n: state.merged[n] + v for n, v in _wide(vector).items()}
    return Running(kept, state.count + 1)


def _largest_step(state: Running | None, vector: Named) -> Running:
    if state is None:
        return Running(_wide(vector), 1)
    kept = {
        n: torch.where(v.abs() >= state.merged[n].abs(), v, state.merged[n])
        for n, v in _wide(vector).items()
    }
    return Running(kept, state.count + 1)


def _opcm_step(state: Running | None, vector: Named, *, alpha: Unit = 0.5) -> Running:
    vector = _wide(vector)
    size = _norm(vector)
    if state is None:
        return Running(vector, 1, size)
    kept = {}
    for name, value in vector.items():
        old = state.merged[name]
        new = _outside(value, old, alpha) if value.ndim == 2 else value
        kept[name] = state.factor * old + new
    count, norms = state.count + 1, state.norms + size
    average, whole = norms / count, _norm(kept)
    if whole == 0:
        return Running(kept, count, norms, state.factor)
    factor = whole / average if average else 1.0
    return Running({n: v / factor for n, v in kept.items()}, count, norms, factor)


def _outside(new: Tensor, old: Tensor, alpha: float) -> Tensor:
    """A matrix without its part in the main directions of `old`, and without their own values."""
    u, s, vh = torch.linalg.svd(old, full_matrices=False)
    true = s > s[:1] * max(old.shape) * torch.finfo(s.dtype).eps  # others are no directions
    u, s, vh = u[:, true], s[true], vh[true]
    if not len(s):
        return new
    main = int((s.cumsum(0) / s.sum() > alpha).float().argmax())
    inside = u.mT @ new @ vh.mT
    taken = torch.eye(len(s), dtype=torch.bool, device=s.device)
    taken[:main, :main] = True
    return new - u @ (inside * taken) @ vh


def _norm(vector: Named) -> float:
    return math.sqrt(sum(float(v.double().square().sum()) for v in vector.values()))


def mean(vectors: Sequence[Named]) -> dict[str, Tensor]:
    """`1/T sum_t v_t` (Wortsman et al., "Model soups", ICML 2022, arXiv 2203.05482)."""
    return fold("mean", vectors)


def task_arithmetic(
    vectors: Sequence[Named], *, scale: float = 0.3, weights: Weights = None
) -> dict[str, Tensor]:
    """`scale * sum_t w_t v_t`.

    Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089, code
    mlfoundations/task_vectors. 0.3 is their choice for eight tasks where nothing can be tuned.
    """
    return fold("task_arithmetic", _weighted(vectors, weights), scale=scale)


def magmax(vectors: Sequence[Named], *, scale: float = 0.5) -> dict[str, Tensor]:
    """`scale` times the value of largest magnitude at every place; of equal ones, the last.

    Marczak et al., "MagMax", ECCV 2024, arXiv 2407.06322; code danielm1405/magmax 4f49f18, whose
    `merge_splitted.py` has the scale 0.5 and trains each task from where the one before ended.
    """
    return fold("magmax", vectors, scale=scale)


def opcm(vectors: Sequence[Named], *, alpha: Unit = 0.5) -> dict[str, Tensor]:
    """One task after the other, each projected away from what is merged already.

        m_1 = v_1
        m_t = (lambda_{t-1} m_{t-1} + P(v_t)) / lambda_t

    P acts on matrices alone: in the singular bases U, V of m_{t-1}, it sets to 0 the diagonal of
    U^T v V and its block of the first k directions, the last ones before their sum of singular
    values passes the share `alpha`. lambda_t gives m_t the mean norm of v_1 ... v_t (over all
    tensors together).

    Tang et al., "Merging Models on the Fly Without Retraining", NeurIPS 2025, arXiv 2501.09522;
    code tanganke/fusion_bench 54c9e8c, `method/opcm`. Ours: directions with a singular value of 0,
    whose basis is arbitrary, are left alone; every two-dimensional tensor counts as a matrix.
    """
    return fold("opcm", vectors, alpha=alpha)


STEPS: dict[str, Callable[..., Running]] = {
    "mean": _sum_step,
    "task_arithmetic": _sum_step,
    "magmax": _largest_step,
    "opcm": _opcm_step,
}


def step(rule: str, state: Running | None, vector: Named, **options: Any) -> Running:
    """A sequential rule takes one more set; `options` that its step does not read do nothing."""
    if state is not None:
        check([state.merged, vector])
    known = inspect.signature(STEPS[rule]).parameters
    return STEPS[rule](state, vector, **{k: v for k, v in options.items() if k in known})


def finish(rule: str, state: Running, *, scale: float | None = None, **_: Any) -> dict[str, Tensor]:
    """The merged vector of a sequential rule, in the type in which it was computed."""
    if rule == "mean":
        return {n: v / state.count for n, v in state.merged.items()}
    if scale is None:
        return dict(state.merged)
    return {n: scale * v for n, v in state.merged.items()}


def fold(rule: str, vectors: Sequence[Named], **options: Any) -> dict[str, Tensor]:
    """All sets at once through `step`, in their types."""
    check(vectors)
    state: Running | None = None
    for vector in vectors:
        state = step(rule, state, vector, **options)
    assert state is not None
    return _as(finish(rule, state, **options), vectors[0])


# ------------------------------------------------------------------ all sets at once


def ties(
    vectors: Sequence[Named],
    *,
    density: Share = 0.2,
    scale: float = 1.0,
    scope: Literal["model", "tensor"] = "model",
    weights: Weights = None,
) -> dict[str, Tensor]:
    """Trim, elect a sign, average those that have it.

    1. Of each v_t only the largest magnitudes stay. 2. The sign of a place is that of `sum_t v_t`.
    3. `scale` times the mean over the values with this sign that are not 0.

    Yadav et al., "TIES-Merging", NeurIPS 2023, arXiv 2306.01708.

    Args:
        density: share of values that stay.
        scope: `model`: as prateeky2806/ties-merging, over all tensors as one vector; one value more
            than the share stays, and all that equal the smallest of them; where the sum is 0, the
            sign is that of all sums together. `tensor`: as the peft library, each tensor by itself,
            exactly the share; of equal magnitudes, the first; where the sum is 0, plus.
        weights: of each set in the mean, which is still divided by the number of values.
    """
    flat, split = _flat(vectors, scope)
    return split([scale * _elected(_trimmed(v, density, scope), scope, weights) for v in flat])


def dare(
    vectors: Sequence[Named],
    *,
    seed: Seed,
    density: Share = 0.5,
    scale: float = 0.3,
    weights: Weights = None,
) -> dict[str, Tensor]:
    """`scale * sum_t w_t (mask_t * v_t) / density`, a value stays with probability `density`.

    Yu et al., "Language Models are Super Mario", ICML 2024, arXiv 2311.03099, code
    yule-BUAA/MergeLM. Masks come from a generator of `seed`, on the CPU and in float32 whatever
    the tensors are: name by name, for one set after the other. `scale` as in task arithmetic.
    """
    return task_arithmetic(_dropped(vectors, density, seed), scale=scale, weights=weights)


def dare_mean(vectors: Sequence[Named], *, seed: Seed, density: Share = 0.5) -> dict[str, Tensor]:
    """`dare` with 1/T for the scale."""
    return mean(_dropped(vectors, density, seed))


def dare_ties(
    vectors: Sequence[Named],
    *,
    seed: Seed,
    density: Share = 0.5,
    scale: float = 1.0,
    weights: Weights = None,
) -> dict[str, Tensor]:
    """Values dropped as in `dare`, then sign and mean as in `ties` of scope `tensor`."""
    dropped = _dropped(vectors, density, seed)
    flat, split = _flat(dropped, "tensor")
    return split([scale * _elected(v, "tensor", weights) for v in flat])


def breadcrumbs(
    vectors: Sequence[Named],
    *,
    density: Share = 0.9,
    outliers: Below1 = 0.01,
    scale: float = 0.3,
    weights: Weights = None,
) -> dict[str, Tensor]:
    """Task arithmetic of vectors without their largest and smallest values, tensor by tensor.

    Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024, arXiv 2312.06795. As in mergekit 0.1.5,
    whose defaults these are: the share `outliers` of the largest magnitudes goes, fewer where
    `density` could not be reached otherwise, then the smallest until `density` is left. Equal
    magnitudes in the order of their places, the first counts as smaller.
    """
    check(vectors)
    thin = [{n: _crumbs(v, density, outliers) for n, v in one.items()} for one in vectors]
    return task_arithmetic(thin, scale=scale, weights=weights)


def fisher(
    sets: Sequence[Named],
    importance: Sequence[Named],
    *,
    weights: Weights = None,
    floor: NonNegative = 1e-6,
    normalise: bool = True,
) -> dict[str, Tensor]:
    """`sum_t w_t F_t theta_t / sum_t w_t F_t`, place by place.

    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv
    2111.09832; as tanganke/fusion_bench 54c9e8c, `fisher_merging`.

    Args:
        sets: weights, or task vectors of one base, which comes to the same.
        importance: F_t, the diagonal of the Fisher information, as `sets`.
        floor: added to every F_t (and to norms).
        normalise: w_t is divided by the norm of F_t over all tensors, and these shares by their
            sum.

    Raises:
        ValueError: for an importance of other names or shapes.
    """
    check([*sets, *importance])
    if len(sets) != len(importance):
        raise ValueError(f"{len(sets)} sets and {len(importance)} importances")
    rates = [1.0] * len(sets) if weights is None else list(weights)
    if normalise:
        shares = [1 / (_norm(one) + floor) for one in importance]
        rates = [w * s / sum(shares) for w, s in zip(rates, shares, strict=True)]
    out = {}
    wide = [_wide(one) for one in sets]
    for name in sets[0]:
        each = [w * (_up(f[name]) + floor) for w, f in zip(rates, importance, strict=True)]
        top = sum(f * one[name] for f, one in zip(each, wide, strict=True))
        out[name] = torch.as_tensor(top / torch.stack(each).sum(0))
    return _as(out, sets[0])


def core_space(
    pairs: Sequence[Pairs], *, rule: str = "task_arithmetic", **options: Any
) -> dict[str, tuple[Tensor, Tensor]]:
    """Low-rank updates `B_t A_t` merged in the space that all of them span.

    With the singular bases U of [B_1 ... B_T] and V of [A_1; ...; A_T]:
    `M_t = U^T B_t A_t V`, merged by any of `RULES` (those that look at whole models see all M_t),
    and `U M V^T` is the update. Nothing is lost before the rule acts.

    Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", NeurIPS 2025,
    arXiv 2509.17786; code apanariello4/core-space-merging 85176fa. In float64, as there.

    Args:
        pairs: by name, A [r, D] and B [D_out, r] of every set; ranks may differ.

    Returns:
        A [R, D] and B [D_out, R] by name, R at most the sum of the ranks.
    """
    _check_pairs(pairs)
    cores: list[dict[str, Tensor]] = [{} for _ in pairs]
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    for name in pairs[0]:
        a = torch.cat([one[name][0].double() for one in pairs])
        b = torch.cat([one[name][1].double() for one in pairs], 1)
        u = torch.linalg.svd(b, full_matrices=False)[0]
        vh = torch.linalg.svd(a, full_matrices=False)[2]
        bases[name] = u, vh
        for core, one in zip(cores, pairs, strict=True):
            core[name] = (u.mT @ one[name][1].double()) @ (one[name][0].double() @ vh.mT)
    merged = RULES[rule](cores, **options)
    out = {}
    for name, (u, vh) in bases.items():
        a, b = pairs[0][name]
        out[name] = vh.to(a), (u @ merged[name]).to(b)
    return out


def lego(pairs: Sequence[Pairs], *, rank: Size, seed: Seed) -> dict[str, tuple[Tensor, Tensor]]:
    """Low-rank updates taken apart into their ranks, of which similar ones become one.

    A unit u is a row of A and the column of B with the same number, one vector [D + D_out]. k-means
    puts the units of all sets into k clusters, name by name. Each cluster C is one unit of the
    result: its centroid m, made as large as its members are in the mean,

        m * mean over u in C of max |u| / max |m|

    and the product is multiplied by sqrt(r / k), r the rank of the sets (their mean rank). The
    order of ranks and of sets changes nothing. `(-a, -b)` is the same update as `(a, b)` and counts
    as another unit.

    Zhao et al., "Merging LoRAs like Playing LEGO: Pushing the Modularity of LoRA to Extremes
    Through Rank-Wise Clustering", ICLR 2025, arXiv 2409.16167. No code of the authors is known:
    both factors are as public reimplementations have them, and the mean rank is ours. Checked by
    hand and against no other code. In float64.

    Args:
        pairs: by name, A [r, D] and B [D_out, r] of every set; ranks may differ.
        rank: k; fewer where there are fewer different units.
        seed: of the starts of k-means, the same for every name.

    Returns:
        A [k, D] and B [D_out, k] by name.
    """
    _check_pairs(pairs)
    out = {}
    for name, (first, _) in pairs[0].items():
        a = torch.cat([one[name][0].double() for one in pairs])
        b = torch.cat([one[name][1].double() for one in pairs], 1)
        # Each different unit once, sorted: the draws of k-means then do not depend on the order.
        units, counts = torch.unique(torch.cat([a, b.mT], 1), dim=0, return_counts=True)
        k = min(rank, len(units))
        rng = torch.Generator().manual_seed(seed)
        centres, member = kmeans(units, counts.to(units), k, rng)
        share = F.one_hot(member, k).to(units).mT * counts
        size = share @ units.abs().amax(1) / share.sum(1)
        tiny = torch.finfo(centres.dtype).tiny
        centres = centres * (size / centres.abs().amax(1).clamp_min(tiny))[:, None]
        down, up = centres.split([a.shape[1], len(b)], 1)
        out[name] = down.to(first), (math.sqrt(len(a) / len(pairs) / k) * up.mT).to(first)
    return out


RULES: dict[str, Callable[..., dict[str, Tensor]]] = {
    "mean": mean,
    "task_arithmetic": task_arithmetic,
    "ties": ties,
    "dare": dare,
    "dare_mean": dare_mean,
    "dare_ties": dare_ties,
    "breadcrumbs": breadcrumbs,
    "magmax": magmax,
    "opcm": opcm,
}


def defaults(rule: str) -> dict[str, Any]:
    """The options of a rule with their values; `seed`, which has none, is left out."""
    parameters = inspect.signature(RULES[rule]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


# ------------------------------------------------------------------ pieces


def _check_pairs(pairs: Sequence[Pairs]) -> None:
    if not pairs or any(one.keys() != pairs[0].keys() for one in pairs):
        raise ValueError("the sets do not hold the same pairs")


def _up(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _wide(one: Named) -> dict[str, Tensor]:
    return {name: _up(value) for name, value in one.items()}


def _as(out: Named, like: Named) -> dict[str, Tensor]:
    return {name: value.to(like[name].dtype) for name, value in out.items()}


def _weighted(vectors: Sequence[Named], weights: Weights) -> Sequence[Named]:
    if weights is None:
        return vectors
    pairs = zip(weights, vectors, strict=True)
    return [{name: w * value for name, value in one.items()} for w, one in pairs]


def _flat(
    vectors: Sequence[Named], scope: str
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], dict[str, Tensor]]]:
    """[T, N] for every tensor, or one [T, N] for the model; and the way back from [N]."""
    check(vectors)
    wide = [_wide(one) for one in vectors]
    names = sorted(wide[0])
    tensors = [torch.stack([one[n].flatten() for one in wide]) for n in names]
    sizes = [t.shape[1] for t in tensors]

    def split(flat: Sequence[Tensor]) -> dict[str, Tensor]:
        parts = flat[0].split(sizes) if scope == "model" else flat
        shaped = {n: p.view(wide[0][n].shape) for n, p in zip(names, parts, strict=True)}
        return _as({n: shaped[n] for n in vectors[0]}, vectors[0])

    return ([torch.cat(tensors, 1)] if scope == "model" else tensors), split


def _trimmed(v: Tensor, density: float, scope: str) -> Tensor:
    """The largest magnitudes of each row of [T, N]."""
    kept, size = int(density * v.shape[1]), v.abs()
    if density >= 1 or kept == v.shape[1]:
        return v
    if scope == "model":
        limit = size.kthvalue(v.shape[1] - kept, dim=1, keepdim=True).values
        return v * (size >= limit)
    order = size.argsort(dim=1, descending=True, stable=True)[:, :kept]
    return v * torch.zeros_like(v).scatter_(1, order, 1)


def _elected(v: Tensor, scope: str, weights: Weights) -> Tensor:
    """[T, N] -> [N]: the mean of the values whose sign is that of their sum."""
    total = v.sum(0)
    sign = total.sign()
    if scope == "model":
        sign[sign == 0] = sign.sum().sign()
        # A sum of 0 of all places: the official comparison takes the negative values.
        agrees = torch.where(sign > 0, v > 0, v < 0)
    else:
        agrees = v.sign() == torch.where(sign >= 0, 1.0, -1.0)
    if weights is not None:
        v = v * v.new_tensor(weights)[:, None]
    return (v * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _dropped(vectors: Sequence[Named], density: float, seed: int) -> list[dict[str, Tensor]]:
    """Values set to 0 at random, the others divided by `density`."""
    check(vectors)
    generator = torch.Generator().manual_seed(seed)
    out: list[dict[str, Tensor]] = [{} for _ in vectors]
    for name in vectors[0]:
        for thin, one in zip(out, vectors, strict=True):
            value = _up(one[name])
            mask = torch.bernoulli(torch.full(value.shape, float(density)), generator=generator)
            kept = value * mask.to(value)
            thin[name] = kept / density if density else kept
    return [dict(_as(thin, vectors[0])) for thin in out]


def _crumbs(value: Tensor, density: float, outliers: float) -> Tensor:
    flat = _up(value).flatten()
    kept, top = int(density * len(flat)), int(outliers * len(flat))
    if density >= 1:
        return value
    low = max(0, len(flat) - kept - top)
    order = flat.abs().argsort(stable=True)[low : low + kept]
    mask = torch.zeros_like(flat).scatter_(0, order, 1)
    return (flat * mask).view(value.shape).to(value.dtype)
