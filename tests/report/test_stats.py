"""Intervals against closed forms, brute force and simulated coverage."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from alignbench.errors import ConfigError, DataError
from alignbench.report import stats
from alignbench.report.table import cell


def clustered(k, seed, *, low=2, high=5):
    """Responses of k prompts (low to high-1 each), unit variance, correlation 0.5 within a prompt, mean 0."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(k), rng.integers(low, high, size=k))
    return (rng.normal(size=k)[clusters] + rng.normal(size=len(clusters))) / math.sqrt(2), clusters


def test_point_estimate_and_counts():
    estimate = stats.cluster_bootstrap([1.0, 2.0, 3.0, 10.0, 4.0, 4.0], ["a", "a", "b", "c", "d", "e"], seed=0)
    assert estimate.mean == pytest.approx(4.0)
    assert (estimate.n, estimate.clusters, estimate.level) == (6, 5, 0.95)
    assert estimate.low < estimate.mean < estimate.high


def test_seed_decides_everything():
    values, clusters = clustered(20, 3)
    first = stats.cluster_bootstrap(values, clusters, seed=5)
    assert stats.cluster_bootstrap(values, clusters, seed=5) == first
    assert stats.cluster_bootstrap(values, clusters, seed=6) != first


def test_chunking_changes_nothing(monkeypatch):
    values, clusters = clustered(20, 4)
    sample = stats.Sample.read(values, clusters, "values")
    whole = stats.cluster_bootstrap(values, clusters, seed=1), stats.tail_means(sample, 0.9, 500, 1)
    monkeypatch.setattr(stats, "_CHUNK", 999)
    parts = stats.cluster_bootstrap(values, clusters, seed=1), stats.tail_means(sample, 0.9, 500, 1)
    assert parts[0].to_dict() == pytest.approx(whole[0].to_dict())
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-12)


def test_row_order_and_prompt_names_do_not_matter():
    values, clusters = clustered(15, 8)
    order = np.random.default_rng(0).permutation(len(values))
    plain = stats.cluster_bootstrap(values, clusters, seed=2)
    shuffled = stats.cluster_bootstrap(values[order], [f"p{c:03d}" for c in clusters[order]], seed=2)
    assert [shuffled.low, shuffled.high] == pytest.approx([plain.low, plain.high], abs=1e-12)


def test_width_approaches_the_clustered_standard_error():
    values, clusters = clustered(400, 9, low=3, high=4)
    estimate = stats.cluster_bootstrap(values, clusters, resamples=4000, seed=0)
    per_prompt = values.reshape(400, 3).mean(1)
    expected = scipy_stats.t.ppf(0.975, 399) * per_prompt.std(ddof=1) / 20
    assert (estimate.high - estimate.low) / 2 == pytest.approx(expected, rel=0.05)
    naive = 1.96 * values.std() / math.sqrt(len(values))
    assert (estimate.high - estimate.low) / 2 > 1.2 * naive, "responses to one prompt are not independent"


def test_copying_every_response_does_not_shorten_the_interval():
    values, clusters = clustered(30, 10)
    once = stats.cluster_bootstrap(values, clusters, seed=3)
    thrice = stats.cluster_bootstrap(np.tile(values, 3), np.tile(clusters, 3), seed=3)
    assert [thrice.low, thrice.high] == pytest.approx([once.low, once.high], abs=1e-12)


def test_equivariance():
    values, clusters = clustered(25, 11)
    base = stats.cluster_bootstrap(values, clusters, seed=3)
    moved = stats.cluster_bootstrap(7.0 + 2.0 * values, clusters, seed=3)
    assert [moved.low, moved.high] == pytest.approx([7 + 2 * base.low, 7 + 2 * base.high])


def test_higher_level_is_wider():
    values, clusters = clustered(25, 12)
    narrow = stats.cluster_bootstrap(values, clusters, level=0.8, seed=3)
    wide = stats.cluster_bootstrap(values, clusters, level=0.99, seed=3)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_constant_values_have_a_point_interval():
    estimate = stats.cluster_bootstrap([0.1] * 9, [0, 0, 0, 1, 1, 2, 3, 4, 4], seed=0)
    assert (estimate.mean, estimate.low, estimate.high) == (0.1, 0.1, 0.1)
    assert estimate.method == stats.NO_SPREAD, "a width of 0 must not read as certainty"


def test_one_cluster_has_no_interval():
    for estimate in (
        stats.cluster_bootstrap([1.0, 3.0], ["p", "p"], seed=0),
        stats.paired_difference([3.0], ["p"], [1.0], ["p"], seed=0),
    ):
        assert estimate.mean == 2.0
        assert math.isnan(estimate.low)
        assert math.isnan(estimate.high)
        assert estimate.method == "one cluster: no interval"
        record = json.loads(json.dumps(estimate.to_dict(), allow_nan=False))
        assert record["low"] is None
        assert record["high"] is None


@pytest.mark.parametrize("k", [2, 3, 4])
def test_very_few_prompts_have_no_interval(k):
    values, clusters = clustered(k, 0)
    for estimate in (
        stats.cluster_bootstrap(values, clusters, seed=0),
        stats.paired_difference(values, clusters, values**2, clusters, seed=0),
        stats.interval_of(0.0, np.arange(9.0), level=0.95, n=9, clusters=k),
    ):
        assert math.isnan(estimate.low)
        assert math.isnan(estimate.high)
        assert estimate.method == stats.FEW_PROMPTS
    assert cell(stats.cluster_bootstrap([1.0] * k, range(k), seed=0).to_dict()) == f"1.00 (no interval: n={k})"


@pytest.mark.parametrize("k", [5, 6, 8])
def test_few_prompts_give_an_ordered_and_finite_interval(k):
    for seed in range(20):
        values, clusters = clustered(k, seed)
        estimate = stats.cluster_bootstrap(np.exp(3 * values), clusters, seed=seed)
        assert -math.inf < estimate.low <= estimate.mean <= estimate.high < math.inf


def test_a_tenth_of_the_prompts_that_differ_do_not_make_an_endless_interval():
    """Resamples without them have no spread of their own."""
    values = np.zeros(40)
    values[3] = 1.0
    estimate = stats.cluster_bootstrap(values, np.arange(40) // 2, seed=0)
    assert estimate.high < 0.5


def test_record_form():
    record = stats.cluster_bootstrap([0.0, 1.0, 1.0, 2.0, 0.5], range(5), seed=0).to_dict()
    assert set(record) == {"mean", "low", "high", "n", "clusters", "level", "method"}
    assert record["method"] == stats.BOOTSTRAP


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_the_vectorised_tail_mean_equals_that_of_the_resampled_rows(seed, k):
    rng = np.random.default_rng(seed)
    values, clusters = clustered(k, seed)
    values = np.round(values, 1)  # ties
    sample = stats.Sample.read(values, clusters, "values")
    counts = rng.multinomial(k, np.full(k, 1 / k), size=5)
    got = stats._cvar_of(sample, 0.8)(counts.astype(float))
    for row, value in zip(counts, got, strict=True):
        rows = np.concatenate([np.tile(values[clusters == c], times) for c, times in enumerate(row)])
        assert value == pytest.approx(stats.cvar(rows, 0.8), abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(5, 20))
def test_the_interval_is_the_studentised_one_written_out(seed, k):
    """Equal numbers of responses: each draw's own mean and standard deviation, prompt by prompt."""
    values = np.exp(np.random.default_rng(seed).normal(size=(k, 3)))
    found = stats.cluster_bootstrap(values.ravel(), np.repeat(np.arange(k), 3), resamples=200, seed=7)
    means = values.mean(axis=1)
    spread = means.std()
    rng, deviations = np.random.default_rng(7), []
    for row in rng.integers(0, k, size=(200, k)):
        drawn = (means[row] - means.mean()) / spread
        deviations.append(drawn.mean() / math.sqrt(drawn.var() + 0.5 / k))
    below, above = np.quantile(deviations, [0.025, 0.975])
    error = spread * math.sqrt((1 + 0.5 / k) * k / (k - 1))
    assert found.low == pytest.approx(min(means.mean() - error * above, means.mean()))
    assert found.high == pytest.approx(max(means.mean() - error * below, means.mean()))


def test_paired_difference_uses_the_same_prompts():
    rng = np.random.default_rng(0)
    prompt = 5 * rng.normal(size=50)
    clusters = np.repeat(np.arange(50), 2)
    a = prompt[clusters] + 0.3 + 0.1 * rng.normal(size=100)
    b = prompt[clusters] + 0.1 * rng.normal(size=100)
    estimate = stats.paired_difference(a, clusters, b, clusters, seed=0)
    assert 0.25 < estimate.low < estimate.mean < estimate.high < 0.35
    assert (estimate.n, estimate.clusters) == (200, 50)
    alone = stats.cluster_bootstrap(a, clusters, seed=0)
    assert estimate.high - estimate.low < 0.1 * (alone.high - alone.low)


def test_paired_difference_with_unequal_samples_and_orders():
    a, of_a = [1.0, 3.0, 5.0, 2.0, 2.0, 5.0], list("xxyzvw")
    b, of_b = [0.0, 1.0, 1.0, 2.0, 1.0], list("yxwvz")
    estimate = stats.paired_difference(a, of_a, b, of_b, seed=0)
    assert estimate.mean == pytest.approx(3.0 - 1.0)
    assert estimate.low < estimate.mean < estimate.high
    reverse = stats.paired_difference(b, of_b, a, of_a, seed=0)
    assert [reverse.low, reverse.high] == pytest.approx([-estimate.high, -estimate.low])


def test_a_policy_does_not_differ_from_itself():
    values, clusters = clustered(20, 1)
    estimate = stats.paired_difference(values, clusters, values, clusters, seed=0)
    assert (estimate.mean, estimate.low, estimate.high) == (0.0, 0.0, 0.0)


def test_cvar_worked_numbers():
    costs = [1.0, 2.0, 3.0, 4.0, 10.0]
    assert stats.cvar(costs, 0.8) == pytest.approx(10.0)
    assert stats.cvar(costs, 0.6) == pytest.approx(7.0)
    # 1.5 rows fill a share of 0.3: all of 10 and half of 4
    assert stats.cvar(costs, 0.7) == pytest.approx((10 + 0.5 * 4) / 1.5)
    assert stats.cvar(costs, 0.0) == pytest.approx(4.0)
    assert stats.cvar([3.0], 0.95) == 3.0


def test_cvar_of_a_normal_sample():
    values = np.random.default_rng(0).normal(size=200_000)
    exact = scipy_stats.norm.pdf(scipy_stats.norm.ppf(0.9)) / 0.1
    assert stats.cvar(values, 0.9) == pytest.approx(exact, abs=0.02)
    assert stats.cvar(values, 0.95) > stats.cvar(values, 0.9) > stats.quantiles(values, [0.9])[0.9]


def test_quantiles():
    assert stats.quantiles([3.0, 1.0, 2.0], [0.0, 0.5, 0.75, 1.0]) == {
        0.0: 1.0,
        0.5: 2.0,
        0.75: 2.5,
        1.0: 3.0,
    }


def test_wilson_matches_scipy():
    for successes, n in [(0, 9), (1, 9), (25, 50), (49, 50), (50, 50)]:
        estimate = stats.wilson(successes, n)
        expected = scipy_stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert estimate.mean == successes / n
        assert (estimate.n, estimate.clusters, estimate.method) == (n, n, "wilson")
    assert stats.wilson(0, 9).high > 0.25


def test_wilson_takes_fractions_and_levels():
    assert stats.wilson(4.5, 10, level=0.9).mean == 0.45
    assert stats.wilson(4.5, 10, level=0.9).high < stats.wilson(4.5, 10, level=0.95).high


def test_win_rate_counts_ties_half_and_keeps_missing():
    np.testing.assert_array_equal(
        stats.win_rate([2.0, 1.0, 0.0, math.nan, 1.0], [1.0, 1.0, 1.0, 1.0, math.nan]),
        [1.0, 0.5, 0.0, math.nan, math.nan],
    )
    np.testing.assert_array_equal(stats.win_rate([math.inf], [math.inf]), [0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.cluster_bootstrap([], [], seed=0), "values is empty"),
        (
            lambda: stats.cluster_bootstrap([1.0, math.nan, math.inf], [0, 1, 2], seed=0),
            "2 of 3 rows are not",
        ),
        (lambda: stats.cluster_bootstrap([1.0, 2.0], [0], seed=0), "2 values and clusters of shape"),
        (lambda: stats.cluster_bootstrap([[1.0, 2.0]], [[0, 1]], seed=0), "values has shape"),
        (lambda: stats.paired_difference([1.0], [0], [math.nan], [0], seed=0), "values_b"),
        (lambda: stats.paired_difference([1.0, 2.0], [0, 1], [1.0], [0], seed=0), "1 only in a"),
        (lambda: stats.paired_difference([1.0], ["x"], [1.0], ["y"], seed=0), "same prompts"),
        (lambda: stats.cvar([], 0.9), "values is empty"),
        (lambda: stats.cvar([1.0, math.nan], 0.9), "1 of 2 rows"),
        (lambda: stats.quantiles([], [0.5]), "values is empty"),
        (lambda: stats.wilson(0, 0), "0 trials"),
        (lambda: stats.wilson(3, 2), "3 successes in 2 trials"),
        (lambda: stats.wilson(math.nan, 2), "nan successes"),
        (lambda: stats.win_rate([1.0], [1.0, 2.0]), "shapes"),
    ],
)
def test_bad_rows_are_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.cluster_bootstrap([1.0], [0], level=95, seed=0), "level is 95"),
        (lambda: stats.cluster_bootstrap([1.0], [0], resamples=0, seed=0), "resamples is 0"),
        (lambda: stats.cvar([1.0], 1.0), "tail level"),
        (lambda: stats.quantiles([1.0], [1.5]), "quantile level 1.5"),
        (lambda: stats.wilson(1, 2, level=0.0), "level is 0.0"),
    ],
)
def test_bad_settings_are_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_an_interval_of_given_draws_is_scipys_bca_at_the_expanded_level():
    k = 15
    values = np.exp(1.5 * np.random.default_rng(2).normal(size=k))
    draws = values[np.random.default_rng(0).integers(0, k, size=(40_000, k))].mean(axis=1)
    ours = stats.interval_of(float(values.mean()), draws, level=0.95, n=k, clusters=k)
    assert ours.method == stats.BCA
    reach = math.sqrt(k / (k - 1)) * scipy_stats.t.ppf(0.975, k - 1)
    theirs = scipy_stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=1 - 2 * scipy_stats.norm.sf(reach),
        n_resamples=40_000,
        method="BCa",
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert [ours.low, ours.high] == pytest.approx([theirs.low, theirs.high], abs=0.015 * width)


@pytest.mark.parametrize("n", [16, 32, 64, 128])
def test_wilson_covers(n):
    """Exact: the binomial's mass of the counts whose interval holds the rate, averaged over rates."""
    rates = np.linspace(0.05, 0.95, 91)
    ends = [stats.wilson(successes, n) for successes in range(n + 1)]
    low, high = (np.array([getattr(end, name) for end in ends]) for name in ("low", "high"))
    counts = np.arange(n + 1)
    covered = [scipy_stats.binom.pmf(counts, n, rate)[(low <= rate) & (rate <= high)].sum() for rate in rates]
    assert 0.945 <= np.mean(covered) <= 0.96
