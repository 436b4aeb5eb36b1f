"""Intervals of the solved multiplier and of the margin it predicts: jackknife and bootstrap over prompts.

Simulated coverage of nominal 95 % intervals, eight responses per prompt, lambda* and its margin, in percent::

    prompts             5       8      16      20      50
    jackknife      93, 93  94, 93  95, 95  94, 95  95, 95
    bootstrap      87, 91  91, 92  92, 94  93, 94  96, 95

The sandwich, ``H^-1 S H^-1 / K`` with Student's quantiles, has 89, 88 at 5 prompts and 93, 91 at 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from alignbench.dual import SLACK, Bank, Record, Values, _inverse, _minimise, _pairs, _Point, _tightest, _vector, solve

#: With fewer prompts the jackknife, and the bootstrap, cover less than 93 %.
FEWEST_LEFT_OUT, FEWEST_RESAMPLED = 8, 50


@dataclass(frozen=True)
class Intervals(Record):
    """Intervals (low, high) by name for lambda* and for the margin that the solved lambda attains on new prompts.

    An end is infinite where nothing is known: with too few prompts, where a jackknife finds no minimiser without one of
    them, or where that share of a bootstrap's resamples (``unreachable`` of them in all) has none.
    """

    method: str
    level: float
    multipliers: dict[str, tuple[float, float]]
    margins: dict[str, tuple[float, float]]
    resamples: int = 0
    unreachable: int = 0


class Reweighted:
    """The dual of one bank with other shares of its prompts.

    Args:
        bank: Prompts, responses, scores.
        beta: KL weight.
        margins: Asked, in all of them; as for `alignbench.dual.solve`, whose errors are raised.
    """

    def __init__(self, bank: Bank, beta: float, margins: Values) -> None:
        self.bank, self.beta, self.b = bank, beta, _vector(bank, margins, "margins")
        self.whole = solve(bank, beta, self.b)
        self.size = len(bank.prompts)
        self._gains = _Point(bank, beta, self.b, self.whole.multipliers).gains
        self._inverse = _inverse(self.whole.hessian, np.array([self.whole.at_bound[n] is None for n in bank.names]))

    def multipliers(self, share: np.ndarray) -> np.ndarray:
        """The minimiser (m,) for the prompts' shares (K,), which sum to 1; inf where there is none."""
        unbounded = np.full(len(self.b), np.inf)
        if _tightest(self.bank, self.b / self.bank._scale, prompts=share, sign_only=True)[0] <= SLACK:
            return unbounded
        begin = np.maximum(self.whole.multipliers - self._inverse @ (share @ self._gains - self.b), 0.0)
        return _minimise(self.bank, self.beta, self.b, unbounded, begin, 1e-8, 100, share)[0].multipliers

    @cached_property
    def without_each(self) -> np.ndarray:
        """The minimiser without each prompt, (K, m)."""
        return np.array([self.multipliers(share) for share in (1.0 - np.eye(self.size)) / (self.size - 1)])

    @cached_property
    def gains_elsewhere(self) -> np.ndarray:
        """What the minimiser without a prompt gains on that prompt, (K, m); NaN where there is none."""
        finite = np.where(np.isfinite(self.without_each), self.without_each, np.nan)
        tilt = self.bank._reward + np.einsum("kj,jki->ki", finite, self.bank.gain)
        logits = tilt / self.beta + self.bank.log_weights
        weights = np.exp(logits - logits.max(1, keepdims=True))
        return np.einsum("ki,jki->kj", weights / weights.sum(1, keepdims=True), self.bank.gain)


def jackknife_interval(dual: Reweighted, level: float = 0.95) -> Intervals:
    """Student's intervals (K - 1) from the multipliers solved without each of the K prompts.

    A multiplier's standard error is the jackknife's (Efron and Stein 1981). The margin on new prompts is the mean over
    prompts of what the multiplier solved without a prompt gains on it; what the whole bank's own multiplier gains there
    is nearer to the request than it will be elsewhere. The bias of few responses per prompt is not covered.
    """
    size, bank = dual.size, dual.bank
    if size < FEWEST_LEFT_OUT or not np.isfinite(dual.without_each).all():
        return Intervals("jackknife", level, *_unknown(bank))
    width = stats.t.ppf(0.5 + level / 2.0, size - 1)
    error = width * np.sqrt((size - 1) * dual.without_each.var(0))
    margin, spread = dual.gains_elsewhere.mean(0), width * dual.gains_elsewhere.std(0, ddof=1) / np.sqrt(size)
    multipliers = _pairs(bank, np.maximum(dual.whole.multipliers - error, 0.0), dual.whole.multipliers + error)
    return Intervals("jackknife", level, multipliers, _pairs(bank, margin - spread, margin + spread))


def bootstrap_interval(dual: Reweighted, resamples: int = 200, level: float = 0.95, seed: int = 0) -> Intervals:
    """Expanded percentile intervals over resampled prompts, each resample solved on from one shared Newton step.

    The percentiles are those that make the interval of a mean Student's (Hesterberg 2015, section 4.1): a resample of K
    prompts varies too little, by K / (K - 1), and its percentiles are a normal law's. The margin's interval is of
    resampled `Reweighted.gains_elsewhere`.
    """
    size, bank = dual.size, dual.bank
    if size < FEWEST_RESAMPLED:
        return Intervals("bootstrap", level, *_unknown(bank))
    draws = np.random.default_rng(seed).multinomial(size, np.full(size, 1.0 / size), resamples) / size
    found = np.array([dual.multipliers(share) for share in draws])
    tail = stats.norm.cdf(stats.t.ppf(0.5 - level / 2.0, size - 1) * np.sqrt(size / (size - 1)))
    low, high = np.quantile(found, [tail, 1.0 - tail], axis=0, method="inverted_cdf")  # interpolated, inf - inf
    least, most = np.quantile(draws @ dual.gains_elsewhere, [tail, 1.0 - tail], axis=0)
    attained = _pairs(bank, np.nan_to_num(least, nan=-np.inf), np.nan_to_num(most, nan=np.inf))
    unreachable = int(np.isinf(found[:, 0]).sum())
    return Intervals("bootstrap", level, _pairs(bank, low, high), attained, resamples, unreachable)


def _unknown(bank: Bank) -> tuple[dict[str, tuple[float, float]], dict[str, tuple[float, float]]]:
    least, most = np.zeros(len(bank.names)), np.full(len(bank.names), np.inf)
    return _pairs(bank, least, most), _pairs(bank, -most, most)
