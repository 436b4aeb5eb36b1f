"""The dual's identities (CAN, arXiv 2405.19544, sec. 3, 4.2, app. H) on a fixed toy and on random tables."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, minimize

from alignbench.dual import Bank, UnreachableMargin, evaluate, predict, reachable, solve
from alignbench.dual_descent import smoothness
from alignbench.problem import Problem

EXACT = 1e-9
few = settings(max_examples=40, deadline=None, derandomize=True)


class Table:
    """A world of listed answers with the plain formulas, kept apart from the code under test."""

    def __init__(self, reference, reward, utilities, beta, margins):
        self.reference, self.reward, self.utilities = reference, reward, utilities  # (K, Y), (K, Y), (m, K, Y)
        self.beta, self.margins = beta, np.asarray(margins, float)

    @property
    def bank(self):
        return self.bank_with(self.reward, self.utilities)

    def bank_with(self, reward, utilities, reference=None):
        reference = self.reference if reference is None else reference
        ids, names = tuple(map(str, range(len(reward)))), tuple("abc"[: len(utilities)])
        return Bank(ids, names, reward, np.moveaxis(np.asarray(utilities), 0, -1), np.log(reference), False)

    def mean(self, policy, score):
        return (policy * score).sum(-1).mean(-1)

    def kl(self, p, q):
        return (p * np.log(p / q)).sum(1).mean()

    def gibbs(self, score, beta=None):
        beta = self.beta if beta is None else beta
        raw = self.reference * np.exp((score - score.max(1, keepdims=True)) / beta)
        return raw / raw.sum(1, keepdims=True)

    def slack(self, policy):
        return self.mean(policy, self.utilities) - self.mean(self.reference, self.utilities) - self.margins

    def objective(self, policy):
        return self.mean(policy, self.reward) - self.beta * self.kl(policy, self.reference)

    def lagrangian(self, policy, lam):
        return self.objective(policy) + lam @ self.slack(policy)


def toy():
    """Four prompts, six answers: the draws of the notes' reference vector, in their order."""
    rng = np.random.default_rng(0)
    reference = rng.dirichlet(np.full(6, 3.0), size=4)
    reward = 0.3 * rng.normal(size=(4, 6))
    return Table(reference, reward, 0.3 * rng.normal(size=(1, 4, 6)), 0.1, [0.25])


@st.composite
def tables(draw, max_utilities=3):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    prompts, answers, m = draw(st.integers(1, 5)), draw(st.integers(2, 7)), draw(st.integers(1, max_utilities))
    reference = rng.dirichlet(np.full(answers, 2.0), size=prompts)
    utilities = rng.normal(size=(m, prompts, answers)) * draw(st.sampled_from([0.1, 1.0, 20.0]))
    beta = draw(st.sampled_from([0.05, 0.3, 2.0]))
    target = rng.dirichlet(np.ones(answers), size=prompts)
    margins = 0.7 * ((target - reference) * utilities).sum(-1).mean(-1)  # reachable: between the reference and target
    return Table(reference, rng.normal(size=(prompts, answers)), utilities, beta, margins)


multipliers = st.lists(st.floats(0.0, 3.0), min_size=3, max_size=3).map(np.array)


def test_toy_values():
    world = toy()
    found = solve(world.bank, world.beta, world.margins)
    assert found.multipliers[0] == pytest.approx(0.28715367, abs=5e-9)
    assert found.value == pytest.approx(0.26702210, abs=5e-9)


def test_strong_duality_on_the_toy():
    # the primal as it stands, in the answers' probabilities: a concave objective under linear constraints, with exact
    # gradients; with finite differences, or in logits, the search may end 1e-8 short of the optimum
    world = toy()
    prompts, answers = world.reference.shape
    per_prompt = np.kron(np.eye(prompts), np.ones(answers))
    utility = world.utilities[0].ravel() / prompts

    def slope(policy):
        return (world.reward - world.beta * (np.log(policy / world.reference) + 1)).ravel() / prompts

    primal = minimize(
        lambda p: -world.objective(p.reshape(prompts, answers)),
        world.reference.ravel(),
        jac=lambda p: -slope(p.reshape(prompts, answers)),
        bounds=Bounds(1e-12, 1.0),
        constraints=[
            {"type": "eq", "fun": lambda p: per_prompt @ p - 1, "jac": lambda p: per_prompt},
            {
                "type": "ineq",
                "fun": lambda p: world.slack(p.reshape(prompts, answers)),
                "jac": lambda p: utility[None],
            },
        ],
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-15},
    )
    assert primal.success
    assert -primal.fun == pytest.approx(solve(world.bank, world.beta, world.margins).value, abs=EXACT)


@few
@given(tables(), multipliers, st.integers(0, 1000))
def test_the_dual_is_the_largest_lagrangian(world, lam, seed):
    lam = lam[: len(world.margins)]
    value = evaluate(world.bank, world.beta, world.margins, lam).value
    best = world.gibbs(world.reward + np.tensordot(lam, world.utilities, 1))
    size = 1 + abs(value)
    # a Gibbs policy of a sharp score has exact zeros, which the plain KL formula cannot take
    if best.min() > 1e-250:
        assert world.lagrangian(best, lam) == pytest.approx(value, abs=EXACT * size)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        policy = rng.dirichlet(np.ones(world.reference.shape[1]), size=len(world.reference)) + 1e-12
        policy /= policy.sum(1, keepdims=True)
        assert world.lagrangian(policy, lam) <= value + EXACT * size


@few
@given(tables(), multipliers)
def test_gradient_and_hessian_are_derivatives(world, lam):
    bank, beta, b, m = world.bank, world.beta, world.margins, len(world.margins)
    scale = world.utilities.std()
    lam, step = lam[:m] * beta / scale, 1e-4 * beta / scale
    point = evaluate(bank, beta, b, lam)
    for j in range(m):
        up, down = (evaluate(bank, beta, b, lam + sign * step * np.eye(m)[j]) for sign in (1, -1))
        assert (up.value - down.value) / (2 * step) == pytest.approx(point.gradient[j], abs=1e-6 * scale)
        numeric = (up.gradient - down.gradient) / (2 * step)
        assert numeric == pytest.approx(point.hessian[j], abs=1e-6 * scale**2 / beta)
    assert np.linalg.eigvalsh(point.hessian)[-1] <= smoothness(bank, beta) * (1 + 1e-12)


@few
@given(tables(), st.integers(0, 1000))
def test_a_shift_by_the_prompt_changes_nothing(world, seed):
    # the margin form's invariance: a Bradley-Terry score is only known up to f(x)
    shift = 50 * np.random.default_rng(seed).normal(size=(len(world.margins), len(world.reward), 1))
    plain = solve(world.bank, world.beta, world.margins)
    moved = solve(world.bank_with(world.reward, world.utilities + shift), world.beta, world.margins)
    assert moved.multipliers == pytest.approx(plain.multipliers, rel=1e-6, abs=1e-7)
    assert moved.value == pytest.approx(plain.value, abs=1e-8 * (1 + abs(plain.value)))


@few
@given(tables(), st.sampled_from(["absolute_utility", "absolute_cost"]))
def test_threshold_forms_have_the_same_multiplier(world, form):
    bank = world.bank
    floor = np.array([bank.reference_means[name] for name in bank.names]) + world.margins
    thresholds = tuple(floor if form == "absolute_utility" else -floor)
    problem = Problem(beta=world.beta, form=form, utilities=bank.names, thresholds=thresholds)
    by_threshold = solve(bank, problem.beta, problem.margins(bank.reference_means))
    by_margin = solve(bank, world.beta, world.margins)
    assert by_threshold.margins == pytest.approx(world.margins, abs=1e-12 * (1 + np.abs(floor).max()))
    # the round-off of the threshold is magnified where the weights have concentrated
    assert by_threshold.multipliers == pytest.approx(by_margin.multipliers, rel=1e-3, abs=1e-6)


@few
@given(tables())
def test_the_optimum_keeps_the_margins_and_has_no_duality_gap(world):
    found = solve(world.bank, world.beta, world.margins)
    assert found.converged
    assert (found.multipliers >= 0).all()
    scale = 1 + np.abs(world.utilities).max()
    assert (found.gradient >= -1e-8 * scale).all()
    assert found.multipliers * found.gradient == pytest.approx(np.zeros(len(world.margins)), abs=1e-7 * scale)
    assert found.prediction.objective == pytest.approx(found.value, abs=1e-7 * (1 + abs(found.value)))


@few
@given(tables())
def test_margins_of_a_full_support_policy_are_reachable_and_beyond_reach_is_refused(world):
    assert reachable(world.bank, world.margins).reachable
    edge = np.array(list(reachable(world.bank, world.margins).largest_alone.values()))
    beyond = world.margins.copy()
    beyond[0] = edge[0] + 1e-3 * (1 + abs(edge[0]))
    with pytest.raises(UnreachableMargin):
        solve(world.bank, world.beta, beyond)


@few
@given(tables(), multipliers)
def test_solving_for_the_predicted_margin_returns_the_multiplier(world, lam):
    # the inverse map lambda -> b; bounded tilts, since a saturated policy forgets its multiplier
    lam = lam[: len(world.margins)] * world.beta / world.utilities.std()
    margins = predict(world.bank, world.beta, lam).margins
    found = solve(world.bank, world.beta, margins)
    if found.identified and np.linalg.cond(found.hessian) < 1e6 and found.prediction.ess_low > 1.01:
        assert found.multipliers == pytest.approx(lam, rel=1e-3, abs=1e-4 * (1 + lam.max()))
    assert found.value <= evaluate(world.bank, world.beta, margins, lam).value + EXACT * (1 + abs(found.value))


def log_mean_exp(weights, exponent):
    top = exponent.max(1, keepdims=True)
    return (np.log((weights * np.exp(exponent - top)).sum(1, keepdims=True)) + top).mean()


def preference_dual(world, lam, beta_r, beta_g):
    """Algorithm 3's objective with pre-aligned models of KL weights beta_r, beta_g (Algorithm 2 when equal)."""
    helpful, safe = world.gibbs(world.reward, beta_r), world.gibbs(world.utilities[0], beta_g)
    ratio_r, ratio_g = np.log(helpful / world.reference), np.log(safe / world.reference)
    d = world.kl(world.reference, safe)
    exponent = beta_r / world.beta * ratio_r + lam * beta_g / world.beta * ratio_g
    offset = lam * (beta_g / world.beta * d - world.margins[0] / world.beta)
    return log_mean_exp(world.reference, exponent) + offset


@pytest.mark.parametrize(("beta_r", "beta_g"), [(0.1, 0.1), (0.05, 0.02)])
def test_the_preference_dual_is_this_dual_over_beta(beta_r, beta_g):
    world = toy()
    difference = [
        evaluate(world.bank, world.beta, world.margins, lam).value / world.beta
        - preference_dual(world, lam, beta_r, beta_g)
        for lam in (0.0, 0.3, 1.0, 4.0)
    ]
    assert np.ptp(difference) < EXACT


def test_equation_20_averages_over_the_helpful_model():
    world = toy()
    helpful, safe = world.gibbs(world.reward), world.gibbs(world.utilities[0])
    ratio, d = np.log(safe / world.reference), world.kl(world.reference, safe)
    for lam in (0.0, 0.5, 2.0):
        second = log_mean_exp(helpful, lam * ratio) + lam * (d - world.margins[0] / world.beta)
        # E_x ln Z of the helpful model is the constant between the two
        first = preference_dual(world, lam, world.beta, world.beta)
        assert first == pytest.approx(second, abs=EXACT)


@pytest.mark.parametrize(("beta_r", "beta_g"), [(0.1, 0.1), (0.05, 0.02)])
def test_implicit_scores_need_no_second_solver(beta_r, beta_g):
    world = toy()
    reward = beta_r * np.log(world.gibbs(world.reward, beta_r) / world.reference)
    utility = beta_g * np.log(world.gibbs(world.utilities[0], beta_g) / world.reference)
    implicit = solve(world.bank_with(reward, utility[None]), world.beta, world.margins)
    exact = solve(world.bank, world.beta, world.margins)
    assert implicit.multipliers == pytest.approx(exact.multipliers, abs=1e-8)
    assert implicit.prediction.margins["a"] == pytest.approx(0.25)
    # E_ref of the implicit utility is minus beta_g KL(ref || pi_g), CAN sec. 4.2
    safe = world.gibbs(world.utilities[0], beta_g)
    means = world.bank_with(reward, utility[None]).reference_means
    assert means["a"] == pytest.approx(-beta_g * world.kl(world.reference, safe))


def test_the_smoothness_constant_of_theorem_1_is_too_small():
    world = Table(np.full((1, 2), 0.5), np.zeros((1, 2)), np.array([[[3.0, -3.0]]]), 0.1, [0.0])
    largest = evaluate(world.bank, world.beta, 0.0, 0.0).hessian[0, 0]
    assert largest == pytest.approx(90)
    assert largest > 3 / world.beta
    assert smoothness(world.bank, world.beta) == pytest.approx(90)


def test_few_responses_overestimate_the_multiplier():
    # CAN, Fig. 4: the plug-in dual is biased upwards, more so for larger margins
    rng = np.random.default_rng(0)
    reward = 2 * rng.normal(size=(200, 1024))
    utility = -0.4 * reward + 2 * rng.normal(size=reward.shape)
    found = []
    for responses in (16, 64, 1024):
        ids = np.repeat(np.arange(200).astype(str), responses).tolist()
        rows = {"g": utility[:, :responses].ravel()}
        found.append(solve(Bank.from_rows(ids, reward[:, :responses].ravel(), rows), 0.5, 2.5).multipliers[0])
    assert found[0] > 1.2 * found[1] > 1.2 * found[2]
