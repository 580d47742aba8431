"""The small results folder that a release leaves behind, for later ones to open.

    python tools/release_results.py

Writes tests/data/results/<version>/: a finished adaptation run with its source run, a finished run
of tasks, and one that was stopped in its second domain. Embedded images, a few seconds. Made once,
when a release is made, and never changed afterwards; `tests/test_release.py` opens all of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import driftline
from driftline.core.checkpoint import Checkpointer, Stopped
from driftline.core.provenance import version

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "data" / "results"
SMALL = "scenario.images=8 scenario.batch_size=4 scenario.probe_images=2 scenario.clean_images=4"
STREAM = f"scenario=cifar10_c scenario.corruptions=[fog,snow] {SMALL}"
RUNS = {
    "adaptation": f"strategy=tent {STREAM}",
    "tasks": "strategy=simplecil scenario=split_cifar10 scenario.embedded_images=[4,2]",
    "stopped": f"strategy=lame {STREAM}",
}


def stop(words: list[str]) -> None:
    """Begin a run and stop it, as Ctrl-C does, in its second domain."""
    tick = Checkpointer.tick

    def interrupted(self: Checkpointer, *args: object, **cursor: int) -> None:
        if self.log.folder.parents[1].name == "lame" and cursor.get("segment") == 1:
            self.signals.stop = signal.SIGINT
        tick(self, *args, **cursor)  # type: ignore[arg-type]

    Checkpointer.tick = interrupted  # type: ignore[method-assign]
    try:
        driftline.run(words)
    except Stopped:
        return
    finally:
        Checkpointer.tick = tick  # type: ignore[method-assign]
    raise RuntimeError("the run was not stopped")


def main() -> int:
    target = FOLDER / version()
    if target.exists():
        print(f"error: {target} is there; what a release wrote is not changed", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # so that no path of this machine is recorded
        for name, line in RUNS.items():
            words = [*line.split(), "root=results", "runtime.device=cpu"]
            stop(words) if name == "stopped" else driftline.run(words)
        for path in Path("results").rglob("*"):
            if path.name.startswith(".") or path.name == "patch.diff":
                path.unlink()
        shutil.copytree("results", target)
    print(f"wrote {target.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
