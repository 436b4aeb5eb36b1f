"""SACPO and P-SACPO: what is trained against what, in which order, at which KL weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from method_runs import BANK, bank_of, entry, margins_of, tilted
from safetensors.numpy import load_file
from tiny_runs import STATED, Run, plan, run, shared_tiny

from alignbench.data.schema import label_column
from alignbench.errors import ConfigError
from alignbench.lab import Node

TWO = (
    "constraint.utilities=[safety,politeness]",
    "constraint.thresholds=[0.3,0.1]",
    "method.beta_over_lambda=[0.5,0.25]",
)

CONSERVATIVE = "method.beta_over_lambda=[0.25]"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return shared_tiny(tmp_path_factory)


def steps(nodes: dict[str, Node]) -> list[tuple[str, str, float]]:
    """(objective, loss, beta) of every preference step, in order."""
    specs = [node.identity.spec for node in nodes.values() if node.stage.name == "prefer"]
    return [(spec.objective, spec.loss, spec.beta) for spec in specs]


def assert_chained(nodes: dict[str, Node]) -> None:
    """Each step starts from *and* refers to the step before, the first to pi_ref, with that one's log-probs."""
    before = nodes["sft"]
    for node in [n for n in nodes.values() if n.stage.name == "prefer"]:
        assert node.inputs["start"] is before
        assert node.inputs["reference"] is before
        assert node.inputs["reference_logprobs"].inputs["policy"] is before
        assert node.inputs["reference_logprobs"].inputs["rows"] is node.inputs["pairs"] is nodes["label pairs"]
        before = node


def test_helpful_first(tmp_path: Path) -> None:
    _, outcome, evaluations, nodes = plan(tmp_path, "constraint.beta=0.2", "method.beta_over_lambda=[0.05]")
    assert steps(nodes) == [("reward", "dpo", 0.2), ("safety", "dpo", 0.05)]
    assert_chained(nodes)
    assert nodes["prefer reward -> safety"].identity.inputs["reference"] == nodes["prefer reward"].key
    assert list(evaluations) == ["sft", "step reward", "sacpo"]
    assert outcome.policies["sacpo"] is nodes["prefer reward -> safety"]
    assert outcome.reported == "sacpo"
    assert outcome.multipliers == {"safety": pytest.approx(4.0)}


def test_safe_first(tmp_path: Path) -> None:
    overrides = ("method.order=safe_first", "constraint.beta=0.2", "method.beta_over_lambda=[0.05]")
    _, outcome, evaluations, nodes = plan(tmp_path, *overrides)
    assert steps(nodes) == [("safety", "dpo", 0.05), ("reward", "dpo", 0.2)]
    assert_chained(nodes)
    assert list(evaluations) == ["sft", "step safety", "sacpo"]
    assert outcome.policies["sacpo"] is nodes["prefer safety -> reward"]
    assert outcome.multipliers == {"safety": pytest.approx(4.0)}


@pytest.mark.parametrize("order", ["helpful_first", "safe_first"])
def test_lora_steps_refer_to_the_previous_policy_and_not_to_the_bare_base(tmp_path: Path, order: str) -> None:
    _, _, _, nodes = plan(tmp_path, "model=handbook_llama_lora", f"method.order={order}")
    assert all(n.identity.spec.lora.rank == 16 for n in nodes.values() if n.stage.name == "prefer")
    assert nodes["sft"].identity.spec.lora.rank == 0
    assert_chained(nodes)


def test_two_utilities_are_three_steps(tiny: Run, tmp_path: Path) -> None:
    _, outcome, evaluations, nodes = plan(tmp_path / "none", *TWO)
    assert steps(nodes) == [("reward", "dpo", 0.5), ("safety", "dpo", 0.5), ("politeness", "dpo", 0.25)]
    assert_chained(nodes)
    assert list(evaluations) == ["sft", "step reward", "step reward -> safety", "sacpo"]
    assert outcome.multipliers == {"safety": 1.0, "politeness": 2.0}

    done = run(tiny.copied(tmp_path / "store"), tmp_path / "out", *TWO)
    assert done.record["outcome"]["multipliers"] == outcome.multipliers
    assert done.record["cost"]["policies_trained"] == 4
    assert set(done.record["rows"]["sacpo"]["constraints"]) == {"safety", "politeness"}
    asked = {u: c["requested_margin"] for u, c in done.record["rows"]["sacpo"]["constraints"].items()}
    assert asked == {"safety": 0.3, "politeness": 0.1}
    # the first step is that of the problem with one utility
    assert done.key("prefer reward") == tiny.key("prefer reward")
    assert done.weights("prefer reward -> safety -> politeness") != done.weights("prefer reward -> safety")
    header, *_ = (done.folder / "table.md").read_text().splitlines()
    assert "safety margin (asked)" in header
    assert "politeness margin (asked)" in header


def test_both_orders_of_two_utilities(tmp_path: Path) -> None:
    _, outcome, _, nodes = plan(tmp_path, *TWO, "method.order=safe_first")
    assert steps(nodes) == [("safety", "dpo", 0.5), ("politeness", "dpo", 0.25), ("reward", "dpo", 0.5)]
    assert_chained(nodes)
    assert list(outcome.policies) == ["step safety", "step safety -> politeness", "sacpo"]


@pytest.mark.parametrize(("first", "second"), [("ipo", "kto"), ("kto", "ipo"), ("dpo", "kto")])
def test_ipo_and_kto_in_either_step(tiny: Run, tmp_path: Path, first: str, second: str) -> None:
    losses = (f"method.reward_step.loss={first}", f"method.safety_step.loss={second}")
    done = run(tiny.copied(tmp_path / "store"), tmp_path / "out", *losses, "method.beta_over_lambda=[0.5]")
    specs = {s["label"]: s["spec"] for s in done.record["stages"] if s["stage"] == "prefer"}
    assert [spec["loss"] for spec in specs.values()] == [first, second]
    beta = 0.5  # both steps'
    for label, spec in specs.items():
        log = done.artifact(label).jsonl("log.jsonl")
        assert ("kl_estimate" in log[0]) == (spec["loss"] == "kto")
        # the loss at policy = reference: ln 2; (1 / (2 beta))^2; 1 - sigmoid(0), weighted alike on both sides
        start = {"dpo": np.log(2), "ipo": 1 / (4 * beta**2), "kto": 0.5}[spec["loss"]]
        assert log[0]["loss"] == pytest.approx(start, abs=1e-5)
        assert done.weights(label) != tiny.weights("sft")
    caches = [s for s in done.record["stages"] if s["label"].startswith("reference log-probs for")]
    assert [s["spec"]["mismatched"] for s in caches] == [first == "kto", second == "kto"]


def test_kto_can_label_by_the_safety_flags(tiny: Run, tmp_path: Path) -> None:
    kto = (STATED, "method.safety_step.loss=kto", "method.safety_step.kto_labels=is_safe")
    store = tiny.copied(tmp_path / "store")
    flags = run(store, tmp_path / "a", *kto)
    labels = run(store, tmp_path / "b", *kto[:2])
    assert flags.weights("prefer reward -> safety") != labels.weights("prefer reward -> safety")


def test_p_sacpo_merges_one_training_at_every_q(tiny: Run, tmp_path: Path) -> None:
    q = [0.0, 0.25, 0.6, 1.0]
    overrides = ("method=p_sacpo", f"method.q={q}".replace(" ", ""), "method.reported_q=0.6", CONSERVATIVE)
    done = run(tiny.copied(tmp_path / "store"), tmp_path / "out", *overrides)
    record = done.record
    assert list(record["rows"]) == ["sft", "step reward", *(f"p_sacpo q={x:g}" for x in q), "conservative"]
    assert record["outcome"]["reported"] == "p_sacpo q=0.6"
    assert record["cost"]["policies_trained"] == 3  # SFT, reward, conservative: as many as for a single q
    assert [s["spec"]["beta"] for s in record["stages"] if s["stage"] == "prefer"] == [0.5, 0.25]
    assert record["outcome"]["multipliers"] == {"safety": pytest.approx(0.6 * 0.5 / 0.25)}

    def tensors(label: str) -> dict[str, np.ndarray]:
        return load_file(done.artifact(label).path("policy/model.safetensors"))

    helpful, conservative = tensors("prefer reward"), tensors("prefer reward -> safety")
    assert any(not np.array_equal(helpful[name], conservative[name]) for name in helpful)
    for x in q:
        merged = tensors(f"merge q={x:g}")
        assert set(merged) == set(helpful)
        for name, tensor in merged.items():
            expected = (1 - x) * helpful[name].astype(np.float64) + x * conservative[name].astype(np.float64)
            np.testing.assert_array_equal(tensor, expected.astype(tensor.dtype), err_msg=f"q={x}, {name}")
    for end, label in (("p_sacpo q=0", "step reward"), ("p_sacpo q=1", "conservative")):
        same = [{k: v for k, v in record["rows"][name].items() if k != "policy"} for name in (end, label)]
        assert same[0] == same[1]


def test_more_q_cost_no_training(tmp_path: Path) -> None:
    def trained(q: str) -> list[str]:
        _, _, _, nodes = plan(tmp_path, "method=p_sacpo", f"method.q={q}", "method.reported_q=0.5")
        return [node.key for node in nodes.values() if node.stage.name in ("sft", "prefer")]

    assert trained("[0.5]") == trained("[0.1,0.3,0.5,0.7,0.9]")
    assert len(trained("[0.5]")) == 3


def test_p_sacpo_of_two_utilities_merges_the_ends(tmp_path: Path) -> None:
    _, outcome, _, nodes = plan(tmp_path, "method=p_sacpo", *TWO, "method.q=[0.5]", "method.reported_q=0.5")
    merge = nodes["merge q=0.5"]
    assert merge.inputs == {
        "policy_0": nodes["prefer reward"],
        "policy_1": nodes["prefer reward -> safety -> politeness"],
    }
    assert merge.identity.spec.weights == (0.5, 0.5)
    assert outcome.multipliers == {"safety": 0.5, "politeness": 1.0}


# ---------------------------------------------------------------- lambda from the dual, q from validation prompts


def test_lambda_comes_from_the_dual_where_none_is_stated(tmp_path: Path) -> None:
    _, outcome, _, nodes = plan(tmp_path, *TWO[:2], "constraint.beta=0.3")
    solved = nodes["dual"]
    assert solved.inputs == {"responses": nodes["sample bank"], "scores": nodes["score sample bank"]}
    assert nodes["sample bank"].inputs["policy"] is nodes["sft"]
    assert nodes["sample bank"].identity.spec.splits == ("train",)
    assert_chained(nodes)
    first, *utilities = (node for node in nodes.values() if node.stage.name == "prefer")
    assert "multipliers" not in first.inputs
    assert (first.identity.spec.beta, first.identity.spec.ratio_of) == (0.3, None)
    for node, utility in zip(utilities, ("safety", "politeness"), strict=True):
        assert node.inputs["multipliers"] is solved
        assert (node.identity.spec.beta, node.identity.spec.ratio_of) == (0.3, utility)
    assert outcome.duals == {"sacpo": solved}


def test_the_dual_s_lambda_trains_what_the_same_stated_lambda_trains(once: Callable[..., Run], tmp_path: Path) -> None:
    done = once(BANK)
    (multiplier,) = done.record["outcome"]["multipliers"].values()
    bank = bank_of(done, "dual", ["safety"])
    assert margins_of(bank, tilted(bank, 0.5, [multiplier]))[0] == pytest.approx(0.1, abs=1e-9)
    assert done.record["rows"]["sacpo"]["multipliers"] == {"safety": multiplier}
    assert done.record["rows"]["sacpo"]["predicted"]["margins"]["safety"] == pytest.approx(0.1, abs=1e-9)
    assert "multipliers" not in done.record["rows"]["step reward"]
    _, _, _, nodes = plan(tmp_path, f"method.multipliers=[{multiplier!r}]")
    assert "dual" not in {node.stage.name for node in nodes.values()}
    for stated in (f"method.multipliers=[{multiplier!r}]", f"method.beta_over_lambda=[{0.5 / multiplier!r}]"):
        other = once(stated)
        assert other.record["outcome"]["multipliers"]["safety"] == pytest.approx(multiplier, rel=1e-12)
        assert other.weights("prefer reward -> safety") == done.weights("prefer reward -> safety")
        assert other.key("prefer reward -> safety") != done.key("prefer reward -> safety")
    assert once(STATED).weights("prefer reward -> safety") != done.weights("prefer reward -> safety")


def test_q_is_the_smallest_that_meets_the_threshold_on_validation_prompts(once: Callable[..., Run]) -> None:
    q = [0.25, 0.5, 0.75, 1.0]
    settings = ("method=p_sacpo", f"method.q={q}".replace(" ", ""), "method.validation_samples=4", CONSERVATIVE)
    settings += ("method.safety_step.train.learning_rate=1e-2", "method.safety_step.train.epochs=3")
    refused = once(*settings, "constraint.thresholds=[50]").record["outcome"]
    assert (refused["reported"], refused["diagnostics"]["q"]) == ("p_sacpo q=1", 1.0)  # none meets it: the safest
    margin = {x: refused["diagnostics"]["validation_slack"][f"{x:g}"]["safety"] + 50 for x in q}
    threshold = sorted(margin.values())[-2]
    done = once(*settings, f"constraint.thresholds=[{threshold - 1e-9!r}]")
    expected = min(x for x in q if margin[x] >= threshold)
    assert done.record["outcome"]["reported"] == f"p_sacpo q={expected:g}"
    found = done.record["outcome"]["diagnostics"]
    assert (found["q"], found["q_chosen_on"]) == (expected, "validation")
    lambdas = {"safety": pytest.approx(expected * 0.5 / 0.25)}
    assert done.record["outcome"]["multipliers"] == lambdas
    # the slacks themselves, from what was sampled on validation prompts
    validation = {r["prompt_id"] for r in done.artifact("world").jsonl("prompts.jsonl") if r["split"] == "validation"}
    for x in q:
        own, base = (bank_of(done, f"slack q={x:g}", ["safety"], prefix)[..., 1] for prefix in ("", "reference_"))
        assert own.shape == base.shape == (4, 4)
        slack = own.mean() - base.mean() - threshold
        assert found["validation_slack"][f"{x:g}"]["safety"] == pytest.approx(slack, abs=1e-7)
        sampled = done.artifact(f"sample validation q={x:g}")
        assert {row["prompt_id"] for row in sampled.jsonl("responses.jsonl")} == validation
        assert entry(done, f"sample validation q={x:g}")["inputs"]["policy"] == done.key(f"merge q={x:g}")
    assert len(set(margin.values())) > 1


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["method.beta_over_lambda=[0.5,0.5]"], "beta_over_lambda = [0.5, 0.5] for the utilities ['safety']"),
        (["method.beta_over_lambda=[0.0]"], "one positive number per utility"),
        (["method.order=both_first"], "helpful_first or safe_first"),
        (["method.reward_step.loss=hinge"], "hinge"),
        (["method.safety_step.kto_labels=guess"], "preferred or is_safe"),
        (["method=p_sacpo", "method.q=[0.5,1.5]"], "numbers in [0, 1]"),
        (["method=p_sacpo", "method.q=[0.5]", "method.reported_q=0.75"], "reported_q = 0.75 is not among q = [0.5]"),
        (["method=p_sacpo", "method.beta_over_lambda=null"], "conservative on purpose"),
        (["method=p_sacpo", "dataset.world.validation_prompts=0"], "no validation prompt to choose q on"),
        (["method.beta_over_lambda=[0.5]", "method.multipliers=[1]"], "both state lambda"),
        (["method.multipliers=[1,1]"], "one number >= 0 per utility"),
        (["method.multipliers=[-1]"], "one number >= 0 per utility"),
        (["method.dual.splits=[test]"], "no result is reported on"),
        (["method=p_sacpo", "method.order=safe_first"], "method.order=helpful_first"),
    ],
)
def test_settings_that_contradict_are_refused_before_anything_runs(
    tmp_path: Path, overrides: list[str], says: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "store", tmp_path / "out", *overrides)
    assert says in str(refused.value)
    assert not list(tmp_path.glob("store/artifacts/*"))


def test_the_label_columns() -> None:
    columns = [label_column(objective) for objective in ("reward", "safety", "politeness")]
    assert columns == ["better_response_id", "safer_response_id", "politeness_response_id"]
