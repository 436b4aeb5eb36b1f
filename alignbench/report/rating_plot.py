"""Elo-scale ratings of all judged policies, with intervals: the plane of two criteria, and each criterion by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignbench.report.direct import name_beside
from alignbench.report.judging import kind_of, together
from alignbench.report.plot import REFERENCE, arms, looks, pyplot, save
from alignbench.report.table import cell

_SCALE = "Bradley-Terry on Elo's scale, the reference at 1000"


def ratings(records: Sequence[Mapping[str, Any]], path: Path) -> list[str]:
    """Draw the ratings of every kind of judging (judge, protocol, data set), a picture each.

    Args:
        records: Of one sweep; those without judging are passed over.
        path: Base name; a .png and a .pdf are written per kind.

    Returns:
        What was drawn.
    """
    kinds: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        if record.get("judging", {}).get("contests"):
            kinds.setdefault(kind_of(record), []).append(record)
    drawn = []
    for kind, own in kinds.items():
        found = together(own)
        reported = {*found["reported"], *(contest["opponent"] for contest in found["contests"])}
        rated = {
            criterion: {name: value for name, value in own["bradley_terry"].items() if name in reported}
            for criterion, own in found["ratings"].items()
            if own.get("bradley_terry")
        }
        if rated:
            target = path if len(kinds) == 1 else path.with_name("-".join((path.name, *kind)))
            _draw(rated, f"judge {kind[0]}, protocol {kind[1]}, {kind[2]}", target)
            drawn.append(target.name)
    return drawn


def _draw(rated: Mapping[str, Mapping[str, Any]], title: str, path: Path) -> None:
    names = list(dict.fromkeys(name for found in rated.values() for name in found))
    # what all are rated against has no interval of its own
    fixed = {
        name for name in names if all(own[name]["low"] == own[name]["high"] for own in rated.values() if name in own)
    }
    by_series = looks(_series(name) for name in names if name not in fixed)
    styles = {name: by_series[REFERENCE if name in fixed else _series(name)] for name in names}
    plane = len(rated) == 2
    plt = pyplot()
    figure, panels = plt.subplots(
        1, len(rated) + plane, figsize=(5.0 * len(rated) + 6.6 * plane, 1.6 + max(3.4, 0.3 * len(names))),
        layout="constrained", squeeze=False, width_ratios=[*([1.25] if plane else []), *([1.0] * len(rated))],
    )  # fmt: skip
    if plane:
        _plane(panels[0][0], rated, styles)
    for axes, (criterion, found) in zip(panels[0][plane:], rated.items(), strict=True):
        _forest(axes, criterion, found, styles)
    for axes in panels[0]:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{title}: {_SCALE}", fontsize=11)
    save(figure, path)


def _series(name: str) -> str:
    return name.split(" @ ")[0]


def _plane(axes: Any, rated: Mapping[str, Mapping[str, Any]], styles: Mapping[str, tuple[str, str]]) -> None:
    (first, along), (second, up) = rated.items()
    ends: dict[str, tuple[str, float, float, str]] = {}
    courses: dict[str, list[tuple[float, float]]] = {}
    for name in sorted(styles):
        if name not in along or name not in up:
            continue
        marker, colour = styles[name]
        x, y = along[name]["mean"], up[name]["mean"]
        axes.errorbar(
            x, y, xerr=arms(along[name]), yerr=arms(up[name]), fmt=marker, color=colour, markerfacecolor="none",
            capsize=2, elinewidth=0.8, markersize=7,
        )  # fmt: skip
        courses.setdefault(_series(name), []).append((x, y))
        ends[_series(name)] = (_series(name), x, y, colour)
    for series, course in courses.items():
        axes.plot(*zip(*course, strict=True), color=ends[series][3], linewidth=0.8, alpha=0.5)
    for draw in (axes.axhline, axes.axvline):
        draw(1000, color="0.7", linestyle="--", linewidth=1, zorder=0)
    axes.set_xlabel(f"rating, {first}")
    axes.set_ylabel(f"rating, {second}")
    axes.margins(0.08)
    name_beside(axes, list(ends.values()))


def _forest(axes: Any, criterion: str, found: Mapping[str, Any], styles: Mapping[str, tuple[str, str]]) -> None:
    ordered = sorted(found, key=lambda name: -found[name]["mean"])
    for height, name in enumerate(ordered):
        marker, colour = styles[name]
        value = found[name]
        axes.errorbar(
            value["mean"], height, xerr=arms(value), fmt=marker, color=colour, markerfacecolor="none", capsize=3
        )
        axes.annotate(
            cell(value, 0), (value["high"] or value["mean"], height), fontsize=7.5, va="center", xytext=(5, 0),
            textcoords="offset points",
        )  # fmt: skip
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.3 * (high - low))  # room for the numbers
    axes.set_yticks(range(len(ordered)), ordered, fontsize=8)
    axes.set_ylim(len(ordered) - 0.5, -0.5)
    axes.axvline(1000, color="0.7", linestyle="--", linewidth=1, zorder=0)
    axes.set_xlabel(f"rating, {criterion}")
