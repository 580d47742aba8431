"""Train the two backbones for the procedural stand-in images and write their weight files.

    python tools/pretrain_embedded.py [--only resnet|vit|head] [--out FOLDER]

Writes ``embedded_resnet.safetensors`` (classifier of SHIFT_CLASSES), ``embedded_vit.safetensors``
(features learnt on PRETRAIN_CLASSES, head dropped) and ``embedded_vit_head.safetensors`` (a linear
classifier of SHIFT_CLASSES on these features). Tensors are
stored in half precision; their float32 cast defines the weights, and the accuracy in the metadata
is that of the cast weights. Runs on the CPU in about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from driftline.backbones import embedded as builders
from driftline.backbones.checkpoints import load_strict, load_tensors
from driftline.streams import embedded as data

ROOT = Path(__file__).resolve().parents[1]

COMMAND = "python tools/pretrain_embedded.py"


def load(classes: tuple[data.Triple, ...], split: str, per_class: int) -> tuple[Tensor, Tensor]:
    """Normalised images float32 [N,3,32,32] and labels int64 [N] of a set."""
    images = data.EmbeddedImages(classes, split, per_class)
    x = np.stack([images.array(row) for row in range(len(images))])
    mean, std = (torch.tensor(c).view(1, 3, 1, 1) for c in (builders.MEAN, builders.STD))
    x = torch.from_numpy(x).permute(0, 3, 1, 2).float().div_(255)
    return (x - mean) / std, torch.from_numpy(images.labels)


def augment(x: Tensor, generator: torch.Generator, most: int = 3) -> Tensor:
    """Shift each image by up to ``most`` px (edges repeated) and flip half: [B,3,H,W]."""
    b, _, h, w = x.shape
    x = F.pad(x, (most, most, most, most), mode="replicate")
    top, left = torch.randint(0, 2 * most + 1, (2, b, 1), generator=generator)
    rows, cols = top + torch.arange(h), left + torch.arange(w)
    flip = torch.rand(b, 1, generator=generator) < 0.5
    cols = torch.where(flip, cols.flip(1), cols)
    return x.permute(0, 2, 3, 1)[
        torch.arange(b)[:, None, None], rows[:, :, None], cols[:, None, :]
    ].permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Top-1 accuracy in percent of a function from images to logits."""
    hits = sum(
        int((model(a).argmax(1) == b).sum())
        for a, b in zip(x.split(200), y.split(200), strict=True)
    )
    return 100.0 * hits / len(y)


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    batch: int,
    lr: float,
    weight_decay: float,
    seed: int,
) -> None:
    """AdamW with a short warm-up and a cosine schedule down to zero.

    Matrices inside transformer blocks are trained with Muon, which needs fewer steps.
    """
    generator = torch.Generator().manual_seed(seed)
    named = list(model.named_parameters())
    matrices = [p for n, p in named if ".blocks." in n and p.ndim == 2]
    decay = [p for n, p in named if ".blocks." not in n and p.ndim > 1]
    rest = [p for _, p in named if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest}]
    optimizers = [torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    steps = len(x) // batch
    total, warm = epochs * steps, min(steps, 250)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimizers]
    start = time.time()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(x), generator=generator)
        mean_loss = 0.0
        for rows in order[: steps * batch].split(batch):
            images = augment(x[rows], generator).contiguous(memory_format=torch.channels_last)
            loss = loss_fn(model(images), y[rows])
            model.zero_grad()
            loss.backward()
            for stepper in (*optimizers, *schedules):
                stepper.step()
            mean_loss += loss.item() / steps
        print(
            f"epoch {epoch + 1}/{epochs} loss {mean_loss:.3f} {time.time() - start:.0f} s",
            flush=True,
        )


def halve(model: nn.Module) -> dict[str, Tensor]:
    """Round the weights to half precision in place; return them as the file's tensors."""
    model.eval()
    tensors = {}
    for key, value in model.state_dict().items():
        if value.is_floating_point():
            tensors[key] = value.half().contiguous()
            value.copy_(tensors[key].float())
        else:
            tensors[key] = value.clone()
    return tensors


def write(path: Path, tensors: dict[str, Tensor], **metadata: object) -> None:
    """Write a weight file with its description."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    text |= {"data_version": str(data.VERSION), "command": COMMAND, "label": "[embedded]"}
    save_file(tensors, path, metadata=text)
    print(f"{path.name}: {path.stat().st_size} bytes, {text}")


def train_resnet(out: Path, args: argparse.Namespace) -> None:
    """Classifier of SHIFT_CLASSES."""
    torch.manual_seed(args.seed)
    model = builders.embedded_resnet().to(memory_format=torch.channels_last)
    x, y = load(data.SHIFT_CLASSES, "train", args.resnet_per_class)
    fit(
        model, x, y, loss_fn=F.cross_entropy, epochs=args.resnet_epochs, batch=64, lr=3e-3,
        weight_decay=0.05, seed=args.seed,
    )  # fmt: skip
    tensors = halve(model)
    clean = accuracy(model, *load(data.SHIFT_CLASSES, "test", 50))
    write(
        out / "embedded_resnet.safetensors",
        tensors,
        architecture="timm ResNet, BasicBlock, 3x3 stem",
        kwargs=builders.RESNET_KWARGS,
        clean_accuracy=clean,
    )


def train_vit(out: Path, args: argparse.Namespace) -> None:
    """Features of PRETRAIN_CLASSES."""
    torch.manual_seed(args.seed)
    body = builders.embedded_vit()
    classes = data.PRETRAIN_CLASSES
    factors = torch.tensor(classes).T  # [3,classes]: shape, texture, colour
    widths = [len(classes), len(data.SHAPES), len(data.TEXTURES), len(data.COLOURS)]
    model = nn.Sequential(body, nn.Linear(body.num_features, sum(widths)))

    def loss_fn(logits: Tensor, y: Tensor) -> Tensor:
        """Class plus factor cross-entropies: the factors make features that combine anew."""
        whole, *parts = logits.split(widths, dim=1)
        targets = [factor[y] for factor in factors]
        return F.cross_entropy(whole, y) + args.factor_weight * sum(
            F.cross_entropy(part, target) for part, target in zip(parts, targets, strict=True)
        )

    x, y = load(classes, "train", args.vit_per_class)
    fit(
        model, x, y, loss_fn=loss_fn, epochs=args.vit_epochs, batch=64, lr=args.vit_lr,
        weight_decay=0.05, seed=args.seed,
    )  # fmt: skip
    model.eval()
    tensors = halve(body)
    clean = accuracy(lambda a: model(a)[:, : len(classes)], *load(classes, "test", 10))
    write(
        out / "embedded_vit.safetensors",
        tensors,
        architecture="timm VisionTransformer",
        kwargs=builders.VIT_KWARGS,
        clean_accuracy=clean,
    )


def train_head(out: Path, args: argparse.Namespace) -> None:
    """Linear classifier of SHIFT_CLASSES on the frozen features of the transformer."""
    body = builders.embedded_vit().eval()
    load_strict(body, load_tensors(out / "embedded_vit.safetensors"), out)

    def features(x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([body(part) for part in x.split(200)])

    x, y = load(data.SHIFT_CLASSES, "train", args.head_per_class)
    f = features(x)
    torch.manual_seed(args.seed)
    head = nn.Linear(body.num_features, len(data.SHIFT_CLASSES))
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(f), y) + args.head_decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    tensors = {f"head.{k}": v for k, v in halve(head).items()}
    x, y = load(data.SHIFT_CLASSES, "test", 50)
    write(
        out / "embedded_vit_head.safetensors",
        tensors,
        architecture="linear, on embedded_vit",
        clean_accuracy=accuracy(head, features(x), y),
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("resnet", "vit", "head"))
    parser.add_argument("--out", type=Path, default=ROOT / "backbones" / "weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resnet-epochs", type=int, default=8)
    parser.add_argument("--resnet-per-class", type=int, default=250)
    parser.add_argument("--vit-epochs", type=int, default=12)
    parser.add_argument("--vit-lr", type=float, default=3e-3)
    parser.add_argument("--factor-weight", type=float, default=1.0)
    parser.add_argument("--vit-per-class", type=int, default=100)
    parser.add_argument("--head-per-class", type=int, default=200)
    parser.add_argument("--head-decay", type=float, default=1e-4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    for name, train in (("resnet", train_resnet), ("vit", train_vit), ("head", train_head)):
        if args.only in (None, name):
            train(args.out, args)


if __name__ == "__main__":
    main()
