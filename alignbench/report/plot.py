"""Pictures from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignbench.report.table import rows_of

# Okabe and Ito's palette: told apart with every common colour-vision deficiency
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#F0E442")
_MARKERS = "osD^vP*X"


def trade_off(records: Sequence[Mapping[str, Any]], path: Path, *, utility: str) -> None:
    """Reward against a utility: one point per policy with both intervals, and the requested thresholds.

    Args:
        records: Records with scores.
        path: Base name; a .png and a .pdf are written.
        utility: The vertical axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.6, 4.8), layout="constrained")
    names = list(dict.fromkeys(name for name, _, _ in rows_of(records)))
    shown: set[str] = set()
    for name, _, row in rows_of(records):
        x, y = row["metrics"]["reward"], row["metrics"][utility]
        style = names.index(name)
        axes.errorbar(
            x["mean"],
            y["mean"],
            xerr=_arms(x),
            yerr=_arms(y),
            # after eight policies the colours begin anew with the next marker
            fmt=_MARKERS[(style + style // len(_COLOURS)) % len(_MARKERS)],
            color=_COLOURS[style % len(_COLOURS)],
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
    for suffix in (".png", ".pdf"):
        figure.savefig(
            path.with_suffix(suffix),
            dpi=160,
            metadata={"Creator": "alignbench"} if suffix == ".pdf" else None,
        )
    plt.close(figure)


def _arms(value: Mapping[str, Any]) -> list[list[float]] | None:
    if value["low"] is None or value["high"] is None:
        return None
    return [[max(0.0, value["mean"] - value["low"])], [max(0.0, value["high"] - value["mean"])]]


def _requested(record: Mapping[str, Any], utility: str) -> float | None:
    """The requested mean utility: the reference's mean plus the requested margin."""
    reference = next(iter(record["rows"].values()))
    constraint = reference.get("constraints", {}).get(utility)
    return None if constraint is None else reference["metrics"][utility]["mean"] + constraint["requested_margin"]
