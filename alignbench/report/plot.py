"""Pictures from records, and what every picture of the house shares: palette, markers, files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignbench.report.table import rows_of

# Okabe and Ito's palette: told apart with every common colour-vision deficiency
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
MARKERS = "osD^vP*X"
REFERENCE = "reference"
_ENDINGS = (".md", ".png", ".pdf", ".json", ".tex", ".csv", ".html")


def trade_off(records: Sequence[Mapping[str, Any]], path: Path, *, utility: str) -> None:
    """Reward against a utility: one point per policy with both intervals, and the requested thresholds.

    Args:
        records: Records with scores.
        path: Base name; a .png and a .pdf are written.
        utility: The vertical axis.
    """
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.6, 4.8), layout="constrained")
    # a policy without one of the two numbers has no place
    drawn = [(name, row) for name, _, row in rows_of(records) if _known(row, "reward") and _known(row, utility)]
    names = list(dict.fromkeys(name for name, _ in drawn))
    shown: set[str] = set()
    for name, row in drawn:
        x, y = row["metrics"]["reward"], row["metrics"][utility]
        marker, colour = style(names.index(name))
        axes.errorbar(
            x["mean"],
            y["mean"],
            xerr=arms(x),
            yerr=arms(y),
            fmt=marker,
            color=colour,
            capsize=2,
            markersize=9,
            # hollow: policies at one place are all seen
            markerfacecolor="none",
            markeredgewidth=1.8,
            elinewidth=1,
            label=name if name not in shown else None,
        )
        shown.add(name)
    requested = {_requested(record, utility) for record in records}
    for threshold in sorted(value for value in requested if value is not None):
        axes.axhline(threshold, color="0.6", linestyle="--", linewidth=1, zorder=0)
        axes.annotate(
            "requested", (1, threshold), xycoords=("axes fraction", "data"), xytext=(-4, 3),
            textcoords="offset points", ha="right", fontsize=8, color="0.4",
        )  # fmt: skip
    axes.margins(0.15)
    # beside the axes: names at the points overlap as soon as two policies score alike
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    first = records[0]
    axes.set_xlabel("reward (mean per response, larger is better)")
    axes.set_ylabel(f"{utility} (mean per response, larger is better)")
    axes.set_title(f"{first['config']['dataset']['name']}: reward against {utility}", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def pyplot() -> Any:
    """Matplotlib without a screen; imported late, since it takes a second that most commands need not spend."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def style(index: int) -> tuple[str, str]:
    """(marker, colour) of the series of that number; after eight the colours begin anew with the next marker."""
    return MARKERS[(index + index // len(COLOURS)) % len(MARKERS)], COLOURS[index % len(COLOURS)]


def looks(series: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(marker, colour) by name: the reference's is black, the others' go by their order among the names.

    Pictures of one sweep that are given the same names show a series alike.
    """
    others = sorted(set(series) - {REFERENCE})
    return {REFERENCE: style(0)} | {name: style(index) for index, name in enumerate(others, 1)}


def save(figure: Any, path: Path) -> None:
    """Write a figure as .png and .pdf beside each other, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".png", ".pdf"):
        figure.savefig(
            named(path, suffix),
            dpi=160,
            metadata={"Creator": "alignbench"} if suffix == ".pdf" else None,
        )
    pyplot().close(figure)


def named(base: Path, suffix: str) -> Path:
    """A base name with this ending.

    `Path.with_suffix` would take the ".1" of "safety+0.1" for an ending, and two thresholds would share a file.
    """
    name = base.name.removesuffix(base.suffix) if base.suffix in _ENDINGS else base.name
    return base.with_name(name + suffix)


def arms(value: Mapping[str, Any]) -> list[list[float]] | None:
    """Lengths of an error bar below and above the mean; None without an interval."""
    if value.get("low") is None or value.get("high") is None:
        return None
    return [[max(0.0, value["mean"] - value["low"])], [max(0.0, value["high"] - value["mean"])]]


def _requested(record: Mapping[str, Any], utility: str) -> float | None:
    """The requested mean utility: the reference's mean plus the requested margin."""
    reference = next(iter(record["rows"].values()))
    constraint = reference.get("constraints", {}).get(utility)
    if constraint is None or not _known(reference, utility):
        return None
    return float(reference["metrics"][utility]["mean"] + constraint["requested_margin"])


def _known(row: Mapping[str, Any], metric: str) -> bool:
    value = row["metrics"].get(metric)
    return value is not None and value["mean"] is not None and math.isfinite(value["mean"])
