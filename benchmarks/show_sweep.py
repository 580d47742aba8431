"""A sweep of 40 small runs, five of them killed, completed by the same command: three launchers.

    python benchmarks/show_sweep.py [--out results/reference/sweeps.md] [--launchers basic joblib]

Four strategies times ten seeds on embedded images. Five runs, drawn at random, get SIGKILL while
they work; the sweep must go on, name them and their cause, and the same command must complete them.
At the end all launchers must agree on every metric, and the killed runs with those not killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

KILLS = 5
SWEEP = ["strategy=source,bn_adapt,tent,lame", "seed=range(10)"]
SMALL = [
    "scenario=imagenet_c",
    "scenario.corruptions=[contrast]",
    "scenario.images=60",
    "scenario.batch_size=10",
    "scenario.probe_images=0",
    "scenario.clean_images=0",
    "checkpoint.every=1",
]
LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra/launcher=submitit_local"],
}


def states(folder: Path) -> dict[int, dict[str, Any]]:
    """What is noted of each run begun so far."""
    return {int(p.stem): json.loads(p.read_text()) for p in folder.glob("[0-9]*.json")}


def moment(root: Path, overrides: list[str], rng: random.Random) -> None:
    """Wait for a moment to kill: at once, or once the run has a checkpoint to resume from."""
    strategy, seed = (o.split("=")[1] for o in overrides[-3:-1])
    if rng.random() < 0.3:
        return
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(root.glob(f"*/{strategy}/*/s{seed}-*/last.pt")):
            return
        if any(root.glob(f"*/{strategy}/*/s{seed}-*/summary.json")):
            return
        time.sleep(0.01)


def call(words: list[str], root: Path, victims: set[int], rng: random.Random) -> dict[str, Any]:
    """One call of the sweep; runs whose number is in `victims` are killed while they work."""
    known = set(root.glob(".sweeps/*"))
    started = time.perf_counter()
    command = [sys.executable, "run.py", "-m", *words, f"root={root}"]
    killed: list[str] = []
    fresh: list[Path] = []
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True
        )
        while process.poll() is None:
            time.sleep(0.01)
            fresh = sorted(set(root.glob(".sweeps/*")) - known)
            for number, one in states(fresh[0]).items() if fresh and victims else ():
                if number not in victims or one["state"] != "running" or "pid" not in one:
                    continue
                moment(root, one["overrides"], rng)
                victims.discard(number)
                now = states(fresh[0])[number]
                if now["state"] == "running":
                    os.kill(one["pid"], signal.SIGKILL)
                    killed.append(" ".join(now["overrides"][-3:-1]))
                elif later := set(range(number + 1, 40)) - set(states(fresh[0])):
                    victims.add(rng.choice(sorted(later)))  # it was faster: another one instead
        output.seek(0)
        text = output.read()
    logs = [path.read_text() for path in fresh[0].rglob("*_log.out")]  # submitit's, a run each
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("sweep of"))
    return {
        "status": process.returncode,
        "seconds": time.perf_counter() - started,
        "killed": killed,
        "report": "\n".join(lines[start:]).replace(str(root), "results"),
        "resumed": sum(one.count("| resuming in ") for one in [text, *logs]),
    }


def metrics(root: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Metrics of every finished run by strategy and seed."""
    found = {}
    for path in root.rglob("summary.json"):
        summary = json.loads(path.read_text())
        found[summary["run"]["strategy"], summary["run"]["seed"]] = summary["metrics"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--launchers", nargs="+", default=list(LAUNCHERS), choices=LAUNCHERS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with open("/proc/cpuinfo") as file:
        cpu = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    parts = [
        "# A sweep of 40 runs with five killed\n",
        f"Made by `python benchmarks/show_sweep.py` on {os.cpu_count()} cores, {cpu}. Four "
        "strategies times ten seeds on embedded images; five runs drawn at random get SIGKILL "
        "while they work, then the same command is given again.\n",
    ]
    every, good = [], True
    for launcher in given.launchers:
        rng = random.Random(given.seed)
        victims = set(rng.sample(range(35), KILLS))
        words = [*LAUNCHERS[launcher], *SMALL, *SWEEP]
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            first = call(words, root, victims, rng)
            second = call(words, root, set(), rng)
            every.append(metrics(root))
        good &= len(first["killed"]) == KILLS and second["status"] == 0 and len(every[-1]) == 40
        parts += [
            f"## {launcher}\n",
            f"```bash\npython run.py -m {' '.join(words)}\n```\n",
            f"Killed: {'; '.join(first['killed'])}. First call: {first['seconds']:.0f} s, status "
            f"{first['status']}:\n\n```\n{first['report']}\n```\n",
            f"The same command again: {second['seconds']:.0f} s, status {second['status']}, "
            f"{second['resumed']} of the killed runs resumed inside their stream (a source run may "
            f"already have been completed as the comparison of another run):\n\n"
            f"```\n{second['report']}\n```\n",
        ]
        print("\n".join(parts[-4:]), flush=True)
    same = all(one == every[0] for one in every)
    good &= same
    parts.append(
        f"Metrics of all 40 runs, killed or not, agree to the last bit between the launchers: "
        f"{'yes' if same else 'NO'}.\n"
    )
    print(parts[-1])
    if given.out is not None:
        part = given.out.with_name(given.out.name + ".tmp")
        part.write_text("\n".join(parts))
        part.replace(given.out)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
