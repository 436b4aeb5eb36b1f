"""Intervals of the solved multiplier and of the margin it predicts: delta method and bootstrap over prompts.

Simulated coverage of nominal 95 % intervals, eight responses per prompt, lambda* and its margin, in percent::

    prompts                5       8      16      32     100
    delta method      89, 88  92, 89  93, 91  94, 93  95, 95
    bootstrap         77, 80  83, 83  90, 87  92, 93  94, 93
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

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
from alignbench.report.stats import FEWEST_PROMPTS


@dataclass(frozen=True)
class Intervals(Record):
    """Intervals (low, high) by name for lambda* and for the margin that the solved lambda attains on new prompts.

    A bootstrap end is infinite where that share of the resamples (``unreachable`` of them in all) has no minimiser.
    With fewer than `FEWEST_PROMPTS` prompts nothing is known: a multiplier is in (0, inf), a margin anywhere.
    """

    method: str
    level: float
    multipliers: dict[str, tuple[float, float]]
    margins: dict[str, tuple[float, float]]
    resamples: int = 0
    unreachable: int = 0


def delta_interval(bank: Bank, beta: float, solution: Solution, level: float = 0.95) -> Intervals:
    """Student's intervals (K - 1) by the sandwich ``H^-1 S H^-1 / K`` over K prompts, for multipliers off their bounds.

    S is the covariance of ``psi_k = E_{pi_lambda|x_k} g - E_{ref|x_k} g - b``. A multiplier at its bound gets that
    bound only (bootstrap where a constraint barely binds). The bias of few responses per prompt is not covered.
    """
    size = len(bank.prompts)
    if size < FEWEST_PROMPTS:
        return Intervals("delta", level, *_unknown(bank))
    lam, point = solution.multipliers, _Point(bank, beta, solution.margins, solution.multipliers)
    free = np.array([solution.at_bound[name] is None for name in bank.names])
    width = stats.t.ppf(0.5 + level / 2.0, size - 1)
    error = width * np.nan_to_num(np.sqrt(np.diag(_sandwich(point, point.hessian(), free))))
    margin, spread = point.gains.mean(0), width * point.gains.std(0, ddof=1) / np.sqrt(size)
    multipliers = _pairs(bank, np.maximum(lam - error, 0.0), lam + error)
    return Intervals("delta", level, multipliers, _pairs(bank, margin - spread, margin + spread))


def bootstrap_interval(
    bank: Bank, beta: float, margins: Values, resamples: int = 200, level: float = 0.95, seed: int = 0
) -> Intervals:
    """Percentile intervals over resampled prompts, each resample solved on from one shared Newton step.

    The margin's interval is of what the multiplier solved on the whole bank attains on the resample.
    """
    b, size = _vector(bank, margins, "margins"), len(bank.prompts)
    if size < FEWEST_PROMPTS:
        return Intervals("bootstrap", level, *_unknown(bank))
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


def _unknown(bank: Bank) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    least, most = np.zeros(len(bank.names)), np.full(len(bank.names), np.inf)
    return _pairs(bank, least, most), _pairs(bank, -most, most)
