"""Merge what finished runs have learned into one method, by a rule of docs/merging.md.

    python scripts/merge.py RUN RUN ... --rule ties --out merged.safetensors
    python scripts/merge.py RUN RUN --rule ties --option density=0.3 --out new.safetensors
    python scripts/merge.py RUN RUN --rule mean --out soup.safetensors --evaluate

RUN is the folder of a finished continual run that kept its method (checkpoint.model=true). All have
the same backbone, and tensors of the same names and shapes to merge: adapters, or the network.
The result is a file for `driftline.load`: the method of the first run with merged weights. Task
vectors are differences to what the first run began with. Where all runs had the same stream, heads
are averaged; otherwise the head is that of the first run, and it knows the classes of that run.
Its settings name the runs, the rule and its options (`made_of["merged"]`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor

from driftline.analysis.runs import read_config
from driftline.backbones.backbone import weights_hash
from driftline.core.build import build, check_call
from driftline.core.console import program
from driftline.core.errors import UserError, suggest
from driftline.core.strategy import CLStrategy, Strategy
from driftline.core.stream import Task
from driftline.parts import merging
from driftline.parts.adapters.starts import CALIBRATED
from driftline.runs.compose import make_stream
from driftline.runs.execute import MODEL
from driftline.runs.saving import begun, construct, innermost, load, write_method
from driftline.streams.pipelines import Geometry

BODY = ("bank.", "backbone.")  # where a method keeps what is merged


@dataclass
class Run:
    """One finished run: its folder, settings, tasks, method without rules, and its tensors."""

    folder: Path
    config: dict[str, Any]
    made_of: dict[str, Any]
    tasks: list[Task]
    method: CLStrategy
    body: dict[str, Tensor]
    head: dict[str, Tensor]


def read(folder: Path) -> Run:
    """The run of a folder.

    Raises:
        UserError: for what is no finished continual run with a method that can be merged.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is no folder of a run: it has no config.yaml")
    if not (folder / "summary.json").is_file():
        raise UserError(f"{folder} is not finished: it has no summary.json; run it to its end")
    if not (folder / MODEL).is_file():
        raise UserError(
            f"{folder} has no {MODEL}: the same command with on_exists=rerun checkpoint.model=true "
            "makes it"
        )
    method: Strategy = load(folder / MODEL)
    made_of, tasks = dict(method.made_of or {}), list(begun(method))
    name = made_of["strategy"]["name"]
    if others := [rule for rule in made_of["around"] if rule != "merge"]:
        raise UserError(f"{folder}: around={others[0]} answers with other weights than it trains")
    one = innermost(method)
    if not isinstance(one, CLStrategy):
        raise UserError(
            f"{folder}: strategy={name} adapts at test time; merge runs that learn tasks"
        )
    if one.unmergeable or not one.averageable:
        why = one.unmergeable or "it answers with statistics of its own weights"
        raise UserError(f"{folder}: strategy={name} cannot be merged: {why}")
    start = (made_of["strategy"].get("adapter") or {}).get("start")
    if start in CALIBRATED and start != "saft":  # whose values begin at 0
        raise UserError(
            f"{folder}: its adapters began from images (strategy.adapter.start={start}), "
            "which no file knows; merge runs with start=null, pissa or orthonormal"
        )
    config = read_config((folder / "config.yaml").read_text())
    body, head = split(one)
    return Run(folder, config, {**made_of, "around": {}}, tasks, one, body, head)


def split(method: CLStrategy) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is merged, and the head, by name."""
    frozen = method.frozen()
    named = {n: p.detach() for n, p in method.named_parameters() if n not in frozen}
    body = {n: p for n, p in named.items() if n.startswith(BODY)}
    return body, {n: p for n, p in named.items() if n.startswith("head.")}


def compare(runs: Sequence[Run]) -> None:
    """Whether runs can be merged.

    Raises:
        UserError: for the first that differs from the first of all, naming what differs.
    """
    first = runs[0]
    for run in runs[1:]:
        mine, its = (r.made_of["backbone"] for r in (first, run))
        if mine != its:
            names = [b.get("tag") or b["name"] for b in (its, mine)]
            odd = next((k for k in sorted({*mine, *its}) if mine.get(k) != its.get(k)), "name")
            raise UserError(
                f"{run.folder} has another backbone than {first.folder}: {names[0]}, not "
                f"{names[1]} (backbone.{odd})"
            )
        try:
            merging.check([first.body, run.body])
        except ValueError as error:
            raise UserError(
                f"{run.folder} (set 1) does not fit {first.folder} (set 0): {error}. Merge runs "
                "with the same adapter and strategy settings"
            ) from None
        settings = [r.made_of["strategy"].get("adapter") for r in (first, run)]
        fixed = [constants(r) for r in (first, run)]
        odd = next((n for n in fixed[0] if not torch.equal(fixed[0][n], fixed[1][n])), None)
        if settings[0] != settings[1] or odd:
            raise UserError(
                f"{run.folder} has adapters that do not correspond to those of {first.folder}: "
                + (f"{odd} differs and does not learn" if odd else "other settings")
                + ". Merge runs with the same strategy.adapter and, where it draws or chooses what "
                "is fixed, the same seed"
            )


def constants(run: Run) -> dict[str, Tensor]:
    """What the adapters of a run hold and never learn: entries, columns, fixed factors; by name."""
    bank = getattr(run.method, "bank", None)
    names = list(bank.sets) if bank else []
    return {f"{name}.{key}": t for name in names for key, t in bank.fixed(name).items()}


def beginning(run: Run) -> dict[str, Tensor]:
    """What is merged of a run, as it was before the first task."""
    fresh: Any = construct(run.made_of, build(run.made_of["backbone"], at="backbone"))
    for task in run.tasks:  # sets that later tasks make
        fresh.grow(task)
    return {n: p.detach() for n, p in fresh.named_parameters() if n in run.body}


def merge(runs: Sequence[Run], rule: str, options: Mapping[str, Any]) -> tuple[Run, list[str]]:
    """The first run with merged weights, and remarks."""
    first = runs[0]
    starts = [beginning(run) for run in runs]
    began = starts[0]
    merged = merging.added(
        began,
        merging.RULES[rule](merging.differences([r.body for r in runs], began), **options),
    )
    remarks = []
    if len({weights_hash(start) for start in starts}) > 1:
        remarks.append(
            "the runs began with other adapters (other seeds): their low-rank factors do not "
            "correspond, and merged factors may mean little"
        )
    same = all(stream_of(run) == stream_of(first) for run in runs[1:])
    if same:
        merged |= merging.mean([run.head for run in runs])
        remarks.append("heads: averaged, as all runs had the same stream")
    else:
        remarks.append(f"head: that of {first.folder}, as the streams differ; it knows its classes")
    with torch.no_grad():
        for name, value in merged.items():
            first.method.get_parameter(name).copy_(value)
    first.made_of["merged"] = {
        "rule": rule,
        "options": dict(options),
        "runs": [str(run.folder) for run in runs],
        "weights": [weights_hash(run.body) for run in runs],
        "heads": "averaged" if same else "first",
    }
    return first, remarks


def stream_of(run: Run) -> str:
    """What decides which classes and images a run met."""
    return json.dumps([run.config["scenario"], run.config["data"].get("root")], sort_keys=True)


def accuracy(run: Run) -> list[float]:
    """Percent of the test images of each task of the run's own stream, over all classes seen."""
    config = OmegaConf.create(run.config)
    backbone: Any = run.method.backbone
    geometry = Geometry(backbone.input_size, backbone.interpolation)
    stream: Any = make_stream(config, geometry, torch.device("cpu"))
    rows = []
    for task in stream.tasks:
        right = [run.method.predict(b.x).argmax(1) == b.y for b in task.test()]
        rows.append(100 * torch.cat(right).float().mean().item())
    return rows


def checked(rule: str, words: Sequence[str], count: int) -> dict[str, Any]:
    """The options of a rule, `key=value` each.

    Raises:
        UserError: for a rule or an option that does not exist, or a value out of range.
    """
    if rule not in merging.RULES:
        near = suggest(rule, merging.RULES)
        raise UserError(f"--rule {rule} is none{near}: one of {', '.join(merging.RULES)}")
    options: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UserError(f"--option {word} is not of the form key=value")
        try:
            options[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--option {word}: {value!r} is no value") from error
    known = merging.defaults(rule)
    if rule.startswith("dare"):
        options.setdefault("seed", 0)
    check_call(merging.RULES[rule], {"vectors": [], **options}, at=f"{rule}")
    if options.get("weights") is not None and len(options["weights"]) != count:
        raise UserError(f"{rule}.weights has {len(options['weights'])} values for {count} runs")
    return known | options


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--rule", required=True, help=", ".join(merging.RULES))
    parser.add_argument("--option", nargs="*", action="extend", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True, help="a new .safetensors file")
    parser.add_argument("--evaluate", action="store_true", help="on the stream of the first run")
    args = parser.parse_args()
    try:
        options = checked(args.rule, args.option, len(args.runs))
        places = [folder.resolve() for folder in args.runs]
        if len(places) < 2:
            raise UserError("there is nothing to merge with one run: name two or more")
        if twice := next((p for p in places if places.count(p) > 1), None):
            raise UserError(f"{twice} is named twice")
        if args.out.suffix != ".safetensors" or args.out.exists():
            fault = "exists already" if args.out.exists() else "does not end with .safetensors"
            raise UserError(f"--out {args.out} {fault}: choose another name")
        runs = [read(folder) for folder in args.runs]
        compare(runs)
        before = {str(r.folder): accuracy(r) for r in runs[:1]} if args.evaluate else {}
        result, remarks = merge(runs, args.rule, options)
        write_method(result.method, args.out, result.made_of, result.tasks)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = sum(t.numel() for t in result.body.values())
    print(
        f"{args.out}: {len(runs)} runs, {args.rule}, {size:,} values of {len(result.body)} tensors"
    )
    for remark in remarks:
        print(remark)
    if args.evaluate:
        for what, rows in {**before, "merged": accuracy(result)}.items():
            print(f"{what}: " + " ".join(f"{row:.2f}" for row in rows) + " % of each task")
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
