"""Choose hyper-parameters on one stream, freeze them, evaluate on others: the honest protocol.

    python scripts/tune.py strategy=tent data.root=/data \\
        --search strategy.optim.lr=1e-4,1e-3,1e-2 \\
        --tune-on "scenario=cifar10_c backbone.checkpoint=/weights/cifar10.pt" \\
        --evaluate-on "scenario=imagenet_c seed=0,1,2"

Plain words are settings of every run. --search takes Hydra's sweep words: `a,b,c`, `range(1,5)`,
and for random and Optuna also `interval(0,1)`, `int(interval(1,8))`, `tag(log,interval(1e-5,1))`.
All runs go through `python run.py -m` (add hydra/launcher=joblib and the like), so the same command
again finds finished runs. The search and its winner lie in <root>/.tune/<name>/; the result of
every evaluation run says under `tuned` what was chosen, from what, on which stream. Sources of the
protocol: Cha and Cho, "Hyperparameters in Continual Learning: A Reality Check"; values chosen on
the stream that is reported are not a measurement of a method.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from driftline.core.console import program, table
from driftline.core.errors import UserError
from driftline.core.files import read_record, write_json, write_text
from driftline.core.paths import results_folder
from driftline.core.ranges import plain_name
from driftline.runs.sweep import new_folder, outcomes

RUN = Path(__file__).parents[1] / "run.py"
LOWER = ("err", "mce", "forgetting", "source_forgetting", "ece", "collapse", "nan")
Values = dict[str, Any]  # dotted key -> value


# ------------------------------------------------------------------------------ the space


class Dimension:
    """One key and the values it may take."""

    def __init__(self, word: str) -> None:
        try:
            override = OverridesParser.create().parse_overrides([word])[0]
        except HydraException as error:
            raise UserError(f"--search {word}: {error}") from error
        if not override.is_sweep_override():
            raise UserError(f"--search {word}: give several values, as in {word},...")
        self.key, value = override.get_key_element(), override.value()
        self.choices: list[Any] | None = None
        self.interval: IntervalSweep | None = None
        if isinstance(value, IntervalSweep):
            self.interval = value
        else:
            self.choices = [
                v.text if isinstance(v, QuotedString) else v for v in override.sweep_iterator()
            ]

    @property
    def whole(self) -> bool:
        return self.interval is not None and isinstance(self.interval.start, int)

    def bounds(self) -> tuple[float, float, bool]:
        """Lower end, upper end, and whether to draw in logarithms."""
        assert self.interval is not None
        return float(self.interval.start), float(self.interval.end), "log" in self.interval.tags

    def draw(self, rng: random.Random) -> Any:
        if self.choices is not None:
            return rng.choice(self.choices)
        low, high, log = self.bounds()
        value = (
            math.exp(rng.uniform(math.log(low), math.log(high))) if log else rng.uniform(low, high)
        )
        return round(value) if self.whole else float(f"{value:.4g}")

    def suggest(self, trial: Any) -> Any:
        """The same from Optuna."""
        if self.choices is not None:  # by position: Optuna's categories must be plain
            return self.choices[trial.suggest_int(self.key, 0, len(self.choices) - 1)]
        low, high, log = self.bounds()
        if self.whole:
            return trial.suggest_int(self.key, int(low), int(high), log=log)
        return trial.suggest_float(self.key, low, high, log=log)


def grid(space: list[Dimension]) -> list[Values]:
    """All combinations."""
    for one in space:
        if one.choices is None:
            raise UserError(f"--method grid: {one.key} is an interval; list values, or use random")
    keys = [d.key for d in space]
    every = itertools.product(*(d.choices or [] for d in space))
    return [dict(zip(keys, values, strict=True)) for values in every]


def draws(space: list[Dimension], count: int, seed: int) -> list[Values]:
    """`count` different points, drawn one after the other."""
    rng, points = random.Random(seed), []
    for _ in range(100 * count):
        point = {d.key: d.draw(rng) for d in space}
        if point not in points:
            points.append(point)
        if len(points) == count:
            break
    return points


# ------------------------------------------------------------------------------ runs


class Study:
    """The folder of a search; its points are options of a config group `trial` of their own."""

    def __init__(self, folder: Path, common: list[str]) -> None:
        self.folder, self.common = folder.absolute(), common
        (self.folder / "trial").mkdir(parents=True, exist_ok=True)

    def write(self, name: str, values: Values, **more: Any) -> None:
        """Make `+trial=<name>` stand for these values."""
        node = OmegaConf.create({})
        for key, value in {**values, **more}.items():
            OmegaConf.update(node, key, value)
        text = "# @package _global_\n" + OmegaConf.to_yaml(node)
        write_text(self.folder / "trial" / f"{name}.yaml", text)

    def sweep(self, names: list[str], words: list[str]) -> list[dict[str, Any]]:
        """Run the points on a stream; returns the outcome of every run with its `trial`."""
        sweep = new_folder(self.folder / "sweeps")
        command = [sys.executable, str(RUN), "-m", f"hydra.searchpath=[file://{self.folder}]"]
        command += [*self.common, *words, f"+trial={','.join(names)}", f"hydra.sweep.dir={sweep}"]
        code = subprocess.run(command, check=False).returncode
        if code in (130, 143):
            raise SystemExit(code)
        if not (sweep / "sweep.json").exists():
            raise UserError("the sweep could not start; its message is above")
        rows = outcomes(sweep)
        for one in rows:
            trial = next(o for o in one["overrides"] if o.lstrip("+").startswith("trial="))
            one["trial"] = trial.split("=", 1)[1]
        return rows

    def measure(self, names: list[str], words: list[str], metric: str | None) -> dict[str, float]:
        """Mean metric of each point over the runs on a stream; without those with a failed run."""
        runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for one in self.sweep(names, words):
            runs[one["trial"]].append(one)
        means = {}
        for name, several in runs.items():
            if all(one["state"] == "finished" for one in several):
                means[name] = statistics.mean(value_of(one["run"], metric)[1] for one in several)
        return means


def value_of(folder: str, metric: str | None) -> tuple[str, float]:
    """Name and value of the metric of a finished run; None takes its headline number."""
    metrics = read_record(Path(folder) / "summary.json")["metrics"]
    name = metric or ("err_mean" if "err_mean" in metrics else "acc_inc")
    if name not in metrics:
        raise UserError(f"--metric {name}: the run has {', '.join(metrics)}")
    return name, metrics[name]


def optuna_points(
    space: list[Dimension],
    count: int,
    seed: int,
    at_once: int,
    measure: Callable[[dict[str, Values]], dict[str, float]],
    lower: bool,
) -> dict[str, Values]:
    """Points chosen by Optuna's TPE sampler, `at_once` before each measurement."""
    try:
        import optuna
    except ImportError as error:
        raise UserError('--method optuna needs the package: pip install -e ".[tune]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Seeded and told the same values, it proposes the same points when a study is repeated.
    sampler = optuna.samplers.TPESampler(seed=seed)
    study = optuna.create_study(direction="minimize" if lower else "maximize", sampler=sampler)
    points: dict[str, Values] = {}
    while len(points) < count:
        trials = [study.ask() for _ in range(min(at_once, count - len(points)))]
        batch = {f"t{t.number}": {d.key: d.suggest(t) for d in space} for t in trials}
        points |= batch
        values = measure(batch)
        for trial in trials:
            value = values.get(f"t{trial.number}")
            state = optuna.trial.TrialState.FAIL if value is None else None
            study.tell(trial, value, state=state)
    return points


# ------------------------------------------------------------------------------ the protocol


def tune(args: argparse.Namespace) -> int:
    space = [Dimension(word) for word in args.search]
    tune_on = shlex.split(args.tune_on)
    evaluate_on = [shlex.split(text) for text in args.evaluate_on]
    for words in evaluate_on:
        if sorted(words) == sorted(tune_on):
            raise UserError(
                f"--evaluate-on {shlex.join(words)!r} is the stream of the search; a value chosen "
                "there and reported there is no measurement. Evaluate on other data, or on another "
                "class order or sequence of domains"
            )
    asked = [args.words, args.search, tune_on, args.method, args.trials, args.seed]
    if args.name is not None and not plain_name(args.name):
        raise UserError(f"--name {args.name}: {plain_name.__doc__}")
    name = args.name or hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    study = Study(results_folder(args.words) / ".tune" / name, args.words)
    lower = (args.metric or "").startswith(LOWER)
    values: dict[str, float] = {}

    def measure(points: dict[str, Values]) -> dict[str, float]:
        for trial, point in points.items():
            study.write(trial, point)
        new = study.measure(list(points), tune_on, args.metric)
        values.update(new)
        return new

    if args.method == "optuna":
        if args.metric is None:
            raise UserError("--method optuna: name the metric, --metric err_mean or acc_inc")
        points = optuna_points(space, args.trials, args.seed, args.at_once, measure, lower)
    else:
        found = grid(space) if args.method == "grid" else draws(space, args.trials, args.seed)
        points = {f"t{i}": point for i, point in enumerate(found)}
        measure(points)
    if not values:
        raise UserError("no point of the search finished; the reasons are above")
    metric = args.metric or headline(study)
    lower = metric.startswith(LOWER)
    best = (min if lower else max)(values, key=lambda k: values[k])
    tuned = {
        "on": shlex.join(tune_on),
        "search": args.search,
        "method": args.method,
        "points": len(points),
        "finished": len(values),
        "seed": args.seed,
        "metric": metric,
        "value": values[best],
        "chosen": {k: _plain(v) for k, v in points[best].items()},
    }
    study.write("winner", points[best], tuned=tuned)
    record = {"tuned": tuned, "points": points, "values": values}
    write_json(study.folder / "study.json", record)
    head = ("point", *(d.key for d in space), metric)
    order = sorted(values, key=lambda k: values[k], reverse=not lower)
    rows = [(k, *(str(v) for v in points[k].values()), f"{values[k]:.2f}") for k in order]
    rows += [(k, *(str(v) for v in points[k].values()), "-") for k in points if k not in values]
    print(f"\nsearch on {shlex.join(tune_on)}\n{table(head, rows)}\n")
    status = 0
    lines = []
    for words in evaluate_on:
        runs = study.sweep(["winner"], words)
        done = [one for one in runs if one["state"] == "finished"]
        status = status or int(len(done) < len(runs))
        text = "-"
        if done:
            numbers = [value_of(one["run"], args.metric) for one in done]
            text = f"{numbers[0][0]} {statistics.mean(n for _, n in numbers):.2f}"
            if len(numbers) > 1:
                text += f" ± {statistics.stdev(n for _, n in numbers):.2f}"
        lines.append((shlex.join(words), f"{len(done)} of {len(runs)}", text))
    chosen = " ".join(f"{k}={v}" for k, v in points[best].items())
    print(f"\nchosen on {shlex.join(tune_on)}: {chosen} ({study.folder})")
    if lines:
        print(table(("evaluated on", "runs", "result"), lines))
    return status


def headline(study: Study) -> str:
    """The name of the metric that the search used by default."""
    for sweep in sorted((study.folder / "sweeps").iterdir(), reverse=True):
        for one in outcomes(sweep):
            if one["state"] == "finished":
                return value_of(one["run"], None)[0]
    raise UserError("no point of the search finished; the reasons are above")


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | list | bool | None) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="settings of every run")
    parser.add_argument("--search", nargs="+", required=True, metavar="KEY=VALUES")
    parser.add_argument("--tune-on", required=True, metavar="SETTINGS", help="the search's stream")
    parser.add_argument("--evaluate-on", action="append", default=[], metavar="SETTINGS")
    parser.add_argument("--method", choices=("grid", "random", "optuna"), default="grid")
    parser.add_argument("--trials", type=int, default=20, help="points of random and Optuna")
    parser.add_argument("--at-once", type=int, default=1, help="Optuna: points before an update")
    parser.add_argument("--metric", help="default: err_mean, or acc_inc of a stream of tasks")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument("--name", help="folder under <root>/.tune/; default: a hash of the search")
    args = parser.parse_intermixed_args()
    try:
        return tune(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(program(main))
