"""The courses of all iterative runs of a sweep: multiplier and constraint gap by iteration, a column per threshold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignbench.report.direct import name_beside
from alignbench.report.entries import asked
from alignbench.report.plot import looks, pyplot, save
from alignbench.report.thresholds import distinct, over_seeds, series_of, thresholds_of

Record = Mapping[str, Any]


def courses(records: Sequence[Record], path: Path) -> list[str]:
    """Draw multiplier and gap (requested less achieved margin; above zero: violated) of every run with iterations.

    Per utility two rows of panels, a column for every choice of thresholds. Of one seed the gap has its bootstrap
    interval on the prompts of the dual step; of several the mean over seeds its Student interval (of two: both
    seeds), for multipliers as well.

    Args:
        records: Of one sweep.
        path: Base name; one picture per utility, a .png and a .pdf each.

    Returns:
        The utilities drawn; none where no run has two iterations.
    """
    records = distinct(records)
    runs: dict[tuple[str, tuple[float, ...]], list[list[Mapping[str, Any]]]] = {}
    every = series_of(records)
    styles = looks(every)
    for record, series in zip(records, every, strict=True):
        entries = sorted(record["outcome"].get("trajectory") or [], key=lambda entry: entry["iteration"])
        if len(entries) > 1:
            runs.setdefault((series, thresholds_of(record)), []).append(entries)
    utilities = list(dict.fromkeys(u for group in runs.values() for run in group for e in run for u in _names(e)))
    for utility in utilities:
        target = path if len(utilities) == 1 else path.with_name(f"{path.name}-{utility}")
        _draw(runs, utility, styles, target)
    return utilities


def _names(entry: Mapping[str, Any]) -> list[str]:
    return [*(entry.get("multipliers") or {}), *(entry.get("slack") or {})]


def _draw(
    runs: Mapping[tuple[str, tuple[float, ...]], list[Any]],
    utility: str,
    styles: Mapping[str, tuple[str, str]],
    path: Path,
) -> None:
    columns = sorted({thresholds for _, thresholds in runs})
    plt = pyplot()
    size = (4.3 * len(columns) + 0.6, 5.6)
    # the last iteration's gap may not have been measured, and stands below its multiplier all the same
    figure, panels = plt.subplots(
        2, len(columns), figsize=size, layout="constrained", squeeze=False, sharex="col", sharey="row"
    )
    ends: dict[tuple[int, int], list[tuple[str, float, float, str]]] = {}
    for k, thresholds in enumerate(columns):
        for row, read in enumerate((_multiplier, _gap)):
            axes = panels[row][k]
            ends[row, k] = []
            for name in dict.fromkeys(name for name, _ in sorted(runs)):
                course = _course(runs.get((name, thresholds), []), utility, read)
                if course:
                    marker, colour = styles[name]
                    xs, values = list(course), list(course.values())
                    means = [value["mean"] for value in values]
                    axes.plot(xs, means, color=colour, marker=marker, markersize=4, linewidth=1.3)
                    sure = [(x, v) for x, v in course.items() if v["low"] is not None and v["high"] is not None]
                    axes.fill_between(
                        [x for x, _ in sure], [v["low"] for _, v in sure], [v["high"] for _, v in sure],
                        color=colour, alpha=0.16, linewidth=0,
                    )  # fmt: skip
                    if not any((name, later) in runs for later in columns[k + 1 :]):  # once per row is enough
                        ends[row, k].append((name, xs[-1], means[-1], colour))
            axes.margins(x=0.04)
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.get_major_locator().set_params(integer=True)
            panels[0][k].set_title(f"asked: {asked(thresholds)}", fontsize=10)
            if row:
                axes.axhline(0.0, color="0.6", linestyle="--", linewidth=1, zorder=0)
                axes.set_xlabel("iteration")
    for (row, k), items in ends.items():  # last: the panels of a row share their limits
        name_beside(panels[row][k], items, share=0.36)
    figure.get_layout_engine().set(w_pad=0.12)
    panels[0][0].set_ylabel(f"multiplier of {utility}")
    panels[1][0].set_ylabel("constraint gap\n(requested - achieved)")
    seeds = max(len(group) for group in runs.values())
    kind = (
        f"up to {seeds} seeds: mean and interval over them" if seeds > 1 else "one seed; bands: bootstrap over prompts"
    )
    figure.suptitle(
        f"{utility}: multipliers and constraint gap by iteration ({kind}); above zero is violated", fontsize=11
    )
    save(figure, path)


def _course(group: Sequence[Any], utility: str, read: Any) -> dict[int, Mapping[str, Any]]:
    """By iteration: the value of a single run, or the mean over several that all have it."""
    found: dict[int, list[Mapping[str, Any]]] = {}
    for run in group:
        for entry in run:
            value = read(entry, utility)
            if value is not None:
                found.setdefault(entry["iteration"], []).append(value)
    whole = {t: values for t, values in sorted(found.items()) if len(values) == len(group)}
    return {t: v[0] if len(v) == 1 else over_seeds([one["mean"] for one in v]) for t, v in whole.items()}


def _multiplier(entry: Mapping[str, Any], utility: str) -> Mapping[str, Any] | None:
    value = (entry.get("multipliers") or {}).get(utility)
    return None if value is None else {"mean": float(value), "low": None, "high": None}


def _gap(entry: Mapping[str, Any], utility: str) -> Mapping[str, Any] | None:
    slack = (entry.get("slack") or {}).get(utility)
    if slack is None or slack.get("mean") is None:
        return None
    ends = [None if slack.get(end) is None else -slack[end] for end in ("high", "low")]
    return {"mean": -slack["mean"], "low": ends[0], "high": ends[1]}
