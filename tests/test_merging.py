"""Merging rules against numbers recorded from public code, and what each of them promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import equal
from torch import Tensor

from driftline.parts import merging

FOLDER = Path(__file__).parent / "golden" / "merging"
CASES = [
    (path.stem, case)
    for path in sorted(FOLDER.glob("*.json"))
    for case in json.loads(path.read_text())["cases"]
]
SEEDED = ("dare", "dare_mean", "dare_ties")
SHAPES = {"a.w": (4, 6), "b": (5,), "c.w": (3, 3)}


def recorded(source: str) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """What is known of a file, and its sets by what stands before the name of the tensor."""
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in np.load(FOLDER / f"{source}.npz").items():
        group, _, name = key.partition("/")
        if group == "in":
            index, _, name = name.partition("/")
            group = f"in {index}"
        groups.setdefault(group, {})[name] = torch.from_numpy(value)
    return json.loads((FOLDER / f"{source}.json").read_text()), groups


def inputs(groups: dict[str, dict[str, Tensor]], first: int, count: int) -> list[dict[str, Tensor]]:
    return [groups[f"in {i}"] for i in range(first, first + count)]


@pytest.mark.parametrize(("source", "case"), CASES)
def test_the_numbers_of_public_code(source, case):
    info, groups = recorded(source)
    options = dict(info["cases"][case])
    rule = options.pop("rule")
    first = 4 if options.pop("inputs", None) == "tied" else 0
    many = 4 if source == "fusion_bench" else 3
    sets = inputs(groups, first, options.pop("count", many))
    if rule == "fisher":
        got = merging.fisher(sets, inputs(groups, 8, 4), **options)
    elif rule == "core_space":
        inner = options.pop("inner")
        names = sorted({key.partition("/")[0] for key in sets[0]})
        pairs = [{n: (one[f"{n}/a"], one[f"{n}/b"]) for n in names} for one in sets]
        products = merging.core_space(pairs, rule=inner, **options)
        got = {name: b.double() @ a.double() for name, (a, b) in products.items()}
    else:
        got = merging.RULES[rule](sets, **options)
    assert got.keys() == groups[case].keys()
    for name, want in groups[case].items():
        assert want.any(), "the recorded tensor is 0"
        torch.testing.assert_close(
            got[name].double(), want.double(), rtol=info["rtol"], atol=info["rtol"]
        )


def sets(count: int = 3, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(3)
    return [
        {n: torch.randn(s, generator=draw).to(dtype) for n, s in SHAPES.items()}
        for _ in range(count)
    ]


def merged(rule: str, vectors: list[dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
    seed = {"seed": 4} if rule in SEEDED else {}
    return merging.RULES[rule](vectors, **seed, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rule", merging.RULES)
def test_every_rule_keeps_names_shapes_types_and_its_inputs(rule, dtype):
    vectors, before = sets(dtype=dtype), sets(dtype=dtype)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    out = merged(rule, vectors)
    assert {n: (v.shape, v.dtype) for n, v in out.items()} == {
        n: (torch.Size(s), dtype) for n, s in SHAPES.items()
    }
    assert list(out) == list(SHAPES)
    assert equal(vectors, before) and torch.equal(torch.get_rng_state(), state)
    assert equal(merged(rule, vectors), out)
    wide = merged(rule, [{n: v.double() for n, v in one.items()} for one in vectors])
    for name, value in out.items():  # as computed in float64, up to the type
        torch.testing.assert_close(value.double(), wide[name], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("rule", merging.RULES)
def test_zeros_and_one_set_give_finite_numbers(rule):
    zeros = [{n: torch.zeros(s) for n, s in SHAPES.items()} for _ in range(2)]
    assert all(not v.any() for v in merged(rule, zeros).values())
    mixed = [zeros[0], sets(1)[0], zeros[1]]
    assert all(v.isfinite().all() for v in merged(rule, mixed).values())
    assert all(v.isfinite().all() for v in merged(rule, sets(1)).values())


@pytest.mark.parametrize("rule", ["mean", "opcm", "ties", "dare_mean", "magmax"])
def test_equal_sets_merge_to_themselves(rule):
    (one,) = sets(1)
    options: dict[str, Any] = {"ties": {"density": 1.0}, "dare_mean": {"density": 1.0}}.get(
        rule, {}
    )
    options |= {"scale": 1.0} if rule == "magmax" else {}
    out = merged(rule, [one, dict(one)] if rule != "opcm" else [one], **options)
    for name, value in one.items():
        torch.testing.assert_close(out[name], value)


@pytest.mark.parametrize("rule", merging.STEPS)
def test_a_sequential_rule_set_by_set_is_the_rule(rule):
    vectors = sets(4)
    options = merging.defaults(rule)
    state = None
    for vector in vectors:
        state = merging.step(rule, state, vector, **options)
        assert {n: v.shape for n, v in state.merged.items()} == {
            n: v.shape for n, v in vector.items()
        }, "more than one set is kept"
    assert equal(merging.finish(rule, state, **options), merging.RULES[rule](vectors))


def test_opcm_keeps_what_is_merged_out_of_the_way_of_a_new_task():
    first, second = sets(2, torch.float64)
    out = merging.opcm([first, second], alpha=1.0)
    u, _, vh = torch.linalg.svd(first["a.w"], full_matrices=False)
    new = merging._outside(second["a.w"], first["a.w"], 1.0)
    inside = u.mT @ new @ vh.mT
    assert inside.diagonal().abs().max() < 1e-12
    assert not torch.allclose(out["a.w"], (first["a.w"] + second["a.w"]) / 2)
    norms = [merging._norm(one) for one in (first, second)]
    assert merging._norm(out) == pytest.approx(sum(norms) / 2)


def test_dare_masks_depend_on_the_seed_and_not_on_the_type():
    vectors = sets()
    a, b = (merging.dare_mean(vectors, seed=s, density=0.5) for s in (1, 2))
    assert not equal(a, b)
    wide = merging.dare_mean([{n: v.double() for n, v in o.items()} for o in vectors], seed=1)
    assert all(torch.equal(a[n] == 0, wide[n] == 0) for n in SHAPES)


Pair = tuple[Tensor, Tensor]


def low_rank(ranks: tuple[int, ...]) -> list[dict[str, Pair]]:
    draw = torch.Generator().manual_seed(1)
    return [
        {"q": (torch.randn(r, 7, generator=draw), torch.randn(9, r, generator=draw))} for r in ranks
    ]


def units(pair: Pair) -> Tensor:
    """The rank-one parts of a pair, sorted."""
    return torch.unique(torch.cat([pair[0], pair[1].T], 1), dim=0)


def test_core_space_loses_nothing_of_different_ranks():
    pairs = low_rank((2, 3))
    a, b = merging.core_space(pairs, rule="mean")["q"]
    assert a.shape == (5, 7) and b.shape == (9, 5)
    torch.testing.assert_close(b @ a, sum(p["q"][1] @ p["q"][0] for p in pairs) / 2)


def test_lego_gives_units_back_that_are_copies_of_each_other():
    (one,) = low_rank((3,))
    a, b = one["q"]
    other = {"q": (a[[2, 0, 1]], b[:, [2, 0, 1]])}
    merged = merging.lego([one, other, one], rank=3, seed=0)["q"]
    torch.testing.assert_close(units(merged), units((a, b)))
    fewer = merging.lego([one, other], rank=5, seed=0)["q"]
    assert fewer[0].shape == (3, 7)  # there are no more different ones
    torch.testing.assert_close(units(fewer), units((a, b)))


def test_lego_does_not_depend_on_the_order_of_ranks_and_sets():
    pairs = low_rank((4, 3, 4))
    want = merging.lego(pairs, rank=3, seed=2)["q"]
    order = torch.tensor([1, 2, 0])
    a, b = pairs[1]["q"]
    shuffled = [pairs[2], {"q": (a[order], b[:, order])}, pairs[0]]
    assert equal(merging.lego(shuffled, rank=3, seed=2)["q"], want)
    assert want[0].shape == (3, 7) and want[1].shape == (9, 3)


def test_lego_by_hand():
    """Two close units and one far away: (4, 0 | 0) and (0, 2 | 0) become one, (0, 0 | 90) stays."""
    first = {"q": (torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 90.0]]))}
    second = {"q": (torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0]]))}
    a, b = merging.lego([first, second], rank=2, seed=0)["q"]
    # Centroid (2, 1 | 0), whose largest value is 2; those of its members are 4 and 2, 3 in the
    # mean. The mean rank is 1.5, so B is multiplied by sqrt(1.5 / 2).
    want = torch.tensor([[0.0, 0.0, 90.0 * 0.75**0.5], [3.0, 1.5, 0.0]])
    torch.testing.assert_close(units((a, b)), want)


def test_a_base_is_taken_off_and_put_on_again():
    base, *weights = sets(3)
    vectors = merging.differences(weights, base)
    torch.testing.assert_close(merging.added(base, vectors[0]), weights[0])
    assert equal(merging.differences(weights, None), weights)


@pytest.mark.parametrize("rule", merging.RULES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: one.pop("b"), "do not hold the same tensors: 'b'"),
        (lambda one: one.update(extra=torch.zeros(1)), "do not hold the same tensors: 'extra'"),
        (lambda one: one.update(b=torch.zeros(7)), r"'b' is \[7\] in set 1 and \[5\] in set 0"),
    ],
)
def test_sets_that_differ_are_refused_by_name(rule, change, message):
    vectors = sets(2)
    change(vectors[1])
    with pytest.raises(ValueError, match=message):
        merged(rule, vectors)
    with pytest.raises(ValueError, match="there is no set"):
        merged(rule, [])
