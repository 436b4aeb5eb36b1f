"""Means over seeds and prompts: several trained policies that answer the same prompts.

Each number is ``x[s, k] = mean + seed_s + prompt_k + rest_sk``: a seed moves all prompts of its run together, and a
prompt is hard or easy for every seed. Both were drawn from a population, and they are crossed. Resampling prompts
within each resampled seed (the usual hierarchical bootstrap) treats the prompts of different seeds as different ones
and is too short where prompts matter; resampling both at once (Owen 2007, the pigeonhole bootstrap) counts the rest
three times and is too long where answers are noisy; both shorten the seeds' part by (S - 1) / S, a third for three
seeds. From three seeds on the interval here adds the two levels' variances up instead; in place of Student's
quantile stands the geometric mean of those of both levels, weighted by their share of the variance (p-values, which
are corrected for many tests, take a longer one: `safe_reach`). One or two seeds
say nothing about other seeds, so the interval is that of the prompts (a clustered bootstrap) for the seeds that are
there, and its method says so.

Coverage of the nominal 95 % interval in percent, smallest and largest over normal values with standard deviations of
seeds 0 to 0.6, of prompts 0 to 0.7 and of the rest 0.3 and 0.7::

    seeds                         3           4           5           8
    16 prompts               93.1 - 97.1 94.6 - 96.8 95.0 - 96.8
    64 prompts               93.4 - 96.7 94.6 - 96.7 94.8 - 96.7 94.9 - 97.0
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats as scipy_stats
from scipy.optimize import brentq
from scipy.special import stdtrit

from alignbench.errors import DataError
from alignbench.report.stats import (
    BOOTSTRAP,
    FEWEST_PROMPTS,
    NO_SPREAD,
    Estimate,
    FloatArray,
    cluster_bootstrap,
    too_few,
)

__all__ = ["Crossed", "all_pairs_reach", "cross", "holm", "safe_reach"]

CROSSED = "seeds x prompts, both levels"
PROMPTS_ONLY = "these seeds; prompt-clustered bootstrap"
FEWEST_SEEDS = 3
# Share of the rest's mean square that is taken off the seeds' and the prompts' before they are added. Subtracting it
# once in all is unbiased; a little less keeps the interval from being too short where the seeds happen to agree.
_OFF_SEEDS, _OFF_PROMPTS = 0.2, 0.5


@dataclass(frozen=True)
class Crossed:
    """A mean over seeds and prompts, with the two parts of its error.

    Attributes:
        mean: The estimate.
        parts: (variance, degrees of freedom) of the error due to prompts and, from three seeds on, due to seeds; empty
            for too few prompts.
        between_seeds: Standard deviation between seeds that prompts and answers do not explain; None for one seed.
        values: ``x[s, k]``, shape (seeds, prompts).
    """

    mean: float
    parts: tuple[tuple[float, float], ...]
    between_seeds: float | None
    values: FloatArray

    @property
    def seeds(self) -> int:
        """Trained policies behind it."""
        return int(self.values.shape[0])

    @property
    def prompts(self) -> int:
        """Prompts that each of them answered."""
        return int(self.values.shape[1])

    @property
    def error(self) -> float:
        """Standard error; NaN for too few prompts."""
        return math.sqrt(sum(variance for variance, _ in self.parts)) if self.parts else math.nan

    def interval(self, level: float, *, n: int = 0, resamples: int = 2000, seed: int = 0) -> Estimate:
        """The two-sided interval.

        Args:
            level: Coverage; a lower bound with confidence 1 - delta is ``low`` at 1 - 2 delta.
            n: Responses behind it.
            resamples: Bootstrap draws, for one or two seeds.
            seed: Of those draws.
        """
        if self.seeds < FEWEST_SEEDS and self.parts:
            of_prompts = self.values.mean(axis=0)
            found = cluster_bootstrap(of_prompts, np.arange(self.prompts), level=level, resamples=resamples, seed=seed)
            return replace(found, mean=self.mean, n=n, method=found.method.replace(BOOTSTRAP, PROMPTS_ONLY))
        nothing = Estimate(self.mean, math.nan, math.nan, n, self.prompts, level, too_few(self.prompts))
        if not self.parts:
            return nothing
        if self.error == 0.0:
            return replace(nothing, low=self.mean, high=self.mean, method=NO_SPREAD)
        reach = self.reach(lambda df: float(stdtrit(df, 0.5 + level / 2)))
        return replace(nothing, low=self.mean - reach, high=self.mean + reach, method=CROSSED)

    def reach(self, quantile: Callable[[float], float]) -> float:
        """Half an interval's length: the standard error times the parts' quantiles' weighted geometric mean."""
        parts = [(variance, float(quantile(df))) for variance, df in self.parts if variance > 0.0]
        if not parts or min(q for _, q in parts) <= 0.0:
            return 0.0
        total = sum(variance for variance, _ in parts)
        return math.exp(sum(v * math.log(q) for v, q in parts) / total) * math.sqrt(total)

    @property
    def p_value(self) -> float:
        """Two-sided, of a mean of zero, by `safe_reach`, since it is corrected for many tests; NaN without an error."""
        if not self.parts:
            return math.nan
        if self.error == 0.0:
            return 1.0 if self.mean == 0.0 else 0.0

        def beyond(p: float) -> float:
            return safe_reach(self.parts, p / 2) - abs(self.mean)

        smallest = 1e-12
        return smallest if beyond(smallest) < 0 else float(brentq(beyond, smallest, 1.0, xtol=1e-13))


def safe_reach(parts: Sequence[tuple[float, float]], p: float) -> float:
    """How far a mean is from the truth, on one side, with a chance of at most about `p`, however small.

    Student's quantiles of the parts are averaged as squares (Cochran 1964), which is never shorter than
    `Crossed.reach`: far out, where corrections for many tests look, the geometric mean is too short.

    Args:
        parts: (variance, degrees of freedom) of each part of the error.
        p: In (0, 1/2].
    """
    return math.sqrt(sum(float(stdtrit(df, p)) ** 2 * variance for variance, df in parts))


def cross(values: FloatArray) -> Crossed:
    """The mean of ``x[s, k]`` with the error of crossed random seeds and prompts (module's docstring).

    Args:
        values: Shape (seeds, prompts), finite; the same prompts in every row.

    Raises:
        DataError: No values, or values that are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise DataError(f"values of shape {values.shape}", where="cross", mend="give (seeds, prompts), none of them 0")
    if not np.isfinite(values).all():
        raise DataError(
            f"{int((~np.isfinite(values)).sum())} of {values.size} values are not finite",
            where="cross",
            mend="leave the metric out for this method, and say so",
        )
    seeds, prompts = values.shape
    # measured from the first value: equal values then have no spread, without rounding
    origin = float(values[0, 0])
    centred = values - origin
    mean = float(centred.mean())
    if prompts < FEWEST_PROMPTS:
        return Crossed(origin + mean, (), None, values)
    by_prompt = centred.mean(axis=0) - mean
    of_prompts = seeds * float(by_prompt @ by_prompt) / (prompts - 1)
    if seeds == 1:
        return Crossed(origin + mean, ((of_prompts / prompts, prompts - 1.0),), None, values)
    by_seed = centred.mean(axis=1) - mean
    rest = centred - mean - by_seed[:, None] - by_prompt
    of_seeds = prompts * float(by_seed @ by_seed) / (seeds - 1)
    of_rest = float(np.sum(rest * rest)) / ((seeds - 1) * (prompts - 1))
    between = math.sqrt(max(of_seeds - of_rest, 0.0) / prompts)
    count = seeds * prompts
    if seeds < FEWEST_SEEDS:
        return Crossed(origin + mean, ((of_prompts / count, prompts - 1.0),), between, values)
    parts = (
        (max(of_prompts - _OFF_PROMPTS * of_rest, 0.0) / count, prompts - 1.0),
        (max(of_seeds - _OFF_SEEDS * of_rest, 0.0) / count, seeds - 1.0),
    )
    return Crossed(origin + mean, parts, between, values)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family, valid under any dependence (Holm 1979); NaN stays NaN and counts for none."""
    p = np.asarray(p_values, dtype=np.float64)
    known = np.flatnonzero(~np.isnan(p))
    adjusted = np.full(len(p), math.nan)
    order = known[np.argsort(p[known], kind="stable")]
    steps = p[order] * (len(order) - np.arange(len(order)))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else []
    return [float(value) for value in adjusted]


def all_pairs_reach(difference: Crossed, methods: int, level: float) -> float:
    """Half the length of an interval that holds for all pairs of `methods` at once.

    The studentized range in Student's place (Tukey; with each pair's own error and degrees of freedom, Games and Howell
    1976), so that the pair may be chosen after looking: which method is best is known only from the numbers.

    Args:
        difference: Of the pair.
        methods: Of the comparison, at least 2.
        level: Simultaneous coverage.
    """

    def quantile(df: float) -> float:
        # beyond so many degrees of freedom the studentized range no longer moves, and its integral gets slow
        return _studentized_range(level, methods, min(df, 1000.0)) / math.sqrt(2.0)

    return difference.reach(quantile)


@functools.cache
def _studentized_range(level: float, methods: int, df: float) -> float:
    return float(scipy_stats.studentized_range.ppf(level, methods, df))
