"""The study behind conf/strategy/ecotta.yaml: which setting of EcoTTA works on ImageNet images.

One stream and one set of labelled source images, disjoint, are read once; every row then starts
from the pretrained network, prepares on the source images where its setting asks for it, and runs
through the whole stream without a reset. Results are appended to a file, so that rows can be run in
several calls; the table is printed at the end.

    python benchmarks/study_ecotta.py --root $IMAGENET --weights $LITE0 --cache $CACHE
    python benchmarks/study_ecotta.py ... --rows identity identity-lr1e-3
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from driftline.core import papers
from driftline.core.build import build
from driftline.core.seed import seed_all
from driftline.core.strategy import TTAStrategy
from driftline.core.stream import Batch, ShiftStream, SourceImages
from driftline.runs.execute import complete
from driftline.runs.library import settings
from driftline.streams.pipelines import Geometry
from driftline.streams.store import ImageStore

ROOT = Path(__file__).parents[1]

WARMUP: dict[str, Any] = {
    "_target_": "driftline.parts.warmup.WarmUp",
    "epochs": 3,
    "batch_size": 50,
    "optim": {
        "_target_": "driftline.parts.optim.Optim",
        "kind": "sgd",
        "lr": 0.05,
        "momentum": 0.9,
        "rise": 1,
        "schedule": "cosine",
    },
    "augment": "none",
    "every": 1000,
}
SHORT = {**WARMUP, "epochs": 1, "optim": {**WARMUP["optim"], "lr": 0.001, "rise": 0}}
# The setting that the other rows change in one respect.
BASE: dict[str, Any] = {
    "parts": 5,
    "meta_kernel": 1,
    "init": "identity",
    "warmup": None,
    "frozen_bn": "batch",
    "meta_bn": "batch",
    "update": True,
    "procedure": "community",
    "entropy_margin": 0.4,
    "reg_weight": 0.25,
    "on_empty": "skip",
    "lr": 0.005,
}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "source": ("source", {}),
    "bn_adapt": ("bn_adapt", {}),
    "bn_adapt, half batch": ("bn_adapt", {"statistics": "mixed", "alpha": 0.5}),
    "tent": ("tent", {}),
    "community, no warm-up": ("ecotta", {"init": "community"}),
    "community, warm-up": ("ecotta", {"init": "community", "warmup": WARMUP}),
    "community, warm-up, update=false": (
        "ecotta",
        {"init": "community", "warmup": WARMUP, "update": False},
    ),
    "identity": ("ecotta", {}),
    "identity, update=false": ("ecotta", {"update": False}),
    "identity, lr=1e-3": ("ecotta", {"lr": 0.001}),
    "identity, lr=2.5e-4": ("ecotta", {"lr": 0.00025}),
    "identity, lr=0.02": ("ecotta", {"lr": 0.02}),
    "identity, frozen_bn=running": ("ecotta", {"frozen_bn": "running"}),
    "identity, frozen_bn=running, update=false": (
        "ecotta",
        {"frozen_bn": "running", "update": False},
    ),
    "identity, all running": ("ecotta", {"frozen_bn": "running", "meta_bn": "running"}),
    "identity, meta_bn=running": ("ecotta", {"meta_bn": "running"}),
    "identity, meta_bn=running, update=false": (
        "ecotta",
        {"meta_bn": "running", "update": False},
    ),
    "identity, kernel 3": ("ecotta", {"meta_kernel": 3}),
    "identity, joint": ("ecotta", {"procedure": "joint"}),
    "identity, lambda=0": ("ecotta", {"reg_weight": 0.0}),
    "identity, lambda=1": ("ecotta", {"reg_weight": 1.0}),
    "identity, margin=0.6": ("ecotta", {"entropy_margin": 0.6}),
    "identity, margin=0.8": ("ecotta", {"entropy_margin": 0.8}),
    "identity, warm-up lr=1e-3": (
        "ecotta",
        {"warmup": SHORT},
    ),
    "identity, warm-up lr=1e-3, update=false": (
        "ecotta",
        {"warmup": SHORT, "update": False},
    ),
    "identity, lr=0.02, margin=0.8": ("ecotta", {"lr": 0.02, "entropy_margin": 0.8}),
    "identity, lr=0.1, margin=0.8": ("ecotta", {"lr": 0.1, "entropy_margin": 0.8}),
    "identity, K=4": ("ecotta", {"parts": 4}),
}


class Silent:
    """`Progress` of a preparation that is not interrupted."""

    def load(self) -> None:
        return None

    def save(self, state: Any) -> None:
        pass

    def say(self, text: str) -> None:
        print("   ", text, flush=True)


def stored(source: SourceImages) -> SourceImages:
    """`source` with its images in memory; shuffled by epoch like the original."""
    parts = list(source.batches(50))
    x = torch.cat([(b.x * 255).round().to(torch.uint8) for b in parts])
    y, index = torch.cat([b.y for b in parts]), torch.cat([b.index for b in parts])

    def batches(size: int, *, epoch: int | None = None, start: int = 0, augment: str = "none"):
        assert augment == "none"
        order = torch.arange(len(x))
        if epoch is not None:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(size)[start:]:
            image = x[rows].float() / 255
            yield Batch(image, y[rows], index[rows], torch.zeros_like(rows))

    return SourceImages(source.images, source.description, source.fingerprint, batches)


def prepared(method: TTAStrategy, source: SourceImages, known: dict[str, Any]) -> float:
    """Prepare `method` if it asks for it; seconds spent. Equal preparations are done once."""
    settings = method.preparation()
    if settings is None:
        return 0.0
    key, started = json.dumps(settings, sort_keys=True), time.perf_counter()
    if key not in known:
        artefact = method.prepare(source, Silent())
        known[key] = {k: v.detach().clone() for k, v in artefact.items()}
    method.use_prepared(known[key])
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", required=True, help="folder of clean ImageNet images")
    parser.add_argument("--weights", required=True, help="tf_efficientnet_lite0.safetensors")
    parser.add_argument("--cache", required=True, help="folder for the corrupted images")
    parser.add_argument("--corruptions", default="gaussian_noise,zoom_blur,contrast,pixelate")
    parser.add_argument("--images", type=int, default=200, help="per corruption")
    parser.add_argument("--source", type=int, default=500, help="clean images to prepare on")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), metavar="ROW", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("ecotta_study.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    papers.register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(
            "config",
            [
                "scenario=imagenet_c",
                f"data.root={args.root}",
                f"data.cache={args.cache}",
                "scenario.corrupt=on_the_fly",
                "scenario.image_list=all",
                f"scenario.images={args.images}",
                f"scenario.corruptions=[{args.corruptions}]",
                f"scenario.batch_size={args.batch}",
                "scenario.source_from=held_out",
                f"scenario.source_images={args.source}",
                "backbone=efficientnet_lite0_in1k",
                f"backbone.checkpoint={args.weights}",
            ],
        )
    cfg = complete(cfg)
    live = {"data_root": cfg.data.root, "cache": cfg.data.cache, "on_error": "raise", "workers": 0}
    live |= {"geometry": Geometry(), "store": ImageStore(), "seed": 0}
    stream: ShiftStream = build(cfg.scenario, at="scenario", **live)
    assert stream.source is not None
    source = stored(stream.source())
    batches = [(s.name, b) for s in stream.segments for b in s.batches() if b is not None]
    shared = {i for _, b in batches for i in b.index.tolist()}
    assert not shared & {i for b in source.batches(50) for i in b.index.tolist()}
    print(
        f"{len(batches)} batches, {source.images} source images ({source.description})", flush=True
    )

    known: dict[str, Any] = {}
    for seed in args.seeds:
        for row in args.rows or ROWS:
            name, changes = ROWS[row]
            node = settings(name, **(BASE | changes if name == "ecotta" else changes))
            seed_all(seed)
            backbone = build(cfg.backbone, at="backbone").to(memory_format=torch.channels_last)
            method = build(node, at="strategy", backbone=backbone, seed=seed, num_classes=1000)
            spent = prepared(method, source, known)
            method.begin_stream()
            started = time.perf_counter()
            right: dict[str, list[int]] = {}
            confident: list[float] = []
            failed = None
            for segment, batch in batches:
                try:
                    x = batch.x.contiguous(memory_format=torch.channels_last)
                    scores = method.adapt(x)
                except Exception as error:
                    failed = str(error)
                    break
                right.setdefault(segment, []).extend((scores.argmax(1) == batch.y).int().tolist())
                p = scores.softmax(1)
                entropy = -(p * p.clamp_min(1e-30).log()).sum(1)
                confident += (entropy < 0.4 * torch.tensor(1000.0).log()).float().tolist()
            errors = {k: 100 - 100 * sum(v) / len(v) for k, v in right.items()}
            result = {
                "row": row,
                "seed": seed,
                "mean": sum(errors.values()) / max(1, len(errors)),
                "errors": errors,
                "confident": sum(confident) / max(1, len(confident)),
                "skipped": int(getattr(method, "skipped", 0)),
                "trained": sum(p.numel() for p in method.updated_parameters()),
                "prepare_seconds": spent,
                "seconds_per_batch": (time.perf_counter() - started) / len(batches),
                "failed": failed,
                "setting": vars(args) | {"out": str(args.out)},
                "right": right,
            }
            with args.out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            cells = " ".join(f"{v:6.1f}" for v in errors.values())
            print(
                f"{row:42} seed {seed}: {result['mean']:6.2f} | {cells} {failed or ''}", flush=True
            )


if __name__ == "__main__":
    main()
