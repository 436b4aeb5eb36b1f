"""Thresholds and signs, with numbers worked by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import softmax

from alignbench.errors import ConfigError, DataError
from alignbench.problem import (
    Form,
    Problem,
    cost_from_utility,
    lambda_from_ratio,
    ratio_from_lambda,
    utility_from_cost,
    violation,
)

numbers = st.floats(-50.0, 50.0)
positive = st.floats(1e-3, 1e3)
forms = st.sampled_from(list(Form))


def safety(form, threshold, beta=0.1):
    return Problem(beta, form, ("safety",), (threshold,))


def test_worked_signs():
    # the reference's mean cost is 3, so its mean safety is -3; asking for a mean cost of at most 1 asks for
    # +2
    reference, policy = {"safety": -3.0}, {"safety": -1.5}
    for form, threshold in [(Form.margin, 2.0), (Form.absolute_utility, -1.0), (Form.absolute_cost, 1.0)]:
        problem = safety(form, threshold)
        assert problem.margins(reference) == {"safety": 2.0}
        assert problem.requested_absolute(reference) == {"safety": -1.0}
        assert problem.achieved_margin(policy, reference) == {"safety": 1.5}
        assert problem.violations(policy, reference) == {"safety": 0.5}
        assert problem.violations({"safety": -0.5}, reference) == {"safety": 0.0}


def test_safe_rlhf_threshold_zero():
    # Safe RLHF asks E c <= 0; a reference that is already safe (mean cost -1) leaves a negative margin
    assert safety(Form.absolute_cost, 0.0).margins({"safety": 1.0}) == {"safety": -1.0}
    assert safety(Form.absolute_cost, 0.0).margins({"safety": -4.0}) == {"safety": 4.0}


@pytest.mark.parametrize("form", list(Form))
def test_the_stricter_threshold_has_the_larger_margin(form):
    stricter = -1.0 if form is Form.absolute_cost else 1.0
    reference = {"safety": 0.4}
    assert safety(form, stricter).margins(reference)["safety"] > safety(form, 0.0).margins(reference)["safety"]


def test_several_utilities_keep_their_own_thresholds():
    problem = Problem(0.5, Form.absolute_cost, ("safety", "politeness"), (1.0, -2.0))
    reference = {"politeness": 0.5, "reward": 9.0, "safety": -3.0}
    assert problem.margins(reference) == {"safety": 2.0, "politeness": 1.5}
    assert problem.requested_absolute(reference) == {"safety": -1.0, "politeness": 2.0}
    policy = {"safety": 0.0, "politeness": 1.0, "reward": 1.0}
    assert problem.violations(policy, reference) == {"safety": 0.0, "politeness": 1.0}


@settings(deadline=None)
@given(forms, numbers, numbers)
def test_margin_and_absolute_are_two_views_of_one_request(form, threshold, mean):
    problem, reference = safety(form, threshold), {"safety": mean}
    (margin,), (absolute,) = (
        problem.margins(reference).values(),
        problem.requested_absolute(reference).values(),
    )
    assert margin + mean == pytest.approx(absolute, abs=1e-9)


@settings(deadline=None)
@given(numbers, numbers, numbers)
def test_the_three_forms_of_one_request_agree(margin, mean, policy_mean):
    reference, policy = {"safety": mean}, {"safety": policy_mean}
    absolute = mean + margin
    problems = [
        safety(Form.margin, margin),
        safety(Form.absolute_utility, absolute),
        safety(Form.absolute_cost, cost_from_utility(absolute)),
    ]
    for problem in problems:
        assert problem.margins(reference)["safety"] == pytest.approx(margin, abs=1e-9)
        assert problem.violations(policy, reference)["safety"] == pytest.approx(
            max(0.0, absolute - policy_mean), abs=1e-9
        )


@settings(deadline=None)
@given(forms, numbers, numbers, numbers)
def test_a_shift_of_the_utility_moves_absolute_thresholds_only(form, threshold, mean, shift):
    before = safety(form, threshold).margins({"safety": mean})["safety"]
    after = safety(form, threshold).margins({"safety": mean + shift})["safety"]
    expected = 0.0 if form is Form.margin else -shift
    assert after - before == pytest.approx(expected, abs=1e-9)


def solve_lambda(problem, reward, utility, reference_policy):
    """The multiplier at which the Gibbs policy just meets the problem's margin, by bisection."""
    mean = float((reference_policy * utility).sum(1).mean())
    margin = problem.margins({"safety": mean})["safety"]

    def slack(multiplier):
        tilted = np.log(reference_policy) + (reward + multiplier * utility) / problem.beta
        return float((softmax(tilted, axis=1) * utility).sum(1).mean()) - mean - margin

    return brentq(slack, 0.0, 200.0, xtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_lambda_star_is_the_same_in_all_forms(seed):
    rng = np.random.default_rng(seed)
    reference_policy = rng.dirichlet(np.full(6, 3.0), size=4)
    reward, cost = 0.3 * rng.normal(size=(2, 4, 6))
    utility = utility_from_cost(cost - 0.2 * reward)
    unconstrained = softmax(np.log(reference_policy) + reward / 0.1, axis=1)
    start = float(((unconstrained - reference_policy) * utility).sum(1).mean())
    margin = start + 0.1
    mean = float((reference_policy * utility).sum(1).mean())
    found = [
        solve_lambda(problem, reward, utility, reference_policy)
        for problem in (
            safety(Form.margin, margin),
            safety(Form.absolute_utility, mean + margin),
            safety(Form.absolute_cost, -(mean + margin)),
        )
    ]
    assert found[0] > 1e-3
    assert found == pytest.approx([found[0]] * 3, rel=1e-8)


def test_the_sign_slip_asks_for_something_else():
    # the wish is a mean safety of -1; handed on as a cost limit without the flip it asks for twice the margin
    reference = {"safety": -3.0}
    assert safety(Form.absolute_cost, -1.0).margins(reference)["safety"] == 4.0
    assert safety(Form.absolute_cost, cost_from_utility(-1.0)).margins(reference)["safety"] == 2.0


def test_violation_keeps_nan():
    assert violation(1.0, 3.0) == 2.0
    assert violation(3.0, 1.0) == 0.0
    assert math.isnan(violation(math.nan, 1.0))
    assert math.isnan(violation(1.0, math.nan))


@settings(deadline=None)
@given(positive, positive)
def test_lambda_and_ratio_are_inverse(beta, multiplier):
    ratio = ratio_from_lambda(beta, multiplier)
    assert lambda_from_ratio(beta, ratio) == pytest.approx(multiplier)
    assert ratio_from_lambda(beta, lambda_from_ratio(beta, ratio)) == pytest.approx(ratio)


def test_lambda_from_ratio_worked_numbers():
    # SACPO's conservative policy: beta 0.1 and beta/lambda 0.01
    assert lambda_from_ratio(0.1, 0.01) == pytest.approx(10.0)
    assert ratio_from_lambda(0.1, 4.0) == pytest.approx(0.025)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_ratios_must_be_positive(bad):
    for convert in (lambda_from_ratio, ratio_from_lambda):
        with pytest.raises(ConfigError, match="must be a finite number > 0"):
            convert(0.1, bad)
        with pytest.raises(ConfigError, match="beta is"):
            convert(bad, 0.1)


def test_cost_and_utility_for_every_type():
    array, tensor = np.array([1.0, 0.0, -2.0]), torch.tensor([1.0, 0.0, -2.0])
    assert utility_from_cost(2.5) == -2.5
    assert math.copysign(1.0, utility_from_cost(0.0)) == 1.0
    np.testing.assert_array_equal(utility_from_cost(array), [-1.0, 0.0, 2.0])
    assert torch.equal(utility_from_cost(tensor), torch.tensor([-1.0, 0.0, 2.0]))
    np.testing.assert_array_equal(cost_from_utility(utility_from_cost(array)), array)
    assert torch.equal(cost_from_utility(utility_from_cost(tensor)), tensor)


def test_configuration_values_are_converted_and_frozen():
    problem = Problem(1, "absolute_cost", ["safety", "tone"], [0, 2])
    assert problem.form is Form.absolute_cost
    assert problem.utilities == ("safety", "tone")
    assert problem.thresholds == (0.0, 2.0)
    assert hash(problem) == hash(Problem(1, Form.absolute_cost, ("safety", "tone"), (0.0, 2.0)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.beta = 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, "margin", ["a"], [1.0]), "beta is 0.0"),
        ((math.inf, "margin", ["a"], [1.0]), "beta is inf"),
        ((0.1, "cost", ["a"], [1.0]), "margin, absolute_utility, absolute_cost"),
        ((0.1, "margin", "safety", [1.0]), r"write \[safety\]"),
        ((0.1, "margin", [], []), "no utility is named"),
        ((0.1, "margin", ["a", "b", "a"], [1.0, 2.0, 3.0]), "utility a appears twice"),
        ((0.1, "margin", ["a", "b"], [1.0]), r"1 thresholds for 2 utilities \(a, b\)"),
        ((0.1, "margin", ["a"], 1.0), r"write \[1.0\]"),
        ((0.1, "margin", ["a", "b"], [1.0, math.nan]), "threshold of b is nan"),
        ((0.1, "margin", ["a"], [math.inf]), "threshold of a is inf"),
        ((0.1, "absolute_cost", ["a"], [-math.inf]), "threshold of a is -inf"),
    ],
)
def test_a_wrong_problem_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Problem(*arguments)


def test_means_are_checked():
    problem = safety(Form.absolute_cost, 1.0)
    with pytest.raises(DataError, match="no mean for utility safety"):
        problem.margins({"reward": 1.0})
    with pytest.raises(DataError, match="mean of utility safety is nan"):
        problem.margins({"safety": math.nan})
    with pytest.raises(DataError, match="policy_mean"):
        problem.achieved_margin({}, {"safety": 1.0})
    assert safety(Form.margin, 1.0).margins({}) == {"safety": 1.0}
