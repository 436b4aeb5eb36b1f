"""What W&B shows of a record: one function for a run as it ends, and for runs that are rebuilt from their records."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignbench.jsonio import read_jsonl
from alignbench.tracking import Tracker

Record = Mapping[str, Any]
# the axis of an iterative method's iterations, beside the training stages'
ITERATIONS = "dual"
FRONT, DUAL_COURSE = "front", "dual_course"
PICTURES = ("trade_off", "trajectory", "judging", "calibration", "over_optimisation")
GENERATIONS = "generations.jsonl"
_COURSE = ("value", "slack", "ess_mean")


def mirror(record: Record, folder: Path, tracker: Tracker) -> None:
    """Send a record's results, its pictures and generations, and the tables behind the custom charts.

    Args:
        record: The record.
        folder: Its folder; pictures and generations that are not there are passed over.
        tracker: Where to send them; training curves are not sent again.
    """
    tracker.summary(summary_of(record))
    for iteration, values in iterations_of(record):
        tracker.log(ITERATIONS, iteration, values)
    for name, (columns, rows) in tables_of(record).items():
        tracker.table(name, columns, rows)
    for name in PICTURES:
        if (folder / f"{name}.png").exists():
            tracker.image(name, folder / f"{name}.png")
    if (folder / GENERATIONS).exists():
        answers = read_jsonl(folder / GENERATIONS)
        if answers:
            names = list(answers[0])
            tracker.table("generations", names, [[row.get(name) for name in names] for row in answers])


def summary_of(record: Record) -> dict[str, Any]:
    """Final values by name: `ROW/METRIC`, the reported row's as `reported/METRIC`, and `cost/NAME`."""
    found: dict[str, Any] = {}
    rows, reported = record["rows"], record["outcome"]["reported"]
    for name, row in rows.items():
        for metric, value in row["metrics"].items():
            found[f"{name}/{metric}"] = value["mean"]
    # one name for all methods: what a W&B sweep compares
    row = rows[reported]
    found |= {f"reported/{metric}": value["mean"] for metric, value in row["metrics"].items()}
    multipliers = row.get("multipliers") or record["outcome"].get("multipliers") or {}
    for utility, constraint in (row.get("constraints") or {}).items():
        found[f"reported/{utility}_requested_margin"] = constraint["requested_margin"]
        found[f"reported/{utility}_achieved_margin"] = constraint["achieved_margin"]["mean"]
        found[f"reported/{utility}_violation"] = constraint["violation"]["mean"]
        found[f"reported/{utility}_met"] = int(constraint["satisfied"])
    found |= {f"reported/{utility}_multiplier": value for utility, value in multipliers.items()}
    for contest in (record.get("judging") or {}).get("contests", ()):
        if contest["win_rate"]["mean"] is not None:
            name = f"{contest['row']}/judged_{contest['criterion']}_against_{contest['opponent']}"
            found[name] = contest["win_rate"]["mean"]
    cost = record["cost"]
    found |= {f"cost/{name}": value for name, value in {**cost.get("total", {}), **cost.get("peak", {})}.items()}
    found |= {f"cost/{name}": cost[name] for name in ("models_trained",) if name in cost}
    return found


def iterations_of(record: Record) -> Iterator[tuple[int, dict[str, float]]]:
    """Iteration, and its multiplier, gap (requested less achieved margin) and reward by name."""
    for entry in sorted(record["outcome"].get("trajectory") or [], key=lambda e: e["iteration"]):
        values = {f"multiplier/{name}": float(value) for name, value in (entry.get("multipliers") or {}).items()}
        for name, slack in (entry.get("slack") or {}).items():
            if slack.get("mean") is not None:
                values[f"gap/{name}"] = -float(slack["mean"])
        if entry.get("reward") is not None:
            values["reward"] = float(entry["reward"])
        if values:
            yield int(entry["iteration"]), values


def tables_of(record: Record) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and rows of the tables behind custom charts: the run's points of the front, and its duals' courses."""
    found: dict[str, tuple[list[str], list[list[Any]]]] = {}
    constraint = record["config"]["constraint"]
    utilities = [u for u in constraint["utilities"] if u in next(iter(record["rows"].values()))["metrics"]]
    if utilities and "reward" in next(iter(record["rows"].values()))["metrics"]:
        asked = ", ".join(f"{value:g}" for value in constraint["thresholds"])
        points = []
        for row in dict.fromkeys([next(iter(record["rows"])), record["outcome"]["reported"]]):
            metrics = record["rows"][row]["metrics"]
            means = [metrics[name]["mean"] for name in ("reward", *utilities)]
            points.append([record["method"], row, asked, record["seed"], *means])
        found[FRONT] = (["method", "row", "asked", "seed", "reward", *utilities], points)
    courses = [
        [record["method"], utility, dual["requested_margin"][utility], at, *(course[c][i] for c in _COURSE)]
        for dual in record.get("duals") or ()
        for utility, course in dual["course"].items()
        for i, at in enumerate(course["multiplier"])
    ]
    if courses:
        found[DUAL_COURSE] = (["method", "utility", "requested", "multiplier", *_COURSE], courses)
    return found
