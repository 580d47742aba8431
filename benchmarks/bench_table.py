r"""A table of five adaptation methods over three seeds: plain transcriptions beside our command.

    python benchmarks/bench_table.py --imagenet $IMAGENET --lite0 $LITE0

`plain` does the steps of each method one by one, as the official code does, over the same images,
each method in a process of its own with the default allocator; every seed costs what the first one
does, and start and imports are not counted. The other sides are one command as it is typed, with
start, imports, records and checkpoints. Processor seconds of one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from bench_speed import as_typed, settings_of, stream_words
from bench_tta import PlainCoTTA, load, method, same_random
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core.files import write_json
from driftline.core.stream import ShiftStream
from driftline.parts.norms import collect_parameters, use_batch_statistics
from driftline.runs.compose import make_strategy, make_stream
from driftline.runs.machine import set_up
from driftline.streams.pipelines import Geometry
from driftline.tta.lame import affinity_matrix, laplacian_assignments

ROOT = Path(__file__).parents[1]
METHODS = ("source", "lame", "bn_adapt", "tent", "cotta")
SEEDS = 3
STORE = "runtime.feature_store=ROOT/store"
SIDES = {
    "one command, `channels_last=false`": ["channels_last=false"],
    "one command": [],
    "with `runtime.feature_store`": [STORE],
    "and `precision=bf16`": [STORE, "precision=bf16"],
}


def plain(name: str, network: Backbone) -> Callable[[Tensor], Tensor]:
    """What a method answers to a batch, in the order of its official code."""
    if name == "cotta":
        rng = same_random(method("cotta", deepcopy(network)))
        return PlainCoTTA(network, rng, 32, 0.1).adapt
    if name in ("source", "lame"):
        network.eval()
    else:
        network.train()
        use_batch_statistics(network.net)
    if name == "lame":
        return lambda x: lame(network, x)
    if name != "tent":
        return lambda x: without_gradients(network, x)
    network.requires_grad_(False)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.requires_grad_(True)
    names = collect_parameters(network.net)
    chosen = [p for n, p in network.net.named_parameters() if n in names and p.requires_grad]
    optimizer = torch.optim.SGD(chosen, lr=0.00025, momentum=0.9, nesterov=True)

    def adapt(x: Tensor) -> Tensor:
        scores = network(x)
        loss = -(scores.softmax(1) * scores.log_softmax(1)).sum(1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return scores

    return adapt


@torch.no_grad()
def without_gradients(network: Backbone, x: Tensor) -> Tensor:
    return network(x)


@torch.no_grad()
def lame(network: Backbone, x: Tensor) -> Tensor:
    features, scores = network.features_and_logits(x)
    own = scores.softmax(1)
    options: dict[str, Any] = {"affinity": "rbf", "knn": 5, "force_symmetry": False}
    kernel = affinity_matrix(features, **options, rbf_self="count")
    if kernel is None:
        return own
    limits: dict[str, Any] = {"weight": 1.0, "max_steps": 100, "tolerance": 1e-8}
    return laplacian_assignments(-(own + 1e-10).log(), kernel, **limits)[0]


def run_plain(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds and mean error of one transcription; images are read as in a run."""
    cfg = settings_of([*words_of(args), "strategy=source"])
    set_up(cfg)
    start = time.process_time()
    geometry, device = Geometry(), torch.device("cpu")
    stream = make_stream(cfg, geometry, device)
    assert isinstance(stream, ShiftStream)
    make_strategy(cfg, stream, geometry, device)  # gives the images their size
    adapt = plain(name, load("efficientnet_lite0_in1k", str(args.lite0)))
    wrong = []
    for segment in stream.segments:
        batches = [batch for batch in segment.batches() if batch is not None]
        found = [(adapt(batch.x).argmax(1) != batch.y).float() for batch in batches]
        wrong.append(float(torch.cat(found).mean()))
    return {"seconds": time.process_time() - start, "error": 100 * sum(wrong) / len(wrong)}


def words_of(args: argparse.Namespace) -> list[str]:
    return [*stream_words("lite0", args), f"data.cache={args.cache}"]


def one_command(more: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Processor seconds of the command, and mean errors of the first seed."""
    seeds = ",".join(map(str, range(SEEDS)))
    words = ["-m", f"strategy={','.join(METHODS)}", f"seed={seeds}", *words_of(args), *more]
    seconds, runs = as_typed(words)
    errors = {r["run"]["strategy"]: r["metrics"]["err_mean"] for r in runs if not r["run"]["seed"]}
    return {"seconds": seconds, "errors": errors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--imagenet", type=Path, required=True, help="folder of images with labels.csv")
    add("--lite0", type=Path, required=True, help="weights of tf_efficientnet_lite0")
    add("--images", type=int, default=32, help="of each of two corruptions")
    add("--batch", type=int, default=16)
    add("--threads", type=int, default=1)
    add("--cache", type=Path, help="folder for corrupted images; default: one of this call")
    add("--plain", choices=METHODS, help="one transcription alone, as JSON")
    add("--out", type=Path, default=ROOT / "results" / "reference" / "speed_table.json")
    args = parser.parse_args()
    args.device = "cpu"
    if args.plain:
        print(json.dumps(run_plain(args.plain, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        args.cache = args.cache or Path(folder)
        one = [sys.executable, __file__, "--imagenet", args.imagenet, "--lite0", args.lite0]
        one += ["--images", args.images, "--batch", args.batch, "--threads", args.threads]
        one += ["--cache", args.cache, "--plain"]
        rows: dict[str, Any] = {}
        for name in ("source", *METHODS):  # the first one fills the cache
            done = subprocess.run(
                [*map(str, one), name], check=True, stdout=subprocess.PIPE, text=True
            )
            rows[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, rows[name], flush=True)
        sides = {"plain": rows}
        for side, more in SIDES.items():
            sides[side] = one_command(more, args)
            print(side, sides[side], flush=True)
    about = {"images": args.images, "batch": args.batch, "seeds": SEEDS, "torch": torch.__version__}
    write_json(args.out, {**about, "sides": sides})


if __name__ == "__main__":
    main()
