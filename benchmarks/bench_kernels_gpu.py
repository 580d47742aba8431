"""The fused adapter on a GPU: ceilings, correctness, times, memory, tile sizes.

    python benchmarks/bench_kernels.py --device cuda     # writes results/kernels/<device>.json
    python benchmarks/bench_kernels_gpu.py --tune        # measures tile sizes, writes tuning.json
    python benchmarks/bench_kernels_gpu.py --predict     # the model's table; nothing is measured
    python benchmarks/bench_kernels_gpu.py --dry-run     # every step on tiny CPU tensors, no times

Device times are those of CUDA graphs: a graph runs one call on each of several sets of inputs and
outputs, as many as exceed four times the L2 cache (`cold`) or one set of inputs (`warm`); a sample
is a replay divided by its calls. Every version is timed twice, and what differs less than the two
medians of one version is noise. Beside it stands the wall-clock time of plain calls, where the host
may be what takes the time. Each configuration is compared with the formula in float64 before it is
timed, on fresh inputs and with outputs that held NaN; what is too far off is not timed, and the
script then ends with an error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from driftline.core.files import write_json, write_text
from driftline.core.record import environment
from driftline.kernels import adapter, chosen, tuning, use
from driftline.kernels.reference import formula

ROOT = Path(__file__).parents[1]

TOKENS, SCALE = 197, 0.1
WIDTHS = {"Ti": 192, "S": 384, "B": 768, "L": 1024}
LIMITS = {"bf16": 5e-3, "autocast": 5e-3, "tf32": 1e-3, "fp32": 5e-6}
BUDGET = 480.0  # of the whole script
SETS = 128  # most sets of inputs that one graph goes through
REPLAYS = 50

Call = Callable[[], Any]


class Case(NamedTuple):
    """One shape. kind: forward or train. form: S adds x, P adds x and base."""

    kind: str
    model: str
    batch: int
    rank: int
    form: str
    dtype: str  # bf16, autocast (float32 stream), tf32, fp32 (full precision)
    learnt: bool = False

    @property
    def width(self) -> int:
        return WIDTHS[self.model]

    @property
    def stream_bytes(self) -> int:
        """Of one [rows, d] tensor of the residual stream."""
        return self.batch * TOKENS * self.width * (2 if self.dtype == "bf16" else 4)


def cases() -> list[Case]:
    """Small ones first, so that a budget cuts off the repetitions and not the spread."""
    found = []
    shapes = [*product(("Ti", "B"), (64, 1, 8, 256)), ("S", 64), ("L", 64)]
    for (model, batch), rank, form in product(shapes, (64, 16), "SP"):
        found.append(Case("forward", model, batch, rank, form, "bf16"))
        found += [Case("train", model, batch, rank, form, "bf16", s) for s in (False, True)]
    for dtype, rank, form in product(("tf32", "fp32", "autocast"), (64, 16), "SP"):
        found.append(Case("forward", "B", 64, rank, form, dtype))
        found.append(Case("train", "B", 64, rank, form, dtype))
    return found


# ------------------------------------------------------------------ prediction


class Chip(NamedTuple):
    """Measured on an H200: copy (bytes read and written a second) and bf16 products (flop/s)."""

    copy: float = 4.3e12
    flops: float = 790e12


def predict(case: Case, chip: Chip = Chip()) -> dict[str, float]:  # noqa: B008
    """Microseconds by a model: a kernel costs 2 us, and its bytes at 0.85 (pointwise), 0.75 (thin
    product, ours) or 0.70 (weight gradient) of the copy rate or its flops at 0.6 of the peak."""
    u, rho, two = case.stream_bytes, case.rank / case.width, case.form == "P"
    product_flops = 2 * case.batch * TOKENS * case.width * case.rank

    def kernel(passes: float, rate: float = 0.85, products: int = 0) -> float:
        seconds = max(
            passes * u / (rate * chip.copy), products * product_flops / (0.6 * chip.flops)
        )
        return 2 + 1e6 * seconds

    thin = kernel(1 + rho, 0.75, 1)
    weight = kernel(1 + rho, 0.70, 1)
    eager = 2 * thin + kernel(2 * rho) + kernel(2) + kernel(3) * (2 if two else 1)
    ours = kernel(3 if two else 2, 0.75, 2)
    compiled = 2 * thin + kernel(2 * rho) + kernel(4 if two else 3)
    rows = case.batch * TOKENS
    partial_passes = 4 * case.rank / next(
        size for limit, size in ((2048, 256), (8192, 512), (32768, 1024), (math.inf, 2048))
        if rows <= limit
    )  # fmt: skip
    eager_back = kernel(2) + 2 * thin + 2 * weight + kernel(1) + kernel(3 * rho) + kernel(rho)
    eager_back += kernel(3) + ((kernel(3) + kernel(1)) if case.learnt else 0)
    ours_back = kernel(3 + 2 * rho, 0.75, 3) + kernel(2 + 2 * rho + partial_passes, 0.70, 2)
    ours_back += kernel(partial_passes)
    if case.kind == "forward":
        return {"eager": eager, "compile": compiled, "ours": ours, "ratio": eager / ours}
    return {
        "eager": eager + eager_back,
        "ours": ours + ours_back,
        "ratio": (eager + eager_back) / (ours + ours_back),
        "eager backward": eager_back,
        "ours backward": ours_back,
        "ratio backward": eager_back / ours_back,
    }


def print_predictions() -> None:
    print("predicted, not measured: microseconds in a CUDA graph on an H200, bf16")
    print("kind    model   B    r form learnt     eager      ours  ratio   backward ratio")
    for case in cases():
        if case.dtype == "bf16":
            p = predict(case)
            back = f"{p['ratio backward']:10.2f}" if case.kind == "train" else ""
            print(
                f"{case.kind:8}{case.model:3} {case.batch:6} {case.rank:4} {case.form:4} "
                f"{case.learnt!s:6} {p['eager']:9.1f} {p['ours']:9.1f} {p['ratio']:6.2f}   {back}"
            )


# ------------------------------------------------------------------ clock


class Clock:
    """Times on a device; on a CPU every call runs once and no time is kept."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.end = device, time.monotonic() + seconds
        self.cuda = device.type == "cuda"
        properties = torch.cuda.get_device_properties(device) if self.cuda else None
        self.cache_bytes = properties.L2_cache_size if properties is not None else 0

    def left(self) -> float:
        """Seconds of the budget."""
        return self.end - time.monotonic()

    def sets(self, set_bytes: int) -> int:
        """How many sets of inputs and outputs exceed four times the L2 cache."""
        return max(2, min(SETS, math.ceil(4 * self.cache_bytes / set_bytes)))

    def graph(self, calls: Sequence[Call]) -> Call:
        """One replay runs every call once; results stay alive, so that no output is reused."""
        if not self.cuda:
            return lambda: [call() for call in calls]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in (calls[0], *calls[:2]):  # compiles, loads modules, picks algorithms
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph, kept = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            kept += [call() for call in calls]

        def replay() -> list[Any]:
            graph.replay()
            return kept

        return replay

    def device_time(self, calls: Sequence[Call], replays: int = REPLAYS) -> dict[str, float | None]:
        """Microseconds of one call by graph replay: median, tenth and ninetieth percentile of the
        first timing, median of the second."""
        repeats = max(1, 8 // len(calls))
        replay = self.graph([*calls] * repeats)
        count = len(calls) * repeats
        if not self.cuda:
            replay()
            return dict.fromkeys(("median", "p10", "p90", "again"))
        for _ in range(3):
            replay()
        medians, samples = [], []
        for _ in range(2):
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
            marks[0].record()
            for mark in marks[1:]:
                replay()
                mark.record()
            torch.cuda.synchronize()
            times = sorted(1e3 * a.elapsed_time(b) / count for a, b in pairwise(marks))
            samples = samples or times
            medians.append(statistics.median(times))
        tenth = len(samples) // 10
        return {
            "median": medians[0],
            "p10": samples[tenth],
            "p90": samples[-1 - tenth],
            "again": medians[1],
        }

    def wall_time(self, call: Call, *, wait: bool, count: int = 100) -> float | None:
        """Microseconds of a plain call; without `wait` only until it is queued."""
        if not self.cuda:
            call()
            return None
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        if wait:
            torch.cuda.synchronize()
        found = 1e6 * (time.perf_counter() - start) / count
        torch.cuda.synchronize()
        return found


# ------------------------------------------------------------------ contenders


class Bottleneck(nn.Module):
    """Linear, ReLU, linear, times a scale: the plain module of EASE, MOS and AdaptFormer."""

    def __init__(self, width: int, rank: int, learnt: bool) -> None:
        super().__init__()
        self.down, self.up, self.act = nn.Linear(width, rank), nn.Linear(rank, width), nn.ReLU()
        self.scale = nn.Parameter(torch.full((), SCALE)) if learnt else SCALE

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.act(self.down(x))) * self.scale


def eager(module: Bottleneck, x: Tensor, base: Tensor | None) -> Tensor:
    return x + module(x) if base is None else x + base + module(x)


def fused(module: Bottleneck, x: Tensor, base: Tensor | None) -> Tensor:
    """The public operator, by whatever backend is chosen."""
    return adapter(
        x,
        module.down.weight,
        module.up.weight,
        down_bias=module.down.bias,
        up_bias=module.up.bias,
        act="relu",
        scale=module.scale,
        base=base,
        add_input=True,
    )


@cache
def scale_tensor(device: torch.device) -> Tensor:
    """[1], made once: in a graph it would be a launch of its own."""
    return torch.full((1,), SCALE, device=device)


def launched(
    config: tuning.Config, low: torch.dtype, module: Bottleneck, x: Tensor, base: Tensor | None
) -> Tensor:
    """The forward kernel with given tile sizes."""
    from driftline.kernels import triton_adapter

    weights = [module.down.weight, module.up.weight, module.down.bias, module.up.bias]
    down, up, down_bias, up_bias = (w.detach().to(low)[None] for w in weights)
    return triton_adapter.forward(
        x[None].flatten(1, -2),
        None if base is None else base[None].flatten(1, -2),
        down,
        up,
        down_bias,
        up_bias,
        scale_tensor(x.device),
        *(None, None, None, None, None),
        act="relu",
        add_input=True,
        compute_dtype=low,
        config=config,
    ).view(x.shape)


class Inputs(NamedTuple):
    module: Bottleneck
    x: list[Tensor]  # one of each for every set
    base: list[Tensor | None]
    g: list[Tensor]
    low: torch.dtype  # of the products


def inputs(case: Case, device: torch.device, sets: int, rows: int | None = None) -> Inputs:
    """Random tensors; x and base require gradients where the case trains.

    All values fit bfloat16, so that no type rounds the operands of the first product: a hidden
    value rounded across ReLU's zero would count as an error of its whole gradient.
    """
    low = torch.bfloat16 if case.dtype in ("bf16", "autocast") else torch.float32
    stream = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    stored = torch.bfloat16 if case.dtype == "bf16" else torch.float32
    module = Bottleneck(case.width, case.rank, case.learnt).to(device, torch.bfloat16).to(stored)
    shape, train = (case.batch, rows or TOKENS, case.width), case.kind == "train"

    def draw(dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)

    return Inputs(
        module,
        [draw(stream).requires_grad_(train) for _ in range(sets)],
        [draw(low).requires_grad_(train) if case.form == "P" else None for _ in range(sets)],
        [draw(stream) for _ in range(sets if train else 0)],
        low,
    )


def leaves(data: Inputs, number: int) -> list[Tensor]:
    base = data.base[number]
    streams = [data.x[number]] if base is None else [data.x[number], base]
    return [*streams, *data.module.parameters()]


def step(case: Case, function: Callable[..., Tensor], data: Inputs, number: int) -> list[Tensor]:
    """y, and in training the gradients."""
    # autocast's own cache would keep casts of one call for the next, also in a graph
    cast = torch.autocast(data.x[0].device.type, data.low, cache_enabled=False)
    with cast if case.dtype == "autocast" else nullcontext():
        if case.kind == "forward":
            with torch.no_grad():
                return [function(data.module, data.x[number], data.base[number])]
        y = function(data.module, data.x[number], data.base[number])
    return [y, *torch.autograd.grad(y, leaves(data, number), data.g[number])]


def truth(case: Case, data: Inputs) -> list[Tensor]:
    """What `step` computes on the first set, in float64."""
    wide = {id(t): t.detach().double().requires_grad_() for t in leaves(data, 0)}
    m = data.module
    weights = (m.down.weight, m.up.weight, m.down.bias, m.up.bias, m.scale)
    operands = [wide.get(id(t), t) for t in (data.x[0], data.base[0], *weights)]
    y = formula(*operands, act="relu", add_input=True, compute_dtype=torch.float64)  # pyrefly: ignore
    if case.kind == "forward":
        return [y.detach()]
    return [y.detach(), *torch.autograd.grad(y, [*wide.values()], data.g[0].double())]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory of the launchers holds NaN."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def with_nan(made: Tensor) -> Tensor:
        return made.fill_(torch.nan) if made.is_floating_point() else made

    torch.Tensor.new_empty = lambda *a, **k: with_nan(new_empty(*a, **k))  # type: ignore
    torch.empty_like = lambda *a, **k: with_nan(empty_like(*a, **k))  # type: ignore
    try:
        yield
    finally:
        torch.Tensor.new_empty, torch.empty_like = new_empty, empty_like


def largest_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error of the tensors with more than one element."""
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if b.numel() > 1]
    errors = [float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs]
    return max(errors) if all(e == e for e in errors) else math.nan


def contenders(case: Case, data: Inputs, args: argparse.Namespace) -> dict[str, tuple[str, Call]]:
    """Name: backend to choose, and a function of module, x and base."""
    found: dict[str, tuple[str, Any]] = {
        "eager": ("auto", eager),
        "addmm": ("reference", fused),
        "ours": ("triton", fused),
    }
    both_compiled = case.model in ("Ti", "B") and case.batch == 64 and case.rank == 64
    if case.dtype == "bf16" and both_compiled and not case.learnt and not args.no_compile:
        found["compile"] = ("auto", torch.compile(eager, dynamic=False))
        if case.model == "B" and case.kind == "forward":
            found["compile max-autotune"] = (
                "auto",
                torch.compile(eager, dynamic=False, mode="max-autotune-no-cudagraphs"),
            )
    if case.kind == "forward" and case.dtype == "bf16":
        table = tuning.lookup(
            "forward",
            case.width,
            case.rank,
            case.dtype,
            data.x[0].shape[:-1].numel(),
            case.form,
        )
        configs = {"ours streamed": table._replace(resident=False)}
        if case.width <= 768:
            columns = min(64, table.columns)
            configs["ours resident"] = tuning.Config(64, columns, 8, 2, True)
        for name, config in configs.items():
            found[name] = ("triton", partial(launched, config, data.low))
    return found


def bench(case: Case, clock: Clock, args: argparse.Namespace, warm: bool) -> list[dict[str, Any]]:
    """One row for every contender."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if case.dtype == "fp32" else "high")
    rows = args.rows
    tensors = (2, 3) if case.kind == "forward" else (4, 6)  # x y, base; x y g dx, base dbase
    sets = clock.sets(tensors[case.form == "P"] * case.stream_bytes)
    data = inputs(case, clock.device, 1 if warm else sets, rows)
    expected, found = truth(case, data), []
    try:
        for name, (backend, function) in contenders(case, data, args).items():
            use(backend)
            ours = name.startswith(("ours", "addmm"))
            with poisoned() if ours else nullcontext():
                error = largest_error(step(case, function, data, 0), expected)
            if ours and not error <= LIMITS[case.dtype]:
                found.append({**case._asdict(), "contender": name, "failed": f"{error:.2e} off"})
                continue
            calls = [partial(step, case, function, data, n) for n in range(len(data.x))]
            times = clock.device_time(calls)
            row = {
                **case._asdict(),
                "contender": name,
                "cache": "warm" if warm else "cold" if sets < SETS else f"{sets} sets",
                "error": error,
                **{f"device_us_{key}": value for key, value in times.items()},
                "wall_us": clock.wall_time(calls[0], wait=True),
                "backend": chosen() if name in ("ours", "addmm") else None,
            }
            passes = 3 if case.form == "P" else 2
            if case.kind == "forward" and times["median"] is not None:
                row["bytes"] = passes * case.stream_bytes
                row["bytes_a_second"] = 1e6 * passes * case.stream_bytes / times["median"]
            found.append(row)
    finally:
        torch.set_float32_matmul_precision(before)
        use("auto")
    return found


# ------------------------------------------------------------------ other measurements


def ceilings(clock: Clock, scale: int) -> dict[str, float | None]:
    """Copy from memory and inside L2, and products, in bytes and flop a second."""
    found: dict[str, float | None] = {}

    def note(name: str, work: float, calls: list[Call], replays: int) -> None:
        median = clock.device_time(calls, replays)["median"]
        found[name] = None if median is None else 1e6 * work / median

    for name, size in (("copy", 4 << 30), ("copy in L2", 6 << 20)):
        a = torch.randn(size // scale // 4, device=clock.device)
        b = torch.empty_like(a)
        note(name, 2 * a.nbytes, [partial(b.copy_, a)], 10)
        del a, b
    n = 8192 // (64 if scale > 1 else 1)
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "high"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(n, n, device=clock.device, dtype=dtype) for _ in range(2))
        note(f"product {name}", 2 * n**3, [partial(torch.mm, a, b)], 5)
        torch.set_float32_matmul_precision(before)
    return found


def grouped(clock: Clock, args: argparse.Namespace) -> list[dict[str, Any]]:
    """T adapters on T chunks (form P, rank 64): loops of eager and of ours, one grouped call; and
    the first adapted layer, where all adapters read one x."""
    found = []
    models, batches, groups = (("Ti", "B"), (1, 8, 64), (2, 10, 20))
    if not clock.cuda:
        models, batches, groups = ("Ti",), (1,), (2,)
    for model, batch, t in product(models, batches, groups):
        if clock.left() < 60:
            break
        case = Case("forward", model, batch, 64, "P", "bf16")
        modules = [inputs(case, clock.device, 0).module for _ in range(t)]
        stack = partial(_stacked, modules)
        weights = {n: stack(n) for n in ("down.weight", "up.weight", "down.bias", "up.bias")}
        sets = min(8, clock.sets(3 * t * case.stream_bytes)) if clock.cuda else 1
        shape = (sets, t, batch, args.rows or TOKENS, case.width)
        x, base = (torch.randn(shape, device=clock.device, dtype=torch.bfloat16) for _ in range(2))

        def loop(
            function: Any, n: int, modules: Any = modules, x: Tensor = x, base: Tensor = base
        ) -> list[Tensor]:
            with torch.no_grad():
                pairs = zip(modules, x[n], base[n], strict=True)
                return [function(m, *chunk) for m, *chunk in pairs]

        def together(
            shared: bool, n: int, w: Any = weights, x: Tensor = x, base: Tensor = base
        ) -> list[Tensor]:
            with torch.no_grad():
                y = adapter(
                    x[n, :1].expand(x[n].shape) if shared else x[n],
                    w["down.weight"],
                    w["up.weight"],
                    down_bias=w["down.bias"],
                    up_bias=w["up.bias"],
                    act="relu",
                    scale=SCALE,
                    base=base[n],
                    add_input=True,
                )
            return list(y)

        expected: list[Tensor] | None = None
        for name, backend, function in (
            ("looped eager", "auto", partial(loop, eager)),
            ("looped ours", "triton", partial(loop, fused)),
            ("grouped ours", "triton", partial(together, False)),
            ("grouped ours, one x", "triton", partial(together, True)),
        ):
            use(backend)
            result = function(0)
            if expected is None:
                expected = [y.double() for y in result]
            elif "one x" not in name and not largest_error(result, expected) <= 1e-2:
                found.append(
                    {**case._asdict(), "groups": t, "contender": name, "failed": "differs"}
                )
                continue
            calls = [partial(function, n) for n in range(sets)]
            times = clock.device_time(calls, 20)
            found.append(
                {
                    **case._asdict(),
                    "groups": t,
                    "contender": name,
                    **{f"device_us_{key}": value for key, value in times.items()},
                    "wall_us": clock.wall_time(calls[0], wait=True, count=30),
                }
            )
        use("auto")
    return found


def _stacked(modules: list[Bottleneck], name: str) -> Tensor:
    return torch.stack([m.get_parameter(name).detach() for m in modules])


def memory(clock: Clock, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Bytes in units of u: transient peak of forward and of a training step above inputs, and what
    autograd keeps beyond inputs and weights."""
    found = []
    model = "B" if clock.cuda else "Ti"
    for kind, rank, learnt, name in product(
        ("forward", "train"), (16, 64), (False, True), ("eager", "addmm", "ours")
    ):
        case = Case(kind, model, 64 if clock.cuda else 1, rank, "P", "bf16", learnt)
        use({"eager": "auto", "addmm": "reference", "ours": "triton"}[name])
        function = eager if name == "eager" else fused
        data = inputs(case, clock.device, 1, args.rows)
        step(case, function, data, 0)
        row: dict[str, Any] = {**case._asdict(), "contender": name}
        if clock.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            step(case, function, data, 0)
            row["peak_u"] = (torch.cuda.max_memory_allocated() - held) / case.stream_bytes
        if kind == "train":
            given = {t.untyped_storage().data_ptr() for t in leaves(data, 0)}
            kept: dict[int, int] = {}

            def note(
                tensor: Tensor, given: set[int] = given, kept: dict[int, int] = kept
            ) -> Tensor:
                place = tensor.untyped_storage().data_ptr()
                if place not in given:
                    kept[place] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                y = function(data.module, data.x[0], data.base[0])
            row["saved_bytes"] = sum(kept.values())
            row["saved_u"] = row["saved_bytes"] / y.nbytes
        found.append(row)
    use("auto")
    return found


def host(clock: Clock, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds of the host until a call is queued, at batch 1."""
    found = []
    for kind, name in product(("forward", "train"), ("eager", "addmm", "ours")):
        case = Case(kind, "Ti", 1, 16, "P", "bf16")
        use({"eager": "auto", "addmm": "reference", "ours": "triton"}[name])
        data = inputs(case, clock.device, 1, args.rows)
        call = partial(step, case, eager if name == "eager" else fused, data, 0)
        # few calls: a full queue of launches would make the host wait
        samples = [clock.wall_time(call, wait=False, count=25) for _ in range(9)]
        times = [s for s in samples if s is not None]
        median = statistics.median(times) if times else None
        found.append({**case._asdict(), "contender": name, "host_us": median})
    use("auto")
    return found


def peft_linears(clock: Clock, args: argparse.Namespace) -> list[dict[str, Any]]:
    """LoRA and DoRA on a linear layer of ViT-B: PEFT against `base + kernel`, in evaluation."""
    try:
        import peft
    except ImportError:
        return [{"skipped": "PEFT is not installed"}]
    width, found = (768 if clock.cuda else 24), []
    rows = 64 * TOKENS if clock.cuda else 8
    for dora, rank in product((False, True), (16, 64)):
        config = peft.LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["0"], use_dora=dora, lora_dropout=0.0
        )
        plain = nn.Sequential(nn.Linear(width, width, bias=False))
        model = peft.get_peft_model(plain, config).to(clock.device, torch.bfloat16).eval()  # pyrefly: ignore
        layer: Any = model.get_submodule("base_model.model.0")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        nn.init.normal_(b, std=rank**-0.5)
        weight, scale = layer.base_layer.weight.detach(), float(layer.scaling["default"])
        gamma = None
        if dora:
            norm = (weight.double() + scale * b.double() @ a.double()).norm(dim=1)
            magnitude = layer.lora_magnitude_vector["default"].weight
            gamma = (magnitude.double() / norm).detach().float()
        sets = clock.sets(2 * rows * width * 2) if clock.cuda else 1
        xs = [torch.randn(1, rows, width, device=clock.device, dtype=torch.bfloat16) for _ in range(sets)]  # fmt: skip # noqa: E501

        def ours(x: Tensor, w: Tensor = weight, a: Tensor = a, b: Tensor = b, s: float = scale,
            gamma: Tensor | None = gamma,
        ) -> Tensor:  # fmt: skip
            return adapter(x, a, b, base=F.linear(x, w), scale=s, column_scale=gamma, in_place=True)

        with torch.no_grad():
            use("triton")
            error = largest_error([ours(xs[0])], [layer(xs[0]).double()])
            if not error <= 2e-2:
                found.append({"dora": dora, "rank": rank, "failed": f"{error:.2e} off PEFT"})
                continue
            for name, function in (("peft", layer), ("ours", ours)):
                times = clock.device_time([_no_grad(function, x) for x in xs])
                found.append(
                    {
                        "dora": dora,
                        "rank": rank,
                        "contender": name,
                        "error_to_peft": error,
                        **{f"device_us_{key}": value for key, value in times.items()},
                        "wall_us": clock.wall_time(_no_grad(function, xs[0]), wait=True),
                    }
                )
        use("auto")
    return found


def _no_grad(function: Any, x: Tensor) -> Call:
    return torch.no_grad()(partial(function, x))


def clocks() -> str | None:
    """Clock rates, temperature and power as `nvidia-smi` has them now."""
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


# ------------------------------------------------------------------ tile sizes


BUCKET_ROWS = {"2k": 8 * TOKENS, "16k": 64 * TOKENS, "more": 256 * TOKENS}


def tuning_keys() -> list[dict[str, Any]]:
    """What the sweep measures: bf16, four widths, two ranks."""
    keys = []
    for kernel, width, rank, bucket in product(
        tuning.KERNELS, WIDTHS.values(), (16, 64), tuning.BUCKETS
    ):
        for form in ("S", "P") if kernel == "forward" else ("S",):
            keys.append(
                {
                    "kernel": kernel,
                    "width": width,
                    "rank": rank,
                    "dtype": "bf16",
                    "bucket": bucket,
                    "form": form,
                }
            )
    return keys


def configurations(kernel: str, width: int) -> list[tuning.Config]:
    found = [
        tuning.Config(rows, 64, warps, stages)
        for rows, warps, stages in product((32, 64, 128), (4, 8), (2, 3, 4))
    ]
    if kernel == "forward" and width <= 768:
        found += [tuning.Config(r, 64, w, 2, True) for r, w in product((32, 64, 128), (4, 8))]
    return found


def tuned_call(key: dict[str, Any], config: tuning.Config, data: Inputs, number: int) -> Any:
    """The kernel of a key with given tile sizes; a backward kernel runs with its neighbours."""
    from driftline.kernels import triton_adapter

    m, x, base = data.module, data.x[number], data.base[number]
    weights = (m.down.weight, m.up.weight, m.down.bias, m.up.bias)
    operands: list[Any] = [
        *(
            x.detach().view(1, -1, x.shape[-1]),
            None if base is None else base.view(1, -1, x.shape[-1]),
        ),
        *(w.detach()[None] for w in weights),
        *(scale_tensor(x.device), None, None, None, None, None),
    ]
    settings: dict[str, Any] = {"act": "relu", "add_input": True, "compute_dtype": data.low}
    if key["kernel"] == "forward":
        return triton_adapter.forward(*operands, **settings, config=config)
    name = "row_config" if key["kernel"] == "backward_rows" else "weight_config"
    needs = {"x", "down", "up", "down_bias", "up_bias"}
    g = data.g[number].view(operands[0].shape)
    settings[name] = config
    return triton_adapter.backward(g, *operands, needs=needs, **settings)


def _key_inputs(key: dict[str, Any], device: torch.device, batch: int, sets: int) -> Inputs:
    model = next(name for name, width in WIDTHS.items() if width == key["width"])
    kind = "forward" if key["kernel"] == "forward" else "train"
    case = Case(kind, model, batch, key["rank"], key["form"], "bf16")
    with torch.no_grad():
        data = inputs(case, device, sets)
    for tensor in (*data.x, *data.base, *data.module.parameters()):
        if tensor is not None:
            tensor.requires_grad_(False)
    return data


def compile_key(key: dict[str, Any], configs: list[tuning.Config]) -> None:
    """In a process of its own: fills Triton's cache on disk for one key."""
    data = _key_inputs(key, torch.device("cuda"), BUCKET_ROWS[key["bucket"]] // TOKENS, 1)
    for config in configs:
        try:
            tuned_call(key, config, data, 0)
        except Exception as error:  # too much shared memory: the sweep leaves it out
            print(f"{key} {config}: {error}", file=sys.stderr)
    torch.cuda.synchronize()


def tune(clock: Clock, out: Path | None) -> None:
    """Measures every key and puts the fastest tile sizes into the table `out`."""
    keys = tuning_keys()
    if clock.cuda:
        workers = max(1, min(8, (os.cpu_count() or 2) // 2))
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            list(
                pool.map(compile_key, keys, [configurations(k["kernel"], k["width"]) for k in keys])
            )
    else:
        keys = keys[:1] + keys[-1:]
    measured = []
    for key in keys:
        batch = BUCKET_ROWS[key["bucket"]] // TOKENS if clock.cuda else 1
        tensors = 3 if key["kernel"] == "forward" else 4
        sets = clock.sets(tensors * batch * TOKENS * key["width"] * 2) if clock.cuda else 1
        data = _key_inputs(key, clock.device, batch, min(sets, 32))
        results = []
        configs = configurations(key["kernel"], key["width"])
        for config in configs if clock.cuda else configs[:1]:
            calls = [partial(tuned_call, key, config, data, n) for n in range(len(data.x))]
            try:
                times = clock.device_time(calls, 15)
            except Exception as error:  # does not fit the device
                print(f"left out: {config} for {key}: {str(error).splitlines()[0]}")
                continue
            results.append((times["median"] or 0.0, config))
        best, config = min(results)
        source = (
            f"measured on {torch.cuda.get_device_name(clock.device)}" if clock.cuda else "dry run"
        )
        measured.append({**key, **config._asdict(), "source": source, "us": round(best, 2)})
        print(f"{key}: {config} {best:.1f} us", flush=True)
    names = ("kernel", "width", "rank", "dtype", "bucket", "form")
    fresh = {tuple(e[n] for n in names) for e in measured}
    kept = [e for e in tuning.entries() if tuple(e[n] for n in names) not in fresh]
    lines = ",\n".join("  " + json.dumps(e) for e in [*measured, *kept])
    device = torch.cuda.get_device_name(clock.device) if clock.cuda else None
    head = f' "device": {json.dumps(device)},\n "entries": [\n'
    if out is not None:
        write_text(out, "{\n" + head + lines + "\n ]\n}\n")
    print(f"written: {out}" if out else "dry run: nothing written")


# ------------------------------------------------------------------ script


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def report(rows: list[dict[str, Any]], copy: float | None) -> None:
    """Prints one line for every row, with the ratio to eager."""
    eager_time = rows[0]["device_us_median"]
    for row in rows:
        median = row.get("device_us_median")
        if "failed" in row:
            text = f"FAILED: {row['failed']} float64"
        elif median is None:
            text = "dry run"
        else:
            text = f"{median:9.1f} us  {eager_time / median:5.2f}x  wall {row['wall_us']:7.1f} us"
            if copy and "bytes_a_second" in row:
                row["of_copy"] = row["bytes_a_second"] / copy
                text += f"  {100 * row['of_copy']:3.0f}% of copy"
        shape = " ".join(str(row[n]) for n in ("kind", "model", "batch", "rank", "form", "dtype"))
        print(
            f"{shape:32} {'learnt' if row['learnt'] else '':7}{row['contender']:22} {text}",
            flush=True,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this part, for the parser of `bench_kernels.py`."""
    add = parser.add_argument_group("on a GPU").add_argument
    add("--tune", action="store_true", help="measure tile sizes and write kernels/tuning.json")
    add("--tuning-out", type=Path, help="where --tune writes")
    add("--dry-run", action="store_true", help="every step on tiny CPU tensors, without times")
    add("--predict", action="store_true", help="print the model's table; nothing is measured")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--budget", type=float, default=BUDGET, help="after these, cases are left out")


def main(args: argparse.Namespace) -> None:
    """Runs what `args` (of `add_arguments`, and `out`) ask for."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = argparse.Namespace(**{**vars(parser.parse_args([])), "out": None, **vars(args)})
    if args.predict:
        print_predictions()
        return
    if args.dry_run and not _interpreting():
        options = ["--dry-run", *(["--tune"] if args.tune else [])]
        command = [sys.executable, "-W", "ignore", __file__, *options]
        subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
        return
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: use --dry-run or --predict")
    device = torch.device("cpu" if args.dry_run else "cuda")
    clock = Clock(device, args.budget)
    args.rows = 5 if args.dry_run else None
    if args.dry_run:
        WIDTHS.update({name: 24 for name in WIDTHS})
    torch.manual_seed(0)
    if args.tune:
        tune(clock, None if args.dry_run else args.tuning_out or tuning.TABLE)
        return
    run(clock, args)


def _interpreting() -> bool:
    from driftline.kernels import dispatch

    return dispatch.interpreted()


def run(clock: Clock, args: argparse.Namespace) -> None:
    """Everything but the tuning; writes results/kernels/<device>.json."""
    start = clocks()
    found: dict[str, Any] = {
        "environment": environment(clock.device),
        "triton": __import__("triton").__version__,
        "clocks": [start],
        "dry_run": args.dry_run,
        "skipped": [],
        "ceilings": ceilings(clock, 1 if clock.cuda else 1 << 16),
    }
    copy = found["ceilings"]["copy"]
    print({k: v and f"{v:.3g}" for k, v in found["ceilings"].items()})
    found["host"] = host(clock, args)
    found["memory"] = memory(clock, args)
    found["linears"] = peft_linears(clock, args)
    found["grouped"] = grouped(clock, args)
    todo = cases()
    if not clock.cuda:  # one of each kind, dtype and form
        wanted = {(c.kind, c.dtype, c.form, c.learnt): c for c in todo}
        todo = [c._replace(model="Ti", batch=1) for c in wanted.values()]
        args.no_compile = True
    found["cases"] = []
    for case in todo:
        if clock.left() < 20:
            found["skipped"].append({**case._asdict(), "why": "time budget"})
            continue
        rows = bench(case, clock, args, warm=False)
        report(rows, copy)
        found["cases"] += rows
        if (case.model, case.batch, case.rank, case.learnt) == ("B", 64, 64, False):
            found["cases"] += bench(case, clock, args, warm=True)
        if clock.cuda:
            torch.cuda.empty_cache()
    found["clocks"].append(clocks())
    failed = [r for part in ("cases", "grouped", "linears") for r in found[part] if "failed" in r]
    if args.dry_run:
        json.dumps(found, default=str)
        print(f"dry run: {len(found['cases'])} rows, nothing written, no times")
        if failed:
            raise SystemExit(f"wrong results: {failed}")
        return
    name = slug(torch.cuda.get_device_name(clock.device))
    out = args.out or ROOT / "results" / "kernels" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found)
    seconds = args.budget - clock.left()
    print(f"written: {out} ({seconds:.0f} s, {len(found['skipped'])} cases skipped)")
    if failed:
        raise SystemExit(f"wrong results, not timed: {failed}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--out", type=Path, help="default: results/kernels/<device>.json")
    main(parser.parse_args())
