"""A sweep on one machine with several GPUs: one process a GPU, each seeing only its own.

    python scripts/gpu_pool.py strategy=tent,cotta seed=0,1,2 data.root=/data
    python scripts/gpu_pool.py --gpus 0,1 --per-gpu 2 strategy=tent,cotta "seed=range(5)"
    python scripts/gpu_pool.py --file runs.txt          # one run a line, as after `python run.py`
    python scripts/gpu_pool.py --slurm strategy=tent,cotta seed=0,1,2 > sweep.sh && sbatch sweep.sh

The words are those of `python run.py -m`. The same command again skips finished runs and resumes
broken ones; outputs lie under <root>/.sweeps/<time>/, the end tells what became of each run. With
--slurm nothing is run: it prints one array job, which saves and goes back into the queue at the
scheduler's warning (set what your cluster asks for at its head).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from driftline.core.console import program
from driftline.core.paths import results_folder
from driftline.core.processes import end_with_parent
from driftline.runs.command import as_sweeps
from driftline.runs.sweep import expand, new_folder, note, place_in_sweep, plan, report

COMMAND = [sys.executable, str(Path(__file__).parents[1] / "run.py")]
WAIT = "runtime.wait=true"  # another run of the sweep may be making what this one needs
ARRAY = """#!/bin/bash
#SBATCH --job-name=driftline
#SBATCH --array=0-{last}%{at_once}
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=driftline-%A_%a.log
#SBATCH --signal=B:USR1@120
# The same script again skips finished runs and resumes broken ones.
cd {here} || exit 1
runs=(
{runs}
)
eval "set -- ${{runs[$SLURM_ARRAY_TASK_ID]}}"
{command} {wait} "$@" &
pid=$!
warned() {{  # the time limit is near: save, then back into the queue
    kill -TERM $pid 2>/dev/null
    wait $pid
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
    exit 0
}}
trap warned USR1
trap 'kill -TERM $pid; wait $pid; exit 143' TERM
wait $pid
"""


def gpus() -> list[str]:
    """Those that CUDA_VISIBLE_DEVICES allows, else all that nvidia-smi lists."""
    if os.environ.get("CUDA_VISIBLE_DEVICES"):
        return os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^GPU (\d+):", done.stdout, re.MULTILINE)


def array_script(runs: list[list[str]], at_once: int) -> str:
    """One SLURM array job, a task a run."""
    lines = "\n".join(f"    {shlex.quote(shlex.join(run))}" for run in runs)
    names = {"here": shlex.quote(os.getcwd()), "command": shlex.join(COMMAND), "wait": WAIT}
    return ARRAY.format(last=len(runs) - 1, at_once=at_once, runs=lines, **names)


class Pool:
    """Starts run after run on whatever place is free."""

    def __init__(self, folder: Path, runs: list[list[str]], places: list[str]) -> None:
        self.folder, self.runs = folder, runs
        self.free = list(places)
        self.active: dict[int, tuple[subprocess.Popen[bytes], str]] = {}
        self.threads = max(1, (os.cpu_count() or 1) // len(places))

    def start(self, number: int) -> None:
        gpu = self.free.pop(0)
        words = list(self.runs[number])
        for setting in (f"runtime.threads={self.threads}", WAIT):
            if not any(w.startswith(setting.partition("=")[0] + "=") for w in words):
                words.append(setting)
        line = place_in_sweep(self.folder, number, self.runs[number])
        print(f"GPU {gpu}, {line}", flush=True)
        note(self.folder, number, state="running")
        with open(self.folder / f"{number}.log", "wb") as log:
            process = subprocess.Popen(
                [*COMMAND, *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu},
                start_new_session=True,  # Ctrl-C reaches it once, as SIGTERM from here
                preexec_fn=end_with_parent,
            )
        self.active[number] = process, gpu

    def collect(self) -> None:
        """Note what has ended."""
        for number, (process, gpu) in list(self.active.items()):
            code = process.poll()
            if code is None:
                continue
            del self.active[number]
            self.free.append(gpu)
            outcome = read_log(self.folder / f"{number}.log", code)
            note(self.folder, number, **outcome)
            print(f"run {number + 1}: {outcome['state']}", flush=True)

    def run(self) -> bool:
        """True if it came to the end, False after Ctrl-C or SIGTERM."""
        waiting = list(range(len(self.runs)))
        try:
            while waiting or self.active:
                while waiting and self.free:
                    self.start(waiting.pop(0))
                time.sleep(0.1)
                self.collect()
        except KeyboardInterrupt:
            print("stopping; the runs save their state ...", flush=True)
            for process, _ in self.active.values():
                process.terminate()
            while self.active:
                time.sleep(0.1)
                self.collect()
            return False
        return True


def read_log(path: Path, code: int) -> dict[str, object]:
    """State of a run from its exit status and the last lines of its output."""
    lines = path.read_text(errors="replace").splitlines()
    if code == 0:
        return {"state": "finished", "before": any("| already done: " in line for line in lines)}
    if code > 128 or code == -signal.SIGTERM:
        return {"state": "stopped", "error": "stopped by a signal"}
    if code < 0:
        return {"state": "killed", "error": f"killed by {signal.Signals(-code).name}"}
    errors = [line for line in lines if line.startswith("error: ")]
    text = errors[-1].removeprefix("error: ") if errors else (lines or [f"status {code}"])[-1]
    return {"state": "failed", "error": f"{text} (see {path})"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="settings, as for `python run.py -m`")
    parser.add_argument("--file", type=Path, help="one run a line")
    parser.add_argument("--gpus", help="for example 0,1; default: all")
    parser.add_argument("--per-gpu", type=int, default=1, metavar="N", help="runs at once on one")
    parser.add_argument("--slurm", action="store_true", help="print an array job instead")
    args = parser.parse_args()
    from hydra.errors import HydraException

    try:
        runs = expand(as_sweeps(args.words)) if args.words else []
    except HydraException as error:
        parser.error(str(error))
    if args.file:
        lines = args.file.read_text().splitlines()
        shared = runs or [[]]
        runs = [shlex.split(li) + more for li in lines if li.strip() for more in shared]
    if not runs:
        parser.error("no run given; for example: strategy=tent,cotta seed=0,1,2")
    places = [g.strip() for g in args.gpus.split(",")] if args.gpus else gpus()
    if args.slurm:
        print(array_script(runs, 8 * args.per_gpu), end="")
        return 0
    if not places:
        parser.error(
            "nvidia-smi lists no GPU here; name them with --gpus 0,1, or use processor cores: "
            "python run.py -m hydra/launcher=joblib ..."
        )
    folder = new_folder(results_folder(runs[0]) / ".sweeps")
    plan(folder, runs)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    came_to_end = Pool(folder, runs, places * args.per_gpu).run()
    text, status = report(folder)
    print(text, file=sys.stderr if status else sys.stdout)
    return status if came_to_end else 130


if __name__ == "__main__":
    sys.exit(program(main))
