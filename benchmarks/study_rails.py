"""What `around=rails` is worth: methods x streams, as they are and with rails.

    python benchmarks/study_rails.py --out results/rails
    python benchmarks/study_rails.py --out results/rails-real --methods tent,roid --images 64 \\
        --corruptions snow,contrast,motion_blur,pixelate data.root=/data scenario.batch_size=32

Words at the end are settings of every run. A cell is one pass of a method over a stream that keeps
the probabilities of the method and of the source for every image and its mirror image
(`<out>/<method>-<stream>.npz`, float16); the same command goes on where it was stopped. The rule
itself is then played on them, which takes a second and is exact as long as it never puts the method
back: rails change who answers, not what the method sees. Where it does, a second pass follows with
the rule around the method (`--replay`: not, the number is marked `*`).

The table has errors in percent over all images, passes more than without rails (a backward pass
counts as two forward ones), batches answered by the source and by both, and the warning "worse than
not adapting is likely" of `around.rails.answer=method`: most judgements were against the method.
Below it stand the goals of the rails, with precision and recall of the warning against the method's
error being more than a point above the source's. `--time N`: what rails cost on N batches of the
ordinary stream, the method alone and with rails in turn batch by batch.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from driftline.backbones.backbone import Backbone
from driftline.core import papers
from driftline.core.errors import UserError
from driftline.core.paths import CONF
from driftline.core.strategy import TTAStrategy
from driftline.core.stream import ShiftStream
from driftline.parts.rules.rails import Rails
from driftline.runs.compose import complete, make_strategy, make_stream, replays_source
from driftline.runs.machine import set_up
from driftline.runs.prepare import prepare
from driftline.streams.pipelines import Geometry

METHODS = (
    "tent,cotta,bn_adapt,eata,eta,sar,deyo,roid,cmf,rotta,note,sotta,petal,lame,t3a,neo,recap,"
    "come,unmix_tns"
)
CORRUPTIONS = "gaussian_noise,fog,jpeg_compression,contrast"
OUTAGES = ("noise", "black")  # in the middle of the stream
SORTED = "scenario.order=continual+correlated"
STREAMS: dict[str, list[str]] = {
    "ordinary": [],
    "sorted": [SORTED],
    "batch1": ["scenario.batch_size=1"],
    "batch4": ["scenario.batch_size=4"],
    "sorted4": [SORTED, "scenario.batch_size=4"],
    "noise": [],
    "black": [],
    "lr100": [],
}


class Built(NamedTuple):
    """A method on a stream, ready for the first batch, and the network before it."""

    strategy: TTAStrategy
    stream: ShiftStream
    source: Backbone


def configured(words: list[str], stream: str) -> DictConfig | None:
    """The settings of a run; None: the method has no learning rate to raise."""
    cfg = complete(compose("config", words))
    if stream == "lr100":
        for key in ("optim.lr", "lr"):
            if (rate := OmegaConf.select(cfg.strategy, key)) is not None:
                OmegaConf.update(cfg.strategy, key, 100 * float(rate))
                return cfg
        return None
    return cfg


def built(cfg: DictConfig) -> Built:
    """What `run.py` builds, without a run folder."""
    geometry, device = Geometry(), set_up(cfg)
    stream = make_stream(cfg, geometry, device)
    assert isinstance(stream, ShiftStream)

    def fresh() -> tuple[TTAStrategy, dict[str, str]]:
        made = make_strategy(cfg, stream, geometry, device)
        return cast(tuple[TTAStrategy, dict[str, str]], made)

    strategy, weights = fresh()
    bare = cfg.copy()
    bare.strategy, bare.around = compose("config", ["strategy=source"]).strategy, {}
    source = cast(Backbone, make_strategy(bare, stream, geometry, device)[0].backbone)
    prepare(
        strategy.method,
        lambda: fresh()[0].method,
        stream.source,
        weights=weights["hash"],
        folder=Path(cfg.root) / "prepared" / cfg.strategy.name,
        say=print,
        warn=print,
    )
    if replays_source(cfg):
        assert stream.source is not None
        strategy.use_source(stream.source())
    strategy.begin_stream()
    return Built(strategy, stream, source.eval())


def taken(strategy: TTAStrategy) -> int:
    passes = cast(Backbone, strategy.backbone).passes
    return passes.forward + 2 * passes.backward


def kept(scores: Tensor, outputs: str = "logits") -> Tensor:
    return (scores if outputs == "probabilities" else scores.softmax(1)).detach().half().cpu()


def record(cfg: DictConfig) -> dict[str, np.ndarray]:
    """Probabilities of method and source, of images and mirror images, over a whole stream."""
    strategy, stream, source = built(cfg)
    rows: dict[str, list[Tensor]] = {k: [] for k in ("pm", "fm", "ps", "fs", "y")}
    sizes, passes = [], []
    for segment in stream.segments:
        strategy.begin_segment()
        for batch in segment.batches(0):
            if batch is None:
                continue
            x, before = batch.x, taken(strategy)
            scores = kept(strategy.adapt(x), strategy.outputs)
            passes.append(taken(strategy) - before)
            with torch.no_grad():
                mirrored = kept(strategy.predict(x.flip(3)), strategy.outputs)
                answers = [kept(source(x)), kept(source(x.flip(3)))]
            for key, row in zip(rows, (scores, mirrored, *answers, batch.y.cpu()), strict=True):
                rows[key].append(row)
            sizes.append(len(x))
    joined = {key: torch.cat(row).numpy() for key, row in rows.items()}
    return {**joined, "sizes": np.array(sizes), "passes": np.array(passes)}


# ------------------------------------------------------------------ the rule on recorded answers


class Table(nn.Module):
    """Answers by number: an image is its number, left or (mirrored) right."""

    def __init__(self, plain: Tensor, mirrored: Tensor) -> None:
        super().__init__()
        self.num_classes = plain.shape[1]
        self.weight = nn.Parameter(torch.zeros(()))
        self.tables = (mirrored, plain)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x[:, 0, 0, 0].long(), x[:, 0, 0, 1].long()
        return self.tables[int((left > 0).any())][left + right - 1]


class Recorded(TTAStrategy):
    """A method that answers from a table, and counts passes as it did then."""

    def __init__(self, table: Table) -> None:
        super().__init__(Backbone(table))
        self.passes, self.back = 0, 0

    def predict(self, x: Tensor) -> Tensor:
        return self.backbone(x)

    def adapt(self, x: Tensor) -> Tensor:
        scores = self.backbone.net(x)
        cast(Backbone, self.backbone).passes.forward += self.passes
        return scores

    def reset(self) -> None:
        self.back += 1

    def restore(self, state: Any) -> None:
        self.back += 1


def numbered(start: int, stop: int) -> Tensor:
    x = torch.zeros(stop - start, 3, 1, 2)
    x[:, 0, 0, 0] = torch.arange(start, stop) + 1
    return x


def options(cfg: DictConfig, **other: Any) -> dict[str, Any]:
    return {k: v for k, v in cfg.around.rails.items() if k != "_target_"} | other


def play(rows: dict[str, np.ndarray], settings: dict[str, Any]) -> dict[str, Any]:
    """Error in percent, passes more in percent, and the report of the rule on recorded answers."""
    logs = [torch.from_numpy(rows[k].astype(np.float32)).clamp_min(1e-7).log() for k in TABLES]
    method = Recorded(Table(logs[0], logs[1]))
    rule = Rails(inner=method, source=Backbone(Table(logs[2], logs[3])), **settings)
    rule.begin_stream()
    y, at, wrong = torch.from_numpy(rows["y"]), 0, 0
    for size, passes in zip(rows["sizes"].tolist(), rows["passes"].tolist(), strict=True):
        method.passes = passes
        scores = rule.adapt(numbered(at, at + size))
        wrong += int((scores.argmax(1) != y[at : at + size]).sum())
        at += size
    more = 100 * (taken(method) / max(1, int(rows["passes"].sum())) - 1)
    return {"error": 100 * wrong / len(y), "more": more, "back": method.back, **rule.report()}


TABLES = ("pm", "fm", "ps", "fs")


def loop(cfg: DictConfig) -> dict[str, Any]:
    """The same of a pass with the rule around the method; `more` is that of the replay."""
    strategy, stream, _ = built(cfg)
    wrong = count = 0
    for segment in stream.segments:
        strategy.begin_segment()
        for batch in segment.batches(0):
            if batch is not None:
                scores = strategy.adapt(batch.x)
                wrong += int((scores.argmax(1) != batch.y).sum())
                count += len(batch.y)
    return {"error": 100 * wrong / count, **strategy.report()}


def timed(cfg: DictConfig, railed: DictConfig, batches: int) -> tuple[list[float], list[int]]:
    """CPU seconds and passes of the method alone and with rails for so many batches."""
    pair, seconds = (built(cfg), built(railed)), [0.0, 0.0]
    before, done = [taken(one.strategy) for one in pair], 0
    for segment in pair[0].stream.segments:
        for batch in segment.batches(0):
            if batch is None or done >= batches:
                continue
            order = (0, 1) if done % 2 else (1, 0)
            for i in order:
                started = time.process_time()
                pair[i].strategy.adapt(batch.x)
                seconds[i] += time.process_time() - started
            done += 1
    return seconds, [taken(one.strategy) - n for one, n in zip(pair, before, strict=True)]


# ------------------------------------------------------------------ the table


def cell(path: Path, words: list[str], stream: str, *, replay: bool) -> dict[str, Any] | None:
    """What the table says of one method on one stream; None: see `configured`."""
    found = path.with_suffix(".json")
    railed = configured([*words, "around=rails"], stream)
    plain = configured(words, stream)
    if plain is None or railed is None:
        return None
    if not path.exists():
        np.savez(path, **cast(Any, record(plain)))
        found.unlink(missing_ok=True)
    rows = dict(np.load(path))
    rails = play(rows, options(railed))
    watched = play(rows, options(railed, answer="method"))
    known = json.loads(found.read_text()) if found.exists() else {}
    if rails["back"] and not replay:
        if known.get("settings") != options(railed):
            known = {"settings": options(railed), **loop(railed)}
            found.write_text(json.dumps(known))
        rails |= {k: v for k, v in known.items() if k != "settings"}
    errors = {k: 100 * float((rows[k].argmax(1) != rows["y"]).mean()) for k in ("ps", "pm")}
    return {
        "source": errors["ps"],
        "plain": errors["pm"],
        "rails": rails["error"],
        "star": bool(rails["back"]) and replay,
        "more": rails["more"],
        "batches": len(rows["sizes"]),
        "by_source": rails["rails_by_source"],
        "by_both": rails["rails_by_both"],
        "worse": watched["rails_worse"],
        "judged": watched["rails_judged"],
        "warned": bool(watched["rails_worse"])
        and 2 * watched["rails_worse"] >= watched["rails_judged"],
    }


def table(rows: dict[tuple[str, str], dict[str, Any] | None]) -> str:
    lines = ["| stream | method | source | plain | rails | passes | batches | by source | by both "]
    lines[0] += "| against | warned |"
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|")
    for (stream, method), r in rows.items():
        if r is not None:
            warned = "yes" if r["warned"] else "no"
            star = "*" if r["star"] else ""
            lines.append(
                f"| {stream} | {method} | {r['source']:.1f} | {r['plain']:.1f} "
                f"| {r['rails']:.1f}{star} | {r['more']:+.0f} % | {r['batches']} "
                f"| {r['by_source']:.0f} | {r['by_both']:.0f} "
                f"| {r['worse']:.0f} of {r['judged']:.0f} | {warned} |"
            )
    return "\n".join(lines)


def goals(rows: dict[tuple[str, str], dict[str, Any] | None]) -> str:
    whole = {k: r for k, r in rows.items() if r is not None}
    hostile = {k: r["rails"] - r["source"] for k, r in whole.items() if k[0] != "ordinary"}
    ordinary = {k: r for k, r in whole.items() if k[0] == "ordinary"}
    lines = []
    if hostile:
        bad = [f"{'/'.join(k)} {d:+.1f}" for k, d in hostile.items() if d > 1]
        before = sum(whole[k]["plain"] - whole[k]["source"] > 1 for k in hostile)
        lines.append(
            f"* hostile: {len(bad)} of {len(hostile)} end more than a point worse than the source "
            f"with rails, {before} without{': ' if bad else ''}{', '.join(bad)}"
        )
        lost = [f"{'/'.join(k)} {whole[k]['rails'] - whole[k]['plain']:+.1f}" for k in hostile
                if whole[k]["rails"] - whole[k]["plain"] > 1]  # fmt: skip
        lines.append(
            f"* hostile: {len(lost)} of {len(hostile)} end more than a point worse than the method "
            f"without rails{': ' if lost else ''}{', '.join(lost)}"
        )
    if ordinary:
        points = {k[1]: r["rails"] - r["plain"] for k, r in ordinary.items()}
        most = max(points, key=lambda k: points[k])
        more = sorted(r["more"] for r in ordinary.values())
        lines.append(
            f"* ordinary: rails cost at most {points[most]:+.2f} points ({most}), on average "
            f"{sum(points.values()) / len(points):+.2f}, and {more[len(more) // 2]:+.1f} % of the "
            "passes (median)"
        )
    hits = [(r["plain"] - r["source"] > 1, r["warned"]) for r in whole.values()]
    right = sum(worse and warned for worse, warned in hits)
    warned, worse = sum(w for _, w in hits), sum(w for w, _ in hits)
    wrong = [
        f"{'/'.join(k)} ({r['plain'] - r['source']:+.1f})"
        for k, r in whole.items()
        if r["warned"] != (r["plain"] - r["source"] > 1)
    ]
    lines.append(
        f"* warning: precision {right} of {warned}, recall {right} of {worse} ({len(whole)} cells)"
        f"{'; wrong: ' if wrong else ''}{', '.join(wrong)}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("--out", required=True, help="folder of the cells, and of table.md")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--streams", default=",".join(STREAMS))
    parser.add_argument("--corruptions", default=CORRUPTIONS)
    parser.add_argument("--images", default="150", help="of each corruption")
    parser.add_argument("--replay", action="store_true", help="no second pass")
    parser.add_argument("--known", action="store_true", help="only cells that were recorded")
    parser.add_argument("--time", type=int, default=0, help="batches; the table is not made")
    parser.add_argument("settings", nargs="*", help="of every run, as after run.py")
    args = parser.parse_args()
    torch.set_num_threads(1)
    papers.register()
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    common = [f"root={out}", f"scenario.images={args.images}"]
    common += ["scenario.probe_images=0", "scenario.clean_images=0"]

    def words(stream: str, method: str) -> list[str]:
        domains = args.corruptions.split(",")
        if stream in OUTAGES:
            domains.insert(len(domains) // 2, stream)
        mine = [f"strategy={method}", f"scenario.corruptions=[{','.join(domains)}]"]
        return [*mine, *common, *args.settings, *STREAMS[stream]]

    with initialize_config_dir(str(CONF), version_base=None):
        if args.time:
            for method in args.methods.split(","):
                mine = words("ordinary", method)
                pair = [configured([*mine, *more], "ordinary") for more in ([], ["around=rails"])]
                seconds, passes = timed(cast(Any, pair[0]), cast(Any, pair[1]), args.time)
                more = [100 * (two / one - 1) for one, two in (seconds, passes)]
                print(f"{method}: {more[0]:+.1f} % CPU time, {more[1]:+.1f} % passes", flush=True)
            return
        rows: dict[tuple[str, str], dict[str, Any] | None] = {}
        for stream, method in product(args.streams.split(","), args.methods.split(",")):
            path = out / f"{method}-{stream}.npz"
            if args.known and not path.exists():
                continue
            try:
                found = cell(path, words(stream, method), stream, replay=args.replay)
            except UserError as error:
                print(f"{stream}/{method}: {error}", flush=True)
                continue
            rows[stream, method] = found
            print(f"{stream}/{method}", found, flush=True)
    text = f"{table(rows)}\n\n{goals(rows)}\n"
    print(text)
    (out / "table.md").write_text(text)


if __name__ == "__main__":
    main()
