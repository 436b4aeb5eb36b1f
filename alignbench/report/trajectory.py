"""The course of an iterative method: multipliers, slack and reward per iteration, from one record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignbench.report.plot import pyplot, save, style

Entry = Mapping[str, Any]


def trajectory(record: Mapping[str, Any], path: Path) -> bool:
    """Draw lambda_t, slack_t (with its interval) and the reward of every iteration, below each other.

    The slack is the achieved minus the requested margin on the prompts that the dual step used: below zero the
    multiplier must grow. A multiplier at a bound is marked by a triangle that points to that bound, the reported
    iterate by a dotted line.

    Args:
        record: A run's record.
        path: Base name; a .png and a .pdf are written.

    Returns:
        Whether there was something to draw: fewer than two iterations have no course.
    """
    entries = sorted(record["outcome"].get("trajectory") or [], key=lambda e: e["iteration"])
    if len(entries) < 2:
        return False
    utilities = list(
        dict.fromkeys(u for e in entries for u in {**(e.get("multipliers") or {}), **(e.get("slack") or {})})
    )
    rewards = [(e["iteration"], float(e["reward"])) for e in entries if e.get("reward") is not None]
    plt = pyplot()
    count = 3 if rewards else 2
    figure, panels = plt.subplots(count, 1, figsize=(7.6, 2.2 * count + 0.8), sharex=True, layout="constrained")
    for index, utility in enumerate(utilities):
        _multipliers(panels[0], entries, utility, index)
        _slack(panels[1], entries, utility, index)
    panels[0].set_ylabel("multiplier")
    panels[1].axhline(0.0, color="0.6", linestyle="--", linewidth=1, zorder=0)
    panels[1].set_ylabel("slack\n(achieved - requested)")
    if rewards:
        panels[2].plot(*zip(*rewards, strict=True), color="0.3", marker="o", markersize=4)
        panels[2].set_ylabel("reward")
    reported = reported_iteration(record, entries)
    for axes in panels:
        if reported is not None:
            axes.axvline(reported, color="0.5", linestyle=":", linewidth=1.2, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("iteration" + (" (dotted: reported)" if reported is not None else ""))
    panels[-1].xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, panels[0], entries)
    figure.suptitle(_title(record), fontsize=11)
    save(figure, path)
    return True


def _title(record: Mapping[str, Any]) -> str:
    title = f"{record['method']} on {record['config']['dataset']['name']}, seed {record['seed']}"
    diagnostics = record["outcome"].get("diagnostics") or {}
    if diagnostics.get("reported_iterate"):
        title += f", reported: {str(diagnostics['reported_iterate']).replace('_', ' ')}"
    return f"{title}; the dual oscillates" if diagnostics.get("oscillates") else title


def _multipliers(axes: Any, entries: Sequence[Entry], utility: str, index: int) -> None:
    course = [
        (e, float(e["multipliers"][utility])) for e in entries if _value(e.get("multipliers"), utility) is not None
    ]
    marker, colour = style(index)
    axes.plot(
        [e["iteration"] for e, _ in course], [value for _, value in course], color=colour, marker=marker, markersize=4,
        label=utility,
    )  # fmt: skip
    for entry, value in course:
        bound = _value(entry.get("at_bound"), utility)
        if bound:
            axes.plot(
                entry["iteration"], value, "v" if bound == "lower" else "^", color=colour, markerfacecolor="none",
                markersize=12, markeredgewidth=1.6, linestyle="none",
            )  # fmt: skip


def _slack(axes: Any, entries: Sequence[Entry], utility: str, index: int) -> None:
    course = [(e["iteration"], _value(e.get("slack"), utility)) for e in entries]
    known = [(t, value) for t, value in course if value is not None and value.get("mean") is not None]
    marker, colour = style(index)
    axes.plot([t for t, _ in known], [v["mean"] for _, v in known], color=colour, marker=marker, markersize=4)
    sure = [(t, v) for t, v in known if v.get("low") is not None and v.get("high") is not None]
    axes.fill_between(
        [t for t, _ in sure], [v["low"] for _, v in sure], [v["high"] for _, v in sure], color=colour, alpha=0.18, lw=0
    )


def _legend(figure: Any, axes: Any, entries: Sequence[Entry]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    hit = {bound for e in entries for bound in (e.get("at_bound") or {}).values() if bound}
    for bound, marker in (("lower", "v"), ("upper", "^")):
        if bound in hit:
            (handle,) = axes.plot([], [], marker, color="0.3", markerfacecolor="none", markersize=9, linestyle="none")
            handles.append(handle)
            labels.append(f"at its {bound} bound")
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)


def reported_iteration(record: Mapping[str, Any], entries: Sequence[Entry]) -> int | None:
    """The iteration that made the reported policy; rows of one policy may have two names."""
    rows, outcome = record["rows"], record["outcome"]
    reported = rows.get(outcome["reported"], {}).get("policy")
    for entry in entries:
        name = entry.get("policy")
        if name is not None and (name == outcome["reported"] or rows.get(name, {}).get("policy", "") == reported):
            return int(entry["iteration"])
    return None


def _value(values: Mapping[str, Any] | None, utility: str) -> Any:
    return None if values is None else values.get(utility)
