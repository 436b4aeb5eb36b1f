"""KL estimates: closed forms of normal log-ratios, exact sums over a list, heavy tails, simulated coverage."""

import math

import numpy as np
import pytest

from alignbench.report.kl import METHOD, TOO_WIDE, k3, k3_kl, low_variance_kl
from alignbench.report.stats import FEW_PROMPTS, MAY_BE_SHORT, NO_INTERVAL, NO_SPREAD, cluster_bootstrap

PROMPTS = np.repeat(np.arange(128), 4)


def drawn(rng: np.random.Generator, spread: float, prompts: np.ndarray = PROMPTS) -> np.ndarray:
    """Log-ratios of two normal laws: normal, with exp(-x) of mean 1, and KL spread^2 / 2."""
    return rng.normal(spread**2 / 2, spread, size=len(prompts))


@pytest.mark.parametrize("spread", [0.2, 0.7, 1.2])
def test_estimates_agree_and_the_controlled_one_is_steadier(spread: float) -> None:
    rng, exact = np.random.default_rng(0), spread**2 / 2
    samples = [drawn(rng, spread) for _ in range(500)]
    plain = np.array([x.mean() for x in samples])
    third = np.array([k3(x).mean() for x in samples])
    low = np.array([low_variance_kl(x, PROMPTS, resamples=9, seed=0).mean for x in samples])
    assert min(k3(x).min() for x in samples) >= 0
    for means in (plain, third, low):
        assert means.mean() == pytest.approx(exact, abs=4 * means.std() / math.sqrt(500))
    assert low.std() < 0.95 * plain.std()
    if spread > 1.1:
        assert third.std() > plain.std(), "far from the reference k3 is the noisier one"


def test_of_a_list_of_answers() -> None:
    """The expectation of k3's terms under the policy is the exact KL; a large sample's estimate is near it."""
    rng = np.random.default_rng(1)
    policy, reference = rng.dirichlet(np.ones(40)), rng.dirichlet(np.ones(40))
    ratios = np.log(policy / reference)
    exact = float(policy @ ratios)
    assert policy @ k3(ratios) == pytest.approx(exact)
    some = ratios[rng.choice(40, size=20_000, p=policy)]
    found = low_variance_kl(some, np.arange(20_000) // 4, resamples=500, seed=0)
    assert found.low < exact < found.high
    assert found.high - found.low < 4 * some.std() / math.sqrt(20_000)


def test_one_response_that_the_reference_prefers_by_far() -> None:
    x = np.random.default_rng(2).normal(0.3, 0.8, size=512)
    x[7] = -5.0
    assert k3(x).std() > 3 * x.std()
    found = low_variance_kl(x, PROMPTS, seed=0)
    of_k3 = k3(x).reshape(128, 4).mean(1).std() / math.sqrt(128)
    assert (found.high - found.low) / 2 < 0.6 * 1.98 * of_k3
    assert METHOD in found.method
    assert found.low < 0.3 < found.high


def test_the_jackknife_is_the_one_written_out() -> None:
    x, prompts = np.random.default_rng(3).normal(0.2, 0.6, size=30), np.repeat(np.arange(10), 3)

    def controlled(some: np.ndarray) -> float:
        e = np.exp(-some) - 1
        of_sample, of_normal = -np.cov(some, e, ddof=0)[0, 1] / e.var(), some.var() / (np.exp(some.var()) - 1)
        return float(some.mean() + min(max(min(of_sample, of_normal), 0.0), 1.0) * e.mean())

    pseudo = [10 * controlled(x) - 9 * controlled(x[prompts != k]) for k in range(10)]
    found = low_variance_kl(x, prompts, seed=3)
    expected = cluster_bootstrap(pseudo, np.arange(10), seed=3)
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))
    assert (found.n, found.clusters, found.method) == (30, 10, METHOD)


def test_responses_that_are_not_the_policys_own_are_still_numbers() -> None:
    x = np.concatenate([np.full(8, 0.5), [-2000.0]])
    assert np.isfinite(k3(x)).all()
    found = low_variance_kl(x, np.arange(9), seed=0)
    assert np.isfinite([found.mean, found.low, found.high]).all()


def test_what_has_no_interval() -> None:
    assert low_variance_kl([0.1, 0.3], ["p", "p"], seed=0).method == NO_INTERVAL
    assert low_variance_kl([0.1, 0.3, 0.2], [0, 1, 2], seed=0).method == FEW_PROMPTS
    same = low_variance_kl(np.zeros(6), np.arange(6), seed=0)
    assert (same.mean, same.low, same.high, same.method) == (0.0, 0.0, 0.0, NO_SPREAD)
    wide = drawn(np.random.default_rng(5), 1.2)
    far = k3_kl(wide, PROMPTS, seed=0)
    assert (far.mean, far.method) == (pytest.approx(k3(wide).mean()), TOO_WIDE)
    assert math.isnan(far.low)


def test_a_tail_that_makes_half_of_the_variance_is_told() -> None:
    """Weights without a variance: log-ratios whose lower tail is exponential with scale 0.6."""
    rng = np.random.default_rng(6)
    heavy = -math.log(0.4) - rng.exponential(0.6, size=(200, len(PROMPTS)))
    told = [
        np.mean([low_variance_kl(x, PROMPTS, resamples=99, seed=0).method.endswith(MAY_BE_SHORT) for x in rows])
        for rows in (heavy, [drawn(rng, 0.7) for _ in range(200)])
    ]
    assert told[0] > 0.3
    assert told[1] < 0.03


def of_kind(kind: str, rng: np.random.Generator, spread: float, prompts: int) -> tuple[np.ndarray, float]:
    """Log-ratios of four responses per prompt with exp(-x) of mean 1, and their KL."""
    if kind == "normal":
        return rng.normal(spread**2 / 2, spread, size=4 * prompts), spread**2 / 2
    if kind == "prompts differ":  # half of them hardly moved
        own = spread * np.sqrt(np.where(rng.random(prompts) < 0.5, 0.2, 1.8)).repeat(4)
        return own**2 / 2 + own * rng.normal(size=4 * prompts), spread**2 / 2
    # skewed to the right, as a policy's own responses are: a gamma law's values less its log moment
    shape, scale = (spread / 0.6) ** 2, 0.6
    return rng.gamma(shape, scale, size=4 * prompts) - shape * math.log1p(scale), shape * (scale - math.log1p(scale))


@pytest.mark.parametrize("kind", ["normal", "prompts differ", "skewed"])
@pytest.mark.parametrize("prompts", [32, 128])
@pytest.mark.parametrize("spread", [0.3, 0.7, 1.3, 2.0])
def test_intervals_cover(kind: str, prompts: int, spread: float) -> None:
    """From 0.05 to 2 nats; simulation error 0.5 points."""
    rng, runs, hits, of_k3, with_k3 = np.random.default_rng(4), 2000, 0, 0, 0
    of = np.repeat(np.arange(prompts), 4)
    for run in range(runs):
        x, exact = of_kind(kind, rng, spread, prompts)
        found = low_variance_kl(x, of, resamples=600, seed=run % 4)
        hits += found.low <= exact <= found.high
        if spread < 1:
            third = k3_kl(x, of, resamples=600, seed=run % 4)
            with_k3 += third.method != TOO_WIDE
            of_k3 += third.low <= exact <= third.high
    assert 0.93 <= hits / runs <= 0.97
    if spread < 0.5:
        assert with_k3 == runs
        assert 0.93 <= of_k3 / runs <= 0.97
    elif spread < 1:  # at its border: those that have one
        assert with_k3 > 0.5 * runs
        assert 0.925 <= of_k3 / with_k3 <= 0.97
