"""Our runs beside the papers' numbers: which records belong to which row, and at what scale they ran.

A record names the preset under which it was asked for. A preset's grid has as many points in the embedded world as at
the paper's scale, in the same order: a run at the k-th embedded value stands beside the row of the paper's k-th value.
What a run was asked for besides its preset is found by comparing configurations, and is said.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePath
from typing import Any

from omegaconf import OmegaConf

from alignbench.config import recorded
from alignbench.record import portable
from alignbench.report.published import Ours, PublishedTable, Row, same_key
from alignbench.report.runs import Record, configured, experiments_of, number
from alignbench.report.stats import FEW_PROMPTS
from alignbench.report.thresholds import multiplier_of, over_seeds, predicted_margin, settings_of

Measured = Mapping[str, Any]
#: What a user must state to run a preset at all.
_TO_BE_GIVEN = ("revision",)
_SHARES = ("win", "judged")
_GROUPS = ("method", "model", "dataset", "constraint", "evaluate")


@dataclass(frozen=True)
class Run:
    """What runs that differ in the seed only have in common.

    Attributes:
        experiment: The preset.
        scale: "paper" or "embedded".
        changed: Settings that are not the preset's; empty: exactly the preset.
        values: Values of the grid as our runs had them.
        own: Key of the table -> our value, where the key is a number of the grid.
        policy: Row of the record.
    """

    experiment: str
    scale: str
    changed: tuple[str, ...]
    values: tuple[float, ...]
    own: tuple[tuple[str, float], ...]
    policy: str

    @property
    def as_published(self) -> bool:
        """Whether this is the preset at the paper's scale, with nothing changed."""
        return self.scale == "paper" and not self.changed

    def __str__(self) -> str:
        scale = {"paper": "paper's scale", "embedded": "twin"}[self.scale] + (", changed" if self.changed else "")
        values = ", ".join(f"{value:g}" for value in self.values)
        return f"{self.experiment.partition('/')[2]}: {scale}" + (f", {values}" if values else "")


@dataclass(frozen=True)
class Line:
    """Our runs beside one row of a table.

    Attributes:
        run: What they share.
        row: The paper's row; None: the paper has none at this setting.
        keys: The row's keys, as far as they are known.
        records: Record by seed.
        missing: Seeds that other lines of the same scale have.
    """

    run: Run
    row: Row | None
    keys: dict[str, Any]
    records: dict[int, Record]
    missing: tuple[int, ...] = ()

    def measured(self, measure: str) -> Measured | None:
        """A measure over the seeds; None unless every seed has it."""
        found = [value for value in self._values(measure).values() if value is not None]
        if len(found) < len(self.records):
            return None
        if len(found) == 1:
            return found[0]
        limits = {"least": 0.0, "most": 1.0} if measure.partition(" ")[0] in _SHARES else {}
        counts = {"clusters": found[0].get("clusters"), "responses": sum(int(value.get("n") or 0) for value in found)}
        return over_seeds([float(value["mean"]) for value in found], **limits) | counts

    def gap(self, name: str, measure: str) -> str:
        """Which seeds lack a measure that others have; "" where it is there, or of none."""
        lacking = [str(seed) for seed, value in self._values(measure).items() if value is None]
        if not lacking or len(lacking) == len(self.records):
            return ""
        return f"{self.run}: no number of {name} for seed {', '.join(lacking)}, so none is shown for the others"

    def _values(self, measure: str) -> dict[int, Measured | None]:
        found = {seed: _measured(record, self.run.policy, measure) for seed, record in self.records.items()}
        return {seed: None if number(value) is None else value for seed, value in found.items()}


@dataclass(frozen=True)
class Found:
    """Our runs of a table.

    Attributes:
        lines: In the order of the table's rows; those without a row last.
        without: Presets of the table of which there is no record.
        notes: What a reader must know of records that were left out.
    """

    lines: list[Line]
    without: list[str]
    notes: list[str] = field(default_factory=list)


def find(table: PublishedTable, records: Sequence[Record]) -> Found:
    """The lines of a table."""
    groups: dict[tuple[Run, tuple[tuple[str, Any], ...]], dict[int, Record]] = {}
    notes: list[str] = []
    for ours in table.ours:
        for record in records:
            if ours.experiment not in experiments_of(record):
                continue
            if lacking := [group for group in _GROUPS if not isinstance(record["config"].get(group), Mapping)]:
                notes.append(f"left out: {record['run_id']}: no {', '.join(lacking)} in its configuration")
            else:
                for run, keys in _places(ours, record):
                    seeds = groups.setdefault((run, tuple(sorted(keys.items(), key=str))), {})
                    seeds[record["seed"]] = _newer(seeds.get(record["seed"]), record, run, notes)
    every: dict[str, set[int]] = {}
    for (run, _), seeds in groups.items():
        every.setdefault(run.scale, set()).update(seeds)
    lines = []
    for (run, items), seeds in groups.items():
        keys = dict(items)
        missing = tuple(sorted(every[run.scale] - set(seeds)))
        lines.append(Line(run, table.row_of(keys), keys, dict(sorted(seeds.items())), missing))
    order = [id(row) for row in table.rows]
    lines.sort(key=lambda line: (line.row is None, 0 if line.row is None else order.index(id(line.row)), str(line.run)))
    there = {line.run.experiment for line in lines}
    return Found(lines, [ours.experiment for ours in table.ours if ours.experiment not in there], notes)


def _newer(there: Record | None, record: Record, run: Run, notes: list[str]) -> Record:
    """Of two records of one seed the newer, and a note."""
    if there is None:
        return record
    older, newer = sorted((there, record), key=lambda one: str(one.get("created", "")))
    notes.append(
        f"seed {record['seed']} of {run} stands in two runs: {newer['run_id']} is used, {older['run_id']} left out"
    )
    return newer


def _places(ours: Ours, record: Record) -> Iterable[tuple[Run, dict[str, Any]]]:
    """The rows of one record's policies: (what it shares with other seeds, keys)."""
    scale = str(record["config"].get("scale", "paper"))
    if scale not in ("paper", "embedded"):
        return
    base, grid, paper = preset(ours.experiment, scale)
    keys, values = dict(ours.keys), list[float]()
    own: dict[str, float] = {}
    for key, points in grid.items():
        given = configured(record["config"], key)
        at = next((i for i, point in enumerate(points) if point == given), None)
        stated = None if at is None else paper[key][at]
        if key in ours.where and not same_key(ours.where[key], stated):
            return
        if key in ours.grid:
            names, had = ours.grid[key], [value for value in _list(given) if isinstance(value, int | float)]
            values += had
            own |= dict(zip(names, map(float, had), strict=False))
            # beside no row where the paper has no such point
            keys |= dict(zip(names, ["-"] * len(names) if at is None else _list(stated), strict=True))
    changed = _changed(record, base, {*ours.grid, *ours.where})
    for policy, further in ours.rows.items() if ours.rows else [(str(record["outcome"]["reported"]), {})]:
        if policy in record["rows"]:
            yield Run(ours.experiment, scale, changed, tuple(values), tuple(own.items()), policy), keys | dict(further)


@cache
def preset(experiment: str, scale: str) -> tuple[dict[str, Any], dict[str, list[Any]], dict[str, list[Any]]]:
    """A preset's configuration as a record would have it, its grid at that scale, and at the paper's."""
    from alignbench import presets  # it brings torch along

    config, *grids = presets.at_scale(experiment, scale)
    grid, paper = ({key: list(map(_plain, points)) for key, points in one.items()} for one in grids)
    return portable(recorded(config)), grid, paper


def _changed(record: Record, base: Mapping[str, Any], told: Collection[str]) -> tuple[str, ...]:
    """Settings in which a record is not its preset, but for those that its place in the table tells."""
    of_preset, own = settings_of({"config": base}), settings_of(record)
    for flat, config in ((of_preset, base), (own, record["config"])):
        flat["constraint.thresholds"] = json.dumps(config["constraint"]["thresholds"])
    found = []
    for key in sorted(of_preset.keys() & own.keys()):
        if key in told or key.rpartition(".")[2] in _TO_BE_GIVEN:
            continue
        stated, given = (json.loads(flat[key]) for flat in (of_preset, own))
        if key.endswith(".path"):  # the hub's name, or a folder of that name
            stated, given = (PurePath(value).name if isinstance(value, str) else value for value in (stated, given))
        if stated != given:
            found.append(f"{key}={own[key]}")
    return tuple(found)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


# ---------------------------------------------------------------- measures


def _measured(record: Record, policy: str, measure: str) -> Measured | None:
    kind, _, what = measure.partition(" ")
    row = record["rows"][policy]
    utilities = record["config"]["constraint"]["utilities"]
    name = "reward"
    if what.isdigit():
        if int(what) > len(utilities):
            return None
        name = utilities[int(what) - 1]
    found: Measured | None
    if kind == "gain":
        found = row.get("metrics", {}).get(f"{name}_gain")
    elif kind == "win":
        found = row.get("metrics", {}).get(f"{name}_win_rate")
    elif kind == "margin":
        found = row.get("constraints", {}).get(name, {}).get("achieved_margin")
    elif kind == "predicted":
        found = predicted_margin(row, name)
    elif kind == "lambda":
        found = _with_interval(multiplier_of(record, row, name), record, name)
    elif kind == "judged":
        found = _contest(record, policy, what)
    else:  # rating
        ratings = (record.get("judging") or {}).get("ratings", {})
        found = ratings.get(what, {}).get("bradley_terry", {}).get(policy)
    return found


def _with_interval(multiplier: Measured | None, record: Record, utility: str) -> Measured | None:
    """A multiplier that is the dual's solution, with the dual's jackknife interval."""
    dual = (record["outcome"].get("diagnostics") or {}).get("dual") or {}
    solution, intervals = dual.get("solution"), (dual.get("intervals") or {}).get("jackknife")
    if multiplier is None or not solution or not intervals or utility not in solution["names"]:
        return multiplier
    solved = solution["multipliers"][solution["names"].index(utility)]
    if not math.isclose(solved, multiplier["mean"], rel_tol=1e-6):
        return multiplier  # stated, or stepped to since
    low, high = intervals["multipliers"][utility]
    clusters = {"clusters": dual.get("prompts"), "n": dual.get("responses")}
    method = "jackknife" if high is not None else FEW_PROMPTS
    return {**multiplier, "low": low, "high": high, "level": intervals["level"], "method": method} | clusters


def _contest(record: Record, policy: str, criterion: str) -> Measured | None:
    reference = next(iter(record["rows"]))
    for contest in (record.get("judging") or {}).get("contests", ()):
        if (contest["row"], contest["opponent"], contest["criterion"]) == (policy, reference, criterion):
            return dict(contest["win_rate"])
    return None


def described(measure: str, lines: Sequence[Line]) -> str:
    """What a measure of ours is, in the words of the records that have it."""
    kind, _, what = measure.partition(" ")
    names = []
    for line in (line for line in lines if line.measured(measure) is not None):
        for record in line.records.values():
            config = record["config"]
            utilities = config["constraint"]["utilities"]
            name = utilities[int(what) - 1] if what.isdigit() and int(what) <= len(utilities) else what
            scorer = (config.get("evaluate") or {}).get("scorer")
            judge = (record.get("judging") or {}).get("judge")
            names.append(
                {
                    "gain": f"{name} over reference ({scorer})",
                    "win": f"win rate, {name} ({scorer})",
                    "margin": f"{name} over reference ({scorer})",
                    "predicted": f"predicted {name} over reference",
                    "lambda": f"lambda of {name}",
                    "judged": f"win rate, {name} (judge {judge})",
                    "rating": f"rating of {name} (judge {judge})",
                }[kind]
            )
    return " / ".join(dict.fromkeys(names))
