"""Requested against achieved margins: what a sweep over thresholds is for.

A *point* is one utility of one run's reported policy: what was asked, what the dual predicted before training, what
came out, with the multiplier, reward and KL that it took. Points that differ in the seed only are averaged.

A *series* is a method, with those of its settings that tell its runs apart beyond thresholds and seed: two values of
`beta` or of `method.q` are two series and are never averaged together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from alignbench.report.direct import name_beside
from alignbench.report.plot import arms, looks, named, pyplot, save
from alignbench.report.table import cell

Record = Mapping[str, Any]
Value = Mapping[str, Any]

LEVEL = 0.95
# of a table that is not printed on a terminal: no interval is broken over two lines
WIDTH = 240
# what changes no number (config.run_id leaves the same out), and what the table shows in columns of its own
_NO_SETTING = (
    "seed", "plan", "output_dir", "store_dir", "tuned_by", "constraint.thresholds",
    "evaluate.every_steps", "evaluate.every_examples",
)  # fmt: skip
_NO_SECTION = ("tracking.", "hardware.")


@dataclass(frozen=True)
class Point:
    """One utility of a reported policy, of one seed or averaged over several.

    Attributes:
        series: Method, and the settings that tell it from others.
        thresholds: The user's thresholds, all of them: the group within which seeds are averaged.
        utility: The constrained utility.
        seeds: The seeds behind it; one, or those that were averaged.
        requested: The margin asked for.
        predicted: The margin that the dual predicted before training, where the method predicts one.
        achieved: The margin measured.
        violation: How far it fell short.
        multiplier: lambda of this utility, where the method has one.
        reward: Mean reward.
        kl: KL to the reference.
        satisfied: Seeds whose point estimate meets the margin.
        sure: Seeds that meet it with confidence.
        iterate: Which iterate is reported, for iterative methods.
    """

    series: str
    thresholds: tuple[float, ...]
    utility: str
    seeds: tuple[int, ...]
    requested: float
    predicted: Value | None
    achieved: Value
    violation: Value
    multiplier: Value | None
    reward: Value | None
    kl: Value | None
    satisfied: int
    sure: int
    iterate: str


# ---------------------------------------------------------------- from records to points


def points_of(records: Sequence[Record]) -> list[Point]:
    """The points of every run that has constraints, sorted by series, thresholds, utility and seed."""
    records = distinct(records)
    found = []
    for record, series in zip(records, series_of(records), strict=True):
        row = record["rows"][record["outcome"]["reported"]]
        for utility in record["config"]["constraint"]["utilities"]:
            constraint = row.get("constraints", {}).get(utility)
            if constraint is None or not _known(constraint["achieved_margin"]):
                continue
            found.append(
                Point(
                    series=series,
                    thresholds=thresholds_of(record),
                    utility=utility,
                    seeds=(record["seed"],),
                    requested=constraint["requested_margin"],
                    predicted=predicted_margin(row, utility),
                    achieved=constraint["achieved_margin"],
                    violation=constraint["violation"],
                    multiplier=multiplier_of(record, row, utility),
                    reward=row["metrics"].get("reward"),
                    kl=row["metrics"].get("kl"),
                    satisfied=int(constraint["satisfied"]),
                    sure=int(constraint["satisfied_with_confidence"]),
                    iterate=record["outcome"].get("diagnostics", {}).get("reported_iterate") or "-",
                )
            )
    return sorted(found, key=lambda p: (p.series, p.thresholds, p.utility, p.seeds))


def _known(value: Value) -> bool:
    return value.get("mean") is not None and math.isfinite(value["mean"])


def averaged(points: Sequence[Point]) -> list[Point]:
    """One point per series, thresholds and utility; of a single seed the point itself."""
    return [group[0] if len(group) == 1 else _average(group) for group in _groups(points)]


def _groups(points: Sequence[Point]) -> list[list[Point]]:
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        groups.setdefault((point.series, point.thresholds, point.utility), []).append(point)
    return list(groups.values())


def _average(group: Sequence[Point]) -> Point:
    first = group[0]

    def mean(read: Callable[[Point], Value | None]) -> Value | None:
        values = [read(point) for point in group]
        means = [value["mean"] for value in values if value is not None and _known(value)]
        # a mean over some of the seeds would stand in the line of all of them
        return over_seeds(means) if len(means) == len(group) else None

    return Point(
        series=first.series,
        thresholds=first.thresholds,
        utility=first.utility,
        seeds=tuple(seed for point in group for seed in point.seeds),
        # absolute thresholds ask for another margin on every seed's own reference
        requested=_mean([point.requested for point in group]),
        predicted=mean(lambda p: p.predicted),
        achieved=over_seeds([p.achieved["mean"] for p in group]),
        violation=over_seeds([p.violation["mean"] for p in group], least=0.0),
        multiplier=mean(lambda p: p.multiplier),
        reward=mean(lambda p: p.reward),
        kl=mean(lambda p: p.kl),
        satisfied=sum(p.satisfied for p in group),
        sure=sum(p.sure for p in group),
        iterate=", ".join(sorted({p.iterate for p in group})),
    )


def over_seeds(values: Sequence[float], *, least: float = -math.inf, most: float = math.inf) -> dict[str, Any]:
    """Mean over seeds with its interval: Student's t from three seeds on, smallest to largest for two.

    Two seeds have one degree of freedom: their t-interval is 13 standard errors long on either side and tells less
    than the two numbers themselves.

    Args:
        values: One number per seed.
        least: What the quantity cannot fall below; the interval is cut there.
        most: What it cannot exceed.
    """
    from scipy import stats

    n = len(values)
    mean = _mean(values)
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1, "method": "one seed: no interval"}
    if n == 2:
        return {"mean": mean, "low": min(values), "high": max(values), "n": 2, "method": "smallest to largest seed"}
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    reach = float(stats.t.ppf(0.5 + LEVEL / 2, df=n - 1)) * spread / math.sqrt(n)
    low, high = max(least, mean - reach), min(most, mean + reach)
    return {"mean": mean, "low": low, "high": high, "n": n, "method": f"{LEVEL:.0%} Student t"}


def _mean(values: Sequence[float]) -> float:
    # measured from the first value: the mean of equal values is that value, without rounding
    return values[0] + sum(value - values[0] for value in values) / len(values)


def thresholds_of(record: Record) -> tuple[float, ...]:
    """The user's thresholds, in the order of the utilities."""
    return tuple(float(value) for value in record["config"]["constraint"]["thresholds"])


def thresholds_differ(records: Sequence[Record]) -> bool:
    """Whether these records ask for different things, so that one table of rewards would compare unlike runs."""
    return len({thresholds_of(record) for record in records}) > 1


def missing_seeds(records: Sequence[Record]) -> list[str]:
    """One sentence for every series and choice of thresholds that lacks seeds which others have."""
    points: dict[tuple[str, tuple[float, ...]], set[int]] = {}
    for record, series in zip(records, series_of(records), strict=True):
        points.setdefault((series, thresholds_of(record)), set()).add(record["seed"])
    every = set().union(*points.values())
    return [
        f"{series} @ {', '.join(f'{value:g}' for value in thresholds)}: "
        f"{named_seeds(every - seeds)} missing, {named_seeds(seeds)} there"
        for (series, thresholds), seeds in sorted(points.items())
        if every - seeds
    ]


def named_seeds(seeds: Collection[int]) -> str:
    """Seeds as words."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))}"


def distinct(records: Sequence[Record]) -> list[Record]:
    """Each run once: a folder may hold copies of a run folder."""
    return list({record["run_id"]: record for record in records}.values())


def series_of(records: Sequence[Record]) -> list[str]:
    """The series of each record: its method, and the settings that are needed to tell it from the others.

    A setting is named only if runs of the same thresholds differ in it and no setting named before tells them apart;
    so a multiplier chosen for each threshold, which has its own column, names nothing.
    """
    flat = [settings_of(record) for record in records]
    labels = [[str(record["method"])] for record in records]
    everywhere = list(range(len(records)))
    shared = _telling(flat, records, everywhere, lambda key: not key.startswith("method."))
    for name in dict.fromkeys(record["method"] for record in records):
        group = [i for i in everywhere if records[i]["method"] == name]
        # the shared ones first: what they already tell apart needs no second name
        own = _telling(flat, records, group, lambda key: key.startswith("method."), known=shared)
        for i in group:
            labels[i] += [f"{_short(key)}={_spelled(flat[i].get(key))}" for key in [*own, *shared]]
    return [" ".join(parts) for parts in labels]


def _telling(
    flat: Sequence[Mapping[str, str]],
    records: Sequence[Record],
    group: Sequence[int],
    wanted: Callable[[str], bool],
    known: Sequence[str] = (),
) -> list[str]:
    """The settings that split records of equal thresholds (and equal `known` settings) further."""
    keys = {key for i in group for key in flat[i] if wanted(key)}
    parts = {i: (thresholds_of(records[i]), *(flat[i].get(key) for key in known)) for i in group}
    chosen = []
    # names first: the keys that come with another data set or model need not all be listed
    for key in sorted(keys, key=lambda k: (not k.endswith(".name"), k.count("."), k)):
        finer = {i: (*parts[i], flat[i].get(key)) for i in group}
        if len(set(finer.values())) > len(set(parts.values())):
            chosen.append(key)
            parts = finer
    return chosen


def settings_of(record: Record) -> dict[str, str]:
    """Key -> value, as JSON, of every setting that may change numbers, but for thresholds and seed."""
    flat = _flatten(record["config"])
    kept = {k: v for k, v in flat.items() if k not in _NO_SETTING and not k.startswith(_NO_SECTION)}
    kept.pop("method.name", None)
    return kept | {"hardware.dtype": flat.get("hardware.dtype", "null")}


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, Mapping):
        return {prefix: json.dumps(value)}
    return {k: v for key, child in value.items() for k, v in _flatten(child, f"{prefix}.{key}".lstrip(".")).items()}


def _short(key: str) -> str:
    return key.removeprefix("method.").removeprefix("constraint.")


def _spelled(value: str | None) -> str:
    return "unset" if value is None else value.strip('"').replace(" ", "")


def predicted_margin(row: Mapping[str, Any], utility: str) -> Value | None:
    """The margin that the dual predicted for a row's policy before training."""
    predicted = row.get("predicted") or {}
    mean = (predicted.get("margins") or {}).get(utility)
    if mean is None:
        return None
    low, high = (predicted.get("intervals") or {}).get(utility) or (None, None)
    return {"mean": mean, "low": low, "high": high}


def multiplier_of(record: Record, row: Mapping[str, Any], utility: str) -> Value | None:
    """The policy's own multiplier; the outcome's is that of the reported policy, too."""
    found = row.get("multipliers") or record["outcome"].get("multipliers") or {}
    value = found.get(utility)
    return None if value is None else {"mean": float(value), "low": None, "high": None}


# ---------------------------------------------------------------- tables


def cells_of(points: Sequence[Point]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; columns of seeds and utilities only where there are several."""
    seeds = len({p.seeds for p in points}) > 1 or any(len(p.seeds) > 1 for p in points)
    utilities = len({p.utility for p in points}) > 1
    headings = ["method", *(["utility"] if utilities else []), "requested", *(["seed"] if seeds else [])]
    headings += ["predicted", "achieved", "violation", "lambda", "reward", "KL", "met", "reported iterate"]
    lines = []
    for p in points:
        line = [p.series, *([p.utility] if utilities else []), asked(p.requested), *([_seed(p)] if seeds else [])]
        line += [cell(p.predicted), cell(p.achieved), cell(p.violation), cell(p.multiplier, 3)]
        lines.append([*line, cell(p.reward), cell(p.kl), _met(p), p.iterate])
    return headings, lines


def with_means(points: Sequence[Point]) -> list[Point]:
    """Every seed's point, and after the seeds of a group their mean."""
    every = []
    for group in _groups(points):
        every += [*group, _average(group)] if len(group) > 1 else group
    return every


def caption_of(records: Sequence[Record], points: Sequence[Point]) -> str:
    """What the numbers are."""
    record = records[0]
    means = sorted({str(p.achieved["method"]) for p in points if len(p.seeds) > 1})
    metric = record["rows"][record["outcome"]["reported"]]["metrics"].get("kl") or {}
    level = f"{metric['level']:.0%} " if metric.get("level") else ""
    text = (
        f"margins over the reference on {record['config']['evaluate']['split']} prompts; "
        f"predicted: by the dual, before training; [{level}prompt-clustered] within a seed"
    )
    if means:
        text += f"; [{' or '.join(means)}] in a mean over seeds, which counts the seeds that meet the margin"
    return f"{text}; met: yes = with confidence, likely = the point estimate only"


def terminal_table(records: Sequence[Record], title: str) -> Table:
    """The table for a terminal: several seeds as their mean."""
    points = averaged(points_of(records))
    headings, lines = cells_of(points)
    table = Table(title=escape(title), caption=escape(caption_of(records, points)))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 else "right", overflow="fold")
    for i, line in enumerate(lines):
        last = i + 1 == len(lines) or points[i + 1].series != points[i].series
        # the brackets of an interval or of a setting are no markup of rich's
        table.add_row(*map(escape, line), end_section=last)
    return table


def markdown_table(records: Sequence[Record]) -> str:
    """The table as Markdown: every seed, and the mean after several."""
    points = with_means(points_of(records))
    headings, lines = cells_of(points)
    return markdown(headings, lines) + f"\n\n{caption_of(records, points)}\n"


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar within a cell is escaped."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"

    return "\n".join([row(headings), "|" + " --- |" * len(headings), *map(row, lines)])


def asked(margin: float) -> str:
    """A requested margin: two digits, and a third where it has one."""
    return f"{margin:z.2f}" if abs(margin - round(margin, 2)) < 1e-9 else f"{margin:z.3f}"


def _seed(point: Point) -> str:
    return str(point.seeds[0]) if len(point.seeds) == 1 else f"mean of {len(point.seeds)}"


def _met(point: Point) -> str:
    if len(point.seeds) > 1:
        return f"{point.satisfied}/{len(point.seeds)} ({point.sure} surely)"
    if point.sure:
        return "yes"
    return "likely" if point.satisfied else "no"


# ---------------------------------------------------------------- picture


def picture(records: Sequence[Record], path: Path) -> None:
    """Achieved against requested margin: a panel per utility, a series per method, predictions as hollow markers.

    Points of several methods at one threshold are set apart sideways by a hundredth of the axis, so that their
    intervals can be read.

    Args:
        records: Records with constraints.
        path: Base name; a .png and a .pdf are written.
    """
    points = averaged(points_of(records))
    utilities = list(dict.fromkeys(u for r in records for u in r["config"]["constraint"]["utilities"]))
    utilities = [u for u in utilities if any(p.utility == u for p in points)]
    series = sorted({p.series for p in points})
    styles = looks(series)
    plt = pyplot()
    figure, panels = plt.subplots(
        1, len(utilities), figsize=(6.2 * len(utilities) + 0.6, 5.0), layout="constrained", squeeze=False
    )
    for axes, utility in zip(panels[0], utilities, strict=True):
        shown = [p for p in points if p.utility == utility]
        _identity(axes, shown)
        asides = {name: _apart(shown, index, len(series)) for index, name in enumerate(series)}
        for name in series:
            _draw(axes, [p for p in shown if p.series == name], styles[name], asides[name])
        axes.set_xlabel(f"requested margin of {utility}")
        axes.set_ylabel(f"achieved margin of {utility}")
        axes.spines[["top", "right"]].set_visible(False)
        ends = {p.series: p for p in sorted(shown, key=lambda p: p.requested)}
        name_beside(
            axes, [(n, p.requested + asides[n], p.achieved["mean"], styles[n][1]) for n, p in ends.items()], share=0.75
        )
    handles, labels = panels[0][0].get_legend_handles_labels()
    if any(p.predicted for p in points):
        (hollow,) = panels[0][0].plot([], [], "o", markerfacecolor="white", color="0.4", markersize=4, linestyle="none")
        handles.append(hollow)
        labels.append("predicted before training")
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    names = ", ".join(dict.fromkeys(str(r["config"]["dataset"]["name"]) for r in records))
    kind = "mean over seeds with its interval" if any(len(p.seeds) > 1 for p in points) else "with bootstrap intervals"
    figure.suptitle(f"{names}: achieved against requested margin ({kind})", fontsize=11)
    save(figure, path)


def write(records: Sequence[Record], base: Path) -> list[Path]:
    """Table (.md) and picture (.png, .pdf) of records with constraints.

    Returns:
        The Markdown file and the .png.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    named(base, ".md").write_text(markdown_table(records), encoding="utf-8")
    picture(records, base)
    return [named(base, ".md"), named(base, ".png")]


def _identity(axes: Any, points: Sequence[Point]) -> None:
    """The line of what was asked, across the requested margins and a little beyond."""
    low, high = min(p.requested for p in points), max(p.requested for p in points)
    beyond = 0.08 * (high - low) or 0.1 * max(abs(high), 1.0)
    ends = (low - beyond, high + beyond)
    axes.plot(ends, ends, color="0.6", linestyle="--", linewidth=1, zorder=0, label="achieved = requested")


def _apart(points: Sequence[Point], index: int, count: int) -> float:
    low, high = min(p.requested for p in points), max(p.requested for p in points)
    return 0.012 * (high - low) * (index - (count - 1) / 2)


def _draw(axes: Any, points: Sequence[Point], look: tuple[str, str], aside: float) -> None:
    points = sorted(points, key=lambda p: p.requested)
    marker, colour = look
    xs = [p.requested + aside for p in points]
    if points:
        axes.plot(xs, [p.achieved["mean"] for p in points], color=colour, linewidth=1, alpha=0.6)
    for x, p in zip(xs, points, strict=True):
        axes.errorbar(
            x, p.achieved["mean"], yerr=arms(p.achieved), fmt=marker, color=colour, markersize=6, capsize=2,
            elinewidth=1,
        )  # fmt: skip
        if p.predicted is not None:
            axes.plot(x, p.predicted["mean"], marker, color=colour, markerfacecolor="white", markersize=4, zorder=4)
