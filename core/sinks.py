"""Mirrors of the run's files. A sink never prompts, never raises, never stops a run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from core.errors import UserError


class WandbSink:
    """Mirrors rows to Weights & Biases through its own API.

    Offline unless `mode="online"` and a key is in the environment. Batch rows are thinned to every
    n-th; experience and matrix rows all go. The first failure turns the sink off with one warning.

    Raises:
        UserError: for `mode="online"` without WANDB_API_KEY, instead of a prompt.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        mode: Literal["offline", "online"],
        project: str,
        entity: str | None,
        every: int,
        run_id: str,
        group: str,
        job_type: str,
    ) -> None:
        if mode == "online" and not os.environ.get("WANDB_API_KEY"):
            raise UserError(
                "logger.wandb.mode=online needs a key: set WANDB_API_KEY, or stay offline and "
                "upload later with `wandb sync <run folder>/wandb/offline-run-*`"
            )
        self.every, self._step, self._run = every, 0, None
        os.environ.setdefault("WANDB_SILENT", "true")

        def start() -> Any:
            import wandb

            return wandb.init(
                mode=mode,
                project=project,
                entity=entity,
                id=run_id,
                name=run_id,
                group=group,
                job_type=job_type,
                dir=str(folder),
                config=dict(config),
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

        self._run = self._try(start)

    def _try(self, call: Any) -> Any:
        try:
            return call()
        except Exception as error:  # a tracker must never stop an experiment
            warnings.warn(
                f"wandb is off for this run ({type(error).__name__}: {error}); "
                "the files in the run folder are complete",
                stacklevel=3,
            )
            self._run = None
            return None

    def log(self, table: str, row: Mapping[str, Any]) -> None:
        if self._run is None:
            return
        if table == "batches":
            self._step += 1
            if self._step % self.every:
                return
        values = {f"{table}/{k}": v for k, v in row.items() if isinstance(v, int | float)}
        if table == "matrix":
            values = {f"matrix/{row['on']}": row["acc"]}
        self._try(lambda: self._run and self._run.log(values))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """End the run; None marks it as unfinished."""
        run = self._run
        if run is None:
            return
        if summary is not None:
            self._try(lambda: run.summary.update(dict(summary)))
        self._try(lambda: run.finish(exit_code=0 if summary is not None else 1))
        self._run = None
