"""Kinds of adapters on one linear layer of a ViT-B, ours beside the peft library's: `--out FILE`.

    python benchmarks/bench_adapter_kinds.py

A forward and a backward pass of 4 images (197 tokens of 768 numbers) through a frozen layer of 768
to 2304, rank 8, and a forward pass without gradients; all kinds in turn in one process, medians of
processor seconds after one warm-up.
`saved`: bytes that autograd keeps for the backward pass, without what is there before and after it
and does not learn (the layer's weights, random matrices).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from driftline.core.files import write_text
from driftline.parts.adapters.dora import DoRA
from driftline.parts.adapters.ether import EtherPlus
from driftline.parts.adapters.gated_lora import GatedLoRA
from driftline.parts.adapters.hra import HRA
from driftline.parts.adapters.hydra import Hydra
from driftline.parts.adapters.lora import LoRA
from driftline.parts.adapters.lori import LoRI
from driftline.parts.adapters.mixture import LoRAMixture
from driftline.parts.adapters.moslora import MoSLoRA
from driftline.parts.adapters.nola import NOLA
from driftline.parts.adapters.oft import OFT
from driftline.parts.adapters.paca import PaCA
from driftline.parts.adapters.self_activated import SelfActivated
from driftline.parts.adapters.shared_lora import VeRA, tied_lora

DIM, OUT, RANK, TOKENS = 768, 2304, 8, (4, 197)
Pass = tuple[Callable[[Tensor], Tensor], list[Tensor], list[Tensor]]  # learned, constant


def ours() -> dict[str, Pass]:
    layer = nn.Linear(DIM, OUT).requires_grad_(False)
    after = {
        "LoRA": LoRA(DIM, OUT, RANK),
        "MoSLoRA": MoSLoRA(DIM, OUT, RANK),
        "growing ranks": GatedLoRA(DIM, OUT, RANK, gate="growing", threshold=0.05),
        "4 ranks of 8 by their activations": SelfActivated(DIM, OUT, RANK, top=4, temperature=0.01),
        "2 of 4 experts of rank 4": LoRAMixture(DIM, OUT, RANK // 2, experts=4, top=2),
        "LoRI": LoRI(DIM, OUT, RANK),
        "Tied-LoRA": tied_lora({"0:out": layer}, RANK)["0:out"],
        "Hydra, half the rank": Hydra(DIM, OUT, RANK // 2),
        "PaCA": PaCA(DIM, OUT, RANK),
        "DoRA": DoRA(layer, RANK),
        "VeRA, rank 256": VeRA(DIM, OUT, 256),
        "NOLA, rank 4 of 1024 bases": NOLA(DIM, OUT, 4, 1024),
        "ETHER+, 4 blocks": EtherPlus(layer, 4),
    }
    before = {"HRA": HRA(DIM, RANK), "OFT, blocks of 32": OFT(DIM, 32)}
    passes: dict[str, Pass] = {"no adapter": (layer, [], [layer.weight])}
    for name, a in after.items():
        drawn = getattr(a, "_drawn", None)
        constant = [layer.weight, *(drawn.like(layer.weight) if drawn else [])]
        passes[name] = (lambda x, a=a: a.after(x, layer(x)), _learned(a), constant)
    for name, a in before.items():
        passes[name] = (lambda x, a=a: layer(a.before(x)), _learned(a), [layer.weight])
    return passes


def theirs() -> dict[str, Pass]:
    kinds = {
        "LoRA": peft.LoraConfig(r=RANK, target_modules=["0"]),
        "DoRA": peft.LoraConfig(r=RANK, use_dora=True, target_modules=["0"]),
        "HRA": peft.HRAConfig(r=RANK, target_modules=["0"]),
        "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=["0"]),
        "OFT": peft.OFTConfig(oft_block_size=32, r=0, target_modules=["0"]),
        "VeRA": peft.VeraConfig(r=256, target_modules=["0"]),
    }
    passes: dict[str, Pass] = {}
    for name, config in kinds.items():
        net = peft.get_peft_model(nn.Sequential(nn.Linear(DIM, OUT)), config)
        constant = [p for p in net.parameters() if not p.requires_grad]
        constant += [t for m in net.modules() for t in m.buffers(recurse=False)]
        passes[f"peft's {name}"] = (net, _learned(net), constant)
    return passes


def _learned(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


def step(run: Pass, x: Tensor) -> tuple[float, float, int]:
    """Processor seconds of a step and of an answer; bytes saved for the backward pass."""
    forward, learned, constant = run
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    start = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = forward(x)
    torch.autograd.grad(out.sum(), [x, *learned])
    spent = time.process_time() - start
    start = time.process_time()
    with torch.no_grad():
        forward(x)
    answer = time.process_time() - start
    there = {t.untyped_storage().data_ptr() for t in constant}
    return spent, answer, sum(size for place, size in saved.items() if place not in there)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="Markdown file; else printed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(*TOKENS, DIM, requires_grad=True)
    passes = ours() | theirs()
    looks: dict[str, list[tuple[float, float, int]]] = {name: [] for name in passes}
    for _ in range(args.rounds + 1):
        for name, run in passes.items():
            looks[name].append(step(run, x))
    steps, answers = (
        {n: 1000 * statistics.median(row[i] for row in rows[1:]) for n, rows in looks.items()}
        for i in (0, 1)
    )
    lines = [
        "| kind | parameters | step, ms | of LoRA | answer, ms | of LoRA | saved, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (_, learned, _) in passes.items():
        count = sum(p.numel() for p in learned)
        saved = looks[name][-1][2] / 2**20
        times = [f"{t[name]:.1f} | {t[name] / t['LoRA']:.2f}x" for t in (steps, answers)]
        lines.append(f"| {name} | {count:,} | {' | '.join(times)} | {saved:.1f} |")
    text = "\n".join(lines) + "\n"
    write_text(args.out, text) if args.out else print(text)


if __name__ == "__main__":
    main()
