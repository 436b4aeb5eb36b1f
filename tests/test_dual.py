"""The dual solver: reach, bounds, degenerate problems, the papers' methods, intervals, refusals."""

import json

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar

from alignbench.dual import Bank, Solution, UnreachableMargin, evaluate, predict, reachable, solve, solve_path
from alignbench.dual_descent import oscillation, projected_gradient, released_schedule, smoothness
from alignbench.dual_intervals import FEWEST_RESAMPLED, Reweighted, bootstrap_interval, jackknife_interval
from alignbench.errors import ConfigError, DataError

BETA = 0.3


def bank_of(*utilities, reward=None, log_weights=None):
    """A bank of (K, I) arrays; uniform samples unless log-weights are given."""
    prompts, responses = utilities[0].shape
    reward = np.zeros((prompts, responses)) if reward is None else reward
    weights = np.full((prompts, responses), -np.log(responses)) if log_weights is None else log_weights
    names = tuple(f"g{j}" for j in range(len(utilities)))
    ids = tuple(f"p{k}" for k in range(prompts))
    return Bank(ids, names, reward, np.stack(utilities, axis=-1), weights, log_weights is None)


@pytest.fixture
def scores():
    rng = np.random.default_rng(3)
    return rng.normal(size=(3, 20, 8))


@pytest.fixture
def bank(scores):
    return bank_of(scores[1], scores[2], reward=scores[0])


def random_problem(rng):
    prompts, responses, m = rng.integers(1, 7), rng.integers(2, 9), rng.integers(1, 4)
    scale = 10 ** rng.uniform(-2, 2, size=m)
    utilities = rng.normal(size=(m, prompts, responses)) * scale[:, None, None]
    weights = np.log(rng.dirichlet(np.ones(responses), size=prompts))
    bank = bank_of(*utilities, reward=rng.normal(size=(prompts, responses)), log_weights=weights)
    policy = rng.dirichlet(np.ones(responses), size=prompts)
    attained = ((policy - np.exp(weights)) * utilities).sum(-1).mean(-1)
    return bank, 10 ** rng.uniform(-1.5, 1), attained - rng.choice([-0.2, 1e-3, 0.1, 0.5]) * scale


def test_agrees_with_scipy_on_random_problems():
    rng, unreachable, steps = np.random.default_rng(0), 0, []
    for _ in range(500):
        bank, beta, margins = random_problem(rng)
        try:
            found = solve(bank, beta, margins)
        except UnreachableMargin:
            assert not reachable(bank, margins).reachable
            unreachable += 1
            continue

        def dual(x, bank=bank, beta=beta, margins=margins):
            point = evaluate(bank, beta, margins, np.atleast_1d(x))
            return point.value, point.gradient

        m = len(bank.names)
        if m == 1:
            high = 2 * found.multipliers[0] + 1
            other = minimize_scalar(lambda x: dual(x)[0], bounds=(0, high), method="bounded", options={"xatol": 1e-10})
        else:
            options = {"ftol": 1e-15, "gtol": 1e-11, "maxiter": 3000}
            other = minimize(dual, np.zeros(m), jac=True, bounds=[(0, None)] * m, method="L-BFGS-B", options=options)
        assert found.converged
        assert found.value <= other.fun + 1e-9 * (1 + abs(other.fun))
        assert found.value >= other.fun - 1e-5 * (1 + abs(other.fun)), "scipy stops a little early, not far away"
        steps.append(found.iterations)
    assert 0 < unreachable < 300
    assert np.mean(steps) < 8


@pytest.mark.parametrize("room", [1e-2, 1e-4, 1e-6, 1e-8])
def test_converges_right_up_to_the_edge_of_reach(bank, room):
    one = bank_of(bank.utilities[..., 0], reward=bank.reward)
    edge = reachable(one, 0.0).largest_alone["g0"]
    found = solve(one, BETA, edge - room)
    assert found.converged
    assert found.prediction.margins["g0"] == pytest.approx(edge - room, abs=1e-9)


@pytest.mark.parametrize("excess", [0.0, 1e-9, 0.5])
def test_a_margin_at_or_beyond_the_edge_is_refused(bank, excess):
    one = bank_of(bank.utilities[..., 0], reward=bank.reward)
    edge = reachable(one, 0.0).largest_alone["g0"]
    with pytest.raises(UnreachableMargin, match=r"g0 >= .*largest alone.*(?s:.*)responses per prompt") as error:
        solve(one, BETA, edge + excess)
    assert error.value.reach.largest_alone["g0"] == edge
    assert error.value.ess < 2


def test_largest_margin_is_the_mean_of_the_best_responses(bank):
    gain = bank.utilities.max(1) - bank.utilities.mean(1)
    assert list(reachable(bank, [0, 0]).largest_alone.values()) == pytest.approx(gain.mean(0))
    one = bank_of(bank.utilities[..., 0])
    assert reachable(one, 2.5).common_scale == pytest.approx(gain.mean(0)[0] / 2.5)
    assert reachable(one, -2.5).common_scale == np.inf


def test_conflicting_margins_are_named_with_the_share_that_fits(scores):
    bank = bank_of(scores[1], -scores[1] + 0.3 * scores[2], scores[2], reward=scores[0])
    with pytest.raises(UnreachableMargin, match="not together") as error:
        solve(bank, BETA, [0.9, 0.9, -1.0])
    reach = error.value.reach
    assert reach.direction["g2"] == pytest.approx(0, abs=1e-9)
    assert all(reach.largest_alone[name] > 0.9 for name in ("g0", "g1"))
    # the share is exact: a little less can be solved, a little more cannot
    assert solve(bank, BETA, np.array([0.9, 0.9, -1.0]) * reach.common_scale * 0.999).converged
    with pytest.raises(UnreachableMargin):
        solve(bank, BETA, np.array([0.9, 0.9, -1.0]) * reach.common_scale * 1.001)


def test_the_proof_of_unreachability_holds(scores):
    bank = bank_of(*scores)
    margins = np.array([1.0, 1.1, 1.2])
    reach = reachable(bank, margins)
    v = np.array(list(reach.direction.values()))
    gain = bank.utilities - bank.utilities.mean(1, keepdims=True)
    assert not reach.reachable
    assert (v >= 0).all()
    assert (gain @ v).max(1).mean() < v @ margins


def test_responses_needed_is_exact_within_the_bank_and_extrapolated_beyond():
    rng = np.random.default_rng(0)
    bank = bank_of(rng.normal(size=(400, 32)))
    # E max of n standard normals, less the mean: n = 16 gives 1.766, n = 256 gives 2.83
    assert reachable(bank, 1.7).responses_needed in range(13, 18)
    assert reachable(bank, 2.82).responses_needed in range(128, 512)
    assert reachable(bank_of(rng.normal(size=(4, 3))), 9.0).responses_needed is None
    listed = bank_of(rng.normal(size=(40, 32)), log_weights=np.full((40, 32), -np.log(32)))
    assert reachable(listed, 9.0).responses_needed is None


def test_the_expected_best_of_a_subset_matches_enumeration():
    from itertools import combinations

    values = np.random.default_rng(1).normal(size=(1, 9))
    gain = values - values.mean()
    means = [np.mean([gain[0, list(c)].max() for c in combinations(range(9), n)]) for n in range(1, 10)]
    for n in range(2, 10):
        assert reachable(bank_of(values), means[n - 1] - 1e-9).responses_needed == n


def test_identical_utilities_converge_to_one_of_many(scores):
    twins = bank_of(scores[1], scores[1], reward=scores[0])
    single = solve(bank_of(scores[1], reward=scores[0]), BETA, 0.4)
    found = solve(twins, BETA, [0.4, 0.4])
    assert found.converged
    assert not found.identified
    assert found.null_directions[0]["g0"] == pytest.approx(-found.null_directions[0]["g1"])
    assert found.multipliers.sum() == pytest.approx(single.multipliers[0])
    assert found.value == pytest.approx(single.value)
    # with different margins the stronger one carries all
    uneven = solve(twins, BETA, [0.3, 0.4])
    assert uneven.converged
    assert uneven.identified
    assert uneven.at_bound == {"g0": "lower", "g1": None}


def test_a_utility_of_the_prompt_alone_cannot_be_moved(scores):
    flat = np.repeat(np.arange(20.0)[:, None], 8, axis=1)
    bank = bank_of(scores[1], flat, reward=scores[0])
    slope = [evaluate(bank, BETA, [0.4, -0.2], [0.5, x]).gradient[1] for x in (0.0, 1.0, 7.0)]
    assert slope == pytest.approx([0.2] * 3), "the dual is linear in such a multiplier"
    assert solve(bank, BETA, [0.4, -0.2]).identified
    assert not solve(bank, BETA, [0.4, 0.0]).identified
    with pytest.raises(UnreachableMargin, match=r"g1 >= 0\.1"):
        solve(bank, BETA, [0.4, 0.1])


def test_bounds_hold_and_are_named(bank):
    slack = solve(bank, BETA, [-2.0, 0.4])
    assert slack.at_bound["g0"] == "lower"
    assert slack.multipliers[0] == 0
    assert slack.gradient[0] > 0
    free = solve(bank, BETA, [0.5, 0.4])
    capped = solve(bank, BETA, [0.5, 0.4], upper={"g0": free.multipliers[0] / 2, "g1": np.inf})
    assert capped.converged
    assert capped.at_bound == {"g0": "upper", "g1": None}
    assert capped.gradient[0] < 0
    # a cap makes any margin solvable
    assert solve(bank, BETA, [50.0, 50.0], upper=3.0).multipliers == pytest.approx([3.0, 3.0])
    assert np.isnan(slack.standard_errors[0])
    assert slack.standard_errors[1] > 0


def test_starts_and_scales_do_not_matter(bank):
    plain = solve(bank, BETA, [0.5, 0.4])
    far = solve(bank, BETA, [0.5, 0.4], start=[30.0, 2.0])
    assert far.multipliers == pytest.approx(plain.multipliers, rel=1e-8)
    factor = np.array([1e4, 1e-3])
    rescaled = Bank(bank.prompts, bank.names, bank.reward, bank.utilities * factor, bank.log_weights)
    assert solve(rescaled, BETA, np.array([0.5, 0.4]) * factor).multipliers * factor == pytest.approx(plain.multipliers)


def test_a_path_is_the_pointwise_solution(bank):
    grid = np.linspace(-0.5, 2.5, 12)[:, None] * [1.0, 0.7]
    path = solve_path(bank, BETA, grid)
    kinds = [type(entry) for entry in path]
    assert Solution in kinds
    assert kinds[-1] is UnreachableMargin
    for margins, entry in zip(grid, path, strict=True):
        if isinstance(entry, Solution):
            assert entry.multipliers == pytest.approx(solve(bank, BETA, margins).multipliers, abs=1e-8)
        else:
            assert not reachable(bank, margins).reachable


def test_prediction_is_the_direct_computation(bank):
    lam = np.array([0.3, 0.8])
    weights = np.exp((bank.reward + bank.utilities @ lam) / BETA)
    weights /= weights.sum(1, keepdims=True)
    found = predict(bank, BETA, lam)
    assert found.reward == pytest.approx((weights * bank.reward).sum(1).mean())
    assert found.kl == pytest.approx((weights * np.log(weights * 8)).sum(1).mean())
    assert found.objective == pytest.approx(found.reward - BETA * found.kl)
    assert found.ess_mean == pytest.approx((1 / (weights**2).sum(1)).mean())
    assert found.largest_weight == pytest.approx(weights.max())
    assert found.kl <= found.kl_ceiling == pytest.approx(np.log(8))
    for j, name in enumerate(bank.names):
        assert found.utilities[name] == pytest.approx((weights * bank.utilities[..., j]).sum(1).mean())
        assert found.margins[name] == pytest.approx(found.utilities[name] - bank.reference_means[name])


def test_rows_of_different_length_weigh_prompts_alike():
    ids = ["a", "b", "a", "b", "b"]
    bank = Bank.from_rows(ids, np.arange(5.0), {"safety": np.array([1.0, 2.0, 3.0, 4.0, 9.0])})
    assert bank.prompts == ("a", "b")
    assert bank.reward[0, :2].tolist() == [0.0, 2.0]
    assert bank.log_weights[0, 2] == -np.inf
    assert bank.reference_means == pytest.approx({"safety": 3.5, "reward": (1 + 8 / 3) / 2})
    weights = np.exp(np.arange(5.0) / 2.0)
    a, b = weights[[0, 2]], weights[[1, 3, 4]]
    expected = ((a @ [0, 2]) / a.sum() + (b @ [1, 3, 4]) / b.sum()) / 2
    assert predict(bank, 2.0, {"safety": 0.0}).reward == pytest.approx(expected)
    assert solve(bank, 2.0, {"safety": 1.2}).prediction.margins["safety"] == pytest.approx(1.2)


def test_log_weights_are_renormalised_and_may_exclude_an_answer():
    weights = np.array([np.log(3.0), 0.0, -np.inf, 5.0, 5.0])
    bank = Bank.from_rows(list("aaabb"), np.ones(5), {"g": np.arange(5.0)}, weights)
    assert np.exp(bank.log_weights[0]).tolist() == pytest.approx([0.75, 0.25, 0.0])
    assert bank.reference_means["g"] == pytest.approx((0.25 + 3.5) / 2)
    assert not bank.sampled
    assert predict(bank, 1.0, 0.0).kl_ceiling is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": np.array([1.0, np.nan, 0.0, 1.0])}, r"reward is NaN.*\n.*row 1 \(a: nan\)"),
        ({"utilities": {"g": np.array([0.0, 1.0, np.inf, 1.0])}}, r"g is NaN.*\n.*row 2 \(b: inf\)"),
        ({"utilities": {"g": np.zeros(3)}}, r"g has shape \(3,\) for 4"),
        ({"utilities": {}}, "no utility"),
        ({"prompt_ids": [], "reward": np.zeros(0), "utilities": {"g": np.zeros(0)}}, "no row"),
        ({"prompt_ids": list("abcd")}, "single response"),
        ({"log_weights": np.array([0.0, 0.0, -np.inf, -np.inf])}, "prompt b"),
        ({"log_weights": np.array([0.0, np.nan, 0.0, 0.0])}, r"log_weights.*\n.*row 1"),
    ],
)
def test_rows_that_cannot_stand_for_the_reference_are_refused(change, message):
    rows = {"prompt_ids": list("aabb"), "reward": np.zeros(4), "utilities": {"g": np.arange(4.0)}}
    with pytest.raises(DataError, match=message):
        Bank.from_rows(**(rows | change))


def test_arguments_that_make_no_sense_are_refused(bank):
    with pytest.raises(ConfigError, match="margins"):
        solve(bank, BETA, {"g0": 0.1})
    with pytest.raises(ConfigError, match="margins"):
        solve(bank, BETA, [0.1, np.nan])
    with pytest.raises(ConfigError, match="beta"):
        predict(bank, 0.0, [0.1, 0.1])
    with pytest.raises(ConfigError, match="one utility"):
        released_schedule(bank, BETA, 0.1)


def test_results_are_plain_json(bank):
    found = solve(bank, BETA, [-2.0, 0.4])
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["standard_errors"][0] is None
    interval = jackknife_interval(Reweighted(bank, BETA, found.margins))
    json.dumps([reachable(bank, [-1, -1]).to_dict(), interval.to_dict()], allow_nan=False)


def test_projected_gradient_with_its_default_step_reaches_the_solution(bank):
    found = solve(bank, BETA, [0.3, 0.2])
    path = projected_gradient(bank, BETA, [0.3, 0.2], iterations=600)
    assert path.multipliers.shape == (601, 2)
    assert path.multipliers[-1] == pytest.approx(found.multipliers, abs=1e-4)
    assert (np.diff(path.values) <= 1e-12).all()
    assert not path.oscillates


def test_the_papers_step_oscillates_on_a_sharp_bank_and_the_default_does_not():
    # responses at +-3 and the step beta / G of CAN's theory, where the curvature asks for beta / G^2
    two = bank_of(np.tile([3.0, -3.0], (5, 1)))
    assert smoothness(two, 0.1) == pytest.approx(90)
    long = projected_gradient(two, 0.1, 0.3, step=0.1 / 3, start=0.05)
    assert long.oscillates
    assert oscillation(long.multipliers[:, 0])
    assert not projected_gradient(two, 0.1, 0.3, start=0.05).oscillates


def test_oscillation_tells_a_swing_from_a_ringing_that_dies():
    t = np.arange(60)
    assert oscillation((-1.0) ** t)
    assert oscillation(np.stack([0.0 * t, 2 + np.sin(t)], axis=1))
    assert not oscillation((-0.9) ** t)
    assert not oscillation(0.9**t)
    assert not oscillation(np.ones(60))
    assert not oscillation(np.array([1.0, 2.0]))


def test_released_schedule_agrees_where_it_converges_and_gives_up_elsewhere(scores):
    bank = bank_of(scores[1], reward=scores[0])
    assert released_schedule(bank, BETA, 0.4) == pytest.approx(solve(bank, BETA, 0.4).multipliers[0], abs=1e-4)
    # step 1 swings here, the first restarts settle
    sharp = bank_of(4 * scores[1], reward=scores[0])
    assert projected_gradient(sharp, 0.1, 1.6, step=1.0).oscillates
    assert released_schedule(sharp, 0.1, 1.6) == pytest.approx(solve(sharp, 0.1, 1.6).multipliers[0], abs=1e-3)
    assert released_schedule(bank, BETA, 3.0) is None, "unreachable, so the multiplier grows for ever"


def test_released_schedule_divides_its_step_ever_more():
    # curvature 89 asks for a step below 0.022: reached by the third restart (1, 1/2, 1/8, 1/64)
    two = bank_of(np.tile([3.0, -3.0], (5, 1)))
    assert released_schedule(two, 0.1, 0.3, restarts=2) is None
    third = released_schedule(two, 0.1, 0.3, restarts=3)
    assert third == pytest.approx(solve(two, 0.1, 0.3).multipliers[0], abs=1e-5)


def test_released_schedule_doubles_a_given_step(scores):
    # and a step so small that nothing moves counts as converged, at the start: a quirk of the release
    bank = bank_of(scores[1], reward=scores[0])
    assert released_schedule(bank, BETA, 0.4, step=0.5, restarts=0) == released_schedule(bank, BETA, 0.4, restarts=0)
    assert released_schedule(bank, BETA, 0.4, step=1e-7, restarts=0) == pytest.approx(1.0, abs=1e-4)


def covered(prompts, runs, interval_of):
    """Share of intervals of lambda* and of its margin that hold the truth, of banks of `prompts` out of one world."""
    rng = np.random.default_rng(5)
    # many responses each, so that the estimate is unbiased and only the draw of prompts matters
    world = rng.normal(size=(prompts * runs, 2, 8)) + 0.5 * rng.normal(size=(prompts * runs, 2, 1))
    world[:, 1] *= rng.uniform(0.3, 2.0, size=(prompts * runs, 1))
    whole = bank_of(world[:, 1], reward=world[:, 0])
    truth = solve(whole, 1.0, 0.3).multipliers[0]
    intervals, found = [], np.zeros(runs)
    for run in range(runs):
        part = world[prompts * run : prompts * (run + 1)]
        again = Reweighted(bank_of(part[:, 1], reward=part[:, 0]), 1.0, 0.3)
        found[run] = again.whole.multipliers[0]
        interval = interval_of(again)
        intervals.append([interval.multipliers["g0"], interval.margins["g0"]])
    # what a multiplier attains in the whole world: a smooth function of one variable, so 100 points of it will do
    grid = np.linspace(found.min(), found.max(), 100)
    attained = np.interp(found, grid, [evaluate(whole, 1.0, 0.0, point).gradient[0] for point in grid])
    low, high = np.moveaxis(np.array(intervals), 2, 0)
    true = np.stack([np.full(runs, truth), attained], axis=1)
    return ((low <= true) & (true <= high)).mean(axis=0)


@pytest.mark.slow
@pytest.mark.parametrize(("prompts", "runs"), [(8, 4000), (16, 800), (50, 800)])
def test_jackknife_intervals_cover(prompts, runs):
    inside = covered(prompts, runs, jackknife_interval)
    # simulation error: 0.4 points with 8 prompts, whose coverage is the lowest, 0.8 points with more
    assert (inside >= 0.93).all(), inside
    assert (inside <= 0.97).all(), inside


@pytest.mark.slow
def test_bootstrap_intervals_cover():
    inside = covered(FEWEST_RESAMPLED, 600, bootstrap_interval)
    # simulation error: 0.9 points
    assert (inside >= 0.93).all(), inside
    assert (inside <= 0.97).all(), inside


@pytest.mark.parametrize("prompts", [1, 7])
def test_too_few_prompts_have_no_interval(prompts):
    again = Reweighted(bank_of(np.random.default_rng(8).normal(size=(prompts, 16))), 1.0, 0.1)
    for found in (jackknife_interval(again), bootstrap_interval(again)):
        assert found.multipliers["g0"] == (0, np.inf)
        assert found.margins["g0"] == (-np.inf, np.inf)
        assert found.to_dict()["margins"]["g0"] == [None, None]


@pytest.mark.parametrize("interval_of", [jackknife_interval, bootstrap_interval])
def test_many_prompts_have_the_sandwich_s_interval(interval_of):
    rng = np.random.default_rng(6)
    scores = rng.normal(size=(3, 300, 16))
    bank = bank_of(scores[1], scores[2], reward=scores[0])
    margins = {"g0": 0.4, "g1": 0.3}
    solution = solve(bank, 1.0, margins)
    found = interval_of(Reweighted(bank, 1.0, margins))
    assert found.unreachable == 0
    for name, multiplier, error in zip(bank.names, solution.multipliers, solution.standard_errors, strict=True):
        low, high = found.multipliers[name]
        assert (low, high) == pytest.approx((multiplier - 1.96 * error, multiplier + 1.96 * error), abs=0.8 * error)
        assert found.margins[name][0] < margins[name] < found.margins[name][1]


def test_without_each_prompt_is_the_dual_of_the_others():
    rng = np.random.default_rng(9)
    scores = rng.normal(size=(3, 12, 16))
    again = Reweighted(bank_of(scores[1], scores[2], reward=scores[0]), 1.0, {"g0": 0.3, "g1": 0.2})
    for k in (0, 7):
        rest = np.delete(scores, k, axis=1)
        alone = solve(bank_of(rest[1], rest[2], reward=rest[0]), 1.0, {"g0": 0.3, "g1": 0.2}).multipliers
        np.testing.assert_allclose(again.without_each[k], alone, atol=1e-6)
        left_out = bank_of(scores[1, k : k + 1], scores[2, k : k + 1], reward=scores[0, k : k + 1])
        gained = evaluate(left_out, 1.0, [0.0, 0.0], alone).gradient
        np.testing.assert_allclose(again.gains_elsewhere[k], gained, atol=1e-6)


def test_unreachable_resamples_are_counted_and_leave_the_interval_open():
    rng = np.random.default_rng(7)
    bank = bank_of(rng.normal(size=(FEWEST_RESAMPLED, 4)))
    edge = reachable(bank, 0.0).largest_alone["g0"]
    again = Reweighted(bank, 1.0, edge - 0.01)
    found = bootstrap_interval(again, resamples=60)
    assert 15 < found.unreachable < 45
    assert found.multipliers["g0"][1] == np.inf
    assert found.to_dict()["multipliers"]["g0"][1] is None
    assert jackknife_interval(again).multipliers["g0"] == (0, np.inf)
