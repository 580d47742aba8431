r"""What the options of speed change and gain, and what the runner costs: one page of parts.

    python benchmarks/bench_speed.py precision --imagenet $IMAGENET --lite0 $LITE0 --vit $VIT
    python benchmarks/bench_speed.py store --folders $FOLDERS   # and the same three
    python benchmarks/bench_speed.py layout runner start sweep page

* `precision`: methods on real images under corruption, `precision` and `channels_last` side by
  side: the same batches, one side after the other in turns, in one process. Error, ECE and the
  number of images whose predicted class is not that of float32 in the default layout.
* `layout`: one forward pass, and one with its backward pass, in both layouts, of the networks that
  papers use and of families with depthwise or grouped convolutions, with random weights.
* `runner`: what the loop around a method costs a batch of one image, beside the method itself, on
  a network that is next to nothing.
* `start`: processor seconds of `--help` and of the imports of a run, in processes of their own.
* `sweep`: processor seconds and images through the network of whole runs on embedded images, as
  they are typed.
* `store`: the same of sweeps on real images with `runtime.feature_store` and without it.

Each part is a JSON file beside the page, so that parts can be measured one by one; `--label` keeps
what was measured with other code (PYTHONPATH names it) under another name. `page` makes the page of
what is there. Whole methods beside plain transcriptions are in `bench_tta.py` (adaptation) and
`bench_end_to_end.py` (adapters).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core.build import build
from driftline.core.checkpoint import Checkpointer, Signals
from driftline.core.console import Console
from driftline.core.cost import synchronize
from driftline.core.files import write_json, write_text
from driftline.core.metrics import OnlineError
from driftline.core.record import RunLogger, environment
from driftline.core.runner import Context, run_shifts
from driftline.core.stream import Batch, Segment, ShiftStream, Skipped
from driftline.runs.command import composed
from driftline.runs.compose import complete, make_strategy, make_stream
from driftline.runs.library import settings
from driftline.runs.machine import set_up
from driftline.streams.pipelines import Geometry

ROOT = Path(__file__).parents[1]
PARTS = ("precision", "layout", "runner", "start", "sweep", "store")
CPU = torch.device("cpu")

# ------------------------------------------------------------------ precision and layout

SIDES = {
    "float32": ["channels_last=false"],
    "float32, channels-last": ["channels_last=true"],
    "bf16": ["precision=bf16", "channels_last=false"],
    "bf16, channels-last": ["precision=bf16", "channels_last=true"],
}
GPU_SIDES = SIDES | {
    "tf32": ["precision=tf32", "channels_last=false"],
    "fp16": ["precision=fp16", "channels_last=false"],
    "fp16, channels-last": ["precision=fp16", "channels_last=true"],
}
VIEWS = ["strategy.views=4", "strategy.threshold=2"]  # for every batch; the official number is 32
METHODS: dict[str, dict[str, list[str]]] = {
    "lite0": {"source": [], "bn_adapt": [], "tent": [], "cotta": VIEWS, "lame": []},
    "vit": {"source": [], "tent": ["strategy.layers=norm"], "cotta": VIEWS, "lame": []},
}


def stream_words(network: str, args: argparse.Namespace) -> list[str]:
    """Settings of a short stream of real images: two corruptions at severity 5."""
    words = [
        "scenario=imagenet_c",
        "scenario.corrupt=on_the_fly",
        "scenario.image_list=all",
        "scenario.corruptions=[gaussian_noise,fog]",
        f"scenario.images={args.images}",
        f"scenario.batch_size={args.batch}",
        "scenario.probe_images=0",
        "scenario.clean_images=0",
        f"data.root={args.imagenet}",
        "runtime.workers=0",
        f"runtime.device={args.device}",
        f"runtime.threads={args.threads}",
    ]
    if network == "lite0":
        return [*words, "backbone=efficientnet_lite0_in1k", f"backbone.checkpoint={args.lite0}"]
    tag = "backbone.tag=vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    return [*words, "backbone=timm", tag, f"backbone.checkpoint={args.vit}"]


def settings_of(words: list[str]) -> DictConfig:
    return complete(composed(words))


def precision(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each network, method and side."""
    rows = []
    for network in args.networks:
        methods = {
            k: v for k, v in METHODS[network].items() if not args.methods or k in args.methods
        }
        device = torch.device(args.device)
        name_of_device = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        cfg = settings_of([*stream_words(network, args), "strategy=source"])
        set_up(cfg)
        geometry = Geometry()
        stream = make_stream(cfg, geometry, device)
        assert isinstance(stream, ShiftStream)
        make_strategy(cfg, stream, geometry, device)  # gives the images their size
        batches = [
            (segment.index, batch)
            for segment in stream.segments
            for batch in segment.batches()
            if batch is not None
        ]
        table_sides = GPU_SIDES if device.type == "cuda" else SIDES
        sides = {k: v for k, v in table_sides.items() if network != "vit" or "channels" not in k}
        for name, options in methods.items():
            made, meters, answers, seconds = {}, {}, {}, {}
            for side, more in sides.items():
                words = [*stream_words(network, args), f"strategy={name}", *options, *more]
                strategy = make_strategy(settings_of(words), stream, geometry, device)[0]
                strategy.begin_stream()
                made[side], answers[side], seconds[side] = strategy, [], []
                meters[side] = OnlineError(stream.domains, stream.num_classes)
            for turn, (segment, batch) in enumerate(batches):
                for side in sides if turn % 2 else reversed(sides):
                    strategy = made[side]
                    synchronize(device)
                    wall, cpu = time.perf_counter(), time.process_time()
                    scores = strategy.adapt(batch.x)
                    synchronize(device)
                    spent = time.perf_counter() - wall, time.process_time() - cpu
                    seconds[side].append(spent)
                    answers[side].append(scores.argmax(1))
                    meter = meters[side]
                    meter.update(scores, batch.y, segment, batch.domain, strategy.outputs)
            base = torch.cat(answers["float32"])
            for side in sides:
                summary = meters[side].summary()
                wall, cpu = (statistics.median(v) for v in zip(*seconds[side][1:], strict=True))
                rows.append(
                    {
                        "device": name_of_device,
                        "network": network,
                        "method": name,
                        "options": options,
                        "side": side,
                        "images": len(base),
                        "error": summary["err_images"],
                        "ece": summary["ece"],
                        "flips": int((torch.cat(answers[side]) != base).sum()),
                        "seconds": wall,
                        "cpu_seconds": cpu,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    return rows


LAYOUTS: dict[str, tuple[list[str], int]] = {  # settings of a network, images a batch
    "tf_efficientnet_lite0": (["backbone=efficientnet_lite0_in1k"], 16),
    "efficientnet_b0": (["backbone=timm", "backbone.tag=efficientnet_b0.ra_in1k"], 8),
    "mobilenetv3_large_100": (["backbone=timm", "backbone.tag=mobilenetv3_large_100.ra_in1k"], 16),
    "regnety_008": (["backbone=timm", "backbone.tag=regnety_008.pycls_in1k"], 16),
    "convnext_tiny": (["backbone=timm", "backbone.tag=convnext_tiny.fb_in1k"], 8),
    "ResNet-50": (["backbone=resnet50_in1k"], 8),
    "ResNet-50, GroupNorm": (["backbone=resnet50_gn_in1k"], 8),
    "WRN-28-10": (["backbone=wrn28_10_cifar10"], 10),
    "WRN-40-2": (["backbone=wrn40_2_augmix_cifar10"], 100),
    "ResNeXt-29": (["backbone=resnext29_augmix_cifar100"], 20),
}


def layout(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each network: processor seconds in both layouts, in turns; medians of three."""
    torch.set_num_threads(args.threads)
    rows = []
    for name, (words, batch) in LAYOUTS.items():
        cfg = settings_of([*words, "backbone.checkpoint=random"])
        network: Backbone = build(cfg.backbone, at="backbone")
        network.train()
        nets = {"default": network, "channels-last": deepcopy(network)}
        nets["channels-last"].to(memory_format=torch.channels_last)
        x = torch.rand(batch, 3, network.input_size, network.input_size)
        spent: dict[tuple[str, str], list[float]] = {}
        for _ in range(4):  # the first warms up
            for side, net in nets.items():
                for passes in ("forward", "step"):
                    begin = time.process_time()
                    with torch.set_grad_enabled(passes == "step"):
                        loss = net(x).logsumexp(1).sum()
                    if passes == "step":
                        loss.backward()
                        net.zero_grad()
                    spent.setdefault((passes, side), []).append(time.process_time() - begin)
        seconds = {" ".join(case): statistics.median(v[1:]) for case, v in spent.items()}
        chosen = bool(cfg.channels_last)
        rows.append({"network": name, "batch": batch, "chosen": chosen, "seconds": seconds})
        print(json.dumps(rows[-1]), flush=True)
    return rows


# ------------------------------------------------------------------ the runner


class Nothing(nn.Module):
    """A network that takes next to no time, with a layer for Tent."""

    def __init__(self, classes: int = 100) -> None:
        super().__init__()
        self.norm, self.fc, self.num_classes = nn.BatchNorm2d(3), nn.Linear(192, classes), classes

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x).flatten(1))


def outside(name: str, every: int, batches: int = 400) -> float:
    """Processor milliseconds a batch of one image that `run_shifts` spends outside `adapt`."""
    torch.manual_seed(0)
    seed = {"seed": 0, "num_classes": 100}
    method: Any = build(settings(name), at="strategy", backbone=Backbone(Nothing()), **seed)
    images = torch.rand(20, 1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    zeros, inside, adapt = torch.zeros(1, dtype=torch.int64), 0.0, method.adapt

    def timed(x: Tensor) -> Tensor:
        nonlocal inside
        start = time.process_time()
        scores = adapt(x)
        inside += time.process_time() - start
        return scores

    def stream(start: int = 0) -> Iterator[Batch]:
        for i in range(start, batches):
            yield Batch(images[i % 20], zeros + i % 100, zeros, zeros)

    method.adapt = timed
    segment = Segment(0, "one", (0,), batches, batches, stream)
    shifts = ShiftStream("bench", 100, ("one",), [segment], facts={}, skipped=Skipped())
    with tempfile.TemporaryDirectory() as folder:
        log = RunLogger(Path(folder), "bench")
        saves = Checkpointer(log, Signals(), key="bench", every=every)
        start = time.process_time()
        run_shifts(method, shifts, Context(log, saves, Console("", True), CPU))
        whole = time.process_time() - start
    return 1000 * (whole - inside) / batches


def runner(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each method and distance of checkpoints."""
    torch.set_num_threads(1)
    cases = [(name, every) for name in ("source", "tent") for every in (100, 0)]
    spent: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for turn in range(6):
        for case in cases:
            took = outside(*case)
            spent[case] += [took] if turn else []  # the first warms up
    return [
        {"label": args.label, "method": n, "every": e, "ms": statistics.median(spent[n, e])}
        for n, e in cases
    ]


def start(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Processor seconds of processes that do no more than begin."""
    runs = "import driftline.runs.execute, driftline.backbones.load, driftline.streams.shifts"
    code = "import sys; from driftline.runs.command import main; sys.exit(main())"
    commands = {
        "python alone": ["-c", "pass"],
        "`--help`": ["-c", code, "--help"],
        "imports of a run": ["-c", runs],
    }
    spent: dict[str, list[float]] = {what: [] for what in commands}
    for _ in range(4):
        for what, words in commands.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            user = after.ru_utime - before.ru_utime
            spent[what].append(user + after.ru_stime - before.ru_stime)
    return [
        {"label": args.label, "what": what, "cpu_seconds": statistics.median(took[1:])}
        for what, took in spent.items()
    ]


SWEEP = ["scenario=imagenet_c", "scenario.images=80", "scenario.batch_size=20"]
SWEEP += ["scenario.probe_images=8", "scenario.clean_images=40", "runtime.threads=1"]
TYPED = {
    "`-m strategy=source,lame,bn_adapt,tent,cotta seed=0,1,2`": [
        *["-m", "strategy=source,lame,bn_adapt,tent,cotta", "seed=0,1,2"]
    ],
}


def sweep(args: argparse.Namespace) -> list[dict[str, Any]]:
    """What commands spend, and the images that their streams pass through the network."""
    return [
        {"label": args.label, "what": what, **_spent([*words, *SWEEP])}
        for what, words in TYPED.items()
    ]


def as_typed(words: list[str]) -> tuple[float, list[dict[str, Any]]]:
    """Processor seconds of a command, and the summaries of its runs; ROOT in it is their folder."""
    code = "import sys; from driftline.runs.command import main; sys.exit(main())"
    with tempfile.TemporaryDirectory() as root:
        words = [word.replace("ROOT", root) for word in words]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", code, *words, f"root={root}/results"]
        subprocess.run(command, check=True, cwd=root, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        runs = [json.loads(p.read_text()) for p in sorted(Path(root).rglob("summary.json"))]
    for run in runs:
        run["run"]["folder"] = run["run"]["folder"].removeprefix(root)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, runs


def _spent(words: list[str]) -> dict[str, Any]:
    """Processor seconds of a command, the images of its streams and a digest of all metrics."""
    seconds, runs = as_typed(words)
    costs = [run["cost"] for run in runs if "same_as" not in run]
    metrics = {run["run"]["folder"]: run["metrics"] for run in runs}
    passed = ("forward_images", "evaluation_forward_images")
    return {
        "cpu_seconds": seconds,
        "forward_images": sum(cost["forward_images"] for cost in costs),
        "all_forward_images": sum(cost.get(k, 0) for cost in costs for k in passed),
        "runs": len(runs),
        "metrics": hashlib.sha256(json.dumps(metrics, sort_keys=True).encode()).hexdigest(),
    }


def store(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Sweeps of methods whose network never learns, without the store and with it, in turn."""
    tasks = ["scenario=split_imagefolder", f"data.root={args.folders}", "scenario.increment=2"]
    tasks += ["backbone=timm", "backbone.tag=vit_tiny_patch16_224.augreg_in21k_ft_in1k"]
    tasks += [f"backbone.checkpoint={args.vit}", "scenario.test_batches=one_class"]
    tasks += ["runtime.workers=0", f"runtime.threads={args.threads}"]
    commands = {
        "`-m strategy=source,lame,t3a,neo`": stream_words("lite0", args),
        "`-m strategy=simplecil,slda,fecam scenario.order_seed=1993,1,2`": tasks,
        **dict.fromkeys(TYPED, SWEEP),
    }
    rows = []
    for what, words in commands.items():
        for label, more in (("without", []), ("with", ["runtime.feature_store=ROOT/store"])):
            spent = _spent([*what.strip("`").split(), *words, *more])
            rows.append({"label": label, "what": what, **spent})
    return rows


# ------------------------------------------------------------------ the page


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


NETWORKS = {"lite0": "EfficientNet-Lite0", "vit": "ViT-Tiny"}
HOW = """\
Machine: {machine}, one torch thread, torch {torch}. Other programs ran on it all the time and took
most of both cores, so **the seconds of this page are processor seconds**, which busy
caches lengthen as well; seconds of the clock say nothing here and are left out. Compare within a table.
Sides of `precision` ran in turns, batch by batch, in one process; medians, without the first batch.
"""  # noqa: E501
PRECISION = """\
## Precision and layout

Real images (`imagenet_c[on_the_fly]`: one photograph a class, Gaussian noise and fog at severity 5),
batches of 25, settings of conf/strategy; CoTTA with 4 views of every batch instead of 32 of unsure
ones (`strategy.views=4 strategy.threshold=2`). "Flips": images whose predicted class is another one
than in float32 and the default layout. With so few images an error differs by three points or more
from another draw: the table says what the options change, not which method is good.
"""  # noqa: E501
READING = """\
* **`channels_last=true`** in float32 changed {layout_flips} of {layout_images} predictions.
* **`precision=bf16`** rounds passes without gradients: {low_flips} of {low_images} predictions
  changed, over all rows without channels-last. Methods that learn on the only pass they make (Tent)
  are not touched: nothing of them is without gradients. LAME on EfficientNet-Lite0 changes most, and
  its ECE nearly doubles: 15 of its 21 flips are one batch of 25 different photographs under Gaussian noise whose
  iteration stands at its limit of 100 steps in float32, with 15 classes, and falls into one class in bf16. The rounded
  scores do that, not the rounded features: with scores of float32 and affinities of bf16 nothing changes.
* `fp16` and `tf32` are for GPUs, which this page has none of: **not measured**. On a CPU `tf32` does
  nothing and `fp16` is refused. bf16 needs a processor that multiplies in it (AMX, AVX512-BF16).
"""  # noqa: E501
LAYOUT = """\
## Which networks get channels-last by themselves

One batch forward, and forward and backward, with random weights in training mode. `channels_last: null`
chooses the layout for families of timm that gain a fifth or more; the others gain less, lose, or gained
in one measurement and not in another (ResNeXt-29: 1.22x and 1.04x in one before this), and keep their
bits. `channels_last=false` brings the bits of the default layout back for all; the layout is part of a
run's identity.
"""  # noqa: E501
RUNNER = """\
## The runner at batches of one image

Processor milliseconds a batch outside the method: loading from memory, cost, guard, online metrics,
rows and checkpoints, on a network of one normalisation and one linear layer with 100 classes. The
defaults save a checkpoint every 100 batches; `checkpoint.every=0` saves at the ends of segments.
The metrics are the same to the last bit. Columns are versions of the code, in processes of their own.
"""  # noqa: E501
START = """\
## The start

Processor seconds of processes that begin and end. What is left is torch (half), torch._dynamo, which
torchvision imports in any case, timm and Hydra.
"""  # noqa: E501
ONCE = """\
## Runs whose seed changes nothing, and scoring beside the stream

A whole command on embedded stand-in images, as typed, start and source run included, with

    {words}

and all else at its default; the two versions one after the other while other jobs came and went.
A run that draws nothing is made once, and its other seeds take over the result; probes and clean
images are scored where a metric reads them and the method's state has changed. Images: through the
network for the stream, without scoring.
"""
STORE = """\
## Sweeps with `runtime.feature_store`

Whole commands on real images, without the store and with it, which is empty at the start: {images}
photographs under each of two corruptions on EfficientNet-Lite0 at 224 px; and 300 + 300 photographs
of CIFAR-10 as class folders, in tasks of two classes, on ViT-Tiny at 224 px with
`scenario.test_batches=one_class`; the last row is the sweep of the section above on embedded images,
where the anchor of CoTTA answers once for three seeds. Images: through the network for the stream and
for test images; training images that are measured are not counted. Every run reads its images.
"""  # noqa: E501
PAPER = """\
## A table of five methods over three seeds

source, LAME, BN-adapt, Tent and CoTTA with its 32 views, {images} photographs under each of Gaussian
noise and fog, batches of {batch}, EfficientNet-Lite0 at 224 px. `plain`: the steps of each method one by
one, as in the official code, in a process of its own; every seed counts as much as the first one.
The others are one command, with start, records and checkpoints: runs that draw nothing are made for one
seed. Mean error of the first seed in percent. **{share} % of the plain side is CoTTA**, which draws and so is
made for every seed, and its views take about two thirds of the official time with equal bits, and half of it in
the layout that this network gets by itself. The last two sides ran beside more other work than the others; in a
measurement before this one the last had 2.96x. The goal, a fifth for the whole table, is not reached on this CPU.
"""  # noqa: E501
LEFT = """\
## Not measured here

GPUs; fp16 and tf32; streams longer than {images} images a method; seconds of the clock; the time
from the start to the first batch on an idle machine. Whole methods beside plain transcriptions in
the order of the official code are in [bench_tta](bench_tta.md) (`benchmarks/bench_tta.py`); adapters
beside the plain formula are in `benchmarks/bench_end_to_end.py`.
"""  # noqa: E501


def page(out: Path, machine: str) -> str:
    """The page of the parts that are there."""
    parts: dict[str, Any] = {}
    for part in PARTS:
        file = out.with_name(f"speed_{part}.json")
        if file.exists():
            parts[part] = json.loads(file.read_text())
    torch_version = next(iter(parts.values()))["environment"]["packages"]["torch"]
    words = "--imagenet $IMAGENET --lite0 $LITE0 --vit $VIT"
    text = [
        "# Speed: precision, layout, runner, start, sweeps\n",
        HOW.format(machine=machine, torch=torch_version),
        "```bash",
        f"python benchmarks/bench_speed.py precision {words}",
        f"python benchmarks/bench_speed.py store --folders $FOLDERS {words}",
        "python benchmarks/bench_table.py --imagenet $IMAGENET --lite0 $LITE0",
        'python benchmarks/bench_speed.py layout runner start sweep page --machine "..."',
        "```\n",
    ]
    rows = parts.get("precision", {}).get("rows", [])
    if rows:
        text += [PRECISION, precision_table(rows), ""]
        plain = [r for r in rows if r["side"] == "float32, channels-last"]
        low = [r for r in rows if r["side"] == "bf16"]
        counts = {
            "layout_flips": sum(r["flips"] for r in plain),
            "layout_images": sum(r["images"] for r in plain),
            "low_flips": sum(r["flips"] for r in low),
            "low_images": sum(r["images"] for r in low),
        }
        text += [READING.format(**counts)]
    if "layout" in parts:
        text += [LAYOUT, layout_table(parts["layout"]["rows"]), ""]
    if "runner" in parts:
        text += [RUNNER, runner_table(parts["runner"]["rows"]), ""]
    if "start" in parts:
        text += [START, start_table(parts["start"]["rows"]), ""]
    if "sweep" in parts:
        text += [ONCE.format(words=" ".join(SWEEP)), sweep_table(parts["sweep"]["rows"]), ""]
    if "store" in parts:
        rows_of = parts["store"]["rows"]
        text += [STORE.format(images=parts["store"]["images"]), sweep_table(rows_of), ""]
    file = out.with_name("speed_table.json")
    if file.exists():
        whole = json.loads(file.read_text())
        spent = {name: row["seconds"] for name, row in whole["sides"]["plain"].items()}
        share = round(100 * spent["cotta"] / sum(spent.values()))
        text += [PAPER.format(**whole, share=share), paper_table(whole), ""]
    return "\n".join([*text, LEFT.format(images=max(r["images"] for r in rows) if rows else 0)])


def precision_table(rows: list[dict[str, Any]]) -> str:
    first = {(r["network"], r["method"]): r for r in rows if r["side"] == "float32"}
    return table(
        [
            "network",
            "method",
            "images",
            "side",
            "error %",
            "ECE",
            "flips",
            "CPU s a batch",
            "ratio",
        ],
        [
            [
                NETWORKS[r["network"]],
                " ".join([r["method"], *(["4 views"] if r["options"] == VIEWS else [])]),
                str(r["images"]),
                r["side"],
                f"{r['error']:.1f}",
                f"{r['ece']:.3f}",
                str(r["flips"]),
                f"{r['cpu_seconds']:.2f}",
                f"{first[r['network'], r['method']]['cpu_seconds'] / r['cpu_seconds']:.2f}x",
            ]
            for r in rows
        ],
    )


def layout_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        cells = [r["network"], str(r["batch"])]
        for passes in ("forward", "step"):
            before, now = (
                r["seconds"][f"{passes} {side}"] for side in ("default", "channels-last")
            )
            cells += [f"{before:.2f}", f"{now:.2f}", f"{before / now:.2f}x"]
        lines.append([*cells, "yes" if r["chosen"] else ""])
    heads = ["CPU s", "channels-last", "ratio"]
    with_gradients = ["with gradients: CPU s", *heads[1:]]
    return table(["network", "batch", *heads, *with_gradients, "chosen"], lines)


def side_by_side(rows: list[dict[str, Any]], keys: list[str], value: str, digits: int) -> list[Any]:
    """Heads and rows: one column for each label, and the ratio of the first to the last."""
    labels = list(dict.fromkeys(r["label"] for r in rows))
    values = {(*(r[k] for k in keys), r["label"]): r[value] for r in rows}
    lines = []
    for case in dict.fromkeys(tuple(r[k] for k in keys) for r in rows):
        numbers = [values[(*case, label)] for label in labels if (*case, label) in values]
        cells = [f"{number:.{digits}f}" for number in numbers]
        lines.append([*map(str, case), *cells, f"{numbers[0] / numbers[-1]:.2f}x"])
    return [[*labels, "ratio"], lines]


def runner_table(rows: list[dict[str, Any]]) -> str:
    heads, lines = side_by_side(rows, ["method", "every"], "ms", 2)
    return table(["method", "checkpoint.every", *heads], lines)


def start_table(rows: list[dict[str, Any]]) -> str:
    heads, lines = side_by_side(rows, ["what"], "cpu_seconds", 2)
    return table(["what", *heads], lines)


def sweep_table(rows: list[dict[str, Any]]) -> str:
    """Seconds and images of the first and the last label, and whether all metrics are equal."""
    heads, seconds = side_by_side(rows, ["what"], "cpu_seconds", 1)
    counted = "forward_images" if heads[0] != "without" else "all_forward_images"
    _, images = side_by_side(rows, ["what"], counted, 0)
    sums = {r["what"]: {o["metrics"] for o in rows if o["what"] == r["what"]} for r in rows}
    lines = [
        [*spent, ", ".join(passed[1:-1]), "equal" if len(sums[spent[0]]) == 1 else "differ"]
        for spent, passed in zip(seconds, images, strict=True)
    ]
    return table(
        ["command", *(f"CPU s, {head}" for head in heads[:-1]), "ratio", "images", "metrics"], lines
    )


def paper_table(whole: dict[str, Any]) -> str:
    """Seconds and errors of the sides of `bench_table.py`."""
    plain = whole["sides"]["plain"]
    first = whole["seeds"] * sum(row["seconds"] for row in plain.values())
    sides = {"plain": (first, {name: row["error"] for name, row in plain.items()})}
    for side, found in whole["sides"].items():
        if side != "plain":
            sides[side] = found["seconds"], found["errors"]
    lines = [
        [side, f"{seconds:.0f}", f"{first / seconds:.2f}x", *(f"{errors[n]:.2f}" for n in plain)]
        for side, (seconds, errors) in sides.items()
    ]
    return table(["side", "CPU s", "ratio", *plain], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("parts", nargs="+", choices=[*PARTS, "page"])
    add("--imagenet", type=Path, help="folder of images with labels.csv, of 256 pixels")
    add("--lite0", type=Path, help="weights of tf_efficientnet_lite0")
    add("--vit", type=Path, help="weights of vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    add("--folders", type=Path, help="of `store`: train/ and test/ with class folders")
    add("--networks", nargs="+", choices=METHODS, default=list(METHODS))
    add("--methods", nargs="+", help="of `precision`; what is in the file of the others stays")
    add("--images", type=int, default=50, help="of each corruption")
    add("--threads", type=int, default=1)
    add("--device", default="cpu", help="of `precision`")
    add("--batch", type=int, default=25, help="of `precision`")
    add("--label", default="now", help="of the code that is measured")
    add("--machine", default="a CPU", help="how the page calls the machine")
    add("--out", type=Path, default=ROOT / "results" / "reference" / "speed.md")
    args = parser.parse_args()
    measure = {"precision": precision, "layout": layout, "runner": runner, "start": start}
    measure |= {"sweep": sweep, "store": store}
    same = dict.fromkeys(PARTS, ("label",)) | {
        "precision": ("device", "network", "method"),
        "layout": ("network",),
    }
    for part in args.parts:
        if part == "page":
            write_text(args.out, page(args.out, args.machine))
            continue
        file = args.out.with_name(f"speed_{part}.json")
        rows = measure[part](args)
        now = {tuple(row[k] for k in same[part]) for row in rows}
        before = json.loads(file.read_text())["rows"] if file.exists() else []
        before = [row for row in before if tuple(row[k] for k in same[part]) not in now]
        about = environment(CPU)
        about = {k: about[k] for k in ("packages", "python", "threads")}
        write_json(file, {"environment": about, "images": args.images, "rows": before + rows})
        print(*map(json.dumps, rows), sep="\n")


if __name__ == "__main__":
    main()
