"""Pictures of published tables: the paper's panel and ours beside it, in one only where the scales are the same."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignbench.report.plot import arms, pyplot, save, style
from alignbench.report.published import Number, Picture, PublishedTable
from alignbench.report.published_runs import Line, described

_NOTHING: dict[str, Any] = {"low": None, "high": None}


@dataclass(frozen=True)
class _Point:
    series: str
    x: Mapping[str, Any]
    y: Mapping[str, Any]
    label: str
    ours: bool


def picture(table: PublishedTable, lines: Sequence[Line], path: Path) -> bool:
    """Draw a table, if it says how.

    Args:
        table: Its picture names the axes.
        lines: Our runs.
        path: Base name; a .png and a .pdf are written.

    Returns:
        Whether there is a picture.
    """
    asked = table.picture
    if asked is None:
        return False
    measures = {axis: _measure(table, name, lines) for axis, name in (("x", asked.x), ("y", asked.y))}
    theirs = _theirs(table, asked)
    same = [point for line in lines if line.run.as_published for point in _ours(table, line, measures)]
    other = [point for line in lines if not line.run.as_published for point in _ours(table, line, measures)]
    panels = [(f"{table.paper.upper().replace('_', '-')}, {table.source}", theirs + same, True)]
    if other:
        scales = {line.run.scale for line in lines if not line.run.as_published}
        kind = (
            "embedded twins" if scales == {"embedded"} else "paper's scale, changed" if scales == {"paper"} else "ours"
        )
        panels.append((f"ours: {kind}, another scale", other, False))
    series = list(dict.fromkeys(point.series for _, points, _ in panels for point in points))
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels) + 2, 4.4), layout="constrained", squeeze=False
    )
    handles: dict[str, Any] = {}
    for panel, (title, points, published) in zip(axes[0], panels, strict=True):
        for point in points:
            handles.setdefault(
                point.series, _draw(panel, point, series.index(point.series), both=bool(same) and published)
            )
        if asked.identity:
            _identity(panel)
        panel.set_title(title, fontsize=10)
        names = {"x": asked.x, "y": asked.y}
        for axis, name in names.items():
            label = name if published else _own_label(name, measures[axis], lines)
            text = _with_unit(table, label, name) if published else label
            getattr(panel, f"set_{axis}label")(textwrap.fill(text, 48), fontsize=9)
        panel.margins(0.12)
        panel.spines[["top", "right"]].set_visible(False)
    if asked.by:
        figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=8)
    told = _told(table, asked)
    words = [table.title, *([f"labels: {', '.join(told)}"] if told else []), *(["filled: ours"] if same else [])]
    figure.suptitle("; ".join(words), fontsize=11)
    save(figure, path)
    return True


def _theirs(table: PublishedTable, asked: Picture) -> list[_Point]:
    found = []
    for row in table.rows:
        values: dict[str, Any] = dict(zip(table.keys, row.keys, strict=True))
        values |= dict(zip([column.name for column in table.columns], row.cells, strict=True))
        x, y = (_as_value(values[name]) for name in (asked.x, asked.y))
        if x is not None and y is not None:
            told = [str(getattr(values[key], "text", values[key])) for key in _told(table, asked) if values[key]]
            found.append(_Point(str(values[asked.by]) if asked.by else "", x, y, ", ".join(told), ours=False))
    return found


def _told(table: PublishedTable, asked: Picture) -> list[str]:
    """Keys that neither an axis nor the colour tells: they stand beside the points."""
    return [key for key in table.keys if key not in (asked.x, asked.by)] if not asked.identity else []


def _as_value(number: Any) -> dict[str, Any] | None:
    if isinstance(number, Number):
        if number.value is None:  # a range: its middle, with the range as interval
            assert number.low is not None
            assert number.high is not None
            return {"mean": (number.low + number.high) / 2, "low": number.low, "high": number.high}
        if number.low is not None:
            return {"mean": number.value, "low": number.low, "high": number.high}
        if number.spread is not None:
            return {"mean": number.value, "low": number.value - number.spread, "high": number.value + number.spread}
        return _NOTHING | {"mean": float(number.value)}
    return _NOTHING | {"mean": float(number)} if isinstance(number, float) else None


def _ours(table: PublishedTable, line: Line, measures: Mapping[str, str]) -> list[_Point]:
    own, asked = dict(line.run.own), table.picture
    assert asked is not None
    ends: list[Mapping[str, Any] | None] = []
    for axis, name in (("x", asked.x), ("y", asked.y)):
        measured = line.measured(measures[axis]) if measures[axis] else None
        ends.append(_NOTHING | {"mean": own[name]} if name in own else measured)
    x, y = ends
    if x is None or y is None:
        return []
    values = [own.get(key, line.keys.get(key)) for key in _told(table, asked)]
    label = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values if value is not None)
    return [_Point(str(line.keys.get(asked.by)) if asked.by else "", x, y, label, ours=True)]


def _measure(table: PublishedTable, name: str, lines: Sequence[Line]) -> str:
    """Our measure of a column: the first that a line has; "" for a key, and where there is none."""
    for column in table.columns:
        if column.name == name:
            return next((m for m in column.measures if any(line.measured(m) is not None for line in lines)), "")
    return ""


def _draw(panel: Any, point: _Point, index: int, *, both: bool) -> Any:
    marker, colour = style(index)
    panel.annotate(
        point.label, (point.x["mean"], point.y["mean"]), xytext=(5, 4), textcoords="offset points", fontsize=7,
        color="0.35",
    )  # fmt: skip
    return panel.errorbar(
        point.x["mean"],
        point.y["mean"],
        xerr=arms(point.x),
        yerr=arms(point.y),
        fmt=marker,
        color=colour,
        capsize=2,
        markersize=7,
        # in one panel ours are filled; elsewhere hollow, so that policies at one place are all seen
        markerfacecolor=colour if both and point.ours else "none",
        markeredgewidth=1.5,
        elinewidth=1,
    )


def _identity(panel: Any) -> None:
    """The line on which both axes are equal, within what is drawn."""
    low = max(panel.get_xlim()[0], panel.get_ylim()[0])
    high = min(panel.get_xlim()[1], panel.get_ylim()[1])
    if low < high:
        panel.plot([low, high], [low, high], color="0.6", linestyle="--", linewidth=1, zorder=0)
        panel.annotate("equal", (low, low), xytext=(4, -6), textcoords="offset points", fontsize=7, color="0.4")


def _own_label(name: str, measure: str, lines: Sequence[Line]) -> str:
    if not measure:
        return f"{name} (ours)"
    return described(measure, lines)


def _with_unit(table: PublishedTable, label: str, name: str) -> str:
    for column in table.columns:
        if column.name == name:
            return f"{label}: {column.metric}" + ("" if column.unit == "none" else f" ({column.unit})")
    return label
