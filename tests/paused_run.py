"""run.py that stands still at a known place until a signal asks it to stop.

    python tests/paused_run.py MARKER STRATEGY BATCHES WORDS...

After that many batches of a run of STRATEGY, of which the last is in the checkpoint, the file
MARKER appears, with the process's number in it, and the run waits. With `-m` among the words this
holds for the runs of a sweep.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

from driftline.core import distributed
from driftline.core.checkpoint import Checkpointer

ROOT = Path(__file__).parents[1]


def main() -> None:
    marker, strategy, batches, *words = sys.argv[1:]
    left = iter(range(int(batches) - 1))
    tick = Checkpointer.tick

    def paused(self: Checkpointer, *args: Any, **cursor: int) -> None:
        tick(self, *args, **cursor)
        if strategy not in self.log.folder.parts or next(left, None) is not None:
            return
        if distributed.rank0():
            part = Path(f"{marker}.part")
            part.write_text(str(os.getpid()))
            part.rename(marker)
        while self.signals.stop is None:
            time.sleep(0.01)

    Checkpointer.tick = paused  # type: ignore[method-assign]
    sys.argv = [str(ROOT / "run.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
