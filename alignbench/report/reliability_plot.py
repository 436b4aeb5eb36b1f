"""Reliability of every probability that a sweep rests on: learned scorers, judges, the models behind drawn labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignbench.report.calibration import curves_of, draw_reliability, pooled
from alignbench.report.plot import pyplot, save

_COLUMNS = 4


def reliability(records: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw a diagram per learned column, per judged criterion (against gold), and per kind of drawn label.

    What stands in several records is counted once; different runs of one kind are pooled, bin by bin.

    Args:
        records: Of one sweep.
        path: Base name; a .png and a .pdf are written.

    Returns:
        Whether a record holds a probability and what came of it.
    """
    panels = _panels(records)
    if not panels:
        return False
    plt = pyplot()
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4.3 * columns, 4.5 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        merged = {name: pooled(list(found.values())) for name, found in curves.items()}
        draw_reliability(axes, merged)
        examples = max(sum(cell["n"] for cell in curve["bins"]) for curve in merged.values())
        axes.set_title(f"{title}\n{examples} examples", fontsize=10)
    save(figure, path)
    return True


def _panels(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Mapping[str, Any]]]]:
    """Panel -> curve -> distinct reliabilities, each under its own text."""
    panels: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}

    def add(title: str, name: str, curve: Mapping[str, Any]) -> None:
        panels.setdefault(title, {}).setdefault(name, {})[json.dumps(curve, sort_keys=True)] = curve

    for record in records:
        for scorer, columns in (record.get("scorers") or {}).items():
            for column, entry in columns.items():
                split = "validation" if "validation" in entry else "train"
                for name, curve in curves_of(entry[split]).items():
                    add(f"scorer {scorer}: {column}, {split} pairs", name, curve)
        judging = record.get("judging") or {}
        for contest in judging.get("contests", ()):
            found = contest.get("gold", {}).get("calibration")
            if found is not None:
                add(f"judge {judging['judge']}: {contest['criterion']}", "P(the policy's answer is better)", found)
        for entry in (record.get("labels") or {}).values():
            add(f"labels by {entry['objective']}, {entry['kind']}", "P(response 1 preferred)", entry)
    return panels
