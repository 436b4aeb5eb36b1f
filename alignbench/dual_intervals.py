"""Intervals of the solved multiplier and of the margin it predicts: delta method and bootstrap over prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from alignbench.dual import (
    SLACK,
    Bank,
    Record,
    Solution,
    Values,
    _inverse,
    _minimise,
    _pairs,
    _Point,
    _sandwich,
    _tightest,
    _vector,
    solve,
)


@dataclass(frozen=True)
class Intervals(Record):
    """Intervals (low, high) by name for lambda* and for the margin that the solved lambda attains on new prompts.

    A bootstrap end is infinite where that share of the resamples (``unreachable`` of them in all) has no minimiser.
    """

    method: str
    level: float
    multipliers: dict[str, tuple[float, float]]
    margins: dict[str, tuple[float, float]]
    resamples: int = 0
    unreachable: int = 0


def delta_interval(bank: Bank, beta: float, solution: Solution, level: float = 0.95) -> Intervals:
    """Normal intervals by the sandwich ``H^-1 S H^-1 / K`` over prompts, for the multipliers off their bounds.

    S is the second moment of ``psi_k = E_{pi_lambda|x_k} g - E_{ref|x_k} g - b``. A multiplier at its bound gets that
    bound only (bootstrap where a constraint barely binds). The bias of few responses per prompt is not covered.
    """
    lam, point = solution.multipliers, _Point(bank, beta, solution.margins, solution.multipliers)
    free = np.array([solution.at_bound[name] is None for name in bank.names])
    width = ndtri(0.5 + level / 2.0)
    error = width * np.nan_to_num(np.sqrt(np.diag(_sandwich(point, point.hessian(), free))))
    margin, spread = point.gains.mean(0), width * point.gains.std(0) / np.sqrt(len(point.gains))
    multipliers = _pairs(bank, np.maximum(lam - error, 0.0), lam + error)
    return Intervals("delta", level, multipliers, _pairs(bank, margin - spread, margin + spread))


def bootstrap_interval(
    bank: Bank, beta: float, margins: Values, resamples: int = 200, level: float = 0.95, seed: int = 0
) -> Intervals:
    """Percentile intervals over resampled prompts, each resample solved on from one shared Newton step.

    The margin's interval is of what the multiplier solved on the whole bank attains on the resample.
    """
    b, size = _vector(bank, margins, "margins"), len(bank.prompts)
    whole = solve(bank, beta, b)
    gains = _Point(bank, beta, b, whole.multipliers).gains
    draws = np.random.default_rng(seed).multinomial(size, np.full(size, 1.0 / size), resamples) / size
    inverse = _inverse(whole.hessian, np.array([whole.at_bound[name] is None for name in bank.names]))
    found, top = np.full((resamples, len(b)), np.inf), np.full(len(b), np.inf)
    for i, share in enumerate(draws):
        if _tightest(bank, b / bank._scale, prompts=share, sign_only=True)[0] > SLACK:
            begin = np.maximum(whole.multipliers - inverse @ (share @ gains - b), 0.0)
            found[i] = _minimise(bank, beta, b, top, begin, 1e-8, 100, share)[0].multipliers
    tails = [0.5 - level / 2.0, 0.5 + level / 2.0]
    low, high = np.quantile(found, tails, axis=0, method="inverted_cdf")  # interpolation would make inf - inf
    attained = _pairs(bank, *np.quantile(draws @ gains, tails, axis=0))
    unreachable = int(np.isinf(found[:, 0]).sum())
    return Intervals("bootstrap", level, _pairs(bank, low, high), attained, resamples, unreachable)
