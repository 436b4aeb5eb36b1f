"""Weights & Biases as a mirror of the record: losing it never loses a result."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from alignbench.config import TrackingConfig

log = logging.getLogger(__name__)
#: Set by `wandb agent` for the runs that it starts.
_AGENT = "WANDB_SWEEP_ID"


class Tracker:
    """One W&B run per Hydra job. Every call is safe: a failure is logged once and ends the mirroring.

    Use as a context manager: the run is finished in any case, so that the jobs of a multirun in one process
    never share a W&B run.
    """

    def __init__(
        self,
        settings: TrackingConfig,
        *,
        run_id: str,
        group: str,
        job_type: str,
        config: Mapping[str, Any],
        folder: Path,
    ) -> None:
        self._settings, self._folder, self._config = settings, folder, dict(config)
        self._names = {"id": run_id, "group": group, "job_type": job_type}
        self._run: Any = None
        self._opened: Any = None
        self._axes: set[str] = set()

    def __enter__(self) -> Tracker:
        if self._settings.mode != "disabled":
            self._safely(self._start)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        run, self._run, self._opened = self._opened, None, None
        if run is not None:  # also where mirroring broke off: an open run would swallow the next job's metrics
            with contextlib.suppress(Exception):
                run.finish(exit_code=0 if kind is None else 1)

    def _start(self) -> None:
        import wandb

        self._folder.mkdir(parents=True, exist_ok=True)
        self._run = self._opened = wandb.init(
            project=self._settings.project,
            entity=self._settings.entity,
            id=self._identity(),
            name=self._names["id"],
            group=self._names["group"],
            job_type=self._names["job_type"],
            tags=list(self._settings.tags),
            config=self._config,
            dir=str(self._folder),
            mode=cast(Literal["online", "offline", "disabled"], self._settings.mode),
            resume="allow" if self._settings.mode == "online" and not os.environ.get(_AGENT) else None,
            reinit="finish_previous",
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )

    def _identity(self) -> str | None:
        if os.environ.get(_AGENT):
            return None  # the agent has named the run, and looks for its result under that name
        # W&B keeps a deleted run's id for ever: the folder's hash keeps two checkouts apart
        return f"{self._names['id']}-{hashlib.sha256(str(self._folder.resolve()).encode()).hexdigest()[:6]}"

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of one optimiser step of a stage, on the stage's own axis."""

        def send(run: Any) -> None:
            axis = f"{stage}/step"
            if axis not in self._axes:
                run.define_metric(axis)
                run.define_metric(f"{stage}/*", step_metric=axis)
                self._axes.add(axis)
            run.log({axis: step, **{f"{stage}/{name}": value for name, value in metrics.items()}})

        self._send(send)

    def replay(self, stage: str, rows: Iterable[Mapping[str, float]]) -> None:
        """Log a finished stage's training curve again: a run that found it in the store shows it too."""
        for row in rows:
            self.log(stage, int(row["step"]), {k: v for k, v in row.items() if k != "step"})

    def summary(self, values: Mapping[str, Any]) -> None:
        """Final values of the run."""
        self._send(lambda run: run.summary.update(dict(values)))

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """A table, for instance of generations."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(columns=columns, data=rows)})

        self._send(send)

    def image(self, name: str, path: Path) -> None:
        """A picture."""

        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Image(str(path))})

        self._send(send)

    def _send(self, action: Callable[[Any], None]) -> None:
        if self._run is not None:
            self._safely(lambda: action(self._run))

    def _safely(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - a mirror that breaks must not take the result with it
            self._run = None
            log.warning("W&B stopped (%s: %s); the run goes on, its record is complete", type(error).__name__, error)
