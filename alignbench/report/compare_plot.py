"""The picture of a comparison: reward against a utility with the front, and requested against achieved or regret."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignbench.report.compare import LEVEL, constrained_best
from alignbench.report.direct import name_beside
from alignbench.report.entries import REFERENCE, Entry, Group, asked, paired
from alignbench.report.front import on_front
from alignbench.report.plot import arms, looks, pyplot, save

# more series than this do not fit beside a picture
_LEGEND_ROWS = 24


def picture(group: Group, path: Path) -> bool:
    """Write a .png and a .pdf.

    Left: every method and threshold, reward against the first utility, with intervals in both; the broad grey steps are
    the front of all points. Right: achieved slack by requested margin where several thresholds were asked, else reward
    against the constrained best, with intervals.

    Args:
        group: What is compared.
        path: Base name.

    Returns:
        Whether there was anything to draw: False without scores.
    """
    utility = group.utilities[0]
    known = [entry for entry in group.entries if {"reward", utility} <= set(entry.values)]
    if len(known) < 2:
        return False
    plt = pyplot()
    figure, (plane, right) = plt.subplots(1, 2, figsize=(12.4, 4.9), layout="constrained")
    series = list(dict.fromkeys(entry.series for entry in known))
    shown = looks(series)
    _plane(plane, known, utility, shown)
    if len(group.asked) > 1:
        _slacks(right, known, utility, shown)
    else:
        _regrets(right, group, known, shown)
    for axes in (plane, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.08)
    handles, labels = plane.get_legend_handles_labels()
    figure.legend(handles[:_LEGEND_ROWS], labels[:_LEGEND_ROWS], loc="outside right center", frameon=False, fontsize=8)
    figure.suptitle(f"{group.name}: means over seeds and {group.prompts} prompts, {LEVEL:.0%} intervals", fontsize=11)
    save(figure, path)
    return True


def front(group: Group, path: Path) -> bool:
    """Write a .png and a .pdf: reward against every constrained utility, a panel each, with the front of all points.

    The points of one series are joined in the order of their thresholds, and the series' name stands beside the last.

    Args:
        group: What is compared.
        path: Base name.

    Returns:
        Whether there was anything to draw: False without scores.
    """
    panels = {u: [e for e in group.entries if {"reward", u} <= set(e.values)] for u in group.utilities}
    panels = {utility: known for utility, known in panels.items() if len(known) > 1}
    if not panels:
        return False
    shown = looks(entry.series for entry in group.entries)
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(7.4 * len(panels), 5.2), layout="constrained", squeeze=False)
    for axis, (utility, known) in zip(axes[0], panels.items(), strict=True):
        _plane(axis, known, utility, shown)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(0.08)
        last = {}
        for name in dict.fromkeys(entry.series for entry in known):
            own = [entry for entry in known if entry.series == name]
            course = [(entry.values["reward"].mean(), entry.values[utility].mean()) for entry in own]
            axis.plot(*zip(*course, strict=True), color=shown[name][1], linewidth=0.8, alpha=0.5)
            last[name] = course[-1]
        name_beside(axis, [(name, x, y, shown[name][1]) for name, (x, y) in last.items()])
    asked_for = "; ".join(asked(thresholds) for thresholds in group.asked)
    figure.suptitle(
        f"{group.name}: means over seeds and {group.prompts} prompts, {LEVEL:.0%} intervals\n"
        f"grey: the front of all points; lines join a method's thresholds, ascending to its name ({asked_for})",
        fontsize=10,
    )
    save(figure, path)
    return True


def _plane(axes: Any, known: Sequence[Entry], utility: str, shown: dict[str, tuple[str, str]]) -> None:
    seen: set[str] = set()
    for entry in known:
        marker, colour = shown[entry.series]
        x, y = (_interval(entry, name) for name in ("reward", utility))
        axes.errorbar(
            x["mean"], y["mean"], xerr=arms(x), yerr=arms(y), fmt=marker, color=colour, capsize=2, markersize=7,
            markerfacecolor="none", markeredgewidth=1.6, elinewidth=0.8,
            label=entry.series if entry.series not in seen else None,
        )  # fmt: skip
        seen.add(entry.series)
    points = np.array([[entry.values[name].mean() for name in ("reward", utility)] for entry in known])
    front = points[on_front(points)]
    front = front[np.argsort(front[:, 0])]
    # what the front reaches: constant up to each point, then down
    axes.step(front[:, 0], front[:, 1], where="pre", color="0.85", linewidth=5, zorder=0, label="front of all points")
    axes.set_xlabel("reward (mean per response, larger is better)")
    axes.set_ylabel(f"{utility} (mean per response, larger is better)")


def _slacks(axes: Any, known: Sequence[Entry], utility: str, shown: dict[str, tuple[str, str]]) -> None:
    names = [name for name in shown if name != REFERENCE]
    some = [entry for entry in known if utility in entry.requested]
    requested = [entry.requested[utility] for entry in some]
    apart = 0.015 * (max(requested) - min(requested) or 1.0)
    axes.axhline(0.0, color="0.6", linestyle="--", linewidth=1, zorder=0)
    for i, name in enumerate(names):
        own = sorted((entry for entry in some if entry.series == name), key=lambda entry: entry.requested[utility])
        marker, colour = shown[name]
        xs = [entry.requested[utility] + apart * (i - (len(names) - 1) / 2) for entry in own]
        values = [_dict(entry.slack(utility)) for entry in own]
        axes.plot(xs, [value["mean"] for value in values], color=colour, linewidth=1, alpha=0.6)
        for x, value in zip(xs, values, strict=True):
            axes.errorbar(x, value["mean"], yerr=arms(value), fmt=marker, color=colour, capsize=2, elinewidth=0.8)
    axes.set_xlabel(f"requested margin of {utility}")
    axes.set_ylabel("achieved less requested (met at 0 and above)")


def _regrets(axes: Any, group: Group, known: Sequence[Entry], shown: dict[str, tuple[str, str]]) -> None:
    """Reward less that of the constrained best (of the reference, where nothing is feasible), method by method."""
    some = [entry for entry in known if entry.thresholds]
    against = constrained_best(group, some) or known[0]
    axes.axvline(0.0, color="0.6", linestyle="--", linewidth=1, zorder=0)
    rows = [entry for entry in known if entry is not against]
    for height, entry in enumerate(reversed(rows)):
        pair = paired(entry, against, "reward")
        if pair is None:
            continue
        marker, colour = shown[entry.series]
        value = _dict(pair[0])
        axes.errorbar(value["mean"], height, xerr=arms(value), fmt=marker, color=colour, capsize=2, elinewidth=0.8)
    axes.set_yticks(range(len(rows)), [entry.series for entry in reversed(rows)], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    what = "the constrained best" if against.thresholds else "no method is feasible"
    axes.set_xlabel(f"reward less that of {against.series} ({what}; paired)")
    if group.asked:
        axes.set_title(f"asked: {asked(group.asked[0])}", fontsize=9)


def _interval(entry: Entry, name: str) -> dict[str, Any]:
    return _dict(entry.mean(name))


def _dict(found: Any) -> dict[str, Any]:
    estimate = found.interval(LEVEL)
    return {
        "mean": estimate.mean,
        "low": None if math.isnan(estimate.low) else estimate.low,
        "high": None if math.isnan(estimate.high) else estimate.high,
    }
