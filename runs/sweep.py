"""Sweeps: every run in a process of its own, and one report for any launcher.

The folder of a sweep, `<root>/.sweeps/<time>/`, holds `sweep.json` (what was planned) and
`<number>.json` for every run that was begun. Results lie in the run folders, as always.
"""

from __future__ import annotations

import fcntl
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from driftline.core.console import duration
from driftline.core.errors import UserError
from driftline.core.files import Damaged, read_record, write_record
from driftline.core.paths import CONF
from driftline.core.processes import end_with_parent, lasting_imports
from driftline.core.provenance import read_ahead
from driftline.runs.schema import embedded

BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
LOCAL = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"
ENDED = ("finished", "failed", "killed", "stopped")
Outcome = dict[str, Any]
# Our launcher files are laid over the plugins' own of the same name, as intended.
warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against")


class Planned(Callback):
    """Hydra's callback: notes at the start of a sweep which runs it will have."""

    folder: Path | None = None  # of the sweep that this process has begun

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if config.hydra.sweeper._target_ != BASIC:
            return  # other sweepers choose their runs as they go
        words = [f"{k}={v}" for k, v in (config.hydra.sweeper.params or {}).items()]
        words += typed(config.hydra.overrides.task)
        folder = Path(config.hydra.sweep.dir)
        try:
            plan(folder, expand(words), int(config.hydra.launcher.get("n_jobs") or 1))
        except (UserError, OSError) as error:  # Hydra takes errors of a callback for warnings
            what = (
                "" if isinstance(error, UserError) else f"the folder of the sweep {folder} fails: "
            )
            print(f"error: {what}{error}", file=sys.stderr)
            raise SystemExit(2) from None
        Planned.folder = folder


def expand(words: list[str]) -> list[list[str]]:
    """The runs that sweep words stand for: `["seed=0,1"]` -> `[["seed=0"], ["seed=1"]]`."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return BasicSweeper.split_arguments(reader(words).parse_overrides(words), None)[0]


def reader(words: list[str]) -> OverridesParser:
    """Hydra's parser of settings; `strategy=glob(t*)` looks the names up in conf/."""
    if not any("glob(" in word for word in words):
        return OverridesParser.create()
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path

    return OverridesParser.create(ConfigLoaderImpl(create_config_search_path(str(CONF))))


def plan(folder: Path, runs: list[list[str]], at_once: int = 1) -> None:
    """Begin a sweep: its folder and the list of its runs.

    Raises:
        UserError: if it is the folder of another sweep, whose outcomes would be taken for its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / "sweep.json", "x") as file:
            json.dump({"runs": runs, "at_once": at_once, "command": sys.argv}, file, indent=2)
    except FileExistsError as error:
        raise UserError(
            f"{folder} is the folder of another sweep; give this one another hydra.sweep.dir, or "
            "leave that out"
        ) from error


def new_folder(place: Path) -> Path:
    """A folder in `place` for a sweep that begins now; no two are alike."""
    return place / datetime.now().strftime("%Y%m%d-%H%M%S-%f")


def note(folder: Path, number: int, **outcome: Any) -> None:
    """What became of one run: `state`, and `error` where it did not finish."""
    write_record(folder / f"{number}.json", outcome)


def _noted(folder: Path, number: int) -> Outcome:
    """What `note` wrote about a run; nothing is known of one whose note is damaged."""
    try:
        return read_record(folder / f"{number}.json", "state")
    except FileNotFoundError:
        return {"state": "not started"}
    except Damaged as error:
        return {"state": "failed", "error": f"what became of it is lost: {error}"}


# ------------------------------------------------------------------------------ one run


def run_job(cfg: DictConfig) -> float | None:
    """One run of a sweep in a child process; returns its headline number, None without one.

    A run that is killed, runs out of memory or crashes in native code takes nothing else with it,
    and no state leaks into the next one. The child is forked after torch is imported, which costs
    milliseconds. SIGINT, SIGTERM and the warning signal of a cluster reach the child as SIGTERM: it
    saves its state first. Then the launcher's own handler goes on (submitit puts the job back into
    the queue), and without one this process ends.
    """
    hydra = HydraConfig.get()
    folder, number = Path(hydra.sweep.dir), int(hydra.job.num)
    overrides = typed(hydra.overrides.task)
    with _slot(folder, hydra.launcher):
        # Imported here once and inherited by every child: torch and timm take seconds.
        if "driftline.runs.execute" not in sys.modules:
            with lasting_imports():
                import driftline.runs.execute  # noqa: F401

                read_ahead()

        cfg = _threads(cfg, folder, hydra.launcher)
        print(place_in_sweep(folder, number, overrides), flush=True)
        note(folder, number, state="running", overrides=overrides)
        begun = time.monotonic()
        with warnings.catch_warnings():
            # Some library's idle thread lives here already; the child does not depend on it.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = multiprocessing.get_context("fork").Process(
                target=_child,
                args=(cfg, overrides, folder, number),
                kwargs={"alone": processes(int(hydra.launcher.get("n_jobs") or 1)) == 1},
                daemon=False,
            )
            child.start()
        assert child.pid is not None
        with _Forward(child.pid) as asked:
            child.join()
    done = _noted(folder, number)
    if done["state"] == "running":  # it could not say anything itself
        done |= _sudden(child.exitcode, asked.number)
        print(f"error: {done['error']}: {' '.join(overrides)}", file=sys.stderr)
    note(folder, number, **done, seconds=time.monotonic() - begun)
    asked.pass_on()
    return done.get("value")


def place_in_sweep(folder: Path, number: int, overrides: Sequence[str]) -> str:
    """A line on a run that begins: which one of how many, and how long the sweep may still take.

    A run takes what those took that this sweep has made, those taken over from before left out; how
    many go on at once is seen from the time since the sweep began.
    """
    sweep = folder / "sweep.json"
    if not sweep.exists():  # a sweeper that chooses its runs as it goes
        return f"sweep, run {number + 1}: {' '.join(overrides)}"
    runs = json.loads(sweep.read_text())["runs"]
    ended = [one for n in range(len(runs)) if (one := _noted(folder, n))["state"] in ENDED]
    fixed = set.intersection(*map(set, runs)) if len(runs) > 1 else set()
    what = " ".join(word for word in overrides if word not in fixed) or " ".join(overrides)
    line = f"sweep {number + 1}/{len(runs)}: {what}"
    timed = [one for one in ended if "seconds" in one]
    if made := [one["seconds"] for one in timed if not one.get("before")]:
        together = (time.time() - sweep.stat().st_mtime) / sum(one["seconds"] for one in timed)
        each = together * sum(made) / len(made)
        line += f", about {duration(each * (len(runs) - len(ended)))} left"
    return line


def typed(words: Any) -> list[str]:
    """The settings of a run (a node of Hydra's) as they were typed, `${...}` in them included."""
    plain: Any = OmegaConf.to_container(words, resolve=False)
    return [str(word) for word in plain]


def _child(
    cfg: DictConfig, overrides: list[str], folder: Path, number: int, *, alone: bool
) -> None:
    from driftline.core.checkpoint import Stopped
    from driftline.core.console import Console, reader_left
    from driftline.runs.execute import run_experiment

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for quiet in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT):
        signal.signal(quiet, signal.SIG_IGN)
    end_with_parent()
    outcome: Outcome = {"overrides": overrides, "pid": os.getpid()}
    note(folder, number, **outcome, state="running")
    started = time.time()
    Console.bars = alone
    try:
        summary = run_experiment(cfg, overrides, wait=True)
    except (Stopped, KeyboardInterrupt):  # not by which signal: Ctrl-C comes as SIGTERM
        note(folder, number, **outcome, state="stopped", error="stopped, state saved")
        return
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_left():
            text = "nobody reads its output any more; it goes on from its last saved state"
            note(folder, number, **outcome, state="stopped", error=text)
            return
        text = str(error)
        if not isinstance(error, UserError):
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
        print(f"error: {text}", file=sys.stderr)
        wrong = isinstance(error, UserError)
        note(folder, number, **outcome, state="failed", error=text, wrong_settings=wrong)
        return
    metrics = summary["metrics"]
    place = summary.get("run", {}).get("folder")
    before = place is not None and (Path(place) / "summary.json").stat().st_mtime < started
    note(
        folder,
        number,
        **outcome,
        state="finished",
        before=before,
        run=place,
        same_as="same_as" in summary,
        value=metrics.get("err_mean", metrics.get("acc_inc")),
    )


def _sudden(code: int | None, asked: int | None) -> Outcome:
    """What an exit status without a word means."""
    if asked is not None:
        return {"state": "stopped", "error": f"stopped by {signal.Signals(asked).name}"}
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", which is also how a system out of memory ends a process" if code == -9 else ""
        return {"state": "killed", "error": f"killed by {name}{hint}"}
    return {"state": "failed", "error": f"ended with status {code} before it could say why"}


class _Forward:
    """While a child runs: signals to stop reach it as SIGTERM, SIGUSR1 as itself."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.number: int | None = None  # of the signal that asked to stop
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, _: object) -> None:
        if number == signal.SIGUSR1 and not callable(self._before[number]):
            os.kill(self.pid, signal.SIGUSR1)  # save and go on
            return
        self.number = number
        # Not SIGINT: a terminal has sent that to the child too, and a second one would not wait.
        os.kill(self.pid, signal.SIGTERM)

    def __enter__(self) -> _Forward:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if callable(signal.getsignal(signal.SIGUSR2)):
            numbers.append(signal.SIGUSR2)  # submitit's warning
        for number in numbers:
            self._before[number] = signal.getsignal(number)
        for number in numbers:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on(self) -> None:
        """Do what the signal would have done without a child."""
        if self.number is None:
            return
        handler = self._before[self.number]
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self.number, None)
        else:
            raise SystemExit(128 + self.number)


def _threads(cfg: DictConfig, folder: Path, launcher: DictConfig) -> DictConfig:
    """Share the cores among the runs that go on at once; no number depends on it."""
    if cfg.runtime.threads is not None:
        return cfg
    if launcher.get("cpus_per_task"):
        threads = int(launcher.cpus_per_task)
    elif "n_jobs" in launcher:
        jobs = len(json.loads((folder / "sweep.json").read_text())["runs"])
        threads = max(1, cores() // min(processes(int(launcher.n_jobs)), jobs))
    else:
        return cfg
    cfg = cfg.copy()
    cfg.runtime.threads = 1 if embedded(cfg) else threads
    return cfg


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes(n_jobs: int) -> int:
    """joblib's count: -1 is one a core, -2 one less."""
    return n_jobs if n_jobs > 0 else max(1, cores() + 1 + n_jobs)


@contextmanager
def _slot(folder: Path, launcher: DictConfig) -> Iterator[None]:
    """Wait for a free place: submitit's local executor starts all jobs of a sweep at once."""
    if launcher._target_ != LOCAL:
        yield
        return
    places = max(1, cores() // int(launcher.cpus_per_task or 1))
    with ExitStack() as stack:
        files = [stack.enter_context(open(folder / f".slot{i}", "w")) for i in range(places)]
        while not any(_try_lock(file) for file in files):
            time.sleep(0.2)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: no run can wait for another one
        return True
    return True


# ------------------------------------------------------------------------------ the end


def outcomes(folder: Path) -> list[Outcome]:
    """One entry a planned run; `state` is finished, failed, killed, stopped or not started."""
    rows = []
    for number, overrides in enumerate(json.loads((folder / "sweep.json").read_text())["runs"]):
        one = _noted(folder, number)
        if one["state"] == "running":
            one |= {"state": "killed", "error": "its process was killed together with the launcher"}
        rows.append({**one, "overrides": overrides})
    return rows


def report(folder: Path) -> tuple[str, int]:
    """The end of a sweep as text, and its exit status.

    0: every run is finished; 2: all those that are not failed for their settings, as a single run
    of each would; 1: anything else.
    """
    runs = outcomes(folder)
    states: dict[str, list[Outcome]] = defaultdict(list)
    for run in runs:
        states[run["state"]].append(run)
    finished = states.pop("finished", [])
    before = sum(bool(r.get("before")) for r in finished)
    shared = sum(bool(r.get("same_as") and not r.get("before")) for r in finished)
    parts = [f"{before} of them before"] if before else []
    parts += [f"{shared} with the result of another seed"] if shared else []
    counts = [f"{len(finished)} finished" + (f" ({', '.join(parts)})" if parts else "")]
    counts += [f"{len(rows)} {state}" for state, rows in states.items()]
    lines = [f"sweep of {len(runs)} runs: {', '.join(counts)} ({folder})"]
    fixed = _common(runs)
    for state in ("failed", "killed", "stopped"):
        reasons: dict[str, list[list[str]]] = defaultdict(list)
        for run in states.get(state, []):
            reasons[str(run["error"])].append([o for o in run["overrides"] if o not in fixed])
        for reason, those in reasons.items():
            lines += [f"{state}: {name or '(no setting)'}" for name in _together(those)]
            lines.append(f"    because: {reason.splitlines()[0] if reason else 'no message'}")
    lines += _seeds_agree(finished, fixed)
    failed = states.get("failed", [])
    if len(runs) > 1 and len(failed) == len(runs):
        same = len({r["error"] for r in runs}) == 1
        lines.append("every run failed" + (", all for this one reason" if same else ""))
    elif states:
        lines.append("the same command skips what is finished and goes on with the rest")
    others = [run for runs_of in states.values() for run in runs_of]
    wrong = all(run.get("wrong_settings") for run in others)
    return "\n".join(lines), 0 if not others else 2 if wrong else 1


def _seeds_agree(finished: Sequence[Outcome], fixed: set[str]) -> list[str]:
    """A line on the runs that gave the same metrics for every seed of the sweep."""
    repeats: dict[tuple[str, ...], list[Any]] = defaultdict(list)
    for run in finished:
        rest = tuple(o for o in run["overrides"] if not o.startswith("seed=") and o not in fixed)
        if len(rest) < len(run["overrides"]):
            with suppress(OSError, Damaged):
                summary = read_record(Path(run.get("run") or "", "summary.json"))
                repeats[rest].append((summary["run"]["seed"], summary["metrics"]))
    same = [
        " ".join(rest) or "this sweep"
        for rest, runs in repeats.items()
        if len({seed for seed, _ in runs}) > 1 and all(m == runs[0][1] for _, m in runs)
    ]
    if not same:
        return []
    return [
        f"the seed changed nothing in: {', '.join(same)}. The order of classes and images comes "
        "from scenario.order_seed; 'scenario.order_seed=${seed}' makes it follow the seed"
    ]


def _together(runs: list[list[str]]) -> list[str]:
    """Runs in words: on one line, as typed, where they are all combinations of their values."""
    if len(runs) < 2:
        return [" ".join(run) for run in runs]
    values: dict[str, list[str]] = defaultdict(list)
    for key, _, value in (word.partition("=") for run in runs for word in run):
        values[key] += [value] if value not in values[key] else []
    combinations = math.prod(map(len, values.values()))
    if len(runs) == combinations and len({tuple(run) for run in runs}) == combinations:
        return [" ".join(f"{key}={','.join(some)}" for key, some in values.items())]
    return [" ".join(run) for run in runs]


def _common(runs: Sequence[Outcome]) -> set[str]:
    """Overrides that all runs share; of a single run all are shown."""
    if len(runs) < 2:
        return set()
    return set.intersection(*(set(r["overrides"]) for r in runs))
