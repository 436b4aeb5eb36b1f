"""Projected gradient on the dual: the papers' own method, the released schedule, and how to tell that it oscillates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from alignbench.dual import (
    Bank,
    Record,
    Values,
    _Point,
    _vector,
)
from alignbench.errors import ConfigError


@dataclass(frozen=True)
class Trajectory(Record):
    """Projected gradient descent: multipliers (T + 1, m), values (T + 1,), gradients (T + 1, m), start included."""

    step: float
    multipliers: np.ndarray
    values: np.ndarray
    gradients: np.ndarray
    oscillates: bool


def smoothness(bank: Bank, beta: float) -> float:
    """A bound on the Hessian's eigenvalues at any lambda: mean over prompts of ``sum_j range_j^2 / 4`` over beta.

    The ``G / beta`` of CAN, Theorem 1 (iv), is none: two responses at g = +-3, beta = 0.1 reach 90, where it says 30.
    """
    high, low = (np.where(bank._listed, bank.gain, edge) for edge in (-np.inf, np.inf))
    return float(((high.max(-1) - low.min(-1)) ** 2 / 4.0).sum(0).mean() / beta)


def projected_gradient(
    bank: Bank, beta: float, margins: Values, *, step: float | None = None, iterations: int = 200, start: Values = 1.0
) -> Trajectory:
    """The papers' solver ``lambda <- max(0, lambda - step * gradient)`` (CAN, sec. 4), for their figures.

    Arguments as ``solve``; ``step`` is ``1 / smoothness(bank, beta)`` by default, which cannot oscillate.
    """
    b = _vector(bank, margins, "margins")
    step = 1.0 / max(smoothness(bank, beta), 1e-300) if step is None else step
    points = [_Point(bank, beta, b, _vector(bank, start, "start", spread=True))]
    for _ in range(iterations):
        points.append(_Point(bank, beta, b, np.maximum(points[-1].multipliers - step * points[-1].gradient, 0.0)))
    multipliers, gradients = (np.stack([getattr(p, name) for p in points]) for name in ("multipliers", "gradient"))
    return Trajectory(step, multipliers, np.array([p.value for p in points]), gradients, oscillation(multipliers))


def released_schedule(
    bank: Bank, beta: float, margin: float, *, step: float | None = None, restarts: int = 5, compat: str = "can-2024"
) -> float | None:
    """lambda* as CAN's released solver finds it (one utility); None where it gives up.

    Gradient steps from 1 of size 1, or TWICE a given ``step``; at most 200; done when the last five multipliers lie
    within 1e-5 (from iteration 10 on); the n-th restart divides the step by ``2**n`` once more (1, 1/2, 1/8, 1/64...).
    """
    if compat != "can-2024" or len(bank.names) != 1:
        what = f"no schedule {compat!r} for {len(bank.names)} utilities"
        raise ConfigError(what, where="released_schedule", mend="use can-2024 with one utility; solve handles several")
    rate, b = 1.0 if step is None else 2.0 * step, np.array([float(margin)])
    for restart in range(restarts + 1):
        rate /= 2**restart
        path = [1.0]
        for iteration in range(200):
            path.append(max(path[-1] - rate * float(_Point(bank, beta, b, np.array(path[-1:])).gradient[0]), 0.0))
            if iteration >= 10 and max(abs(path[-1] - earlier) for earlier in path[-6:-1]) < 1e-5:
                return path[-1]
    return None


def oscillation(values: np.ndarray) -> bool:
    """Whether a trajectory (T,) or (T, m) of multipliers swings without settling.

    Over its second half one must turn back in a fifth of the steps, with a range that the last quarter keeps to 90%.
    """
    late = np.asarray(values, float).reshape(len(values), -1)[len(values) // 2 :]
    if len(late) < 6:
        return False
    moves = np.diff(late, axis=0)
    turns = (moves[1:] * moves[:-1] < 0.0).mean(0)
    before, after = (np.ptp(part, axis=0) for part in np.array_split(late, 2))
    return bool(((turns >= 0.2) & (after >= 0.9 * before) & (after > 1e-9 * (1.0 + np.abs(late).max(0)))).any())
