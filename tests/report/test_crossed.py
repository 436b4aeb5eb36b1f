"""Seeds and prompts: closed forms, the bootstrap for few seeds, corrections, simulated coverage."""

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from alignbench.errors import DataError
from alignbench.report.crossed import (
    _OFF_PROMPTS,
    _OFF_SEEDS,
    CROSSED,
    PROMPTS_ONLY,
    all_pairs_reach,
    cross,
    holm,
    safe_reach,
)
from alignbench.report.stats import FEW_PROMPTS, NO_INTERVAL, NO_SPREAD, cluster_bootstrap


def drawn(rng: np.random.Generator, seeds: int, prompts: int, spread: tuple[float, float, float]) -> np.ndarray:
    of_seeds, of_prompts, rest = spread
    found: np.ndarray = (
        of_seeds * rng.normal(size=(seeds, 1))
        + of_prompts * rng.normal(size=(1, prompts))
        + rest * rng.normal(size=(seeds, prompts))
    )
    return found


def test_parts_are_the_mean_squares() -> None:
    x = drawn(np.random.default_rng(0), 4, 10, (1, 1, 1))
    found = cross(x)
    of_seeds, of_prompts = 10 * x.mean(1).var(ddof=1), 4 * x.mean(0).var(ddof=1)
    rest = x - x.mean(1, keepdims=True) - x.mean(0) + x.mean()
    of_rest = (rest**2).sum() / 27
    assert found.mean == pytest.approx(x.mean())
    (prompts, df_prompts), (seeds, df_seeds) = found.parts
    assert prompts == pytest.approx((of_prompts - _OFF_PROMPTS * of_rest) / 40)
    assert seeds == pytest.approx((of_seeds - _OFF_SEEDS * of_rest) / 40)
    assert (df_prompts, df_seeds) == (9, 3)
    assert found.between_seeds == pytest.approx(math.sqrt((of_seeds - of_rest) / 10))
    interval = found.interval(0.95)
    t9, t3 = scipy_stats.t.ppf(0.975, [9, 3])
    share = prompts / (prompts + seeds)
    expected = t9**share * t3 ** (1 - share) * math.sqrt(prompts + seeds)
    assert interval.high - interval.mean == pytest.approx(expected)
    assert (interval.method, interval.clusters) == (CROSSED, 10)


def test_of_one_or_two_seeds_the_prompts_are_resampled() -> None:
    x = drawn(np.random.default_rng(1), 2, 30, (5, 1, 1))
    for seeds in (1, 2):
        found = cross(x[:seeds]).interval(0.95, n=7)
        expected = cluster_bootstrap(x[:seeds].mean(0), np.arange(30), seed=0)
        assert (found.low, found.high, found.n) == (expected.low, expected.high, 7)
        assert found.method == PROMPTS_ONLY
    assert cross(x[:1]).between_seeds is None
    assert cross(x).between_seeds > 1


def test_what_has_no_interval() -> None:
    for prompts, why in ((1, NO_INTERVAL), (4, FEW_PROMPTS)):
        for seeds in (1, 3):
            alone = cross(np.tile(np.array([[1.0], [2.0], [4.0]])[:seeds], prompts) + np.arange(prompts))
            assert alone.mean == pytest.approx(np.mean([1, 2, 4][:seeds]) + (prompts - 1) / 2)
            assert math.isnan(alone.interval(0.95).low)
            assert alone.interval(0.95).method == why
            assert math.isnan(alone.p_value)
    for seeds in (1, 3):
        same = cross(np.full((seeds, 5), 0.1))
        assert (same.interval(0.95).low, same.interval(0.95).high) == (0.1, 0.1)
        assert same.interval(0.95).method == NO_SPREAD
    assert cross(np.zeros((3, 5))).p_value == 1.0
    assert cross(np.ones((3, 5))).p_value == 0.0


def test_the_p_value_is_never_below_what_the_interval_says() -> None:
    for seed in range(5):
        found = cross(0.3 + drawn(np.random.default_rng(seed), 3, 40, (0.1, 0.5, 0.7)))
        assert safe_reach(found.parts, found.p_value / 2) == pytest.approx(abs(found.mean), abs=1e-9)
        edge = found.interval(1 - found.p_value)
        assert edge.low * edge.high >= 0.0, "the interval of that level does not hold zero inside"


def test_a_pair_of_two_is_students_interval() -> None:
    found = cross(drawn(np.random.default_rng(0), 3, 40, (0.1, 0.5, 0.7)))
    assert all_pairs_reach(found, 2, 0.95) == pytest.approx(found.interval(0.95).high - found.mean, rel=1e-6)
    assert all_pairs_reach(found, 6, 0.95) > 1.2 * all_pairs_reach(found, 2, 0.95)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, math.nan, 0.9])[0] == 1.0
    assert math.isnan(holm([0.5, math.nan])[1])
    assert holm([0.02, math.nan])[0] == pytest.approx(0.02), "what was not tested counts for nothing"
    assert holm([]) == []


def test_holm_keeps_the_family_wise_error() -> None:
    p = np.random.default_rng(0).uniform(size=(4000, 6))
    wrong = np.mean([min(holm(list(row))) < 0.05 for row in p])
    assert 0.04 < wrong < 0.06


@pytest.mark.parametrize("values", [np.ones((0, 3)), np.ones(3), np.array([[1.0, np.nan]])])
def test_bad_values_are_refused(values: np.ndarray) -> None:
    with pytest.raises(DataError):
        cross(values)


SPREADS = [(0.0, 0.5, 0.7), (0.0, 0.2, 0.3), (0.1, 0.5, 0.7), (0.3, 0.2, 0.7), (0.3, 0.7, 0.3)]


@pytest.mark.parametrize("seeds", [3, 4, 5])
@pytest.mark.parametrize("prompts", [16, 64])
def test_intervals_cover(seeds: int, prompts: int) -> None:
    # standard error of each simulated coverage: 0.35 points
    for spread in SPREADS:
        rng = np.random.default_rng([seeds, prompts, *(int(100 * part) for part in spread)])
        hits, runs = 0, 4000
        for _ in range(runs):
            found = cross(drawn(rng, seeds, prompts, spread))
            hits += abs(found.mean) <= found.reach(T975[seeds - 1, prompts - 1].__getitem__)
        assert 0.93 <= hits / runs <= 0.97, spread


class _Quantiles(dict):  # Student's, each looked up once: scipy's own are the slow part of a simulation
    def __missing__(self, key: tuple[int, ...]) -> dict[float, float]:
        self[key] = {float(df): float(scipy_stats.t.ppf(0.975, df)) for df in key}
        return self[key]


T975 = _Quantiles()


@pytest.mark.parametrize("kind", ["skewed", "heavy"])
def test_intervals_of_skewed_and_heavy_tailed_values_cover(kind: str) -> None:
    """Log-normal or Student's answers (5 degrees of freedom), prompts that differ exponentially, three seeds."""
    rng, hits, runs = np.random.default_rng(21), 0, 4000
    for _ in range(runs):
        rest = rng.lognormal(size=(3, 64)) - math.exp(0.5) if kind == "skewed" else rng.standard_t(5, size=(3, 64))
        x = 0.1 * rng.normal(size=(3, 1)) + rng.exponential(0.7, size=(1, 64)) - 0.7 + 0.5 * rest
        found = cross(x)
        hits += abs(found.mean) <= found.reach(T975[2, 63].__getitem__)
    assert 0.93 <= hits / runs <= 0.97


@pytest.mark.parametrize("seeds", [1, 2])
def test_intervals_of_one_and_two_seeds_cover_for_these_seeds(seeds: int) -> None:
    """Their claim is about other prompts: the seeds' own effects are part of the truth."""
    rng, hits, runs = np.random.default_rng(22), 0, 3000
    for run in range(runs):
        x = drawn(rng, seeds, 48, (0.0, 0.5, 0.7))
        found = cross(x + rng.normal(size=(seeds, 1)))
        truth = float((found.values - x).mean())
        interval = found.interval(0.95, resamples=600, seed=run % 16)
        hits += interval.low <= truth <= interval.high
    assert 0.93 <= hits / runs <= 0.97


def test_lower_bounds_hold_at_their_confidence() -> None:
    """'Feasible with confidence 95 %': the lower end at 90 % two-sided is above the truth in 5 % of the cases."""
    rng, runs = np.random.default_rng(4), 3000
    for seeds in (1, 3, 5):
        held = 0
        for run in range(runs):
            # of one seed the claim is about that seed: its own effect is part of the truth
            x = drawn(rng, seeds, 48, (0.0 if seeds == 1 else 0.15, 0.5, 0.7))
            held += cross(x).interval(0.9, resamples=600, seed=run % 16).low <= 0.0
        assert 0.93 <= held / runs <= 0.97


def test_usual_hierarchical_bootstraps_would_not_cover() -> None:
    """Why the interval is no bootstrap of seeds and prompts: nested it is too short, crossed too long."""
    rng = np.random.default_rng(7)
    nested, crossed, runs = 0, 0, 300
    for _ in range(runs):
        x = drawn(rng, 3, 40, (0.0, 0.7, 0.3))
        y = drawn(rng, 3, 40, (0.0, 0.1, 0.7))
        rows = rng.integers(0, 3, size=(200, 3))
        columns = rng.integers(0, 40, size=(200, 3, 40))
        low, high = np.quantile(x[rows[:, :, None], columns].mean((1, 2)), [0.025, 0.975])
        nested += low <= 0.0 <= high
        low, high = np.quantile(y[rows[:, :, None], columns[:, :1]].mean((1, 2)), [0.025, 0.975])
        crossed += low <= 0.0 <= high
    assert nested / runs < 0.85
    assert crossed / runs > 0.975


def test_all_pairs_hold_at_once() -> None:
    rng, methods, hits, runs = np.random.default_rng(3), 4, 0, 2000
    for _ in range(runs):
        common = drawn(rng, 5, 48, (0.1, 0.5, 0.0))
        own = [common + drawn(rng, 5, 48, (0.1, 0.2, 0.7)) for _ in range(methods)]
        pairs = [cross(own[i] - own[j]) for i in range(methods) for j in range(i)]
        hits += all(abs(pair.mean) <= all_pairs_reach(pair, methods, 0.95) for pair in pairs)
    assert 0.93 <= hits / runs <= 0.97
