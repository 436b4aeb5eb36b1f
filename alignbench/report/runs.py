"""Records as they lie in folders: what can be used, and what was left out and why.

A sweep's folder may hold records of another schema, half-written ones, copies, runs of several versions. None of it is
averaged silently: every fault becomes a note, and the notes stand below the tables.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alignbench.errors import DataError, StoreError
from alignbench.jsonio import read_json, read_jsonl
from alignbench.record import SCHEMA

Record = dict[str, Any]
Table = dict[str, dict[str, np.ndarray]]

# what a report reads in every record
_NEEDED: dict[str, type] = {
    "run_id": str, "method": str, "seed": int, "config": dict, "outcome": dict, "rows": dict, "cost": dict,
}  # fmt: skip
_NEEDED_SETTINGS: dict[str, dict[str, Any]] = {"dataset": {"name": str}}
_THRESHOLDS: dict[str, dict[str, Any]] = {"constraint": {"utilities": list, "thresholds": list}}
# what tables of measurements read besides
_MEASURED_SETTINGS: dict[str, dict[str, Any]] = {
    "constraint": {"form": str, "beta": (int, float)},
    "evaluate": {"split": str},
}
_MEASURED_IN_ROWS: dict[str, type] = {"policy": str, "metrics": dict}
_JUDGED_SETTINGS: dict[str, dict[str, Any]] = {"constraint": {"thresholds": list}, "evaluate": {"level": (int, float)}}
_JUDGED_IN_ROWS: dict[str, type] = {"policy": str}
_OF_CONSTRAINT: dict[str, Any] = {
    "requested_margin": (int, float), "achieved_margin": dict, "violation": dict,
    "satisfied": bool, "satisfied_with_confidence": bool,
}  # fmt: skip
_OPTIONAL = ("judging", "scorers", "over_optimisation", "per_prompt")
# the summary in a multirun's folder
SWEEP = "sweep.json"
_PACKAGES = ("torch", "transformers", "deepspeed")


@dataclass(frozen=True)
class Runs:
    """Usable records, in the order of their run id, and what a reader must know about the others.

    Attributes:
        records: Each run once.
        folders: Folder of each run by run id.
        notes: One sentence per fault.
    """

    records: list[Record]
    folders: dict[str, Path]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Needs:
    """What a report reads besides what every one does."""

    thresholds: bool
    measured: bool
    judged: bool


def collect(folder: Path, *, thresholds: bool = False, measured: bool = False, judged: bool = False) -> Runs:
    """Every usable record below a folder; of a sweep's own folder, which holds its sweep.json, that sweep's runs.

    Args:
        folder: Searched with all that lies in it.
        thresholds: Whether what was asked of every run is needed.
        judged: Whether what tables of judges read is needed.
        measured: Whether what was asked and the metrics and constraints of every row are needed, too.

    Raises:
        DataError: There is no record at all, or none that can be used; the message holds the notes.
    """
    paths, notes = _of_sweep(folder) if (folder / SWEEP).is_file() else (sorted(folder.rglob("record.json")), [])
    if not paths:
        raise DataError(f"no record.json below {folder}", where=str(folder), mend="run something first: python main.py")
    found: dict[str, tuple[Path, Record]] = {}
    for path in paths:
        inside = path.parent != folder and path.is_relative_to(folder)
        name = str(path.parent.relative_to(folder)) if inside else path.parent.name
        record, fault = _read(path, _Needs(thresholds or measured, measured, judged))
        if record is None:
            notes.append(f"left out: {name}: {fault}")
            continue
        if record["run_id"] in found:
            notes.append(_duplicate(found, record, path, name))
        else:
            found[record["run_id"]] = (path, record)
    if not found:
        raise DataError(
            f"no usable record below {folder}: " + "; ".join(notes),
            where=str(folder),
            mend="run again what was left out: the store keeps what was computed",
        )
    chosen = {run_id: found[run_id] for run_id in sorted(found)}
    records = [record for _, record in chosen.values()]
    return Runs(records, {run_id: path.parent for run_id, (path, _) in chosen.items()}, notes + _versions(records))


def _of_sweep(folder: Path) -> tuple[list[Path], list[str]]:
    """Records of a multirun's runs, which lie beside its folder, and what became of its other jobs."""
    summary = read_json(folder / SWEEP)
    try:
        paths, failed, missing = (
            [folder.parent / run / "record.json" for run in summary["runs"]],
            summary["failed"],
            summary["missing"],
        )
        notes = [f"failed: {' '.join(job['overrides'])}: {job['error']}" for job in failed]
    except (KeyError, TypeError):
        raise DataError("it is no summary of a sweep", where=str(folder / SWEEP), mend="run the sweep again") from None
    if missing != 0:
        notes.append(f"{'some' if missing is None else missing} of the sweep's jobs never ran to an end")
    return paths, notes


def _read(path: Path, needs: _Needs) -> tuple[Record | None, str]:
    """A record, or None and why not."""
    if not path.is_file():
        return None, "its record is gone; run it again"
    try:
        record = read_json(path)
    except StoreError:
        return None, "half-written or damaged (no JSON); run it again"
    if not isinstance(record, dict):
        return None, f"no record but a JSON {type(record).__name__}"
    if record.get("schema") != SCHEMA:
        return None, f"schema {record.get('schema')!r}, this program reads {SCHEMA}; run it again"
    if record.get("status", "finished") != "finished":
        return None, f"status {record['status']!r}"
    lacking = [key for key, kind in _NEEDED.items() if not isinstance(record.get(key), kind)]
    if lacking:
        return None, f"no usable {', '.join(lacking)}; run it again"
    lacking = _lacking(record, needs)
    if lacking:
        return None, f"no usable {', '.join(lacking)}; run it again"
    if record["outcome"].get("reported") not in record["rows"]:
        return None, f"its reported row {record['outcome'].get('reported')!r} is not there; run it again"
    return record, ""


def _lacking(record: Record, needs: _Needs) -> list[str]:
    """What reports read below the first level, where it is absent or of another kind."""
    found = [key for key in _OPTIONAL if not isinstance(record.get(key) or {}, dict)]
    asked = [_NEEDED_SETTINGS]
    asked += [_THRESHOLDS] if needs.thresholds else []
    asked += [_MEASURED_SETTINGS] if needs.measured else []
    asked += [_JUDGED_SETTINGS] if needs.judged else []
    for group, keys in ((group, keys) for groups in asked for group, keys in groups.items()):
        found += _absent(record["config"].get(group), keys, f"config.{group}")
    if needs.thresholds and not found:
        constraint = record["config"]["constraint"]
        if len(constraint["utilities"]) != len(constraint["thresholds"]):
            found.append("config.constraint.thresholds (one per utility)")
    in_rows = _MEASURED_IN_ROWS if needs.measured else _JUDGED_IN_ROWS if needs.judged else {}
    for name, row in record["rows"].items():
        found += _absent(row, in_rows, f"rows.{name}")
        if not needs.measured or not isinstance(row, dict):
            continue
        for metric, value in (row.get("metrics") or {}).items():
            # a number and its interval are one thing; an absent one is null
            if value is not None and not (isinstance(value, dict) and "mean" in value):
                found.append(f"rows.{name}.metrics.{metric}")
        for utility, value in (row.get("constraints") or {}).items():
            found += _absent(value, _OF_CONSTRAINT, f"rows.{name}.constraints.{utility}")
    return list(dict.fromkeys(found))


def _absent(values: Any, keys: Mapping[str, Any], where: str) -> list[str]:
    """Names of the keys whose values are absent or of another kind."""
    if not isinstance(values, dict):
        return [where]
    return [f"{where}.{key}" for key, kind in keys.items() if not isinstance(values.get(key), kind)]


def _duplicate(found: dict[str, tuple[Path, Record]], record: Record, path: Path, name: str) -> str:
    """Keep one of two records of one run: the newer, where their numbers differ."""
    kept_path, kept = found[record["run_id"]]
    # one run, whichever presets asked for it
    kept["experiments"] = record["experiments"] = sorted({*experiments_of(kept), *experiments_of(record)})
    if record["rows"] == kept["rows"]:
        return f"counted once: {name} is a copy of {kept_path.parent.name}"
    newer = str(record.get("created", "")) > str(kept.get("created", ""))
    if newer:
        found[record["run_id"]] = (path, record)
    used, other = (path, kept_path) if newer else (kept_path, path)
    return (
        f"two records of run {record['run_id']} differ: the newer ({used.parent}) is used, "
        f"the other ({other.parent}) left out"
    )


def _versions(records: Sequence[Record]) -> list[str]:
    """Notes on code and packages that differ between records that stand in one table."""
    notes = []
    for what, read in (
        ("commits", lambda r: r.get("commit")),
        ("alignbench versions", lambda r: r.get("alignbench")),
        *((f"{name} versions", lambda r, name=name: (r.get("versions") or {}).get(name)) for name in _PACKAGES),
    ):
        values = sorted({str(read(record)) for record in records})
        if len(values) > 1:
            notes.append(f"records of {len(values)} {what}: {', '.join(value[:10] for value in values)}")
    return notes


def per_prompt(record: Record, folder: Path) -> tuple[Table | None, str]:
    """Means per prompt of every row of a run, sorted by prompt: `{row: {"prompt_id": ..., metric: ...}}`.

    Returns:
        The table and "", or None and why it cannot be used.
    """
    rows, fault = _beside(record, folder, "per_prompt", "values per prompt")
    if fault:
        return None, fault
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault(row["row"], []).append(row)
    found: Table = {}
    for name, rows in tables.items():
        rows.sort(key=lambda row: str(row["prompt_id"]))
        columns = {key: np.array([row[key] for row in rows]) for key in rows[0] if key != "row"}
        found[name] = columns
    return found, ""


def experiments_of(record: Mapping[str, Any]) -> list[str]:
    """The presets that asked for a run; none where the record does not say."""
    found = record.get("experiments")
    return [str(name) for name in found] if isinstance(found, list) else []


def training_curves(record: Record, folder: Path) -> tuple[dict[str, list[dict[str, float]]] | None, str]:
    """Training curves of a run by stage, in the order in which they were trained.

    Returns:
        The curves and "", or None and why there are none.
    """
    rows, fault = _beside(record, folder, "training", "training curves")
    if fault:
        return None, fault
    curves: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        curves.setdefault(row.pop("stage"), []).append(row)
    return curves, ""


def _beside(record: Record, folder: Path, key: str, words: str) -> tuple[list[dict[str, Any]], str]:
    """Rows of a file that lies beside a record and is named there under `key`; and what is wrong with it, or ""."""
    stated = record.get(key)
    if not isinstance(stated, Mapping):
        return [], f"no {words} (made by an earlier version); the same command writes them"
    path = folder / str(stated["file"])
    try:
        content = path.read_bytes()
    except OSError:
        return [], f"{path.name} is missing; the same command writes it again"
    if hashlib.sha256(content).hexdigest() != stated["sha256"]:
        return [], f"{path.name} is damaged or of another run; the same command writes it again"
    return read_jsonl(path), ""


def by_problem(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records that may stand in one table: same data, prompts and constraint."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        config = record["config"]
        constraint = config["constraint"]
        asked = ",".join(f"{u}{t:+g}" for u, t in zip(constraint["utilities"], constraint["thresholds"], strict=True))
        name = f"{config['dataset']['name']}-{config['evaluate']['split']}-{constraint['form']}-{asked}"
        groups.setdefault(name, []).append(record)
    return groups


def configured(config: Mapping[str, Any], key: str) -> Any:
    """What a record's configuration holds under a dotted key; None where there is no such key."""
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def number(value: Mapping[str, Any] | None) -> float | None:
    """The mean of a record's metric; None where it is absent or no number (a NaN reads as null)."""
    mean = None if value is None else value.get("mean")
    return float(mean) if isinstance(mean, int | float) and math.isfinite(mean) else None
