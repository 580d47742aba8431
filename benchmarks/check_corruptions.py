"""Source error of a network under the corruptions, compared with the reference's images.

    python benchmarks/check_corruptions.py --data $REALDATA --frost $REALDATA/frost \
      --out results/reference/corruptions.md

Corrupts the centre 224 px of 1,000 ImageNet images at severity 5 and classifies them with
EfficientNet-Lite0 (eval mode, fp32, mean = std = 0.5). The folder holds `imagenet_real`,
`efficientnet_lite0` and `corruption_golden/source_errors.csv`, the errors under the images of the
reference code. No JPEG step on either side. `--seeds` redraws the random corruptions.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import driftline.core.vision  # noqa: F401  # isort: skip
import timm

from driftline.core.files import write_json, write_text
from driftline.streams import corruptions as C

DETERMINISTIC = {
    *("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"),
}
BATCH = 50


def images(folder: Path) -> tuple[Tensor, Tensor]:
    """Centre crops, uint8 [N, 3, 224, 224], and labels [N]."""
    with open(folder / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    crops = []
    for row in rows:
        with Image.open(folder / row["filename"]) as image:
            pixels = np.array(image.convert("RGB"))[16:240, 16:240]
        crops.append(torch.from_numpy(pixels).permute(2, 0, 1))
    return torch.stack(crops), torch.tensor([int(row["class_index"]) for row in rows])


@torch.inference_mode()
def wrong(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is misclassified, bool [N]."""
    scores = net(x.float().div(255).sub(0.5).div(0.5).contiguous(memory_format=torch.channels_last))
    return scores.argmax(1) != labels


def measure(
    net: nn.Module, x: Tensor, labels: Tensor, name: str, seed: int, frost: Path | None
) -> float:
    """Top-1 error in percent under one corruption at severity 5."""
    errors = 0
    for start in range(0, len(x), BATCH):
        rows = slice(start, start + BATCH)
        ids = range(len(x))[rows]
        batch = C.corrupt_batch(x[rows], name, 5, ids, seed=seed, frost_dir=frost)
        errors += int(wrong(net, batch, labels[rows]).sum())
    return 100 * errors / len(x)


HEAD = """\
# Errors of a network under the corruptions

Top-1 error (%) of EfficientNet-Lite0 on {images} ImageNet images at severity 5, no JPEG step. The
reference is the code of `hendrycks/robustness` on the same images. Other draws of the noise move an
error by up to a point or so; the aim is 1.5 points for each corruption and 0.5 for the mean.

    python benchmarks/check_corruptions.py --data DATA --frost FROST \\
      --out results/reference/corruptions.md
"""


def report(
    found: dict[str, list[float]], expected: dict[str, float], frost: Path | None, images: int
) -> str:
    """Markdown table; a redrawn corruption shows mean and standard deviation over its seeds."""
    lines = [
        HEAD.format(images=images),
        "| corruption | ours | redraws | reference | difference |",
        "|---|---|---|---|---|",
    ]
    means = {name: float(np.mean(errors)) for name, errors in found.items()}
    for name, errors in found.items():
        spread = f"{len(errors)} (std {np.std(errors, ddof=1):.2f})" if len(errors) > 1 else "1"
        label = f"{name} ({C.frost_source(frost)})" if name == "frost" else name
        lines.append(
            f"| {label} | {means[name]:.1f} | {spread} | {expected[name]:.1f} "
            f"| {means[name] - expected[name]:+.1f} |"
        )
    own = float(np.mean(list(means.values())))
    reference = float(np.mean([expected[name] for name in means]))
    lines.append(
        f"| mean of {len(means)} | {own:.2f} | | {reference:.2f} | {own - reference:+.2f} |"
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with images, weights and reference")
    add("--frost", type=Path, help="folder of the frost photographs; default: synthetic texture")
    add("--names", nargs="+", default=list(C.STANDARD))
    add("--seeds", type=int, default=1, help="redraws of the random corruptions")
    add("--images", type=int, default=1000)
    add("--threads", type=int, default=1)
    add("--out", type=Path, help="Markdown file; a JSON file is written beside it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = args.data / "efficientnet_lite0" / "tf_efficientnet_lite0.safetensors"
    net.load_state_dict(load_file(weights), strict=True)
    net = net.eval().to(memory_format=torch.channels_last)
    x, labels = images(args.data / "imagenet_real")
    x, labels = x[: args.images], labels[: args.images]
    with open(args.data / "corruption_golden" / "source_errors.csv", newline="") as file:
        expected = {r["stream"]: float(r["top1_error_percent"]) for r in csv.DictReader(file)}
    found: dict[str, list[float]] = {}
    for name in args.names:
        seeds = range(1 if name in DETERMINISTIC else args.seeds)
        found[name] = [measure(net, x, labels, name, seed, args.frost) for seed in seeds]
        print(name, found[name], "reference", expected[name], flush=True)
    text = report(found, expected, args.frost, len(x))
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(args.out, text)
        write_json(args.out.with_suffix(".json"), {"errors": found, "version": C.VERSION})


if __name__ == "__main__":
    main()
