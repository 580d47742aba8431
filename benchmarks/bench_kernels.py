"""The fused adapter against the plain module of EASE and MOS, in one process and interleaved.

    python benchmarks/bench_kernels.py --device cpu          # writes results/kernels/<machine>.json

On a CPU: d in {192, 384, 768}, r in {16, 64}, B in {1, 8, 32} images of 197 tokens, float32.

* forward: no gradients; `S` is x + s A(x), `P` is x + base + s A(x), where base is a temporary that
  may be overwritten (the output of the MLP beside the adapter);
* train: forward and backward to x, base and all parameters, with a constant or a learnt s;
* grouped: ten adapters on ten chunks in one call, against a loop of plain calls.

Every case is first compared with the formula in float64 (limit 1e-6 of the norm; for a learnt s,
whose gradient can cancel, of the sum of the magnitudes of its terms). Then both sides take turns; a
sample repeats a call until it takes a few milliseconds. With one thread the time is that of the
thread on the CPU, which other load does not enter; with more it is wall-clock time. Ratios are
those of medians; those of lower deciles stand beside them.

On a GPU the cases are those of `benchmarks/bench_kernels_gpu.py`.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from driftline.core.files import write_json
from driftline.core.record import cpu_name, environment
from driftline.kernels import adapter, chosen
from driftline.kernels.reference import formula

ROOT = Path(__file__).parents[1]

CPU = torch.device("cpu")
TOKENS, GROUPS, SCALE, LIMIT = 197, 10, 0.1, 1e-6
WIDTHS, RANKS, BATCHES = (192, 384, 768), (16, 64), (1, 8, 32)
GROUPED_BATCHES = (1, 8)  # ten chunks of 32 images would be a tensor of 194 MB


class Plain(nn.Module):
    """Linear, ReLU, linear, times a scale; the caller adds the residuals."""

    def __init__(self, dim: int, rank: int, learnt: bool) -> None:
        super().__init__()
        self.down, self.up, self.act = nn.Linear(dim, rank), nn.Linear(rank, dim), nn.ReLU()
        self.scale = nn.Parameter(torch.full((), SCALE)) if learnt else SCALE

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.act(self.down(x))) * self.scale

    def tensors(self) -> tuple[Tensor, ...]:
        """down, up and their biases."""
        return self.down.weight, self.up.weight, self.down.bias, self.up.bias


class Case(NamedTuple):
    kind: str  # forward, train, grouped
    form: str  # S or P
    scale: str  # constant or learnt
    dim: int
    rank: int
    batch: int


def cases() -> list[Case]:
    """Small ones first."""
    found = []
    for batch, dim, rank in product(BATCHES, WIDTHS, RANKS):
        for form in "SP":
            found.append(Case("forward", form, "constant", dim, rank, batch))
            found += [Case("train", form, s, dim, rank, batch) for s in ("constant", "learnt")]
            if batch in GROUPED_BATCHES:
                found.append(Case("grouped", form, "constant", dim, rank, batch))
    return found


# ------------------------------------------------------------------ the two sides of a case


Call = Callable[[], Any]
Truth = list[tuple[Tensor, Tensor]]  # result, and the size that errors are relative to


def sides(case: Case) -> tuple[Call, Call, Call]:
    """Plain and ours, which return lists of tensors, and the float64 formula (`Truth`)."""
    torch.manual_seed(0)
    groups = GROUPS if case.kind == "grouped" else 1
    modules = [Plain(case.dim, case.rank, case.scale == "learnt") for _ in range(groups)]
    x = torch.randn(groups, case.batch, TOKENS, case.dim)
    base = torch.randn(x.shape) if case.form == "P" else None
    if case.kind == "train":
        return _train(case, modules[0], x[0], None if base is None else base[0])
    return _forward(case, modules, x, base)


def _sum(module: Plain, x: Tensor, base: Tensor | None) -> Tensor:
    return x + module(x) if base is None else x + base + module(x)


def _forward(
    case: Case, modules: list[Plain], x: Tensor, base: Tensor | None
) -> tuple[Call, Call, Call]:
    grouped = case.kind == "grouped"
    chunks = [(m, x[t], None if base is None else base[t]) for t, m in enumerate(modules)]
    stacked = [torch.stack(t).detach() for t in zip(*(m.tensors() for m in modules), strict=True)]
    x, base = (x, base) if grouped else (x[0], None if base is None else base[0])
    down, up, down_bias, up_bias = stacked if grouped else modules[0].tensors()
    wide = [t.double() if t is not None else None for t in (x, base, down, up, down_bias, up_bias)]

    @torch.no_grad()
    def plain() -> list[Tensor]:
        return [_sum(*chunk) for chunk in chunks]

    @torch.no_grad()
    def ours() -> list[Tensor]:
        y = adapter(
            x,
            down,
            up,
            down_bias=down_bias,
            up_bias=up_bias,
            act="relu",
            scale=SCALE,
            base=base,
            add_input=True,
            in_place=True,
        )
        return [y]

    @torch.no_grad()
    def truth() -> Truth:
        y = formula(*wide, SCALE, act="relu", add_input=True)  # pyrefly: ignore
        return [(y, y.norm())]

    return plain, ours, truth


def _train(case: Case, module: Plain, x: Tensor, base: Tensor | None) -> tuple[Call, Call, Call]:
    down, up, down_bias, up_bias = module.tensors()
    g = torch.randn(x.shape)
    inputs = [x] if base is None else [x, base]
    inputs = [*(t.requires_grad_() for t in inputs), *module.parameters()]

    def plain() -> list[Tensor]:
        y = _sum(module, x, base)
        return [y, *torch.autograd.grad(y, inputs, g)]

    def ours() -> list[Tensor]:
        y = adapter(
            x,
            down,
            up,
            down_bias=down_bias,
            up_bias=up_bias,
            act="relu",
            scale=module.scale,
            base=base,
            add_input=True,
        )
        return [y, *torch.autograd.grad(y, inputs, g)]

    def truth() -> Truth:
        wide = {id(t): t.detach().double().requires_grad_() for t in inputs}
        named = (x, base, down, up, down_bias, up_bias, module.scale)
        y = formula(*(wide.get(id(t), t) for t in named), act="relu", add_input=True)  # pyrefly: ignore
        found = [y, *torch.autograd.grad(y, [*wide.values()], g.double())]
        added = y - sum(wide[id(t)] for t in (x, base) if t is not None)
        sizes = [t.norm() for t in found]
        if case.scale == "learnt":
            at = [t is module.scale for t in inputs].index(True) + 1
            sizes[at] = (g * added / SCALE).abs().sum()
        return list(zip(found, sizes, strict=True))

    return plain, ours, truth


def largest_error(found: list[Tensor], truth: Truth) -> float:
    """Largest `||a - b|| / size` over the results; chunks are put together first."""
    if len(found) != len(truth):
        found = [torch.stack(found)]
    pairs = zip(found, truth, strict=True)
    errors = [float((a.double() - b).detach().norm() / size.detach()) for a, (b, size) in pairs]
    if any(math.isnan(error) for error in errors):
        raise ValueError(f"a result is not a number: {errors}")
    return max(errors)


# ------------------------------------------------------------------ measurements


def compare(case: Case, seconds: float, clock: Callable[[], float]) -> dict[str, Any]:
    """Times of both sides of a case, after its results were checked."""
    plain, ours, truth = sides(case)
    if case.kind != "train" and case.form == "P":  # base is overwritten: the truth comes first
        expected, first, second = truth(), plain(), ours()
    else:
        first, second, expected = plain(), ours(), truth()
    errors = [largest_error(r, expected) for r in (first, second)]
    if max(errors) > LIMIT:
        raise ValueError(f"{case}: relative errors {errors} to float64, the limit is {LIMIT}")
    del first, second, expected

    once = min(_time(plain, 1, clock) for _ in range(3))
    repeats = max(1, round(0.004 / once))
    rounds = int(min(60, max(9, seconds / (1.7 * once * repeats))))
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for side in (0, 1) if turn % 2 else (1, 0):
            times[side].append(_time((plain, ours)[side], repeats, clock))
    medians = [statistics.median(t) for t in times]
    deciles = [sorted(t)[len(t) // 10] for t in times]
    return {
        **case._asdict(),
        "plain_us": 1e6 * medians[0],
        "ours_us": 1e6 * medians[1],
        "ratio": medians[0] / medians[1],
        "ratio_lower_decile": deciles[0] / deciles[1],
        "error_plain": errors[0],
        "error_ours": errors[1],
        "samples": rounds,
        "calls_a_sample": repeats,
    }


def _time(call: Call, repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean and minimum of the ratios, by kind and form of case."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for name in (row["kind"], f"{row['kind']} {row['form']} {row['scale']}"):
            groups.setdefault(name, []).append(row)
    return [
        {
            "cases": name,
            "count": len(members),
            "geometric_mean": statistics.geometric_mean(r["ratio"] for r in members),
            "minimum": min(r["ratio"] for r in members),
            "geometric_mean_lower_decile": statistics.geometric_mean(
                r["ratio_lower_decile"] for r in members
            ),
            "minimum_lower_decile": min(r["ratio_lower_decile"] for r in members),
        }
        for name, members in sorted(groups.items())
    ]


def slug(name: str, threads: int) -> str:
    """A file name: `intel-r-xeon-r-processor-1t`."""
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {threads}t".lower()).strip("-")


def run_cpu(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    name, load = cpu_name(), os.getloadavg()[0]
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    rows = []
    print(f"{name}, {args.threads} thread(s), torch {torch.__version__}")
    print("kind     form scale     d    r   B    plain us     ours us  ratio  p10")
    for case in cases():
        if args.only and case.kind not in args.only:
            continue
        row = compare(case, args.seconds, clock)
        rows.append(row)
        print(
            f"{case.kind:8} {case.form:4} {case.scale:8} {case.dim:4} {case.rank:4} "
            f"{case.batch:3} {row['plain_us']:11.0f} {row['ours_us']:11.0f} "
            f"{row['ratio']:6.2f} {row['ratio_lower_decile']:5.2f}",
            flush=True,
        )
    found = summary(rows)
    print("\ncases                      n   geo mean   min   (lower decile: geo mean, min)")
    for s in found:
        print(
            f"{s['cases']:24} {s['count']:3} {s['geometric_mean']:10.2f} {s['minimum']:5.2f}"
            f" {s['geometric_mean_lower_decile']:18.2f} {s['minimum_lower_decile']:5.2f}"
        )
    out = args.out or ROOT / "results" / "kernels" / f"{slug(name, args.threads)}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        out,
        {
            "machine": name,
            "threads": args.threads,
            "time": "CPU time of the thread" if args.threads == 1 else "wall clock",
            "environment": environment(CPU),
            "load": [load, os.getloadavg()[0]],
            "backend": chosen(),
            "summary": found,
            "cases": rows,
        },
    )
    print(f"written: {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=1, help="on a CPU")
    add("--seconds", type=float, default=0.8, help="about as long a case is measured, on a CPU")
    add("--only", nargs="+", choices=("forward", "train", "grouped"), help="on a CPU")
    add("--out", type=Path, help="default: results/kernels/<machine>.json")
    if parser.parse_known_args()[0].device == "cpu":
        run_cpu(parser.parse_args())
    else:
        from benchmarks import bench_kernels_gpu  # imports Triton

        bench_kernels_gpu.add_arguments(parser)
        bench_kernels_gpu.main(parser.parse_args())


if __name__ == "__main__":
    main()
