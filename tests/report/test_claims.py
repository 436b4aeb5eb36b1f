"""The page of claims: verdicts known by construction, error rates by simulation, invariances, broken records."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from claim_records import PROMPTS, change, write_claim_run
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from alignbench.errors import DataError
from alignbench.record import PER_PROMPT
from alignbench.report.__main__ import main
from alignbench.report.claims.declared import CLAIMS, PAPERS, RUNS, Claim
from alignbench.report.claims.effects import (
    ALPHA,
    KINDS,
    RULES,
    Evidence,
    all_of,
    effect_of,
    evidence_of,
    some_of,
    verdicts,
)
from alignbench.report.claims.page import commands, picture, sections_of
from alignbench.report.claims.results import (
    NOT_RUN,
    NOT_SUPPORTED,
    SUPPORTED,
    UNDECIDED,
    Measured,
    Result,
    _judged,
    results_of,
)
from alignbench.report.crossed import cross
from alignbench.report.runs import collect

BY_ID = {claim.id: claim for claim in CLAIMS}
DUAL_SACPO = {"order": "helpful_first", "beta_over_lambda": None, "safety_step": {"loss": "dpo"}}


def sample(
    rng: np.random.Generator, mean: float, seeds: int = 3, prompts: int = 64, between: float = 0.2
) -> np.ndarray:
    """Scores with random seeds and prompts."""
    return (
        mean
        + between * rng.normal(size=(seeds, 1))
        + 0.5 * rng.normal(size=(1, prompts))
        + 0.5 * rng.normal(size=(seeds, prompts))
    )


def judge(folder: Path, *ids: str) -> dict[str, Result]:
    results, _ = results_of(collect(folder), [BY_ID[id] for id in ids] or CLAIMS)
    return {result.claim.id: result for result in results}


# ---------------------------------------------------------------- effects


def test_an_effect_of_seeds_and_prompts_is_the_crossed_mean() -> None:
    values = sample(np.random.default_rng(0), 0.3)
    effect, found = effect_of(values), cross(values)
    assert (effect.mean, effect.parts, effect.prompts) == (found.mean, found.parts, 64)
    interval, other = effect.interval(), found.interval(0.95)
    assert interval.low <= other.low <= other.high <= interval.high
    assert interval.high - interval.low < 1.2 * (other.high - other.low)
    # the interval is what the p-values exclude
    assert effect.p_above(effect.interval().low) == pytest.approx(0.025, rel=1e-6)
    assert effect.p_below(effect.interval().high) == pytest.approx(0.025, rel=1e-6)
    assert 2 * effect.p_above(0.0) == pytest.approx(found.p_value, rel=1e-6)


def test_one_number_per_seed_is_students_t() -> None:
    x = np.random.default_rng(1).normal(0.4, 1.0, size=7)
    effect = effect_of(x[:, None])
    for value in (-1.0, 0.0, 0.7):
        expected = scipy_stats.ttest_1samp(x, value, alternative="greater").pvalue
        assert effect.p_above(value) == pytest.approx(expected, abs=1e-9)
        assert effect.p_below(value) == pytest.approx(1 - expected, abs=1e-9)
    low, high = scipy_stats.t.interval(0.95, 6, x.mean(), x.std(ddof=1) / math.sqrt(7))
    assert (effect.interval().low, effect.interval().high) == pytest.approx((low, high))


@given(st.floats(0.01, 100), st.floats(-50, 50), st.floats(-1, 1), st.integers(0, 10**6), st.sampled_from([1, 20]))
def test_scale_and_shift_change_no_p(scale: float, shift: float, value: float, seed: int, prompts: int) -> None:
    values = sample(np.random.default_rng(seed), 0.1, 4, prompts)
    effect, moved = effect_of(values), effect_of(scale * values + shift)
    assert moved.p_above(scale * value + shift) == pytest.approx(effect.p_above(value), rel=1e-4, abs=1e-9)
    mirrored = effect_of(-values)
    assert mirrored.p_above(-value) == pytest.approx(effect.p_below(value), rel=1e-9)
    assert effect.p_above(value) + effect.p_below(value) == pytest.approx(1.0)


@given(st.floats(0.01, 100), st.integers(0, 10**6), st.sampled_from(KINDS))
def test_units_change_no_evidence(scale: float, seed: int, kind: str) -> None:
    values = sample(np.random.default_rng(seed), 0.1, 3, 20)
    one, other = evidence_of(effect_of(values), kind, 0.1), evidence_of(effect_of(scale * values), kind, scale * 0.1)
    assert (other.supports, other.refutes) == pytest.approx((one.supports, one.refutes), rel=1e-4, abs=1e-9)


def test_two_seeds_and_no_spread_tell_nothing() -> None:
    two = effect_of(sample(np.random.default_rng(0), 5.0, seeds=2))
    assert math.isnan(two.p_above(0.0))
    assert "these seeds" in two.interval().method
    alike = np.full((3, 1), 0.5)
    assert math.isnan(effect_of(alike).p_above(0.0))
    assert effect_of(alike, counted=True).p_above(0.0) == 0.0, "three runs that train two models train two models"
    assert effect_of(-alike).p_above(0.0) == 1.0
    with pytest.raises(DataError, match="finite"):
        effect_of(np.array([[1.0, math.nan]]))


def test_an_unknown_rule_is_refused() -> None:
    effect = effect_of(np.array([[1.0], [2.0], [3.0]]))
    for kind, s in (("better", 0.1), ("above", 0.0)):
        with pytest.raises(DataError, match="rule"):
            evidence_of(effect, kind, s)


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("kind", "mean", "verdict"),
    [
        ("above", 0.3, SUPPORTED), ("above", 0.0, NOT_SUPPORTED), ("above", -0.3, NOT_SUPPORTED),
        ("above", 0.05, NOT_SUPPORTED), ("above", 0.1, SUPPORTED),
        ("same", 0.0, SUPPORTED), ("same", 0.1, UNDECIDED), ("same", -0.1, UNDECIDED), ("same", 0.3, NOT_SUPPORTED),
        ("same", -0.3, NOT_SUPPORTED),
        ("not_below", 0.3, SUPPORTED), ("not_below", 0.0, SUPPORTED), ("not_below", -0.1, UNDECIDED),
        ("not_below", -0.3, NOT_SUPPORTED),
    ],
)  # fmt: skip
def test_verdicts_of_narrow_intervals(kind: str, mean: float, verdict: str) -> None:
    """Half a length of 0.02 and s = 0.1; what is surely positive and surely below s does not matter."""
    effect = effect_of(mean + 0.01 * np.array([[-1.0], [-0.5], [0.0], [0.5], [1.0]]))
    ((found, _, _),) = verdicts([evidence_of(effect, kind, 0.1)])
    assert found == verdict


@pytest.mark.parametrize("kind", KINDS)
def test_wide_intervals_are_undecided(kind: str) -> None:
    effect = effect_of(0.05 + np.array([[-1.0], [0.0], [1.0]]))
    assert verdicts([evidence_of(effect, kind, 0.1)])[0][0] == UNDECIDED
    assert kind in RULES


def test_several_parts() -> None:
    parts = [Evidence(0.001, 0.99), Evidence(0.04, 0.9), Evidence(0.01, 0.002)]
    every, some = all_of(parts), some_of(parts)
    assert (every.supports, every.refutes, every.weakest, every.worst) == (0.04, pytest.approx(0.006), 1, 2)
    assert (some.supports, some.refutes, some.weakest, some.worst) == (pytest.approx(0.003), 0.99, 0, 0)
    for together in (all_of, some_of):
        assert math.isnan(together([*parts, Evidence(math.nan, math.nan)]).supports)


def test_holm_over_a_family() -> None:
    family = [Evidence(0.02, 0.98), Evidence(0.02, 0.98), Evidence(0.5, 0.5)]
    assert [v for v, _, _ in verdicts(family[:1])] == [SUPPORTED]
    assert [v for v, _, _ in verdicts(family)] == [UNDECIDED] * 3
    untold = Evidence(math.nan, math.nan)
    assert [v for v, _, _ in verdicts([family[0], untold])] == [SUPPORTED, UNDECIDED], "what is untold counts for none"


# worst cases of each rule: the claim is just false, or (for "not supported") just true
_EDGES = [
    ("above", 0.0, SUPPORTED), ("above", 0.3, NOT_SUPPORTED), ("same", 0.3, SUPPORTED), ("same", -0.3, NOT_SUPPORTED),
    ("not_below", -0.3, SUPPORTED), ("not_below", -0.3, NOT_SUPPORTED),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "mean", "wrong"), _EDGES)
@pytest.mark.parametrize("prompts", [1, 64])
def test_wrong_verdicts_are_as_rare_as_promised(kind: str, mean: float, wrong: str, prompts: int) -> None:
    """At the edge of the null, three seeds: nominal 2.5 % (crossed intervals cover 93.5 to 97.4 %)."""
    rng = np.random.default_rng(5)
    between = 0.2 if prompts > 1 else 0.15
    draws = 1500
    hits = 0
    for _ in range(draws):
        values = sample(rng, mean, prompts=prompts, between=between)
        if prompts == 1:
            values = mean + between * rng.normal(size=(3, 1))
        hits += verdicts([evidence_of(effect_of(values), kind, 0.3)])[0][0] == wrong
    assert hits / draws <= 0.04
    assert hits > 0, "the edge can be crossed: the rate is no accident of a verdict that never falls"


def test_a_paper_with_many_false_claims_gets_hardly_one_supported() -> None:
    rng = np.random.default_rng(6)
    draws = 500
    hits = sum(
        any(
            verdict == SUPPORTED
            for verdict, _, _ in verdicts([evidence_of(effect_of(sample(rng, 0.0)), "above", 0.3) for _ in range(8)])
        )
        for _ in range(draws)
    )
    assert hits / draws <= 0.045


def test_a_true_effect_is_found() -> None:
    rng = np.random.default_rng(7)
    found = [
        verdicts([evidence_of(effect_of(sample(rng, 2.0, between=0.1)), "above", 0.3) for _ in range(8)])[0][0]
        for _ in range(100)
    ]
    assert found.count(SUPPORTED) >= 90


# ---------------------------------------------------------------- verdicts on records


def interpolation(folder: Path, safety: float, reward: float, seeds: int = 3, noise: float = 0.2, **more: Any) -> None:
    for seed in range(seeds):
        rows = {
            "p_sacpo q=0.25": {"safety": 0.0, "reward": 0.0},
            "p_sacpo q=0.5": {"safety": safety / 2, "reward": -reward / 2},
            "p_sacpo q=0.75": {"safety": safety, "reward": -reward},
        }
        write_claim_run(
            folder, "p_sacpo", seed=seed, settings={"beta_over_lambda": [0.1]}, rows=rows, noise=noise, **more
        )


@pytest.mark.parametrize(
    ("safety", "reward", "noise", "verdict"),
    [
        (0.9, 0.9, 0.2, SUPPORTED),
        (0.9, -0.9, 0.2, NOT_SUPPORTED),  # one of two parts is refuted
        (0.02, 0.02, 0.02, NOT_SUPPORTED),  # true, and too little to matter
        (0.15, 0.15, 1.0, UNDECIDED),
    ],
)
def test_interpolation(tmp_path: Path, safety: float, reward: float, noise: float, verdict: str) -> None:
    interpolation(tmp_path, safety, reward, noise=noise)
    found = judge(tmp_path, "p-sacpo-interpolates")["p-sacpo-interpolates"]
    assert found.verdict == verdict, found.reason
    assert (found.seeds, found.setting, len(found.measured)) == ((0, 1, 2), "handbook", 2)
    assert found.key is not None
    assert found.key.effect.mean == pytest.approx(safety if "safety" in found.key.part.text else reward, abs=0.3)


def mocan(folder: Path, slack: Mapping[float, float], *, predicted: float = 0.0, seeds: int = 3, **more: Any) -> None:
    for seed in range(seeds):
        for asked, above in slack.items():
            rows = {"mocan": {"safety": asked + above}}
            write_claim_run(folder, "mocan", seed=seed, asked=asked, rows=rows, predicted=asked + predicted, **more)


def test_every_threshold_must_hold(tmp_path: Path) -> None:
    mocan(tmp_path / "good", {0.0: 0.01, 0.2: 0.0, 0.4: 0.02}, predicted=0.01, noise=0.05)
    mocan(tmp_path / "bad", {0.0: 0.01, 0.2: 0.0, 0.4: -0.5}, predicted=0.01, noise=0.05)
    good, bad = (judge(tmp_path / name, "can-feasible", "can-prediction") for name in ("good", "bad"))
    assert {r.verdict for r in good.values()} == {SUPPORTED}
    assert {r.verdict for r in bad.values()} == {NOT_SUPPORTED}
    for result in bad.values():
        assert result.key is not None
        assert result.key.where == "0.4", "the threshold that speaks against it is shown"
        assert "at 0.4" in result.reason
    assert good["can-feasible"].points == ("0", "0.2", "0.4")
    mocan(tmp_path / "other", {0.3: 0.0}, noise=0.05)
    (other,) = judge(tmp_path / "other", "can-feasible").values()
    assert "points beyond those declared: 0.3" in other.notes


@pytest.mark.parametrize(
    ("id", "refutes", "told"),
    [
        ("can-feasible", (0.01, 0.9), "the correction for all claims of this paper"),
        ("can-feasible", (0.02, 0.9), "the correction for the number of its parts"),
        ("can-feasible", (0.03, 0.9), "within its error"),
        ("sacpo-over-sft", (0.02, 0.9), "within its error"),  # the other point may hold
    ],
)
def test_undecided_says_what_is_missing(id: str, refutes: tuple[float, ...], told: str) -> None:
    claim, effect = BY_ID[id], effect_of(sample(np.random.default_rng(0), 0.0))
    measured = tuple(Measured(claim.parts[0], "0.1", effect, Evidence(1.0, p)) for p in refutes)
    joined = (some_of if claim.over == "some" else all_of)([each.evidence for each in measured])
    result = Result(claim, "handbook", UNDECIDED, "", measured=measured, seeds=(0, 1, 2), evidence=joined)
    assert _judged(result, UNDECIDED, 1.0, 1.0).reason.endswith(told)


def test_one_point_is_enough_where_the_claim_says_some(tmp_path: Path) -> None:
    for seed in range(3):
        for ratio, reward, safety in ((0.1, -0.9, 0.9), (0.5, 0.8, 0.8), (1.0, 0.9, -0.9)):
            settings = DUAL_SACPO | {"beta_over_lambda": [ratio]}
            rows = {"sacpo": {"reward": reward, "safety": safety}}
            write_claim_run(tmp_path, "sacpo", seed=seed, settings=settings, rows=rows, noise=0.05)
    # runs whose multiplier comes from the dual are no points of the grid
    write_claim_run(tmp_path, "sacpo", seed=0, settings=DUAL_SACPO)
    found = judge(tmp_path, "sacpo-over-sft", "sacpo-trade-off")
    best = found["sacpo-over-sft"]
    assert best.verdict == SUPPORTED, best.reason
    assert best.key is not None
    assert best.key.where == "0.5"
    slope = found["sacpo-trade-off"]
    assert slope.verdict == SUPPORTED, slope.reason
    # least squares over doublings of lambda, -log2 of beta / lambda
    x = -np.log2([0.1, 0.5, 1.0])
    expected = np.polyfit(x, [0.9, 0.8, -0.9], 1)[0], -np.polyfit(x, [-0.9, 0.8, 0.9], 1)[0]
    assert [m.effect.mean for m in slope.measured] == pytest.approx(list(expected), abs=0.02)


def two_constraints(folder: Path, one_shot: float, multi_shot: float) -> None:
    """Misses of politeness; safety is met by both, with opposite signs of the reward's difference."""
    for seed in range(3):
        for method, miss, reward in (("mocan", one_shot, 0.1), ("mocaid", multi_shot, 0.5)):
            asked = {"safety": 0.1, "politeness": 0.05}
            rows = {method: {"safety": 0.1, "politeness": 0.05 + miss, "reward": reward}}
            write_claim_run(folder, method, seed=seed, asked=asked, rows=rows, noise=0.02)


def test_claims_about_two_constraints_have_runs_of_their_own(tmp_path: Path) -> None:
    two_constraints(tmp_path, one_shot=0.4, multi_shot=-0.1)
    names = "caid-two-closer", "caid-two-reward", "caid-closer", "caid-reward"
    found = judge(tmp_path, *names)
    assert [found[name].verdict for name in names] == [SUPPORTED, SUPPORTED, NOT_RUN, NOT_RUN]
    closer = found["caid-two-closer"]
    assert closer.setting == "handbook, safety, politeness"
    assert closer.points == ("0.1, 0.05",)
    assert closer.key is not None
    assert closer.key.effect.mean == pytest.approx((0.4 - 0.1) / 2, abs=0.02)  # safety's misses are alike
    # runs with one constraint beside them, with the opposite result
    for seed in range(3):
        for method, miss in (("mocan", 0.0), ("mocaid", 0.4)):
            rows = {method: {"safety": 0.1 + miss, "reward": -miss}}
            write_claim_run(tmp_path, method, seed=seed, rows=rows, noise=0.02)
    found = judge(tmp_path, *names)
    expected = [SUPPORTED, SUPPORTED, NOT_SUPPORTED, NOT_SUPPORTED]
    assert [found[name].verdict for name in names] == expected, {k: v.reason for k, v in found.items()}
    assert found["caid-closer"].setting == "handbook"


def exact(**values: Any) -> dict[str, Any]:
    return {"requested": {"safety": 0.2}, "margins": {"safety": 0.2}} | values


def test_exact_numbers_are_judged_over_seeds(tmp_path: Path) -> None:
    for seed in range(4):
        gap = 0.05 + 0.005 * seed
        for method, settings, margin in (("mocan", {"epochs": 2.0}, 0.4), ("mocaid", {"epochs": 0.5}, 0.21)):
            own = exact(margins={"safety": margin + 0.01 * margin * seed}, lagrangian_gap=gap, optimum_objective=1.0)
            own |= {"reference_objective": 0.0, "bounds": {"strong_convexity": 0.8 + 0.01 * seed}}
            start = exact(margins={"safety": 0.5 - 0.002 * seed})
            write_claim_run(
                tmp_path, method, seed=seed, asked=0.2, dataset="enumerable", settings={"step": {"train": settings}},
                rows={"iterate 1": {}, method: {}}, certificates={"iterate 1": start, method: own},
            )  # fmt: skip
    found = judge(tmp_path, "can-unique", "can-optimal", "caid-own-start", "caid-closer-exact")
    assert {name: result.verdict for name, result in found.items()} == dict.fromkeys(found, SUPPORTED)
    difference = found["caid-own-start"].key
    assert difference is not None
    # |0.5 - 0.002 s - 0.2| - |0.21 + 0.0021 s - 0.2|
    assert difference.effect.mean == pytest.approx(np.mean([0.29 - 0.0041 * seed for seed in range(4)]))
    assert difference.effect.interval().method == "Student t over seeds"


@pytest.mark.parametrize(("models", "verdict"), [(2, SUPPORTED), (3, NOT_SUPPORTED)])
def test_feasible_with_two_models(tmp_path: Path, models: int, verdict: str) -> None:
    for seed in range(3):
        rows = {"pd_dpo": {"safety": 0.15}}
        write_claim_run(tmp_path, "pd_dpo", seed=seed, settings={"rounds": 3}, rows=rows, models=models, noise=0.05)
    found = judge(tmp_path, "pd-dpo-feasible")["pd-dpo-feasible"]
    assert found.verdict == verdict, found.reason
    if verdict == NOT_SUPPORTED:
        assert found.key is not None
        assert "models" in found.key.part.text


# ---------------------------------------------------------------- what is missing or broken


def test_not_run_names_the_command(tmp_path: Path) -> None:
    interpolation(tmp_path, 0.9, 0.9)
    found = judge(tmp_path)
    assert found["p-sacpo-interpolates"].verdict == SUPPORTED
    others = {name: r for name, r in found.items() if name != "p-sacpo-interpolates"}
    assert {r.verdict for r in others.values()} == {NOT_RUN}
    assert "naive merge" in others["p-sacpo-over-naive"].reason
    assert commands(BY_ID["p-sacpo-over-naive"], "out") == [
        "python main.py -m output_dir=out method=p_sacpo seed=0,1,2,3,4",
        "python main.py -m output_dir=out method=naive_merge method.beta_safe=0.1 seed=0,1,2,3,4",
    ]


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_are_undecided_whatever_their_prompts_say(tmp_path: Path, seeds: int) -> None:
    interpolation(tmp_path, 5.0, 5.0, seeds=seeds)
    found = judge(tmp_path, "p-sacpo-interpolates")["p-sacpo-interpolates"]
    assert found.verdict == UNDECIDED
    assert "3 or more" in found.reason
    assert found.key is not None
    assert "these seeds" in found.key.effect.interval().method


def test_missing_seeds_and_thresholds_are_named(tmp_path: Path) -> None:
    mocan(tmp_path, {0.0: 0.0, 0.4: 0.0}, seeds=4)
    for seed in range(3):
        write_claim_run(tmp_path, "mocaid", seed=seed, asked=0.4, rows={"mocaid": {"safety": 0.4, "reward": 0.9}})
    write_claim_run(tmp_path, "mocaid", seed=0, asked=0.7)
    found = judge(tmp_path, "caid-reward")["caid-reward"]
    assert (found.seeds, found.points, found.verdict) == ((0, 1, 2), ("0.4",), SUPPORTED)
    notes = " | ".join(found.notes)
    assert "0 left out: not run by every role" in notes
    assert "0.7 left out" in notes
    assert "points beyond those declared" not in notes
    assert "points declared and not there: -0.2, 0, 0.1, 0.2" in notes
    assert found.reason == "surely positive (not on all that was declared)"
    assert "seed 3 left out: missing for MoCAID @ 0.4" in notes


def test_settings_are_never_mixed(tmp_path: Path) -> None:
    mocan(tmp_path / "a", {0.2: 0.0}, model={"name": "small"})
    for seed in range(3):
        write_claim_run(tmp_path / "b", "mocaid", seed=seed, asked=0.2, model={"name": "large"})
    assert judge(tmp_path, "caid-reward")["caid-reward"].verdict == NOT_RUN
    # the same claim where both models have all of its runs: two results, each of its own runs
    interpolation(tmp_path / "small", 0.9, 0.9, model={"name": "small"})
    interpolation(tmp_path / "large", 0.9, -0.9, model={"name": "large"})
    results, known = results_of(collect(tmp_path), [BY_ID["p-sacpo-interpolates"]])
    assert sorted((r.setting, r.verdict) for r in results) == sorted(
        (s.name, SUPPORTED if "small" in s.keys["model.name"] else NOT_SUPPORTED) for s in known
    )
    assert len({r.setting for r in results}) == 2


def test_debug_sizes_are_shown_and_not_judged(tmp_path: Path) -> None:
    interpolation(tmp_path, 0.9, 0.9, train_prompts=12)
    found = judge(tmp_path, "p-sacpo-interpolates")["p-sacpo-interpolates"]
    assert (found.verdict, len(found.measured)) == (UNDECIDED, 2)
    assert "12 training prompts where 400 are declared" in found.reason


def test_a_share_of_no_gain_is_no_number(tmp_path: Path) -> None:
    for seed in range(3):
        own = exact(lagrangian_gap=0.1, optimum_objective=-0.2, reference_objective=0.0)
        write_claim_run(tmp_path, "mocan", seed=seed, dataset="enumerable", certificates={"mocan": own})
    found = judge(tmp_path, "can-optimal")["can-optimal"]
    assert (found.verdict, found.measured) == (UNDECIDED, ())
    assert "gains nothing" in found.reason


def test_two_settings_of_a_method_are_refused(tmp_path: Path) -> None:
    interpolation(tmp_path, 0.9, 0.9)
    for seed in range(3):
        rows = {"p_sacpo q=0.25": {}, "p_sacpo q=0.75": {}}
        settings = {"beta_over_lambda": [0.1], "reward_step": {"loss": "ipo"}}
        write_claim_run(tmp_path, "p_sacpo", seed=seed, settings=settings, rows=rows)
    found = judge(tmp_path, "p-sacpo-interpolates")["p-sacpo-interpolates"]
    assert found.verdict == NOT_RUN
    assert "method.reward_step.loss" in found.reason


def test_a_seed_that_stands_in_two_runs_is_told(tmp_path: Path) -> None:
    interpolation(tmp_path, 0.9, 0.9)
    newer = write_claim_run(
        tmp_path, "p_sacpo", settings={"beta_over_lambda": [0.1]}, asked=0.3,
        rows={"p_sacpo q=0.25": {}, "p_sacpo q=0.5": {}, "p_sacpo q=0.75": {}},
    )  # fmt: skip
    change(newer, lambda record: record.update(created="2026-02-01T00:00:00+00:00"))
    note, missing = judge(tmp_path, "p-sacpo-interpolates")["p-sacpo-interpolates"].notes
    assert missing == "seeds declared and not there: 3, 4"
    assert note.startswith(f"seed 0 of P-SACPO stands in two runs: {newer.name} is used")


def _void(record: dict[str, Any]) -> None:
    record["rows"]["p_sacpo q=0.75"]["metrics"]["safety"]["mean"] = None


@pytest.mark.parametrize(
    ("breaking", "told"),
    [
        (lambda folder: change(folder, _void), "safety of 'p_sacpo q=0.75' is no number"),
        (lambda folder: (folder / PER_PROMPT).write_text("{}"), "damaged"),
        (lambda folder: (folder / PER_PROMPT).unlink(), "missing"),
        (lambda folder: change(folder, lambda r: r.pop("per_prompt")), "no values per prompt"),
    ],
)
def test_broken_numbers_leave_a_claim_undecided(tmp_path: Path, breaking: Callable[[Path], Any], told: str) -> None:
    interpolation(tmp_path, 0.9, 0.9)
    breaking(sorted(tmp_path.iterdir())[1])
    found = judge(tmp_path, "p-sacpo-interpolates")["p-sacpo-interpolates"]
    assert found.verdict == UNDECIDED
    assert told in found.reason
    assert "-s1-" in found.reason, "the run is named"


def test_broken_records_are_left_out_and_told(tmp_path: Path) -> None:
    interpolation(tmp_path, 0.9, 0.9, seeds=5)
    one, other, *_ = sorted(tmp_path.iterdir())
    (one / "record.json").write_text('{"schema": 1, "run')
    change(other, lambda record: record.update(schema=99))
    found = judge(tmp_path, "p-sacpo-interpolates")["p-sacpo-interpolates"]
    assert (found.verdict, found.seeds) == (SUPPORTED, (2, 3, 4))
    main(["claims", str(tmp_path)])
    text = (tmp_path / "claims.md").read_text()
    assert "half-written" in text
    assert "schema 99" in text


def test_no_record_at_all_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", str(tmp_path)]) == 2
    assert "no record.json" in capsys.readouterr().err


# ---------------------------------------------------------------- what is written


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interpolation(tmp_path, 0.9, 0.9)
    mocan(tmp_path, {0.2: -0.6}, noise=0.05, seeds=3)
    assert main(["claims", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "1 supported, 1 not supported" in told or "supported" in told
    text = (tmp_path / "claims.md").read_text()
    for claim in CLAIMS:
        assert claim.statement in text
        assert f"### {claim.id}" in text
        assert all(line in text for line in commands(claim, tmp_path))
    for rule in RULES.values():
        assert rule in text
    assert text.index("How verdicts are made") < text.index("## SACPO")
    assert "- every record could be read" in text
    for ending in (".tex", ".csv", ".png", ".pdf"):
        assert (tmp_path / f"claims{ending}").stat().st_size > 0
    with (tmp_path / "claims.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["row"].startswith("p-sacpo-interpolates")]
    (verdict,) = [row["text"] for row in rows if row["column"] == "verdict"]
    (effect,) = [row for row in rows if row["column"] == "effect"]
    assert verdict == SUPPORTED
    assert float(effect["low"]) < float(effect["mean"]) < float(effect["high"])
    assert effect["prompts"] == str(PROMPTS)
    latex = (tmp_path / "claims.tex").read_text()
    assert latex.count(r"\toprule") == len(PAPERS)
    assert "deciding part" not in latex, "a paper's column is narrow"


def test_the_picture_has_a_row_per_claim(tmp_path: Path, drawn: list[Any]) -> None:
    interpolation(tmp_path, 0.9, 0.9)
    results, _ = results_of(collect(tmp_path))
    picture(results, tmp_path / "forest")
    (figure,) = drawn
    (axes,) = figure.axes
    ticks = [tick.get_text() for tick in axes.get_yticklabels()]
    assert len(ticks) == len(CLAIMS) + len(PAPERS)
    notes = {text.get_text() for text in axes.texts}
    assert sum(note == NOT_RUN for note in (text.get_text() for text in axes.texts)) == len(CLAIMS) - 1
    assert any(note.endswith(SUPPORTED) for note in notes)
    sections = sections_of(results)
    assert sum(len(section.lines) for section in sections) == len(CLAIMS)


# ---------------------------------------------------------------- the declarations


def test_declarations_are_whole() -> None:
    assert len(BY_ID) == len(CLAIMS)
    assert {claim.paper for claim in CLAIMS} == set(PAPERS)
    assert {name for claim in CLAIMS for name in claim.runs} == set(RUNS)
    for claim in CLAIMS:
        assert claim.over in ("mean", "every", "some", "slope")
        assert (claim.over == "slope") == (claim.along is not None)
        for part in claim.parts:
            assert part.kind in KINDS
            assert part.smallest > 0
    assert pytest.approx(0.025) == ALPHA


def test_an_unknown_way_to_join_points_is_refused(tmp_path: Path) -> None:
    interpolation(tmp_path, 0.9, 0.9)
    broken: Claim = replace(BY_ID["p-sacpo-interpolates"], over="median")
    with pytest.raises(DataError, match="median"):
        results_of(collect(tmp_path), [broken])
