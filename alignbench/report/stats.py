"""Prompt-clustered intervals and the small statistics of the tables.

Several responses to one prompt are not independent: the prompt's difficulty is common to them. The unit that
is drawn from a population is the prompt, so every interval here resamples prompts, each with all its
responses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats as scipy_stats

from alignbench.errors import ConfigError, DataError

__all__ = [
    "Estimate",
    "cluster_bootstrap",
    "cvar",
    "interval_of",
    "paired_difference",
    "quantiles",
    "wilson",
    "win_rate",
]

FloatArray = npt.NDArray[np.float64]
Statistic = Callable[[FloatArray], FloatArray]

# resample counts held at once: 2 million numbers are about 50 MB with their working copies
_CHUNK = 2_000_000

BOOTSTRAP = "cluster bootstrap, studentised"
BCA = "cluster bootstrap, expanded BCa"
NO_INTERVAL = "one cluster: no interval"
NO_SPREAD = "all prompts alike: width 0 is no confidence"
FEWEST_PROMPTS = 5
"""Below so many prompts there is no interval: their spread says too little of other prompts'."""
MAY_BE_SHORT = "; may be too short: one prompt makes half of the variance"
FEW_PROMPTS = f"fewer than {FEWEST_PROMPTS} prompts: no interval"

# share of the spread, per prompt, that is added to each resample's: one that drew almost the same value everywhere
# has hardly any of its own, and dividing by it would make the interval endless
_STEADY = 0.5
# prompts from which on one that makes half of the variance is a heavy tail, and not mere chance
_ENOUGH_TO_TELL = 16


@dataclass(frozen=True)
class Estimate:
    """A point estimate with its interval.

    Attributes:
        mean: The point estimate (of whichever statistic was asked for), in the values' units.
        low: Lower end of the two-sided interval; NaN where there is none.
        high: Upper end; NaN where there is none.
        n: Samples (responses) behind it; for a paired difference those of both sides.
        clusters: Prompts behind it, the number that governs the interval's width.
        level: Nominal two-sided coverage.
        method: How the interval was made, or why there is none.
    """

    mean: float
    low: float
    high: float
    n: int
    clusters: int
    level: float = 0.95
    method: str = BOOTSTRAP

    def to_dict(self) -> dict[str, float | int | str | None]:
        """The fields for a JSON record; an absent interval is ``None``, since JSON has no NaN."""
        return {
            "mean": self.mean,
            "low": None if math.isnan(self.low) else self.low,
            "high": None if math.isnan(self.high) else self.high,
            "n": self.n,
            "clusters": self.clusters,
            "level": self.level,
            "method": self.method,
        }


def cluster_bootstrap(
    values: npt.ArrayLike, clusters: npt.ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int
) -> Estimate:
    """The mean of all responses with an interval that respects their clustering by prompt.

    Prompts are drawn with replacement, each with all its responses (the mean is a ratio of sums, so a prompt weighs as
    its number of responses). Of each draw the deviation of its mean in units of its own standard error is taken, and
    the quantiles of these studentised deviations take the place of Student's (Efron 1982, the bootstrap-t; Hall 1988:
    right to the second order, so it follows skewness, where plain percentiles and Student's interval are one-sided).

    Measured coverage of the nominal 95 % interval, in percent (`tests/report/test_coverage.py`; four responses per
    prompt, correlation 0.5 within a prompt)::

        prompts                        5     8    16    32    64   128
        normal                        95    95    95    95    95    95
        Student's t, 5 degrees        95    95    95    94    94    94
        Student's t, 3 degrees        95    95    94    93    94    94
        exponential                   93    94    95    95    94    96
        log-normal, sigma 0.5         94    94    94    94    94    95
        log-normal, sigma 1           90    92    93    93    94    94

    Below 16 prompts it is too short for values as skewed as the last. From 16 on, where one prompt makes more than half
    of the variance, ``method`` ends in `MAY_BE_SHORT` and tables mark the interval with (!).

    A rate near 0 or 1 is no case for it: where all prompts agree the interval has width 0 and ``method`` says so. Take
    `report.tails.rate_interval` for numbers between 0 and 1.

    "Feasible with confidence 1 - delta" is ``low`` at ``level = 1 - 2 delta``.

    Args:
        values: One number per response, shape ``(n,)``, finite.
        clusters: The prompt each response answers, shape ``(n,)``; integers or strings.
        level: Two-sided coverage, in (0, 1).
        resamples: Bootstrap draws.
        seed: Of this interval's own generator, so that it depends on nothing computed before.

    Returns:
        The estimate; with less than `FEWEST_PROMPTS` prompts its interval is NaN and ``method`` says so, with equal
        values everywhere its interval is the point and ``method`` is ``NO_SPREAD``.

    Raises:
        DataError: No rows, rows that are not finite, or values and clusters of different lengths.
        ConfigError: A level or number of resamples out of range.
    """
    check_settings(level, resamples)
    sample = Sample.read(values, clusters, "values")
    point, influence = _mean_and_influence(sample)
    return _studentised(point, influence, level, resamples, seed, sample.n)


def paired_difference(
    values_a: npt.ArrayLike,
    clusters_a: npt.ArrayLike,
    values_b: npt.ArrayLike,
    clusters_b: npt.ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int,
) -> Estimate:
    """Estimate ``mean(a) - mean(b)``, resampling the same prompts for both sides.

    What the prompts contribute to both sides cancels, so the interval is shorter than that of two separate
    ones, and "does A differ from B" is read from it and not from whether two intervals overlap. Rows need no
    common order and the sides may have different numbers of responses per prompt; the interval is that of
    ``cluster_bootstrap``.

    Args:
        values_a: Shape ``(n_a,)``, finite.
        clusters_a: Prompt of each row of a, shape ``(n_a,)``.
        values_b: Shape ``(n_b,)``, finite.
        clusters_b: Prompt of each row of b, shape ``(n_b,)``; the same set of prompts as a's.
        level: Two-sided coverage, in (0, 1).
        resamples: Bootstrap draws.
        seed: Of this interval's own generator.

    Raises:
        DataError: As ``cluster_bootstrap``, or the two sides do not answer the same prompts.
        ConfigError: As ``cluster_bootstrap``.
    """
    check_settings(level, resamples)
    a = Sample.read(values_a, clusters_a, "values_a")
    b = Sample.read(values_b, clusters_b, "values_b")
    _require_same_prompts(a, b)
    (of_a, own), (of_b, other) = _mean_and_influence(a), _mean_and_influence(b)
    return _studentised(of_a - of_b, own - other, level, resamples, seed, a.n + b.n)


def interval_of(point: float, draws: npt.ArrayLike, *, level: float, n: int, clusters: int) -> Estimate:
    """The interval of a statistic that is no mean, from resamples of the prompts that the caller has made.

    Bias-corrected and accelerated (Efron 1987, BCa; the acceleration is a sixth of the draws' skewness), *expanded*:
    Student's quantile with k - 1 degrees of freedom times ``sqrt(k / (k - 1))`` stands where the normal quantile was,
    since plain percentiles are too short for few prompts k (Hesterberg 2015, arXiv 1411.5279).

    Args:
        point: The statistic of the whole sample.
        draws: The statistic of each resample of the prompts, shape ``(resamples,)``, finite.
        level: Two-sided coverage, in (0, 1).
        n: Samples behind it.
        clusters: Prompts behind it.
    """
    check_settings(level, resamples=1)
    return _estimate(point, _finite(draws, "draws"), level, n, clusters)


def cvar(values: npt.ArrayLike, level: float) -> float:
    """Conditional value at risk: the mean of the largest ``1 - level`` share of the values.

    The upper tail is the bad one, so pass *costs*. A value on the border counts with the fraction that fills
    the share (Rockafellar and Uryasev 2000), hence no jump when one row is added.

    Args:
        values: Shape ``(n,)``, finite.
        level: In [0, 1); 0 gives the mean, 0.9 the mean of the worst tenth.

    Raises:
        DataError: No rows, or rows that are not finite.
        ConfigError: The level is out of range.
    """
    array = _finite(values, "values")
    sample = Sample(array, np.arange(len(array)), np.arange(len(array)))
    if not 0.0 <= level < 1.0:
        raise ConfigError(f"tail level {level}", where="cvar", mend="choose it in [0, 1)")
    return float(_cvar_of(sample, level)(np.ones((1, sample.k)))[0])


def quantiles(values: npt.ArrayLike, levels: Sequence[float]) -> dict[float, float]:
    """Quantiles of the pooled values by level, linearly interpolated.

    Args:
        values: Shape ``(n,)``, finite.
        levels: Each in [0, 1].

    Raises:
        DataError: No rows, or rows that are not finite.
        ConfigError: A level is out of range.
    """
    array = _finite(values, "values")
    for level in levels:
        if not 0.0 <= level <= 1.0:
            raise ConfigError(f"quantile level {level}", where="quantiles", mend="choose levels in [0, 1]")
    return {float(level): float(np.quantile(array, level)) for level in levels}


def wilson(successes: float, n: float, level: float = 0.95) -> Estimate:
    """Wilson score interval of a rate, for small cells (safe rate by harm category).

    It holds for *independent* trials, and unlike a bootstrap it stays honest at 0 or n successes. With
    several responses per prompt pass the sum of per-prompt rates as ``successes`` and the number of prompts
    as ``n`` (which errs on the wide side).

    Source: Wilson (1927), without continuity correction.

    Args:
        successes: Between 0 and ``n``; fractions are allowed, for per-prompt rates and ties counted half.
        n: Trials, >= 1; a fraction is an effective number of them.
        level: Two-sided coverage, in (0, 1).

    Raises:
        DataError: ``n`` is below 1, or ``successes`` is outside [0, n].
        ConfigError: The level is out of range.
    """
    check_settings(level, resamples=1)
    if n < 1:
        raise DataError(f"a rate of {n} trials", where="wilson", mend="leave empty cells out of the table")
    if not 0.0 <= successes <= n:
        raise DataError(f"{successes} successes in {n} trials", where="wilson", mend="count successes among the trials")
    z2 = float(scipy_stats.norm.ppf(0.5 + level / 2)) ** 2
    rate = successes / n
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # at 0 and n successes the formula's end is exactly 0 and 1, up to rounding that must not leave [0, 1]
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Estimate(rate, low, high, int(n), int(n), level, "wilson")


def win_rate(a: npt.ArrayLike, b: npt.ArrayLike) -> FloatArray:
    """Per-sample wins of a over b: 1 where ``a > b``, 0.5 on a tie, 0 otherwise.

    Give the result to ``cluster_bootstrap`` for the rate and its interval.

    Args:
        a: Scores, shape ``(n,)``; larger wins.
        b: Scores of the matched responses, shape ``(n,)``.

    Returns:
        Shape ``(n,)``. A NaN score (a judge's unreadable answer) gives NaN, never a loss or a tie: drop those
        rows and report their number.

    Raises:
        DataError: Different lengths.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.shape != right.shape:
        raise DataError(
            f"scores of shapes {left.shape} and {right.shape}", where="win_rate", mend="match the rows first"
        )
    # compared rather than subtracted: two infinite scores tie
    wins = 0.5 + 0.5 * (left > right) - 0.5 * (left < right)
    return np.where(np.isnan(left) | np.isnan(right), np.nan, wins)


@dataclass(frozen=True)
class Sample:
    """Values with the index of the prompt each belongs to, ``names[index]``."""

    values: FloatArray
    index: npt.NDArray[np.intp]
    names: npt.NDArray[Any]

    @classmethod
    def read(cls, values: npt.ArrayLike, clusters: npt.ArrayLike, argument: str) -> Sample:
        array, labels = _finite(values, argument), np.asarray(clusters)
        if labels.shape != array.shape:
            raise DataError(
                f"{array.shape[0]} values and clusters of shape {labels.shape}",
                where=argument,
                mend="give the prompt of every row",
            )
        names, index = np.unique(labels, return_inverse=True)
        return cls(array, index, names)

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def k(self) -> int:
        return len(self.names)


def _finite(values: npt.ArrayLike, argument: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise DataError(
            f"{argument} has shape {array.shape}", where=argument, mend="give one number per row, shape (n,)"
        )
    if array.size == 0:
        raise DataError(f"{argument} is empty", where=argument, mend="score at least one response")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise DataError(
            f"{bad.size} of {array.size} rows are not finite (first: row {bad[0]}, {array[bad[0]]})",
            where=argument,
            mend="drop rows that could not be scored and report their number",
        )
    return array


def _mean_and_influence(sample: Sample) -> tuple[float, FloatArray]:
    """The mean of all rows, and what each prompt adds to it times k, shape (k,); they sum to zero."""
    # measured from the first value: equal values then have no influence at all, without rounding
    origin = float(sample.values[0])
    sums = np.bincount(sample.index, weights=sample.values - origin)
    mean = float(sums.sum()) / sample.n
    sizes = np.bincount(sample.index)
    return origin + mean, (sums - mean * sizes) * (sample.k / sample.n)


def _studentised(point: float, influence: FloatArray, level: float, resamples: int, seed: int, n: int) -> Estimate:
    k = len(influence)
    if k < FEWEST_PROMPTS:
        return Estimate(point, math.nan, math.nan, n, k, level, too_few(k))
    spread = math.sqrt(float(np.mean(influence**2)))
    # prompts that are alike up to rounding are alike
    if spread <= 1e-14 * max(1.0, abs(point)):
        return Estimate(point, point, point, n, k, level, NO_SPREAD)
    scaled = influence / spread
    moments = np.stack([scaled, scaled**2], axis=1) / k

    def deviation(counts: FloatArray) -> FloatArray:
        mean, square = (counts @ moments).T
        found: FloatArray = mean / np.sqrt(np.maximum(square - mean**2, 0.0) + _STEADY / k)
        return found

    draws = _bootstrap(k, resamples, seed, deviation, k)
    below, above = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    error = spread * math.sqrt((1.0 + _STEADY / k) * k / (k - 1))
    low, high = point - error * float(above), point - error * float(below)
    method = BOOTSTRAP
    if k >= _ENOUGH_TO_TELL and float(np.max(scaled**2)) > k / 2:
        method += MAY_BE_SHORT
    return Estimate(point, min(low, point), max(high, point), n, k, level, method)


def too_few(clusters: int) -> str:
    """Why there is no interval over so few prompts."""
    return NO_INTERVAL if clusters == 1 else FEW_PROMPTS


def _cvar_of(sample: Sample, tail: float) -> Statistic:
    order = np.argsort(-sample.values, kind="stable")
    origin = sample.values[0]
    shifted, index = (sample.values - origin)[order], sample.index[order]

    def tail_mean(counts: FloatArray) -> FloatArray:
        weights = counts[:, index]
        mass = (1.0 - tail) * weights.sum(axis=1, keepdims=True)
        filled = np.minimum(np.cumsum(weights, axis=1), mass)
        return origin + (np.diff(filled, axis=1, prepend=0.0) @ shifted) / mass[:, 0]

    return tail_mean


def tail_means(sample: Sample, tail: float, resamples: int, seed: int) -> FloatArray:
    """The tail mean of each resample of the prompts, shape ``(resamples,)``."""
    return _bootstrap(sample.k, resamples, seed, _cvar_of(sample, tail), sample.n)


def _bootstrap(k: int, resamples: int, seed: int, compute: Statistic, width: int) -> FloatArray:
    """The statistic of each resample of k prompts, in chunks of rows as wide as ``width`` numbers."""
    rows = max(1, _CHUNK // max(width, k))
    # many numbers of one evaluation or report are resampled alike: their counts are drawn once
    if resamples <= rows:
        return compute(_drawn(k, resamples, seed))
    rng, draws = np.random.default_rng(seed), np.empty(resamples)
    # the generator is read in order, so the chunk size never changes the draws
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        draws[start : start + size] = compute(_counts(rng, k, size))
    return draws


@functools.lru_cache(maxsize=4)
def _drawn(k: int, resamples: int, seed: int) -> FloatArray:
    counts = _counts(np.random.default_rng(seed), k, resamples)
    counts.setflags(write=False)
    return counts


def _counts(rng: np.random.Generator, k: int, size: int) -> FloatArray:
    """How often each of k prompts is drawn, shape (size, k)."""
    picks = rng.integers(0, k, size=(size, k)) + np.arange(size)[:, None] * k
    return np.bincount(picks.ravel(), minlength=size * k).reshape(size, k).astype(np.float64)


def _estimate(point: float, draws: FloatArray, level: float, n: int, k: int) -> Estimate:
    if k < FEWEST_PROMPTS:
        return Estimate(point, math.nan, math.nan, n, k, level, too_few(k))
    # compared rather than taken from the standard deviation, whose rounding is not always zero
    if np.ptp(draws) == 0.0:
        return Estimate(point, point, point, n, k, level, NO_SPREAD)
    low, high = _interval(draws, point, level, k)
    return Estimate(point, low, high, n, k, level, BCA)


def _interval(draws: FloatArray, point: float, level: float, k: int) -> tuple[float, float]:
    """Bias-corrected accelerated percentiles, with Student's quantile widened for the bootstrap's divisor."""
    spread = float(draws.std())
    # for smooth statistics a jackknife's acceleration is a sixth of the draws' skewness, which costs nothing
    # more
    acceleration = float(np.mean(((draws - draws.mean()) / spread) ** 3)) / 6.0
    below = float(np.mean(draws < point) + 0.5 * np.mean(draws == point))
    edge = 1.0 / (len(draws) + 1)
    bias = float(scipy_stats.norm.ppf(min(max(below, edge), 1.0 - edge)))
    reach = math.sqrt(k / (k - 1)) * float(scipy_stats.t.ppf(0.5 + level / 2, df=k - 1))
    shifted = [bias - reach, bias + reach]
    # with very few prompts the reach is so long that the denominator would pass zero and swap the two ends
    ends = [bias + end / max(1.0 - acceleration * end, 1e-6) for end in shifted]
    low, high = np.quantile(draws, scipy_stats.norm.cdf(ends))
    return float(low), float(high)


def _require_same_prompts(a: Sample, b: Sample) -> None:
    if np.array_equal(a.names, b.names):
        return
    only_a, only_b = np.setdiff1d(a.names, b.names), np.setdiff1d(b.names, a.names)
    raise DataError(
        f"the two sides do not answer the same prompts: {only_a.size} only in a {only_a[:3].tolist()}, "
        f"{only_b.size} only in b {only_b[:3].tolist()}",
        where="paired_difference",
        mend="evaluate both on the same prompts, or drop the others from both",
    )


def check_settings(level: float, resamples: int) -> None:
    if not 0.0 < level < 1.0:
        raise ConfigError(f"level is {level}", where="interval", mend="choose a coverage in (0, 1), such as 0.95")
    if resamples < 1:
        raise ConfigError(f"resamples is {resamples}", where="interval", mend="2000 is usual")
