"""Mirrors of the run's files. A sink never prompts, never raises, never stops a run.

A sink has four parts: `check` says what is wrong with its settings before anything is computed; a
constructor gets the run (`About`) and the settings from `conf/logger/`; `log(table, row)` gets
every row of the run's files, of a resumed run those that are there first; and `finish(summary)`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from driftline.core.errors import UserError
from driftline.core.paths import script_line
from driftline.core.ranges import Count

TABLES = ("batches", "experiences", "matrix")  # of a run folder, each a file of JSON lines
LONGEST, LONGEST_TAG = 128, 64  # characters of a name and of a tag in Weights & Biases


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
        self._batches = 0
        self._mirrored: Mapping[str, float] = {}  # the last step of each table that it has already
        self._matrix: list[tuple[int, str, str, float]] = []
        self._off = False

    @classmethod
    def check(cls, **settings: Any) -> None:
        """See whether the sink can start here.

        Raises:
            UserError: if not, with what to do.
        """

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
        step = int(step or 0)
        if step >= self._mirrored.get(table, 0):
            self._try(lambda: self._write(table, step, values))

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
    published figures. A resumed run is one run there too: offline its records are written anew as
    a whole, online they go on where they ended.
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
        os.environ.setdefault("WANDB_SILENT", "true")
        name = short(about.run_id, LONGEST)
        before = list(about.folder.glob(f"wandb/offline-run-*-{name}"))

        def start() -> Any:
            import wandb

            run = wandb.init(
                mode=mode,
                project=project,
                entity=entity,
                id=name,
                name=name,
                group=short(about.group, LONGEST, "/[]() =,"),
                job_type=about.job_type,
                tags=[short(tag, LONGEST_TAG, ":[]") for tag in about.tags],
                resume="allow" if mode == "online" else None,
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
            for table in TABLES:
                run.define_metric(f"{table}/step", hidden=True)
                run.define_metric(f"{table}/*", step_metric=f"{table}/step")
            for folder in before:
                shutil.rmtree(folder)  # a part of what the new one will hold
            return run

        self._run = self._try(start)
        if self._run is not None and mode == "online":
            steps = {table: self._run.summary.get(f"{table}/step") for table in TABLES}
            self._mirrored = {table: step for table, step in steps.items() if step is not None}

    @classmethod
    def check(cls, **settings: Any) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError("logger=wandb needs the package: pip install wandb, or logger=files")
        if settings["mode"] == "online" and not os.environ.get("WANDB_API_KEY"):
            raise UserError(
                "logger.wandb.mode=online needs a key: set WANDB_API_KEY, or stay offline and "
                f"upload later with {script_line('sync_wandb')}"
            )
        import wandb

        try:
            wandb.Settings(project=settings["project"], entity=settings["entity"])
        except Exception as error:  # its rules for names
            raise UserError(f"logger.wandb: {str(error).splitlines()[-1].strip()}") from error

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

    A resumed run makes them anew.
    """

    name = "tensorboard"

    def __init__(self, about: About, *, every: Count) -> None:
        super().__init__(about, every=every)

        def start() -> Any:
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(about.folder / "tensorboard", ignore_errors=True)
            writer = SummaryWriter(str(about.folder / "tensorboard"))
            lines = [f"    {k}: {v}" for k, v in about.config.items()]  # indented: kept as it is
            writer.add_text("config", "\n".join([f"{about.group} {about.run_id}", "", *lines]))
            return writer

        self._writer = self._try(start)

    @classmethod
    def check(cls, **settings: Any) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise UserError(
                'logger=tensorboard needs the package: pip install -e ".[tensorboard]", or take '
                "logger=files"
            )

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


def short(text: str, limit: int, allowed: str = "") -> str:
    """A name of letters, digits, `_.+-` and `allowed`, cut to `limit` with a hash of the whole."""
    plain = "".join(c if c.isalnum() or c in f"_.+-{allowed}" else "-" for c in text)
    if len(plain) <= limit:
        return plain
    return f"{plain[: limit - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_sinks(loggers: Mapping[str, Mapping[str, Any] | None]) -> None:
    """See whether the sinks that `conf/logger/` names with settings can start here.

    Raises:
        UserError: for the first that cannot.
    """
    for name, settings in loggers.items():
        if settings is not None:
            SINKS[name].check(**settings)


def make_sinks(loggers: Mapping[str, Mapping[str, Any] | None], about: About) -> list[Mirror]:
    """The sinks that `conf/logger/` names with settings; null means none."""
    return [
        SINKS[name](about, **settings) for name, settings in loggers.items() if settings is not None
    ]
