"""Which records a claim's experiment is made of: roles, settings that are never mixed, seeds that all have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignbench.report.certificates import ONE_SHOT, certificate_of
from alignbench.report.entries import asked
from alignbench.report.runs import Record, Runs, Table, configured, number, per_prompt
from alignbench.report.stats import FloatArray
from alignbench.report.thresholds import settings_of, thresholds_of

REPORTED, REFERENCE, FIRST = "reported", "reference", "first iterate"
# stands for the name of the (first) constrained utility
UTILITY = "utility"
# what changes no policy, beyond what `settings_of` leaves out
_OTHER = ("judge", "benchmark", "constraint.thresholds")
_SAME_POLICIES = ("method.evaluate_iterates", "method.measure_last")
# where the exact numbers are taken: the prompts that the dual was solved on
SPLIT = "train"

Point = tuple[Any, ...]


class UnusableError(Exception):
    """Why a claim cannot be measured on the runs that are there, in words for the page."""


@dataclass(frozen=True)
class Role:
    """The runs that play one part in a claim's experiment.

    Attributes:
        method: Their method.
        where: Dotted configuration keys and the values they must have; what is not named must be the same in all.
        varies: The key whose values are the experiment's points; null: the thresholds are.
        anywhere: True for a policy that does not depend on the thresholds: it stands at every point.
    """

    method: str
    where: Mapping[str, Any] = field(default_factory=dict)
    varies: str | None = None
    anywhere: bool = False

    def plays(self, record: Record) -> bool:
        """Whether a record is one of them."""
        config = record["config"]
        if record["method"] != self.method or (self.varies is not None and configured(config, self.varies) is None):
            return False
        return all(configured(config, key) == value for key, value in self.where.items())

    def point(self, record: Record) -> Point:
        """Where among the experiment's points the record stands."""
        if self.anywhere:
            return ()
        if self.varies is None:
            return thresholds_of(record)
        value = configured(record["config"], self.varies)
        return tuple(value) if isinstance(value, list) else (value,)


@dataclass
class Setting:
    """Runs that may be compared: everything but method, thresholds and seed is the same.

    Attributes:
        name: For the page.
        records: Of the same utilities.
        keys: The configuration that they share, flattened.
    """

    name: str
    records: list[Record]
    keys: Mapping[str, str]

    @property
    def constraints(self) -> int:
        """How many utilities are constrained."""
        return len(_utilities(self.records[0]))


def settings(runs: Runs) -> list[Setting]:
    """The folder's settings, in the order of their names."""
    found: dict[str, Setting] = {}
    for record in runs.records:
        keys = {
            key: value
            for key, value in settings_of(record).items()
            if not key.startswith("method.") and key.split(".")[0] not in _OTHER and key not in _OTHER
        }
        several = _utilities(record) if len(_utilities(record)) > 1 else []
        name = ", ".join([record["config"]["dataset"]["name"], *several])
        found.setdefault(json.dumps(keys, sort_keys=True), Setting(name, [], keys)).records.append(record)
    ordered = sorted(found.values(), key=lambda s: (s.name, -len(s.records), json.dumps(s.keys, sort_keys=True)))
    names = [setting.name for setting in ordered]
    for i, setting in enumerate(ordered):
        if names.count(setting.name) > 1:
            setting.name = f"{setting.name} {names[: i + 1].count(names[i])}"
    return ordered


@dataclass
class Picked:
    """A claim's runs in one setting.

    Attributes:
        setting: Where.
        points: Points that every role has, ascending.
        seeds: Seeds that every role has at every one of these points, ascending.
        notes: What was left out.
        found: Role -> point -> seed -> record.
        roles: The roles.
        tables: Reads a record's values per prompt.
    """

    setting: Setting
    points: tuple[Point, ...]
    seeds: tuple[int, ...]
    notes: list[str]
    found: Mapping[str, Mapping[Point, Mapping[int, Record]]]
    roles: Mapping[str, Role]
    tables: Callable[[Record], Table]

    def at(self, point: Point) -> At:
        """The runs at one point."""
        chosen = {}
        for name, role in self.roles.items():
            by_seed = self.found[name][() if role.anywhere else point]
            chosen[name] = [by_seed[seed] for seed in self.seeds]
        return At(chosen, self.tables)


@dataclass(frozen=True)
class At:
    """Numbers of a claim's runs at one point, seeds in rows: what a claim's effects are written in."""

    runs: Mapping[str, Sequence[Record]]
    tables: Callable[[Record], Table]

    def mean(self, role: str, metric: str, row: str = REPORTED) -> FloatArray:
        """A metric per seed and prompt, (seeds, prompts); "utility" is the (first) constrained one.

        Raises:
            UnusableError: The metric is no number somewhere, or the runs answer different prompts.
        """
        return np.array([self._column(role, record, metric, row) for record in self.runs[role]])

    def gain(self, role: str, metric: str) -> FloatArray:
        """A metric's gain over the reference, (seeds, prompts)."""
        return self.mean(role, metric) - self.mean(role, metric, REFERENCE)

    def requested(self, role: str, utility: str = UTILITY) -> FloatArray:
        """The requested margin, (seeds, 1)."""

        def read(record: Record) -> Any:
            return _row(record, REPORTED)["constraints"][_named(utility, record)]["requested_margin"]

        return self.number(role, "requested margin", read)

    def slack(self, role: str, utility: str = UTILITY) -> FloatArray:
        """Achieved less requested margin, (seeds, prompts)."""
        return self.gain(role, utility) - self.requested(role, utility)

    def miss(self, role: str, utility: str = UTILITY) -> FloatArray:
        """Distance of the achieved from the requested margin, (seeds, 1)."""
        return np.abs(self.slack(role, utility).mean(axis=1, keepdims=True))

    def predicted(self, role: str) -> FloatArray:
        """The margin that the dual predicted before training, (seeds, 1)."""
        return self.number(
            role, "predicted margin", lambda r: _row(r, REPORTED)["predicted"]["margins"][_utility(r)]
        )  # fmt: skip

    def multiplier(self, role: str) -> FloatArray:
        """The reported policy's multiplier, (seeds, 1)."""

        def read(record: Record) -> Any:
            row = _row(record, REPORTED)
            return (row.get("multipliers") or record["outcome"].get("multipliers") or {})[_utility(record)]

        return self.number(role, "multiplier", read)

    def exact(self, role: str, *path: str, row: str = REPORTED) -> FloatArray:
        """A number of the row's certificate, (seeds, 1); of one by utility that of the constrained one."""

        def read(record: Record) -> Any:
            value: Any = certificate_of(_row(record, row), SPLIT)
            for key in path:
                value = value[key]
            return value[_utility(record)] if isinstance(value, Mapping) else value

        return self.number(role, f"certificate's {' '.join(path)}", read)

    def cost(self, role: str, name: str) -> FloatArray:
        """A number of the run's cost, (seeds, 1)."""
        return self.number(role, name, lambda record: record["cost"][name])

    def setting(self, role: str, key: str) -> FloatArray:
        """A number of the configuration, or the first of a list, (seeds, 1)."""

        def read(record: Record) -> Any:
            value = configured(record["config"], key)
            return value[0] if isinstance(value, list) else value

        return self.number(role, key, read)

    def number(self, role: str, what: str, read: Callable[[Record], Any]) -> FloatArray:
        """One number per seed, (seeds, 1); `what` names it.

        Raises:
            UnusableError: It is not there, or no number.
        """
        found = []
        for record in self.runs[role]:
            try:
                value = read(record)
                found.append([float(value)])
            except (KeyError, IndexError, TypeError, ValueError):
                raise UnusableError(f"{record['run_id']} ({role}) has no number for: {what}") from None
            if not np.isfinite(found[-1]).all():
                raise UnusableError(f"{record['run_id']} ({role}): {what} is {found[-1][0]}")
        return np.array(found)

    def _column(self, role: str, record: Record, metric: str, row: str) -> FloatArray:
        name, found = _row_name(record, row), self.tables(record)
        metric = _named(metric, record)
        of_first = self.tables(next(iter(self.runs.values()))[0])
        if name not in found:
            raise UnusableError(f"{record['run_id']} ({role}) has no values per prompt of {name!r}")
        prompts = next(iter(of_first.values()))["prompt_id"]
        if not np.array_equal(found[name]["prompt_id"], prompts):
            raise UnusableError(f"{record['run_id']} ({role}) answers other prompts than the others")
        values = found[name].get(metric)
        void = values is None or any(value is None for value in values)
        stated = record["rows"].get(name, {}).get("metrics", {})
        if void or (metric in stated and number(stated[metric]) is None):
            raise UnusableError(f"{record['run_id']} ({role}): {metric} of {name!r} is no number")
        column = np.asarray(values, dtype=np.float64)
        if not np.isfinite(column).all():
            raise UnusableError(f"{record['run_id']} ({role}): {metric} of {name!r} is no number on some prompts")
        return column


def reader(runs: Runs) -> Callable[[Record], Table]:
    """Values per prompt of a record, each file read once.

    The reader raises `UnusableError` where they are absent or damaged.
    """
    known: dict[str, tuple[Table | None, str]] = {}

    def read(record: Record) -> Table:
        run_id = record["run_id"]
        if run_id not in known:
            known[run_id] = per_prompt(record, runs.folders[run_id])
        table, fault = known[run_id]
        if table is None:
            raise UnusableError(f"{run_id}: {fault}")
        return table

    return read


def pick(roles: Mapping[str, Role], setting: Setting, tables: Callable[[Record], Table]) -> Picked | str:
    """A claim's runs in a setting, or in words what is missing."""
    found: dict[str, dict[Point, dict[int, Record]]] = {}
    notes: list[str] = []
    for name, role in roles.items():
        records = [record for record in setting.records if role.plays(record)]
        if not records:
            continue
        differ = _differing(role, records)
        if differ:
            return (
                f"runs of several settings could be {name!r}; they differ in {', '.join(differ)} and are not mixed: "
                "report on a folder with one of them"
            )
        found[name] = _by_point(name, role, records, notes)
    missing = [name for name in roles if name not in found]
    if missing:
        return f"no run of: {', '.join(missing)}"
    moving = [name for name, role in roles.items() if not role.anywhere]
    every = {point for name in moving for point in found[name]} or {()}
    points = tuple(sorted(p for p in every if all(p in found[name] for name in moving)))
    if not points:
        return f"no point in common of: {', '.join(moving)}"
    notes += [f"{asked_of(p)} left out: not run by every role" for p in sorted(every - set(points))]
    cells = {(name, p): set(found[name][p]) for name in moving for p in points}
    cells |= {(name, ()): set(found[name][()]) for name, role in roles.items() if role.anywhere}
    seeds = set.intersection(*cells.values())
    for seed in sorted(set.union(*cells.values()) - seeds):
        lacking = [f"{name} @ {asked_of(p)}" if p else name for (name, p), own in cells.items() if seed not in own]
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        notes.append(f"seed {seed} left out: missing for {', '.join(lacking[:3])}{more}")
    if not seeds:
        return "no seed in common; " + "; ".join(notes)
    return Picked(setting, points, tuple(sorted(seeds)), notes, found, roles, tables)


def _by_point(name: str, role: Role, records: Sequence[Record], notes: list[str]) -> dict[Point, dict[int, Record]]:
    """Point -> seed -> record; of two runs of one seed the newer, with a note."""
    found: dict[Point, dict[int, Record]] = {}
    for record in sorted(records, key=lambda r: (str(r.get("created", "")), r["run_id"])):
        seeds = found.setdefault(role.point(record), {})
        former = seeds.get(record["seed"])
        # a policy that does not depend on the thresholds may stand in runs of several
        if former is not None and _policies(former) != _policies(record):
            notes.append(
                f"seed {record['seed']} of {name} stands in two runs: {record['run_id']} is used, "
                f"{former['run_id']} left out"
            )
        seeds[record["seed"]] = record
    return found


def _policies(record: Record) -> dict[str, Any]:
    return {name: row.get("policy") for name, row in record["rows"].items()}


def _differing(role: Role, records: Sequence[Record]) -> list[str]:
    """Keys of the method in which records of one role differ; none: they are of one experiment."""
    ignored = {role.varies, *_SAME_POLICIES}
    flat = [
        {k: v for k, v in settings_of(r).items() if k.startswith("method.") and k not in ignored} for r in records
    ]  # fmt: skip
    keys = sorted({key for one in flat for key in one})
    return [key for key in keys if len({one.get(key) for one in flat}) > 1]


def asked_of(point: Point) -> str:
    """A point in words."""
    try:
        return asked(point)
    except (TypeError, ValueError):
        return ", ".join(map(str, point))


def _utilities(record: Record) -> list[str]:
    return [str(name) for name in record["config"]["constraint"]["utilities"]]


def _utility(record: Record) -> str:
    return _utilities(record)[0]


def _named(metric: str, record: Record) -> str:
    return _utility(record) if metric == UTILITY else metric


def _row_name(record: Record, row: str) -> str:
    if row == REPORTED:
        return str(record["outcome"]["reported"])
    if row == REFERENCE:
        return str(next(iter(record["rows"])))
    if row == FIRST:
        if ONE_SHOT in record["rows"]:
            return ONE_SHOT
        # the first iterate may be the reported one, and has then no row of its own
        first = (record["outcome"].get("trajectory") or [{}])[0]
        return str(first.get("policy") or ONE_SHOT)
    return row


def _row(record: Record, row: str) -> Mapping[str, Any]:
    name = _row_name(record, row)
    if name not in record["rows"]:
        raise UnusableError(f"{record['run_id']} has no row {name!r}")
    found: Mapping[str, Any] = record["rows"][name]
    return found
