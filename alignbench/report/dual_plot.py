"""The dual function, its minimiser, and what it rests on: pictures of the geometry that records hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignbench.report.direct import name_beside
from alignbench.report.plot import pyplot, save, style
from alignbench.report.thresholds import asked

Dual = Mapping[str, Any]
_Z95 = 1.959964


def duals_of(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Dual]]:
    """Distinct duals of some records, those of one bank together: `{title: duals by ascending margin}`.

    A dual is known by its artifact; two are of one bank if their responses and scores are the same artifacts.
    """
    banks: dict[tuple[Any, ...], dict[str, Dual]] = {}
    titles: dict[tuple[Any, ...], tuple[set[str], int]] = {}
    for record in records:
        stages = {stage["key"]: stage for stage in record.get("stages", ())}
        for dual in record.get("duals") or ():
            inputs = stages.get(dual["artifact"], {}).get("inputs", {"artifact": dual["artifact"]})
            bank = (*sorted(inputs.items()), dual["beta"])
            banks.setdefault(bank, {})[dual["artifact"]] = dual
            titles.setdefault(bank, (set(), record["seed"]))[0].add(str(record["method"]))
    found: dict[str, list[Dual]] = {}
    for bank, duals in banks.items():
        methods, seed = titles[bank]
        title = f"{', '.join(sorted(methods))}, seed {seed}, beta {bank[-1]:g}"
        ordered = sorted(duals.values(), key=lambda dual: tuple(dual["requested_margin"].values()))
        found[title if title not in found else f"{title}, bank {len(found) + 1}"] = ordered
    return found


def dual_function(duals: Sequence[Dual], title: str, path: Path) -> None:
    """Draw the duals of one bank along each multiplier: a row of four panels per utility.

    D with its minimiser and lambda's 95 % interval over prompts; the slack that it predicts, which is its slope; the
    effective sample size behind that prediction; the minimiser that fewer responses per prompt would have given.

    Args:
        duals: Of one bank, by ascending margin; as `duals_of` gives them.
        title: Above the picture.
        path: Base name; a .png and a .pdf are written.
    """
    utilities = list(duals[0]["multipliers"])
    plt = pyplot()
    figure, axes = plt.subplots(
        len(utilities), 4, figsize=(16.5, 3.9 * len(utilities) + 0.6), layout="constrained", squeeze=False
    )
    for row, utility in zip(axes, utilities, strict=True):
        names = [f"{utility} {asked(dual['requested_margin'][utility])}" for dual in duals]
        _along(row[0], duals, utility, "value", names)
        row[0].set_ylabel("D (reward units)")
        _along(row[1], duals, utility, "slack", names)
        row[1].axhline(0.0, color="0.6", linestyle="--", linewidth=1, zorder=0)
        row[1].set_ylabel(f"predicted - requested margin of {utility}\n(the slope of D)")
        _sample_size(row[2], duals, utility)
        for panel in row[:3]:
            panel.set_xlabel(
                f"multiplier of {utility} (others at the minimiser)" if len(utilities) > 1 else "multiplier"
            )
        _fewer(row[3], duals, utility, names)
        for panel in row:
            panel.spines[["top", "right"]].set_visible(False)
    figure.get_layout_engine().set(w_pad=0.16)
    shown = duals[0]
    figure.suptitle(
        f"{title}: the dual on {shown['responses']} scored responses to {shown['prompts']} prompts; "
        "markers: the minimisers for the margins asked for",
        fontsize=11,
    )
    save(figure, path)


def _along(axes: Any, duals: Sequence[Dual], utility: str, column: str, names: Sequence[str]) -> None:
    ends = []
    for index, (dual, name) in enumerate(zip(duals, names, strict=True)):
        marker, colour = style(index)
        course = dual["course"][utility]
        axes.plot(course["multiplier"], course[column], color=colour, linewidth=1.4)
        at = dual["multipliers"][utility]
        y = course[column][course["multiplier"].index(at)]
        error = dual["standard_errors"][utility]
        axes.errorbar(
            at, y, xerr=None if error is None else _Z95 * error, fmt=marker, color=colour, markersize=8, capsize=3,
            markerfacecolor="white", markeredgewidth=1.6, zorder=4,
        )  # fmt: skip
        ends.append((name, course["multiplier"][-1], course[column][-1], colour))
    axes.margins(x=0.02)
    name_beside(axes, ends, share=0.7)


def _sample_size(axes: Any, duals: Sequence[Dual], utility: str) -> None:
    """Tilted weights know nothing of the margin: of one utility the courses of all duals lie on one curve."""
    longest = max(duals, key=lambda dual: dual["course"][utility]["multiplier"][-1])
    shown = [longest] if len(longest["course"]) == 1 else list(duals)
    ends = []
    for index, dual in enumerate(shown):
        course = dual["course"][utility]
        colour = "0.3" if len(shown) == 1 else style(index)[1]
        axes.plot(course["multiplier"], course["ess_mean"], color=colour, linewidth=1.4)
        axes.plot(course["multiplier"], course["ess_low"], color=colour, linewidth=1.2, linestyle=":")
        if index == 0:
            x = course["multiplier"][-1]
            ends = [("mean", x, course["ess_mean"][-1], colour), ("worst 5 %", x, course["ess_low"][-1], colour)]
    for index, dual in enumerate(duals):
        marker, colour = style(index)
        course, at = dual["course"][utility], dual["multipliers"][utility]
        y = course["ess_mean"][course["multiplier"].index(at)]
        axes.plot(at, y, marker, color=colour, markersize=8, markerfacecolor="white", markeredgewidth=1.6)
    axes.set_ylim(bottom=0.0)
    axes.margins(x=0.02)
    axes.set_ylabel("effective sample size per prompt")
    name_beside(axes, ends, share=0.7)


def _fewer(axes: Any, duals: Sequence[Dual], utility: str, names: Sequence[str]) -> None:
    """lambda* on subsets of the responses; the horizontal line is that of the whole bank."""
    ends = []
    for index, (dual, name) in enumerate(zip(duals, names, strict=True)):
        marker, colour = style(index)
        axes.axhline(dual["multipliers"][utility], color=colour, linewidth=0.8, linestyle="--", zorder=0)
        known = [e for e in dual["sample_effect"] if e["multipliers"][utility] is not None]
        aside = 1.0 + 0.04 * (index - (len(duals) - 1) / 2)
        for entry in known:
            value = entry["multipliers"][utility]
            arms = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
            axes.errorbar(
                entry["responses"] * aside, value["mean"], yerr=arms, fmt=marker, color=colour, capsize=2, markersize=5
            )
        if known:
            ends.append((name, known[-1]["responses"] * aside, known[-1]["multipliers"][utility]["mean"], colour))
    sizes = sorted({entry["responses"] for dual in duals for entry in dual["sample_effect"]})
    if not ends:
        axes.text(0.5, 0.5, "too few responses per prompt\nfor smaller subsets", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("responses per prompt (dashed: all)")
    axes.set_ylabel("minimiser on random subsets\n(mean, central 90 %)")
    lost = sum(entry["unreachable"] for dual in duals for entry in dual["sample_effect"])
    if lost:
        axes.set_title(f"{lost} subsets cannot reach the margin: not drawn", fontsize=8)
    name_beside(axes, ends, share=0.7)
