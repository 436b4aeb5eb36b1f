"""Methods against each other, from records: paired differences, feasibility, fronts, calibration, cost.

Everything is a mean over prompts of what one trained policy does, over seeds of how it was trained; see
`alignbench.report.crossed` for the intervals and `alignbench.report.entries` for what is compared with what.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from alignbench.errors import ConfigError
from alignbench.report.crossed import Crossed, all_pairs_reach, cross, holm
from alignbench.report.entries import REFERENCE, Entry, Group, asked, contrast, paired
from alignbench.report.front import hypervolume, on_front
from alignbench.report.sections import Cell, Section, Value
from alignbench.report.stats import Estimate, too_few

LEVEL = 0.95
DELTA = 0.05
_COSTS = ("trained_tokens", "generated_tokens", "scored_tokens", "seconds")
_NAMES = {"kl": "KL", "length": "tokens", "unsafe_rate": "unsafe", "refusal_rate": "refused"}


def sections_of(group: Group, *, against: str | None = None, corner: Sequence[float] | None = None) -> list[Section]:
    """All tables of one group.

    Args:
        group: What is compared.
        against: Compare the others with this series only; by default every pair.
        corner: Reference point of the hypervolume, in the order of the group's objectives; by default the smallest
            mean of each objective over all entries.

    Raises:
        ConfigError: `against` names no series of the group, or the corner has another number of objectives.
    """
    names = sorted({entry.series for entry in group.entries})
    if against is not None and against not in names:
        raise ConfigError(f"no method {against!r}", where="--against", mend=f"one of: {', '.join(names)}")
    if corner is not None and len(corner) != len(group.objectives):
        raise ConfigError(
            f"{len(corner)} numbers", where="--corner", mend=f"one for each of: {', '.join(group.objectives)}"
        )
    found = [methods(group), differences(group, against), best(group), volumes(group, corner)]
    found += [calibration(group), to_seed(group), to_beta(group), costs(group)]
    return [section for section in found if section.lines]


# ---------------------------------------------------------------- every method by itself


def methods(group: Group) -> Section:
    """Every method: scores, margin, lower bound of the slack, feasibility."""
    shown = [name for name in ("kl", "length", "unsafe_rate", "refusal_rate") if _somewhere(group, name)]
    headings = ["method", "asked", "seeds", *group.objectives]
    for utility in group.utilities:
        headings += [f"{utility} slack", f"{utility} slack at least"]
    headings += ["feasible", *(_NAMES[name] for name in shown)]
    lines = []
    for entry in group.entries:
        line: list[Cell] = [entry.series, asked(entry.thresholds) or "-", _seeds(entry)]
        line += [_value(entry.mean(name), entry) for name in group.objectives]
        for utility in group.utilities:
            slack = entry.slack(utility)
            bound = lower_bound(slack)
            line += [_value(slack, entry), "-" if bound is None else f"{bound:z.2f}"]
        line += [feasible(group, entry)]
        line += [_value(entry.mean(name), entry, 1 if name == "length" else 2) for name in shown]
        lines.append(line)
    caption = (
        f"means over seeds and {group.prompts} {group.split} prompts [{LEVEL:.0%} for other prompts; from three seeds "
        "on for other prompts and seeds]; slack: achieved less requested margin; feasible: yes = every slack is at "
        f"least 0 with confidence {1 - DELTA:.0%} (its lower bound), likely = the point estimates only"
    )
    return Section("methods", "Methods", headings, lines, caption, texts=3)


def lower_bound(slack: Crossed | None) -> float | None:
    """What the slack is at least, with confidence 1 - DELTA; None where there is no interval."""
    if slack is None:
        return None
    low = slack.interval(1 - 2 * DELTA).low
    return None if math.isnan(low) else low


def feasible(group: Group, entry: Entry) -> str:
    """yes, likely, no, or "-" where a utility has no number.

    That *all* constraints hold is claimed only where each bound does, so several constraints need no correction
    (intersection-union test, Berger 1982).
    """
    slacks = [entry.slack(utility) for utility in group.utilities]
    if any(slack is None for slack in slacks):
        return "-"
    bounds = [lower_bound(slack) for slack in slacks]
    if all(bound is not None and bound >= 0 for bound in bounds):
        return "yes"
    return "likely" if all(slack.mean >= 0 for slack in slacks if slack is not None) else "no"


# ---------------------------------------------------------------- pairs


def differences(group: Group, against: str | None) -> Section:
    """Paired differences of methods that were asked the same, corrected for their number."""
    found: list[tuple[list[Cell], list[Crossed | None]]] = []
    for thresholds in group.asked:
        for a, b in combinations(group.at(thresholds), 2):
            if against is not None and against not in (a.series, b.series):
                continue
            first, second = (b, a) if a.series in (against, REFERENCE) else (a, b)
            pairs = {name: paired(first, second, name) for name in group.objectives}
            seeds = next((common for pair in pairs.values() if pair for common in [pair[1]]), ())
            head: list[Cell] = [f"{first.series} - {second.series}", asked(thresholds), str(len(seeds))]
            found.append((head, [pair[0] if pair else None for pair in pairs.values()]))
    p_values = [difference.p_value if difference else math.nan for _, line in found for difference in line]
    adjusted = iter(holm(p_values))
    lines = []
    for head, line in found:
        cells = list(head)
        for difference in line:
            p = next(adjusted)
            cells += [_value(difference), "-" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "<0.001"]
        lines.append(cells)
    headings = ["difference", "asked", "seeds"]
    for name in group.objectives:
        headings += [name, f"p {name}"]
    tests = sum(not math.isnan(p) for p in p_values)
    caption = (
        f"paired by prompt and by seed, on the seeds that both have [{LEVEL:.0%}, each by itself]; p: two-sided, with "
        f"Holm's correction over all {tests} tests of this table"
    )
    return Section("differences", "Paired differences", headings, lines, caption, texts=3)


# ---------------------------------------------------------------- several objectives


def best(group: Group) -> Section:
    """The constrained best for each choice of thresholds, the regret of the others, and who is on the front."""
    headings = ["method", "asked", "feasible", "regret", "largest violation", "front"]
    lines = []
    for thresholds in group.asked:
        entries = [entry for entry in group.at(thresholds) if entry.thresholds]
        winner = constrained_best(group, entries)
        front = fronts(group, entries)
        for entry in entries:
            regret: Cell = "-"
            if entry is winner:
                regret = "the best"
            elif winner is not None and (pair := paired(winner, entry, "reward")) is not None:
                regret = Value(_simultaneous(pair[0], len(entries)))
            slacks = [slack for utility in group.utilities if (slack := entry.slack(utility))]
            violation = f"{max(0.0, *(-slack.mean for slack in slacks)):.2f}" if slacks else "-"
            lines.append(
                [entry.series, asked(thresholds), feasible(group, entry), regret, violation, front[entry.series]]
            )
    caption = (
        "the best: largest reward among the feasible, or among the likely where none is surely so; regret: its reward "
        "less the method's [simultaneous over all pairs (Games-Howell), so that the best may be chosen from the same "
        "numbers]; a negative regret is reward bought by violating; front: among the methods asked the same, in "
        f"{', '.join(group.objectives)}; surely = every difference is above 0 in its simultaneous interval"
    )
    return Section("best", "Constrained best, regret and front", headings, lines, caption, texts=3)


def constrained_best(group: Group, entries: Sequence[Entry]) -> Entry | None:
    """Largest mean reward among the feasible, else among the likely; None if neither is there."""
    for verdict in ("yes", "likely"):
        some = [entry for entry in entries if feasible(group, entry) == verdict and "reward" in entry.values]
        if some:
            return max(some, key=lambda entry: float(entry.values["reward"].mean()))
    return None


def fronts(group: Group, entries: Sequence[Entry]) -> dict[str, str]:
    """By series: on the front, or dominated, by whom, and whether surely; "-" without a number."""
    known = [entry for entry in entries if all(name in entry.values for name in group.objectives)]
    found = {entry.series: "-" for entry in entries}
    if not known:
        return found
    points = np.array([[entry.values[name].mean() for name in group.objectives] for entry in known])
    front = on_front(points)
    for i, entry in enumerate(known):
        if front[i]:
            found[entry.series] = "yes"
            continue
        above = [j for j in np.flatnonzero(front) if (points[j] >= points[i]).all() and (points[j] > points[i]).any()]
        sure = [j for j in above if _surely_above(group, known[j], entry, len(known))]
        by = known[(sure or above)[0]].series
        found[entry.series] = f"no: {by}{', surely' if sure else ''}"
    return found


def _surely_above(group: Group, a: Entry, b: Entry, count: int) -> bool:
    pairs = [paired(a, b, name) for name in group.objectives]
    return all(pair is not None and _simultaneous(pair[0], count).low > 0 for pair in pairs)


def _simultaneous(difference: Crossed, count: int) -> Estimate:
    found = difference.interval(LEVEL)
    if math.isnan(difference.error) or difference.error == 0.0:
        return found
    reach = all_pairs_reach(difference, max(count, 2), LEVEL)
    low, high = difference.mean - reach, difference.mean + reach
    return replace(found, low=low, high=high, method="Games-Howell, all pairs")


def volumes(group: Group, corner: Sequence[float] | None) -> Section:
    """Hypervolume of each method's points over all thresholds."""
    names = group.objectives
    known = [entry for entry in group.entries if all(name in entry.values for name in names)]
    headings = ["method", "points", "on the front of all", "hypervolume"]
    if not known:
        return Section("hypervolume", "Hypervolume", headings, [], "")
    means = np.array([[entry.values[name].mean() for name in names] for entry in known])
    reference = means.min(axis=0) if corner is None else np.array(corner, dtype=np.float64)
    front = on_front(means)
    lines: list[list[Cell]] = []
    for series in sorted({entry.series for entry in known if entry.thresholds}):
        own = [entry for entry in known if entry.series == series]
        of_all = sum(bool(front[known.index(entry)]) for entry in own)
        lines.append([series, str(len(own)), str(of_all), Value(volume(own, names, reference), 3)])
    where = ", ".join(f"{name} {value:.3f}" for name, value in zip(names, reference, strict=True))
    caption = (
        f"volume between the point ({where}) and what a method's policies reach over all thresholds, in units of "
        f"{' x '.join(names)}; {'the smallest mean of each over all methods' if corner is None else 'as given'}; "
        "[delta method, the point fixed]; a method asked more often has more points: compare equal numbers"
    )
    return Section("hypervolume", "Hypervolume", headings, lines, caption)


def volume(entries: Sequence[Entry], names: Sequence[str], reference: np.ndarray) -> Estimate:
    """Hypervolume of entries' means, with an interval by the delta method on common seeds and prompts.

    Its derivative with respect to each mean is taken over one standard error to both sides, which smooths the kinks
    where a point enters or leaves the front.
    """
    points = np.array([[entry.values[name].mean() for name in names] for entry in entries])
    total = hypervolume(points, reference)
    weights = np.zeros_like(points)
    for i, entry in enumerate(entries):
        for j, name in enumerate(names):
            step = cross(entry.values[name]).error
            if not step > 0.0:
                continue
            up, down = points.copy(), points.copy()
            up[i, j] += step
            down[i, j] -= step
            weights[i, j] = (hypervolume(up, reference) - hypervolume(down, reference)) / (2.0 * step)

    flat = [(entry, name, weights[i, j]) for i, entry in enumerate(entries) for j, name in enumerate(names)]
    common = tuple(seed for seed in entries[0].seeds if all(seed in entry.seeds for entry in entries))
    prompts = entries[0].values[names[0]].shape[1]
    nothing = Estimate(total, math.nan, math.nan, sum(e.responses for e in entries), prompts, LEVEL, too_few(prompts))
    if not common:
        return replace(nothing, method="no seed in common: no interval")
    # of the linear approximation only the spread is used; the volume itself is exact
    linear = cross(
        np.sum([w * entry.values[name][[entry.seeds.index(s) for s in common]] for entry, name, w in flat], axis=0)
    )
    reach = linear.interval(LEVEL)
    if math.isnan(reach.low):
        return nothing
    low, high = total + (reach.low - linear.mean), total + (reach.high - linear.mean)
    return replace(nothing, low=max(0.0, low), high=high, method="delta method")


# ---------------------------------------------------------------- calibration and sensitivity


def calibration(group: Group) -> Section:
    """Requested against achieved margins over all thresholds of a method."""
    headings = ["method", "utility", "runs", "bias", "mean absolute error", "slope", "covered", "met"]
    lines: list[list[Cell]] = []
    for series in _series(group):
        own = [entry for entry in group.entries if entry.series == series]
        for utility in group.utilities:
            some = [entry for entry in own if utility in entry.slacks]
            if not some:
                continue
            runs = sum(len(entry.seeds) for entry in some)
            bias = contrast(some, [1.0 / len(some)] * len(some), lambda e, u=utility: e.slacks.get(u))
            errors = [abs(float(row.mean())) for entry in some for row in entry.slacks[utility]]
            covered, met = (sum(getattr(e, name)[utility] for e in some) for name in ("covered", "met"))
            line: list[Cell] = [series, utility, str(runs), _value(bias), f"{float(np.mean(errors)):.2f}"]
            lines.append([*line, _value(_slope(some, utility)), f"{covered}/{runs}", f"{met}/{runs}"])
    caption = (
        "bias: achieved less requested margin, mean over thresholds, seeds and prompts; absolute error: of each run; "
        "slope: of the achieved margin in the requested one, 1 is calibrated (from two thresholds on); covered: runs "
        "whose own interval of the achieved margin holds the requested one; met: runs whose achieved margin is at "
        "least that"
    )
    return Section("calibration", "Threshold calibration", headings, lines, caption, texts=3)


def _slope(entries: Sequence[Entry], utility: str) -> Crossed | None:
    """Least-squares slope of achieved margins in requested ones: linear in what the prompts gain."""
    requested = np.array([entry.requested[utility] for entry in entries])
    weights = _least_squares(requested)
    if weights is None:
        return None
    # achieved = slack + requested, and the requested part has slope 1
    found = contrast(entries, list(weights), lambda e: e.slacks.get(utility))
    return None if found is None else cross(found.values + 1.0)


def _least_squares(x: np.ndarray) -> np.ndarray | None:
    """Weights w with ``w @ y`` the slope of y in x; None without spread."""
    centred = x - x.mean()
    total = float(centred @ centred)
    return None if len(x) < 2 or total < 1e-12 else centred / total


def to_seed(group: Group) -> Section:
    """How far seeds move a method's numbers, beyond what prompts and answers explain."""
    headings = ["method", "asked", "seeds"]
    for name in group.objectives:
        headings += [f"{name}: sd between seeds", f"{name}: range"]
    lines: list[list[Cell]] = []
    for entry in group.entries:
        if len(entry.seeds) < 2:
            continue
        line: list[Cell] = [entry.series, asked(entry.thresholds) or "-", _seeds(entry)]
        for name in group.objectives:
            found = entry.mean(name)
            if found is None or found.between_seeds is None:
                line += ["-", "-"]
                continue
            means = found.values.mean(axis=1)
            line += [f"{found.between_seeds:.3f}", f"{means.min():z.2f} to {means.max():z.2f}"]
        lines.append(line)
    caption = (
        "standard deviation between trained policies once the noise of prompts and sampled answers is taken off (0: "
        "they explain all of it), and the range of the seeds' means"
    )
    return Section("seeds", "Sensitivity to the seed", headings, lines, caption, texts=3)


def to_beta(group: Group) -> Section:
    """How a method's numbers change with the KL weight, where it was run with several."""
    headings = ["method", "asked", "beta", *(f"{name} per doubling" for name in (*group.objectives, "kl"))]
    families: dict[tuple[str, tuple[float, ...]], list[Entry]] = {}
    for entry in group.entries:
        if entry.thresholds:
            families.setdefault((_without_beta(entry), entry.thresholds), []).append(entry)
    lines: list[list[Cell]] = []
    for (series, thresholds), own in sorted(families.items()):
        own = sorted(own, key=lambda entry: entry.beta)
        weights = _least_squares(np.log2([entry.beta for entry in own]))
        if weights is None:
            continue
        line: list[Cell] = [series, asked(thresholds), ", ".join(f"{entry.beta:g}" for entry in own)]
        for name in (*group.objectives, "kl"):
            line.append(_value(contrast(own, list(weights), lambda e, n=name: e.values.get(n))))
        lines.append(line)
    caption = "change per doubling of beta, least squares in log2 beta over the means [paired by prompt and seed]"
    return Section("beta", "Sensitivity to beta", headings, lines, caption, texts=3)


def _without_beta(entry: Entry) -> str:
    own = f"beta={entry.beta:g}"
    return " ".join(word for word in entry.series.split(" ") if not (word == own or _is_beta(word, entry.beta)))


def _is_beta(word: str, beta: float) -> bool:
    name, _, value = word.partition("=")
    try:
        return name == "beta" and float(value) == beta
    except ValueError:
        return False


# ---------------------------------------------------------------- cost


def costs(group: Group) -> Section:
    """What each method costs from nothing."""
    headings = ["method", "runs", "trained tokens", "generated tokens", "scored tokens", "seconds", "peak memory, GiB"]
    headings += ["policies trained", "models trained", "models held"]
    lines: list[list[Cell]] = []
    for series in _series(group):
        records = [record for entry in group.entries if entry.series == series for record in entry.records]
        found = [record["cost"] for record in records]
        line: list[Cell] = [series, str(len(records))]
        line += [_mean_of([_number(c.get("total"), name) for c in found]) for name in _COSTS]
        peaks = [c.get("peak") or {} for c in found]
        line.append(_mean_of([max(p.values()) / 2**30 if p else None for p in peaks], digits=2))
        for name in ("policies_trained", "models_trained", "models_in_memory_while_training"):
            line.append(_mean_of([_number(c, name) for c in found]))
        lines.append(line)
    caption = (
        "mean over runs, each counted from nothing, whatever the store held (SFT and reference included); seconds: of "
        "the machines that computed the stages; peak: the largest of any stage, host or GPU; models held: at once, "
        "while training"
    )
    return Section("cost", "Cost", headings, lines, caption)


def _number(values: Any, name: str) -> float | None:
    value = (values or {}).get(name)
    return float(value) if isinstance(value, int | float) else None


def _mean_of(values: Sequence[float | None], digits: int | None = None) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:  # a mean over some of the runs would stand for all
        return "-"
    mean = float(np.mean(known))
    if digits is not None:
        return f"{mean:.{digits}f}"
    return f"{mean:,.0f}" if mean >= 100 or mean == int(mean) else f"{mean:.1f}"


# ---------------------------------------------------------------- small


def _series(group: Group) -> list[str]:
    return list(dict.fromkeys(entry.series for entry in group.entries if entry.series != REFERENCE))


def _somewhere(group: Group, name: str) -> bool:
    return any(name in entry.values for entry in group.entries)


def _seeds(entry: Entry) -> str:
    total = len(entry.seeds) + len(entry.missing)
    return str(total) if not entry.missing else f"{len(entry.seeds)} of {total}"


def _value(found: Crossed | None, entry: Entry | None = None, digits: int = 2) -> Cell:
    return "-" if found is None else Value(found.interval(LEVEL, n=0 if entry is None else entry.responses), digits)
