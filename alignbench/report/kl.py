"""Estimates of the KL divergence from sequence log-ratios of sampled responses, besides their plain mean."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from alignbench.report.stats import BOOTSTRAP, Estimate, FloatArray, Sample, cluster_bootstrap

__all__ = ["k3", "k3_kl", "low_variance_kl"]

METHOD = "control variate, jackknife by prompt, studentised bootstrap"
WIDEST_K3 = 0.8
"""Largest standard deviation of the log-ratios, nats, at which k3 has an interval: beyond it, simulated ones missed."""
TOO_WIDE = f"log-ratios vary by more than {WIDEST_K3:g} nats: no interval of k3"


def k3(ratios: npt.ArrayLike) -> FloatArray:
    """Terms of the KL estimate ``x + exp(-x) - 1`` of sequence log-ratios, shape (n,); never negative, unbiased.

    Source: Schulman, "Approximating KL divergence" (2020), k3. ``exp(-x) - 1`` has mean zero under the policy. Near the
    reference its variance is far below that of the plain mean of x; for normal log-ratios they cross at a KL of 0.63
    nats, and beyond it k3 is the noisier one.

    Args:
        ratios: ``log pi(y|x) - log pi_ref(y|x)`` of whole responses drawn from pi at temperature 1 and top_p 1, nats.
    """
    x = np.asarray(ratios, dtype=np.float64)
    found: FloatArray = x + _control(x)
    return found


def k3_kl(
    ratios: npt.ArrayLike, clusters: npt.ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int
) -> Estimate:
    """The mean of `k3` with the interval of `cluster_bootstrap`, where it has one.

    The variance of ``exp(-x)`` grows as ``exp(s^2) - 1`` with the spread s of normal log-ratios, and most of it lies in
    responses that a few hundred do not hold: intervals cover 93 % at s = 0.7, 92 % at 1 and 80 % at 2, whatever the
    method (64 prompts, four responses each). So beyond `WIDEST_K3` there is the mean only, and ``method`` says why.

    Args:
        ratios: As for `k3`.
        clusters: Prompt of each response, shape (n,).
        level: Two-sided coverage.
        resamples: Bootstrap draws.
        seed: Of the draws.

    Raises:
        DataError: No rows, rows that are not finite, or lengths that differ.
        ConfigError: A level or number of resamples out of range.
    """
    found = cluster_bootstrap(k3(ratios), clusters, level=level, resamples=resamples, seed=seed)
    if float(np.std(np.asarray(ratios, dtype=np.float64))) <= WIDEST_K3:
        return found
    return replace(found, low=math.nan, high=math.nan, method=TOO_WIDE)


def low_variance_kl(
    ratios: npt.ArrayLike, clusters: npt.ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int
) -> Estimate:
    """The mean of ``x + c (exp(-x) - 1)`` with the c of least variance, and its interval.

    ``e = exp(-x) - 1`` is a control variate of mean zero (Glasserman 2003, section 4.1). The best c is
    ``s^2 / (exp(s^2) - 1)`` for normal x of variance s^2: 1 near the reference, which is k3, and 0 far from it, which
    is the plain mean. That of the sample's s^2 is taken, and the regression's ``-cov(x, e) / var(e)`` where it is
    smaller: one response that is far likelier under the reference lowers it. The regression's c alone, noisy where e is
    heavy-tailed, gave intervals of 82 to 92 % at 2 nats. What the choice of c biases, of the order of 1 / n, the
    jackknife over prompts takes off; so the estimate may fall below 0 by chance. The interval is that of
    `cluster_bootstrap` for the jackknife's pseudo-values.

    Measured (`tests/report/test_kl.py`), normal log-ratios, four responses per prompt: standard deviation as a share of
    the plain mean's, and coverage of the nominal 95 % interval in percent::

            KL, nats               0.05      0.25      0.50      0.85      1.28      2.00
        16 prompts         0.23, 95  0.48, 95  0.64, 94  0.77, 94  0.87, 94  0.95, 94
        64 prompts         0.22, 96  0.48, 93  0.65, 95  0.79, 94  0.88, 95  0.95, 94
        128 prompts        0.22, 95  0.47, 95  0.64, 94  0.78, 95  0.85, 94  0.96, 95

    A lower tail that falls off exponentially is covered too seldom (weights with a variance: 90 %; without, if it falls
    off more slowly than ``exp(2 x)``: 75 to 90 %), since most samples do not show how far e reaches. Where one prompt
    makes half of the variance, ``method`` ends in `report.stats.MAY_BE_SHORT`; its absence proves nothing.

    Arguments and errors are those of `k3_kl`.
    """
    sample = Sample.read(ratios, clusters, "ratios")
    x, e = sample.values, _control(sample.values)
    terms = np.stack([np.ones_like(x), x, e, e * e, x * e, x * x])
    sums = np.stack([np.bincount(sample.index, weights=row) for row in terms])
    total = sums.sum(axis=1, keepdims=True)
    if sample.k == 1 or np.ptp(x) == 0.0:
        pseudo = np.full(sample.k, float(_controlled(total)[0]))
    else:
        pseudo = sample.k * _controlled(total) - (sample.k - 1) * _controlled(total - sums)
    found = cluster_bootstrap(pseudo, np.arange(sample.k), level=level, resamples=resamples, seed=seed)
    return replace(found, n=sample.n, method=found.method.replace(BOOTSTRAP, METHOD))


def _control(ratios: FloatArray) -> FloatArray:
    """``exp(-x) - 1``, of mean zero under the policy."""
    # responses that are not the policy's own (another temperature) may be likelier by any factor: its square is finite
    found: FloatArray = np.expm1(np.minimum(-ratios, 300.0))
    return found


def _controlled(sums: FloatArray) -> FloatArray:
    """The controlled mean from sums of 1, x, e, e^2, x e and x^2, shape (6, draws) -> (draws,)."""
    n, x, e, ee, xe, xx = sums
    spread, control = np.maximum(xx / n - (x / n) ** 2, 0.0), ee / n - (e / n) ** 2
    # without spread there is nothing to control
    known = (spread > 1e-300) & (control > 1e-300)
    of_normal = spread / np.expm1(np.clip(spread, 1e-300, 300.0))
    of_sample = (x * e / n**2 - xe / n) / np.where(known, control, 1.0)
    c = np.where(known, np.clip(np.minimum(of_normal, of_sample), 0.0, 1.0), 0.0)
    found: FloatArray = x / n + c * e / n
    return found
