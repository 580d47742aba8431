"""One run for all seeds, where nothing in it depends on the seed.

What a seed can reach is a short list: parameters called `seed` of stream, method and rules, their
generators, and the global generators of Python, NumPy and torch. A run says in its summary
(`any_seed`) that none of them had any part: no parameter takes it, no generator was made, and the
global ones stood at the end, as after every batch, as they were seeded. Another seed of the same
settings, data, weights and code on the same device and versions then has the same result, which is
taken over with all rows; `same_as` says of which run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from time import sleep
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from driftline.core import distributed
from driftline.core.build import locate, nodes, takes
from driftline.core.console import Console
from driftline.core.errors import UserError
from driftline.core.files import Damaged, checksum_of, read_record
from driftline.core.processes import Lock
from driftline.core.record import RunLogger
from driftline.core.seed import Draws
from driftline.core.strategy import Strategy, TTAStrategy
from driftline.runs.folder import RECORD

RESULT = ("metrics", "cost", "method", "guard", "kernel", "skipped_images", "any_seed")
SAME = ("driftline", "python", "packages", "device", "driver", "threads", "processes")
SAME += ("code", "weights")  # of environment.json


class SeedUse(Draws):
    """Draws, and the lock that runs of other seeds wait for as long as there are none."""

    lock: Lock | None = None

    def look(self) -> bool:
        if super().look():
            self.end()
        return self.drawn

    def end(self) -> None:
        """Let the others go on."""
        if self.lock is not None:
            self.lock.release()


class Twin(NamedTuple):
    """A finished run of another seed whose result this one has, too."""

    folder: Path
    summary: dict[str, Any]

    @property
    def same_as(self) -> dict[str, Any]:
        """The run that was made: this one, or the one that it has its own result of."""
        run = self.summary["run"]
        about = {"folder": str(self.folder), "seed": run["seed"], "key": run["key"]}
        return self.summary.get("same_as", about)

    @property
    def result(self) -> dict[str, Any]:
        own = {key: self.summary[key] for key in RESULT if key in self.summary}
        return {**own, "same_as": self.same_as}

    def copy_rows(self, log: RunLogger) -> None:
        """Write its rows with `log`, whatever an earlier attempt had written."""
        log.rewind({})
        rows = RunLogger(self.folder, log.label)
        for table in self.summary["rows"]:
            for row in rows.rows(table):
                log.log(table, **{k: v for k, v in row.items() if k != "scenario"})


def seed_is_idle(cfg: DictConfig, strategy: Strategy) -> bool:
    """Whether no parameter takes the seed: what is left are the global generators.

    Preparations and measured seconds are left out, and so are estimates, which draw by the seed of
    the method.
    """
    if not isinstance(strategy, TTAStrategy) or distributed.size() > 1:
        return False
    if cfg.get("time") is not None or cfg.get("estimate") is not None:
        return False
    if strategy.preparation() is not None:
        return False
    if takes(cfg.scenario, "seed", "scenario"):
        return False
    methods = [node for one in (cfg.strategy, *cfg.around.values()) for node in nodes(one)]
    return not any(_takes_seed(node) for node in methods)


def _takes_seed(node: DictConfig) -> bool:
    kind = locate(node._target_)
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        return takes(node, "seed", "strategy")
    says_so = vars(kind).get("takes_seed")  # for itself alone
    own = says_so or vars(Strategy)["takes_seed"]
    return bool(own.__func__(kind, node))


def seed_was_idle(strategy: Strategy, draws: Draws) -> bool:
    """At the end of a run: whether neither a global generator nor one of its own was in use."""
    own = [value for part in strategy.modules() for value in _generators(part)]
    return not draws.look() and not own


def _generators(part: torch.nn.Module) -> list[torch.Generator]:
    values = [*vars(part).values(), *vars(part).get("_generators", {}).values()]
    return [value for value in values if isinstance(value, torch.Generator)]


def may_take_over(cfg: DictConfig) -> bool:
    """Whether a result of another seed serves this command."""
    keeps = cfg.checkpoint.model or cfg.checkpoint.keep
    return cfg.runtime.share_seeds and cfg.on_exists != "rerun" and not keeps


def twin_or_lock(
    place: Path, root: Path, any_seed: str, known: Mapping[str, Any], console: Console
) -> tuple[Twin | None, Lock | None]:
    """A finished run of another seed; else the lock that lets those of other seeds wait for ours.

    Waits for a process that is at such a run: it either ends with a result for all seeds, or gives
    the lock back once something has drawn (`SeedUse`).

    Args:
        place: folder of the runs of this method.
        root: of all results.
        any_seed: identity of the run without its seed.
        known: environment.json as this run would write it.
    """
    lock, waiting = None, False
    try:
        while True:
            if twin := _find(place, any_seed, known):
                if lock is not None:
                    lock.release()
                return twin, None
            if lock is None:
                lock = Lock(root / ".seeds" / any_seed)
            if lock.acquire():
                if twin := _find(place, any_seed, known):
                    lock.release()
                return twin, None if twin else lock
            if not waiting:
                console.say(
                    f"waiting for {lock.holder()}, which is at this run with another seed and has "
                    "drawn nothing so far (runtime.share_seeds=false does not wait)"
                )
                waiting = True
            sleep(1)
    except UserError:  # another machine may hold it, and cannot be asked
        return None, None
    except BaseException:
        if lock is not None:
            lock.leave()
        raise


def _find(place: Path, any_seed: str, known: Mapping[str, Any]) -> Twin | None:
    """The first finished run under `place` that is whole and made under the same conditions."""
    for path in sorted(place.glob("s*/summary.json")):
        folder = path.parent
        try:
            if f'"any_seed": "{any_seed}"' not in path.read_text():
                continue
            summary = read_record(path, "run", "metrics", "cost", "rows", "any_seed")
            environment = read_record(folder / RECORD, *SAME)
            tables = {table: folder / f"{table}.jsonl" for table in summary["rows"]}
            sums = {t: f"{checksum_of(p, p.stat().st_size):08x}" for t, p in tables.items()}
        except (Damaged, OSError, ValueError):
            continue
        same = all(environment[key] == known[key] for key in SAME)
        if same and sums == summary["rows"] and summary["any_seed"] == any_seed:
            return Twin(folder, summary)
    return None
