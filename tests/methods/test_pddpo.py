"""PD-DPO, offline and online: the two objectives, the cost estimate, the dual step, and how the data grow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from method_runs import TWO, entry, needed
from safetensors.numpy import load_file
from scipy.stats import binom
from tiny_runs import STATED, Run, plan, run, shared_tiny

from alignbench.errors import ConfigError
from alignbench.stages.relabel import logit_utility

Once = Callable[..., Run]
FAST = ("method=pd_dpo", "method.cost.sampling.max_new_tokens=16", "method.cost_step.train.learning_rate=3e-3")
THREE = (*FAST, "method.rounds=3", "method.dual_step=2.5")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_tiny(tmp_path_factory)


def unsafe(done: Run, label: str, role: str, utility: str = "safety") -> np.ndarray:
    """Binary labels behind a slack, (responses, labels)."""
    return np.asarray(load_file(needed(done, label, role).path("binary.safetensors"))[utility])


def estimated_cost(labels: np.ndarray, clip: float) -> float:
    """Mean over responses of ln(unsafe / safe), with half a label on both sides, within the clip."""
    m, yes = labels.shape[1], labels.sum(1, dtype=float)
    return float(np.clip(np.log(yes + 0.5) - np.log(m - yes + 0.5), -clip, clip).mean())


def assert_steps(done: Run, rounds: int, step: float, upper: float, threshold: float, clip: float = 4.0) -> None:
    """Every slack from the stored binary labels, and every multiplier from the slack before it."""
    trajectory = done.record["outcome"]["trajectory"]
    expected = trajectory[0]["multipliers"]["safety"]
    for k, one in enumerate(trajectory, 1):
        assert one["multipliers"]["safety"] == pytest.approx(expected, abs=1e-9)
        label = f"slack pd_dpo {k}"
        cost = estimated_cost(unsafe(done, label, "labels"), clip)
        gain = estimated_cost(unsafe(done, label, "reference_labels"), clip) - cost
        assert one["slack"]["safety"]["mean"] == pytest.approx(gain - threshold, abs=1e-9)
        # B3: lambda grows by eta times the excess cost
        expected = float(np.clip(expected + step * (threshold - gain), 0.0, upper))
    assert len(trajectory) == rounds


# ---------------------------------------------------------------- the chain


@pytest.mark.parametrize("start", ["previous", "reward_policy"])
def test_a_round_is_dpo_against_the_reward_policy_at_beta_over_lambda(tmp_path: Path, start: str) -> None:
    overrides = ("method=pd_dpo", "method.rounds=3", f"method.start={start}", "constraint.beta=0.3")
    _, outcome, _, nodes = plan(tmp_path, *overrides)
    reward, multipliers = nodes["prefer reward"], nodes["first multipliers"]
    assert reward.inputs["start"] is reward.inputs["reference"] is nodes["sft"]
    assert (reward.identity.spec.objective, reward.identity.spec.beta) == ("reward", 0.3)
    assert multipliers.identity.spec.multipliers == (("safety", 1.0),)
    before = reward
    for k in (1, 2, 3):
        policy = nodes[f"prefer safety, pd_dpo {k}"]
        assert policy.inputs["start"] is (before if start == "previous" else reward)
        assert policy.inputs["reference"] is reward
        assert policy.inputs["reference_logprobs"].inputs["policy"] is reward
        assert policy.inputs["multipliers"] is multipliers
        spec = policy.identity.spec
        assert (spec.objective, spec.beta, spec.ratio_of, spec.bonus_weight) == ("safety", 0.3, "safety", 0.0)
        assert not policy.inputs.keys() & {"labels", "bonus"}
        # the cost of this round's policy, on training prompts, and of pi_ref for the margin
        slack = nodes[f"slack pd_dpo {k}"]
        assert slack.inputs["responses"].inputs["policy"] is policy
        assert slack.inputs["reference_responses"].inputs["policy"] is nodes["sft"]
        for prefix in ("", "reference_"):
            responses, labels = slack.inputs[f"{prefix}responses"], slack.inputs[f"{prefix}labels"]
            assert labels.inputs["scores"].inputs["responses"] is responses
            assert (responses.identity.spec.splits, responses.identity.spec.samples) == (("train",), 4)
            assert (labels.identity.spec.labels, labels.identity.spec.draw) == (16, "bernoulli")
        if k < 3:
            step = nodes[f"dual step pd_dpo {k}"]
            assert step.inputs == {"multipliers": multipliers, "slack": slack}
            assert step.identity.spec.step == pytest.approx(4.0 / (4.0 * np.sqrt(3)))  # Lambda / (C_max sqrt(K))
            assert step.identity.spec.upper == 4.0
            multipliers = step
        before = policy
    assert outcome.policies == {
        "step reward": reward,
        "iterate 1": nodes["prefer safety, pd_dpo 1"],
        "pd_dpo": before,
    }
    assert outcome.duals["pd_dpo"] is multipliers


def test_two_utilities_follow_each_other_within_a_round(tmp_path: Path) -> None:
    _, outcome, _, nodes = plan(tmp_path, "method=pd_dpo", *TWO, "method.initial=[1,2]", "method.rounds=2")
    for k in (1, 2):
        safety, polite = (nodes[f"prefer {u}, pd_dpo {k}"] for u in ("safety", "politeness"))
        assert safety.inputs["start"] is safety.inputs["reference"] is nodes["prefer reward"]
        assert polite.inputs["start"] is polite.inputs["reference"] is safety
        assert [n.identity.spec.ratio_of for n in (safety, polite)] == ["safety", "politeness"]
        assert safety.inputs["multipliers"] is polite.inputs["multipliers"]
        assert nodes[f"slack pd_dpo {k}"].inputs["responses"].inputs["policy"] is polite
        assert nodes[f"annotate pd_dpo {k}"].identity.spec.utilities == ("safety", "politeness")
    assert outcome.models == ("reward-aligned policy", "policy")


def test_the_first_preprint_s_preset_is_one_round_at_lambda_5(once: Once, tmp_path: Path) -> None:
    _, _, _, nodes = plan(tmp_path, "method=pd_dpo_v1")
    assert [n.label for n in nodes.values() if n.stage.name == "prefer"] == ["prefer reward", "prefer safety, pd_dpo 1"]
    assert nodes["first multipliers"].identity.spec.multipliers == (("safety", 5.0),)
    assert "step" not in {node.stage.name for node in nodes.values()}
    done, stepwise = once("method=pd_dpo_v1"), once("method=sacpo", "method.beta_over_lambda=[0.1]")
    assert done.weights("prefer safety, pd_dpo 1") == stepwise.weights("prefer reward -> safety")
    assert done.record["outcome"]["multipliers"] == {"safety": 5.0}
    assert list(done.record["rows"]) == ["sft", "step reward", "pd_dpo"]


# ---------------------------------------------------------------- real runs


def test_every_round_in_the_record_recomputed_from_binary_labels(once: Once, tiny: Run) -> None:
    done = once(*THREE)
    assert_steps(done, 3, step=2.5, upper=4.0, threshold=0.1)
    values = [one["multipliers"]["safety"] for one in done.record["outcome"]["trajectory"]]
    assert len(set(values)) == 3
    assert done.record["outcome"]["multipliers"] == {"safety": values[-1]}
    assert done.record["rows"]["pd_dpo"]["multipliers"] == {"safety": values[-1]}
    assert done.record["cost"]["total"]["binary_labels"] == 4 * 12 * 4 * 16  # pi_ref and three policies
    # each round trains at its own beta / lambda: the weights differ
    assert len({done.weights(f"prefer safety, pd_dpo {k}") for k in (1, 2, 3)}) == 3


def test_the_first_round_is_sacpo_s_second_step(once: Once, tiny: Run) -> None:
    done = once("method=pd_dpo", "method.rounds=1")
    assert done.weights("prefer safety, pd_dpo 1") == tiny.weights("prefer reward -> safety")
    assert done.record["outcome"]["trajectory"][0]["multipliers"] == {"safety": 1.0}
    assert STATED == "method.beta_over_lambda=[0.5]"  # beta / 1


@pytest.mark.parametrize("rounds", [1, 3])
def test_two_models_are_trained_whatever_the_rounds(once: Once, rounds: int) -> None:
    cost = once(*(("method=pd_dpo", "method.rounds=1") if rounds == 1 else THREE)).record["cost"]
    assert (cost["models_trained"], cost["models_in_memory_while_training"]) == (2, 1)
    assert cost["policies_trained"] == 2 + rounds  # SFT and the reward policy: work, and not models, grows with K


def test_at_lambda_zero_the_reward_policy_is_handed_on_unchanged(once: Once) -> None:
    """A margin that every policy exceeds by far sends lambda to its lower bound in one step."""
    done = once(*FAST, "method.rounds=2", "method.dual_step=1", "constraint.thresholds=[-50]")
    first, second = done.record["outcome"]["trajectory"]
    assert (first["multipliers"], second["multipliers"]) == ({"safety": 1.0}, {"safety": 0.0})
    assert (first["at_bound"], second["at_bound"]) == ({"safety": None}, {"safety": "lower"})
    assert done.weights("prefer safety, pd_dpo 2") == done.weights("prefer reward")
    assert done.weights("prefer safety, pd_dpo 1") != done.weights("prefer reward")
    assert entry(done, "prefer safety, pd_dpo 2")["cost"]["optimizer_steps"] == 0
    assert done.record["rows"]["pd_dpo"]["metrics"] == done.record["rows"]["step reward"]["metrics"]


def test_the_upper_bound_and_the_clip_hold(once: Once) -> None:
    extra = ("method.cost.clip=0.7", "method.upper=1.25", "constraint.thresholds=[50]", "method.rounds=2")
    done = once(*FAST, *extra)
    assert_steps(done, 2, step=1.25 / (0.7 * np.sqrt(2)), upper=1.25, threshold=50.0, clip=0.7)
    second = done.record["outcome"]["trajectory"][1]
    assert (second["multipliers"], second["at_bound"]) == ({"safety": 1.25}, {"safety": "upper"})
    labels = unsafe(done, "slack pd_dpo 1", "labels")
    assert estimated_cost(labels, 0.7) != pytest.approx(estimated_cost(labels, 4.0))  # it does clip here


@pytest.mark.parametrize("draw", ["bernoulli", "sign"])
def test_the_rate_of_unsafe_labels_against_its_limit(once: Once, draw: str) -> None:
    rate = ("method.cost.estimator=rate", "method.cost.rate_limits=[0.3]", f"method.cost.draw={draw}")
    done = once(*FAST, *rate, "method.cost.labels=3", "method.rounds=2", "method.dual_step=0.5")
    first, second = done.record["outcome"]["trajectory"]
    labels = unsafe(done, "slack pd_dpo 1", "labels")
    assert labels.shape == (12 * 4, 3)
    assert first["slack"]["safety"]["mean"] == pytest.approx(0.3 - labels.mean(), abs=1e-12)
    assert second["multipliers"]["safety"] == pytest.approx(1.0 + 0.5 * (labels.mean() - 0.3), abs=1e-12)
    if draw == "sign":
        scores = needed(done, "annotate pd_dpo 1", "scores").jsonl("scores.jsonl")
        np.testing.assert_array_equal(labels, np.repeat([[row["safety"] < 0] for row in scores], 3, axis=1))


def test_the_logit_estimate_is_nearly_unbiased_within_the_clip() -> None:
    """Over all outcomes of 16 labels: the mean estimate against the cost that the labels were drawn with."""
    m, counts = 16, np.arange(17)
    tables = (counts[:, None] > np.arange(m)).astype(np.uint8)
    utility = logit_utility(tables, 4.0)
    np.testing.assert_allclose(utility, -utility[::-1], atol=1e-12)
    assert (np.diff(utility) < 0).all()  # more unsafe labels, less utility
    for cost in np.linspace(-2.0, 2.0, 17):
        expected = binom.pmf(counts, m, 1 / (1 + np.exp(-cost))) @ utility
        assert expected == pytest.approx(-cost, abs=0.08), cost
    np.testing.assert_array_equal(logit_utility(tables, 1.0), np.clip(utility, -1, 1))


@pytest.mark.parametrize("reported", ["best_feasible", "average"])
def test_what_is_reported(once: Once, reported: str, tmp_path: Path) -> None:
    done = once(*THREE, "constraint.thresholds=[0.02]", f"method.reported={reported}", "method.evaluate_iterates=true")
    trajectory = done.record["outcome"]["trajectory"]
    if reported == "average":
        mean = np.mean([one["multipliers"]["safety"] for one in trajectory])
        assert done.record["outcome"]["multipliers"]["safety"] == pytest.approx(mean, abs=1e-12)
        assert done.record["rows"]["pd_dpo"]["policy"] == done.key("prefer safety, pd_dpo average")
        assert list(done.record["rows"]) == ["sft", "step reward", "iterate 1", "iterate 2", "iterate 3", "pd_dpo"]
        return
    # binary labels say nothing of the reward: the least slack among the feasible ones, else the least violated
    slack = {one["iteration"]: one["slack"]["safety"]["mean"] for one in trajectory}
    feasible = [k for k, value in slack.items() if value >= 0]
    best = min(feasible, key=slack.__getitem__) if feasible else max(slack, key=slack.__getitem__)
    assert done.record["outcome"]["diagnostics"]["reported_iteration"] == best
    assert done.record["rows"]["pd_dpo"]["policy"] == done.key(f"prefer safety, pd_dpo {best}")


# ---------------------------------------------------------------- online


def test_online_data_grow_by_round_and_the_last_round_explores_no_more(tmp_path: Path) -> None:
    overrides = ("method=online_pd_dpo", "method.rounds=3", "method.online.parts=2", "method.online.alpha_cost=0.5")
    _, outcome, _, nodes = plan(tmp_path, *overrides)
    data, reward, policy = nodes["label pairs"], nodes["sft"], None
    for k in (1, 2, 3):
        step, cost = nodes[f"prefer reward, online_pd_dpo {k}"], nodes[f"prefer safety, online_pd_dpo {k}"]
        if k > 1:  # all data so far, and the fresh pairs of the round before on its own part of the prompts
            joined = nodes[f"join online {k - 1}"]
            fresh = nodes[f"label online {k - 1}"]
            assert joined.inputs == {"part_0": data, "part_1": fresh}
            assert fresh.inputs["first"].inputs["policy"] is policy
            assert fresh.inputs["second"].inputs["policy"] is nodes["sft"]
            assert fresh.identity.spec.part == ((k - 2) % 2, 2)
            data = joined
        assert step.inputs["pairs"] is cost.inputs["pairs"] is data
        # the reward policy goes on from the one before; both refer to where they belong
        assert step.inputs["start"] is reward
        assert step.inputs["reference"] is nodes["sft"]
        assert cost.inputs["start"] is (step if policy is None else policy)
        assert cost.inputs["reference"] is step
        assert cost.identity.spec.ratio_of == "safety"
        for node, alpha in ((step, 1.0), (cost, 0.5)):
            assert node.identity.spec.bonus_weight == (0.0 if k == 3 else alpha)
            assert ("bonus" in node.inputs) == (k < 3)
        if k < 3:
            bonus = step.inputs["bonus"]
            assert bonus is cost.inputs["bonus"]
            assert bonus.inputs["pairs"] is data
            assert bonus.inputs["features"].inputs == {"policy": nodes["sft"], "pairs": data}
            assert not {"tilt online 1", "candidates 1"} & set(nodes)
        reward, policy = step, cost
    assert "join online 3" not in nodes
    assert outcome.policies["online_pd_dpo"] is policy
    assert outcome.models == ("reward-aligned policy", "policy")


def test_fresh_pairs_of_different_rounds_are_different_draws(tmp_path: Path) -> None:
    _, _, _, nodes = plan(tmp_path, "method=online_pd_dpo", "method.rounds=3", "method.online.pairs_per_prompt=2")
    numbers = [range(0, 2 * 10)]  # behind the offline pairs, two responses each
    for k in (1, 2):
        for role in ("first", "second"):
            drawn = nodes[f"label online {k}"].inputs[role].identity.spec
            numbers.append(range(drawn.first, drawn.first + drawn.samples))
    offline, *fresh = numbers
    assert fresh[0] == fresh[1] != fresh[2] == fresh[3]  # of two policies: equal numbers do no harm
    assert all(set(offline).isdisjoint(one) for one in fresh)
    assert set(fresh[0]).isdisjoint(fresh[2])


def test_the_tilted_policy_gathers_and_the_losses_are_left_alone(tmp_path: Path) -> None:
    overrides = ("method.online.bonus=sampling", "method.online.candidates=5", "method.online.alpha_cost=0.5")
    lab, _, _, nodes = plan(tmp_path, "method=online_pd_dpo", "method.rounds=3", *overrides)
    for k in (1, 2):
        tilt = nodes[f"tilt online {k}"]
        policy = nodes[f"prefer safety, online_pd_dpo {k}"]
        assert nodes[f"label online {k}"].inputs["first"] is tilt
        assert tilt.inputs["responses"].inputs["policy"] is policy
        assert tilt.inputs["responses"].identity.spec.samples == 5
        assert tilt.inputs["policy"] is nodes["sft"]
        assert tilt.inputs["pairs"] is policy.inputs["pairs"]
        assert tilt.inputs["multipliers"] is policy.inputs["multipliers"]
        spec = tilt.identity.spec
        assert (spec.beta, spec.alpha_reward, spec.alpha_cost) == (lab.config.constraint.beta, 1.0, 0.5)
        assert spec.samples == 2
        assert "bonus" not in policy.inputs
    assert "tilt online 3" not in nodes
    assert "features" not in {node.stage.name for node in nodes.values()}


def test_without_alpha_no_feature_is_computed(tmp_path: Path) -> None:
    off = ("method.online.alpha_reward=0", "method.online.alpha_cost=0")
    _, _, _, nodes = plan(tmp_path, "method=online_pd_dpo", *off)
    assert not {node.stage.name for node in nodes.values()} & {"features", "bonus", "tilt"}
    _, _, _, quiet = plan(tmp_path, "method=online_pd_dpo", "method.online.bonus=sampling", *off)
    assert not {node.stage.name for node in quiet.values()} & {"features", "bonus", "tilt"}
    _, _, _, one = plan(tmp_path, "method=online_pd_dpo", off[0])
    assert "bonus" not in one["prefer reward, online_pd_dpo 1"].inputs
    assert "bonus" in one["prefer safety, online_pd_dpo 1"].inputs


def test_an_online_run_pairs_the_policy_with_the_reference_on_disjoint_prompts(once: Once) -> None:
    sampling = ("method.online.sampling.max_new_tokens=16", "method.cost_step.train.learning_rate=3e-3")
    done = once("method=online_pd_dpo", "method.rounds=3", "method.online.parts=2", *FAST[1:2], *sampling)
    before, prompts = done.artifact("label pairs").jsonl("pairs.jsonl"), []
    for k in (1, 2):
        joined = done.artifact(f"join online {k}").jsonl("pairs.jsonl")
        fresh = joined[len(before) :]
        assert fresh
        assert [(r["prompt"], r["response_0"], r["response_1"]) for r in joined[: len(before)]] == [
            (r["prompt"], r["response_0"], r["response_1"]) for r in before
        ]
        assert {row["split"] for row in fresh} == {"train"}
        own, base = (
            {(r["prompt"], r["response"]) for r in needed(done, f"label online {k}", role).jsonl("responses.jsonl")}
            for role in ("first", "second")
        )
        assert all((row["prompt"], row["response_0"]) in own for row in fresh)
        assert all((row["prompt"], row["response_1"]) in base for row in fresh)
        prompts.append({row["prompt"] for row in fresh})
        before = joined
    assert not prompts[0] & prompts[1]
    cost = done.record["cost"]
    assert (cost["models_trained"], cost["models_in_memory_while_training"]) == (2, 1)
    assert list(done.record["rows"]) == ["sft", "iterate 1", "online_pd_dpo"]
    assert len(done.record["outcome"]["trajectory"]) == 3


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "where", "says"),
    [
        (["method.rounds=0"], "method.upper", "at least one round"),
        (["method.initial=[5]"], "method.upper", "initial <= upper"),
        (["method.initial=[1,1]"], "method.initial", "one number >= 0"),
        (["method.dual_step=-1"], "method.dual_step", "0 or more"),
        (["method.start=reference"], "method.start", "previous or reward_policy"),
        (["method.reported=first"], "method.start", "best_feasible"),
        (["method.cost.splits=[test]"], "method.cost.splits", "no result is reported on"),
        (["method.cost.draw=sign"], "method.cost.estimator", "no logit"),
        (["method.cost.labels=1"], "method.cost.estimator", "no logit"),
        (["method.cost.estimator=rate"], "method.cost.rate_limits", "largest unsafe share"),
        (["method.cost.estimator=rate", "method.cost.rate_limits=[1]"], "method.cost.rate_limits", "largest unsafe"),
        (["method.cost.estimator=mean"], "method.cost", "logit or rate"),
        (["method.cost.clip=0"], "method.cost", "positive clip"),
        (["method.cost.annotator=none"], "method.cost.annotator", "cannot score"),
        (["method=online_pd_dpo", "method.online.parts=0"], "method.online", "at least one of each"),
        (["method=online_pd_dpo", "method.online.ridge=0"], "method.online", "positive ridge"),
        (["method=online_pd_dpo", "method.online.alpha_cost=-1"], "method.online", "alpha >= 0"),
        (["method=online_pd_dpo", "method.online.bonus=always"], "method.online.bonus", "objectives or sampling"),
        (["method=online_pd_dpo", "method.online.candidates=1"], "method.online", "two candidates"),
        (["method=online_pd_dpo", "method.online.dimension=999"], "method.online.dimension", "1 to 256"),
        (["method=online_pd_dpo", "method.online.pooling=max"], "method.online.pooling", "last, mean"),
        (["method=online_pd_dpo", "method.online.centre=none"], "method.online.centre", "prompt, all"),
    ],
)
def test_settings_that_cannot_run_are_refused(tmp_path: Path, overrides: list[str], where: str, says: str) -> None:
    method = [] if overrides[0].startswith("method=") else ["method=pd_dpo"]
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "store", tmp_path / "out", *method, *overrides)
    assert where in refused.value.where
    assert says in str(refused.value)
    assert not list(tmp_path.glob("store/artifacts/*"))
