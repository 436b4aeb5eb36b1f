"""The exact certificate: zero at the optimum, weak duality elsewhere, and each figure against a direct sum."""

import json

import numpy as np
import pytest
from scipy.special import log_softmax

from alignbench.certificate import certify, tilted
from alignbench.dual import Bank, UnreachableMargin, evaluate, solve
from alignbench.errors import DataError

BETA, MARGINS = 0.2, np.array([0.25, 0.1])


@pytest.fixture(params=range(3))
def world(request):
    rng = np.random.default_rng(request.param)
    weights = log_softmax(rng.normal(size=(5, 7)), axis=1)
    weights[0, 5:] = -np.inf  # a shorter list
    weights[0] -= np.log(np.exp(weights[0]).sum())
    reward, utilities = 0.4 * rng.normal(size=(5, 7)), 0.5 * rng.normal(size=(5, 7, 2))
    return Bank(tuple("abcde"), ("safe", "kind"), reward, utilities, weights, False)


def random_policy(world, rng, spread=1.0):
    return world.log_weights + spread * rng.normal(size=world.log_weights.shape)


def direct(world, log_policy):
    """Reward, utilities (m,), KL by plain sums over the listed answers."""
    reward, utilities, kl = 0.0, np.zeros(2), 0.0
    for k in range(len(world.prompts)):
        listed = np.isfinite(world.log_weights[k])
        p = np.exp(log_policy[k, listed])
        p /= p.sum()
        reward += p @ world.reward[k, listed] / 5
        utilities += p @ world.utilities[k, listed] / 5
        kl += p @ (np.log(p) - world.log_weights[k, listed]) / 5
    return reward, utilities, kl


GAPS = (
    "optimality_gap",
    "primal_dual_gap",
    "optimal_dual_gap",
    "lagrangian_gap",
    "kl_to_target",
    "reward_optimality",
)


def test_the_optimum_has_no_gap(world):
    optimum = solve(world, BETA, MARGINS)
    found = certify(world, tilted(world, BETA, optimum.multipliers), MARGINS, BETA, optimum=optimum)
    for gap in GAPS:
        assert getattr(found, gap) == pytest.approx(0, abs=1e-9), gap
    assert found.utility_optimality == pytest.approx(0, abs=1e-9)
    assert max(found.constraint_gap.values()) < 1e-9
    assert set(found.lambda_error.values()) == {0.0}
    assert found.bounds.nu_l1 == pytest.approx(0, abs=1e-9)
    assert found.bounds.one_shot_reward == pytest.approx(0, abs=1e-3)


def test_figures_are_the_direct_sums(world):
    policy = random_policy(world, np.random.default_rng(9)) + 7.0  # unnormalised on purpose
    found = certify(world, policy, MARGINS, BETA, multipliers={"kind": 0.4, "safe": 0.3})
    reward, utilities, kl = direct(world, policy)
    base_reward, base, _ = direct(world, world.log_weights)
    optimum = solve(world, BETA, MARGINS)
    best_reward, best, best_kl = direct(world, tilted(world, BETA, optimum.multipliers))
    assert found.reward == pytest.approx(reward)
    assert list(found.utilities.values()) == pytest.approx(utilities.tolist())
    assert list(found.margins.values()) == pytest.approx((utilities - base).tolist())
    assert found.kl == pytest.approx(kl)
    assert found.objective == pytest.approx(reward - BETA * kl)
    assert found.reference_objective == pytest.approx(base_reward)
    assert found.optimum_objective == pytest.approx(best_reward - BETA * best_kl)
    assert found.optimality_gap == pytest.approx(best_reward - BETA * best_kl - reward + BETA * kl)
    assert found.reward_optimality == pytest.approx(abs(found.optimality_gap))
    assert found.utility_optimality == pytest.approx(np.abs(utilities - best).max())
    gap = np.maximum(MARGINS - (utilities - base), 0)
    assert list(found.constraint_gap.values()) == pytest.approx(gap.tolist())
    dual = evaluate(world, BETA, MARGINS, [0.3, 0.4]).value
    assert found.primal_dual_gap == pytest.approx(dual - found.objective)
    assert list(found.lambda_error.values()) == pytest.approx(np.abs([0.3, 0.4] - optimum.multipliers).tolist())
    free_reward, free, free_kl = direct(world, tilted(world, BETA, np.zeros(2)))
    assert found.unconstrained_objective == pytest.approx(free_reward - BETA * free_kl)
    listed = np.where(np.isfinite(world.log_weights)[..., None], world.utilities, -np.inf)
    room = listed.max(1).mean(0) - free
    assert list(found.constraint_gap_share.values()) == pytest.approx((gap / room).tolist())


def test_gain_share_runs_from_the_reference_to_the_optimum(world):
    easy = np.array([0.05, 0.02])
    optimum = solve(world, BETA, easy)
    assert certify(world, world.log_weights, easy, BETA).gain_share == pytest.approx(0, abs=1e-9)
    best = certify(world, tilted(world, BETA, optimum.multipliers), easy, BETA)
    assert best.gain_share == pytest.approx(1)
    # where the margins cost more than the reward gains there is no such share
    hard = np.array(list(best.most_constrained_margins.values())) * np.array([0.97, -1.0])
    costly = certify(world, world.log_weights, hard, 5.0)
    assert costly.optimum_objective < costly.reference_objective
    assert np.isnan(costly.gain_share)


def test_weak_duality_for_any_feasible_policy_and_multiplier(world):
    rng = np.random.default_rng(1)
    optimum, kept = solve(world, BETA, MARGINS), 0
    for _ in range(200):
        lam = rng.exponential(size=2)
        # a mixture of random policies with one that is pushed towards the utilities
        policy = random_policy(world, rng, 0.3) + (world.utilities @ rng.exponential(size=2)) / BETA
        found = certify(world, policy, MARGINS, BETA, multipliers=lam, optimum=optimum)
        if max(found.constraint_gap.values()) == 0.0:
            kept += 1
            assert found.primal_dual_gap >= 0
            assert found.optimality_gap >= -1e-9
        assert evaluate(world, BETA, MARGINS, lam).value >= optimum.value - 1e-9
        assert found.kl_to_target >= 0
    assert kept > 5


def test_primal_dual_gap_is_the_divergence_to_the_target_and_the_slack(world):
    # L(pi_lambda) - L(pi) = beta KL(pi || pi_lambda): the Lagrangian's Bregman distance
    rng = np.random.default_rng(2)
    lam = np.array([0.5, 0.2])
    found = certify(world, random_policy(world, rng), MARGINS, BETA, multipliers=lam)
    slack = np.array(list(found.margins.values())) - MARGINS
    assert found.primal_dual_gap == pytest.approx(BETA * found.kl_to_target + lam @ slack)
    # the same identity at lambda*, whatever multiplier the method used
    best = np.array(list(found.optimum_multipliers.values()))
    assert found.lagrangian_gap == pytest.approx(found.optimal_dual_gap - best @ slack)
    assert found.lagrangian_gap > 0


def test_a_wrong_multiplier_is_told_from_a_missed_target(world):
    lam = np.array([0.9, 0.1])
    found = certify(world, tilted(world, BETA, lam), MARGINS, BETA, multipliers=lam)
    assert found.kl_to_target == pytest.approx(0, abs=1e-12)
    assert max(found.lambda_error.values()) > 1e-3
    assert found.bounds.nu_l1 == pytest.approx(0, abs=1e-12)


def test_bounds_are_put_together_as_stated(world):
    lam = np.array([0.5, 0.2])
    policy = tilted(world, BETA, lam) + 0.05 * np.random.default_rng(3).normal(size=(5, 7))
    optimum = solve(world, BETA, MARGINS)
    bounds = certify(world, policy, MARGINS, BETA, multipliers=lam, optimum=optimum).bounds
    nu, norm = max(bounds.nu_l1, bounds.nu_kl), optimum.multipliers.sum()
    price = (bounds.largest_score * (1 + norm) + BETA) * nu
    assert bounds.multiplier_norm == pytest.approx(norm)
    assert bounds.one_shot_utility**2 == pytest.approx(2 * bounds.smoothness * price)
    assert bounds.one_shot_reward == pytest.approx(norm * bounds.one_shot_utility + price)
    used = (bounds.largest_score * (1 + lam.sum()) + BETA) * nu
    constant = bounds.smoothness + bounds.smoothness**2 / bounds.strong_convexity
    assert bounds.multi_shot_utility**2 == pytest.approx(4 * constant * used)
    assert bounds.strong_convexity <= bounds.smoothness_at_optimum <= bounds.smoothness
    raised = solve(world, BETA, MARGINS + bounds.largest_score * nu).multipliers.sum()
    rest = (bounds.largest_score * (1 + raised) + BETA) * nu
    assert bounds.multi_shot_reward == pytest.approx(lam.sum() * bounds.multi_shot_utility + rest)
    # the utility gap that the policy really has lies far below the indicative bounds
    found = certify(world, policy, MARGINS, BETA, multipliers=lam)
    assert found.utility_optimality <= bounds.multi_shot_utility


def test_the_result_is_plain_json(world):
    text = json.dumps(certify(world, world.log_weights, MARGINS, BETA).to_dict(), allow_nan=False)
    assert set(json.loads(text)["margins"]) == {"safe", "kind"}


def test_an_answer_the_policy_never_gives_is_no_trouble(world):
    policy = world.log_weights.copy()
    policy[1, 0] = -np.inf
    assert np.isfinite(certify(world, policy, MARGINS, BETA).kl)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p[:, :-1], "shape"),
        (lambda p: np.where(p > -np.inf, p, 0.0), "cannot give"),
        (lambda p: np.where(np.arange(5)[:, None] == 2, -np.inf, p), "prompt c"),
        (lambda p: p * np.nan, "NaN"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(world, spoil, message):
    with pytest.raises(DataError, match=message):
        certify(world, spoil(world.log_weights), MARGINS, BETA)


def test_an_optimum_of_another_problem_is_refused(world):
    with pytest.raises(DataError, match="another problem"):
        certify(world, world.log_weights, MARGINS, BETA, optimum=solve(world, BETA, MARGINS / 2))
    with pytest.raises(DataError, match="another problem"):
        certify(world, world.log_weights, MARGINS, BETA, optimum=solve(world, 2 * BETA, MARGINS))


def test_margins_no_policy_keeps_are_refused(world):
    with pytest.raises(UnreachableMargin):
        certify(world, world.log_weights, [9.0, 0.0], BETA)
