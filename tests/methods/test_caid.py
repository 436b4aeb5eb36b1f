"""MoCAID and PeCAID: every iterate's start, reference, labels and multiplier; the dual step; what is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from method_runs import BANK, TWO, bank_of, entry, gold_of_pairs, hessian_of, labels_of, needed
from scipy.special import expit
from tiny_runs import Run, plan, run

from alignbench.errors import ConfigError

Once = Callable[..., Run]
BETA = 0.5
FAST = (BANK, "method.on_policy_samples=4", "method.step.train.learning_rate=3e-3")
THREE = ("method=mocaid", *FAST, "method.iterations=3", "method.evaluate_iterates=true")


def measured_slack(done: Run, label: str, utilities: list[str], thresholds: list[float]) -> np.ndarray:
    """Achieved minus requested margin, from the responses and scores that the slack was measured on."""
    own, base = (bank_of(done, label, utilities, prefix)[..., 1:].mean(1).mean(0) for prefix in ("", "reference_"))
    return np.asarray(own - base - thresholds)


def assert_trajectory(done: Run, name: str, utilities: list[str], thresholds: list[float], iterations: int) -> None:
    """Every recorded number of the iteration, recomputed from stored responses and scores."""
    trajectory = done.record["outcome"]["trajectory"]
    assert [one["iteration"] for one in trajectory] == list(range(1, iterations + 1))
    one_shot = done.artifact("dual").json("multipliers.json")["multipliers"]
    expected = np.array([one_shot[u] for u in utilities])
    # ours: 1 / the largest eigenvalue of the dual's Hessian at the one-shot multiplier
    step = 1.0 / np.linalg.eigvalsh(hessian_of(bank_of(done, "dual", utilities), BETA, expected))[-1]
    for t, one in enumerate(trajectory, 1):
        np.testing.assert_allclose([one["multipliers"][u] for u in utilities], expected, rtol=1e-7)
        slack = measured_slack(done, f"slack {name} {t}", utilities, thresholds)
        np.testing.assert_allclose([one["slack"][u]["mean"] for u in utilities], slack, atol=1e-10)
        reward = bank_of(done, f"slack {name} {t}", utilities)[..., 0].mean()
        assert one["reward"] == pytest.approx(reward, abs=1e-10)
        if t < iterations:
            assert done.artifact(f"dual step {name} {t}").json("multipliers.json")["step"] == pytest.approx(step)
            # (6): a violation, which is a negative slack, raises the multiplier
            expected = np.maximum(expected - step * slack, 0.0)
    assert any(abs(one["slack"][utilities[0]]["mean"]) > 1e-3 for one in trajectory)


# ---------------------------------------------------------------- the chain


def test_mocaid_is_algorithm_2(tmp_path: Path) -> None:
    _, outcome, _, nodes = plan(tmp_path, "method=mocaid", "method.iterations=3", "constraint.beta=0.3")
    before, multipliers, draws = nodes["sft"], nodes["dual"], []
    for t in (1, 2, 3):
        policy = nodes[f"prefer mocaid {t}"]
        # (7): from the iterate before, against pi_ref, on all pairs
        assert policy.inputs["start"] is before
        assert policy.inputs["reference"] is nodes["sft"]
        assert policy.inputs["reference_logprobs"].inputs["policy"] is nodes["sft"]
        assert policy.inputs["pairs"] is nodes["label pairs"]
        assert (policy.identity.spec.beta, policy.identity.spec.objective) == (0.3, "lagrangian")
        labels = policy.inputs["labels"]
        assert labels.inputs["multipliers"] is multipliers
        assert labels.inputs["scores"] is nodes["score pairs with gold"]
        assert labels.identity.spec.scale == 1.0
        draws.append(labels.identity.spec.draw)
        # (5): the new policy's responses against the reference's bank, on the prompts of the bank
        slack = nodes[f"slack mocaid {t}"]
        own, base = slack.inputs["responses"], slack.inputs["reference_responses"]
        assert own.inputs["policy"] is policy
        assert base is nodes["sample bank"] is nodes["dual"].inputs["responses"]
        assert base.inputs["policy"] is nodes["sft"]
        assert (own.identity.spec.splits, own.identity.spec.samples) == (base.identity.spec.splits, 8)
        assert own.identity.spec.sampling == base.identity.spec.sampling
        assert slack.inputs["scores"].inputs["responses"] is own
        assert slack.inputs["reference_scores"] is nodes["dual"].inputs["scores"]
        # (6): from this iterate's multiplier, against this iterate's slack
        if t < 3:
            step = nodes[f"dual step mocaid {t}"]
            assert step.inputs == {"multipliers": multipliers, "slack": slack, "dual": nodes["dual"]}
            assert (step.identity.spec.step, step.identity.spec.scale, step.identity.spec.upper) == (None, 1.0, None)
            multipliers = step
        before = policy
    assert len(set(draws)) == 3  # labels are drawn afresh in every iteration
    assert "dual step mocaid 3" not in nodes
    assert outcome.policies == {"iterate 1": nodes["prefer mocaid 1"], "mocaid": before}
    assert outcome.duals == {"iterate 1": nodes["dual"], "mocaid": multipliers}
    assert outcome.models == ("mocaid",)


def test_the_warm_start_is_the_one_shot_multiplier(tmp_path: Path) -> None:
    for one_shot, iterative in (("mocan", "mocaid"), ("pecan", "pecaid")):
        _, _, _, before = plan(tmp_path, f"method={one_shot}")
        _, _, _, nodes = plan(tmp_path, f"method={iterative}", "method.iterations=2")
        assert nodes[f"prefer {iterative} 1"].inputs["labels"].inputs["multipliers"].key == before["dual"].key


def test_pecaid_measures_with_the_pre_aligned_policies(tmp_path: Path) -> None:
    overrides = ("method=pecaid", "method.iterations=2", "method.beta_utilities=[0.2]", "method.compat=can-2024")
    _, outcome, _, nodes = plan(tmp_path, *overrides)
    assert list(outcome.policies) == ["aligned reward", "aligned safety", "iterate 1", "pecaid"]
    aligned = {"reference": nodes["sft"], "reward": nodes["prefer reward"], "safety": nodes["prefer safety"]}
    for t in (1, 2):
        slack, labels = nodes[f"slack pecaid {t}"], nodes[f"prefer pecaid {t}"].inputs["labels"]
        assert slack.inputs["responses"].inputs["policy"] is nodes[f"prefer pecaid {t}"]
        assert labels.identity.spec.scale == 2.0
        implied = [slack.inputs["scores"], slack.inputs["reference_scores"], labels.inputs["scores"]]
        assert [node.inputs["rows"] for node in implied] == [
            slack.inputs["responses"],
            nodes["sample bank"],
            nodes["label pairs"],
        ]
        for node in implied:
            assert {role: n.inputs["policy"] for role, n in node.inputs.items() if role != "rows"} == aligned
            assert node.identity.spec.kl_weights == (("reward", 0.5), ("safety", 0.2))


# ---------------------------------------------------------------- real runs


def test_every_iterate_is_in_the_record_with_its_own_slack(once: Once) -> None:
    done = once(*THREE)
    assert_trajectory(done, "mocaid", ["safety"], [0.1], 3)
    outcome, rows = done.record["outcome"], done.record["rows"]
    assert list(rows) == ["sft", "iterate 1", "iterate 2", "mocaid"]
    assert [one["policy"] for one in outcome["trajectory"]] == ["iterate 1", "iterate 2", "mocaid"]
    assert [rows[one["policy"]]["multipliers"] for one in outcome["trajectory"]] == [
        one["multipliers"] for one in outcome["trajectory"]
    ]
    assert outcome["multipliers"] == rows["mocaid"]["multipliers"]
    assert [rows[name]["policy"] for name in list(rows)[1:]] == [done.key(f"prefer mocaid {t}") for t in (1, 2, 3)]
    assert len({done.weights(f"prefer mocaid {t}") for t in (1, 2, 3)}) == 3
    assert done.record["cost"]["models_trained"] == 1
    assert done.record["cost"]["models_in_memory_while_training"] == 1
    # each iteration labels by its own multiplier
    gold, uniform = gold_of_pairs(done), []
    for t, one in enumerate(outcome["trajectory"], 1):
        preferred, probability = labels_of(done.artifact(f"bernoulli labels for mocaid {t}"))
        difference = (gold["reward"] + one["multipliers"]["safety"] * gold["safety"]) @ [-1, 1]
        np.testing.assert_allclose(probability, expit(difference), atol=1e-12)
        uniform.append(preferred)
    assert (uniform[1] != uniform[2]).any()
    # without evaluate_iterates the same artifacts, and fewer rows
    few = once(*THREE[:-1])
    assert list(few.record["rows"]) == ["sft", "iterate 1", "mocaid"]
    assert few.weights("prefer mocaid 3") == done.weights("prefer mocaid 3")
    assert [one["policy"] for one in few.record["outcome"]["trajectory"]] == ["iterate 1", None, "mocaid"]


def test_an_unmeasured_last_slack_changes_no_policy(once: Once) -> None:
    done, without = once(*THREE), once(*THREE, "method.measure_last=false")
    assert without.weights("prefer mocaid 3") == done.weights("prefer mocaid 3")
    whole, cut = (run.record["outcome"]["trajectory"] for run in (done, without))
    assert cut[:2] == whole[:2]
    assert (cut[2]["slack"], cut[2]["reward"]) == ({}, None)
    assert {k: v for k, v in cut[2].items() if k not in ("slack", "reward")} == {
        k: v for k, v in whole[2].items() if k not in ("slack", "reward")
    }
    costs = [run.record["cost"]["total"]["generated_tokens"] for run in (done, without)]
    assert costs[0] > costs[1]
    with pytest.raises(ConfigError, match="last one's slack"):
        once(*THREE, "method.measure_last=false", "method.reported=best_feasible")


def test_two_utilities_step_by_the_largest_eigenvalue(once: Once) -> None:
    done = once("method=mocaid", *FAST, *TWO, "method.iterations=2")
    assert_trajectory(done, "mocaid", ["safety", "politeness"], [0.1, 0.02], 2)


def test_pecaid_iterates_on_implied_scores(once: Once) -> None:
    done = once("method=pecaid", *FAST, "constraint.thresholds=[0.02]", "method.iterations=2")
    assert_trajectory(done, "pecaid", ["safety"], [0.02], 2)
    assert needed(done, "slack pecaid 2", "scores").manifest["stage"] == "implicit"
    assert done.record["cost"]["models_trained"] == 3
    assert done.record["cost"]["models_in_memory_while_training"] == 1


@pytest.mark.parametrize("labels", ["soft", "bernoulli"])
def test_one_iteration_is_mocan(once: Once, labels: str) -> None:
    settings = (*FAST, f"method.step.labels={labels}")
    iterated, one_shot = (
        once("method=mocaid", *settings, "method.iterations=1"),
        once("method=mocan", BANK, *settings[2:]),
    )
    assert iterated.weights("prefer mocaid 1") == one_shot.weights("prefer mocan")
    assert list(iterated.record["rows"]) == ["sft", "mocaid"]
    assert iterated.record["rows"]["mocaid"]["multipliers"] == one_shot.record["rows"]["mocan"]["multipliers"]
    assert iterated.record["rows"]["mocaid"]["predicted"] == one_shot.record["rows"]["mocan"]["predicted"]
    assert iterated.record["rows"]["mocaid"]["metrics"] == one_shot.record["rows"]["mocan"]["metrics"]


def test_a_multiplier_never_falls_below_zero(once: Once) -> None:
    """The reference itself meets a negative margin, so the one-shot multiplier is 0 and every slack is positive."""
    done = once("method=mocaid", *FAST, "constraint.thresholds=[-5]", "method.iterations=2", "method.dual_step=3")
    first, second = done.record["outcome"]["trajectory"]
    assert first["multipliers"] == second["multipliers"] == {"safety": 0.0}
    assert first["slack"]["safety"]["mean"] > 3
    assert second["at_bound"] == {"safety": "lower"}
    gold = gold_of_pairs(done)
    probability = labels_of(done.artifact("bernoulli labels for mocaid 2"))[1]
    np.testing.assert_allclose(probability, expit(gold["reward"] @ [-1, 1]), atol=1e-12)


def test_a_stated_step_and_start_replace_the_dual_s(once: Once) -> None:
    stated = ("method.multipliers=[1.5]", "method.dual_step=0.7", "method.iterations=2")
    done = once("method=mocaid", *FAST, *stated)
    first, second = done.record["outcome"]["trajectory"]
    assert first["multipliers"] == {"safety": 1.5}
    slack = measured_slack(done, "slack mocaid 1", ["safety"], [0.1])[0]
    assert second["multipliers"]["safety"] == pytest.approx(1.5 - 0.7 * slack, abs=1e-10)


def test_the_scale_multiplies_the_curvature_s_step(tmp_path: Path) -> None:
    _, _, _, nodes = plan(tmp_path, "method=mocaid", "method.dual_step_scale=0.25")
    spec = nodes["dual step mocaid 1"].identity.spec
    assert (spec.step, spec.scale) == (None, 0.25)


# ---------------------------------------------------------------- which iterate is reported


def merit(one: dict[str, Any]) -> tuple[float, float]:
    """Feasible before infeasible, then by reward; infeasible ones by how much is violated."""
    violated = sum(min(0.0, value["mean"]) for value in one["slack"].values())
    return violated, one["reward"]


@pytest.mark.parametrize("threshold", ["0.1", "-0.1"])
def test_the_best_feasible_iterate_is_reported(once: Once, threshold: str) -> None:
    done = once(*THREE, f"constraint.thresholds=[{threshold}]", "method.reported=best_feasible")
    trajectory = done.record["outcome"]["trajectory"]
    best = max(trajectory, key=merit)
    if threshold == "-0.1":
        feasible = [one for one in trajectory if one["slack"]["safety"]["mean"] >= 0]
        assert feasible
        assert best["reward"] == max(one["reward"] for one in feasible)
    assert done.record["outcome"]["reported"] == "mocaid"
    assert done.record["outcome"]["diagnostics"]["reported_iteration"] == best["iteration"]
    assert done.record["rows"]["mocaid"]["policy"] == done.key(f"prefer mocaid {best['iteration']}")
    assert done.record["outcome"]["multipliers"] == best["multipliers"]
    others = [f"iterate {one['iteration']}" for one in trajectory if one is not best]
    assert sorted(done.record["rows"]) == sorted(["sft", "mocaid", *others])


def test_the_average_is_a_further_policy_at_the_mean_multiplier(once: Once, tmp_path: Path) -> None:
    average = (*THREE, "method.reported=average")
    done = once(*average)
    values = [one["multipliers"]["safety"] for one in done.record["outcome"]["trajectory"]]
    assert len(set(values)) == 3
    assert done.record["outcome"]["multipliers"]["safety"] == pytest.approx(np.mean(values), abs=1e-12)
    assert done.record["rows"]["mocaid"]["policy"] == done.key("prefer mocaid average")
    assert [one["policy"] for one in done.record["outcome"]["trajectory"]] == [f"iterate {t}" for t in (1, 2, 3)]
    assert done.record["outcome"]["diagnostics"]["reported_iteration"] is None
    _, _, _, nodes = plan(tmp_path, *average)
    policy = nodes["prefer mocaid average"]
    assert policy.inputs["start"] is nodes["prefer mocaid 3"]
    assert policy.inputs["reference"] is nodes["sft"]
    assert policy.inputs["labels"].inputs["multipliers"].stage.name == "average"
    # the same training, on the pairs that follow
    assert entry(done, "prefer mocaid average")["spec"] == entry(done, "prefer mocaid 3")["spec"] | {"round": 3}


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["method.iterations=0"], "method.iterations"),
        (["method.on_policy_samples=0"], "method.iterations"),
        (["method.dual_step_scale=0"], "method.iterations"),
        (["method.dual_step=0"], "method.dual_step"),
        (["method.dual_step=-1"], "method.dual_step"),
        (["method.reported=first"], "method.reported"),
        (["method.dual.splits=[test]"], "method.dual.splits"),
        (["method.multipliers=[1,2]"], "method.multipliers"),
    ],
)
@pytest.mark.parametrize("method", ["mocaid", "pecaid"])
def test_settings_that_cannot_iterate_are_refused(
    tmp_path: Path, method: str, overrides: list[str], where: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "store", tmp_path / "out", f"method={method}", *overrides)
    assert where in refused.value.where
    assert not list(tmp_path.glob("store/artifacts/*"))


def test_pecaid_refuses_an_absolute_threshold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preferences cannot tell"):
        run(tmp_path / "store", tmp_path / "out", "method=pecaid", "constraint.form=absolute_utility")
