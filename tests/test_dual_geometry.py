"""The dual's course and the effect of fewer responses: against the dual itself and against exact expectations."""

from __future__ import annotations

import numpy as np
import pytest

from alignbench import dual, dual_geometry


def bank(prompts: int = 40, responses: int = 64, utilities: int = 1, seed: int = 0) -> dual.Bank:
    rng = np.random.default_rng(seed)
    reward = rng.normal(size=(prompts, responses))
    g = rng.normal(size=(prompts, responses, utilities)) - 0.5 * reward[..., None]
    weights = np.full((prompts, responses), -np.log(responses))
    names = tuple(f"u{j}" for j in range(utilities))
    return dual.Bank(tuple(map(str, range(prompts))), names, reward, g, weights)


def test_the_course_is_the_dual_with_its_minimiser_on_it() -> None:
    found = bank(utilities=2)
    solution = dual.solve(found, 0.5, [0.2, 0.1])
    for j, (name, course) in enumerate(dual_geometry.course(found, solution, points=11).items()):
        at = course["multiplier"].index(float(solution.multipliers[j]))
        assert course["value"][at] == pytest.approx(solution.value)
        assert min(course["value"]) == course["value"][at]
        assert course["slack"][at] == pytest.approx(0.0, abs=1e-8)
        assert course["ess_mean"][at] == pytest.approx(solution.prediction.ess_mean)
        assert course["multiplier"][0] == 0.0
        # the slack is the slope: central differences of the value
        x, value, slope = (np.array(course[key]) for key in ("multiplier", "value", "slack"))
        trapezoid = np.diff(value) - np.diff(x) * (slope[1:] + slope[:-1]) / 2
        assert np.abs(trapezoid).max() < 0.02
        assert np.diff(slope).min() > 0, f"D is convex along {name}"


def test_fewer_responses_overstate_the_multiplier_of_a_demanding_margin() -> None:
    found = bank()
    solution = dual.solve(found, 0.5, [0.8])
    effect = dual_geometry.sample_effect(found, solution, seed=1, draws=12)
    assert [entry["responses"] for entry in effect] == [4, 8, 16, 32]
    known = [entry["multipliers"]["u0"]["mean"] for entry in effect if entry["multipliers"]["u0"]]
    assert known == sorted(known, reverse=True)
    assert known[-1] > solution.multipliers[0]
    again = dual_geometry.sample_effect(found, solution, seed=1, draws=12)
    assert again == effect


def test_all_responses_give_the_minimiser_itself() -> None:
    found = bank()
    solution = dual.solve(found, 0.5, [0.2])
    (entry,) = dual_geometry.sample_effect(found, solution, seed=0, draws=2, responses=[64])
    assert entry["multipliers"]["u0"]["mean"] == pytest.approx(float(solution.multipliers[0]), rel=1e-9)


def test_many_draws_of_listed_answers_approach_the_exact_minimiser() -> None:
    rng = np.random.default_rng(3)
    log_weights = np.log(rng.dirichlet(np.ones(6), size=20))
    reward, g = rng.normal(size=(20, 6)), rng.normal(size=(20, 6, 1))
    listed = dual.Bank(tuple(map(str, range(20))), ("safety",), reward, g, log_weights, sampled=False)
    solution = dual.solve(listed, 1.0, [0.1])
    effect = dual_geometry.sample_effect(listed, solution, seed=0, draws=6, responses=[8, 4000])
    off = [abs(entry["multipliers"]["safety"]["mean"] - float(solution.multipliers[0])) for entry in effect]
    assert off[1] < 0.03
    assert off[1] < off[0]


def test_subsets_out_of_reach_are_counted() -> None:
    found = bank(prompts=8)
    solution = dual.solve(found, 0.5, [1.9])
    effect = dual_geometry.sample_effect(found, solution, seed=0, draws=5, responses=[2])
    assert effect[0]["unreachable"] == 5
    assert effect[0]["multipliers"]["u0"] is None
