"""From judgements to win rates: by hand, by identities, and by simulated coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignbench.errors import ConfigError
from alignbench.judging import verdicts
from alignbench.judging.protocols import OPPONENT_FIRST, POLICY_FIRST

FIRST, TIE, SECOND = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
OPTIONS = verdicts.Options(0.95, 200, 0)


def row(comparison, order, outcome, repeat=0):
    return {"comparison": comparison, "order": order, "repeat": repeat, "outcome": outcome}


def read(*rows):
    return verdicts.Judgements.read(rows)


def test_an_outcome_by_place_becomes_one_by_side():
    found = read(row(0, POLICY_FIRST, FIRST), row(0, OPPONENT_FIRST, FIRST), row(1, OPPONENT_FIRST, None))
    np.testing.assert_array_equal(found.triple[:2], [[1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(found.missing, [False, False, True])


def test_each_is_the_mean_of_what_could_be_read():
    found = read(
        row(0, POLICY_FIRST, FIRST),  # win
        row(0, OPPONENT_FIRST, FIRST),  # loss
        row(1, POLICY_FIRST, TIE),
        row(1, OPPONENT_FIRST, None),
        row(2, POLICY_FIRST, None),
    )
    triples = verdicts.combine("each", found, 3)
    np.testing.assert_array_equal(triples[:2], [[0.5, 0, 0.5], [0, 1, 0]])
    assert np.isnan(triples[2]).all()
    np.testing.assert_array_equal(verdicts.win_values(triples, 0.5)[:2], [0.5, 0.5])
    np.testing.assert_array_equal(verdicts.win_values(triples, 0.0)[:2], [0.5, 0.0])


def test_consistent_wants_both_orders_to_say_the_same():
    found = read(
        *(row(0, POLICY_FIRST, FIRST), row(0, OPPONENT_FIRST, SECOND)),  # win in both
        *(row(1, POLICY_FIRST, FIRST), row(1, OPPONENT_FIRST, FIRST)),  # the place decides
        *(row(2, POLICY_FIRST, TIE), row(2, OPPONENT_FIRST, FIRST)),  # tie and loss
        *(row(3, POLICY_FIRST, FIRST), row(3, OPPONENT_FIRST, None)),  # one of them is missing
        *(row(4, POLICY_FIRST, SECOND), row(4, OPPONENT_FIRST, [0.6, 0.1, 0.3])),  # loss in both, one in probabilities
    )
    triples = verdicts.combine("consistent", found, 5)
    np.testing.assert_array_equal(triples[[0, 1, 2, 4]], [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]])
    assert np.isnan(triples[3]).all()


def test_an_unknown_rule_is_refused():
    with pytest.raises(ConfigError, match="each, consistent"):
        verdicts.combine("majority", read(row(0, 0, FIRST)), 1)


def test_nothing_readable_is_no_number_and_no_error():
    found = read(row(0, 0, None), row(1, 0, None))
    result = verdicts.win_tie_loss(verdicts.combine("each", found, 2), 0.5, np.array(["a", "b"]), OPTIONS)
    assert result["win_rate"]["mean"] is None
    assert result["win_rate"]["n"] == 0
    assert verdicts.order_bias(found, np.array(["a", "b"]), OPTIONS) is None


cells = st.sampled_from([FIRST, TIE, SECOND, None])


@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=12))
@settings(deadline=None, max_examples=60)
def test_swapping_policy_and_opponent_swaps_wins_and_losses(pairs):
    own = read(*(row(i, k, pair[k]) for i, pair in enumerate(pairs) for k in (0, 1)))
    # the opponent's view: who stood first is now the opponent
    other = read(*(row(i, 1 - k, pair[k]) for i, pair in enumerate(pairs) for k in (0, 1)))
    for rule in verdicts.RULES:
        mine, theirs = (verdicts.combine(rule, side, len(pairs)) for side in (own, other))
        np.testing.assert_array_equal(mine, theirs[:, ::-1])
        whole = mine[~np.isnan(mine[:, 0])]
        np.testing.assert_allclose(whole.sum(axis=1), 1)


def test_order_bias_of_a_judge_that_always_takes_the_first_and_of_one_that_never_looks_at_places():
    prompts = np.array([f"p{i}" for i in range(20)])
    first = read(*(row(i, k, FIRST) for i in range(20) for k in (0, 1)))
    fair = read(*(row(i, k, FIRST if k == i % 2 else SECOND) for i in range(20) for k in (0, 1)))
    biased, unbiased = (verdicts.order_bias(found, prompts, OPTIONS) for found in (first, fair))
    assert (biased["first_place"]["mean"], biased["agreement"]["mean"]) == (0.5, 0.0)
    assert (unbiased["first_place"]["mean"], unbiased["agreement"]["mean"]) == (0.0, 1.0)


def test_a_pair_with_one_order_missing_says_nothing_of_order():
    found = read(row(0, 0, FIRST), row(0, 1, None), row(1, 0, FIRST), row(1, 1, SECOND))
    assert verdicts.order_bias(found, np.array(["a", "b"]), OPTIONS)["agreement"]["n"] == 1


def test_repeats_spread_is_the_standard_deviation_over_repeats():
    found = read(
        *(row(i, 0, outcome, r) for r, outcomes in enumerate(([FIRST, FIRST], [FIRST, SECOND])) for i, outcome in
          enumerate(outcomes))
    )  # fmt: skip
    assert verdicts.repeat_spread(found, 0.5) == pytest.approx(0.25)
    assert verdicts.repeat_spread(read(row(0, 0, FIRST)), 0.5) is None


def test_agreement_and_length_bias_by_hand():
    triples = np.array([FIRST, SECOND, TIE, FIRST, [np.nan] * 3])
    gold = np.array([1.0, 1.0, -1.0, 0.0, 1.0])
    longer = np.array([1.0, -1.0, 0.0, 1.0, 1.0])
    found = verdicts.against_gold(triples, gold, longer, np.array(list("abcde")), OPTIONS)
    assert found["agreement"]["mean"] == pytest.approx((1 + 0 + 0.5) / 3)
    # longer answers: the judge took them in 1, 1 and 1 of three; gold in 1, 0 and a half
    assert found["length_bias"]["mean"] == pytest.approx(0.5)
    assert found["win_rate"]["mean"] == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    # without the tie of gold and the answer that could not be read: said 1 (true), 0 (true), 1/2 (false)
    bins = [(b["predicted"], b["observed"], b["n"]) for b in found["calibration"]["bins"]]
    assert bins == [(0.0, 1.0, 1), (0.5, 0.0, 1), (1.0, 1.0, 1)]
    assert found["calibration"]["brier"] == pytest.approx((0 + 1 + 0.25) / 3)
    nothing = verdicts.against_gold(triples[4:], gold[4:], longer[4:], np.array(["e"]), OPTIONS)
    assert nothing["calibration"] is None


def test_a_judge_that_is_gold_agrees_and_has_no_length_bias():
    rng = np.random.default_rng(0)
    gold = rng.integers(-1, 2, 50).astype(float)
    triples = np.stack([gold > 0, gold == 0, gold < 0], axis=1).astype(float)
    found = verdicts.against_gold(triples, gold, rng.integers(-1, 2, 50), np.arange(50), OPTIONS)
    assert (found["agreement"]["mean"], found["length_bias"]["mean"]) == (1.0, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("quantity", ["win_rate", "win", "tie", "loss", "first_place", "agreement"])
def test_intervals_cover_at_their_nominal_rate(quantity):
    """64 prompts, 2 comparisons each, both orders; a prompt's difficulty is common to all of them."""
    rng, covered, runs = np.random.default_rng(5), 0, 1500
    order, owner = np.tile([0, 1], 128), np.repeat(np.arange(128), 2)
    prompts = np.repeat(np.arange(64), 2)

    def simulate(n):
        """Triples, (n prompts, 2 comparisons, 2 orders, 3): the prompt leans one way, the judge towards the first."""
        lean = rng.normal(0.3, 1.0, (n, 1, 1)) + np.array([0.4, -0.4])
        noise = rng.logistic(size=(n, 2, 2))
        said = np.where(lean + noise > 0.5, 0, np.where(lean + noise > -0.5, 1, 2))
        return np.eye(3)[said]

    def statistic(found):
        return {
            "win_rate": (found[..., 0] + found[..., 1] / 2).mean(),
            **{name: found[..., k].mean() for k, name in enumerate(("win", "tie", "loss"))},
            "first_place": ((found[:, :, 0] - found[:, :, 1]) @ [1, 0.5, 0]).mean() / 2,
            "agreement": (found[:, :, 0] == found[:, :, 1]).all(axis=-1).mean(),
        }[quantity]

    truth = statistic(simulate(1_000_000))
    for run in range(runs):
        triples = simulate(64).reshape(-1, 3)
        judged = verdicts.Judgements(owner, order, np.zeros(256, dtype=np.int64), triples)
        options = verdicts.Options(0.95, 500, run)
        if quantity in ("first_place", "agreement"):
            found = verdicts.order_bias(judged, prompts, options)[quantity]
        else:
            found = verdicts.win_tie_loss(verdicts.combine("each", judged, 128), 0.5, prompts, options)[quantity]
        covered += found["low"] <= truth <= found["high"]
    assert 0.93 <= covered / runs <= 0.97
