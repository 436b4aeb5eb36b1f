"""What methods cost: bars of tokens, time, memory and models, from records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignbench.report.plot import COLOURS, pyplot, save
from alignbench.report.thresholds import distinct, series_of

Record = Mapping[str, Any]
_GIB = 2.0**30


def _panels() -> list[tuple[str, list[tuple[str, Any]]]]:
    def total(name: str, unit: float = 1.0) -> Any:
        return lambda cost: cost["total"][name] / unit if name in cost.get("total", {}) else None

    def peak(cost: Mapping[str, Any]) -> float | None:
        peaks = cost.get("peak") or {}
        found = peaks.get("peak_gpu_bytes") or peaks.get("peak_rss_bytes")
        return None if found is None else found / _GIB

    tokens = [(name, total(f"{name}_tokens", 1e6)) for name in ("trained", "generated", "scored")]
    models = [
        ("trained", lambda c: c.get("models_trained")),
        ("held", lambda c: c.get("models_in_memory_while_training")),
    ]
    return [
        ("tokens (millions)", tokens),
        ("computing time (minutes)", [("", total("seconds", 60.0))]),
        ("peak memory (GiB)", [("", peak)]),
        ("models", models),
    ]


def costs(records: Sequence[Record], path: Path) -> bool:
    """Draw the cost of making each series' result from nothing; a line from the least to the most costly of its runs.

    Args:
        records: Of one sweep.
        path: Base name; a .png and a .pdf are written.

    Returns:
        Whether a record states costs.
    """
    records = [record for record in distinct(records) if record.get("cost", {}).get("total")]
    if not records:
        return False
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record, series in zip(records, series_of(records), strict=True):
        groups.setdefault(series, []).append(record["cost"])
    names = sorted(groups)
    plt = pyplot()
    figure, axes = plt.subplots(
        1, 4, figsize=(15.0, 1.6 + 0.62 * len(names)), layout="constrained", width_ratios=(1.6, 1.0, 1.0, 1.0)
    )
    for axis, (title, bars) in zip(axes, _panels(), strict=True):
        for k, (label, read) in enumerate(bars):
            colour = COLOURS[(5, 1, 3)[k]]
            thick = 0.8 / len(bars)
            for height, name in enumerate(names):
                values = [value for cost in groups[name] if (value := read(cost)) is not None]
                if values:
                    _bar(axis, height + thick * (k - (len(bars) - 1) / 2), values, thick, colour, label)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names), fontsize=9)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlim(0.0, (axis.get_xlim()[1] or 1.0) * 1.35)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    runs = sum(map(len, groups.values()))
    figure.suptitle(
        f"cost of each result from nothing, stages that runs share counted for each: means over {runs} runs, "
        "lines from least to most",
        fontsize=11,
    )
    save(figure, path)
    return True


def _bar(axes: Any, at: float, values: Sequence[float], thick: float, colour: str, label: str) -> None:
    mean, most = sum(values) / len(values), max(values)
    axes.barh(at, mean, height=0.9 * thick, color=colour)
    if most > min(values):
        axes.plot([min(values), most], [at, at], color="black", linewidth=1.2, solid_capstyle="butt")
    text = f" {mean:.3g} {label}".rstrip()
    axes.annotate(text, (most, at), xytext=(2, 0), textcoords="offset points", va="center", fontsize=7.5)
