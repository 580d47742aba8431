"""The calibration grid of `scenario=ccc`: accuracy of a network under every pair of severities.

    python scripts/calibrate_ccc.py scenario=ccc --out ccc.json            # embedded images
    python scripts/calibrate_ccc.py scenario=ccc data.root=/data --images 1000 --out ccc.json
    python run.py scenario=ccc data.root=/data scenario.calibration=ccc.json

Plain words are settings of a run; its backbone, without adaptation, is measured. Images: of the
set that stays outside the stream where there are enough, else of the stream's own list (the file
says which). Ordered pairs are written one by one: the same command again goes on where it was
stopped, and refuses a file of other settings. `--step 0.25` is CCC's; coarser grids give coarser
walks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from torch import Tensor

from driftline.backbones.backbone import Backbone, weights_hash
from driftline.core import papers
from driftline.core.build import build, build_part
from driftline.core.console import program
from driftline.core.errors import UserError
from driftline.core.files import write_text
from driftline.core.seed import derive
from driftline.runs.execute import complete, set_up
from driftline.streams import corruptions as C
from driftline.streams.corrupted import frost_content
from driftline.streams.dataset import NAMED, CleanData
from driftline.streams.pairs import corrupt_pair, corruption_names, key
from driftline.streams.severities import HIGHEST, STEP

ROOT = Path(__file__).parents[1]

QUARTERS = round(HIGHEST / STEP)
BATCH = 64


@torch.inference_mode()
def accuracy(net: Backbone, levels: Tensor, labels: Tensor) -> float:
    """Percent of uint8 [N, 3, H, W] that are classified correctly."""
    right = 0
    for start in range(0, len(levels), BATCH):
        scores = net.logits(levels[start : start + BATCH].float().div(255))
        right += int((scores.argmax(1) == labels[start : start + BATCH]).sum())
    return 100 * right / len(levels)


class Grid:
    """Measures the grid of one ordered pair after the other.

    Args:
        levels: clean images, uint8 [N, 3, H, W], on the device of `net`.
        severities: in quarters, from 0.
        settings: preset, seed, frost_dir and jpeg_quality of `corrupt_pair`.
    """

    def __init__(
        self,
        net: Backbone,
        levels: Tensor,
        labels: Tensor,
        severities: list[int],
        settings: dict[str, Any],
    ) -> None:
        self.net, self.levels, self.labels = net, levels, labels
        self.severities, self.settings = severities, settings
        self._single: dict[tuple[str, int], float] = {}  # one corruption alone serves many pairs

    def _corrupted(self, levels: Tensor, name: str, quarters: int, jpeg: bool) -> Tensor:
        settings = self.settings if jpeg else {**self.settings, "jpeg_quality": None}
        ids = range(len(levels))
        return torch.cat(
            [
                corrupt_pair(
                    levels[at : at + BATCH], (name, name), (quarters, 0), ids[at : at + BATCH],
                    **settings,
                )
                for at in range(0, len(levels), BATCH)
            ]
        )  # fmt: skip

    def _alone(self, name: str, quarters: int) -> float:
        key = (name if quarters else "", quarters)
        if key not in self._single:
            found = self._corrupted(self.levels, name, quarters, True)
            self._single[key] = accuracy(self.net, found, self.labels)
        return self._single[key]

    def pair(self, a: str, b: str) -> np.ndarray:
        """Percent, [K, K]: severity of a, severity of b."""
        rows = []
        for i in self.severities:
            if not i:
                rows.append([self._alone(b, j) for j in self.severities])
                continue
            first = self._corrupted(self.levels, a, i, False)
            rows.append(
                [
                    accuracy(self.net, self._corrupted(first, b, j, True), self.labels)
                    if j
                    else self._alone(a, i)
                    for j in self.severities
                ]
            )
        return np.asarray(rows)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", help="of a run, e.g. scenario=ccc data.root=/data")
    parser.add_argument("--out", type=Path, required=True, help="the calibration file, .json")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--step", type=float, default=STEP, help="between severities, e.g. 0.5")
    args = parser.parse_args(words)
    side = HIGHEST / args.step if args.step > 0 else 0.0
    if side < 2 or side % 1 or QUARTERS % side:
        raise UserError(f"--step={args.step:g} must be 0.25, 0.5, 1, 1.25 or 2.5")
    papers.register()
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", args.settings or ["scenario=ccc"])
    except HydraException as error:
        raise UserError(str(error).splitlines()[0]) from error
    cfg = complete(cfg)
    scenario = cfg.scenario
    if "baseline" not in scenario:
        raise UserError(f"scenario={scenario.name} has no calibration; use scenario=ccc")
    device = set_up(cfg)
    names = corruption_names(scenario.corruptions, float(scenario.baseline))
    root = cfg.data.root
    wanted = {**scenario, "clean_images": args.images}
    data: CleanData = build_part(Annotated[CleanData, NAMED], wanted, at="scenario", data_root=root)
    found = data.images()
    apart = len(found.held_out) >= args.images
    rows = found.held_out if apart else found.rows
    if not 1 <= args.images <= len(rows):
        raise UserError(f"--images={args.images}, but {len(rows)} images are available")
    rng = np.random.default_rng(derive(scenario.order_seed, "calibration"))
    rows = rng.permutation(rows)[: args.images]

    torch.manual_seed(0)
    net: Backbone = build(cfg.backbone, at="backbone").to(device).eval()
    options = {
        "preset": data.preset,
        "seed": int(scenario.corruption_seed) + 1,  # other draws than the stream's
        "jpeg_quality": scenario.jpeg_quality if root and data.preset == "imagenet" else None,
        "frost_dir": scenario.frost_dir,
    }
    settings: dict[str, Any] = {
        "network": {"tag": net.tag, "weights": weights_hash(net.net.state_dict())},
        "dataset": scenario.dataset if root else "embedded",
        "images": args.images,
        "images_from": "outside the stream" if apart else "the images of the stream",
        "step": args.step,
        **options,
        "frost_dir": frost_content(options["frost_dir"]),
        "version": C.VERSION,
        **({"content": found.clean.content(rows)} if root else {}),
    }
    accuracies = read(args.out, settings)
    levels = torch.stack(
        [torch.from_numpy(np.array(found.clean.image(int(r)))).permute(2, 0, 1) for r in rows]
    ).to(device)
    labels = torch.from_numpy(found.clean.labels[rows]).to(device)
    severities = list(range(0, QUARTERS + 1, round(args.step / STEP)))
    grid = Grid(net, levels, labels, severities, options)
    pairs = [(a, b) for a in names for b in names if a != b]
    for n, (a, b) in enumerate(pairs, 1):
        if key((a, b)) in accuracies:
            continue
        accuracies[key((a, b))] = grid.pair(a, b).round(2).tolist()
        try:
            write_text(args.out, text(settings, accuracies))
        except OSError as error:
            raise UserError(f"--out={args.out}: cannot write there: {error.strerror}") from error
        print(f"{n}/{len(pairs)} {a} then {b}", flush=True)
    print(f"{args.out}: {len(accuracies)} pairs of {net.tag} on {args.images} images")


def text(settings: dict[str, Any], accuracies: dict[str, Any]) -> str:
    """JSON with a pair a line."""
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in accuracies.items())
    return f'{{"settings": {json.dumps(settings)},\n"accuracy": {{\n{lines}\n}}}}\n'


def read(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The grids measured so far.

    Raises:
        UserError: if they were measured with other settings.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        known, accuracy = content["settings"], content["accuracy"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out={path} is no calibration file; name another") from error
    differ = [k for k in settings if known.get(k) != settings[k]]
    if differ:
        raise UserError(
            f"--out={path} was measured with other settings ({', '.join(differ)}); name another "
            "file, or remove this one"
        )
    return accuracy


if __name__ == "__main__":
    try:
        sys.exit(program(main))
    except UserError as error:
        sys.exit(f"error: {error}")
