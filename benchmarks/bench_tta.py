r"""CoTTA, ViDA and the runner against plain transcriptions, in one process and interleaved.

    python benchmarks/bench_tta.py --checkpoint lite0.safetensors \
        --out results/reference/bench_tta.md

Every side starts from the same weights and random state and sees the same batches, one side after
the other, in turns; the first batch is not timed. `plain` does the steps of the method one by one
(each view alone through torchvision's transforms, per-tensor average and restoration, graphs where
the official code has them) in the default memory format. `ours` is this repository's method,
`ours, channels-last` the same with `channels_last=true`. The largest difference is that of the
scores over all batches, relative to the largest score; random weights make it grow faster than
trained ones do. Peak memory is measured in one process per side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

import driftline.core.vision  # noqa: F401  # isort: skip
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transform

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.checkpoint import Checkpointer, Signals
from driftline.core.console import Console
from driftline.core.cost import peak_memory_mb, reset_peak_memory
from driftline.core.files import write_json, write_text
from driftline.core.record import RunLogger, environment
from driftline.core.runner import Context, run_shifts
from driftline.core.stream import Batch, Segment, ShiftStream, Skipped
from driftline.parts import views
from driftline.parts.adapters.dual_rank import DualRank
from driftline.parts.norms import collect_parameters, use_batch_statistics
from driftline.runs.library import settings
from driftline.tta.vida import NAME, adapters

ROOT = Path(__file__).parents[1]

CPU = torch.device("cpu")
Adapt = Callable[[Tensor], Tensor]


# ------------------------------------------------------------------ transcriptions


def plain_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """One view of the batch by torchvision's transforms on the padded canvas."""
    draws = views.draw(generator, x.shape)
    height, width = x.shape[-2:]
    out = x.clamp(0, 1)
    for name, factor in draws.colour:
        out = out.clamp(1e-8, 1) if name == "gamma" else out
        out = getattr(transform, f"adjust_{name}")(out, factor)
    out = transform.pad(out, [width // 2, height // 2], padding_mode="edge")
    out = transform.affine(
        out,
        draws.angle,
        list(draws.shift),
        draws.scale,
        [0.0, 0.0],
        interpolation=InterpolationMode.BILINEAR,
        fill=[0.0] * 3,
    )
    out = transform.gaussian_blur(out, [5, 5], [draws.sigma, draws.sigma])
    out = transform.center_crop(out, [height, width])
    out = transform.hflip(out) if draws.flip else out
    return (out + draws.noise.to(out) * views.NOISE_STD).clamp(0, 1)


def symmetric_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean of both directions of the cross-entropy, both [B, C]."""
    forward = -(target.softmax(1) * logits.log_softmax(1)).sum(1)
    backward = -(logits.softmax(1) * target.log_softmax(1)).sum(1)
    return (0.5 * forward + 0.5 * backward).mean()


class PlainCoTTA:
    """The ImageNet recipe, step by step; the anchor runs with a graph as in the official code."""

    def __init__(self, backbone: Backbone, rng: torch.Generator, views: int, threshold: float):
        self.rng, self.views, self.threshold = rng, views, threshold
        self.student = backbone.train()
        self.student.requires_grad_(True)
        use_batch_statistics(self.student.net)
        self.source = deepcopy(self.student.state_dict())
        self.teacher, self.anchor = deepcopy(self.student), deepcopy(self.student)
        for parameter in self.teacher.parameters():
            parameter.detach_()
        self.names = {f"net.{name}" for name in collect_parameters(self.student.net)}
        named = self.student.named_parameters()
        chosen = [parameter for name, parameter in named if name in self.names]
        self.optimizer = torch.optim.SGD(chosen, lr=0.01, momentum=0.9, nesterov=True)

    def adapt(self, x: Tensor) -> Tensor:
        scores = self.student(x)
        confidence = self.anchor(x).softmax(1).amax(1)
        target = self.teacher(x)
        if confidence.mean() < self.threshold:
            views = [self.teacher(plain_view(x, self.rng)) for _ in range(self.views)]
            target = torch.stack(views).mean(0)
        symmetric_loss(scores, target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for old, new in pairs:
            old.data[:] = 0.999 * old.data + (1 - 0.999) * new.data
        for name, parameter in self.student.named_parameters():
            if name in self.names:
                mask = (torch.rand(parameter.shape, generator=self.rng) < 0.001).float()
                with torch.no_grad():
                    parameter.data = self.source[name] * mask + parameter * (1 - mask)
        return target


class PlainAdapted(nn.Module):
    """A linear layer beside two bottlenecks, each on its own."""

    def __init__(self, linear: nn.Linear, adapter: DualRank) -> None:
        super().__init__()
        self.linear = linear
        for name, pairs in (("vida_down", adapter.down), ("vida_up", adapter.up)):
            setattr(self, name, nn.ParameterList(p.detach().clone() for p in pairs))
        self.scales = [1.0, 1.0]

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        for scale, down, up in zip(self.scales, self.vida_down, self.vida_up, strict=True):
            out = out + scale * F.linear(F.linear(x, down), up)
        return out


def plainly_adapted(network: nn.Module) -> list[PlainAdapted]:
    return [m for m in network.modules() if isinstance(m, PlainAdapted)]


class PlainViDA:
    """The ImageNet recipe (no restoration), with adapters as modules in the network."""

    def __init__(self, backbone: Backbone, made: dict[str, Any], rng: torch.Generator, views: int):
        self.rng, self.views = rng, views
        for point, one in made.items():
            path = point.removesuffix(":out")
            layer = PlainAdapted(backbone.net.get_submodule(path), one)
            backbone.net.set_submodule(path, layer)
        self.student = backbone.requires_grad_(True)
        self.teacher, self.anchor = deepcopy(backbone), deepcopy(backbone)  # the anchor is unused
        self.source = deepcopy(backbone.state_dict())
        groups: list[dict[str, Any]] = [
            {"params": [], "lr": 5e-7},
            {"params": [], "lr": 2e-7},
        ]
        for parameter in self.teacher.parameters():
            parameter.detach_()
        for name, parameter in self.student.named_parameters():
            groups["vida_" in name]["params"].append(parameter)
        self.optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)

    def adapt(self, x: Tensor) -> Tensor:
        views = [self.teacher(plain_view(x, self.rng)) for _ in range(self.views)]
        spread = 0.1 * float(torch.stack(views).var(0).mean())
        for layer in (*plainly_adapted(self.student), *plainly_adapted(self.teacher)):
            layer.scales[0] = 1 - spread if spread >= 0.2 else 1 + spread
        target = self.teacher(x)
        symmetric_loss(self.student(x), target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        teacher = dict(self.teacher.named_parameters())
        for name, new in self.student.named_parameters():
            share = 0.8 if "vida_" in name else 0.999
            teacher[name].data[:] = share * teacher[name].data + (1 - share) * new.data
        return target


# ------------------------------------------------------------------ the two sides of a case


class Side(NamedTuple):
    name: str
    adapt: Adapt


def load(name: str, checkpoint: str | None) -> Backbone:
    """A configured backbone, or a timm network by its full tag; random weights without a file."""
    path = ROOT / "conf" / "backbone" / f"{name}.yaml"
    node = OmegaConf.load(path if path.exists() else path.with_name("timm.yaml"))
    if not path.exists():
        node = OmegaConf.merge(node, {"tag": name})
    node = OmegaConf.merge(node, {"checkpoint": checkpoint or "random"})
    return build(node, at="backbone")  # pyrefly: ignore


def method(name: str, backbone: Backbone, **options: Any) -> Any:
    """A method of this repository in its default configuration but for `options`."""
    node = settings(name, **options)
    made = build(node, at="strategy", backbone=backbone, seed=0)  # pyrefly: ignore
    made.begin_stream()
    return made


def same_random(ours: Any) -> torch.Generator:
    """A generator in the state that `ours` starts from."""
    rng = torch.Generator()
    rng.set_state(ours.rng("method").get_state())
    return rng


def cotta(backbone: Backbone, which: str, views: int, threshold: float) -> Adapt:
    """`which`: "plain", "ours", "ours, channels-last" or "plain, channels-last"."""
    if "channels-last" in which:
        backbone.to(memory_format=torch.channels_last)
    if "ours" in which:
        return method("cotta", backbone, views=views, threshold=threshold).adapt
    rng = same_random(method("cotta", deepcopy(backbone)))
    return PlainCoTTA(backbone, rng, views, threshold).adapt


def vida(backbone: Backbone, which: str, views: int, chunk: int = 1) -> Adapt:
    """As `cotta`; a vision transformer has no use for channels-last."""
    plain = deepcopy(backbone)
    ours = method("vida", backbone, views=views, view_chunk=chunk)
    for number, one in enumerate(adapters(ours.bank)):  # zeros would hide the branches
        rng = torch.Generator().manual_seed(number)
        for up in one.up:
            up.data.normal_(std=0.02, generator=rng)
    ours.teacher_bank.load_state_dict(ours.bank.state_dict())
    ours.begin_stream()
    if "ours" in which:
        return ours.adapt
    return PlainViDA(plain, ours.bank.adapters(NAME), same_random(ours), views).adapt


class Case(NamedTuple):
    """What is compared: `make(backbone, side)` for every side, the first one being the plain."""

    name: str
    make: Callable[[Backbone, str], Adapt]
    backbone: str
    batch: int
    repeats: int
    sides: tuple[str, ...]


LITE, RESNET = "efficientnet_lite0_in1k", "resnet50_in1k"
VIT = "vit_small_patch16_224.augreg_in21k_ft_in1k"
FORMATS = ("plain", "ours", "ours, channels-last")


def cases(views: int) -> list[Case]:
    """Every case that compares two ways to adapt; thresholds of 2 and 0 force and forbid views."""
    on = partial(cotta, views=views, threshold=2.0)
    off = partial(cotta, views=1, threshold=0.0)
    return [
        Case("cotta_views", on, LITE, 8, 2, FORMATS),
        Case("cotta_views", on, RESNET, 16, 1, ("plain", "ours, channels-last")),
        Case("cotta_plain", off, LITE, 20, 3, FORMATS),
        Case("cotta_plain", off, RESNET, 16, 2, FORMATS),
        Case("vida", partial(vida, views=10), VIT, 4, 2, ("plain", "ours")),
    ]


# ------------------------------------------------------------------ measurements


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall-clock seconds, seconds of CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def image_batches(size: int, count: int, side: int) -> list[Tensor]:
    """Random images with the smooth structure of photographs, [size, 3, side, side] in [0, 1]."""
    g = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        x = torch.zeros(size, 3, side, side)
        for scale in (4, 16, 64):
            noise = torch.rand(size, 3, max(2, side // scale), max(2, side // scale), generator=g)
            x += F.interpolate(noise, (side, side), mode="bicubic") / 3
        batches.append(x.clamp(0, 1))
    return batches


def compare(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table, one a side."""
    start = load(case.backbone, args.checkpoint if case.backbone in (LITE, args.backbone) else None)
    sides = [Side(which, case.make(deepcopy(start), which)) for which in case.sides]
    repeats, size = args.repeats or case.repeats, args.batch or case.batch
    seconds: dict[str, list[tuple[float, float]]] = {s.name: [] for s in sides}
    apart = dict.fromkeys(seconds, 0.0)
    for turn, x in enumerate(image_batches(size, repeats + 1, start.input_size)):
        scores = {}
        if turn == 0 and "views" in case.name:  # a whole batch of 32 views is too long a warm-up
            for side in sides:
                side.adapt(x[:2])
            continue
        for side in sides if turn % 2 else reversed(sides):
            scores[side.name], *spent = timed(partial(side.adapt, x))
            if turn:
                seconds[side.name].append((spent[0], spent[1]))
        truth = scores[sides[0].name].detach()
        for key, value in scores.items():
            apart[key] = max(apart[key], float((value - truth).abs().max() / truth.abs().max()))
    median = {k: [statistics.median(t) for t in zip(*v, strict=True)] for k, v in seconds.items()}
    first = median[sides[0].name]
    return [
        {
            "case": case.name,
            "backbone": start.tag,
            "batch": size,
            "side": key,
            "repeats": repeats,
            "seconds": wall,
            "cpu_seconds": cpu,
            "times_as_fast": first[0] / wall,
            "times_as_fast_cpu": first[1] / cpu,
            "largest_difference": apart[key],
        }
        for key, (wall, cpu) in median.items()
    ]


def measure_peak(case: Case, side: str, args: argparse.Namespace) -> dict[str, float]:
    """Peak of this process over two batches with two views each."""
    start = load(case.backbone, args.checkpoint if case.backbone in (LITE, args.backbone) else None)
    before = peak_memory_mb(CPU)
    adapt = case.make(start, side)
    reset_peak_memory(CPU)
    for x in image_batches(args.batch or 20, 2, start.input_size):
        adapt(x)
    return {"peak_mb": peak_memory_mb(CPU), "before_mb": before}


def compare_memory(args: argparse.Namespace, backbone: str) -> list[dict[str, Any]]:
    """Rows of the memory table: one process a side, one at a time."""
    rows: list[dict[str, Any]] = []
    for side in FORMATS:
        command = [sys.executable, __file__, "--peak", side, "--backbone", backbone]
        command += ["--threads", str(args.threads), "--batch", str(args.batch or 20)]
        if args.checkpoint:
            command += ["--checkpoint", args.checkpoint]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        own = found["peak_mb"] - found["before_mb"]
        row = {"backbone": backbone, "batch": args.batch or 20, "side": side, **found}
        first = rows[0] if rows else row | {"own_mb": own}
        row |= {
            "own_mb": own,
            "saved": 1 - found["peak_mb"] / first["peak_mb"],
            "saved_own": 1 - own / first["own_mb"],
        }
        rows.append(row)
    return rows


def compare_runner(args: argparse.Namespace) -> dict[str, Any]:
    """`run_shifts` against the bare loop, which does each batch before or after the run does."""
    count, size = args.runner_batches, args.batch or 32
    g = torch.Generator().manual_seed(0)
    images = [torch.rand(size, 3, 32, 32, generator=g) for _ in range(20)]
    zeros, index = torch.zeros(size, dtype=torch.int64), torch.arange(size)
    node = OmegaConf.load(ROOT / "conf" / "backbone" / "embedded_resnet.yaml")
    backbone: Backbone = build(node, at="backbone")  # pyrefly: ignore
    bare, inside = (method("tent", deepcopy(backbone)) for _ in range(2))
    spent: list[tuple[float, float]] = []
    scores: list[Tensor] = []

    def batches(start: int = 0) -> Any:
        for i in range(start, count):
            x = images[i % len(images)]
            if i % 2:  # the second to work on a batch finds it in the cache
                yield Batch(x, zeros, index, zeros)
            last, *seconds = timed(partial(bare.adapt, x))
            spent.append((seconds[0], seconds[1]))
            scores.append(last)
            if not i % 2:
                yield Batch(x, zeros, index, zeros)

    stream = ShiftStream(
        name="bench",
        num_classes=backbone.num_classes,
        domains=("one",),
        segments=[Segment(0, "one", (0,), count * size, count, batches)],
        facts={},
        skipped=Skipped(),
    )
    with tempfile.TemporaryDirectory() as folder:
        log = RunLogger(Path(folder), "bench")
        context = Context(
            log, Checkpointer(log, Signals(), key="bench", every=100), Console("", True), CPU
        )
        result, wall, cpu = timed(lambda: run_shifts(inside, stream, context))
    loop_wall, loop_cpu = (sum(column) for column in zip(*spent, strict=True))
    steps = result["cost"]["seconds_total"]
    wrong = sum(int((s.argmax(1) != 0).sum()) for s in scores)
    return {
        "batches": count,
        "batch": size,
        "loop_seconds": loop_wall,
        "run_seconds": wall - loop_wall,
        "overhead": (wall - loop_wall) / loop_wall - 1,
        "overhead_cpu": (cpu - loop_cpu) / loop_cpu - 1,
        "outside_adapt": (wall - loop_wall - steps) / steps,
        "error_loop": 100 * wrong / (count * size),
        "error_run": result["metrics"]["err_mean"],
    }


# ------------------------------------------------------------------ report


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(r) + " |" for r in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]]) + "\n"


def report(found: dict[str, Any]) -> str:
    """The Markdown of everything that was measured."""
    about = found["environment"]
    load_before, load_after = found["load"]
    parts = [
        "# Speed and memory of the adaptation methods\n",
        f"{about['device']}, {about['threads']} thread(s), torch {about['packages']['torch']}, "
        f"load average {load_before:.1f} before and {load_after:.1f} after. Command:\n",
        f"```bash\n{found['command']}\n```\n",
    ]
    if found["speed"]:
        parts += [
            "Medians of seconds per batch. Weights `@random` are random ones.\n",
            markdown(
                [
                    "case",
                    "backbone",
                    "batch",
                    "side",
                    "n",
                    "s",
                    "CPU s",
                    "ratio",
                    "CPU ratio",
                    "max diff",
                ],
                [
                    [
                        r["case"],
                        f"`{r['backbone']}`",
                        str(r["batch"]),
                        r["side"],
                        str(r["repeats"]),
                        f"{r['seconds']:.2f}",
                        f"{r['cpu_seconds']:.2f}",
                        f"{r['times_as_fast']:.2f}",
                        f"{r['times_as_fast_cpu']:.2f}",
                        f"{r['largest_difference']:.1e}",
                    ]
                    for r in found["speed"]
                ],
            ),
        ]
    if found["memory"]:
        parts += [
            "Peak resident memory of CoTTA with views, and its part beyond the loaded network.\n",
            markdown(
                ["backbone", "batch", "side", "peak MiB", "saved", "own MiB", "saved"],
                [
                    [
                        r["backbone"],
                        str(r["batch"]),
                        r["side"],
                        f"{r['peak_mb']:.0f}",
                        f"{r['saved']:.0%}",
                        f"{r['own_mb']:.0f}",
                        f"{r['saved_own']:.0%}",
                    ]
                    for r in found["memory"]
                ],
            ),
        ]
    if found["runner"]:
        r = found["runner"]
        parts.append(
            f"Runner: TENT on the embedded ResNet, {r['batches']} batches of {r['batch']}, both "
            f"sides in turns, a checkpoint every 100 batches: bare loop {r['loop_seconds']:.2f} s, "
            f"`run_shifts` {r['run_seconds']:.2f} s, overhead {r['overhead']:.2%} (CPU time "
            f"{r['overhead_cpu']:.2%}; outside `adapt` {r['outside_adapt']:.2%}). Error of both: "
            f"{r['error_loop']:.3f} and {r['error_run']:.3f} %.\n"
        )
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--case", nargs="+", default=["all"], help="cotta_views cotta_plain vida memory runner")
    add("--backbone", help="a name in conf/backbone or a timm tag; default: per case")
    add("--checkpoint", help="weights of --backbone, or of EfficientNet-Lite0; else random")
    add("--batch", type=int, help="default: per case")
    add("--views", type=int, default=32)
    add("--repeats", type=int, help="timed batches; default: per case")
    add("--threads", type=int, default=1)
    add("--channels-last", choices=("yes", "no", "both"), default="both", help="which of ours")
    add("--runner-batches", type=int, default=500)
    add("--out", type=Path, help="Markdown file; a JSON file is written beside it")
    add("--peak", help=argparse.SUPPRESS)  # of one side, in this process
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak:
        case = Case("memory", partial(cotta, views=2, threshold=2.0), args.backbone, 20, 1, ())
        print(json.dumps(measure_peak(case, args.peak, args)))
        return
    table = cases(args.views)
    if args.backbone:
        named = {case.name: case._replace(backbone=args.backbone) for case in reversed(table)}
        named |= {case.name: case for case in table if case.backbone == args.backbone}
        table = list(named.values())
    known = {*(case.name for case in table), "memory", "runner"}
    chosen = known if "all" in args.case else {*args.case}
    if unknown := chosen - known:
        parser.error(f"unknown case {sorted(unknown)}; there are {sorted(known)}")

    shown = [Path(a).name if a == args.checkpoint else a for a in sys.argv[1:]]
    before = os.getloadavg()[0]
    found: dict[str, Any] = {
        "command": "python benchmarks/bench_tta.py " + " ".join(shown),
        "environment": environment(CPU),
        "speed": [],
        "memory": [],
        "runner": None,
    }
    drop = {"yes": "ours", "no": "ours, channels-last", "both": ""}[args.channels_last]
    for case in table:
        if case.name not in chosen:
            continue
        if len(case.sides) > 2:
            case = case._replace(sides=tuple(s for s in case.sides if s != drop))
        rows = compare(case, args)
        found["speed"] += rows
        for row in rows:
            print(json.dumps(row), flush=True)
    if "memory" in chosen:
        for backbone in [args.backbone] if args.backbone else [LITE]:
            found["memory"] += compare_memory(args, backbone)
    if "runner" in chosen:
        found["runner"] = compare_runner(args)
    found["load"] = [before, os.getloadavg()[0]]
    text = report(found)
    print(text)
    if args.out:
        write_text(args.out, text)
        write_json(args.out.with_suffix(".json"), found)


if __name__ == "__main__":
    main()
