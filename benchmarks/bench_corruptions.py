"""Speed of the corruptions against public code, in one process and interleaved.

    python benchmarks/bench_corruptions.py          # writes results/corruptions/<machine>.json
    python benchmarks/bench_corruptions.py --device cuda --batch 64

Standard output is the Markdown of the section "Speed" in docs/corruptions.md; progress goes to the
standard error.

Milliseconds of processor time an image, one core, severity 5, draws included. Every round runs all
sides of a corruption one after the other; the table shows medians over the rounds, and ratios that
are medians of the ratios within a round.

`exact` and `fast` are `corrupt_batch` in its two precisions, `single` is `corrupt`. `public` is the
package `imagecorruptions`, if it can be imported (`--packages` names a folder to look in; names
that newer libraries have dropped are put back for it, which changes none of its arithmetic). Its
frost decodes a photograph for every image and its elastic transform lacks the affine part. `steps`
is benchmarks/reference_corruptions.py. Ratios are against `public`, else against `steps`.

On a GPU the times are wall-clock, the draws stay on the host, and the last column is the share of a
ResNet-50 forward (fp32, same batch) that the generation of the batch costs.
"""

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"  # before NumPy is loaded

import argparse
import contextlib
import io
import re
import sys
import time
import types
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]

from reference_corruptions import transcriptions

from driftline.core.files import write_json
from driftline.core.record import environment
from driftline.streams import corruptions as C

SEVERITY = 5
# Sum of the 15 in ms, geometric mean of the ratios, lowest ratio: a core, 224 px, draws included.
TARGETS = {"exact": (66.0, 3.0, 0.9)}
Side = Callable[[], Any]


def scene(side: int, seed: int) -> np.ndarray:
    """Cloudy random colours with the 1/f spectrum of photographs, uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = np.inf
    planes = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(3, side, side))) / frequency**1.3)
    planes *= 50 / planes.std(axis=(1, 2), keepdims=True)
    return np.clip(planes.transpose(1, 2, 0) + 120, 0, 255).astype(np.uint8)


def public(packages: Path | None) -> tuple[Callable[..., Any] | None, str]:
    """`imagecorruptions.corrupt` and its version, or None and the reason."""
    if packages is not None:
        sys.path.insert(0, str(packages))
    try:
        import cv2
        import scipy.ndimage
        import skimage.filters

        cv2.setNumThreads(1)
        interpolation = types.ModuleType("scipy.ndimage.interpolation")
        interpolation.map_coordinates = scipy.ndimage.map_coordinates  # type: ignore
        resources = types.ModuleType("pkg_resources")
        resources.resource_filename = lambda name, path: str(  # type: ignore
            Path(sys.modules[name].__file__ or "").parent / path
        )
        sys.modules[interpolation.__name__] = interpolation
        sys.modules[resources.__name__] = resources
        np.float_ = np.float64  # type: ignore
        import imagecorruptions
        import imagecorruptions.corruptions as module

        def gaussian(image: np.ndarray, sigma: Any, multichannel: bool = False, **more: Any) -> Any:
            axis = -1 if multichannel else None
            return skimage.filters.gaussian(image, sigma, channel_axis=axis, **more)

        module.gaussian = gaussian
    except ImportError as error:
        return None, f"not available ({error})"
    from importlib.metadata import version

    return imagecorruptions.corrupt, f"imagecorruptions {version('imagecorruptions')}"


def clock(run: Side, images: int, cuda: bool) -> float:
    """Milliseconds an image: processor time of this process, or wall-clock time on a GPU."""
    now = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    start = now()
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints
        run()
    if cuda:
        torch.cuda.synchronize()
    return (now() - start) * 1000 / images


def forward_ms(batch: int, side: int, rounds: int, device: torch.device) -> float:
    """Milliseconds an image of a ResNet-50 forward, fp32, channels-last."""
    import driftline.core.vision  # noqa: F401  # isort: skip
    from torchvision.models import resnet50

    net = resnet50().eval().to(device, memory_format=torch.channels_last)
    x = torch.rand(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
    cuda = device.type == "cuda"
    with torch.inference_mode():
        for _ in range(3):
            net(x)
        return float(np.median([clock(lambda: net(x), batch, cuda) for _ in range(rounds)]))


def compare(
    name: str, args: argparse.Namespace, other: Callable[..., Any] | None, files: list[Path]
) -> dict[str, Any]:
    """Medians and ratios of one corruption."""
    cuda = args.device == "cuda"
    scenes = [scene(args.side, i) for i in range(args.batch)]
    x = torch.stack([torch.from_numpy(s).permute(2, 0, 1) for s in scenes]).contiguous()
    x = x.to(args.device)
    given = {"frost_dir": args.frost}
    ids = range(args.batch)
    sides: dict[str, tuple[Side, int]] = {
        precision: (
            partial(C.corrupt_batch, x, name, SEVERITY, ids, precision=precision, **given),
            args.batch,
        )
        for precision in ("exact", "fast")
    }
    if not cuda:
        sides["single"] = (partial(C.corrupt, scenes[0], name, SEVERITY, **given), 1)
        if other is not None:
            sides["public"] = (partial(other, scenes[0], SEVERITY, name), 1)
        steps = transcriptions(files).get(name)
        if steps is not None:
            parameters = C._PARAMETERS["imagenet"][name][SEVERITY - 1]
            rng = np.random.RandomState(0)
            sides["steps"] = (partial(steps, scenes[0], parameters, rng), 1)
    for run, _ in sides.values():
        clock(run, 1, cuda)
    times: dict[str, list[float]] = {key: [] for key in sides}
    for _ in range(args.rounds):
        for key, (run, images) in sides.items():
            # single images are timed in groups, for a clock of limited resolution
            slow = name == "glass_blur" and key in ("public", "steps")
            repeats = 1 if images > 1 or slow else args.batch
            times[key].append(np.mean([clock(run, images, cuda) for _ in range(repeats)]))
    row: dict[str, Any] = {"name": name} | {k: float(np.median(v)) for k, v in times.items()}
    rival = "public" if "public" in times else "steps" if "steps" in times else None
    if rival:
        row["against"] = rival
        for key in ("exact", "fast"):
            ratios = np.divide(times[rival], times[key])
            row[f"{key}_ratio"] = float(np.median(ratios))
            row[f"{key}_range"] = [float(ratios.min()), float(ratios.max())]
    return row


def geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sums and geometric means over the standard corruptions."""
    chosen = [row for row in rows if row["name"] in C.STANDARD]
    keys = [
        k for k in ("exact", "fast", "single", "public", "steps") if all(k in r for r in chosen)
    ]
    out: dict[str, Any] = {"corruptions": len(chosen)}
    out["sum_ms"] = {key: sum(row[key] for row in chosen) for key in keys}
    if all("exact_ratio" in row for row in chosen):
        for key in ("exact", "fast"):
            ratios = [row[f"{key}_ratio"] for row in chosen]
            out[f"{key}_geometric_mean"] = geometric_mean(ratios)
            out[f"{key}_lowest"] = min(ratios)
            rival = sum(row[row["against"]] for row in chosen)
            out[f"{key}_sum_ratio"] = rival / out["sum_ms"][key]
    return out


def table(rows: list[dict[str, Any]], forward: float | None) -> str:
    """Markdown."""
    keys = [k for k in ("exact", "fast", "single", "public", "steps") if any(k in r for r in rows)]
    heads = ["corruption", *(f"{k} ms" for k in keys), "exact ratio", "fast ratio"]
    if forward is not None:
        heads = [*heads[:-2], "share of a forward, %"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["name"], *(f"{row[k]:.2f}" if k in row else "" for k in keys)]
        if forward is not None:
            cells.append(f"{100 * row['exact'] / forward:.0f}")
        else:
            cells += [f"{row[k]:.1f}" if k in row else "" for k in ("exact_ratio", "fast_ratio")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def listed(values: dict[str, float], unit: str = "") -> str:
    """`exact 1.2, fast 1.0` with units."""
    return ", ".join(f"{key} {value:.1f}{unit}" for key, value in values.items())


def words(rows: list[dict[str, Any]], total: dict[str, Any]) -> str:
    """The summary as a Markdown list."""
    lines = [f"- Sum of the {total['corruptions']} standard: {listed(total['sum_ms'], ' ms')}."]
    for key in ("exact", "fast"):
        if f"{key}_geometric_mean" not in total:
            continue
        ratios = {r["name"]: r[f"{key}_ratio"] for r in rows if r["name"] in C.STANDARD}
        least = min(ratios, key=lambda name: ratios[name])
        without = [ratio for name, ratio in ratios.items() if name != "glass_blur"]
        lines.append(
            f"- `{key}`: geometric mean of the ratios {total[f'{key}_geometric_mean']:.2f} "
            f"({geometric_mean(without):.2f} without `glass_blur`), ratio of the sums "
            f"{total[f'{key}_sum_ratio']:.1f}, lowest {ratios[least]:.2f} (`{least}`)."
        )
    if all(f"{key}_geometric_mean" in total for key in TARGETS) and len(ratios) == len(C.STANDARD):
        for key, (limit, mean, lowest) in TARGETS.items():
            met = {
                f"sum at most {limit:.0f} ms": total["sum_ms"][key] <= limit,
                f"geometric mean at least {mean:.0f}": total[f"{key}_geometric_mean"] >= mean,
                f"no ratio below {lowest}": total[f"{key}_lowest"] >= lowest,
            }
            verdicts = (f"{text}: {'met' if ok else 'NOT met'}" for text, ok in met.items())
            lines.append(f"- Targets of `{key}` (224 px): {'; '.join(verdicts)}.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--names", nargs="+", default=[*C.STANDARD, *C.EXTRA])
    add("--side", type=int, default=224)
    add("--batch", type=int, default=8)
    add("--rounds", type=int, default=15)
    add("--frost", type=Path, help="frost photographs; default: those of the package, if installed")
    add("--packages", type=Path, help="folder with imagecorruptions and opencv-python-headless")
    add("--out", type=Path, help="default: results/corruptions/<machine>.json")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in (*C.STANDARD, *C.EXTRA)]:
        parser.error(f"unknown corruption {unknown}; there are {[*C.STANDARD, *C.EXTRA]}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device was found")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    device = torch.device(args.device)
    other, contender = public(args.packages)
    if args.frost is None and other is not None:
        args.frost = Path(sys.modules["imagecorruptions"].__file__ or "").parent / "frost"
    files = [args.frost / name for name in C.FROST_FILES] if args.frost else []
    before = os.getloadavg()[0]
    facts = environment(device)
    rows = []
    for name in args.names:
        print(name, file=sys.stderr, flush=True)
        rows.append(compare(name, args, other, files))
    forward = None
    if args.device == "cuda":
        forward = forward_ms(args.batch, args.side, args.rounds, device)
    total = summary(rows)
    print(
        f"{facts['device']}, torch {torch.__version__.split('+')[0]}, one thread, {args.side} px, "
        f"severity {SEVERITY}; medians of {args.rounds} rounds, load {before:.1f} before; "
        f"public: {contender}; frost: {C.frost_source(args.frost)}.\n"
    )
    print(table(rows, forward))
    if any(row["name"] in C.STANDARD for row in rows):
        print("\n" + words(rows, total))
    machine = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = args.out or ROOT / "results" / "corruptions" / f"{machine}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = [Path(a).name if "/" in a else a for a in sys.argv[1:]]
    write_json(
        path,
        {
            "command": "python benchmarks/bench_corruptions.py " + " ".join(shown),
            "environment": facts,
            "public": contender,
            "frost": C.frost_source(args.frost),
            "severity": SEVERITY,
            "side": args.side,
            "batch": args.batch,
            "rounds": args.rounds,
            "load": [before, os.getloadavg()[0]],
            "rows": rows,
            "summary": total,
            "forward_ms": forward,
        },
    )


if __name__ == "__main__":
    main()
