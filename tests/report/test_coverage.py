"""Every kind of interval that is offered, and where its coverage is simulated; here those of means over prompts.

Nominal 95 % must cover 93 to 97 % of simulated evaluations. All simulations are seeded; their own error is given at
each test (0.3 to 0.6 points), so a kind that were at the border would be seen. Measured, in percent:

    interval                          simulated in                               setups
    mean over prompts (studentised    here: test_means_cover                     normal, t (5 degrees), exponential,
      bootstrap): scores, KL, length,                                            log-normal; 5, 8, 16, 64, 128 prompts,
      distinct-n, predictions                                                    2 to 4 responses
    paired difference: gains, slack   here: test_paired_*                        normal, skewed; 16, 64 prompts, other
                                                                                 numbers of responses on each side
    rate, win rate, accuracy, MC1/2   test_tails.py: test_rates_cover            0.5 to 0.97, ties; 16, 64 prompts
    Wilson                            test_stats.py: test_wilson_covers          exact, 16 to 128 trials
    rates in cells                    test_tails.py: test_cell_rates_cover       0.5 to 0.95, 16 prompts per cell
    CVaR 0.9, 0.95                    test_tails.py: test_tail_means_cover       normal, bounded, t (5); 64 to 400
    quantiles                         test_tails.py: test_quantiles_cover        0.5 to 0.95; 16 to 400 prompts
    KL, control variate; k3           test_kl.py: test_intervals_cover           0.05 to 2 nats; normal, mixed, skewed
    seeds x prompts                   test_crossed.py: test_intervals_*          3 to 5 seeds, 16, 64 prompts; skewed,
                                                                                 heavy-tailed
    one or two seeds                  test_crossed.py: test_intervals_of_one_*   48 prompts
    lower bound, feasibility          test_crossed.py: test_lower_bounds_*       1, 3, 5 seeds
    all pairs at once (regret)        test_crossed.py: test_all_pairs_*          4 methods, 5 seeds
    hypervolume                       test_compare.py: test_the_hypervolumes_*   3 policies, 5 seeds
    over seeds only (Student)         here: test_means_over_seeds_cover          3 and 5 seeds
    win, tie, loss; order; agreement  judging/test_verdicts.py                   64 prompts, both orders
    Bradley-Terry ratings             judging/test_ratings.py                    3 policies, 64 prompts
    multiplier, predicted margin      test_dual.py: test_jackknife_*,            8, 16, 50 prompts; bootstrap 50
                                      test_bootstrap_*

A violation's interval is the achieved margin's, reflected and cut at 0, so it covers whenever that one does. Two seeds
have their smallest and largest value, which is said and is no 95 % interval. SACPO's Elo has a spread over orders.
"""

import math

import numpy as np
import pytest
from scipy import special

from alignbench.report import stats
from alignbench.report.thresholds import over_seeds

LAWS = {
    "normal": (lambda z: z, 0.0),
    "t": (lambda z: special.stdtrit(5, special.ndtr(z)), 0.0),
    "exponential": (lambda z: -special.log_ndtr(-z), 1.0),
    "log-normal": (lambda z: np.exp(z / 2), math.exp(1 / 8)),
    "mirrored": (lambda z: -np.exp(z / 2), -math.exp(1 / 8)),
    "very skewed": (np.exp, math.exp(0.5)),
}
RUNS, DRAWS = 3000, 600


def responses(rng: np.random.Generator, clusters: np.ndarray) -> np.ndarray:
    """Normal, unit variance, correlation 0.5 within a prompt."""
    found: np.ndarray = (rng.normal(size=clusters.max() + 1)[clusters] + rng.normal(size=len(clusters))) / math.sqrt(2)
    return found


@pytest.mark.parametrize(
    ("law", "prompts"),
    [
        *((law, prompts) for law in ("normal", "t") for prompts in (5, 8, 16, 64)),
        *(("exponential", prompts) for prompts in (16, 64)),
        *((law, prompts) for law in ("log-normal", "mirrored") for prompts in (16, 64)),
        ("very skewed", 128),
    ],
)
def test_means_cover(law: str, prompts: int) -> None:
    """Two to four responses per prompt; simulation error 0.4 points."""
    transform, truth = LAWS[law]
    rng, hits = np.random.default_rng([prompts, *law.encode()]), 0
    for run in range(RUNS):
        # the numbers of responses say nothing of the values, so the mean of all responses is the law's
        clusters = np.repeat(np.arange(prompts), rng.integers(2, 5, size=prompts))
        found = stats.cluster_bootstrap(transform(responses(rng, clusters)), clusters, resamples=DRAWS, seed=run % 4)
        hits += found.low <= truth <= found.high
    assert 0.93 <= hits / RUNS <= 0.97


@pytest.mark.parametrize("prompts", [16, 64])
@pytest.mark.parametrize("skewed", [False, True])
def test_paired_differences_cover(prompts: int, skewed: bool) -> None:
    """The prompts' part is common to both; simulation error 0.4 points."""
    rng, hits = np.random.default_rng([prompts, skewed]), 0
    for run in range(RUNS):
        a, b = (np.repeat(np.arange(prompts), rng.integers(2, 5, size=prompts)) for _ in "ab")
        hard = 2 * rng.normal(size=prompts)
        of_a = rng.exponential(size=len(a)) if skewed else 1 + rng.normal(size=len(a))
        x, y = hard[a] + of_a, hard[b] + 0.5 * rng.normal(size=len(b))
        found = stats.paired_difference(x, a, y, b, resamples=DRAWS, seed=run % 4)
        hits += found.low <= 1.0 <= found.high
    assert 0.93 <= hits / RUNS <= 0.97


@pytest.mark.parametrize("level", [0.8, 0.9, 0.99])
def test_other_levels_hold(level: float) -> None:
    rng, hits = np.random.default_rng(int(100 * level)), 0
    clusters = np.repeat(np.arange(32), 2)
    for run in range(RUNS):
        found = stats.cluster_bootstrap(responses(rng, clusters), clusters, level=level, resamples=999, seed=run % 4)
        hits += found.low <= 0.0 <= found.high
    assert hits / RUNS == pytest.approx(level, abs=0.4 * (1 - level))


@pytest.mark.parametrize("seeds", [3, 5])
def test_means_over_seeds_cover(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    found = [over_seeds(list(rng.normal(size=seeds))) for _ in range(2000)]
    assert 0.93 <= np.mean([value["low"] <= 0.0 <= value["high"] for value in found]) <= 0.97


def test_two_seeds_claim_no_confidence() -> None:
    found = over_seeds([1.0, 3.0])
    assert (found["low"], found["high"]) == (1.0, 3.0)
    assert "%" not in found["method"]


@pytest.mark.parametrize("law", ["normal", "very skewed"])
def test_why_it_is_studentised(law: str) -> None:
    """Plain percentiles of eight prompts are too short, and of skewed values they miss to one side."""
    transform, truth = LAWS[law]
    rng, plain, ours = np.random.default_rng(3), 0, 0
    clusters = np.arange(8)
    for run in range(1000):
        values = transform(rng.normal(size=8))
        low, high = np.quantile(values[rng.integers(0, 8, size=(400, 8))].mean(axis=1), [0.025, 0.975])
        plain += low <= truth <= high
        found = stats.cluster_bootstrap(values, clusters, resamples=DRAWS, seed=run % 4)
        ours += found.low <= truth <= found.high
    assert ours > plain + 40
