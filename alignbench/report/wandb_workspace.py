"""A W&B workspace as code: panels over what runs of a sweep have logged, grouped by method and threshold."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from alignbench.config import TrackingConfig
from alignbench.errors import ConfigError, TrackingError
from alignbench.jsonio import write_json
from alignbench.mirror import DUAL_COURSE, FRONT, ITERATIONS, PICTURES, iterations_of, mirror, summary_of, tables_of
from alignbench.report.runs import Record, Runs, training_curves
from alignbench.tracking import Tracker

GROUPS = ("method.name", "constraint.thresholds")
_COSTS = ("trained_tokens", "generated_tokens", "scored_tokens", "seconds", "peak_rss_bytes", "models_trained")


def workspace(runs: Runs, *, entity: str, project: str, name: str) -> Any:
    """The workspace, not saved: a `wandb_workspaces.workspaces.Workspace`.

    Every panel's metric is one that at least one of the runs has, as `alignbench.mirror` sends it.

    Args:
        runs: What W&B holds, or will hold.
        entity: W&B user or team.
        project: W&B project.
        name: Of the workspace.

    Raises:
        ConfigError: The extra is not installed.
    """
    ws, wr = _libraries()
    records = runs.records
    utilities = list(dict.fromkeys(u for record in records for u in record["config"]["constraint"]["utilities"]))
    sections = [
        ws.Section(name=title, is_open=True, panels=panels)
        for title, panels in (
            ("Trade-off", _trade_off(wr, records, utilities)),
            ("Duals", _duals(wr, records, utilities)),
            ("Training", _training(wr, runs)),
            ("Cost", _costs(wr, records)),
            ("Pictures", _pictures(wr, runs)),
        )
        if panels
    ]
    groups = [ws.Config(key) for key in GROUPS]
    return ws.Workspace(
        entity=entity, project=project, name=name, sections=sections, runset_settings=ws.RunsetSettings(groupby=groups)
    )


def spec_of(space: Any) -> dict[str, Any]:
    """The workspace as W&B stores it, in plain JSON types."""
    return dict(space._to_model().model_dump(mode="json", by_alias=True))


def write_spec(space: Any, path: Path) -> None:
    """Write `spec_of` a workspace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, spec_of(space))


def save(space: Any) -> str:
    """Save a workspace with the W&B account of this machine; its address.

    Raises:
        ConfigError: There is no login.
        TrackingError: W&B refused it, or could not be reached.
    """
    import wandb

    if not (os.environ.get("WANDB_API_KEY") or wandb.login(prompt=False)):
        raise ConfigError(
            "this machine has no W&B login, so the workspace cannot be saved",
            where="--save",
            mend="wandb login, or set WANDB_API_KEY; without an account leave --save out",
        )
    try:
        return str(space.save().url)
    except Exception as error:  # noqa: BLE001 - whatever the client raises, the user hears which side it was on
        raise TrackingError(
            f"W&B did not save the workspace ({type(error).__name__}: {error})",
            where=f"{space.entity}/{space.project}",
            mend="does the project exist, and may this account write to it?",
        ) from None


def rebuild(runs: Runs, folder: Path, *, mode: str, project: str, entity: str | None, group: str) -> list[Path]:
    """Make W&B runs of records: curves, results, tables, pictures, as the runs themselves would have sent them.

    Args:
        runs: The records.
        folder: Where W&B's files go, a folder per run.
        mode: "offline" or "online".
        project: W&B project.
        entity: W&B user or team; None for the account's own.
        group: W&B group of all of them.

    Returns:
        The folders.
    """
    settings = dataclasses.replace(TrackingConfig(mode=cast(Any, mode)), project=project, entity=entity)
    made = []
    for record in runs.records:
        target = folder / record["run_id"]
        own = Tracker(
            settings,
            run_id=record["run_id"],
            group=group,
            job_type=str(record["method"]),
            config=record["config"],
            folder=target,
        )
        with own as tracker:
            curves, _ = training_curves(record, runs.folders[record["run_id"]])
            for stage, rows in (curves or {}).items():
                tracker.replay(stage, rows)
            mirror(record, runs.folders[record["run_id"]], tracker)
        made.append(target)
    return made


# ---------------------------------------------------------------- panels


def _trade_off(wr: Any, records: Sequence[Record], utilities: Sequence[str]) -> list[Any]:
    has = _known(summary_of(record) for record in records)
    panels = []
    for utility in utilities:
        if has("reported/reward", f"reported/{utility}"):
            panels.append(
                wr.ScatterPlot(
                    title=f"reward against {utility} (reported policies)",
                    x=wr.SummaryMetric("reported/reward"),
                    y=wr.SummaryMetric(f"reported/{utility}"),
                )
            )
        if any(FRONT in tables_of(record) and utility in tables_of(record)[FRONT][0] for record in records):
            panels.append(_chart(wr, FRONT, "wandb/scatter/v0", {"x": "reward", "y": utility}, f"front: {utility}"))
        pair = [f"reported/{utility}_{kind}_margin" for kind in ("requested", "achieved")]
        if has(*pair):
            panels.append(
                wr.ScatterPlot(
                    title=f"requested against achieved margin of {utility}",
                    x=wr.SummaryMetric(pair[0]),
                    y=wr.SummaryMetric(pair[1]),
                    regression=True,
                )
            )
    for metric in ("reward", *utilities, *(f"{u}_violation" for u in utilities), "kl", "length"):
        if has(f"reported/{metric}"):
            panels.append(_bars(wr, f"reported/{metric}", metric))
    return panels


def _duals(wr: Any, records: Sequence[Record], utilities: Sequence[str]) -> list[Any]:
    names = {name for record in records for _, values in iterations_of(record) for name in values}
    panels = []
    for utility in utilities:
        for kind, what in (("multiplier", "multiplier"), ("gap", "constraint gap (above 0: violated)")):
            if f"{kind}/{utility}" in names:
                key = f"{ITERATIONS}/{kind}/{utility}"
                panels.append(
                    wr.LinePlot(
                        title=f"{what} of {utility} by iteration",
                        x=f"{ITERATIONS}/step",
                        y=[key],
                        groupby=wr.Config(GROUPS[0]),
                        groupby_aggfunc="mean",
                        groupby_rangefunc="minmax",
                    )
                )
        if _known(summary_of(record) for record in records)(f"reported/{utility}_multiplier"):
            panels.append(_bars(wr, f"reported/{utility}_multiplier", f"multiplier of {utility}"))
    if any(DUAL_COURSE in tables_of(record) for record in records):
        for column, what in (("value", "dual function"), ("ess_mean", "effective sample size")):
            fields = {"x": "multiplier", "y": column, "stroke": "requested"}
            panels.append(_chart(wr, DUAL_COURSE, "wandb/line/v0", fields, f"{what} along the multiplier"))
    return panels


def _training(wr: Any, runs: Runs) -> list[Any]:
    """A panel per quantity of every stage's name; methods that share a stage share its panel."""
    curves: dict[str, set[str]] = {}
    for record in runs.records:
        found, _ = training_curves(record, runs.folders[record["run_id"]])
        for stage, rows in (found or {}).items():
            curves.setdefault(stage, set()).update(name for row in rows for name in row)
    panels = []
    for stage, names in curves.items():
        for quantity in ("loss", "accuracy"):
            shown = [f"{stage}/{name}" for name in (quantity, f"validation_{quantity}") if name in names]
            if shown:
                panels.append(wr.LinePlot(title=f"{stage}: {quantity}", x=f"{stage}/step", y=shown))
    return panels


def _costs(wr: Any, records: Sequence[Record]) -> list[Any]:
    has = _known(summary_of(record) for record in records)
    return [_bars(wr, f"cost/{name}", name.replace("_", " ")) for name in _COSTS if has(f"cost/{name}")]


def _pictures(wr: Any, runs: Runs) -> list[Any]:
    folders = list(runs.folders.values())
    there = [name for name in PICTURES if any((folder / f"{name}.png").exists() for folder in folders)]
    return [wr.MediaBrowser(title=name, media_keys=[name]) for name in there]


def _bars(wr: Any, metric: str, title: str) -> Any:
    return wr.BarPlot(
        title=title, metrics=[metric], groupby=wr.Config(GROUPS[0]), groupby_aggfunc="mean", groupby_rangefunc="minmax"
    )


def _chart(wr: Any, table: str, preset: str, fields: Mapping[str, str], title: str) -> Any:
    """One of W&B's own charts over a table that every run has logged."""
    return wr.CustomChart(
        query={"summaryTable": {"tableKey": table}},
        chart_name=preset,
        chart_fields=dict(fields),
        chart_strings={"title": title},
    )


def _known(summaries: Any) -> Callable[..., bool]:
    found = {name for summary in summaries for name, value in summary.items() if value is not None}
    return lambda *names: found >= set(names)


def _libraries() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise ConfigError(
            "wandb-workspaces is not installed",
            where="python -m alignbench.report wandb",
            mend="pip install wandb-workspaces==0.4.13 (the extra [wandb] of pyproject.toml)",
        ) from None
    return ws, wr
