"""Intervals of what is not a mean: tail means, quantiles, and rates in small cells."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from scipy import stats as scipy_stats

from alignbench.errors import ConfigError, DataError
from alignbench.report.stats import (
    FEWEST_PROMPTS,
    NO_SPREAD,
    Estimate,
    FloatArray,
    Sample,
    check_settings,
    cvar,
    tail_means,
    too_few,
    wilson,
)

__all__ = [
    "FEWEST_TAIL_PROMPTS",
    "cell_rates",
    "cvar_interval",
    "intraclass_correlation",
    "quantile_interval",
    "rate_interval",
]

FEWEST_TAIL_PROMPTS = 6
"""Below so many prompts beyond the tail's border there is no interval: simulated ones missed their level."""

TAIL_METHOD = "clustered influence, Student t of the tail's prompts"
TOO_FEW = f"fewer than {FEWEST_TAIL_PROMPTS} prompts in the tail: no interval"
QUANTILE_METHOD = "Woodruff, clustered"
CELL_METHOD = "wilson, clustered"


def cvar_interval(
    values: npt.ArrayLike,
    clusters: npt.ArrayLike,
    tail: float,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int,
) -> Estimate:
    """The mean of the largest ``1 - tail`` share of the values, with an interval clustered by prompt.

    A tail mean rests on about ``k (1 - tail)`` of k prompts, and bootstrap percentiles of it are too short. This is the
    estimate less its bootstrap bias, plus and minus Student's quantile with one degree of freedom per prompt in the
    tail (less one) times the standard error of its influence function ``q + (v - q)_+ / (1 - tail)`` summed by prompt
    (Manistre and Hancock 2005, "Variance of the CTE estimator"), moved up by the skewness of those sums (Johnson 1978,
    "Modified t tests and confidence intervals for asymmetrical populations"): heavy tails were covered too seldom.

    Args:
        values: One number per response, shape (n,), finite; large is bad.
        clusters: The prompt of each, shape (n,).
        tail: In [0, 1); 0.9 is the worst tenth.
        level: Two-sided coverage.
        resamples: Bootstrap draws, for the bias.
        seed: Of the draws.

    Returns:
        ``mean`` is the plain tail mean. The interval is NaN where fewer than `FEWEST_TAIL_PROMPTS` prompts are expected
        beyond the border, and ``method`` says so.

    Raises:
        DataError: No rows, rows that are not finite, or lengths that differ.
        ConfigError: A level out of range.
    """
    check_settings(level, resamples)
    sample = Sample.read(values, clusters, "values")
    point = cvar(sample.values, tail)
    nothing = Estimate(point, math.nan, math.nan, sample.n, sample.k, level, too_few(sample.k))
    if sample.k < FEWEST_PROMPTS:
        return nothing
    if np.ptp(sample.values) == 0.0:
        return replace(nothing, low=point, high=point, method=NO_SPREAD)
    prompts = sample.k * (1.0 - tail)
    if prompts < FEWEST_TAIL_PROMPTS:
        return replace(nothing, method=TOO_FEW)
    border = float(np.quantile(sample.values, tail))
    influence = border + np.maximum(sample.values - border, 0.0) / (1.0 - tail) - point
    error = _clustered_error(influence, sample)
    bias = float(np.mean(tail_means(sample, tail, resamples, seed))) - point
    reach = float(scipy_stats.t.ppf(0.5 + level / 2, df=prompts - 1)) * error
    centre = point - bias + _skewness_shift(influence, sample)
    low, high = centre - reach, centre + reach
    # bias and skewness move the interval's ends only: the mean is what the formula of the tail mean says
    return replace(nothing, low=min(low, point), high=max(high, point), method=TAIL_METHOD)


def quantile_interval(values: npt.ArrayLike, clusters: npt.ArrayLike, share: float, *, level: float = 0.95) -> Estimate:
    """A quantile of the pooled values, linearly interpolated, with an interval clustered by prompt.

    The interval is that of the share of values up to the quantile (Wilson's, at the effective number of responses that
    the clustered standard error implies), read off the sample as quantiles (Woodruff 1952).

    Args:
        values: One number per response, shape (n,), finite.
        clusters: The prompt of each, shape (n,).
        share: In (0, 1).
        level: Two-sided coverage.

    Returns:
        The estimate; its interval is NaN for a single prompt, and where the quantile's upper or lower share holds less
        than `FEWEST_TAIL_PROMPTS` prompts.

    Raises:
        DataError: No rows, rows that are not finite, or lengths that differ.
        ConfigError: The level or the share is out of range.
    """
    check_settings(level, resamples=1)
    if not 0.0 < share < 1.0:
        raise ConfigError(f"quantile {share}", where="quantile_interval", mend="choose it in (0, 1)")
    sample = Sample.read(values, clusters, "values")
    point = float(np.quantile(sample.values, share))
    nothing = Estimate(point, math.nan, math.nan, sample.n, sample.k, level, too_few(sample.k))
    if sample.k < FEWEST_PROMPTS:
        return nothing
    if np.ptp(sample.values) == 0.0:
        return replace(nothing, low=point, high=point, method=NO_SPREAD)
    if sample.k * min(share, 1.0 - share) < FEWEST_TAIL_PROMPTS:
        return replace(nothing, method=TOO_FEW)
    # a step function at a tie: the share below and half of the share at the point
    upto = (sample.values < point) + 0.5 * (sample.values == point)
    error = _clustered_error(upto - upto.mean(), sample)
    effective = share * (1.0 - share) / error**2 if error > 0.0 else float(sample.k)
    # Student's quantile in place of the normal one: the error's own error is that of the few prompts in the tail
    few = 2.0 * sample.k * min(share, 1.0 - share)
    widened = (scipy_stats.norm.ppf(0.5 + level / 2) / scipy_stats.t.ppf(0.5 + level / 2, df=few)) ** 2
    effective = max(1.0, min(effective, float(sample.n)) * float(widened))
    shares = wilson(share * effective, effective, level)
    low, high = np.quantile(sample.values, [shares.low, shares.high])
    return replace(nothing, low=float(low), high=float(high), method=QUANTILE_METHOD)


def rate_interval(values: npt.ArrayLike, clusters: npt.ArrayLike, *, level: float = 0.95) -> Estimate:
    """The mean of numbers between 0 and 1 (wins with ties half, hits, shares), with an interval clustered by prompt.

    Wilson's, at the number of independent coin throws that would know the mean as well: responses to one prompt count
    by their correlation as in `cell_rates`, and values between 0 and 1 vary less than a coin of that mean. Where this
    number is estimated Student's quantile stands in place of the normal one. Near 0 and 1, where resampled prompts are
    often all alike, it holds its level (`tests/report/test_tails.py`), and it stays in [0, 1].

    Args:
        values: In [0, 1], shape (n,).
        clusters: The prompt of each, shape (n,).
        level: Two-sided coverage.

    Returns:
        The estimate; its interval is NaN below `report.stats.FEWEST_PROMPTS` prompts.

    Raises:
        DataError: No rows, rows that are not finite or outside [0, 1], or lengths that differ.
        ConfigError: The level is out of range.
    """
    check_settings(level, resamples=1)
    sample = Sample.read(values, clusters, "values")
    outside = (sample.values < 0.0) | (sample.values > 1.0)
    if outside.any():
        raise DataError(
            f"{int(outside.sum())} of {sample.n} values are outside [0, 1]",
            where="rate_interval",
            mend="use cluster_bootstrap for a mean of other numbers",
        )
    mean = float(sample.values.mean())
    if sample.k < FEWEST_PROMPTS:
        return Estimate(mean, math.nan, math.nan, sample.n, sample.k, level, too_few(sample.k))
    sizes = np.bincount(sample.index)
    correlation = intraclass_correlation(sample, np.zeros(sample.n, dtype=np.intp))
    effective = float(np.sum(sizes / (1.0 + (sizes - 1.0) * correlation)))
    variance = float(np.mean((sample.values - mean) ** 2))
    coins = bool(np.isin(sample.values, (0.0, 1.0)).all())
    if not coins and variance == 0.0:  # nothing but ties: a policy against itself
        return Estimate(mean, mean, mean, sample.n, sample.k, level, NO_SPREAD)
    if not coins:
        effective *= mean * (1.0 - mean) / variance
    if not coins or sample.n > sample.k:
        normal, student = scipy_stats.norm.ppf(0.5 + level / 2), scipy_stats.t.ppf(0.5 + level / 2, df=sample.k - 1)
        effective *= float(normal / student) ** 2
    found = wilson(mean * effective, effective, level)
    return replace(found, mean=mean, n=sample.n, clusters=sample.k, method=CELL_METHOD)


def cell_rates(
    values: npt.ArrayLike, clusters: npt.ArrayLike, cells: npt.ArrayLike, *, level: float = 0.95
) -> dict[str, Estimate]:
    """The rate in each cell, with Wilson's interval at the effective number of independent responses.

    Several responses to one prompt agree more than responses to different prompts. Their correlation within a prompt
    is estimated over all cells together (a cell alone is too small) and turns the m responses of a prompt into
    ``m / (1 + (m - 1) correlation)`` independent ones.

    Args:
        values: 0 or 1 per response, shape (n,).
        clusters: The prompt of each, shape (n,); every prompt lies in one cell.
        cells: The cell of each, shape (n,), strings.
        level: Two-sided coverage.

    Returns:
        By cell, sorted by name.

    Raises:
        DataError: No rows, rows that are not finite, or lengths that differ.
        ConfigError: The level is out of range.
    """
    sample, labels = Sample.read(values, clusters, "values"), np.asarray(cells)
    names, cell = np.unique(labels, return_inverse=True)
    correlation = intraclass_correlation(sample, cell)
    found = {}
    for i, name in enumerate(names):
        where = cell == i
        sizes = np.bincount(sample.index[where])
        sizes = sizes[sizes > 0]
        effective = float(np.sum(sizes / (1.0 + (sizes - 1.0) * correlation)))
        rate = float(sample.values[where].mean())
        found[str(name)] = replace(
            wilson(rate * effective, effective, level), n=int(where.sum()), clusters=len(sizes), method=CELL_METHOD
        )
    return found


def intraclass_correlation(sample: Sample, cell: npt.NDArray[np.intp]) -> float:
    """Correlation of two responses to one prompt around their cell's mean, in [0, 1] (one-way analysis of variance).

    Args:
        sample: Values by prompt.
        cell: Index of each row's cell, shape (n,).

    Returns:
        1, the cautious end, where it cannot be known: one response per prompt, or no variation at all.
    """
    n, k, groups = sample.n, sample.k, len(np.unique(cell))
    if n == k or k == groups:
        return 1.0
    sizes = np.bincount(sample.index)
    means = np.bincount(cell, weights=sample.values) / np.bincount(cell)
    residual = sample.values - means[cell]
    of_prompt = np.bincount(sample.index, weights=residual) / sizes
    between = float(sizes @ of_prompt**2) / (k - groups)
    within = float(np.sum((residual - of_prompt[sample.index]) ** 2)) / (n - k)
    size = (n - float(sizes @ sizes) / n) / (k - 1)
    total = between + (size - 1.0) * within
    return 1.0 if total == 0.0 else min(max((between - within) / total, 0.0), 1.0)


def _skewness_shift(influence: FloatArray, sample: Sample) -> float:
    """Johnson's shift of a mean's interval, third moment over six variances and k, of the prompts' sums."""
    sums = np.bincount(sample.index, weights=influence)
    variance = float(np.mean(sums**2))
    # the mean of all rows is k / n times the mean of the prompts' sums
    return float(np.mean(sums**3)) / (6.0 * variance * sample.k) * sample.k / sample.n if variance > 0.0 else 0.0


def _clustered_error(influence: FloatArray, sample: Sample) -> float:
    """Standard error of a mean of terms that sum to about zero, clustered by prompt."""
    sums = np.bincount(sample.index, weights=influence)
    return math.sqrt(float(sums @ sums) * sample.k / (sample.k - 1)) / sample.n
