"""MoCAN and PeCAN: the multiplier, the pseudo-preferences, what is trained against what, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from method_runs import (
    BANK,
    TWO,
    ancestors,
    bank_of,
    entry,
    gold_of_pairs,
    labels_of,
    margins_of,
    needed,
    tilted,
)
from scipy.special import expit, logit
from tiny_runs import Run, plan, run

from alignbench.errors import ConfigError
from alignbench.models import policy as policies
from alignbench.stages.tokens import TokenSpec, prompt_ids

Once = Callable[..., Run]
BETA = 0.5
PECAN = ("method=pecan", BANK, "constraint.thresholds=[0.02]", "method.beta_reward=0.25", "method.beta_utilities=[0.2]")


# ---------------------------------------------------------------- MoCAN


def test_mocan_is_algorithm_1(tmp_path: Path) -> None:
    _, outcome, evaluations, nodes = plan(tmp_path, "method=mocan", "constraint.beta=0.3")
    bank, solved, labels, policy = (
        nodes[n] for n in ("sample bank", "dual", "bernoulli labels for mocan", "prefer mocan")
    )
    # the bank: the reference's own distribution on training prompts
    assert bank.inputs["policy"] is nodes["sft"]
    assert (bank.identity.spec.splits, bank.identity.spec.samples) == (("train",), 64)
    assert (bank.identity.spec.sampling.temperature, bank.identity.spec.sampling.top_p) == (1.0, 1.0)
    assert solved.inputs == {"responses": bank, "scores": nodes["score sample bank"]}
    assert (solved.identity.spec.problem.beta, solved.identity.spec.problem.thresholds) == (0.3, (0.1,))
    # the labels: r + <lambda, g> of the pairs, no KL weight inside
    assert labels.inputs == {
        "pairs": nodes["label pairs"],
        "scores": nodes["score pairs with gold"],
        "multipliers": solved,
    }
    spec = labels.identity.spec
    assert (spec.objective, spec.kind, spec.scale) == ("lagrangian", "bernoulli", 1.0)
    # the one alignment: from pi_ref, against pi_ref, at the dual's beta
    assert policy.inputs["start"] is policy.inputs["reference"] is nodes["sft"]
    assert policy.inputs["labels"] is labels
    assert policy.inputs["pairs"] is nodes["label pairs"]
    assert policy.inputs["reference_logprobs"].inputs == {"policy": nodes["sft"], "rows": nodes["label pairs"]}
    assert (policy.identity.spec.beta, policy.identity.spec.ratio_of, policy.identity.spec.soft) == (0.3, None, False)
    assert [n for n in nodes.values() if n.stage.name == "prefer"] == [policy]
    assert (outcome.policies, outcome.duals, outcome.models) == ({"mocan": policy}, {"mocan": solved}, ("mocan",))
    assert outcome.predictions["mocan"].inputs == solved.inputs | {"multipliers": solved}
    assert list(evaluations) == ["sft", "mocan"]


@pytest.mark.parametrize(
    ("utilities", "thresholds", "extra"), [(["safety"], [0.1], ()), (["safety", "politeness"], [0.1, 0.02], TWO)]
)
def test_the_multiplier_meets_the_thresholds_on_the_bank_and_makes_the_labels(
    once: Once, utilities: list[str], thresholds: list[float], extra: tuple[str, ...]
) -> None:
    done = once("method=mocan", BANK, *extra)
    row = done.record["rows"]["mocan"]
    assert list(row["multipliers"]) == utilities
    multipliers = np.array(list(row["multipliers"].values()))
    bank = bank_of(done, "dual", utilities)
    assert bank.shape == (12, 8, 1 + len(utilities))
    weights = tilted(bank, BETA, multipliers)
    predicted = margins_of(bank, weights)
    # optimal: what is asked is met, exactly where the multiplier is positive
    assert (multipliers >= 0).all()
    assert multipliers.max() > 0
    assert (predicted > np.array(thresholds) - 1e-8).all()
    np.testing.assert_allclose((predicted - thresholds) * multipliers, 0, atol=1e-7)
    assert list(row["predicted"]["margins"].values()) == pytest.approx(predicted.tolist(), abs=1e-9)
    assert row["predicted"]["kl"] == pytest.approx((weights * np.log(weights * 8)).sum(1).mean(), abs=1e-9)
    assert row["predicted"]["reward"] == pytest.approx((weights * bank[..., 0]).sum(1).mean(), abs=1e-9)
    assert done.record["outcome"]["multipliers"] == row["multipliers"]
    diagnosed = done.record["outcome"]["diagnostics"]["dual"]
    assert (diagnosed["prompts"], diagnosed["responses"], diagnosed["solver"]) == (12, 96, "newton")
    assert diagnosed["requested_margin"] == dict(zip(utilities, thresholds, strict=True))
    # labels by r + <lambda, g> of the pairs' texts
    gold = gold_of_pairs(done)
    score = gold["reward"] + sum(value * gold[name] for name, value in row["multipliers"].items())
    preferred, probability = labels_of(done.artifact("bernoulli labels for mocan"))
    np.testing.assert_allclose(probability, expit(score[:, 1] - score[:, 0]), atol=1e-12)
    assert np.abs(preferred - probability).mean() < 0.5
    assert done.record["cost"]["models_trained"] == 1
    assert done.record["cost"]["models_in_memory_while_training"] == 1


def test_stated_multipliers_leave_the_dual_out(once: Once, tmp_path: Path) -> None:
    stated = ("method=mocan", BANK, "method.multipliers=[1.5]")
    _, _, _, nodes = plan(tmp_path, *stated)
    assert "dual" not in {node.stage.name for node in nodes.values()}
    done = once(*stated)
    assert done.record["rows"]["mocan"]["multipliers"] == done.record["outcome"]["multipliers"] == {"safety": 1.5}
    assert done.record["outcome"]["diagnostics"]["dual"] is None
    gold = gold_of_pairs(done)
    difference = (gold["reward"] + 1.5 * gold["safety"]) @ [-1, 1]
    np.testing.assert_allclose(labels_of(done.artifact("bernoulli labels for mocan"))[1], expit(difference), atol=1e-12)
    # the bank still says what 1.5 will bring
    bank = bank_of(done, "predict mocan", ["safety"])
    expected = margins_of(bank, tilted(bank, BETA, [1.5]))[0]
    assert done.record["rows"]["mocan"]["predicted"]["margins"]["safety"] == pytest.approx(expected, abs=1e-9)


def test_soft_argmax_and_bernoulli_labels_train_three_policies(once: Once) -> None:
    weights, probabilities, preferred = {}, {}, {}
    for kind in ("bernoulli", "argmax", "soft"):
        done = once("method=mocan", BANK, *([] if kind == "bernoulli" else [f"method.step.labels={kind}"]))
        weights[kind] = done.weights("prefer mocan")
        preferred[kind], probabilities[kind] = labels_of(done.artifact(f"{kind} labels for mocan"))
        assert entry(done, "prefer mocan")["spec"]["soft"] == (kind == "soft")
        assert done.artifact("prefer mocan").jsonl("log.jsonl")[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert len(set(weights.values())) == 3
    np.testing.assert_array_equal(probabilities["soft"], probabilities["bernoulli"])
    np.testing.assert_array_equal(preferred["argmax"], probabilities["argmax"] > 0.5)
    assert (preferred["bernoulli"] != preferred["argmax"]).any()  # some labels are drawn against the larger score


# ---------------------------------------------------------------- PeCAN


def test_pecan_is_algorithm_3(tmp_path: Path) -> None:
    overrides = ("method=pecan", "constraint.beta=0.4", "method.beta_reward=0.25", "method.beta_utilities=[0.2]")
    _, outcome, evaluations, nodes = plan(tmp_path, *overrides)
    reward, safety, policy = (nodes[n] for n in ("prefer reward", "prefer safety", "prefer pecan"))
    for node, objective, beta in ((reward, "reward", 0.25), (safety, "safety", 0.2), (policy, "lagrangian", 0.4)):
        assert node.inputs["start"] is node.inputs["reference"] is nodes["sft"]
        assert (node.identity.spec.objective, node.identity.spec.beta) == (objective, beta)
    assert "labels" not in reward.inputs.keys() | safety.inputs.keys()  # pre-alignment takes the pairs' own
    solved, labels = nodes["dual"], policy.inputs["labels"]
    assert labels.inputs["multipliers"] is solved
    assert labels.identity.spec.scale == 1.0
    assert solved.inputs["responses"].inputs["policy"] is nodes["sft"]
    assert solved.inputs["responses"].identity.spec.splits == ("train",)
    for implied, rows, kind in (
        (solved.inputs["scores"], solved.inputs["responses"], "responses"),
        (labels.inputs["scores"], nodes["label pairs"], "pairs"),
    ):
        assert implied.stage.name == "implicit"
        assert implied.identity.spec.table == kind
        assert implied.identity.spec.kl_weights == (("reward", 0.25), ("safety", 0.2))
        assert implied.inputs["rows"] is rows
        made_by = {role: node.inputs["policy"] for role, node in implied.inputs.items() if role != "rows"}
        assert made_by == {"reference": nodes["sft"], "reward": reward, "safety": safety}
        assert all(node.inputs["rows"] is rows for role, node in implied.inputs.items() if role != "rows")
    # a score model is asked nowhere but behind the world's labels
    assert [n.label for n in ancestors(policy).values() if n.stage.name == "score"] == ["score pairs"]
    assert list(evaluations) == ["sft", "aligned reward", "aligned safety", "pecan"]
    assert outcome.models == ("aligned reward", "aligned safety", "pecan")


def test_pecan_s_algorithm_2_aligns_at_the_problem_s_beta(tmp_path: Path) -> None:
    _, _, _, nodes = plan(tmp_path, "method=pecan", *TWO, "constraint.beta=0.4")
    betas = {n.identity.spec.objective: n.identity.spec.beta for n in nodes.values() if n.stage.name == "prefer"}
    assert betas == dict.fromkeys(("reward", "safety", "politeness", "lagrangian"), 0.4)
    weights = nodes["dual"].inputs["scores"].identity.spec.kl_weights
    assert weights == (("reward", 0.4), ("safety", 0.4), ("politeness", 0.4))


def test_pecan_s_scores_are_kl_weights_times_log_ratios_of_the_trained_policies(once: Once) -> None:
    done = once(*PECAN)
    implied, rows = (
        needed(done, "dual", "scores").jsonl("scores.jsonl"),
        needed(done, "dual", "responses").jsonl("responses.jsonl"),
    )
    spec = TokenSpec(**entry(done, "prefer pecan")["spec"]["tokens"])

    def logprobs(label: str) -> list[float]:
        folder = done.artifact(label).path("policy")
        tokenizer, model = (
            policies.load_tokenizer(folder),
            policies.load_policy(folder, torch.float64, torch.device("cpu")),
        )
        found = []
        for row in rows[:5]:
            prompt = prompt_ids(tokenizer, row["prompt"], spec)
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *row["response_ids"]]])).logits[0, len(prompt) - 1 : -1]
            each = torch.log_softmax(logits.double(), -1)[range(len(row["response_ids"])), row["response_ids"]]
            found.append(float(each.sum()))
        return found

    base = np.array(logprobs("sft"))
    for objective, weight in (("reward", 0.25), ("safety", 0.2)):
        expected = weight * (np.array(logprobs(f"prefer {objective}")) - base)
        assert [row[objective] for row in implied[:5]] == pytest.approx(expected.tolist(), abs=2e-4)
        assert np.abs(expected).max() > 1e-3
    # the multiplier solves the implied problem, and labels the pairs by the implied scores
    (value,) = done.record["rows"]["pecan"]["multipliers"].values()
    bank = bank_of(done, "dual", ["safety"])
    assert value > 0
    assert margins_of(bank, tilted(bank, BETA, [value]))[0] == pytest.approx(0.02, abs=1e-9)
    pairs = needed(done, "bernoulli labels for pecan", "scores").jsonl("scores.jsonl")
    difference = np.array([np.array(p["reward"]) + value * np.array(p["safety"]) for p in pairs]) @ [-1, 1]
    probability = labels_of(done.artifact("bernoulli labels for pecan"))[1]
    np.testing.assert_allclose(probability, expit(difference), atol=1e-12)
    assert done.record["cost"]["models_trained"] == 3
    assert done.record["cost"]["models_in_memory_while_training"] == 1


def test_compat_sharpens_the_labels_by_one_over_beta_and_changes_nothing_else(once: Once) -> None:
    ours, released = once(*PECAN), once(*PECAN, "method.compat=can-2024")
    label = "bernoulli labels for pecan"
    _, plain = labels_of(ours.artifact(label))
    _, sharp = labels_of(released.artifact(label))
    np.testing.assert_allclose(logit(sharp), logit(plain) / BETA, atol=1e-9)
    changed = [
        x["label"]
        for x, y in zip(ours.record["stages"], released.record["stages"], strict=True)
        if x["key"] != y["key"]
    ]
    assert changed[:2] == [label, "prefer pecan"]
    assert all(text.endswith(" pecan") for text in changed)
    assert "predict pecan" not in changed
    one, other = entry(ours, "prefer pecan"), entry(released, "prefer pecan")
    assert one["spec"] == other["spec"]
    assert {role for role in one["inputs"] if one["inputs"][role] != other["inputs"][role]} == {"labels"}


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "where", "says"),
    [
        (["method=pecan", "constraint=absolute_utility"], "constraint.form", "preferences cannot tell"),
        (["method=pecan", "constraint.form=absolute_cost"], "constraint.form", "preferences cannot tell"),
        (["method=pecan", "method.beta_utilities=[0.1,0.1]"], "method.beta_utilities", "one per utility"),
        (["method=pecan", "method.beta_reward=0"], "method.beta_utilities", "positive numbers"),
        (["method=pecan", "method.compat=can-2025"], "method.compat", "can-2024"),
        (["method=pecan", "method.align.loss=hinge"], "", "hinge"),
        (["method.dual.splits=[test]"], "method.dual.splits", "no result is reported on"),
        (["method.dual.splits=[train,test]"], "method.dual.splits", "no result is reported on"),
        (["method.dual.splits=[]"], "method.dual.splits", "[train], [validation] or both"),
        (["method.dual.samples=1"], "method.dual.samples", "nothing to reweight"),
        (["method.dual.solver=sgd"], "method.dual.solver", "projected_gradient"),
        (["method.dual.solver=can-2024", *TWO], "method.dual.solver", "one constraint"),
        (["method.dual.scorer=none"], "method.dual.scorer", "cannot score"),
        (["method.multipliers=[1,1]"], "method.multipliers", "one number >= 0 per utility"),
        (["method.multipliers=[-0.5]"], "method.multipliers", "one number >= 0 per utility"),
        (["method.multipliers=[nan]"], "method.multipliers", "one number >= 0 per utility"),
        (["method.step.labels=dataset"], "method.step.labels", "bernoulli, argmax, soft"),
        (["method.step.labels=soft", "method.step.loss=ipo"], "method.step.labels", "no ipo loss"),
        (
            ["dataset=files", "dataset.files.pairs.path=p.jsonl", "model=folder", "model.path=/m", "evaluate=unscored"],
            "method.dual.scorer",
            "gold belongs to the embedded worlds",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_solved_or_trained_are_refused(
    tmp_path: Path, overrides: list[str], where: str, says: str
) -> None:
    method = [] if any(override.startswith("method=") for override in overrides) else ["method=mocan"]
    base = ("constraint.thresholds=[0.1]", "constraint.beta=0.5", "tracking=disabled", "tuned_by=null")
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "store", tmp_path / "out", *method, *overrides, base=base)
    assert where in refused.value.where
    assert says in str(refused.value)
    assert not list(tmp_path.glob("store/artifacts/*"))
