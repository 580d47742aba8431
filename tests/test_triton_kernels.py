"""Triton's kernels: on a CPU through the interpreter in a process of its own, and on a GPU.

`tests/interpreted_kernels.py` holds the cases and the checks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from driftline.kernels import dispatch

if reason := dispatch.no_triton():
    pytest.skip(reason, allow_module_level=True)
import interpreted_kernels as shared
from interpreted_kernels import BF16, CASES, FP16, FP32, Case

from driftline.kernels.reference import formula
from driftline.kernels.triton_adapter import INTERPRETED, backward, forward

ROOT = Path(__file__).parents[1]
TILED = ((40, 5), (67, 20), (192, 64), (768, 16), (67, 1), (768, 64), (192, 4), (40, 129))


def on_gpu(test):
    """Marks a test that needs a device, and the compiler and not the interpreter."""
    absent = INTERPRETED or not torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(absent, reason="no CUDA device")(test))


@pytest.mark.slow
def test_in_the_interpreter(pytestconfig):
    more = ["--all"] if pytestconfig.getoption("all") else []
    command = [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "no:xdist", *more, "tests/interpreted_kernels.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@on_gpu
@pytest.mark.parametrize("name", list(CASES))
def test_cases_on_the_gpu(name, monkeypatch):
    case = CASES[name]
    arguments, settings, g = shared.make(case, "cuda")
    expected, norms = shared.truth(arguments, settings, g)
    guarded = shared.Guarded(monkeypatch)
    first, second = (shared.run(arguments, settings, g) for _ in range(2))
    guarded.check()
    for key, tensor in first.items():
        error = float((tensor.double() - expected[key]).norm()) / norms[key]
        assert error <= shared.limit(case), key
        assert torch.equal(tensor, second[key]), key


@on_gpu
@pytest.mark.parametrize(
    ("number", "dtype", "act", "form"),
    [
        (number, *kind)
        for number, kind in enumerate(
            product((FP32, BF16, FP16), ("none", "relu", "gelu"), ("S", "P", "N"))
        )
    ],
)
def test_grid_on_the_gpu(number, dtype, act, form):
    """Widths and ranks take turns: every combination of all would compile for an hour."""
    for step in range(2):
        width, rank = TILED[(number + 3 * step) % len(TILED)]
        for rows in (1, 33, 197):
            case = Case(dtype, act, form, width, rank, rows, bias=bool((number + step) % 2))
            loose = 1e-4 if act == "gelu" and rows == 1 else 0.0  # GELU deep in its tail
            for key, error in shared.errors(case, "cuda", seed=number).items():
                assert error <= max(shared.limit(case), loose), (case, key)


@on_gpu
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_tf32_on_the_gpu(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for rank in (16, 64):
            found = shared.errors(Case(FP32, "gelu", "P", 192, rank, 197), "cuda")
            # the tensor cores drop the low 13 bits of both operands: up to 2 * 2^-10
            assert all(error <= 2e-3 for error in found.values()), found
    finally:
        torch.set_float32_matmul_precision(before)


@on_gpu
def test_every_tuned_configuration_on_the_gpu():
    """Tile sizes change the last bits alone; all that the table holds for these shapes."""
    from driftline.kernels import tuning

    for entry in tuning.entries():
        if entry["dtype"] != "bf16" or entry["rank"] not in (16, 64, 144):
            continue
        case = Case(BF16, "relu", "P", entry["width"], min(entry["rank"], 129), 300)
        arguments, settings, g = shared.make(case, "cuda")
        expected, norms = shared.truth(arguments, settings, g)
        config = tuning.Config(*(entry[name] for name in tuning.Config._fields))
        if entry["kernel"] == "forward":
            found = {"y": forward(*arguments, **settings, config=config)}
        else:
            name = "row_config" if entry["kernel"] == "backward_rows" else "weight_config"
            found = backward(g, *arguments, needs=shared.NEEDS, **settings, **{name: config})
        for key, tensor in found.items():
            error = float((tensor.double() - expected[key]).norm()) / norms[key]
            assert error <= shared.limit(case), (entry, key)


@on_gpu
@pytest.mark.parametrize("segments", [1, 2800])
def test_offsets_beyond_31_bits_on_the_gpu(segments):
    """More than 2^31 elements of x; gradients come from the last rows alone."""
    width, rank, last = 768, 16, 50
    rows = 2_800_500 // segments
    assert segments * rows * width > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.empty(segments, rows, width, device="cuda", dtype=BF16).normal_(generator=generator)
    small, settings, _ = shared.make(Case(BF16, "relu", "S", width, rank, 8), "cuda")
    arguments = [x, *small[1:]]
    y = forward(*arguments, **settings)
    g = torch.zeros_like(y)
    g[-1, -last:].normal_(generator=generator)
    found = backward(g, *arguments, needs={"x", "down", "up"}, **settings)

    leaves = [t.double().requires_grad_() for t in (x[-1, -last:], small[2][0], small[3][0])]
    plain = [None if t is None else t[0].double() for t in small[4:7]]
    expected = formula(leaves[0], None, *leaves[1:], *plain, act="relu", add_input=True)
    grads = torch.autograd.grad(expected, leaves, g[-1, -last:].double())
    tails = (y[-1, -last:], found["x"][-1, -last:], found["down"][0], found["up"][0])
    for tensor, wanted in zip(tails, (expected.detach(), *grads), strict=True):
        assert (tensor.double() - wanted).norm() <= 5e-3 * wanted.norm()
