"""Mirrors of the run's files. A sink never prompts, never raises, never stops a run.

A sink has three parts: a constructor that gets the run (`About`) and its settings from
`conf/logger/`, `log(table, row)` for every row of the run's files, and `finish(summary)`.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from driftline.core.errors import UserError
from driftline.core.ranges import Count


@dataclass(frozen=True)
class About:
    """What a sink is told of the run that it mirrors."""

    folder: Path
    config: Mapping[str, Any]  # resolved
    run_id: str  # the same for the same configuration
    group: str  # runs that differ in the seed alone share it
    job_type: str  # "run", or "companion" for the source model measured beside one
    tags: tuple[str, ...]


class Mirror:
    """What all sinks share: the first failure turns the sink off with one warning.

    Args:
        every: of the batch rows every n-th is mirrored; all other rows go.
    """

    name = "mirror"

    def __init__(self, about: About, *, every: int) -> None:
        self.about, self.every = about, every
        self._batches: int | None = None
        self._matrix: list[tuple[int, str, str, float]] = []
        self._off = False

    def _try(self, call: Callable[[], Any]) -> Any:
        if self._off:
            return None
        try:
            return call()
        except Exception as error:  # a tracker must never stop an experiment
            warnings.warn(
                f"{self.name} is off for this run ({type(error).__name__}: {error}); "
                "the files in the run folder are complete",
                stacklevel=3,
            )
            self._off = True
            return None

    def log(self, table: str, row: Mapping[str, Any]) -> None:
        """Mirror one row of `batches`, `experiences` or `matrix`."""
        if self._off:
            return
        if table == "batches":
            if self._batches is None:  # a resumed run goes on counting where its file ends
                self._batches = _lines(self.about.folder / "batches.jsonl")
            self._batches += 1
            if self._batches % self.every:
                return
        if table == "matrix":
            self._matrix.append((row["after"], row["after_name"], row["on"], row["acc"]))
            # -1, the state before the first experience, becomes step 0
            step, values = row["after"] + 1, {f"matrix/{row['on']}": row["acc"]}
        else:
            step = row["index"] if table == "experiences" else self._batches
            drop = ("index", "segment", "batch", "task", "epoch", "step")
            values = {
                f"{table}/{k}": v
                for k, v in row.items()
                if isinstance(v, int | float) and k not in drop
            }
        self._try(lambda: self._write(table, int(step or 0), values))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """End the mirror; None marks the run as unfinished."""
        self._try(lambda: self._end(summary))
        self._off = True

    def _write(self, table: str, step: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError

    def _end(self, summary: Mapping[str, Any] | None) -> None:
        raise NotImplementedError

    def _table(self) -> tuple[list[Any], list[Any]]:
        """The accuracy matrix: head, and one row an experience."""
        columns = list(dict.fromkeys(on for _, _, on, _ in self._matrix))
        rows: dict[tuple[int, str], dict[str, float]] = {}
        for after, name, on, acc in self._matrix:
            rows.setdefault((after, name), {})[on] = acc
        body = [[name, *(row.get(on) for on in columns)] for (_, name), row in rows.items()]
        return ["after", *columns], body


def _lines(path: Path) -> int:
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """Metrics, cost and the gain over the source model as flat names."""
    parts = {
        "metrics": summary["metrics"],
        "cost": summary["cost"],
        "gain": summary.get("source", {}).get("gain", {}),
    }
    return {
        f"{part}/{k}": v
        for part, values in parts.items()
        for k, v in values.items()
        if isinstance(v, int | float)
    }


class WandbSink(Mirror):
    """Mirrors rows to Weights & Biases through its own API.

    Offline unless `mode="online"` and a key is in the environment. The step axis of each table is
    its own: batches, experiences. The end adds the metrics, the accuracy matrix as a table and the
    published figures.

    Raises:
        UserError: for `mode="online"` without WANDB_API_KEY, instead of a prompt.
    """

    name = "wandb"

    def __init__(
        self,
        about: About,
        *,
        mode: Literal["offline", "online"],
        project: str,
        entity: str | None,
        every: Count,
    ) -> None:
        super().__init__(about, every=every)
        if mode == "online" and not os.environ.get("WANDB_API_KEY"):
            raise UserError(
                "logger.wandb.mode=online needs a key: set WANDB_API_KEY, or stay offline and "
                "upload later with `python scripts/sync_wandb.py`"
            )
        os.environ.setdefault("WANDB_SILENT", "true")

        def start() -> Any:
            import wandb

            run = wandb.init(
                mode=mode,
                project=project,
                entity=entity,
                id=about.run_id,
                name=about.run_id,
                group=about.group,
                job_type=about.job_type,
                tags=list(about.tags),
                dir=str(about.folder),
                config=dict(about.config),
                reinit="create_new",
                settings=wandb.Settings(
                    console="off",
                    disable_git=True,
                    x_disable_stats=True,
                    save_code=False,
                    silent=True,
                    init_timeout=30,
                ),
            )
            for table in ("batches", "experiences", "matrix"):
                run.define_metric(f"{table}/step", hidden=True)
                run.define_metric(f"{table}/*", step_metric=f"{table}/step")
            return run

        self._run = self._try(start)

    def _write(self, table: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{table}/step": step, **values})

    def _end(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            import wandb

            self._run.summary.update({**_numbers(summary), "folder": summary["run"]["folder"]})
            head, body = self._table()
            tables = {"tables/matrix": wandb.Table(columns=head, data=body)}
            figures: list[Any] = [
                [row["strategy"], row["metric"], row["value"], row["ours"], row["status"]]
                for row in summary.get("reference") or []
            ]
            if figures:
                columns: list[Any] = ["strategy", "metric", "published", "ours", "status"]
                tables["tables/published"] = wandb.Table(columns=columns, data=figures)
            self._run.log(tables)
        self._run.finish(exit_code=0 if summary is not None else 1)


class TensorBoardSink(Mirror):
    """Mirrors rows to TensorBoard event files in `<run folder>/tensorboard/`.

    Raises:
        UserError: without the package `tensorboard`.
    """

    name = "tensorboard"

    def __init__(self, about: About, *, every: Count) -> None:
        super().__init__(about, every=every)
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                'logger=tensorboard needs the package: pip install -e ".[tensorboard]", or take '
                "logger=files"
            )

        def start() -> Any:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(about.folder / "tensorboard"))
            lines = [f"    {k}: {v}" for k, v in about.config.items()]  # indented: kept as it is
            writer.add_text("config", "\n".join([f"{about.group} {about.run_id}", "", *lines]))
            return writer

        self._writer = self._try(start)

    def _write(self, table: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def _end(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            for name, value in _numbers(summary).items():
                self._writer.add_scalar(f"summary/{name}", value, 0)
            head, body = self._table()
            cells = [
                ["-" if c is None else c if isinstance(c, str) else f"{c:.2f}" for c in r]
                for r in body
            ]
            rows = [head, ["---"] * len(head), *cells]
            self._writer.add_text("matrix", "\n".join("| " + " | ".join(r) + " |" for r in rows))
        self._writer.close()


SINKS: dict[str, type[Mirror]] = {"wandb": WandbSink, "tensorboard": TensorBoardSink}


def make_sinks(loggers: Mapping[str, Mapping[str, Any] | None], about: About) -> list[Mirror]:
    """The sinks that `conf/logger/` names with settings; null means none.

    Raises:
        UserError: from a sink that cannot start with these settings.
    """
    return [
        SINKS[name](about, **settings) for name, settings in loggers.items() if settings is not None
    ]
