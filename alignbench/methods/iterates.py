"""Iterates of a dual method: which one is reported, and the course they took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from alignbench import dual_descent
from alignbench.methods.recipe import Outcome

if TYPE_CHECKING:
    from alignbench.lab import Lab, Node

REPORTED = ("last", "best_feasible", "average")


@dataclass(frozen=True)
class Iterate:
    """One iterate of a dual method: its policy, the multipliers it was trained at, and its slack if it was measured."""

    policy: Node
    multipliers: Node
    slack: Node | None


def report_iterates(
    lab: Lab,
    name: str,
    iterates: Sequence[Iterate],
    reported: str,
    averaged: Node | None,
    mean: Node | None,
    *,
    every: bool,
) -> Outcome:
    """All iterates as an outcome: which one is reported, the trajectory, whether the dual oscillated.

    Args:
        lab: The lab.
        name: Row of the reported iterate.
        iterates: In order.
        reported: "last", "best_feasible" (largest reward among those whose measured slack is not negative, or
            where the reward is not measured the smallest slack; the least violated if none is feasible) or
            "average" (a further policy, at the mean multiplier).
        averaged: That policy, for "average".
        mean: Its multiplier.
        every: Whether every iterate gets a row; otherwise the first and the reported one.
    """
    trajectory = [_entry(lab, t, one) for t, one in enumerate(iterates, 1)]
    known = [entry for entry in trajectory if entry is not None]
    chosen = len(iterates) - 1
    if reported == "best_feasible" and len(known) == len(iterates):
        chosen = max(range(len(known)), key=lambda t: _merit(known[t]))
    rows = {f"iterate {t}": t - 1 for t in range(1, len(iterates) + 1)}
    if reported != "average":
        rows = {(name if t == chosen else row): t for row, t in rows.items()}
    kept = {row: t for row, t in rows.items() if every or t in (0, chosen)}
    policies = {row: iterates[t].policy for row, t in kept.items()}
    duals = {row: iterates[t].multipliers for row, t in kept.items()}
    if averaged is not None and mean is not None:
        policies[name], duals[name] = averaged, mean
    for entry in known:
        entry["policy"] = next((row for row, t in kept.items() if t == entry["iteration"] - 1), None)
    values = np.array([list(entry["multipliers"].values()) for entry in known])
    return Outcome(
        policies,
        name,
        trajectory=known,
        duals=duals,
        diagnostics={
            "reported_iterate": reported,
            "reported_iteration": None if reported == "average" else chosen + 1,
            "oscillates": bool(len(known) > 2 and (dual_descent.oscillation(values) or _swings(known))),
        },
    )


def _swings(entries: Sequence[dict[str, Any]]) -> bool:
    """Whether some slack changes its sign at each of the last three steps, never within its interval of zero.

    Few iterations show no settled pattern, so only swings that sampling cannot explain count.
    """
    measured = [entry["slack"] for entry in entries if entry["slack"]]
    for utility in measured[0] if len(measured) >= 4 else ():
        late = [slack[utility] for slack in measured[-4:]]
        clear = all(s["low"] is not None and (s["low"] > 0 or s["high"] < 0) for s in late)
        if clear and all(a["mean"] * b["mean"] < 0 for a, b in pairwise(late)):
            return True
    return False


def _entry(lab: Lab, iteration: int, one: Iterate) -> dict[str, Any] | None:
    stated = lab.peek(one.multipliers, "multipliers.json")
    measured = {"slack": {}, "reward": None} if one.slack is None else lab.peek(one.slack, "slack.json")
    if stated is None or measured is None:
        return None
    return {
        "iteration": iteration,
        "artifact": one.policy.key,
        "multipliers": stated["multipliers"],
        "at_bound": stated.get("at_bound", dict.fromkeys(stated["multipliers"])),
        "slack": measured["slack"],
        "reward": measured["reward"],
    }


def _merit(entry: dict[str, Any]) -> tuple[float, float]:
    slack = [value["mean"] for value in entry["slack"].values()]
    violated = sum(min(0.0, value) for value in slack)
    return violated, sum(slack) * -1.0 if entry["reward"] is None else entry["reward"]
