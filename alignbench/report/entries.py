"""Runs brought together for comparison: a method at its thresholds, over seeds, on common prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignbench.problem import Form, Problem
from alignbench.report.crossed import Crossed, cross
from alignbench.report.plot import REFERENCE
from alignbench.report.runs import Record, Runs, Table, number, per_prompt
from alignbench.report.stats import FloatArray
from alignbench.report.thresholds import named_seeds, series_of, thresholds_of

# besides the reward and the utilities; each is a mean per prompt
OTHER = ("kl", "length", "unsafe_rate", "refusal_rate")


@dataclass(frozen=True)
class Entry:
    """One method at one choice of thresholds: a point of the comparison.

    Attributes:
        series: Method, with the settings that tell it from others; `REFERENCE` for the reference itself.
        method: The method's name alone.
        thresholds: As the user asked; empty for the reference.
        beta: KL weight of the problem.
        seeds: Seeds that are there, ascending.
        missing: Seeds that other entries of the group have and this one has not.
        values: Metric -> ``x[s, k]``, shape (seeds, prompts), rows in the order of `seeds`.
        slacks: Utility -> achieved less requested, same shape; not negative in the mean: met.
        requested: Utility -> requested margin, mean over seeds.
        covered: Utility -> seeds whose interval of the achieved margin holds the requested one.
        met: Utility -> seeds whose achieved margin is at least the requested one.
        records: The records behind it.
        responses: Responses per metric.
        lacking: Metrics that were asked of it and are no numbers.
    """

    series: str
    method: str
    thresholds: tuple[float, ...]
    beta: float
    seeds: tuple[int, ...]
    missing: tuple[int, ...]
    values: dict[str, FloatArray]
    slacks: dict[str, FloatArray]
    requested: dict[str, float]
    covered: dict[str, int]
    met: dict[str, int]
    records: tuple[Record, ...]
    responses: int
    lacking: tuple[str, ...]

    @property
    def label(self) -> str:
        """The series, and what it was asked for."""
        return self.series if not self.thresholds else f"{self.series} @ {asked(self.thresholds)}"

    def mean(self, metric: str) -> Crossed | None:
        """The metric over seeds and prompts; None where it is lacking."""
        return cross(self.values[metric]) if metric in self.values else None

    def slack(self, utility: str) -> Crossed | None:
        """Achieved less requested margin; None for the reference and where it is lacking."""
        return cross(self.slacks[utility]) if utility in self.slacks else None


@dataclass(frozen=True)
class Group:
    """Entries that may be compared: same data, prompts, scorer, form and utilities.

    Attributes:
        name: For titles and files.
        utilities: Constrained utilities.
        entries: The reference first, then by series and thresholds.
        prompts: Number of test prompts.
        split: Whose prompts they are.
        notes: What a reader must know.
    """

    name: str
    utilities: tuple[str, ...]
    entries: tuple[Entry, ...]
    prompts: int
    split: str
    notes: list[str] = field(default_factory=list)

    @property
    def objectives(self) -> tuple[str, ...]:
        """Reward and utilities, larger is better in each."""
        return ("reward", *self.utilities)

    @property
    def asked(self) -> tuple[tuple[float, ...], ...]:
        """Every choice of thresholds, ascending."""
        return tuple(sorted({entry.thresholds for entry in self.entries if entry.thresholds}))

    def at(self, thresholds: tuple[float, ...]) -> list[Entry]:
        """The reference and the entries of these thresholds."""
        return [entry for entry in self.entries if entry.thresholds in ((), thresholds)]


def asked(thresholds: Sequence[float]) -> str:
    """Thresholds on one line."""
    return ", ".join(f"{value:g}" for value in thresholds)


def groups_of(runs: Runs) -> list[Group]:
    """Comparable groups of a folder's runs, with notes on what is missing."""
    tables: dict[str, Table] = {}
    notes = list(runs.notes)
    families: dict[tuple[str, ...], list[Record]] = {}
    for record in runs.records:
        table, fault = per_prompt(record, runs.folders[record["run_id"]])
        if table is None or record["outcome"]["reported"] not in table:
            notes.append(f"left out: {record['run_id']}: {fault or 'no values per prompt of the reported row'}")
            continue
        tables[record["run_id"]] = table
        families.setdefault(_family(record, table), []).append(record)
    if len(families) > 1:
        notes.append(
            f"{len(families)} groups that cannot be compared with each other (data, prompts, scorer, form or utilities "
            "differ); each has tables of its own"
        )
    found = []
    for number_, (family, records) in enumerate(sorted(families.items())):
        name = "-".join(part for part in family[:3] if part)
        unique = len({f[:3] for f in families}) == len(families)
        found.append(_group(name if unique else f"{name}-{number_ + 1}", records, tables, notes))
    return found


def _family(record: Record, table: Table) -> tuple[str, ...]:
    config = record["config"]
    constraint, evaluate = config["constraint"], config["evaluate"]
    prompts = "\n".join(map(str, next(iter(table.values()))["prompt_id"]))
    return (
        str(config["dataset"]["name"]),
        str(evaluate["split"]),
        str(constraint["form"]),
        ",".join(constraint["utilities"]),
        str(evaluate.get("scorer")),
        hashlib.sha256(prompts.encode()).hexdigest()[:8],
    )


def _group(name: str, records: Sequence[Record], tables: Mapping[str, Table], notes: Iterable[str]) -> Group:
    notes = list(notes)
    utilities = tuple(records[0]["config"]["constraint"]["utilities"])
    points: dict[tuple[str, tuple[float, ...]], dict[int, Record]] = {}
    for record, series in zip(records, series_of(records), strict=True):
        seeds = points.setdefault((series, thresholds_of(record)), {})
        if record["seed"] in seeds:
            older, newer = sorted((seeds[record["seed"]], record), key=lambda r: str(r.get("created", "")))
            notes.append(
                f"seed {record['seed']} of {series} @ {asked(thresholds_of(record))} stands in two runs: "
                f"{newer['run_id']} is used, {older['run_id']} left out"
            )
            seeds[record["seed"]] = newer
        else:
            seeds[record["seed"]] = record
    every = tuple(sorted({seed for seeds in points.values() for seed in seeds}))
    entries = [_reference(points, tables, utilities, every)]
    for (series, thresholds), seeds in sorted(points.items()):
        entries.append(_entry(series, thresholds, dict(sorted(seeds.items())), tables, utilities, every))
    for entry in entries:
        if entry.missing and entry.series != REFERENCE:
            notes.append(f"{entry.label}: {named_seeds(entry.missing)} missing, {named_seeds(entry.seeds)} there")
        if entry.lacking:
            notes.append(f"{entry.label}: no number for {', '.join(entry.lacking)}; left out of what needs it")
    prompts = len(next(iter(tables[records[0]["run_id"]].values()))["prompt_id"])
    return Group(name, utilities, tuple(entries), prompts, str(records[0]["config"]["evaluate"]["split"]), notes)


def _reference(
    points: Mapping[Any, Mapping[int, Record]],
    tables: Mapping[str, Table],
    utilities: tuple[str, ...],
    every: tuple[int, ...],
) -> Entry:
    """The reference of each seed: the first row of any record of that seed."""
    by_seed: dict[int, Record] = {}
    for seeds in points.values():
        for seed, record in seeds.items():
            by_seed.setdefault(seed, record)
    by_seed = dict(sorted(by_seed.items()))
    own = [tables[record["run_id"]][_first(record)] for record in by_seed.values()]
    values, lacking = _values(own, utilities)
    n = int(sum(table["n"].sum() for table in own))
    records, betas = tuple(by_seed.values()), [float(r["config"]["constraint"]["beta"]) for r in by_seed.values()]
    return Entry(
        REFERENCE, REFERENCE, (), betas[0], every, (), values, {}, {}, {}, {}, records, n, tuple(lacking)
    )  # fmt: skip


def _first(record: Record) -> str:
    return str(next(iter(record["rows"])))


def _entry(
    series: str,
    thresholds: tuple[float, ...],
    seeds: Mapping[int, Record],
    tables: Mapping[str, Table],
    utilities: tuple[str, ...],
    every: tuple[int, ...],
) -> Entry:
    records = tuple(seeds.values())
    rows = [record["rows"][record["outcome"]["reported"]] for record in records]
    own = [tables[record["run_id"]][record["outcome"]["reported"]] for record in records]
    base = [tables[record["run_id"]][_first(record)] for record in records]
    values, lacking = _values(own, utilities)
    for metric in [name for name in values if any(_is_void(row, name) for row in rows)]:
        del values[metric]
        lacking.append(metric)
    config = records[0]["config"]["constraint"]
    problem = Problem(float(config["beta"]), Form(config["form"]), utilities, thresholds)
    slacks, requested, covered, met = {}, {}, {}, {}
    for utility in utilities:
        if utility not in values:
            continue
        reference = [float(table[utility].mean()) for table in base]
        margins = [problem.margins(dict.fromkeys(utilities, r))[utility] for r in reference]
        floors = [problem.requested_absolute(dict.fromkeys(utilities, r))[utility] for r in reference]
        if problem.form is Form.margin:
            # the reference's own prompts cancel: what a prompt gains, less what was asked
            slacks[utility] = values[utility] - np.array([table[utility] for table in base]) - margins[0]
        else:
            slacks[utility] = values[utility] - floors[0]
        # measured from the first: the mean of equal margins is that margin, without rounding
        requested[utility] = margins[0] + float(np.mean(np.array(margins) - margins[0]))
        constraints = [row.get("constraints", {}).get(utility, {}) for row in rows]
        met[utility] = sum(bool(c.get("satisfied")) for c in constraints)
        covered[utility] = sum(_holds(c.get("achieved_margin"), c.get("requested_margin")) for c in constraints)
    return Entry(
        series=series,
        method=str(records[0]["method"]),
        thresholds=thresholds,
        beta=problem.beta,
        seeds=tuple(seeds),
        missing=tuple(seed for seed in every if seed not in seeds),
        values=values,
        slacks=slacks,
        requested=requested,
        covered=covered,
        met=met,
        records=records,
        responses=int(sum(table["n"].sum() for table in own)),
        lacking=tuple(lacking),
    )


def _values(tables: Sequence[Mapping[str, np.ndarray]], utilities: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Metric -> (seeds, prompts) where every seed has finite numbers, and the names of those that have not."""
    values, lacking = {}, []
    for metric in ("reward", *utilities, *OTHER):
        columns = [table[metric] for table in tables if metric in table]
        if not columns:
            continue
        stacked = np.array([[np.nan if v is None else float(v) for v in column] for column in columns])
        if len(columns) == len(tables) and np.isfinite(stacked).all():
            values[metric] = stacked
        else:
            lacking.append(metric)
    return values, lacking


def _is_void(row: Mapping[str, Any], metric: str) -> bool:
    """Whether a row's record says that the metric is no number."""
    return metric in row["metrics"] and number(row["metrics"][metric]) is None


def _holds(interval: Mapping[str, Any] | None, value: float | None) -> bool:
    if interval is None or value is None or interval.get("low") is None or interval.get("high") is None:
        return False
    return bool(interval["low"] <= value <= interval["high"])


def paired(a: Entry, b: Entry, metric: str) -> tuple[Crossed, tuple[int, ...]] | None:
    """``a - b`` of a metric on the seeds that both have, and those seeds; None where there is nothing to pair."""
    common = tuple(seed for seed in a.seeds if seed in b.seeds)
    if not common or metric not in a.values or metric not in b.values:
        return None
    return cross(a.values[metric][_at(a, common)] - b.values[metric][_at(b, common)]), common


def contrast(entries: Sequence[Entry], weights: Sequence[float], read: Any) -> Crossed | None:
    """``sum_i weights[i] x_i`` over the seeds that all entries have; `read` gives an entry's x or None."""
    common = tuple(seed for seed in entries[0].seeds if all(seed in entry.seeds for entry in entries))
    parts = [read(entry) for entry in entries]
    if not common or any(part is None for part in parts):
        return None
    total = sum(w * part[_at(entry, common)] for w, part, entry in zip(weights, parts, entries, strict=True))
    return cross(np.asarray(total))


def _at(entry: Entry, seeds: Sequence[int]) -> list[int]:
    return [entry.seeds.index(seed) for seed in seeds]
