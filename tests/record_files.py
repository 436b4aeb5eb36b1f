"""Records of tests as finished runs leave them: a folder each, with what every report asks of a record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignbench.jsonio import write_json
from alignbench.record import SCHEMA


def folder_of(made: Sequence[dict[str, Any]], folder: Path) -> Path:
    """A sweep's folder with these records."""
    for k, one in enumerate(made):
        (folder / str(k)).mkdir(parents=True)
        write_json(folder / str(k) / "record.json", {"schema": SCHEMA, "cost": {}} | one)
    return folder


def constraint_of(requested: float, achieved: dict[str, Any]) -> dict[str, Any]:
    """What a record says of one constraint of a policy, from the margin it achieved (an estimate)."""
    low, high = achieved["low"], achieved["high"]
    violation = {
        "mean": max(0.0, requested - achieved["mean"]),
        "low": None if high is None else max(0.0, requested - high),
        "high": None if low is None else max(0.0, requested - low),
    }
    return {
        "requested_margin": requested,
        "achieved_margin": achieved,
        "violation": {**achieved, **violation},
        "satisfied": achieved["mean"] >= requested,
        "satisfied_with_confidence": low is not None and low >= requested,
    }
