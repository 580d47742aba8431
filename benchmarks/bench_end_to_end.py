r"""What the fused adapter is worth in whole methods, both sides in one process and interleaved.

    python benchmarks/bench_end_to_end.py --out results/kernels/end_to_end.md
    python benchmarks/bench_end_to_end.py --device cuda --batch 64 \\
        --tag vit_base_patch16_224.augreg_in1k

* one EASE evaluation with ten tasks: a batch of images through ten adapter sets, official shape
  (rank 64); besides, the official loop of ten passes;
* one LAE training epoch: steps on the batch, rank 5 on five blocks, learnt scales;
* one ViDA stream: ranks 1 and 128 on every linear layer of the attention, uncertainty views.

`plain` computes every adapter as linear, activation, linear, times scale, plus residual; `fused` is
`kernel.backend=auto`. Random weights, random images. Times are medians of rounds; the ratio is that
of medians. The difference is the largest of the scores, relative to the largest score.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor

from driftline.backbones.backbone import Backbone
from driftline.core import papers
from driftline.core.build import build
from driftline.core.files import write_text
from driftline.core.record import environment
from driftline.core.stream import Batch, Task
from driftline.kernels import adapter as fused
from driftline.kernels import chosen
from driftline.kernels.reference import formula
from driftline.tta.vida import adapters

ROOT = Path(__file__).parents[1]

Work = Callable[[], Tensor]
TASKS = 10


def plain(x: Tensor, down: Tensor, up: Tensor, **given: Any) -> Tensor:
    """The formula step by step, in place of `kernels.adapter`."""
    given.pop("in_place", None)
    return formula(x, given.pop("base", None), down, up, **given)


@contextmanager
def side(name: str) -> Iterator[None]:
    """Inside, all adapters are computed by `plain` or by the operator."""
    users = [
        m
        for n, m in sys.modules.items()
        if n.startswith(("driftline.parts.", "driftline.cl.", "driftline.tta."))
    ]
    users = [m for m in users if getattr(m, "adapter", None) is fused]
    for module in users if name != "fused" else ():
        module.adapter = plain  # pyrefly: ignore
    try:
        yield
    finally:
        for module in users:
            module.adapter = fused  # pyrefly: ignore


def method(name: str, tag: str, device: torch.device, **options: Any) -> Any:
    """A strategy in its default configuration on a network with random weights."""
    folder = ROOT / "conf"
    node = OmegaConf.merge(
        OmegaConf.load(folder / "backbone" / "timm.yaml"), {"tag": tag, "checkpoint": "random"}
    )
    torch.manual_seed(0)
    backbone: Backbone = build(node, at="backbone").to(device)  # pyrefly: ignore
    papers.register()
    with initialize_config_dir(str(folder), version_base="1.3"):
        node = OmegaConf.merge(compose("config", [f"strategy={name}"]).strategy, options)
    given = {"backbone": backbone, "seed": 0, "num_classes": 2 * TASKS}
    return build(node, at="strategy", **given).to(device)  # pyrefly: ignore


def task(index: int) -> Task:
    none: Any = iter
    return Task(index, str(index), range(2 * index, 2 * index + 2), 1, none, none, none)


def wake(parameters: Iterator[Tensor]) -> None:
    """Adapters start as zeros, which would hide differences."""
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_((torch.randn(p.shape, generator=draws) * 0.02).to(p))


def ease(tag: str, x: Tensor, which: str) -> Work:
    strategy = method("ease", tag, x.device)
    for index in range(TASKS):
        strategy.grow(task(index))
    wake(p for p in strategy.bank.parameters() if p.ndim == 2)
    for name in strategy.names:
        strategy.bank.freeze(name)

    def looped() -> Tensor:
        return torch.stack([strategy.embed(x, [name])[0] for name in strategy.names])

    return looped if which == "plain, looped" else lambda: strategy.embed(x, strategy.names)


def lae(tag: str, x: Tensor, which: str) -> Work:
    strategy = method("lae", tag, x.device, freeze_epochs=0)
    strategy.begin_task(task(0))
    strategy.begin_epoch(task(0), 0)
    wake(p for p in strategy.bank.parameters() if p.ndim == 2)
    zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    batch = Batch(x, zeros, zeros, zeros)

    def epoch() -> Tensor:
        return torch.stack([strategy.observe(batch)["loss"] for _ in range(4)])

    return epoch


def vida(tag: str, x: Tensor, which: str) -> Work:
    strategy = method("vida", tag, x.device, views=2)
    wake(up for one in adapters(strategy.bank) for up in one.up)
    strategy.teacher_bank.load_state_dict(strategy.bank.state_dict())
    strategy.begin_stream()
    return lambda: torch.stack([strategy.adapt(x) for _ in range(2)])


CASES: dict[str, tuple[Callable[[str, Tensor, str], Work], tuple[str, ...]]] = {
    "EASE, evaluation at T = 10": (ease, ("plain, looped", "plain", "fused")),
    "LAE, training epoch": (lae, ("plain", "fused")),
    "ViDA, stream": (vida, ("plain", "fused")),
}


def seconds(work: Work, device: torch.device) -> tuple[float, Tensor]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def compare(name: str, tag: str, x: Tensor, rounds: int) -> list[str]:
    """One row of the table for each side."""
    make, sides = CASES[name]
    work = {}
    for which in sides:
        with side(which):
            work[which] = make(tag, x, which)
    times: dict[str, list[float]] = {which: [] for which in sides}
    first: dict[str, Tensor] = {}
    for turn in range(rounds + 1):  # the first is not timed
        for which in sides:
            with side(which):
                took, found = seconds(work[which], x.device)
            first.setdefault(which, found.detach())
            if turn:
                times[which].append(took)
    base = statistics.median(times[sides[0]])
    rows = []
    for which in sides:
        middle = statistics.median(times[which])
        apart = float((first[which] - first["plain"]).abs().max() / first["plain"].abs().max())
        cells = [name, which, f"{middle:.3f}", f"{base / middle:.2f}x", f"{apart:.1e}"]
        rows.append("| " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tag", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    draws = torch.Generator().manual_seed(0)
    x = torch.rand(given.batch, 3, 224, 224, generator=draws).to(device)
    rows = [row for name in CASES for row in compare(name, given.tag, x, given.rounds)]
    used = chosen()
    text = [
        f"Machine: {environment(device)['device']}, {given.threads} thread(s); torch "
        f"{torch.__version__}; `{given.tag}`, random weights, {given.batch} images; "
        f"backend {used['used']} ({used['reason']}).",
        "",
        "| what | side | s | ratio | difference |",
        "|---|---|---|---|---|",
        *rows,
    ]
    print("\n".join(text))
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(given.out, "\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
