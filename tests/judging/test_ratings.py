"""Ratings: the maximum against an independent optimiser and closed forms, Elo against a plain loop, coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from alignbench.errors import ConfigError, DataError
from alignbench.jsonio import canonical
from alignbench.judging.ratings import ANCHOR, NO_ESTIMATE, POINTS, Pairing, bradley_terry, ratings, sequential_elo


def independent(wins):
    """The same maximum by scipy's optimiser, on a likelihood written pair by pair."""
    players = len(wins)
    pairs = [(i, j, wins[i, j]) for i in range(players) for j in range(players) if i != j and wins[i, j]]

    def loss(free):
        theta = np.concatenate([[0.0], free])
        return sum(w * math.log1p(math.exp(theta[j] - theta[i])) for i, j, w in pairs)

    def slope(free):
        theta, found = np.concatenate([[0.0], free]), np.zeros(players)
        for i, j, w in pairs:
            lost = w / (1 + math.exp(theta[i] - theta[j]))
            found[i] -= lost
            found[j] += lost
        return found[1:]

    found = minimize(loss, np.zeros(players - 1), jac=slope, method="BFGS", options={"gtol": 1e-10})
    return np.concatenate([[0.0], found.x])


def random_wins(players, seed, games=30):
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=players)
    wins = np.zeros((players, players))
    for i in range(players):
        for j in range(i):
            wins[i, j] = rng.binomial(games, 1 / (1 + math.exp(theta[j] - theta[i])))
            wins[j, i] = games - wins[i, j]
    return wins + 0.5 * (1 - np.eye(players))  # a tie each: no one wins everything


@pytest.mark.parametrize("players", [2, 3, 6])
def test_the_maximum_against_an_independent_optimiser(players):
    for seed in range(5):
        wins = random_wins(players, seed)
        np.testing.assert_allclose(bradley_terry(wins), independent(wins), atol=1e-6)


@pytest.mark.parametrize("players", [2, 5, 20])
def test_the_maximum_against_choix(players):
    choix = pytest.importorskip("choix", reason="an independent library, not in requirements.txt")
    wins = random_wins(players, 3) - 0.5 * (1 - np.eye(players)) + 1 * (1 - np.eye(players))
    games = [(i, j) for i in range(players) for j in range(players) for _ in range(int(wins[i, j]))]
    reference = choix.ilsr_pairwise(players, games, tol=1e-12, max_iter=10_000)
    np.testing.assert_allclose(bradley_terry(wins), reference - reference[0], atol=1e-6)


def test_two_players_are_the_log_odds():
    assert bradley_terry([[0, 30], [10, 0]])[1] == pytest.approx(-math.log(3), abs=1e-12)


@given(st.lists(st.tuples(st.floats(0.1, 50), st.floats(0.1, 50)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=60)
def test_against_one_common_opponent_each_rating_is_its_own_log_odds(results):
    wins = np.zeros((len(results) + 1, len(results) + 1))
    for i, (won, lost) in enumerate(results, 1):
        wins[i, 0], wins[0, i] = won, lost
    expected = [0.0, *(math.log(won / lost) for won, lost in results)]
    np.testing.assert_allclose(bradley_terry(wins), expected, atol=1e-7)


def test_expected_wins_are_the_observed_ones():
    wins = random_wins(7, 11)
    theta = bradley_terry(wins)
    chance = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))
    np.testing.assert_allclose((chance * (wins + wins.T)).sum(1) - np.diag(wins), wins.sum(1), atol=1e-8)


def test_a_batch_is_its_parts_and_the_anchor_only_shifts():
    batch = np.stack([random_wins(4, seed) for seed in range(6)])
    found = bradley_terry(batch, anchor=2)
    for one, wins in zip(found, batch, strict=True):
        alone = bradley_terry(wins)
        np.testing.assert_allclose(one, alone - alone[2], atol=1e-9)


def test_one_sided_and_unconnected_results_have_no_maximum():
    assert np.isnan(bradley_terry([[0, 5], [0, 0]])).all()
    apart = np.zeros((4, 4))
    apart[0, 1] = apart[1, 0] = apart[2, 3] = apart[3, 2] = 1
    assert np.isnan(bradley_terry(apart)).all()
    ring = np.roll(np.eye(3), 1, axis=1)  # each beats the next: a maximum, all equal
    np.testing.assert_allclose(bradley_terry(ring), 0, atol=1e-12)


def test_far_apart_players_are_found_too():
    assert bradley_terry([[0, 1e6], [1, 0]])[1] == pytest.approx(-math.log(1e6), abs=1e-7)


def test_what_is_no_matrix_of_wins_is_refused():
    for wins in ([[0, 1]], [[0.0]], [[0, -1], [1, 0]], [[0, math.nan], [1, 0]]):
        with pytest.raises(DataError):
            bradley_terry(wins)
    with pytest.raises(ConfigError):
        bradley_terry([[0, 1], [1, 0]], anchor=2)


def pairing(name, triples, opponent="sft"):
    return Pairing(name, opponent, {f"p{i}": tuple(map(float, t)) for i, t in enumerate(triples)})


def test_ratings_are_on_elo_s_scale_with_ties_half():
    found = ratings(
        [pairing("a", [(1, 0, 0)] * 30 + [(0, 0, 1)] * 8 + [(0, 1, 0)] * 4)], anchor="sft", level=0.95, resamples=200,
        seed=0,
    )  # fmt: skip
    assert found["a"].mean == pytest.approx(ANCHOR + POINTS * math.log(32 / 10))
    assert found["a"].low < found["a"].mean < found["a"].high
    assert found["sft"].mean == found["sft"].low == found["sft"].high == 1000
    assert (found["a"].n, found["a"].clusters) == (42, 42)


def test_ratings_use_what_rivals_say_of_each_other():
    strong = [(1, 0, 0)] * 7 + [(0, 0, 1)] * 3
    alone = ratings([pairing("a", strong), pairing("b", strong)], anchor="sft", level=0.95, resamples=100, seed=0)
    rivals = [pairing("a", strong), pairing("b", strong), pairing("b", strong, "a")]
    together = ratings(rivals, anchor="sft", level=0.95, resamples=100, seed=0)
    assert alone["a"].mean == pytest.approx(alone["b"].mean)
    assert together["b"].mean > together["a"].mean


def test_no_finite_rating_is_an_error_and_too_few_prompts_give_no_interval():
    with pytest.raises(DataError, match="no finite ratings"):
        ratings([pairing("a", [(1, 0, 0)] * 5)], anchor="sft", level=0.95, resamples=100, seed=0)
    found = ratings([pairing("a", [(1, 0, 0)] * 4 + [(0, 0, 1)])], anchor="sft", level=0.95, resamples=500, seed=0)
    assert found["a"].method == NO_ESTIMATE
    canonical(found["a"].to_dict())  # it goes into records
    assert math.isnan(found["a"].low)
    with pytest.raises(DataError, match="sft"):
        ratings([pairing("a", [(1, 0, 1)])], anchor="none", level=0.95, resamples=100, seed=0)


def test_elo_against_a_plain_loop():
    pairings = [pairing("a", [(2, 1, 0), (1, 0, 2)]), pairing("b", [(0, 1, 1), (3, 0, 0)])]
    games = [("a", 1.0)] * 3 + [("a", 0.5)] + [("a", 0.0)] * 2 + [("b", 0.5), ("b", 0.0)] + [("b", 1.0)] * 3
    # one game per epoch order is drawn by the same generator over games in the order prompts list them
    listed = [(name, r) for p, name in zip(pairings, "ab", strict=True) for t in p.wins.values()
              for c, r in zip(t, (1.0, 0.5, 0.0), strict=True) for _ in range(int(c))]  # fmt: skip
    assert sorted(listed) == sorted(games)
    rng, trials, epochs = np.random.default_rng(7), 3, 2
    rating = [dict.fromkeys(("a", "sft", "b"), 1200.0) for _ in range(trials)]
    for _ in range(epochs):
        orders = rng.permuted(np.tile(np.arange(len(listed)), (trials, 1)), axis=1)
        for mine, order in zip(rating, orders, strict=True):
            for game in order:
                name, result = listed[game]
                expected = 1 / (1 + 10 ** ((mine["sft"] - mine[name]) / 400))
                mine[name] += 32 * (result - expected)
                mine["sft"] -= 32 * (result - expected)
    found = sequential_elo(pairings, anchor="sft", seed=7, trials=trials, epochs=epochs)
    for name in ("a", "b", "sft"):
        scaled = [1000 * mine[name] / mine["sft"] for mine in rating]  # multiplied, not shifted
        assert found[name].mean == pytest.approx(np.mean(scaled))
        assert found[name].std == pytest.approx(np.std(scaled), abs=1e-9)


def test_one_game_moves_both_by_half_of_k():
    found = sequential_elo([pairing("a", [(1, 0, 0)])], anchor="sft", seed=0, epochs=1, trials=1)
    assert found["a"].mean == pytest.approx(1000 * 1216 / 1184)


def test_elo_wants_whole_games():
    with pytest.raises(DataError, match="whole games"):
        sequential_elo([pairing("a", [(0.5, 0.0, 0.5)])], anchor="sft", seed=0)


@pytest.mark.slow
def test_intervals_of_ratings_cover_at_their_nominal_rate():
    """Three policies, all against all on 64 prompts whose difficulty is common to the pairings."""
    rng, runs, covered = np.random.default_rng(1), 1000, np.zeros(2)
    names, strength = ("sft", "a", "b"), np.array([0.0, 0.5, -0.4])
    pairs = ((1, 0), (2, 0), (2, 1))

    def simulate(prompts):
        shift = strength + rng.normal(size=(prompts, 3)) * 0.7
        first, second = (shift[:, [pair[k] for pair in pairs]] for k in (0, 1))
        return rng.random((prompts, 3)) < 1 / (1 + np.exp(second - first))

    def wins_of(won):
        wins = np.zeros((3, 3))
        for k, (i, j) in enumerate(pairs):
            wins[i, j], wins[j, i] = won[:, k].sum(), (~won[:, k]).sum()
        return wins

    truth = ANCHOR + POINTS * bradley_terry(wins_of(simulate(2_000_000)))
    for run in range(runs):
        won = simulate(64)
        given = [
            Pairing(names[i], names[j], {f"p{r}": (float(w), 0.0, float(not w)) for r, w in enumerate(won[:, k])})
            for k, (i, j) in enumerate(pairs)
        ]
        found = ratings(given, anchor="sft", level=0.95, resamples=500, seed=run)
        covered += [found[name].low <= truth[i] <= found[name].high for i, name in ((1, "a"), (2, "b"))]
    assert (covered / runs >= 0.93).all()
    assert (covered / runs <= 0.97).all()
