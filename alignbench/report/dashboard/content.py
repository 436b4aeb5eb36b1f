"""What a dashboard shows, from records: points with their intervals, fronts, courses of the multipliers, tables.

Every number is another report's: means over seeds are `entries` and `compare`'s, single runs are their records' own.
Nothing is estimated here, and an end of an interval that is not there stays absent.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from alignbench.report.compare import LEVEL, constrained_best, feasible, sections_of
from alignbench.report.crossed import Crossed
from alignbench.report.dashboard.generations import Texts
from alignbench.report.entries import REFERENCE, Entry, Group, asked, groups_of
from alignbench.report.front import on_front
from alignbench.report.plot import style
from alignbench.report.runs import Record, Runs, per_prompt
from alignbench.report.sections import Section
from alignbench.report.stats import Estimate
from alignbench.report.table import cell
from alignbench.report.thresholds import averaged, cells_of, points_of, series_of, thresholds_of, with_means
from alignbench.report.trajectory import reported_iteration

# a point: its mean and the two ends of its interval, None where there is none
Triple = list[float | None]

MEANS, RUNS, ALL = "means", "runs", "all"
# iterations of all courses together that are shown; a sweep of 400 runs of 25 iterations
_ITERATIONS = 10_000
_FILES = ("record.json", "table.md", "generations.jsonl", "trade_off.png", "trajectory.png", "judging.png")
_SHAPES = {
    "o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "P": "cross",
    "*": "M0,-1L0.29,-0.4L0.95,-0.31L0.48,0.15L0.59,0.81L0,0.5L-0.59,0.81L-0.48,0.15L-0.95,-0.31L-0.29,-0.4Z",
    "X": "M-0.7,-0.95L0,-0.25L0.7,-0.95L0.95,-0.7L0.25,0L0.95,0.7L0.7,0.95L0,0.25L-0.7,0.95L-0.95,0.7L-0.25,0"
         "L-0.95,-0.7Z",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Runs that one choice of "Group" shows.

    Attributes:
        title: Its name.
        data: Everything that the page's program draws, as JSON.
        sections: Tables over seeds.
        runs: One line per run, with links.
    """

    title: str
    data: dict[str, Any]
    sections: list[Section]
    runs: list[RunLine]


@dataclass(frozen=True)
class RunLine:
    """One run in the table of runs.

    Attributes:
        series, threshold, seed: For the filters; the numbers are those of the lists in `Part.data`.
        cells: Texts under `run_headings`.
        links: (text, relative address) of files that are there.
        artifact: (name, key, relative address or "" where it is not found) of the reported policy.
    """

    series: int
    threshold: int
    seed: int
    cells: list[str]
    links: list[tuple[str, str]]
    artifact: tuple[str, str, str] | None


@dataclass
class Content:
    """A dashboard before it is a page.

    Attributes:
        parts: Groups of comparable runs.
        texts: Prompts and responses.
        notes: What is missing or left out.
        records: Number of runs.
        commits: Of the code that made them.
        newest: When the last run ended.
    """

    parts: list[Part]
    texts: Texts
    notes: list[str]
    records: int
    commits: list[str]
    newest: str
    courses_left_out: int = field(default=0)


def content_of(runs: Runs, base: Path, store: Path | None = None) -> Content:
    """Everything that the page of a sweep shows.

    Args:
        runs: Of `collect`.
        base: Folder of the page; links are relative to it.
        store: Artifacts that are there are linked; None links none.
    """
    groups = groups_of(runs)
    notes = list(dict.fromkeys(note for group in groups for note in group.notes)) if groups else _notes_of_none(runs)
    used = {record["run_id"] for group in groups for entry in group.entries for record in entry.records}
    content = Content([], Texts(), notes, len(runs.records), *_origin(runs.records))
    builder = _Builder(runs, base, store, content)
    content.parts += [builder.compared(group) for group in groups]
    content.parts += [builder.single(records) for records in _alike(r for r in runs.records if r["run_id"] not in used)]
    content.texts.settle()
    return content


def _notes_of_none(runs: Runs) -> list[str]:
    """Without a group there is nobody to carry the notes."""
    faults = {record["run_id"]: per_prompt(record, runs.folders[record["run_id"]])[1] for record in runs.records}
    return [*runs.notes, *(f"in no mean: {run}: {fault or 'no values per prompt'}" for run, fault in faults.items())]


def _origin(records: Sequence[Record]) -> tuple[list[str], str]:
    commits = sorted({str(record["commit"])[:10] for record in records if record.get("commit")})
    return commits, max(str(record.get("created", "")) for record in records)


def _alike(records: Iterable[Record]) -> list[list[Record]]:
    """Runs that stand in no mean, by what they are about."""
    found: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        config = record["config"]
        constraint, evaluate = config["constraint"], config["evaluate"]
        key = (config["dataset"]["name"], evaluate["split"], constraint["form"], *constraint["utilities"])
        found.setdefault(tuple(map(str, key)), []).append(record)
    return [found[key] for key in sorted(found)]


class _Builder:
    def __init__(self, runs: Runs, base: Path, store: Path | None, content: Content) -> None:
        self._runs, self._base, self._store, self._content = runs, base, store, content
        self._iterations = 0

    def compared(self, group: Group) -> Part:
        """A group with means over seeds."""
        series = list(dict.fromkeys(entry.series for entry in group.entries))
        records = [(e.series, r) for e in group.entries if e.series != REFERENCE for r in e.records]
        predicted = {
            (p.series, p.thresholds, p.utility): p.predicted for p in averaged(points_of([r for _, r in records]))
        }
        means = []
        for entry in group.entries:
            point: dict[str, Any] = {
                "s": series.index(entry.series),
                "t": _index(group.asked, entry.thresholds),
                "n": _seeds(entry),
                "v": {name: triple(entry.mean(name)) for name in group.objectives if name in entry.values},
            }
            if entry.series != REFERENCE:
                point |= {
                    "f": feasible(group, entry),
                    "q": {u: _short(value) for u, value in entry.requested.items()},
                    "d": {u: triple(entry.slack(u)) for u in entry.slacks},
                    "p": {
                        u: interval(predicted.get((entry.series, entry.thresholds, u))) for u in entry.requested
                    },
                }  # fmt: skip
            means.append(point)
        title = f"{group.name}, {group.prompts} {group.split} prompts"
        return self._part(title, series, group.asked, group.utilities, records, means, sections_of(group), _best(group))

    def single(self, records: Sequence[Record]) -> Part:
        """Runs without values per prompt, or left out of the means: each by itself."""
        names = series_of(records)
        series = [REFERENCE, *sorted(set(names))]
        config = records[0]["config"]
        thresholds = tuple(sorted({thresholds_of(record) for record in records} - {()}))
        headings, lines = cells_of(with_means(points_of(records)))
        caption = "each run's own margins, and after several seeds their mean"
        section = Section("requested_achieved", "Requested against achieved", headings, lines, caption)
        utilities = tuple(config["constraint"]["utilities"])
        title = f"{config['dataset']['name']}, {config['evaluate']['split']}: in no mean, each run by itself"
        pairs = list(zip(names, records, strict=True))
        return self._part(title, series, thresholds, utilities, pairs, [], [section] if lines else [], [])

    def _part(
        self,
        title: str,
        series: list[str],
        thresholds: Sequence[tuple[float, ...]],
        utilities: Sequence[str],
        records: Sequence[tuple[str, Record]],
        means: list[dict[str, Any]],
        sections: list[Section],
        best: list[dict[str, Any]],
    ) -> Part:
        objectives = ("reward", *utilities)
        seeds = sorted({record["seed"] for _, record in records})
        looks = [style(i) for i in range(len(series))]
        runs, lines = [], []
        first_of: dict[int, Record] = {}
        for name, record in records:
            first_of.setdefault(record["seed"], record)
            place = (series.index(name), _index(thresholds, thresholds_of(record)), record["seed"])
            runs.append(self._run(place, record, objectives))
            lines.append(RunLine(*place, _cells(name, record, utilities), *self._links(record)))
        for seed, record in sorted(first_of.items()):
            row = next(iter(record["rows"].values()))
            answers = self._content.texts.reference(self._runs.folders[record["run_id"]], record, objectives)
            runs.append({"s": 0, "t": -1, "seed": seed, "v": _metrics(row, objectives), "g": answers})
        data = {
            "title": title,
            "series": [
                {"name": n, "colour": c, "shape": _SHAPES[m]} for n, (m, c) in zip(series, looks, strict=True)
            ],
            "thresholds": [asked(t) for t in thresholds],
            "seeds": seeds,
            "objectives": list(objectives),
            "level": LEVEL,
            "means": means,
            "runs": runs,
            "fronts": _fronts(means, runs, utilities, len(thresholds), seeds),
            "best": best,
        }  # fmt: skip
        return Part(title, data, sections, lines)

    def _run(self, place: tuple[int, int, int], record: Record, objectives: Sequence[str]) -> dict[str, Any]:
        row = record["rows"][record["outcome"]["reported"]]
        folder = self._runs.folders[record["run_id"]]
        constraints = {u: c for u, c in (row.get("constraints") or {}).items() if u in objectives}
        predicted = {(p.utility): p.predicted for p in points_of([record])}
        found: dict[str, Any] = dict(zip(("s", "t", "seed"), place, strict=True))
        found |= {
            "id": record["run_id"],
            "v": _metrics(row, objectives),
            "q": {u: _short(c.get("requested_margin")) for u, c in constraints.items()},
            "a": {u: interval(c.get("achieved_margin")) for u, c in constraints.items()},
            "p": {u: interval(value) for u, value in predicted.items()},
            "g": self._content.texts.reported(folder, record, objectives),
        }
        course = _course(record)
        self._iterations += len(course["steps"]) if course else 0
        if course and self._iterations > _ITERATIONS:
            self._content.courses_left_out += 1
        elif course:
            found["course"] = course
        return found

    def _links(self, record: Record) -> tuple[list[tuple[str, str]], tuple[str, str, str] | None]:
        folder = self._runs.folders[record["run_id"]]
        links = [("folder", address(folder, self._base) + "/")]
        links += [(name, address(folder / name, self._base)) for name in _FILES if (folder / name).is_file()]
        outcome = record["outcome"]
        key = (outcome.get("policies") or {}).get(outcome["reported"])
        if key is None:  # the reference itself
            key = record["rows"][outcome["reported"]].get("policy")
        if key is None:
            return links, None
        place = None if self._store is None else self._store / "artifacts" / str(key)
        where = address(place, self._base) if place is not None and place.is_dir() else ""
        return links, (outcome["reported"], str(key), where)


def address(path: Path, base: Path) -> str:
    """A relative link from a page in `base`; every character that means something in an address is escaped."""
    return quote(Path(os.path.relpath(path.resolve(), base.resolve())).as_posix())


def run_headings(utilities: Sequence[str]) -> list[str]:
    """Of the table of runs, before its links."""
    headings = ["method", "asked", "seed", "reward", *utilities]
    for utility in utilities:
        headings += [f"requested {utility}", f"achieved {utility}", f"lambda {utility}"]
    return [*headings, "KL"]


def _cells(series: str, record: Record, utilities: Sequence[str]) -> list[str]:
    row = record["rows"][record["outcome"]["reported"]]
    metrics, constraints = row.get("metrics") or {}, row.get("constraints") or {}
    cells = [series, asked(thresholds_of(record)) or "-", str(record["seed"])]
    cells += [_cell(metrics.get(name)) for name in ("reward", *utilities)]
    multipliers = row.get("multipliers") or record["outcome"].get("multipliers") or {}
    for utility in utilities:
        constraint = constraints.get(utility) or {}
        requested, multiplier = constraint.get("requested_margin"), multipliers.get(utility)
        cells += ["-" if requested is None else f"{requested:z.3g}", _cell(constraint.get("achieved_margin"))]
        cells += ["-" if multiplier is None else f"{multiplier:z.3g}"]
    return [*cells, _cell(metrics.get("kl"))]


def _cell(value: Mapping[str, Any] | None) -> str:
    return "-" if value is None or value.get("mean") is None else cell(value)


# ---------------------------------------------------------------- numbers


def triple(found: Crossed | Estimate | None) -> Triple | None:
    """Mean and interval of a mean over seeds and prompts."""
    if found is None:
        return None
    estimate = found.interval(LEVEL) if isinstance(found, Crossed) else found
    return [_short(estimate.mean), _short(estimate.low), _short(estimate.high)]


def interval(value: Mapping[str, Any] | None) -> Triple | None:
    """Mean and interval as a record has them; None where it has no number."""
    if value is None or _short(value.get("mean")) is None:
        return None
    return [_short(value.get(name)) for name in ("mean", "low", "high")]


def _short(value: Any) -> float | None:
    """Five significant digits: more than a screen shows."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _metrics(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Triple]:
    metrics = row.get("metrics") or {}
    return {name: found for name in names if (found := interval(metrics.get(name))) is not None}


def _index(thresholds: Sequence[tuple[float, ...]], own: tuple[float, ...]) -> int:
    return list(thresholds).index(own) if own in thresholds else -1


def _seeds(entry: Entry) -> str:
    seeds = f"seed{'s' if len(entry.seeds) > 1 else ''} {', '.join(map(str, entry.seeds))}"
    if not entry.missing or entry.series == REFERENCE:
        return seeds
    return f"{seeds}; missing: {', '.join(map(str, entry.missing))}"


def _best(group: Group) -> list[dict[str, Any]]:
    """The constrained best of every choice of thresholds; none where nothing was scored."""
    found: list[dict[str, Any]] = []
    if not any("reward" in entry.values for entry in group.entries):
        return found
    for index, thresholds in enumerate(group.asked):
        winner = constrained_best(group, [entry for entry in group.at(thresholds) if entry.thresholds])
        line: dict[str, Any] = {"t": index}
        if winner is not None:
            line |= {
                "series": winner.series,
                "feasible": feasible(group, winner),
                "reward": triple(winner.mean("reward")),
                "slack": {u: triple(winner.slack(u)) for u in group.utilities},
            }
        found.append(line)
    return found


def _fronts(
    means: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    utilities: Sequence[str],
    thresholds: int,
    seeds: Sequence[int],
) -> dict[str, list[list[float]]]:
    """Who is not dominated, for every view of the page: `utility|which points|threshold`, ascending in reward."""
    views = {MEANS: means, RUNS: runs} | {str(seed): [r for r in runs if r["seed"] == seed] for seed in seeds}
    found = {}
    for utility in utilities:
        for view, points in views.items():
            for threshold in (ALL, *range(thresholds)):
                some = [
                    [p["v"]["reward"][0], p["v"][utility][0]]
                    for p in points
                    if threshold in (ALL, p["t"]) or p["t"] == -1
                    if p["v"].get("reward") and p["v"].get(utility)
                ]
                if some:
                    places = np.array(some)
                    front = np.unique(places[on_front(places)], axis=0)
                    found[f"{utility}|{view}|{threshold}"] = front.tolist()
    return found


def _course(record: Record) -> dict[str, Any] | None:
    """Multipliers and slack of every iteration; None below two iterations."""
    entries = sorted(record["outcome"].get("trajectory") or [], key=lambda e: e["iteration"])
    if len(entries) < 2:
        return None
    steps = []
    for entry in entries:
        slack = {u: interval(value) for u, value in (entry.get("slack") or {}).items()}
        multipliers = {u: _short(value) for u, value in (entry.get("multipliers") or {}).items()}
        bounds = {u: bound for u, bound in (entry.get("at_bound") or {}).items() if bound}
        steps.append({"i": entry["iteration"], "m": multipliers, "s": slack} | ({"b": bounds} if bounds else {}))
    return {"steps": steps, "reported": reported_iteration(record, entries)}
