"""Tail means, quantiles and rates in cells: point values, what has no interval, simulated coverage."""

import math

import numpy as np
import pytest
from scipy import special as scipy_special
from scipy import stats as scipy_stats

from alignbench.errors import ConfigError, DataError
from alignbench.report.stats import FEW_PROMPTS, NO_INTERVAL, NO_SPREAD, Sample, cvar, wilson
from alignbench.report.tails import (
    CELL_METHOD,
    FEWEST_TAIL_PROMPTS,
    TOO_FEW,
    cell_rates,
    cvar_interval,
    intraclass_correlation,
    quantile_interval,
    rate_interval,
)

ROWS = 4


def responses(rng: np.random.Generator, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Four responses per prompt, unit variance, correlation 0.5 within a prompt."""
    of = np.repeat(np.arange(prompts), ROWS)
    return (rng.normal(size=prompts)[of] + rng.normal(size=len(of))) / math.sqrt(2), of


def test_point_values_are_the_plain_ones() -> None:
    values, prompts = responses(np.random.default_rng(0), 100)
    assert cvar_interval(values, prompts, 0.9, seed=0).mean == cvar(values, 0.9)
    assert quantile_interval(values, prompts, 0.9).mean == np.quantile(values, 0.9)
    for found in (cvar_interval(values, prompts, 0.9, seed=0), quantile_interval(values, prompts, 0.9)):
        assert (found.n, found.clusters) == (400, 100)
        assert found.low < found.mean < found.high


def test_the_seed_and_the_order_of_rows() -> None:
    values, prompts = responses(np.random.default_rng(1), 80)
    order = np.random.default_rng(2).permutation(len(values))
    first = cvar_interval(values, prompts, 0.9, seed=5)
    assert cvar_interval(values, prompts, 0.9, seed=5) == first
    other = cvar_interval(values[order], prompts[order], 0.9, seed=5)
    assert (other.low, other.high) == pytest.approx((first.low, first.high))
    moved = cvar_interval(7 + 2 * values, prompts, 0.9, seed=5)
    assert (moved.low, moved.high) == pytest.approx((7 + 2 * first.low, 7 + 2 * first.high))


def test_what_has_no_interval() -> None:
    values, prompts = responses(np.random.default_rng(3), 50)
    for found in (cvar_interval(values, prompts, 0.9, seed=0), quantile_interval(values, prompts, 0.9)):
        assert math.isnan(found.low)
        assert found.method == TOO_FEW
        assert found.mean > 0
    assert 50 * 0.1 < FEWEST_TAIL_PROMPTS < 64 * 0.1
    one = np.zeros(4, int)
    for found in (cvar_interval(values[:4], one, 0.5, seed=0), quantile_interval(values[:4], one, 0.5)):
        assert found.method == NO_INTERVAL
    for found in (cvar_interval([0.1] * 80, np.arange(80), 0.9, seed=0), quantile_interval([0.1] * 80, range(80), 0.9)):
        assert (found.mean, found.low, found.high, found.method) == (0.1, 0.1, 0.1, NO_SPREAD)


def test_a_quantile_of_few_different_values() -> None:
    """Scores with ties: 30 % are 0, so the 30 % quantile may be 0 or 1; the median is surely 1."""
    values = np.random.default_rng(1).permutation(np.repeat([0.0, 1.0, 2.0], [120, 160, 120]))
    prompts = np.repeat(np.arange(100), 4)
    edge, middle = (quantile_interval(values, prompts, share) for share in (0.3, 0.5))
    assert (edge.low, edge.high) == (0.0, 1.0)
    assert (middle.low, middle.mean, middle.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: cvar_interval([], [], 0.9, seed=0), DataError, "values is empty"),
        (lambda: cvar_interval([1.0, 2.0], [0, 1], 1.0, seed=0), ConfigError, "tail level"),
        (lambda: quantile_interval([1.0, 2.0], [0, 1], 1.0), ConfigError, "quantile 1.0"),
        (lambda: quantile_interval([1.0, math.nan], [0, 1], 0.5), DataError, "1 of 2 rows"),
        (lambda: cell_rates([1.0], [0, 1], ["a"]), DataError, "1 values and clusters"),
    ],
)
def test_bad_input_is_refused(call, error, says) -> None:
    with pytest.raises(error, match=says):
        call()


# ---------------------------------------------------------------- cells


def test_one_response_per_prompt_is_wilsons_own() -> None:
    safe = np.array([1.0, 1, 1, 0, 1, 0, 0, 1])
    found = cell_rates(safe, np.arange(8), ["b", "a", "b", "a", "b", "a", "b", "a"])
    assert list(found) == ["a", "b"]
    for name, successes in (("a", 2), ("b", 3)):
        expected = wilson(successes, 4)
        assert (found[name].low, found[name].high) == (expected.low, expected.high)
        assert (found[name].n, found[name].clusters) == (4, 4)


def test_alike_responses_of_a_prompt_count_once_and_unrelated_ones_fully() -> None:
    rng = np.random.default_rng(0)
    prompts, cells = np.repeat(np.arange(60), 4), np.repeat(["a", "b"], 120)
    alike = np.repeat((rng.uniform(size=60) < 0.7).astype(float), 4)
    for name, found in cell_rates(alike, prompts, cells).items():
        of_prompts = alike.reshape(60, 4)[:, 0][:30] if name == "a" else alike.reshape(60, 4)[:, 0][30:]
        expected = wilson(of_prompts.sum(), 30)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
        assert (found.n, found.clusters) == (120, 30)
    # every prompt has two safe and two unsafe: less alike than chance, so none is lost
    mixed = np.tile([1.0, 0.0], 120)
    assert intraclass_correlation(Sample.read(mixed, prompts, "x"), np.zeros(240, int)) == 0.0
    expected = wilson(60, 120)
    assert cell_rates(mixed, prompts, cells)["a"].low == pytest.approx(expected.low)


def test_no_successes_still_leave_doubt() -> None:
    found = cell_rates([0.0] * 20, np.repeat(np.arange(10), 2), ["a"] * 20)["a"]
    assert (found.mean, found.low) == (0.0, 0.0)
    assert found.high > 0.2


# ---------------------------------------------------------------- rates


def test_a_rate_of_single_answers_is_wilsons_own() -> None:
    safe = np.array([1.0, 1, 1, 0, 1, 0, 0, 1])
    found, expected = rate_interval(safe, np.arange(8)), wilson(5, 8)
    assert (found.low, found.mean, found.high) == pytest.approx((expected.low, expected.mean, expected.high))
    assert (found.n, found.clusters, found.method) == (8, 8, CELL_METHOD)


def test_ties_vary_less_than_coins_and_alike_answers_count_once() -> None:
    prompts = np.repeat(np.arange(40), 4)
    won = np.random.default_rng(3).integers(0, 2, size=160).astype(float)
    tied = 0.25 + won / 2
    wide, narrow = rate_interval(won, prompts), rate_interval(tied, prompts)
    assert 0.4 < (narrow.high - narrow.low) / (wide.high - wide.low) < 0.6
    alike = rate_interval(np.repeat(won[:40], 4), prompts)
    assert alike.high - alike.low > 1.5 * (wide.high - wide.low)
    same = rate_interval(np.ones(40), np.repeat(np.arange(10), 4))
    assert (same.mean, same.high) == (1.0, 1.0)
    assert same.low < 0.8, "ten prompts without a failure leave doubt"
    ties = rate_interval(np.full(40, 0.5), np.repeat(np.arange(10), 4))
    assert (ties.low, ties.high, ties.method) == (0.5, 0.5, NO_SPREAD)


def test_what_is_no_rate_is_refused_and_few_prompts_have_no_interval() -> None:
    with pytest.raises(DataError, match="1 of 3 values are outside"):
        rate_interval([0.0, 1.5, 1.0], [0, 1, 2])
    few = rate_interval([0.0, 0.5, 1.0], [0, 1, 2])
    assert (few.mean, few.method) == (0.5, FEW_PROMPTS)
    assert math.isnan(few.low)


# ---------------------------------------------------------------- coverage


def covered(draw, truth: float, runs: int, seed: int, prompts: int, estimate) -> float:
    rng, hits = np.random.default_rng(seed), 0
    for run in range(runs):
        values, of = responses(rng, prompts)
        found = estimate(draw(values), of, run)
        hits += found.low <= truth <= found.high
    return hits / runs


SHAPES = {
    "normal": (lambda z: z, scipy_stats.norm()),
    "bounded": (lambda z: scipy_stats.norm.cdf(z) ** 0.5, scipy_stats.powerlaw(2.0)),
    "heavy": (lambda z: scipy_stats.t(5).ppf(scipy_stats.norm.cdf(z)), scipy_stats.t(5)),
}


def tail_mean(law, tail: float) -> float:
    return float(law.expect(lambda v: v, lb=law.ppf(tail), ub=law.support()[1])) / (1 - tail)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tail", "prompts"), [(0.9, 64), (0.9, 128), (0.95, 128), (0.95, 400)])
def test_tail_means_cover(shape: str, tail: float, prompts: int) -> None:
    draw, law = SHAPES[shape]
    truth = tail_mean(law, tail)
    share = covered(
        draw, truth, 1000, 1, prompts, lambda v, of, run: cvar_interval(v, of, tail, resamples=200, seed=run % 4)
    )
    assert 0.93 <= share <= 0.97  # simulation error 0.7 points


@pytest.mark.slow
@pytest.mark.parametrize(("share", "prompts"), [(0.5, 16), (0.5, 128), (0.9, 64), (0.9, 400), (0.95, 128)])
def test_quantiles_cover(share: float, prompts: int) -> None:
    truth = scipy_stats.norm.ppf(share)
    found = covered(lambda z: z, truth, 1200, 2, prompts, lambda v, of, run: quantile_interval(v, of, share))
    assert 0.93 <= found <= 0.97


def test_tail_intervals_cover_here_and_there() -> None:
    """The quick part of the two above."""
    truth = tail_mean(scipy_stats.norm(), 0.9)
    found = covered(
        lambda z: z, truth, 1200, 3, 96, lambda v, of, run: cvar_interval(v, of, 0.9, resamples=100, seed=run % 4)
    )
    assert 0.93 <= found <= 0.97
    truth = scipy_stats.norm.ppf(0.9)
    found = covered(lambda z: z, truth, 1200, 4, 96, lambda v, of, run: quantile_interval(v, of, 0.9))
    assert 0.93 <= found <= 0.97


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
def test_cell_rates_cover(rate: float) -> None:
    """Four cells of 16 prompts with four correlated responses each."""
    rng, hits, runs = np.random.default_rng(5), 0, 600
    border = scipy_stats.norm.ppf(rate)
    cells = np.repeat(["a", "b", "c", "d"], 64)
    for _ in range(runs):
        values, of = responses(rng, 64)
        hits += sum(
            found.low <= rate <= found.high for found in cell_rates((values < border).astype(float), of, cells).values()
        )
    assert 0.93 <= hits / (4 * runs) <= 0.97


@pytest.mark.parametrize("prompts", [16, 64])
@pytest.mark.parametrize("kind", ["hit", "win"])
@pytest.mark.parametrize("rate", [0.5, 0.8, 0.9, 0.97])
def test_rates_cover(rate: float, kind: str, prompts: int) -> None:
    """Hits, and wins with as many ties as losses or more.

    Counts are whole numbers, so coverage jumps with the rate (Brown, Cai and DasGupta 2001): its mean over the rates
    nearby is what is meant. Simulation error 0.4 points.
    """
    rng, hits, runs = np.random.default_rng([prompts, int(100 * rate)]), 0, 3000
    for _ in range(runs):
        true = rng.uniform(rate - 0.02, rate + 0.02)
        ties = 0.0 if kind == "hit" else 1.0 - true
        edges = scipy_special.ndtri([true - ties / 2, true + ties / 2])
        z, of = responses(rng, prompts)
        found = rate_interval((z[:, None] < edges).mean(axis=1), of)
        hits += found.low <= true <= found.high
    # where most evaluations see no failure at all, their common interval holds nearly every rate that leads there
    assert 0.93 <= hits / runs <= (0.975 if prompts * (1 - rate) < 1 else 0.97)
