"""Training curves of a sweep: a panel per method, its stages one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignbench.report.plot import COLOURS, pyplot, save

Curves = Mapping[str, Sequence[Mapping[str, float]]]
_COLUMNS = 4
_PREFER = "prefer "  # how the lab calls preference stages
_TRAIN, _HELD_OUT = COLOURS[2], COLOURS[4]


def training(runs: Sequence[tuple[str, Curves]], path: Path) -> bool:
    """Draw the losses of every run: each optimiser step pale, their running mean, held-out examples as joined points.

    Preference stages of a run follow each other along the steps; a dotted line and its name mark the begin of each.
    Others (SFT, score models) have a panel each.

    Args:
        runs: (method, curves by stage in order); several runs of a method lie in one panel.
        path: Base name; a .png and a .pdf are written.

    Returns:
        Whether there was a curve.
    """
    panels: dict[str, list[dict[str, Sequence[Mapping[str, float]]]]] = {}
    for method, curves in runs:
        own = {stage: rows for stage, rows in curves.items() if rows and "loss" in rows[0]}
        # SFT and score models: losses of their own, and shared by methods
        for stage in [stage for stage in own if not stage.startswith(_PREFER)]:
            shared = {stage: own.pop(stage)}
            if shared not in panels.setdefault(stage, []):
                panels[stage].append(shared)
        if own:
            panels.setdefault(method, []).append(own)
    if not panels:
        return False
    plt = pyplot()
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.2 * columns, 3.0 * rows + 0.7), layout="constrained", squeeze=False
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (method, drawn) in zip(grid.flat, panels.items(), strict=False):
        for curves in drawn:
            _course(axes, curves)
        _boundaries(axes, drawn[0])
        axes.set_title(f"{method} ({len(drawn)} run{'s' if len(drawn) > 1 else ''})", fontsize=10)
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("loss")
        axes.spines[["top", "right"]].set_visible(False)
    held_out = any(
        "validation_loss" in row for drawn in panels.values() for c in drawn for r in c.values() for row in r
    )
    names = [
        (_TRAIN, "the steps' own examples and their running mean"),
        *([(_HELD_OUT, "held-out examples")] if held_out else []),
    ]
    handles = [grid[0][0].plot([], [], color=colour, linewidth=1.6)[0] for colour, _ in names]
    figure.legend(handles, [name for _, name in names], loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    save(figure, path)
    return True


def _course(axes: Any, curves: Curves) -> None:
    begin = 0.0
    for rows in curves.values():
        steps = [begin + row["step"] for row in rows]
        loss = np.array([row["loss"] for row in rows])
        axes.plot(steps, loss, color=_TRAIN, linewidth=0.5, alpha=0.2)
        axes.plot(steps, running_mean(loss), color=_TRAIN, linewidth=1.1, alpha=0.9)
        checked = [(x, row["validation_loss"]) for x, row in zip(steps, rows, strict=True) if "validation_loss" in row]
        if checked:
            axes.plot(*zip(*checked, strict=True), color=_HELD_OUT, marker="o", markersize=2.5, linewidth=1.3)
        begin = steps[-1]


def running_mean(values: np.ndarray) -> np.ndarray:
    """Means over a twentieth of the curve to either side, of what there is of it at the ends; shape (n,) to (n,)."""
    half = len(values) // 20
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def _boundaries(axes: Any, curves: Curves) -> None:
    """Where stages begin, from the first run; their names, a step lower each, so that neighbours do not collide."""
    if len(curves) < 2:
        return
    begin = 0.0
    for k, (stage, rows) in enumerate(curves.items()):
        axes.axvline(begin, color="0.6", linestyle=":", linewidth=1, zorder=0)
        axes.annotate(
            stage.removeprefix(_PREFER), (begin, 0.98 - 0.065 * (k % 4)), xycoords=("data", "axes fraction"),
            xytext=(3, 0), textcoords="offset points", fontsize=7, color="0.25", va="top",
        )  # fmt: skip
        begin += rows[-1]["step"]
