"""Kinds of adapters on one linear layer of a ViT-B, ours beside the peft library's: `--out FILE`.

    python benchmarks/bench_adapter_kinds.py

A forward and a backward pass of 4 images (197 tokens of 768 numbers) through a frozen layer of 768
to 2304, rank 8; all kinds in turn in one process, medians of processor seconds after one warm-up.
`saved`: bytes that autograd keeps for the backward pass, without the layer's weights.
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
from driftline.parts.adapters.hra import HRA
from driftline.parts.adapters.hydra import Hydra
from driftline.parts.adapters.lora import LoRA
from driftline.parts.adapters.moslora import MoSLoRA
from driftline.parts.adapters.paca import PaCA

DIM, OUT, RANK, TOKENS = 768, 2304, 8, (4, 197)
Pass = Callable[[Tensor], Tensor]


def ours() -> dict[str, tuple[Pass, list[Tensor]]]:
    layer = nn.Linear(DIM, OUT).requires_grad_(False)
    after = {
        "LoRA": LoRA(DIM, OUT, RANK),
        "MoSLoRA": MoSLoRA(DIM, OUT, RANK),
        "Hydra, half the rank": Hydra(DIM, OUT, RANK // 2),
        "PaCA": PaCA(DIM, OUT, RANK),
        "DoRA": DoRA(layer, RANK),
    }
    passes: dict[str, tuple[Pass, list[Tensor]]] = {"no adapter": (layer, [])}
    for name, a in after.items():
        passes[name] = (lambda x, a=a: a.after(x, layer(x)), [*a.parameters()])
    hra = HRA(DIM, RANK)
    passes["HRA"] = (lambda x: layer(hra.before(x)), [*hra.parameters()])
    return passes


def theirs() -> dict[str, tuple[Pass, list[Tensor]]]:
    kinds = {
        "LoRA": peft.LoraConfig(r=RANK, target_modules=["0"]),
        "DoRA": peft.LoraConfig(r=RANK, use_dora=True, target_modules=["0"]),
        "HRA": peft.HRAConfig(r=RANK, target_modules=["0"]),
        "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=["0"]),
        "OFT": peft.OFTConfig(oft_block_size=32, r=0, target_modules=["0"]),
    }
    passes: dict[str, tuple[Pass, list[Tensor]]] = {}
    for name, config in kinds.items():
        net = peft.get_peft_model(nn.Sequential(nn.Linear(DIM, OUT)), config)
        passes[f"peft's {name}"] = (net, [p for p in net.parameters() if p.requires_grad])
    return passes


def step(run: Pass, learned: list[Tensor], x: Tensor) -> tuple[float, int]:
    """Processor seconds, and bytes saved for the backward pass."""
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    start = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run(x)
    torch.autograd.grad(out.sum(), [x, *learned])
    spent = time.process_time() - start
    return spent, sum(saved.values()) - 4 * DIM * OUT  # the weight


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="Markdown file; else printed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(*TOKENS, DIM, requires_grad=True)
    passes = ours() | theirs()
    looks: dict[str, list[tuple[float, int]]] = {name: [] for name in passes}
    for _ in range(args.rounds + 1):
        for name, (run, learned) in passes.items():
            looks[name].append(step(run, learned, x))
    seconds = {n: statistics.median(s for s, _ in rows[1:]) for n, rows in looks.items()}
    lines = ["| kind | parameters | ms | of LoRA | saved, MiB |", "|---|---|---|---|---|"]
    for name, (_, learned) in passes.items():
        count = sum(p.numel() for p in learned)
        ratio = seconds[name] / seconds["LoRA"]
        saved = looks[name][-1][1] / 2**20
        lines.append(
            f"| {name} | {count:,} | {1000 * seconds[name]:.1f} | {ratio:.2f}x | {saved:.1f} |"
        )
    text = "\n".join(lines) + "\n"
    write_text(args.out, text) if args.out else print(text)


if __name__ == "__main__":
    main()
