"""Everything that only a GPU can show, once, each step with its own time limit.

    python benchmarks/check_gpu.py --out checks
    python benchmarks/check_gpu.py --out checks --images /path/to/images --weights lite0.safetensors

The tests marked gpu and one CoTTA and one EASE run (on the GPU and, to compare with, on the CPU) go
first and together: they show right or wrong. What is timed follows, one step at a time. Each step's
output goes to `<out>/<step>.log`; a table of steps, exit codes and seconds ends the script, whose
own exit code is 1 if any step failed.

`--images` is a folder of photographs with `labels.csv` (filename, class_index), `--weights` a file
of EfficientNet-Lite0: CoTTA then also runs with its views on corruptions of these.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

VIT_B = "vit_base_patch16_224.augreg_in1k"


class Step(NamedTuple):
    name: str
    command: list[str]
    limit: float  # seconds


def run_command(out: Path, name: str, *settings: str) -> list[str]:
    return ["run.py", *settings, f"root={out / 'runs' / name}", "logger=files"]


def steps(out: Path, images: Path | None, weights: Path | None) -> list[list[Step]]:
    """Groups that run one after the other; the steps of a group run together."""
    report = f"--junitxml={out / 'tests.xml'}"
    files = [f"tests/test_{name}.py" for name in ("triton_kernels", "corruptions", "streams")]
    tests = ["-m", "pytest", *files, "-m", "gpu", "-q", "-n", "6", "-p", "no:cacheprovider", report]
    right = [Step("tests", tests, 150)]
    for device in ("cuda", "cpu"):
        for strategy, scenario in (("cotta", "imagenet_c"), ("ease", "split_cifar")):
            name = f"{strategy}-{device}"
            settings = (f"strategy={strategy}", f"scenario={scenario}", f"runtime.device={device}")
            right.append(Step(name, run_command(out, name, *settings), 200))
    kernels = ["benchmarks/bench_kernels_gpu.py", "--budget", "70"]
    kernels += ["--out", str(out / "kernels.json")]
    corruptions = ["benchmarks/bench_corruptions.py", "--device", "cuda", "--batch", "64"]
    corruptions += ["--rounds", "3", "--out", str(out / "corruptions.json")]
    methods = [
        "benchmarks/bench_end_to_end.py",
        "--device",
        "cuda",
        "--batch",
        "64",
        "--tag",
        VIT_B,
    ]
    methods += ["--out", str(out / "end_to_end.md")]
    groups = [
        right,
        [Step("end_to_end", methods, 60)],
        [Step("corruptions", corruptions, 60)],
        [Step("kernels", kernels, 120)],
    ]
    if images and weights:
        settings = (
            *("scenario=imagenet_c", f"data.root={images}", "scenario.corrupt=on_the_fly"),
            *("scenario.image_list=all", "scenario.batch_size=50", "scenario.probe_images=0"),
            *("scenario.clean_images=0", "backbone=efficientnet_lite0_in1k"),
            *(f"backbone.checkpoint={weights}", f"data.cache={out.resolve() / 'cache'}"),
            *("runtime.workers=15", "strategy=cotta"),
        )
        groups.insert(1, [Step("cotta-images", run_command(out, "images", *settings), 120)])
    return groups


def carry_out(step: Step, out: Path) -> dict[str, object]:
    """Runs a step; its exit code is None where it ran past its limit."""
    start = time.monotonic()
    with open(out / f"{step.name}.log", "w") as log:
        try:
            done = subprocess.run(
                [sys.executable, *step.command],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                timeout=step.limit,
            ).returncode
        except subprocess.TimeoutExpired:
            done = None
    seconds = round(time.monotonic() - start, 1)
    print(f"{step.name}: exit {done}, {seconds} s", flush=True)
    return {"step": step.name, "exit": done, "seconds": seconds, "limit": step.limit}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of logs and figures")
    parser.add_argument("--images", type=Path, help="photographs with labels.csv")
    parser.add_argument("--weights", type=Path, help="EfficientNet-Lite0, safetensors")
    parser.add_argument("--only", nargs="+", help="names of steps")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    images, weights = (p.resolve() if p else None for p in (args.images, args.weights))
    rows = []
    for group in steps(out, images, weights):
        chosen = [s for s in group if not args.only or s.name in args.only]
        with ThreadPoolExecutor(max(1, len(chosen))) as pool:
            rows += pool.map(lambda step: carry_out(step, out), chosen)
    (out / "steps.json").write_text(json.dumps(rows, indent=2) + "\n")
    return int(any(row["exit"] != 0 for row in rows))


if __name__ == "__main__":
    sys.exit(main())
